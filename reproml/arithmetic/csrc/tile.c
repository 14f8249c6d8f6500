/* The loops of tile.h for three vector widths, chosen at run time by the processor. */

#include "tile.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

/* The products are exact, so contraction changes no sum. */
#ifdef __clang__
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif

typedef float half_2 __attribute__((vector_size(8), aligned(4), may_alias));
typedef int32_t bits_2 __attribute__((vector_size(16), aligned(4), may_alias)); /* two vectors of floats */
typedef int32_t bits_4 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t bits_8 __attribute__((vector_size(64), aligned(4), may_alias));
typedef double full_2 __attribute__((vector_size(16), aligned(8), may_alias));
typedef double full_4 __attribute__((vector_size(32), aligned(8), may_alias));
typedef double full_8 __attribute__((vector_size(64), aligned(8), may_alias));
typedef float single_2 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float single_4 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float single_8 __attribute__((vector_size(64), aligned(4), may_alias));

/* Load and widen. GCC splits the builtin into halves even if the processor has one instruction for it. */
#define WIDE_2(at) __builtin_convertvector(*(const half_2 *)(at), full_2)
#define WIDE_4(at) (full_4) _mm256_cvtps_pd(_mm_loadu_ps(at))
#define WIDE_8(at) (full_8) _mm512_cvtps_pd(_mm256_loadu_ps(at))
#define WIDE(lanes, at) WIDE_##lanes(at)

/* The larger of two integers in each lane. */
static inline bits_2 larger(bits_2 x, bits_2 y) {
    bits_2 first = x > y;
    return (x & first) | (y & ~first);
}
#define LARGER_2(x, y) larger(x, y)
#define LARGER_4(x, y) (bits_4) _mm256_max_epi32((__m256i)(x), (__m256i)(y))
#define LARGER_8(x, y) (bits_8) _mm512_max_epi32((__m512i)(x), (__m512i)(y))
#define LARGER(lanes, x, y) LARGER_##lanes(x, y)

static void transpose_2(const float *from, const integer *line, integer count, float *to, integer pitch) {
    for (integer p = 0; p < count; p++)
        for (int r = 0; r < 8; r++) to[p * pitch + r] = from[line[r] + p];
}

#if defined(__x86_64__) && defined(__GNUC__)
/* Blocks of 8 x 8; the last one overlaps the one before. */
__attribute__((target("avx2"))) static void transpose_4(const float *from, const integer *line, integer count,
                                                        float *to, integer pitch) {
    for (integer p = 0; p < count; p += 8) {
        if (p > count - 8) p = count - 8;
        __m256 row[8], pair[8], four[8];
        for (int r = 0; r < 8; r++) row[r] = _mm256_loadu_ps(from + line[r] + p);
        for (int r = 0; r < 8; r += 2) {
            pair[r] = _mm256_unpacklo_ps(row[r], row[r + 1]);
            pair[r + 1] = _mm256_unpackhi_ps(row[r], row[r + 1]);
        }
        for (int r = 0; r < 8; r += 4)
            for (int h = 0; h < 2; h++) {
                four[r + 2 * h] = _mm256_shuffle_ps(pair[r + h], pair[r + h + 2], 0x44);
                four[r + 2 * h + 1] = _mm256_shuffle_ps(pair[r + h], pair[r + h + 2], 0xEE);
            }
        for (int c = 0; c < 4; c++) {
            _mm256_storeu_ps(to + (p + c) * pitch, _mm256_permute2f128_ps(four[c], four[c + 4], 0x20));
            _mm256_storeu_ps(to + (p + c + 4) * pitch, _mm256_permute2f128_ps(four[c], four[c + 4], 0x31));
        }
    }
}
#endif

/* The formatter does not converge on these macros. */
/* clang-format off */

/* Sums [m, n] are set to zero and stored in loops that are unrolled: else GCC keeps them in memory. */
#define ZERO(type, sum, m, n)                           \
    _Pragma("GCC unroll 8") for (int i = 0; i < m; i++) \
        _Pragma("GCC unroll 6") for (int j = 0; j < n; j++) sum[i][j] = (type){0};
#define STORE(type, sum, m, n, out, pitch)              \
    _Pragma("GCC unroll 8") for (int i = 0; i < m; i++) \
        _Pragma("GCC unroll 6") for (int j = 0; j < n; j++) ((type *)(out + i * pitch))[j] = sum[i][j];

/* m rows by v vectors of columns. */
#define ACROSS(lanes, m, v, target)                                                                        \
    target static void across_##lanes##_##m##_##v(                                              \
        integer k, const double *restrict a, const float *restrict b, const integer *restrict offset,      \
        double *restrict out) {                                                                            \
        full_##lanes sum[m][v], row[v];                                                                    \
        ZERO(full_##lanes, sum, m, v)                                                                      \
        for (integer p = 0; p < k; p++) {                                                                  \
            const float *from = b + offset[p];                                                             \
            _Pragma("GCC unroll 3") for (int j = 0; j < v; j++) row[j] = WIDE(lanes, from + j * lanes);    \
            _Pragma("GCC unroll 8") for (int i = 0; i < m; i++) {                                          \
                double x = a[p * m + i];                                                                   \
                _Pragma("GCC unroll 3") for (int j = 0; j < v; j++) sum[i][j] += x * row[j];               \
            }                                                                                              \
        }                                                                                                  \
        STORE(full_##lanes, sum, m, v, out, TILE_COLUMNS)                                                  \
    }

#if PRECISION == 8
#define SINGLE_TERMS(m, v, lanes, from, to)                                                                \
    for (integer q = from; q < to; q++) {                                                                  \
        const single_##lanes *row = (const single_##lanes *)(b + q * pitch);                               \
        _Pragma("GCC unroll 8") for (int i = 0; i < m; i++)                                                \
            _Pragma("GCC unroll 3") for (int j = 0; j < v; j++) sum[i][j] += a[q * TILE_ROWS + i] * row[j]; \
    }
/* m rows by v vectors of floats. */
#define SINGLE(lanes, m, v, target)                                                                        \
    target static void single_##lanes##_##m##_##v(integer k, const float *restrict a,                      \
                                                  const float *restrict b, integer pitch,                  \
                                                  double *restrict out) {                                  \
        full_##lanes all[m][2 * v];                                                                        \
        ZERO(full_##lanes, all, m, 2 * v)                                                                  \
        for (integer p = 0; p < k; p += SINGLE_BLOCK) {                                                    \
            single_##lanes sum[m][v];                                                                      \
            ZERO(single_##lanes, sum, m, v)                                                                \
            if (p + SINGLE_BLOCK <= k)                                                                     \
                SINGLE_TERMS(m, v, lanes, p, p + SINGLE_BLOCK)                                             \
            else                                                                                           \
                SINGLE_TERMS(m, v, lanes, p, k)                                                            \
            _Pragma("GCC unroll 8") for (int i = 0; i < m; i++)                                            \
                _Pragma("GCC unroll 3") for (int j = 0; j < v; j++) {                                      \
                    float part[2 * lanes];                                                                 \
                    memcpy(part, &sum[i][j], sizeof part);                                                 \
                    all[i][2 * j] += WIDE(lanes, part);                                                    \
                    all[i][2 * j + 1] += WIDE(lanes, part + lanes);                                        \
                }                                                                                          \
        }                                                                                                  \
        STORE(full_##lanes, all, m, 2 * v, out, TILE_COLUMNS)                                              \
    }
#define SINGLE_ROWS(lanes, m, target)                                                                      \
    SINGLE(lanes, m, 1, target) SINGLE(lanes, m, 2, target) SINGLE(lanes, m, 3, target)
#define SINGLE_NAMES(lanes, m) {0, single_##lanes##_##m##_1, single_##lanes##_##m##_2, single_##lanes##_##m##_3}
#define SINGLE_4_ROWS(lanes, target)                                                                       \
    SINGLE_ROWS(lanes, 1, target) SINGLE_ROWS(lanes, 2, target) SINGLE_ROWS(lanes, 3, target)              \
    SINGLE_ROWS(lanes, 4, target)
#define SINGLE_TABLE(...) __VA_ARGS__
#else
#define SINGLE_4_ROWS(lanes, target)
#define SINGLE_TABLE(...)
#endif

/* m rows by n columns, a vector of terms at a time; the last terms are padded to a vector with zeros. */
#define ALONG(lanes, m, n, target)                                                                         \
    target static void along_##lanes##_##m##_##n(                                               \
        integer k, const float *restrict a, integer a_row, const float *restrict b,                        \
        const integer *restrict b_offset, double *restrict sums) {                                         \
        full_##lanes sum[m][n], left[m];                                                                   \
        ZERO(full_##lanes, sum, m, n)                                                                      \
        integer p = 0;                                                                                     \
        for (; p + lanes <= k; p += lanes) {                                                               \
            _Pragma("GCC unroll 4") for (int i = 0; i < m; i++) left[i] = WIDE(lanes, a + i * a_row + p);  \
            _Pragma("GCC unroll 6") for (int j = 0; j < n; j++) {                                          \
                full_##lanes right = WIDE(lanes, b + b_offset[j] + p);                                     \
                _Pragma("GCC unroll 4") for (int i = 0; i < m; i++) sum[i][j] += left[i] * right;          \
            }                                                                                              \
        }                                                                                                  \
        if (p < k) {                                                                                       \
            float rest[m + n][lanes];                                                                      \
            memset(rest, 0, sizeof rest);                                                                  \
            for (int i = 0; i < m; i++) memcpy(rest[i], a + i * a_row + p, (size_t)(k - p) * sizeof(float)); \
            for (int j = 0; j < n; j++)                                                                    \
                memcpy(rest[m + j], b + b_offset[j] + p, (size_t)(k - p) * sizeof(float));                 \
            _Pragma("GCC unroll 4") for (int i = 0; i < m; i++)                                            \
                _Pragma("GCC unroll 6") for (int j = 0; j < n; j++)                                        \
                    sum[i][j] += WIDE(lanes, rest[i]) * WIDE(lanes, rest[m + j]);                          \
        }                                                                                                  \
        STORE(full_##lanes, sum, m, n, sums, n * lanes)                                                    \
    }

/* m rows; v vectors of columns at a time, where v is even. A NaN is larger than every number. */
#define SLIDING(lanes, m, v, target)                                                                       \
    target static void sliding_##lanes##_##m(integer k, const double *restrict w, const float *restrict x,\
                                             const integer *restrict offset, integer n,                    \
                                             double *restrict out, integer pitch,                          \
                                             int32_t *restrict largest) {                                  \
        for (integer at = 0; at < n; at += v * lanes) {                                                     \
            full_##lanes sum[m][v], row[v];                                                                \
            bits_##lanes size[v / 2] = {{0}};                                                              \
            ZERO(full_##lanes, sum, m, v)                                                                  \
            for (integer p = 0; p < k; p++) {                                                              \
                const float *from = x + offset[p] + at;                                                    \
                _Pragma("GCC unroll 4") for (int t = 0; t < v; t++) row[t] = WIDE(lanes, from + t * lanes); \
                _Pragma("GCC unroll 8") for (int i = 0; i < m; i++) {                                      \
                    double y = w[p * m + i];                                                               \
                    _Pragma("GCC unroll 4") for (int t = 0; t < v; t++) sum[i][t] += y * row[t];           \
                }                                                                                          \
                _Pragma("GCC unroll 2") for (int t = 0; t < v / 2; t++) {                                  \
                    bits_##lanes y = *(const bits_##lanes *)(from + 2 * t * lanes) & INT32_MAX;            \
                    size[t] = LARGER(lanes, size[t], y);                                                   \
                }                                                                                          \
            }                                                                                              \
            STORE(full_##lanes, sum, m, v, out + at, pitch)                                                \
            memcpy(largest + at, size, sizeof size);                                                       \
        }                                                                                                  \
    }

#define ACROSS_ROWS(lanes, m, target)                                                                      \
    ACROSS(lanes, m, 1, target) ACROSS(lanes, m, 2, target) ACROSS(lanes, m, 3, target)
#define ALONG_ROWS(lanes, m, target)                                                                       \
    ALONG(lanes, m, 1, target) ALONG(lanes, m, 2, target) ALONG(lanes, m, 3, target)                       \
    ALONG(lanes, m, 4, target) ALONG(lanes, m, 5, target) ALONG(lanes, m, 6, target)

#define ACROSS_NAMES(lanes, m) {0, across_##lanes##_##m##_1, across_##lanes##_##m##_2, across_##lanes##_##m##_3}
#define ALONG_NAMES(lanes, m)                                                                              \
    {0, along_##lanes##_##m##_1, along_##lanes##_##m##_2, along_##lanes##_##m##_3,                         \
     along_##lanes##_##m##_4, along_##lanes##_##m##_5, along_##lanes##_##m##_6}

#define FOUR_ROWS(lanes, target)                                                                           \
    SLIDING(lanes, 1, 4, target) SLIDING(lanes, 2, 2, target) SLIDING(lanes, 3, 2, target)                 \
    SLIDING(lanes, 4, 2, target)                                                                           \
    ACROSS_ROWS(lanes, 1, target) ACROSS_ROWS(lanes, 2, target) ACROSS_ROWS(lanes, 3, target)              \
    ACROSS_ROWS(lanes, 4, target)

/* 4 rows of 3 vectors fit into 16 registers, 8 rows into 32. */
#define NARROW(lanes, target)                                                                              \
    FOUR_ROWS(lanes, target) SINGLE_4_ROWS(lanes, target)                                                  \
    ALONG(lanes, 1, 1, target) ALONG(lanes, 1, 2, target) ALONG(lanes, 1, 3, target)                       \
    ALONG(lanes, 2, 1, target) ALONG(lanes, 2, 2, target) ALONG(lanes, 2, 3, target)                       \
    ALONG(lanes, 3, 1, target) ALONG(lanes, 3, 2, target) ALONG(lanes, 3, 3, target)                       \
    ALONG(lanes, 4, 1, target) ALONG(lanes, 4, 2, target) ALONG(lanes, 4, 3, target)                       \
    static const tiling TILING_##lanes = {                                                                     \
        lanes, 4, 3 * lanes, 4, 3,                                                                         \
        {{0}, ACROSS_NAMES(lanes, 1), ACROSS_NAMES(lanes, 2), ACROSS_NAMES(lanes, 3), ACROSS_NAMES(lanes, 4)}, \
        {{0}, {0, along_##lanes##_1_1, along_##lanes##_1_2, along_##lanes##_1_3},                          \
         {0, along_##lanes##_2_1, along_##lanes##_2_2, along_##lanes##_2_3},                               \
         {0, along_##lanes##_3_1, along_##lanes##_3_2, along_##lanes##_3_3},                               \
         {0, along_##lanes##_4_1, along_##lanes##_4_2, along_##lanes##_4_3}},                              \
        SINGLE_TABLE(6 * lanes, {{0}, SINGLE_NAMES(lanes, 1), SINGLE_NAMES(lanes, 2), SINGLE_NAMES(lanes, 3), \
                                 SINGLE_NAMES(lanes, 4)},)                                                 \
        {0, sliding_##lanes##_1, sliding_##lanes##_2, sliding_##lanes##_3, sliding_##lanes##_4},           \
        transpose_##lanes};

NARROW(2, )

#if defined(__x86_64__) && defined(__GNUC__)
NARROW(4, __attribute__((target("avx2,fma"))))

#define AVX512 __attribute__((target("avx512f,avx512dq,fma")))
FOUR_ROWS(8, AVX512)
SLIDING(8, 5, 2, AVX512)
SLIDING(8, 6, 2, AVX512)
SLIDING(8, 7, 2, AVX512)
SLIDING(8, 8, 2, AVX512)
ACROSS_ROWS(8, 5, AVX512)
ACROSS_ROWS(8, 6, AVX512)
ACROSS_ROWS(8, 7, AVX512)
ACROSS_ROWS(8, 8, AVX512)
ALONG_ROWS(8, 1, AVX512)
ALONG_ROWS(8, 2, AVX512)
ALONG_ROWS(8, 3, AVX512)
ALONG_ROWS(8, 4, AVX512)
#if PRECISION == 8 /* one vector, as 8 rows of it with their sums in binary64 fill 24 of 32 registers */
SINGLE(8, 1, 1, AVX512)
SINGLE(8, 2, 1, AVX512)
SINGLE(8, 3, 1, AVX512)
SINGLE(8, 4, 1, AVX512)
SINGLE(8, 5, 1, AVX512)
SINGLE(8, 6, 1, AVX512)
SINGLE(8, 7, 1, AVX512)
SINGLE(8, 8, 1, AVX512)
#endif
static const tiling TILING_8 = {
    8, 8, 24, 4, 6,
    {{0}, ACROSS_NAMES(8, 1), ACROSS_NAMES(8, 2), ACROSS_NAMES(8, 3), ACROSS_NAMES(8, 4), ACROSS_NAMES(8, 5),
     ACROSS_NAMES(8, 6), ACROSS_NAMES(8, 7), ACROSS_NAMES(8, 8)},
    {{0}, ALONG_NAMES(8, 1), ALONG_NAMES(8, 2), ALONG_NAMES(8, 3), ALONG_NAMES(8, 4)},
    SINGLE_TABLE(16, {{0}, {0, single_8_1_1}, {0, single_8_2_1}, {0, single_8_3_1}, {0, single_8_4_1},
                      {0, single_8_5_1}, {0, single_8_6_1}, {0, single_8_7_1}, {0, single_8_8_1}},)
    {0, sliding_8_1, sliding_8_2, sliding_8_3, sliding_8_4, sliding_8_5, sliding_8_6, sliding_8_7, sliding_8_8},
    transpose_4};
#endif

/* clang-format on */

static int max_lanes = 8;

/* Limit vectors to this number of doubles, so that tests reach the narrower loops. */
void reproml_limit_vectors(int doubles) { max_lanes = doubles; }

const tiling *reproml_tiling(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (max_lanes >= 8 && __builtin_cpu_supports("avx512dq")) return &TILING_8;
    if (max_lanes >= 4 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &TILING_4;
#endif
    return &TILING_2;
}
