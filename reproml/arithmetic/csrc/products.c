/* Products of the rows of a tensor, and the products up to each of their elements (operators/products.py), eight rows
   side by side.

   A product is (s + t) 2^e. A factor x changes s to s x, rounded, and t to t x + r, where r is the error of that rounding,
   which fma computes exactly (S. Graillat, Accurate floating-point product and exponentiation, IEEE Transactions on
   Computers 58(7), 2009). After every four factors |s| is in [1, 2) again. So it is at least 2^-596, no r underflows, and
   what t loses below 2^-1074 is far below its bound.

   The bound. Let |t| <= a |s| and |exact - (s + t)| <= b |s|, and a', b' those of a second product; a = b = 0 for one
   factor. The product of both has a + a' + U and b + b' + U (a + 2 a' + 2 U) + a a', up to terms of order U^3. With
   a = i U and a' = j U it follows by induction that a product of n factors, in any order, has a = (n - 1) U and
   b <= 2 (n - 1)^2 U^2, as i + 2 j + 2 + i j <= 2 (i + j + 1)^2 - 2 i^2 - 2 j^2. PAIR_BOUND is twice that.

   A midpoint of two numbers of the target has an odd part of up to 25 bits. That of a product of some of its factors
   divides it, so all these products are exact in binary64, every t is 0, and so is the bound: each tie passes the test. */

#include "compensated.h"
#include "lanes.h"

enum { TILE = 64 }; /* columns at once */

#define PAIR_BOUND(n) (4 * U * U * (double)(n) * (double)(n))

/* One product for each lane; lost: the bits of all its t so far. */
typedef struct {
    double s[LANES], t[LANES];
    int64_t e[LANES], lost[LANES];
} product;

typedef struct {
    integer rows, n, inner;
    const float *x; /* [rows / inner, n, inner] */
    int running;
    float *out;
    failure_list failed;
} call;

/* One row, or a part of one, in each lane. */
typedef struct {
    integer first[LANES], count[LANES]; /* the flat index of its first element, and how many it has */
    integer longest, step;              /* the largest count, and the distance of its elements */
} strip;

/* Numbers in the memory of a thread, those of all lanes for each column. */
typedef struct {
    float x[TILE][LANES], out[TILE][LANES];
    double s[TILE][LANES], t[TILE][LANES];
    int64_t lost[TILE][LANES];
    int32_t failed[TILE][LANES];
} memory;

INLINE void set_one(product *p) {
    for (int l = 0; l < LANES; l++) p->s[l] = 1, p->t[l] = 0, p->e[l] = p->lost[l] = 0;
}

/* By how much e grows if |s| is brought to [1, 2): not for 0, infinity and NaN. */
INLINE int64_t change_of(double s) {
    const int64_t field = pattern(s) >> 52 & 0x7FF;
    return field != 0 && field != 0x7FF ? field - 1023 : 0;
}

INLINE double power(int64_t e) { return from_pattern((e + 1023) << 52); }

/* 2^e, or another power of two beyond the range of the target: |s| < 2^513. */
INLINE double limited_power(int64_t e) {
    e = e < -1000 ? -1000 : e;
    return power(e > 1000 ? 1000 : e);
}

/* Four factors of each lane. With `running`, keep the product up to each of them from a column on. */
INLINE void multiply_columns(product *restrict p, const float *restrict x, integer step, memory *restrict m,
                             integer column, int running) {
    for (int l = 0; l < LANES; l++) {
        const double scale = limited_power(p->e[l]);
        double s = p->s[l], t = p->t[l];
        int64_t lost = p->lost[l];
        for (int j = 0; j < 4; j++) {
            const double y = x[j * step + l], rounded = s * y;
            t = fma(t, y, fma(s, y, -rounded));
            s = rounded;
            lost |= pattern(t);
            if (running) {
                m->s[column + j][l] = s * scale;
                m->t[column + j][l] = t * scale;
                m->lost[column + j][l] = lost;
            }
        }
        const int64_t change = change_of(s);
        p->s[l] = s * power(-change);
        p->t[l] = t * power(-change);
        p->e[l] += change;
        p->lost[l] = lost;
    }
}

/* p = p times the product q in lane k, for lane l. */
INLINE void multiply_lane(product *p, int l, const product *q, int k) {
    const double s = p->s[l] * q->s[k];
    const double t = fma(p->t[l], q->s[k], fma(p->s[l], q->t[k], fma(p->s[l], q->s[k], -s)));
    const int64_t change = change_of(s);
    p->s[l] = s * power(-change);
    p->t[l] = t * power(-change);
    p->e[l] += q->e[k] + change;
    p->lost[l] |= q->lost[k] | pattern(t);
}

/* Round the first columns: s, or where a midpoint is too near, s + t. Infinity, NaN and zero, also by underflow, are
   those of s. Returns nonzero if some have failed. */
INLINE int32_t round_columns(memory *m, integer columns, integer factors) {
    const double *s = m->s[0], *t = m->t[0], minus_rel = -((double)factors + 4) * U * SLACK;
    const int64_t *lost = m->lost[0];
    float *out = m->out[0];
    int32_t *failed = m->failed[0], any = 0, left = 0;
    for (integer i = 0; i < columns * LANES; i++) {
        const int finite = fabs(s[i]) <= DBL_MAX;
        float y;
        const int32_t again = round_signed_sum(s[i], minus_rel * fabs(s[i]), &y);
        out[i] = finite ? y : (float)s[i];
        any |= failed[i] = finite ? again : 0;
    }
    for (integer i = 0; any && i < columns * LANES; i++) {
        const double rad = lost[i] & INT64_MAX ? PAIR_BOUND(factors) * fabs(s[i]) : 0;
        float y;
        const int32_t again = round_pair((pair){s[i], t[i], rad}, &y) != 0;
        out[i] = failed[i] ? y : out[i];
        failed[i] = failed[i] ? again : 0;
        left |= failed[i];
    }
    return left;
}

/* Multiply the factors of each lane; store the products up to each of them if `running`. */
INLINE void multiply(call *c, const strip *rows, product *p, int running, memory *m) {
    integer common = rows->longest; /* elements that lie side by side in all lanes */
    for (integer l = 0; l < LANES; l++) {
        const int beside = rows->first[l] == rows->first[0] + l;
        common = !beside ? 0 : rows->count[l] < common ? rows->count[l] : common;
    }
    for (integer at = 0; at < rows->longest; at += TILE) {
        const integer columns = rows->longest - at < TILE ? rows->longest - at : TILE;
        const integer padded = (columns + 3) / 4 * 4, whole = at + columns <= common ? columns / 4 * 4 : 0;
        const float *x = c->x + at * rows->step;
        for (integer i = 0; i < whole; i += 4)
            multiply_columns(p, x + rows->first[0] + i * rows->step, rows->step, m, i, running);
        for (integer l = 0; l < LANES; l++) {
            const integer left = rows->count[l] - at;
            integer i = whole;
            for (; i < columns && i < left; i++) m->x[i][l] = x[rows->first[l] + i * rows->step];
            for (; i < padded; i++) m->x[i][l] = 1;
        }
        for (integer i = whole; i < columns; i += 4) multiply_columns(p, m->x[i], LANES, m, i, running);
        if (!running) continue;
        const int32_t left = round_columns(m, columns, c->n);
        for (integer l = 0; l < LANES; l++)
            for (integer i = 0; i < columns && at + i < rows->count[l]; i++) {
                const integer to = rows->first[l] + (at + i) * rows->step;
                c->out[to] = m->out[i][l];
                if (left && m->failed[i][l]) add_failure(&c->failed, to);
            }
    }
}

/* Store the products of the first lanes at `to`. */
INLINE void round_products(call *c, const product *p, memory *m, integer count, integer to) {
    for (int l = 0; l < LANES; l++) {
        const double scale = limited_power(p->e[l]);
        m->s[0][l] = p->s[l] * scale;
        m->t[0][l] = p->t[l] * scale;
        m->lost[0][l] = p->lost[l];
    }
    round_columns(m, 1, c->n);
    for (integer l = 0; l < count; l++) {
        c->out[to + l] = m->out[0][l];
        if (m->failed[0][l]) add_failure(&c->failed, to + l);
    }
}

INLINE integer first_of(const call *c, integer row) { return row / c->inner * c->n * c->inner + row % c->inner; }

VECTORISED static void multiply_rows(call *c, integer row) {
    memory m;
    product p;
    strip rows = {{0}, {0}, c->n, c->inner};
    const integer count = c->rows - row < LANES ? c->rows - row : LANES;
    for (integer l = 0; l < count; l++) {
        rows.first[l] = first_of(c, row + l);
        rows.count[l] = c->n;
    }
    set_one(&p);
    multiply(c, &rows, &p, c->running, &m);
    if (!c->running) round_products(c, &p, &m, count, row);
}

/* A long row in eight parts, whose products come first. The parts are contiguous only where that matters. */
VECTORISED static void multiply_parts(call *c, integer row) {
    memory m;
    product parts, before;
    const integer length = (c->n + LANES - 1) / LANES;
    strip rows = {{0}, {0}, length, c->running ? c->inner : c->inner * LANES};
    for (integer l = 0; l < LANES; l++) {
        const integer first = c->running ? l * length : l, left = c->n - first;
        const integer count = c->running ? left : (left + LANES - 1) / LANES;
        rows.first[l] = first_of(c, row) + first * c->inner;
        rows.count[l] = count < 0 ? 0 : count < length ? count : length;
    }
    set_one(&parts);
    multiply(c, &rows, &parts, 0, &m);
    set_one(&before);
    for (int l = 0; l < LANES; l++)
        for (int k = 0; k < l; k++) multiply_lane(&before, l, &parts, k);
    if (c->running) {
        multiply(c, &rows, &before, 1, &m);
        return;
    }
    multiply_lane(&before, LANES - 1, &parts, LANES - 1);
    before.s[0] = before.s[LANES - 1], before.t[0] = before.t[LANES - 1];
    before.e[0] = before.e[LANES - 1], before.lost[0] = before.lost[LANES - 1];
    round_products(c, &before, &m, 1, row);
}

static int in_parts(const call *c) { return c->rows < LANES && c->n > TILE; }

static void run_products(integer task, void *data) {
    call *c = data;
    if (in_parts(c))
        multiply_parts(c, task);
    else
        multiply_rows(c, task * LANES);
}

/* out [outer, inner] = the products of x [outer, n, inner] over its second axis, or with `running` out [outer, n, inner]
   those up to each element. */
integer reproml_row_products(integer outer, integer n, integer inner, const float *x, int running, float *out,
                             integer *failed, integer capacity) {
    call c = {outer * inner, n, inner, x, running, out, {failed, capacity, 0}};
    run_tasks(run_products, &c, in_parts(&c) ? c.rows : (c.rows + LANES - 1) / LANES, c.rows * n > 32768);
    return c.failed.count;
}

/* ---- products of the numbers that have the same index ---- */

typedef struct {
    double s, t;
    int64_t e, lost;
} segment;

INLINE void multiply_segment(segment *p, double y) {
    const double s = p->s * y, t = fma(p->t, y, fma(p->s, y, -s));
    const int64_t change = change_of(s);
    p->s = s * power(-change);
    p->t = t * power(-change);
    p->e += change;
    p->lost |= pattern(t);
}

VECTORISED static void multiply_segments(integer n, integer size, const integer *index, const float *x,
                                         segment *segments, float *out, failure_list *failed) {
    memory m;
    for (integer i = 0; i < size; i++) segments[i] = (segment){1, 0, 0, 0};
    for (integer i = 0; i < n; i++) multiply_segment(segments + index[i], x[i]);
    for (integer first = 0; first < size; first += TILE * LANES) {
        const integer count = size - first < TILE * LANES ? size - first : TILE * LANES;
        for (integer i = 0; i < TILE * LANES; i++) {
            const segment p = i < count ? segments[first + i] : (segment){1, 0, 0, 0};
            m.s[i / LANES][i % LANES] = p.s * limited_power(p.e);
            m.t[i / LANES][i % LANES] = p.t * limited_power(p.e);
            m.lost[i / LANES][i % LANES] = p.lost;
        }
        const int32_t left = round_columns(&m, TILE, n);
        for (integer i = 0; i < count; i++) {
            out[first + i] = m.out[i / LANES][i % LANES];
            if (left && m.failed[i / LANES][i % LANES]) add_failure(failed, first + i);
        }
    }
}

/* out [size] = the products of x [n] at each index, 1 where there is none. */
integer reproml_segment_products(integer n, integer size, const integer *index, const float *x, float *out,
                                 integer *failed, integer capacity) {
    failure_list list = {failed, capacity, 0};
    segment *segments = reproml_scratch((size_t)size * sizeof(segment));
    for (integer i = 0; i < n; i++)
        if (index[i] < 0 || index[i] >= size) return -1;
    if (!segments) return -1;
    multiply_segments(n, size, index, x, segments, out, &list);
    return list.count;
}
