/* The innermost loops of products and convolutions: a tile of sums of products, held in registers.

   Numbers are widened as they are loaded. A product of two binary32 numbers is exact in binary64, so fused
   multiply-adds (the compiler's contraction makes them) give the same bits as separate ones. */

#ifndef REPROML_TILE_H
#define REPROML_TILE_H

#include "compensated.h"

#define TILE_ROWS 8 /* at most, on any processor */
#define TILE_COLUMNS 24
#define ALONG_SUMS (24 * 8) /* partial sums of a tile along, at most */

/* out[i][j] = sum over p < k of a[p][i] * b[offset[p] + j], a [k, m]: vectors lie across the columns. A row of
   b may start anywhere, so that one loop serves a matrix and the shifted rows of an image. */
typedef void across_loop(integer k, const double *a, const float *b, const integer *offset, double *out);

/* sums[i][j] = sum over p < k of a[i * a_row + p] * b[b_offset[j] + p]: vectors lie along the terms, and each sum is
   a vector of `lanes` partial sums, [m][n][lanes]. */
typedef void along_loop(integer k, const float *a, integer a_row, const float *b, const integer *b_offset,
                        double *sums);

typedef struct {
    int lanes;                             /* doubles of a vector */
    int rows, columns;                     /* of a full tile across; its columns are 3 vectors */
    int along_rows, along_columns;         /* of a full tile along */
    across_loop *across[TILE_ROWS + 1][4]; /* [rows][vectors]; rows of `out` have TILE_COLUMNS */
    along_loop *along[5][7];               /* [rows][columns] */
} tiling;

/* The tiling for this processor. */
const tiling *reproml_tiling(void);

/* The partial sums of `along` added up: out[i] of n sums, in a tree. */
static inline void fold(const double *restrict sums, int n, int lanes, double *restrict out) {
    if (lanes == 8) { /* in halves, which become vector operations */
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

/* The sum of squares of n numbers, `stride` elements apart. */
double reproml_squares(const float *x, integer n, integer stride);

/* gamma of a sum whose tree of additions has this height, with room for the bias and for the test's own roundings. */
static inline double relative_bound(double height) {
    double g = height + 8;
    return g * U / (1 - g * U) * SLACK;
}

/* Round a tile of sums to binary32: what each exact sum lies within row_bound[i] * column_bound[j] of, with
   the bias of its row or column (either may be null) as one more term; g: the relative bound of a sum.
   sums: rows of TILE_COLUMNS. out: [m][n] with `stride` elements between rows. Returns how many elements are not sure; their
   row * TILE_COLUMNS + column is in `unsure`. The test compares bit patterns, so that not even the sign of a
   zero comes from a sum. */
int reproml_round_tile(const double *sums, int m, int n, double g, const double *row_bound, const double *column_bound,
                       const float *row_bias, const float *column_bias, float *out, integer stride, int *unsure);

/* Round a sum of n terms, each given to add_exact; 0 if it is not sure. Sure wherever no rounding happened: of ties
   and zeros of whole numbers. */
static inline int settle_sum(const compensated *sum, integer n, float *result) {
    return settle_pair(sum->s, sum->t, sum->size * ((double)n + 4) * U * SLACK, result);
}

#endif
