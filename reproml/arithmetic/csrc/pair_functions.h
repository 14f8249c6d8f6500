/* Arithmetic and functions of pairs of binary64 numbers, each with a bound of its error, for pair_program.c. */

#ifndef REPROML_PAIR_FUNCTIONS_H
#define REPROML_PAIR_FUNCTIONS_H

#include "elementary.h"
#include "rounding.h"

static const double LEAST = 0x1p-900,
                    LARGEST = 0x1p900; /* no step of a quotient or root underflows or overflows here */

/* ---- arithmetic ---- */

/* For |a| >= |b|, or a = 0 only if b = 0. */
INLINE pair quick_pair(double a, double b, double rad) {
    const double s = a + b;
    return (pair){s, b - (s - a), rad};
}

INLINE pair full_pair(double a, double b, double rad) {
    pair p;
    two_sum(a, b, &p.s, &p.t);
    p.rad = rad;
    return p;
}

INLINE pair single(double x) { return (pair){x, 0, 0}; }

INLINE int is_zero(pair p) { return (p.s == 0) & (p.rad == 0); }

INLINE pair add(pair p, pair q) {
    double s, t, low, lost, more;
    two_sum(p.s, q.s, &s, &t);
    two_sum(p.t, q.t, &low, &lost);
    two_sum(t, low, &t, &more);
    return full_pair(s, t, p.rad + q.rad + fabs(lost) + fabs(more));
}

INLINE pair add1(pair p, double x) {
    double s, t, more;
    two_sum(p.s, x, &s, &t);
    two_sum(t, p.t, &t, &more);
    return full_pair(s, t, p.rad + fabs(more));
}

/* What a product may lose by underflow. */
INLINE double product_floor(double product, double x, double y) {
    return ((fabs(product) < LEAST) & (x != 0) & (y != 0)) ? TINY : 0;
}

INLINE pair mul11(double x, double y) {
    const double high = x * y;
    return (pair){high, fma(x, y, -high), product_floor(high, x, y)};
}

INLINE pair mul1(pair p, double x) {
    const double high = p.s * x, low = fma(p.s, x, -high), rest = p.t * x;
    double rad = p.rad * fabs(x) + product_floor(high, p.s, x);
    rad += (((p.t != 0) | (p.rad != 0)) & (x != 0)) ? 4 * U * (fabs(low) + fabs(rest)) + TINY : 0;
    return full_pair(high, low + rest, rad);
}

INLINE pair mul(pair p, pair q) {
    const double high = p.s * q.s, low = fma(p.s, q.s, -high), a = p.s * q.t, b = p.t * q.s;
    const double size_p = fabs(p.s) + fabs(p.t), size_q = fabs(q.s) + fabs(q.t);
    const int inexact = (p.t != 0) | (q.t != 0) | (p.rad != 0) | (q.rad != 0);
    double rad = size_p * q.rad + size_q * p.rad + p.rad * q.rad + product_floor(high, p.s, q.s);
    rad += inexact ? 4 * U * (fabs(low) + fabs(a) + fabs(b)) + fabs(p.t * q.t) + TINY : 0;
    return full_pair(high, low + (a + b), is_zero(p) | is_zero(q) ? 0 : rad);
}

INLINE int in_range(double x) { return (fabs(x) >= LEAST) & (fabs(x) <= LARGEST); }

/* p / d = h + (r + p.t - h d.t) / d, where h = p.s / d.s is rounded and the remainder r = p.s - h d.s is exact. d.s in
   place of the last d errs by up to 2 U, d.rad by |h| d.rad / |d|. */
INLINE pair divide(pair p, pair d) {
    const double high = p.s / d.s, rest = fma(-high, d.s, p.s), product = high * d.t;
    const double least = fabs(d.s) - fabs(d.t) - d.rad;
    const int inexact = (rest != 0) | (p.t != 0) | (d.t != 0) | (p.rad != 0) | (d.rad != 0);
    double rad = p.rad + fabs(high) * d.rad + 8 * U * (fabs(rest) + fabs(p.t) + fabs(product));
    rad = inexact ? (rad + TINY) / least + TINY : 0;
    rad = is_zero(p) ? 0 : p.s == 0 || (in_range(p.s) & in_range(high)) ? rad : INFINITY;
    return full_pair(high, (rest + p.t - product) / d.s, (in_range(d.s) & (least > fabs(d.s) / 2)) ? rad : INFINITY);
}

/* The same for an exact divisor. */
INLINE pair divide1(pair p, double d) {
    const double high = p.s / d, rest = fma(-high, d, p.s);
    const int inexact = (rest != 0) | (p.t != 0) | (p.rad != 0);
    double rad = inexact ? (p.rad + 8 * U * (fabs(rest) + fabs(p.t)) + TINY) / fabs(d) + TINY : 0;
    rad = is_zero(p) ? 0 : p.s == 0 || (in_range(p.s) & in_range(high)) ? rad : INFINITY;
    return full_pair(high, (rest + p.t) / d, in_range(d) ? rad : INFINITY);
}

/* sqrt(p) = s + r / (2 s) - r^2 / (8 s^3) + ..., where s = sqrt(p.s) is rounded and r = (p.s - s^2) + p.t; the first of
   these differences is exact. */
INLINE pair square_root(pair p) {
    const double s = sqrt(p.s), rest = fma(-s, s, p.s), r = rest + p.t;
    const int inexact = (rest != 0) | (p.t != 0) | (p.rad != 0);
    double rad = 4 * U * (fabs(rest) + fabs(p.t)) / s + r * r / (s * s * s) + p.rad / s + TINY;
    rad = (in_range(p.s) & (p.rad <= p.s / 2)) ? (inexact ? rad : 0) : INFINITY;
    const pair root = full_pair(s, r / (2 * s), rad);
    return is_zero(p) ? p : root;
}

INLINE pair negative(pair p) { return (pair){-p.s, -p.t, p.rad}; }

INLINE pair absolute(pair p) {
    const int below = p.s < 0;
    return (pair){below ? -p.s : p.s, below ? -p.t : p.t, p.rad};
}

/* 1 or 0; NaN if it is not certain. */
INLINE double less_than_zero(pair p) {
    const double certain = p.s < 0 ? 1 : 0;
    return ((fabs(p.s) * 0.5 > p.rad) | (p.rad == 0)) ? certain : NAN;
}

INLINE double equals_zero(pair p) { return is_zero(p) ? 1 : less_than_zero(p) * 0; }

INLINE pair select(double condition, pair p, pair q) {
    pair chosen = {condition != 0 ? p.s : q.s, condition != 0 ? p.t : q.t, condition != 0 ? p.rad : q.rad};
    chosen.rad = condition == condition ? chosen.rad : INFINITY;
    return chosen;
}

/* ---- functions: relative errors of a few 2^-104 in each step (M. Joldes, J.-M. Muller & V. Popescu, Tight and rigorous
   error bounds for basic building blocks of double-word arithmetic, ACM TOMS 44(2), 2017), 2^-94 in all ---- */

#define FUNCTION_ERROR 0x1p-94
#define TINY_ARGUMENT 0x1p-21

INLINE pair light_mul(pair p, pair q) {
    const double high = p.s * q.s;
    return quick_pair(high, fma(p.s, q.s, -high) + (p.s * q.t + p.t * q.s), 0);
}

INLINE pair light_add(pair p, pair q) {
    double s, e, f, g;
    two_sum(p.s, q.s, &s, &e);
    two_sum(p.t, q.t, &f, &g);
    p = quick_pair(s, e + f, 0);
    return quick_pair(p.s, p.t + g, 0);
}

/* a r + 1 / n */
INLINE pair horner(pair a, pair r, double n) {
    const double inverse = 1 / n;
    return light_add(light_mul(a, r), (pair){inverse, fma(-inverse, n, 1.0) / n, 0});
}

/* A number m with 1 + m = exp(x) / 2^k, |x| <= 640. With x = k log 2 + 8 r the series of exp(r) - 1 ends at r^17 / 17!,
   whose terms from r^9 on have one double each; then (1 + m)^2 - 1 = m (2 + m) three times. For k = 0, which |x| < 0.34
   gives, its relative error is below 2^-96 even for tiny x. Otherwise its absolute error is. tiny: |x| <= 2^-21, for
   which a few terms suffice. */
INLINE pair expm1_reduced(pair x, double *power, int tiny) {
    if (tiny) {
        double q = 1 / 120.0;
        q = q * x.s + 1 / 24.0;
        q = q * x.s + 1 / 6.0;
        *power = 0;
        return light_mul(horner(horner(single(q), x, 2), x, 1), x);
    }
    const double k = rint(x.s * 0x1.71547652b82fep+0), l = 0x1.62e42fefa39efp-1, h = k * l;
    pair r = light_add((pair){x.s, x.t, 0}, (pair){-h, -(fma(k, l, -h) + k * 0x1.abc9e3b39803fp-56), 0});
    r.s *= 0.125, r.t *= 0.125;
    double y = 1 / 355687428096000.0;
    y = y * r.s + 1 / 20922789888000.0;
    y = y * r.s + 1 / 1307674368000.0;
    y = y * r.s + 1 / 87178291200.0;
    y = y * r.s + 1 / 6227020800.0;
    y = y * r.s + 1 / 479001600.0;
    y = y * r.s + 1 / 39916800.0;
    y = y * r.s + 1 / 3628800.0;
    y = y * r.s + 1 / 362880.0;
    pair m = horner(single(y), r, 40320);
    m = horner(m, r, 5040);
    m = horner(m, r, 720);
    m = horner(m, r, 120);
    m = horner(m, r, 24);
    m = horner(m, r, 6);
    m = horner(m, r, 2);
    m = horner(m, r, 1);
    m = light_mul(m, r);
    for (int i = 0; i < 3; i++) m = light_mul(m, light_add(single(2), m));
    *power = k;
    return m;
}

/* exp(d) - 1 for a d up to `rad` is below 2 rad. */
INLINE double rad_of_exp(double rad) { return rad <= 0.5 ? 2 * rad : INFINITY; }

INLINE pair exponential(pair p, int tiny) {
    double k, e, low, lost;
    const pair m = expm1_reduced((pair){clamp(p.s, -610, 610), p.t, 0}, &k, tiny);
    const double scale = tiny ? 1 : power_of_two(k);
    pair y;
    two_sum(1, m.s, &y.s, &e);
    two_sum(e, m.t, &low, &lost);
    y = full_pair(y.s, low, (k == 0 ? fabs(m.s) : 2) * FUNCTION_ERROR + fabs(lost) + (p.s == 0 ? 0 : TINY));
    y.rad += rad_of_exp(p.rad) * 1.5;
    y = (pair){y.s * scale, y.t * scale, y.rad * scale};
    const int below = p.s < -600, beyond = below | (p.s > 600); /* exp(-599) < 2^-864 */
    const double far = (below & (p.rad <= 1)) ? 0x1p-864 : INFINITY;
    return (pair){beyond ? 0 : y.s, beyond ? 0 : y.t, beyond ? far : y.rad};
}

INLINE pair exponential_less_1(pair p, int tiny) {
    double k;
    pair m = expm1_reduced((pair){clamp(p.s, -610, 610), p.t, 0}, &k, tiny);
    m.rad = fabs(m.s) * FUNCTION_ERROR + (p.s == 0 ? 0 : TINY) + 1.5 * rad_of_exp(p.rad);
    const pair elsewhere = add1(exponential(p, tiny), -1);
    return select(k == 0, m, elsewhere);
}

/* log(p) = z + log(1 + w) with z = log(p.s) in binary64 and w = p exp(-z) - 1, |w| < 2^-45 |z|, or w = p.t if p.s is 1.
   The series w - w^2 / 2 suffices. With exp(-z) = 2^k (1 + m) and q = 2^k p, w is (q - 1) + q m. */
INLINE pair logarithm(pair p, int tiny) {
    double k, high, low, s, e;
    const double z = tiny ? (p.s - 1) - (p.s - 1) * (p.s - 1) * 0.5 : log_(p.s);
    const pair m = expm1_reduced(single(-z), &k, tiny);
    const double scale = tiny ? 1 : power_of_two(k);
    const pair q = {p.s * scale, p.t * scale, 0};
    two_sum(q.s, -1, &high, &low);
    const pair w = light_add(full_pair(high, low + q.t, 0), light_mul(q, m));
    two_sum(z, w.s, &s, &e);
    double rad =
        16 * FUNCTION_ERROR * fabs(z) + 0x1p-50 * (w.s * w.s) + 4 * U * (fabs(e) + fabs(w.t)) + 2 * p.rad / p.s;
    rad += ((s == 0) & (p.rad == 0)) ? 0 : TINY;
    rad = ((p.s >= LEAST) & (p.s <= LARGEST) & (p.rad <= p.s / 4)) ? rad : INFINITY;
    return full_pair(s, e + (w.t - w.s * w.s * 0.5), rad);
}

/* log(1 + p.s) + p.t / (1 + p.s) - ... */
INLINE pair logarithm_of_1_plus(pair p, int tiny) {
    const pair one_plus = full_pair(1, p.s, 0);
    const double d = one_plus.s, c = p.t / d;
    double rad = (p.t == 0 ? 0 : 4 * U * fabs(c) + 4 * c * c + TINY) + 4 * p.rad / d;
    rad = ((d > 0x1p-30) & (p.rad <= d / 8)) ? rad : INFINITY;
    return add(logarithm(one_plus, tiny), (pair){c, 0, rad});
}

/* Parts of pi / 2 of 30 bits each, whose products with integers below 2^23 are exact, and the rest, within 2^-165. */
#define HALF_PI_HIGH 0x1.921fb54000000p+0
#define HALF_PI_MIDDLE 0x1.10b4611800000p-30
static const pair HALF_PI_LOW = {0x1.313198a2e0370p-61, 0x1.cd129024e088ap-115, 0x1p-165};
static const pair PI = {0x1.921fb54442d18p+1, 0x1.1a62633145c07p-53, 0x1p-107};

/* sin and cos of r + k pi / 2 for an integer k; without a bound if |r| >= 0.8. The Taylor series end at r^27 / 27! and
   r^28 / 28!; the terms from r^17 and r^18 on have one double each. No slope exceeds 1. */
INLINE void turned(pair r, double k, pair *sin_of, pair *cos_of) {
    const pair x = {r.s, r.t, 0}, r2 = light_mul(x, x);
    double s = -0x1.d1ab1c2dccea3p-94, c = 0x1.0a18a2635085dp-98;
    s = s * r2.s + 0x1.3f3ccdd165fa9p-84;
    s = s * r2.s - 0x1.761b41316381ap-75;
    s = s * r2.s + 1 / 51090942171709440000.0;
    s = s * r2.s - 1 / 121645100408832000.0;
    s = s * r2.s + 1 / 355687428096000.0;
    c = c * r2.s - 0x1.88e85fc6a4e5ap-89;
    c = c * r2.s + 0x1.f2cf01972f578p-80;
    c = c * r2.s - 1 / 1124000727777607680000.0;
    c = c * r2.s + 1 / 2432902008176640000.0;
    c = c * r2.s - 1 / 6402373705728000.0;
    pair sine = horner(single(s), r2, -1307674368000);
    sine = horner(sine, r2, 6227020800);
    sine = horner(sine, r2, -39916800);
    sine = horner(sine, r2, 362880);
    sine = horner(sine, r2, -5040);
    sine = horner(sine, r2, 120);
    sine = horner(sine, r2, -6);
    sine = light_mul(horner(sine, r2, 1), x);
    pair cosine = horner(single(c), r2, 20922789888000);
    cosine = horner(cosine, r2, -87178291200);
    cosine = horner(cosine, r2, 479001600);
    cosine = horner(cosine, r2, -3628800);
    cosine = horner(cosine, r2, 40320);
    cosine = horner(cosine, r2, -720);
    cosine = horner(cosine, r2, 24);
    cosine = light_mul(horner(cosine, r2, -2), r2); /* less 1 */
    const double least = r.rad + (r.s == 0 ? 0 : TINY);
    sine.rad = fabs(sine.s) * FUNCTION_ERROR + least;
    cosine.rad = fabs(cosine.s) * FUNCTION_ERROR + least;
    cosine = add1(cosine, 1);
    const int64_t q = last_bits(k);
    const double odd = (double)(q & 1), sign = q & 2 ? -1 : 1, other = (q + 1) & 2 ? -1 : 1;
    const pair y = select(odd, cosine, sine), z = select(odd, sine, cosine);
    const int known = fabs(r.s) < 0.8;
    *sin_of = (pair){sign * y.s, sign * y.t, known ? y.rad : INFINITY};
    *cos_of = (pair){other * z.s, other * z.t, known ? z.rad : INFINITY};
}

/* x less the nearest multiple k of pi / 2; without a bound if |x| >= 2^23. */
INLINE pair without_turns(pair p, double *k) {
    *k = rint(clamp(p.s, -0x1p23, 0x1p23) * 0x1.45f306dc9c883p-1);
    const pair r = add(add1(add1(p, -*k * HALF_PI_HIGH), -*k * HALF_PI_MIDDLE), mul1(HALF_PI_LOW, -*k));
    return (pair){r.s, r.t, fabs(p.s) < 0x1p23 ? r.rad : INFINITY};
}

#endif
