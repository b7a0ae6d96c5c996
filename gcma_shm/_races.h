/* The races by design, all of them, and how ThreadSanitizer is told.
 *
 * A reader of a page holds nothing: the page may be freed, granted to somebody else and written anew while its bytes are read. What was
 * read counts only if the reader finds afterwards, in a word, that this has not happened; so the bytes may be torn, and the program is
 * right all the same. There are three such places, and each takes its bytes through a name of this file:
 *
 *   load.copy      racy_copy     `load_cached`: the sequence in the life word, and the claim word, are compared after the copy
 *   promote.copy   racy_copy     `fill`: the swing is a CAS from the word that was read before the copy
 *   clean.write    RACY_READS    `crc32c_page`, and
 *                  racy_pwritev  `write_some`, and racy_pwritev2 there: DIRTY goes by a CAS from the word that was read before; where that is
 *                                lost, the file's content does not matter
 *
 * Only the reading is racy. Where a copy writes to is told to the sanitizer as a write like any other, so two writers of one page
 * that nothing orders are reported: `store_page`, `refault` and `Span.zero` use the plain copy_in and memset for their
 * targets, and `fill` tells what it writes to. (`ahead.read` lets the kernel write into a page that is ours.)
 * Every word that several threads touch is atomic, and none of those is excepted.
 *
 * In the product, and under the other sanitizers, the names mean copy_out, pwrite or pwritev, and nothing.
 */
#ifndef GCMA_RACES_H
#define GCMA_RACES_H

#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "_copy.h"

#ifdef __SANITIZE_THREAD__

#define RACY_READS __attribute__((no_sanitize("thread"), noinline))

/* ThreadSanitizer's own entries; gcc 12 has no header for them. Between Begin and End this thread's reads and writes go unseen, also
 * those that the runtime makes in its memcpy and pwritev. Atomic operations are seen all the same. */
void AnnotateIgnoreReadsBegin(const char *file, int line);
void AnnotateIgnoreReadsEnd(const char *file, int line);
void __tsan_write_range(void *to, unsigned long size);

static inline void racy_copy(void *to, const void *from, size_t size)
{
    __tsan_write_range(to, size);
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    memcpy(to, from, size);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}

static inline ssize_t racy_pwritev(int fd, const struct iovec *parts, int count, off_t at)
{
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    ssize_t written = pwritev(fd, parts, count, at);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    return written;
}

static inline ssize_t racy_pwritev2(int fd, const struct iovec *parts, int count, off_t at, int flags)
{
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    ssize_t written = pwritev2(fd, parts, count, at, flags);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    return written;
}

#else

#define RACY_READS
#define racy_copy(to, from, size) copy_out(to, from, size)
/* One page, as most writes are, by the call that has no vector to take in: 50 ns of 850. */
#define racy_pwritev(fd, parts, count, at) \
    ((count) == 1 ? pwrite(fd, (parts)->iov_base, (parts)->iov_len, at) : pwritev(fd, parts, count, at))
#define racy_pwritev2(fd, parts, count, at, flags) pwritev2(fd, parts, count, at, flags)

#endif

#endif
