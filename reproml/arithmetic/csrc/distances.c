/* Euclidean distances between the rows of two matrices, and their gradients (operators/norms.py). Both are summed in
   binary64 first, and where that fails the test with all rounding errors. Nothing underflows: squares are at least
   2^-298, and terms of gradients at least 2^-426. */

#include "compensated.h"
#include "lanes.h"

enum { WIDTH = 64 }; /* columns at once */

typedef struct {
    integer n, m, k;
    int triangle; /* only the rows of y behind the row of x */
    const float *x, *y, *g, *distance;
    float *out;
    uint8_t *failed;
    integer failures;
} call;

/* ---- distances ---- */

static int32_t distance_with_errors(const float *x, const float *y, integer k, float *out) {
    compensated squares = {0, 0, 0};
    for (integer i = 0; i < k; i++) {
        double high, low;
        two_sum(x[i], -(double)y[i], &high, &low);
        add_product(&squares, high, high);
        add_small(&squares, 2 * high * low);
        add_small(&squares, low * low);
    }
    return round_pair(pair_sqrt(compensated_pair(&squares, k)), out);
}

VECTORISED static void distances_of_row(integer task, void *data) {
    call *c = data;
    const integer batch = task / c->n, row = task % c->n, first = c->triangle ? row + 1 : 0;
    const integer at = c->triangle ? row * c->m - row * (row + 1) / 2 - first : task * c->m;
    const float *x = c->x + task * c->k, *all = c->y + batch * c->m * c->k;
    integer failures = 0;
    for (integer j = first; j < c->m; j++) {
        const float *y = all + j * c->k;
        const runs r = {.x = x, .y = y, .runs = 1, .length = c->k};
        double square;
        const integer height = sum_runs(DISTANCES, &r, &square) + 3; /* each term has 3 roundings */
        const double root = sqrt(square), rad = root * (relative_bound((double)height) / 2 + 3 * U) * SLACK;
        int32_t left = !(square <= DBL_MAX);
        if (!left && round_sum(root, rad, c->out + at + j)) left = distance_with_errors(x, y, c->k, c->out + at + j);
        failures += c->failed[at + j] = left != 0;
    }
    __atomic_fetch_add(&c->failures, failures, __ATOMIC_RELAXED);
}

/* out [batches, n, m] = the distances of each row of x [batches, n, k] from each of y [batches, m, k], or with
   `triangle`, for one batch, from those of a larger index. `failed` has one element for each. Returns how many failed
   the test. */
integer reproml_distances(integer batches, integer n, integer m, integer k, int triangle, const float *x,
                          const float *y, float *out, uint8_t *failed) {
    call c = {.n = n, .m = m, .k = k, .triangle = triangle, .x = x, .y = y, .out = out, .failed = failed};
    run_tasks(distances_of_row, &c, batches * n, batches * n * m * k > WORTH_A_THREAD);
    return c.failures;
}

/* ---- gradients ---- */

typedef struct {
    double s[WIDTH], t[WIDTH], size[WIDTH], rad[WIDTH];
} sums_side_by_side;

/* Add q (x - y) to `count` sums. */
INLINE void add_differences(sums_side_by_side *sum, pair q, const float *x, const float *y, integer count) {
    for (integer i = 0; i < count; i++) {
        double high, low, error;
        two_sum(x[i], -(double)y[i], &high, &low);
        const double product = q.s * high, lost = fma(q.s, high, -product), a = q.t * high, b = q.s * low;
        two_sum(sum->s[i], product, &sum->s[i], &error);
        sum->t[i] += (error + lost) + (a + b);
        sum->size[i] += (fabs(error) + fabs(lost)) + (fabs(a) + fabs(b));
        sum->rad[i] += q.rad * (fabs(high) + fabs(low)) + fabs(q.t * low);
    }
}

/* The gradients of one row of x. A term is 0 where x = y or the distance is 0. */
VECTORISED static void gradients_of_row(integer task, void *data) {
    call *c = data;
    const float *x = c->x + task * c->k, *all = c->y + task / c->n * c->m * c->k;
    const float *g = c->g + task * c->m, *distance = c->distance + task * c->m;
    float *out = c->out + task * c->k;
    uint8_t *failed = c->failed + task * c->k;
    const double bound = relative_bound((double)c->m + 3); /* each term has 3 roundings */
    integer failures = 0;
    int finite = 1;
    for (integer j = 0; j < c->m; j++) finite &= (fabsf(g[j]) <= FLT_MAX) & (fabsf(distance[j]) <= FLT_MAX);
    for (integer at = 0; at < c->k; at += WIDTH) {
        const integer count = c->k - at < WIDTH ? c->k - at : WIDTH;
        double mid[WIDTH] = {0}, size[WIDTH] = {0};
        for (integer j = 0; finite && j < c->m; j++) {
            const float *y = all + j * c->k + at;
            const double q = distance[j] == 0 ? 0 : (double)g[j] / distance[j];
            for (integer i = 0; i < count; i++) {
                const double term = q * ((double)x[at + i] - y[i]);
                mid[i] += term;
                size[i] += fabs(term);
            }
        }
        int32_t any = 0;
        for (integer i = 0; i < count; i++) {
            const int32_t left = round_sum(mid[i] + 0.0, size[i] * bound, out + at + i);
            any |= failed[at + i] = !finite || !(size[i] <= DBL_MAX) || left;
        }
        if (!any) continue;
        sums_side_by_side sum = {{0}, {0}, {0}, {0}};
        for (integer j = 0; finite && j < c->m; j++)
            if (distance[j] != 0)
                add_differences(&sum, pair_over((pair){g[j], 0, 0}, distance[j]), x + at, all + j * c->k + at, count);
        for (integer i = 0; i < count; i++) {
            if (!failed[at + i]) continue;
            const compensated one = {sum.s[i], sum.t[i], sum.size[i]};
            pair value = compensated_pair(&one, c->m);
            value.rad += sum.rad[i] * SLACK;
            failures += failed[at + i] = !finite || round_pair(value, out + at + i);
        }
    }
    __atomic_fetch_add(&c->failures, failures, __ATOMIC_RELAXED);
}

/* out [batches, n, k] = the gradients of x, with g and the distances [batches, n, m]; failed [batches, n, k] marks the
   elements for which the test failed. Returns their number. */
integer reproml_distances_backward(integer batches, integer n, integer m, integer k, const float *g, const float *x,
                                   const float *y, const float *distance, float *out, uint8_t *failed) {
    call c = {.n = n, .m = m, .k = k, .x = x, .y = y, .g = g, .distance = distance, .out = out, .failed = failed};
    run_tasks(gradients_of_row, &c, batches * n, batches * n * m * k > WORTH_A_THREAD);
    return c.failures;
}
