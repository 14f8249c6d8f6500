/* What all compiled loops share. They only speed up the library: each loop rounds the elements whose error bound
   allows it and reports the indices of all others, which Python then evaluates on the reference path. No result depends
   on whether these files were built. They need no particular compiler, instruction set or contraction of a * b + c
   (which changes a midpoint only within its bound), but never -ffast-math. The interface is plain C on raw pointers, so
   one build serves every version of PyTorch and Python. */

#ifndef REPROML_COMMON_H
#define REPROML_COMMON_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __FAST_MATH__
#error "The rounding test needs IEEE arithmetic: build without -ffast-math."
#endif
#if FLT_EVAL_METHOD != 0
#error "The rounding test needs each operation rounded to its own type (on x86: -msse2 -mfpmath=sse)."
#endif

/* A loop is compiled for several instruction sets, and the loader chooses the best that the processor has. All such
   functions are static: Clang 14 gives the others a name that no other file finds. It also accepts the names of
   GCC's levels but never chooses one, so it gets features; avx512dq implies fma. */
#if !defined(__x86_64__) || !defined(__GLIBC__)
#define VECTORISED
#elif defined(__clang__) && __clang_major__ >= 14
#define VECTORISED __attribute__((target_clones("avx512dq", "fma", "default")))
#elif !defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 12
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif

/* Inlined into every clone of a VECTORISED function that calls it. */
#define INLINE static inline __attribute__((always_inline))

typedef int64_t integer;

/* The bit patterns of floating-point numbers. */
INLINE int32_t bits(float x) {
    int32_t b;
    memcpy(&b, &x, sizeof b);
    return b;
}

INLINE float from_bits(int32_t b) {
    float x;
    memcpy(&x, &b, sizeof x);
    return x;
}

INLINE int64_t pattern(double x) {
    int64_t b;
    memcpy(&b, &x, sizeof b);
    return b;
}

INLINE double from_pattern(int64_t b) {
    double x;
    memcpy(&x, &b, sizeof x);
    return x;
}

/* s + t = a + b exactly, s rounded (Knuth, The Art of Computer Programming 2, section 4.2.2). */
INLINE void two_sum(double a, double b, double *s, double *t) {
    double sum = a + b, z = sum - a;
    *t = (a - (sum - z)) + (b - z);
    *s = sum;
}

/* The elements for which the rounding test failed: `count` flat indices; `index` holds the first
   `capacity`. */
typedef struct {
    integer *index, capacity, count;
} failure_list;

/* May be called from any thread. */
static inline void add_failure(failure_list *list, integer at) {
    integer i = __atomic_fetch_add(&list->count, 1, __ATOMIC_RELAXED);
    if (i < list->capacity) list->index[i] = at;
}

static inline integer smaller(integer a, integer b) { return a < b ? a : b; }

/* Set a flag that other threads may set as well. */
static inline void set_flag(int *flag) { __atomic_store_n(flag, 1, __ATOMIC_RELAXED); }

/* Returns working memory of this thread, valid until its next call; null if allocation fails. */
void *reproml_scratch(size_t bytes);

/* Returns the number of threads that PyTorch uses. */
int reproml_threads(void);

/* Run work(task, data) for task = 0 ... tasks - 1 on PyTorch's threads. */
void reproml_parallel(void (*work)(integer task, void *data), void *data, integer tasks);

#define WORTH_A_THREAD 16384 /* operations of some nanoseconds that are worth a second thread */

/* The same, but on this thread alone unless `parallel`. */
static inline void run_tasks(void (*work)(integer task, void *data), void *data, integer tasks, int parallel) {
    if (parallel)
        reproml_parallel(work, data, tasks);
    else
        for (integer task = 0; task < tasks; task++) work(task, data);
}

#endif
