/* The gradient of adaptive average pooling, whose windows may overlap and differ in size (operators/pooling.py). */

#include "compensated.h"

#define SERIAL 8192 /* elements that are not worth a second thread */

/* The windows along one axis. Element i lies in the windows from first[i] to last[i] - 1. The share of a window of
   length l is 1 / l = factor / denominator, with a denominator that all windows have in common. */
typedef struct {
    integer size, windows, denominator;
    integer *first, *last;
    double *factor;
} axis;

typedef struct {
    axis rows, columns;
    const float *g;
    float *out;
    failure_list failed;
} gradient;

static integer greatest_common_divisor(integer a, integer b) {
    while (b) {
        integer rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

static integer start_of(const axis *a, integer window) { return window * a->size / a->windows; }

static integer end_of(const axis *a, integer window) { return ((window + 1) * a->size + a->windows - 1) / a->windows; }

/* Returns 0 if the denominator is too large for exact products. */
static int fill_axis(axis *a) {
    a->denominator = 1;
    for (integer i = 0; i < a->size; i++) a->first[i] = a->windows, a->last[i] = 0;
    for (integer window = 0; window < a->windows; window++) {
        const integer start = start_of(a, window), end = end_of(a, window), length = end - start;
        a->denominator *= length / greatest_common_divisor(a->denominator, length);
        if (a->denominator > 1 << 26) return 0;
        for (integer i = start; i < end; i++) {
            if (window < a->first[i]) a->first[i] = window;
            a->last[i] = window + 1;
        }
    }
    for (integer window = 0; window < a->windows; window++)
        a->factor[window] = (double)(a->denominator / (end_of(a, window) - start_of(a, window)));
    return 1;
}

static void add_windows(integer plane, void *data) {
    gradient *c = data;
    const axis *rows = &c->rows, *columns = &c->columns;
    const double denominator = (double)(rows->denominator * columns->denominator);
    const float *g = c->g + plane * rows->windows * columns->windows;
    integer at = plane * rows->size * columns->size;
    for (integer y = 0; y < rows->size; y++)
        for (integer x = 0; x < columns->size; x++, at++) {
            compensated sum = {0, 0, 0};
            integer terms = 0;
            for (integer i = rows->first[y]; i < rows->last[y]; i++)
                for (integer j = columns->first[x]; j < columns->last[x]; j++, terms++)
                    add_exact(&sum, rows->factor[i] * columns->factor[j] * g[i * columns->windows + j]);
            const double mid = sum.s / denominator;
            if (!(fabs(sum.s) <= DBL_MAX)) {
                c->out[at] = to_target(sum.s); /* infinite or NaN in any order */
                continue;
            }
            /* One rounding, and what the additions lost. */
            if (!round_sum(mid, 3 * U * fabs(mid) + 2 * sum.size / denominator, c->out + at)) continue;
            if (round_pair(pair_over(compensated_pair(&sum, terms), denominator), c->out + at))
                add_failure(&c->failed, at);
        }
}

/* out [planes, h, w] = for each element, the sum of g / size over the windows that contain it, g [planes, rows, columns].
   Returns the number of elements for which the tests failed, or -1 where it does not apply. */
integer reproml_adaptive_pool_backward(integer planes, integer h, integer w, integer rows, integer columns,
                                       const float *g, float *out, integer *failed, integer capacity) {
    gradient c = {.rows = {.size = h, .windows = rows},
                  .columns = {.size = w, .windows = columns},
                  .g = g,
                  .out = out,
                  .failed = {failed, capacity, 0}};
    integer *memory =
        reproml_scratch((size_t)(2 * (h + w)) * sizeof(integer) + (size_t)(rows + columns) * sizeof(double));
    if (!memory) return -1;
    c.rows.first = memory, c.rows.last = memory + h;
    c.columns.first = memory + 2 * h, c.columns.last = memory + 2 * h + w;
    c.rows.factor = (double *)(memory + 2 * (h + w)), c.columns.factor = c.rows.factor + rows;
    if (!fill_axis(&c.rows) || !fill_axis(&c.columns) || c.rows.denominator * c.columns.denominator > 1 << 28)
        return -1;
    run_tasks(add_windows, &c, planes, planes * h * w > SERIAL);
    return c.failed.count;
}
