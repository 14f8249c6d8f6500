/* Convolutions, their transposes and their gradients: each element is one dot product, rounded once.

   No patches are copied. An image is copied once into planes with its padding, split by the stride, so that the
   numbers which one weight multiplies at successive places are contiguous: they are the rows of a product, each at
   its own offset (tile.h). Places are counted through the padding at the end of a row; results there are dropped
   when the tile is stored. */

#include "tile.h"

#define SERIAL (1 << 17) /* multiplications, some microseconds, that are not worth a second thread */
#define BATCH (1 << 16)  /* numbers of several small images copied at once, within the second-level cache */

typedef struct {
    integer n, groups, c, o;    /* images; channels of one group, in and out */
    integer h, w, out_h, out_w; /* of the convolution, also where its transpose is calculated */
    integer kh, kw, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
} geometry;

/* The channels of a source image: row r of phase a holds row r * step_h + a - pad_h of the source, or zeros. */
typedef struct {
    integer channels, h, w; /* of the source */
    integer step_h, step_w, pad_h, pad_w;
    integer rows, pitch; /* of one image in a plane */
    integer images;      /* in each plane, one below the other */
} planes;

/* A multiple of the length of every vector, with zeros at the end. */
static integer plane_size(const planes *p) { return (p->images * p->rows * p->pitch + 7) / 8 * 8; }

/* The number of zeros behind the last plane, which a tile or a shifted row may read. */
static integer margin(const planes *p) { return p->pitch + 2 * TILE_COLUMNS; }

static integer planes_size(const planes *p) { return p->channels * p->step_h * p->step_w * plane_size(p) + margin(p); }

/* Whether the planes take far more memory than the image: a stride much longer than the kernel leaves most of them
   unused. The reference path is better at that. */
static int wasteful(const planes *p) {
    integer image = p->channels * (p->h + 2 * p->pad_h) * (p->w + 2 * p->pad_w);
    return planes_size(p) > 4 * image + (1 << 18);
}

/* Copy `count` images, `step` elements apart, into planes; the rest of each plane is filled with zeros. */
static void fill_planes(const planes *p, const float *restrict first, integer count, integer step, float *restrict to) {
    integer rest = plane_size(p) - count * p->rows * p->pitch;
    for (integer c = 0; c < p->channels; c++)
        for (integer a = 0; a < p->step_h; a++)
            for (integer b = 0; b < p->step_w; b++) {
                for (integer i = 0; i < count; i++) {
                    const float *restrict source = first + i * step + c * p->h * p->w;
                    for (integer r = 0; r < p->rows; r++, to += p->pitch) {
                        integer row = r * p->step_h + a - p->pad_h, from = b - p->pad_w, t = 0;
                        if (row < 0 || row >= p->h) {
                            memset(to, 0, (size_t)p->pitch * sizeof(float));
                            continue;
                        }
                        const float *restrict line = source + row * p->w;
                        integer begin = from < 0 ? (-from + p->step_w - 1) / p->step_w : 0;
                        integer end = from < p->w ? (p->w - 1 - from) / p->step_w + 1 : 0;
                        if (end > p->pitch) end = p->pitch;
                        for (; t < begin && t < p->pitch; t++) to[t] = 0;
                        if (p->step_w == 1)
                            for (; t < end; t++) to[t] = line[t + from];
                        for (; t < end; t++) to[t] = line[t * p->step_w + from];
                        for (; t < p->pitch; t++) to[t] = 0;
                    }
                }
                memset(to, 0, (size_t)rest * sizeof(float));
                to += rest;
            }
    memset(to, 0, (size_t)margin(p) * sizeof(float));
}

/* Outputs that use the same weights: all of a convolution, or those of one phase of a transposed one. */
typedef struct {
    integer k, rows, columns;                               /* terms; places */
    integer first_row, first_column, row_step, column_step; /* of the places in the output */
    integer *offset;                                        /* [k], into the planes */
    double *weights, *norm; /* [groups, panels of outputs, k, rows of the panel]; [groups, outputs] */
} pass;

typedef struct {
    planes from;
    integer n, groups, outputs, out_h, out_w; /* outputs: channels of a group */
    integer count;
    pass *passes;
    const float *source, *bias;
    float *out, *buffer; /* buffer: planes for each task */
    integer tasks;
    const tiling *tiles;
    failure_list *failed;
} slide;

VECTORISED static float largest_magnitude(const float *restrict x, integer n) {
    float part[16] = {0}, most = 0;
    integer i = 0;
    for (; i + 16 <= n; i += 16)
        for (int t = 0; t < 16; t++) part[t] = part[t] > fabsf(x[i + t]) ? part[t] : fabsf(x[i + t]);
    for (; i < n; i++) most = most > fabsf(x[i]) ? most : fabsf(x[i]);
    for (int t = 0; t < 16; t++) most = most > part[t] ? most : part[t];
    return most;
}

/* Store a rounded tile whose first column is place q. */
static void store(const slide *s, const pass *p, integer q, int columns, int m, const float *tile, float *out) {
    integer pitch = s->from.pitch, y = q / pitch, x = q % pitch;
    for (int j = 0; j < columns && y < p->rows; y++, x = 0) {
        int run = (int)(columns - j < pitch - x ? columns - j : pitch - x);
        int valid = x < p->columns ? (int)(run < p->columns - x ? run : p->columns - x) : 0;
        float *to = out + (p->first_row + y * p->row_step) * s->out_w + p->first_column + x * p->column_step;
        for (int i = 0; i < m; i++, to += s->out_h * s->out_w)
            for (int t = 0; t < valid; t++) to[t * p->column_step] = tile[i * TILE_COLUMNS + j + t];
        j += run;
    }
}

/* Calculate all places of one pass over one group of one image. */
static void slide_over(const slide *s, const pass *p, integer item, const float *buffer, double size) {
    integer group = item % s->groups, pitch = s->from.pitch;
    integer places = p->rows && p->columns ? (p->rows - 1) * pitch + p->columns : 0;
    int height = s->tiles->rows, width = s->tiles->columns;
    float *out = s->out + item * s->outputs * s->out_h * s->out_w;
    double bound[TILE_COLUMNS];
    for (int j = 0; j < TILE_COLUMNS; j++) bound[j] = size;
    for (integer q = 0; q < places; q += width) {
        int columns = (int)(places - q < width ? places - q : width);
        for (integer i = 0; i < s->outputs; i += height) {
            int m = (int)(s->outputs - i < height ? s->outputs - i : height), failed[TILE_ROWS * TILE_COLUMNS];
            double sums[TILE_ROWS * TILE_COLUMNS];
            float tile[TILE_ROWS * TILE_COLUMNS];
            const double *weights = p->weights + (group * s->outputs + i) * p->k;
            const float *bias = s->bias ? s->bias + group * s->outputs + i : NULL;
            s->tiles->across[m][(columns + s->tiles->lanes - 1) / s->tiles->lanes](p->k, weights, buffer + q, p->offset,
                                                                                   sums);
            int count =
                reproml_round_tile(sums, m, columns, relative_bound((double)p->k), p->norm + group * s->outputs + i,
                                   bound, bias, NULL, tile, TILE_COLUMNS, failed);
            for (int t = 0; t < count; t++) {
                integer r = failed[t] / TILE_COLUMNS, at = q + failed[t] % TILE_COLUMNS, x = at % pitch;
                if (x >= p->columns) continue;
                if (sums[failed[t]] != sums[failed[t]]) { /* NaN in any order */
                    tile[failed[t]] = NAN;
                    continue;
                }
                compensated sum = {0, 0, 0};
                for (integer k = 0; k < p->k; k++) add_exact(&sum, weights[k * m + r] * buffer[p->offset[k] + at]);
                if (bias) add_exact(&sum, bias[r]);
                if (round_compensated(&sum, p->k + 1, tile + failed[t])) {
                    integer row = p->first_row + at / pitch * p->row_step,
                            column = p->first_column + x * p->column_step;
                    add_failure(s->failed, ((item * s->outputs + i + r) * s->out_h + row) * s->out_w + column);
                }
            }
            store(s, p, q, columns, m, tile, out + i * s->out_h * s->out_w);
        }
    }
}

static void slide_task(integer task, void *data) {
    const slide *s = data;
    integer items = s->n * s->groups, share = (items + s->tasks - 1) / s->tasks;
    integer length = s->from.channels * s->from.h * s->from.w;
    float *buffer = s->buffer + task * planes_size(&s->from);
    for (integer item = task * share; item < (task + 1) * share && item < items; item++) {
        const float *source = s->source + item * length;
        double most = largest_magnitude(source, length), norm = sqrt(reproml_squares(source, length, 1));
        if (!(norm <= DBL_MAX)) { /* NaN or infinity: the reference path determines their products with zeros */
            for (integer i = 0; i <= s->failed->capacity; i++) add_failure(s->failed, 0);
            return;
        }
        fill_planes(&s->from, source, 1, 0, buffer);
        for (integer i = 0; i < s->count; i++) {
            double all = most * sqrt((double)s->passes[i].k); /* an upper bound of the norm of a patch, as `norm` is */
            slide_over(s, s->passes + i, item, buffer, norm < all ? norm : all);
        }
    }
}

/* Weights of a pass are gathered into panels: w(output, term) is w[group * group_step + output * output_step +
   term[k]]. */
typedef struct {
    const slide *s;
    pass *p;
    const float *w;
    integer group_step, output_step, panels;
    const integer *term;
} gathering;

VECTORISED static void gather_task(integer task, void *data) {
    const gathering *x = data;
    integer height = x->s->tiles->rows, group = task / x->panels, i = task % x->panels * height, k = x->p->k;
    integer m = x->s->outputs - i < height ? x->s->outputs - i : height;
    double *restrict to = x->p->weights + (group * x->s->outputs + i) * k,
                     *norm = x->p->norm + group * x->s->outputs + i;
    const integer *restrict term = x->term;
    for (integer r = 0; r < m; r++) {
        const float *restrict from = x->w + group * x->group_step + (i + r) * x->output_step;
        double sum = 0;
        for (integer t = 0; t < k; t++) {
            double v = from[term[t]];
            to[t * m + r] = v;
            sum += v * v;
        }
        norm[r] = sqrt(sum);
    }
}

/* Returns 0 if a weight is NaN or infinite. */
static int gather(const slide *s, pass *p, const float *w, integer group_step, integer output_step,
                  const integer *term) {
    gathering x = {s, p, w, group_step, output_step, (s->outputs + s->tiles->rows - 1) / s->tiles->rows, term};
    integer tasks = s->groups * x.panels;
    run_tasks(gather_task, &x, tasks, 8 * s->groups * s->outputs * p->k > SERIAL);
    for (integer i = 0; i < s->groups * s->outputs; i++)
        if (!(p->norm[i] <= DBL_MAX)) return 0;
    return 1;
}

static void start(slide *s, const geometry *g, integer multiplications) {
    s->tiles = reproml_tiling();
    integer items = g->n * g->groups, threads = multiplications > SERIAL ? reproml_threads() : 1;
    s->tasks = items < threads ? items : threads;
}

static integer finish(slide *s) {
    reproml_parallel(slide_task, s, s->tasks);
    return s->failed->count;
}

/* out [n, groups * o, out_h, out_w] = the convolution of x [n, groups * c, h, w] with w [groups * o, c, kh, kw]; bias
   null or [groups * o]. `sizes` are those of `geometry`. failed, capacity and the result
   are as in matmul.c, and -1 also leaves everything to the caller. */
integer reproml_convolution(const integer *sizes, const float *x, const float *w, const float *bias, float *out,
                            integer *failed, integer capacity) {
    geometry g;
    memcpy(&g, sizes, sizeof g);
    failure_list list = {failed, capacity, 0};
    pass p = {.k = g.c * g.kh * g.kw, .rows = g.out_h, .columns = g.out_w, .row_step = 1, .column_step = 1};
    integer reach_h = (g.kh - 1) * g.dilation_h, reach_w = (g.kw - 1) * g.dilation_w;
    slide s = {.from = {g.c, g.h, g.w, g.stride_h, g.stride_w, g.pad_h, g.pad_w, g.out_h + reach_h / g.stride_h,
                        g.out_w + reach_w / g.stride_w, 1},
               .n = g.n,
               .groups = g.groups,
               .outputs = g.o,
               .out_h = g.out_h,
               .out_w = g.out_w,
               .count = 1,
               .passes = &p,
               .source = x,
               .bias = bias,
               .out = out,
               .failed = &list};
    if (wasteful(&s.from)) return -1;
    start(&s, &g, g.n * g.groups * g.o * p.k * g.out_h * g.out_w);
    integer outputs = g.groups * g.o;
    char *work =
        reproml_scratch((size_t)(outputs * (p.k + 1) + 2 * p.k) * 8 + (size_t)(s.tasks * planes_size(&s.from)) * 4);
    if (!work) return -1;
    p.weights = (double *)work, p.norm = p.weights + outputs * p.k;
    p.offset = (integer *)(p.norm + outputs);
    integer *term = p.offset + p.k, k = 0;
    s.buffer = (float *)(term + p.k);
    for (integer c = 0; c < g.c; c++)
        for (integer i = 0; i < g.kh; i++)
            for (integer j = 0; j < g.kw; j++, k++) {
                integer y = i * g.dilation_h, z = j * g.dilation_w;
                integer plane = (c * g.stride_h + y % g.stride_h) * g.stride_w + z % g.stride_w;
                p.offset[k] = plane * plane_size(&s.from) + y / g.stride_h * s.from.pitch + z / g.stride_w;
                term[k] = k;
            }
    return gather(&s, &p, w, g.o * p.k, p.k, term) ? finish(&s) : -1;
}

/* One axis of a transposed convolution: at the outputs first + stride * i, i < count, each tap j of `taps`
   multiplies the source at i + shift[j]. */
typedef struct {
    integer count, taps, *tap, *shift;
} phase;

static integer find_phases(integer size, integer kernel, integer stride, integer pad, integer dilation, phase *phases,
                           integer *memory, integer *least_shift) {
    integer end = 0, low = INT64_MAX;
    for (integer first = 0; first < stride; first++, memory += 2 * kernel) {
        phase *p = phases + first;
        *p = (phase){first < size ? (size - 1 - first) / stride + 1 : 0, 0, memory, memory + kernel};
        for (integer j = 0; j < kernel; j++) {
            integer reach = first + pad - j * dilation;
            if (reach % stride) continue;
            p->tap[p->taps] = j, p->shift[p->taps++] = reach / stride;
            if (low > reach / stride) low = reach / stride;
            if (end < p->count + reach / stride) end = p->count + reach / stride;
        }
    }
    *least_shift = low;
    return low < INT64_MAX && end > low ? end - low : 1;
}

/* out [n, groups * c, h, w] = the transposed convolution of x [n, groups * o, out_h, out_w]; the names are those of the
   convolution that it transposes; bias null or [groups * c]. */
integer reproml_transposed(const integer *sizes, const float *x, const float *w, const float *bias, float *out,
                           integer *failed, integer capacity) {
    geometry g;
    memcpy(&g, sizes, sizeof g);
    failure_list list = {failed, capacity, 0};
    slide s = {.from = {g.o, g.out_h, g.out_w, 1, 1, 0, 0, 0, 0, 1},
               .n = g.n,
               .groups = g.groups,
               .outputs = g.c,
               .out_h = g.h,
               .out_w = g.w,
               .count = g.stride_h * g.stride_w,
               .source = x,
               .bias = bias,
               .out = out,
               .failed = &list};
    integer k = g.o * g.kh * g.kw, outputs = g.groups * g.c;
    if (s.count > 1 << 12) return -1;
    start(&s, &g, g.n * outputs * k * g.out_h * g.out_w);
    integer low_h, low_w, taps = 2 * (g.stride_h * g.kh + g.stride_w * g.kw);
    phase *of_h = reproml_scratch((size_t)(g.stride_h + g.stride_w) * sizeof(phase) + (size_t)taps * 8);
    if (!of_h) return -1;
    phase *of_w = of_h + g.stride_h;
    integer *memory = (integer *)(of_w + g.stride_w);
    s.from.rows = find_phases(g.h, g.kh, g.stride_h, g.pad_h, g.dilation_h, of_h, memory, &low_h);
    s.from.pitch =
        find_phases(g.w, g.kw, g.stride_w, g.pad_w, g.dilation_w, of_w, memory + 2 * g.stride_h * g.kh, &low_w);
    s.from.pad_h = low_h < INT64_MAX ? -low_h : 0, s.from.pad_w = low_w < INT64_MAX ? -low_w : 0;
    for (integer i = 0; i < g.stride_w; i++) /* a row must have space for the places of every phase */
        if (s.from.pitch < of_w[i].count) s.from.pitch = of_w[i].count;
    /* All passes together use each weight once. */
    size_t phases = (size_t)(g.stride_h + g.stride_w) * sizeof(phase) + (size_t)taps * 8;
    size_t bytes = phases + (size_t)s.count * sizeof(pass) + (size_t)(outputs * (k + s.count) + 2 * k) * 8;
    char *work = reproml_scratch(bytes + (size_t)(s.tasks * planes_size(&s.from)) * 4);
    if (!work) return -1;
    of_h = (phase *)work, of_w = of_h + g.stride_h, memory = (integer *)(of_w + g.stride_w);
    find_phases(g.h, g.kh, g.stride_h, g.pad_h, g.dilation_h, of_h, memory, &low_h);
    find_phases(g.w, g.kw, g.stride_w, g.pad_w, g.dilation_w, of_w, memory + 2 * g.stride_h * g.kh, &low_w);
    s.passes = (pass *)(work + phases);
    double *weights = (double *)(s.passes + s.count), *norm = weights + outputs * k;
    integer *offset = (integer *)(norm + outputs * s.count), *term = offset + k;
    s.buffer = (float *)(term + k);
    for (integer a = 0; a < g.stride_h; a++)
        for (integer b = 0; b < g.stride_w; b++) {
            const phase *h = of_h + a, *v = of_w + b;
            pass *p = s.passes + a * g.stride_w + b;
            *p = (pass){
                g.o * h->taps * v->taps, h->count, v->count, a, b, g.stride_h, g.stride_w, offset, weights, norm};
            integer at = 0;
            for (integer o = 0; o < g.o; o++)
                for (integer i = 0; i < h->taps; i++)
                    for (integer j = 0; j < v->taps; j++, at++) {
                        offset[at] =
                            o * plane_size(&s.from) + (h->shift[i] - low_h) * s.from.pitch + v->shift[j] - low_w;
                        term[at] = (o * g.c * g.kh + h->tap[i]) * g.kw + v->tap[j];
                    }
            if (!gather(&s, p, w, g.o * g.c * g.kh * g.kw, g.kh * g.kw, term)) return -1;
            weights += outputs * p->k, norm += outputs, offset += p->k, term += p->k;
        }
    return finish(&s);
}

/* ---- the gradient of the weights ---- */

typedef struct {
    const geometry *g;
    planes of_x, of_g;
    integer tasks, k, *x_offset; /* k: weights of one output */
    const float *x, *grad;
    float *buffer;          /* planes of both for each task */
    double *sums, *squares; /* for each task [groups * o, k]; of grad [groups * o], then of x [groups * c] */
    const tiling *tiles;
    double relative, *bound; /* bounds of the sums: relative; norms of x [groups * c] */
    float *out;
    failure_list *failed;
} correlation;

static integer outputs_of(const correlation *s) { return s->g->groups * s->g->o; }
static integer squares_of(const correlation *s) { return s->g->groups * (s->g->o + s->g->c); }

static void correlate_task(integer task, void *data) {
    const correlation *s = data;
    const geometry *g = s->g;
    integer share = (g->n + s->tasks - 1) / s->tasks, places = plane_size(&s->of_g), k = s->k;
    /* Rows of x that are shifted past its last plane continue into the planes of the gradient: finite numbers, which
       are multiplied by zeros. */
    float *of_x = s->buffer + task * (planes_size(&s->of_x) + planes_size(&s->of_g)),
          *of_g = of_x + planes_size(&s->of_x);
    double *all = s->sums + task * outputs_of(s) * k, *squares = s->squares + task * squares_of(s);
    memset(all, 0, (size_t)(outputs_of(s) * k) * sizeof(double));
    memset(squares, 0, (size_t)squares_of(s) * sizeof(double));
    integer end = (task + 1) * share < g->n ? (task + 1) * share : g->n;
    integer x_step = g->groups * g->c * g->h * g->w, g_step = g->groups * g->o * g->out_h * g->out_w;
    for (integer n = task * share; n < end; n += s->of_x.images)
        for (integer group = 0; group < g->groups; group++) {
            integer count = end - n < s->of_x.images ? end - n : s->of_x.images;
            const float *x = s->x + n * x_step + group * g->c * g->h * g->w;
            const float *grad = s->grad + n * g_step + group * g->o * g->out_h * g->out_w;
            for (integer i = 0; i < count; i++) {
                for (integer o = 0; o < g->o; o++)
                    squares[group * g->o + o] +=
                        reproml_squares(grad + i * g_step + o * g->out_h * g->out_w, g->out_h * g->out_w, 1);
                for (integer c = 0; c < g->c; c++)
                    squares[g->groups * g->o + group * g->c + c] +=
                        reproml_squares(x + i * x_step + c * g->h * g->w, g->h * g->w, 1);
            }
            fill_planes(&s->of_x, x, count, x_step, of_x);
            fill_planes(&s->of_g, grad, count, g_step, of_g);
            for (integer i = 0; i < g->o; i += s->tiles->along_rows)
                for (integer j = 0; j < k; j += s->tiles->along_columns) {
                    int m = (int)(g->o - i < s->tiles->along_rows ? g->o - i : s->tiles->along_rows);
                    int v = (int)(k - j < s->tiles->along_columns ? k - j : s->tiles->along_columns);
                    double parts[ALONG_SUMS], sums[TILE_COLUMNS];
                    s->tiles->along[m][v](places, of_g + i * places, places, of_x, s->x_offset + j, parts);
                    fold(parts, m * v, s->tiles->lanes, sums);
                    double *to = all + (group * g->o + i) * k + j;
                    for (int r = 0; r < m; r++)
                        for (int t = 0; t < v; t++) to[r * k + t] += sums[r * v + t];
                }
        }
}

/* Sum one element again with its rounding errors. Returns nonzero if the test fails. */
static int32_t round_weight_with_errors(const correlation *s, integer output, integer term, float *result) {
    const geometry *g = s->g;
    integer group = output / g->o, c = term / (g->kh * g->kw), i = term / g->kw % g->kh, j = term % g->kw;
    compensated sum = {0, 0, 0};
    for (integer n = 0; n < g->n; n++) {
        const float *x = s->x + ((n * g->groups + group) * g->c + c) * g->h * g->w;
        const float *grad = s->grad + (n * g->groups * g->o + output) * g->out_h * g->out_w;
        for (integer y = 0; y < g->out_h; y++) {
            integer row = y * g->stride_h + i * g->dilation_h - g->pad_h;
            if (row < 0 || row >= g->h) continue;
            for (integer z = 0; z < g->out_w; z++) {
                integer column = z * g->stride_w + j * g->dilation_w - g->pad_w;
                if (column < 0 || column >= g->w || grad[y * g->out_w + z] == 0) continue;
                add_exact(&sum, (double)grad[y * g->out_w + z] * x[row * g->w + column]);
            }
        }
    }
    return round_compensated(&sum, g->n * g->out_h * g->out_w, result);
}

/* Round the weights of one output. */
static void round_weights(integer output, void *data) {
    const correlation *s = data;
    const geometry *g = s->g;
    const double *sums = s->sums + output * s->k, *bound = s->bound + output / g->o * g->c;
    double norm = sqrt(s->squares[output]), column[TILE_COLUMNS];
    float *out = s->out + output * s->k;
    for (integer j = 0; j < s->k; j += TILE_COLUMNS) {
        int n = (int)(s->k - j < TILE_COLUMNS ? s->k - j : TILE_COLUMNS), failed[TILE_COLUMNS];
        for (int t = 0; t < n; t++) column[t] = bound[(j + t) / (g->kh * g->kw)];
        int count = reproml_round_tile(sums + j, 1, n, s->relative, &norm, column, NULL, NULL, out + j, s->k, failed);
        for (int t = 0; t < count; t++)
            if (round_weight_with_errors(s, output, j + failed[t], out + j + failed[t]))
                add_failure(s->failed, output * s->k + j + failed[t]);
    }
}

/* out [groups * o, c, kh, kw] = the gradient of the weights, from x [n, groups * c, h, w] and the gradient of the
   outputs [n, groups * o, out_h, out_w]. */
integer reproml_weight_gradient(const integer *sizes, const float *x, const float *grad, float *out, integer *failed,
                                integer capacity) {
    geometry g;
    memcpy(&g, sizes, sizeof g);
    failure_list list = {failed, capacity, 0};
    integer reach_h = (g.kh - 1) * g.dilation_h, reach_w = (g.kw - 1) * g.dilation_w;
    integer pitch = g.out_w + reach_w / g.stride_w;
    integer rows = g.out_h + reach_h / g.stride_h; /* of both, so that images below each other stay aligned */
    correlation s = {.g = &g,
                     .k = g.c * g.kh * g.kw,
                     .x = x,
                     .grad = grad,
                     .tiles = reproml_tiling(),
                     .of_x = {g.c, g.h, g.w, g.stride_h, g.stride_w, g.pad_h, g.pad_w, rows, pitch, 1},
                     .of_g = {g.o, g.out_h, g.out_w, 1, 1, 0, 0, rows, pitch, 1},
                     .out = out,
                     .failed = &list};
    if (wasteful(&s.of_x)) return -1;
    integer work_size = g.n * outputs_of(&s) * s.k * g.out_h * g.out_w;
    integer threads = work_size > SERIAL ? reproml_threads() : 1;
    s.tasks = g.n < threads ? g.n : threads;
    /* Several small images are processed at once, as many as stay in the cache. */
    integer images = BATCH / (rows * pitch * (g.o + g.c * g.stride_h * g.stride_w)),
            share = (g.n + s.tasks - 1) / s.tasks;
    s.of_x.images = s.of_g.images = images < 1 ? 1 : images < share ? images : share;
    if (s.of_g.images == 1) s.of_g.rows = g.out_h;
    integer all = outputs_of(&s) * s.k, squares = squares_of(&s);
    integer floats = planes_size(&s.of_x) + planes_size(&s.of_g);
    char *work = reproml_scratch((size_t)(s.tasks * (all + squares) + s.k) * 8 + (size_t)(s.tasks * floats) * 4);
    if (!work) return -1;
    s.sums = (double *)work, s.squares = s.sums + s.tasks * all;
    s.x_offset = (integer *)(s.squares + s.tasks * squares);
    s.buffer = (float *)(s.x_offset + s.k);
    integer k = 0;
    for (integer c = 0; c < g.c; c++)
        for (integer i = 0; i < g.kh; i++)
            for (integer j = 0; j < g.kw; j++, k++) {
                integer y = i * g.dilation_h, z = j * g.dilation_w;
                integer plane = (c * g.stride_h + y % g.stride_h) * g.stride_w + z % g.stride_w;
                s.x_offset[k] = plane * plane_size(&s.of_x) + y / g.stride_h * pitch + z / g.stride_w;
            }
    reproml_parallel(correlate_task, &s, s.tasks);
    for (integer task = 1; task < s.tasks; task++) {
        for (integer i = 0; i < all; i++) s.sums[i] += s.sums[task * all + i];
        for (integer i = 0; i < squares; i++) s.squares[i] += s.squares[task * squares + i];
    }
    for (integer i = 0; i < squares; i++)
        if (!(s.squares[i] <= DBL_MAX)) return -1; /* NaN or infinity: see slide_task */
    s.bound = s.squares + outputs_of(&s);
    for (integer i = 0; i < g.groups * g.c; i++) s.bound[i] = sqrt(s.bound[i]);
    /* The height of the tree of additions: places in lanes, the lanes, the images, the tasks. */
    s.relative = relative_bound((double)(plane_size(&s.of_g) / s.tiles->lanes + s.tiles->lanes + g.n + s.tasks));
    run_tasks(round_weights, &s, outputs_of(&s), all > 1 << 14);
    return list.count;
}
