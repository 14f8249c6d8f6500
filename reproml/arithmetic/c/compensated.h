/* Sums with their rounding errors kept: what Ziv's test cannot settle on a plain sum, this mostly can
   (T. Ogita, S. Rump & S. Oishi, Accurate sum and dot product, SIAM J. Sci. Comput. 26(6), 2005).

   The sum is s + t; t's own roundings err by at most gamma_k * size, t being a sum of k numbers whose
   absolute values sum up to `size`. Nothing underflows: terms are products of at most four binary32 numbers,
   so multiples of 2^-596. */

#ifndef REPROML_COMPENSATED_H
#define REPROML_COMPENSATED_H

#include "common.h"

typedef struct {
    double s, t, size;
} compensated;

static inline void add_small(compensated *sum, double x) {
    sum->t += x;
    sum->size += fabs(x);
}

static inline void add_exact(compensated *sum, double x) {
    double error;
    two_sum(sum->s, x, &sum->s, &error);
    add_small(sum, error);
}

static inline void add_product(compensated *sum, double a, double b) {
    double product = a * b;
    add_exact(sum, product);
    add_small(sum, fma(a, b, -product));
}

/* a (x - m) */
static inline void add_deviation(compensated *sum, double a, double x, double m) {
    double high, low;
    two_sum(x, -m, &high, &low);
    add_product(sum, a, high);
    add_small(sum, a * low);
}

/* A number s + t, |t| <= |s|, known within e. */
typedef struct {
    double s, t, e;
} pair;

static inline pair normal_pair(double s, double t, double e) {
    pair p = {0, 0, e};
    two_sum(s, t, &p.s, &p.t);
    return p;
}

/* The sum of n terms, each of which added at most four numbers to t, which are rounded three times. */
static inline pair pair_of(const compensated *sum, integer n) {
    return normal_pair(sum->s, sum->t, sum->size * (4 * (double)n + 4) * U * SLACK);
}

static inline pair scaled(pair p, double factor) {
    double high = p.s * factor, low = fma(p.s, factor, -high), rest = p.t * factor;
    return normal_pair(high, low + rest, p.e * fabs(factor) + 4 * U * (fabs(low) + fabs(rest)));
}

static inline pair divided(pair p, double divisor) {
    double high = p.s / divisor, rest = fma(-high, divisor, p.s); /* the remainder is exact */
    double e = p.e + 4 * U * (fabs(rest) + fabs(p.t));
    return normal_pair(high, (rest + p.t) / divisor, e / fabs(divisor));
}

#endif
