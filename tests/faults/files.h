/* Included before everything else into a build for tests (-include files.h): writes and reads of spill files fail, or do less than they
 * were asked for, holes cannot be punched, and file systems do not know this or that, as a test says while broker and clients run. What it
 * says are words in a file that GCMA_TEST_FILES names, mapped by all of them; files.py has the other side.
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

enum { GCMA_WRITES, GCMA_READS, GCMA_PUNCHES, GCMA_FLAGS, GCMA_BLOCK }; /* of the last two: the flags of pwritev2 and preadv2; what `most` says is the block's size */
static struct gcma_fault *gcma_faults;

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

/* How many of `size` bytes at `at` the call may do; negative: errno. Past the page cache whole sectors are done. */
static ssize_t gcma_allowed(int kind, int fd, ssize_t size, int64_t at)
{
    struct gcma_fault *f = &gcma_faults[kind];
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
    if (!f->most || size <= f->most)
        return size;
    return fcntl(fd, F_GETFL) & O_DIRECT ? (f->most + 511) / 512 * 512 : f->most;
}

typedef ssize_t gcma_call(int, const struct iovec *, int, off_t, int);

/* `call` with as many of the bytes as may be done. */
static ssize_t gcma_some(gcma_call *call, int kind, int fd, const struct iovec *parts, int count, int64_t at, int flags)
{
    struct iovec some[64];
    ssize_t size = 0, allowed;
    int n = 0;
    if (!gcma_faults)
        return call(fd, parts, count, at, flags);
    if (count > 64)
        abort();
    if (flags && gcma_faults[GCMA_FLAGS].number) {
        __atomic_add_fetch(&gcma_faults[GCMA_FLAGS].failed, 1, __ATOMIC_RELAXED);
        errno = (int)gcma_faults[GCMA_FLAGS].number;
        return -1;
    }
    for (int i = 0; i < count; i++)
        size += parts[i].iov_len;
    allowed = gcma_allowed(kind, fd, size, at);
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
    return call(fd, some, n, at, flags);
}

static ssize_t gcma_pwrite(int fd, const void *page, size_t size, int64_t at)
{
    struct iovec part = {(void *)page, size};
    return gcma_some(pwritev2, GCMA_WRITES, fd, &part, 1, at, 0);
}

static ssize_t gcma_pread(int fd, void *out, size_t size, int64_t at)
{
    struct iovec part = {out, size};
    return gcma_some(preadv2, GCMA_READS, fd, &part, 1, at, 0);
}

static int gcma_fallocate(int fd, int mode, int64_t at, int64_t size)
{
    ssize_t allowed = gcma_faults ? gcma_allowed(GCMA_PUNCHES, fd, size, at) : size;
    if (allowed == size)
        return fallocate(fd, mode, at, size);
    errno = allowed < 0 ? (int)-allowed : EIO;
    return -1;
}

static int gcma_fstat(int fd, struct stat *found)
{
    int failed = fstat(fd, found);
    if (!failed && gcma_faults && gcma_faults[GCMA_BLOCK].most)
        found->st_blksize = gcma_faults[GCMA_BLOCK].most;
    return failed;
}

#define pwritev(f, v, n, o) gcma_some(pwritev2, GCMA_WRITES, f, v, n, o, 0)
#define pwritev2(f, v, n, o, w) gcma_some(pwritev2, GCMA_WRITES, f, v, n, o, w)
#define preadv(f, v, n, o) gcma_some(preadv2, GCMA_READS, f, v, n, o, 0)
#define preadv2(f, v, n, o, w) gcma_some(preadv2, GCMA_READS, f, v, n, o, w)
#define pwrite(f, b, n, o) gcma_pwrite(f, b, n, o)
#define pread(f, b, n, o) gcma_pread(f, b, n, o)
#define fallocate(f, m, o, n) gcma_fallocate(f, m, o, n)
#define fstat(f, s) gcma_fstat(f, s)
