/* Sums and dot products over any axes of strided arrays: dot.sum_over has the method.

   The sums go over low trees (lanes.h), which makes the bound small. What fails the test all the same is
   summed again with its errors kept. */

#include "compensated.h"
#include "lanes.h"

#define AXES 12
#define WIDTH 128  /* sums side by side */
#define FEW 16     /* terms of a sum that is a tie too often for a test that has to leave room */
#define SLICES 8   /* parts of one long sum */
#define PART 32768 /* terms that are worth a thread */

typedef struct {
    integer size, x, y; /* length, and the strides of x and y */
} axis;

typedef struct {
    const float *x, *y; /* y: null, or the other factor */
    float *out;
    double divisor;
    axis kept[AXES], column, p, q; /* column: the last of the kept axes; p, q: summed */
    int outer;                     /* kept axes but for the column */
    int along;                     /* vectors run along q, not along the column */
    int few;                       /* terms: the sizes are those of the rounding errors alone */
    integer width, chunks, slices; /* sums at once; such chunks in a column; parts of q */
    double *parts;
    failures failed;
} sums;

INLINE double term(const float *x, const float *y, integer i, integer j) { return y ? (double)x[i] * y[j] : x[i]; }

/* One sum over p and over q from `first` to `last`, where q is contiguous. Returns the height of the tree. */
INLINE integer along_q(const sums *k, const float *x, const float *y, integer first, integer last, double *s,
                       double *a) {
    const runs r = {.x = x + first,
                    .y = y ? y + first : 0,
                    .x_stride = k->p.x,
                    .y_stride = k->p.y,
                    .runs = k->p.size,
                    .length = last - first};
    double total[2];
    integer height = y ? sum_runs(PRODUCTS, &r, total) : sum_runs(NUMBERS, &r, total);
    *s = total[0];
    *a = total[1];
    return height;
}

INLINE void empty(double *restrict from, double *restrict to, integer count) {
    for (integer i = 0; i < count; i++) {
        to[i] += from[i];
        from[i] = 0;
    }
}

/* `count` sums side by side, over `rows` elements of q. */
INLINE void add_rows(const float *x, const float *y, axis q, axis column, integer rows, integer count, double *s,
                     double *a) {
    integer r = 0;
    for (; r + 4 <= rows; r += 4)
        for (integer i = 0; i < count; i++) {
            double d[4];
            for (int t = 0; t < 4; t++) d[t] = term(x, y, (r + t) * q.x + i * column.x, (r + t) * q.y + i * column.y);
            s[i] += (d[0] + d[1]) + (d[2] + d[3]);
            a[i] += (fabs(d[0]) + fabs(d[1])) + (fabs(d[2]) + fabs(d[3]));
        }
    for (; r < rows; r++)
        for (integer i = 0; i < count; i++) {
            double d = term(x, y, r * q.x + i * column.x, r * q.y + i * column.y);
            s[i] += d;
            a[i] += fabs(d);
        }
}

/* A few terms of `count` sums: s + an error of at most a. Mostly a is 0. */
INLINE void add_few(const sums *k, const float *x, const float *y, axis column, integer count, double *restrict s,
                    double *restrict a) {
    for (integer i = 0; i < count; i++) s[i] = a[i] = 0;
    for (integer p = 0; p < k->p.size; p++)
        for (integer q = 0; q < k->q.size; q++) {
            const float *from = x + p * k->p.x + q * k->q.x, *with = y ? y + p * k->p.y + q * k->q.y : 0;
            for (integer i = 0; i < count; i++) {
                double error;
                two_sum(s[i], term(from, with, i * column.x, i * column.y), s + i, &error);
                a[i] += fabs(error);
            }
        }
}

/* `count` <= WIDTH sums side by side, over p and over q from `first` to `last`. */
INLINE integer across_columns(const sums *k, const float *x, const float *y, integer first, integer last, integer count,
                              double *s, double *a) {
    double some_s[WIDTH], some_a[WIDTH];
    integer steps = 0, taken = 0, emptied = 1;
    const axis unit = {k->column.size, 1, 1};
    for (integer i = 0; i < count; i++) s[i] = a[i] = some_s[i] = some_a[i] = 0;
    for (integer p = 0; p < k->p.size; p++)
        for (integer at = first; at < last; at += 4 * STEPS) {
            integer rows = last - at < 4 * STEPS ? last - at : 4 * STEPS;
            const float *from = x + p * k->p.x + at * k->q.x, *with = y ? y + p * k->p.y + at * k->q.y : 0;
            if (k->column.x == 1 && !y)
                add_rows(from, 0, k->q, unit, rows, count, some_s, some_a);
            else
                add_rows(from, with, k->q, k->column, rows, count, some_s, some_a);
            steps += rows / 4 + rows % 4;
            if (steps >= STEPS) {
                empty(some_s, s, count);
                empty(some_a, a, count);
                taken = steps > taken ? steps : taken;
                emptied++;
                steps = 0;
            }
        }
    for (integer i = 0; i < count; i++) {
        s[i] += some_s[i];
        a[i] += some_a[i];
    }
    return (steps > taken ? steps : taken) + emptied + 2;
}

/* Where the sums of this chunk begin in x and y; *out: the index of the first of them; returns their number. */
static integer locate(const sums *k, integer chunk, const float **x, const float **y, integer *out) {
    integer row = chunk / k->chunks, i = chunk % k->chunks * k->width;
    *out = row * k->column.size + i;
    *x = k->x + i * k->column.x;
    *y = k->y ? k->y + i * k->column.y : 0;
    for (int d = k->outer - 1; d >= 0; d--) {
        integer at = row % k->kept[d].size;
        row /= k->kept[d].size;
        *x += at * k->kept[d].x;
        if (*y) *y += at * k->kept[d].y;
    }
    return k->column.size - i < k->width ? k->column.size - i : k->width;
}

static int settle_with_errors(const sums *k, const float *x, const float *y, float *result) {
    compensated sum = {0, 0, 0};
    for (integer p = 0; p < k->p.size; p++)
        for (integer q = 0; q < k->q.size; q++)
            add_exact(&sum, term(x, y, p * k->p.x + q * k->q.x, p * k->p.y + q * k->q.y));
    pair value = pair_of(&sum, k->p.size * k->q.size);
    if (k->divisor != 1) value = divided(value, k->divisor);
    return settle_pair(value.s, value.t, value.e, result);
}

INLINE double bound(const sums *k, double s, double a, double g, int whole) {
    double lost = a / fabs(k->divisor) * SLACK + 4 * U * fabs(s / k->divisor);
    if (!k->few) return g * a;
    return (whole && a == 0) || !(a <= DBL_MAX) ? 0 : lost; /* an infinite s has no error */
}

/* Round the sums s of one chunk, |s - exact| <= gamma_height * a, of few terms a. Bit patterns are compared, so that not
   even the sign of a zero comes from s. */
INLINE void round_chunk(sums *k, integer chunk, const double *s, const double *a, integer height) {
    const float *x, *y;
    integer first, count = locate(k, chunk, &x, &y, &first);
    float *out = k->out + first;
    double g = ((double)height + 4) * U * SLACK / fabs(k->divisor), divisor = k->divisor;
    int32_t differ = 0;
    int power, whole = fabs(frexp(divisor, &power)) == 0.5;
    for (integer i = 0; i < count; i++) {
        double c = s[i] / divisor, e = bound(k, s[i], a[i], g, whole);
        out[i] = (float)(c + e);
        differ |= bits((float)(c - e)) ^ bits(out[i]);
    }
    for (integer i = 0; differ && i < count; i++) {
        double c = s[i] / divisor, e = bound(k, s[i], a[i], g, whole);
        if (!(fabs(s[i]) <= DBL_MAX))
            out[i] = (float)c; /* infinite or NaN, whatever the order */
        else if (bits((float)(c - e)) != bits(out[i]) &&
                 !settle_with_errors(k, x + i * k->column.x, y ? y + i * k->column.y : 0, out + i))
            reproml_fail(&k->failed, first + i);
    }
}

VECTORISED static void add_up(integer task, void *data) {
    sums *k = data;
    double memory[2 * WIDTH];
    const float *x, *y;
    integer chunk = task / k->slices, slice = task % k->slices, height = 0, at;
    integer share = (k->q.size + k->slices - 1) / k->slices, first = slice * share, last = first + share;
    integer count = locate(k, chunk, &x, &y, &at);
    double *s = k->parts ? k->parts + task * (2 * WIDTH + 1) : memory, *a = s + WIDTH;
    if (last > k->q.size) last = k->q.size;
    if (k->few && k->column.x == 1 && !y)
        add_few(k, x, 0, (axis){0, 1, 1}, count, s, a);
    else if (k->few)
        add_few(k, x, y, k->column, count, s, a);
    else if (!k->along)
        height = across_columns(k, x, y, first, last, count, s, a);
    else
        for (integer i = 0; i < count; i++)
            height = along_q(k, x + i * k->column.x, y ? y + i * k->column.y : 0, first, last, s + i, a + i);
    if (k->parts)
        s[2 * WIDTH] = (double)height;
    else
        round_chunk(k, chunk, s, a, height);
}

/* The slices of each sum together. */
static void join(sums *k, integer chunks) {
    for (integer chunk = 0; chunk < chunks; chunk++) {
        double *s = k->parts + chunk * k->slices * (2 * WIDTH + 1), height = s[2 * WIDTH];
        for (integer slice = 1; slice < k->slices; slice++) {
            const double *more = s + slice * (2 * WIDTH + 1);
            for (integer i = 0; i < 2 * WIDTH; i++) s[i] += more[i];
            if (more[2 * WIDTH] > height) height = more[2 * WIDTH];
        }
        round_chunk(k, chunk, s, s + WIDTH, (integer)height + k->slices);
    }
}

/* Append an axis, merged with the one before where both are one in memory. */
static int append(axis *axes, int count, axis next) {
    axis *last = axes + count - 1;
    if (next.size == 1) return count;
    if (count && last->x == next.size * next.x && last->y == next.size * next.y) {
        next.size *= last->size;
        *last = next;
        return count;
    }
    axes[count] = next;
    return count + 1;
}

static void sort(axis *axes, int count) { /* the longest stride first */
    for (int i = 1; i < count; i++)
        for (int j = i; j && axes[j - 1].x < axes[j].x; j--) {
            axis swapped = axes[j];
            axes[j] = axes[j - 1];
            axes[j - 1] = swapped;
        }
}

/* The axes of x and y as this file wants them; 0 if they are too many. */
static int arrange(sums *k, const integer *axes, int rank, integer reduced) {
    axis summed[AXES], merged[AXES];
    int count = 0, outer = 0, left = 0;
    const axis unit = {1, 0, 0};
    if (rank > AXES) return 0;
    for (int d = 0; d < rank; d++) {
        axis next = {axes[d], axes[rank + d], axes[2 * rank + d]};
        if (reduced >> d & 1)
            summed[count++] = next;
        else
            outer = append(k->kept, outer, next);
    }
    sort(summed, count);
    for (int d = 0; d < count; d++) left = append(merged, left, summed[d]);
    if (left > 2) return 0;
    k->q = left ? merged[left - 1] : unit;
    k->p = left > 1 ? merged[0] : unit;
    k->column = outer ? k->kept[outer - 1] : unit;
    k->outer = outer ? outer - 1 : 0;
    return 1;
}

/* out = the sum of x, or of x * y, over the axes whose bit is set in `reduced`, divided by `divisor`.
   axes: the sizes, x's strides and y's strides of `rank` axes each. `out` is contiguous.
   Returns the number of sums that it could not settle; -1 if there are too many axes. */
integer reproml_sum(const float *x, const float *y, const integer *axes, int rank, integer reduced, double divisor,
                    float *out) {
    sums k = {.x = x, .y = y, .out = out, .divisor = divisor, .slices = 1};
    if (!arrange(&k, axes, rank, reduced)) return -1;
    k.few = k.p.size * k.q.size <= FEW;
    k.along = !k.few && k.q.x == 1 && (!y || k.q.y == 1) && (k.q.size >= LANES || k.column.size < 4);
    if (!k.along && k.p.size > k.q.size) {
        axis swapped = k.p;
        k.p = k.q;
        k.q = swapped;
    }
    integer terms = k.p.size * k.q.size, rows = 1;
    k.width = k.along && terms > PART / WIDTH ? (terms > PART ? 1 : PART / terms) : WIDTH;
    for (int d = 0; d < k.outer; d++) rows *= k.kept[d].size;
    integer work = terms * rows * k.column.size;
    if (k.along && work > 2 * PART && k.column.size / SLICES < k.width)
        k.width = k.column.size < SLICES ? 1 : k.column.size / SLICES;
    k.chunks = (k.column.size + k.width - 1) / k.width;
    integer chunks = rows * k.chunks;
    if (chunks && chunks < SLICES && work > 2 * PART && k.q.size >= SLICES * LANES) {
        k.slices = work / PART < SLICES ? work / PART : SLICES;
        k.parts = reproml_scratch((size_t)(chunks * k.slices * (2 * WIDTH + 1)) * sizeof(double));
        if (!k.parts) k.slices = 1;
    }
    if (work > 2 * PART)
        reproml_parallel(add_up, &k, chunks * k.slices);
    else
        for (integer task = 0; task < chunks * k.slices; task++) add_up(task, &k);
    if (k.parts) join(&k, chunks);
    return k.failed.count;
}
