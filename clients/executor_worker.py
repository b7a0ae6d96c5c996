"""What runs in the worker processes of an `ArenaExecutor`: tasks that hold anything large come as parcels, and such results leave so.

Results are packed by the queue that they leave through, and opened by the pool's thread when it reads them there: so a task whose
arguments and result are small is to both sides what it is in the standard library's pool, and takes no longer.

What a task was given is given back before its result is sent, unless the next task is there already and is given the same: then the pool
holds that memory, too, and to ask the broker for it anew would take longer than many a task.
"""

from __future__ import annotations

import itertools
import select
import traceback
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures.process import _CallItem, _RemoteTraceback, _ResultItem, _SafeQueue
from multiprocessing.context import BaseContext
from multiprocessing.queues import SimpleQueue
from multiprocessing.reduction import ForkingPickler
from typing import Any, cast

from gcma_shm.clients import handles
from gcma_shm.clients.calls import Call, Told
from gcma_shm.clients.client import Client
from gcma_shm.clients.correspondence import Patience
from gcma_shm.clients.frames import forget_frames
from gcma_shm.clients.handles import Reference, client_of
from gcma_shm.clients.packers import Giving, Packer, large_in
from gcma_shm.clients.parcels import Parcel
from gcma_shm.clients.parents import Who, end_with
from gcma_shm.clients.plain import PLAIN_MAX, plainly_small
from gcma_shm.errors import GcmaError

#: In the parent: of its pools, by number.
packers: weakref.WeakValueDictionary[int, Packer] = weakref.WeakValueDictionary()

_pool: int  # in a worker: the number of its pool,
_results: Giving  # ... its packer,
_threshold: int  # ... and what is large
_given: dict[tuple[Any, ...], memoryview] = {}  # ... and the memory that its task was given


def begin(
    parent: Who,
    pool: int,
    endpoint: str,
    arena_id: bytes,
    patience: Patience,
    threshold: int,
    after_end: float,
    initializer: Callable[..., object] | None,
    initargs: tuple[Any, ...],
) -> None:
    """The pool's initializer, which calls its user's. Connects to nobody: that is left to the first parcel which needs it."""
    global _pool, _results, _threshold
    handles.patience = patience
    _pool, _results, _threshold = pool, Giving(lambda: client_of(endpoint, arena_id), threshold, after_end), threshold
    end_with(parent)
    if initializer is not None:
        initializer(*initargs)


def work(what: Call | Parcel) -> Any:
    """Does a task."""
    failed: list[GcmaError] = []

    def memory_of(reference: tuple[Any, ...]) -> memoryview:
        if failed:  # a parcel tries all its pieces, and each would ask for all of them again
            raise failed[0]
        try:
            return _given.get(reference) or _seen(reference) or _taken(reference, what)
        except GcmaError as error:
            failed.append(error)
            raise

    fn, args, kwargs = what.open(memory_of)
    return fn(*args, **kwargs)


def call(fn: Callable[..., Any], args: list[Any], arrays: Sequence[Told]) -> Any:
    """Does a task whose arrays lie in the arena: `work(Call(...))`, pickled as what it is made of."""
    return work(Call(fn, args, arrays))


def _seen(told: tuple[Any, ...]) -> memoryview | None:
    """The memory of what this process has anyway, as a fork has what its parent had. Raises StaleHandle, BrokerUnavailable."""
    reference = Reference(*told)
    return client_of(reference.endpoint, reference.arena_id).view_of(reference)


def _taken(reference: tuple[Any, ...], what: Call | Parcel) -> memoryview:
    """What it stands for, asked for with all else that the task is given and this process has not. Raises as `_take`."""
    _take({reference, *(other for other in what.references if other not in _given and _seen(other) is None)})
    return _given[reference]


def _take(references: Iterable[tuple[Any, ...]]) -> None:
    """Asks for them, of each arena at once. Raises StaleHandle, QuotaExceeded, BrokerUnavailable."""
    by_client: dict[Client, list[Reference]] = {}
    for reference in itertools.starmap(Reference, references):
        by_client.setdefault(client_of(reference.endpoint, reference.arena_id), []).append(reference)
    for client, wanted in by_client.items():
        for reference, buffer in zip(wanted, client.attach_handles(wanted), strict=True):
            _given[reference] = buffer.view


class Tasks(_SafeQueue):
    """The way of tasks from their pool to the workers."""

    _reader: Any
    _rlock: Any
    _sem: Any
    _ahead: tuple[Any, BaseException | None] | None = None  # in a worker: its next task, or why there is none
    _waiting: select.poll | None = None

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """As any queue's."""
        if self._ahead is None:
            return super().get(block, timeout)
        (item, error), self._ahead = self._ahead, None
        if error is not None:
            raise error
        return item

    def look_ahead(self) -> Any:
        """In a worker: the next task, if it is there. It is this worker's from now on, `get` gives it, and raises what this meets."""
        if self._ahead is None:
            try:
                sent = self._receive()
                if sent is not None:
                    # Without the lock, as by `get`: this may import what takes long, and others wait for their tasks.
                    self._ahead = ForkingPickler.loads(sent), None
            except BaseException as error:  # whatever was read of the task is lost
                self._ahead = None, error
        return self._ahead and self._ahead[0]

    def _receive(self) -> bytes | None:
        if not self._rlock.acquire(False):
            return None
        try:
            if not self._is_waiting():
                return None
            sent: bytes = self._reader.recv_bytes()
            self._sem.release()
            return sent
        finally:
            self._rlock.release()

    def _is_waiting(self) -> bool:
        if self._waiting is None:  # the connection's own `poll` makes one each time
            self._waiting = select.poll()
            self._waiting.register(self._reader, select.POLLIN)
        return bool(self._waiting.poll(0))


class Results(SimpleQueue[Any]):
    """The way of results from the workers to their pool."""

    def __init__(self, tasks: Tasks, context: BaseContext) -> None:
        super().__init__(ctx=context)
        self._tasks = tasks

    def __getstate__(self) -> Any:
        return super().__getstate__(), self._tasks

    def __setstate__(self, state: Any) -> None:
        theirs, self._tasks = state
        super().__setstate__(theirs)

    def put(self, item: Any) -> None:
        """In a worker. Raises what packing raises, which is sent in its place."""
        if type(item) is not _ResultItem:  # the number of a worker that ends
            super().put(item)
            return
        sent: Any = item
        if sent.exception is None and not (_threshold >= PLAIN_MAX and plainly_small((sent.result,))):
            parcel = _results.pack(sent.result, large_in(sent.result, _threshold))[0]
            sent = _Arriving(_pool, sent.work_id, sent.exit_pid, parcel)
        if item.exception is not None:
            # The worker has it until another task fails, and its frames have this one's arrays; where it was raised is in words by now.
            forget_frames(cast(Any, item.exception).exc)
        if _given:
            self._give_back(last=item.exit_pid is not None)
        super().put(sent)

    def _give_back(self, last: bool) -> None:
        """What the next task is not given. `last`: this worker has none."""
        wanted = set() if last else _references(self._tasks.look_ahead())
        for reference in _given.keys() - wanted:
            del _given[reference]


def _references(task: Any) -> set[tuple[Any, ...]]:
    """Of what a task is given, or whatever comes in its place."""
    if type(task) is not _CallItem or task.fn not in (work, call):
        return set()
    args: Any = task.args
    references: set[tuple[Any, ...]] = (args[0] if task.fn is work else Call(*args)).references
    return references


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
