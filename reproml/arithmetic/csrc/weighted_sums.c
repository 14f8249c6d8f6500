/* Sums with rational weights along up to three axes: interpolation, average pooling, and their gradients
   (operators/weighted_sums.py).

   The sums are computed in binary64 with rounded weights, one axis after the other. Subnormal, equal and whole numbers
   then fail the test in masses, as their sums are ties. Such sums are computed again with integers as weights and
   divided once: those of a plane together if binary64 holds all of them, and others one by one with their rounding
   errors. */

#include "compensated.h"

enum { AXES = 3 };

/* A sparse matrix: weight k of a row belongs to a column. Rows with fewer weights have zeros at the end. */
typedef struct {
    integer rows, columns, width;
    const integer *index;              /* [rows, width] */
    const double *weights, *numerator; /* [rows, width]; integers, or null */
} axis;

typedef struct {
    axis axes[AXES];
    integer inner, outer, most; /* numbers of a plane: of the input, the output, and the largest product on the way */
    const double *divisors;     /* [outer]: a sum of integer multiples is divided by it */
    double growth, bound;       /* of sums of integer multiples, relative to the largest number; 0 without integers */
    const float *x;
    float *out;
    uint8_t *failed;
    integer failures;
} call;

INLINE void apply_axis(const axis *m, int integers, int sizes, integer before, integer after, const double *restrict in,
                       double *restrict out) {
    const double *weights = integers ? m->numerator : m->weights;
    for (integer b = 0; b < before; b++)
        for (integer r = 0; r < m->rows; r++) {
            const double *w = weights + r * m->width, *from = in + b * m->columns * after;
            const integer *index = m->index + r * m->width;
            double *to = out + (b * m->rows + r) * after;
            if (after == 1) {
                double sum = 0;
                for (integer k = 0; k < m->width; k++) sum += (sizes ? fabs(w[k]) : w[k]) * from[index[k]];
                *to = sum;
                continue;
            }
            for (integer i = 0; i < after; i++) to[i] = 0;
            for (integer k = 0; k < m->width; k++) {
                const double weight = sizes ? fabs(w[k]) : w[k], *row = from + index[k] * after;
                for (integer i = 0; i < after; i++) to[i] += weight * row[i];
            }
        }
}

/* Apply all axes to the numbers in `a`; the result is there or in b. */
INLINE double *apply_axes(const call *c, int integers, int sizes, double *a, double *b) {
    integer before = 1, after = c->inner;
    for (int i = 0; i < AXES; i++) {
        const axis *m = c->axes + i;
        after /= m->columns;
        if (m->rows == 1 && m->columns == 1 && m->width == 1) { /* mostly an axis that is not there */
            const double given = (integers ? m->numerator : m->weights)[0], w = sizes ? fabs(given) : given;
            for (integer k = 0; w != 1 && k < before * after; k++) a[k] *= w;
            continue;
        }
        apply_axis(m, integers, sizes, before, after, a, b);
        before *= m->rows;
        double *swap = a;
        a = b, b = swap;
    }
    return a;
}

/* Whether binary64 holds all sums of integer multiples: they are multiples of the last bit of any number. */
INLINE int are_short(const call *c, const float *x) {
    int32_t last = 512;
    double largest = 0;
    for (integer i = 0; i < c->inner; i++) {
        const int32_t pattern = bits(x[i]), fraction = pattern & 0x7FFFFF, exponent = pattern >> 23 & 0xFF;
        const int32_t whole = exponent ? fraction | 0x800000 : fraction;
        if (!whole) continue;
        const int32_t bit = (exponent ? exponent : 1) + __builtin_ctz((unsigned)whole);
        last = bit < last ? bit : last;
        largest = fabs(x[i]) > largest ? fabs(x[i]) : largest;
    }
    return largest * c->growth <= ldexp(1, last - 150 + 53);
}

/* The quotient of two integers. It is a tie only if nothing remains; otherwise it has one rounding. */
INLINE int32_t round_quotient(double sum, double divisor, float *out) {
    const double quotient = sum / divisor;
    if (fma(-quotient, divisor, sum) == 0) {
        *out = to_target(quotient + 0.0); /* an exact zero is +0 */
        return 0;
    }
    return round_sum(quotient, 3 * U * fabs(quotient), out) && round_pair(pair_over((pair){sum, 0, 0}, divisor), out);
}

/* The sum of integer multiples of one result, divided; the products are exact. */
static int32_t sum_again(const call *c, const float *x, integer at, float *out) {
    const axis *m = c->axes;
    integer row[AXES], rest = at;
    for (int i = AXES - 1; i >= 0; i--) row[i] = rest % m[i].rows * m[i].width, rest /= m[i].rows;
    compensated sum = {0, 0, 0};
    for (integer i = row[0]; i < row[0] + m[0].width; i++)
        for (integer j = row[1]; j < row[1] + m[1].width; j++)
            for (integer k = row[2]; k < row[2] + m[2].width; k++) {
                const integer from = (m[0].index[i] * m[1].columns + m[1].index[j]) * m[2].columns + m[2].index[k];
                add_exact(&sum, m[0].numerator[i] * m[1].numerator[j] * m[2].numerator[k] * x[from]);
            }
    const integer terms = m[0].width * m[1].width * m[2].width;
    return round_pair(pair_over(compensated_pair(&sum, terms), c->divisors[at]), out);
}

VECTORISED static void sum_plane(integer plane, void *data) {
    call *c = data;
    const float *x = c->x + plane * c->inner;
    float *out = c->out + plane * c->outer;
    uint8_t *failed = c->failed + plane * c->outer;
    double *memory = reproml_scratch((size_t)(4 * c->most) * sizeof(double));
    double *a = memory, *b = a + c->most, *p = b + c->most, *q = p + c->most;
    integer failures = 0;
    int finite = memory != 0;
    for (integer i = 0; memory && i < c->inner; i++) {
        a[i] = x[i];
        p[i] = fabs(a[i]);
        finite &= p[i] <= DBL_MAX;
    }
    const double *mid = finite ? apply_axes(c, 0, 0, a, b) : 0, *size = finite ? apply_axes(c, 0, 1, p, q) : 0;
    for (integer i = 0; i < c->outer; i++)
        failures += failed[i] = !finite || round_sum(mid[i] + 0.0, size[i] * c->bound, out + i);
    if (failures && finite && c->growth != 0) {
        const int together = failures > c->outer / 16 && are_short(c, x);
        for (integer i = 0; together && i < c->inner; i++) a[i] = x[i];
        const double *sums = together ? apply_axes(c, 1, 0, a, b) : 0;
        failures = 0;
        for (integer i = 0; i < c->outer; i++)
            if (failed[i]) {
                const int32_t left =
                    sums ? round_quotient(sums[i], c->divisors[i], out + i) : sum_again(c, x, i, out + i);
                failures += failed[i] = left != 0;
            }
    }
    __atomic_fetch_add(&c->failures, failures, __ATOMIC_RELAXED);
}

/* out [planes, *rows of the three axes] = the sums of x [planes, *columns]. sizes: rows, columns and width of each axis;
   pointers: index of each, weights, and numerators or null. additions: how many roundings a sum has. Planes with an
   infinite or NaN number fail. `failed` has one element for each of `out`. Returns how many failed. */
integer reproml_weighted_sums(integer planes, const integer *sizes, const void *const *pointers, const double *divisors,
                              double growth, integer additions, const float *x, float *out, uint8_t *failed) {
    call c = {.inner = 1,
              .outer = 1,
              .most = 1,
              .divisors = divisors,
              .growth = growth,
              .bound = relative_bound((double)additions),
              .x = x,
              .out = out,
              .failed = failed};
    for (int i = 0; i < AXES; i++) {
        const integer rows = sizes[3 * i], columns = sizes[3 * i + 1];
        c.axes[i] = (axis){rows, columns, sizes[3 * i + 2], pointers[i], pointers[AXES + i], pointers[2 * AXES + i]};
        c.inner *= columns;
        c.outer *= rows;
        c.most *= rows > columns ? rows : columns;
    }
    run_tasks(sum_plane, &c, planes, planes > 1 && planes * c.most > WORTH_A_THREAD);
    return c.failures;
}
