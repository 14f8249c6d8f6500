/* What the loops of the optimizers share. */

#ifndef REPROML_OPTIMIZERS_H
#define REPROML_OPTIMIZERS_H

#include "rounding.h"

/* The elements are processed block by block: one loop rounds a block into scratch memory, with a flag for each element
   that failed the test; then the elements that passed are written back. A task is several blocks. */
#define BLOCK 512
#define TASK (8 * BLOCK)
#define STATES 4

typedef struct {
    float value[STATES][BLOCK];
    int32_t failed[BLOCK];
} rounded;

/* at: the low 40 bits hold the first element; the bits above are reported with each failure. */
static inline void write_back(integer at, int n, const rounded *r, float *const *state, int states, int32_t any,
                              failure_list *list) {
    integer first = at & (((integer)1 << 40) - 1);
    for (int s = 0; s < states; s++) {
        if (!any)
            memcpy(state[s] + first, r->value[s], (size_t)n * sizeof(float));
        else
            for (int i = 0; i < n; i++)
                if (!r->failed[i]) state[s][first + i] = r->value[s][i];
    }
    for (int i = 0; any && i < n; i++)
        if (r->failed[i]) add_failure(list, at + i);
}

#endif
