/* Matrix products, rounded once, by the method of operators/matmul.py.

   The bound of an element is the product of the norms of its row of a and of its column of b. The sums are calculated,
   tested and rounded tile by tile. An element that fails the test is summed again with its rounding errors, and if it
   fails once more, it is reported to Python. */

#include "tile.h"

#define DEPTH 1024    /* terms of one pass, so that a panel of b stays in the second-level cache */
#define FAR (1 << 16) /* elements: a matrix that extends over more is packed first */
#define SHORT 448     /* terms: for fewer, the horizontal sums of along_loop cost more than packing b */
/* Multiplications (numbers to prepare: an eighth) that take a microsecond or two, too few for a second thread. */
#define SERIAL (1 << 16)

typedef struct {
    integer batch, m, n, k;
    const float *a, *b, *bias;        /* bias: null or [n] */
    integer a_batch, a_row, a_column; /* strides, in elements */
    integer b_batch, b_row, b_column;
    float *out; /* [batch, m, n] */
    failure_list *failed;
    const tiling *tiles;
    int along, rows, columns;          /* which loop, and its full tile */
    integer row_panels, column_panels; /* of one matrix of the batch */
    integer packed;                    /* the first column panel that is packed */
    integer groups;                    /* of row panels: a thread takes those that it prepared itself */
    integer first, depth;              /* the terms of this pass */
    double *norm_a, *norm_b;           /* [batch, row_panels * rows], [batch, column_panels * columns] */
    double *wide_a;                    /* across: a's panels, [depth, rows of the panel] each */
    float *panel_b;                    /* across: packed panels of b, [depth, TILE_COLUMNS] each */
    double *sums;                      /* of earlier passes, tile by tile; null if there is one pass */
    integer *b_offset, *panel_offset;
} product;

static inline int smaller(integer a, integer b) { return (int)(a < b ? a : b); }

static integer panel_count(integer n, int width) { return (n + width - 1) / width; }

VECTORISED static double squares(const float *restrict x, integer n, integer stride) {
    double part[16] = {0}, sum = 0;
    integer i = 0;
    if (stride == 1)
        for (; i + 16 <= n; i += 16)
            for (int t = 0; t < 16; t++) part[t] += (double)x[i + t] * x[i + t];
    for (; i < n; i++) sum += (double)x[i * stride] * x[i * stride];
    for (int t = 0; t < 16; t++) sum += part[t];
    return sum;
}

double reproml_squares(const float *x, integer n, integer stride) { return squares(x, n, stride); }

VECTORISED static void add_squares(const float *restrict x, int n, integer rows, integer stride,
                                   double *restrict norm) {
    for (integer p = 0; p < rows; p++)
        for (int j = 0; j < n; j++) norm[j] += (double)x[p * stride + j] * x[p * stride + j];
}

/* For a panel that is laid out [depth, rows] already: one call instead of one for each row. */
VECTORISED static void add_wide_squares(const double *restrict x, int rows, integer depth, double *restrict norm) {
    double sum[TILE_ROWS] = {0};
    if (rows == TILE_ROWS) /* most panels; with a constant number of rows this is one vector */
        for (integer p = 0; p < depth; p++)
            for (int i = 0; i < TILE_ROWS; i++) sum[i] += x[p * TILE_ROWS + i] * x[p * TILE_ROWS + i];
    else
        for (integer p = 0; p < depth; p++)
            for (int i = 0; i < rows; i++) sum[i] += x[p * rows + i] * x[p * rows + i];
    for (int i = 0; i < rows; i++) norm[i] += sum[i];
}

VECTORISED static void widen(const float *restrict from, integer row, integer column, int rows, integer depth,
                             double *restrict to) {
    if (row == 1)
        for (integer p = 0; p < depth; p++)
            for (int i = 0; i < rows; i++) to[p * rows + i] = from[p * column + i];
    else
        for (int i = 0; i < rows; i++)
            for (integer p = 0; p < depth; p++) to[p * rows + i] = from[i * row + p * column];
}

VECTORISED static void pack(const float *restrict from, integer row, integer column, int columns, integer depth,
                            float *restrict to) {
    if (columns < TILE_COLUMNS) memset(to, 0, (size_t)(depth * TILE_COLUMNS) * sizeof(float));
    if (column == 1)
        for (integer p = 0; p < depth; p++)
            for (int j = 0; j < columns; j++) to[p * TILE_COLUMNS + j] = from[p * row + j];
    else
        for (int j = 0; j < columns; j++)
            for (integer p = 0; p < depth; p++) to[p * TILE_COLUMNS + j] = from[p * row + j * column];
}

/* Prepare one panel of a for the tiles of this pass. */
static void prepare_a(const product *x, integer task) {
    integer batch = task / x->row_panels, i = task % x->row_panels * x->rows;
    int rows = smaller(x->m - i, x->rows);
    const float *a = x->a + batch * x->a_batch + i * x->a_row + x->first * x->a_column;
    integer at = batch * x->row_panels * x->rows + i;
    double *wide = x->wide_a + at * x->depth;
    if (!x->along) {
        widen(a, x->a_row, x->a_column, rows, x->depth, wide);
        add_wide_squares(wide, rows, x->depth, x->norm_a + at);
    } else
        for (int r = 0; r < rows; r++) x->norm_a[at + r] += reproml_squares(a + r * x->a_row, x->depth, x->a_column);
}

static float *panel_of(const product *x, integer batch, integer panel) {
    return x->panel_b + (batch * (x->column_panels - x->packed) + panel - x->packed) * x->depth * TILE_COLUMNS;
}

static void prepare_b(const product *x, integer task) {
    integer batch = task / x->column_panels, panel = task % x->column_panels, j = panel * x->columns;
    int columns = smaller(x->n - j, x->columns);
    const float *b = x->b + batch * x->b_batch + j * x->b_column + x->first * x->b_row;
    integer at = batch * x->column_panels * x->columns + j;
    double *norm = x->norm_b + at;
    if (!x->along && panel >= x->packed) {
        float *packed = panel_of(x, batch, panel);
        pack(b, x->b_row, x->b_column, columns, x->depth, packed);
        add_squares(packed, columns, x->depth, TILE_COLUMNS, norm);
    } else if (x->b_column == 1)
        add_squares(b, columns, x->depth, x->b_row, norm);
    else
        for (int c = 0; c < columns; c++) norm[c] += reproml_squares(b + c * x->b_column, x->depth, x->b_row);
}

static void prepare(integer task, void *data) {
    const product *x = data;
    integer a_tasks = x->batch * x->row_panels;
    if (task < a_tasks)
        prepare_a(x, task);
    else
        prepare_b(x, task - a_tasks);
}

/* Sum an element that failed the test again, with its rounding errors. */
static void round_with_errors(const product *x, integer batch, integer i, integer j, double sum) {
    const float *a = x->a + batch * x->a_batch + i * x->a_row, *b = x->b + batch * x->b_batch + j * x->b_column;
    integer at = (batch * x->m + i) * x->n + j;
    compensated s = {0, 0, 0};
    if (sum != sum) { /* NaN in any order */
        x->out[at] = (float)sum;
        return;
    }
    for (integer p = 0; p < x->k; p++) add_exact(&s, (double)a[p * x->a_column] * b[p * x->b_row]);
    if (x->bias) add_exact(&s, x->bias[j]);
    if (round_compensated(&s, x->k + 1, x->out + at)) add_failure(x->failed, at);
}

/* The sums of one tile over the terms of this pass. */
static void sum_tile(const product *x, integer batch, integer row_panel, integer panel, int m, int n, double *sums) {
    integer i = row_panel * x->rows, j = panel * x->columns;
    if (x->along) {
        const float *a = x->a + batch * x->a_batch + i * x->a_row + x->first;
        const float *b = x->b + batch * x->b_batch + j * x->b_column + x->first;
        for (int c = 0; c < n; c += x->tiles->along_columns, b += x->tiles->along_columns * x->b_column) {
            int width = smaller(n - c, x->tiles->along_columns);
            double parts[ALONG_SUMS];
            x->tiles->along[m][width](x->depth, a, x->a_row, b, x->b_offset, parts);
            for (int r = 0; r < m; r++)
                fold(parts + r * width * x->tiles->lanes, width, x->tiles->lanes, sums + r * TILE_COLUMNS + c);
        }
        return;
    }
    const double *a = x->wide_a + (batch * x->row_panels * x->rows + i) * x->depth;
    across_loop *loop = x->tiles->across[m][panel_count(n, x->tiles->lanes)];
    if (panel < x->packed)
        loop(x->depth, a, x->b + batch * x->b_batch + j + x->first * x->b_row, x->b_offset, sums);
    else
        loop(x->depth, a, panel_of(x, batch, panel), x->panel_offset, sums);
}

/* The height of the tree of additions: passes in sequence, each a sum of DEPTH terms. */
static double height(integer k) { return (double)(k < DEPTH ? k : DEPTH + k / DEPTH); }

/* Multiply one group of row panels with one panel of b, tile by tile. */
static void multiply(integer task, void *data) {
    const product *x = data;
    integer panel = task % x->column_panels, group = task / x->column_panels % x->groups;
    integer batch = task / x->groups / x->column_panels;
    integer share = panel_count(x->row_panels, (int)x->groups), j = panel * x->columns;
    int n = smaller(x->n - j, x->columns), last = x->first + x->depth == x->k;
    const float *bias = x->bias ? x->bias + j : NULL;
    const double *norm_b = x->norm_b + batch * x->column_panels * x->columns + j;
    for (integer r = group * share; r < (group + 1) * share && r < x->row_panels; r++) {
        integer i = r * x->rows;
        int m = smaller(x->m - i, x->rows), failed[TILE_ROWS * TILE_COLUMNS];
        double sums[TILE_ROWS * TILE_COLUMNS];
        sum_tile(x, batch, r, panel, m, n, sums);
        if (x->sums) {
            double *all = x->sums + ((batch * x->column_panels + panel) * x->row_panels + r) * TILE_ROWS * TILE_COLUMNS;
            for (int t = 0; t < m; t++)
                for (int c = t * TILE_COLUMNS; c < t * TILE_COLUMNS + n; c++) all[c] = sums[c] += x->first ? all[c] : 0;
        }
        if (!last) continue;
        int count = reproml_round_tile(sums, m, n, relative_bound(height(x->k)),
                                       x->norm_a + batch * x->row_panels * x->rows + i, norm_b, NULL, bias,
                                       x->out + (batch * x->m + i) * x->n + j, x->n, failed);
        for (int t = 0; t < count; t++)
            round_with_errors(x, batch, i + failed[t] / TILE_COLUMNS, j + failed[t] % TILE_COLUMNS, sums[failed[t]]);
    }
}

/* Round a tile. Returns nonzero if the test fails for an element; differ[i * TILE_COLUMNS + j] is nonzero for those. */
INLINE int32_t round_rows(const double *restrict sums, int m, int n, double g, const double *restrict row_bound,
                          const double *restrict column_bound, const float *restrict row_bias,
                          const float *restrict column_bias, float *restrict out, integer stride,
                          int32_t *restrict differ) {
    int32_t failed[TILE_COLUMNS] = {0}, any = 0;
    for (int i = 0; i < m; i++) {
        const double *restrict from = sums + i * TILE_COLUMNS;
        float *restrict to = out + i * stride;
        int32_t *restrict row = differ + i * TILE_COLUMNS;
        double bound = g * row_bound[i], constant = row_bias ? row_bias[i] : 0;
        for (int j = 0; j < n; j++) {
            double bias = column_bias ? (double)column_bias[j] : constant;
            row[j] = round_sum(from[j] + bias, bound * column_bound[j] + g * fabs(bias), to + j);
            failed[j] |= row[j];
        }
    }
    for (int j = 0; j < n; j++) any |= failed[j];
    return any;
}

VECTORISED static int32_t round_tile(const double *restrict sums, int m, int n, double g,
                                     const double *restrict row_bound, const double *restrict column_bound,
                                     const float *restrict row_bias, const float *restrict column_bias,
                                     float *restrict out, integer stride, int32_t *restrict differ) {
    if (n == TILE_COLUMNS) /* most tiles; with a constant number of columns the loop has no remainder */
        return round_rows(sums, m, TILE_COLUMNS, g, row_bound, column_bound, row_bias, column_bias, out, stride,
                          differ);
    return round_rows(sums, m, n, g, row_bound, column_bound, row_bias, column_bias, out, stride, differ);
}

int reproml_round_tile(const double *sums, int m, int n, double g, const double *row_bound, const double *column_bound,
                       const float *row_bias, const float *column_bias, float *out, integer stride, int *failed) {
    int32_t differ[TILE_ROWS * TILE_COLUMNS];
    int32_t any = round_tile(sums, m, n, g, row_bound, column_bound, row_bias, column_bias, out, stride, differ);
    int count = 0;
    for (int i = 0; any && i < m; i++)
        for (int j = 0; j < n; j++)
            if (differ[i * TILE_COLUMNS + j]) {
                const double sum = sums[i * TILE_COLUMNS + j];
                const float bias = row_bias ? row_bias[i] : column_bias ? column_bias[j] : 0;
                if (fabs(sum) == INFINITY)
                    out[i * stride + j] = (float)sum + bias; /* in any order */
                else
                    failed[count++] = i * TILE_COLUMNS + j;
            }
    return count;
}

/* Choose the loop and the tile for the layout of a and b. */
static void plan(product *x) {
    const tiling *t = x->tiles = reproml_tiling();
    x->along = x->a_column == 1 && x->b_row == 1 && x->b_column != 1 && x->k >= SHORT;
    x->rows = x->along ? t->along_rows : t->rows;
    x->columns = x->along ? TILE_COLUMNS : t->columns;
    x->row_panels = panel_count(x->m, x->rows);
    x->column_panels = panel_count(x->n, x->columns);
    int unpacked = !x->along && x->b_column == 1 && x->k * x->b_row <= FAR;
    x->packed = unpacked ? x->column_panels - (x->n % t->lanes != 0) : 0;
    x->groups = smaller(reproml_threads(), x->row_panels);
}

/* out = a @ b + bias. a [batch, m, k] and b [batch, k, n] with any strides; bias null or [n]; out contiguous; no
   size but k is 0. failed: memory for `capacity` flat indices. Returns the number of elements for which the test
   failed. If that exceeds `capacity`, or is negative for lack of memory, the caller has to calculate the entire
   result. */
integer reproml_product(integer batch, integer m, integer n, integer k, const float *a, integer a_batch, integer a_row,
                        integer a_column, const float *b, integer b_batch, integer b_row, integer b_column,
                        const float *bias, float *out, integer *failed, integer capacity) {
    failure_list list = {failed, capacity, 0};
    product x = {.batch = batch,
                 .m = m,
                 .n = n,
                 .k = k,
                 .a = a,
                 .b = b,
                 .bias = bias,
                 .a_batch = a_batch,
                 .a_row = a_row,
                 .a_column = a_column,
                 .b_batch = b_batch,
                 .b_row = b_row,
                 .b_column = b_column,
                 .out = out,
                 .failed = &list};
    plan(&x);
    integer depth = k < DEPTH ? k : DEPTH;
    integer rows = batch * x.row_panels * x.rows, columns = batch * x.column_panels * x.columns;
    integer wide = x.along ? 0 : rows * depth;
    integer area = k > DEPTH ? batch * x.row_panels * x.column_panels * TILE_ROWS * TILE_COLUMNS : 0;
    integer packed = x.along ? 0 : batch * (x.column_panels - x.packed) * depth * TILE_COLUMNS;
    integer offsets = 2 * depth + TILE_COLUMNS;
    char *work = reproml_scratch((size_t)(rows + columns + wide + area + offsets) * 8 + (size_t)packed * 4);
    if (!work) return -1;
    x.norm_a = (double *)work, x.norm_b = x.norm_a + rows;
    x.wide_a = x.norm_b + columns, x.sums = area ? x.wide_a + wide : NULL;
    x.b_offset = (integer *)(x.wide_a + wide + area);
    x.panel_offset = x.b_offset + depth + TILE_COLUMNS;
    x.panel_b = (float *)(x.panel_offset + depth);
    memset(work, 0, (size_t)(rows + columns) * sizeof(double));
    integer lines = x.along ? x.columns : depth, line = x.along ? b_column : b_row;
    for (integer p = 0; p < lines; p++) x.b_offset[p] = p * line;
    for (integer p = 0; p < depth; p++) x.panel_offset[p] = p * TILE_COLUMNS;
    for (x.first = 0; x.first < k || !k; x.first += DEPTH) {
        x.depth = k - x.first < DEPTH ? k - x.first : DEPTH;
        run_tasks(prepare, &x, batch * (x.row_panels + x.column_panels), 8 * batch * (m + n) * x.depth > SERIAL);
        if (x.first + x.depth == k)
            for (integer i = 0; i < rows + columns; i++) x.norm_a[i] = sqrt(x.norm_a[i]);
        run_tasks(multiply, &x, batch * x.column_panels * x.groups, batch * m * n * x.depth > SERIAL);
        if (!k) break;
    }
    return list.count;
}
