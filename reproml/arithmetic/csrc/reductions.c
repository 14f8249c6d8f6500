/* Sums and dot products over any axes of strided arrays, by the method of operators/reductions.py, and the sum of
   squared differences of two arrays.

   The trees of additions are low (lanes.h), which makes the bound small. A sum that fails the test is added up again
   with its rounding errors. */

#include "compensated_runs.h"
#include "lanes.h"

#define AXES 12
#define WIDTH 128  /* sums side by side */
#define FEW 16     /* terms; a sum of so few is too often a midpoint for a test that has to leave room */
#define SLICES 8   /* parts of one long sum */
#define PART 32768 /* terms that are worth a thread */

typedef struct {
    integer size, x, y; /* length, and the strides of x and y */
} axis;

typedef struct {
    const float *x, *y; /* y: null, or the other factor */
    float *out;
    double divisor;
    int squared;                   /* the terms are (x - y)^2 */
    axis kept[AXES], column, p, q; /* column: the last of the kept axes; p, q: summed */
    int outer;                     /* kept axes but for the column */
    int along;                     /* vectors run along q, not along the column */
    int few;                       /* few terms: the bounds come from the rounding errors themselves */
    integer width, chunks, slices; /* sums side by side; chunks of a column; parts of q */
    double *parts;
    failure_list failed;
} sums;

INLINE double term(const float *x, const float *y, integer i, integer j) { return y ? (double)x[i] * y[j] : x[i]; }

/* One sum over p and over q from `first` to `last`, where q is contiguous. Returns the height of the tree. */
INLINE integer along_q(const sums *ctx, const float *x, const float *y, integer first, integer last, double *s,
                       double *a) {
    const runs r = {.x = x + first,
                    .y = y ? y + first : 0,
                    .x_stride = ctx->p.x,
                    .y_stride = ctx->p.y,
                    .runs = ctx->p.size,
                    .length = last - first};
    double total[2];
    if (ctx->squared) { /* each term has 3 roundings */
        integer height = sum_runs(DISTANCES, &r, total) + 3;
        *s = *a = total[0];
        return height;
    }
    integer height = y ? sum_runs(PRODUCTS, &r, total) : sum_runs(NUMBERS, &r, total);
    *s = total[0];
    *a = total[1];
    return height;
}

INLINE void move_sums(double *restrict from, double *restrict to, integer count) {
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

/* `count` sums of few terms: s with an error of at most a. Mostly a is 0. */
INLINE void add_few(const sums *ctx, const float *x, const float *y, axis column, integer count, double *restrict s,
                    double *restrict a) {
    for (integer i = 0; i < count; i++) s[i] = a[i] = 0;
    for (integer p = 0; p < ctx->p.size; p++)
        for (integer q = 0; q < ctx->q.size; q++) {
            const float *from = x + p * ctx->p.x + q * ctx->q.x, *with = y ? y + p * ctx->p.y + q * ctx->q.y : 0;
            for (integer i = 0; i < count; i++) {
                double error;
                two_sum(s[i], term(from, with, i * column.x, i * column.y), s + i, &error);
                a[i] += fabs(error);
            }
        }
}

/* `count` <= WIDTH sums side by side, over p and over q from `first` to `last`. */
INLINE integer across_columns(const sums *ctx, const float *x, const float *y, integer first, integer last,
                              integer count, double *s, double *a) {
    double some_s[WIDTH], some_a[WIDTH];
    integer steps = 0, taken = 0, emptied = 1;
    const axis unit = {ctx->column.size, 1, 1};
    for (integer i = 0; i < count; i++) s[i] = a[i] = some_s[i] = some_a[i] = 0;
    for (integer p = 0; p < ctx->p.size; p++)
        for (integer at = first; at < last; at += 4 * STEPS) {
            integer rows = last - at < 4 * STEPS ? last - at : 4 * STEPS;
            const float *from = x + p * ctx->p.x + at * ctx->q.x, *with = y ? y + p * ctx->p.y + at * ctx->q.y : 0;
            if (ctx->column.x == 1 && !y)
                add_rows(from, 0, ctx->q, unit, rows, count, some_s, some_a);
            else
                add_rows(from, with, ctx->q, ctx->column, rows, count, some_s, some_a);
            steps += rows / 4 + rows % 4;
            if (steps >= STEPS) {
                move_sums(some_s, s, count);
                move_sums(some_a, a, count);
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

/* Find where the sums of this chunk begin in x and y, and the index of the first in *out. Returns their number. */
static integer locate(const sums *ctx, integer chunk, const float **x, const float **y, integer *out) {
    integer row = chunk / ctx->chunks, i = chunk % ctx->chunks * ctx->width;
    *out = row * ctx->column.size + i;
    *x = ctx->x ? ctx->x + i * ctx->column.x : 0;
    *y = ctx->y ? ctx->y + i * ctx->column.y : 0;
    for (int d = ctx->outer - 1; d >= 0; d--) {
        integer at = row % ctx->kept[d].size;
        row /= ctx->kept[d].size;
        *x += at * ctx->kept[d].x;
        if (*y) *y += at * ctx->kept[d].y;
    }
    return ctx->column.size - i < ctx->width ? ctx->column.size - i : ctx->width;
}

/* Add up one sum again with its rounding errors. Returns nonzero if the test fails. */
INLINE int32_t round_with_errors(const sums *ctx, const float *x, const float *y, float *result) {
    pair value;
    if (ctx->along) {
        value = sum_with_errors(x, y, ctx->p.x, ctx->p.y, ctx->p.size, ctx->q.size);
    } else {
        compensated sum = {0, 0, 0};
        for (integer p = 0; p < ctx->p.size; p++)
            for (integer q = 0; q < ctx->q.size; q++)
                add_exact(&sum, term(x, y, p * ctx->p.x + q * ctx->q.x, p * ctx->p.y + q * ctx->q.y));
        value = compensated_pair(&sum, ctx->p.size * ctx->q.size);
    }
    if (ctx->divisor != 1) value = pair_over(value, ctx->divisor);
    return round_pair(value, result);
}

/* Bound of the error of s / divisor with room for the test. */
INLINE double bound(const sums *ctx, double s, double a, double g, int power_of_two) {
    double few = a / fabs(ctx->divisor) * SLACK + 4 * U * fabs(s / ctx->divisor);
    if (!ctx->few) return g * a;
    return (power_of_two && a == 0) || !(a <= DBL_MAX) ? 0 : few; /* an infinite s has no error */
}

/* Round the sums s of one chunk, where |s - exact| <= gamma_height * a, or <= a for few terms. */
INLINE void round_chunk(sums *ctx, integer chunk, const double *s, const double *a, integer height) {
    const float *x, *y;
    integer first, count = locate(ctx, chunk, &x, &y, &first);
    float *out = ctx->out + first;
    double g = ((double)height + 4) * U * SLACK / fabs(ctx->divisor), divisor = ctx->divisor;
    int32_t failed = 0;
    int exponent, power_of_two = fabs(frexp(divisor, &exponent)) == 0.5;
    for (integer i = 0; i < count; i++) {
        double mid = s[i] / divisor, rad = bound(ctx, s[i], a[i], g, power_of_two);
        failed |= round_sum(mid, rad, out + i);
    }
    for (integer i = 0; failed && i < count; i++) {
        double mid = s[i] / divisor, rad = bound(ctx, s[i], a[i], g, power_of_two);
        if (!(fabs(s[i]) <= DBL_MAX))
            out[i] = to_target(mid); /* infinite or NaN in any order */
        else if (round_sum(mid, rad, out + i) &&
                 (ctx->squared ||
                  round_with_errors(ctx, x + i * ctx->column.x, y ? y + i * ctx->column.y : 0, out + i)))
            add_failure(&ctx->failed, first + i);
    }
}

VECTORISED static void add_up(integer task, void *data) {
    sums *ctx = data;
    double memory[2 * WIDTH];
    const float *x, *y;
    integer chunk = task / ctx->slices, slice = task % ctx->slices, height = 0, at;
    integer share = (ctx->q.size + ctx->slices - 1) / ctx->slices, first = slice * share, last = first + share;
    integer count = locate(ctx, chunk, &x, &y, &at);
    double *s = ctx->parts ? ctx->parts + task * (2 * WIDTH + 1) : memory, *a = s + WIDTH;
    if (last > ctx->q.size) last = ctx->q.size;
    if (ctx->few && ctx->column.x == 1 && !y)
        add_few(ctx, x, 0, (axis){0, 1, 1}, count, s, a);
    else if (ctx->few)
        add_few(ctx, x, y, ctx->column, count, s, a);
    else if (!ctx->along)
        height = across_columns(ctx, x, y, first, last, count, s, a);
    else
        for (integer i = 0; i < count; i++)
            height = along_q(ctx, x + i * ctx->column.x, y ? y + i * ctx->column.y : 0, first, last, s + i, a + i);
    if (ctx->parts)
        s[2 * WIDTH] = (double)height;
    else
        round_chunk(ctx, chunk, s, a, height);
}

/* Add up the slices of each sum. */
VECTORISED static void join_slices(sums *ctx, integer chunks) {
    for (integer chunk = 0; chunk < chunks; chunk++) {
        double *s = ctx->parts + chunk * ctx->slices * (2 * WIDTH + 1), height = s[2 * WIDTH];
        for (integer slice = 1; slice < ctx->slices; slice++) {
            const double *more = s + slice * (2 * WIDTH + 1);
            for (integer i = 0; i < 2 * WIDTH; i++) s[i] += more[i];
            if (more[2 * WIDTH] > height) height = more[2 * WIDTH];
        }
        round_chunk(ctx, chunk, s, s + WIDTH, (integer)height + ctx->slices);
    }
}

/* Append an axis; merge it with the one before if both are contiguous in memory. */
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

static void sort_axes(axis *axes, int count) { /* the longest stride first */
    for (int i = 1; i < count; i++)
        for (int j = i; j && axes[j - 1].x < axes[j].x; j--) {
            axis swapped = axes[j];
            axes[j] = axes[j - 1];
            axes[j - 1] = swapped;
        }
}

/* Sort and merge the axes of x and y. Returns 0 if there are too many. */
static int arrange(sums *ctx, const integer *axes, int rank, integer reduced) {
    axis summed[AXES], merged[AXES];
    int count = 0, outer = 0, left = 0;
    const axis unit = {1, 0, 0};
    if (rank > AXES) return 0;
    for (int d = 0; d < rank; d++) {
        axis next = {axes[d], axes[rank + d], axes[2 * rank + d]};
        if (reduced >> d & 1)
            summed[count++] = next;
        else
            outer = append(ctx->kept, outer, next);
    }
    sort_axes(summed, count);
    for (int d = 0; d < count; d++) left = append(merged, left, summed[d]);
    if (left > 2) return 0;
    ctx->q = left ? merged[left - 1] : unit;
    ctx->p = left > 1 ? merged[0] : unit;
    ctx->column = outer ? ctx->kept[outer - 1] : unit;
    ctx->outer = outer ? outer - 1 : 0;
    return 1;
}

/* Add up and round. Returns the number of sums for which it failed. */
static integer add_all(sums *ctx) {
    integer terms = ctx->p.size * ctx->q.size, rows = 1;
    ctx->width = ctx->along && terms > PART / WIDTH ? (terms > PART ? 1 : PART / terms) : WIDTH;
    for (int d = 0; d < ctx->outer; d++) rows *= ctx->kept[d].size;
    integer work = terms * rows * ctx->column.size;
    if (ctx->along && work > 2 * PART && ctx->column.size / SLICES < ctx->width)
        ctx->width = ctx->column.size < SLICES ? 1 : ctx->column.size / SLICES;
    ctx->chunks = (ctx->column.size + ctx->width - 1) / ctx->width;
    integer chunks = rows * ctx->chunks;
    if (chunks && chunks < SLICES && work > 2 * PART && ctx->q.size >= SLICES * LANES) {
        ctx->slices = work / PART < SLICES ? work / PART : SLICES;
        ctx->parts = reproml_scratch((size_t)(chunks * ctx->slices * (2 * WIDTH + 1)) * sizeof(double));
        if (!ctx->parts) ctx->slices = 1;
    }
    run_tasks(add_up, ctx, chunks * ctx->slices, work > 2 * PART);
    if (ctx->parts) join_slices(ctx, chunks);
    return ctx->failed.count;
}

/* out = the sum of x, or of x * y, over the axes whose bit is set in `reduced`, divided by `divisor`. axes: the
   sizes, the strides of x and the strides of y, `rank` numbers each. `out` is contiguous. Returns the number of sums
   for which it failed, or -1 if there are too many axes. */
integer reproml_sum(const float *x, const float *y, const integer *axes, int rank, integer reduced, double divisor,
                    float *out) {
    sums ctx = {.x = x, .y = y, .out = out, .divisor = divisor, .slices = 1};
    if (!arrange(&ctx, axes, rank, reduced)) return -1;
    ctx.few = ctx.p.size * ctx.q.size <= FEW;
    ctx.along = !ctx.few && ctx.q.x == 1 && (!y || ctx.q.y == 1) && (ctx.q.size >= LANES || ctx.column.size < 4);
    if (!ctx.along && ctx.p.size > ctx.q.size) {
        axis swapped = ctx.p;
        ctx.p = ctx.q;
        ctx.q = swapped;
    }
    return add_all(&ctx);
}

/* out = the sum of (x - y)^2 over n numbers, divided by `divisor`. Returns nonzero if it failed. */
integer reproml_squared_distance(const float *x, const float *y, integer n, double divisor, float *out) {
    sums ctx = {.x = x, .y = y, .out = out, .divisor = divisor, .squared = 1, .along = 1, .slices = 1};
    ctx.column = ctx.p = (axis){1, 0, 0}, ctx.q = (axis){n, 1, 1};
    return add_all(&ctx);
}
