"""joblib's backend "gcma": joblib's own process backend, loky, whose large arrays travel through the arena in place of files.

loky starts the workers, restarts, resizes and ends them, and pickles; this module has a pool of its own of them, packs each batch of tasks
where loky pickles it (in its feeder thread), and unpacks it inside the task, so that what fails there is the task's exception. It never
makes a file, nor a temporary folder.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, cast

from joblib import register_parallel_backend
from joblib._parallel_backends import FallbackToBackend, LokyBackend, SequentialBackend
from joblib.externals.loky.backend.reduction import loads
from joblib.externals.loky.process_executor import ProcessPoolExecutor
from joblib.externals.loky.reusable_executor import _ReusablePoolExecutor

from gcma_shm.clients.client import Client
from gcma_shm.clients.default import ENDPOINT, default_client
from gcma_shm.clients.handles import client_of
from gcma_shm.clients.joblib_arrays import Given, Returned

log = logging.getLogger(__name__)

NAME = "gcma"
IDLE_S = 300  # an idle worker ends after that, as loky's do under joblib
MAX_NBYTES = 1 << 20  # joblib's default, where it does not say


def register() -> None:
    """Makes the backend known to joblib: `with joblib.parallel_config(backend="gcma"):`. A second time has no effect."""
    register_parallel_backend(NAME, ArenaBackend)


def end_workers() -> None:
    """Ends this process's workers, when what they are at is done; without it they end with the process, or IDLE_S after their last task."""
    global _workers
    with _lock:
        workers, _workers = _workers, None
    if workers is not None and _made_as[0][0] == os.getpid():
        workers.shutdown(wait=True)


class ArenaBackend(LokyBackend):  # type: ignore[misc] # joblib is not typed
    """What `parallel_config(backend="gcma")` makes. It takes what joblib's "loky" takes, and `client`: of the arena, mapped; by
    default this process's, see `default_client`.

    Of Parallel's arguments `max_nbytes` says from how many bytes on arrays of tasks and of results travel through the arena; None: none.
    Those of tasks: by `mmap_mode` "r" (the default) they are read-only, and many tasks have the same; "r+" and "w+": the same, writable;
    "c" and None: each task's own. `temp_folder` has no meaning. Arrays on a Buffer (`buf.numpy(...)`) are passed as they are,
    whatever these say. Results are the caller's own.
    """

    def __init__(self, *, client: Client | None = None, **parameters: Any) -> None:
        super().__init__(**parameters)
        #: How many large arrays, of tasks and of results, went through the pipe, for want of room in the arena.
        self.fallbacks = 0
        #: How many bytes of tasks' arrays were copied into the arena.
        self.copied = 0
        self._client_given = client
        self._workers: Any = None  # loky's pool, which is not typed
        self._given: Given | None = None
        self._given_as: tuple[Client, int | None, str | None]

    def configure(
        self,
        n_jobs: int = 1,
        parallel: Any = None,
        idle_worker_timeout: float | None = None,
        **parameters: Any,
    ) -> int:
        """Called by Parallel. Raises what `default_client` raises, and ValueError for a client that does not map the arena."""
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        parameters = {**getattr(self, "backend_kwargs", {}), **parameters}  # joblib 1.4 has none
        if "timeout" in parameters:
            raise ValueError("timeout: use `idle_worker_timeout`, as with joblib's loky")
        client = parameters.get("client") or self._client_given or _worker_client or default_client()
        if not client.mapped:
            raise ValueError("the backend needs a client that maps the arena; connect with mapped=True")
        self._given_as = (client, parameters.get("max_nbytes", MAX_NBYTES), parameters.get("mmap_mode", "r"))
        if idle_worker_timeout is None:
            idle_worker_timeout = parameters.get("idle_worker_timeout", IDLE_S)
        self._workers = _pool(
            n_jobs,
            os.getpid(),  # a forked child has no use for its parent's
            client.arena_id,
            timeout=idle_worker_timeout,
            env=self._prepare_worker_env(n_jobs=n_jobs) | {ENDPOINT: os.environ.get(ENDPOINT, client.endpoint)},
            initializer=parameters.get("initializer"),
            initargs=parameters.get("initargs", ()),
        )
        self.parallel = parallel
        return n_jobs

    def start_call(self) -> None:
        """Called by Parallel."""
        self._given = Given(*self._given_as, self._note)

    def stop_call(self) -> None:
        """Called by Parallel, however its call ended. (Calls that overlap share a backend under one `parallel_config`: what the one ends
        is then the other's, which goes on with it, and copies anew.)
        """
        if self._given is not None:
            self.copied += self._given.end()

    def submit(self, func: Any, callback: Callable[[Future[Any]], None] | None = None) -> Future[Any]:
        """Called by Parallel, with a batch of tasks."""
        client, max_nbytes, _ = self._given_as
        task = _Task(cast(Given, self._given), func, callback, self._note)
        desk = _Desk(client.endpoint, client.arena_id, max_nbytes)
        future: Future[Any] = self._workers.submit(_work, task, desk)
        future.add_done_callback(task.end)
        return future

    apply_async = submit  # its name in joblib 1.4

    def terminate(self) -> None:
        """Called by Parallel, which is done with the workers; they stay for the next call."""
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Called by Parallel when a task has failed: ends the workers at once."""
        self._workers.shutdown(kill_workers=True)
        if ensure_ready:
            self.configure(n_jobs=self.parallel.n_jobs, parallel=self.parallel, **self.parallel._backend_kwargs)

    def _note(self, refusal: str) -> None:
        if not self.fallbacks:
            log.warning("an array goes through the pipe, as others may, of %s", refusal)
        self.fallbacks += 1


class _NoFolders:
    """For Parallel, which names the folder of its call to any kind of LokyBackend before it pickles a batch."""

    def set_current_context(self, context_id: str) -> None:
        """There are no folders."""


class _Workers(_ReusablePoolExecutor):  # type: ignore[misc]
    """loky's pool of workers that can be resized. Not the one of joblib's own backend, whose reducers write files."""

    _temp_folder_manager = _NoFolders()

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As loky's, but that pool of joblib's backend is not asked when this one has been shut down."""
        with self._submit_resize_lock:
            future: Future[Any] = ProcessPoolExecutor.submit(self, fn, *args, **kwargs)
            return future


_lock = threading.Lock()
_workers: _Workers | None = None
_made_as: Any = None


def _pool(n_jobs: int, *others: Any, **how: Any) -> _Workers:
    """This process's workers: those of the call before, if they were made alike. Else that pool is forgotten, and ends when no call has
    it any more.
    """
    global _workers, _made_as
    with _lock:
        if _workers is None or _made_as != (others, how) or not _fits(_workers, n_jobs):
            _workers, _made_as = _Workers(threading.RLock(), max_workers=n_jobs, **how), (others, how)
        return _workers


def _fits(pool: _Workers, n_jobs: int) -> bool:
    """Makes it so many workers, unless it is broken, too small, or at work for others."""
    with pool._submit_resize_lock:  # nothing is submitted meanwhile
        if pool._flags.broken or pool._flags.shutdown or pool.queue_size < n_jobs:
            return False
        if pool._max_workers != n_jobs and pool._pending_work_items:
            return False
        pool._resize(n_jobs)
        return True


class _Task:
    """A batch on its way, packed when it is pickled; keeps what it was packed with until its future is done."""

    def __init__(self, given: Given, batch: Any, callback: Any, note: Callable[[str], None]) -> None:
        self._what: tuple[Given, Any] | None = given, batch
        self._kept: list[object] = []
        self._callback = callback
        self._note = note

    def __reduce__(self) -> tuple[Any, ...]:
        if self._what is None:  # the pool was ended before its feeder came to this
            return bytes, ()
        given, batch = self._what
        data, self._kept = given.dumps(batch)
        return bytes, (data,)

    def end(self, future: Future[Any]) -> None:
        """The future is done. Its result is unpacked now, also if nobody asks for it, or the arena would keep it for a minute."""
        self._what, self._kept = None, []
        opened: Future[Any] = Future()
        try:
            result = future.result()
            for refusal in result.refusals:
                self._note(refusal)
            opened.set_result(loads(result.data))
        except BaseException as error:
            opened.set_exception(error.with_traceback(None))
        if self._callback is not None:
            self._callback(opened)


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
    refusals: list[str]


_worker_client: Client | None = None


def _work(batch: bytes, desk: _Desk) -> _Result:
    """In a worker."""
    global _worker_client  # noqa: PLW0603 - kept, so that the worker connects once
    register()  # for tasks that use the backend by its name
    if _worker_client is None:
        _worker_client = client_of(desk.endpoint, desk.arena_id)
    result = loads(batch)()
    refusals: list[str] = []
    return _Result(Returned(_worker_client, desk.max_nbytes, refusals.append).dumps(result)[0], refusals)
