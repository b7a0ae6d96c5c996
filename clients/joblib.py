"""joblib's backend "gcma": joblib's own process backend, loky, whose large arrays travel through the arena in place of files.

loky starts the workers, restarts, resizes and ends them, and pickles; this module has a pool of its own of them, packs each batch of tasks
where loky pickles it (in its feeder thread), and unpacks it inside the task, so that what fails there is the task's exception. It never
makes a file, nor a temporary folder.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

try:
    from joblib import register_parallel_backend
except ImportError:
    raise ImportError("gcma_shm.clients.joblib needs joblib: pip install 'gcma-shm[joblib]'") from None
from joblib._parallel_backends import FallbackToBackend, LokyBackend, SequentialBackend
from joblib.externals.loky.backend.queues import SimpleQueue
from joblib.externals.loky.backend.reduction import loads
from joblib.externals.loky.process_executor import ProcessPoolExecutor
from joblib.externals.loky.reusable_executor import _ReusablePoolExecutor

from gcma_shm.clients import handles
from gcma_shm.clients.client import Client
from gcma_shm.clients.correspondence import Patience
from gcma_shm.clients.default import ENDPOINT, default_client
from gcma_shm.clients.frames import forget_frames
from gcma_shm.clients.handles import Reference, client_of
from gcma_shm.clients.joblib_arrays import Given, Returned, Room
from gcma_shm.clients.parents import Who, end_with, who_we_are
from gcma_shm.clients.places import give_up

log = logging.getLogger(__name__)

NAME = "gcma"
IDLE_S = 300  # an idle worker ends after that, as loky's do under joblib
MAX_NBYTES = 1 << 20  # joblib's default, where it does not say


def register() -> None:
    """Makes the backend known to joblib: `with joblib.parallel_config(backend="gcma"):`. A second time has no effect."""
    register_parallel_backend(NAME, ArenaBackend)


def end_workers() -> None:
    """Ends this process's workers, when what they are at is done. Without it they end with the process, or a while after their last task
    (`idle_worker_timeout`, 300 s).
    """
    global _workers
    with _lock:
        workers, _workers = _workers, None
    if workers is not None:
        workers.shutdown(wait=True)


class _NoFolders:
    """For Parallel, which names the folder of its call to the workers of any kind of LokyBackend before it pickles a batch."""

    @property
    def _temp_folder_manager(self) -> _NoFolders:
        return self

    def set_current_context(self, context_id: str) -> None:
        """There are no folders."""


class ArenaBackend(LokyBackend):  # type: ignore[misc] # joblib is not typed
    """What `parallel_config(backend="gcma")` makes. It takes what joblib's "loky" takes, and `client`: of the arena, mapped; by
    default this process's, see `default_client`.

    Of Parallel's arguments, `max_nbytes` says beyond how many bytes an array of a task or of its result travels through the arena; None:
    none does. `mmap_mode` is of the tasks' arrays: "r" (the default): read-only, and many tasks have the same; "r+", "w+": the same,
    writable, a copy of the caller's; "c", None: each batch of tasks has its own. `temp_folder` has no meaning. Writable arrays on a Buffer
    (`buf.numpy(...)`) are passed as they are, whatever these say. Results are the caller's own, and writable.
    """

    _workers = _NoFolders()

    def __init__(self, *, client: Client | None = None, **parameters: Any) -> None:
        super().__init__(**parameters)
        #: How many large arrays, of tasks and of results, went through the pipe, for want of room in the arena.
        self.fallbacks = 0
        #: How many bytes of tasks' arrays were copied into the arena.
        self.copied = 0
        self._client_given = client
        self._made: tuple[int, dict[str, Any]]  # how many workers, and how they are made
        # While a call is on: a pool that others have replaced is to end with its last task.
        self._pool: _Workers | None = None
        self._asked: dict[str, Any] = {}  # what `configure` was called with
        self._given: Given | None = None
        self._given_as: tuple[Room, int | None, str | None]

    def configure(
        self,
        n_jobs: int = 1,
        parallel: Any = None,
        idle_worker_timeout: float | None = None,
        **parameters: Any,
    ) -> int:
        """Called by Parallel. Raises what `default_client` raises, and ValueError for a client that does not map the arena."""
        asked = {"n_jobs": n_jobs, "idle_worker_timeout": idle_worker_timeout, **parameters}
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        parameters = {**getattr(self, "backend_kwargs", {}), **parameters}  # joblib 1.4 has none
        if "timeout" in parameters:
            raise ValueError("timeout: use `idle_worker_timeout`, as with joblib's loky")
        client = parameters.get("client") or self._client_given or (default_client() if _room is None else _room.client)
        if not client.mapped:
            raise ValueError("the backend needs a client that maps the arena; connect with mapped=True")
        self._given_as = (
            Room(lambda: client),
            parameters.get("max_nbytes", MAX_NBYTES),
            parameters.get("mmap_mode", "r"),
        )
        if idle_worker_timeout is None:
            idle_worker_timeout = parameters.get("idle_worker_timeout", IDLE_S)
        how = {
            "timeout": idle_worker_timeout,
            "env": self._prepare_worker_env(n_jobs=n_jobs) | {ENDPOINT: os.environ.get(ENDPOINT, client.endpoint)},
            "initializer": parameters.get("initializer"),
            "initargs": parameters.get("initargs", ()),
        }
        self._made = n_jobs, how | {"arena_id": client.arena_id, "patience": client._channel.patience}
        self._pool = _pool(self._made[0], **self._made[1])
        self.parallel, self._asked = parallel, asked
        return n_jobs

    def start_call(self) -> None:
        """Called by Parallel."""
        self._given = Given(*self._given_as, self._note)

    def stop_call(self) -> None:
        """Called by Parallel, however its call ended. Calls that overlap under one `parallel_config` share a backend: what the one that is
        over ends here, and with `terminate`, may be the other's, which then copies anew, and fetches the workers anew.
        """
        if self._given is not None:
            self.copied += self._given.end()

    def submit(self, func: Any, callback: Callable[[Future[Any]], None] | None = None) -> Future[Any]:
        """Called by Parallel, with a batch of tasks."""
        room, max_nbytes, _ = self._given_as
        pool = self._pool = self._pool or _pool(self._made[0], **self._made[1])
        task = _Task(pool, cast(Given, self._given), func, callback, self._note)
        desk = _Desk(room.client.endpoint, room.client.arena_id, max_nbytes)
        future: Future[Any] = pool.submit(_work, task, desk)
        future.add_done_callback(task.end)
        return future

    apply_async = submit  # its name in joblib 1.4

    def terminate(self) -> None:
        """Called by Parallel, which is done with the workers; they stay for the next call."""
        self._pool = None
        # What a failed call leaves in its Parallel may be results, in the arena: neither we nor itself must keep it. The stand-in is for calls
        # that overlap, as above.
        self.parallel._reducer_callback = None  # it refers to its Parallel
        self.parallel = SimpleNamespace(verbose=0)
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Called by Parallel when a task has failed: ends the workers at once."""
        pool, self._pool = self._pool, None
        if pool is not None:
            _forget(pool)
            pool.shutdown(kill_workers=True)
        if ensure_ready:
            self.configure(parallel=self.parallel, **self._asked)

    def _note(self, refusal: str) -> None:
        if not self.fallbacks:
            log.warning("an array goes through the pipe, as others may, of %s", refusal)
        self.fallbacks += 1


class _Results(SimpleQueue):  # type: ignore[misc]
    """What workers send."""

    def close(self) -> None:
        """Takes what was sent by workers that were killed since, and nobody waits for, or the arena would keep it for a minute."""
        os.set_blocking(self._reader.fileno(), False)  # the last of it may have been cut off
        with contextlib.suppress(Exception):
            while True:
                result = getattr(self._reader.recv(), "result", None)
                if isinstance(result, _Result):
                    give_up(result.handles)
        super().close()


class _Workers(_ReusablePoolExecutor):  # type: ignore[misc]
    """loky's pool of workers that can be resized. Not the one of joblib's own backend, whose reducers write files."""

    def __init__(self, n_jobs: int, **how: Any) -> None:
        self.made = how
        begin = (who_we_are(), how["patience"], how["initializer"], how["initargs"])
        loky = {"timeout": how["timeout"], "env": how["env"], "initializer": _begin, "initargs": begin}
        super().__init__(threading.RLock(), max_workers=n_jobs, **loky)

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As loky's, but that pool of joblib's backend is not asked when this one has been shut down."""
        with self._submit_resize_lock:
            future: Future[Any] = ProcessPoolExecutor.submit(self, fn, *args, **kwargs)
            return future

    def _setup_queues(self, job_reducers: Any, result_reducers: Any) -> None:
        super()._setup_queues(job_reducers, result_reducers)
        self._result_queue = _Results(reducers=result_reducers, ctx=self._context)

    def fits(self, n_jobs: int, how: dict[str, Any]) -> bool:
        """Makes it so many workers, unless they are to be others, or it is broken, too small, or at work."""
        with self._submit_resize_lock:  # nothing is submitted meanwhile
            if self._flags.broken or self._flags.shutdown or self._call_queue._maxsize < n_jobs or self.made != how:
                return False
            if self._max_workers != n_jobs and self._pending_work_items:
                return False
            self._resize(n_jobs)
            return True


_lock = threading.Lock()
_workers: _Workers | None = None


def _pool(n_jobs: int, **how: Any) -> _Workers:
    """This process's workers: those of the call before, if they fit. Else that pool is forgotten, and ends with its last task."""
    global _workers  # noqa: PLW0603 - one a process
    with _lock:
        if _workers is None or not _workers.fits(n_jobs, how):
            _workers = _Workers(n_jobs, **how)
        return _workers


def _forget(pool: _Workers) -> None:
    """It is to end. One that is broken has the exception that its callers got, and with its frames the results of their calls."""
    global _workers  # noqa: PLW0603
    with _lock:
        if _workers is pool:
            _workers = None


_of_parent: _Workers | None = None


def _after_fork_in_child() -> None:
    global _lock, _workers, _of_parent  # noqa: PLW0603
    _lock = threading.Lock()  # another thread of the parent may have held it
    _of_parent, _workers = _workers, None  # kept: what its end would do is the parent's to do


os.register_at_fork(after_in_child=_after_fork_in_child)


class _Task:
    """A batch on its way, packed when it is pickled; keeps what it was packed with until its future is done."""

    def __init__(self, pool: _Workers, given: Given, batch: Any, callback: Any, note: Callable[[str], None]) -> None:
        self._pool: _Workers | None = pool
        self._what: tuple[Given, Any] | None = given, batch
        self._kept: list[object] = []
        self._callback = callback
        self._note = note

    def __reduce__(self) -> tuple[Any, ...]:
        what = self._what
        if what is None:  # the pool was ended before its feeder came to this
            return bytes, ()
        given, batch = what
        data, self._kept = given.dumps(batch)
        if self._is_over():  # since: `end` may have cleared what was kept before
            self._kept = []
        return bytes, (data,)

    def _is_over(self) -> bool:
        return self._what is None

    def end(self, future: Future[Any]) -> None:
        """The future is done. Its result is unpacked now, also if nobody asks for it, or the arena would keep it."""
        self._what, self._kept = None, []
        opened: Future[Any] = Future()
        try:
            result = future.result()
            for refusal in result.refusals:
                self._note(refusal)
            opened.set_result(result.open())
        except BaseException as error:
            forget_frames(error)
            opened.set_exception(error)
        callback, self._callback = self._callback, None  # it refers to the future, which refers to us
        if callback is not None:
            callback(opened)  # submits the next batch
        self._pool = None


@dataclass(frozen=True)
class _Desk:
    """Where a worker packs its results."""

    endpoint: str
    arena_id: bytes
    max_nbytes: int | None


@dataclass(frozen=True)
class _Result:
    """What a batch returned, packed, and why which arrays found no room."""

    data: bytes
    handles: list[Reference]
    refusals: list[str]

    def open(self) -> Any:
        """Raises what unpickling it raises; nothing of it is held then."""
        try:
            return loads(self.data)
        except BaseException:
            give_up(self.handles)
            raise


_room: Room | None = None  # in a worker


def _begin(
    parent: Who,
    patience: Patience,
    initializer: Callable[..., object] | None,
    initargs: tuple[Any, ...],
) -> None:
    """In a worker, before its first task, should it ever get one."""
    handles.patience = patience
    end_with(parent)
    if initializer is not None:
        initializer(*initargs)


def _work(batch: bytes, desk: _Desk) -> _Result:
    """In a worker."""
    global _room  # noqa: PLW0603 - kept, so that the worker connects once
    register()  # for tasks that use the backend by its name
    if _room is None:
        _room = Room(functools.partial(client_of, desk.endpoint, desk.arena_id))
    refusals: list[str] = []
    packer = Returned(_room, desk.max_nbytes, refusals.append)
    # In no variable of ours: a result that is an exception refers to this frame, and would be collected late, with its task's arrays.
    return _Result(packer.dumps(loads(batch)())[0], packer.handles, refusals)
