/* Weights and inputs of golden cases by name: eridiff/trace/hashfill.py says what becomes of these numbers.

   cc -O2 hashfill.c -o hashfill && ./hashfill flux-dev-tiny img_in.weight 4 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static uint64_t seed(const char *salt, const char *name) { /* FNV-1a of salt/name */
    const char *parts[] = {salt, "/", name};
    uint64_t h = 0xCBF29CE484222325u;
    for (int i = 0; i < 3; i++)
        for (const char *c = parts[i]; *c; c++) h = (h ^ (unsigned char)*c) * 0x100000001B3u;
    return h;
}

static double uniform(uint64_t seed, uint64_t index) { /* splitmix64, 24 bits, [-1, 1) */
    uint64_t z = seed + (index + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z = z ^ (z >> 31);
    return (double)(z >> 40) / 8388608.0 - 1.0;
}

int main(int count, char **words) {
    if (count != 4) return 2;
    uint64_t s = seed(words[1], words[2]);
    for (uint64_t i = 0; i < strtoull(words[3], NULL, 10); i++) printf("%.17g\n", uniform(s, i));
    return 0;
}
