/* Rows of softmax and the like in pairs of binary64 numbers. */

#ifndef REPROML_SOFTMAX_PAIRS_H
#define REPROML_SOFTMAX_PAIRS_H

#include "common.h"

/* The first four as in fast.h. */
enum { PAIRS_SOFTMAX, PAIRS_LOG_SOFTMAX, PAIRS_SOFTMAX_BACKWARD, PAIRS_LOG_SOFTMAX_BACKWARD, PAIRS_LOGSUMEXP };

/* One row of n numbers x, and y for the gradients. `out` has n numbers, or one for logsumexp; failed[i] is nonzero where
   the test fails. Returns the number of failures. */
integer reproml_softmax_row(int which, const float *x, const float *y, integer n, float *out, int32_t *failed);

#endif
