/* Included before everything else into a build with faults (-include planted.h), of which the environment chooses one: GCMA_TEST_PLANT. The
 * sanitizer must report each: so that these are no checks that cannot fail.
 *
 * A function-like macro is not expanded again inside its own expansion, so each name below ends at the function itself.
 */
#include "_atomics.h"
#include "_crc32c.h"
#include <stdlib.h>
#include <string.h>

enum gcma_fault {
    NONE,
    PLAIN_STORE,
    RELAXED_CAS,
    RELAXED_DONE,
    NO_ANNOUNCEMENT,
    UNTOLD_COPY,
    UNTOLD_CHECKSUM,
    UNTOLD_WRITE,
    LONG_COPY,
    LONG_LOAD,
    LEAK,
    WIDE_SHIFT,
};
static const char *const gcma_faults[] = {
    "none", "plain_store", "relaxed_cas", "relaxed_done", "no_announcement", "untold_copy", "untold_checksum", "untold_write",
    "long_copy", "long_load", "leak", "wide_shift",
};
static unsigned gcma_fault;

__attribute__((constructor)) static void gcma_choose_fault(void)
{
    const char *wanted = getenv("GCMA_TEST_PLANT");
    while (wanted && strcmp(wanted, gcma_faults[gcma_fault]))
        if (++gcma_fault == sizeof gcma_faults / sizeof *gcma_faults)
            abort();
}

#define IS_IN(function) strstr(__func__, function)

/* `untold_…`: one of the races by design (_races.h), not told. The others are races by mistake, none of which x86 itself would show but for
 * the first and the fourth: a word that is published by a plain store; compare-and-swap that orders nothing, so that a page changes hands and
 * the bytes of its two owners are in no order; `promote` takes its announcement back without a release, so that nothing orders its copy and the
 * bytes of the guest who waited for it; `promote` announces nothing, and a guest writes at the same time. */
#define store_release(p, v) \
    (gcma_fault == PLAIN_STORE                          ? (void)(*(p) = (v)) \
     : gcma_fault == RELAXED_DONE && IS_IN("_promote") ? (void)store_relaxed(p, v) \
                                                        : (store_release)(p, v))
#define store_relaxed(p, v) (gcma_fault == NO_ANNOUNCEMENT && IS_IN("_promote") ? (void)0 : (store_relaxed)(p, v))
#define cas(p, expected, desired) (gcma_fault == RELAXED_CAS ? gcma_relaxed_cas(p, expected, desired) : (cas)(p, expected, desired))

static inline int gcma_relaxed_cas(uint64_t *p, uint64_t expected, uint64_t desired)
{
    return __atomic_compare_exchange_n(p, &expected, desired, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

#define crc32c_page(table, page) (gcma_fault == UNTOLD_CHECKSUM ? gcma_look(page) : (void)0, (crc32c_page)(table, page))
static volatile uint64_t gcma_seen;
static inline void gcma_look(const uint8_t *page) { gcma_seen = *(const uint64_t *)page; }

#define racy_pwritev(fd, parts, count, at) \
    (gcma_fault == UNTOLD_WRITE ? pwritev(fd, parts, count, at) : gcma_told_pwritev(fd, parts, count, at))
#define racy_copy(to, from, size) gcma_copy(__func__, to, from, size)

/* Named so that a copy, told or not, is a function of this file: in the product racy_copy and racy_pwritev are macros. */
#ifdef __SANITIZE_THREAD__
#define gcma_told_pwritev (racy_pwritev)
#define gcma_told_copy (racy_copy)
#else
#define gcma_told_pwritev pwritev
#define gcma_told_copy memcpy
#endif

/* `long_…`: eight bytes more than a page has room for, behind the arena's end and behind the caller's page. */
static void gcma_copy(const char *where, void *to, const void *from, size_t size)
{
    if (gcma_fault == UNTOLD_COPY) {
        memcpy(to, from, size);
        return;
    }
    gcma_told_copy(to, from, size);
    if ((gcma_fault == LONG_COPY && strstr(where, "_fill")) || (gcma_fault == LONG_LOAD && strstr(where, "_load_cached")))
        memset((char *)to + size, 1, 8);
}

#define free(p) (gcma_fault == LEAK && IS_IN("__dealloc__") ? (void)0 : free(p))
static inline uint64_t gcma_wide_shift(uint64_t v) { return (uint64_t)(1 << (int)(v | 32)); }
#define fetch_add(p, v) ((fetch_add)(p, v) + (gcma_fault == WIDE_SHIFT ? gcma_wide_shift(v) : 0))
