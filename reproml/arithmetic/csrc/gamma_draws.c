/* The decisions of the rejection method that draws gamma numbers, and what they are taken from
   (operators/gamma_draws.py, which has the method, the bounds and the same decisions one by one). */

#include "elementary.h"

/* In the order of operators/gamma_draws.py. */
enum { ALL_DECIDED, NUMBERS_MISSING, UNDECIDED };      /* why the loop ended */
enum { ELEMENT, AT, LEFT, BEGUN, VERDICT };            /* its state */
enum { NO_VERDICT, REJECTED, ACCEPTED, NOT_POSITIVE }; /* about one attempt; the last takes no uniform number */
enum { NONE = -1, SPARE = -2 };                        /* no normal number is left over, or the generator's */

/* approximations [4, n]: log(1 - u), sqrt(-2 log(1 - u)), cos(2 pi u) and sin(2 pi u). */
VECTORISED static void approximate(integer n, const double *restrict u, double *restrict log, double *restrict radius,
                                   double *restrict cosine, double *restrict sine) {
    for (integer i = 0; i < n; i++) {
        log[i] = log1p_(-u[i]);
        radius[i] = sqrt(-2 * log[i]);
        cosine[i] = cospi_(2 * u[i]);
        sine[i] = sinpi_(2 * u[i]);
    }
}

void reproml_gamma_approximations(integer n, const double *u, double *approximations) {
    approximate(n, u, approximations, approximations + n, approximations + 2 * n, approximations + 3 * n);
}

/* The nearest binary64 number to log(v), for v = 1 + e within 2^-20 of 1; NaN where that is not certain. It is
   e - e^2/2 + c with c = e^3/3 - e^4/4. What is left out and all roundings of c are below 2^-38 |c|; the two halves of
   the square are exact, and the sums of the small parts round twice. */
static double rounded_log_near_1(double v) {
    const double e = v - 1, square = e * e, rest = fma(e, e, -square), c = square * e * (1 / 3.0 - e / 4);
    double high, low;
    if (!(fabs(e) < 0x1p-20)) return NAN;
    two_sum(e, -0.5 * square, &high, &low);
    const double small = low + (c - 0.5 * rest);
    const double bound = 0x1p-51 * (fabs(low) + fabs(rest) + fabs(c)) + 0x1p-37 * fabs(c);
    const double below = high + (small - bound), above = high + (small + bound);
    return below == above ? below : NAN;
}

/* gamma_draws._passes. The roundings of the logarithm of a known v make the difference if d is huge. */
static int decide(double z, double c, double d, double log) {
    const double t = c * z, y = 1 + t, error = fabs(t) * 0x1p-46;
    if (fabs(y) < 0x1p-10) return NO_VERDICT;
    if (y < 0) return NOT_POSITIVE;
    const double v = y * y * y, log_v = log_(v);
    const int known = 1 + (t - error) == 1 + (t + error);
    double margin = 1 + z * z - log + d * (fabs(1 - v) + fabs(log_v)) * (1 + 1 / y);
    margin = 0x1p-42 * margin + (known ? 0 : d * 0x1p-84);
    double gap = 0.5 * (z * z) + d * (1 - v + log_v) - log;
    if (fabs(gap) <= margin && known) {
        const double g = d * (1 - v + rounded_log_near_1(v));
        gap = 0.5 * (z * z) + g - log;
        margin = 0x1p-42 * (1 + z * z - log + fabs(g));
    }
    return fabs(gap) > margin ? (gap > 0 ? ACCEPTED : REJECTED) : NO_VERDICT;
}

/* Decide about the elements from state[ELEMENT] on, until all are decided, numbers are missing or a decision is open,
   whose verdict the next call takes from the state. d, c [n]: of the method; below_1 [n]: whether the shape is;
   approximations [4, available]; normals, uniforms [n]: the places of what each element takes. */
int reproml_gamma_decisions(integer n, const double *d, const double *c, const uint8_t *below_1, integer available,
                            const double *approximations, double spare, integer *state, integer *normals,
                            integer *uniforms) {
    const double *log = approximations, *radius = log + available, *cosine = radius + available;
    const double *sine = cosine + available;
    integer at = state[AT], left = state[LEFT];
    for (integer i = state[ELEMENT]; i < n; i++) {
        if (below_1[i] && !state[BEGUN]) uniforms[i] = at++; /* it is drawn before it is used */
        state[BEGUN] = 1;
        int verdict = REJECTED;
        while (verdict != ACCEPTED) {
            state[ELEMENT] = i, state[AT] = at, state[LEFT] = left;
            if (available - at < 5) return NUMBERS_MISSING;
            double z;
            integer normal = left;
            if (left == NONE) {
                z = radius[at + 1] * cosine[at];
                normal = 2 * at, left = 2 * at + 1;
                at += 2;
            } else {
                z = left == SPARE ? spare : radius[(left >> 1) + 1] * sine[left >> 1];
                left = NONE;
            }
            const double t = c[i] * z, square = t * t;
            if (state[VERDICT] != NO_VERDICT)
                verdict = (int)state[VERDICT];
            else if (d[i] < 1e6 && square < 0.25 && log[at] < -1.35 * d[i] * square * square - 1e-5)
                verdict = ACCEPTED;
            else
                verdict = decide(z, c[i], d[i], log[at]);
            state[VERDICT] = NO_VERDICT;
            if (verdict == NO_VERDICT) return UNDECIDED;
            at += verdict != NOT_POSITIVE;
            normals[i] = normal;
        }
        state[BEGUN] = 0;
    }
    state[ELEMENT] = n, state[AT] = at, state[LEFT] = left;
    return ALL_DECIDED;
}
