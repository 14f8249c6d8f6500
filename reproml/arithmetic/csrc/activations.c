/* Fast loops of elementwise formulas: exp, expm1, activations and their gradients. */

#include "fast.h"

/* Above 100 the value at 100, which rounds to infinity in binary32 as well, replaces the exponential. */
INLINE double at_most_100(double x) { return x > 100 ? 100 : x; }

/* scale p + (scale - 1): the first is p itself where k = 0 and no larger than the sum elsewhere, so the error stays
   below 2^-48.3 + 5 U < EXP_ERROR. */
INLINE double fast_expm1(double x) {
    double scale, p = exp_parts(at_least_minus_700(x), &scale);
    return copysign(scale * p + (scale - 1), x);
}

INLINE ball relative(double mid, double rel) { return (ball){mid, fabs(mid) * rel}; }

/* elementary.RELATIVE and room for the test. A contraction in erfinv_ only leaves out a rounding. */
#define ERFINV_ERROR (0x1p-49 + 2 * U)

/* -t / (2 + t), t = expm1(-2 |x|) in (-1, 0]: both operands err by EXP_ERROR at most, the quotient by twice that and
   3 U. */
INLINE ball tanh_ball(double x) {
    double t = fast_expm1(-2 * fabs(x));
    return relative(copysign(t / (2 + t), x), 0x1.1p-47);
}

/* sigmoid(x), and sigmoid(-x) in *other: 1 / (1 + t) and t / (1 + t), t = exp(-|x|). t errs by EXP_ERROR, 1 + t by half
   of it and U, the rest by 2 U: together below 1.6 EXP_ERROR. */
#define SIGMOID_ERROR 0x1.ap-48
INLINE double sigmoid_pair(double x, double *other) {
    double t = fast_exp(-fabs(x)), inverse = 1 / (1 + t), product = t * inverse;
    *other = x < 0 ? inverse : product;
    return x < 0 ? product : inverse;
}

INLINE ball sigmoid_ball(double x) {
    double other;
    return relative(sigmoid_pair(x, &other), SIGMOID_ERROR);
}

INLINE ball silu_ball(double x) {
    double other;
    return relative(x * sigmoid_pair(x, &other), SIGMOID_ERROR + 2 * U);
}

/* g f, where f lies within `rad` of `mid`. The sign of f must be known even if g is 0. */
INLINE ball times(double g, double mid, double rad) {
    return (ball){g * mid, fabs(mid) > rad ? fabs(g) * rad + 2 * U * fabs(g * mid) : INFINITY};
}

/* s (1 + x sigmoid(-x)): the second factor cancels, with an error relative to 1 + |x| sigmoid(-x). */
INLINE ball silu_backward_ball(double g, double x) {
    double other, s = sigmoid_pair(x, &other), a = x * other;
    return times(g, s * (1 + a), s * (1 + fabs(a)) * (2 * SIGMOID_ERROR + 8 * U));
}

/* The normal distribution Phi(x), x exact, and exp(-x^2 / 2), whose argument is exact too. Phi(-t) = exp(-t^2 / 2) w
   P(q) for 0 <= t <= 8, w = 1 / (t + 6), q = 1 - 12 w, P of degree 15 at the Chebyshev nodes in q, within 2^-48.7.
   In units of U: q errs by 5, times P' / P < 1.9; Horner's scheme by 4; the products by 4: 18 U and EXP_ERROR. Above
   0, 1 - Phi(-x) is no worse; Phi(-8) < 2^-50 replaces smaller values there. Below -8 PHI_LOW makes the test fail. */
#define PHI_ERROR 0x1.2p-47
#define PHI_LOW(x, rad) ((x) < -8 ? INFINITY : (rad))
INLINE double phi(double x, double *bell) {
    double t = fabs(x) > 8 ? 8 : fabs(x), w = 1 / (t + 6), q = 1 - 12 * w, y = 0x1.cb51e75d95823p-19;
    y = y * q + 0x1.61555d073a9adp-16;
    y = y * q + 0x1.7b201b8c6b81bp-16;
    y = y * q - 0x1.7148796b26686p-15;
    y = y * q + 0x1.9811e23ecbed8p-13;
    y = y * q + 0x1.4195927453580p-15;
    y = y * q - 0x1.17391e2cdcc32p-9;
    y = y * q + 0x1.48a8f521f7823p-7;
    y = y * q - 0x1.fba9ffca2866ep-6;
    y = y * q + 0x1.33e774cb9d4bap-4;
    y = y * q - 0x1.38b069e40eb1cp-3;
    y = y * q + 0x1.1267d73ad4c17p-2;
    y = y * q - 0x1.a7d657723b7f2p-2;
    y = y * q + 0x1.234fe3fd90cd2p-1;
    y = y * q - 0x1.66eaa7d096597p-1;
    y = y * q + 0x1.8e010d2b8a0f0p-1;
    *bell = fast_exp(-0.5 * (x * x));
    double tail = *bell * (w * y);
    return x < 0 ? tail : 1 - tail;
}

/* Below -15 it is closer to 0 than half of the smallest number, and -0; NaN at minus infinity. */
INLINE ball gelu_ball(double x) {
    double bell, mid = x * (x < -15 ? 0 : phi(x, &bell));
    return (ball){mid, x < -15 ? 0 : PHI_LOW(x, fabs(mid) * (PHI_ERROR + 4 * U))};
}

/* Phi(x) + x density(x), which cancels below 0, and below -32 lies between -2^-280 and 0. */
INLINE ball gelu_backward_ball(double g, double x) {
    double bell, c = phi(x, &bell), a = x * (bell * DENSITY_AT_0);
    ball y = times(g, c + a, PHI_LOW(x, (c + fabs(a)) * (PHI_ERROR + 4 * U)));
    y.mid = x < -32 ? g * (x * 0) : y.mid;
    y.rad = x < -32 ? 0 : y.rad;
    return y;
}

/* u = 4 / sqrt(2 pi) (x + 0.044715 x^3), whose sigmoid is (1 + tanh) / 2, and its derivative: both add positive numbers
   and err by less than 8 U. */
#define GELU_SLOPE (4 * DENSITY_AT_0)
#define GELU_CUBIC (GELU_SLOPE * 0.044715)
INLINE double gelu_tanh_inner(double x) { return x * (GELU_SLOPE + GELU_CUBIC * (x * x)); }
INLINE double gelu_tanh_slope(double x) { return GELU_SLOPE + 3 * GELU_CUBIC * (x * x); }

/* The relative error of sigmoid(u) and sigmoid(-u), where u errs by 8 U: an exponential passes that on |u| times. Beyond
   700, 1 has no error and the other is far below the smallest number. */
INLINE double sigmoid_error(double u) { return SIGMOID_ERROR + 8 * U * (fabs(u) < 700 ? fabs(u) : 700); }

INLINE ball gelu_tanh_ball(double x) {
    double other, u = gelu_tanh_inner(x);
    return relative(x * sigmoid_pair(u, &other), sigmoid_error(u) + 2 * U);
}

/* s (1 + x sigmoid(-u) u'), as for silu; its product errs by 10 U more. */
INLINE ball gelu_tanh_backward_ball(double g, double x) {
    double other, u = gelu_tanh_inner(x), s = sigmoid_pair(u, &other), a = x * other * gelu_tanh_slope(x);
    return times(g, s * (1 + a), s * (1 + fabs(a)) * (2 * sigmoid_error(u) + 16 * U));
}

INLINE double softplus(double x) { return (x > 0 ? x : 0) + softplus_of_minus(fabs(x)); }

/* mish(x) = x n / d, t = exp(x), n = t (t + 2), d = n + 2. t errs by E = EXP_ERROR and n by 2 E + 3 U, of which
   n / (n + 2) takes no more, as d has the same n; the roundings of d and of the results add 4 U. Above 40 the quotient is
   1 within U, and so is the derivative: 40 replaces x in both. */
INLINE double mish_terms(double x, double *n, double *d) {
    const double t = fast_exp(x > 40 ? 40 : x);
    *n = t * (t + 2), *d = *n + 2;
    return t;
}

INLINE ball mish_ball(double x) {
    double n, d;
    mish_terms(x, &n, &d);
    return relative(x * (n / d), 2 * EXP_ERROR + 8 * U);
}

/* p x above 0, q expm1(r x) below, where p is a binary32 number, q has up to 48 bits and r x is exact. */
INLINE ball elu_ball(double p, double q, double r, double x) {
    const double y = x > 0 ? p * x : q * fast_expm1(x > 0 ? 0 : r * x);
    return relative(y, x > 0 ? 0 : EXP_ERROR + 2 * U);
}

/* g p above 0, g q exp(r x) below, where q has one rounding. */
INLINE ball elu_backward_ball(double p, double q, double r, double g, double x) {
    const double y = x > 0 ? g * p : g * (q * fast_exp(x > 0 ? 0 : r * x));
    return relative(y, x > 0 ? 0 : EXP_ERROR + 4 * U);
}

/* g p above 0, g r (y + q) below: g p and g r are exact. */
INLINE ball elu_backward_of_result_ball(double p, double q, double r, double g, double y) {
    return relative(y > 0 ? g * p : g * r * (y + q), y > 0 ? 0 : 4 * U);
}

/* t (a + b) / d^2, where a = (t + 2) d errs by 3 E + 6 U, b = 4 x (t + 1) by E + 2 U, and t / d^2 by 5 E + 11 U. */
INLINE ball mish_backward_ball(double g, double x) {
    double n, d;
    const double t = mish_terms(x, &n, &d), a = (t + 2) * d, factor = t / (d * d);
    const double b =
        4 * (((x > 40) & (x < INFINITY)) ? 40 : x) * (t + 1); /* infinite at infinity, where the test fails */
    return times(g, factor * (a + b), factor * (a + fabs(b)) * (8 * EXP_ERROR + 24 * U));
}

/* One loop with the fast test; if an element fails, a second loop with the test that also covers subnormal numbers. */
#define FORMULA(NAME, BALL)                                       \
    case NAME:                                                    \
        for (integer i = 0; i < count; i++) {                     \
            const double x = a[i], y = b[i];                      \
            const ball v = BALL;                                  \
            failures += round_normal_ball(v.mid, v.rad, &out[i]); \
            (void)x, (void)y;                                     \
        }                                                         \
        if (!failures) break;                                     \
        for (integer i = 0; i < count; i++) {                     \
            const double x = a[i], y = b[i];                      \
            const ball v = BALL;                                  \
            failed[i] = round_ball(v.mid, 0, v.rad, &out[i]);     \
            (void)x, (void)y;                                     \
        }                                                         \
        break;

VECTORISED static int32_t activation_block(int which, const double *scalars, const float *restrict a,
                                           const float *restrict b, float *restrict out, int32_t *restrict failed,
                                           integer count) {
    const double p = scalars ? scalars[0] : 0, q = scalars ? scalars[1] : 0, r = scalars ? scalars[2] : 0;
    int32_t failures = 0;
    double other;
    switch (which) {
        FORMULA(EXP, relative(fast_exp(at_most_100(x)), EXP_ERROR))
        FORMULA(EXPM1, relative(fast_expm1(at_most_100(x)), EXP_ERROR))
        FORMULA(ERFINV, relative(erfinv_(x), ERFINV_ERROR))
        FORMULA(TANH, tanh_ball(x))
        FORMULA(SIGMOID, sigmoid_ball(x))
        FORMULA(SILU, silu_ball(x))
        FORMULA(GELU, gelu_ball(x))
        FORMULA(GELU_TANH, gelu_tanh_ball(x))
        FORMULA(SOFTPLUS, relative(softplus(x), SOFTPLUS_ERROR))
        FORMULA(LOG_SIGMOID, relative(-softplus(-x), SOFTPLUS_ERROR))
        FORMULA(ELU, elu_ball(p, q, r, x))
        FORMULA(MISH, mish_ball(x))
        FORMULA(TANH_BACKWARD, relative(x * (1 - y * y), 4 * U))    /* y^2 is exact */
        FORMULA(SIGMOID_BACKWARD, relative(x * y * (1 - y), 4 * U)) /* x y is exact */
        FORMULA(SILU_BACKWARD, silu_backward_ball(x, y))
        FORMULA(GELU_BACKWARD, gelu_backward_ball(x, y))
        FORMULA(GELU_TANH_BACKWARD, gelu_tanh_backward_ball(x, y))
        FORMULA(SOFTPLUS_BACKWARD, relative(x * sigmoid_pair(y, &other), SIGMOID_ERROR + 2 * U))
        FORMULA(LOG_SIGMOID_BACKWARD, relative(x * sigmoid_pair(-y, &other), SIGMOID_ERROR + 2 * U))
        FORMULA(ELU_BACKWARD, elu_backward_ball(p, q, r, x, y))
        FORMULA(ELU_BACKWARD_OF_RESULT, elu_backward_of_result_ball(p, q, r, x, y))
        FORMULA(MISH_BACKWARD, mish_backward_ball(x, y))
    }
    return failures;
}

int32_t reproml_activation_block(int which, const double *scalars, const float *restrict a, const float *restrict b,
                                 float *restrict out, int32_t *restrict failed, integer count) {
    int32_t failures = activation_block(which, scalars, a, b, out, failed, count);
    if (!failures) return 0;
    reproml_round_near_zero(which, a, b, out, failed, count);
    return failures;
}
