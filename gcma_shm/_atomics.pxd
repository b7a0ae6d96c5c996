"""C declarations of `_atomics.h`, `_races.h`, `_copy.h` and `_crc32c.h`."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "_atomics.h" nogil:
    enum:
        RECHECK
    uint64_t load_relaxed(const uint64_t *p)
    uint64_t load_acquire(const uint64_t *p)
    void store_relaxed(uint64_t *p, uint64_t v)
    void store_release(uint64_t *p, uint64_t v)
    uint64_t fetch_add(uint64_t *p, uint64_t v)
    bint cas(uint64_t *p, uint64_t expected, uint64_t desired)
    uint8_t load_byte(const uint8_t *p)
    void store_byte(uint8_t *p, uint8_t v)
    uint32_t load32(const uint32_t *p)
    void store32(uint32_t *p, uint32_t v)
    uint32_t exchange32(uint32_t *p, uint32_t v)
    int32_t add32(int32_t *p, int32_t v)
    void fence_acquire()
    void fence_release()
    void fence_full()
    void prefetch(const void *p)
    void prefetch_lines(const uint8_t *p, int lines)
    uint64_t now_ns()
    void back_off(unsigned step)
    uint64_t set_slice(uint64_t ns)
    bint is_locked(int fd, int64_t at)
    void futex_wait(uint32_t *word, uint32_t expected, uint64_t timeout_ns)
    void futex_wake(uint32_t *word)
    void futex_wake_all(uint32_t *word)

cdef extern from "_races.h" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    void racy_copy(void *to, const void *from_, size_t size)
    ssize_t racy_pwritev(int fd, const iovec *parts, int count, int64_t at)
    ssize_t racy_pwritev2(int fd, const iovec *parts, int count, int64_t at, int flags)

cdef extern from "_copy.h" nogil:
    enum:
        HELD_MAX
    void copy_init()
    void copy_in(void *to, const void *from_, size_t size)

cdef extern from "_crc32c.h" nogil:
    ctypedef struct crc32c_t:
        pass
    void crc32c_init(crc32c_t *table, size_t page_size, bint hardware)
    uint32_t crc32c_page(const crc32c_t *table, const uint8_t *page)
