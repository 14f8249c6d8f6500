/* Fingerprints of tensors, as tracing/fingerprint.py defines them: equal tensors have equal fingerprints. */

#include "common.h"

#define WORDS 1024 /* of a block and of the key */
#define HALF (WORDS / 2)

/* Replace every NaN by the positive quiet NaN with an empty payload, as in digest.py. */
static inline uint32_t canonical(uint32_t word) {
    float x;
    memcpy(&x, &word, sizeof x);
    return x != x ? 0x7fc00000 : word;
}

typedef uint32_t word __attribute__((may_alias, aligned(1))); /* of the memory of a tensor of any type */

typedef struct {
    uint64_t hash, sum;
} pairs;

VECTORISED static pairs block(const word *words, const uint32_t *key, int floats, int summed) {
    pairs p = {0, 0};
    for (int j = 0; j < HALF; j++) {
        uint32_t a = words[j], b = words[j + HALF];
        if (floats) a = canonical(a), b = canonical(b);
        p.hash += (uint64_t)(uint32_t)(a + key[j]) * (uint32_t)(b + key[j + HALF]);
        if (summed) p.sum += (uint64_t)a + b;
    }
    return p;
}

/* The memory of a tensor; floats: whether it holds float32. */
typedef struct {
    const char *data;
    integer bytes, floats;
} piece;

/* Store the fingerprint of pieces[i] in result[2 i] and the sum of its words in result[2 i + 1], 0 from i = summed
   on. */
void reproml_fingerprint(integer count, integer summed, const piece *pieces, const uint32_t *key, uint64_t multiplier,
                         uint64_t *result) {
    for (integer i = 0; i < count; i++) {
        const char *from = pieces[i].data;
        uint64_t hash = (uint64_t)pieces[i].bytes, sum = 0;
        for (integer left = pieces[i].bytes; left > 0; left -= 4 * WORDS, from += 4 * WORDS) {
            uint32_t last[WORDS];
            const word *words = (const word *)from;
            if (left < 4 * WORDS) {
                memset(last, 0, sizeof last);
                words = memcpy(last, from, (size_t)left);
            }
            pairs p = block(words, key, pieces[i].floats != 0, i < summed);
            hash = hash * multiplier + p.hash;
            sum += p.sum;
        }
        result[2 * i] = hash;
        result[2 * i + 1] = sum;
    }
}
