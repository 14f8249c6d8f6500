/* The steps of the other optimizers (operators/optimizer_formulas.py): each formula in balls, in the same order of
   operations, rounded by the test. All new numbers of an element come from one loop, and all are left to Python if one
   of them fails. What is not finite fails. */

#include "balls.h"
#include "optimizers.h"

/* In the order of operators/optimizer_formulas.py. */
enum {
    RMSPROP,
    RMSPROP_CENTERED,
    RMSPROP_MOMENTUM,
    RMSPROP_CENTERED_MOMENTUM,
    ADAGRAD,
    ADADELTA,
    NADAM,
    RADAM,
    RADAM_PLAIN,
    ADAMAX,
    ASGD,
    ASGD_COPY,
    RPROP
};

#define NUMBERS 9

typedef struct {
    integer n;
    int loop;
    double sign, decay, number[NUMBERS];
    float *state[STATES]; /* the parameter comes first */
    const float *g;
    failure_list failed;
} step;

/* The direction: the gradient plus decay * p. Without weight decay p is the gradient, so that the sum keeps the sign of a
   zero and does not depend on the parameter; d is a binary32 number then, with a radius of 0. With it the radius is not 0,
   even if the sum is exact: that may have more bits. */
INLINE ball direction(double grad, double decay, double p) {
    const ball sum = plus(exact(grad), exact_product(decay, p));
    return (ball){sum.mid, sum.rad + (decay != 0 ? U : 0) * fabs(sum.mid)};
}

/* A multiple and the square of the direction, which are exact for a binary32 number. */
INLINE ball multiple(double c, ball d) {
    const ball product = scaled(c, d);
    return (ball){product.mid, d.rad == 0 ? 0 : product.rad};
}

INLINE ball square(ball d) {
    const ball product = times(d, d);
    return (ball){product.mid, d.rad == 0 ? 0 : product.rad};
}

/* keep * v + rest * d^2 */
INLINE ball average_square(double keep, double v, double rest, ball d) {
    return plus(exact_product(keep, v), scaled(rest, square(d)));
}

/* keep * m + rest * d */
INLINE ball average(double keep, double m, double rest, ball d) {
    return plus(exact_product(keep, m), multiple(rest, d));
}

/* round_ball; a minimum, for the room of a ball that is not a point, compiles to one instruction. */
INLINE int32_t store(ball x, float *to) {
    const double room = 2 * U * fabs(x.mid), any = 0x1p900 * x.rad; /* any is 0 or huge */
    return round_padded_ball(x.mid, x.rad * SLACK + (any < room ? any : room), to);
}

/* a - b; again: by the second test. */
INLINE int32_t store_difference(const int again, ball a, ball b, float *to) {
    return again ? round_difference(a.mid, b.mid, a.rad + b.rad, to) : store(minus(a, b), to);
}

/* x / d for an exact x, with the rounding error itself, which is 0 for a quotient in binary64. */
INLINE ball quotient(double x, double d) {
    const double q = x / d;
    return (ball){q, fabs(fma(-q, d, x) / d) * SLACK};
}

/* The new numbers of one element: s [STATES], replaced. c: the constants of the optimizer, in the order in which Python
   gives them. `which` is a constant, so that one case remains. again: with the second test of the parameter. */
INLINE int32_t new_numbers(const int which, const int again, const double *c, ball d, float *s) {
    const ball p = exact(s[0]);
    int32_t failed = 0;
    switch (which) {
    case RMSPROP:
    case RMSPROP_CENTERED:
    case RMSPROP_MOMENTUM:
    case RMSPROP_CENTERED_MOMENTUM: {
        const int centered = which == RMSPROP_CENTERED || which == RMSPROP_CENTERED_MOMENTUM;
        const int momentum = which == RMSPROP_MOMENTUM || which == RMSPROP_CENTERED_MOMENTUM;
        const double rate = c[0], keep = c[1], rest = c[2], eps = c[3], mu = c[4];
        failed |= store(average_square(keep, s[1], rest, d), &s[1]);
        double variance = s[1];
        if (centered) {
            failed |= store(average(keep, s[2], rest, d), &s[2]);
            variance -= (double)s[2] * s[2];
        }
        const ball u = over(d, plus(root(variance), exact(eps)));
        if (momentum) {
            float *buffer = s + 2 + centered;
            failed |= store(plus(exact_product(mu, *buffer), u), buffer);
            failed |= store_difference(again, p, exact_product(rate, *buffer), &s[0]);
        } else
            failed |= store_difference(again, p, scaled(rate, u), &s[0]);
        return failed;
    }
    case ADAGRAD: {
        const double rate = c[0], eps = c[1];
        failed |= store(plus(exact(s[1]), square(d)), &s[1]);
        const ball change = times(near(rate), over(d, plus(root(s[1]), exact(eps))));
        return failed | store_difference(again, p, change, &s[0]);
    }
    case ADADELTA: {
        const double rate = c[0], keep = c[1], rest = c[2], eps = c[3];
        float u;
        failed |= store(average_square(keep, s[1], rest, d), &s[1]);
        failed |= store(times(over(root(s[2] + eps), root(s[1] + eps)), d), &u);
        failed |= store(plus(exact_product(keep, s[2]), scaled(rest, exact_product(u, u))), &s[2]);
        return failed | store_difference(again, p, exact_product(rate, u), &s[0]);
    }
    case NADAM:
    case RADAM:
    case RADAM_PLAIN: {
        const double shrinkage = c[4];
        failed |= store(average(c[0], s[1], c[1], d), &s[1]);
        failed |= store(average_square(c[2], s[2], c[3], d), &s[2]);
        const ball kept = exact_product(shrinkage, s[0]);
        if (which == RADAM_PLAIN) return failed | store_difference(again, kept, exact_product(c[5], s[1]), &s[0]);
        const double eps = c[6], variance = which == NADAM ? s[2] / c[8] : s[2];
        const ball denominator = plus(root(variance), exact(eps));
        if (which == RADAM)
            return failed | store_difference(again, kept, scaled(c[5], over(exact(s[1]), denominator)), &s[0]);
        const ball ahead = plus(multiple(c[7], d), exact_product(c[5], s[1]));
        return failed | store_difference(again, kept, over(ahead, denominator), &s[0]);
    }
    case ADAMAX: {
        const double keep = c[0], rest = c[1], fade = c[2], eps = c[3], rate = c[4];
        const float faded = (float)(fade * s[2]); /* the product is exact */
        float size;
        failed |= store(average(keep, s[1], rest, d), &s[1]);
        failed |= store(plus((ball){fabs(d.mid), d.rad}, exact(eps)), &size);
        failed |= !(fabsf(faded) <= FLT_MAX);
        s[2] = faded > size ? faded : size;
        const ball change = again ? quotient(rate * s[1], s[2]) : scaled(rate, over(exact(s[1]), exact(s[2])));
        return failed | store_difference(again, p, change, &s[0]);
    }
    case ASGD:
    case ASGD_COPY: {
        const double shrinkage = c[0], rate = c[1], weight = c[2];
        failed |= store(minus(exact_product(shrinkage, s[0]), multiple(rate, d)), &s[0]);
        if (which == ASGD_COPY)
            s[1] = s[0];
        else
            failed |= store(plus(exact(s[1]), scaled_closely(weight, minus(exact(s[0]), exact(s[1])))), &s[1]);
        return failed;
    }
    case RPROP: { /* each number has one operation, of which IEEE arithmetic rounds the exact result */
        const double increase = c[0], decrease = c[1], low = c[2], high = c[3];
        const float grad = (float)d.mid;
        const int same = ((grad > 0) & (s[1] > 0)) | ((grad < 0) & (s[1] < 0));
        const int turned = ((grad > 0) & (s[1] < 0)) | ((grad < 0) & (s[1] > 0));
        const float size = (float)(s[2] * (same ? increase : turned ? decrease : 1.0));
        const double numbers = fabs((double)s[0]) + fabs((double)s[1]) + fabs((double)grad) + fabs((double)size);
        failed |= !(numbers <= DBL_MAX) | (size == 0); /* clamp_ decides the sign of a zero */
        s[1] = turned ? 0 : grad;
        s[2] = size > low ? size : (float)low;
        s[2] = s[2] < high ? s[2] : (float)high;
        s[0] -= s[1] > 0 ? s[2] : s[1] < 0 ? -s[2] : 0;
        return failed;
    }
    }
    return 1;
}

INLINE int32_t run_loop(const int which, const int again, const int states, const step *x, integer at, int n,
                        rounded *restrict r) {
    const float *restrict p = x->state[0] + at, *restrict a = x->state[1] + at, *restrict g = x->g + at;
    const float *restrict b = states > 2 ? x->state[2] + at : NULL;
    const float *restrict c = states > 3 ? x->state[3] + at : NULL;
    const float *decayed = x->decay != 0 ? p : g;
    const double sign = x->sign, decay = x->decay, decayed_sign = x->decay != 0 ? 1 : sign;
    double number[NUMBERS];
    int32_t any = 0;
    memcpy(number, x->number, sizeof number);
    for (int i = 0; i < n; i++) {
        float s[STATES] = {p[i], a[i], states > 2 ? b[i] : 0, states > 3 ? c[i] : 0};
        const ball d = direction(sign * g[i], decay, decayed_sign * decayed[i]);
        const int32_t failed = new_numbers(which, again, number, d, s);
        for (int k = 0; k < states; k++) r->value[k][i] = s[k];
        r->failed[i] = failed;
        any |= failed;
    }
    return any;
}

#define LOOP(which, states) \
    case which: return run_loop(which, again, states, x, at, n, r);

INLINE int32_t run_block(const step *x, integer at, int n, rounded *restrict r, const int again) {
    switch (x->loop) {
        LOOP(RMSPROP, 2)
        LOOP(RMSPROP_CENTERED, 3)
        LOOP(RMSPROP_MOMENTUM, 3)
        LOOP(RMSPROP_CENTERED_MOMENTUM, 4)
        LOOP(ADAGRAD, 2)
        LOOP(ADADELTA, 3)
        LOOP(NADAM, 3)
        LOOP(RADAM, 3)
        LOOP(RADAM_PLAIN, 3)
        LOOP(ADAMAX, 3)
        LOOP(ASGD, 2)
        LOOP(ASGD_COPY, 2)
        LOOP(RPROP, 3)
    }
    return 0;
}

VECTORISED static int32_t optimizer_block(const step *x, integer at, int n, rounded *restrict r) {
    return run_block(x, at, n, r, 0);
}

VECTORISED static void optimizer_block_again(const step *x, integer at, int n, rounded *restrict r) {
    run_block(x, at, n, r, 1);
}

static void optimizer_task(integer task, void *data) {
    step *x = data;
    int states = 1;
    while (states < STATES && x->state[states]) states++;
    rounded r, again;
    for (integer at = task * TASK; at < (task + 1) * TASK && at < x->n; at += BLOCK) {
        int n = (int)(x->n - at < BLOCK ? x->n - at : BLOCK);
        int32_t any = optimizer_block(x, at, n, &r);
        if (any) {
            optimizer_block_again(x, at, n, &again);
            any = take_passed(&r, &again, states, n);
        }
        write_back(at, n, &r, x->state, states, any, &x->failed);
    }
}

/* One step of a parameter of n numbers. state [STATES]: the parameter, its states, and null; number [NUMBERS]: the
   constants of its loop; failed: memory for n indices. Returns the number of elements that failed, listed there. */
integer reproml_optimizer_step(int loop, integer n, float *const *state, const float *g, double sign, double decay,
                               const double *number, integer *failed) {
    step x = {.n = n, .loop = loop, .sign = sign, .decay = decay, .g = g, .failed = {failed, n, 0}};
    memcpy(x.number, number, sizeof x.number);
    for (size_t i = 0; i < sizeof x.state / sizeof *x.state; i++) x.state[i] = state[i];
    reproml_parallel(optimizer_task, &x, (n + TASK - 1) / TASK);
    return x.failed.count;
}
