/* Operands of any layout, taken as rows along their last dimension, and the failures of several tasks. */

#ifndef REPROML_ROWS_H
#define REPROML_ROWS_H

#include "common.h"

enum { TASKS = 64 }; /* the largest number of tasks of one call */

/* Returns where a row starts, in elements. sizes and strides have `dims` dimensions. */
static inline integer row_start(integer dims, const integer *sizes, const integer *strides, integer row) {
    integer start = 0;
    for (integer d = dims - 2; d > 0; d--) {
        start += row % sizes[d] * strides[d];
        row /= sizes[d];
    }
    return dims > 1 ? start + row * strides[0] : 0;
}

/* Returns whether rows of n elements lie one after the other. */
static inline int dense_rows(integer dims, const integer *strides, integer n) {
    return (n == 1 || strides[dims - 1] == 1) && (dims == 1 || (dims == 2 && strides[0] == n));
}

/* Close the gaps in a list of failures of which each task wrote count[task] from start[task] on. Returns their
   number. */
static inline integer join_failures(integer *failed, const integer *start, const integer *count, integer tasks) {
    integer total = 0;
    for (integer task = 0; task < tasks; task++) {
        memmove(failed + total, failed + start[task], (size_t)count[task] * sizeof *failed);
        total += count[task];
    }
    return total;
}

#endif
