/* Batch, group and layer normalisation: normalization.py has the definitions. A group of numbers that are
   normalised together is some runs of contiguous ones. */

#include "compensated.h"
#include "lanes.h"

#define BLOCK 512 /* elements whose tests are looked at together */

typedef struct {
    integer groups, runs, length; /* each group has `runs` runs of `length` */
    integer group_stride, run_stride;
    integer weight_period, weight_group, weight_run; /* of run r of group j: (j % period) * group + r * run */
    integer along;                                   /* instead, one weight for each element of a run */
} layout;

typedef struct {
    layout at;
    const float *x, *g, *w, *b;
    float *mean, *rstd, *out; /* mean and rstd of each group */
    double eps;
    float *var;                                     /* rounded unbiased variances, or null */
    int given;                                      /* mean and rstd are not those of x */
    integer block;                                  /* groups for a thread at a time */
    float *sum, *deviation, *weight_sum, *bias_sum; /* backward's sums over each group */
    int unsure;                                     /* some sum or statistic */
    failures failed;                                /* elements of `out` */
} normal;

static void give_up(normal *k) { __atomic_store_n(&k->unsure, 1, __ATOMIC_RELAXED); }

/* Round c, known within e = -minus_e. Returns 0 if that is sure. With these signs -0 stays -0 where e is 0. */
INLINE int32_t apart(double c, double minus_e, float *result) {
    float low = (float)(minus_e + c), high = -(float)(minus_e - c);
    *result = high;
    return bits(low) ^ bits(high);
}

static inline int settled(double c, double e, float *result) { return !apart(c, -e, result) && fabs(c) <= DBL_MAX; }

static runs runs_of(const normal *k, integer group) {
    const layout *at = &k->at;
    integer first = group * at->group_stride;
    runs r = {.x = k->x + first,
              .y = k->g ? k->g + first : 0,
              .w = at->along ? k->w : 0,
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

static void run_tasks(void (*work)(integer, void *), void *data, integer tasks, integer elements) {
    if (elements > 4096)
        reproml_parallel(work, data, tasks);
    else
        for (integer task = 0; task < tasks; task++) work(task, data);
}

static void run_blocks(void (*work)(integer, void *), normal *k) {
    integer each = k->at.runs * k->at.length;
    k->block = each < 1024 ? 16 : 1;
    run_tasks(work, k, (k->at.groups + k->block - 1) / k->block, k->at.groups * each);
}

/* ---- statistics ---- */

/* 1 / sqrt(v) for v within e, v > 0: half the relative error, and three roundings. */
static int round_inverse_root(double v, double e, float *result) {
    double r = 1 / sqrt(v), relative = e * r * r;
    return relative < 0.1 && settled(r, r * (0.6 * relative + 4 * U), result);
}

/* The same by a step of Newton's method, y + y (1 - v y^2) / 2, whose own error is 3/8 (1 - v y^2)^2. */
static int settle_inverse_root(pair v, float *result) {
    double y = 1 / sqrt(v.s), square = y * y, low = fma(y, y, -square);
    double product = v.s * square, rest = fma(v.s, square, -product);
    double left = ((1 - product) - rest) - (v.s * low + v.t * square), relative = v.e / v.s;
    if (!(v.s > 0 && relative < 0.1)) return 0;
    return settle_pair(y, y * left / 2, y * (0.6 * relative + 100 * U * U), result);
}

/* mean, 1 / sqrt(variance + eps) and the unbiased variance with all errors kept. With d = x - mu for any
   mu, sum (x - mean)^2 = sum d^2 - n (mean - mu)^2. */
static int settle_statistics(const runs *k, integer n, double eps, float *mean, float *rstd, float *var) {
    compensated sum = {0, 0, 0}, squares = {0, 0, 0};
    for (integer run = 0; run < k->runs; run++)
        for (integer i = 0; i < k->length; i++) add_exact(&sum, k->x[run * k->x_stride + i]);
    pair m = divided(pair_of(&sum, n), (double)n);
    for (integer run = 0; run < k->runs; run++)
        for (integer i = 0; i < k->length; i++) {
            double d, low;
            two_sum(k->x[run * k->x_stride + i], -m.s, &d, &low);
            low -= m.t;
            add_product(&squares, d, d);
            add_small(&squares, 2 * d * low);
            add_small(&squares, low * low);
        }
    pair s = pair_of(&squares, n), v;
    s.e += (double)n * m.e * m.e * SLACK;
    v = divided(s, (double)n);
    double high, low;
    two_sum(v.s, eps, &high, &low);
    v = normal_pair(high, low + v.t, v.e + 2 * U * (fabs(low) + fabs(v.t)));
    s = divided(s, (double)(n - 1));
    return settle_pair(m.s, m.t, m.e, mean) && settle_inverse_root(v, rstd) &&
           (!var || settle_pair(s.s, s.t, s.e, var));
}

/* Mean and variance in two passes. The second takes d = x - mu, mu within `off` of the mean, three roundings
   for each square: the sum of squares errs by (height + 3) U of itself and by n off^2. Multiplying by 1 / n
   costs two roundings, and a test two. */
INLINE int statistics(const runs *of, integer n, double eps, float *mean, float *rstd, float *var) {
    runs k = *of;
    double total[2], squares, part = 1 / (double)n;
    double height = (double)sum_runs(NUMBERS, &k, total);
    if (!(total[1] <= DBL_MAX)) return 0;
    k.m = total[0] * part;
    double off = (height + 5) * U * SLACK * total[1] * part;
    int sure = settled(k.m, off, mean);
    height = (double)sum_runs(SQUARES, &k, &squares);
    double e = (height + 6) * U * SLACK * squares + (double)n * off * off * SLACK;
    double v = squares * part + eps;
    sure &= round_inverse_root(v, e * part + 4 * U * v, rstd);
    if (var) {
        v = squares / (double)(n - 1);
        sure &= settled(v, e / (double)(n - 1) + 2 * U * v, var);
    }
    return sure || settle_statistics(of, n, eps, mean, rstd, var);
}

/* ---- forward ---- */

/* out = (x - m) r w + b: the product errs by 2 U of itself (r w is exact), the sum by U, the test by 2 U.
   Returns whether some element is not sure. */
INLINE int32_t normalize_block(const int along, const float *x, integer n, double m, double r, const float *w,
                               const float *b, float *restrict out) {
    double scale = along ? r : r * (w ? *w : 1), shift = along || !b ? 0 : *b;
    int32_t differ = 0;
    for (integer i = 0; i < n; i++) {
        double product = (x[i] - m) * (along ? scale * w[i] : scale), term = along ? b[i] : shift;
        differ |= apart(product + term, fabs(product) * (-6 * U) + fabs(term) * (-4 * U), out + i);
    }
    return differ;
}

INLINE void normalize_run(normal *k, integer at, integer group, const float *w, const float *b) {
    const int along = k->at.along != 0;
    double m = k->mean[group], r = k->rstd[group];
    for (integer i = 0; i < k->at.length; i += BLOCK) {
        integer n = k->at.length - i < BLOCK ? k->at.length - i : BLOCK;
        const float *x = k->x + at + i, *wi = along ? w + i : w, *bi = along ? b + i : b;
        float *out = k->out + at + i;
        if (!(along ? normalize_block(1, x, n, m, r, wi, bi, out) : normalize_block(0, x, n, m, r, wi, bi, out)))
            continue;
        for (integer j = 0; j < n; j++) {
            const float *wj = along ? wi + j : wi, *bj = along ? bi + j : bi;
            double product = (x[j] - m) * (r * (wj ? *wj : 1)), term = bj ? *bj : 0, c = product + term;
            if (!(fabs(c) <= DBL_MAX))
                out[j] = (float)c; /* a limit: nothing to round */
            else if (!settled(c, fabs(product) * (6 * U) + fabs(term) * (4 * U), out + j))
                reproml_fail(&k->failed, at + i + j);
        }
    }
}

INLINE void normalize_run_of(normal *k, integer group, integer run) {
    const layout *at = &k->at;
    integer weight = at->along ? 0 : group % at->weight_period * at->weight_group + run * at->weight_run;
    normalize_run(k, group * at->group_stride + run * at->run_stride, group, k->w ? k->w + weight : 0,
                  k->b ? k->b + weight : 0);
}

/* Some groups with their own statistics. These come first: so the next group's need not wait for one's roots. */
VECTORISED static void normalize_groups(integer task, void *data) {
    normal *k = data;
    integer first = task * k->block, last = first + k->block < k->at.groups ? first + k->block : k->at.groups;
    for (integer group = first; group < last; group++) {
        runs r = runs_of(k, group);
        if (!statistics(&r, k->at.runs * k->at.length, k->eps, k->mean + group, k->rstd + group,
                        k->var ? k->var + group : 0)) {
            give_up(k);
            return;
        }
    }
    for (integer group = first; group < last; group++)
        for (integer run = 0; run < k->at.runs; run++) normalize_run_of(k, group, run);
}

/* One run of each group, of given statistics: in the order of the memory. */
VECTORISED static void normalize_across(integer run, void *data) {
    normal *k = data;
    for (integer group = 0; group < k->at.groups; group++) normalize_run_of(k, group, run);
}

/* (1 - momentum) old + momentum new, where 1 - momentum is exact in binary64. */
static int follow(double momentum, double old, double new, float *result) {
    double keep = 1 - momentum, a = keep * old, b = momentum * new;
    if (1 - keep != momentum) return 0;
    if (settled(a + b, 5 * U * (fabs(a) + fabs(b)), result)) return 1;
    compensated sum = {0, 0, 0};
    add_product(&sum, keep, old);
    add_product(&sum, momentum, new);
    pair p = pair_of(&sum, 2);
    return settle_pair(p.s, p.t, p.e, result);
}

static int follow_all(integer n, double momentum, float *running, const float *new, float *fresh) {
    for (integer i = 0; i < n; i++)
        if (!follow(momentum, running[i], new[i], fresh + i)) return 0;
    return 1;
}

/* Writes out, and mean and rstd of each group. running_mean, running_var: null, or followed with `momentum`.
   given_var: null; otherwise mean and this are used in place of x's own. w, b: null, or for each run; of
   `along`, both for each element. Returns the number of elements that are to be settled; -1 if a statistic
   is. Where it is -1 or more than `room`, nothing is followed. */
integer reproml_normalize(const integer *shape, const float *x, const float *w, const float *b, double eps,
                          const float *given_var, float *running_mean, float *running_var, double momentum, float *mean,
                          float *rstd, float *out, integer *failed, integer room) {
    normal k = {.x = x,
                .w = w,
                .b = b,
                .mean = mean,
                .rstd = rstd,
                .out = out,
                .eps = eps,
                .given = given_var != 0,
                .failed = {failed, room, 0}};
    memcpy(&k.at, shape, sizeof k.at);
    integer groups = k.at.groups;
    float *fresh = 0;
    if (running_mean || running_var) {
        fresh = reproml_scratch((size_t)(3 * groups) * sizeof(float));
        if (!fresh) return -1;
    }
    if (running_var) k.var = fresh;
    for (integer j = 0; given_var && j < groups; j++) {
        double v = given_var[j] + eps;
        if (!(v > 0 && v <= DBL_MAX) || !round_inverse_root(v, 2 * U * v, rstd + j)) return -1;
    }
    if (given_var)
        run_tasks(normalize_across, &k, k.at.runs, groups * k.at.runs * k.at.length);
    else
        run_blocks(normalize_groups, &k);
    if (k.unsure) return -1;
    if (k.failed.count > room) return k.failed.count;
    if (running_mean && !follow_all(groups, momentum, running_mean, mean, fresh + groups)) return -1;
    if (running_var && !follow_all(groups, momentum, running_var, k.var, fresh + 2 * groups)) return -1;
    if (running_mean) memcpy(running_mean, fresh + groups, (size_t)groups * sizeof(float));
    if (running_var) memcpy(running_var, fresh + 2 * groups, (size_t)groups * sizeof(float));
    return k.failed.count;
}

/* ---- backward ---- */

/* Sums of q and q (x - m), each with the sum of absolute values after it; q is g w, but of a weight that is
   the same for the whole group only g. A term errs by 2 U of itself. Returns the height of the tree. */
INLINE integer moments(const normal *k, integer group, double *total) {
    runs r = runs_of(k, group);
    r.m = k->mean[group];
    if (k->at.along) return sum_runs(WEIGHTED_MOMENTS, &r, total);
    if (!k->at.weight_run || !k->w) return sum_runs(MOMENTS, &r, total);
    const float *w = k->w + group % k->at.weight_period * k->at.weight_group;
    integer height = 0;
    r.runs = 1;
    r.length = k->at.length;
    for (int v = 0; v < 4; v++) total[v] = 0;
    for (integer run = 0; run < k->at.runs; run++) {
        double part[4], weight = w[run];
        integer h = sum_runs(MOMENTS, &r, part);
        for (int v = 0; v < 4; v++) total[v] += part[v] * (v & 1 ? fabs(weight) : weight);
        height = h > height ? h : height;
        r.x += k->at.run_stride;
        r.y += k->at.run_stride;
    }
    return height + k->at.runs + 1;
}

static void moments_with_errors(const normal *k, integer group, pair *sum, pair *deviation) {
    const layout *at = &k->at;
    compensated s = {0, 0, 0}, d = {0, 0, 0};
    const float *w = k->w && (at->along || at->weight_run) ? k->w + group % at->weight_period * at->weight_group : 0;
    for (integer run = 0; run < at->runs; run++) {
        integer first = group * at->group_stride + run * at->run_stride;
        for (integer i = 0; i < at->length; i++) {
            double q = k->g[first + i] * (w ? (double)w[at->along ? i : run] : 1);
            add_exact(&s, q);
            add_deviation(&d, q, k->x[first + i], k->mean[group]);
        }
    }
    *sum = pair_of(&s, at->runs * at->length);
    *deviation = pair_of(&d, at->runs * at->length);
}

/* scale times a sum; scale is a product of two binary32 numbers, so exact. An exact zero is +0. */
static int round_scaled(const double *sum, double height, double scale, float *result) {
    double e = (height + 8) * U * SLACK * sum[1] * fabs(scale);
    return !result || settled(sum[0] * scale + 0.0, e, result);
}

static int settle_scaled(pair p, double scale, float *result) {
    if (!result) return 1;
    p = scaled(p, scale);
    return settle_pair(p.s, p.t, p.e, result);
}

INLINE int sums_of_group(const normal *k, integer group) {
    const layout *at = &k->at;
    double total[4], height = (double)moments(k, group, total), r = k->rstd[group];
    double w = k->w && !at->along && !at->weight_run ? k->w[group] : 1;
    float *to[4] = {k->sum, k->bias_sum, k->deviation, k->weight_sum};
    const double scale[4] = {w, 1, w * r, r};
    if (!(total[1] <= DBL_MAX && total[3] <= DBL_MAX)) return 0;
    for (int v = 0; v < 4; v++) to[v] = to[v] ? to[v] + group : 0;
    int sure = 1;
    for (int v = 0; v < 4; v++) sure &= round_scaled(total + (v & 2), height, scale[v], to[v]);
    if (sure) return 1;
    pair sum, deviation;
    moments_with_errors(k, group, &sum, &deviation);
    sure = 1;
    for (int v = 0; v < 4; v++) sure &= settle_scaled(v & 2 ? deviation : sum, scale[v], to[v]);
    return sure;
}

/* out = r (w g - (a + (x - m) b)), a and b / r being the sums over the group, rounded, divided by n.
   Absolute values of the terms, in U: w g is exact, a has one rounding, (x - m) b three; then two sums and
   the product with r, and the test. */
typedef struct {
    double m, r, a, b, size; /* size: -U |r| */
} group_terms;

INLINE double gradient(group_terms k, double x, double g, double w, double *minus_e) {
    double term = w * g, slope = (x - k.m) * k.b;
    *minus_e = fabs(term) * (5 * k.size) + (fabs(slope) * (9 * k.size) + fabs(k.a) * (9 * k.size));
    return k.r * (term - (k.a + slope));
}

/* out = g w r, with given statistics */
INLINE double scaled_gradient(double g, double w, double r, double *minus_e) {
    double c = g * w * r;
    *minus_e = -4 * U * fabs(c);
    return c;
}

INLINE int32_t gradient_block(const int along, const int given, group_terms k, const float *x, const float *g,
                              const float *w, integer n, float *restrict out) {
    double weight = along || !w ? 1 : *w;
    int32_t differ = 0;
    for (integer i = 0; i < n; i++) {
        double e, wi = along ? w[i] : weight;
        double c = given ? scaled_gradient(g[i], wi, k.r, &e) : gradient(k, x[i], g[i], wi, &e);
        differ |= apart(c, e, out + i);
    }
    return differ;
}

INLINE void gradient_run(normal *k, integer at, group_terms t, const float *w) {
    const int along = k->at.along != 0;
    for (integer i = 0; i < k->at.length; i += BLOCK) {
        integer n = k->at.length - i < BLOCK ? k->at.length - i : BLOCK;
        const float *x = k->x + at + i, *g = k->g + at + i, *wi = along ? w + i : w;
        float *out = k->out + at + i;
        if (!(along      ? gradient_block(1, 0, t, x, g, wi, n, out)
              : k->given ? gradient_block(0, 1, t, x, g, wi, n, out)
                         : gradient_block(0, 0, t, x, g, wi, n, out)))
            continue;
        for (integer j = 0; j < n; j++) {
            double e, wj = along ? wi[j] : wi ? *wi : 1;
            double c = k->given ? scaled_gradient(g[j], wj, t.r, &e) : gradient(t, x[j], g[j], wj, &e);
            if (!(fabs(c) <= DBL_MAX))
                out[j] = (float)c;
            else if (apart(c, e, out + j))
                reproml_fail(&k->failed, at + i + j);
        }
    }
}

INLINE void gradient_of_group(normal *k, integer group) {
    const layout *at = &k->at;
    double n = (double)(at->runs * at->length), r = k->rstd[group];
    group_terms t = {k->mean[group], r, 0, 0, -U * fabs(r)};
    if (k->sum) {
        t.a = k->sum[group] / n;
        t.b = r * k->deviation[group] / n;
    }
    for (integer run = 0; run < at->runs; run++) {
        integer weight = at->along ? 0 : group % at->weight_period * at->weight_group + run * at->weight_run;
        gradient_run(k, group * at->group_stride + run * at->run_stride, t, k->w ? k->w + weight : 0);
    }
}

VECTORISED static void backward_groups(integer task, void *data) {
    normal *k = data;
    integer first = task * k->block, last = first + k->block < k->at.groups ? first + k->block : k->at.groups;
    int sums = k->sum || k->weight_sum || k->bias_sum;
    for (integer group = first; sums && group < last; group++)
        if (!sums_of_group(k, group)) {
            give_up(k);
            return;
        }
    for (integer group = first; k->out && group < last; group++) gradient_of_group(k, group);
}

/* Gradients of x (out), and, where all of a group has one weight, of weight and bias. sum and deviation: of
   each group, as in normalization.py; null where mean and rstd are given. Any of the results may be null.
   Returns the number of elements that are to be settled; -1 if a sum is. */
integer reproml_normalize_backward(const integer *shape, const float *x, const float *g, const float *w,
                                   const float *mean, const float *rstd, float *sum, float *deviation,
                                   float *weight_sum, float *bias_sum, float *out, integer *failed, integer room) {
    normal k = {.x = x,
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
                .failed = {failed, room, 0}};
    memcpy(&k.at, shape, sizeof k.at);
    run_blocks(backward_groups, &k);
    return k.unsure ? -1 : k.failed.count;
}

/* ---- gradients of the weights of layer and group normalisation ---- */

#define WIDTH 64 /* columns at once */
#define ROWS 256 /* after so many, sums are emptied into the next */
#define SLICES 8 /* parts of one long sum */

typedef struct {
    integer rows, columns, slices;
    const float *x, *g, *mean, *rstd; /* x and g: [rows, columns] */
    float *weight_sum, *bias_sum;
    double (*parts)[4][WIDTH];
} column_sums;

/* Sums of g, |g|, p and |p|, p = g r (x - m), of some rows. p has two roundings, as g r is exact. */
INLINE void add_rows(const column_sums *k, integer first, integer last, integer column, integer count,
                     double (*restrict total)[WIDTH]) {
    const float *x = k->x + column, *g = k->g + column;
    for (integer row = first; row < last; row++) {
        const float *xr = x + row * k->columns, *gr = g + row * k->columns;
        double m = k->mean[row], r = k->rstd[row];
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
    const column_sums *k = data;
    integer column = task / k->slices * WIDTH, slice = task % k->slices;
    integer count = k->columns - column < WIDTH ? k->columns - column : WIDTH;
    integer share = (k->rows + k->slices - 1) / k->slices, last = (slice + 1) * share;
    double (*total)[WIDTH] = k->parts[task];
    if (last > k->rows) last = k->rows;
    memset(total, 0, sizeof k->parts[task]);
    for (integer row = slice * share; row < last; row += ROWS) {
        double some[4][WIDTH] = {{0}};
        integer end = last - row < ROWS ? last : row + ROWS;
        if (count == WIDTH)
            add_rows(k, row, end, column, WIDTH, some);
        else
            add_rows(k, row, end, column, count, some);
        for (int v = 0; v < 4; v++)
            for (integer i = 0; i < WIDTH; i++) total[v][i] += some[v][i];
    }
}

static int settle_column(const column_sums *k, integer column, float *weight_sum, float *bias_sum) {
    compensated s = {0, 0, 0}, d = {0, 0, 0};
    for (integer row = 0; row < k->rows; row++) {
        integer at = row * k->columns + column;
        add_exact(&s, k->g[at]);
        add_deviation(&d, (double)k->g[at] * k->rstd[row], k->x[at], k->mean[row]);
    }
    return settle_scaled(pair_of(&s, k->rows), 1, bias_sum) & settle_scaled(pair_of(&d, k->rows), 1, weight_sum);
}

/* The sums over the rows of g, and of g (x - mean) rstd with each row's own; null for none of these.
   Returns 0 if all are sure. */
integer reproml_column_moments(integer rows, integer columns, const float *x, const float *g, const float *mean,
                               const float *rstd, float *weight_sum, float *bias_sum) {
    integer chunks = (columns + WIDTH - 1) / WIDTH, work = rows * columns;
    column_sums k = {rows, columns, 1, x, g, mean, rstd, weight_sum, bias_sum, 0};
    if (chunks < SLICES && work > 32768) k.slices = work / 16384 < SLICES ? work / 16384 : SLICES;
    k.parts = reproml_scratch((size_t)(chunks * k.slices) * sizeof *k.parts);
    if (!k.parts) return -1;
    run_tasks(add_columns, &k, chunks * k.slices, work);
    double height = (double)((rows < ROWS ? rows : ROWS) + rows / ROWS + 1 + k.slices);
    for (integer column = 0; column < columns; column++) {
        double total[4] = {0};
        for (integer slice = 0; slice < k.slices; slice++)
            for (int v = 0; v < 4; v++) total[v] += k.parts[column / WIDTH * k.slices + slice][v][column % WIDTH];
        float *weight = weight_sum ? weight_sum + column : 0, *bias = bias_sum ? bias_sum + column : 0;
        if (!(total[1] <= DBL_MAX && total[3] <= DBL_MAX)) return -1;
        if (!(round_scaled(total, height, 1, bias) & round_scaled(total + 2, height, 1, weight)) &&
            !settle_column(&k, column, weight, bias))
            return -1;
    }
    return 0;
}

typedef struct {
    integer images, channels, length, groups;
    const float *x, *g, *mean, *rstd; /* x and g: [images, channels, length]; mean: [images, groups] */
    float *weight_sum;
    int unsure;
} channel_sums;

INLINE int sum_channel(const channel_sums *k, integer channel) {
    double total[4], sum[2] = {0, 0}, height = 0;
    integer group = channel / (k->channels / k->groups);
    for (integer image = 0; image < k->images; image++) {
        integer first = (image * k->channels + channel) * k->length, at = image * k->groups + group;
        runs r = {.x = k->x + first, .y = k->g + first, .runs = 1, .length = k->length, .m = k->mean[at]};
        double h = (double)sum_runs(MOMENTS, &r, total), factor = k->rstd[at];
        sum[0] += total[2] * factor;
        sum[1] += total[3] * fabs(factor);
        height = h > height ? h : height;
    }
    if (!(sum[1] <= DBL_MAX)) return 0;
    if (round_scaled(sum, height + (double)k->images + 1, 1, k->weight_sum + channel)) return 1;
    compensated s = {0, 0, 0};
    for (integer image = 0; image < k->images; image++)
        for (integer i = 0; i < k->length; i++) {
            integer at = image * k->groups + group, j = (image * k->channels + channel) * k->length + i;
            add_deviation(&s, (double)k->g[j] * k->rstd[at], k->x[j], k->mean[at]);
        }
    return settle_scaled(pair_of(&s, k->images * k->length), 1, k->weight_sum + channel);
}

VECTORISED static void channel_task(integer channel, void *data) {
    channel_sums *k = data;
    if (!sum_channel(k, channel)) __atomic_store_n(&k->unsure, 1, __ATOMIC_RELAXED);
}

/* Of each channel the sum of g (x - mean) rstd, with those of its image and group. Returns 0 if all are sure. */
integer reproml_channel_moments(integer images, integer channels, integer length, integer groups, const float *x,
                                const float *g, const float *mean, const float *rstd, float *weight_sum) {
    channel_sums k = {images, channels, length, groups, x, g, mean, rstd, weight_sum, 0};
    run_tasks(channel_task, &k, channels, images * channels * length);
    return k.unsure;
}
