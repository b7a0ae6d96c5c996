"""Workers end with the process that they work for, also when that is killed."""

from __future__ import annotations

import os
import select
import signal
import threading


def end_with(parent: int) -> None:
    """Ends this process when that one has ended. A worker of the standard library's pool whose parent was killed waits for ever for its
    next task, one of loky's until it was idle for long; and ours would hold the parent's buffers meanwhile, as far as it was forked, or
    what it has given away.
    """

    def watch(descriptor: int) -> None:
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        ended.poll()
        os.kill(os.getpid(), signal.SIGTERM)  # as the pool ends its workers when one of them was killed

    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGTERM)
        return
    threading.Thread(target=watch, args=(descriptor,), daemon=True, name="gcma-parent").start()
