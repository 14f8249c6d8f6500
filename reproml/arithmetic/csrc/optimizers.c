/* The steps of the optimizers (operators/optimizers.py). */

#include "optimizers.h"

/* Adam's step (adam in operators/optimizers.py). sign: -1 to maximize; decay: weight decay as a
   penalty; keep: 1 - lr * weight decay when decoupled; scale: 1 / sqrt(1 - beta2^t). Error bounds are in units of U
   and of the absolute values of the terms. The sum of two terms and the test each round once. Products of two
   binary32 numbers are exact. With a penalty, the last term of the bounds covers d and d^2; without one, v' has one
   more rounding. keep and its product have two roundings. In the quotient the scale has three; the root, the
   product, the sum, the division, the rate and its product have one each. */
typedef struct {
    float *p, *m, *v, *v_max; /* v_max: null without amsgrad */
    const float *g;
    integer n, first; /* the parameter's elements, and its first task */
} parameter;

typedef struct {
    integer count;
    parameter *of;
    double sign, decay, keep, b1, rest1, b2, rest2, rate, scale, eps;
    failure_list failed; /* parameter * 2^40 + element */
} adam;

/* again: with the second test of the parameter. */
INLINE int32_t adam_loop(const adam *x, const parameter *of, integer at, int n, rounded *restrict r, const int amsgrad,
                         const int again) {
    const float *restrict p = of->p + at, *restrict g = of->g + at, *restrict m = of->m + at, *restrict v = of->v + at;
    const float *restrict v_max = amsgrad ? of->v_max + at : NULL;
    const double decay = x->decay, sign = x->sign, keep = x->keep, b1 = x->b1, rest1 = x->rest1, b2 = x->b2;
    const double rest2 = x->rest2, rate = x->rate, scale = x->scale, eps = x->eps;
    int32_t any = 0;
    for (int i = 0; i < n; i++) {
        double old_p = p[i], penalty = decay * old_p, grad = sign * g[i];
        double d = decay != 0 ? grad + penalty : grad; /* + 0 would lose the sign of -0 */
        double size = fabs(grad) + fabs(penalty), ed = decay != 0 ? 3 * U * size : 0;
        double m1 = b1 * m[i], m2 = rest1 * d, v1 = b2 * v[i], v2 = rest2 * (d * d);
        float new_p, new_m, new_v;
        int32_t failed = round_padded_ball(m1 + m2, bound_of_sum(m1, m2, m1 + m2, 2 * fabs(rest1) * ed), &new_m);
        failed |= round_padded_ball(v1 + v2, 4 * U * (fabs(v1) + fabs(v2)) + 4 * fabs(rest2) * size * ed, &new_v);
        float largest = new_v;
        if (amsgrad) { /* torch.maximum as pointwise.maximum defines it: NaN if v_max is, and +0 > -0 */
            float before = v_max[i], sum = before + new_v;
            largest = new_v > before ? new_v : before;
            largest = ((new_v == 0) & (before == 0)) ? sum : largest;
            r->value[3][i] = largest;
        }
        double kept = keep * old_p, denominator = sqrt((double)largest) * scale + eps;
        double change = rate * (new_m / denominator);
        if (again)
            failed |=
                round_difference(kept, change, (keep == 1 ? 0 : 3 * U * fabs(kept)) + 20 * U * fabs(change), &new_p);
        else
            failed |= round_padded_ball(kept - change, 5 * U * fabs(kept) + 20 * U * fabs(change), &new_p);
        r->value[0][i] = new_p, r->value[1][i] = new_m, r->value[2][i] = new_v;
        r->failed[i] = failed;
        any |= failed;
    }
    return any;
}

VECTORISED static int32_t adam_block(const adam *x, const parameter *of, integer at, int n, rounded *restrict r) {
    return of->v_max ? adam_loop(x, of, at, n, r, 1, 0) : adam_loop(x, of, at, n, r, 0, 0);
}

VECTORISED static void adam_block_again(const adam *x, const parameter *of, integer at, int n, rounded *restrict r) {
    if (of->v_max)
        adam_loop(x, of, at, n, r, 1, 1);
    else
        adam_loop(x, of, at, n, r, 0, 1);
}

static void adam_task(integer task, void *data) {
    adam *x = data;
    integer i = x->count - 1;
    while (x->of[i].first > task) i--;
    const parameter *of = x->of + i;
    float *const state[STATES] = {of->p, of->m, of->v, of->v_max};
    const int states = of->v_max ? 4 : 3;
    rounded r, again;
    for (integer at = (task - of->first) * TASK; at < (task - of->first + 1) * TASK && at < of->n; at += BLOCK) {
        int n = (int)(of->n - at < BLOCK ? of->n - at : BLOCK);
        int32_t any = adam_block(x, of, at, n, &r);
        if (any) {
            adam_block_again(x, of, at, n, &again);
            any = take_passed(&r, &again, states, n);
        }
        write_back((i << 40) + at, n, &r, state, states, any, &x->failed);
    }
}

/* One step of `count` parameters. sizes [count]: their elements; pointers [count, 5]: parameter, gradient, both
   averages, and the largest second average or null. failed: memory for all elements. Returns the number of elements for which the test failed, listed in
   `failed` as parameter * 2^40 + element; negative if memory is lacking. */
integer reproml_adam(integer count, const integer *sizes, float *const *pointers, double sign, double decay,
                     double keep, double b1, double rest1, double b2, double rest2, double rate, double scale,
                     double eps, integer *failed) {
    integer tasks = 0, elements = 0;
    parameter *of = reproml_scratch((size_t)count * sizeof(parameter));
    if (!of) return -1;
    for (integer i = 0; i < count; i++, pointers += 5) {
        of[i] = (parameter){pointers[0], pointers[2], pointers[3], pointers[4], pointers[1], sizes[i], tasks};
        tasks += (sizes[i] + TASK - 1) / TASK;
        elements += sizes[i];
    }
    adam x = {count, of, sign, decay, keep, b1, rest1, b2, rest2, rate, scale, eps, {failed, elements, 0}};
    if (tasks) reproml_parallel(adam_task, &x, tasks);
    return x.failed.count;
}

/* SGD's step (sgd in operators/optimizers.py). buffer: null without momentum. first: the buffer starts as d. */
typedef struct {
    integer n;
    float *p, *buffer;
    const float *g;
    int nesterov;
    double sign, decay, rate, momentum, keep, take;
    failure_list failed;
} sgd;

/* The constants select a loop without branches, which vectorises. */
INLINE int32_t sgd_loop(const sgd *x, integer at, int n, rounded *restrict r, const int with_buffer,
                        const int with_decay, const int nesterov) {
    const float *restrict p = x->p + at, *restrict g = x->g + at;
    const float *restrict buffer = with_buffer ? x->buffer + at : NULL;
    const double sign = x->sign, decay = x->decay, rate = x->rate, momentum = x->momentum;
    const double keep = x->keep, take = x->take;
    int32_t any = 0;
    for (int i = 0; i < n; i++) {
        double old_p = p[i], penalty = with_decay ? decay * old_p : 0, grad = sign * g[i];
        double d = with_decay ? grad + penalty : grad; /* + 0 would lose the sign of -0 */
        double size = fabs(grad) + fabs(penalty), e = with_decay ? 3 * U * size : 0, step = d;
        float new_p, new_b = 0;
        int32_t failed = 0;
        if (with_buffer) {
            double b1 = keep * buffer[i], b2 = take * d;
            b1 = keep != 0 ? b1 : -0.0;
            failed = round_padded_ball(b1 + b2, bound_of_sum(b1, b2, b1 + b2, 2 * fabs(take) * e), &new_b);
            double b = new_b, ahead = momentum * b;
            step = nesterov ? d + ahead : b;
            size = nesterov ? size + fabs(ahead) : fabs(b);
            e = nesterov ? e + 3 * U * size : 0;
        }
        /* If the step is one binary32 number, its product with the rate, which is another, is exact. The bound is 0 then,
           as half of a subnormal step makes midpoints. */
        const int one_number = with_buffer ? !nesterov : !with_decay;
        const double change = rate * step, sum = old_p - change;
        const double error = 2 * fabs(rate) * e + (one_number ? 0 : 6 * U * fabs(rate) * size);
        failed |= round_padded_ball(sum, bound_of_sum(old_p, -change, sum, error), &new_p);
        r->value[0][i] = new_p;
        if (with_buffer) r->value[1][i] = new_b;
        r->failed[i] = failed;
        any |= failed;
    }
    return any;
}

VECTORISED static int32_t sgd_block(const sgd *x, integer at, int n, rounded *restrict r) {
    const int decay = x->decay != 0;
    if (!x->buffer) return decay ? sgd_loop(x, at, n, r, 0, 1, 0) : sgd_loop(x, at, n, r, 0, 0, 0);
    if (x->nesterov) return decay ? sgd_loop(x, at, n, r, 1, 1, 1) : sgd_loop(x, at, n, r, 1, 0, 1);
    return decay ? sgd_loop(x, at, n, r, 1, 1, 0) : sgd_loop(x, at, n, r, 1, 0, 0);
}

static void sgd_task(integer task, void *data) {
    sgd *x = data;
    float *const state[2] = {x->p, x->buffer};
    rounded r;
    for (integer at = task * TASK; at < (task + 1) * TASK && at < x->n; at += BLOCK) {
        int n = (int)(x->n - at < BLOCK ? x->n - at : BLOCK);
        write_back(at, n, &r, state, x->buffer ? 2 : 1, sgd_block(x, at, n, &r), &x->failed);
    }
}

/* One step of SGD on n elements. buffer: null without momentum. first: the buffer starts as the gradient; later it keeps
   `momentum` of itself and takes `fresh` of the gradient. failed: memory for n elements. Returns the number of elements
   for which the test failed, listed in `failed`. */
integer reproml_sgd(integer n, float *p, const float *g, float *buffer, int first, int nesterov, double sign,
                    double decay, double rate, double momentum, double fresh, integer *failed) {
    sgd x = {n,
             p,
             buffer,
             g,
             nesterov,
             sign,
             decay,
             rate,
             momentum,
             first ? 0 : momentum,
             first ? 1 : fresh,
             {failed, n, 0}};
    reproml_parallel(sgd_task, &x, (n + TASK - 1) / TASK);
    return x.failed.count;
}
