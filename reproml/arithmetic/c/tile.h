/* The innermost loops of products and convolutions: a tile of sums of products, held in registers.

   Numbers are widened as they are loaded. A product of two binary32 numbers is exact in binary64, so fused
   multiply-adds (the compiler's contraction makes them) give the same bits as separate ones. */

#ifndef REPROML_TILE_H
#define REPROML_TILE_H

#include "common.h"

#define TILE_ROWS 8 /* at most, on any processor */
#define TILE_COLUMNS 24

/* out[i][j] = sum over p < k of a[p][i] * b[offset[p] + j], a [k, m]: vectors lie across the columns. A row of
   b may start anywhere, so that one loop serves a matrix and the shifted rows of an image. */
typedef void across_loop(integer k, const double *a, const float *b, const integer *offset, double *out);

/* out[i][j] = sum over p < k of a[a_offset[i] + p] * b[b_offset[j] + p]: vectors lie along the terms. */
typedef void along_loop(integer k, const float *a, const integer *a_offset, const float *b,
                        const integer *b_offset, double *out);

typedef struct {
    int lanes;                                   /* doubles of a vector */
    int rows, columns;                           /* of a full tile across; its columns are 3 vectors */
    int along_rows, along_columns;               /* of a full tile along */
    across_loop *across[TILE_ROWS + 1][4];       /* [rows][vectors]; rows of `out` have TILE_COLUMNS */
    along_loop *along[5][7];                     /* [rows][columns]; likewise */
} tiling;

/* The tiling for this processor. */
const tiling *reproml_tiling(void);

/* Round a tile of sums to binary32: what each exact sum lies within row_bound[i] * column_bound[j] of, with
   the bias of its row or column (either may be null) as one more term; g: the relative bound of a sum.
   sums: rows of TILE_COLUMNS. out: [m][n] with `stride` elements between rows. Returns how many elements are not sure; their
   row * TILE_COLUMNS + column is in `unsure`. The test compares bit patterns, so that not even the sign of a
   zero comes from a sum. */
int reproml_round_tile(const double *sums, int m, int n, double g, const double *row_bound,
                       const double *column_bound, const float *row_bias, const float *column_bias,
                       float *out, integer stride, int *unsure);

/* A sum of products of binary32 numbers with what its roundings lost (Ogita, Rump & Oishi, SIAM Journal on
   Scientific Computing 26(6), 2005, Sum2): the exact sum is within gamma(terms) * size of sum + lost. */
typedef struct {
    double sum, lost, size;
    integer terms;
} long_sum;

static inline void add_term(long_sum *s, double term) {
    double t;
    two_sum(s->sum, term, &s->sum, &t);
    s->lost += t;
    s->size += fabs(t);
    s->terms++;
}

/* Round it; 0 if it is not sure. Exact wherever no rounding happened: ties and zeros of whole numbers. */
static inline int settle_long_sum(const long_sum *s, float *result) {
    return settle_pair(s->sum, s->lost, (s->terms + 3) * 1.01 * U * s->size, result);
}

#endif
