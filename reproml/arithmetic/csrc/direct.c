/* Operators of one or two operations on binary32 numbers, rounded correctly without a test, so that no element is left
   to another path.

   Each value is a sum of products that binary64 holds exactly, perhaps divided by one exact number d. Binary64 numbers
   that are rounded to odd compare with every number of up to 52 bits as the exact value does, and rounding them again to
   binary32 rounds that value (Boldo & Melquiond, IEEE Transactions on Computers 57(4), 2008). So

       a + b        is rounded to odd: `sum`;
       a + b + c    is the fused multiply-add of the same paper, with c + b in place of the product: `sum_of_3`;
       (a + b) / d  has S = a + b rounded to odd, then S / d rounded to odd by the sign of its remainder. A midpoint m of
                    binary32 has 25 bits and d up to 27, so m d has up to 52 bits and S compares with it as a + b does:
                    `quotient`.

   Roots are sqrtf's, and in 16 bits those of binary64, rounded again; maximum, minimum and the gradient of shrinking
   choose between operands. Remainders and whole quotients have steps that are exact.

   Nothing underflows: the terms are products of at most three binary32 numbers. Where an operand is infinite or NaN, and
   for the sign of an exact zero, the result is that of `mid`, by IEEE arithmetic step by step (compiler/evaluate.py).

   All this takes several times as long as the rounding test, so a block of numbers takes the test first (the balls below,
   and QUICKLY), and is computed as above if an element fails. */

#include "rounding.h"

/* In the order of compiler/direct.py. */
enum {
    ADD_SCALED,
    ADDCMUL,
    ADDCDIV,
    LERP,
    LEAKY_RELU,
    LEAKY_RELU_BACKWARD,
    HARDSIGMOID,
    HARDSIGMOID_BACKWARD,
    HARDSWISH,
    HARDSWISH_BACKWARD,
    MSE_LOSS_BACKWARD,
    SMOOTH_L1_BACKWARD,
    SQRT,
    MAXIMUM,
    MINIMUM,
    PRELU,
    SOFTSHRINK,
    SHRINK_BACKWARD,
    FMOD,
    REMAINDER,
    FLOOR_DIVIDE,
    TRUNC_DIVIDE
};

enum { DIRECT_BLOCK = 256, DIRECT_TASKS = 64 };

/* s + t, |t| <= ulp(s), rounded to odd; s if t is 0 or NaN. */
INLINE double to_odd(double s, double t) {
    const int64_t sum = pattern(s), away = (t > 0) == (s > 0) ? 1 : -1;
    return from_pattern(sum + (((t > 0) | (t < 0)) & ~sum & 1 ? away : 0));
}

INLINE double sum(double a, double b) {
    double s, t;
    two_sum(a, b, &s, &t);
    return to_odd(s, t);
}

INLINE float or_mid(double value, double mid) {
    const double zero = mid == 0 ? mid : 0.0;
    value = value == 0 ? zero : value;
    return to_target(fabs(value) <= DBL_MAX ? value : mid);
}

INLINE double sum_of_3(double a, double b, double c) {
    double high, low, error, rest;
    two_sum(a, b, &high, &low);
    two_sum(c, high, &high, &error);
    rest = sum(low, error);
    return sum(high, rest);
}

/* a b + c, where a has up to 48 bits and b up to 24. */
INLINE double product_plus(double a, double b, double c) {
    const double product = a * b;
    return sum_of_3(c, fma(a, b, -product), product);
}

/* (a + b) / d, given 1 / d rounded. The first q errs by 2 U, the second is one of the two neighbours of s / d, so its
   remainder is exact (P. Markstein, IBM Journal of Research and Development 34(1), 1990). */
INLINE double quotient(double a, double b, double d, double inverse) {
    const double s = sum(a, b);
    double q = s * inverse;
    q = fma(fma(-q, d, s), inverse, q);
    const double rest = fma(-q, d, s);
    return to_odd(q, d < 0 ? -rest : rest);
}

static const double SIXTH = 1 / 6.0;

INLINE double clamped(double x) { return x < -3 ? -3 : x > 3 ? 3 : x; }

/* s / 6, s = c + 3, rounded to binary64, is a midpoint m only if s / 6 is: |s - 6 m| would be at least ulp(s), and the
   quotient is rounded by at most ulp(s) / 8. Where s is rounded, |c| < 2^-28, and the result is 1 / 2. */
INLINE float hardsigmoid(double x) { return to_target((clamped(x) + 3) / 6); }

INLINE float hardswish(double x) {
    const double c = clamped(x);
    return or_mid(quotient(x * c, 3 * x, 6, SIXTH), x * (c + 3));
}

INLINE float hardswish_backward(float g, float x) {
    const double middle = or_mid(quotient(2.0 * g * x, 3.0 * g, 6, SIXTH), (double)g * (2.0 * x + 3));
    return x <= -3 ? 0.0f : x < 3 ? (float)middle : g;
}

/* g d / n within (-1, 1), else g sign(d) / n, with d = x - y. */
INLINE float smooth_l1_backward(double x, double y, double g, double n, double inverse) {
    const double d = sum(x, -y), one = d > 0 ? g : d < 0 ? -g : g * d;
    const double within = quotient(g * x, -g * y, n, inverse), beyond = quotient(one, 0, n, inverse);
    return fabs(d) < 1 ? or_mid(within, g * (x - y)) : or_mid(beyond, one);
}

INLINE double near_smooth_l1_backward(double x, double y, double g, double inverse) {
    const double d = x - y, limited = d > 1 ? 1 : d < -1 ? -1 : d;
    return g * limited * inverse;
}

/* NaN if either number is; +0 > -0. */
INLINE float maximum(float x, float y) {
    const float larger = x > y ? x : y, sum = x + y;
    return (((x == 0) & (y == 0)) | (x != x) | (y != y)) ? sum : larger;
}

/* Rounded by the test. mid errs by n U of |mid| + of_terms; one more is for the test, and one is room. */
INLINE int32_t near(double mid, double of_terms, int n, float *result) {
    return round_normal_ball(mid, (n + 2) * U * (fabs(mid) + of_terms), result);
}

INLINE int32_t near_hardswish_backward(float g, float x, float *result) {
    float middle;
    const int32_t inside = (x > -3) & (x < 3), failed = near((double)g * (2.0 * x + 3) * SIXTH, 0, 4, &middle);
    *result = inside ? middle : x <= -3 ? 0.0f : g;
    return failed & -inside;
}

#define EACH(BODY)                                               \
    for (integer i = 0; i < count; i++) {                        \
        const float xf = x[i], yf = y[i], zf = z[i];             \
        const double a = xf, b = yf, c = zf;                     \
        (void)xf, (void)yf, (void)zf, (void)a, (void)b, (void)c; \
        BODY;                                                    \
    }
#define LOOP(NAME, VALUE) \
    case NAME: EACH(out[i] = VALUE) break;
#define QUICKLY(NAME, FAILED, VALUE)     \
    case NAME:                           \
        EACH(failed |= FAILED)           \
        if (failed) EACH(out[i] = VALUE) \
        break;

VECTORISED static void run_block(int which, const float *restrict x, const float *restrict y, const float *restrict z,
                                 double scalar, float *restrict out, integer count) {
    const float narrow = (float)scalar;
    const double inverse = 1 / scalar;
    int32_t failed = 0;
    switch (which) {
        QUICKLY(ADD_SCALED, near(a + scalar * b, 0, 1, out + i), to_target(sum(a, scalar * b)))
        QUICKLY(ADDCMUL, near(a + scalar * b * c, fabs(scalar * b * c), 1, out + i),
                or_mid(product_plus(scalar * b, c, a), a + scalar * b * c))
        QUICKLY(ADDCDIV, near(a + scalar * b / c, fabs(scalar * b / c), 1, out + i),
                or_mid(quotient(a * c, scalar * b, c, 1 / c), a + scalar * b * (1 / c)))
        QUICKLY(LERP, near(a + c * (b - a), fabs(c * (b - a)), 2, out + i),
                or_mid(sum_of_3(a, -c * a, c * b), a + c * (b - a)))
        LOOP(LEAKY_RELU, xf > 0 ? xf : to_target(a * narrow))
        LOOP(LEAKY_RELU_BACKWARD, yf > 0 ? xf : to_target(a * narrow))
        LOOP(HARDSIGMOID, hardsigmoid(a))
        LOOP(HARDSIGMOID_BACKWARD, ((yf > -3) & (yf < 3)) ? to_target(a / 6) : 0.0f)
        QUICKLY(HARDSWISH, near(a * (clamped(a) + 3) * SIXTH, 0, 4, out + i), hardswish(a))
        QUICKLY(HARDSWISH_BACKWARD, near_hardswish_backward(xf, yf, out + i), hardswish_backward(xf, yf))
        QUICKLY(MSE_LOSS_BACKWARD, near(2 * c * (a - b) * inverse, 0, 4, out + i),
                or_mid(quotient(2 * c * a, -2 * c * b, scalar, inverse), c * (a - b)))
        QUICKLY(SMOOTH_L1_BACKWARD, near(near_smooth_l1_backward(a, b, c, inverse), 0, 4, out + i),
                smooth_l1_backward(a, b, c, scalar, inverse))
        LOOP(SQRT, PRECISION == 24 ? sqrtf(xf) : to_target(sqrt(a))) /* see pointwise.sqrt */
        LOOP(MAXIMUM, maximum(xf, yf))
        LOOP(MINIMUM, -maximum(-xf, -yf))
        LOOP(PRELU, xf > 0 ? xf : to_target(a * b))
        LOOP(SOFTSHRINK, xf > narrow ? to_target(sum(a, -scalar)) : xf < -narrow ? to_target(sum(a, scalar)) : xf * 0)
        LOOP(SHRINK_BACKWARD, fabsf(yf) <= narrow ? 0 : xf)
    }
}

/* r modulo d for 0 <= r < 2^52 d, where each has up to 24 bits. The quotient, rounded, is at most 1 too large, as binary64
   has all integers below 2^52 and rounding is monotone. Its remainder r - q d is exact: where the last place of d is not
   above that of r, it is a multiple of that of d and not above d; otherwise q is not too large, as q d - r would be below
   2^-52 r and a multiple of the last place of r. So the result has up to 24 bits. */
INLINE double modulo(double r, double d) {
    const double rest = fma(-trunc(r / d), d, r);
    return rest < 0 ? rest + d : rest;
}

/* trunc(r / d) for r >= 0 and d > 0. From 2^52 on, where it would have more than 53 bits, it is r / d: a midpoint m of 25
   bits is an integer there, and either r = m d or |r - m d| is at least one unit of the last place of m d, at least
   2^-49 m d, so that m lies on the same side of r / d, of this rounded to binary64 and of the integers around it. */
INLINE double whole_quotient(double r, double d) {
    const double q = r / d, whole = trunc(q);
    return q < 0x1p52 ? (fma(-whole, d, r) < 0 ? whole - 1 : whole) : q;
}

VECTORISED static void run_remainders(int which, const float *restrict x, const float *restrict y, float *restrict out,
                                      integer count) {
    double r[DIRECT_BLOCK], d[DIRECT_BLOCK];
    int far = 0;
    for (integer i = 0; i < count; i++) {
        const int regular = (fabsf(x[i]) <= FLT_MAX) & (fabsf(y[i]) <= FLT_MAX) & (y[i] != 0);
        r[i] = regular ? fabsf(x[i]) : 0;
        d[i] = regular ? fabsf(y[i]) : 1;
        far |= r[i] >= 0x1p52 * d[i];
    }
    for (int k = far ? 5 : 0; k >= 0; k--) { /* r < 2^277 d */
        const double scale = from_pattern((int64_t)(1023 + 52 * k) << 52);
        for (integer i = 0; i < count; i++) r[i] = modulo(r[i], scale * d[i]);
    }
    for (integer i = 0; i < count; i++) {
        const float a = x[i], b = y[i];
        const int finite = fabsf(a) <= FLT_MAX, regular = finite & (fabsf(b) <= FLT_MAX) & (b != 0);
        const float limit = (finite & (fabsf(b) > FLT_MAX)) ? a : NAN;
        const float rest = regular ? copysignf((float)r[i], a) : limit;
        const int up = (rest != 0) & ((rest < 0) != (b < 0)); /* trunc(a / b) > floor(a / b) */
        if (which == FMOD) {
            out[i] = rest;
        } else if (which == REMAINDER) {
            out[i] = up ? to_target(sum(rest, b)) : rest;
        } else {
            const int floored = which == FLOOR_DIVIDE;
            const float ratio = a / b, sign = copysignf(1, a) * copysignf(1, b);
            const float at_infinity = limit == limit ? (up ? -1 : 0 * sign) : NAN,
                        at_limit = b == 0 ? ratio : at_infinity;
            const double q = whole_quotient(regular ? fabsf(a) : 0, d[i]),
                         size = q < 0x1p52 && floored && up ? q + 1 : q;
            out[i] = regular ? to_target(sign * size) : floored ? at_limit : truncf(ratio);
        }
    }
}

typedef struct {
    int which;
    integer n, tasks;
    const float *const *operands;
    const integer *steps;
    double scalar;
    float *out;
} direct_call;

static void run_task(integer task, void *data) {
    const direct_call *c = data;
    const integer blocks = (c->n + DIRECT_BLOCK - 1) / DIRECT_BLOCK;
    const integer last = blocks * (task + 1) / c->tasks * DIRECT_BLOCK, end = last < c->n ? last : c->n;
    float constant[3][DIRECT_BLOCK];
    for (int j = 0; j < 3; j++)
        for (integer i = 0; !c->steps[j] && i < DIRECT_BLOCK; i++) constant[j][i] = *c->operands[j];
    for (integer at = blocks * task / c->tasks * DIRECT_BLOCK; at < end; at += DIRECT_BLOCK) {
        const float *x[3];
        for (int j = 0; j < 3; j++) x[j] = c->steps[j] ? c->operands[j] + at : constant[j];
        const integer count = end - at < DIRECT_BLOCK ? end - at : DIRECT_BLOCK;
        if (c->which >= FMOD)
            run_remainders(c->which, x[0], x[1], c->out + at, count);
        else
            run_block(c->which, x[0], x[1], x[2], c->scalar, c->out + at, count);
    }
}

/* out[i] = the operator of three operands, each n numbers (step 1) or one for all (step 0), and of a scalar. */
void reproml_direct(int which, integer n, const float *const *operands, const integer *steps, double scalar, float *out,
                    integer tasks) {
    direct_call c = {which, n, tasks < DIRECT_TASKS ? tasks : DIRECT_TASKS, operands, steps, scalar, out};
    reproml_parallel(run_task, &c, c.tasks);
}

VECTORISED static void run_recurrence(const float *restrict g, const float *restrict x, integer n, integer inner,
                                      float *restrict out) {
    memcpy(out + (n - 1) * inner, g + (n - 1) * inner, (size_t)inner * sizeof(float));
    for (integer i = n - 2; i >= 0; i--) {
        const float *restrict term = g + i * inner, *restrict factor = x + (i + 1) * inner;
        const float *before = out + (i + 1) * inner;
        float *to = out + i * inner;
        for (integer j = 0; j < inner; j++) {
            const double a = term[j], b = factor[j], c = before[j];
            to[j] = or_mid(product_plus(b, c, a), a + b * c);
        }
    }
}

/* out[i] = g[i] + x[i + 1] out[i + 1], each rounded once, from the last to the first; all are [n, inner], n > 0. */
void reproml_recurrence(integer n, integer inner, const float *g, const float *x, float *out) {
    run_recurrence(g, x, n, inner, out);
}
