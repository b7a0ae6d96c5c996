/* Included before everything else into a build for tests (-include files.h): pwrite, pwritev and pread of spill files fail, or do less than they
 * were asked for, as a test says while broker and clients run. What it says are words in a file that GCMA_TEST_FILES names, mapped
 * by all of them; files.py has the other side.
 *
 * A fault lies on a range of bytes, of each file or of one. A call that begins there fails; one that begins below it is short, as on a disk
 * with a bad block.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

struct gcma_fault {
    volatile int64_t number;   /* errno; 0: none */
    volatile int64_t from, to; /* bytes of a file */
    volatile int64_t inode;    /* of the only file; 0: all of them */
    volatile int64_t most;     /* bytes that one call may do; -1: none, and it says so; 0: all */
    volatile int64_t calls;    /* how many there were ... */
    volatile int64_t failed;   /* ... and how many failed */
};

static struct gcma_fault *gcma_faults; /* of writes, of reads */

__attribute__((constructor)) static void gcma_faults_from_environment(void)
{
    const char *name = getenv("GCMA_TEST_FILES");
    int fd = name ? open(name, O_RDWR | O_CLOEXEC) : -1;
    if (fd >= 0) {
        void *found = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        gcma_faults = found == MAP_FAILED ? 0 : found;
        close(fd);
    }
}

/* How many of `size` bytes at `at` the call may do; negative: errno. */
static ssize_t gcma_allowed(struct gcma_fault *f, int fd, ssize_t size, int64_t at)
{
    struct stat found;
    __atomic_add_fetch(&f->calls, 1, __ATOMIC_RELAXED);
    if (f->inode && (fstat(fd, &found) || (int64_t)found.st_ino != f->inode))
        return size;
    if (f->number && at + size > f->from && at < f->to) {
        if (at >= f->from) {
            __atomic_add_fetch(&f->failed, 1, __ATOMIC_RELAXED);
            return -f->number;
        }
        size = f->from - at;
    }
    if (f->most < 0)
        return 0;
    return f->most && size > f->most ? f->most : size;
}

static ssize_t gcma_pwritev(int fd, const struct iovec *parts, int count, int64_t at)
{
    struct iovec some[16];
    ssize_t size = 0, allowed;
    int n = 0;
    if (!gcma_faults || count > 16)
        return pwritev(fd, parts, count, at);
    for (int i = 0; i < count; i++)
        size += parts[i].iov_len;
    allowed = gcma_allowed(&gcma_faults[0], fd, size, at);
    if (allowed <= 0) {
        errno = (int)-allowed;
        return allowed ? -1 : 0;
    }
    for (ssize_t left = allowed; left > 0; n++) {
        some[n] = parts[n];
        if ((ssize_t)some[n].iov_len > left)
            some[n].iov_len = left;
        left -= some[n].iov_len;
    }
    return pwritev(fd, some, n, at);
}

static ssize_t gcma_pwrite(int fd, const void *page, size_t size, int64_t at)
{
    struct iovec part = {(void *)page, size};
    return gcma_pwritev(fd, &part, 1, at);
}

static ssize_t gcma_pread(int fd, void *out, size_t size, int64_t at)
{
    ssize_t allowed;
    if (!gcma_faults)
        return pread(fd, out, size, at);
    allowed = gcma_allowed(&gcma_faults[1], fd, (ssize_t)size, at);
    if (allowed <= 0) {
        errno = (int)-allowed;
        return allowed ? -1 : 0;
    }
    return pread(fd, out, allowed, at);
}

#define pwritev(f, v, n, o) gcma_pwritev(f, v, n, o)
#define pwrite(f, b, n, o) gcma_pwrite(f, b, n, o)
#define pread(f, b, n, o) gcma_pread(f, b, n, o)
