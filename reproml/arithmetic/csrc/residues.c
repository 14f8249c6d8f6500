/* Equalities among the numbers of an eliminated matrix, proven by their remainders (operators/small_matrices.py).

   Bounds never prove that a number is 0, or lies on a midpoint of two binary32 numbers. But every number of a
   solution is a quotient of two determinants of integers (Cramer), so x = c is an equality between two integers.
   If it holds modulo primes whose product exceeds what their difference can be (Hadamard's bound), it holds. */

#include "common.h"

#include <math.h>
#include <stdlib.h>

typedef uint64_t residue;
__extension__ typedef unsigned __int128 wide;

/* The 320 largest primes below 2^62, as their distances to it. Each is larger than 2^61. */
#define PRIMES 320 /* for 64 x 64 matrices of the whole range of binary32 */
#define BITS_OF_PRIME 61
static const uint16_t BELOW_2_62[PRIMES] = {
    57,    87,    117,   143,   153,   167,   171,   195,   203,   273,   287,   317,   443,   483,   495,   575,
    581,   603,   633,   663,   765,   773,   777,   791,   813,   831,   923,   981,   993,   1001,  1007,  1017,
    1197,  1241,  1293,  1353,  1433,  1515,  1553,  1575,  1581,  1595,  1617,  1673,  1697,  1701,  1703,  1823,
    1881,  1911,  1923,  2043,  2073,  2103,  2141,  2187,  2217,  2247,  2285,  2351,  2367,  2375,  2397,  2421,
    2511,  2541,  2583,  2661,  2675,  2753,  2777,  2793,  2861,  2891,  2927,  3023,  3041,  3221,  3251,  3255,
    3257,  3263,  3317,  3377,  3521,  3537,  3545,  3551,  3563,  3671,  3705,  3767,  3797,  3803,  3873,  3933,
    4163,  4247,  4275,  4301,  4377,  4403,  4485,  4557,  4595,  4641,  4661,  4707,  4781,  4815,  4821,  4857,
    4881,  4917,  4941,  4971,  4991,  4997,  5003,  5055,  5103,  5133,  5153,  5265,  5355,  5393,  5445,  5465,
    5475,  5483,  5547,  5571,  5637,  5645,  5693,  5771,  5805,  5817,  5883,  5885,  5915,  5927,  5943,  5991,
    6027,  6035,  6057,  6063,  6077,  6123,  6135,  6147,  6225,  6237,  6273,  6281,  6323,  6327,  6333,  6411,
    6425,  6525,  6573,  6597,  6617,  6627,  6665,  6827,  6905,  7007,  7043,  7071,  7113,  7283,  7335,  7371,
    7395,  7415,  7521,  7535,  7541,  7547,  7601,  7637,  7707,  7757,  7815,  7821,  7841,  7845,  7911,  8015,
    8115,  8121,  8135,  8151,  8183,  8231,  8253,  8261,  8321,  8325,  8351,  8373,  8393,  8457,  8567,  8585,
    8601,  8613,  8631,  8645,  8687,  8703,  8763,  8823,  8847,  8871,  8895,  8907,  8975,  8997,  9005,  9033,
    9063,  9095,  9287,  9347,  9435,  9513,  9593,  9731,  9753,  9777,  9791,  9821,  9855,  9905,  9977,  10023,
    10163, 10197, 10227, 10233, 10251, 10323, 10361, 10373, 10425, 10431, 10433, 10457, 10503, 10523, 10565, 10613,
    10635, 10643, 10683, 10691, 10785, 10797, 10811, 10863, 10865, 10887, 10985, 11031, 11121, 11123, 11187, 11207,
    11217, 11255, 11271, 11273, 11307, 11343, 11363, 11423, 11451, 11453, 11493, 11585, 11657, 11661, 11667, 11733,
    11817, 11823, 11891, 11901, 11915, 11943, 12045, 12053, 12087, 12113, 12123, 12153, 12161, 12173, 12183, 12257,
    12327, 12371, 12425, 12461, 12515, 12531, 12543, 12623, 12645, 12651, 12717, 12741, 12785, 12825, 12915, 12917};

#define POWERS 640 /* of two, of which remainders are kept: numbers of a matrix and candidates may differ by as much */

typedef struct {
    residue p, inverse;    /* -1 / p modulo 2^64 */
    residue power[POWERS]; /* 2^(i + 64) */
} modulus;

/* x / 2^64 for x < 4 p^2 (P. Montgomery, Mathematics of Computation 44(170), 1985): in [0, p). The quotient is less than
   (4 p^2 + 2^64 p) / 2^64 < 2 p, as p < 2^62. */
INLINE residue reduced(wide x, const modulus *q) {
    const residue m = (residue)x * q->inverse;
    const residue y = (residue)((x + (wide)m * q->p) >> 64);
    return y >= q->p ? y - q->p : y;
}

INLINE residue negative(residue x, const modulus *q) { return x ? q->p - x : 0; }

static void set_modulus(modulus *q, int index, int powers) {
    q->p = ((residue)1 << 62) - BELOW_2_62[index];
    residue inverse = q->p; /* right to 3 bits, as p is odd; each step doubles them */
    for (int i = 0; i < 5; i++) inverse *= 2 - q->p * inverse;
    q->inverse = 0 - inverse;
    q->power[0] = (0 - q->p) % q->p;
    for (int i = 1; i < powers; i++) {
        const residue x = 2 * q->power[i - 1];
        q->power[i] = x >= q->p ? x - q->p : x;
    }
}

/* whole 2^exponent; 0 is 0 2^0. */
typedef struct {
    int64_t whole;
    int exponent;
} number;

static number split(double x) {
    number y = {0, 0};
    if (x == 0) return y;
    y.whole = (int64_t)ldexp(frexp(x, &y.exponent), 53);
    const int zeros = __builtin_ctzll((unsigned long long)y.whole);
    y.whole /= (int64_t)1 << zeros;
    y.exponent += zeros - 53;
    return y;
}

/* The integer x / 2^low, modulo a prime. */
INLINE residue of_number(number x, int low, const modulus *q) {
    if (!x.whole) return 0;
    const residue size = reduced((wide)(residue)(x.whole < 0 ? -x.whole : x.whole) * q->power[x.exponent - low], q);
    return x.whole < 0 ? negative(size, q) : size;
}

/* Numbers x / 2^low are integers of at most `bits` bits. */
typedef struct {
    int low, bits;
} range;

static range split_all(const double *x, integer n, number *to) {
    int low = INT32_MAX, high = INT32_MIN;
    for (integer i = 0; i < n; i++) {
        int top;
        to[i] = split(x[i]);
        if (x[i] == 0) continue;
        frexp(x[i], &top);
        low = to[i].exponent < low ? to[i].exponent : low;
        high = top > high ? top : high;
    }
    return low > high ? (range){0, 0} : (range){low, high - low};
}

typedef struct {
    integer n, k;
    const double *f, *g, *b, *candidates;
    uint8_t *unsure;
    int32_t *column, *rank;
} decision;

/* Eliminate m [n, width] modulo q in all rows but the pivot's. Each row is multiplied by a number other than 0. Returns the
   rank of the first n columns and sets `first` to the first that depends on those before it, from 1, or 0. */
static integer eliminate(residue *m, integer n, integer width, const modulus *q, integer *first) {
    integer rank = 0;
    *first = 0;
    for (integer j = 0; j < n; j++) {
        integer pivot = rank;
        while (pivot < n && !m[pivot * width + j]) pivot++;
        if (pivot == n) {
            *first = *first ? *first : j + 1;
            continue;
        }
        residue *row = m + rank * width, *other = m + pivot * width;
        for (integer i = j; i < width && pivot != rank; i++) {
            const residue x = row[i];
            row[i] = other[i];
            other[i] = x;
        }
        const residue p = row[j];
        for (integer i = width > n ? 0 : rank + 1; i < n; i++) { /* the rank alone needs the rows below */
            residue *to = m + i * width;
            const residue factor = negative(to[j], q);
            if (i == rank || !factor) continue;
            if (i < rank && rank == j) to[i] = reduced((wide)to[i] * p, q);
            for (integer c = j; c < width; c++) to[c] = reduced((wide)p * to[c] + (wide)factor * row[c], q);
        }
        rank++;
    }
    return rank;
}

/* to [n, n], in rows of `width`: the integers x / 2^low. */
static void set_matrix(integer n, residue *to, integer width, const number *x, int low, const modulus *q) {
    for (integer i = 0; i < n; i++)
        for (integer j = 0; j < n; j++) to[i * width + j] = of_number(x[i * n + j], low, q);
}

/* to = a b / 2^64, for a and b [n, n], in rows of `width`. */
static void multiply(integer n, const residue *a, const residue *b, residue *to, integer width, const modulus *q) {
    for (integer i = 0; i < n; i++)
        for (integer j = 0; j < n; j++) {
            residue sum = 0;
            for (integer l = 0; l < n; l++) {
                sum += reduced((wide)a[i * n + l] * b[l * n + j], q);
                sum = sum >= q->p ? sum - q->p : sum;
            }
            to[i * width + j] = sum;
        }
}

/* Returns whether value = x.whole 2^exponent d. */
INLINE int is_quotient(number x, int exponent, residue value, residue d, const modulus *q) {
    const residue size = (residue)(x.whole < 0 ? -x.whole : x.whole);
    d = reduced((wide)d * size, q);
    d = x.whole < 0 ? negative(d, q) : d;
    value = reduced(value, q);
    if (!x.whole) return value == d;
    d = exponent > 0 ? reduced((wide)d * q->power[exponent], q) : d;
    value = exponent < 0 ? reduced((wide)value * q->power[-exponent], q) : value;
    return value == d;
}

static void decide(integer index, decision *c) {
    const integer n = c->n, size = n * n;
    const double *f = c->f + index * size, *g = c->g ? c->g + index * size : 0, *b = c->b + index * n * c->k;
    const double *candidates = c->candidates + index * n * c->k;
    uint8_t *unsure = c->unsure + index * n * c->k;
    const int unknown = c->column[index] < 0;
    const size_t residues = (size_t)size * 2 + (size_t)n * (n + c->k), numbers = (size_t)size * 2 + (size_t)n * c->k;
    modulus *q = reproml_scratch(sizeof(modulus) + residues * sizeof(residue) + numbers * sizeof(number) +
                                 (size_t)c->k * sizeof(integer));
    if (!q) return;
    residue *m = (residue *)(q + 1), *first_factor = m + n * (n + c->k), *second = first_factor + size;
    number *in_f = (number *)(second + size), *in_g = in_f + size, *in_b = in_g + size;
    integer *which = (integer *)(in_b + n * c->k);
    const range of_f = split_all(f, size, in_f), of_g = g ? split_all(g, size, in_g) : (range){0, 0};
    const range of_b = split_all(b, n * c->k, in_b);
    const int log_n = (int)ceil(log2((double)n));
    /* columns are shorter than 2^of_a, and those of b than 2^of_b */
    const int of_a = of_f.bits + of_g.bits + (g ? log_n : 0) + (log_n + 1) / 2;
    const int right = of_b.bits + (log_n + 1) / 2;
    const int shift = of_f.low + of_g.low - of_b.low; /* x 2^shift solves the system of integers */
    integer columns = 0, pending = 0, width = n;
    int largest = 0;
    if (of_f.bits >= POWERS || of_g.bits >= POWERS || of_b.bits >= POWERS) return;
    for (integer j = 0; j < c->k && !unknown; j++) {
        integer here = 0;
        for (integer i = 0; i < n; i++) {
            const integer at = i * c->k + j;
            if (!unsure[at] || !isfinite(candidates[at])) continue;
            const number x = split(candidates[at]);
            const int exponent = x.whole ? abs(x.exponent + shift) : 0;
            if (exponent >= POWERS) continue;
            unsure[at] = 2; /* may be decided */
            largest = exponent > largest ? exponent : largest;
            here++;
        }
        if (here) which[columns++] = j;
        pending += here;
    }
    if (!unknown && !pending) return;
    width += columns;
    /* d, and N 2^-t - whole d or N - whole 2^t d, where whole has at most 53 bits */
    const double bound = (double)(n - 1) * of_a + (of_a > right ? of_a : right) + (unknown ? 0 : largest + 54) + 1;
    double known = 0;
    int powers = largest;
    powers = of_f.bits > powers ? of_f.bits : powers;
    powers = of_g.bits > powers ? of_g.bits : powers;
    powers = (of_b.bits > powers ? of_b.bits : powers) + 1;
    integer first = 0, rank = 0;
    for (int prime = 0; bound < PRIMES * BITS_OF_PRIME && prime < PRIMES && known <= bound; prime++) {
        set_modulus(q, prime, powers);
        set_matrix(n, g ? first_factor : m, g ? n : width, in_f, of_f.low, q);
        if (g) {
            set_matrix(n, second, n, in_g, of_g.low, q);
            multiply(n, first_factor, second, m, width, q);
        }
        for (integer i = 0; i < n; i++)
            for (integer j = 0; j < columns; j++) {
                const residue x = of_number(in_b[i * c->k + which[j]], of_b.low, q);
                m[i * width + n + j] = g ? reduced(x, q) : x; /* divided by 2^64, as the product is */
            }
        integer here;
        const integer found = eliminate(m, n, width, q, &here);
        if (unknown) {
            if (!here) return; /* it is not singular */
            if (prime && (here != first || found != rank)) return;
            first = here, rank = found;
        } else if (found == n) {
            for (integer i = 0; i < n; i++)
                for (integer j = 0; j < columns; j++) {
                    const integer at = i * c->k + which[j];
                    if (unsure[at] != 2) continue;
                    const number x = split(candidates[at]);
                    if (!is_quotient(x, x.exponent + shift, m[i * width + n + j], m[i * width + i], q)) {
                        unsure[at] = 1;
                        pending--;
                    }
                }
            if (!pending) return;
        } else {
            continue; /* the prime divides the determinant */
        }
        known += BITS_OF_PRIME;
    }
    const int proven = known > bound;
    for (integer i = 0; i < n * c->k; i++)
        if (unsure[i] == 2) unsure[i] = !proven;
    if (unknown && proven) {
        c->column[index] = (int32_t)first;
        c->rank[index] = (int32_t)rank;
    }
}

static void run_decide(integer index, void *call) { decide(index, call); }

/* Decide what `count` systems a x = b leave open, where a = f, or f g (g may be null), [n, n], and b [n, k]. unsure: 1
   where x is perhaps the candidate; set to 0 where it is one. column: 0 if a is certainly not singular; others are set to
   the first column, from 1, that depends on those before, with the rank of a, if a is singular. */
void reproml_decide(integer count, integer n, integer k, const double *f, const double *g, const double *b,
                    const double *candidates, uint8_t *unsure, int32_t *column, int32_t *rank) {
    decision c = {n, k, f, g, b, candidates, unsure, column, rank};
    run_tasks(run_decide, &c, count, count * n * n * (n + k) > WORTH_A_THREAD / 16);
}
