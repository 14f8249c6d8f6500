/* What all compiled loops share. They only ever speed up: each rounds what its error bound lets it round
   and hands the indices of the rest back to Python, which settles them by the definition. So no result
   depends on these files being here. They need no particular compiler, instruction set or contraction
   (which only changes a centre within its bound), but never -ffast-math. Plain C on raw pointers: one
   build serves every PyTorch and Python. */

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

#define U 0x1p-53           /* unit roundoff of binary64 */
#define TINY 0x1p-1000      /* rounding.TINY: absolute error of what underflows in binary64 */
#define SLACK (1 + 0x1p-20) /* rounding.SLACK: bounds are themselves computed in binary64 */

/* A loop is compiled for several instruction sets, and the loader takes the best that the processor has. */
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__x86_64__) && defined(__GLIBC__)
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif

typedef int64_t integer;

static inline int32_t bits(float x) {
    int32_t b;
    memcpy(&b, &x, sizeof b);
    return b;
}

/* s + t = a + b exactly, s rounded (Knuth, The Art of Computer Programming 2, section 4.2.2). */
static inline void two_sum(double a, double b, double *s, double *t) {
    double sum = a + b, z = sum - a;
    *t = (a - (sum - z)) + (b - z);
    *s = sum;
}

/* a + b rounded to odd in binary64, so that rounding it once more, to binary32, rounds a + b
   (Boldo & Melquiond, IEEE Transactions on Computers 57(4), 2008). Finite a and b. */
static inline double add_to_odd(double a, double b) {
    double s, t;
    two_sum(a, b, &s, &t);
    int64_t pattern;
    memcpy(&pattern, &s, sizeof pattern);
    if (t != 0 && !(pattern & 1)) {
        pattern += (t > 0) == (s > 0) ? 1 : -1;
        memcpy(&s, &pattern, sizeof s);
    }
    return s;
}

/* Round to binary32 the real number within e of s + t, |t| <= |s|. Returns 0 where e is too large for that,
   or where it is not finite. An exact zero is +0. */
static inline int settle_pair(double s, double t, double e, float *result) {
    e = e * SLACK + fabs(t) * 0x1p-52; /* t - e and t + e are rounded */
    float low = (float)(add_to_odd(s, t - e) + 0.0), high = (float)(add_to_odd(s, t + e) + 0.0);
    *result = high;
    return bits(low) == bits(high) && fabs(s) <= DBL_MAX;
}

/* What a loop could not settle: `count` flat indices, of which `index` holds the first `room`. */
typedef struct {
    integer *index, room, count;
} failures;

static inline void reproml_fail(failures *f, integer at) { /* from any thread */
    integer i = __atomic_fetch_add(&f->count, 1, __ATOMIC_RELAXED);
    if (i < f->room) f->index[i] = at;
}

/* Working memory of this thread, valid until its next call; null if there is none. */
void *reproml_scratch(size_t bytes);

int reproml_threads(void);

/* Run work(task, data) for task = 0 ... tasks - 1, on as many threads as PyTorch has been given. */
void reproml_parallel(void (*work)(integer task, void *data), void *data, integer tasks);

#endif
