/* The negative log-likelihood (operators/losses.py). Each function returns 0 if the rounding test fails or a target
   is not a class; the caller then takes the reference path. */

#include "compensated.h"

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
