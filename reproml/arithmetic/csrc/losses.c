/* The negative log-likelihood: activations.nll_loss has the definition. Each function returns 0, and the plain
   path does it, where the rounding test fails or a target is no class. */

#include "ball.h"
#include "compensated.h"

/* loss: -sum w x[target] / sum w (mean) or -sum w x[target]. weight_sum: sum w. x: [rows][classes]; weight:
   null or one a class. A product of two binary32 numbers is exact. A mean of a few numbers is often a tie, hence pairs. */
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
    pair s = pair_of(&products, rows), w = pair_of(&weights, rows);
    if (!settle_pair(w.s, w.t, w.e, weight_sum)) return 0;
    if (mean) {
        if (!(fabs(w.s) > fabs(w.t) + w.e)) return 0;
        s = quotient(s, w);
        return settle_pair(-s.s, -s.t, s.e, loss);
    }
    int sure = settle_pair(s.s, s.t, s.e, loss);
    *loss = -*loss;
    return sure;
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
