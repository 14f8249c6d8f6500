/* Sums over runs of contiguous numbers in the lanes of a vector, which is added to a second vector at intervals. Such a
   tree is little higher than the square root of the number of terms, and a sum errs by at most
   gamma_height * sum |terms| (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2). */

#ifndef REPROML_LANES_H
#define REPROML_LANES_H

#include "common.h"

#define LANES 8
#define STEPS 64 /* additions to a lane before it is added to the second vector */

/* The compiler splits these into shorter vectors if the processor has none of this length. */
typedef double lanes __attribute__((vector_size(8 * LANES)));
typedef int64_t lane_bits __attribute__((vector_size(8 * LANES)));
typedef float stored __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE lanes widen(const float *x) { return __builtin_convertvector(*(const stored *)x, lanes); }

INLINE lanes magnitude(lanes x) { return (lanes)((lane_bits)x & INT64_MAX); }

/* The terms: x; x y; (x - y)^2; (x - m)^2; y and y (x - m); w y and w y (x - m). */
enum { NUMBERS, PRODUCTS, DISTANCES, SQUARES, MOMENTS, WEIGHTED_MOMENTS };

typedef struct {
    const float *x, *y, *w;
    integer x_stride, y_stride; /* from run to run; all runs have the same w */
    integer runs, length;
    double m;
} runs;

/* Add LANES terms, of which the first `count` are valid. */
INLINE void add_terms(const int kind, const float *x, const float *y, const float *w, double m, int count, lanes *sum) {
    lanes d = widen(x);
    if (kind == NUMBERS || kind == PRODUCTS) {
        if (kind == PRODUCTS) d *= widen(y);
        sum[0] += d;
        sum[1] += magnitude(d);
    } else if (kind == DISTANCES) {
        d -= widen(y);
        sum[0] += d * d;
    } else if (kind == SQUARES) {
        d -= m;
        for (int t = count; t < LANES; t++) d[t] = 0;
        sum[0] += d * d;
    } else {
        lanes q = widen(y);
        if (kind == WEIGHTED_MOMENTS) q *= widen(w);
        sum[0] += q;
        sum[1] += magnitude(q);
        q *= d - m;
        sum[2] += q;
        sum[3] += magnitude(q);
    }
}

INLINE const float *padded(const float *x, integer count, float *memory) {
    for (integer t = 0; t < count; t++) memory[t] = x[t];
    return memory;
}

/* Store each sum, followed by the sum of the absolute values of its terms, in `total`. Returns the height of the
   tree. */
INLINE integer sum_runs(const int kind, const runs *ctx, double *total) {
    const int sums = kind < DISTANCES ? 2 : kind <= SQUARES ? 1 : 4;
    const int with_y = kind != NUMBERS && kind != SQUARES, with_w = kind == WEIGHTED_MOMENTS; /* else they are null */
    const lanes zero = {0};
    lanes some[4] = {zero, zero, zero, zero}, all[4] = {zero, zero, zero, zero};
    integer steps = 0, most = 0, emptied = 0;
    for (integer run = 0; run < ctx->runs; run++) {
        const float *x = ctx->x + run * ctx->x_stride, *y = with_y ? ctx->y + run * ctx->y_stride : 0;
        for (integer at = 0; at < ctx->length; at += LANES * STEPS) {
            integer i = at, end = ctx->length - at < LANES * STEPS ? ctx->length : at + LANES * STEPS;
            for (; i + LANES <= end; i += LANES)
                add_terms(kind, x + i, with_y ? y + i : 0, with_w ? ctx->w + i : 0, ctx->m, LANES, some);
            if (i < end) {
                float memory[3][LANES] = {{0}};
                integer rest = end - i;
                const float *last = padded(x + i, rest, memory[0]);
                const float *with = with_y ? padded(y + i, rest, memory[1]) : 0;
                const float *weight = with_w ? padded(ctx->w + i, rest, memory[2]) : 0;
                add_terms(kind, last, with, weight, ctx->m, (int)rest, some);
            }
            steps += (end - at + LANES - 1) / LANES;
            if (steps >= STEPS) {
                for (int v = 0; v < sums; v++) {
                    all[v] += some[v];
                    some[v] = zero;
                }
                most = steps > most ? steps : most;
                emptied++;
                steps = 0;
            }
        }
    }
    for (int v = 0; v < sums; v++) {
        lanes a = all[v] + some[v];
        total[v] = ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
    }
    return (steps > most ? steps : most) + emptied + 4;
}

#endif
