/* Products of matrices that are given by tables of offsets, rounded once: matrices of any strides, the patches of an
   image, the weights of a convolution. Numbers are packed into panels as they are needed, so that no patches are kept
   in memory. */

#ifndef REPROML_PANELS_H
#define REPROML_PANELS_H

#include "tile.h"

#define FEW_LINES 4 /* lines of a for which preparing panels costs more than it saves */

/* Number p of line i is first[line[i] + term[p]]. A line is a row of a or a column of b. */
typedef struct {
    const float *first;
    integer step; /* elements from one product of the batch to the next */
    const integer *line, *term;
} operand;

/* All panels of an operand b that several products share, [column panels, k, pitch], and the norms of its lines. */
typedef struct {
    float *panels;
    double *norms;
} packed;

typedef struct {
    integer batch, m, n, k; /* k may be 0 */
    operand a, b;
    const packed *kept; /* the panels of b, or null; set before reproml_plan */
    float *out;         /* element i, j is out[row[i] + column[j]] */
    integer out_step;
    const integer *row, *column;
    const float *row_bias, *column_bias; /* of each row or column, or null */
    integer bias_step;
    const float *added;   /* to each element, at the same offset as in `out`, or null */
    failure_list *failed; /* offsets in `out` */
    /* Set by reproml_plan. */
    const tiling *tiles;
    integer row_panels, column_panels, block, workers; /* block: row panels that are prepared at once */
    integer sections, length;                          /* terms of a section */
    int columns, pitch, by_item;                       /* by_item: each worker multiplies matrices of its own */
    int a_contiguous, b_contiguous;                    /* the terms of each line */
    int single;                                        /* blocks of terms are summed in binary32 */
} product;

/* Choose how to calculate a product. Returns the bytes of memory that it needs. */
size_t reproml_plan(product *x);

/* Pack b of a product without a batch into the panels of `kept`, which is then multiplied in place of b. */
void reproml_pack(const product *x);

/* Calculate it; `memory` is aligned to 8 bytes. Returns 0 if an operand, other than `kept`, has a NaN or an infinity;
   the result is then that of IEEE arithmetic in any order. */
int reproml_multiply(const product *x, void *memory);

#endif
