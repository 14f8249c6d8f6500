/* Sampling at the places of a grid, and its gradients (operators/grid_sampling.py, which finds the neighbors).

   A weight is computed as a pair, once for each place; its bound is 0 where all of its bits fit in. A sample is summed
   in binary64 first and, where that fails the test, with its rounding errors, as the gradients are at once: places that
   are simple fractions give ties in whole tensors. Nothing underflows: a weight other than 0 is at
   least 2^-620, as at most four of its factors are as small as 2^-150. */

#include "compensated.h"

enum { AXES = 3, MOST = 16, BLOCK = 64 }; /* neighbors of a place in all; places of a task */

typedef struct {
    integer axes, near; /* neighbors along an axis: 2 for linear and 4 for cubic weights */
    integer images, channels, places, area, all;
    const double *offsets[2 * AXES]; /* d and t of each axis, [images, places]; d is NaN for a place unknown */
    const double *slopes[AXES];      /* the derivative of the place by the grid, [images, places] */
    const integer *index;            /* [images, places, all], below 0 outside of the image */
    const float *x, *g;              /* [images, channels, area]; [images, channels, places] */
    float *out;
    uint8_t *failed;
    integer failures;
} samples;

static const pair ONE = {1, 0, 0};

/* 1 + x - 5/4 x^2 */
INLINE pair near_factor(pair x) { return pair_plus(pair_plus(ONE, x), pair_times(pair_times_pair(x, x), -1.25)); }

/* The weights of the neighbors along an axis, for a place at u = d + t behind the second of four or the first of two,
   and their derivatives but for the first, as all of them add up to 0. */
INLINE void weights_along(integer near, double d, double t, pair *w, pair *slopes) {
    const pair u = make_pair(d, t, 0), v = pair_plus(ONE, (pair){-u.s, -u.t, 0});
    if (near == 2) {
        w[0] = v, w[1] = u;
        slopes[1] = ONE;
        return;
    }
    const pair product = pair_times(pair_times_pair(u, v), -0.75);
    w[0] = pair_times_pair(product, v);
    w[1] = pair_times_pair(v, near_factor(u));
    w[2] = pair_times_pair(u, near_factor(v));
    w[3] = pair_times_pair(product, u);
    const pair from_left = pair_plus(pair_times(u, 3.75), (pair){-4.5, 0, 0});
    const pair from_right = pair_plus(pair_times(v, -3.75), (pair){4.5, 0, 0});
    slopes[1] = pair_times_pair(u, from_left);
    slopes[2] = pair_times_pair(v, from_right);
    slopes[3] = pair_times_pair(pair_times(u, -0.75), pair_plus(pair_times(u, -3), (pair){2, 0, 0}));
}

/* The weights along all axes, and their products in the order of the neighbors. Returns 0 for a place unknown. */
INLINE int weigh(const samples *c, integer place, pair w[AXES][4], pair slopes[AXES][4], pair *all) {
    integer count = 1;
    all[0] = ONE;
    for (integer axis = 0; axis < c->axes; axis++) {
        const double d = c->offsets[2 * axis][place], t = c->offsets[2 * axis + 1][place];
        if (d != d) return 0;
        weights_along(c->near, d, t, w[axis], slopes[axis]);
        for (integer i = count - 1; i >= 0; i--)
            for (integer j = c->near - 1; j >= 0; j--) {
                const pair factor = all[i];
                all[i * c->near + j] = axis ? pair_times_pair(factor, w[axis][j]) : w[axis][j];
            }
        count *= c->near;
    }
    return 1;
}

INLINE float value_at(const float *image, integer index) { return index < 0 ? 0 : image[index]; }

/* A sum of numbers times weights. rad: what the bounds of the weights add up to. */
typedef struct {
    compensated sum;
    double rad;
} weighted_sum;

INLINE void add_weighted(weighted_sum *to, pair w, double x) {
    add_product(&to->sum, w.s, x);
    add_small(&to->sum, w.t * x);
    to->rad += w.rad * fabs(x);
}

INLINE int32_t round_weighted(const weighted_sum *of, integer terms, float *out) {
    pair value = compensated_pair(&of->sum, terms);
    value.rad += of->rad * SLACK;
    return round_pair(value, out);
}

/* ---- samples ---- */

/* One sample whose first test failed. */
INLINE int32_t sample_with_errors(const samples *c, const pair *w, const float *v, float *out) {
    weighted_sum sum = {{0, 0, 0}, 0};
    for (integer k = 0; k < c->all; k++) add_weighted(&sum, w[k], v[k]);
    return round_weighted(&sum, c->all, out);
}

/* Whether a sum of zeros may be -0: it is +0 unless all terms are -0. Linear weights are not negative, and of cubic
   ones that of the nearest neighbor is positive. */
INLINE int may_be_negative_zero(const samples *c, const float *v) {
    integer negative = 0;
    for (integer k = 0; k < c->all; k++) negative += bits(v[k]) < 0;
    return c->near == 2 ? negative == c->all : negative > 0;
}

VECTORISED static void sample_places(integer task, void *data) {
    samples *c = data;
    const integer end = (task + 1) * BLOCK, last = c->images * c->places;
    integer failures = 0;
    for (integer place = task * BLOCK; place < end && place < last; place++) {
        pair along[AXES][4], slopes[AXES][4], w[MOST];
        double bound[MOST];
        const int known = weigh(c, place, along, slopes, w);
        const integer image = place / c->places, *index = c->index + place * c->all;
        /* a rounding for each product and sum, and room for the test */
        for (integer k = 0; known && k < c->all; k++)
            bound[k] = (fabs(w[k].s) * ((double)c->all + 4) * U + fabs(w[k].t) + w[k].rad) * SLACK;
        for (integer channel = 0; channel < c->channels; channel++) {
            const integer plane = image * c->channels + channel, at = plane * c->places + place % c->places;
            const float *x = c->x + plane * c->area;
            float v[MOST];
            double mid = 0, rad = 0;
            for (integer k = 0; k < c->all; k++) v[k] = value_at(x, index[k]);
            for (integer k = 0; known && k < c->all; k++) {
                mid += w[k].s * v[k];
                rad += bound[k] * fabs(v[k]);
            }
            int32_t left = !known || !(rad <= DBL_MAX);
            if (!left && rad == 0) left = may_be_negative_zero(c, v); /* all terms are 0 */
            if (!left && round_sum(mid + 0.0, rad, c->out + at)) left = sample_with_errors(c, w, v, c->out + at);
            failures += c->failed[at] = left != 0;
        }
    }
    __atomic_fetch_add(&c->failures, failures, __ATOMIC_RELAXED);
}

/* ---- the gradient of the image ---- */

VECTORISED static void scatter_image(integer image, void *data) {
    samples *c = data;
    const size_t weights = (size_t)(c->places * c->all) * sizeof(pair);
    pair *w = reproml_scratch(weights + (size_t)c->area * sizeof(weighted_sum));
    weighted_sum *sums = (weighted_sum *)(w + c->places * c->all);
    const integer *index = c->index + image * c->places * c->all;
    integer failures = 0;
    for (integer place = 0; w && place < c->places; place++) {
        pair along[AXES][4], slopes[AXES][4];
        weigh(c, image * c->places + place, along, slopes, w + place * c->all); /* unknown: no index is used */
    }
    for (integer channel = 0; channel < c->channels; channel++) {
        const integer plane = image * c->channels + channel;
        const float *g = c->g + plane * c->places;
        for (integer i = 0; w && i < c->area; i++) sums[i] = (weighted_sum){{0, 0, 0}, 0};
        for (integer place = 0; w && place < c->places; place++)
            for (integer term = place * c->all; term < (place + 1) * c->all; term++)
                if (index[term] >= 0) add_weighted(sums + index[term], w[term], g[place]);
        for (integer i = 0; i < c->area; i++) {
            const integer at = plane * c->area + i;
            const int32_t left = !w || round_weighted(sums + i, c->places * c->all, c->out + at);
            failures += c->failed[at] = left != 0;
        }
    }
    __atomic_fetch_add(&c->failures, failures, __ATOMIC_RELAXED);
}

/* ---- the gradient of the grid ---- */

/* The derivative of a sample along an axis, times g, summed over all channels. The derivatives of the weights along an
   axis add up to 0, so the first neighbor is subtracted from the others, which leaves 0 of equal numbers. */
INLINE pair slope_along(const samples *c, integer place, integer axis, pair w[AXES][4], pair slopes[AXES][4]) {
    const integer image = place / c->places, *index = c->index + place * c->all;
    const float *x = c->x + image * c->channels * c->area;
    const float *g = c->g + image * c->channels * c->places + place % c->places;
    integer step = 1;
    for (integer a = axis + 1; a < c->axes; a++) step *= c->near;
    pair total = {0, 0, 0};
    for (integer first = 0; first < c->all; first++) {
        if (first / step % c->near) continue;
        pair others = ONE;
        for (integer a = c->axes - 1, rest = first; a >= 0; a--, rest /= c->near)
            if (a != axis) others = pair_times_pair(others, w[a][rest % c->near]);
        for (integer j = 1; j < c->near; j++) {
            const integer from = index[first], to = index[first + j * step];
            compensated sum = {0, 0, 0};
            for (integer channel = 0; channel < c->channels; channel++) {
                const float *plane = x + channel * c->area;
                add_deviation(&sum, g[channel * c->places], value_at(plane, to), value_at(plane, from));
            }
            const pair weight = pair_times_pair(others, slopes[axis][j]);
            total = pair_plus(total, pair_times_pair(compensated_pair(&sum, c->channels), weight));
        }
    }
    return pair_times(total, c->slopes[axis][place]);
}

VECTORISED static void slopes_of_places(integer task, void *data) {
    samples *c = data;
    const integer end = (task + 1) * BLOCK, last = c->images * c->places;
    integer failures = 0;
    for (integer place = task * BLOCK; place < end && place < last; place++) {
        pair along[AXES][4], slopes[AXES][4], w[MOST];
        const int known = weigh(c, place, along, slopes, w);
        for (integer axis = 0; axis < c->axes; axis++) {
            const integer at = place * c->axes + c->axes - 1 - axis; /* the grid has x first */
            const int32_t left = !known || round_pair(slope_along(c, place, axis, along, slopes), c->out + at);
            failures += c->failed[at] = left != 0;
        }
    }
    __atomic_fetch_add(&c->failures, failures, __ATOMIC_RELAXED);
}

/* sizes: images, channels, places, area. offsets: d and t of each axis, then the slopes. kind 0 computes the samples
   out [images, channels, places] of x, 1 the gradient out [images, channels, area] of x, and 2 that of the grid,
   out [images, places, axes]. `failed` has one element for each of `out`. Returns how many failed the test. */
integer reproml_grid_sampling(int kind, integer axes, integer near, const integer *sizes, const double *const *offsets,
                              const integer *index, const float *x, const float *g, float *out, uint8_t *failed) {
    samples c = {.axes = axes,
                 .near = near,
                 .images = sizes[0],
                 .channels = sizes[1],
                 .places = sizes[2],
                 .area = sizes[3],
                 .all = 1,
                 .index = index,
                 .x = x,
                 .g = g,
                 .out = out,
                 .failed = failed};
    for (integer axis = 0; axis < axes; axis++) {
        c.offsets[2 * axis] = offsets[2 * axis];
        c.offsets[2 * axis + 1] = offsets[2 * axis + 1];
        c.slopes[axis] = offsets[2 * axes + axis];
        c.all *= near;
    }
    const integer blocks = (c.images * c.places + BLOCK - 1) / BLOCK;
    if (kind == 1)
        run_tasks(scatter_image, &c, c.images, c.images > 1);
    else
        run_tasks(kind ? slopes_of_places : sample_places, &c, blocks, blocks > 8);
    return c.failures;
}
