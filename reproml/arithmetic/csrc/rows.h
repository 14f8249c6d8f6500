/* Operands of any layout, taken as rows along their last dimension. */

#ifndef REPROML_ROWS_H
#define REPROML_ROWS_H

#include "common.h"

/* Where a row starts, in elements; sizes and strides: of `dims` dimensions. */
static inline integer row_start(integer dims, const integer *sizes, const integer *strides, integer row) {
    integer start = 0;
    for (integer d = dims - 2; d > 0; d--) {
        start += row % sizes[d] * strides[d];
        row /= sizes[d];
    }
    return dims > 1 ? start + row * strides[0] : 0;
}

/* Whether rows of n elements lie one after the other. */
static inline int dense_rows(integer dims, const integer *strides, integer n) {
    return (n == 1 || strides[dims - 1] == 1) && (dims == 1 || (dims == 2 && strides[0] == n));
}

/* The failures that each task noted from its own place on, moved together. Returns how many there are. */
static inline integer together(integer *failed, const integer *start, const integer *found, integer tasks) {
    integer count = 0;
    for (integer task = 0; task < tasks; task++) {
        memmove(failed + count, failed + start[task], (size_t)found[task] * sizeof *failed);
        count += found[task];
    }
    return count;
}

#endif
