/* Fast loops of formulas over rows: softmax, log_softmax and their gradients. */

#include "fast.h"

#include "compensated_runs.h"
#include "softmax_pairs.h"

enum { PARTS = 16 };

/* The number of additions that a number passes through in `sum`, and two more. */
INLINE double height(integer n) { return (double)(n / PARTS + 8); }

INLINE double sum(const double *x, integer n) {
    double part[PARTS] = {0}, total = 0;
    integer i = 0;
    for (; i + PARTS <= n; i += PARTS)
        for (int l = 0; l < PARTS; l++) part[l] += x[i + l];
    if (i)
        for (int width = PARTS / 2; width; width /= 2)
            for (int l = 0; l < width; l++) part[l] += part[l + width];
    for (integer j = i; j + 4 <= n; j += 4) total += (x[j] + x[j + 1]) + (x[j + 2] + x[j + 3]);
    for (integer j = n - (n - i) % 4; j < n; j++) total += x[j];
    return part[0] + total;
}

/* The sum of x y, whose terms are exact, or of x alone if y is null, with a bound of its error. */
INLINE ball quick_sum(const float *x, const float *y, integer n) {
    const runs r = {.x = x, .y = y, .runs = 1, .length = n};
    double total[2];
    const integer height = y ? sum_runs(PRODUCTS, &r, total) : sum_runs(NUMBERS, &r, total);
    return (ball){total[0], (double)height * U * SLACK * total[1]};
}

/* The same with a smaller bound. A sum without rounding errors is exact. */
INLINE ball exact_sum(const float *x, const float *y, integer n) {
    const pair total = sum_with_errors(x, y, 0, 0, 1, n);
    return (ball){total.s, fabs(total.t) + total.rad};
}

/* The largest of n numbers; it may ignore a NaN. */
INLINE float largest(const float *x, integer n) {
    float part[PARTS], top = x[0];
    integer i = 0;
    if (n >= PARTS) {
        for (int l = 0; l < PARTS; l++) part[l] = x[l];
        for (i = PARTS; i + PARTS <= n; i += PARTS)
            for (int l = 0; l < PARTS; l++) part[l] = x[i + l] > part[l] ? x[i + l] : part[l];
        for (int l = 0; l < PARTS; l++) top = part[l] > top ? part[l] : top;
    }
    for (; i < n; i++) top = x[i] > top ? x[i] : top;
    return top;
}

/* mid = x minus the largest number of the row; error_of_row >= 0 bounds the relative error of its exponential. Above
   -128, a difference that TwoSum finds to be rounded adds 128 U; below, both its exponential and the calculated one are
   below 2^-184 of the sum and vanish in binary32. */
INLINE void subtract_largest(row_table *t) {
    for (integer r = 0; r < t->rows; r++) {
        const float *x = t->x + r * t->n;
        const double top = largest(x, t->n);
        double *d = t->mid + r * t->n, lost;
        int64_t inexact = 0;
        for (integer i = 0; i < t->n; i++) {
            two_sum(x[i], -top, &d[i], &lost);
            inexact |= lost != 0;
        }
        t->error_of_row[r] = EXP_ERROR + (inexact ? 128 * U : 0);
    }
}

/* exp(d) / sum, as a multiplication by the inverse. Infinite and NaN rows result in NaN, which fails the test. */
INLINE void softmax(row_table *t) {
    const integer count = t->rows * t->n;
    subtract_largest(t);
    for (integer i = 0; i < count; i++) {
        double d = t->mid[i], e = fast_exp(d);
        t->mid[i] = d == -INFINITY ? 0 : e;
    }
    for (integer r = 0; r < t->rows; r++) {
        t->of_row[r] = 1 / sum(t->mid + r * t->n, t->n);
        t->error_of_row[r] = 2 * t->error_of_row[r] + (height(t->n) + 4) * U;
    }
}

/* d - log1p(the sum of exp over all but one of the largest numbers): both have the same sign, so nothing cancels; log1p
   passes on the relative error of its operand and adds 2^-49. */
INLINE void log_softmax(row_table *t) {
    const integer count = t->rows * t->n;
    double e[ROW_MAX];
    subtract_largest(t);
    for (integer i = 0; i < count; i++) {
        double d = t->mid[i], y = fast_exp(d);
        e[i] = d < 0 ? (d == -INFINITY ? 0 : y) : d + 1; /* 1, or NaN, which fails the test */
    }
    for (integer r = 0; r < t->rows; r++) {
        double *of = e + r * t->n, *first = of;
        const double *d = t->mid + r * t->n;
        while (first < of + t->n - 1 && d[first - of] != 0) first++;
        *first -= 1;
        t->of_row[r] = sum(of, t->n);
        t->error_of_row[r] += 0x1p-49 + (height(t->n) + 4) * U;
    }
    for (integer r = 0; r < t->rows; r++) t->of_row[r] = log1p_(t->of_row[r]);
}

INLINE void sums(row_table *t, int product, int exact) {
    for (integer r = 0; r < t->rows; r++) {
        const float *x = t->x + r * t->n, *y = product ? t->y + r * t->n : 0;
        const ball s = exact ? exact_sum(x, y, t->n) : quick_sum(x, y, t->n);
        t->of_row[r] = s.mid, t->error_of_row[r] = s.rad;
    }
}

INLINE void exponentials(row_table *t) {
    for (integer i = 0; i < t->rows * t->n; i++) {
        const double y = t->y[i], e = fast_exp(y);
        t->mid[i] = y > 700 ? INFINITY : y == -INFINITY ? 0 : y == 0 ? 1 : e;
    }
}

/* Round the elements of one row that failed the tests by pairs. */
static void finish_row_by_pairs(row_table *t, integer r, int which) {
    const integer first = r * t->n;
    float out[ROW_MAX];
    int32_t left[ROW_MAX], any = 0;
    for (integer i = 0; i < t->n; i++) any |= t->failed[first + i];
    if (!any) return;
    reproml_softmax_row(which - SOFTMAX, t->x + first, t->y ? t->y + first : 0, t->n, out, left);
    for (integer i = 0; i < t->n; i++)
        if (t->failed[first + i]) {
            t->out[first + i] = out[i];
            t->failed[first + i] = left[i];
        }
}

/* A result of a row with the sum s and its error e. before: what was calculated of the element. */
INLINE ball result(int which, double before, double x, double y, double s, double e) {
    double c, rad;
    if (which == SOFTMAX) {
        c = before * s;
        rad = c * e;
    } else if (which == LOG_SOFTMAX) {
        c = before - s;
        rad = fabs(c) * e;
    } else if (which == SOFTMAX_BACKWARD) { /* y (g - s) */
        c = y * (x - s);
        rad = fabs(y) * e + 3 * U * fabs(c);
    } else { /* g - exp(y) s; the exponential errs by EXP_ERROR, and not at all where it is 0 or 1 */
        const double p = before * s;
        c = x - p;
        rad = before * e + (y == 0 ? 0 : fabs(p) * (EXP_ERROR + U)) + 2 * U * fabs(c);
    }
    return (ball){c + 0.0, rad}; /* an exact zero of a row is +0 */
}

INLINE int32_t finish_row(row_table *t, integer r, int which) {
    const double s = t->of_row[r], e = t->error_of_row[r];
    int32_t any = 0;
    for (integer i = r * t->n; i < (r + 1) * t->n; i++) {
        const ball v = result(which, t->mid[i], t->x[i], t->y[i], s, e);
        any |= round_normal_ball(v.mid, v.rad, &t->out[i]);
    }
    return any;
}

/* Test with exact sums, and round what fails by pairs. */
INLINE void finish_row_again(row_table *t, integer r, int which) {
    const double s = t->of_row[r], e = t->error_of_row[r];
    for (integer i = r * t->n; i < (r + 1) * t->n; i++) {
        const ball v = result(which, t->mid[i], t->x[i], t->y[i], s, e);
        t->failed[i] = round_ball(v.mid, 0, v.rad, &t->out[i]);
        if (which == LOG_SOFTMAX) t->failed[i] &= v.mid != -INFINITY;
    }
    finish_row_by_pairs(t, r, which);
}

INLINE void finish_rows(row_table *t, int which) {
    int32_t any = 0;
    for (integer r = 0; r < t->rows; r++) any |= finish_row(t, r, which);
    t->any_failed = any != 0;
    if (!any) return;
    if (which >= SOFTMAX_BACKWARD) sums(t, which == SOFTMAX_BACKWARD, 1);
    for (integer r = 0; r < t->rows; r++) finish_row_again(t, r, which);
}

#define FORMULA(NAME, BEFORE) \
    case NAME:                \
        BEFORE;               \
        finish_rows(t, NAME); \
        break;

VECTORISED static void softmax_rows(int which, row_table *t) {
    switch (which) {
        FORMULA(SOFTMAX, softmax(t))
        FORMULA(LOG_SOFTMAX, log_softmax(t))
        FORMULA(SOFTMAX_BACKWARD, sums(t, 1, 0))
        FORMULA(LOG_SOFTMAX_BACKWARD, (sums(t, 0, 0), exponentials(t)))
    }
}

void reproml_softmax_rows(int which, row_table *t) { softmax_rows(which, t); }
