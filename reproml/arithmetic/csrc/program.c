/* Interprets the compiled formulas of compiler/: a program of few, simple instructions on registers of `block`
   numbers, which stay in the first-level cache. Each instruction is one loop over its registers.

   An elementwise formula runs block by block. For a formula over rows, several short rows fill a block and the
   program runs straight through; a row longer than a block takes one pass for each stage of reductions (sum, max),
   and each pass recalculates what it needs. Numbers that belong to an entire row have registers too, one number for
   each row. The threads share the blocks of a single long row, such as a loss.

   The elements of an elementwise formula that fail the rounding test take the second one at once (pair_program.c). */

#include "elementary.h"
#include "pair_program.h"
#include "rows.h"

/* What is a result without another path: nothing; what is infinite or NaN; only NaNs that come from NaNs. */
enum { NO_LIMITS, ALL_LIMITS, NAN_OF_OPERANDS };

enum { SCRATCH = 8192, LONGEST = 256, LANES = 16, REDUCTIONS = 16 };

/* In the order of compiler/assembler.py. An instruction is encoded as 4 * operation + form; the form states which of
   its operands are constants. */
enum {
    LOAD32,
    LOAD64,
    EXPAND,
    SUM,
    MAX,
    ROUND,
    ADD,
    SUB,
    MUL,
    DIV,
    LT,
    LE,
    EQ,
    AND,
    OR,
    NEG,
    ABS,
    NOT,
    SQRT,
    EXP,
    LOG,
    EXPM1,
    LOG1P,
    SIN,
    COS,
    SINPI,
    COSPI,
    ERF,
    ERFC,
    ERFINV,
    SELECT,
    MULADD,
    ABSMULADD,
    LOST,
    PLUS,
    PLUS_ERROR
};

/* Operands are registers, or constants where negative (~index). by_row: the registers hold one number for each row. */
typedef struct {
    int32_t op, to, a, b, c, by_row;
} instruction;

/* Run code[begin .. body) for each block of a row, then code[body .. end) once. */
typedef struct {
    int32_t begin, body, end;
} stage;

typedef struct {
    integer block, operands, stages, reduces, by_row; /* by_row: one result for each row */
    const double *constants;
    const instruction *straight, *code;
    integer straight_length;
    const stage *stage;
    const pair_program *pairs; /* the same formula for the second test; null if there is none */
} program;

/* A reduction after some blocks of a row: sum + lost is the sum so far. */
typedef struct {
    double sum, lost, largest;
} partial;

typedef struct {
    const program *p;
    integer dims, rows, n;
    const integer *sizes, *strides;
    void *const *pointers;
    integer *failed;
    integer items, tasks, per_block, blocks, shares; /* shares: parts of a single long row */
    integer count[TASKS], start[TASKS];
    int dense[64], limits;
} call;

typedef struct {
    const call *c;
    double *registers;
    partial *partials; /* null: straight through */
    integer row, rows, at, length, count;
    integer *failed;
} state;

/* Returns where a row of an operand starts. */
static inline integer operand_row(const call *c, integer operand, integer row) {
    return row_start(c->dims, c->sizes, c->strides + operand * c->dims, row);
}

/* The sum of x with the errors of all its additions (Ogita, Rump & Oishi, Accurate Sum and Dot Product, SIAM J. Sci.
   Comput. 26(6), 2005): the returned number and what is added to *t. */
INLINE double sum_of(const double *x, integer length, double *t) {
    double part[LANES] = {0}, errors[LANES] = {0}, sum, more;
    integer i = 0;
    for (; i + LANES <= length; i += LANES)
        for (int l = 0; l < LANES; l++) {
            two_sum(part[l], x[i + l], &sum, &more);
            part[l] = sum;
            errors[l] += more;
        }
    for (int l = 0; i + l < length; l++) {
        two_sum(part[l], x[i + l], &sum, &more);
        part[l] = sum;
        errors[l] += more;
    }
    for (int width = LANES / 2; width; width /= 2)
        for (int l = 0; l < width; l++) {
            two_sum(part[l], part[l + width], &sum, &more);
            part[l] = sum;
            errors[l] += errors[l + width] + more;
        }
    *t += errors[0];
    return part[0];
}

INLINE double larger(double x, double y) { return ((x > y) | (x != x)) ? x : y; } /* NaN if either is */

INLINE double largest_of(const double *x, integer length) {
    double part[8];
    for (int t = 0; t < 8; t++) part[t] = -INFINITY;
    integer i = 0;
    for (; i + 8 <= length; i += 8)
        for (int t = 0; t < 8; t++) part[t] = larger(x[i + t], part[t]);
    for (int t = 0; i + t < length; t++) part[t] = larger(x[i + t], part[t]);
    for (int width = 4; width; width /= 2)
        for (int t = 0; t < width; t++) part[t] = larger(part[t + width], part[t]);
    return part[0];
}

static void merge(partial *p, double sum) {
    double more;
    two_sum(p->sum, sum, &p->sum, &more);
    p->lost += more;
}

#define GATHER(type)                                                                                         \
    do {                                                                                                     \
        const type *from = s->c->pointers[j];                                                                \
        if (s->c->dense[j])                                                                                  \
            for (integer i = 0; i < found; i++) x[j][i] = from[first + at[i]];                               \
        else                                                                                                 \
            for (integer i = 0; i < found; i++)                                                              \
                x[j][i] = from[operand_row(s->c, j, s->row + at[i] / each) + (s->at + at[i] % each) * step]; \
    } while (0)

/* Take the second test with all elements of a block that failed the first one and are finite. */
static void test_again(const state *s, const double *mid, integer count, integer first, float *value, int32_t *failed) {
    const pair_program *p = s->c->p->pairs;
    const integer each = count / s->rows;
    double x[PAIR_OPERANDS][PAIR_BLOCK], mids[PAIR_BLOCK];
    float results[PAIR_BLOCK];
    int32_t left[PAIR_BLOCK], at[PAIR_BLOCK] = {0};
    for (integer start = 0; start < count;) {
        integer found = 0;
        for (; start < count && found < PAIR_BLOCK; start++) {
            at[found] = (int32_t)start;
            found += (failed[start] != 0) & (fabs(mid[start]) <= DBL_MAX);
        }
        if (!found) return;
        for (integer j = 0; j < p->operands; j++) {
            const integer step = s->c->strides[(j + 1) * s->c->dims - 1];
            if (p->wide >> j & 1)
                GATHER(double);
            else
                GATHER(float);
        }
        for (integer i = 0; i < found; i++) mids[i] = mid[at[i]];
        reproml_run_pairs(p, found, x, mids, results, left);
        for (integer i = 0; i < found; i++) value[at[i]] = results[i], failed[at[i]] = left[i];
    }
}

/* Returns the number i of a block in an operand. */
#define OPERAND(type, j, i)                                                              \
    ((const type *)                                                                      \
         s->c->pointers[j])[s->c->dense[j] ? first + (i)                                 \
                                           : operand_row(s->c, j, s->row + (i) / each) + \
                                                 (s->at + (i) % each) * s->c->strides[((j) + 1) * s->c->dims - 1]]

/* Pass the NaNs of a block that come from an operand that is NaN. */
static void pass_nan(const state *s, const double *mid, integer count, integer first, int32_t *failed) {
    const integer each = count / s->rows;
    const instruction *end = s->c->p->straight + s->c->p->straight_length;
    for (const instruction *in = s->c->p->straight; in < end; in++)
        for (integer i = 0; i < count && in->op <= 4 * LOAD64; i++)
            if (failed[i] && mid[i] != mid[i]) {
                const double x = in->op == 4 * LOAD64 ? OPERAND(double, in->a, i) : OPERAND(float, in->a, i);
                failed[i] = x == x;
            }
}

/* Round the results of a block, store them and list the failures. */
INLINE void round_results(state *s, const double *mid, double rel, const double *rad, integer step, integer count,
                          integer first, int by_row) {
    const call *call = s->c;
    const integer operand = call->p->operands, stride = call->strides[(operand + 1) * call->dims - 1];
    float *out = call->pointers[operand], value[LONGEST];
    int32_t failed[LONGEST], any = 0;
    const int32_t all = call->limits != ALL_LIMITS;
    for (integer i = 0; i < count; i++) {
        failed[i] = round_ball(mid[i], rel, rad[i * step], &value[i]) & ((fabs(mid[i]) <= DBL_MAX) | all);
        any |= failed[i];
    }
    if (any && call->limits == NAN_OF_OPERANDS) pass_nan(s, mid, count, first, failed);
    if (any && call->p->pairs) test_again(s, mid, count, first, value, failed);
    if (call->dense[operand])
        memcpy(out + first, value, (size_t)count * sizeof *out);
    else if (by_row)
        for (integer i = 0; i < count; i++) out[operand_row(call, operand, s->row + i)] = value[i];
    else
        for (integer i = 0, k = 0; i < s->rows; i++) {
            float *to = out + operand_row(call, operand, s->row + i) + s->at * stride;
            for (integer j = 0; j < count / s->rows; j++) to[j * stride] = value[k++];
        }
    if (any)
        for (integer i = 0; i < count; i++)
            if (failed[i]) s->failed[s->count++] = first + i;
}

#define LOAD(type)                                                                              \
    do {                                                                                        \
        const type *from = s->c->pointers[in->a];                                               \
        if (s->c->dense[in->a]) {                                                               \
            from += s->row * s->c->n + s->at;                                                   \
            for (integer i = 0; i < length; i++) to[i] = from[i];                               \
        } else                                                                                  \
            for (integer r = 0, k = 0; r < s->rows; r++) {                                      \
                integer stride = s->c->strides[(in->a + 1) * s->c->dims - 1];                   \
                const type *row = from + operand_row(s->c, in->a, s->row + r) + s->at * stride; \
                if (stride == 1)                                                                \
                    for (integer i = 0; i < each; i++) to[k++] = row[i];                        \
                else                                                                            \
                    for (integer i = 0; i < each; i++) to[k++] = row[i * stride];               \
            }                                                                                   \
        for (integer i = length; i < count; i++) to[i] = 1;                                     \
    } while (0)

#define EACH for (integer i = 0; i < count; i++)
#define UNARY(OP, VALUE)           \
    case 4 * OP:                   \
        EACH {                     \
            const double x = a[i]; \
            to[i] = VALUE;         \
        }                          \
        break;
#define BINARY(OP, VALUE)                    \
    case 4 * OP:                             \
        EACH {                               \
            const double x = a[i], y = b[i]; \
            to[i] = VALUE;                   \
        }                                    \
        break;                               \
    case 4 * OP + 1: {                       \
        const double x = *a;                 \
        EACH {                               \
            const double y = b[i];           \
            to[i] = VALUE;                   \
        }                                    \
    } break;                                 \
    case 4 * OP + 2: {                       \
        const double y = *b;                 \
        EACH {                               \
            const double x = a[i];           \
            to[i] = VALUE;                   \
        }                                    \
    } break;
/* x, y and z are the operands a, b and c; b or c may be a constant. */
#define TERNARY_FORM(FORM, OP, Y, Z, VALUE)      \
    case 4 * OP + FORM: {                        \
        const double y0 = *b, z0 = *c;           \
        EACH {                                   \
            const double x = a[i], y = Y, z = Z; \
            to[i] = VALUE;                       \
        }                                        \
        (void)y0, (void)z0;                      \
    } break;
#define TERNARY(OP, VALUE)                 \
    TERNARY_FORM(0, OP, b[i], c[i], VALUE) \
    TERNARY_FORM(1, OP, y0, c[i], VALUE)   \
    TERNARY_FORM(2, OP, b[i], z0, VALUE)   \
    TERNARY_FORM(3, OP, y0, z0, VALUE)

/* The rounding error of x + y. */
INLINE double lost(double x, double y) {
    double s, t;
    two_sum(x, y, &s, &t);
    return t;
}

/* Binary64.plus: whether s is a midpoint of two binary32 numbers that may move to the side of its rounding error t. */
INLINE int may_leave_midpoint(double s, double t, double e) {
    return ((pattern(s) & 0x1FFFFFFF) == 0x10000000) & (fabs(t) > e) & (fabs(t) > 0x1p-900 * fabs(s));
}

/* The binary64 number beside s in the direction of t. */
INLINE double next_toward(double s, double t) { return from_pattern(pattern(s) + ((t > 0) == (s > 0) ? 1 : -1)); }

VECTORISED static void run_instructions(state *restrict s, const instruction *in, const instruction *end) {
    const integer block = s->c->p->block;
    double *const registers = s->registers;
    const double *const constants = s->c->p->constants;
    for (; in < end; in++) {
        const integer length = in->by_row ? s->rows : s->length, count = (length + 7) & ~(integer)7;
        const integer each = s->length / s->rows;
        double *restrict const to = registers + in->to * block;
        const double *restrict const a = in->a < 0 ? constants + ~in->a : registers + in->a * block;
        const double *restrict const b = in->b < 0 ? constants + ~in->b : registers + in->b * block;
        const double *restrict const c = in->c < 0 ? constants + ~in->c : registers + in->c * block;
        switch (in->op) {
        case 4 * LOAD32: LOAD(float); break;
        case 4 * LOAD64: LOAD(double); break;
        case 4 * EXPAND:
            if (s->rows == 1) {
                const double x = *a;
                EACH to[i] = x;
            } else
                for (integer r = 0, k = 0; r < s->rows; r++)
                    for (integer i = 0; i < each; i++) to[k++] = a[r];
            break;
        case 4 * SUM:
            if (s->partials)
                merge(&s->partials[in->b], sum_of(a, s->length, &s->partials[in->b].lost));
            else
                for (integer r = 0; r < s->rows; r++) {
                    double t = 0, sum = sum_of(a + r * each, each, &t);
                    to[r] = sum + t;
                }
            break;
        case 4 * MAX:
            if (s->partials) {
                partial *p = &s->partials[in->b];
                p->largest = larger(largest_of(a, s->length), p->largest);
            } else
                for (integer r = 0; r < s->rows; r++) to[r] = largest_of(a + r * each, each);
            break;
        case 4 * ROUND:
            round_results(s, a, *b, c, 1, length, in->by_row ? s->row : s->row * s->c->n + s->at, in->by_row);
            break;
        case 4 * ROUND + 2:
            round_results(s, a, *b, c, 0, length, in->by_row ? s->row : s->row * s->c->n + s->at, in->by_row);
            break;
            BINARY(ADD, x + y)
            BINARY(SUB, x - y)
            BINARY(MUL, x * y)
            BINARY(DIV, x / y)
            BINARY(LT, x < y ? 1.0 : 0.0)
            BINARY(LE, x <= y ? 1.0 : 0.0)
            BINARY(EQ, x == y ? 1.0 : 0.0)
            BINARY(AND, x * y)
            BINARY(OR, x > y ? x : y)
            UNARY(NEG, -x)
            UNARY(ABS, fabs(x))
            UNARY(NOT, 1 - x)
            UNARY(SQRT, sqrt(x))
            UNARY(EXP, exp_(x))
            UNARY(LOG, log_(x))
            UNARY(EXPM1, expm1_(x))
            UNARY(LOG1P, log1p_(x))
            UNARY(SIN, sin_(x))
            UNARY(COS, cos_(x))
            UNARY(SINPI, sinpi_(x))
            UNARY(COSPI, cospi_(x))
            UNARY(ERF, erf_(x))
            UNARY(ERFC, erfc_(x))
            UNARY(ERFINV, erfinv_(x))
            TERNARY(SELECT, x != 0 ? y : z)
            TERNARY(MULADD, x * y + z)
            TERNARY(ABSMULADD, fabs(x) * y + z)
            BINARY(LOST, lost(x, y))
            TERNARY(PLUS, may_leave_midpoint(x, y, z) ? next_toward(x, y) : x)
            TERNARY(PLUS_ERROR, may_leave_midpoint(x, y, z) ? 0.0 : fabs(y) + z)
        }
    }
}

static void run_straight(state *s, integer row) {
    const call *c = s->c;
    const program *p = c->p;
    s->row = row, s->at = 0, s->partials = 0;
    s->rows = c->rows - row < c->per_block ? c->rows - row : c->per_block;
    s->length = s->rows * c->n;
    run_instructions(s, p->straight, p->straight + p->straight_length);
}

static void run_block(state *s, const stage *t, integer row, integer block) {
    const call *c = s->c;
    s->row = row, s->rows = 1, s->at = block * c->p->block;
    s->length = c->n - s->at < c->p->block ? c->n - s->at : c->p->block;
    run_instructions(s, c->p->code + t->begin, c->p->code + t->body);
}

static void reset(partial *partials) {
    for (int i = 0; i < REDUCTIONS; i++) partials[i] = (partial){0, 0, -INFINITY};
}

/* A pass over the blocks of a row by several threads, each with registers and partial results of its own. */
typedef struct {
    state *s;
    const stage *stage;
    integer row, count[TASKS], start[TASKS];
    partial partials[TASKS][REDUCTIONS];
} pass;

static void run_share(integer share, void *data) {
    pass *x = data;
    const call *c = x->s->c;
    const integer first = c->blocks * share / c->shares, last = c->blocks * (share + 1) / c->shares;
    double registers[SCRATCH] __attribute__((aligned(64)));
    state s = *x->s;
    memcpy(registers, s.registers, sizeof registers);
    reset(x->partials[share]);
    x->start[share] = c->p->by_row ? 0 : first * c->p->block; /* one result is not rounded by blocks */
    s.registers = registers, s.partials = x->partials[share], s.count = 0, s.failed += x->start[share];
    for (integer block = first; block < last; block++) run_block(&s, x->stage, x->row, block);
    x->count[share] = s.count;
}

static void run_shares(state *s, const stage *stage, integer row, partial *partials) {
    pass x = {.s = s, .stage = stage, .row = row};
    reproml_parallel(run_share, &x, s->c->shares);
    s->count += join_failures(s->failed, x.start, x.count, s->c->shares);
    for (integer share = 0; share < s->c->shares; share++)
        for (int i = 0; i < REDUCTIONS; i++) {
            const partial *part = &x.partials[share][i];
            merge(&partials[i], part->sum);
            partials[i].lost += part->lost;
            partials[i].largest = larger(part->largest, partials[i].largest);
        }
}

static void run_stages(state *s, integer row) {
    const program *p = s->c->p;
    partial partials[REDUCTIONS];
    for (const stage *t = p->stage; t < p->stage + p->stages; t++) {
        reset(partials);
        s->partials = partials;
        if (t->begin < t->body && s->c->shares > 1)
            run_shares(s, t, row, partials);
        else
            for (integer block = 0; t->begin < t->body && block < s->c->blocks; block++) run_block(s, t, row, block);
        for (const instruction *in = p->code + t->begin; in < p->code + t->body; in++)
            if (in->op == 4 * SUM || in->op == 4 * MAX)
                s->registers[in->to * p->block] =
                    in->op == 4 * SUM ? partials[in->b].sum + partials[in->b].lost : partials[in->b].largest;
        s->partials = 0, s->row = row, s->rows = s->length = 1;
        run_instructions(s, p->code + t->body, p->code + t->end);
    }
}

/* An item is a block of short rows, a block of a long row, or, if the program has reductions, a long row. */
static void run_items(integer task, void *data) {
    call *c = data;
    double registers[SCRATCH] __attribute__((aligned(64)));
    const integer first = c->items * task / c->tasks, last = c->items * (task + 1) / c->tasks;
    state s = {.c = c, .registers = registers, .count = 0};
    integer start = first * c->per_block * (c->p->by_row ? 1 : c->n);
    if (c->blocks > 1 && !c->p->reduces) start = first / c->blocks * c->n + first % c->blocks * c->p->block;
    s.failed = c->failed + start;
    for (integer item = first; item < last; item++) {
        if (c->blocks == 1)
            run_straight(&s, item * c->per_block);
        else if (c->p->reduces)
            run_stages(&s, item);
        else
            run_block(&s, c->p->stage, item / c->blocks, item % c->blocks);
    }
    c->start[task] = start;
    c->count[task] = s.count;
}

/* Run a program on operands of `sizes` with `strides` [operands + 1][dims], in elements; the last of the pointers
   and of the strides are those of the result. Rows lie along the last dimension. Returns the number of results for
   which the rounding test failed; their flat indices, counted along the sizes, are in `failed`. limits: which results
   that are infinite or NaN in binary64 pass. */
integer reproml_program(const program *p, integer dims, const integer *sizes, const integer *strides,
                        void *const *pointers, integer *failed, integer tasks, int limits) {
    call c = {
        .limits = limits, .p = p, .dims = dims, .rows = 1, .n = sizes[dims - 1], .sizes = sizes, .strides = strides};
    c.pointers = pointers;
    c.failed = failed;
    for (integer d = 0; d < dims - 1; d++) c.rows *= sizes[d];
    for (integer j = 0; j <= p->operands; j++) {
        c.dense[j] = dense_rows(dims, strides + j * dims, p->by_row && j == p->operands ? 1 : c.n);
    }
    c.blocks = (c.n + p->block - 1) / p->block;
    c.per_block = c.blocks == 1 ? p->block / c.n : 1;
    c.items = c.blocks > 1 && !p->reduces ? c.rows * c.blocks : (c.rows + c.per_block - 1) / c.per_block;
    if (tasks > TASKS) tasks = TASKS;
    c.tasks = tasks < c.items ? tasks : c.items;
    c.shares = c.items > 1 ? 1 : tasks < c.blocks ? tasks : c.blocks;
    reproml_parallel(run_items, &c, c.tasks);
    return join_failures(failed, c.start, c.count, c.tasks);
}
