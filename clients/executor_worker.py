"""What runs in the worker processes of an `ArenaExecutor`: tasks that hold anything large come as parcels, and such results leave so.

Results are packed by the queue that they leave through, and opened by the pool's thread when it reads them there: so a task whose
arguments and result are small is to both sides what it is in the standard library's pool, and takes no longer.
"""

from __future__ import annotations

import multiprocessing
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures.process import _RemoteTraceback, _ResultItem
from multiprocessing.queues import SimpleQueue
from typing import Any, cast

from gcma_shm.clients.frames import forget_frames
from gcma_shm.clients.handles import client_of
from gcma_shm.clients.packers import PLAIN_MAX, Giving, Packer, large_in, plainly_small
from gcma_shm.clients.parcels import Parcel
from gcma_shm.clients.parents import end_with

#: In the parent: of its pools, by number.
packers: weakref.WeakValueDictionary[int, Packer] = weakref.WeakValueDictionary()

_pool: int  # in a worker: the number of its pool,
_results: Giving  # ... its packer,
_threshold: int  # ... and what is large


def begin(
    pool: int,
    endpoint: str,
    arena_id: bytes,
    threshold: int,
    after_end: float,
    initializer: Callable[..., object] | None,
    initargs: tuple[Any, ...],
) -> None:
    """The pool's initializer, which calls its user's. Connects to nobody: that is left to the first parcel which needs it."""
    global _pool, _results, _threshold
    _pool, _results, _threshold = pool, Giving(lambda: client_of(endpoint, arena_id), threshold, after_end), threshold
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with(parent.pid)
    if initializer is not None:
        initializer(*initargs)


def work(parcel: Parcel) -> Any:
    """Does a task."""
    fn, args, kwargs = parcel.open()
    return fn(*args, **kwargs)


class Results(SimpleQueue[Any]):
    """The way of results from the workers to their pool."""

    def put(self, item: Any) -> None:
        """In a worker. Raises what packing raises, which is sent in its place."""
        if type(item) is not _ResultItem:  # the number of a worker that ends
            super().put(item)
            return
        sent: Any = item
        if sent.exception is None and not (_threshold >= PLAIN_MAX and plainly_small((sent.result,))):
            parcel = _results.pack(sent.result, large_in(sent.result, _threshold))[0]
            sent = _Arriving(_pool, sent.work_id, sent.exit_pid, parcel)
        super().put(sent)
        if (
            item.exception is not None
        ):  # the worker has it until another task fails, and its frames have this one's arrays
            forget_frames(cast(Any, item.exception).exc)


class _Arriving:
    """A result under way; unpickled it is what the pool expects."""

    def __init__(self, *what: Any) -> None:
        self._what = what

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, self._what


def _arrive(pool: int, work_id: int, exit_pid: int | None, parcel: Parcel) -> _ResultItem:
    """In the pool's thread."""
    if (packer := packers.get(pool)) is not None:
        packer.fell_back(parcel.in_pipe, "a worker's result found no room")
    try:
        return _ResultItem(work_id, result=parcel.open(), exit_pid=exit_pid)
    except BaseException as error:
        where = "".join(traceback.format_exception(error))
        forget_frames(error)
        error.__cause__ = cast(Any, _RemoteTraceback)(where)
        return _ResultItem(work_id, exception=cast(Exception, error), exit_pid=exit_pid)
