"""What CMA does, for `alloc.py` and `lent.py`: memory that was lent holds dirty pages, which must be written out before the range is handed over.

A stand-in, and wherever there was a choice the one that favours CMA:
- only the writing counts. Isolating and migrating the other pages, locks and retries cost nothing here;
- dirty pages go to consecutive places of a file, as swap clusters give them, in runs of `run` pages (256, a swap cluster, by default), however they lie
  in memory; the file is laid out before;
- what to write is known before the time starts, and C writes it. O_DIRECT has DEPTH runs in flight at once (Linux AIO, as the kernel queues its own
  writes); a buffered write is done when the page cache has the bytes, on no disk yet;
- the range is then handed over by the same request as ours, in an area that nobody uses, by a client whose page table is filled.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from _common import address_of, compile_c
from alloc_job import Job, Sample
from alloc_ours import IDLE_AREA, PAGE, Stage, touch

DEPTH = 64  # runs in flight
RUN_MAX = 1024  # IOV_MAX: a run is one call at the most
RUN = 256  # SWAPFILE_CLUSTER of Linux
CHUNK = 1 << 20

_C_SOURCE = """
#define _GNU_SOURCE
#include <errno.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* Run i: pieces[first[i]] up to pieces[first[i + 1]], to consecutive bytes of the file from offset[i]; bytes[i] in all. Return 0 or an errno. */

int write_buffered(int fd, const struct iovec *pieces, const int64_t *first, const int64_t *offset, const int64_t *bytes, int64_t runs, int depth)
{
    (void)depth;
    for (int64_t i = 0; i < runs; i++) {
        ssize_t wrote = pwritev(fd, pieces + first[i], (int)(first[i + 1] - first[i]), offset[i]);
        if (wrote != bytes[i])
            return wrote < 0 ? errno : EIO;
    }
    return 0;
}

static aio_context_t queue;

int open_queue(int depth)
{
    return syscall(SYS_io_setup, depth, &queue) < 0 ? errno : 0;
}

void close_queue(void)
{
    syscall(SYS_io_destroy, queue);
    queue = 0;
}

int write_direct(int fd, const struct iovec *pieces, const int64_t *first, const int64_t *offset, const int64_t *bytes, int64_t runs, int depth)
{
    struct iocb control[128];
    struct io_event done[128];
    int free_controls[128], frees = 0, error = 0;
    int64_t next = 0, flying = 0;

    for (int i = 0; i < depth; i++)
        free_controls[frees++] = i;
    while (flying || (next < runs && !error)) {
        while (frees && next < runs && !error) {
            int at = free_controls[frees - 1];
            struct iocb *one = &control[at];
            *one = (struct iocb){
                .aio_data = ((uint64_t)next << 8) | (uint64_t)at,
                .aio_lio_opcode = IOCB_CMD_PWRITEV,
                .aio_fildes = (uint32_t)fd,
                .aio_buf = (uint64_t)(uintptr_t)(pieces + first[next]),
                .aio_nbytes = (uint64_t)(first[next + 1] - first[next]),
                .aio_offset = offset[next],
            };
            if (syscall(SYS_io_submit, queue, 1, &one) != 1) {
                if (errno == EAGAIN && flying)
                    break;
                error = errno;
                break;
            }
            frees--, next++, flying++;
        }
        if (!flying)
            break;
        long got = syscall(SYS_io_getevents, queue, 1, 128, done, 0);
        if (got < 0 && errno != EINTR)
            return errno;
        for (long i = 0; i < got; i++) {
            free_controls[frees++] = (int)(done[i].data & 0xff);
            flying--;
            if (done[i].res != bytes[done[i].data >> 8])
                error = done[i].res < 0 ? (int)-done[i].res : EIO;
        }
    }
    return error;
}
"""


@dataclass(frozen=True)
class Writes:
    """What `_C_SOURCE` takes."""

    pieces: npt.NDArray[np.uint64]  # (address, bytes)
    first: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]


def plan(dirty: npt.NDArray[np.int64], memory_at: int, file_page: int, run: int) -> Writes:
    """Writes of these pages, in order of memory, to consecutive pages of the file from `file_page`; neighbours in memory are one piece."""
    index = np.arange(dirty.size)
    run_starts = index[::run]
    begins = np.ones(dirty.size, bool)
    begins[1:] = np.diff(dirty) != 1
    begins[run_starts] = True
    piece_starts = np.flatnonzero(begins)
    lengths = np.diff(np.append(piece_starts, dirty.size))
    pieces = np.stack([memory_at + dirty[piece_starts] * PAGE, lengths * PAGE], axis=1).astype(np.uint64)
    first = np.append(np.searchsorted(piece_starts, run_starts), piece_starts.size)
    sizes = np.diff(np.append(run_starts, dirty.size)) * PAGE
    return Writes(np.ascontiguousarray(pieces), first, (file_page + run_starts) * PAGE, sizes)


class WriteOut:
    """Writes what is dirty in a range of memory of its own to a file, as CMA must before it hands the range over."""

    def __init__(
        self, nbytes_max: int, directory: Path, stack: ExitStack, dirty: float, direct: bool, run: int, seed: int
    ) -> None:
        self._dirty = dirty
        self._run = run
        self._rng = np.random.default_rng(seed)
        self._bytes = nbytes_max
        self._memory = _memory(self._bytes)
        stack.callback(self._memory.close)
        path = directory / f"cma-{'direct' if direct else 'buffered'}-{dirty:g}"
        self._fd = _laid_out(path, self._memory, self._bytes, direct)
        stack.callback(os.close, self._fd)
        self._next_page = 0
        library = ctypes.CDLL(str(compile_c(directory, path.name, _C_SOURCE)))
        self._write = library.write_direct if direct else library.write_buffered
        pointer = ctypes.c_void_p
        self._write.argtypes = [ctypes.c_int, pointer, pointer, pointer, pointer, ctypes.c_int64, ctypes.c_int]
        if direct:
            if error := library.open_queue(DEPTH):
                raise OSError(error, os.strerror(error), "io_setup")
            stack.callback(library.close_queue)

    def ready(self, nbytes: int) -> Callable[[], int]:
        """For the next range: what writes it, and returns 0 or an errno. Which of its pages are dirty is drawn anew each time."""
        pages = -(-nbytes // PAGE)
        dirty = np.flatnonzero(self._rng.random(pages) < self._dirty)
        if (self._next_page + pages) * PAGE > self._bytes:
            self._next_page = 0
        memory_at = address_of(self._memory) + self._next_page * PAGE
        writes = plan(dirty, memory_at, self._next_page, self._run)
        self._next_page += pages
        places = [array.ctypes.data for array in (writes.pieces, writes.first, writes.offsets, writes.sizes)]
        count = writes.sizes.size

        def write(_alive: Writes = writes) -> int:
            return int(self._write(self._fd, *places, count, DEPTH))

        return write


class Cma(Job):
    """A range whose dirty pages are written to a file, then handed over."""

    def __init__(
        self, at: Stage, directory: Path, stack: ExitStack, dirty: float, direct: bool, run: int, seed: int
    ) -> None:
        self.name = f"CMA {dirty:.0%} dirty, {'O_DIRECT' if direct else 'buffered'}"
        self._stage = at
        self._write_out = WriteOut(at.sizes[IDLE_AREA], directory, stack, dirty, direct, run, seed)

    @contextmanager
    def ready(self, nbytes: int) -> Iterator[Callable[[], Sample]]:
        """One range."""
        write = self._write_out.ready(nbytes)
        self._stage.client.areas()  # a message before the pause, as with the other jobs

        def act() -> Sample:
            start = time.perf_counter_ns()
            error = write()
            buffer = self._stage.client.alloc_contig(nbytes, area=IDLE_AREA)
            handed_over = time.perf_counter_ns()
            used = touch(buffer, self._stage.floor)
            buffer.free()
            if error:
                raise OSError(error, os.strerror(error), self.name)
            return Sample(handed_over - start, used - start)

        yield act


def _memory(nbytes: int) -> mmap.mmap:
    """Shared memory, all of it there, that does not compress."""
    memory = mmap.mmap(-1, nbytes)
    noise = os.urandom(CHUNK)
    for at in range(0, nbytes, CHUNK):
        memory[at : at + CHUNK] = noise[: min(CHUNK, nbytes - at)]
    return memory


def _laid_out(path: Path, memory: mmap.mmap, nbytes: int, direct: bool) -> int:
    """A file of that size, written once, so that no write in the time has to find room for it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0), 0o600)
    with memoryview(memory) as view:
        for at in range(0, nbytes, CHUNK):
            os.pwrite(fd, view[at : at + CHUNK], at)
    os.fsync(fd)
    return fd
