/* Sums over runs of contiguous numbers, in the lanes of a vector, which is emptied into a second one now
   and then. Such a tree is little higher than the square root of the number of terms, and a sum errs by at
   most gamma_height * sum |terms| (Higham, section 4.2). */

#ifndef REPROML_LANES_H
#define REPROML_LANES_H

#include "common.h"

/* Part of every clone of a VECTORISED function that calls it. */
#define INLINE static inline __attribute__((always_inline))

#define LANES 8
#define STEPS 64 /* additions to a lane before it is emptied */

/* The compiler makes shorter vectors of these where the processor has no longer ones. */
typedef double lanes __attribute__((vector_size(8 * LANES)));
typedef int64_t lane_bits __attribute__((vector_size(8 * LANES)));
typedef float stored __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE lanes widen(const float *x) { return __builtin_convertvector(*(const stored *)x, lanes); }

INLINE lanes magnitude(lanes x) { return (lanes)((lane_bits)x & INT64_MAX); }

/* What is summed up: x; x y; (x - m)^2; y and y (x - m); w y and w y (x - m). */
enum { NUMBERS, PRODUCTS, SQUARES, MOMENTS, WEIGHTED_MOMENTS };

typedef struct {
    const float *x, *y, *w;
    integer x_stride, y_stride; /* from run to run; w is the same for all */
    integer runs, length;
    double m;
} runs;

/* LANES terms, of which `count` are there. */
INLINE void add_terms(const int kind, const float *x, const float *y, const float *w, double m, int count, lanes *sum) {
    lanes d = widen(x);
    if (kind == NUMBERS || kind == PRODUCTS) {
        if (kind == PRODUCTS) d *= widen(y);
        sum[0] += d;
        sum[1] += magnitude(d);
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

/* Each sum, and the sum of its absolute values after it, into `total`. Returns the height of the tree. */
INLINE integer sum_runs(const int kind, const runs *k, double *total) {
    const int sums = kind < SQUARES ? 2 : kind == SQUARES ? 1 : 4;
    const lanes zero = {0};
    lanes some[4] = {zero, zero, zero, zero}, all[4] = {zero, zero, zero, zero};
    integer steps = 0, most = 0, emptied = 0;
    for (integer run = 0; run < k->runs; run++) {
        const float *x = k->x + run * k->x_stride, *y = k->y + run * k->y_stride;
        for (integer at = 0; at < k->length; at += LANES * STEPS) {
            integer i = at, end = k->length - at < LANES * STEPS ? k->length : at + LANES * STEPS;
            for (; i + LANES <= end; i += LANES) add_terms(kind, x + i, y + i, k->w + i, k->m, LANES, some);
            if (i < end) {
                float memory[3][LANES] = {{0}};
                integer rest = end - i;
                const float *last = padded(x + i, rest, memory[0]);
                const float *with = kind == NUMBERS || kind == SQUARES ? 0 : padded(y + i, rest, memory[1]);
                const float *weight = kind == WEIGHTED_MOMENTS ? padded(k->w + i, rest, memory[2]) : 0;
                add_terms(kind, last, with, weight, k->m, (int)rest, some);
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
