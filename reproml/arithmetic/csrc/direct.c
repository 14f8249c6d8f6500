/* Formulas that are asked for most, each in a loop of its own: what tape.c does for any formula, for these in
   one pass, with just as much precision as the rounding test needs (about 2^-47; one element in a million
   fails) and a bound found by hand, which has U of room for the rounding of c - e and c + e. What fails goes to
   tape.c, and from there to the definition. */

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast") /* within every bound below, and no product enters a two_sum but exact ones */
#endif

#include "ball.h"
#include "elementary.h"
#include "rows.h"

/* As in compiled.py. */
enum {
    EXP,
    EXPM1,
    TANH,
    SIGMOID,
    SILU,
    GELU,
    TANH_BACKWARD,
    SIGMOID_BACKWARD,
    SILU_BACKWARD,
    GELU_BACKWARD,
    SOFTMAX,
    LOG_SOFTMAX,
    SOFTMAX_BACKWARD,
    LOG_SOFTMAX_BACKWARD
};
enum { BLOCK = 256, ROOM = 2048, LANES = 16, TASKS = 64 };

/* A number and an absolute bound of its error. */
typedef struct {
    double c, e;
} ball;

/* ---- one element ---- */

/* exp(x) = scale (1 + p), for |x| <= 700. x = k ln 2 + r, |r| <= 0.3466, as in elementary.py; p = expm1(r) = r + r^2 Q(r), Q of degree 8 at the Chebyshev
   nodes. p's error is below 2^-48.3 of p and of 1 + p; roundings add 3 U of p. So exp errs by EXP_ERROR. */
#define EXP_ERROR 0x1p-48
INLINE double exp_parts(double x, double *scale) {
    double shifted = x * 1.4426950408889634 + 0x1.8p52, k = shifted - 0x1.8p52; /* k in the last bits of the first */
    double r = (x - k * 0x1.62e42fefap-1) - k * 0x1.cf79abc9e3b3ap-40, y = 0x1.28803a9f7bb01p-22;
    y = y * r + 0x1.72c722e81c5f2p-19;
    y = y * r + 0x1.a019c9aa11c0bp-16;
    y = y * r + 0x1.a019adaa6411ep-13;
    y = y * r + 0x1.6c16c1738f05cp-10;
    y = y * r + 0x1.1111111c46274p-7;
    y = y * r + 0x1.5555555554cb8p-5;
    y = y * r + 0x1.5555555553b7cp-3;
    y = y * r + 0x1p-1;
    *scale = number((int64_t)((uint64_t)(pattern(shifted) + 1023) << 52));
    return r + r * r * y;
}

/* Below -700, where binary32 is long at its end, the value there is taken; above 700 the bound refuses. */
INLINE double at_least(double x) { return x < -700 ? -700 : x; }
#define EXP_HIGH(x, r) ((x) > 700 ? INFINITY : (r))

/* For x <= 700. */
INLINE double fast_exp(double x) {
    double scale, p = exp_parts(at_least(x), &scale);
    return scale + scale * p;
}

/* scale p + (scale - 1): the first is p itself where k = 0, and no larger than the sum elsewhere, so the error stays
   below 2^-48.3 + 5 U < EXP_ERROR. */
INLINE double fast_expm1(double x) {
    double scale, p = exp_parts(at_least(x), &scale);
    return copysign(scale * p + (scale - 1), x);
}

INLINE ball relative(double c, double r) { return (ball){c, fabs(c) * r}; }

/* The rounding test for normal numbers and exact zeros, which are most, in few instructions: TINY is nothing to
   them, and SLACK less than the bound's room. c - e has the sign of a zero c. */
INLINE int32_t surely(ball v, float *result) {
    float low = (float)(v.c - v.e), high = (float)(v.c + v.e);
    uint32_t above = ((uint32_t)bits(low) & 0x7FFFFFFF) - 0x00800000;
    *result = low;
    return (low == high) & ((above < 0x7F000000) | (fabs(v.c) + v.e == 0));
}

/* -t / (2 + t), t = expm1(-2 |x|) in (-1, 0]: both parts err by EXP_ERROR at most, the quotient by twice that and 3 U. */
INLINE ball tanh_ball(double x) {
    double t = fast_expm1(-2 * fabs(x));
    return relative(copysign(t / (2 + t), x), 0x1.1p-47);
}

/* sigmoid(x), and sigmoid(-x): 1 / (1 + t) and t / (1 + t), t = exp(-|x|). t errs by EXP_ERROR, 1 + t by half of it and
   U, the rest by 2 U: together below 1.6 EXP_ERROR. */
#define SIGMOID_ERROR 0x1.ap-48
INLINE double sigmoid_pair(double x, double *other) {
    double t = fast_exp(-fabs(x)), inverse = 1 / (1 + t), product = t * inverse;
    *other = x < 0 ? inverse : product;
    return x < 0 ? product : inverse;
}

INLINE ball sigmoid_ball(double x) {
    double other;
    return relative(sigmoid_pair(x, &other), SIGMOID_ERROR);
}

INLINE ball silu_ball(double x) {
    double other;
    return relative(x * sigmoid_pair(x, &other), SIGMOID_ERROR + 2 * U);
}

/* g f, f within e of c. Its sign has to be sure even where g is 0. */
INLINE ball times(double g, double c, double e) {
    return (ball){g * c, fabs(c) > e ? fabs(g) * e + 2 * U * fabs(g * c) : INFINITY};
}

/* s (1 + x sigmoid(-x)): the second factor cancels, by an error of 1 + |x| sigmoid(-x). */
INLINE ball silu_backward_ball(double g, double x) {
    double other, s = sigmoid_pair(x, &other), a = x * other;
    return times(g, s * (1 + a), s * (1 + fabs(a)) * (2 * SIGMOID_ERROR + 8 * U));
}

/* Phi(x), x exact, and exp(-x^2 / 2), whose argument is exact too. Phi(-t) = exp(-t^2 / 2) w P(q) for 0 <= t <= 8,
   w = 1 / (t + 6), q = 1 - 12 w, P of degree 15 at the Chebyshev nodes in q, within 2^-48.7. In units of U: q
   is off by 5, times P' / P < 1.9; Horner's scheme by 4; the products by 4: 18 U and EXP_ERROR. Above 0
   1 - Phi(-x) is no worse; Phi(-8) < 2^-50 stands in for smaller ones there. Below -8 PHI_LOW refuses. */
#define PHI_ERROR 0x1.2p-47
#define PHI_LOW(x, e) ((x) < -8 ? INFINITY : (e))
INLINE double phi(double x, double *bell) {
    double t = fabs(x) > 8 ? 8 : fabs(x), w = 1 / (t + 6), q = 1 - 12 * w, y = 0x1.cb51e75d95823p-19;
    y = y * q + 0x1.61555d073a9adp-16;
    y = y * q + 0x1.7b201b8c6b81bp-16;
    y = y * q - 0x1.7148796b26686p-15;
    y = y * q + 0x1.9811e23ecbed8p-13;
    y = y * q + 0x1.4195927453580p-15;
    y = y * q - 0x1.17391e2cdcc32p-9;
    y = y * q + 0x1.48a8f521f7823p-7;
    y = y * q - 0x1.fba9ffca2866ep-6;
    y = y * q + 0x1.33e774cb9d4bap-4;
    y = y * q - 0x1.38b069e40eb1cp-3;
    y = y * q + 0x1.1267d73ad4c17p-2;
    y = y * q - 0x1.a7d657723b7f2p-2;
    y = y * q + 0x1.234fe3fd90cd2p-1;
    y = y * q - 0x1.66eaa7d096597p-1;
    y = y * q + 0x1.8e010d2b8a0f0p-1;
    *bell = fast_exp(-0.5 * (x * x));
    double tail = *bell * (w * y);
    return x < 0 ? tail : 1 - tail;
}

INLINE ball gelu_ball(double x) {
    double bell, c = x * phi(x, &bell);
    return (ball){c, PHI_LOW(x, fabs(c) * (PHI_ERROR + 4 * U))};
}

/* Phi(x) + x density(x), which cancels below 0. */
INLINE ball gelu_backward_ball(double g, double x) {
    double bell, c = phi(x, &bell), a = x * (bell * 0x1.9884533d43651p-2);
    return times(g, c + a, PHI_LOW(x, (c + fabs(a)) * (PHI_ERROR + 4 * U)));
}

#define EACH(NAME, BALL)                             \
    case NAME:                                       \
        for (integer i = 0; i < count; i++) {        \
            const double x = a[i], y = b[i];         \
            unsure += 1 - surely(BALL, &out[i]);     \
            (void)x, (void)y;                        \
        }                                            \
        if (!unsure) break;                          \
        for (integer i = 0; i < count; i++) {        \
            const double x = a[i], y = b[i];         \
            const ball v = BALL;                     \
            sure[i] = settled(v.c, 0, v.e, &out[i]); \
            (void)x, (void)y;                        \
        }                                            \
        break;

/* out: of operands a and b (or only of a). Returns 0 if `sure` tells which are. */
VECTORISED int32_t reproml_direct_elements(int which, const float *restrict a, const float *restrict b,
                                           float *restrict out, int32_t *restrict sure, integer count) {
    int32_t unsure = 0;
    switch (which) {
        EACH(EXP, relative(fast_exp(x), EXP_HIGH(x, EXP_ERROR)))
        EACH(EXPM1, relative(fast_expm1(x), EXP_HIGH(x, EXP_ERROR)))
        EACH(TANH, tanh_ball(x))
        EACH(SIGMOID, sigmoid_ball(x))
        EACH(SILU, silu_ball(x))
        EACH(GELU, gelu_ball(x))
        EACH(TANH_BACKWARD, relative(x * (1 - y * y), 4 * U)) /* y^2 is exact */
        EACH(SIGMOID_BACKWARD, relative(x * y * (1 - y), 4 * U))
        EACH(SILU_BACKWARD, silu_backward_ball(x, y))
        EACH(GELU_BACKWARD, gelu_backward_ball(x, y))
    }
    return !unsure;
}

/* ---- rows ---- */

/* Some rows of n numbers each, n <= ROOM, and what is calculated of them. */
typedef struct {
    const float *x, *y;
    float *out;
    integer rows, n;
    double wide[ROOM], bound[ROOM]; /* of each number */
    double of_row[ROOM], error[ROOM];
    float x_[ROOM], y_[ROOM], out_[ROOM];
    int32_t sure[ROOM];
} table;

/* Additions on a number's way through `sum`, and room for two more. */
INLINE double height(integer n) { return n / LANES + 8; }

INLINE double sum(const double *x, integer n) {
    double part[LANES] = {0}, total = 0;
    integer i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) part[l] += x[i + l];
    if (i)
        for (int width = LANES / 2; width; width /= 2)
            for (int l = 0; l < width; l++) part[l] += part[l + width];
    for (integer j = i; j + 4 <= n; j += 4) total += (x[j] + x[j + 1]) + (x[j + 2] + x[j + 3]);
    for (integer j = n - (n - i) % 4; j < n; j++) total += x[j];
    return part[0] + total;
}

/* The sum of x y, whose terms are exact, or of x alone, and a bound of its error: what TwoSum lost is summed too, so
   only that sum's own roundings count, and a sum without any is exact. */
INLINE ball exact_sum(const float *x, const float *y, integer n) {
    double part[LANES] = {0}, lost[LANES] = {0}, size[LANES] = {0}, term[LANES], more;
    for (integer i = 0; i < n; i += LANES) {
        const int count = n - i < LANES ? (int)(n - i) : LANES;
        if (count == LANES)
            for (int l = 0; l < LANES; l++) term[l] = y ? (double)x[i + l] * y[i + l] : x[i + l];
        else
            for (int l = 0; l < LANES; l++) term[l] = l >= count ? 0 : y ? (double)x[i + l] * y[i + l] : x[i + l];
        for (int l = 0; l < LANES; l++) {
            two_sum(part[l], term[l], &part[l], &more);
            lost[l] += more;
            size[l] += fabs(more);
        }
    }
    for (int width = LANES / 2; width; width /= 2)
        for (int l = 0; l < width; l++) {
            two_sum(part[l], part[l + width], &part[l], &more);
            lost[l] += lost[l + width] + more;
            size[l] += size[l + width] + fabs(more);
        }
    two_sum(part[0], lost[0], &part[0], &more);
    return (ball){part[0], fabs(more) + 2 * (n + LANES) * U * size[0]};
}

/* Of numbers; a NaN among them may be passed over. */
INLINE float largest(const float *x, integer n) {
    float part[LANES], top = x[0];
    integer i = 0;
    if (n >= LANES) {
        for (int l = 0; l < LANES; l++) part[l] = x[l];
        for (i = LANES; i + LANES <= n; i += LANES)
            for (int l = 0; l < LANES; l++) part[l] = x[i + l] > part[l] ? x[i + l] : part[l];
        for (int l = 0; l < LANES; l++) top = part[l] > top ? part[l] : top;
    }
    for (; i < n; i++) top = x[i] > top ? x[i] : top;
    return top;
}

/* wide: x minus the row's largest; 0 <= error: of its exponential, relatively. Above -128 a difference that
   TwoSum finds to be rounded adds 128 U; below, both its exponential and the one calculated are below 2^-184 of
   the sum, and vanish in binary32. */
INLINE void shift(table *t) {
    for (integer r = 0; r < t->rows; r++) {
        const float *x = t->x + r * t->n;
        const double top = largest(x, t->n);
        double *d = t->wide + r * t->n, lost;
        int64_t inexact = 0;
        for (integer i = 0; i < t->n; i++) {
            two_sum(x[i], -top, &d[i], &lost);
            inexact |= lost != 0;
        }
        t->error[r] = EXP_ERROR + (inexact ? 128 * U : 0);
    }
}

/* exp(d) / sum, in a multiplication by the inverse. Infinite and NaN rows come out as NaN, and fail. */
INLINE void softmax(table *t) {
    const integer count = t->rows * t->n;
    shift(t);
    for (integer i = 0; i < count; i++) {
        double d = t->wide[i], e = fast_exp(d);
        t->wide[i] = d == -INFINITY ? 0 : e;
    }
    for (integer r = 0; r < t->rows; r++) {
        t->of_row[r] = 1 / sum(t->wide + r * t->n, t->n);
        t->error[r] = 2 * t->error[r] + (height(t->n) + 4) * U;
    }
}

/* d - log1p(the sum of exp over all but one of the largest): both have one sign, so nothing cancels; log1p passes
   on the relative error of its operand, and adds 2^-49. */
INLINE void log_softmax(table *t) {
    const integer count = t->rows * t->n;
    double e[ROOM];
    shift(t);
    for (integer i = 0; i < count; i++) {
        double d = t->wide[i], y = fast_exp(d);
        e[i] = d < 0 ? (d == -INFINITY ? 0 : y) : d + 1; /* 1, or NaN, which fails */
    }
    for (integer r = 0; r < t->rows; r++) {
        double *of = e + r * t->n, *first = of;
        const double *d = t->wide + r * t->n;
        while (first < of + t->n - 1 && d[first - of] != 0) first++;
        *first -= 1;
        t->of_row[r] = sum(of, t->n);
        t->error[r] += 0x1p-49 + (height(t->n) + 4) * U;
    }
    for (integer r = 0; r < t->rows; r++) t->of_row[r] = log1p_(t->of_row[r]);
}

/* From what is known of a row, its results and their bounds. */
INLINE void finish_row(table *t, integer r, int which) {
    const float *x = t->x + r * t->n, *y = t->y + r * t->n;
    double *wide = t->wide + r * t->n, *bound = t->bound + r * t->n;
    const double s = t->of_row[r], e = t->error[r];
    for (integer i = 0; i < t->n; i++) {
        double c;
        if (which == SOFTMAX) {
            c = wide[i] * s;
            bound[i] = c * e;
        } else if (which == LOG_SOFTMAX) {
            c = wide[i] - s;
            bound[i] = fabs(c) * e;
        } else if (which == SOFTMAX_BACKWARD) { /* y (g - s) */
            c = y[i] * (x[i] - s);
            bound[i] = fabs((double)y[i]) * e + 3 * U * fabs(c);
        } else { /* g - exp(y) s; exp(y) is wide, its error 2^-51, none where it is 0 or 1 */
            double p = wide[i] * s;
            c = x[i] - p;
            bound[i] = wide[i] * e + (y[i] == 0 ? 0 : fabs(p) * (0x1p-51 + U)) + 2 * U * fabs(c);
        }
        wide[i] = c + 0.0; /* an exact zero of a row is +0 */
    }
}

INLINE void settle_all(table *t, int which) {
    const integer count = t->rows * t->n;
    int32_t all = 1;
    for (integer r = 0; r < t->rows; r++) finish_row(t, r, which);
    for (integer i = 0; i < count; i++) {
        t->sure[i] = surely((ball){t->wide[i], t->bound[i]}, &t->out[i]);
        all &= t->sure[i];
    }
    if (all) return;
    for (integer i = 0; i < count; i++) {
        t->sure[i] = settled(t->wide[i], 0, t->bound[i], &t->out[i]);
        if (which == LOG_SOFTMAX) t->sure[i] |= t->wide[i] == -INFINITY;
    }
}

#define ROWS(NAME, BEFORE)   \
    case NAME:               \
        BEFORE;              \
        settle_all(t, NAME); \
        break;

INLINE void sums(table *t, int product) {
    for (integer r = 0; r < t->rows; r++) {
        ball s = exact_sum(t->x + r * t->n, product ? t->y + r * t->n : 0, t->n);
        t->of_row[r] = s.c, t->error[r] = s.e;
    }
}

INLINE void exponentials(table *t) {
    for (integer i = 0; i < t->rows * t->n; i++) t->wide[i] = t->y[i] == -INFINITY ? 0 : exp_(t->y[i]);
}

VECTORISED void reproml_direct_rows(int which, table *t) {
    switch (which) {
        ROWS(SOFTMAX, softmax(t))
        ROWS(LOG_SOFTMAX, log_softmax(t))
        ROWS(SOFTMAX_BACKWARD, sums(t, 1))
        ROWS(LOG_SOFTMAX_BACKWARD, (sums(t, 0), exponentials(t)))
    }
}

/* ---- the calls ---- */

typedef struct {
    int which, operands;
    integer dims, rows, n, per_item, items, tasks;
    const integer *sizes, *strides;
    void *const *pointers;
    integer *failed, found[TASKS], start[TASKS];
} call;

static integer note(const int32_t *sure, integer count, integer first, integer *failed) {
    integer found = 0;
    for (integer i = 0; i < count; i++)
        if (!sure[i]) failed[found++] = first + i;
    return found;
}

static void run_elements(const call *c, integer first, integer count, integer *failed, integer *found) {
    int32_t sure[BLOCK];
    const float *a = (const float *)c->pointers[0] + first, *b = (const float *)c->pointers[c->operands - 1] + first;
    float *out = (float *)c->pointers[c->operands] + first;
    if (!reproml_direct_elements(c->which, a, b, out, sure, count)) *found += note(sure, count, first, failed + *found);
}

/* The rows of an operand, one after the other. */
static const float *gathered(const call *c, int operand, integer row, integer rows, float *memory) {
    const integer *strides = c->strides + operand * c->dims, step = strides[c->dims - 1];
    const float *x = c->pointers[operand];
    if (dense_rows(c->dims, strides, c->n)) return x + row * c->n;
    for (integer r = 0; r < rows; r++) {
        const float *from = x + row_start(c->dims, c->sizes, strides, row + r);
        for (integer i = 0; i < c->n; i++) *memory++ = from[i * step];
    }
    return memory - rows * c->n;
}

static void run_rows(const call *c, integer row, integer rows, table *t, integer *failed, integer *found) {
    const integer *strides = c->strides + c->operands * c->dims, step = strides[c->dims - 1];
    t->rows = rows;
    t->n = c->n;
    t->x = gathered(c, 0, row, rows, t->x_);
    t->y = c->operands > 1 ? gathered(c, 1, row, rows, t->y_) : t->x;
    const int dense = dense_rows(c->dims, strides, c->n);
    t->out = dense ? (float *)c->pointers[c->operands] + row * c->n : t->out_;
    reproml_direct_rows(c->which, t);
    for (integer r = 0; r < rows && !dense; r++) {
        float *to = (float *)c->pointers[c->operands] + row_start(c->dims, c->sizes, strides, row + r);
        for (integer i = 0; i < c->n; i++) to[i * step] = t->out[r * c->n + i];
    }
    *found += note(t->sure, rows * c->n, row * c->n, failed + *found);
}

static void run_items(integer task, void *data) {
    call *c = data;
    table t;
    const integer first = c->items * task / c->tasks * c->per_item;
    integer end = c->items * (task + 1) / c->tasks * c->per_item, found = 0;
    if (end > c->rows) end = c->rows;
    integer *failed = c->failed + first * c->n;
    for (integer at = first; at < end; at += c->per_item) {
        integer count = end - at < c->per_item ? end - at : c->per_item;
        if (c->which < SOFTMAX)
            run_elements(c, at, count, failed, &found);
        else
            run_rows(c, at, count, &t, failed, &found);
    }
    c->start[task] = first * c->n;
    c->found[task] = found;
}

/* As reproml_tape, of float32 operands: elementwise ones dense, in one dimension; rows of up to ROOM numbers. */
integer reproml_direct(int which, integer dims, const integer *sizes, const integer *strides, void *const *pointers,
                       integer *failed, integer tasks) {
    const int pairs = (which >= TANH_BACKWARD && which < SOFTMAX) || which >= SOFTMAX_BACKWARD;
    call c = {.which = which, .operands = 1 + pairs, .dims = dims, .rows = 1, .n = 1, .sizes = sizes};
    c.strides = strides, c.pointers = pointers, c.failed = failed;
    for (integer d = 0; d < dims; d++) c.rows *= sizes[d];
    if (which >= SOFTMAX) c.n = sizes[dims - 1], c.rows /= c.n;
    c.per_item = which < SOFTMAX ? BLOCK : c.n < ROOM / 2 ? ROOM / 2 / c.n : 1; /* in the nearest cache */
    c.items = (c.rows + c.per_item - 1) / c.per_item;
    c.tasks = tasks < c.items ? tasks : c.items;
    if (c.tasks > TASKS) c.tasks = TASKS;
    reproml_parallel(run_items, &c, c.tasks);
    return together(failed, c.start, c.found, c.tasks);
}
