/* The loops of panels.h, as in K. Goto & R. van de Geijn, Anatomy of high-performance matrix multiplication, ACM TOMS
   34(3), 2008. Lines of a, widened to binary64, are shared by all threads; a panel of lines of b is packed by the
   thread that multiplies it, a slice of terms at a time that stays in the first-level cache.

   Products of bfloat16 numbers are exact in binary32. For PRECISION 8 nothing is widened (`single`): blocks of
   SINGLE_BLOCK terms are summed in binary32, twice as many at once, and the blocks in binary64. Rounding errs by at most
   2^-24 of each partial sum of a block, so a term counts once for each rounded sum that it is in, which is w <= 15
   times, and by Cauchy-Schwarz the norms of lines whose squares have the factors w bound the error. An element that
   fails the test is summed in binary64. Numbers with more bits, as an in-place form may bring, or from 2^60, are left to
   the loops in binary64, and so are products with panels that are kept. */

#include "panels.h"

#define SLICE 256        /* terms for which a panel of b stays in the first-level cache */
#define SECTION 2048     /* terms for which lines of a are prepared at once */
#define BLOCK 256        /* lines of a that are prepared at once: with a section 4 MB */
#define SERIAL (1 << 16) /* multiplications that take a microsecond or two, too few for a second thread */

#define SMALL (1 << 20) /* multiplications of one product of a batch that are not worth several threads */

#define TILE (TILE_ROWS * TILE_COLUMNS)
#define MANY_FAILED 16 /* elements of a tile that fail, from which on they are summed again in rows */
#define MANY_TILES 8   /* tiles, for which lines of a panel are made contiguous again */
#define SHORT 32       /* terms, fewer than which cost less across the columns than along the terms */
#define WIDE 480       /* columns that are multiplied with few lines of a at once: a multiple of every tile */

static inline integer parts(integer n, integer size) { return (n + size - 1) / size; }

/* ---- packing ---- */

/* Runs of lines whose numbers are contiguous, cut into pieces of 8, 4, 2 and 1 numbers. Pieces may overlap. */
typedef struct {
    int count[4];
    int to[4][TILE_COLUMNS];
    integer from[4][TILE_COLUMNS];
} pieces;

static inline void add_piece(pieces *s, int size, int to, integer from) {
    s->to[size][s->count[size]] = to;
    s->from[size][s->count[size]++] = from;
}

/* Returns the number of pieces. */
static int find_pieces(const integer *line, int count, pieces *s) {
    int all = 0, end;
    memset(s->count, 0, sizeof s->count);
    for (int start = 0; start < count; start = end) {
        for (end = start + 1; end < count && line[end] == line[end - 1] + 1; end++) {
        }
        int run = end - start, size = run >= 8 ? 0 : run >= 4 ? 1 : run >= 2 ? 2 : 3, width = 8 >> size;
        for (int at = start; at < end; at += width, all++) {
            if (at > end - width) at = end - width; /* overlaps the piece before */
            add_piece(s, size, at, line[start] + at - start);
        }
    }
    return all;
}

#define COPY(size)                           \
    for (int i = 0; i < s->count[size]; i++) \
        memcpy(row + s->to[size][i], source + s->from[size][i], (8 >> size) * sizeof(float));

VECTORISED static void copy_pieces(const pieces *s, const float *restrict from, const integer *restrict term,
                                   integer depth, int pitch, float *restrict to) {
    if (s->count[0] == 3 && !s->count[1] && !s->count[2] && !s->count[3]) { /* also in a panel of contiguous lines */
        integer a = s->from[0][0], b = s->from[0][1], c = s->from[0][2];
        int d = s->to[0][1], e = s->to[0][2];
        for (integer p = 0; p < depth; p++) {
            float *row = to + p * pitch;
            memcpy(row, from + term[p] + a, 8 * sizeof(float));
            memcpy(row + d, from + term[p] + b, 8 * sizeof(float));
            memcpy(row + e, from + term[p] + c, 8 * sizeof(float));
        }
        return;
    }
    for (integer p = 0; p < depth; p++) {
        const float *restrict source = from + term[p];
        float *restrict row = to + p * pitch;
        COPY(0) COPY(1) COPY(2) COPY(3)
    }
}

/* to[p * pitch + j] = number p of line j, for `count` lines and `depth` terms; the rest of each row is finite. */
static void pack(const product *x, const operand *o, integer item, integer first, int count, integer begin,
                 integer depth, int pitch, float *to) {
    const float *from = o->first + item * o->step;
    const integer *term = o->term + begin;
    integer line[TILE_COLUMNS] = {0}, end;
    pieces s;
    for (int j = 0; j < pitch; j++) line[j] = o->line[first + (j < count ? j : count - 1)];
    if (find_pieces(line, count, &s) <= (count + 1) / 2) {
        if (count < pitch) memset(to, 0, (size_t)(depth * pitch) * sizeof(float));
        copy_pieces(&s, from, term, depth, pitch, to);
        return;
    }
    int used = (count + 7) / 8 * 8;
    if (used < pitch) memset(to, 0, (size_t)(depth * pitch) * sizeof(float));
    for (integer p = 0; p < depth; p = end) {
        for (end = p + 1; end < depth && term[end] == term[end - 1] + 1; end++) {
        }
        if (end - p >= 8)
            for (int j = 0; j < used; j += 8)
                x->tiles->transpose(from + term[p], line + j, end - p, to + p * pitch + j, pitch);
        else
            for (integer q = p; q < end; q++)
                for (int j = 0; j < used; j++) to[q * pitch + j] = from[term[q] + line[j]];
    }
}

/* ---- one product of the batch ---- */

/* Number p of line r is first[r * line_step + p * step]. */
typedef struct {
    const float *first;
    integer line_step, step;
} lines;

typedef struct {
    const product *x;
    int along;
    integer item, first, length, block, panels; /* first: term; block, panels: row panels */
    double *wide;                               /* [panels, length, rows of the panel]; see single_panel */
    double *norm_a, *norm_b;                    /* [m], [n]; squares until the last section */
    float *lines_of_a;                          /* of `single`: [panels, TILE_ROWS, length], or null */
    double *sums;                               /* [column panels, row panels, TILE], if there are several sections */
    char *memory;                               /* of the first worker */
    int *infinite, *wide_numbers;               /* flags; wide_numbers: `single` is not possible */
} job;

static size_t worker_bytes(const product *x) {
    integer panel = x->single ? x->length * x->pitch : SLICE * x->pitch / 2; /* and its lines, for `single` */
    return (size_t)(x->block * TILE + panel) * sizeof(double);
}

#if PRECISION == 8
/* One panel of a, [length, TILE_ROWS]. */
static inline float *single_panel(const job *j, integer panel) {
    return (float *)j->wide + panel * TILE_ROWS * j->length;
}
#endif

static inline int is_last(const job *j) { return j->first + j->length == j->x->k; }

VECTORISED static void widen(const float *restrict from, integer depth, int rows, double *restrict to,
                             double *restrict squares) {
    double sum[TILE_ROWS] = {0};
    if (rows == TILE_ROWS) /* most panels; with a constant number of rows this is one vector */
        for (integer p = 0; p < depth; p++)
            for (int i = 0; i < TILE_ROWS; i++) {
                double v = from[p * TILE_ROWS + i];
                to[p * TILE_ROWS + i] = v;
                sum[i] += v * v;
            }
    else
        for (integer p = 0; p < depth; p++)
            for (int i = 0; i < rows; i++) {
                double v = from[p * TILE_ROWS + i];
                to[p * rows + i] = v;
                sum[i] += v * v;
            }
    for (int i = 0; i < rows; i++) squares[i] += sum[i];
}

INLINE void add_rows_of_squares(const float *restrict x, integer depth, const int pitch, double *restrict squares) {
    double sum[2][TILE_COLUMNS] = {{0}}; /* two, as an addition takes several cycles */
    integer p = 0;
    for (; p + 2 <= depth; p += 2, x += 2 * pitch)
        for (int j = 0; j < pitch; j++) {
            sum[0][j] += (double)x[j] * x[j];
            sum[1][j] += (double)x[pitch + j] * x[pitch + j];
        }
    for (; p < depth; p++, x += pitch)
        for (int j = 0; j < pitch; j++) sum[0][j] += (double)x[j] * x[j];
    for (int j = 0; j < pitch; j++) squares[j] += sum[0][j] + sum[1][j];
}

#if PRECISION == 8
typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t eight_bits __attribute__((vector_size(32), aligned(4), may_alias));
typedef double eight_wide __attribute__((vector_size(64)));

/* Add the squares of a panel, each as often as the sums in binary32 that it is in are rounded. Returns nonzero if a
   number has more bits than a bfloat16 number or is not below 2^60: its products might be inexact or overflow. */
VECTORISED static int32_t add_weighted_squares(const float *restrict x, integer depth, int pitch,
                                               double *restrict squares) {
    eight_bits wide = {0};
    int32_t any = 0;
    for (int j = 0; j < pitch; j += 8) {
        eight_wide sum = {0};
        for (integer p = 0; p < depth; p += SINGLE_BLOCK) {
            integer end = smaller(depth, p + SINGLE_BLOCK);
            double weight = SINGLE_BLOCK - 1;
            eight_wide part = {0};
            for (integer q = p; q < end; q++) {
                const float *row = x + q * pitch + j;
                eight_bits b = *(const eight_bits *)row;
                eight_wide v = __builtin_convertvector(*(const eight *)row, eight_wide);
                wide |= (b & 0xFFFF) | ((b & INT32_MAX) >= (187 << 23));
                part += v * v * weight;
                if (q > p) weight -= 1;
            }
            sum += part;
        }
        for (int t = 0; t < 8; t++) squares[j + t] += sum[t];
    }
    for (int t = 0; t < 8; t++) any |= wide[t];
    return any;
}

/* The sum of the products of two lines. */
VECTORISED static double sum_products(const float *restrict a, const float *restrict b, integer n) {
    double part[16] = {0}, sum = 0;
    integer p = 0;
    for (; p + 16 <= n; p += 16)
        for (int t = 0; t < 16; t++) part[t] += (double)a[p + t] * b[p + t];
    for (; p < n; p++) part[p & 15] += (double)a[p] * b[p];
    for (int t = 0; t < 16; t++) sum += part[t];
    return sum;
}

/* The same for lines whose numbers lie apart. */
static double sum_distant_products(const float *a, integer a_step, const float *b, integer b_step, integer n) {
    double part[4] = {0};
    for (integer p = 0; p < n; p++) part[p & 3] += (double)a[p * a_step] * b[p * b_step];
    return (part[0] + part[1]) + (part[2] + part[3]);
}

/* to[j * length + p] = from[p * pitch + j] for p < length. */
static void unpack(const product *x, const float *from, int pitch, integer length, float *to) {
    integer line[8], p = 0;
    for (int r = 0; r < 8; r++) line[r] = r * pitch;
    for (; p + 8 <= length; p += 8) x->tiles->transpose(from + p * pitch, line, pitch, to + p, length);
    for (; p < length; p++)
        for (int j = 0; j < pitch; j++) to[j * length + p] = from[p * pitch + j];
}
#endif

VECTORISED static void add_squares(const float *restrict x, integer depth, int pitch, double *restrict squares) {
    if (pitch == 24)
        add_rows_of_squares(x, depth, 24, squares);
    else if (pitch == 16)
        add_rows_of_squares(x, depth, 16, squares);
    else
        add_rows_of_squares(x, depth, 8, squares);
}

static int take_roots(double *squares, integer n) {
    int infinite = 0;
    for (integer i = 0; i < n; i++) {
        squares[i] = sqrt(squares[i]);
        infinite |= !(squares[i] <= DBL_MAX);
    }
    return infinite;
}

/* Prepare one panel of a. */
static void prepare(integer panel, void *data) {
    const job *j = data;
    const product *x = j->x;
    integer i = (j->block + panel) * x->tiles->rows;
    int rows = (int)smaller(x->m - i, x->tiles->rows);
    double *to = j->wide + panel * x->tiles->rows * j->length;
    float memory[SLICE * TILE_ROWS];
    if (!j->first) memset(j->norm_a + i, 0, (size_t)rows * sizeof(double));
#if PRECISION == 8
    if (x->single) {
        double squares[TILE_ROWS] = {0};
        for (integer p = 0; p < j->length; p += SLICE) {
            integer depth = smaller(j->length - p, SLICE);
            float *lines = single_panel(j, panel) + p * TILE_ROWS;
            pack(x, &x->a, j->item, i, rows, j->first + p, depth, TILE_ROWS, lines);
            if (add_weighted_squares(lines, depth, TILE_ROWS, squares)) set_flag(j->wide_numbers);
        }
        for (int r = 0; r < rows; r++) j->norm_a[i + r] += squares[r];
        if (is_last(j)) take_roots(j->norm_a + i, rows);
        if (j->lines_of_a)
            unpack(x, single_panel(j, panel), TILE_ROWS, j->length, j->lines_of_a + panel * TILE_ROWS * j->length);
        return;
    }
#endif
    for (integer p = 0; p < j->length; p += SLICE) {
        integer depth = smaller(j->length - p, SLICE);
        pack(x, &x->a, j->item, i, rows, j->first + p, depth, TILE_ROWS, memory);
        widen(memory, depth, rows, to + p * rows, j->norm_a + i);
    }
    if (is_last(j) && take_roots(j->norm_a + i, rows)) set_flag(j->infinite);
}

/* Round an element that failed the test by the sum of its terms with its rounding errors. */
static void round_with_errors(const product *x, integer item, integer i, integer j, compensated s) {
    integer at = item * x->out_step + x->row[i] + x->column[j];
    if (x->row_bias) add_exact(&s, x->row_bias[item * x->bias_step + i]);
    if (x->column_bias) add_exact(&s, x->column_bias[item * x->bias_step + j]);
    if (x->added) add_exact(&s, x->added[at]);
    if (round_compensated(&s, x->k + 1, x->out + at)) add_failure(x->failed, at);
}

static compensated sum_with_errors(const product *x, integer item, integer i, integer j) {
    const float *a = x->a.first + item * x->a.step + x->a.line[i], *b = x->b.first + item * x->b.step + x->b.line[j];
    compensated s = {0, 0, 0};
    for (integer p = 0; p < x->k; p++) add_exact(&s, (double)a[x->a.term[p]] * b[x->b.term[p]]);
    return s;
}

/* The sums of a row of a tile, each as in `compensated`. */
typedef struct {
    double s[TILE_COLUMNS], t[TILE_COLUMNS], size[TILE_COLUMNS];
} row_of_sums;

INLINE void add_rows_with_errors(integer depth, const float *restrict a, const float *restrict b, const int pitch,
                                 row_of_sums *restrict sums) {
    double s[TILE_COLUMNS], t[TILE_COLUMNS], size[TILE_COLUMNS];
    memcpy(s, sums->s, sizeof s), memcpy(t, sums->t, sizeof t), memcpy(size, sums->size, sizeof size);
    for (integer p = 0; p < depth; p++) {
        const double v = a[p * TILE_ROWS];
        for (int j = 0; j < pitch; j++) {
            double sum, error;
            two_sum(s[j], v * b[p * pitch + j], &sum, &error);
            s[j] = sum, t[j] += error, size[j] += fabs(error);
        }
    }
    memcpy(sums->s, s, sizeof s), memcpy(sums->t, t, sizeof t), memcpy(sums->size, size, sizeof size);
}

VECTORISED static void add_with_errors(integer depth, const float *restrict a, const float *restrict b, int pitch,
                                       row_of_sums *restrict sums) {
    if (pitch == 24)
        add_rows_with_errors(depth, a, b, 24, sums);
    else if (pitch == 16)
        add_rows_with_errors(depth, a, b, 16, sums);
    else
        add_rows_with_errors(depth, a, b, 8, sums);
}

/* The largest absolute value in each line of a panel, and the largest power of two that divides all its numbers. */
typedef struct {
    float largest[TILE_COLUMNS], unit[TILE_COLUMNS];
} ranges;

VECTORISED static void find_ranges(integer depth, const float *restrict x, int pitch, ranges *restrict of) {
    for (integer p = 0; p < depth; p++, x += pitch)
        for (int j = 0; j < pitch; j++) {
            const int32_t b = bits(x[j]) & INT32_MAX, shorter = b & (b - 1); /* without the last bit */
            const float size = fabsf(x[j]), unit = b & 0x7FFFFF ? size - from_bits(shorter) : size;
            of->largest[j] = size > of->largest[j] ? size : of->largest[j];
            of->unit[j] = ((unit < of->unit[j]) & (size > 0)) ? unit : of->unit[j];
        }
}

/* Find which sums of a tile are exact, as those of whole numbers and with a gradient of ones mostly are: every partial
   sum is a multiple of the product of two units, and a binary64 number if it is at most 2^53 of them. (`largest` is
   rounded, at most from 2^53 + 1 to 2^53, which no partial sum but the last can reach.) */
static void find_exact(const product *x, integer item, integer i, integer j, int m, int n, int *exact) {
    memset(exact, 0, TILE * sizeof *exact);
    if (x->single) return;
    float a[SLICE * TILE_ROWS], b[SLICE * TILE_COLUMNS];
    ranges of_a, of_b;
    for (int t = 0; t < TILE_COLUMNS; t++)
        of_a.largest[t] = of_b.largest[t] = 0, of_a.unit[t] = of_b.unit[t] = INFINITY;
    for (integer p = 0; p < x->k; p += SLICE) {
        const integer depth = smaller(x->k - p, SLICE);
        pack(x, &x->a, item, i, m, p, depth, TILE_ROWS, a);
        pack(x, &x->b, item, j, n, p, depth, x->pitch, b);
        find_ranges(depth, a, TILE_ROWS, &of_a), find_ranges(depth, b, (int)x->pitch, &of_b);
    }
    for (int r = 0; r < m; r++)
        for (int c = 0; c < n; c++) {
            const double largest = (double)x->k * of_a.largest[r] * of_b.largest[c];
            exact[r * TILE_COLUMNS + c] = largest <= 0x1p53 * of_a.unit[r] * of_b.unit[c];
        }
}

/* Round the elements of a tile that failed, of which there are many: whole rows at once. */
static void round_rows_with_errors(const product *x, integer item, integer i, integer j, int m, int n,
                                   const double *quick, const int *failed, int count) {
    float a[SLICE * TILE_ROWS], b[SLICE * TILE_COLUMNS];
    row_of_sums sums[TILE_ROWS];
    int used[TILE_ROWS] = {0}, exact[TILE], any = 0;
    memset(sums, 0, sizeof sums);
    find_exact(x, item, i, j, m, n, exact);
    for (int t = 0; t < count; t++)
        if (!exact[failed[t]]) any = used[failed[t] / TILE_COLUMNS] = 1;
    for (integer p = 0; any && p < x->k; p += SLICE) {
        integer depth = smaller(x->k - p, SLICE);
        pack(x, &x->a, item, i, m, p, depth, TILE_ROWS, a);
        pack(x, &x->b, item, j, n, p, depth, x->pitch, b);
        for (int r = 0; r < m; r++)
            if (used[r]) add_with_errors(depth, a + r, b, x->pitch, sums + r);
    }
    for (int t = 0; t < count; t++) {
        int r = failed[t] / TILE_COLUMNS, c = failed[t] % TILE_COLUMNS;
        compensated sum = {sums[r].s[c], sums[r].t[c], sums[r].size[c]};
        if (exact[failed[t]]) sum = (compensated){quick[failed[t]], 0, 0};
        round_with_errors(x, item, i + r, j + c, sum);
    }
}

static int is_run(const integer *at, integer n, integer step) {
    for (integer i = 1; i < n; i++)
        if (at[i] != at[i - 1] + step) return 0;
    return 1;
}

#if PRECISION == 8
/* Sum an element in binary64 that failed the test in binary32. norms: their product, which is at least the sum of
   the absolute values. Returns nonzero if the test fails again. */
static int32_t round_in_binary64(const product *x, integer item, integer i, integer j, const lines *a, const lines *b,
                                 int r, int c, double norms) {
    const float *of_a = x->a.first + item * x->a.step + x->a.line[i],
                *of_b = x->b.first + item * x->b.step + x->b.line[j];
    integer a_step = 1, b_step = 1;
    double sum = 0;
    if (x->a_contiguous)
        of_a += x->a.term[0];
    else if (a)
        of_a = a->first + r * a->line_step, a_step = a->step;
    if (x->b_contiguous)
        of_b += x->b.term[0];
    else if (b)
        of_b = b->first + c * b->line_step, b_step = b->step;
    if ((!x->a_contiguous && !a) || (!x->b_contiguous && !b)) {
        of_a -= x->a_contiguous ? x->a.term[0] : 0, of_b -= x->b_contiguous ? x->b.term[0] : 0;
        for (integer p = 0; p < x->k; p++) sum += (double)of_a[x->a.term[p]] * of_b[x->b.term[p]];
    } else
        sum = a_step == 1 && b_step == 1 ? sum_products(of_a, of_b, x->k)
                                         : sum_distant_products(of_a, a_step, of_b, b_step, x->k);
    const integer at = item * x->out_step + x->row[i] + x->column[j];
    double bias = x->row_bias      ? x->row_bias[item * x->bias_step + i]
                  : x->column_bias ? x->column_bias[item * x->bias_step + j]
                  : x->added       ? x->added[at]
                                   : 0;
    return round_sum(sum + bias, relative_bound((double)x->k) * (norms + fabs(bias)), x->out + at);
}
#endif

/* Copy what is added to the elements of a tile to `to`, and return that. */
static const float *gather_added(const product *x, integer item, const integer *row, const integer *column, int m,
                                 int n, float *to) {
    const float *from = x->added + item * x->out_step;
    for (int r = 0; r < m; r++)
        for (int c = 0; c < n; c++) to[r * TILE_COLUMNS + c] = from[row[r] + column[c]];
    return to;
}

/* Round and store one tile. a, b: its panels, if blocks of its terms were summed in binary32 and the panels have all
   terms. */
static void store(const product *x, integer item, integer i, integer j, const double *sums, const double *norm_a,
                  const double *norm_b, const lines *a, const lines *b) {
    int m = (int)smaller(x->m - i, x->tiles->rows), n = (int)smaller(x->n - j, x->columns);
    int failed[TILE];
    float tile[TILE], *out = x->out + item * x->out_step;
    const integer *row = x->row + i, *column = x->column + j;
    integer stride = m > 1 ? row[1] - row[0] : 0, step = n > 1 ? column[1] - column[0] : 0;
    int direct = is_run(column, n, 1) && is_run(row, m, stride);
    /* A sum is a sequence of a slice's terms, then of the slices and the sections. */
    double g = relative_bound((double)(smaller(x->k, SLICE) + x->k / SLICE + 2 * x->sections));
    if (x->single) g += 0x1p-24 * (1 + 0x1p-16); /* (1 + 2^-24)^w - 1 < w g for w <= SINGLE_BLOCK, with room */
    float added[TILE];
    const float *column_bias = x->added         ? gather_added(x, item, row, column, m, n, added)
                               : x->column_bias ? x->column_bias + item * x->bias_step + j
                                                : NULL;
    int count = reproml_round_tile(
        sums, m, n, g, norm_a + i, norm_b, x->row_bias ? x->row_bias + item * x->bias_step + i : NULL, column_bias,
        x->added ? TILE_COLUMNS : 0, direct ? out + row[0] + column[0] : tile, direct ? stride : TILE_COLUMNS, failed);
    if (!direct) {
        static const integer lines[8] = {0,
                                         TILE_COLUMNS,
                                         2 * TILE_COLUMNS,
                                         3 * TILE_COLUMNS,
                                         4 * TILE_COLUMNS,
                                         5 * TILE_COLUMNS,
                                         6 * TILE_COLUMNS,
                                         7 * TILE_COLUMNS};
        if (m == 8 && n >= 8 && is_run(row, m, 1) && is_run(column, n, step))
            x->tiles->transpose(tile, lines, n, out + row[0] + column[0], step);
        else
            for (int r = 0; r < m; r++)
                for (int c = 0; c < n; c++) out[row[r] + column[c]] = tile[r * TILE_COLUMNS + c];
    }
    int left = 0;
    for (int t = 0; t < count; t++) {
        int r = failed[t] / TILE_COLUMNS, c = failed[t] % TILE_COLUMNS;
        if (sums[failed[t]] != sums[failed[t]]) {
            out[row[r] + column[c]] = to_target(sums[failed[t]]); /* NaN in any order */
            continue;
        }
#if PRECISION == 8
        if (x->single && !round_in_binary64(x, item, i + r, j + c, a, b, r, c, norm_a[i + r] * norm_b[c])) continue;
#endif
        failed[left++] = failed[t];
    }
    (void)a, (void)b;
    if (left >= MANY_FAILED)
        round_rows_with_errors(x, item, i, j, m, n, sums, failed, left);
    else
        for (int t = 0; t < left; t++) {
            integer r = i + failed[t] / TILE_COLUMNS, c = j + failed[t] % TILE_COLUMNS;
            round_with_errors(x, item, r, c, sum_with_errors(x, item, r, c));
        }
}

/* Multiply tiles of this section and block; each worker takes a range of the same length. */
static void multiply(integer worker, void *data) {
    const job *j = data;
    const product *x = j->x;
    integer panel_offset[SLICE], workers = x->by_item ? 1 : x->workers;
    integer tiles = j->panels * x->column_panels, from = worker * tiles / workers, to = (worker + 1) * tiles / workers;
    double *part = (double *)(j->memory + (size_t)worker * worker_bytes(x));
    float *panel = (float *)(part + x->block * TILE);
    for (integer p = 0; p < SLICE; p++) panel_offset[p] = p * x->pitch;
    for (integer end; from < to; from = end) {
        integer c = from / j->panels, begin = from - c * j->panels;
        end = smaller(to, (c + 1) * j->panels);
        integer column = c * x->columns, count = end - from;
        int n = (int)smaller(x->n - column, x->columns);
        double squares[TILE_COLUMNS] = {0};
        for (integer p = 0; p < j->length || !p; p += SLICE) {
            integer depth = smaller(j->length - p, SLICE);
            float *memory = x->single ? panel + p * x->pitch : panel;
            const float *slice = memory;
            if (x->kept)
                slice = x->kept->panels + (c * x->k + j->first + p) * x->pitch;
            else {
                pack(x, &x->b, j->item, column, n, j->first + p, depth, x->pitch, memory);
#if PRECISION == 8
                if (x->single) {
                    if (add_weighted_squares(memory, depth, x->pitch, squares)) set_flag(j->wide_numbers);
                } else
#endif
                    add_squares(memory, depth, x->pitch, squares);
            }
            for (integer r = 0; r < count; r++) {
                integer i = begin + r;
                int m = (int)smaller(x->m - (j->block + i) * x->tiles->rows, x->tiles->rows);
                double more[TILE], *sums = p ? more : part + r * TILE;
#if PRECISION == 8
                if (x->single)
                    x->tiles->single[m][parts(n, 2 * x->tiles->lanes)](depth, single_panel(j, i) + p * TILE_ROWS, slice,
                                                                       x->pitch, sums);
                else
#endif
                    x->tiles->across[m][parts(n, x->tiles->lanes)](
                        depth, j->wide + i * x->tiles->rows * j->length + p * m, slice, panel_offset, sums);
                if (p)
                    for (int t = 0; t < m * TILE_COLUMNS; t++) part[r * TILE + t] += more[t];
            }
        }
        if (x->sections == 1) {
            if (!x->kept && take_roots(squares, n)) set_flag(j->infinite);
            const double *norms = x->kept ? x->kept->norms + column : squares;
            const lines *of_a = NULL, *of_b = NULL;
#if PRECISION == 8
            lines a, b = {panel, 1, x->pitch};
            if (x->single && !x->b_contiguous && count >= MANY_TILES) {
                b = (lines){panel + x->length * x->pitch, x->length, 1};
                unpack(x, panel, x->pitch, x->length, panel + x->length * x->pitch);
            }
            if (x->single) of_a = &a, of_b = &b;
#endif
            for (integer r = 0; r < count; r++) {
#if PRECISION == 8
                a = (lines){single_panel(j, begin + r), 1, TILE_ROWS};
                if (j->lines_of_a) a = (lines){j->lines_of_a + (begin + r) * TILE_ROWS * x->length, x->length, 1};
#endif
                store(x, j->item, (j->block + begin + r) * x->tiles->rows, column, part + r * TILE, j->norm_a, norms,
                      of_a, of_b);
            }
            continue;
        }
        if (!j->block && !begin)
            for (int t = 0; t < n; t++) j->norm_b[column + t] = squares[t] + (j->first ? j->norm_b[column + t] : 0);
        double *sums = j->sums + (c * x->row_panels + j->block + begin) * TILE;
        for (integer t = 0; t < count * TILE; t++) sums[t] = part[t] + (j->first ? sums[t] : 0);
    }
}

/* Round the tiles of one panel of columns, after the last of several sections. */
static void round_column(integer c, void *data) {
    const job *j = data;
    const product *x = j->x;
    integer column = c * x->columns;
    const double *norms = (x->kept ? x->kept->norms : j->norm_b) + column;
    if (!x->kept && take_roots(j->norm_b + column, smaller(x->n - column, x->columns))) set_flag(j->infinite);
    for (integer r = 0; r < x->row_panels; r++)
        store(x, j->item, r * x->tiles->rows, column, j->sums + (c * x->row_panels + r) * TILE, j->norm_a, norms, NULL,
              NULL);
}

static void pack_panel(integer c, void *data) {
    const job *j = data;
    const product *x = j->x;
    integer column = c * x->columns;
    int n = (int)smaller(x->n - column, x->columns);
    double squares[TILE_COLUMNS] = {0};
    for (integer p = 0; p < x->k; p += SLICE) {
        integer depth = smaller(x->k - p, SLICE);
        float *to = x->kept->panels + (c * x->k + p) * x->pitch;
        pack(x, &x->b, 0, column, n, p, depth, x->pitch, to);
        add_squares(to, depth, x->pitch, squares);
    }
    take_roots(squares, n);
    memcpy(x->kept->norms + column, squares, (size_t)n * sizeof(double));
}

void reproml_pack(const product *x) {
    job j = {.x = x};
    run_tasks(pack_panel, &j, x->column_panels, x->workers > 1);
}

/* ---- few lines of a, which need no panels ---- */

/* Multiply lines of b whose terms are contiguous. */
static void multiply_along(const job *j, integer column, int n, double *sums, double *squares) {
    const product *x = j->x;
    const tiling *t = x->tiles;
    const float *a = x->a.first + j->item * x->a.step + x->a.line[0] + x->a.term[0];
    const float *b = x->b.first + j->item * x->b.step + x->b.term[0];
    integer step = x->m > 1 ? x->a.line[1] - x->a.line[0] : 0, most = SLICE * t->lanes / 2, depth;
    double parts[ALONG_SUMS], part[TILE_COLUMNS];
    for (integer p = 0; p < x->k; p += depth) {
        depth = smaller(x->k - p, most);
        for (int c = 0; c < n; c += t->along_columns) {
            int width = (int)smaller(n - c, t->along_columns);
            const integer *line = x->b.line + column + c;
            t->along[x->m][width](depth, a + p, step, b + p, line, parts);
            fold(parts, (int)x->m * width, t->lanes, part);
            for (int i = 0; i < x->m; i++)
                for (int v = 0; v < width; v++) sums[i * WIDE + c + v] += part[i * width + v];
            for (int v = 0; v < width; v++) squares[c + v] += reproml_squares(b + p + line[v], depth, 1);
        }
    }
}

/* Add four terms of each sum. a [m, 4]; sums [m, WIDE]. */
VECTORISED static void add_terms(const double *restrict a, integer m, const float *restrict p, const float *restrict q,
                                 const float *restrict r, const float *restrict s, int n, double *restrict sums,
                                 double *restrict squares) {
    for (integer i = 0; i < m; i++, a += 4, sums += WIDE)
        for (int j = 0; j < n; j++) sums[j] = sums[j] + a[0] * p[j] + a[1] * q[j] + a[2] * r[j] + a[3] * s[j];
    for (int j = 0; j < n; j++)
        squares[j] = squares[j] + (double)p[j] * p[j] + (double)q[j] * q[j] + (double)r[j] * r[j] + (double)s[j] * s[j];
}

/* Multiply lines of b that lie side by side. */
static void multiply_across(const job *j, integer column, int n, double *sums, double *squares) {
    static const float zeros[WIDE];
    const product *x = j->x;
    const float *a = x->a.first + j->item * x->a.step, *b = x->b.first + j->item * x->b.step + x->b.line[column];
    double part[FEW_LINES * WIDE];
    for (integer first = 0; first < x->k; first += SLICE) {
        integer end = smaller(x->k, first + SLICE);
        memset(part, 0, (size_t)(x->m * WIDE) * sizeof(double));
        for (integer p = first; p < end; p += 4) {
            const float *row[4];
            double four[FEW_LINES * 4];
            for (int t = 0; t < 4; t++) {
                row[t] = p + t < end ? b + x->b.term[p + t] : zeros;
                for (integer i = 0; i < x->m; i++)
                    four[4 * i + t] = p + t < end ? a[x->a.line[i] + x->a.term[p + t]] : 0;
            }
            add_terms(four, x->m, row[0], row[1], row[2], row[3], n, part, squares);
        }
        for (integer t = 0; t < x->m * WIDE; t++) sums[t] += part[t];
    }
}

/* Multiply up to WIDE columns. */
static void multiply_few(integer task, void *data) {
    const job *j = data;
    const product *x = j->x;
    integer column = task * WIDE;
    int n = (int)smaller(x->n - column, WIDE);
    double sums[FEW_LINES * WIDE] = {0}, squares[WIDE] = {0}, tile[TILE];
    (j->along ? multiply_along : multiply_across)(j, column, n, sums, squares);
    if (take_roots(squares, n)) set_flag(j->infinite);
    for (int c = 0; c < n; c += x->columns) {
        for (integer i = 0; i < x->m; i++)
            memcpy(tile + i * TILE_COLUMNS, sums + i * WIDE + c, (size_t)x->columns * sizeof(double));
        store(x, j->item, 0, column + c, tile, j->norm_a, squares + c, NULL, NULL);
    }
}

/* ---- the batch ---- */

static integer item_doubles(const product *x) {
    integer sums = x->sections > 1 ? x->row_panels * x->column_panels * TILE : 0;
    integer of_a = x->single ? x->block * TILE_ROWS * x->length / 2 + 1 : 0;
    return x->block * x->tiles->rows * x->length + x->m + x->n + sums + of_a;
}

static size_t plan(product *x, int single) {
    const tiling *t = x->tiles = reproml_tiling();
    x->single = single, x->columns = t->columns;
#if PRECISION == 8
    if (single) x->columns = t->single_columns;
#endif
    x->pitch = (x->columns + 7) / 8 * 8;
    x->row_panels = parts(x->m, t->rows), x->column_panels = parts(x->n, x->columns);
    x->block = smaller(x->row_panels, BLOCK / t->rows);
    x->sections = x->k ? parts(x->k, single ? 4 * SECTION : SECTION) : 1, x->length = parts(x->k, x->sections);
    x->workers = x->batch * x->m * x->n * x->k > SERIAL ? reproml_threads() : 1;
    x->by_item =
        x->workers == 1 || x->batch >= 4 * x->workers || (x->batch >= x->workers && x->m * x->n * x->k < SMALL);
    return (size_t)x->workers * worker_bytes(x) +
           (size_t)((x->by_item ? x->workers : 1) * item_doubles(x)) * sizeof(double);
}

size_t reproml_plan(product *x) {
    size_t bytes = plan(x, 0), more = 0;
    if (PRECISION == 8 && !x->kept && x->m > FEW_LINES && x->k && x->k <= 1 << 20) more = plan(x, 1);
    return bytes > more ? bytes : more;
}

typedef struct {
    const product *x;
    char *memory;
    int infinite, along, across; /* along, across: how few lines of a are multiplied */
    int wide_numbers;
} whole;

/* Calculate one product of the batch. worker: -1 to use all of them. */
static void multiply_item(whole *w, integer item, integer worker) {
    const product *x = w->x;
    int parallel = worker < 0 && x->workers > 1;
    if (worker < 0) worker = 0;
    double *memory = (double *)(w->memory + (size_t)x->workers * worker_bytes(x)) + worker * item_doubles(x);
    job j = {.x = x, .item = item, .infinite = &w->infinite, .wide_numbers = &w->wide_numbers};
    j.memory = w->memory + (size_t)worker * worker_bytes(x);
    j.wide = memory, j.norm_a = j.wide + x->block * x->tiles->rows * x->length, j.norm_b = j.norm_a + x->m;
    j.sums = j.norm_b + x->n;
    if (x->single && x->sections == 1 && !x->a_contiguous && x->column_panels >= MANY_TILES)
        j.lines_of_a = (float *)j.sums;
    if (w->along || w->across) {
        j.first = 0, j.length = x->k, j.along = w->along;
        for (integer i = 0; i < x->m; i++) {
            double sum = 0;
            for (integer p = 0; p < x->k; p++) {
                double v = (x->a.first + item * x->a.step)[x->a.line[i] + x->a.term[p]];
                sum += v * v;
            }
            j.norm_a[i] = sum;
        }
        if (take_roots(j.norm_a, x->m)) set_flag(j.infinite);
        run_tasks(multiply_few, &j, parts(x->n, WIDE), parallel);
        return;
    }
    for (integer section = 0; section < x->sections; section++) {
        j.first = section * x->length, j.length = smaller(x->k - j.first, x->length);
        for (j.block = 0; j.block < x->row_panels; j.block += x->block) {
            j.panels = smaller(x->row_panels - j.block, x->block);
            run_tasks(prepare, &j, j.panels, parallel);
            run_tasks(multiply, &j, parallel ? x->workers : 1, parallel);
        }
    }
    if (x->sections > 1) run_tasks(round_column, &j, x->column_panels, parallel);
}

static void multiply_items(integer worker, void *data) {
    whole *w = data;
    for (integer i = worker * w->x->batch / w->x->workers; i < (worker + 1) * w->x->batch / w->x->workers; i++)
        multiply_item(w, i, worker);
}

int reproml_multiply(const product *given, void *memory) {
    product copy = *given, *x = &copy;
    whole w = {.x = x, .memory = memory};
    integer failures = x->failed->count;
    x->a_contiguous = x->single && is_run(x->a.term, x->k, 1);
    x->b_contiguous = x->single && is_run(x->b.term, x->k, 1);
    if (x->m <= FEW_LINES && x->k) {
        w.along = x->k >= SHORT && is_run(x->a.term, x->k, 1) && is_run(x->b.term, x->k, 1) &&
                  (x->m == 1 || is_run(x->a.line, x->m, x->a.line[1] - x->a.line[0]));
        w.across = !w.along && is_run(x->b.line, x->n, 1);
    }
    if (x->by_item)
        run_tasks(multiply_items, &w, x->workers, x->workers > 1);
    else
        for (integer i = 0; i < x->batch; i++) multiply_item(&w, i, -1);
    if (w.wide_numbers) {
        plan(x, 0);
        x->failed->count = failures;
        return reproml_multiply(x, memory);
    }
    return !w.infinite;
}
