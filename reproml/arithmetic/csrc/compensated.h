/* Sums that keep their rounding errors. Where the rounding test fails on a simple sum, it mostly passes on this one
   (T. Ogita, S. Rump & S. Oishi, Accurate sum and dot product, SIAM J. Sci. Comput. 26(6), 2005).

   The sum is s + t. The additions to t err by at most gamma_k * size if t is a sum of k numbers whose absolute
   values add up to `size`. Nothing underflows: terms are products of at most four binary32 numbers, so multiples of
   2^-596. */

#ifndef REPROML_COMPENSATED_H
#define REPROML_COMPENSATED_H

#include "rounding.h"

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

/* Add a (x - m). */
static inline void add_deviation(compensated *sum, double a, double x, double m) {
    double high, low;
    two_sum(x, -m, &high, &low);
    add_product(sum, a, high);
    add_small(sum, a * low);
}

/* The sum of n terms, each of which added at most four numbers to t, with at most three roundings. */
static inline pair compensated_pair(const compensated *sum, integer n) {
    return make_pair(sum->s, sum->t, sum->size * (4 * (double)n + 4) * U * SLACK);
}

INLINE pair pair_times(pair p, double factor) {
    double high = p.s * factor, low = fma(p.s, factor, -high), rest = p.t * factor;
    double rounded = rest == 0 ? 0 : 4 * U * (fabs(low) + fabs(rest));
    return make_pair(high, low + rest, p.rad * fabs(factor) + rounded);
}

/* What is lost of the sum's third term is in its bound, which is 0 if the sum is exact. */
INLINE pair pair_plus(pair p, pair q) {
    double s, t, low, lost, more;
    two_sum(p.s, q.s, &s, &t);
    two_sum(p.t, q.t, &low, &lost);
    two_sum(t, low, &t, &more);
    return make_pair(s, t, p.rad + q.rad + fabs(lost) + fabs(more));
}

/* A product below 2^-960 may lose more than its bound has, but keeps its sign; such a term counts as zero beside any
   other (docs/contract.md). */
INLINE pair pair_times_pair(pair p, pair q) {
    double high = p.s * q.s, low = fma(p.s, q.s, -high), a = p.s * q.t, b = p.t * q.s, both = fabs(a) + fabs(b);
    double rounded = both == 0 ? 0 : 4 * U * (fabs(low) + both) + fabs(p.t * q.t);
    double rad = (fabs(p.s) + fabs(p.t)) * q.rad + (fabs(q.s) + fabs(q.t)) * p.rad + p.rad * q.rad;
    return make_pair(high, low + (a + b), rad + rounded);
}

/* p / d, where the interval of d must not contain 0. With h = p.s / d.s, p / d = h + ((p.s - h d.s) + p.t - h d.t) / d
   exactly; d.s in place of the last d errs by up to 2 U, d.rad by |h| d.rad / |d|. */
INLINE pair pair_over_pair(pair p, pair d) {
    double high = p.s / d.s, rest = fma(-high, d.s, p.s), product = high * d.t; /* the remainder is exact */
    double rad = p.rad + fabs(high) * d.rad + 8 * U * (fabs(rest) + fabs(p.t) + fabs(product));
    return make_pair(high, (rest + p.t - product) / d.s, rad / (fabs(d.s) - fabs(d.t) - d.rad) * SLACK);
}

INLINE pair pair_over(pair p, double divisor) { return pair_over_pair(p, (pair){divisor, 0, 0}); }

/* The square root of p > 0. With s = sqrt(p.s), which has one rounding, and r = (p.s - s^2) + p.t, it is
   s + r / (2 s) - r^2 / (8 s^3) + ...; the remainder p.s - s^2 is exact. */
INLINE pair pair_sqrt(pair p) {
    double s = sqrt(p.s), rest = fma(-s, s, p.s), r = rest + p.t;
    double rounded = 4 * U * (fabs(rest) + fabs(p.t)) / s + r * r / (s * s * s);
    return make_pair(s, r / (2 * s), (rounded + p.rad / s) * SLACK);
}

/* Round a sum of n terms, each added by add_exact. Sums without any rounding error pass even if they are midpoints or
   zeros, as sums of integers often are. */
static inline int32_t round_compensated(const compensated *sum, integer n, float *result) {
    pair value = {sum->s, sum->t, sum->size * ((double)n + 4) * U * SLACK};
    *result = to_target(sum->s);
    if (!(fabs(sum->s) <= DBL_MAX)) return 0; /* infinite or NaN in any order */
    return round_pair(value, result);
}

#endif
