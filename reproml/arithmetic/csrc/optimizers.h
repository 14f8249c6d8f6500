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

/* Where the test failed, take the numbers of `again` that passed another one. Returns whether any failed that, too. */
static inline int32_t take_passed(rounded *restrict r, const rounded *restrict again, int states, int n) {
    int32_t any = 0;
    for (int i = 0; i < n; i++) {
        if (!r->failed[i]) continue;
        for (int s = 0; s < states; s++) r->value[s][i] = again->value[s][i];
        any |= r->failed[i] = again->failed[i];
    }
    return any;
}

/* The second test of a - b, where the bound does not include the rounding of the difference: a parameter of 24 bits minus
   a change of about half its last place lies as close to a midpoint as that. A zero is left, as its sign is not known. */
INLINE int32_t round_difference(double a, double b, double rad, float *result) {
    pair difference = {0, 0, rad};
    two_sum(a, -b, &difference.s, &difference.t);
    return round_pair(difference, result) | (*result == 0);
}

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
