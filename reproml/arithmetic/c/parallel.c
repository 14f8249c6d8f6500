/* Threads: PyTorch's own pool, so that no second one competes with it for the processors. */

#include "common.h"

#include <stdlib.h>

/* GNU OpenMP's entry points, which PyTorch has loaded before us; absent (macOS), one thread does it all. */
extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));
extern int omp_get_thread_num(void) __attribute__((weak));
extern int omp_get_num_threads(void) __attribute__((weak));
extern int omp_get_max_threads(void) __attribute__((weak));

/* What torch.set_num_threads has set; in a forked worker of a DataLoader 1, as it must be. */
int reproml_threads(void) {
    return GOMP_parallel && omp_get_thread_num && omp_get_num_threads && omp_get_max_threads ? omp_get_max_threads() : 1;
}

typedef struct {
    void (*work)(integer, void *);
    void *data;
    integer tasks;
} job;

static void part(void *argument) {
    const job *j = argument;
    integer share = (j->tasks + omp_get_num_threads() - 1) / omp_get_num_threads();
    integer first = omp_get_thread_num() * share, end = first + share;
    for (integer task = first; task < end && task < j->tasks; task++) j->work(task, j->data);
}

void reproml_parallel(void (*work)(integer, void *), void *data, integer tasks) {
    integer threads = reproml_threads(), count = tasks < threads ? tasks : threads;
    if (count < 2) {
        for (integer task = 0; task < tasks; task++) work(task, data);
        return;
    }
    job j = {work, data, tasks};
    GOMP_parallel(part, &j, (unsigned)count, 0);
}

void *reproml_scratch(size_t bytes) {
    static _Thread_local void *memory;
    static _Thread_local size_t size;
    if (bytes > size || size > (size_t)1 << 26) { /* what is large is not kept for something small */
        free(memory);
        memory = malloc(bytes);
        size = memory ? bytes : 0;
    }
    return memory;
}

#define REPROML_VERSION 4 /* raised with any change of these files, together with kernels.py */

int reproml_version(void) { return REPROML_VERSION; }
