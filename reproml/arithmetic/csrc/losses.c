/* Losses (operators/losses.py). Each function returns 0 if the rounding test fails or a target is not a class; the caller
   then takes the reference path. */

#include "fast.h"

#include "compensated.h"
#include "rows.h"

/* loss: -sum w x[target] / sum w (mean) or -sum w x[target]. weight_sum: sum w. x: [rows][classes]; weight: null or
   one number for each class. A product of two binary32 numbers is exact. The mean of a few numbers is often a
   midpoint of two binary32 numbers, hence the sums with their errors. */
int reproml_nll(const float *x, const integer *target, const float *weight, integer rows, integer classes,
                integer ignored, int mean, float *loss, float *weight_sum) {
    compensated products = {0, 0, 0}, weights = {0, 0, 0};
    for (integer i = 0; i < rows; i++) {
        if (target[i] == ignored) continue;
        if (target[i] < 0 || target[i] >= classes) return 0;
        double w = weight ? weight[target[i]] : 1.0;
        add_exact(&products, w * x[i * classes + target[i]]);
        add_exact(&weights, w);
    }
    pair s = compensated_pair(&products, rows), w = compensated_pair(&weights, rows);
    if (round_pair(w, weight_sum)) return 0;
    if (mean) {
        if (!(fabs(w.s) > fabs(w.t) + w.rad)) return 0;
        s = pair_over_pair(s, w);
        return !round_pair((pair){-s.s, -s.t, s.rad}, loss);
    }
    int failed = round_pair(s, loss) != 0;
    *loss = -*loss;
    return !failed;
}

/* out[i][target[i]] = -g w / divisor (mean) or -g w, 0 elsewhere. g: one number, or (each) one for each row. */
int reproml_nll_backward(const float *g, int each, const integer *target, const float *weight, integer rows,
                         integer classes, integer ignored, int mean, float divisor, float *out) {
    memset(out, 0, (size_t)(rows * classes) * sizeof *out);
    for (integer i = 0; i < rows; i++) {
        if (target[i] == ignored) continue;
        if (target[i] < 0 || target[i] >= classes) return 0;
        double product = (double)g[each ? i : 0] * (weight ? weight[target[i]] : 1.0f);
        float *to = &out[i * classes + target[i]];
        if (round_ball(mean ? -(product / divisor) : -product, mean ? 2 * U : 0, 0, to)) return 0;
    }
    return 1;
}

/* ---- sums over logits or predictions x and targets y ---- */

/* In the order of operators/losses.py. */
enum { BCE_WITH_LOGITS, SMOOTH_L1, HUBER };

enum { PART = 1 << 12 }; /* terms that are worth a thread */

typedef struct {
    int which;
    const float *x, *y;
    integer n, tasks;
    double scalar;
    compensated sums[TASKS];
    double sizes[TASKS];
} losses;

/* The cross-entropy is (1 - y) x + softplus(-x), or -y x + softplus(x) below 0: nothing cancels for targets in [0, 1].
   With d = |x - y| and the scalar b, the smooth loss is d^2 / (2 b) if d < b, else d - b / 2, and Huber's is b times
   that. Where d = b, both branches and their slopes are equal, so a rounded d may take the other one. */
INLINE double term(int which, double b, double x, double y, double *size) {
    if (which == BCE_WITH_LOGITS) {
        const double linear = (x < 0 ? -y : 1 - y) * x, rest = softplus_of_minus(fabs(x));
        *size = fabs(linear) + rest;
        return linear + rest;
    }
    const double d = fabs(x - y), slope = which == HUBER ? b : 1;
    const double value = d < b ? d * d * (which == HUBER ? 0.5 : 0.5 / b) : slope * (d - 0.5 * b);
    return *size = value;
}

/* Add n <= BLOCK terms, and their sizes. */
INLINE void add_block(int which, const losses *c, integer at, integer n, double *sum, double *size) {
    double terms[BLOCK] = {0}, sizes[BLOCK] = {0};
    for (integer i = 0; i < n; i++) terms[i] = term(which, c->scalar, c->x[at + i], c->y[at + i], &sizes[i]);
    for (integer width = BLOCK / 2; width; width /= 2)
        for (integer i = 0; i < width; i++) terms[i] += terms[i + width], sizes[i] += sizes[i + width];
    *sum = terms[0], *size = sizes[0];
}

VECTORISED static void add_share(integer task, void *data) {
    losses *c = data;
    const integer blocks = (c->n + BLOCK - 1) / BLOCK, last = blocks * (task + 1) / c->tasks * BLOCK;
    for (integer at = blocks * task / c->tasks * BLOCK; at < last && at < c->n; at += BLOCK) {
        const integer count = c->n - at < BLOCK ? c->n - at : BLOCK;
        double sum, size;
        if (c->which == BCE_WITH_LOGITS)
            add_block(BCE_WITH_LOGITS, c, at, count, &sum, &size);
        else if (c->which == SMOOTH_L1)
            add_block(SMOOTH_L1, c, at, count, &sum, &size);
        else
            add_block(HUBER, c, at, count, &sum, &size);
        add_exact(&c->sums[task], sum);
        c->sizes[task] += size;
    }
}

/* out = the sum of n terms, divided by `divisor`. scalar: b > 0. In units of U and of the sizes, a term errs by 5, a
   block's sum by 8, and the sum of blocks by less than 1. */
int reproml_loss(int which, const float *x, const float *y, integer n, double scalar, double divisor, float *out) {
    losses c = {.which = which, .x = x, .y = y, .n = n, .scalar = scalar};
    compensated total = {0, 0, 0};
    double size = 0;
    c.tasks = n > 2 * PART ? reproml_threads() : 1;
    if (c.tasks > TASKS) c.tasks = TASKS;
    run_tasks(add_share, &c, c.tasks, c.tasks > 1);
    for (integer task = 0; task < c.tasks; task++) {
        add_exact(&total, c.sums[task].s);
        total.t += c.sums[task].t, total.size += c.sums[task].size;
        size += c.sizes[task];
    }
    pair s = compensated_pair(&total, n / BLOCK + TASKS);
    s.rad += size * ((which == BCE_WITH_LOGITS ? SOFTPLUS_ERROR : 0) + 16 * U) * SLACK;
    return !round_pair(pair_over(s, divisor), out);
}
