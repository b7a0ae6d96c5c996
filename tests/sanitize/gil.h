/* Included before everything else into the build for ThreadSanitizer (-include gil.h): between a thread's `gcma_blind` and its
 * `gcma_see`, plain accesses that the extension makes while it holds the interpreter's lock go unseen; outside the lock all are seen.
 *
 * For the runs in which the lock orders nothing (runtime.py). Its order is what would hide most races: a thread takes it and gives it up
 * at both ends of every operation, so to the sanitizer two operations that do not overlap in time are in order, whatever the protocol says.
 * Without that order, what the lock does protect (reference counts, say) would look like races; hence the blindness. Atomic operations
 * are seen at all times, so what the protocol orders under the lock is in order.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define GCMA_EXPORTED __attribute__((visibility("default"), no_sanitize("thread")))

void AnnotateIgnoreReadsBegin(const char *file, int line);
void AnnotateIgnoreReadsEnd(const char *file, int line);

static __thread int gcma_is_blind;

GCMA_EXPORTED void gcma_blind(void)
{
    gcma_is_blind = 1;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
}

GCMA_EXPORTED void gcma_see(void)
{
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    gcma_is_blind = 0;
}

static __attribute__((no_sanitize("thread"))) PyThreadState *gcma_leave_interpreter(void)
{
    PyThreadState *state = PyEval_SaveThread();
    if (gcma_is_blind)
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    return state;
}

static __attribute__((no_sanitize("thread"))) void gcma_enter_interpreter(PyThreadState *state)
{
    if (gcma_is_blind)
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    PyEval_RestoreThread(state);
}

#define PyEval_SaveThread() gcma_leave_interpreter()
#define PyEval_RestoreThread(state) gcma_enter_interpreter(state)
