/* The fast loops of elementwise formulas: what other files call. */

#ifndef REPROML_ACTIVATIONS_H
#define REPROML_ACTIVATIONS_H

#include "common.h"

/* In the order of compiler/executor.py. */
enum {
    EXP,
    EXPM1,
    ERFINV,
    TANH,
    SIGMOID,
    SILU,
    GELU,
    GELU_TANH,
    SOFTPLUS,
    LOG_SIGMOID,
    ELU,
    MISH,
    TANH_BACKWARD,
    SIGMOID_BACKWARD,
    SILU_BACKWARD,
    GELU_BACKWARD,
    GELU_TANH_BACKWARD,
    SOFTPLUS_BACKWARD,
    LOG_SIGMOID_BACKWARD,
    ELU_BACKWARD,
    ELU_BACKWARD_OF_RESULT,
    MISH_BACKWARD,
    SOFTMAX,
    LOG_SOFTMAX,
    SOFTMAX_BACKWARD,
    LOG_SOFTMAX_BACKWARD
};

enum { BLOCK = 256 };

#define DENSITY_AT_0 0x1.9884533d43651p-2 /* 1 / sqrt(2 pi), of the normal distribution */

/* activations.c: out[i] = the formula of a[i] and b[i], count <= BLOCK. scalars: three for elu, else null. Returns 0 if
   all elements passed the test; otherwise failed[i] is nonzero for those that failed. */
int32_t reproml_activation_block(int which, const double *scalars, const float *restrict a, const float *restrict b,
                                 float *restrict out, int32_t *restrict failed, integer count);

/* near_zero.c: round those elements that failed and whose series near zero can be rounded. */
void reproml_round_near_zero(int which, const float *a, const float *b, float *out, int32_t *failed, integer count);

#endif
