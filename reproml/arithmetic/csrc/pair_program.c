/* Interprets formulas in pairs of binary64 numbers, which have about 100 bits. Elements that the first test left in
   masses are ties, numbers beside a midpoint, and results whose bits lie far apart, such as x / 2 + x^2 / 6 for a
   subnormal x. So each bound is relative to the small part of a pair, and 0 if nothing was rounded.

   Bounds are sums and products of nonnegative numbers, whose own roundings SLACK covers. Where a step may underflow, its
   bound is at least TINY. Results whose small part is below 2^-900 of the large one are left to the exact path, for
   which such a term may count as zero (docs/contract.md). */

#include "pair_program.h"
#include "elementary.h"

/* In the order of compiler/pair_program.py. The second letters state which operands are single numbers, exact. */
enum { ADD, ADD1, ADD11, MUL, MUL1, MUL11, DIV, DIV1, NEG, ABS, SQRT, EXP, EXPM1, LOG, LOG1P, LT, EQ, SELECT };

typedef struct {
    double s[PAIR_BLOCK], t[PAIR_BLOCK], rad[PAIR_BLOCK];
} pairs;

static const double LEAST = 0x1p-900,
                    LARGEST = 0x1p900; /* no step of a quotient or root underflows or overflows here */

/* ---- arithmetic ---- */

/* For |a| >= |b|, or a = 0 only if b = 0. */
INLINE pair quick_pair(double a, double b, double rad) {
    const double s = a + b;
    return (pair){s, b - (s - a), rad};
}

INLINE pair full_pair(double a, double b, double rad) {
    pair p;
    two_sum(a, b, &p.s, &p.t);
    p.rad = rad;
    return p;
}

INLINE pair single(double x) { return (pair){x, 0, 0}; }

INLINE int is_zero(pair p) { return (p.s == 0) & (p.rad == 0); }

INLINE pair add(pair p, pair q) {
    double s, t, low, lost, more;
    two_sum(p.s, q.s, &s, &t);
    two_sum(p.t, q.t, &low, &lost);
    two_sum(t, low, &t, &more);
    return full_pair(s, t, p.rad + q.rad + fabs(lost) + fabs(more));
}

INLINE pair add1(pair p, double x) {
    double s, t, more;
    two_sum(p.s, x, &s, &t);
    two_sum(t, p.t, &t, &more);
    return full_pair(s, t, p.rad + fabs(more));
}

/* What a product may lose by underflow. */
INLINE double product_floor(double product, double x, double y) {
    return ((fabs(product) < LEAST) & (x != 0) & (y != 0)) ? TINY : 0;
}

INLINE pair mul11(double x, double y) {
    const double high = x * y;
    return (pair){high, fma(x, y, -high), product_floor(high, x, y)};
}

INLINE pair mul1(pair p, double x) {
    const double high = p.s * x, low = fma(p.s, x, -high), rest = p.t * x;
    double rad = p.rad * fabs(x) + product_floor(high, p.s, x);
    rad += (((p.t != 0) | (p.rad != 0)) & (x != 0)) ? 4 * U * (fabs(low) + fabs(rest)) + TINY : 0;
    return full_pair(high, low + rest, rad);
}

INLINE pair mul(pair p, pair q) {
    const double high = p.s * q.s, low = fma(p.s, q.s, -high), a = p.s * q.t, b = p.t * q.s;
    const double size_p = fabs(p.s) + fabs(p.t), size_q = fabs(q.s) + fabs(q.t);
    const int inexact = (p.t != 0) | (q.t != 0) | (p.rad != 0) | (q.rad != 0);
    double rad = size_p * q.rad + size_q * p.rad + p.rad * q.rad + product_floor(high, p.s, q.s);
    rad += inexact ? 4 * U * (fabs(low) + fabs(a) + fabs(b)) + fabs(p.t * q.t) + TINY : 0;
    return full_pair(high, low + (a + b), is_zero(p) | is_zero(q) ? 0 : rad);
}

INLINE int in_range(double x) { return (fabs(x) >= LEAST) & (fabs(x) <= LARGEST); }

/* p / d = h + (r + p.t - h d.t) / d, where h = p.s / d.s is rounded and the remainder r = p.s - h d.s is exact. d.s in
   place of the last d errs by up to 2 U, d.rad by |h| d.rad / |d|. */
INLINE pair divide(pair p, pair d) {
    const double high = p.s / d.s, rest = fma(-high, d.s, p.s), product = high * d.t;
    const double least = fabs(d.s) - fabs(d.t) - d.rad;
    const int inexact = (rest != 0) | (p.t != 0) | (d.t != 0) | (p.rad != 0) | (d.rad != 0);
    double rad = p.rad + fabs(high) * d.rad + 8 * U * (fabs(rest) + fabs(p.t) + fabs(product));
    rad = inexact ? (rad + TINY) / least + TINY : 0;
    rad = is_zero(p) ? 0 : p.s == 0 || (in_range(p.s) & in_range(high)) ? rad : INFINITY;
    return full_pair(high, (rest + p.t - product) / d.s, (in_range(d.s) & (least > fabs(d.s) / 2)) ? rad : INFINITY);
}

/* The same for an exact divisor. */
INLINE pair divide1(pair p, double d) {
    const double high = p.s / d, rest = fma(-high, d, p.s);
    const int inexact = (rest != 0) | (p.t != 0) | (p.rad != 0);
    double rad = inexact ? (p.rad + 8 * U * (fabs(rest) + fabs(p.t)) + TINY) / fabs(d) + TINY : 0;
    rad = is_zero(p) ? 0 : p.s == 0 || (in_range(p.s) & in_range(high)) ? rad : INFINITY;
    return full_pair(high, (rest + p.t) / d, in_range(d) ? rad : INFINITY);
}

/* sqrt(p) = s + r / (2 s) - r^2 / (8 s^3) + ..., where s = sqrt(p.s) is rounded and r = (p.s - s^2) + p.t; the first of
   these differences is exact. */
INLINE pair square_root(pair p) {
    const double s = sqrt(p.s), rest = fma(-s, s, p.s), r = rest + p.t;
    const int inexact = (rest != 0) | (p.t != 0) | (p.rad != 0);
    double rad = 4 * U * (fabs(rest) + fabs(p.t)) / s + r * r / (s * s * s) + p.rad / s + TINY;
    rad = (in_range(p.s) & (p.rad <= p.s / 2)) ? (inexact ? rad : 0) : INFINITY;
    const pair root = full_pair(s, r / (2 * s), rad);
    return is_zero(p) ? p : root;
}

INLINE pair negative(pair p) { return (pair){-p.s, -p.t, p.rad}; }

INLINE pair absolute(pair p) {
    const int below = p.s < 0;
    return (pair){below ? -p.s : p.s, below ? -p.t : p.t, p.rad};
}

/* 1 or 0; NaN if it is not certain. */
INLINE double less_than_zero(pair p) {
    const double certain = p.s < 0 ? 1 : 0;
    return ((fabs(p.s) * 0.5 > p.rad) | (p.rad == 0)) ? certain : NAN;
}

INLINE double equals_zero(pair p) { return is_zero(p) ? 1 : less_than_zero(p) * 0; }

INLINE pair select(double condition, pair p, pair q) {
    pair chosen = {condition != 0 ? p.s : q.s, condition != 0 ? p.t : q.t, condition != 0 ? p.rad : q.rad};
    chosen.rad = condition == condition ? chosen.rad : INFINITY;
    return chosen;
}

/* ---- functions: relative errors of a few 2^-104 in each step (M. Joldes, J.-M. Muller & V. Popescu, Tight and rigorous
   error bounds for basic building blocks of double-word arithmetic, ACM TOMS 44(2), 2017), 2^-94 in all ---- */

#define FUNCTION_ERROR 0x1p-94
#define TINY_ARGUMENT 0x1p-21

INLINE pair light_mul(pair p, pair q) {
    const double high = p.s * q.s;
    return quick_pair(high, fma(p.s, q.s, -high) + (p.s * q.t + p.t * q.s), 0);
}

INLINE pair light_add(pair p, pair q) {
    double s, e, f, g;
    two_sum(p.s, q.s, &s, &e);
    two_sum(p.t, q.t, &f, &g);
    p = quick_pair(s, e + f, 0);
    return quick_pair(p.s, p.t + g, 0);
}

/* a r + 1 / n */
INLINE pair horner(pair a, pair r, double n) {
    const double inverse = 1 / n;
    return light_add(light_mul(a, r), (pair){inverse, fma(-inverse, n, 1.0) / n, 0});
}

/* A number m with 1 + m = exp(x) / 2^k, |x| <= 640. With x = k log 2 + 8 r the series of exp(r) - 1 ends at r^17 / 17!,
   whose terms from r^9 on have one double each; then (1 + m)^2 - 1 = m (2 + m) three times. For k = 0, which |x| < 0.34
   gives, its relative error is below 2^-96 even for tiny x. Otherwise its absolute error is. tiny: |x| <= 2^-21, for
   which a few terms suffice. */
INLINE pair expm1_reduced(pair x, double *power, int tiny) {
    if (tiny) {
        double q = 1 / 120.0;
        q = q * x.s + 1 / 24.0;
        q = q * x.s + 1 / 6.0;
        *power = 0;
        return light_mul(horner(horner(single(q), x, 2), x, 1), x);
    }
    const double k = rint(x.s * 0x1.71547652b82fep+0), l = 0x1.62e42fefa39efp-1, h = k * l;
    pair r = light_add((pair){x.s, x.t, 0}, (pair){-h, -(fma(k, l, -h) + k * 0x1.abc9e3b39803fp-56), 0});
    r.s *= 0.125, r.t *= 0.125;
    double y = 1 / 355687428096000.0;
    y = y * r.s + 1 / 20922789888000.0;
    y = y * r.s + 1 / 1307674368000.0;
    y = y * r.s + 1 / 87178291200.0;
    y = y * r.s + 1 / 6227020800.0;
    y = y * r.s + 1 / 479001600.0;
    y = y * r.s + 1 / 39916800.0;
    y = y * r.s + 1 / 3628800.0;
    y = y * r.s + 1 / 362880.0;
    pair m = horner(single(y), r, 40320);
    m = horner(m, r, 5040);
    m = horner(m, r, 720);
    m = horner(m, r, 120);
    m = horner(m, r, 24);
    m = horner(m, r, 6);
    m = horner(m, r, 2);
    m = horner(m, r, 1);
    m = light_mul(m, r);
    for (int i = 0; i < 3; i++) m = light_mul(m, light_add(single(2), m));
    *power = k;
    return m;
}

/* exp(d) - 1 for a d up to `rad` is below 2 rad. */
INLINE double rad_of_exp(double rad) { return rad <= 0.5 ? 2 * rad : INFINITY; }

INLINE pair exponential(pair p, int tiny) {
    double k, e, low, lost;
    const pair m = expm1_reduced((pair){clamp(p.s, -610, 610), p.t, 0}, &k, tiny);
    const double scale = tiny ? 1 : power_of_two(k);
    pair y;
    two_sum(1, m.s, &y.s, &e);
    two_sum(e, m.t, &low, &lost);
    y = full_pair(y.s, low, (k == 0 ? fabs(m.s) : 2) * FUNCTION_ERROR + fabs(lost) + (p.s == 0 ? 0 : TINY));
    y.rad += rad_of_exp(p.rad) * 1.5;
    y = (pair){y.s * scale, y.t * scale, y.rad * scale};
    const int below = p.s < -600, beyond = below | (p.s > 600); /* exp(-599) < 2^-864 */
    const double far = (below & (p.rad <= 1)) ? 0x1p-864 : INFINITY;
    return (pair){beyond ? 0 : y.s, beyond ? 0 : y.t, beyond ? far : y.rad};
}

INLINE pair exponential_less_1(pair p, int tiny) {
    double k;
    pair m = expm1_reduced((pair){clamp(p.s, -610, 610), p.t, 0}, &k, tiny);
    m.rad = fabs(m.s) * FUNCTION_ERROR + (p.s == 0 ? 0 : TINY) + 1.5 * rad_of_exp(p.rad);
    const pair elsewhere = add1(exponential(p, tiny), -1);
    return select(k == 0, m, elsewhere);
}

/* log(p) = z + log(1 + w) with z = log(p.s) in binary64 and w = p exp(-z) - 1, |w| < 2^-45 |z|, or w = p.t if p.s is 1.
   The series w - w^2 / 2 suffices. With exp(-z) = 2^k (1 + m) and q = 2^k p, w is (q - 1) + q m. */
INLINE pair logarithm(pair p, int tiny) {
    double k, high, low, s, e;
    const double z = tiny ? (p.s - 1) - (p.s - 1) * (p.s - 1) * 0.5 : log_(p.s);
    const pair m = expm1_reduced(single(-z), &k, tiny);
    const double scale = tiny ? 1 : power_of_two(k);
    const pair q = {p.s * scale, p.t * scale, 0};
    two_sum(q.s, -1, &high, &low);
    const pair w = light_add(full_pair(high, low + q.t, 0), light_mul(q, m));
    two_sum(z, w.s, &s, &e);
    double rad =
        16 * FUNCTION_ERROR * fabs(z) + 0x1p-50 * (w.s * w.s) + 4 * U * (fabs(e) + fabs(w.t)) + 2 * p.rad / p.s;
    rad += ((s == 0) & (p.rad == 0)) ? 0 : TINY;
    rad = ((p.s >= LEAST) & (p.s <= LARGEST) & (p.rad <= p.s / 4)) ? rad : INFINITY;
    return full_pair(s, e + (w.t - w.s * w.s * 0.5), rad);
}

/* log(1 + p.s) + p.t / (1 + p.s) - ... */
INLINE pair logarithm_of_1_plus(pair p, int tiny) {
    const pair one_plus = full_pair(1, p.s, 0);
    const double d = one_plus.s, c = p.t / d;
    double rad = (p.t == 0 ? 0 : 4 * U * fabs(c) + 4 * c * c + TINY) + 4 * p.rad / d;
    rad = ((d > 0x1p-30) & (p.rad <= d / 8)) ? rad : INFINITY;
    return add(logarithm(one_plus, tiny), (pair){c, 0, rad});
}

/* ---- the interpreter ---- */

#define EACH for (integer i = 0; i < count; i++)
#define P ((pair){a->s[i], a->t[i], a->rad[i]})
#define Q ((pair){b->s[i], b->t[i], b->rad[i]})
#define R ((pair){c->s[i], c->t[i], c->rad[i]})
#define STORE(VALUE)                                        \
    EACH {                                                  \
        const pair y = VALUE;                               \
        to->s[i] = y.s, to->t[i] = y.t, to->rad[i] = y.rad; \
    }
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

static void fill(pairs *to, pair p) {
    for (integer i = 0; i < PAIR_BLOCK; i++) to->s[i] = p.s, to->t[i] = p.t, to->rad[i] = p.rad;
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
