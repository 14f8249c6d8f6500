/* Formulas over rows in pairs of binary64 numbers: running sums, and the second test of formulas on whose rows the
   first one failed, as it does where whole tensors cancel or are equal. */

#include "compensated.h"
#include "softmax_pairs.h"

/* In the order of compiler/pairs.py. */
enum { RUNNING_SUMS, VARIANCE, DEVIATION, SOFTMAX_BACKWARD, LOG_SOFTMAX_BACKWARD, SOFTMAX, LOG_SOFTMAX, LOGSUMEXP };

enum { WORK = 32768 }; /* numbers that are worth a thread */

typedef struct {
    int kind;
    const float *x, *y;
    integer rows, n, per_task;
    double divisor;
    float *out;
    uint8_t *failed;
    integer failures;
} rows_of;

static int32_t running_sums(const float *x, integer n, float *out, uint8_t *failed) {
    int32_t failures = 0;
    compensated sum = {0, 0, 0};
    for (integer i = 0; i < n; i++) {
        add_exact(&sum, x[i]);
        failures += failed[i] = round_compensated(&sum, i + 1, out + i) != 0;
    }
    return failures;
}

/* With any number a near the mean m, the variance is the sum of (x - a)^2 less n (m - a)^2, over the divisor. */
static int32_t variance(const float *x, integer n, double divisor, int root, float *out) {
    compensated sum = {0, 0, 0}, squares = {0, 0, 0};
    for (integer i = 0; i < n; i++) add_exact(&sum, x[i]);
    const pair mean = pair_over(compensated_pair(&sum, n), (double)n);
    for (integer i = 0; i < n; i++) {
        double high, low;
        two_sum(x[i], -mean.s, &high, &low);
        add_product(&squares, high, high);
        add_small(&squares, 2 * high * low);
        add_small(&squares, low * low);
    }
    pair v = compensated_pair(&squares, n);
    const double beside = fabs(mean.t) + mean.rad;
    v.rad += (double)n * beside * beside * SLACK;
    v = pair_over(v, divisor);
    if (root && v.s != 0) {
        if (!(v.s > 2 * (fabs(v.t) + v.rad))) return 1;
        v = pair_sqrt(v);
    }
    return round_pair(v, out);
}

static integer softmax_row(int which, const float *x, const float *y, integer n, integer results, float *out,
                           uint8_t *failed) {
    int32_t *left = reproml_scratch((size_t)results * sizeof *left);
    const integer failures = left ? reproml_softmax_row(which, x, y, n, out, left) : results;
    for (integer i = 0; i < results; i++) failed[i] = !left || left[i];
    return failures;
}

static void run_task(integer task, void *data) {
    rows_of *c = data;
    const integer n = c->n, end = c->per_task * (task + 1);
    integer failures = 0;
    for (integer row = c->per_task * task; row < end && row < c->rows; row++) {
        const float *x = c->x + row * n, *y = c->y + row * n;
        float *out = c->out + row * n;
        uint8_t *failed = c->failed + row * n;
        switch (c->kind) {
        case RUNNING_SUMS: failures += running_sums(x, n, out, failed); break;
        case VARIANCE:
        case DEVIATION:
            failures += c->failed[row] = variance(x, n, c->divisor, c->kind == DEVIATION, c->out + row) != 0;
            break;
        case SOFTMAX_BACKWARD: failures += softmax_row(PAIRS_SOFTMAX_BACKWARD, x, y, n, n, out, failed); break;
        case LOG_SOFTMAX_BACKWARD: failures += softmax_row(PAIRS_LOG_SOFTMAX_BACKWARD, x, y, n, n, out, failed); break;
        case SOFTMAX: failures += softmax_row(PAIRS_SOFTMAX, x, y, n, n, out, failed); break;
        case LOG_SOFTMAX: failures += softmax_row(PAIRS_LOG_SOFTMAX, x, y, n, n, out, failed); break;
        case LOGSUMEXP: failures += softmax_row(PAIRS_LOGSUMEXP, x, y, n, 1, c->out + row, c->failed + row); break;
        }
    }
    __atomic_fetch_add(&c->failures, failures, __ATOMIC_RELAXED);
}

/* x and y (not read by formulas of one operand) are `rows` contiguous rows of n numbers. `out` and `failed` have one
   element for each result: n for each row, or one. Returns the number of results for which the test failed. */
integer reproml_rows(int kind, const float *x, const float *y, integer rows, integer n, double divisor, float *out,
                     uint8_t *failed) {
    rows_of c = {.kind = kind, .x = x, .y = y, .rows = rows, .n = n, .divisor = divisor, .out = out, .failed = failed};
    const integer wanted = rows * n / WORK, tasks = wanted < 1 ? 1 : wanted < rows ? wanted : rows;
    c.per_task = (rows + tasks - 1) / tasks;
    run_tasks(run_task, &c, tasks, tasks > 1);
    return c.failures;
}
