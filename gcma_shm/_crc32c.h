/* CRC32C (Castagnoli, RFC 3720 appendix B.4) of one page, with the CPU's instruction where it has one.
 *
 * The instruction takes three cycles but a new one can start every cycle, so four quarters of the page are computed side by
 * side and joined: appending n bytes to a message multiplies its CRC by x^(8n) modulo the polynomial, a linear map, kept here as four
 * tables of 256 entries (the way of Mark Adler's crc32c.c and of zlib's crc32_combine, written anew).
 */
#ifndef GCMA_CRC32C_H
#define GCMA_CRC32C_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "_races.h"

#define CRC32C_POLYNOMIAL 0x82f63b78u /* bit-reflected */

typedef struct {
    size_t quarter;           /* bytes: a fourth of a page */
    int hardware;             /* whether the CPU has the instruction */
    uint32_t bytes[256];      /* one byte of the table-driven way */
    uint32_t shift[4][256];   /* appends `quarter` zero bytes */
} crc32c_t;

RACY_READS static inline uint32_t crc32c_soft(const crc32c_t *t, uint32_t crc, const uint8_t *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        crc = t->bytes[(crc ^ p[i]) & 0xff] ^ (crc >> 8);
    return crc;
}

static inline uint32_t crc32c_append(const crc32c_t *t, uint32_t crc)
{
    return t->shift[0][crc & 0xff] ^ t->shift[1][(crc >> 8) & 0xff] ^ t->shift[2][(crc >> 16) & 0xff] ^ t->shift[3][crc >> 24];
}

#if defined(__x86_64__)
#include <nmmintrin.h>
#define CRC32C_TARGET __attribute__((target("sse4.2")))
#define CRC32C_STEP(crc, word) ((uint32_t)_mm_crc32_u64((crc), (word)))
#define CRC32C_HARDWARE() __builtin_cpu_supports("sse4.2")
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#define CRC32C_TARGET
#define CRC32C_STEP(crc, word) __crc32cd((crc), (word))
#define CRC32C_HARDWARE() 1
#endif

#ifdef CRC32C_HARDWARE
RACY_READS CRC32C_TARGET static uint32_t crc32c_fast(const crc32c_t *t, const uint8_t *page)
{
    uint32_t a = 0xffffffffu, b = 0, c = 0, d = 0;
    const size_t quarter = t->quarter;
    for (size_t i = 0; i < quarter; i += 8) {
        uint64_t wa, wb, wc, wd;
        memcpy(&wa, page + i, 8);
        memcpy(&wb, page + quarter + i, 8);
        memcpy(&wc, page + 2 * quarter + i, 8);
        memcpy(&wd, page + 3 * quarter + i, 8);
        a = CRC32C_STEP(a, wa);
        b = CRC32C_STEP(b, wb);
        c = CRC32C_STEP(c, wc);
        d = CRC32C_STEP(d, wd);
    }
    return ~(crc32c_append(t, crc32c_append(t, crc32c_append(t, a) ^ b) ^ c) ^ d);
}
#endif

static inline uint32_t crc32c_page(const crc32c_t *t, const uint8_t *page)
{
#ifdef CRC32C_HARDWARE
    if (t->hardware)
        return crc32c_fast(t, page);
#endif
    return ~crc32c_soft(t, 0xffffffffu, page, 4 * t->quarter);
}

/* `page_size` is a power of two, at least 4 KiB. The map for 1 KiB of zeros is computed bit by bit, longer ones by applying
 * a map to itself. */
static void crc32c_init(crc32c_t *t, size_t page_size, int hardware)
{
    static const uint8_t zeros[1024];
    uint32_t basis[32];
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? (crc >> 1) ^ CRC32C_POLYNOMIAL : crc >> 1;
        t->bytes[i] = crc;
    }
    for (int bit = 0; bit < 32; bit++)
        basis[bit] = crc32c_soft(t, 1u << bit, zeros, sizeof zeros);
    for (t->quarter = sizeof zeros;; t->quarter *= 2) {
        for (int byte = 0; byte < 4; byte++)
            for (uint32_t i = 0; i < 256; i++) {
                t->shift[byte][i] = 0;
                for (int bit = 0; bit < 8; bit++)
                    if (i >> bit & 1)
                        t->shift[byte][i] ^= basis[8 * byte + bit];
            }
        if (t->quarter == page_size / 4)
            break;
        for (int bit = 0; bit < 32; bit++)
            basis[bit] = crc32c_append(t, basis[bit]);
    }
#ifdef CRC32C_HARDWARE
    t->hardware = hardware && CRC32C_HARDWARE();
#else
    t->hardware = 0;
    (void)hardware;
#endif
}

#endif
