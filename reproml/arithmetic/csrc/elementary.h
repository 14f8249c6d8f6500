/* exp, log, sin, erf and related functions in binary64. numerics/elementary.py has the sequences of operations and
   their error analysis; these are the same, operation by operation, without branches, so that loops over them
   vectorise. */

#ifndef REPROML_ELEMENTARY_H
#define REPROML_ELEMENTARY_H

#include "common.h"

/* An integer |k| < 2^51 in the last bits, two's complement. */
INLINE int64_t last_bits(double k) { return pattern(k + 0x1.8p52); }

INLINE double clamp(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

/* 2^k for integers -1022 <= k <= 1023. */
INLINE double power_of_two(double k) { return from_pattern((int64_t)((uint64_t)(last_bits(k) + 1023) << 52)); }

INLINE double exp_(double x) {
    x = clamp(x, -700.0, 709.0);
    double k = rint(x * 1.4426950408889634);
    double r = (x - k * 0x1.62e42fefap-1) - k * 0x1.cf79abc9e3b3ap-40;
    double half = floor(k * 0.5), y = 1 / 87178291200.0;
    y = y * r + 1 / 6227020800.0;
    y = y * r + 1 / 479001600.0;
    y = y * r + 1 / 39916800.0;
    y = y * r + 1 / 3628800.0;
    y = y * r + 1 / 362880.0;
    y = y * r + 1 / 40320.0;
    y = y * r + 1 / 5040.0;
    y = y * r + 1 / 720.0;
    y = y * r + 1 / 120.0;
    y = y * r + 1 / 24.0;
    y = y * r + 1 / 6.0;
    y = y * r + 1 / 2.0;
    y = y * r + 1.0;
    y = y * r + 1.0;
    return y * power_of_two(half) * power_of_two(k - half);
}

INLINE double expm1_(double x) {
    double s = clamp(x, -0.35, 0.35), y = 1 / 1307674368000.0, elsewhere = exp_(x) - 1;
    y = y * s + 1 / 87178291200.0;
    y = y * s + 1 / 6227020800.0;
    y = y * s + 1 / 479001600.0;
    y = y * s + 1 / 39916800.0;
    y = y * s + 1 / 3628800.0;
    y = y * s + 1 / 362880.0;
    y = y * s + 1 / 40320.0;
    y = y * s + 1 / 5040.0;
    y = y * s + 1 / 720.0;
    y = y * s + 1 / 120.0;
    y = y * s + 1 / 24.0;
    y = y * s + 1 / 6.0;
    y = y * s + 1 / 2.0;
    y = y * s + 1.0;
    return fabs(x) < 0.35 ? y * s : elsewhere;
}

/* The series of 2 artanh s up to s^23 without its first term: s (2/3 s^2 + 2/5 s^4 + ...). */
INLINE double artanh_rest(double s) {
    double s2 = s * s, y = 2 / 23.0;
    y = y * s2 + 2 / 21.0;
    y = y * s2 + 2 / 19.0;
    y = y * s2 + 2 / 17.0;
    y = y * s2 + 2 / 15.0;
    y = y * s2 + 2 / 13.0;
    y = y * s2 + 2 / 11.0;
    y = y * s2 + 2 / 9.0;
    y = y * s2 + 2 / 7.0;
    y = y * s2 + 2 / 5.0;
    y = y * s2 + 2 / 3.0;
    return s * (y * s2);
}

INLINE double log_(double x) {
    /* k is the exponent of x / sqrt(1/2), found by an unsigned shift because AVX2 has no signed one. */
    uint64_t shifted = (uint64_t)pattern(x) - 0x3FE6A09E667F3BCDu + ((uint64_t)1024 << 52);
    uint64_t biased = shifted >> 52; /* k + 1024 */
    double k = from_pattern((int64_t)(biased | 0x4330000000000000u)) - (0x1p52 + 1024);
    double m = from_pattern((int64_t)((uint64_t)pattern(x) - (biased << 52) + ((uint64_t)1024 << 52)));
    double s = (m - 1) / (m + 1);
    double y = (2 * s + artanh_rest(s) + k * 0x1.cf79abc9e3b3ap-40) + k * 0x1.62e42fefap-1;
    y = x > 0 ? y : x == 0 ? -INFINITY : NAN;
    return x == INFINITY ? x : y;
}

INLINE double log1p_(double x) {
    double s = clamp(x, -0.25, 0.25), elsewhere = log_(1 + x);
    s = s / (2 + s);
    double near_zero = 2 * s + artanh_rest(s);
    return fabs(x) < 0.25 ? near_zero : elsewhere;
}

/* sin (quarter 0) or cos (quarter 1) of r + k pi / 2, where |r| <= 0.79 and k is an integer. */
INLINE double sin_reduced(double r, double k, int64_t quarter) {
    double r2 = r * r, s = 1 / 355687428096000.0, c = -1 / 6402373705728000.0;
    s = s * r2 - 1 / 1307674368000.0;
    s = s * r2 + 1 / 6227020800.0;
    s = s * r2 - 1 / 39916800.0;
    s = s * r2 + 1 / 362880.0;
    s = s * r2 - 1 / 5040.0;
    s = s * r2 + 1 / 120.0;
    s = s * r2 - 1 / 6.0;
    c = c * r2 + 1 / 20922789888000.0;
    c = c * r2 - 1 / 87178291200.0;
    c = c * r2 + 1 / 479001600.0;
    c = c * r2 - 1 / 3628800.0;
    c = c * r2 + 1 / 40320.0;
    c = c * r2 - 1 / 720.0;
    c = c * r2 + 1 / 24.0;
    c = c * r2 - 1 / 2.0;
    s = r + r * (s * r2);
    c = 1 + c * r2;
    int64_t q = last_bits(k) + quarter;
    double y = q & 1 ? c : s;
    return q & 2 ? -y : y;
}

#define SIN_MAX 0x1p19

INLINE double sin_of_quarter(double x, int64_t quarter) {
    double k = rint(clamp(x, -SIN_MAX, SIN_MAX) * (1 / 0x1.921fb544p+0));
    double r = ((x - k * 0x1.921fb544p+0) - k * 0x1.0b4611a6p-34) - k * 0x1.3198a2e037073p-69;
    return sin_reduced(fabs(x) <= SIN_MAX ? r : x * 0, k, quarter);
}

INLINE double sin_(double x) { return sin_of_quarter(x, 0); }
INLINE double cos_(double x) { return sin_of_quarter(x, 1); }

/* For |x| < 2^50, which last_bits needs. */
INLINE double sinpi_of_quarter(double x, int64_t quarter) {
    double k = rint(2 * x);
    return sin_reduced((x - k * 0.5) * 3.141592653589793, k, quarter);
}

INLINE double sinpi_(double x) { return sinpi_of_quarter(x, 0); }
INLINE double cospi_(double x) { return sinpi_of_quarter(x, 1); }

INLINE double erfc_(double x) {
    double t = fabs(x) > 26.4 ? 26.4 : fabs(x);
    double h = (t + 0x1.8p32) - 0x1.8p32, z = (t - h) * (t + h);
    double e = exp_(-(h * h)) * (1 - z * (1 - z * (0.5 - z * (1 / 6.0))));
    double q = (t - 4) / (t + 4), y = -0x1.145966503e5d2p-29;
    y = y * q - 0x1.eb2fb8da58cefp-27;
    y = y * q - 0x1.100b34b026457p-27;
    y = y * q + 0x1.f53f0fc69fbadp-24;
    y = y * q + 0x1.12bd61508d241p-24;
    y = y * q - 0x1.c0f6bc55d88a1p-21;
    y = y * q + 0x1.41ccde9dafc40p-22;
    y = y * q + 0x1.7fbe577ed8f8ep-18;
    y = y * q - 0x1.789aef365b0bcp-17;
    y = y * q - 0x1.996a9b20dbee0p-16;
    y = y * q + 0x1.3be07b21013ddp-13;
    y = y * q - 0x1.a1de85c746b2fp-13;
    y = y * q - 0x1.8d4a9a7d2a17ep-11;
    y = y * q + 0x1.49c671a0c8c9bp-8;
    y = y * q - 0x1.096238870c62dp-6;
    y = y * q + 0x1.3079edf99d4cap-5;
    y = y * q - 0x1.0fb06dfe33f76p-4;
    y = y * q + 0x1.7fee004dfa851p-4;
    y = y * q - 0x1.9ddb23c3ea4c9p-4;
    y = y * q + 0x1.16ecefcfa5e28p-4;
    y = y * q + 0x1.f7f5df66fdadep-7;
    y = y * q - 0x1.1df1ad154a299p-3;
    y = y * q + 0x1.3ba5916e9fd7fp+0;
    y = e * y / (1 + 2 * t);
    return x < 0 ? 2 - y : y;
}

/* 2 / sqrt(pi) (-1)^n / (n! (2 n + 1)), rounded at each step as in Python. */
#define ERF_15 -0x1.f56f071a885cep-46
#define ERF_14 0x1.f683ae4a97007p-42
#define ERF_13 -0x1.d8453cb0c46eap-38
#define ERF_12 0x1.9e6ad5e55a730p-34
#define ERF_11 -0x1.51d7181c5d36cp-30
#define ERF_10 0x1.fcc5720624c1cp-27
#define ERF_9 -0x1.5f742ec43e71ap-23
#define ERF_8 0x1.b9e6c9dc651a2p-20
#define ERF_7 -0x1.f4d25c3e0c2ebp-17
#define ERF_6 0x1.f9a326f9b89b7p-14
#define ERF_5 -0x1.c02db40040b85p-11
#define ERF_4 0x1.565bcd0e6a53fp-8
#define ERF_3 -0x1.b82ce31288b51p-6
#define ERF_2 0x1.ce2f21a042be2p-4
#define ERF_1 -0x1.812746b0379e7p-2
#define ERF_0 0x1.20dd750429b6dp+0

INLINE double erf_(double x) {
    double s = clamp(x, -0.5, 0.5), s2 = s * s, elsewhere = 1 - erfc_(fabs(x)), y = ERF_15;
    y = y * s2 + ERF_14;
    y = y * s2 + ERF_13;
    y = y * s2 + ERF_12;
    y = y * s2 + ERF_11;
    y = y * s2 + ERF_10;
    y = y * s2 + ERF_9;
    y = y * s2 + ERF_8;
    y = y * s2 + ERF_7;
    y = y * s2 + ERF_6;
    y = y * s2 + ERF_5;
    y = y * s2 + ERF_4;
    y = y * s2 + ERF_3;
    y = y * s2 + ERF_2;
    y = y * s2 + ERF_1;
    y = y * s2 + ERF_0;
    return fabs(x) < 0.5 ? s * y : x < 0 ? -elsewhere : elsewhere;
}

INLINE double erfinv_(double x) {
    double v = 8 - log_((1 - x) * (1 + x)), q = 1.4375 - 19.5 / v, y = -0x1.9d4ceca247833p-23;
    y = y * q - 0x1.0d8d941795ea8p-25;
    y = y * q + 0x1.f32b900b0f1b9p-20;
    y = y * q - 0x1.805ba420a7f54p-23;
    y = y * q - 0x1.370871491342bp-17;
    y = y * q + 0x1.3a125df50cdd1p-19;
    y = y * q + 0x1.02b1746505d95p-15;
    y = y * q - 0x1.4f9fc760eca78p-17;
    y = y * q - 0x1.3b1c73b940e81p-14;
    y = y * q + 0x1.d0ddcb91bb0bcp-16;
    y = y * q + 0x1.27bf83f008482p-13;
    y = y * q - 0x1.1a62bd9a9a209p-14;
    y = y * q - 0x1.cee21fcb840ebp-13;
    y = y * q + 0x1.478c38710c4eep-13;
    y = y * q + 0x1.567ede47627f4p-12;
    y = y * q - 0x1.4c4f30e3880d0p-12;
    y = y * q - 0x1.05354bb1b8e9ap-11;
    y = y * q + 0x1.12b843600355bp-11;
    y = y * q + 0x1.793e523e6e8bcp-11;
    y = y * q - 0x1.92075d9def448p-11;
    y = y * q - 0x1.ccc05ceeb5762p-11;
    y = y * q + 0x1.3833cfafc9660p-10;
    y = y * q + 0x1.d130045ef694dp-11;
    y = y * q - 0x1.1b9256091c7c5p-9;
    y = y * q - 0x1.02ef9539300d5p-10;
    y = y * q + 0x1.f71ca09b20523p-9;
    y = y * q + 0x1.74afce0d52c66p-10;
    y = y * q - 0x1.98d17182b4e14p-8;
    y = y * q - 0x1.439bae46ebd4ep-9;
    y = y * q + 0x1.185aa8ef0fafbp-7;
    y = y * q + 0x1.3afa08000da1dp-9;
    y = y * q - 0x1.991dbfff50645p-7;
    y = y * q - 0x1.0fe5f5d7ca97ep-9;
    y = y * q + 0x1.ab88dfec0062ap-7;
    y = y * q - 0x1.2989e9538b735p-6;
    y = y * q - 0x1.764447cecce86p-5;
    y = y * q + 0x1.f0dcaf8089916p-6;
    y = y * q + 0x1.4be363d1a1814p-3;
    y = x * (v * y);
    return fabs(x) == 1 ? x * INFINITY : y;
}

#endif
