/* Recurrent cells and layers, forward and backward: the operators that operators/recurrent.py consists of, step by step
   without PyTorch between them. Each operation is rounded to binary32 by itself, or by the rounding test. A step for
   which a test fails is left to Python. */

#include "activations.h"
#include "rows.h"

#include <stdlib.h>

#ifdef __clang__
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

/* In the order of operators/recurrent.py. */
enum { LSTM, GRU, RNN_TANH, RNN_RELU };

#define SERIAL (1 << 12) /* gates that are computed in a few microseconds, too few for a second thread */

integer reproml_product(const void *kept, integer batch, integer m, integer n, integer k, const float *a,
                        integer a_batch, integer a_row, integer a_column, const float *b, integer b_batch,
                        integer b_row, integer b_column, const float *bias, const float *added, float *out,
                        integer *failed, integer capacity);
void *reproml_pack_matrix(integer m, integer n, integer k, const float *b, integer b_row, integer b_column);

static integer gates_of(int cell) { return cell == LSTM ? 4 : cell == GRU ? 3 : 1; }

/* One step of a batch. x, z: the products of the input and of the hidden state, [rows, gates n]. Everything else is
   [rows, n]: h and c, the state before. The results: gates [rows, gates n], after their activations; for an LSTM the new
   c and `kept` = tanh c; for a GRU `kept` = the part of z for n, and c = h - n; the new state h. */
typedef struct {
    int cell;
    integer rows, n, tasks;
    const float *x, *z, *h, *c;
    float *gates, *new_c, *kept, *new_h;
    int failed;
} step;

static int32_t apply(int which, const float *a, const float *b, float *out, integer n) {
    int32_t failed[BLOCK], any = 0;
    if (!reproml_activation_block(which, NULL, a, b, out, failed, n)) return 0;
    for (integer i = 0; i < n; i++) any |= failed[i];
    return any;
}

VECTORISED static void add(const float *restrict a, const float *restrict b, float *restrict out, integer n) {
    for (integer i = 0; i < n; i++) out[i] = a[i] + b[i];
}

VECTORISED static void add_to(float *restrict sum, const float *restrict x, integer n) {
    for (integer i = 0; i < n; i++) sum[i] += x[i];
}

VECTORISED static void multiply(const float *restrict a, const float *restrict b, float *restrict out, integer n) {
    for (integer i = 0; i < n; i++) out[i] = a[i] * b[i];
}

VECTORISED static void subtract(const float *restrict a, const float *restrict b, float *restrict out, integer n) {
    for (integer i = 0; i < n; i++) out[i] = a[i] - b[i];
}

/* n <= BLOCK numbers of each gate of a row. */
static int32_t lstm_block(const float *x, const float *z, const float *c, float *gates, float *new_c, float *kept,
                          float *new_h, integer stride, integer n) {
    const int which[] = {SIGMOID, SIGMOID, TANH, SIGMOID};
    float sum[BLOCK], fc[BLOCK], ig[BLOCK];
    int32_t failed = 0;
    for (int q = 0; q < 4; q++) {
        add(z + q * stride, x + q * stride, sum, n);
        failed |= apply(which[q], sum, sum, gates + q * stride, n);
    }
    multiply(gates + stride, c, fc, n);
    multiply(gates, gates + 2 * stride, ig, n);
    add(fc, ig, new_c, n);
    failed |= apply(TANH, new_c, new_c, kept, n);
    multiply(gates + 3 * stride, kept, new_h, n);
    return failed;
}

static int32_t gru_block(const float *x, const float *z, const float *h, float *gates, float *new_c, float *kept,
                         float *new_h, integer stride, integer n) {
    float sum[BLOCK], part[BLOCK];
    int32_t failed = 0;
    for (int q = 0; q < 2; q++) {
        add(z + q * stride, x + q * stride, sum, n);
        failed |= apply(SIGMOID, sum, sum, gates + q * stride, n);
    }
    memcpy(kept, z + 2 * stride, (size_t)n * sizeof(float));
    multiply(kept, gates, part, n);
    add(x + 2 * stride, part, sum, n);
    failed |= apply(TANH, sum, sum, gates + 2 * stride, n);
    subtract(h, gates + 2 * stride, new_c, n);
    multiply(new_c, gates + stride, part, n);
    add(part, gates + 2 * stride, new_h, n);
    return failed;
}

/* A sum that is NaN or -0, which relu may return with either sign, is left to Python. */
static int32_t relu(const float *sum, float *out, integer n) {
    int32_t failed = 0;
    for (integer i = 0; i < n; i++) {
        failed |= (sum[i] != sum[i]) | (bits(sum[i]) == INT32_MIN);
        out[i] = sum[i] > 0 ? sum[i] : 0;
    }
    return failed;
}

static int32_t rnn_block(int cell, const float *x, const float *z, float *new_h, integer n) {
    float sum[BLOCK];
    add(z, x, sum, n);
    return cell == RNN_RELU ? relu(sum, new_h, n) : apply(TANH, sum, sum, new_h, n);
}

static void step_rows(integer task, void *data) {
    step *s = data;
    const integer n = s->n, wide = gates_of(s->cell) * n, end = s->rows * (task + 1) / s->tasks;
    int32_t failed = 0;
    for (integer row = s->rows * task / s->tasks; row < end; row++)
        for (integer at = 0; at < n; at += BLOCK) {
            const integer count = n - at < BLOCK ? n - at : BLOCK, i = row * n + at, j = row * wide + at;
            if (s->cell == LSTM)
                failed |= lstm_block(s->x + j, s->z + j, s->c + i, s->gates + j, s->new_c + i, s->kept + i,
                                     s->new_h + i, n, count);
            else if (s->cell == GRU)
                failed |= gru_block(s->x + j, s->z + j, s->h + i, s->gates + j, s->new_c + i, s->kept + i, s->new_h + i,
                                    n, count);
            else
                failed |= rnn_block(s->cell, s->x + j, s->z + j, s->new_h + i, count);
        }
    if (failed) set_flag(&s->failed);
}

static integer tasks_for(integer rows, integer wide) {
    return smaller(rows * wide > SERIAL ? reproml_threads() : 1, rows);
}

static int run_step(step *s) {
    s->failed = 0;
    s->tasks = tasks_for(s->rows, gates_of(s->cell) * s->n);
    run_tasks(step_rows, s, s->tasks, s->tasks > 1);
    return s->failed;
}

/* ---- gradients ---- */

/* g_h, g_c: the gradients of the new state; g_c is null if there is none. The results: g_x, g_z, of x and z (of an LSTM
   and an RNN g_z = g_x, and g_z is null); g_state: of the c before (LSTM) or of h apart from its product (GRU). */
typedef struct {
    int cell;
    integer rows, n, tasks;
    const float *gates, *kept, *c, *h, *g_h, *g_c;
    float *g_x, *g_z, *g_state;
    int failed;
} gradient;

static int32_t lstm_gradient(const float *gates, const float *kept, const float *c, const float *g_h, const float *g_c,
                             float *g_x, float *g_state, integer stride, integer n) {
    const float *i = gates, *f = gates + stride, *g = gates + 2 * stride, *o = gates + 3 * stride;
    float part[BLOCK], total[BLOCK];
    int32_t failed = 0;
    multiply(g_h, kept, part, n);
    failed |= apply(SIGMOID_BACKWARD, part, o, g_x + 3 * stride, n);
    multiply(g_h, o, part, n);
    failed |= apply(TANH_BACKWARD, part, kept, total, n);
    if (g_c) {
        memcpy(part, total, (size_t)n * sizeof(float));
        add(g_c, part, total, n);
    }
    multiply(total, g, part, n);
    failed |= apply(SIGMOID_BACKWARD, part, i, g_x, n);
    multiply(total, i, part, n);
    failed |= apply(TANH_BACKWARD, part, g, g_x + 2 * stride, n);
    multiply(total, c, part, n);
    failed |= apply(SIGMOID_BACKWARD, part, f, g_x + stride, n);
    multiply(total, f, g_state, n);
    return failed;
}

static int32_t gru_gradient(const float *gates, const float *kept, const float *c, const float *g_h, float *g_x,
                            float *g_z, float *g_state, integer stride, integer n) {
    const float *r = gates, *z = gates + stride, *new = gates + 2 * stride;
    float part[BLOCK], rest[BLOCK];
    int32_t failed = 0;
    multiply(g_h, c, part, n);
    failed |= apply(SIGMOID_BACKWARD, part, z, g_x + stride, n);
    multiply(g_h, z, g_state, n);
    subtract(g_h, g_state, rest, n);
    failed |= apply(TANH_BACKWARD, rest, new, g_x + 2 * stride, n);
    multiply(g_x + 2 * stride, kept, part, n);
    failed |= apply(SIGMOID_BACKWARD, part, r, g_x, n);
    memcpy(g_z, g_x, (size_t)n * sizeof(float));
    memcpy(g_z + stride, g_x + stride, (size_t)n * sizeof(float));
    multiply(g_x + 2 * stride, r, g_z + 2 * stride, n);
    return failed;
}

static int32_t rnn_gradient(int cell, const float *h, const float *g_h, float *g_x, integer n) {
    if (cell == RNN_TANH) return apply(TANH_BACKWARD, g_h, h, g_x, n);
    for (integer i = 0; i < n; i++) g_x[i] = h[i] <= 0 ? 0 : g_h[i];
    return 0;
}

static void gradient_rows(integer task, void *data) {
    gradient *s = data;
    const integer n = s->n, wide = gates_of(s->cell) * n, end = s->rows * (task + 1) / s->tasks;
    int32_t failed = 0;
    for (integer row = s->rows * task / s->tasks; row < end; row++)
        for (integer at = 0; at < n; at += BLOCK) {
            const integer count = n - at < BLOCK ? n - at : BLOCK, i = row * n + at, j = row * wide + at;
            if (s->cell == LSTM)
                failed |= lstm_gradient(s->gates + j, s->kept + i, s->c + i, s->g_h + i, s->g_c ? s->g_c + i : NULL,
                                        s->g_x + j, s->g_state + i, n, count);
            else if (s->cell == GRU)
                failed |= gru_gradient(s->gates + j, s->kept + i, s->c + i, s->g_h + i, s->g_x + j, s->g_z + j,
                                       s->g_state + i, n, count);
            else
                failed |= rnn_gradient(s->cell, s->h + i, s->g_h + i, s->g_x + j, count);
        }
    if (failed) set_flag(&s->failed);
}

static int run_gradient(gradient *s) {
    s->failed = 0;
    s->tasks = tasks_for(s->rows, gates_of(s->cell) * s->n);
    run_tasks(gradient_rows, s, s->tasks, s->tasks > 1);
    return s->failed;
}

/* ---- one step, without products ---- */

/* pointers: x, z, h, c, gates, new c, kept, new h, as in `step`. Returns nonzero if a test failed. */
int reproml_cell(int cell, integer rows, integer n, float *const *p) {
    step s = {.cell = cell, .rows = rows, .n = n, .x = p[0], .z = p[1], .h = p[2], .c = p[3]};
    s.gates = p[4], s.new_c = p[5], s.kept = p[6], s.new_h = p[7];
    return run_step(&s);
}

/* pointers: gates, kept, c (LSTM: the one before), new h, g_h, g_c, g_x, g_z, g_state, as in `gradient`. */
int reproml_cell_backward(int cell, integer rows, integer n, float *const *p) {
    gradient s = {.cell = cell, .rows = rows, .n = n, .gates = p[0], .kept = p[1], .c = p[2], .h = p[3]};
    s.g_h = p[4], s.g_c = p[5], s.g_x = p[6], s.g_z = p[7], s.g_state = p[8];
    return run_gradient(&s);
}

/* ---- all steps of a layer ---- */

/* A row of a batch depends on no other row, so each thread takes some rows through all steps and waits for nobody. This
   pays where a thread has enough rows for its products, and a weight of KEPT numbers stays in the cache of its core. */
#define ROWS 8
#define KEPT (1 << 18)

static integer threads_for(integer rows, integer wide, integer n) {
    const integer threads = reproml_threads(), enough = wide * n <= KEPT ? ROWS : 4 * ROWS;
    return rows >= enough * threads ? smaller(threads, TASKS) : 1;
}

/* c = a @ b, a [m, k] and b [k, n], both contiguous; panels: those of b, or null. Returns nonzero if an element failed
   its tests. */
static int product(const void *panels, integer m, integer n, integer k, const float *a, const float *b,
                   const float *bias, float *c) {
    integer failed[1];
    return reproml_product(panels, 1, m, n, k, a, 0, k, 1, b, 0, n, 1, bias, NULL, c, failed, 1) != 0;
}

/* What the threads share. */
typedef struct {
    int cell, has_state, with_h;
    integer steps, rows, n, from, tasks; /* from: the first step of a layer, or the number of steps that are left */
    void *panels;
    float *const *p;
    integer reached[TASKS];
} layer;

static void run_layer(integer task, void *data) {
    layer *l = data;
    float *const *p = l->p;
    const integer n = l->n, wide = gates_of(l->cell) * n, size = l->rows * n, size_x = l->rows * wide;
    const integer row = l->rows * task / l->tasks, rows = l->rows * (task + 1) / l->tasks - row;
    const integer at = row * n, at_x = row * wide;
    integer t = l->from;
    for (; t < l->steps; t++) {
        const int last = t == l->steps - 1;
        step s = {.cell = l->cell, .rows = rows, .n = n, .x = p[0] + t * size_x + at_x, .z = p[3] + at_x};
        s.h = (t ? p[9] + (t - 1) * size : p[4]) + at;
        if (l->cell == LSTM) s.c = (t ? p[7] + (t - 1) * size : p[5]) + at;
        if (l->cell <= GRU) s.gates = p[6] + t * size_x + at_x, s.kept = p[8] + t * size + at;
        if (l->cell <= GRU) s.new_c = (last && l->cell == LSTM ? p[11] : p[7] + t * size) + at;
        s.new_h = (last ? p[10] : p[9] + t * size) + at;
        if (product(l->panels, rows, wide, n, s.h, p[1], p[2], p[3] + at_x) || run_step(&s)) break;
    }
    l->reached[task] = t;
}

/* Run the steps from `first` on. pointers: x [steps, rows, gates n]; the transposed weight [n, gates n] and its bias or
   null; z, memory for [rows, gates n]; h and c before the first step; gates, c and kept of all steps; h of all steps but
   the last; h of the last step; c of the last step. Returns the number of steps that are done for all rows. */
integer reproml_layer(int cell, integer steps, integer rows, integer n, integer first, float *const *p) {
    const integer wide = gates_of(cell) * n;
    layer l = {.cell = cell, .steps = steps, .rows = rows, .n = n, .from = first, .p = p};
    l.tasks = threads_for(rows, wide, n);
    l.panels = steps - first > 1 ? reproml_pack_matrix(rows / l.tasks, wide, n, p[1], wide, 1) : NULL;
    run_tasks(run_layer, &l, l.tasks, l.tasks > 1);
    free(l.panels);
    integer done = steps;
    for (integer i = 0; i < l.tasks; i++) done = smaller(done, l.reached[i]);
    return done;
}

static void run_layer_backward(integer task, void *data) {
    layer *l = data;
    float *const *p = l->p;
    const integer n = l->n, wide = gates_of(l->cell) * n, size = l->rows * n, size_x = l->rows * wide;
    const integer row = l->rows * task / l->tasks, rows = l->rows * (task + 1) / l->tasks - row;
    const integer at = row * n, at_x = row * wide, count = rows * n;
    const float *g_y = p[9];
    float *through = p[14] + at;
    integer t = l->from - 1;
    for (; t >= 0; t--) {
        const int last = t == l->steps - 1;
        gradient s = {.cell = l->cell, .rows = rows, .n = n, .g_x = p[12] + t * size_x + at_x};
        s.h = (last ? p[8] : p[6] + t * size) + at;
        s.g_h = p[10] + t * size + at, s.g_state = p[11] + t * size + at;
        if (l->cell <= GRU) s.gates = p[3] + t * size_x + at_x, s.kept = p[5] + t * size + at;
        if (l->cell == LSTM) s.c = (t ? p[4] + (t - 1) * size : p[2]) + at;
        if (l->cell == LSTM && (l->has_state || !last)) s.g_c = s.g_state + size;
        if (l->cell == GRU) s.c = p[4] + t * size + at, s.g_z = p[13] + t * size_x + at_x;
        const float *g_z = p[13] + t * size_x + at_x;
        if (run_gradient(&s)) break;
        if ((t || l->with_h) && product(l->panels, rows, n, wide, g_z, p[0], NULL, through)) break;
        if (!t) continue;
        float *g_h = p[10] + (t - 1) * size + at;
        const float *of_y = g_y ? g_y + (t - 1) * size + at : NULL;
        if (l->cell != GRU)
            of_y ? add(of_y, through, g_h, count) : (void)memcpy(g_h, through, (size_t)count * sizeof(float));
        else if (of_y)
            add(of_y, s.g_state, g_h, count), add_to(g_h, through, count);
        else
            add(s.g_state, through, g_h, count);
    }
    l->reached[task] = t + 1;
}

/* Compute the gradients of steps left - 1 to 0, in this order. pointers: the weight [gates n, n]; h and
   c before the first step; gates, c, kept and h as for reproml_layer, and the last c and h; the gradient of h of all
   steps but the last, or null; memory for those of h of all steps, of which step left - 1 is given; memory for the
   gradients of states [steps + 1, rows, n], of which step t reads that of t + 1 (if has_state, also the last step) and
   writes t; the gradients of x and z (one memory, but for a GRU); that of h before the step through its product [rows,
   n]. with_h: whether the gradient of h before the first step is wanted. Returns the number of steps that are left for
   any row. */
integer reproml_layer_backward(int cell, integer steps, integer rows, integer n, integer left, int has_state,
                               int with_h, float *const *p) {
    const integer wide = gates_of(cell) * n;
    layer l = {.cell = cell, .steps = steps, .rows = rows, .n = n, .from = left, .p = p};
    l.has_state = has_state, l.with_h = with_h;
    l.tasks = threads_for(rows, wide, n);
    l.panels = left > 1 ? reproml_pack_matrix(rows / l.tasks, n, wide, p[0], n, 1) : NULL;
    run_tasks(run_layer_backward, &l, l.tasks, l.tasks > 1);
    free(l.panels);
    integer most = 0;
    for (integer i = 0; i < l.tasks; i++)
        if (l.reached[i] > most) most = l.reached[i];
    return most;
}
