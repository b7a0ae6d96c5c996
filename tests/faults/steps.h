/* Included before everything else into a build for tests (-include steps.h): a hook before every atomic operation of the data plane, in
 * the middle of every copy of a page, and before every access to a spill file. At the hook a process stops or dies at a chosen step,
 * or loses the processor at random ones, so that the rarest interleavings become common ones.
 *
 * A function-like macro is not expanded again inside its own expansion, so each name below ends at the function itself.
 */
#include "_atomics.h"
#include "_copy.h"
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/uio.h>

__attribute__((visibility("default"))) volatile uint64_t gcma_steps;          /* taken since they were last set to 0 */
__attribute__((visibility("default"))) volatile uint64_t gcma_step_at;        /* the step to be stopped at; 0: none */
__attribute__((visibility("default"))) volatile int gcma_step_signal;         /* what is raised there */
__attribute__((visibility("default"))) volatile int gcma_step_thread;         /* the thread that counts; 0: every one */
__attribute__((visibility("default"))) volatile int gcma_step_changes;        /* 1: only what changes memory or a file counts */
__attribute__((visibility("default"))) volatile uint32_t gcma_jitter;         /* one step in so many loses the processor; 0: none */
__attribute__((visibility("default"))) const char *volatile gcma_step_where;  /* the function of the step that was stopped at */

static __thread uint64_t gcma_random;

static void gcma_step(const char *where, int changes)
{
    if (gcma_jitter) {
        if (!gcma_random)
            gcma_random = now_ns() ^ (uint64_t)getpid() << 32 ^ (uint64_t)(uintptr_t)&gcma_random;
        gcma_random ^= gcma_random << 13;
        gcma_random ^= gcma_random >> 7;
        gcma_random ^= gcma_random << 17;
        if (gcma_random % gcma_jitter == 0) {
            struct timespec t = {0, (long)(gcma_random >> 40) % 300000};
            if (gcma_random >> 32 & 3)
                sched_yield();
            else
                nanosleep(&t, 0);
        }
    }
    if (gcma_step_at && (changes || !gcma_step_changes) && (!gcma_step_thread || gcma_step_thread == (int)syscall(SYS_gettid)) && ++gcma_steps == gcma_step_at) {
        gcma_step_where = where;
        syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), gcma_step_signal); /* this very thread, so not one step later */
    }
}

static void *gcma_memcpy(const char *where, void *to, const void *from, size_t size)
{
    size_t half = size >= 4096 ? size / 128 * 64 : 0;
    if (half) {
        gcma_step(where, 1);
        (memcpy)(to, from, half);
        gcma_step(where, 1);
    }
    (memcpy)((char *)to + half, (const char *)from + half, size - half);
    return to;
}

#define LOOK(call) (gcma_step(__func__, 0), call)
#define STEP(call) (gcma_step(__func__, 1), call)
#define load_relaxed(p) LOOK(load_relaxed(p))
#define load_acquire(p) LOOK(load_acquire(p))
#define store_relaxed(p, v) STEP(store_relaxed(p, v))
#define store_release(p, v) STEP(store_release(p, v))
#define fetch_add(p, v) STEP(fetch_add(p, v))
#define cas(p, e, d) STEP(cas(p, e, d))
#define load_byte(p) LOOK(load_byte(p))
#define store_byte(p, v) STEP(store_byte(p, v))
#define exchange32(p, v) STEP(exchange32(p, v))
#define add32(p, v) STEP(add32(p, v))
#define pread(f, b, n, o) LOOK(pread(f, b, n, o))
#define preadv(f, v, n, o) LOOK(preadv(f, v, n, o))
#define preadv2(f, v, n, o, w) LOOK(preadv2(f, v, n, o, w))
#define pwrite(f, b, n, o) STEP(pwrite(f, b, n, o))
#define pwritev(f, v, n, o) STEP(pwritev(f, v, n, o))
#define pwritev2(f, v, n, o, w) STEP(pwritev2(f, v, n, o, w))
#define fallocate(f, m, o, n) STEP(fallocate(f, m, o, n))
#define memcpy(t, f, n) gcma_memcpy(__func__, t, f, n)
#define copy_in(t, f, n) gcma_memcpy(__func__, t, f, n)
#define copy_out(t, f, n) gcma_memcpy(__func__, t, f, n)

/* Jitter without a hand on the process: from the environment, for brokers and for the workers of a storm. */
__attribute__((constructor)) static void gcma_jitter_from_environment(void)
{
    extern char **environ;
    for (char **e = environ; *e; e++)
        if (!strncmp(*e, "GCMA_TEST_JITTER=", 17))
            for (const char *c = *e + 17; *c >= '0' && *c <= '9'; c++)
                gcma_jitter = gcma_jitter * 10 + (uint32_t)(*c - '0');
}
