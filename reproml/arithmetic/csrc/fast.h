/* Fast loops for the formulas that are used most. Each does in one pass what program.c does for any formula, with
   just as much precision as the rounding test needs (about 2^-47; one element in a million fails) and a bound
   derived by hand, which leaves room of U |mid| for the test (round_normal_ball). Elements that fail go to program.c
   and from there to the reference path.

   Include this file first: the pragma has to precede every inlined function. */

#ifndef REPROML_FAST_H
#define REPROML_FAST_H

/* Contraction is within every bound: two_sum takes no product, or an exact one. */
#ifdef __clang__
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif

#include "activations.h"
#include "elementary.h"
#include "rounding.h"

enum { ROW_MAX = 2048 };

/* A real number that lies within `rad` of `mid`. */
typedef struct {
    double mid, rad;
} ball;

/* exp(x) = scale (1 + p), for |x| <= 700. x = k ln 2 + r, |r| <= 0.3466, as in elementary.py; p = expm1(r) = r + r^2
   Q(r), with Q of degree 8 at the Chebyshev nodes. The error of p is below 2^-48.3 of p and of 1 + p; roundings add
   3 U of p. So exp errs by less than EXP_ERROR. */
#define EXP_ERROR 0x1p-48
INLINE double exp_parts(double x, double *scale) {
    double shifted = x * 1.4426950408889634 + 0x1.8p52, k = shifted - 0x1.8p52; /* the last bits of `shifted` hold k */
    double r = (x - k * 0x1.62e42fefap-1) - k * 0x1.cf79abc9e3b3ap-40, y = 0x1.28803a9f7bb01p-22;
    y = y * r + 0x1.72c722e81c5f2p-19;
    y = y * r + 0x1.a019c9aa11c0bp-16;
    y = y * r + 0x1.a019adaa6411ep-13;
    y = y * r + 0x1.6c16c1738f05cp-10;
    y = y * r + 0x1.1111111c46274p-7;
    y = y * r + 0x1.5555555554cb8p-5;
    y = y * r + 0x1.5555555553b7cp-3;
    y = y * r + 0x1p-1;
    *scale = from_pattern((int64_t)((uint64_t)(pattern(shifted) + 1023) << 52));
    return r + r * r * y;
}

/* Below -700 the value at -700 replaces exp(x), both being far below the smallest binary32 number. */
INLINE double at_least_minus_700(double x) { return x < -700 ? -700 : x; }

/* For x <= 700. */
INLINE double fast_exp(double x) {
    double scale, p = exp_parts(at_least_minus_700(x), &scale);
    return scale + scale * p;
}

/* log(1 + exp(x)) = max(x, 0) + log(1 + t), t = exp(-|x|) <= 1. log(1 + t) is 2 artanh s with s = t / (2 + t), or for
   t > sqrt 2 - 1 log 2 + 2 artanh s with s = (t - 1) / (t + 3), so that |s| < 0.172: the series is cut after s^23 with
   less than 2^-65. t errs by EXP_ERROR, and so does log(1 + t), the rest by 10 U. */
#define SOFTPLUS_ERROR (EXP_ERROR + 16 * U)
INLINE double softplus_of_minus(double size) {
    const double t = fast_exp(-size), s = t > 0.4142 ? (t - 1) / (t + 3) : t / (2 + t), log_2 = 0x1.62e42fefa39efp-1;
    return (t > 0.4142 ? log_2 : 0) + (2 * s + artanh_rest(s));
}

/* Some rows of n <= ROW_MAX numbers each, ROW_MAX numbers at most, and what is calculated from them. */
typedef struct {
    const float *x, *y;
    float *out;
    integer rows, n;
    double mid[ROW_MAX];                           /* of each number */
    double of_row[ROW_MAX], error_of_row[ROW_MAX]; /* one number for each row, and a bound of its error */
    float x_copy[ROW_MAX], y_copy[ROW_MAX], out_copy[ROW_MAX];
    int any_failed;
    int32_t failed[ROW_MAX];
} row_table;

/* softmax.c: fill out and, where any failed, failed. */
void reproml_softmax_rows(int which, row_table *t);

#endif
