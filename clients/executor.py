"""`ArenaExecutor`: a process pool whose large arguments and results travel through the arena.

It is the standard library's ProcessPoolExecutor in all but this: what a task is given is packed where the pool pickles it (in its feeder
thread, a few tasks ahead), and unpacked inside the task; what it returns is packed there, and unpacked before the future has it. A task that
is small, or small but for arrays that lie in the arena, is not packed at all: it goes as the standard library's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ProcessPoolExecutor
from multiprocessing.context import BaseContext
from typing import Any, ParamSpec, TypeVar, cast

from gcma_shm.clients import executor_worker
from gcma_shm.clients.calls import Call, without
from gcma_shm.clients.client import Client
from gcma_shm.clients.default import default_client
from gcma_shm.clients.packers import Copy, Sharing, all_in_arena, large_in
from gcma_shm.clients.parcels import Parcel
from gcma_shm.clients.parents import who_we_are
from gcma_shm.clients.places import AFTER_END_S, Place
from gcma_shm.clients.plain import PLAIN_MAX, arrays_among, goes_by_name

THRESHOLD = 256 << 10  # bytes: below, a pipe is quicker than the requests for a buffer
# In place of AFTER_END_S, for a pool that is stopped or busy: workers end in the ordinary course, by max_tasks_per_child.
AFTER_END_OF_MANY_S = 600.0
_numbers = itertools.count()  # of this process's pools

P = ParamSpec("P")
T = TypeVar("T")


class ArenaExecutor(ProcessPoolExecutor):
    """A `concurrent.futures.ProcessPoolExecutor` whose large arguments and results travel through an arena.

    Of an argument or a result, each buffer of `threshold` bytes or more (of an array of NumPy, Arrow or pandas, a PickleBuffer, bytes, a
    bytearray) is copied once into the arena, and the other side works on that memory; so is the rest of its pickle, if it is large.

    A task's arrays are read-only: an array that is given to many tasks is copied once for all that are submitted and not done, and all
    of them see that copy. So it must not be changed until they are done. Contiguous arrays on a Buffer (`buf.numpy(...)`) are passed as
    they are, without a copy, writable; `share` makes some that are read-only. Results are the caller's alone, and writable, but for
    what lies on an argument's memory still. Memory is free again when the last array on it is gone, on both sides, or the process is.

    When the arena has no room, or cannot be reached, what is large goes through the pipe; `fallbacks` counts that, and a warning is logged once.
    """

    _call_queue: Any
    _initargs: tuple[Any, ...]

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: BaseContext | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        client: Client | None = None,
        threshold: int = THRESHOLD,
    ) -> None:
        """As ProcessPoolExecutor's. `client`: of the arena, mapped; by default this process's, see `default_client`. Workers wait for the
        broker as long as it does.
        """
        if threshold < 1:
            raise ValueError(f"threshold {threshold}: expected at least 1 byte")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        client = client or default_client()
        if not client.mapped:
            raise ValueError("the executor needs a client that maps the arena; connect with mapped=True")
        self._threshold = threshold
        self._packer = Sharing(lambda: client, threshold)
        after_end = AFTER_END_S if max_tasks_per_child is None else AFTER_END_OF_MANY_S
        number = next(_numbers)
        executor_worker.packers[number] = self._packer
        arena = (client.endpoint, client.arena_id, client._channel.patience)
        started = (who_we_are(), number, *arena, threshold, after_end, initializer, initargs)
        super().__init__(
            max_workers, mp_context, executor_worker.begin, started, max_tasks_per_child=max_tasks_per_child
        )
        tasks = self._call_queue
        tasks.__class__ = executor_worker.Tasks
        tasks.pending_work_items = self._pending_work_items = _Pending()
        self._result_queue = executor_worker.Results(tasks, cast(BaseContext, self._mp_context))

    @property
    def fallbacks(self) -> int:
        """How many large arguments and results went through the pipe, for want of room in the arena."""
        return self._packer.fallbacks

    @property
    def copied(self) -> int:
        """How many bytes of arguments were copied into the arena."""
        return self._packer.copied

    def share(self, value: T) -> T:
        """An equal object, whose large buffers lie in the arena, read-only: tasks are given it without a copy, as long as it lives.

        For what is given to one task after another. Where the arena has no room the buffers are copies elsewhere. Raises what
        pickling raises.
        """
        parcel, kept = self._packer.pack(value, large_in(value, self._threshold))
        try:
            return cast(T, parcel.open())
        finally:
            del kept

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As `Executor.submit`."""
        arrays = None
        if not kwargs and self._threshold >= PLAIN_MAX and goes_by_name(fn):
            arrays = arrays_among(args)
            if arrays == []:
                return super().submit(cast(Any, fn), *args)
        submit: Any = super().submit
        found = all_in_arena(args, arrays, self._threshold) if arrays else None
        if arrays and found:
            future = submit(executor_worker.call, fn, without(args, arrays), found, given=_Given(args))
        else:
            shipment = _Shipment(self._packer, self._threshold, fn, args, kwargs, arrays)
            future = submit(executor_worker.work, shipment, given=shipment)
        return cast("Future[T]", future)

    def _spawn_process(self) -> None:
        # They end with whoever starts them: a pool that was made before a fork may be used after it.
        self._initargs = (who_we_are(), *self._initargs[1:])
        cast(Any, super())._spawn_process()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As `Executor.shutdown`."""
        if cancel_futures:
            # Not by the standard library's pool, which hides its tasks from its own feeder thread then: when one of them cannot be pickled
            # it waits for it for ever. And it keeps the tasks, with their results, as long as the pool.
            with self._shutdown_lock:  # no task comes meanwhile
                submitted = [item.future for item in list(self._pending_work_items.values())]
            for future in submitted:
                future.cancel()
        super().shutdown(wait)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("an executor cannot be pickled: make another one in the other process")


class _Given:
    """What a task is given, kept until it is done."""

    def __init__(self, what: tuple[Any, ...]) -> None:
        self._what: tuple[Any, ...] | None = what

    def end(self) -> None:
        """The task is done."""
        self._what = None


class _Shipment(_Given):
    """... and packed when it is pickled: keeps what its parcel refers to as well."""

    def __init__(
        self,
        packer: Sharing,
        threshold: int,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        arrays: list[int] | None,
    ) -> None:
        """`arrays`: the indices of those among `args`, where all else is plainly small."""
        super().__init__((fn, args, kwargs))
        self._packer = packer
        self._arrays = arrays
        self._large: Sequence[Any] = (
            large_in([args, kwargs], threshold) if arrays is None else [args[at] for at in arrays]
        )
        self._expected: Sequence[Place | Copy] = packer.expect(self._large)
        self._kept: list[object] = []
        self._done = False

    def __reduce__(self) -> tuple[Any, ...]:
        packed = self._call() or self._parcel()
        if self._done:  # meanwhile, since the pool is broken
            self._kept.clear()
        return packed.__reduce__()

    def _call(self) -> Call | None:
        what, expected = self._what, self._expected
        if what is None or self._arrays is None or len(expected) < len(self._arrays):  # done; or a small array
            return None
        fn, args, _ = what
        return self._packer.call(fn, args, self._arrays, expected)

    def _parcel(self) -> Parcel:
        parcel, kept = self._packer.pack(self._what, self._large)
        self._kept += kept
        return parcel

    def end(self) -> None:
        super().end()
        self._done = True
        self._large = self._expected = ()
        self._kept.clear()


class _Pending(dict[int, Any]):
    """The pool's tasks that are not done. The pool enters each here before any other of its threads knows of it: no result can be under way."""

    def __setitem__(self, number: int, item: Any) -> None:
        item.future.__class__ = _Failing
        if item.kwargs:  # ours to this, and not the task's
            item.future.__class__ = _Opening
            item.future.given = item.kwargs.pop("given")
        dict.__setitem__(self, number, item)


class _Failing(Future[Any]):
    """A future that a pool which breaks can fail although its task was cancelled.

    The pool makes its futures itself, so theirs becomes this class (`_Pending`): it adds no state, and overrides what executors call.
    """

    def set_exception(self, exception: BaseException | None) -> None:
        try:
            super().set_exception(exception)
        except InvalidStateError:
            # A pool that breaks fails the tasks that were cancelled, too; up to Python 3.12 its thread died of that, and the tasks
            # behind them were never done.
            if not self.cancelled():
                raise
            # Nor does its thread tell those who `wait` for them, as it does when it comes to a cancelled task in an ordinary course; a pool
            # whose workers are ended (Python 3.14) cancels and breaks at once. Only that thread tells them, and each once: what it
            # has told is among the pool's tasks no longer.
            self.set_running_or_notify_cancel()


class _Opening(_Failing):
    """A future that ends what its task was given before anybody can see its result.

    A task has ended before its future is done: who waits for that may change what the task was given.
    """

    given: _Given

    def set_result(self, result: Any) -> None:
        self.given.end()
        super().set_result(result)

    def set_exception(self, exception: BaseException | None) -> None:
        self.given.end()
        super().set_exception(exception)

    def cancel(self) -> bool:
        cancelled = super().cancel()
        if cancelled:
            self.given.end()
        return cancelled
