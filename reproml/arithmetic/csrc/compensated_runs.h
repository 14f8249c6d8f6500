/* Sums over runs of contiguous numbers that keep their rounding errors (compensated.h), in the lanes of a vector. */

#ifndef REPROML_COMPENSATED_RUNS_H
#define REPROML_COMPENSATED_RUNS_H

#include "compensated.h"
#include "lanes.h"

/* One sum for each lane. */
typedef struct {
    lanes s, t, size;
} compensated_lanes;

INLINE lanes fma_of_lanes(lanes a, lanes b, lanes c) {
    for (int l = 0; l < LANES; l++) a[l] = fma(a[l], b[l], c[l]);
    return a;
}

INLINE void two_sum_of_lanes(lanes a, lanes b, lanes *s, lanes *t) {
    lanes sum = a + b, z = sum - a;
    *t = (a - (sum - z)) + (b - z);
    *s = sum;
}

INLINE void add_small_lanes(compensated_lanes *sum, lanes x) {
    sum->t += x;
    sum->size += magnitude(x);
}

INLINE void add_exact_lanes(compensated_lanes *sum, lanes x) {
    lanes error;
    two_sum_of_lanes(sum->s, x, &sum->s, &error);
    add_small_lanes(sum, error);
}

INLINE void add_product_lanes(compensated_lanes *sum, lanes a, lanes b) {
    const lanes product = a * b;
    add_exact_lanes(sum, product);
    add_small_lanes(sum, fma_of_lanes(a, b, -product));
}

/* The sum of n terms as in compensated_pair; each lane counts as one term more. */
INLINE pair pair_of_lanes(const compensated_lanes *sum, integer n) {
    compensated total = {0, 0, 0};
    for (int l = 0; l < LANES; l++) {
        add_exact(&total, sum->s[l]);
        total.t += sum->t[l];
        total.size += sum->size[l];
    }
    return compensated_pair(&total, n + LANES);
}

/* LANES numbers, with 0 in place of those from the `count`th on. */
INLINE lanes widen_some(const float *x, integer count) {
    float memory[LANES] = {0};
    return widen(count < LANES ? padded(x, count, memory) : x);
}

/* The sum of x, or of x y if y is not null, over `runs` runs of `length` numbers. */
INLINE pair sum_with_errors(const float *x, const float *y, integer x_stride, integer y_stride, integer runs,
                            integer length) {
    const lanes zero = {0};
    compensated_lanes sum = {zero, zero, zero};
    for (integer run = 0; run < runs; run++)
        for (integer i = 0; i < length; i += LANES) {
            lanes term = widen_some(x + run * x_stride + i, length - i);
            if (y) term *= widen_some(y + run * y_stride + i, length - i);
            add_exact_lanes(&sum, term);
        }
    return pair_of_lanes(&sum, runs * length);
}

#endif
