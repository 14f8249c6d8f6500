/* The rounding test (A. Ziv, ACM TOMS 17(3), 1991), as in numerics/rounding.py: if a real number lies within `rad` of
   `mid` and both ends of that interval round to the same binary32 number, so does the real number.

   Every function of this file stores the rounded number in *result and returns 0 if the test passed; otherwise it
   returns a nonzero value, and *result is a guess. All of them consist of

       the two ends, computed in binary64, so that each may move inward by up to U (|mid| + rad): the bound needs ROOM
       for that, or an end may land on the midpoint of two binary32 numbers with the real number on its other side;
       a comparison of the rounded ends, either as numbers (-0 equals +0, NaN fails) or as bit patterns.

   They differ in what they assume of `rad`:

   function           compares  assumes of rad                     room for the test, sign of a zero
   -----------------  --------  ---------------------------------  ----------------------------------------------------
   round_ball         numbers   bounds |real - mid|, no more       adds SLACK, 2 U |mid| and TINY; a result of 0 by
                                                                   underflow fails if its sign is unknown
   round_padded_ball  numbers   has room of U |mid|                adds TINY; zeros as in round_ball
   round_normal_ball  numbers   has room of U |mid|                fails on subnormal and infinite results and on zeros
                                                                   that are not exact, so TINY does not matter
   round_sum          patterns  has room of U |mid|; nothing       adds nothing; -0 and +0 differ, so an exact zero has
                                underflows, as in sums of          to be +0
                                products of binary32 numbers
   round_sum_quickly  patterns  as round_sum; is 0 or >= 2^-149    adds 2^-23 (|mid| + rad), as its ends are rounded to
                                                                   binary32 first, for PRECISION < 24; the balls do so too
   round_signed_sum   patterns  as round_sum                       adds nothing; an exact -0 stays -0
   round_pair         patterns  bounds |real - (s + t)|            adds SLACK and 2 U |t|; the ends are rounded to odd,
                                                                   so s needs no room; an exact zero is +0

   Where the callers have their room, one line for each use. Errors are in units of U of the stated quantity; h is the
   height of the tree of additions; "+ 1" is the room that the test needs. It need not be more, not even for terms of
   order U^2: a midpoint M of two binary32 numbers is at least (1 + 2^-24) 2^k where the spacing of binary64 at M is
   2 U 2^k, so U |mid| exceeds the rounding of an end at M by a fraction of 2^-24.

   use                                    function           errors                         in the bound
   -------------------------------------  -----------------  -----------------------------  ---------------------------
   direct.c: first test                   round_normal_ball  n; + 1                         n + 2
   program.c: any formula                 round_ball         those of numerics/balls.py     nothing more
   activations.c, softmax.c: second test  round_ball         as in the first test           as in the first test
   softmax_pairs.c: running logsumexp     round_ball         log1p's, and that of its pair   the same
   losses.c: gradient of nll_loss         round_ball         1                              2
   activations.c: first test              round_normal_ball  stated at each formula; + 1    at least 1 more
   softmax.c: softmax, log_softmax        round_normal_ball  h + 2; + 1                     h + 4
   softmax.c: backward                    round_normal_ball  sum h; result 2 (log_softmax   h; 3 (2 and EXP_ERROR + 1)
                                                             1 and the exponential); + 1
   optimizers.c: averages                 round_padded_ball  2; + 1                         3; Adam's second average 4
   optimizers.c: parameters               round_padded_ball  Adam 3 and 12, SGD 2; + 1      Adam 5 and 20, SGD 3 and 6
   optimizer_formulas.c                   round_padded_ball  those of balls.h; + 1          SLACK and 2 more
   optimizers.h: second test              round_pair         Adam 2 and 12; balls.h         3 (0 if exact) and 20
   panels.c, convolution.c                round_sum          h, bias 1; + 1                 h + 8 (relative_bound)
   panels.c: blocks in binary32           round_sum_quickly  w of 2^-24, h, bias 1; + 1     w, 2^-40, h + 8
   reductions.c: sums                     round_sum          h, divisor 1; + 1              h + 4
   reductions.c: squared differences      round_sum          terms 3, h, divisor 1; + 1     h + 7
   losses.c: sums of losses               round_pair         terms 5, h 8, SOFTPLUS_ERROR   16, SOFTPLUS_ERROR
   reductions.c: few terms                round_sum          divisor 1; + 1                 4; 0 if nothing was rounded
   partial_sums.c: sums of all workers    round_sum          h + W, packing, divisor 1; + 1 h + W + 3, 1.125 of packing
   normalization.c: mean                  round_signed_sum   h, division by n 2; + 1        h + 5
   normalization.c: variance              round_signed_sum   h + 3; result 1; + 1           h + 6; result 2
   normalization.c: 1 / sqrt(v)           round_signed_sum   result 2, half of v's; + 1     4, and 0.6 of v's
   normalization.c: output                round_signed_sum   product 3, bias 1; + 1         6, 4
   normalization.c: running statistics    round_signed_sum   2; + 1                         5
   normalization.c: sums of the backward  round_signed_sum   h, terms 2, factor 1; + 1      h + 8
   normalization.c: gradient              round_signed_sum   w g 2, slope 6, a 4; + 1       5, 9, 9
   normalization.c: given statistics      round_signed_sum   1; + 1                         4
   products.c                             round_signed_sum   n - 1; + 1                     n + 4
   products.c: second test                round_pair         2 (n - 1)^2 U                  4 n^2 U; 0 if exact
   compensated.h, indexing.c              round_pair         of t: its additions            4 n + 4, n + 4 or n + 2 of
                                                                                            the sum of |errors|
   near_zero.c                            round_pair         5 of the rest c, the next term 8, more than the next
   pairs.c, pair_program.c,
   softmax_pairs.c                        round_pair         those of the pairs' operations nothing more
   normalization.c: second test           round_pair         those of the pairs' operations nothing more
   weighted_sums.c: first test            round_sum          n - 1 and 2 for each axis; + 1 n + 2 for each axis, + 8
   weighted_sums.c: quotients             round_sum          1; + 1                         3; 0 if exact
   weighted_sums.c: single results        round_pair         of t: its additions            4 n + 4, those of the quotient
   distances.c: distances                 round_sum          h + 3, half; root 1; + 1       h + 11, half; 3
   distances.c: gradients                 round_sum          m - 1, terms 3; + 1            m + 11
   distances.c: second tests              round_pair         those of compensated.h         4 n + 4, rad of the quotients
   weight_norm.c: scaled rows             round_sum          2; product 1; + 1              4, rad of the factor
   weight_norm.c: gradients               round_sum          3; sum and factor 4; + 1       3, 6 and rad of both factors
   weight_norm.c: second tests            round_pair         those of the pairs' operations nothing more
   grid_sampling.c: samples               round_sum          n, weight its t and rad; + 1   n + 4, both
   grid_sampling.c: second test           round_pair         those of compensated.h         4 n + 4, rad of the weights
   pooling.c: one rounding                round_sum          divisor 1, lost by sums; + 1   3, 2 of the sum of |errors|

   tests/arithmetic/compiler/test_rounding_bounds.py checks the functions, and the lines from optimizers.c on, with
   numbers just beside a midpoint; in a build whose U is too small, the same numbers must be rounded wrongly. It also
   checks the gradients of sigmoid, softmax and log_softmax; test_direct.py has numbers beside a midpoint for direct.c, and
   test_fast.py and test_losses.py compare the other formulas with the reference path and with an oracle. */

#ifndef REPROML_ROUNDING_H
#define REPROML_ROUNDING_H

#include "common.h"

#ifndef U         /* a test builds these files with bounds that are too small */
#define U 0x1p-53 /* unit roundoff of binary64 */
#endif
#define TINY 0x1p-1000      /* rounding.TINY: absolute error of an operation that underflows in binary64 */
#define SLACK (1 + 0x1p-20) /* rounding.SLACK: bounds are themselves computed in binary64 */

/* ---- the target format (numerics/formats.py) ---- */

#ifndef PRECISION
#define PRECISION 24 /* binary32; 8 for bfloat16 and 11 for float16, whose numbers are binary32 numbers too */
#endif

/* x, rounded once to the target format. */
#if PRECISION == 24
INLINE float to_target(double x) { return (float)x; }
#else
INLINE float to_target(double x) {
    enum { BELOW = 53 - PRECISION }; /* bits of binary64 below the last place */
    const double least = PRECISION == 8 ? 0x1p-126 : 0x1p-14, top = PRECISION == 8 ? 0x1p128 : 0x1p16;
    const double to_integer =
        0x1.8p52 * (PRECISION == 8 ? 0x1p-133 : 0x1p-24); /* an ulp is that of subnormal numbers */
    const uint64_t b = (uint64_t)pattern(x), half = ((uint64_t)1 << (BELOW - 1)) - 1;
    const double normal = from_pattern((int64_t)((b + half + (b >> BELOW & 1)) & ~(2 * half + 1)));
    const double subnormal = copysign((x + to_integer) - to_integer, x);
    const double rounded = fabs(x) < least ? subnormal : fabs(normal) >= top ? copysign(INFINITY, x) : normal;
    return (float)(x == x ? rounded : x);
}
#endif

#if PRECISION < 24
/* Rounding the ends to binary32 first takes half the instructions, and a test fails a little more often. */
INLINE float float_to_target(float x) {
    enum { BELOW = 24 - PRECISION };
    const uint32_t b = (uint32_t)bits(x), half = (1U << (BELOW - 1)) - 1;
    const uint32_t sum = (b & INT32_MAX) + half + (b >> BELOW & 1), rounded = sum & ~(2 * half + 1);
    float size;
#if PRECISION == 11
    const float least = 0x1p-14, subnormal = (fabsf(x) + 0.75f) - 0.75f; /* a multiple of 2^-24 */
    memcpy(&size, &rounded, sizeof size);
    size = fabsf(x) < least ? subnormal : size >= 0x1p16f ? INFINITY : size;
#else
    memcpy(&size, &rounded, sizeof size);
#endif
    return x == x ? copysignf(size, x) : x;
}

/* A bound that encloses the real number also after the ends are rounded to binary32: |end| <= |mid| + rad. */
INLINE double enclosing(double mid, double rad) {
    double size = fabs(mid);
    return rad + 0x1p-23 * (rad + (size < DBL_MAX ? size : DBL_MAX));
}

INLINE float lower_end(double mid, double rad) { return float_to_target((float)(mid - rad)); }
INLINE float upper_end(double mid, double rad) { return float_to_target((float)(mid + rad)); }
#endif

/* ---- the two comparisons ---- */

/* As numbers. *result is the rounded `mid`. If |mid| <= rad, a result of 0 may have either sign. */
INLINE int32_t numbers_differ(double mid, double rad, float *result) {
#if PRECISION == 24
    float low = to_target(mid - rad), high = to_target(mid + rad);
    *result = to_target(mid);
#else
    double wide = enclosing(mid, rad) + 0x1p-149; /* also for an end that is subnormal in binary32 */
    float low = lower_end(mid, wide), high = upper_end(mid, wide);
    *result = float_to_target((float)mid); /* if the test passes, it equals both ends */
#endif
    return (low != high) | ((*result == 0) & (fabs(mid) <= rad) & (rad > 2 * TINY));
}

/* As bit patterns. */
INLINE int32_t patterns_differ(float low, float high) { return bits(low) ^ bits(high); }

/* ---- balls: the sign of mid is the sign of a result of zero ---- */

/* rounding.round_ball: the real number lies within rel |mid| + rad of mid. */
INLINE int32_t round_ball(double mid, double rel, double rad, float *result) {
    rad += rel * fabs(mid);
    double room = rad == 0 ? 0 : 2 * U * fabs(mid); /* a product with a condition would not be vectorised */
    return numbers_differ(mid, rad * SLACK + room + TINY, result);
}

/* For a `rad` that has room for the test. */
INLINE int32_t round_padded_ball(double mid, double rad, float *result) {
    return numbers_differ(mid, rad + TINY, result);
}

/* The same in few instructions, for normal numbers and exact zeros, which are the most frequent results. mid - rad has
   the sign of a zero mid. */
INLINE int32_t round_normal_ball(double mid, double rad, float *result) {
#if PRECISION == 24
    float low = to_target(mid - rad), high = to_target(mid + rad);
#else
    double wide = enclosing(mid, rad);
    float low = lower_end(mid, wide), high = upper_end(mid, wide);
#endif
    uint32_t above = ((uint32_t)bits(low) & 0x7FFFFFFF) - 0x00800000; /* the smallest normal number */
    *result = low;
    return (low != high) | !((above < 0x7F000000) | (fabs(mid) + rad == 0));
}

/* ---- sums: any order of additions must give the same bits, so not even the sign of a zero may come from mid ---- */

/* rounding.round_sum: for a `rad` that has room for the test. */
INLINE int32_t round_sum(double mid, double rad, float *result) {
    float low = to_target(mid - rad), high = to_target(mid + rad);
    *result = high;
    return patterns_differ(low, high);
}

#if PRECISION < 24
/* The same with the ends rounded to binary32 first. That moves an end that is subnormal there by up to 2^-150, for which
   a bound has room: it includes SINGLE_LOST of tile.h, unless all products are 0 and the value is exact. */
INLINE int32_t round_sum_quickly(double mid, double rad, float *result) {
    double wide = enclosing(mid, rad);
    float low = lower_end(mid, wide), high = upper_end(mid, wide);
    *result = high;
    return patterns_differ(low, high);
}
#else
#define round_sum_quickly round_sum
#endif

/* The same, but an exact -0 passes as -0: with these signs neither end turns into +0. */
INLINE int32_t round_signed_sum(double mid, double minus_rad, float *result) {
    float low = to_target(minus_rad + mid), high = -to_target(minus_rad - mid);
    *result = high;
    return patterns_differ(low, high);
}

/* Bound of the relative error of a sum whose tree of additions has this height, of which at most one more term was
   added; with room for the test. Source: N. Higham, Accuracy and Stability of Numerical Algorithms, section 4.2. */
INLINE double relative_bound(double height) {
    double g = height + 8;
    return g * U / (1 - g * U) * SLACK;
}

/* Bound of a + b, rounded to `sum`, where a and b have one rounding each and err by `error` in addition; with room for
   the test. It is 0 if nothing was rounded: with a beta of one half every other sum is a midpoint. */
INLINE double bound_of_sum(double a, double b, double sum, double error) {
    double z = sum - a, lost = (a - (sum - z)) + (b - z); /* two_sum */
    double bound = 3 * U * (fabs(a) + fabs(b)) + error, any = 0x1p900 * (fabs(lost) + error);
    return any < bound ? any : bound; /* any is 0 or huge; a minimum compiles to one instruction, a branch does not */
}

/* ---- pairs of binary64 numbers ---- */

/* a + b rounded to odd in binary64, so that rounding it once more, to binary32, rounds a + b correctly
   (Boldo & Melquiond, IEEE Transactions on Computers 57(4), 2008). a and b are finite. */
INLINE double add_to_odd(double a, double b) {
    double s, t;
    two_sum(a, b, &s, &t);
    int64_t sum = pattern(s);
    if (t != 0 && !(sum & 1)) s = from_pattern(sum + ((t > 0) == (s > 0) ? 1 : -1));
    return s;
}

/* A real number that lies within `rad` of s + t, |t| <= |s|. */
typedef struct {
    double s, t, rad;
} pair;

INLINE pair make_pair(double s, double t, double rad) {
    pair p = {0, 0, rad};
    two_sum(s, t, &p.s, &p.t);
    return p;
}

/* Fails also if the number or its bound is not finite. */
static inline int32_t round_pair(pair p, float *result) {
    double rad = p.rad * SLACK + fabs(p.t) * (2 * U); /* t - rad and t + rad are rounded */
    float low = to_target(add_to_odd(p.s, p.t - rad) + 0.0), high = to_target(add_to_odd(p.s, p.t + rad) + 0.0);
    *result = high;
    return (patterns_differ(low, high) != 0) | !(fabs(p.s) + p.rad <= DBL_MAX);
}

#endif
