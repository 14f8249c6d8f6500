/* Elimination and factorizations of small matrices (operators/small_matrices.py) in pairs with error bounds.

   Gaussian elimination subtracts a multiple of the pivot's row, and its bounds grow least. The other method, `whole`, is
   that of numerics/exact_matrices.py: every number on the way is a determinant of a part of the matrix (E. Bareiss,
   Mathematics of Computation 22(103), 1968). It takes twice as long, and bounds grow, but whole numbers of up to 53 bits
   stay exact, so that it finds the zeros and the ties among them.

   Every number of a result is given by two ends, between which it lies; NaN if nothing is known. Python rounds both, and
   takes integers of any length if they differ. */

#include "compensated.h"

/* Nothing underflows or overflows: the caller scales each matrix so that its largest number is in [1/4, 1), and parts of
   a pair outside these limits make it unknown. Products of two are at least 2^-906, and those with bounds 2^-1000. What
   is lost below that, even after a division, is far below FLOOR, which every bound but 0 has. */
#define SMALLEST 0x1p-400
#define LARGEST 0x1p400
#define FLOOR 0x1p-600

/* Rows of pairs. */
typedef struct {
    double *s, *t, *rad;
    integer rows, width;
} matrix;

INLINE pair get(const matrix *m, integer i, integer j) {
    const integer at = i * m->width + j;
    return (pair){m->s[at], m->t[at], m->rad[at]};
}

INLINE pair opposite(pair p) { return (pair){-p.s, -p.t, p.rad}; }

INLINE int within_limits(double x) { return (x == 0) | ((fabs(x) >= SMALLEST) & (fabs(x) <= LARGEST)); }

INLINE int is_zero(pair p) { return (p.s == 0) & (p.rad == 0); }

/* A result p of operations on numbers whose bounds add up to `given`. */
INLINE pair limited(pair p, double given) {
    const double rad = given + p.rad == 0 ? 0 : p.rad + FLOOR; /* NaN stays */
    p.rad = within_limits(p.s) & within_limits(p.t) ? rad : INFINITY;
    return p;
}

/* p / d, and exactly so if d is a number of binary64 and no remainder is left. */
INLINE pair quotient(pair p, pair d) {
    const double high = p.s / d.s;
    double rest, lost;
    two_sum(fma(-high, d.s, p.s), p.t, &rest, &lost);
    const double remainder = fma(-(rest / d.s), d.s, rest);
    pair q = pair_over_pair(p, d);
    q.rad = p.rad + d.rad + fabs(d.t) + fabs(lost) + fabs(remainder) == 0 ? 0 : q.rad;
    return limited(q, is_zero(p) ? 0 : p.rad + d.rad);
}

/* The bounds of two factors; those of an exact 0 and any other have no effect. */
INLINE double bounds_of(pair p, pair q) { return is_zero(p) | is_zero(q) ? 0 : p.rad + q.rad; }

INLINE pair product(pair p, pair q) { return limited(pair_times_pair(p, q), bounds_of(p, q)); }

/* p 2^e, for a p with |s| in [1/2, 1); unknown if it is far from 1. */
INLINE pair shifted(pair p, integer e) {
    const int n = e < -300 || e > 300 ? 0 : (int)e;
    return (pair){ldexp(p.s, n), ldexp(p.t, n), n == e ? ldexp(p.rad, n) : INFINITY};
}

INLINE int has_sign(pair p) { return fabs(p.s) > 2 * p.rad; } /* |t| <= U |s| */

/* The ends of p, rounded outward. */
INLINE void store_ends(pair p, double *low, double *high) {
    const double rad = p.rad * SLACK;
    const int exact = p.t == 0 && rad == 0;
    *low = exact ? p.s + 0.0 : nextafter(p.s + (p.t - rad), -INFINITY); /* an exact zero is +0 */
    *high = exact ? p.s + 0.0 : nextafter(p.s + (p.t + rad), INFINITY);
    if (!(rad <= DBL_MAX)) *low = *high = NAN;
}

static void exchange(double *a, double *b, integer n) {
    for (integer i = 0; i < n; i++) {
        const double x = a[i];
        a[i] = b[i];
        b[i] = x;
    }
}

static void exchange_rows(const matrix *m, integer i, integer j) {
    const integer a = i * m->width, b = j * m->width;
    exchange(m->s + a, m->s + b, m->width);
    exchange(m->t + a, m->t + b, m->width);
    exchange(m->rad + a, m->rad + b, m->width);
}

/* Change the numbers x of row i from column k + 1 on, with the numbers y of the pivot's row k; p and f are those of column
   k: x - (f / p) y, or (p x - f y) / d if `whole`, where d is the pivot before. */
INLINE void eliminate_row(int whole, const matrix *m, integer i, integer k, pair p, pair d) {
    const pair f = opposite(get(m, i, k));
    double *restrict s = m->s + i * m->width, *restrict t = m->t + i * m->width, *restrict rad = m->rad + i * m->width;
    const double *restrict ys = m->s + k * m->width, *restrict yt = m->t + k * m->width;
    const double *restrict yrad = m->rad + k * m->width;
    if (whole) {
        for (integer j = k + 1; j < m->width; j++) {
            const pair x = {s[j], t[j], rad[j]}, y = {ys[j], yt[j], yrad[j]};
            const pair z = pair_plus(pair_times_pair(p, x), pair_times_pair(f, y));
            const pair q = limited(quotient(z, d), bounds_of(p, x) + bounds_of(f, y));
            s[j] = q.s;
            t[j] = q.t;
            rad[j] = q.rad;
        }
    } else if (!is_zero(f)) {
        const pair multiple = quotient(f, p);
        for (integer j = k + 1; j < m->width; j++) {
            const pair x = {s[j], t[j], rad[j]}, y = {ys[j], yt[j], yrad[j]};
            const pair z = limited(pair_plus(x, pair_times_pair(multiple, y)), x.rad + bounds_of(multiple, y));
            s[j] = z.s;
            t[j] = z.t;
            rad[j] = z.rad;
        }
    }
}

/* The row of the largest number of column k, from row k on. */
static integer largest_row(const matrix *m, integer k) {
    integer best = k;
    for (integer i = k + 1; i < m->rows; i++)
        if (fabs(get(m, i, k).s) > fabs(get(m, best, k).s)) best = i;
    return best;
}

/* Copy matrix `index` of a batch to the memory of this thread. `t` and `rad` are null for binary32 numbers, which are
   within the limits, as each is a multiple of 2^-277 of the largest. */
static int load(matrix *m, const double *const *parts, integer index) {
    const integer size = m->rows * m->width;
    m->s = reproml_scratch(3 * (size_t)size * sizeof(double));
    if (!m->s) return 0;
    m->t = m->s + size;
    m->rad = m->t + size;
    for (int v = 0; v < 3; v++)
        for (integer i = 0; i < size; i++) m->s[v * size + i] = parts[v] ? parts[v][index * size + i] : 0;
    for (integer i = 0; parts[1] && i < size; i++)
        m->rad[i] = limited((pair){m->s[i], m->t[i], m->rad[i]}, m->rad[i]).rad;
    return 1;
}

enum { UNDECIDED = -1 }; /* of `info` */

typedef struct {
    integer n, k;
    const double *const *parts;
    int whole, adjugate;
    double *low, *high, *determinant;
    integer *exponent;
    int32_t *info;
} system_call;

/* Eliminate matrix `index`. */
VECTORISED static void solve(integer index, system_call *c) {
    const integer n = c->n;
    matrix m = {0, 0, 0, n, n + c->k};
    pair d = {1, 0, 0}, determinant = d; /* the determinant without its power of two */
    integer exponent = 0;
    double sign = 1;
    c->info[index] = UNDECIDED;
    if (!load(&m, c->parts, index)) return;
    for (integer k = 0; k < n; k++) {
        const integer best = largest_row(&m, k);
        const pair p = get(&m, best, k);
        if (!has_sign(p)) {
            int zero = 1;
            for (integer i = k; i < n; i++) zero &= is_zero(get(&m, i, k));
            if (zero) c->info[index] = (int32_t)k + 1; /* the column depends on those before */
            return;
        }
        exchange_rows(&m, k, best);
        sign = best != k ? -sign : sign;
        for (integer i = 0; i < n; i++)
            if (i != k && (i > k || c->k)) eliminate_row(c->whole, &m, i, k, p, d);
        if (c->whole) {
            determinant = d = p;
        } else { /* of wide matrices it would leave the limits */
            int e;
            determinant = product(determinant, p);
            frexp(determinant.s, &e);
            determinant = shifted(determinant, -e);
            exponent += e;
        }
    }
    c->exponent[index] = exponent;
    c->info[index] = 0;
    determinant = sign < 0 ? opposite(determinant) : determinant;
    store_ends(determinant, c->determinant + 2 * index, c->determinant + 2 * index + 1);
    for (integer i = 0; i < n; i++)
        for (integer j = 0; j < c->k; j++) {
            const pair x = get(&m, i, n + j), pivot = c->whole ? d : get(&m, i, i);
            const integer to = (index * n + i) * c->k + j;
            pair result = quotient(x, pivot);
            if (c->adjugate)
                result = !c->whole ? product(result, shifted(determinant, exponent)) : sign < 0 ? opposite(x) : x;
            store_ends(result, c->low + to, c->high + to);
        }
}

static void run_solve(integer index, void *call) { solve(index, call); }

/* Solve a x = b for `count` matrices [n, n + k], a beside b, which are s + t within rad. Stores the ends of x [n, k], or
   of x times the determinant of a (`adjugate`), and those of the determinant without 2^exponent. info: 0; or the first column of a, from 1,
   that depends on those before; or UNDECIDED. */
void reproml_solve(int whole, integer count, integer n, integer k, const double *const *parts, int adjugate,
                   double *low, double *high, double *determinant, integer *exponent, int32_t *info) {
    system_call c = {n, k, parts, whole, adjugate, low, high, determinant, exponent, info};
    run_tasks(run_solve, &c, count, count * n * n * (n + k) > WORTH_A_THREAD);
}

typedef struct {
    int whole, cholesky;
    integer rows, width;
    const double *const *parts;
    double *low, *high;
    int32_t *pivots, *info;
} factor_call;

/* Whether |p| > |q| for certain (1), or they are equal (0), or neither is known (UNDECIDED). */
static int is_larger(pair p, pair q) {
    const pair difference = pair_plus(p.s < 0 ? opposite(p) : p, q.s < 0 ? q : opposite(q));
    return is_zero(difference) ? 0 : has_sign(difference) && difference.s > 0 ? 1 : UNDECIDED;
}

/* The row of the pivot of column k: of the numbers that are largest for certain, the first. */
static integer certain_row(const matrix *m, integer k) {
    const integer best = largest_row(m, k);
    for (integer i = k; i < m->rows; i++)
        if (i != best && is_larger(get(m, best, k), get(m, i, k)) == UNDECIDED) return UNDECIDED;
    return best;
}

/* P a = L U, L below the diagonal and U in one matrix. */
VECTORISED static void factorize_lu(integer index, factor_call *c) {
    matrix m = {0, 0, 0, c->rows, c->width};
    pair d = {1, 0, 0};
    const integer steps = c->rows < c->width ? c->rows : c->width;
    double *low = c->low + index * c->rows * c->width, *high = c->high + index * c->rows * c->width;
    int32_t zero = 0;
    c->info[index] = UNDECIDED;
    if (!load(&m, c->parts, index)) return;
    for (integer k = 0; k < steps; k++) {
        const integer best = certain_row(&m, k);
        if (best == UNDECIDED) return;
        const pair p = get(&m, best, k);
        c->pivots[index * steps + k] = (int32_t)best + 1;
        exchange_rows(&m, k, best);
        exchange(low + k * c->width, low + best * c->width, k); /* the part of L that is there already */
        exchange(high + k * c->width, high + best * c->width, k);
        for (integer j = k; j < c->width; j++) {
            const integer to = k * c->width + j;
            store_ends(quotient(get(&m, k, j), d), low + to, high + to);
        }
        if (is_zero(p)) { /* the column is 0 from here on: nothing is eliminated */
            zero = zero ? zero : (int32_t)k + 1;
            for (integer i = k + 1; i < c->rows; i++) low[i * c->width + k] = high[i * c->width + k] = 0;
            continue;
        }
        for (integer i = k + 1; i < c->rows; i++) {
            const pair f = get(&m, i, k);
            store_ends(quotient(f, p), low + i * c->width + k, high + i * c->width + k);
            eliminate_row(c->whole, &m, i, k, p, d);
        }
        d = c->whole ? p : d;
    }
    c->info[index] = zero;
}

/* L L^T = a. */
VECTORISED static void factorize_cholesky(integer index, factor_call *c) {
    const integer n = c->rows;
    matrix m = {0, 0, 0, n, n};
    pair d = {1, 0, 0};
    double *low = c->low + index * n * n, *high = c->high + index * n * n;
    c->info[index] = UNDECIDED;
    if (!load(&m, c->parts, index)) return;
    for (integer i = 0; i < n; i++)
        for (integer j = i + 1; j < n; j++) { /* what is above the diagonal is not read */
            m.s[i * n + j] = m.s[j * n + i];
            low[i * n + j] = high[i * n + j] = 0;
        }
    for (integer k = 0; k < n; k++) {
        const pair p = get(&m, k, k), square = product(p, d);
        if (!(has_sign(p) && p.s > 0 && has_sign(square))) return;
        const pair root = limited(pair_sqrt(square), square.rad);
        for (integer i = k; i < n; i++) {
            const pair f = get(&m, i, k);
            store_ends(quotient(f, root), low + i * n + k, high + i * n + k);
            if (i > k) eliminate_row(c->whole, &m, i, k, p, d);
        }
        d = c->whole ? p : d;
    }
    c->info[index] = 0;
}

static void run_factorize(integer index, void *call) {
    factor_call *c = call;
    if (c->cholesky)
        factorize_cholesky(index, c);
    else
        factorize_lu(index, c);
}

/* Factorize `count` matrices of numbers [rows, width], as numerics/exact_matrices.py. Stores the ends of the factors. info:
   0; or the first column whose pivot is 0, from 1 (LU); or UNDECIDED. */
void reproml_factorize(int whole, int cholesky, integer count, integer rows, integer width, const double *a,
                       double *low, double *high, int32_t *pivots, int32_t *info) {
    const double *parts[3] = {a, 0, 0};
    factor_call c = {whole, cholesky, rows, width, parts, low, high, pivots, info};
    run_tasks(run_factorize, &c, count, count * rows * rows * width > WORTH_A_THREAD);
}
