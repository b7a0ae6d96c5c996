/* Atomic operations on words in shared memory, and the few system calls that have no wrapper in libc.
 *
 * GCC's and Clang's __atomic builtins are C11's atomics for memory that was not declared _Atomic, which memory that several
 * processes map cannot be. All are lock-free on 64-bit machines; the assertion below refuses to build where they are not,
 * because a lock inside libatomic would be private to one process.
 */
#ifndef GCMA_ATOMICS_H
#define GCMA_ATOMICS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>
#include <linux/futex.h>
#include <sys/syscall.h>

#include "_races.h"

_Static_assert(__atomic_always_lock_free(8, 0), "gcma-shm needs lock-free 64-bit atomics");

/* A build with -DGCMA_FAULT_NO_RECHECK leaves out the second look at a page's life. The tests make one to prove that they
 * would see a torn page. */
#ifdef GCMA_FAULT_NO_RECHECK
enum { RECHECK = 0 };
#else
enum { RECHECK = 1 };
#endif

static inline uint64_t load_relaxed(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline uint64_t load_acquire(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void store_relaxed(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
static inline void store_release(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline uint64_t fetch_add(uint64_t *p, uint64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }

/* True when *p was `expected` and is `desired` now. Sequentially consistent: on x86 every locked operation is a full fence
 * anyway, and on ARM the protocol's swings are both a release of the page behind them and an acquire of the one before. */
static inline int cas(uint64_t *p, uint64_t expected, uint64_t desired)
{
    return __atomic_compare_exchange_n(p, &expected, desired, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
}

static inline uint8_t load_byte(const uint8_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline void store_byte(uint8_t *p, uint8_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
static inline uint32_t load32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void store32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
static inline uint32_t exchange32(uint32_t *p, uint32_t v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
static inline int32_t add32(int32_t *p, int32_t v) { return __atomic_add_fetch(p, v, __ATOMIC_SEQ_CST); }

static inline void fence_acquire(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
static inline void fence_release(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }
static inline void fence_full(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

/* Asks for cache lines that will be read, or written, soon; harmless for any address. */
static inline void prefetch(const void *p) { __builtin_prefetch(p); }
static inline void prefetch_lines(const uint8_t *p, int lines)
{
    for (int i = 0; i < lines; i++)
        __builtin_prefetch(p + 64 * i);
}

static inline void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb" ::: "memory");
#endif
}

static inline uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* One step of a bounded wait: first spin, then yield, then sleep a little longer each time, up to a millisecond. */
static inline void back_off(unsigned step)
{
    if (step < 64) {
        cpu_relax();
    } else if (step < 80) {
        sched_yield();
    } else {
        unsigned doublings = step - 80 < 5 ? step - 80 : 5;
        struct timespec t = {0, 31250L << doublings};
        nanosleep(&t, 0);
    }
}

/* Asks the scheduler for slices of `ns` for this thread and those that it starts from now on; 0: the default. A waking thread with
 * shorter slices is put before a running one with longer ones (EEVDF, Linux 6.12; sched_setattr(2), sched_runtime); older kernels
 * take it for nothing. Returns what they were, 0 where that cannot be told. */
static inline uint64_t set_slice(uint64_t ns)
{
    struct {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } attr = {.size = sizeof attr};
    if (syscall(SYS_sched_getattr, 0, &attr, sizeof attr, 0) || attr.policy != SCHED_OTHER)
        return 0;
    uint64_t before = attr.runtime;
    attr.flags = 0;
    attr.runtime = ns;
    syscall(SYS_sched_setattr, 0, &attr, 0);
    return before;
}

/* Whether another open file than `fd` has a lock on byte `at`; also when that cannot be told. See presence.py. */
static inline int is_locked(int fd, int64_t at)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = at, .l_len = 1};
    return fcntl(fd, F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

/* Futexes shared between processes (not FUTEX_PRIVATE). */
static inline void futex_wait(uint32_t *word, uint32_t expected, uint64_t timeout_ns)
{
    struct timespec t = {(time_t)(timeout_ns / 1000000000u), (long)(timeout_ns % 1000000000u)};
    syscall(SYS_futex, word, FUTEX_WAIT, expected, &t, 0, 0);
}
static inline void futex_wake_all(uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, 0, 0, 0); }
static inline void futex_wake(uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, 1, 0, 0, 0); }

#endif
