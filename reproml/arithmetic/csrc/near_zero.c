/* Series of activations near zero, in pairs: the first terms are often a midpoint of two binary32 numbers. They stand
   apart from activations.c, which contracts products and sums. */

#include "activations.h"
#include "compensated.h"

INLINE int is_near(double x) { return (fabs(x) <= 0x1p-9) & (x != 0); }

/* 1/2 + x / 4 - x^3 / 48 + x^5 / 480 - 17 x^7 / 80640 + ...: the first two terms are often a midpoint. */
INLINE pair sigmoid(double x) {
    const double x2 = x * x, c = x * x2 * (x2 * (1 / 480.0) - 1 / 48.0);
    return pair_plus(make_pair(0.5, 0.25 * x, 0), (pair){c, 0, fabs(c) * (8 * U + x2 * x2 * 0x1p-6)});
}

/* x / 2 + x^2 / 4 - x^4 / 48 + x^6 / 480 - ...: half of a subnormal number may be a midpoint. */
INLINE pair silu(double x) {
    const double x2 = x * x, c = x2 * (0.25 - x2 * (1 / 48.0));
    return make_pair(0.5 * x, c, c * (8 * U + x2 * x2 * 0x1p-5));
}

/* g times the derivative of that series, 1/2 + x / 2 - x^3 / 12 + x^5 / 80 - 17 x^7 / 10080 + ... */
INLINE pair silu_backward(double g, double x) {
    const double x2 = x * x, c = x * x2 * (x2 * (1 / 80.0) - 1 / 12.0);
    const pair rest = {c, 0, fabs(c) * (8 * U + x2 * x2 * 0x1p-4)};
    return pair_times(pair_plus(make_pair(0.5, 0.5 * x, 0), rest), g);
}

/* gelu, x / 2 + d (x^2 + t x^4 + ...) with d = 1 / sqrt(2 pi): t = -1/6, and 0.044715 - 4 d^2 / 3 for the form with tanh;
   and g times its derivative. The next term is below 0.026 d x^6 in both. */
#define GELU_TERM (-1 / 6.0)
#define GELU_TANH_TERM (0.044715 - DENSITY_AT_0 * DENSITY_AT_0 * (4 / 3.0))

INLINE pair gelu(double x, double t) {
    const double x2 = x * x, c = DENSITY_AT_0 * x2 * (1 + t * x2);
    return make_pair(0.5 * x, c, c * (8 * U + x2 * x2 * 0x1p-5));
}

INLINE pair gelu_backward(double g, double x, double t) {
    const double x2 = x * x, c = 2 * DENSITY_AT_0 * x * (1 + 2 * t * x2);
    const pair rest = {c, 0, fabs(c) * (8 * U + x2 * x2 * 0x1p-3)};
    return pair_times(pair_plus((pair){0.5, 0, 0}, rest), g);
}

#define LOOP(NEAR, VALUE)                                \
    for (integer i = 0; i < count; i++) {                \
        float y;                                         \
        const int near = failed[i] && (NEAR);            \
        const int32_t left = round_pair(VALUE, &y) != 0; \
        out[i] = near ? y : out[i];                      \
        failed[i] = near ? left : failed[i];             \
    }

VECTORISED static void round_block(int which, const float *restrict a, const float *restrict b, float *restrict out,
                                   int32_t *restrict failed, integer count) {
    if (which == SIGMOID)
        LOOP(is_near(a[i]), sigmoid(a[i]))
    else if (which == SOFTPLUS_BACKWARD || which == LOG_SIGMOID_BACKWARD) {
        const double sign = which == SOFTPLUS_BACKWARD ? 1 : -1;
        LOOP(is_near(b[i]) && a[i] != 0, pair_times(sigmoid(sign * b[i]), a[i]))
    } else if (which == SILU)
        LOOP(is_near(a[i]), silu(a[i]))
    else if (which == SILU_BACKWARD)
        LOOP(is_near(b[i]) && a[i] != 0, silu_backward(a[i], b[i]))
    else if (which == GELU || which == GELU_TANH) {
        const double t = which == GELU ? GELU_TERM : GELU_TANH_TERM;
        LOOP(is_near(a[i]), gelu(a[i], t))
    } else if (which == GELU_BACKWARD || which == GELU_TANH_BACKWARD) {
        const double t = which == GELU_BACKWARD ? GELU_TERM : GELU_TANH_TERM;
        LOOP(is_near(b[i]) && a[i] != 0, gelu_backward(a[i], b[i], t))
    }
}

void reproml_round_near_zero(int which, const float *a, const float *b, float *out, int32_t *failed, integer count) {
    round_block(which, a, b, out, failed, count);
}
