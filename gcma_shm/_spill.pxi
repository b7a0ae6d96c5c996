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
#
# All processes of an arena read and write them in the arena's way:
#   buffered   through the page cache, and what the kernel keeps there is its affair
#   uncached   through the page cache, which lets go of it: by RWF_DONTCACHE where kernel and file system know it. Elsewhere a write is only
#              sent on its way to the disk, and what was read is dropped. What either leaves there the broker drops (`drop_cached`).
#   direct     past the page cache (O_DIRECT): whole pages, at addresses that are aligned
# Each write is over when its call returns, in the sense that matters here: whoever reads afterwards, in any way, reads what was written.
# An asynchronous one (io_uring) could be under way when its process is dead and its claim taken over.

cdef enum:
    DIRECT_MEMORY = 4096    # alignment that does for O_DIRECT where nobody tells of less; pages of the arena have it
    DIRECT_GRAIN = 512      # what O_DIRECT moves is a multiple of this, but for the end of a file


cdef int open_named(Arena *a, uint64_t type_, uint64_t life, stat_t *found) noexcept nogil:
    """A new descriptor for what has the name of that life's file; negative: errno."""
    cdef char name[32]
    cdef int fd, again
    snprintf(name, sizeof(name), b"%03llu.%llu", <unsigned long long>type_, <unsigned long long>life)
    cdef int flags = O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY | (O_DIRECT if a.spill_io == DIRECT else 0)
    fd = openat(a.spill_dir, name, flags)
    if fd < 0 and errno == ENOENT:
        # The life has ended; or the whole directory was removed, and perhaps made again. dup3 puts the new one in place of
        # the old one's number, for all threads at once.
        again = open_(a.spill_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        if again < 0:
            return -ENOENT
        dup3(again, a.spill_dir, O_CLOEXEC)
        close(again)
        fd = openat(a.spill_dir, name, flags)
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
    store_relaxed(&a.types[type_].inode, found.st_ino)
    store_relaxed(&a.types[type_].device, found.st_dev)
    return OK


cdef void learn_file(Arena *a, uint64_t type_, int fd) noexcept nogil:
    """What a newly opened file can do is found out anew: it may be on another file system than the one before. Of alignments the largest
    that was met does for all files.
    """
    cdef uint32_t memory, offset
    store_byte(&a.plain[type_], 0)
    if a.spill_io == DIRECT and direct_alignment_of(fd, &memory, &offset) and memory:
        store32(&a.direct_memory, max(memory, load32(&a.direct_memory)))


cdef int open_life(Arena *a, uint64_t type_, uint64_t life) noexcept nogil:
    """A new descriptor for that life's file; negative: errno, ESTALE when another one has its name."""
    cdef stat_t found
    cdef int fd = open_named(a, type_, life, &found)
    if fd >= 0 and (found.st_ino != load_relaxed(&a.types[type_].inode) or found.st_dev != load_relaxed(&a.types[type_].device)):
        close(fd)
        return -ESTALE
    if fd >= 0:
        learn_file(a, type_, fd)
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


cdef inline bint unknown_here() noexcept nogil:
    """Whether the last call failed because kernel or file system do not know RWF_DONTCACHE."""
    return errno == EOPNOTSUPP or errno == ENOSYS


cdef ssize_t write_some(Arena *a, uint64_t type_, int fd, const iovec *parts, int count_, int64_t at) noexcept nogil:
    """One write, in the arena's way; as pwritev."""
    cdef ssize_t written
    if a.spill_io != UNCACHED:
        return racy_pwritev(fd, parts, count_, at)
    if not load_byte(&a.plain[type_]):
        written = racy_pwritev2(fd, parts, count_, at, GCMA_DONTCACHE)
        if written >= 0 or not unknown_here():
            return written
        store_byte(&a.plain[type_], 1)
    written = racy_pwritev(fd, parts, count_, at)
    if written > 0:  # not waited for: that would cost a disk's time a write, as `direct` does
        sync_file_range(fd, at, written, SYNC_FILE_RANGE_WRITE)
    return written


cdef ssize_t read_some(Arena *a, uint64_t type_, int fd, const iovec *parts, int count_, int64_t at) noexcept nogil:
    """One read, in the arena's way; as preadv."""
    cdef ssize_t got
    if a.spill_io != UNCACHED:
        return preadv(fd, parts, count_, at) if count_ > 1 else pread(fd, parts.iov_base, parts.iov_len, at)
    if not load_byte(&a.plain[type_]):
        got = preadv2(fd, parts, count_, at, GCMA_DONTCACHE)
        if got >= 0 or not unknown_here():
            return got
        store_byte(&a.plain[type_], 1)
    got = preadv(fd, parts, count_, at)
    if got > 0:
        posix_fadvise(fd, at, got, POSIX_FADV_DONTNEED)
    return got


cdef int spill_write(
    Arena *a, uint64_t type_, int fd, iovec *parts, int count_, int64_t at, int *whole
) noexcept nogil:
    """Writes all parts from byte `at` on: OK or -errno. `whole`: how many of them are written, from the first on. Parts are consumed."""
    cdef ssize_t written
    whole[0] = 0
    while whole[0] < count_:
        written = write_some(a, type_, fd, parts + whole[0], count_ - whole[0], at)
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


cdef int64_t read_parts(Arena *a, uint64_t type_, int fd, iovec *parts, int count_, int64_t at) noexcept nogil:
    """Bytes read, fewer than asked for only where the file ends; negative: errno. Parts are consumed. In the direct way their
    memory is aligned.
    """
    cdef int64_t got = 0
    cdef ssize_t n, left
    while count_:
        n = read_some(a, type_, fd, parts, count_, at + got)
        if n < 0:
            if errno == EINTR:
                continue
            return -errno
        got += n
        # A file that somebody has cut off in the middle of a block ends a direct read there, and the next one could not begin there.
        if n == 0 or (a.spill_io == DIRECT and n % DIRECT_GRAIN):
            break
        left = n
        while count_ and <size_t>left >= parts.iov_len:
            left -= parts.iov_len
            parts += 1
            count_ -= 1
        if left:
            parts.iov_base = <char *>parts.iov_base + left
            parts.iov_len -= left
    return got


cdef int64_t spill_read(Arena *a, uint64_t type_, int fd, uint8_t *out, size_t size, int64_t at) noexcept nogil:
    """Reads into memory of any alignment. Bytes read, fewer than `size` only where the file ends; negative: errno."""
    cdef iovec part
    cdef uint8_t *aligned
    cdef int64_t got
    part.iov_base = out
    part.iov_len = size
    if a.spill_io != DIRECT or <size_t>out % load32(&a.direct_memory) == 0:
        return read_parts(a, type_, fd, &part, 1, at)
    aligned = <uint8_t *>aligned_alloc(DIRECT_MEMORY, size)  # a page is a multiple of it
    if aligned == NULL:
        return -ENOMEM
    part.iov_base = aligned
    got = read_parts(a, type_, fd, &part, 1, at)
    if got > 0:
        memcpy(out, aligned, got)
    free(aligned)
    return got


cdef void drop_cached(Arena *a) noexcept nogil:
    """Takes out of the page cache what it holds of the living types' files and has written; starts writing the rest."""
    cdef uint64_t type_, life
    cdef int fd
    cdef bint private_ = False
    for type_ in range(256):
        life = load_acquire(&a.types[type_].life)
        if life & 1:
            fd = spill_open(a, type_, life, &private_)
            if fd >= 0:
                posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED)
                spill_done(a, type_, fd, private_)
