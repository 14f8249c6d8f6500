/* Rows of softmax, log_softmax, logsumexp and the gradients in pairs of binary64 numbers, for rows with an element that
   fails the test of softmax.c or of a program. */

#include "softmax_pairs.h"

#include "compensated_runs.h"
#include "elementary.h"

enum { BLOCK = 128 };

/* From here on exp(x) is only known to be below BELOW, or above its inverse. */
#define FAR 600.0
#define BELOW 0x1p-865

/* exp(x + lost) = s + t, with a relative error of less than EXP_OF_PAIR_ERROR, for |x| <= FAR and |lost| <= U |x|.
   x + lost = k log 2 + 256 r with |r| < 0.00136 and exp(r) = 1 + r (1 + r (1/2 + r (1/6 + r Q(r)))). Q needs binary64
   only: its roundings and the next term of its series stay below 2^-92 of exp(r), and 8 squarings double that as often.
   The loops below have neither branches nor calls, so that the compiler makes vectors of them. */
#define EXP_OF_PAIR_ERROR 0x1p-80

INLINE void quick_sum(double a, double b, double *s, double *t) { /* for |a| >= |b| */
    const double sum = a + b;
    *t = b - (sum - a);
    *s = sum;
}

/* c + (a + b) (y + z), for c >= |product| */
INLINE void horner_step(double c, double a, double b, double *y, double *z) {
    const double high = a * *y, low = fma(a, *y, -high) + (a * *z + b * *y);
    double s, t;
    quick_sum(c, high, &s, &t);
    quick_sum(s, t + low, y, z);
}

INLINE void exp_of_pair(double x, double lost, double *s, double *t) {
    const double shifted = x * 0x1.71547652b82fep+0 + 0x1.8p52, k = shifted - 0x1.8p52;
    const double high = k * 0x1.62e42fefa39efp-1;
    const double low = fma(k, 0x1.62e42fefa39efp-1, -high) + k * 0x1.abc9e3b39803fp-56;
    double a, b, y, z;
    two_sum(x, -high, &a, &b);
    quick_sum(a, b + (lost - low), &a, &b);
    a *= 0x1p-8, b *= 0x1p-8;
    const double q = 1 / 24.0 + a * (1 / 120.0 + a * (1 / 720.0 + a * (1 / 5040.0 + a * (1 / 40320.0))));
    quick_sum(0x1.5555555555555p-3, a * q + 0x1.5555555555555p-57, &y, &z);
    horner_step(0.5, a, b, &y, &z);
    horner_step(1, a, b, &y, &z);
    horner_step(1, a, b, &y, &z);
    for (int j = 0; j < 8; j++) {
        const double square = y * y, rest = fma(y, y, -square) + 2 * y * z;
        quick_sum(square, rest, &y, &z);
    }
    const double scale = from_pattern((int64_t)((uint64_t)(pattern(shifted) + 1023) << 52)); /* 2^k */
    *s = y * scale;
    *t = z * scale;
}

/* exp(d[i] + lost[i]), where d[i] is replaced by 0 if it is not within FAR of 0. */
VECTORISED static void exponentials(const double *d, const double *lost, int n, double *s, double *t) {
    for (int i = 0; i < n; i++) {
        const int inside = fabs(d[i]) <= FAR;
        exp_of_pair(inside ? d[i] : 0, inside ? lost[i] : 0, s + i, t + i);
    }
}

/* log(1 + p) for p > 0, small or not. Any binary64 number y near it serves as its first approximation, as the rest is
   log(1 + z), z = (1 + p) exp(-y) - 1. Returns an infinite bound if y is not near. */
static pair log1p_of_pair(pair p) {
    if (p.s < 0x1p-30) { /* p - p^2/2 + p^3/3; the next term is below p^4, which is 2^-90 p */
        const pair square = pair_times_pair(p, p), rest = pair_over(pair_times_pair(square, p), 3);
        pair y = pair_plus(pair_plus(p, pair_times(square, -0.5)), rest);
        y.rad += p.s * (p.s * p.s * p.s + 0x1p-120); /* what underflows is below 2^-120 p */
        return y;
    }
    const double y = log1p(p.s);
    if (!(y < FAR)) return (pair){0, 0, INFINITY};
    pair factor = {0, 0, 0}, z;
    exp_of_pair(-y, 0, &factor.s, &factor.t);
    factor.rad = factor.s * EXP_OF_PAIR_ERROR;
    z = pair_plus(pair_times_pair(pair_plus((pair){1, 0, 0}, p), factor), (pair){-1, 0, 0});
    if (!(fabs(z.s) + z.rad < 0x1p-30)) return (pair){0, 0, INFINITY};
    const double square = z.s * z.s; /* log(1 + z) = z - z^2/2 + z^3/3 - ... */
    z = pair_plus(z, (pair){-0.5 * square, 0, 4 * (square * (U + fabs(z.s)) + fabs(z.s) * (fabs(z.t) + z.rad))});
    return pair_plus((pair){y, 0, 0}, z);
}

/* What the functions of a row have in common: its largest number, and exp(x - top) of each number. */
typedef struct {
    const float *x;
    integer n, first; /* x[first] is the largest number */
    double top, second;
} row;

/* Returns 0 if there is a NaN or the largest number is not finite. */
static int begin_row(row *r, const float *x, integer n) {
    *r = (row){.x = x, .n = n, .top = -INFINITY, .second = -INFINITY};
    for (integer i = 0; i < n; i++) {
        if (x[i] != x[i]) return 0;
        if (x[i] > r->top) {
            r->second = r->top;
            r->top = x[i];
            r->first = i;
        } else if (x[i] > r->second) {
            r->second = x[i];
        }
    }
    return fabs(r->top) <= DBL_MAX;
}

/* Differences d + lost of a block of numbers from `top`, and their exponentials s + t. */
typedef struct {
    double d[BLOCK], lost[BLOCK], s[BLOCK], t[BLOCK];
} block;

static int fill_block(block *b, const row *r, integer at) {
    const int count = (int)(r->n - at < BLOCK ? r->n - at : BLOCK);
    for (int i = 0; i < count; i++) two_sum(r->x[at + i], -r->top, &b->d[i], &b->lost[i]);
    exponentials(b->d, b->lost, count, b->s, b->t);
    return count;
}

/* The sum of exp(x - top) over all numbers, or all but the first of the largest ones. */
static pair sum_of_exponentials(block *b, const row *r, int without_first) {
    compensated sum = {0, 0, 0};
    double error = 0;
    for (integer at = 0; at < r->n; at += BLOCK) {
        const int count = fill_block(b, r, at);
        for (int i = 0; i < count; i++) {
            if ((without_first && at + i == r->first) || b->d[i] == -INFINITY) continue;
            if (b->d[i] == 0) {
                add_exact(&sum, 1);
            } else if (b->d[i] < -FAR) {
                error += BELOW;
            } else {
                add_exact(&sum, b->s[i]);
                add_small(&sum, b->t[i]);
                error += b->s[i] * EXP_OF_PAIR_ERROR;
            }
        }
    }
    pair total = compensated_pair(&sum, r->n);
    total.rad += error * SLACK;
    return total;
}

/* The logarithm of the sum of exp(x - top). Its bound is infinite if the sum is not known to be above 1. */
static pair log_of_sum(block *b, const row *r) {
    const pair sum = sum_of_exponentials(b, r, 1);
    return sum.s > 2 * sum.rad ? log1p_of_pair(sum) : (pair){0, 0, INFINITY};
}

static integer fail_all(integer n, int32_t *failed) {
    for (integer i = 0; i < n; i++) failed[i] = 1;
    return n;
}

static integer softmax(const float *x, integer n, float *out, int32_t *failed) {
    row r;
    block b;
    integer failures = 0;
    if (!begin_row(&r, x, n)) return fail_all(n, failed);
    const pair sum = sum_of_exponentials(&b, &r, 0);
    for (integer at = 0; at < n; at += BLOCK) {
        const int count = fill_block(&b, &r, at);
        for (int i = 0; i < count; i++) {
            const pair e = {b.s[i], b.t[i], b.d[i] == 0 ? 0 : b.s[i] * EXP_OF_PAIR_ERROR};
            if (b.d[i] < -FAR)
                out[at + i] = failed[at + i] = 0;
            else
                failures += failed[at + i] = round_pair(pair_over_pair(e, sum), out + at + i) != 0;
        }
    }
    return failures;
}

/* How far log_softmax is below 1 where one number exceeds all others by more than FAR: log2 of 1 / the sum of exp(x - top)
   over the others. From exp(-1000) on it counts as zero. */
static double bits_below_1(const row *r) {
    const double gap = r->top - r->second;
    double others = 0;
    if (gap > 1000) return INFINITY;
    for (integer i = 0; i < r->n; i++)
        if (i != r->first) others += exp(r->x[i] - r->second);
    return gap * 1.4426950408889634 - log2(others);
}

/* One number d of such a row. Beside d the logarithm decides ties only, and none where it is 2^1100 times smaller, as
   the exact path takes it for zero there (compiler/evaluate.py); just where that begins depends on its bounds. The
   result of the largest number itself rounds to -0. */
static int32_t round_far(pair d, double bits, float *out) {
    float beside;
    *out = -0.0f;
    if (d.s == 0) return 0;
    if (bits == INFINITY) return round_pair(d, out);
    bits += log2(fabs(d.s));
    const int32_t failed = round_pair(d, out) | round_pair(pair_plus(d, (pair){-BELOW, 0, 0}), &beside);
    if (bits >= 1096 && bits < 1100) return failed | (*out != beside);
    if (bits < 1096) *out = beside;
    return failed;
}

static integer log_softmax(const float *x, integer n, float *out, int32_t *failed) {
    row r;
    block b;
    integer failures = 0;
    if (!begin_row(&r, x, n)) return fail_all(n, failed);
    const double gap = r.top - r.second;
    const int far = gap > FAR && r.second != -INFINITY;
    const double bits = far ? bits_below_1(&r) : 0;
    pair log = {0, 0, 0};
    if (!far) log = log_of_sum(&b, &r);
    log.s = -log.s, log.t = -log.t;
    for (integer i = 0; i < n; i++) {
        pair d = {0, 0, 0};
        two_sum(x[i], -r.top, &d.s, &d.t);
        if (x[i] == -INFINITY) {
            out[i] = -INFINITY;
            failed[i] = 0;
        } else {
            failed[i] = (far ? round_far(d, bits, out + i) : round_pair(pair_plus(d, log), out + i)) != 0;
        }
        failures += failed[i];
    }
    return failures;
}

static integer logsumexp(const float *x, integer n, float *out, int32_t *failed) {
    row r;
    block b;
    if (!begin_row(&r, x, n)) return *failed = 1;
    return *failed = round_pair(pair_plus((pair){r.top, 0, 0}, log_of_sum(&b, &r)), out) != 0;
}

/* y (g - the sum of g y), where y is the result of softmax. */
VECTORISED static integer softmax_backward(const float *g, const float *y, integer n, float *restrict out,
                                           int32_t *restrict failed) {
    const pair sum = sum_with_errors(g, y, 0, 0, 1, n), total = {-sum.s, -sum.t, sum.rad};
    integer failures = 0;
    for (integer i = 0; i < n; i++)
        failed[i] = round_pair(pair_times(pair_plus((pair){g[i], 0, 0}, total), y[i]), out + i) != 0;
    for (integer i = 0; i < n; i++) failures += failed[i];
    return failures;
}

/* g - exp(y) times the sum of g, where y is the result of log_softmax, and may be -infinity. */
VECTORISED static integer log_softmax_backward(const float *g, const float *y, integer n, float *restrict out,
                                               int32_t *restrict failed) {
    const pair sum = sum_with_errors(g, 0, 0, 0, 1, n), total = {-sum.s, -sum.t, sum.rad};
    const double size = fabs(total.s) + fabs(total.t) + total.rad;
    integer failures = 0;
    if (!(size <= DBL_MAX)) return fail_all(n, failed);
    for (integer i = 0; i < n; i++) {
        const int inside = fabsf(y[i]) <= (float)FAR;
        pair e = {0, 0, 0};
        exp_of_pair(inside ? y[i] : 0, 0, &e.s, &e.t);
        e.rad = y[i] == 0 ? 0 : e.s * EXP_OF_PAIR_ERROR;
        pair product = pair_times_pair(e, total);
        product.s = inside ? product.s : 0;
        product.t = inside ? product.t : 0;
        product.rad = inside ? product.rad : y[i] == -INFINITY ? 0 : y[i] < 0 ? size * BELOW : INFINITY;
        failed[i] = round_pair(pair_plus((pair){g[i], 0, 0}, product), out + i) != 0;
    }
    for (integer i = 0; i < n; i++) failures += failed[i];
    return failures;
}

/* Whether one of these numbers makes all results of its row NaN. */
static int row_is_nan(int which, const float *x, const float *y, integer n) {
    const int forward = which == PAIRS_SOFTMAX || which == PAIRS_LOG_SOFTMAX;
    int found = 0;
    if (which == PAIRS_LOGSUMEXP) return 0;
    for (integer i = 0; i < n; i++) found |= (x[i] != x[i]) | (forward & (x[i] == INFINITY));
    for (integer i = 0; i < n && which == PAIRS_SOFTMAX_BACKWARD; i++) found |= y[i] != y[i];
    return found;
}

integer reproml_softmax_row(int which, const float *x, const float *y, integer n, float *out, int32_t *failed) {
    if (row_is_nan(which, x, y, n)) {
        for (integer i = 0; i < n; i++) out[i] = NAN, failed[i] = 0;
        return 0;
    }
    switch (which) {
    case PAIRS_SOFTMAX: return softmax(x, n, out, failed);
    case PAIRS_LOG_SOFTMAX: return log_softmax(x, n, out, failed);
    case PAIRS_LOGSUMEXP: return logsumexp(x, n, out, failed);
    case PAIRS_SOFTMAX_BACKWARD: return softmax_backward(x, y, n, out, failed);
    default: return log_softmax_backward(x, y, n, out, failed);
    }
}

/* ---- running logsumexp ---- */

#define LOG1P_ERROR 0x1p-49 /* of log1p_ (numerics/elementary.py) */

typedef struct {
    integer n;
    const float *x;
    float *out;
    failure_list failed;
} running;

/* The numbers of a row up to some element: the largest one, and the sum of exp(x - top) over the others. */
typedef struct {
    double top;
    pair others;
} state;

/* Add a number v, given exp(-|v - top|). */
static inline void add_number(state *up_to, double v, pair e) {
    if (v > up_to->top) {
        if (up_to->top == -INFINITY) {
            up_to->others = (pair){0, 0, 0};
        } else {
            pair scaled = pair_times_pair(pair_plus((pair){1, 0, 0}, up_to->others), e);
            if (scaled.s < BELOW) /* before it underflows */
                scaled = (pair){0, 0, scaled.s + fabs(scaled.t) + scaled.rad};
            scaled.rad += TINY;
            up_to->others = scaled;
        }
        up_to->top = v;
    } else if (v != -INFINITY) {
        up_to->others = pair_plus(up_to->others, e);
    }
}

/* Round top + log(1 + others). Where the others decide less than a unit of the last place of any number, it is `top`,
   and beside 0 it is +0. */
static int32_t round_state(const state *up_to, float *out) {
    const double top = up_to->top;
    const pair others = up_to->others;
    *out = to_target(top) + 0.0f;
    if (top == -INFINITY) return 0;
    if (others.s + others.rad < 0x1p-800) return *out != top;
    if (!(others.s > 2 * others.rad)) return 1;
    return round_pair(pair_plus((pair){top, 0, 0}, log1p_of_pair(others)), out);
}

/* The first test, for a block of states. */
VECTORISED static void round_states(const double *restrict top, const double *restrict s, const double *restrict rad,
                                    int count, float *restrict out, int32_t *restrict failed) {
    for (int i = 0; i < count; i++) {
        const double log = log1p_(s[i]);
        failed[i] = round_ball(top[i] + log, U, log * LOG1P_ERROR + rad[i] * SLACK, out + i);
    }
}

/* As fill_block, for the differences of each number from the largest one before it. */
static int fill_running(block *b, const float *x, integer left, double before) {
    const int count = (int)(left < BLOCK ? left : BLOCK);
    for (int i = 0; i < count; i++) {
        double d, lost;
        two_sum(x[i], -before, &d, &lost);
        b->d[i] = d > 0 ? -d : d;
        b->lost[i] = d > 0 ? -lost : lost;
        before = x[i] > before ? x[i] : before;
    }
    exponentials(b->d, b->lost, count, b->s, b->t);
    return count;
}

VECTORISED static void run_row(integer task, void *data) {
    running *c = data;
    const float *x = c->x + task * c->n;
    float *out = c->out + task * c->n;
    int is_nan = 0; /* from the first NaN or +infinity on */
    state up_to[BLOCK], now = {-INFINITY, {0, 0, 0}};
    block b;
    double top[BLOCK], s[BLOCK], rad[BLOCK];
    int32_t failed[BLOCK];
    for (integer at = 0; at < c->n; at += BLOCK) {
        const int count = fill_running(&b, x + at, c->n - at, now.top);
        for (int i = 0; i < count; i++) {
            pair e = {b.s[i], b.t[i], b.s[i] * EXP_OF_PAIR_ERROR};
            if (b.d[i] == 0) e = (pair){1, 0, 0};
            if (b.d[i] < -FAR) e = (pair){0, 0, BELOW};
            add_number(&now, x[at + i], e);
            up_to[i] = now;
            top[i] = now.top;
            s[i] = now.others.s;
            rad[i] = fabs(now.others.t) + now.others.rad;
        }
        round_states(top, s, rad, count, out + at, failed);
        for (int i = 0; i < count; i++) {
            is_nan |= !(x[at + i] < INFINITY);
            if (is_nan)
                out[at + i] = NAN;
            else if (failed[i] && round_state(up_to + i, out + at + i))
                add_failure(&c->failed, task * c->n + at + i);
        }
    }
}

/* out = the logarithms of the sums of exp(x) up to each number of a row; x, out: [rows, n]. */
integer reproml_logcumsumexp(integer rows, integer n, const float *x, float *out, integer *failed, integer capacity) {
    running c = {n, x, out, {failed, capacity, 0}};
    run_tasks(run_row, &c, rows, rows * n > 4096);
    return c.failed.count;
}
