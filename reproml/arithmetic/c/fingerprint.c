/* fingerprint.py has the definition. It computes no result: it tells whether two tensors have the same bits. */

#include "common.h"

#define WORDS 1024 /* of a block, and of the key */
#define HALF (WORDS / 2)

/* Every NaN is the positive quiet one with an empty payload, as in digest.py. */
static inline uint32_t canonical(uint32_t word) {
    return (word & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : word;
}

typedef struct {
    uint64_t hash, sum;
} pairs;

VECTORISED
static pairs block(const uint32_t *words, const uint32_t *key, int floats) {
    pairs p = {0, 0};
    for (int j = 0; j < HALF; j++) {
        uint32_t a = words[j], b = words[j + HALF];
        if (floats) a = canonical(a), b = canonical(b);
        p.hash += (uint64_t)(uint32_t)(a + key[j]) * (uint32_t)(b + key[j + HALF]);
        p.sum += (uint64_t)a + b;
    }
    return p;
}

/* result[2 i] and result[2 i + 1]: fingerprint and sum of the words of the bytes[i] bytes at data[i], which are
   float32 where floats[i]. */
void reproml_fingerprint(integer count, const void *const *data, const integer *bytes, const char *floats,
                         const uint32_t *key, uint64_t multiplier, uint64_t *result) {
    for (integer i = 0; i < count; i++) {
        const char *from = data[i];
        uint64_t hash = (uint64_t)bytes[i], sum = 0;
        for (integer left = bytes[i]; left > 0; left -= 4 * WORDS, from += 4 * WORDS) {
            uint32_t last[WORDS];
            const uint32_t *words = (const uint32_t *)from;
            if (left < 4 * WORDS) {
                memset(last, 0, sizeof last);
                words = memcpy(last, from, (size_t)left);
            }
            pairs p = block(words, key, floats[i]);
            hash = hash * multiplier + p.hash;
            sum += p.sum;
        }
        result[2 * i] = hash;
        result[2 * i + 1] = sum;
    }
}
