/* Sums of the numbers that have the same index: scatter_add and the gradients of embeddings and max pooling
   (operators/indexing.py). The errors of all additions are kept: the sum of few numbers is mostly exact in binary64,
   and so often a midpoint of two binary32 numbers that a test which has to leave room would fail. */

#include "compensated.h"
#include "lanes.h"

#define WIDTH 128 /* columns at once */
#define NONE (-1)

typedef struct {
    integer sources, width, rows, padding;
    const integer *index;
    const float *values, *start;
    int mean;
    float *out;
    int failed, overlap;
} scatter;

/* Sums side by side, each as in compensated.h: s + t, with an error of at most n U size. */
typedef struct {
    double *s, *t, *size;
} sum_array;

INLINE void add_to(sum_array sum, integer i, double x) {
    double error;
    two_sum(sum.s[i], x, sum.s + i, &error);
    sum.t[i] += error;
    sum.size[i] += fabs(error);
}

INLINE void begin(sum_array sum, const float *start, integer n) {
    for (integer i = 0; i < n; i++) {
        sum.s[i] = start ? start[i] + 0.0 : 0; /* an exact zero is +0 */
        sum.t[i] = sum.size[i] = 0;
    }
}

/* Returns nonzero if the test failed for one of the sums. */
INLINE int32_t round_sums(sum_array sum, integer n, double terms, float *restrict out) {
    int32_t failed = 0;
    for (integer i = 0; i < n; i++) out[i] = to_target(sum.s[i]);
    for (integer i = 0; i < n; i++)
        if (sum.size[i] != 0 && fabs(sum.s[i]) <= DBL_MAX)
            failed |= round_pair(make_pair(sum.s[i], sum.t[i], sum.size[i] * (terms + 2) * U * SLACK), out + i);
    return failed;
}

/* The same for the sums, divided by a count. */
INLINE int32_t round_means(sum_array sum, integer n, double terms, double count, float *restrict out) {
    int32_t failed = 0;
    for (integer i = 0; i < n; i++) {
        const pair total = make_pair(sum.s[i], sum.t[i], sum.size[i] * (terms + 2) * U * SLACK);
        const int finite = fabs(sum.s[i]) <= DBL_MAX;
        const int32_t left = round_pair(pair_over(total, count), out + i);
        failed |= finite ? left : 0;
        out[i] = finite ? out[i] : (float)sum.s[i];
    }
    return failed;
}

/* Store each value at its index. Returns 0 if a nonzero number is stored there already or an index is out of
   range. */
static int store_distinct(const scatter *ctx, const integer *index, const float *values, float *out) {
    memset(out, 0, (size_t)ctx->rows * sizeof(float));
    for (integer i = 0; i < ctx->sources; i++) {
        integer at = index[i];
        if (at < 0 || at >= ctx->rows || out[at] != 0) return 0;
        out[at] = values[i] + 0.0f;
    }
    return 1;
}

/* Rows of one number: all sums side by side. */
VECTORISED static void add_numbers(integer plane, void *data) {
    scatter *ctx = data;
    const integer *index = ctx->index + plane * ctx->sources;
    const float *values = ctx->values + plane * ctx->sources;
    float *out = ctx->out + plane * ctx->rows;
    if (!ctx->start && ctx->padding == NONE && !ctx->overlap) {
        if (store_distinct(ctx, index, values, out)) return;
        set_flag(&ctx->overlap);
    }
    double *memory = reproml_scratch((size_t)(3 * ctx->rows) * sizeof(double));
    sum_array sum = {memory, memory + ctx->rows, memory + 2 * ctx->rows};
    int valid = memory != 0;
    if (valid) begin(sum, ctx->start, ctx->rows);
    for (integer i = 0; valid && i < ctx->sources; i++) {
        integer at = index[i];
        valid = at >= 0 && at < ctx->rows;
        if (valid && at != ctx->padding) add_to(sum, at, values[i]);
    }
    if (!valid || round_sums(sum, ctx->rows, (double)ctx->sources, out)) set_flag(&ctx->failed);
}

/* Chain the sources of each row: first[row], then next[source]. Returns 0 if an index is out of range. */
static int chain_sources(const scatter *ctx, int32_t *first, int32_t *next) {
    for (integer row = 0; row < ctx->rows; row++) first[row] = NONE;
    for (integer i = 0; i < ctx->sources; i++) {
        integer row = ctx->index[i];
        if (row < 0 || row >= ctx->rows) return 0;
        if (row == ctx->padding) continue;
        next[i] = first[row];
        first[row] = (int32_t)i;
    }
    return 1;
}

VECTORISED static int32_t add_rows(const scatter *ctx, const int32_t *first, const int32_t *next) {
    double memory[3][WIDTH];
    sum_array sum = {memory[0], memory[1], memory[2]};
    int32_t failed = 0;
    for (integer row = 0; row < ctx->rows; row++)
        for (integer at = 0; at < ctx->width; at += WIDTH) {
            integer n = ctx->width - at < WIDTH ? ctx->width - at : WIDTH, to = row * ctx->width + at;
            if (first[row] == NONE && !ctx->start) {
                memset(ctx->out + to, 0, (size_t)n * sizeof(float));
                continue;
            }
            begin(sum, ctx->start ? ctx->start + to : 0, n);
            integer count = 0;
            for (int32_t source = first[row]; source != NONE; source = next[source], count++)
                for (integer i = 0; i < n; i++) add_to(sum, i, ctx->values[source * ctx->width + at + i]);
            failed |= ctx->mean ? round_means(sum, n, (double)ctx->sources, (double)count, ctx->out + to)
                                : round_sums(sum, n, (double)ctx->sources, ctx->out + to);
        }
    return failed;
}

/* For each plane, out [rows, width] = start + the sum of the rows of values [sources, width] with the same index,
   except for the row `padding`. start: null for zeros. `planes` may exceed 1 only if `width` is 1. With `mean`, for one
   plane without `start`, each sum is divided by the number of its rows. Returns 0 if all sums were rounded. */
integer reproml_scatter(integer planes, integer sources, integer width, integer rows, const integer *index,
                        const float *values, const float *start, integer padding, int mean, float *out) {
    scatter ctx = {sources, width, rows, padding, index, values, start, mean, out, 0, 0};
    if (width == 1 && !mean) {
        run_tasks(add_numbers, &ctx, planes, planes > 1 && planes * (sources + rows) > 4096);
        return ctx.failed;
    }
    if (planes != 1 || sources >= INT32_MAX || rows >= INT32_MAX) return 1;
    int32_t *first = reproml_scratch((size_t)(rows + sources) * sizeof(int32_t)), *next = first + rows;
    return !first || !chain_sources(&ctx, first, next) || add_rows(&ctx, first, next);
}
