/* How the bytes of one page are copied: out of the arena (`copy_out`) and into it (`copy_in`).
 *
 * Both are memcpy, but where something else measured better with pages of the arena: what lies there is in no cache, as a rule, and what
 * the caller has is. Chosen once, by what the CPU says of itself; nothing is compiled for the machine that compiles. `size` is a page's, a
 * power of two of at least 4 KiB. The figures are in ARCHITECTURE.md ("The path of a hit").
 *
 * What copy_in has written is published by a release or a CAS after it. The stores of AVX and of `rep movsb` need no more than that: none
 * passes a later store (Intel's manual, volume 3, 9.2.4; AMD's, volume 2, 7.1); and copy_out's loads, those of `rep movsb` too, do not pass the
 * later load of `life` that says whether they count: loads are not reordered with loads. Non-temporal stores may pass it, so copy_in ends with a
 * full fence where it has used them.
 */
#ifndef GCMA_COPY_H
#define GCMA_COPY_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Pages up to so many bytes are loaded and stored while the interpreter's lock is held. To give it up and take it again, with the counting that
 * goes with it, costs 55 to 65 ns, in which the processor waits at locked instructions for what it could have overlapped: a sixth of a load
 * of 4 KiB out of memory, 2 % of one of 64 KiB. Other threads wait for one copy meanwhile, about a microsecond of the 5 ms that the
 * interpreter gives each in its turn; whoever may wait for somebody, reclaims or touches a file has given the lock up before.
 * Under ThreadSanitizer the lock would put in order what the protocol has to: there it is always given up. */
#ifdef __SANITIZE_THREAD__
enum { HELD_MAX = 0 };
#else
enum { HELD_MAX = 16 << 10 };
#endif

/* The sanitizers see what memcpy reads and writes, and not what an instruction does that they did not compile. */
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#include <cpuid.h>
#include <immintrin.h>

enum {
    COPY_AVX_MAX = 32 << 10,     /* bytes: larger pages are left to memcpy, ... */
    COPY_REP_MIN = 256 << 10,    /* ... are copied out by `rep movsb` from here on, where memcpy writes past the caches, */
    COPY_STREAM_MIN = 256 << 10, /* ... and copied in past the caches from here on: nobody reads so much before it is evicted from them */
    COPY_AHEAD = 4 << 10,        /* bytes that copy_out asks for before it needs them: the hardware's prefetcher begins anew in every page */
};

static int copy_has_avx; /* AVX2, and a system that saves its registers */
static int copy_has_rep; /* FSRM: the CPU calls its rep movsb fast, also for short copies; those that do are fast at long ones */

static inline void copy_init(void)
{
    unsigned a, b, c, d;
    copy_has_avx = __builtin_cpu_supports("avx2") != 0;
    copy_has_rep = __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 4 & 1;
}

__attribute__((target("avx2"))) static inline void copy_lines(char *to, const char *from, size_t size)
{
    for (size_t i = 0; i < size; i += 128) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(from + i)), b = _mm256_loadu_si256((const __m256i *)(from + i + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(from + i + 64)), d = _mm256_loadu_si256((const __m256i *)(from + i + 96));
        _mm256_storeu_si256((__m256i *)(to + i), a);
        _mm256_storeu_si256((__m256i *)(to + i + 32), b);
        _mm256_storeu_si256((__m256i *)(to + i + 64), c);
        _mm256_storeu_si256((__m256i *)(to + i + 96), d);
    }
}

/* Asks for COPY_AHEAD bytes, the last line first: against the direction of the copy, so the hardware's prefetcher runs that way as well,
 * and the lines that come last are on their way when the copy has got there. */
static inline void copy_fetch(const char *from)
{
    for (size_t i = COPY_AHEAD; i > 0; i -= 64)
        __builtin_prefetch(from + i - 64);
}

__attribute__((target("avx2"))) static void copy_ahead(char *to, const char *from, size_t size)
{
    size_t i = 0;
    for (copy_fetch(from); i < size - COPY_AHEAD; i += COPY_AHEAD) {
        copy_fetch(from + i + COPY_AHEAD);
        copy_lines(to + i, from + i, COPY_AHEAD);
    }
    copy_lines(to + i, from + i, COPY_AHEAD);
}

/* `to` begins at a multiple of 32, as pages of a mapped arena do. (That no such store comes before the life word that says GRANTED is
 * the CAS's doing, a locked instruction.) */
__attribute__((target("avx2"))) static void copy_stream(char *to, const char *from, size_t size)
{
    for (size_t i = 0; i < size; i += 64) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(from + i)), b = _mm256_loadu_si256((const __m256i *)(from + i + 32));
        _mm256_stream_si256((__m256i *)(to + i), a);
        _mm256_stream_si256((__m256i *)(to + i + 32), b);
    }
    _mm_mfence();
}

static inline void copy_out(void *to, const void *from, size_t size)
{
    if (size <= COPY_AVX_MAX && copy_has_avx)
        copy_ahead(to, from, size);
    else if (size >= COPY_REP_MIN && copy_has_rep)
        __asm__ __volatile__("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
    else
        memcpy(to, from, size);
}

static inline void copy_in(void *to, const void *from, size_t size)
{
    if (size <= COPY_AVX_MAX && copy_has_avx)
        copy_lines(to, from, size);
    else if (size >= COPY_STREAM_MIN && copy_has_avx && (uintptr_t)to % 32 == 0)
        copy_stream(to, from, size);
    else
        memcpy(to, from, size);
}
#else
static inline void copy_init(void) {}
static inline void copy_out(void *to, const void *from, size_t size) { memcpy(to, from, size); }
static inline void copy_in(void *to, const void *from, size_t size) { memcpy(to, from, size); }
#endif

#endif
