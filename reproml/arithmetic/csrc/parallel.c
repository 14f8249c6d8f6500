/* Runs tasks on PyTorch's own thread pool, so that no second pool competes with it for the processors. */

#include "common.h"

#include <pthread.h>
#include <stdlib.h>
#ifdef __SSE2__
#include <xmmintrin.h>
#endif

/* Entry points of GNU OpenMP, which PyTorch has loaded already. Where they are missing (macOS), one thread runs all
   tasks. */
extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));
extern int omp_get_thread_num(void) __attribute__((weak));
extern int omp_get_num_threads(void) __attribute__((weak));
extern int omp_get_max_threads(void) __attribute__((weak));
extern int omp_in_parallel(void) __attribute__((weak));

/* The number set by torch.set_num_threads; 1 in a forked worker of a DataLoader, which has no other threads, and within a
   task, as each of the threads runs one. */
int reproml_threads(void) {
    const int found =
        GOMP_parallel && omp_get_thread_num && omp_get_num_threads && omp_get_max_threads && omp_in_parallel;
    return found && !omp_in_parallel() ? omp_get_max_threads() : 1;
}

typedef struct {
    void (*work)(integer, void *);
    void *data;
    integer tasks;
} job;

/* Switch off flushing of subnormal numbers, which a thread of the pool may have inherited. Returns the mode before. */
static unsigned keep_subnormals(void) {
#ifdef __SSE2__
    unsigned before = _mm_getcsr();
    _mm_setcsr(before & ~0x8040u); /* flush to zero, denormals are zero */
    return before;
#else
    return 0;
#endif
}

static void restore_mode(unsigned before) {
#ifdef __SSE2__
    _mm_setcsr(before);
#endif
    (void)before;
}

static void run_share(void *argument) {
    const job *j = argument;
    unsigned before = keep_subnormals();
    integer share = (j->tasks + omp_get_num_threads() - 1) / omp_get_num_threads();
    integer first = omp_get_thread_num() * share, end = first + share;
    for (integer task = first; task < end && task < j->tasks; task++) j->work(task, j->data);
    restore_mode(before);
}

void reproml_parallel(void (*work)(integer, void *), void *data, integer tasks) {
    integer threads = reproml_threads(), count = tasks < threads ? tasks : threads;
    if (count < 2) {
        for (integer task = 0; task < tasks; task++) work(task, data);
        return;
    }
    job j = {work, data, tasks};
    GOMP_parallel(run_share, &j, (unsigned)count, 0);
}

#define HEAD 64 /* bytes before the memory; they hold its size */

static pthread_key_t key; /* frees the memory of a thread when the thread ends */
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void make_key(void) { pthread_key_create(&key, free); }

void *reproml_scratch(size_t bytes) {
    pthread_once(&once, make_key);
    char *memory = pthread_getspecific(key);
    size_t size = 0;
    if (memory) memcpy(&size, memory, sizeof size);
    if (bytes > size || size > (size_t)1 << 26) { /* large memory is not kept for a small request */
        free(memory);
        memory = malloc(bytes + HEAD);
        if (memory) memcpy(memory, &bytes, sizeof bytes);
        pthread_setspecific(key, memory);
    }
    return memory ? memory + HEAD : NULL;
}

#define REPROML_VERSION 21 /* raise it with any change of the interface, together with _VERSION in kernels.py */

int reproml_version(void) { return REPROML_VERSION; }
