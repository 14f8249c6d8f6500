/* Sums and products of binary64 numbers as pairs with a bound, for results that are rounded to binary64. Each product
   and each sum keeps its rounding error (T. Ogita, S. Rump & S. Oishi, Accurate sum and dot product, SIAM J. Sci.
   Comput. 26(6), 2005).

   A product that is not below LEAST is exactly the sum of two numbers; one that is may lose LOST. What overflows is not
   finite, or its bound is not; the caller computes it in another way. */

#include "compensated.h"
#include "lanes.h"

#include <limits.h>

static const double LEAST = 0x1p-900, LOST = 0x1p-1073;

typedef struct {
    integer rows, n;
    const double *x, *y;
    int running;
    double *s, *t, *rad;
} sums;

static void store(const sums *c, integer at, const compensated *sum, integer n, double floor) {
    const pair p = compensated_pair(sum, n);
    c->s[at] = p.s, c->t[at] = p.t, c->rad[at] = p.rad + floor;
}

static void sum_row(integer row, void *data) {
    const sums *c = data;
    compensated sum = {0, 0, 0};
    double floor = 0;
    for (integer i = 0; i < c->n; i++) {
        const double x = c->x[row * c->n + i];
        if (c->y) {
            const double y = c->y[row * c->n + i];
            add_product(&sum, x, y);
            floor += ((fabs(x * y) < LEAST) & (x != 0) & (y != 0)) ? LOST : 0;
        } else {
            add_exact(&sum, x);
        }
        if (c->running) store(c, row * c->n + i, &sum, i + 1, floor);
    }
    if (!c->running) store(c, row, &sum, c->n, floor);
}

/* The sum of each row of n numbers x or products x y, or with `running` the sum up to each element. y may be null. */
void reproml_binary64_sums(integer rows, integer n, const double *x, const double *y, int running, double *const *out) {
    sums c = {rows, n, x, y, running, out[0], out[1], out[2]};
    run_tasks(sum_row, &c, rows, rows > 1 && rows * n > 8192);
}

typedef struct {
    integer m, n, k, panels;
    const double *a, *b; /* [batch, m, k] and [batch, k, n] */
    double *s, *t, *rad; /* [batch, m, n] */
    double lost;
    double exact; /* below it, a sum of the absolute values of all errors has no error of its own */
} product;

/* One row of a with LANES columns of b. */
INLINE void row_by_panel(const double *a, const double *panel, integer k, lanes *s, lanes *t, lanes *size) {
    const lanes zero = {0};
    lanes sum = zero, rest = zero, total = zero;
    for (integer l = 0; l < k; l++) {
        const lanes y = *(const lanes *)(panel + l * LANES);
        const lanes high = a[l] * y;
        lanes low;
        for (int v = 0; v < LANES; v++) low[v] = fma(a[l], y[v], -high[v]);
        const lanes next = sum + high, z = next - sum;
        low += (sum - (next - z)) + (high - z);
        sum = next;
        rest += low;
        total += magnitude(low);
    }
    *s = sum, *t = rest, *size = total;
}

VECTORISED static void multiply_panel(const product *c, integer task, double *panel) {
    const integer batch = task / c->panels, first = task % c->panels * LANES;
    const integer columns = c->n - first < LANES ? c->n - first : LANES, k = c->k;
    const double *b = c->b + batch * k * c->n + first;
    for (integer l = 0; l < k; l++)
        for (integer j = 0; j < LANES; j++) panel[l * LANES + j] = j < columns ? b[l * c->n + j] : 0;
    for (integer i = 0; i < c->m; i++) {
        lanes s, t, size;
        row_by_panel(c->a + (batch * c->m + i) * k, panel, k, &s, &t, &size);
        for (integer j = 0; j < columns; j++) {
            const integer at = (batch * c->m + i) * c->n + first + j;
            const compensated sum = {s[j], t[j], size[j]};
            const pair p = compensated_pair(&sum, k);
            c->s[at] = p.s, c->t[at] = p.t, c->rad[at] = (size[j] < c->exact ? 0 : p.rad) + c->lost;
        }
    }
}

static void multiply(integer task, void *data) {
    const product *c = data;
    double *memory = reproml_scratch((size_t)(c->k + 1) * LANES * sizeof *memory);
    double *panel = memory ? (double *)(((uintptr_t)memory + 63) & ~(uintptr_t)63) : 0;
    if (panel) {
        multiply_panel(c, task, panel);
        return;
    }
    const integer batch = task / c->panels, first = task % c->panels * LANES;
    for (integer i = 0; i < c->m; i++)
        for (integer j = first; j < c->n && j < first + LANES; j++) c->rad[(batch * c->m + i) * c->n + j] = INFINITY;
}

/* The smallest of the numbers that is not 0. */
VECTORISED static double smallest(const double *x, integer n) {
    double least = INFINITY;
    for (integer i = 0; i < n; i++) {
        const double size = x[i] != 0 ? fabs(x[i]) : INFINITY;
        least = size < least ? size : least;
    }
    return least;
}

/* The largest e for which all numbers are integers times 2^e. */
static int common_exponent(const double *x, integer n) {
    int least = INT_MAX;
    for (integer i = 0; i < n; i++) {
        uint64_t bits;
        memcpy(&bits, x + i, sizeof bits);
        const int e = (int)(bits >> 52 & 2047);
        const uint64_t whole = (bits & (((uint64_t)1 << 52) - 1)) | (e ? (uint64_t)1 << 52 : 0);
        if (!whole) continue;
        const int here = (e ? e : 1) - 1075 + __builtin_ctzll(whole);
        least = here < least ? here : least;
    }
    return least;
}

/* Products of dense matrices, a [batch, m, k] and b [batch, k, n]. */
void reproml_binary64_products(integer batch, integer m, integer n, integer k, const double *a, const double *b,
                               double *const *out) {
    product c = {m, n, k, (n + LANES - 1) / LANES, a, b, out[0], out[1], out[2], 0, 0};
    const int e_a = common_exponent(a, batch * m * k), e_b = common_exponent(b, batch * k * n);
    /* The errors are integers times 2^(e_a + e_b). Numbers that were rounded to binary32 make masses of midpoints. */
    if (e_a < INT_MAX && e_b < INT_MAX) c.exact = ldexp(0x1p50, e_a + e_b);
    if (smallest(a, batch * m * k) * smallest(b, batch * k * n) < LEAST) c.lost = (double)k * LOST;
    run_tasks(multiply, &c, batch * c.panels, batch * m * n * k > 32768);
}
