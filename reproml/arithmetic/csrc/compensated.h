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

/* p / d, where d is surely not 0. With h = p.s / d.s, exactly p / d = h + ((p.s - h d.s) + p.t - h d.t) / d; taking
   d.s for the last d errs by up to 2 U, d.e by |h| d.e / |d|. */
static inline pair quotient(pair p, pair d) {
    double high = p.s / d.s, rest = fma(-high, d.s, p.s), product = high * d.t; /* the remainder is exact */
    double e = p.e + fabs(high) * d.e + 8 * U * (fabs(rest) + fabs(p.t) + fabs(product));
    return normal_pair(high, (rest + p.t - product) / d.s, e / (fabs(d.s) - fabs(d.t) - d.e) * SLACK);
}

static inline pair divided(pair p, double divisor) { return quotient(p, (pair){divisor, 0, 0}); }

#endif
