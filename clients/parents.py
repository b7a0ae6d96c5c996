"""Workers end with the process that they work for, also when that is killed."""

from __future__ import annotations

import os
import select
import signal
import threading

from gcma_shm.process import open_pidfd, start_time

# A pid, and when that process began: by the time that a worker looks, the number may be another's.
Who = tuple[int, int]


def who_we_are() -> Who:
    """For the workers of this process."""
    return os.getpid(), start_time(os.getpid()) or 0


def end_with(parent: Who) -> None:
    """Ends this process when that one has ended, or had before. A worker of the standard library's pool whose parent was killed waits for
    ever for its next task, one of loky's until it was idle for long; and ours would hold the parent's buffers meanwhile, as far as it was
    forked, or what it has given away.
    """

    def watch(descriptor: int) -> None:
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        ended.poll()
        os.kill(os.getpid(), signal.SIGTERM)  # as the pool ends its workers when one of them was killed

    descriptor = open_pidfd(*parent)
    if descriptor is None:
        os.kill(os.getpid(), signal.SIGTERM)
        return
    threading.Thread(target=watch, args=(descriptor,), daemon=True, name="gcma-parent").start()
