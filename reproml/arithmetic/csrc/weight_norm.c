/* Vectors that are scaled to a given length, and their gradients (operators/norms.py). The factor of a row and what comes
   of its sum are pairs of binary64 numbers, so that gradients that cancel pass the test. Nothing underflows: the sums
   are multiples of 2^-298, and a result is at least 2^-980 or 0. */

#include "compensated_runs.h"

typedef struct {
    integer n;
    const float *v, *g, *grad, *norm;
    float *out, *of_g;
    uint8_t *failed;
    integer failures;
} call;

static void count_row(call *c, integer row, int32_t failed) {
    c->failed[row] = failed != 0;
    __atomic_fetch_add(&c->failures, failed != 0, __ATOMIC_RELAXED);
}

/* The first test of factor v. The factor is rounded twice, and the product once. */
INLINE int32_t round_multiples(pair factor, const float *restrict v, integer n, float *restrict out) {
    const double bound = 4 * U * fabs(factor.s) + factor.rad * SLACK;
    int32_t failed = 0;
    for (integer i = 0; i < n; i++)
        failed |= round_sum(factor.s * v[i] + 0.0, bound * fabsf(v[i]), out + i); /* an exact zero is +0 */
    return failed;
}

/* The first test of factor (x + slope v): the product with the slope is rounded twice, the sum once, and the product with
   the factor twice. */
INLINE int32_t round_gradients(pair factor, pair slope, const float *restrict x, const float *restrict v, integer n,
                               float *restrict out) {
    int32_t failed = 0;
    for (integer i = 0; i < n; i++) {
        const double product = slope.s * v[i], sum = x[i] + product;
        const double error = 3 * U * fabs(product) + slope.rad * fabsf(v[i]);
        const double rad = fabs(factor.s) * (error + 6 * U * fabs(sum)) + factor.rad * (fabs(sum) + error);
        failed |= round_sum(factor.s * sum + 0.0, rad * SLACK, out + i);
    }
    return failed;
}

static int all_zero(const float *x, integer n) {
    int32_t any = 0;
    for (integer i = 0; i < n; i++) any |= x[i] != 0;
    return !any;
}

static void fill_with_nan(float *x, integer n) {
    for (integer i = 0; i < n; i++) x[i] = NAN;
}

/* g v / |v|; NaN if |v| is 0. */
VECTORISED static void scale_row(integer row, void *data) {
    call *c = data;
    const float *v = c->v + row * c->n;
    float *restrict out = c->out + row * c->n;
    int32_t failed = 0;
    const pair squares = sum_with_errors(v, v, 0, 0, 1, c->n);
    const pair factor = pair_over_pair((pair){c->g[row], 0, 0}, pair_sqrt(squares));
    if (all_zero(v, c->n))
        fill_with_nan(out, c->n);
    else if (!(fabs(factor.s) + factor.rad <= DBL_MAX))
        failed = 1;
    else if (round_multiples(factor, v, c->n, out))
        for (integer i = 0; i < c->n; i++) failed |= round_pair(pair_times(factor, v[i]), out + i);
    count_row(c, row, failed);
}

/* out = g / norm (grad - v sum / norm^2) and of_g = sum / norm, with the sum of grad v. The square of the norm is exact. */
VECTORISED static void gradient_of_row(integer row, void *data) {
    call *c = data;
    const float *v = c->v + row * c->n, *grad = c->grad + row * c->n;
    float *restrict out = c->out + row * c->n;
    const double norm = c->norm[row];
    const pair sum = sum_with_errors(grad, v, 0, 0, 1, c->n), factor = pair_over((pair){c->g[row], 0, 0}, norm);
    const pair slope = pair_over((pair){-sum.s, -sum.t, sum.rad}, norm * norm);
    int32_t failed = round_pair(pair_over(sum, norm), c->of_g + row);
    if (norm == 0 && all_zero(v, c->n)) { /* nothing divided by nothing */
        fill_with_nan(out, c->n);
        c->of_g[row] = NAN;
        failed = 0;
    } else if (!(fabs(factor.s) + factor.rad + fabs(slope.s) + slope.rad <= DBL_MAX)) {
        failed = 1;
    } else if (round_gradients(factor, slope, grad, v, c->n, out)) {
        for (integer i = 0; i < c->n; i++) {
            const pair difference = pair_plus((pair){grad[i], 0, 0}, pair_times(slope, v[i]));
            failed |= round_pair(pair_times_pair(difference, factor), out + i);
        }
    }
    count_row(c, row, failed);
}

/* out [rows, n] = the rows v [rows, n], scaled to the lengths g [rows]. failed [rows]: whether a number of the row failed
   the test. Returns how many rows did. */
integer reproml_weight_norm(integer rows, integer n, const float *v, const float *g, float *out, uint8_t *failed) {
    call c = {.n = n, .v = v, .g = g, .out = out, .failed = failed};
    run_tasks(scale_row, &c, rows, rows * n > WORTH_A_THREAD);
    return c.failures;
}

/* The same for the gradients out [rows, n] of v and of_g [rows] of g, from the gradient and the rounded norms. */
integer reproml_weight_norm_backward(integer rows, integer n, const float *grad, const float *v, const float *g,
                                     const float *norm, float *out, float *of_g, uint8_t *failed) {
    call c = {.n = n, .v = v, .g = g, .grad = grad, .norm = norm, .out = out, .of_g = of_g, .failed = failed};
    run_tasks(gradient_of_row, &c, rows, rows * n > WORTH_A_THREAD);
    return c.failures;
}
