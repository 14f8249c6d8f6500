/* Batch, group and layer normalisation (operators/normalization.py). A group, which is normalised with one mean and one
   variance, consists of runs of contiguous numbers. */

#include "compensated_runs.h"
#include "lanes.h"

#define SERIAL 4096 /* elements that are not worth a second thread */
#define BLOCK 512   /* elements whose tests are evaluated together */

typedef struct {
    integer groups, runs, length; /* each group has `runs` runs of `length` */
    integer group_stride, run_stride;
    integer weight_period, weight_group, weight_run; /* of run r of group j: (j % period) * group + r * run */
    integer along;                                   /* otherwise one weight for each element of a run */
} layout;

typedef struct {
    layout at;
    const float *x, *g, *w, *b;
    float *mean, *rstd, *out; /* mean and rstd of each group */
    double eps;
    float *var;                                     /* rounded unbiased variances, or null */
    int given;                                      /* mean and rstd are given, not those of x */
    integer block;                                  /* groups for a thread at a time */
    float *sum, *deviation, *weight_sum, *bias_sum; /* backward's sums over each group */
    int failed_sum;                                 /* the test failed for a sum or a statistic */
    failure_list failed;                            /* elements of `out` */
} normal;

static runs runs_of(const normal *ctx, integer group) {
    const layout *at = &ctx->at;
    integer first = group * at->group_stride;
    runs r = {.x = ctx->x + first,
              .y = ctx->g ? ctx->g + first : 0,
              .w = at->along ? ctx->w : 0,
              .x_stride = at->run_stride,
              .y_stride = at->run_stride,
              .runs = at->runs,
              .length = at->length};
    if (at->run_stride == at->length) {
        r.length *= r.runs;
        r.runs = 1;
    }
    return r;
}

static void run_blocks(void (*work)(integer, void *), normal *ctx) {
    integer each = ctx->at.runs * ctx->at.length;
    ctx->block = each < 1024 ? 16 : 1;
    run_tasks(work, ctx, (ctx->at.groups + ctx->block - 1) / ctx->block, ctx->at.groups * each > SERIAL);
}

/* ---- statistics ---- */

/* Fails also if the number is not finite. */
static inline int32_t round_statistic(double mid, double rad, float *result) {
    return (round_signed_sum(mid, -rad, result) != 0) | !(fabs(mid) <= DBL_MAX);
}

/* 1 / sqrt of a number within `rad` of v > 0: half its relative error and two roundings. */
static int32_t round_inverse_root(double v, double rad, float *result) {
    double r = 1 / sqrt(v), relative = rad * r * r;
    return !(relative < 0.1) || round_statistic(r, r * (0.6 * relative + 4 * U), result);
}

/* The same by a step of Newton's method, y + y (1 - v y^2) / 2, whose own error is 3/8 (1 - v y^2)^2. */
static int32_t round_inverse_root_of_pair(pair v, float *result) {
    double y = 1 / sqrt(v.s), square = y * y, low = fma(y, y, -square);
    double product = v.s * square, rest = fma(v.s, square, -product);
    double left = ((1 - product) - rest) - (v.s * low + v.t * square), relative = v.rad / v.s;
    if (!(v.s > 0 && relative < 0.1)) return 1;
    pair root = {y, y * left / 2, y * (0.6 * relative + 100 * U * U)};
    return round_pair(root, result);
}

/* mean, 1 / sqrt(variance + eps) and the unbiased variance from sums with their errors. For any mu and d = x - mu,
   sum (x - mean)^2 = sum d^2 - n (mean - mu)^2. */
INLINE int32_t round_statistics_with_errors(const runs *ctx, integer n, double eps, float *mean, float *rstd,
                                            float *var) {
    pair m = pair_over(sum_with_errors(ctx->x, 0, ctx->x_stride, 0, ctx->runs, ctx->length), (double)n);
    const lanes zero = {0};
    compensated_lanes squares = {zero, zero, zero};
    for (integer run = 0; run < ctx->runs; run++)
        for (integer i = 0; i < ctx->length; i += LANES) {
            const integer count = ctx->length - i;
            lanes d, low;
            two_sum_of_lanes(widen_some(ctx->x + run * ctx->x_stride + i, count), zero - m.s, &d, &low);
            low -= m.t;
            for (integer l = count; l < LANES; l++) d[l] = low[l] = 0;
            add_product_lanes(&squares, d, d);
            add_small_lanes(&squares, 2 * d * low);
            add_small_lanes(&squares, low * low);
        }
    pair s = pair_of_lanes(&squares, n), v;
    s.rad += (double)n * m.rad * m.rad * SLACK;
    v = pair_over(s, (double)n);
    double high, low;
    two_sum(v.s, eps, &high, &low);
    v = make_pair(high, low + v.t, v.rad + 2 * U * (fabs(low) + fabs(v.t)));
    s = pair_over(s, (double)(n - 1));
    return round_pair(m, mean) || round_inverse_root_of_pair(v, rstd) || (var && round_pair(s, var));
}

/* Mean and variance in two passes. The second one sums (x - mu)^2 with mu within `off` of the mean and three roundings
   for each square: the sum of squares errs by (height + 3) U of itself and by n off^2. Multiplying by 1 / n adds two
   roundings. Returns nonzero if a test fails. */
INLINE int32_t round_statistics(const runs *of, integer n, double eps, float *mean, float *rstd, float *var) {
    runs ctx = *of;
    double total[2], squares, part = 1 / (double)n;
    double height = (double)sum_runs(NUMBERS, &ctx, total);
    if (!(total[1] <= DBL_MAX)) return 1;
    ctx.m = total[0] * part;
    double off = (height + 5) * U * SLACK * total[1] * part;
    int32_t failed = round_statistic(ctx.m, off, mean);
    height = (double)sum_runs(SQUARES, &ctx, &squares);
    double rad = (height + 6) * U * SLACK * squares + (double)n * off * off * SLACK;
    double v = squares * part + eps;
    failed |= round_inverse_root(v, rad * part + 4 * U * v, rstd);
    if (var) {
        v = squares / (double)(n - 1);
        failed |= round_statistic(v, rad / (double)(n - 1) + 2 * U * v, var);
    }
    return failed && round_statistics_with_errors(of, n, eps, mean, rstd, var);
}

/* ---- forward ---- */

/* x - m */
INLINE pair difference(double x, double m) {
    pair d = {0, 0, 0};
    two_sum(x, -m, &d.s, &d.t);
    return d;
}

/* The test on a number and its bound, then on a pair. Infinite and NaN results need none. Both tests are evaluated, and
   branches avoided, so that a loop of these is one of vectors. A zero that fails the first test is +0 if it is exact, and
   fails the second one if `zero_fails`. */
INLINE int32_t round_twice(double mid, double minus_rad, pair value, int32_t zero_fails, float *result) {
    float first, second;
    int32_t failed = round_signed_sum(mid, minus_rad, &first), left = round_pair(value, &second);
    int32_t finite = fabs(mid) <= DBL_MAX;
    *result = !failed ? first : finite ? second : to_target(mid);
    return (failed != 0) & finite & ((left != 0) | (zero_fails & (second == 0)));
}

/* out = (x - m) r w + b: the product errs by 2 U of itself (r w is exact), the sum by U. Returns nonzero if the test
   fails for an element. */
INLINE int32_t normalize_block(const int along, const float *x, integer n, double m, double r, const float *w,
                               const float *b, float *restrict out) {
    double scale = along ? r : r * (w ? *w : 1), shift = along || !b ? 0 : *b;
    int32_t failed = 0;
    for (integer i = 0; i < n; i++) {
        double product = (x[i] - m) * (along ? scale * w[i] : scale), term = along ? b[i] : shift;
        failed |= round_signed_sum(product + term, fabs(product) * (-6 * U) + fabs(term) * (-4 * U), out + i);
    }
    return failed;
}

/* The same for a block where it fails for an element: the second test is on a pair. left[i] is nonzero where both
   fail. Infinite and NaN results need no test. */
INLINE void normalize_block_by_pairs(const int along, const float *x, integer n, double m, double r, const float *w,
                                     const float *b, float *restrict out, int32_t *restrict left) {
    double scale = along ? r : r * (w ? *w : 1), shift = along || !b ? 0 : *b;
    for (integer i = 0; i < n; i++) {
        double factor = along ? scale * w[i] : scale, product = (x[i] - m) * factor, term = along ? b[i] : shift;
        double mid = product + term;
        pair value = pair_times(difference(x[i], m), factor);
        left[i] = round_twice(mid, fabs(product) * (-6 * U) + fabs(term) * (-4 * U),
                              pair_plus(value, (pair){term, 0, 0}), 0, out + i);
    }
}

INLINE void normalize_run(normal *ctx, integer at, integer group, const float *w, const float *b) {
    const int along = ctx->at.along != 0;
    double m = ctx->mean[group], r = ctx->rstd[group];
    for (integer i = 0; i < ctx->at.length; i += BLOCK) {
        integer n = ctx->at.length - i < BLOCK ? ctx->at.length - i : BLOCK;
        const float *x = ctx->x + at + i, *wi = along ? w + i : w, *bi = along ? b + i : b;
        float *out = ctx->out + at + i;
        if (!(along ? normalize_block(1, x, n, m, r, wi, bi, out) : normalize_block(0, x, n, m, r, wi, bi, out)))
            continue;
        int32_t left[BLOCK];
        if (along)
            normalize_block_by_pairs(1, x, n, m, r, wi, bi, out, left);
        else
            normalize_block_by_pairs(0, x, n, m, r, wi, bi, out, left);
        for (integer j = 0; j < n; j++)
            if (left[j]) add_failure(&ctx->failed, at + i + j);
    }
}

INLINE void normalize_run_of(normal *ctx, integer group, integer run) {
    const layout *at = &ctx->at;
    integer weight = at->along ? 0 : group % at->weight_period * at->weight_group + run * at->weight_run;
    normalize_run(ctx, group * at->group_stride + run * at->run_stride, group, ctx->w ? ctx->w + weight : 0,
                  ctx->b ? ctx->b + weight : 0);
}

/* Some groups with their own statistics. All statistics come first, so that those of a group need not wait for the
   roots of the group before. */
VECTORISED static void normalize_groups(integer task, void *data) {
    normal *ctx = data;
    integer first = task * ctx->block, last = first + ctx->block < ctx->at.groups ? first + ctx->block : ctx->at.groups;
    for (integer group = first; group < last; group++) {
        runs r = runs_of(ctx, group);
        if (round_statistics(&r, ctx->at.runs * ctx->at.length, ctx->eps, ctx->mean + group, ctx->rstd + group,
                             ctx->var ? ctx->var + group : 0)) {
            set_flag(&ctx->failed_sum);
            return;
        }
    }
    for (integer group = first; group < last; group++)
        for (integer run = 0; run < ctx->at.runs; run++) normalize_run_of(ctx, group, run);
}

/* One run of each group with given statistics, in the order of memory. */
VECTORISED static void normalize_across(integer run, void *data) {
    normal *ctx = data;
    for (integer group = 0; group < ctx->at.groups; group++) normalize_run_of(ctx, group, run);
}

/* (1 - momentum) old + momentum new. Returns nonzero if the test fails or 1 - momentum is not exact in binary64. */
static int32_t update_running_stat(double momentum, double old, double new, float *result) {
    double keep = 1 - momentum, a = keep * old, b = momentum * new;
    if (1 - keep != momentum) return 1;
    if (!round_statistic(a + b, 5 * U * (fabs(a) + fabs(b)), result)) return 0;
    compensated sum = {0, 0, 0};
    add_product(&sum, keep, old);
    add_product(&sum, momentum, new);
    return round_pair(compensated_pair(&sum, 2), result);
}

static int32_t update_running_stats(integer n, double momentum, float *running, const float *new, float *fresh) {
    for (integer i = 0; i < n; i++)
        if (update_running_stat(momentum, running[i], new[i], fresh + i)) return 1;
    return 0;
}

/* Write out, and mean and rstd of each group. running_mean and running_var: null, or updated with `momentum`.
   given_var: null; otherwise `mean` and this replace the statistics of x. w and b: null, or one number for each run;
   if `along`, both one for each element of a run. Returns the number of elements for which the test failed, or -1 if
   it failed for a statistic. If it is -1 or exceeds `capacity`, the running statistics are unchanged. */
integer reproml_normalize(const integer *shape, const float *x, const float *w, const float *b, double eps,
                          const float *given_var, float *running_mean, float *running_var, double momentum, float *mean,
                          float *rstd, float *out, integer *failed, integer capacity) {
    normal ctx = {.x = x,
                  .w = w,
                  .b = b,
                  .mean = mean,
                  .rstd = rstd,
                  .out = out,
                  .eps = eps,
                  .given = given_var != 0,
                  .failed = {failed, capacity, 0}};
    memcpy(&ctx.at, shape, sizeof ctx.at);
    integer groups = ctx.at.groups;
    float *fresh = 0;
    if (running_mean || running_var) {
        fresh = reproml_scratch((size_t)(3 * groups) * sizeof(float));
        if (!fresh) return -1;
    }
    if (running_var) ctx.var = fresh;
    for (integer j = 0; given_var && j < groups; j++) {
        double v = given_var[j] + eps;
        if (!(v > 0 && v <= DBL_MAX) || round_inverse_root(v, 2 * U * v, rstd + j)) return -1;
    }
    if (given_var)
        run_tasks(normalize_across, &ctx, ctx.at.runs, groups * ctx.at.runs * ctx.at.length > SERIAL);
    else
        run_blocks(normalize_groups, &ctx);
    if (ctx.failed_sum) return -1;
    if (ctx.failed.count > capacity) return ctx.failed.count;
    if (running_mean && update_running_stats(groups, momentum, running_mean, mean, fresh + groups)) return -1;
    if (running_var && update_running_stats(groups, momentum, running_var, ctx.var, fresh + 2 * groups)) return -1;
    if (running_mean) memcpy(running_mean, fresh + groups, (size_t)groups * sizeof(float));
    if (running_var) memcpy(running_var, fresh + 2 * groups, (size_t)groups * sizeof(float));
    return ctx.failed.count;
}

/* ---- backward ---- */

/* Sums of q and q (x - m), each followed by the sum of absolute values; q is g w, or g if the entire group has one
   weight. A term errs by 2 U of itself. Returns the height of the tree. */
INLINE integer moments(const normal *ctx, integer group, double *total) {
    runs r = runs_of(ctx, group);
    r.m = ctx->mean[group];
    if (ctx->at.along) return sum_runs(WEIGHTED_MOMENTS, &r, total);
    if (!ctx->at.weight_run || !ctx->w) return sum_runs(MOMENTS, &r, total);
    const float *w = ctx->w + group % ctx->at.weight_period * ctx->at.weight_group;
    integer height = 0;
    r.runs = 1;
    r.length = ctx->at.length;
    for (int v = 0; v < 4; v++) total[v] = 0;
    for (integer run = 0; run < ctx->at.runs; run++) {
        double part[4], weight = w[run];
        integer h = sum_runs(MOMENTS, &r, part);
        for (int v = 0; v < 4; v++) total[v] += part[v] * (v & 1 ? fabs(weight) : weight);
        height = h > height ? h : height;
        r.x += ctx->at.run_stride;
        r.y += ctx->at.run_stride;
    }
    return height + ctx->at.runs + 1;
}

/* The sums of q and of q (x - m), q = g w, as pairs. */
INLINE void moments_with_errors(const normal *ctx, integer group, pair *sum, pair *deviation) {
    const layout *at = &ctx->at;
    const lanes zero = {0};
    compensated_lanes s = {zero, zero, zero}, d = {zero, zero, zero};
    const float *w =
        ctx->w && (at->along || at->weight_run) ? ctx->w + group % at->weight_period * at->weight_group : 0;
    for (integer run = 0; run < at->runs; run++) {
        const integer first = group * at->group_stride + run * at->run_stride;
        for (integer i = 0; i < at->length; i += LANES) {
            const integer count = at->length - i;
            lanes q = widen_some(ctx->g + first + i, count), high, low;
            if (w) q *= at->along ? widen_some(w + i, count) : zero + w[run];
            two_sum_of_lanes(widen_some(ctx->x + first + i, count), zero - ctx->mean[group], &high, &low);
            add_exact_lanes(&s, q);
            add_product_lanes(&d, q, high);
            add_small_lanes(&d, q * low);
        }
    }
    *sum = pair_of_lanes(&s, at->runs * at->length);
    *deviation = pair_of_lanes(&d, at->runs * at->length);
}

/* scale times a sum; scale is a product of two binary32 numbers and thus exact. An exact zero is +0. */
static int32_t round_scaled(const double *sum, double height, double scale, float *result) {
    double rad = (height + 8) * U * SLACK * sum[1] * fabs(scale);
    return result && round_statistic(sum[0] * scale + 0.0, rad, result);
}

static int32_t round_scaled_pair(pair p, double scale, float *result) {
    return result && round_pair(pair_times(p, scale), result);
}

/* Returns nonzero if a test fails. */
INLINE int32_t round_sums_of_group(const normal *ctx, integer group) {
    const layout *at = &ctx->at;
    double total[4], height = (double)moments(ctx, group, total), r = ctx->rstd[group];
    double w = ctx->w && !at->along && !at->weight_run ? ctx->w[group] : 1;
    float *to[4] = {ctx->sum, ctx->bias_sum, ctx->deviation, ctx->weight_sum};
    const double scale[4] = {w, 1, w * r, r};
    if (!(total[1] <= DBL_MAX && total[3] <= DBL_MAX)) return 1;
    for (int v = 0; v < 4; v++) to[v] = to[v] ? to[v] + group : 0;
    int32_t failed = 0;
    for (int v = 0; v < 4; v++) failed |= round_scaled(total + (v & 2), height, scale[v], to[v]);
    if (!failed) return 0;
    pair sum, deviation;
    moments_with_errors(ctx, group, &sum, &deviation);
    failed = 0;
    for (int v = 0; v < 4; v++) failed |= round_scaled_pair(v & 2 ? deviation : sum, scale[v], to[v]);
    return failed;
}

/* out = r (w g - (a + (x - m) b)), where a and b / r are the rounded sums over the group, divided by n. Errors in U
   of the absolute values of the terms: w g is exact, a has one rounding, (x - m) b three; the two sums, the product
   with r and the test follow. */
typedef struct {
    double m, r, a, b, minus_ulp; /* minus_ulp: -U |r| */
    double n, sum, deviation;
} group_terms;

INLINE double gradient(group_terms ctx, double x, double g, double w, double *minus_rad) {
    double term = w * g, slope = (x - ctx.m) * ctx.b;
    *minus_rad =
        fabs(term) * (5 * ctx.minus_ulp) + (fabs(slope) * (9 * ctx.minus_ulp) + fabs(ctx.a) * (9 * ctx.minus_ulp));
    return ctx.r * (term - (ctx.a + slope));
}

/* out = g w r, if the statistics are given */
INLINE double scaled_gradient(double g, double w, double r, double *minus_rad) {
    double mid = g * w * r;
    *minus_rad = -4 * U * fabs(mid);
    return mid;
}

INLINE int32_t gradient_block(const int along, const int given, group_terms ctx, const float *x, const float *g,
                              const float *w, integer n, float *restrict out) {
    double weight = along || !w ? 1 : *w;
    int32_t failed = 0;
    for (integer i = 0; i < n; i++) {
        double minus_rad, wi = along ? w[i] : weight;
        double mid = given ? scaled_gradient(g[i], wi, ctx.r, &minus_rad) : gradient(ctx, x[i], g[i], wi, &minus_rad);
        failed |= round_signed_sum(mid, minus_rad, out + i);
    }
    return failed;
}

/* The same by pairs, as n r (w g - (sum + (x - m) r deviation) / n) / n. left[i] is nonzero where both tests fail. */
INLINE void gradient_block_by_pairs(const int along, const int given, group_terms ctx, const float *x, const float *g,
                                    const float *w, integer n, float *restrict out, int32_t *restrict left) {
    double weight = along || !w ? 1 : *w;
    for (integer i = 0; i < n; i++) {
        double minus_rad, wi = along ? w[i] : weight, product = g[i] * wi;
        pair value;
        double mid = given ? scaled_gradient(g[i], wi, ctx.r, &minus_rad) : gradient(ctx, x[i], g[i], wi, &minus_rad);
        if (given) {
            value = pair_times((pair){product, 0, 0}, ctx.r);
        } else {
            value = pair_times((pair){product, 0, 0}, ctx.n);
            value = pair_plus(value, (pair){-ctx.sum, 0, 0});
            value = pair_plus(value, pair_times(difference(x[i], ctx.m), -ctx.r * ctx.deviation));
            value = pair_over(pair_times(value, ctx.r), ctx.n);
        }
        /* Where the steps of the definition give -0, so does the reference path. */
        left[i] = round_twice(mid, minus_rad, value, (ctx.r < 0) | (product == 0), out + i);
    }
}

INLINE void gradient_run(normal *ctx, integer at, group_terms t, const float *w) {
    const int along = ctx->at.along != 0;
    for (integer i = 0; i < ctx->at.length; i += BLOCK) {
        integer n = ctx->at.length - i < BLOCK ? ctx->at.length - i : BLOCK;
        const float *x = ctx->x + at + i, *g = ctx->g + at + i, *wi = along ? w + i : w;
        float *out = ctx->out + at + i;
        int32_t left[BLOCK];
        if (!(along        ? gradient_block(1, 0, t, x, g, wi, n, out)
              : ctx->given ? gradient_block(0, 1, t, x, g, wi, n, out)
                           : gradient_block(0, 0, t, x, g, wi, n, out)))
            continue;
        if (along)
            gradient_block_by_pairs(1, 0, t, x, g, wi, n, out, left);
        else if (ctx->given)
            gradient_block_by_pairs(0, 1, t, x, g, wi, n, out, left);
        else
            gradient_block_by_pairs(0, 0, t, x, g, wi, n, out, left);
        for (integer j = 0; j < n; j++)
            if (left[j]) add_failure(&ctx->failed, at + i + j);
    }
}

INLINE void gradient_of_group(normal *ctx, integer group) {
    const layout *at = &ctx->at;
    double n = (double)(at->runs * at->length), r = ctx->rstd[group];
    group_terms t = {.m = ctx->mean[group], .r = r, .minus_ulp = -U * fabs(r), .n = n};
    if (ctx->sum) {
        t.sum = ctx->sum[group];
        t.deviation = ctx->deviation[group];
        t.a = ctx->sum[group] / n;
        t.b = r * ctx->deviation[group] / n;
    }
    for (integer run = 0; run < at->runs; run++) {
        integer weight = at->along ? 0 : group % at->weight_period * at->weight_group + run * at->weight_run;
        gradient_run(ctx, group * at->group_stride + run * at->run_stride, t, ctx->w ? ctx->w + weight : 0);
    }
}

VECTORISED static void backward_groups(integer task, void *data) {
    normal *ctx = data;
    integer first = task * ctx->block, last = first + ctx->block < ctx->at.groups ? first + ctx->block : ctx->at.groups;
    int sums = ctx->sum || ctx->weight_sum || ctx->bias_sum;
    for (integer group = first; sums && group < last; group++)
        if (round_sums_of_group(ctx, group)) {
            set_flag(&ctx->failed_sum);
            return;
        }
    for (integer group = first; ctx->out && group < last; group++) gradient_of_group(ctx, group);
}

/* Gradients of x (out) and, where a group has one weight, of weight and bias. sum and deviation: one number for each
   group, as in operators/normalization.py; null if mean and rstd are given. Any of the results may be null. Returns the
   number of elements for which the test failed, or -1 if it failed for a sum. */
integer reproml_normalize_backward(const integer *shape, const float *x, const float *g, const float *w,
                                   const float *mean, const float *rstd, float *sum, float *deviation,
                                   float *weight_sum, float *bias_sum, float *out, integer *failed, integer capacity) {
    normal ctx = {.x = x,
                  .g = g,
                  .w = w,
                  .mean = (float *)mean,
                  .rstd = (float *)rstd,
                  .out = out,
                  .given = !sum,
                  .sum = sum,
                  .deviation = deviation,
                  .weight_sum = weight_sum,
                  .bias_sum = bias_sum,
                  .failed = {failed, capacity, 0}};
    memcpy(&ctx.at, shape, sizeof ctx.at);
    run_blocks(backward_groups, &ctx);
    return ctx.failed_sum ? -1 : ctx.failed.count;
}

/* ---- gradients of the weights of layer and group normalisation ---- */

#define WIDTH 64 /* columns side by side */
#define ROWS 256 /* rows of one sum before it is added to the next one */
#define SLICES 8 /* parts of one long sum */

typedef struct {
    integer rows, columns, slices;
    const float *x, *g, *mean, *rstd; /* x and g: [rows, columns] */
    float *weight_sum, *bias_sum;
    double (*parts)[4][WIDTH];
} column_sums;

/* Sums of g, |g|, p and |p|, p = g r (x - m), over some rows. p has two roundings, as g r is exact. */
INLINE void add_rows(const column_sums *ctx, integer first, integer last, integer column, integer count,
                     double (*restrict total)[WIDTH]) {
    const float *x = ctx->x + column, *g = ctx->g + column;
    for (integer row = first; row < last; row++) {
        const float *xr = x + row * ctx->columns, *gr = g + row * ctx->columns;
        double m = ctx->mean[row], r = ctx->rstd[row];
        for (integer i = 0; i < count; i++) {
            double q = gr[i], p = q * r * (xr[i] - m);
            total[0][i] += q;
            total[1][i] += fabs(q);
            total[2][i] += p;
            total[3][i] += fabs(p);
        }
    }
}

VECTORISED static void add_columns(integer task, void *data) {
    const column_sums *ctx = data;
    integer column = task / ctx->slices * WIDTH, slice = task % ctx->slices;
    integer count = ctx->columns - column < WIDTH ? ctx->columns - column : WIDTH;
    integer share = (ctx->rows + ctx->slices - 1) / ctx->slices, last = (slice + 1) * share;
    double (*total)[WIDTH] = ctx->parts[task];
    if (last > ctx->rows) last = ctx->rows;
    memset(total, 0, sizeof ctx->parts[task]);
    for (integer row = slice * share; row < last; row += ROWS) {
        double some[4][WIDTH] = {{0}};
        integer end = last - row < ROWS ? last : row + ROWS;
        if (count == WIDTH)
            add_rows(ctx, row, end, column, WIDTH, some);
        else
            add_rows(ctx, row, end, column, count, some);
        for (int v = 0; v < 4; v++)
            for (integer i = 0; i < WIDTH; i++) total[v][i] += some[v][i];
    }
}

/* Returns nonzero if a test fails. */
static int32_t round_column_with_errors(const column_sums *ctx, integer column, float *weight_sum, float *bias_sum) {
    compensated s = {0, 0, 0}, d = {0, 0, 0};
    for (integer row = 0; row < ctx->rows; row++) {
        integer at = row * ctx->columns + column;
        add_exact(&s, ctx->g[at]);
        add_deviation(&d, (double)ctx->g[at] * ctx->rstd[row], ctx->x[at], ctx->mean[row]);
    }
    return round_scaled_pair(compensated_pair(&s, ctx->rows), 1, bias_sum) ||
           round_scaled_pair(compensated_pair(&d, ctx->rows), 1, weight_sum);
}

/* The sums over the rows of g and of g (x - mean) rstd with each row's own statistics; either result may be null.
   Returns 0 if all sums passed the test. */
integer reproml_column_moments(integer rows, integer columns, const float *x, const float *g, const float *mean,
                               const float *rstd, float *weight_sum, float *bias_sum) {
    integer chunks = (columns + WIDTH - 1) / WIDTH, work = rows * columns;
    column_sums ctx = {rows, columns, 1, x, g, mean, rstd, weight_sum, bias_sum, 0};
    if (chunks < SLICES && work > 32768) ctx.slices = work / 16384 < SLICES ? work / 16384 : SLICES;
    ctx.parts = reproml_scratch((size_t)(chunks * ctx.slices) * sizeof *ctx.parts);
    if (!ctx.parts) return -1;
    run_tasks(add_columns, &ctx, chunks * ctx.slices, work > SERIAL);
    double height = (double)((rows < ROWS ? rows : ROWS) + rows / ROWS + 1 + ctx.slices);
    for (integer column = 0; column < columns; column++) {
        double total[4] = {0};
        for (integer slice = 0; slice < ctx.slices; slice++)
            for (int v = 0; v < 4; v++) total[v] += ctx.parts[column / WIDTH * ctx.slices + slice][v][column % WIDTH];
        float *weight = weight_sum ? weight_sum + column : 0, *bias = bias_sum ? bias_sum + column : 0;
        if (!(total[1] <= DBL_MAX && total[3] <= DBL_MAX)) return -1;
        if ((round_scaled(total, height, 1, bias) | round_scaled(total + 2, height, 1, weight)) &&
            round_column_with_errors(&ctx, column, weight, bias))
            return -1;
    }
    return 0;
}

typedef struct {
    integer images, channels, length, groups;
    const float *x, *g, *mean, *rstd; /* x and g: [images, channels, length]; mean: [images, groups] */
    float *weight_sum;
    int failed;
} channel_sums;

/* Returns nonzero if the test fails. */
INLINE int32_t round_channel(const channel_sums *ctx, integer channel) {
    double total[4], sum[2] = {0, 0}, height = 0;
    integer group = channel / (ctx->channels / ctx->groups);
    for (integer image = 0; image < ctx->images; image++) {
        integer first = (image * ctx->channels + channel) * ctx->length, at = image * ctx->groups + group;
        runs r = {.x = ctx->x + first, .y = ctx->g + first, .runs = 1, .length = ctx->length, .m = ctx->mean[at]};
        double h = (double)sum_runs(MOMENTS, &r, total), factor = ctx->rstd[at];
        sum[0] += total[2] * factor;
        sum[1] += total[3] * fabs(factor);
        height = h > height ? h : height;
    }
    if (!(sum[1] <= DBL_MAX)) return 1;
    if (!round_scaled(sum, height + (double)ctx->images + 1, 1, ctx->weight_sum + channel)) return 0;
    compensated s = {0, 0, 0};
    for (integer image = 0; image < ctx->images; image++)
        for (integer i = 0; i < ctx->length; i++) {
            integer at = image * ctx->groups + group, j = (image * ctx->channels + channel) * ctx->length + i;
            add_deviation(&s, (double)ctx->g[j] * ctx->rstd[at], ctx->x[j], ctx->mean[at]);
        }
    return round_scaled_pair(compensated_pair(&s, ctx->images * ctx->length), 1, ctx->weight_sum + channel);
}

VECTORISED static void channel_task(integer channel, void *data) {
    channel_sums *ctx = data;
    if (round_channel(ctx, channel)) set_flag(&ctx->failed);
}

/* The sum of g (x - mean) rstd over each channel, with the statistics of its image and group. Returns 0 if all sums
   passed the test. */
integer reproml_channel_moments(integer images, integer channels, integer length, integer groups, const float *x,
                                const float *g, const float *mean, const float *rstd, float *weight_sum) {
    channel_sums ctx = {images, channels, length, groups, x, g, mean, rstd, weight_sum, 0};
    run_tasks(channel_task, &ctx, channels, images * channels * length > SERIAL);
    return ctx.failed;
}
