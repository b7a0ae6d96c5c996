/* What the page cache has to do with a spill file: asking whether it can be passed by, and writing and reading so that nothing stays in it.
 *
 * Constants and offsets of the kernel's interface are written out where the headers of a system may be older than its kernel.
 */
#ifndef GCMA_DIRECT_H
#define GCMA_DIRECT_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* pwritev2 and preadv2: what is read or written leaves the page cache when it is done with, or has reached the disk (Linux 6.14). */
enum { GCMA_DONTCACHE = 0x80 };

/* Alignment that O_DIRECT asks of memory and of offset and length, in bytes; 0: of this file there is no such thing. Returns 0 when the
 * kernel (before Linux 6.1) or the file system does not tell. */
static inline int direct_alignment(int fd, uint32_t *memory, uint32_t *offset)
{
    enum { STATX_DIOALIGN_ = 0x2000, MASK_AT = 0, MEMORY_AT = 0x98, OFFSET_AT = 0x9c };
    unsigned char found[256] = {0};
    uint32_t mask = 0;
    if (syscall(SYS_statx, fd, "", 0x1000 /* AT_EMPTY_PATH */, STATX_DIOALIGN_, found) == 0)
        memcpy(&mask, found + MASK_AT, sizeof mask);
    memcpy(memory, found + MEMORY_AT, sizeof *memory);
    memcpy(offset, found + OFFSET_AT, sizeof *offset);
    return (mask & STATX_DIOALIGN_) != 0;
}

#endif
