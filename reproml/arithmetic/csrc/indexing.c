/* Sums of what is put in the same place: gradients of embeddings and of max pooling, scatter_add
   (indexing.py). The errors of all additions are kept: of few numbers the sum is mostly exact in binary64,
   and so often a tie of binary32 that a test which has to leave room would fail. */

#include "compensated.h"
#include "lanes.h"

#define WIDTH 128 /* columns at once */
#define NONE (-1)

typedef struct {
    integer sources, width, rows, padding;
    const integer *index;
    const float *values, *start;
    float *out;
    int refused, overlap;
} scatter;

static void set(int *flag) { __atomic_store_n(flag, 1, __ATOMIC_RELAXED); }

/* s + t + what t's own roundings lose: at most n U size */
typedef struct {
    double *s, *t, *size;
} many;

INLINE void add_to(many sum, integer i, double x) {
    double error;
    two_sum(sum.s[i], x, sum.s + i, &error);
    sum.t[i] += error;
    sum.size[i] += fabs(error);
}

INLINE void begin(many sum, const float *start, integer n) {
    for (integer i = 0; i < n; i++) {
        sum.s[i] = start ? start[i] + 0.0 : 0; /* an exact zero is +0 */
        sum.t[i] = sum.size[i] = 0;
    }
}

INLINE int round_all(many sum, integer n, double terms, float *restrict out) {
    int sure = 1;
    for (integer i = 0; i < n; i++) out[i] = (float)sum.s[i];
    for (integer i = 0; i < n; i++)
        if (sum.size[i] != 0 && fabs(sum.s[i]) <= DBL_MAX) {
            pair p = normal_pair(sum.s[i], sum.t[i], sum.size[i] * (terms + 2) * U * SLACK);
            sure &= settle_pair(p.s, p.t, p.e, out + i);
        }
    return sure;
}

/* Put each value in its place, as long as nothing is there yet. Returns 0 if something was. */
static int put(const scatter *k, const integer *index, const float *values, float *out) {
    memset(out, 0, (size_t)k->rows * sizeof(float));
    for (integer i = 0; i < k->sources; i++) {
        integer at = index[i];
        if (at < 0 || at >= k->rows || out[at] != 0) return 0;
        out[at] = values[i] + 0.0f;
    }
    return 1;
}

/* Rows of one number: all sums at once. */
VECTORISED static void add_numbers(integer plane, void *data) {
    scatter *k = data;
    const integer *index = k->index + plane * k->sources;
    const float *values = k->values + plane * k->sources;
    float *out = k->out + plane * k->rows;
    if (!k->start && k->padding == NONE && !k->overlap) {
        if (put(k, index, values, out)) return;
        set(&k->overlap);
    }
    double *memory = reproml_scratch((size_t)(3 * k->rows) * sizeof(double));
    many sum = {memory, memory + k->rows, memory + 2 * k->rows};
    int sure = memory != 0;
    if (sure) begin(sum, k->start, k->rows);
    for (integer i = 0; sure && i < k->sources; i++) {
        integer at = index[i];
        sure = at >= 0 && at < k->rows;
        if (sure && at != k->padding) add_to(sum, at, values[i]);
    }
    if (!sure || !round_all(sum, k->rows, (double)k->sources, out)) set(&k->refused);
}

/* first[row] and next[source]: the sources of a row, in a chain. Returns 0 if an index is not a row. */
static int chain(const scatter *k, int32_t *first, int32_t *next) {
    for (integer row = 0; row < k->rows; row++) first[row] = NONE;
    for (integer i = 0; i < k->sources; i++) {
        integer row = k->index[i];
        if (row < 0 || row >= k->rows) return 0;
        if (row == k->padding) continue;
        next[i] = first[row];
        first[row] = (int32_t)i;
    }
    return 1;
}

VECTORISED static int add_rows(const scatter *k, const int32_t *first, const int32_t *next) {
    double memory[3][WIDTH];
    many sum = {memory[0], memory[1], memory[2]};
    int sure = 1;
    for (integer row = 0; row < k->rows; row++)
        for (integer at = 0; at < k->width; at += WIDTH) {
            integer n = k->width - at < WIDTH ? k->width - at : WIDTH, to = row * k->width + at;
            if (first[row] == NONE && !k->start) {
                memset(k->out + to, 0, (size_t)n * sizeof(float));
                continue;
            }
            begin(sum, k->start ? k->start + to : 0, n);
            for (int32_t source = first[row]; source != NONE; source = next[source])
                for (integer i = 0; i < n; i++) add_to(sum, i, k->values[source * k->width + at + i]);
            sure &= round_all(sum, n, (double)k->sources, k->out + to);
        }
    return sure;
}

/* Of each plane: out [rows, width] = start + the sum of the rows of values [sources, width] that have its
   index; none for the row `padding`. start: null for zeros. More planes than one only of width 1.
   Returns 0 if all is done. */
integer reproml_scatter(integer planes, integer sources, integer width, integer rows, const integer *index,
                        const float *values, const float *start, integer padding, float *out) {
    scatter k = {sources, width, rows, padding, index, values, start, out, 0, 0};
    if (width == 1) {
        if (planes > 1 && planes * (sources + rows) > 4096)
            reproml_parallel(add_numbers, &k, planes);
        else
            for (integer plane = 0; plane < planes; plane++) add_numbers(plane, &k);
        return k.refused;
    }
    if (planes != 1 || sources >= INT32_MAX || rows >= INT32_MAX) return 1;
    int32_t *first = reproml_scratch((size_t)(rows + sources) * sizeof(int32_t)), *next = first + rows;
    return !(first && chain(&k, first, next) && add_rows(&k, first, next));
}
