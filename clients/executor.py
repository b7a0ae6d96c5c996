"""`ArenaExecutor`: a process pool whose large arguments and results travel through the arena.

It is the standard library's ProcessPoolExecutor in all but this: what a task is given is packed where the pool pickles it (in its feeder
thread, a few tasks ahead), and unpacked inside the task; what it returns is packed there, and unpacked when the future has it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.context import BaseContext
from typing import Any, ParamSpec, TypeVar, cast

from gcma_shm.clients.client import Client
from gcma_shm.clients.default import default_client
from gcma_shm.clients.handles import client_of
from gcma_shm.clients.parcels import Packer, Parcel, wrap

THRESHOLD = 256 << 10  # bytes: below, a pipe is quicker than the requests for a buffer
_PLAIN = (type(None), bool, int, float, complex, str)

P = ParamSpec("P")
T = TypeVar("T")


class ArenaExecutor(ProcessPoolExecutor):
    """A `concurrent.futures.ProcessPoolExecutor` whose large buffers travel through an arena.

    Arrays of NumPy, Arrow and pandas, PickleBuffer, and arguments and results that are bytes or bytearray: each buffer of `threshold`
    bytes or more is copied once into the arena, and the other side works on that memory.

    A task's arrays are read-only: an array that is given to many tasks, while they are under way, is copied once, and all of them
    see that copy. So it must not be changed until they are done. Arrays on a Buffer (`buf.numpy(...)`) are passed as they are, without a
    copy, writable. Results are the caller's alone, and writable. Memory is free again when the last array on it is gone, on both
    sides, or the process is.

    When the arena has no room, a buffer goes through the pipe; `fallbacks` counts these, of arguments, and a warning is logged once.
    """

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
        """As ProcessPoolExecutor's. `client`: of the arena, mapped; by default this process's, see `default_client`."""
        if threshold < 1:
            raise ValueError(f"threshold {threshold}: expected at least 1 byte")
        self._client = client or default_client()
        if not self._client.mapped:
            raise ValueError("the executor needs a client that maps the arena; connect with mapped=True")
        self._threshold = threshold
        self._packer = Packer(lambda: self._client, threshold, shared=True)
        self._desk = _Desk(self._client.endpoint, self._client.arena_id, threshold)
        super().__init__(max_workers, mp_context, initializer, initargs, max_tasks_per_child=max_tasks_per_child)

    @property
    def fallbacks(self) -> int:
        """How many large buffers of arguments went through the pipe, for want of room in the arena."""
        return self._packer.fallbacks

    @property
    def copied(self) -> int:
        """How many bytes of arguments were copied into the arena."""
        return self._packer.copied

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As `Executor.submit`."""
        given = [wrap(value, self._threshold) for value in args]
        named = {name: wrap(value, self._threshold) for name, value in kwargs.items()}
        shipment = _Shipment(self._packer, (fn, given, named))
        future = super().submit(_work, cast(Parcel, shipment), self._desk)  # a parcel is what the worker gets
        future.__class__ = _Opening
        future.add_done_callback(shipment.end)
        return cast("Future[T]", future)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As `Executor.shutdown`."""
        super().shutdown(wait, cancel_futures=cancel_futures)
        if (
            wait
        ):  # after cancel_futures the standard library's pool would keep the last tasks, and with them their results
            self._pending_work_items: dict[int, Any] = {}


class _Opening(Future[Any]):
    """A future whose result may be a parcel. Opened by its pool's thread, or by whoever is quicker to ask."""

    def result(self, timeout: float | None = None) -> Any:
        super().exception(timeout)  # waits
        self.open()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        super().exception(timeout)
        self.open()
        return super().exception(timeout)

    def open(self) -> None:
        """Puts what the parcel holds in its place; what that raises becomes the future's exception."""
        with self._condition:
            if isinstance(self._result, Parcel):
                parcel, self._result = self._result, None
                try:
                    self._result = parcel.open()
                except BaseException as error:
                    self._exception = error


class _Shipment:
    """What a task is given, packed when it is pickled; keeps what its parcel refers to until the task's future is done."""

    def __init__(self, packer: Packer, what: Any) -> None:
        self._packer = packer
        self._what = what
        self._kept: list[object] = []

    def __reduce__(self) -> tuple[Any, ...]:
        parcel, self._kept = self._packer.pack(self._what)
        return Parcel, (parcel.data, parcel.pieces)

    def end(self, future: Future[Any]) -> None:
        """The future is done. Not left to the pool, which may keep the tasks that it has cancelled."""
        self._what, self._kept = None, []
        cast(_Opening, future).open()


class _Desk:
    """Where a worker packs its results."""

    def __init__(self, endpoint: str, arena_id: bytes, threshold: int) -> None:
        self._where = (endpoint, arena_id, threshold)

    def pack(self, result: Any) -> Any:
        """A parcel, or a result that needs none."""
        if type(result) in _PLAIN:
            return result
        return _packer(*self._where).pack(wrap(result, self._where[2]))[0]


@functools.cache
def _packer(endpoint: str, arena_id: bytes, threshold: int) -> Packer:
    """One a worker process and pool: it connects with its first large result."""
    return Packer(lambda: client_of(endpoint, arena_id), threshold, shared=False)


def _work(parcel: Parcel, desk: _Desk) -> Any:
    """In a worker."""
    fn, args, kwargs = parcel.open()
    result = fn(*args, **kwargs)
    del args, kwargs
    return desk.pack(result)
