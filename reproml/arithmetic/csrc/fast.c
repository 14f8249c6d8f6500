/* Runs the fast loops of activations.c and softmax.c, block by block, on PyTorch's threads. */

#include "fast.h"
#include "rows.h"

typedef struct {
    int which, operands;
    const double *scalars;
    integer dims, rows, n, per_item, items, tasks;
    const integer *sizes, *strides;
    void *const *pointers;
    integer *failed, count[TASKS], start[TASKS];
} call;

/* Append the indices of the failures to `list`; returns their number. */
static integer list_failures(const int32_t *failed, integer count, integer first, integer *list) {
    integer found = 0;
    for (integer i = 0; i < count; i++)
        if (failed[i]) list[found++] = first + i;
    return found;
}

static integer run_elements(const call *c, integer first, integer count, integer *list) {
    int32_t failed[BLOCK];
    const float *a = (const float *)c->pointers[0] + first, *b = (const float *)c->pointers[c->operands - 1] + first;
    float *out = (float *)c->pointers[c->operands] + first;
    if (!reproml_activation_block(c->which, c->scalars, a, b, out, failed, count)) return 0;
    return list_failures(failed, count, first, list);
}

/* Returns the rows of an operand, one after the other; `memory` is for those that are not stored so. */
static const float *gather_rows(const call *c, int operand, integer row, integer rows, float *memory) {
    const integer *strides = c->strides + operand * c->dims, step = strides[c->dims - 1];
    const float *x = c->pointers[operand];
    if (dense_rows(c->dims, strides, c->n)) return x + row * c->n;
    for (integer r = 0; r < rows; r++) {
        const float *from = x + row_start(c->dims, c->sizes, strides, row + r);
        for (integer i = 0; i < c->n; i++) *memory++ = from[i * step];
    }
    return memory - rows * c->n;
}

static integer run_rows(const call *c, integer row, integer rows, row_table *t, integer *list) {
    const integer *strides = c->strides + c->operands * c->dims, step = strides[c->dims - 1];
    t->rows = rows;
    t->n = c->n;
    t->x = gather_rows(c, 0, row, rows, t->x_copy);
    t->y = c->operands > 1 ? gather_rows(c, 1, row, rows, t->y_copy) : t->x;
    const int dense = dense_rows(c->dims, strides, c->n);
    t->out = dense ? (float *)c->pointers[c->operands] + row * c->n : t->out_copy;
    reproml_softmax_rows(c->which, t);
    for (integer r = 0; r < rows && !dense; r++) {
        float *to = (float *)c->pointers[c->operands] + row_start(c->dims, c->sizes, strides, row + r);
        for (integer i = 0; i < c->n; i++) to[i * step] = t->out[r * c->n + i];
    }
    return t->any_failed ? list_failures(t->failed, rows * c->n, row * c->n, list) : 0;
}

static void run_items(integer task, void *data) {
    call *c = data;
    row_table t;
    const integer first = c->items * task / c->tasks * c->per_item;
    integer end = c->items * (task + 1) / c->tasks * c->per_item, found = 0;
    if (end > c->rows) end = c->rows;
    integer *list = c->failed + first * c->n;
    for (integer at = first; at < end; at += c->per_item) {
        integer count = end - at < c->per_item ? end - at : c->per_item;
        found +=
            c->which < SOFTMAX ? run_elements(c, at, count, list + found) : run_rows(c, at, count, &t, list + found);
    }
    c->start[task] = first * c->n;
    c->count[task] = found;
}

/* As reproml_program, for one of the formulas of activations.h, with three scalars, on float32 operands: elementwise ones
   dense in one dimension, rows of up to ROW_MAX numbers in any layout. */
integer reproml_fast(int which, const double *scalars, integer dims, const integer *sizes, const integer *strides,
                     void *const *pointers, integer *failed, integer tasks) {
    const int two = (which >= TANH_BACKWARD && which < SOFTMAX) || which >= SOFTMAX_BACKWARD;
    call c = {.which = which, .scalars = scalars, .operands = 1 + two, .dims = dims, .rows = 1, .n = 1, .sizes = sizes};
    c.strides = strides, c.pointers = pointers, c.failed = failed;
    for (integer d = 0; d < dims; d++) c.rows *= sizes[d];
    if (which >= SOFTMAX) c.n = sizes[dims - 1], c.rows /= c.n;
    c.per_item = which < SOFTMAX ? BLOCK : c.n < ROW_MAX / 2 ? ROW_MAX / 2 / c.n : 1; /* fits the first-level cache */
    c.items = (c.rows + c.per_item - 1) / c.per_item;
    c.tasks = tasks < c.items ? tasks : c.items;
    if (c.tasks > TASKS) c.tasks = TASKS;
    reproml_parallel(run_items, &c, c.tasks);
    return join_failures(failed, c.start, c.count, c.tasks);
}
