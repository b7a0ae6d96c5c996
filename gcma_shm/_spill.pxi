# Spill files: one per life of a type, slot n at byte n × page size.
#
# A handle has its life's file open for as long as it exists. Direct reclaim and the broker's sweep clean whatever they
# find, also of types that this process never declared; for them there is a table of files, one per type, where a
# descriptor is replaced only while no thread uses it. Files are opened by (type, life), so that a client that slept
# through the end of a life writes into a file that nobody reads.


cdef int open_life(Arena *a, uint64_t type_, uint64_t life) noexcept nogil:
    """A new descriptor for that life's file; negative: errno."""
    cdef char name[32]
    cdef int fd
    snprintf(name, sizeof(name), b"%03llu.%llu", <unsigned long long>type_, <unsigned long long>life)
    fd = openat(a.spill_dir, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW)
    return fd if fd >= 0 else -errno


cdef int spill_open(Arena *a, uint64_t type_, uint64_t life, bint *private_) noexcept nogil:
    """A descriptor for that life's file, to be given back with spill_done; negative: errno.

    The caller may hold claims, so this waits for nobody: while another thread still uses the file of an older life, the
    descriptor is a private one.
    """
    cdef SpillFile *f = &a.spill[type_]
    cdef int fd, old = -1
    cdef unsigned step = 0
    private_[0] = False
    while exchange32(&a.spill_lock, 1):  # held for one open() at the most, by threads of this process only
        back_off(step)
        step += 1
    if f.fd < 0 or f.life != life:
        fd = open_life(a, type_, life)
        if fd < 0 or load32(<uint32_t *>&f.users):
            private_[0] = fd >= 0
            store32(&a.spill_lock, 0)
            return fd
        old = f.fd
        # In this order, and before the close: a child that another thread forks just now must inherit neither a stale
        # number nor the new life with the old file.
        f.fd = fd
        fence_release()
        f.life = life
    fd = f.fd
    add32(&f.users, 1)  # atomic like spill_done's, which takes no lock
    store32(&a.spill_lock, 0)
    if old >= 0:
        close(old)
    return fd


cdef void spill_done(Arena *a, uint64_t type_, int fd, bint private_) noexcept nogil:
    if private_:
        close(fd)
    else:
        add32(&a.spill[type_].users, -1)


cdef int spill_write(int fd, iovec *parts, int count_, int64_t at) noexcept nogil:
    """Writes all parts from byte `at` on; OK or -errno. The parts are consumed."""
    cdef ssize_t written
    while count_:
        written = racy_pwritev(fd, parts, count_, at)
        if written < 0:
            if errno == EINTR:
                continue
            return -errno
        if written == 0:
            return -ENOSPC
        at += written
        while count_ and <size_t>written >= parts.iov_len:
            written -= parts.iov_len
            parts += 1
            count_ -= 1
        if count_:
            parts.iov_base = <char *>parts.iov_base + written
            parts.iov_len -= written
    return OK


cdef int64_t spill_read(int fd, uint8_t *out, size_t size, int64_t at) noexcept nogil:
    """Bytes read, fewer than `size` only where the file ends; negative: errno."""
    cdef size_t got = 0
    cdef ssize_t n
    while got < size:
        n = pread(fd, out + got, size - got, at + got)
        if n < 0:
            if errno == EINTR:
                continue
            return -errno
        if n == 0:
            break
        got += n
    return got
