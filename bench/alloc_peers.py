"""What Python offers today for `alloc.py`: a new shared-memory object a buffer, by multiprocessing or by posix-ipc and mmap."""

from __future__ import annotations

import mmap
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.shared_memory import SharedMemory

import posix_ipc
from _common import Floor, address_of
from alloc_job import Job, Sample


class Shm(Job):
    """`SharedMemory(create=True)`. Its hand-over is an address without memory behind: that comes with the touch."""

    def __init__(self, floor: Floor) -> None:
        self.name = "SharedMemory"
        self._floor = floor

    @contextmanager
    def ready(self, nbytes: int) -> Iterator[Callable[[], Sample]]:
        """One object."""
        yield lambda: self._sample(nbytes)

    def _sample(self, nbytes: int) -> Sample:
        clock = time.perf_counter_ns
        start = clock()
        shared = SharedMemory(create=True, size=nbytes)
        created = clock()
        try:
            self._floor.touch(address_of(shared.buf), nbytes)
            return Sample(created - start, clock() - start)
        finally:
            shared.close()
            shared.unlink()


class PosixIpc(Job):
    """`posix_ipc.SharedMemory` and `mmap`: the same without multiprocessing's resource tracker."""

    def __init__(self, floor: Floor) -> None:
        self.name = "posix-ipc"
        self._floor = floor

    @contextmanager
    def ready(self, nbytes: int) -> Iterator[Callable[[], Sample]]:
        """One object."""
        yield lambda: self._sample(nbytes)

    def _sample(self, nbytes: int) -> Sample:
        name, clock = f"/gcma-bench-{os.getpid()}-{secrets.token_hex(4)}", time.perf_counter_ns
        start = clock()
        shared = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=nbytes)
        try:
            memory = mmap.mmap(shared.fd, nbytes)
            created = clock()
            self._floor.touch(address_of(memory), nbytes)
            used = clock()
            memory.close()
            return Sample(created - start, used - start)
        finally:
            shared.close_fd()
            shared.unlink()
