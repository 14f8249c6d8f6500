/* Ziv's rounding test, as rounding.settle has it. */

#ifndef REPROML_BALL_H
#define REPROML_BALL_H

#include "common.h"

/* Round to binary32 what lies within r |c| + e of c; 0 where it is not sure. c - e and c + e are rounded as well,
   by up to U |c|: onto a midpoint, perhaps, of which the number is on the other side. */
static inline __attribute__((always_inline)) int settled(double c, double r, double e, float *result) {
    e += r * fabs(c);
    e = (e == 0 ? 0 : e * SLACK + 2 * U * fabs(c)) + TINY;
    float low = (float)(c - e), high = (float)(c + e);
    *result = (float)c;
    /* of what underflows, the sign has to be sure as well */
    return !((low != high) | ((*result == 0) & (fabs(c) <= e) & (e > 2 * TINY)));
}

#endif
