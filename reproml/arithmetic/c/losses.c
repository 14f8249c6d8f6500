/* The negative log-likelihood: activations.nll_loss has the definition. Each function returns 0, and the plain
   path does it, where the rounding test fails or a target is no class. */

#include "ball.h"

/* The sum so far is sum + lost, with all rounding errors kept; size: of the absolute values. */
typedef struct {
    double sum, lost, size;
} total;

static inline void count(total *t, double term) {
    double more;
    two_sum(t->sum, term, &t->sum, &more);
    t->lost += more;
    t->size += fabs(term);
}

/* loss: -sum w x[target] / sum w (mean) or -sum w x[target]. weight_sum: sum w. x: [rows][classes]; weight:
   null or one a class. A product of two binary32 numbers is exact; a sum's bound is tape.Tape's, 2 U. */
int reproml_nll(const float *x, const integer *target, const float *weight, integer rows, integer classes,
                integer ignored, int mean, float *loss, float *weight_sum) {
    total products = {0, 0, 0}, weights = {0, 0, 0};
    for (integer i = 0; i < rows; i++) {
        if (target[i] == ignored) continue;
        if (target[i] < 0 || target[i] >= classes) return 0;
        double w = weight ? weight[target[i]] : 1.0;
        count(&products, w * x[i * classes + target[i]]);
        count(&weights, w);
    }
    double s = products.sum + products.lost, w = weights.sum + weights.lost;
    double es = 2 * U * products.size, ew = weight ? 2 * U * weights.size : 0, low = fabs(w) - ew;
    if (!settled(w, 0, ew, weight_sum)) return 0;
    if (!mean) {
        int sure = settled(s, 0, es, loss);
        *loss = -*loss;
        return sure;
    }
    double c = s / w;
    if (!(low > 0) || !settled(0.0 - c, 2 * U, (es + fabs(c) * ew) / low, loss)) return 0;
    return fabs(c) <= DBL_MAX;
}

/* out[i][target[i]] = -g w / total (mean) or -g w, 0 elsewhere. g: one number or (each) one a row. */
int reproml_nll_backward(const float *g, int each, const integer *target, const float *weight, integer rows,
                         integer classes, integer ignored, int mean, float divisor, float *out) {
    memset(out, 0, (size_t)(rows * classes) * sizeof *out);
    for (integer i = 0; i < rows; i++) {
        if (target[i] == ignored) continue;
        if (target[i] < 0 || target[i] >= classes) return 0;
        double product = (double)g[each ? i : 0] * (weight ? weight[target[i]] : 1.0f);
        float *to = &out[i * classes + target[i]];
        if (!settled(mean ? -(product / divisor) : -product, mean ? 2 * U : 0, 0, to)) return 0;
    }
    return 1;
}
