/* Sums of products whose terms are spread over several workers (distributed/partial_sums.py): the binary64 sums of one
   worker's terms, how they are packed for the exchange, and the sums over all workers, each rounded once. Or they are
   spread over several micro-batches (distributed/running_sums.py). */

#include "tile.h"

#define DEPTH 1024 /* terms of one pass, so that a panel of b stays in the second-level cache */
#define RUN 256    /* terms added in sequence; as many as partial_sums.py has in _RUN */
#define SERIAL (1 << 16)

/* ---- the sums of one worker ---- */

typedef struct {
    integer m, n, k;
    const float *a, *b;
    const integer *a_row, *a_term, *b_term, *b_column; /* offsets: [m], [k], [k], [n] */
    double *out;                                       /* [m, n] */
    const tiling *tiles;
    integer row_panels, column_panels, tasks;
    integer first, depth;      /* the terms of this pass */
    double *wide_a;            /* [row_panels, depth, rows of the panel] */
    double *squares_a;         /* [m]: the sums of squares of this pass */
    double *norms_a, *norms_b; /* [m], [n]: the sums of squares of all passes */
    const integer *offset;
    double *memory; /* for each task: a panel of b, and of a and b with ones for numbers that are not zero */
} products;

#define TASK_MEMORY (DEPTH * (TILE_COLUMNS + TILE_ROWS)) /* doubles: two panels of floats, one of doubles */

VECTORISED static void widen_lines(integer panel, void *data) {
    const products *x = data;
    integer i = panel * x->tiles->rows;
    int m = (int)smaller(x->m - i, x->tiles->rows);
    double *restrict to = x->wide_a + i * x->depth;
    for (int r = 0; r < m; r++) {
        const float *from = x->a + x->a_row[i + r];
        double squares = 0;
        for (integer p = 0; p < x->depth; p++) {
            double value = from[x->a_term[x->first + p]];
            to[p * m + r] = value;
            squares += value * value;
        }
        x->squares_a[i + r] = squares;
        x->norms_a[i + r] += squares;
    }
}

VECTORISED static void pack(const products *x, integer j, int n, float *restrict to, double *restrict squares) {
    const integer *restrict column = x->b_column + j;
    int contiguous = 1;
    for (int c = 1; c < n; c++) contiguous &= column[c] == column[0] + c;
    for (int c = 0; c < TILE_COLUMNS; c++) squares[c] = 0;
    if (n < TILE_COLUMNS) memset(to, 0, (size_t)(x->depth * TILE_COLUMNS) * sizeof(float));
    for (integer p = 0; p < x->depth; p++) {
        const float *restrict from = x->b + x->b_term[x->first + p];
        float *restrict row = to + p * TILE_COLUMNS;
        if (contiguous && n == TILE_COLUMNS)
            memcpy(row, from + column[0], TILE_COLUMNS * sizeof(float));
        else
            for (int c = 0; c < n; c++) row[c] = from[column[c]];
        for (int c = 0; c < TILE_COLUMNS; c++) squares[c] += (double)row[c] * row[c];
    }
    for (int c = 0; c < n; c++) x->norms_b[j + c] += squares[c];
}

VECTORISED static void ones_of_floats(const float *restrict from, integer n, float *restrict to) {
    for (integer i = 0; i < n; i++) to[i] = from[i] != 0;
}

VECTORISED static void ones_of_doubles(const double *restrict from, integer n, double *restrict to) {
    for (integer i = 0; i < n; i++) to[i] = from[i] != 0;
}

/* The sums of one tile over the terms of this pass. */
static void sum_tile(const products *x, const double *a, const float *b, int m, int n, double *restrict sums) {
    across_loop *loop = x->tiles->across[m][(n + x->tiles->lanes - 1) / x->tiles->lanes];
    for (integer p = 0; p < x->depth; p += RUN) {
        double part[TILE_ROWS * TILE_COLUMNS];
        loop(smaller(x->depth - p, RUN), a + p * m, b + p * TILE_COLUMNS, x->offset, p ? part : sums);
        for (int i = 0; p && i < m; i++)
            for (int j = i * TILE_COLUMNS; j < i * TILE_COLUMNS + n; j++) sums[j] += part[j];
    }
}

/* Whether a sum is zero though neither its row of a nor its column of b consists of zeros; the other zeros become
   -0. */
static int32_t find_zeros(const double *squares_a, const double *squares_b, int m, int n, double *sums) {
    int32_t left = 0;
    for (int i = 0; i < m; i++) {
        int32_t any = 0;
        for (int j = 0; j < n; j++) any |= sums[i * TILE_COLUMNS + j] == 0;
        for (int j = 0; any && j < n; j++)
            if (sums[i * TILE_COLUMNS + j] == 0) {
                if (squares_a[i] == 0 || squares_b[j] == 0)
                    sums[i * TILE_COLUMNS + j] = -0.0;
                else
                    left = 1;
            }
    }
    return left;
}

static void multiply(integer task, void *data) {
    const products *x = data;
    double *ones_a = x->memory + task * TASK_MEMORY;
    float *panel = (float *)(ones_a + DEPTH * TILE_ROWS), *ones_b = panel + DEPTH * TILE_COLUMNS;
    double squares_b[TILE_COLUMNS];
    for (integer t = task; t < x->column_panels; t += x->tasks) {
        integer j = t * x->tiles->columns;
        int n = (int)smaller(x->n - j, x->tiles->columns), has_ones = 0;
        pack(x, j, n, panel, squares_b);
        for (integer i = 0; i < x->m; i += x->tiles->rows) {
            int m = (int)smaller(x->m - i, x->tiles->rows);
            const double *a = x->wide_a + i * x->depth;
            double sums[TILE_ROWS * TILE_COLUMNS];
            sum_tile(x, a, panel, m, n, sums);
            if (find_zeros(x->squares_a + i, squares_b, m, n, sums)) { /* count the terms that are not zero */
                double counts[TILE_ROWS * TILE_COLUMNS];
                if (!has_ones) ones_of_floats(panel, x->depth * TILE_COLUMNS, ones_b);
                has_ones = 1;
                ones_of_doubles(a, x->depth * m, ones_a);
                sum_tile(x, ones_a, ones_b, m, n, counts);
                for (int r = 0; r < m; r++)
                    for (int c = r * TILE_COLUMNS; c < r * TILE_COLUMNS + n; c++)
                        if (sums[c] == 0) sums[c] = counts[c] == 0 ? -0.0 : 0.0;
            }
            for (int r = 0; r < m; r++) {
                double *restrict to = x->out + (i + r) * x->n + j;
                const double *restrict from = sums + r * TILE_COLUMNS;
                if (x->first)
                    for (int c = 0; c < n; c++) to[c] += from[c];
                else
                    for (int c = 0; c < n; c++) to[c] = from[c];
            }
        }
    }
}

/* out[i, j] = sum over p < k of a[a_row[i] + a_term[p]] * b[b_term[p] + b_column[j]]; -0 where all terms are zeros, +0
   where they cancel. norms_a [m] and norms_b [n]: the norms of the factors. No size is 0. Each term passes through at
   most min(k, RUN) + k / RUN + 1 additions. Returns -1 for lack of memory. */
int reproml_partial_product(integer m, integer n, integer k, const float *a, const integer *a_row,
                            const integer *a_term, const float *b, const integer *b_term, const integer *b_column,
                            double *out, double *norms_a, double *norms_b) {
    products x = {.m = m,
                  .n = n,
                  .k = k,
                  .a = a,
                  .b = b,
                  .a_row = a_row,
                  .a_term = a_term,
                  .b_term = b_term,
                  .b_column = b_column,
                  .out = out,
                  .norms_a = norms_a,
                  .norms_b = norms_b,
                  .tiles = reproml_tiling()};
    integer depth = k < DEPTH ? k : DEPTH, threads = m * n * depth > SERIAL ? reproml_threads() : 1;
    x.row_panels = (m + x.tiles->rows - 1) / x.tiles->rows;
    x.column_panels = (n + x.tiles->columns - 1) / x.tiles->columns;
    x.tasks = x.column_panels < threads ? x.column_panels : threads;
    double *work = reproml_scratch((size_t)(x.tasks * TASK_MEMORY + m * depth + depth + m) * 8);
    if (!work) return -1;
    x.memory = work;
    x.wide_a = x.memory + x.tasks * TASK_MEMORY;
    integer *offset = (integer *)(x.wide_a + m * depth);
    x.squares_a = (double *)(offset + depth);
    memset(norms_a, 0, (size_t)m * sizeof(double));
    memset(norms_b, 0, (size_t)n * sizeof(double));
    for (integer p = 0; p < depth; p++) offset[p] = p * TILE_COLUMNS;
    x.offset = offset;
    for (x.first = 0; x.first < k; x.first += DEPTH) {
        x.depth = k - x.first < DEPTH ? k - x.first : DEPTH;
        run_tasks(widen_lines, &x, x.row_panels, m * x.depth > SERIAL);
        run_tasks(multiply, &x, x.tasks, x.tasks > 1);
    }
    for (integer i = 0; i < m; i++) norms_a[i] = sqrt(norms_a[i]);
    for (integer j = 0; j < n; j++) norms_b[j] = sqrt(norms_b[j]);
    return 0;
}

/* Some of these sums with their rounding errors kept: out[3 f], s, t and e with |s + t - exact| <= e, for the row that
   begins at a[a_at[f]] and the column that begins at b[b_at[f]]. */
void reproml_partial_pairs(integer count, integer k, const float *a, const integer *a_at, const integer *a_term,
                           const float *b, const integer *b_at, const integer *b_term, double *out) {
    for (integer f = 0; f < count; f++, out += 3) {
        compensated sum = {0, 0, 0};
        for (integer p = 0; p < k; p++) add_exact(&sum, (double)a[a_at[f] + a_term[p]] * b[b_at[f] + b_term[p]]);
        out[0] = sum.s;
        out[1] = sum.t;
        out[2] = compensated_pair(&sum, k).rad;
    }
}

/* ---- sums of products that continue over several calls, without any rounding error ---- */

#define PANEL 32 /* columns that are added to at a time */

typedef struct {
    integer m, n, k;
    const float *a;
    const integer *a_row, *a_term;
    const float *panels; /* [panels, k, columns of the panel]: the factors of b */
    int finite;          /* whether all of these are, so that a factor 0 of a adds nothing */
    double *s, *t;       /* [m, n] */
    uint8_t *failed;     /* [m, n] */
    integer count;       /* of the failed elements */
} running;

/* Add the terms of one row and one panel to s + t. lost[j] is not 0 if a sum needs more than two numbers. */
VECTORISED static void add_terms_exactly(const running *x, const float *a, const float *restrict b, int n,
                                         double *restrict s, double *restrict t, double *restrict lost) {
    for (integer p = 0; p < x->k; p++, b += n) {
        double factor = a[x->a_term[p]];
        if (factor == 0 && x->finite) continue;
        for (int j = 0; j < n; j++) {
            double rest, more;
            two_sum(s[j], factor * b[j], s + j, &rest);
            two_sum(t[j], rest, t + j, &more);
            lost[j] += fabs(more);
        }
    }
}

static void add_row_of_products(integer i, void *data) {
    running *x = data;
    for (integer j = 0; j < x->n; j += PANEL) {
        int n = (int)smaller(x->n - j, PANEL);
        double s[PANEL], t[PANEL], lost[PANEL] = {0}, *to_s = x->s + i * x->n + j, *to_t = x->t + i * x->n + j;
        memcpy(s, to_s, (size_t)n * sizeof *s);
        memcpy(t, to_t, (size_t)n * sizeof *t);
        add_terms_exactly(x, x->a + x->a_row[i], x->panels + j * x->k, n, s, t, lost);
        for (int c = 0; c < n; c++) {
            int finite = fabs(s[c]) <= DBL_MAX, fails = finite && lost[c] != 0;
            x->failed[i * x->n + j + c] = (uint8_t)fails;
            if (fails)
                __atomic_fetch_add(&x->count, 1, __ATOMIC_RELAXED);
            else {
                to_s[c] = s[c];
                to_t[c] = finite ? t[c] : 0; /* infinity and NaN remain what they are */
            }
        }
    }
}

/* Add sum over p < k of a[a_row[i] + a_term[p]] * b[b_term[p] + b_column[j]] to s[i, j] + t[i, j], exactly, but for the
   elements whose sum needs more than two numbers: they keep what they have and are marked in `failed`. No size is 0.
   Returns the number of failed elements, -1 for lack of memory. */
integer reproml_add_products(integer m, integer n, integer k, const float *a, const integer *a_row,
                             const integer *a_term, const float *b, const integer *b_term, const integer *b_column,
                             double *s, double *t, uint8_t *failed) {
    running x = {.m = m, .n = n, .k = k, .a = a, .a_row = a_row, .a_term = a_term, .s = s, .t = t, .failed = failed};
    float *to = reproml_scratch((size_t)(k * n) * sizeof *to);
    if (!to) return -1;
    x.panels = to;
    x.finite = 1;
    for (integer j = 0; j < n; j += PANEL)
        for (integer p = 0; p < k; p++)
            for (integer c = j; c < n && c < j + PANEL; c++, to++) {
                *to = b[b_term[p] + b_column[c]];
                x.finite &= fabsf(*to) <= FLT_MAX;
            }
    run_tasks(add_row_of_products, &x, m, m * n * k > SERIAL);
    return x.count;
}

/* ---- the exchange ----

   A row of n sums with a bound of the absolute values of its terms is packed into record_size(n) bytes: the bound, then
   the upper 32 and the lower 16 bits of each sum, an integer of 48 bits in units of row_unit(bound). */

#define EMPTY INT32_MIN /* the upper bits where all terms are zeros, and of numbers that are not finite: */
#define NOT_A_NUMBER 1  /* their lower bits */
#define INFINITE 2
#define MINUS_INFINITE 3
#define MAGIC 0x1.8p52 /* x + MAGIC is rounded to an integer, which its lower bits have */

static integer record_size(integer n) { return 8 + (6 * n + 7) / 8 * 8; }

/* A power of two: |sum| <= bound (1 + 2^-41) < 2^47 units. */
static double row_unit(double bound) {
    int exponent;
    frexp(bound * (1 + 0x1p-40), &exponent);
    return ldexp(1.0, exponent - 47);
}

VECTORISED static void pack_row(const double *restrict sums, integer n, double scale, int32_t *restrict high,
                                uint16_t *restrict low) {
    for (integer j = 0; j < n; j++) {
        uint64_t q = (uint64_t)pattern(sums[j] * scale + MAGIC) - (uint64_t)pattern(MAGIC);
        int32_t empty = pattern(sums[j]) == INT64_MIN;
        high[j] = empty ? EMPTY : (int32_t)(uint32_t)(q >> 16);
        low[j] = empty ? 0 : (uint16_t)q;
    }
}

/* Pack a row whose bound is infinite or NaN: its finite sums will fail the test, so their values do not matter. */
static void pack_special_row(const double *sums, integer n, int32_t *high, uint16_t *low) {
    for (integer j = 0; j < n; j++) {
        int finite = fabs(sums[j]) <= DBL_MAX;
        high[j] = finite && pattern(sums[j]) != INT64_MIN ? 0 : EMPTY;
        low[j] = (uint16_t)(finite ? 0 : sums[j] != sums[j] ? NOT_A_NUMBER : sums[j] > 0 ? INFINITE : MINUS_INFINITE);
    }
}

/* Pack rows of n sums: to[m, record_size(n)]. */
void reproml_pack_sums(integer m, integer n, const double *sums, const double *bounds, char *to) {
    for (integer i = 0; i < m; i++, sums += n, to += record_size(n)) {
        int32_t *high = (int32_t *)(void *)(to + 8);
        uint16_t *low = (uint16_t *)(void *)(high + n);
        memcpy(to, bounds + i, sizeof *bounds);
        memset(low + n, 0, (size_t)(to + record_size(n) - (char *)(low + n)));
        if (bounds[i] <= DBL_MAX)
            pack_row(sums, n, 1 / row_unit(bounds[i]), high, low);
        else
            pack_special_row(sums, n, high, low);
    }
}

VECTORISED static void add_row(const int32_t *restrict high, const uint16_t *restrict low, integer n, double unit,
                               double *restrict sums) {
    for (integer j = 0; j < n; j++) {
        double value = ((double)high[j] * 0x1p16 + low[j]) * unit;
        sums[j] += high[j] == EMPTY ? -0.0 : value;
    }
}

static void add_special_row(const int32_t *high, const uint16_t *low, integer n, double *sums) {
    for (integer j = 0; j < n; j++) {
        const double values[] = {-0.0, NAN, INFINITY, -INFINITY};
        sums[j] += high[j] == EMPTY ? values[low[j]] : 0.0;
    }
}

VECTORISED static int32_t round_sums(const double *restrict sums, integer n, double divisor, double radius,
                                     float *restrict out) {
    int32_t failed = 0;
    for (integer j = 0; j < n; j++) {
        int32_t differ = round_sum(sums[j] / divisor, radius, out + j), empty = pattern(sums[j]) == INT64_MIN;
        out[j] = empty ? 0 : out[j]; /* only zeros were added; an exact zero is +0 */
        failed |= empty ? 0 : differ;
    }
    return failed;
}

/* Round the sums over all workers: out [rows, n]. received: the records of worker w begin at received + w * step.
   relative: a bound of the relative error of the sums, with room for the test. failed: memory for rows * n indices.
   sums: memory for n numbers. Returns the number of sums for which the test failed. */
integer reproml_round_sums(const char *received, integer workers, integer step, integer rows, integer n,
                           double relative, double divisor, double *sums, float *out, int32_t *failed) {
    integer count = 0;
    for (integer i = 0; i < rows; i++, out += n) {
        double bound = 0, units = 0;
        for (integer j = 0; j < n; j++) sums[j] = -0.0;
        for (integer w = 0; w < workers; w++) {
            const char *record = received + w * step + i * record_size(n);
            const int32_t *high = (const int32_t *)(const void *)(record + 8);
            const uint16_t *low = (const uint16_t *)(const void *)(high + n);
            double its_bound;
            memcpy(&its_bound, record, sizeof its_bound);
            bound += its_bound;
            if (its_bound <= DBL_MAX) {
                double unit = row_unit(its_bound);
                units += its_bound > 0 ? unit : 0;
                add_row(high, low, n, unit, sums);
            } else
                add_special_row(high, low, n, sums);
        }
        /* A sum was rounded to half a unit; the rest of 0.5625 is room for what `relative` multiplies. */
        double radius = (bound * relative + 0.5625 * units) / divisor * SLACK;
        if (!round_sums(sums, n, divisor, radius, out) && radius <= DBL_MAX) continue;
        for (integer j = 0; j < n; j++) {
            double mid = sums[j] / divisor;
            if (!(fabs(mid) <= DBL_MAX))
                out[j] = to_target(mid); /* infinite or NaN in any order */
            else if (pattern(mid) == INT64_MIN)
                out[j] = 0;
            else if (round_sum(mid, radius, out + j) || !(radius <= DBL_MAX))
                failed[count++] = (int32_t)(i * n + j);
        }
    }
    return count;
}
