/* The innermost loops of products and convolutions: a tile of sums of products, kept in registers.

   Numbers are widened as they are loaded. A product of two binary32 numbers is exact in binary64, so fused
   multiply-adds, which the compiler makes by contraction, give the same bits as separate operations. */

#ifndef REPROML_TILE_H
#define REPROML_TILE_H

#include "compensated.h"

#define TILE_ROWS 8 /* the maximum over all processors */
#define TILE_COLUMNS 24
#define SINGLE_BLOCK 16
#define SINGLE_LOST 0x1p-129 /* of a sum in binary32 by underflow: 2^-149 for each of up to 2^20 terms */
#define ALONG_SUMS (24 * 8)  /* the largest number of partial sums of a tile of along_loop */

/* out[i][j] = sum over p < k of a[p][i] * b[offset[p] + j], a [k, m]: vectors lie across the columns. Each row of b has
   its own offset, so that one loop serves a matrix and the shifted rows of an image. */
typedef void across_loop(integer k, const double *a, const float *b, const integer *offset, double *out);

/* out[i][j] = sum over p < k of a[p * TILE_ROWS + i] * b[p * pitch + j], where blocks of SINGLE_BLOCK terms are summed in
   binary32, each from its first term to its last, and the blocks in binary64. */
typedef void single_loop(integer k, const float *a, const float *b, integer pitch, double *out);

/* sums[i][j] = sum over p < k of a[i * a_row + p] * b[b_offset[j] + p]: vectors lie along the terms, and each sum is a
   vector of `lanes` partial sums, [m][n][lanes]. */
typedef void along_loop(integer k, const float *a, integer a_row, const float *b, const integer *b_offset,
                        double *sums);

/* out[i * pitch + j] = sum over p < k of w[p * m + i] * x[offset[p] + j] for i < m and j < n, with largest[j] the bit
   pattern of the largest absolute value of x in its terms. Numbers of x beyond n are read, and results beyond n are
   stored, to a multiple of 32. */
typedef void rows_loop(integer k, const double *w, const float *x, const integer *offset, integer n, double *out,
                       integer pitch, int32_t *largest);

/* to[p * pitch + r] = from[line[r] + p] for r < 8 and p < count, where count >= 8. */
typedef void transpose_loop(const float *from, const integer *line, integer count, float *to, integer pitch);

typedef struct {
    int lanes;                             /* doubles in a vector */
    int rows, columns;                     /* of a full tile of across_loop; its columns are 3 vectors */
    int along_rows, along_columns;         /* of a full tile of along_loop */
    across_loop *across[TILE_ROWS + 1][4]; /* [rows][vectors]; rows of `out` have TILE_COLUMNS */
    along_loop *along[5][7];               /* [rows][columns] */
#if PRECISION == 8
    int single_columns;                    /* of a full tile of single_loop, which has `rows` too */
    single_loop *single[TILE_ROWS + 1][4]; /* [rows][vectors of 2 * lanes floats] */
#endif
    rows_loop *sliding[TILE_ROWS + 1]; /* [m] */
    transpose_loop *transpose;
} tiling;

/* Returns the tiling for this processor. */
const tiling *reproml_tiling(void);

/* Add up the partial sums of along_loop in a tree: out[i] for n sums. */
static inline void fold(const double *restrict sums, int n, int lanes, double *restrict out) {
    if (lanes == 8) { /* in halves, which compile to vector operations */
        for (int i = 0; i < n; i++, sums += 8) {
            double a[4], b[2];
            for (int t = 0; t < 4; t++) a[t] = sums[t] + sums[t + 4];
            for (int t = 0; t < 2; t++) b[t] = a[t] + a[t + 2];
            out[i] = b[0] + b[1];
        }
        return;
    }
    for (int i = 0; i < n; i++, sums += lanes) {
        double part[8];
        for (int t = 0; t < lanes; t++) part[t] = sums[t];
        for (int half = lanes / 2; half; half /= 2)
            for (int t = 0; t < half; t++) part[t] += part[t + half];
        out[i] = part[0];
    }
}

/* Returns the sum of squares of n numbers, `stride` elements apart. */
double reproml_squares(const float *x, integer n, integer stride);

/* Round a tile of sums to binary32. Each exact sum lies within g * row_bound[i] * column_bound[j] of its element, and for
   PRECISION < 24 within another SINGLE_LOST unless the first is 0, and the bias of its row or column (either may be null)
   is one more term; column_biases: elements from those of one row to those of the next, 0 if they are the same; g: the
   relative bound of a sum (relative_bound). sums: rows of TILE_COLUMNS. out: [m][n] with `stride` elements between rows.
   Returns the number of elements for which the test failed; their row * TILE_COLUMNS + column is in `failed`. */
int reproml_round_tile(const double *sums, int m, int n, double g, const double *row_bound, const double *column_bound,
                       const float *row_bias, const float *column_bias, integer column_biases, float *out,
                       integer stride, int *failed);

#endif
