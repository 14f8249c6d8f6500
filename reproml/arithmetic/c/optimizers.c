/* The steps of the optimizers; the definitions are in optimizers.py. */

#include "common.h"

/* Optimizers go block by block: a plain loop rounds a block into scratch, with how far both ends of
   each interval lie apart after rounding; only what is sure is written back. */
#define BLOCK 512

typedef struct {
    float value[BLOCK], apart[BLOCK];
} rounded;

/* The nearest binary32 number to what lies within e of c; apart != 0, or NaN, where it is not sure. */
static inline void settle(double c, double e, float *value, float *apart) {
    e += TINY;
    *value = (float)c;
    *apart = (float)(c + e) - (float)(c - e);
}

static inline integer write_back(integer n, integer at, const rounded *r, float *const *state, int states,
                                 integer *failed, integer count) {
    for (integer i = 0; i < n; i++) {
        int sure = 1;
        for (int s = 0; s < states; s++) sure &= r[s].apart[i] == 0;
        if (sure)
            for (int s = 0; s < states; s++) state[s][at + i] = r[s].value[i];
        else
            failed[count++] = at + i;
    }
    return count;
}

static inline int all_sure(integer n, const rounded *r, int states) {
    float apart = 0;
    for (int s = 0; s < states; s++)
        for (integer i = 0; i < n; i++) apart += r[s].apart[i];
    return apart == 0;
}

static inline integer finish(integer n, integer at, const rounded *r, float *const *state, int states,
                             integer *failed, integer count) {
    if (!all_sure(n, r, states)) return write_back(n, at, r, state, states, failed, count);
    for (int s = 0; s < states; s++) memcpy(state[s] + at, r[s].value, (size_t)n * sizeof(float));
    return count;
}

/* Adam's step (optimizers.adam has the definition), without amsgrad. sign: -1 to maximize; decay: weight
   decay as a penalty; keep: 1 - lr * weight decay when decoupled.
   Error bounds, in units of U and of the absolute values of the terms, with room for second-order
   terms and the test's own roundings: d one rounding of two terms, m' two, v' four, the quotient
   ten, p' three. */
VECTORISED
integer reproml_adam(integer n, float *p, const float *g, float *m, float *v, double sign, double decay,
                     double keep, double b1, double rest1, double b2, double rest2, double rate,
                     double correction2, double eps, integer *failed) {
    rounded r[3];
    float *const state[3] = {p, m, v};
    integer count = 0;
    for (integer at = 0; at < n; at += BLOCK) {
        integer length = n - at < BLOCK ? n - at : BLOCK;
        for (integer i = 0; i < length; i++) {
            double old_p = p[at + i];
            double penalty = decay * old_p, grad = sign * g[at + i];
            double d = decay != 0 ? grad + penalty : grad; /* + 0 would lose the sign of -0 */
            double size = fabs(grad) + fabs(penalty), ed = decay != 0 ? 3 * U * size : 0;
            double m1 = b1 * m[at + i], m2 = rest1 * d, v1 = b2 * v[at + i], v2 = rest2 * (d * d);
            settle(m1 + m2, 5 * U * (fabs(m1) + fabs(m2)) + 2 * fabs(rest1) * ed, &r[1].value[i], &r[1].apart[i]);
            settle(v1 + v2, 8 * U * (fabs(v1) + fabs(v2)) + 4 * fabs(rest2) * size * ed, &r[2].value[i], &r[2].apart[i]);
            double held = keep * old_p;
            double moved = rate * (r[1].value[i] / (sqrt(r[2].value[i] / correction2) + eps));
            settle(held - moved, 6 * U * fabs(held) + 20 * U * fabs(moved), &r[0].value[i], &r[0].apart[i]);
        }
        count = finish(length, at, r, state, 3, failed, count);
    }
    return count;
}

/* SGD's step (optimizers.sgd). buffer: null without momentum. first: the buffer starts as d. */
VECTORISED
integer reproml_sgd(integer n, float *p, const float *g, float *buffer, int first, int nesterov,
                    double sign, double decay, double rate, double momentum, double fresh,
                    integer *failed) {
    rounded r[2];
    float *const state[2] = {p, buffer};
    double keep = buffer && !first ? momentum : 0, take = buffer && !first ? fresh : 1;
    integer count = 0;
    for (integer at = 0; at < n; at += BLOCK) {
        integer length = n - at < BLOCK ? n - at : BLOCK;
        for (integer i = 0; i < length; i++) {
            double old_p = p[at + i];
            double penalty = decay * old_p, grad = sign * g[at + i];
            double d = decay != 0 ? grad + penalty : grad; /* + 0 would lose the sign of -0 */
            double size = fabs(grad) + fabs(penalty), e = decay != 0 ? 3 * U * size : 0, step = d;
            if (buffer) {
                double b1 = keep != 0 ? keep * buffer[at + i] : -0.0, b2 = take * d;
                settle(b1 + b2, 5 * U * (fabs(b1) + fabs(b2)) + 2 * fabs(take) * e,
                       &r[1].value[i], &r[1].apart[i]);
                double b = r[1].value[i], ahead = momentum * b;
                step = nesterov ? d + ahead : b;
                size = nesterov ? size + fabs(ahead) : fabs(b);
                e = nesterov ? e + 3 * U * size : 0;
            }
            settle(old_p - rate * step, 6 * U * (fabs(old_p) + fabs(rate) * size) + 2 * fabs(rate) * e,
                   &r[0].value[i], &r[0].apart[i]);
        }
        count = finish(length, at, r, state, buffer ? 2 : 1, failed, count);
    }
    return count;
}
