# Spill files: one per life of a type, slot n at byte n × page size.
#
# A handle has its life's file open for as long as it exists. Direct reclaim and the broker's sweep clean whatever they
# find, also of types that this process never declared; for them there is a table of files, one per type, where a
# descriptor is replaced only while no thread uses it. Files are opened by (type, life), so that a client that slept
# through the end of a life writes into a file that nobody reads.


#
# Somebody may remove the file, or put another one in its place. Whoever has it open goes on with what it has opened; whoever
# opens it later is refused, by the number of the file that the life began with: two files for one life, each with some of its
# pages, would lose values that were acknowledged. The broker has each living type's file open from the beginning, so pages
# can be cleaned also when nobody else finds the file any more.


cdef int open_named(Arena *a, uint64_t type_, uint64_t life, stat_t *found) noexcept nogil:
    """A new descriptor for what has the name of that life's file; negative: errno."""
    cdef char name[32]
    cdef int fd, again
    snprintf(name, sizeof(name), b"%03llu.%llu", <unsigned long long>type_, <unsigned long long>life)
    fd = openat(a.spill_dir, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY)
    if fd < 0 and errno == ENOENT:
        # The life has ended; or the whole directory was removed, and perhaps made again. dup3 puts the new one in place of
        # the old one's number, for all threads at once.
        again = open_(a.spill_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        if again < 0:
            return -ENOENT
        dup3(again, a.spill_dir, O_CLOEXEC)
        close(again)
        fd = openat(a.spill_dir, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY)
    if fd < 0:
        return -errno
    if fstat(fd, found) < 0:
        close(fd)
        return -EIO
    return fd


cdef int note_file(Arena *a, uint64_t type_, uint64_t life) noexcept nogil:
    """Notes which file that life, about to begin, has: OK or -errno."""
    cdef stat_t found
    cdef int fd = open_named(a, type_, life, &found)
    if fd < 0:
        return fd
    close(fd)
    a.types[type_].inode = found.st_ino
    a.types[type_].device = found.st_dev
    return OK


cdef int open_life(Arena *a, uint64_t type_, uint64_t life) noexcept nogil:
    """A new descriptor for that life's file; negative: errno, ESTALE when another one has its name."""
    cdef stat_t found
    cdef int fd = open_named(a, type_, life, &found)
    if fd >= 0 and (found.st_ino != a.types[type_].inode or found.st_dev != a.types[type_].device):
        close(fd)
        return -ESTALE
    return fd


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


cdef int spill_write(int fd, iovec *parts, int count_, int64_t at, int *whole) noexcept nogil:
    """Writes all parts from byte `at` on: OK or -errno. `whole`: how many of them are written, from the first on. Parts are consumed."""
    cdef ssize_t written
    whole[0] = 0
    while whole[0] < count_:
        written = racy_pwritev(fd, parts + whole[0], count_ - whole[0], at)
        if written < 0:
            if errno == EINTR:
                continue
            return -errno
        if written == 0:  # no file system should; none that does will be asked for ever
            return -ENOSPC
        at += written
        while whole[0] < count_ and <size_t>written >= parts[whole[0]].iov_len:
            written -= parts[whole[0]].iov_len
            whole[0] += 1
        if written:
            parts[whole[0]].iov_base = <char *>parts[whole[0]].iov_base + written
            parts[whole[0]].iov_len -= written
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
