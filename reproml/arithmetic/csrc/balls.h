/* Real numbers with an error bound, as in numerics/balls.py: a number lies within `rad` of `mid`. Each operation adds the
   bound of its own rounding. Bounds are computed without room for their own roundings, which round_ball has, and without
   underflow, which it has as well (TINY). A bound that cannot be given is infinite or NaN, and fails the test. */

#ifndef REPROML_BALLS_H
#define REPROML_BALLS_H

#include "rounding.h"

typedef struct {
    double mid, rad;
} ball;

INLINE ball exact(double x) { return (ball){x, 0}; }
INLINE ball near(double x) { return (ball){x, U * fabs(x)}; } /* one rounding */

INLINE ball plus(ball a, ball b) {
    double s, lost;
    two_sum(a.mid, b.mid, &s, &lost);
    return (ball){s, fabs(lost) + a.rad + b.rad};
}

INLINE ball negative(ball a) { return (ball){-a.mid, a.rad}; }
INLINE ball minus(ball a, ball b) { return plus(a, negative(b)); }

INLINE ball times(ball a, ball b) {
    double product = a.mid * b.mid;
    return (ball){product, U * fabs(product) + fabs(a.mid) * b.rad + fabs(b.mid) * a.rad + a.rad * b.rad};
}

/* c x for a number c; the product of two binary32 numbers is exact. */
INLINE ball scaled(double c, ball x) { return (ball){c * x.mid, U * fabs(c * x.mid) + fabs(c) * x.rad}; }
/* The same with the rounding error itself, which is 0 for a power of two. */
INLINE ball scaled_closely(double c, ball x) {
    const double product = c * x.mid;
    return (ball){product, fabs(fma(c, x.mid, -product)) + fabs(c) * x.rad};
}

INLINE ball exact_product(double a, double b) { return exact(a * b); }

/* By the inverse of d, with three roundings. It lies within 2 / |d.mid| if d.rad is at most |d.mid| / 2. Divided by
   an infinity, such as the root of an infinite average, a finite x gives 0 without an error: of_limit is 0, or NaN if x is
   not finite. */
INLINE ball over(ball x, ball d) {
    double inverse = 1 / d.mid, q = x.mid * inverse;
    double rad = 3 * U * fabs(q) + 2 * fabs(inverse) * (x.rad + fabs(q) * d.rad);
    double of_limit = (fabs(x.mid) + x.rad) * 0;
    rad = fabs(d.mid) <= DBL_MAX ? rad : of_limit;
    return (ball){q, (2 * d.rad <= fabs(d.mid)) | (fabs(d.mid) > DBL_MAX) ? rad : INFINITY};
}

/* The square root of a number that has at most one rounding. */
INLINE ball root(double x) {
    double s = sqrt(x);
    return (ball){s, 2 * U * s};
}

#endif
