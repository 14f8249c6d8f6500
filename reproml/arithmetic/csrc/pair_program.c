/* Interprets formulas in pairs of binary64 numbers, which have about 100 bits. Elements that the first test left in
   masses are ties, numbers beside a midpoint, and results whose bits lie far apart, such as x / 2 + x^2 / 6 for a
   subnormal x. So each bound is relative to the small part of a pair, and 0 if nothing was rounded.

   Bounds are sums and products of nonnegative numbers, whose own roundings SLACK covers. Where a step may underflow, its
   bound is at least TINY. Results whose small part is below 2^-900 of the large one are left to the exact path, for
   which such a term may count as zero (docs/contract.md). */

#include "pair_program.h"
#include "pair_functions.h"

/* In the order of compiler/pair_program.py. The second letters state which operands are single numbers, exact. */
enum {
    ADD,
    ADD1,
    ADD11,
    MUL,
    MUL1,
    MUL11,
    DIV,
    DIV1,
    NEG,
    ABS,
    SQRT,
    EXP,
    EXPM1,
    LOG,
    LOG1P,
    SIN,
    COS,
    SINPI,
    COSPI,
    ATAN,
    ERF,
    ERFC,
    ERFINV,
    LT,
    EQ,
    SELECT
};

typedef struct {
    double s[PAIR_BLOCK], t[PAIR_BLOCK], rad[PAIR_BLOCK];
} pairs;

#define EACH for (integer i = 0; i < count; i++)

static void fill(pairs *to, pair p) {
    for (integer i = 0; i < PAIR_BLOCK; i++) to->s[i] = p.s, to->t[i] = p.t, to->rad[i] = p.rad;
}

INLINE pair get(const pairs *x, integer i) { return (pair){x->s[i], x->t[i], x->rad[i]}; }

INLINE pair get_without_bound(const pairs *x, integer i) { return (pair){x->s[i], x->t[i], 0}; }

INLINE void set(pairs *x, integer i, pair y) { x->s[i] = y.s, x->t[i] = y.t, x->rad[i] = y.rad; }

/* ---- functions of many steps, each compiled once ---- */

/* sin and cos of x, or of pi x. */
VECTORISED static void turn(const pairs *restrict a, pairs *restrict sine, pairs *restrict cosine, integer count,
                            int of_pi) {
    pairs r;
    double k[PAIR_BLOCK];
    EACH {
        const pair p = get(a, i);
        pair rest;
        if (of_pi) {
            k[i] = rint(clamp(p.s, -0x1p49, 0x1p49) * 2);
            rest = mul(add1(p, -0.5 * k[i]), PI);
        } else
            rest = without_turns(p, &k[i]);
        set(&r, i, rest);
    }
    EACH {
        pair s, c;
        turned(get(&r, i), k[i], &s, &c);
        set(sine, i, s), set(cosine, i, c);
    }
}

/* atan(x) = y + atan(w), w = (x cos y - sin y) / (cos y + x sin y), where y is about atan(x), so that w is small;
   atan(w) = w - w^3 / 3 + ... */
VECTORISED static void arctangent(const pairs *restrict a, pairs *restrict to, integer count) {
    pairs near, sine, cosine;
    fill(&near, single(0));
    EACH near.s[i] = atan(a->s[i]);
    turn(&near, &sine, &cosine, count, 0);
    EACH {
        const pair p = get(a, i), s = get(&sine, i), c = get(&cosine, i);
        const pair w = divide(add(mul(p, c), negative(s)), add(mul(p, s), c)), y = add1(w, near.s[i]);
        const double size = fabs(w.s) + fabs(w.t) + w.rad;
        set(to, i, (pair){y.s, y.t, size < 0x1p-20 ? y.rad + size * size * size : INFINITY});
    }
}

static const pair TWO_BY_ROOT_PI = {0x1.20dd750429b6dp+0, 0x1.1ae3a914fed80p-56, 0x1p-109};
#define SERIES_END 3.0 /* erf has a series below, erfc a continued fraction from there on */

/* y with erf(x) = 2 / sqrt(pi) x exp(-x^2) y and y = 1 + z / 3 (1 + z / 5 (1 + ...)), z = 2 x^2 (NIST Digital Library of
   Mathematical Functions, 7.6.2). Below 3 the terms from z^63 on are less than 2^-103 of the sum. Those from z^42 on,
   less than 2^-50 of it, have one double each. */
VECTORISED static void erf_series(const pairs *restrict z, pairs *restrict y, integer count) {
    EACH y->s[i] = 1, y->t[i] = 0;
    for (int n = 62; n > 42; n--) {
        const double c = 1.0 / (2 * n + 1);
        EACH y->s[i] = 1 + z->s[i] * c * y->s[i];
    }
    for (int n = 42; n > 0; n--) {
        const double d = 2 * n + 1, high = 1 / d;
        const pair c = {high, fma(-high, d, 1.0) / d, 0};
        EACH {
            const pair term = light_mul(light_mul(get_without_bound(z, i), c), get_without_bound(y, i));
            set(y, i, light_add(single(1), term));
        }
    }
}

/* y with erfc(x) = exp(-x^2) / (sqrt(pi) y) and y = x + 1/2 / (x + 2/2 / (x + 3/2 / (x + ...))) (Abramowitz & Stegun,
   Handbook of Mathematical Functions, 7.1.14). From 3 on, 90 steps leave less than 2^-101 of y, as successive convergents
   enclose it; what precedes the last 25 counts for less than 2^-47 and has one double each. */
VECTORISED static void erfc_fraction(const pairs *restrict x, pairs *restrict y, integer count) {
    EACH y->s[i] = x->s[i], y->t[i] = 0;
    for (int n = 90; n > 25; n--) EACH y->s[i] = x->s[i] + 0.5 * n / y->s[i];
    for (int n = 25; n > 0; n--) EACH {
            const double d = y->s[i], high = 0.5 * n / d, rest = fma(-high, d, 0.5 * n) - high * y->t[i];
            set(y, i, light_add(get_without_bound(x, i), quick_pair(high, rest / d, 0)));
        }
}

/* erf and erfc. The slope is 2 / sqrt(pi) exp(-x^2). Beyond 40 the value at 40, where exp(-x^2) is 0 within 2^-864, has
   the same bound. */
VECTORISED static void error_functions(const pairs *restrict a, pairs *restrict erf_of, pairs *restrict erfc_of,
                                       integer count) {
    pairs x, z, series, fraction;
    int any_below = 0, any_above = 0;
    fill(&series, single(1));
    fill(&fraction, single(1));
    EACH {
        const pair size = absolute(get_without_bound(a, i)), p = select(size.s < 40, size, single(40));
        const pair square = light_mul(p, p);
        any_below |= p.s < SERIES_END, any_above |= p.s >= SERIES_END;
        set(&x, i, p), set(&z, i, (pair){2 * square.s, 2 * square.t, 0});
    }
    if (any_below) erf_series(&z, &series, count);
    if (any_above) erfc_fraction(&x, &fraction, count);
    EACH {
        const pair p = get(&x, i), e = mul(exponential(negative(mul(p, p)), 0), TWO_BY_ROOT_PI);
        const pair sum = {series.s[i], series.t[i], FUNCTION_ERROR * series.s[i]};
        const pair quotient = divide(e, (pair){fraction.s[i], fraction.t[i], FUNCTION_ERROR * fraction.s[i]});
        const pair of_below = mul(mul(e, sum), p), of_above = {quotient.s / 2, quotient.t / 2, quotient.rad / 2};
        const int below = p.s < SERIES_END, minus = a->s[i] < 0;
        pair y = select(below, of_below, add1(negative(of_above), 1));
        pair c = select(below, add1(negative(of_below), 1), of_above);
        y = select(minus, negative(y), y);
        c = select(minus, add1(negative(c), 2), c);
        const double rad = a->rad[i] * 1.25 * (fabs(e.s) + e.rad);
        const double more = a->rad[i] * (1 + fabs(a->s[i])) < 0x1p-10 ? rad : INFINITY;
        y.rad += more, c.rad += more;
        set(erf_of, i, y), set(erfc_of, i, c);
    }
}

/* erfinv(p) = y + d + y d^2 + ..., where y is about erfinv(p) and d = (p - erf(y)) sqrt(pi) / 2 exp(y^2). The third
   derivative of erfinv is (2 + 8 y^2) erfinv'^3, so the rest is below (1 + 2 y^2) |d|^3; twice that is taken, as the
   derivatives change on the way. From 1/2 on, p and erf(y) are subtracted from 1 first. */
VECTORISED static void inverse_error_function(const pairs *restrict a, pairs *restrict to, integer count) {
    pairs near, below, above;
    fill(&near, single(0));
    EACH near.s[i] = erfinv_(fabs(a->s[i]));
    error_functions(&near, &below, &above, count);
    EACH {
        const double y = near.s[i];
        const pair p = absolute(get(a, i));
        const pair rest = select(p.s < 0.5, add(p, negative(get(&below, i))), add(add1(p, -1), get(&above, i)));
        const pair d = mul(divide(rest, TWO_BY_ROOT_PI), exponential(mul11(y, y), 0));
        const pair z = add1(add(d, mul1(mul(d, d), y)), y);
        const double size = fabs(d.s) + fabs(d.t) + d.rad, last = (2 + 4 * y * y) * (size * size * size);
        const double sign = a->s[i] < 0 ? -1 : 1;
        set(to, i, (pair){sign * z.s, sign * z.t, size < 0x1p-30 ? z.rad + last : INFINITY});
    }
}

/* ---- the interpreter ---- */

#define P get(a, i)
#define Q get(b, i)
#define R get(c, i)
#define STORE(VALUE) EACH set(to, i, VALUE);
#define CASE(OP, VALUE) \
    case OP: STORE(VALUE) break;
#define FUNCTION(OP, NAME)      \
    case OP:                    \
        if (are_tiny(a, count)) \
            STORE(NAME(P, 1))   \
        else                    \
            STORE(NAME(P, 0))   \
        break;

INLINE int are_tiny(const pairs *x, integer count) {
    int all = 1;
    EACH all &= fabs(x->s[i]) <= TINY_ARGUMENT;
    return all;
}

VECTORISED static void run_pair_instructions(const pair_program *p, pairs *restrict registers, integer count) {
    pairs other; /* what is computed as well */
    for (integer j = 0; j < p->length; j++) {
        const pair_instruction *in = p->code + j;
        pairs *restrict const to = registers + p->operands + p->constants + j;
        const pairs *restrict const a = registers + in->a, *restrict const b = registers + in->b;
        const pairs *restrict const c = registers + in->c;
        switch (in->op) {
            CASE(ADD, add(P, Q))
            CASE(ADD1, add1(P, b->s[i]))
            CASE(ADD11, full_pair(a->s[i], b->s[i], 0))
            CASE(MUL, mul(P, Q))
            CASE(MUL1, mul1(P, b->s[i]))
            CASE(MUL11, mul11(a->s[i], b->s[i]))
            CASE(DIV, divide(P, Q))
            CASE(DIV1, divide1(P, b->s[i]))
            CASE(NEG, negative(P))
            CASE(ABS, absolute(P))
            CASE(SQRT, square_root(P))
            FUNCTION(EXP, exponential)
            FUNCTION(EXPM1, exponential_less_1)
            CASE(LOG, logarithm(P, 0))
            FUNCTION(LOG1P, logarithm_of_1_plus)
        case SIN: turn(a, to, &other, count, 0); break;
        case COS: turn(a, &other, to, count, 0); break;
        case SINPI: turn(a, to, &other, count, 1); break;
        case COSPI: turn(a, &other, to, count, 1); break;
        case ATAN: arctangent(a, to, count); break;
        case ERF: error_functions(a, to, &other, count); break;
        case ERFC: error_functions(a, &other, to, count); break;
        case ERFINV:
            inverse_error_function(a, to, count);
            break;
            CASE(LT, single(less_than_zero(P)))
            CASE(EQ, single(equals_zero(P)))
            CASE(SELECT, select(a->s[i], Q, R))
        }
    }
}

/* Ends that are rounded to odd, as in round_pair. A zero is +0 unless binary64 gave a zero, too, which then has the sign
   of IEEE arithmetic, step by step (compiler/evaluate.py). */
VECTORISED static void round_all(const pairs *restrict y, integer count, const double *restrict mid, float *value,
                                 int32_t *failed) {
    EACH {
        const double s = y->s[i], t = y->t[i], rad = y->rad[i] * SLACK + fabs(t) * (2 * U);
        const float low = to_target(add_to_odd(s, t - rad) + 0.0), high = to_target(add_to_odd(s, t + rad) + 0.0);
        const int far_apart = (t != 0) & (fabs(t) < LEAST * fabs(s));
        failed[i] = (patterns_differ(low, high) != 0) | !(fabs(s) + fabs(t) + rad <= DBL_MAX) | far_apart;
        value[i] = ((bits(high) == 0) & (mid[i] == 0)) ? to_target(mid[i]) : high;
    }
}

void reproml_run_pairs(const pair_program *p, integer count, double (*x)[PAIR_BLOCK], const double *mid, float *value,
                       int32_t *failed) {
    pairs registers[PAIR_REGISTERS] __attribute__((aligned(64)));
    const integer full = (count + 7) & ~(integer)7;
    for (integer j = 0; j < p->operands; j++) {
        fill(registers + j, single(1));
        memcpy(registers[j].s, x[j], (size_t)count * sizeof **x);
    }
    for (integer j = 0; j < p->constants; j++) fill(registers + p->operands + j, p->constant[j]);
    run_pair_instructions(p, registers, full);
    round_all(registers + p->operands + p->constants + p->length - 1, count, mid, value, failed);
    for (integer j = 0; j < p->operands; j++)
        for (integer i = 0; i < count; i++) failed[i] |= !(fabs(x[j][i]) <= DBL_MAX);
}

#define WIDEN(type) \
    for (integer i = 0; i < found; i++) registers[j].s[i] = ((const type *)operands[j])[at + i]

VECTORISED static void add_all(pairs *restrict sums, const pairs *restrict y, integer count) {
    EACH {
        const pair z = add((pair){sums->s[i], sums->t[i], sums->rad[i]}, (pair){y->s[i], y->t[i], y->rad[i]});
        sums->s[i] = z.s, sums->t[i] = z.t, sums->rad[i] = z.rad;
    }
}

int reproml_pair_sum(const pair_program *p, integer n, const void *const *operands, double divisor, float *out) {
    pairs registers[PAIR_REGISTERS] __attribute__((aligned(64))), sums;
    fill(&sums, single(0));
    for (integer j = 0; j < p->constants; j++) fill(registers + p->operands + j, p->constant[j]);
    for (integer at = 0; at < n; at += PAIR_BLOCK) {
        const integer found = n - at < PAIR_BLOCK ? n - at : PAIR_BLOCK;
        for (integer j = 0; j < p->operands; j++) {
            fill(registers + j, single(1));
            if (p->wide >> j & 1)
                WIDEN(double);
            else
                WIDEN(float);
            for (integer i = 0; i < found; i++)
                if (!(fabs(registers[j].s[i]) <= DBL_MAX)) return 0;
        }
        run_pair_instructions(p, registers, (found + 7) & ~(integer)7);
        add_all(&sums, registers + p->operands + p->constants + p->length - 1, found);
    }
    pair total = single(0);
    for (integer i = 0; i < PAIR_BLOCK; i++) total = add(total, (pair){sums.s[i], sums.t[i], sums.rad[i]});
    total = divide1(total, divisor);
    const int far_apart = (total.t != 0) & (fabs(total.t) < LEAST * fabs(total.s));
    return !round_pair(total, out) & !far_apart;
}

/* ---- results that are rounded to binary64 (compiler/pair_arrays.py) ---- */

enum { ELEMENTS_OF_TASK = 64 * PAIR_BLOCK };

typedef struct {
    const pair_program *program;
    integer n;
    const double *const *x; /* s, t and rad of each operand; for a program only s */
    const integer *steps;   /* of each operand: 1, or 0 for one number */
    double *const *out;     /* s, t and rad */
} pair_arrays;

static void load(double *to, const double *from, integer step, integer count) {
    for (integer i = 0; i < count; i++) to[i] = from[i * step];
}

/* Round s + t to binary64. A bound of 0 rounds by IEEE arithmetic; a failure has the bound INFINITY. */
VECTORISED static void round_to_binary64(pairs *y, integer count) {
    EACH {
        const double s = y->s[i], t = y->t[i], rad = y->rad[i] == 0 ? 0 : y->rad[i] * SLACK + fabs(t) * (2 * U);
        const double low = s + (t - rad), high = s + (t + rad);
        const int far_apart = (t != 0) & (fabs(t) < LEAST * fabs(s));
        y->s[i] = high;
        y->rad[i] = ((low == high) & (fabs(high) <= DBL_MAX) & (rad <= DBL_MAX) & !far_apart) ? 0 : INFINITY;
    }
}

static void run_arrays(integer task, void *data) {
    const pair_arrays *c = data;
    const pair_program *p = c->program;
    pairs registers[PAIR_REGISTERS] __attribute__((aligned(64)));
    const integer end = (task + 1) * ELEMENTS_OF_TASK < c->n ? (task + 1) * ELEMENTS_OF_TASK : c->n;
    for (integer j = 0; j < p->constants; j++) fill(registers + p->operands + j, p->constant[j]);
    for (integer at = task * ELEMENTS_OF_TASK; at < end; at += PAIR_BLOCK) {
        const integer count = end - at < PAIR_BLOCK ? end - at : PAIR_BLOCK;
        for (integer j = 0; j < p->operands; j++) {
            const integer step = c->steps[j];
            fill(registers + j, single(1));
            if (c->out[1]) {
                load(registers[j].s, c->x[3 * j] + at * step, step, count);
                load(registers[j].t, c->x[3 * j + 1] + at * step, step, count);
                load(registers[j].rad, c->x[3 * j + 2] + at * step, step, count);
            } else {
                load(registers[j].s, c->x[j] + at * step, step, count);
            }
        }
        run_pair_instructions(p, registers, (count + 7) & ~(integer)7);
        pairs *y = registers + p->operands + p->constants + p->length - 1;
        if (!c->out[1]) round_to_binary64(y, PAIR_BLOCK);
        load(c->out[0] + at, y->s, 1, count);
        if (c->out[1]) load(c->out[1] + at, y->t, 1, count);
        load(c->out[2] + at, y->rad, 1, count);
    }
}

/* Run a program on n elements of pairs: x has s, t and rad of each operand, out those of the result. If out[1] is null,
   operands are numbers, and the results are rounded to binary64; out[2] is then 0, or INFINITY where the test failed. */
void reproml_pair_arrays(const pair_program *p, integer n, const double *const *x, const integer *steps,
                         double *const *out) {
    pair_arrays c = {p, n, x, steps, out};
    const integer tasks = (n + ELEMENTS_OF_TASK - 1) / ELEMENTS_OF_TASK;
    run_tasks(run_arrays, &c, tasks, tasks > 1);
}

/* The sum of each row of n pairs. */
void reproml_pair_sums(integer rows, integer n, const double *s, const double *t, const double *rad,
                       double *const *out) {
    for (integer row = 0; row < rows; row++) {
        pair sum = single(0);
        for (integer i = row * n; i < (row + 1) * n; i++) sum = add(sum, (pair){s[i], t[i], rad[i]});
        out[0][row] = sum.s, out[1][row] = sum.t, out[2][row] = sum.rad;
    }
}
