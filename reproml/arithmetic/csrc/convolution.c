/* Convolutions, their transposes and their gradients: each element is one dot product, rounded once.

   They are products of matrices whose lines are the weights and the patches of the images, packed as they are needed
   (panels.h). Where images have padding or a gradient has margins, patches are packed from planes: copies of the
   image with its padding, split by the stride, so that the numbers which one weight multiplies at successive places
   are contiguous. Where a group has few outputs, packing costs more than it saves. Then the planes themselves are the
   rows of a product, each at its own offset (tile.h), for all outputs of a tile at once. Places are counted through the
   padding at the end of a row; results there are dropped. */

#include "panels.h"

#include <stdlib.h>

#define SERIAL (1 << 17)  /* multiplications, some microseconds, that are not worth a second thread */
#define ROW 256           /* places of a row that are calculated at once */
#define GAP 32            /* places between two images that are worth leaving out */
#define FEW 8             /* outputs of a group from which on packing patches saves more than it costs */
#define MANY 33           /* outputs from which on it does so where rows are long */
#define LONG 24           /* places of a long row */
#define AT_ONCE (1 << 21) /* numbers of the planes that are filled at once: 8 MB */
#define COPIED (1 << 24)  /* numbers of the planes of all images: 64 MB, beyond which only one image is copied */
#define BATCH (1 << 16)   /* numbers of several small images copied at once, within the second-level cache */

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

static inline integer most(integer a, integer b) { return a > b ? a : b; }

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

/* Copy one channel of `count` images, `step` elements apart, into its planes; the rest of each plane is filled with
   zeros. */
VECTORISED static void fill_channel(const planes *p, const float *restrict first, integer count, integer step,
                                    float *restrict to) {
    integer pitch = p->pitch, size = plane_size(p);
    memset(to, 0, (size_t)(p->step_h * p->step_w * size) * sizeof(float));
    for (integer a = 0; a < p->step_h; a++) {
        integer y = p->pad_h > a ? (p->pad_h - a + p->step_h - 1) / p->step_h : 0, top = y * p->step_h + a - p->pad_h;
        integer rows = top < p->h ? smaller(p->rows - y, (p->h - 1 - top) / p->step_h + 1) : 0;
        for (integer b = 0; b < p->step_w; b++, to += size) {
            integer x = p->pad_w > b ? (p->pad_w - b + p->step_w - 1) / p->step_w : 0;
            integer left = x * p->step_w + b - p->pad_w;
            integer columns = left < p->w ? smaller(pitch - x, (p->w - 1 - left) / p->step_w + 1) : 0;
            for (integer i = 0; i < count; i++)
                for (integer r = 0; r < rows; r++) {
                    const float *restrict line = first + i * step + (top + r * p->step_h) * p->w + left;
                    float *restrict row = to + (i * p->rows + y + r) * pitch + x;
                    if (p->step_w == 1)
                        for (integer t = 0; t < columns; t++) row[t] = line[t];
                    else if (p->step_w == 2)
                        for (integer t = 0; t < columns; t++) row[t] = line[2 * t];
                    else
                        for (integer t = 0; t < columns; t++) row[t] = line[t * p->step_w];
                }
        }
    }
}

static integer channel_size(const planes *p) { return p->step_h * p->step_w * plane_size(p); }

static void fill_planes(const planes *p, const float *first, integer count, integer step, float *to) {
    for (integer c = 0; c < p->channels; c++, to += channel_size(p))
        fill_channel(p, first + c * p->h * p->w, count, step, to);
    memset(to, 0, (size_t)margin(p) * sizeof(float));
}

/* Outputs that use the same weights: all of a convolution, or those of one phase of a transposed one. */
typedef struct {
    integer k, rows, columns;                               /* terms; places */
    integer first_row, first_column, row_step, column_step; /* of the places in the output */
    integer *offset, *term;                                 /* [k], into the planes and into the weights */
    double *weights; /* [groups, outputs / m, k, m], where m outputs are calculated together */
} pass;

/* How patches are packed from a source image, or from planes if it has padding. */
typedef struct {
    int used, direct;                                      /* whether patches are packed; not from planes */
    integer images;                                        /* at once */
    integer group_step, image_step, row_step, column_step; /* of the first number of a patch */
} packing;

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
    const float *w;
    integer group_step, output_step; /* of the weights */
    packing packed;
} slide;

/* Store rounded numbers of one output, the first of which is place q of the images in the planes. */
static void store(const slide *s, const pass *p, integer q, integer count, const float *row, float *out) {
    integer pitch = s->from.pitch, line = q / pitch, x = q % pitch, step = s->groups * s->outputs * s->out_h * s->out_w;
    for (integer j = 0; j < count; line++, x = 0) {
        integer run = smaller(count - j, pitch - x), y = line % s->from.rows, end = smaller(run, p->columns - x);
        if (y < p->rows) {
            float *to = out + line / s->from.rows * step + (p->first_row + y * p->row_step) * s->out_w +
                        p->first_column + x * p->column_step;
            for (integer t = 0; t < end; t++) to[t * p->column_step] = row[j + t];
        }
        j += run;
    }
}

/* weights: the sum of their absolute values. */
VECTORISED static int32_t round_row(const double *restrict sums, const int32_t *restrict largest, integer n, double g,
                                    double weights, double bias, float *restrict out, int32_t *restrict differ) {
    int32_t any = 0;
    for (integer j = 0; j < n; j++) {
        float size;
        memcpy(&size, largest + j, sizeof size);
        differ[j] = round_sum(sums[j] + bias, g * (weights * size + fabs(bias)), out + j);
        any |= differ[j];
    }
    return any;
}

/* Calculate all places of one pass for the m outputs of a group from `output` on in `count` images. `first`: the first
   number of the first of these outputs in the first image. Returns nonzero if a number is NaN or infinite. */
static int slide_over(const slide *s, const pass *p, integer output, integer m, integer count, const float *buffer,
                      integer first) {
    if (!p->rows || !p->columns) return 0;
    integer pitch = s->from.pitch, rows = s->from.rows, size = s->out_h * s->out_w;
    integer image = s->groups * s->outputs * size, step = rows * pitch, places = (p->rows - 1) * pitch + p->columns;
    const int one_row = step - places < GAP; /* the images are one row of places */
    const double *weights = p->weights + output * p->k, g = relative_bound((double)p->k);
    double sums[TILE_ROWS * ROW], total[TILE_ROWS] = {0};
    float row[ROW];
    int32_t differ[ROW], largest[ROW];
    for (integer k = 0; k < p->k; k++)
        for (integer i = 0; i < m; i++) total[i] += fabs(weights[k * m + i]);
    for (integer q = 0, end = one_row ? (count - 1) * step + places : places; q < count * step;) {
        integer n = smaller(end - q, ROW);
        s->tiles->sliding[m](p->k, weights, buffer + q, p->offset, n, sums, ROW, largest);
        for (integer i = 0; i < m; i++, first += size) {
            double bias = s->bias ? s->bias[output + i] : 0;
            int32_t any = round_row(sums + i * ROW, largest, n, g, total[i], bias, row, differ);
            for (integer j = 0; any && j < n; j++) {
                integer at = q + j, x = at % pitch, y = at / pitch % rows;
                if (!differ[j] || x >= p->columns || y >= p->rows) continue;
                if (largest[j] > bits(FLT_MAX)) return 1;
                compensated sum = {0, 0, 0};
                for (integer k = 0; k < p->k; k++) add_exact(&sum, weights[k * m + i] * buffer[p->offset[k] + at]);
                add_exact(&sum, bias);
                if (round_compensated(&sum, p->k + 1, row + j))
                    add_failure(s->failed, first + at / pitch / rows * image +
                                               (p->first_row + y * p->row_step) * s->out_w + p->first_column +
                                               x * p->column_step);
            }
            store(s, p, q, n, row, s->out + first);
        }
        first -= m * size;
        q += n;
        if (q == end) /* the next image */
            q = one_row ? count * step : end + step - places, end += step;
    }
    return 0;
}

/* The outputs of a group whose sums are taken together. */
static integer together(const slide *s) {
    integer most_rows = s->tiles->rows, tiles = (s->outputs + most_rows - 1) / most_rows;
    return (s->outputs + tiles - 1) / tiles;
}

static void slide_task(integer task, void *data) {
    const slide *s = data;
    integer images = s->from.images, items = (s->n + images - 1) / images * s->groups;
    integer length = s->from.channels * s->from.h * s->from.w, m = together(s);
    float *buffer = s->buffer + task * planes_size(&s->from);
    int infinite = 0;
    for (integer item = task * items / s->tasks; item < (task + 1) * items / s->tasks; item++) {
        integer group = item % s->groups, first = item / s->groups * images, count = smaller(s->n - first, images);
        fill_planes(&s->from, s->source + (first * s->groups + group) * length, count, s->groups * length, buffer);
        for (integer i = 0; i < s->count; i++)
            for (integer o = 0; o < s->outputs; o += m)
                infinite |= slide_over(s, s->passes + i, group * s->outputs + o, smaller(m, s->outputs - o), count,
                                       buffer, ((first * s->groups + group) * s->outputs + o) * s->out_h * s->out_w);
    }
    /* The reference path determines the products of NaN or infinity with zeros. */
    for (integer i = 0; infinite && i <= s->failed->capacity; i++) add_failure(s->failed, 0);
}

/* Gather the weights of a pass. Returns 0 if one is NaN or infinite. */
static int gather(const slide *s, const pass *p) {
    integer m = together(s);
    for (integer o = 0; o < s->groups * s->outputs; o++) {
        const float *from = s->w + o / s->outputs * s->group_step + o % s->outputs * s->output_step;
        integer i = o % s->outputs % m, count = smaller(m, s->outputs - (o % s->outputs - i));
        double *to = p->weights + (o - i) * p->k + i;
        for (integer t = 0; t < p->k; t++, to += count) {
            *to = from[p->term[t]];
            if (!(fabs(*to) <= DBL_MAX)) return 0;
        }
    }
    return 1;
}

/* ---- by packed panels ---- */

/* Numbers of the planes of one image. */
static integer image_size(const slide *s) {
    const planes *p = &s->from;
    return s->groups * p->channels * p->step_h * p->step_w * p->rows * p->pitch;
}

/* Returns the number of images whose patches are packed at once; their tables should not be larger than the planes. */
static integer images_at_once(const slide *s) {
    return most(1, smaller(s->n, AT_ONCE / most(image_size(s), 32 * s->out_h * s->out_w)));
}

/* Whether patches are packed, for this number of outputs of a group and of places in a row. */
static int packs(integer outputs, integer places) { return outputs >= (places < LONG ? FEW : MANY); }

/* Choose how to pack patches. They are packed straight from the source if it has no margins; `h_step` and
   `w_step`: of the places there. */
static void plan_packing(slide *s, integer images, int no_margins, integer h_step, integer w_step) {
    planes *p = &s->from;
    packing *to = &s->packed;
    *to = (packing){1, no_margins, images, 0, 0, 0, 0};
    p->images = images;
    if (no_margins)
        to->group_step = p->channels * p->h * p->w, to->image_step = s->groups * to->group_step,
        to->row_step = h_step * p->w, to->column_step = w_step;
    else
        to->group_step = p->channels * channel_size(p), to->image_step = p->rows * p->pitch, to->row_step = p->pitch,
        to->column_step = 1;
}

/* The offset of the number at row y and column x of a channel, among the numbers which the places of a pass step
   over. */
static integer offset_of(const slide *s, integer channel, integer y, integer x) {
    const planes *p = &s->from;
    if (s->packed.direct) return (channel * p->h + y) * p->w + x;
    integer plane = (channel * p->step_h + y % p->step_h) * p->step_w + x % p->step_w;
    return plane * plane_size(p) + y / p->step_h * p->pitch + x / p->step_w;
}

/* The product that calculates a pass over `images` images. */
static product pass_product(const slide *s, const pass *p, integer images) {
    integer places = images * p->rows * p->columns;
    product x = {.batch = s->groups,
                 .m = smaller(s->outputs, places),
                 .n = s->outputs < places ? places : s->outputs,
                 .k = p->k,
                 .out = s->out,
                 .out_step = s->outputs * s->out_h * s->out_w,
                 .bias_step = s->outputs,
                 .failed = s->failed};
    return x;
}

/* Returns the bytes that the passes need, with planes and tables. */
static size_t packed_bytes(const slide *s, size_t *plan) {
    integer tables = 2 * s->outputs,
            copies = s->packed.direct ? 0 : s->groups * s->from.channels * channel_size(&s->from);
    *plan = 0;
    for (integer i = 0; i < s->count; i++)
        for (integer images = s->packed.images; images; images = images > 1 && s->n % images ? s->n % images : 0) {
            const pass *p = s->passes + i;
            product x = pass_product(s, p, images);
            size_t bytes = x.m ? reproml_plan(&x) : 0;
            if (*plan < bytes) *plan = bytes;
            if (tables < 2 * (s->outputs + images * p->rows * p->columns))
                tables = 2 * (s->outputs + images * p->rows * p->columns);
            if (images != s->packed.images) break;
        }
    return *plan + (size_t)tables * sizeof(integer) + (size_t)copies * sizeof(float);
}

typedef struct {
    const slide *s;
    const float *source;
    integer count;
    float *to;
} filling;

static void fill_task(integer channel, void *data) {
    const filling *f = data;
    const planes *p = &f->s->from;
    integer size = p->h * p->w;
    fill_channel(p, f->source + channel * size, f->count, f->s->groups * p->channels * size,
                 f->to + channel * channel_size(p));
}

static integer slide_packed(const slide *s, char *work, size_t plan) {
    const packing *from = &s->packed;
    integer channels = s->groups * s->from.channels, image = s->out_h * s->out_w;
    integer copies = from->direct ? 0 : channels * channel_size(&s->from);
    float *planes = (float *)(work + plan);
    integer *tables = (integer *)(planes + copies + copies % 2);
    for (integer first = 0; first < s->n; first += from->images) {
        integer count = smaller(s->n - first, from->images);
        filling f = {s, s->source + first * channels * s->from.h * s->from.w, count, planes};
        if (!from->direct) run_tasks(fill_task, &f, channels, copies > SERIAL);
        for (integer i = 0; i < s->count; i++) {
            const pass *p = s->passes + i;
            product x = pass_product(s, p, count);
            if (!x.m) continue;
            integer places = count * p->rows * p->columns, *column = tables, *row = column + places;
            integer *place = row + s->outputs, *output = place + places;
            for (integer n = 0; n < count; n++)
                for (integer y = 0; y < p->rows; y++)
                    for (integer z = 0; z < p->columns; z++) {
                        *place++ = n * from->image_step + y * from->row_step + z * from->column_step;
                        *column++ = (first + n) * s->groups * s->outputs * image +
                                    (p->first_row + y * p->row_step) * s->out_w + p->first_column + z * p->column_step;
                    }
            for (integer o = 0; o < s->outputs; o++) row[o] = o * image, output[o] = o * s->output_step;
            column -= places, place -= places;
            operand patches = {from->direct ? f.source : planes, from->group_step, place, p->offset};
            operand weights = {s->w, s->group_step, output, p->term};
            int swapped = s->outputs >= places;
            x.a = swapped ? patches : weights, x.b = swapped ? weights : patches;
            x.row = swapped ? column : row, x.column = swapped ? row : column;
            *(swapped ? &x.column_bias : &x.row_bias) = s->bias;
            reproml_plan(&x);
            if (!reproml_multiply(&x, work)) return -1; /* see slide_task */
        }
    }
    return s->failed->count;
}

static void start(slide *s, const geometry *g, integer multiplications) {
    integer threads = multiplications > SERIAL ? reproml_threads() : 1;
    s->tiles = reproml_tiling();
    if (!s->packed.used) /* several small images at once, but something for every thread */
        s->from.images =
            most(1, smaller(g->n * g->groups / threads, smaller(g->n, BATCH / (image_size(s) / g->groups))));
    s->tasks = smaller((g->n + s->from.images - 1) / s->from.images * g->groups, threads);
}

static integer finish(slide *s) {
    for (integer i = 0; i < s->count; i++)
        if (!gather(s, s->passes + i)) return -1;
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
               .failed = &list,
               .w = w,
               .group_step = g.o * p.k,
               .output_step = p.k};
    if (wasteful(&s.from)) return -1;
    if (packs(g.o, g.out_w)) plan_packing(&s, images_at_once(&s), !g.pad_h && !g.pad_w, g.stride_h, g.stride_w);
    start(&s, &g, g.n * g.groups * g.o * p.k * g.out_h * g.out_w);
    integer outputs = g.groups * g.o;
    size_t plan = 0, bytes = s.packed.used ? packed_bytes(&s, &plan)
                                           : (size_t)(outputs * p.k) * 8 + (size_t)(s.tasks * planes_size(&s.from)) * 4;
    char *work = reproml_scratch(bytes + (size_t)(2 * p.k + 1) * 8);
    if (!work) return -1;
    integer k = 0;
    p.offset = (integer *)work, p.term = p.offset + p.k;
    p.weights = (double *)(p.term + p.k), s.buffer = (float *)(p.weights + outputs * p.k);
    for (integer c = 0; c < g.c; c++)
        for (integer i = 0; i < g.kh; i++)
            for (integer j = 0; j < g.kw; j++, k++) {
                p.offset[k] = offset_of(&s, c, i * g.dilation_h, j * g.dilation_w);
                p.term[k] = k;
            }
    return s.packed.used ? slide_packed(&s, (char *)p.weights, plan) : finish(&s);
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
               .failed = &list,
               .w = w,
               .group_step = g.o * g.c * g.kh * g.kw,
               .output_step = g.kh * g.kw};
    integer k = g.o * g.kh * g.kw, outputs = g.groups * g.c;
    if (s.count > 1 << 12) return -1;
    integer low_h, low_w, taps = 2 * (g.stride_h * g.kh + g.stride_w * g.kw);
    pass *passes = calloc(1, (size_t)s.count * sizeof(pass) + (size_t)(g.stride_h + g.stride_w) * sizeof(phase) +
                                 (size_t)taps * sizeof(integer));
    if (!passes) return -1;
    phase *of_h = (phase *)(passes + s.count), *of_w = of_h + g.stride_h;
    integer *memory = (integer *)(of_w + g.stride_w);
    s.from.rows = find_phases(g.h, g.kh, g.stride_h, g.pad_h, g.dilation_h, of_h, memory, &low_h);
    s.from.pitch =
        find_phases(g.w, g.kw, g.stride_w, g.pad_w, g.dilation_w, of_w, memory + 2 * g.stride_h * g.kh, &low_w);
    s.from.pad_h = low_h < INT64_MAX ? -low_h : 0, s.from.pad_w = low_w < INT64_MAX ? -low_w : 0;
    /* There must be space for the places of every phase. */
    for (integer i = 0; i < g.stride_h; i++) s.from.rows = most(s.from.rows, of_h[i].count);
    for (integer i = 0; i < g.stride_w; i++) s.from.pitch = most(s.from.pitch, of_w[i].count);
    const planes *from = &s.from;
    if (packs(g.c, g.w / g.stride_w))
        plan_packing(&s, images_at_once(&s),
                     !from->pad_h && !from->pad_w && from->rows == from->h && from->pitch == from->w, 1, 1);
    start(&s, &g, g.n * outputs * k * g.out_h * g.out_w);
    s.passes = passes;
    for (integer a = 0; a < g.stride_h; a++)
        for (integer b = 0; b < g.stride_w; b++) {
            const phase *h = of_h + a, *v = of_w + b;
            passes[a * g.stride_w + b] = (pass){.k = g.o * h->taps * v->taps,
                                                .rows = h->count,
                                                .columns = v->count,
                                                .first_row = a,
                                                .first_column = b,
                                                .row_step = g.stride_h,
                                                .column_step = g.stride_w};
        }
    /* All passes together use each weight at most once. */
    size_t plan = 0, bytes = s.packed.used ? packed_bytes(&s, &plan)
                                           : (size_t)(outputs * k) * 8 + (size_t)(s.tasks * planes_size(&s.from)) * 4;
    char *work = reproml_scratch(bytes + (size_t)(2 * k + 1) * 8);
    integer *offset = (integer *)work, *term = offset + k;
    double *weights = (double *)(term + k);
    for (pass *p = passes; work && p < passes + s.count; p++) {
        const phase *h = of_h + p->first_row, *v = of_w + p->first_column;
        p->offset = offset, p->term = term, p->weights = weights;
        for (integer o = 0; o < g.o; o++)
            for (integer i = 0; i < h->taps; i++)
                for (integer j = 0; j < v->taps; j++) {
                    *offset++ = offset_of(&s, o, h->shift[i] - low_h, v->shift[j] - low_w);
                    *term++ = (o * g.c * g.kh + h->tap[i]) * g.kw + v->tap[j];
                }
        weights += outputs * p->k;
    }
    s.buffer = (float *)weights;
    integer result = !work ? -1 : s.packed.used ? slide_packed(&s, work + 2 * k * 8, plan) : finish(&s);
    free(passes);
    return result;
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
        int count =
            reproml_round_tile(sums + j, 1, n, s->relative, &norm, column, NULL, NULL, 0, out + j, s->k, failed);
        for (int t = 0; t < count; t++)
            if (round_weight_with_errors(s, output, j + failed[t], out + j + failed[t]))
                add_failure(s->failed, output * s->k + j + failed[t]);
    }
}

/* The gradient of the weights by packed panels: its terms are the places of all images. */
static integer correlate_packed(const geometry *g, const slide *s, const float *grad) {
    const packing *from = &s->packed;
    integer channels = g->groups * g->c, copies = from->direct ? 0 : channels * channel_size(&s->from);
    integer image = g->out_h * g->out_w, k = g->c * g->kh * g->kw, terms = g->n * image;
    product x = {.batch = g->groups,
                 .m = smaller(g->o, k),
                 .n = most(g->o, k),
                 .k = terms,
                 .out = s->out,
                 .out_step = g->o * k,
                 .failed = s->failed};
    size_t bytes = reproml_plan(&x);
    char *work =
        reproml_scratch(bytes + (size_t)(2 * (terms + k + g->o)) * sizeof(integer) + (size_t)copies * sizeof(float));
    if (!work) return -1;
    integer *place = (integer *)(work + bytes), *at = place + terms, *line = at + terms, *column = line + k;
    integer *output = column + k, *row = output + g->o;
    float *planes = (float *)(row + g->o);
    filling f = {s, s->source, g->n, planes};
    if (!from->direct) run_tasks(fill_task, &f, channels, copies > SERIAL);
    for (integer n = 0; n < g->n; n++)
        for (integer y = 0; y < g->out_h; y++)
            for (integer z = 0; z < g->out_w; z++) {
                *at++ = n * g->groups * g->o * image + y * g->out_w + z;
                *place++ = n * from->image_step + y * from->row_step + z * from->column_step;
            }
    at -= terms, place -= terms;
    for (integer t = 0; t < k; t++) {
        column[t] = t;
        line[t] = offset_of(s, t / (g->kh * g->kw), t / g->kw % g->kh * g->dilation_h, t % g->kw * g->dilation_w);
    }
    for (integer o = 0; o < g->o; o++) output[o] = o * image, row[o] = o * k;
    operand outputs = {grad, g->o * image, output, at};
    operand patches = {from->direct ? s->source : planes, from->group_step, line, place};
    int swapped = g->o > k;
    x.a = swapped ? patches : outputs, x.b = swapped ? outputs : patches;
    x.row = swapped ? column : row, x.column = swapped ? row : column;
    return reproml_multiply(&x, work) ? s->failed->count : -1; /* see slide_task */
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
    slide source = {.from = {g.c, g.h, g.w, g.stride_h, g.stride_w, g.pad_h, g.pad_w, rows, pitch, 1},
                    .n = g.n,
                    .groups = g.groups,
                    .source = x,
                    .out = out,
                    .failed = &list};
    if (wasteful(&source.from)) return -1;
    if (g.o >= FEW && g.n * image_size(&source) <= COPIED) {
        plan_packing(&source, g.n, !g.pad_h && !g.pad_w, g.stride_h, g.stride_w);
        return correlate_packed(&g, &source, grad);
    }
    correlation s = {.g = &g,
                     .k = g.c * g.kh * g.kw,
                     .x = x,
                     .grad = grad,
                     .tiles = reproml_tiling(),
                     .of_x = {g.c, g.h, g.w, g.stride_h, g.stride_w, g.pad_h, g.pad_w, rows, pitch, 1},
                     .of_g = {g.o, g.out_h, g.out_w, 1, 1, 0, 0, rows, pitch, 1},
                     .out = out,
                     .failed = &list};
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
