/* Matrix products, rounded once, by the method of operators/matmul.py.

   The bound of an element is the product of the norms of its row of a and of its column of b. The sums are calculated,
   tested and rounded tile by tile. An element that fails the test is summed again with its rounding errors, and if it
   fails once more, it is reported to Python. */

#include "panels.h"

#include <stdlib.h>

VECTORISED static double squares(const float *restrict x, integer n, integer stride) {
    double part[16] = {0}, sum = 0;
    integer i = 0;
    if (stride == 1)
        for (; i + 16 <= n; i += 16)
            for (int t = 0; t < 16; t++) part[t] += (double)x[i + t] * x[i + t];
    for (; i < n; i++) sum += (double)x[i * stride] * x[i * stride];
    for (int t = 0; t < 16; t++) sum += part[t];
    return sum;
}

double reproml_squares(const float *x, integer n, integer stride) { return squares(x, n, stride); }

/* Round a tile. Returns nonzero if the test fails for an element; differ[i * TILE_COLUMNS + j] is nonzero for those. */
INLINE int32_t round_rows(const double *restrict sums, int m, int n, double g, const double *restrict row_bound,
                          const double *restrict column_bound, const float *restrict row_bias,
                          const float *restrict column_bias, integer column_biases, float *restrict out, integer stride,
                          int32_t *restrict differ) {
    int32_t failed[TILE_COLUMNS] = {0}, any = 0;
    for (int i = 0; i < m; i++) {
        const double *restrict from = sums + i * TILE_COLUMNS;
        const float *restrict of_columns = column_bias + i * column_biases;
        int32_t row[TILE_COLUMNS]; /* of its own: GCC does not see that differ and out never overlap */
        float rounded[TILE_COLUMNS];
        double bound = g * row_bound[i], constant = row_bias ? row_bias[i] : 0;
        for (int j = 0; j < n; j++) {
            double bias = constant + (double)of_columns[j]; /* one of them is zero */
            double rad = bound * column_bound[j];
#if PRECISION < 24 /* a minimum compiles to one instruction, a branch does not */
            rad += 0x1p900 * rad < SINGLE_LOST ? 0x1p900 * rad : SINGLE_LOST;
#endif
            row[j] = round_sum_quickly(from[j] + bias, rad + g * fabs(bias), rounded + j);
            failed[j] |= row[j];
        }
        memcpy(out + i * stride, rounded, (size_t)n * sizeof(float));
        memcpy(differ + i * TILE_COLUMNS, row, (size_t)n * sizeof(int32_t));
    }
    for (int j = 0; j < n; j++) any |= failed[j];
    return any;
}

VECTORISED static int32_t round_tile(const double *restrict sums, int m, int n, double g,
                                     const double *restrict row_bound, const double *restrict column_bound,
                                     const float *restrict row_bias, const float *restrict column_bias,
                                     integer column_biases, float *restrict out, integer stride,
                                     int32_t *restrict differ) {
    static const float zeros[TILE_COLUMNS];
    if (!column_bias) column_bias = zeros; /* a vector load from the null pointer is slow even if it is masked */
    if (n == TILE_COLUMNS)                 /* most tiles; with a constant number of columns the loop has no remainder */
        return round_rows(sums, m, TILE_COLUMNS, g, row_bound, column_bound, row_bias, column_bias, column_biases, out,
                          stride, differ);
    return round_rows(sums, m, n, g, row_bound, column_bound, row_bias, column_bias, column_biases, out, stride,
                      differ);
}

int reproml_round_tile(const double *sums, int m, int n, double g, const double *row_bound, const double *column_bound,
                       const float *row_bias, const float *column_bias, integer column_biases, float *out,
                       integer stride, int *failed) {
    int32_t differ[TILE_ROWS * TILE_COLUMNS];
    int32_t any =
        round_tile(sums, m, n, g, row_bound, column_bound, row_bias, column_bias, column_biases, out, stride, differ);
    int count = 0;
    for (int i = 0; any && i < m; i++) {
        int32_t in_row = 0;
        for (int j = 0; j < n; j++) in_row |= differ[i * TILE_COLUMNS + j];
        for (int j = 0; in_row && j < n; j++)
            if (differ[i * TILE_COLUMNS + j]) {
                const double sum = sums[i * TILE_COLUMNS + j];
                const float bias = row_bias ? row_bias[i] : column_bias ? column_bias[i * column_biases + j] : 0;
                if (fabs(sum) == INFINITY)
                    out[i * stride + j] = to_target(sum) + bias; /* in any order */
                else
                    failed[count++] = i * TILE_COLUMNS + j;
            }
    }
    return count;
}

/* Fill the tables of offsets, 2 (m + n + k) integers, of out [m, n] = a @ b, or of its transpose if `swapped`. */
static void describe(product *x, int swapped, integer m, integer n, integer k, operand a, integer a_row,
                     integer a_column, operand b, integer b_row, integer b_column, integer *tables) {
    integer *row = tables, *column = row + m, *a_line = column + n, *b_line = a_line + m;
    integer *a_term = b_line + n, *b_term = a_term + k;
    for (integer i = 0; i < m; i++) row[i] = i * n, a_line[i] = i * a_row;
    for (integer i = 0; i < n; i++) column[i] = i, b_line[i] = i * b_column;
    for (integer i = 0; i < k; i++) a_term[i] = i * a_column, b_term[i] = i * b_row;
    a.line = a_line, a.term = a_term, b.line = b_line, b.term = b_term;
    x->a = swapped ? b : a, x->b = swapped ? a : b;
    x->row = swapped ? column : row, x->column = swapped ? row : column;
}

/* out = a @ b + bias. a [batch, m, k] and b [batch, k, n] with any strides; bias null or [n], or as `added`, contiguous
   [batch, m, n]; out contiguous; no size but k is 0. kept: the panels of b, or null. failed: memory for `capacity` flat
   indices. Returns the number of elements for which the test failed. If that exceeds `capacity`, or is negative for lack
   of memory, the caller has to calculate the entire result. */
integer reproml_product(const packed *kept, integer batch, integer m, integer n, integer k, const float *a,
                        integer a_batch, integer a_row, integer a_column, const float *b, integer b_batch,
                        integer b_row, integer b_column, const float *bias, const float *added, float *out,
                        integer *failed, integer capacity) {
    failure_list list = {failed, capacity, 0};
    product x = {.batch = batch, .k = k, .out = out, .out_step = m * n, .added = added, .failed = &list};
    /* The operand with fewer lines is widened, and kept while the other is multiplied with it. */
    int swapped = m > n;
    x.m = swapped ? n : m, x.n = swapped ? m : n;
    x.kept = swapped ? NULL : kept;
    *(swapped ? &x.row_bias : &x.column_bias) = bias;
    size_t bytes = reproml_plan(&x);
    char *work = reproml_scratch(bytes + (size_t)(2 * (m + n + k)) * sizeof(integer));
    if (!work) return -1;
    if (!k) a = b = out; /* an operand without terms has no memory */
    operand rows = {.first = a, .step = a_batch}, columns = {.first = b, .step = b_batch};
    describe(&x, swapped, m, n, k, rows, a_row, a_column, columns, b_row, b_column, (integer *)(work + bytes));
    reproml_multiply(&x, work);
    return list.count;
}

/* Pack b [k, n] for several products with m rows. Returns its panels, in memory to free, or null where the products would
   not use them and for lack of memory. */
packed *reproml_pack_matrix(integer m, integer n, integer k, const float *b, integer b_row, integer b_column) {
    const packed later = {0}; /* the plan of a product depends on whether panels are kept */
    product x = {.batch = 1, .m = m, .n = n, .k = k, .kept = &later};
    if (m <= FEW_LINES || m > n) return NULL;
    reproml_plan(&x);
    integer *tables = reproml_scratch((size_t)(2 * (m + n + k)) * sizeof(integer));
    size_t head = (sizeof(packed) + (size_t)n * sizeof(double) + 63) / 64 * 64;
    void *memory;
    if (!tables || posix_memalign(&memory, 64, head + (size_t)(x.column_panels * k * x.pitch) * sizeof(float)))
        return NULL;
    packed *kept = memory;
    kept->norms = (double *)(kept + 1), kept->panels = (float *)((char *)memory + head);
    x.kept = kept;
    describe(&x, 0, m, n, k, (operand){.first = b}, 0, 0, (operand){.first = b}, b_row, b_column, tables);
    reproml_pack(&x);
    return kept;
}
