"""What runs in the worker processes of an `ArenaExecutor`: tasks come as parcels, and results leave as such."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import threading
from collections.abc import Callable
from typing import Any

from gcma_shm.clients.handles import client_of
from gcma_shm.clients.packers import Giving, large_in
from gcma_shm.clients.parcels import Parcel

_SMALL = {type(None), bool, int, float, complex}  # results that need no parcel

_results: Giving  # this worker's packer
_threshold: int


def begin(
    endpoint: str,
    arena_id: bytes,
    threshold: int,
    after_end: float,
    initializer: Callable[..., object] | None,
    initargs: tuple[Any, ...],
) -> None:
    """The pool's initializer, which calls its user's. Connects to nobody: that is left to the first parcel which needs it."""
    global _results, _threshold
    _results, _threshold = Giving(lambda: client_of(endpoint, arena_id), threshold, after_end), threshold
    _end_with_parent()
    if initializer is not None:
        initializer(*initargs)


def work(parcel: Parcel) -> Any:
    """Does a task; returns its result, or a parcel with it."""
    fn, args, kwargs = parcel.open()
    result = fn(*args, **kwargs)
    del args, kwargs  # before the memory of the result is asked for
    if type(result) in _SMALL:
        return result
    return _results.pack(result, large_in(result, _threshold))[0]


def _end_with_parent() -> None:
    """A worker of the standard library's pool whose parent was killed waits for ever for its next task, and this one would hold the
    parent's buffers with it, as far as it was forked.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return

    def watch(descriptor: int) -> None:
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        ended.poll()
        os.kill(os.getpid(), signal.SIGTERM)  # as the pool ends its workers when one of them was killed

    try:
        descriptor = os.pidfd_open(parent.pid)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGTERM)
        return
    threading.Thread(target=watch, args=(descriptor,), daemon=True, name="gcma-parent").start()
