/* Formulas in pairs of binary64 numbers: the second test of what a program left (program.c). */

#ifndef REPROML_PAIR_PROGRAM_H
#define REPROML_PAIR_PROGRAM_H

#include "rounding.h"

enum { PAIR_BLOCK = 64, PAIR_REGISTERS = 64, PAIR_OPERANDS = 8 };

/* Operands are registers: first those of the formula, then the constants, then one for each instruction. */
typedef struct {
    int32_t op, a, b, c;
} pair_instruction;

typedef struct {
    integer operands, constants, length;
    integer wide; /* bit j: operand j is binary64 */
    const pair *constant;
    const pair_instruction *code;
} pair_program;

/* Evaluate a formula on `count` <= PAIR_BLOCK elements, whose operands are in x. mid: what binary64 gave for each, of
   which only the sign of a zero counts. Stores the rounded numbers in `value`, and in `failed` whether the test
   failed. */
void reproml_run_pairs(const pair_program *p, integer count, double (*x)[PAIR_BLOCK], const double *mid, float *value,
                       int32_t *failed);

/* Round the sum of a formula's values over n elements, divided by `divisor`. The operands lie densely. Returns 0 if the
   test fails. */
int reproml_pair_sum(const pair_program *p, integer n, const void *const *operands, double divisor, float *out);

#endif
