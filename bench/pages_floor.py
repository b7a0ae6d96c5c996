"""The floors of `pages.py`: the copies themselves, in C and in Python, and the file with nothing around it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from _common import Floor, address_of, compile_c
from pages_job import Contender, Fresh, Plain, Setup, Which

# Beside those of _common.py: what a store that is written through cannot do without.
_C_SOURCE = """
#include <stdint.h>
#include <string.h>
#include <unistd.h>

int copy_and_write(char *pages, int fd, const char *from, const int64_t *which, size_t n, size_t size)
{
    for (size_t i = 0; i < n; i++) {
        memcpy(pages + which[i] * size, from, size);
        if (pwrite(fd, from, size, which[i] * size) != (ssize_t)size)
            return -1;
    }
    return 0;
}
"""


def compile_own(directory: Path) -> Path:
    """Compiles it there."""
    return compile_c(directory, "pages_floor", _C_SOURCE)


def open_file(stack: ExitStack, setup: Setup, name: str) -> int:
    """A descriptor for as long as `stack` lives."""
    fd = os.open(setup.directory / name, os.O_RDWR | os.O_CREAT, 0o600)
    stack.callback(os.close, fd)
    return fd


def map_memory(setup: Setup) -> mmap.mmap:
    """The working set of those who copy, in the page table of this process."""
    fd = os.open(setup.memory, os.O_RDWR)
    memory = mmap.mmap(fd, setup.pages * setup.page_size)
    os.close(fd)
    for at in range(0, len(memory), mmap.PAGESIZE):
        memory[at] = 1
    return memory


def copies(setup: Setup, page: bytes, memory: mmap.mmap, source: bytearray, out: bytearray) -> dict[str, Contender]:
    """In C, 64 a call; and what plain Python makes of it."""
    floor, size, batch = Floor(setup.library), setup.page_size, setup.batch
    view, target = memoryview(memory), out

    def starts(which: Which) -> Any:
        return (which * size).tolist()

    def python_new(positions: list[int]) -> None:
        for at in positions:
            bytes(view[at : at + size])

    def python_into(positions: list[int]) -> None:
        for at in positions:
            target[:] = view[at : at + size]

    def python_in(positions: list[int], page: bytes = page) -> None:
        for at in positions:
            view[at : at + size] = page

    def c(function: Callable[..., Any], *arguments: int) -> Plain:
        def run(which: Which) -> None:
            function(*arguments, which.ctypes.data, batch, size)

        return Plain(lambda which: which.copy(), run, single=False)

    return {
        "C memcpy into a buffer": c(floor.copy_out, address_of(out), address_of(memory)),
        "C memcpy, one at a time": c(floor.copy_out_apart, address_of(out), address_of(memory)),
        "C memcpy into new bytes": c(floor.copy_new, address_of(memory)),
        "C memcpy to a random page": c(floor.copy_in, address_of(memory), address_of(source)),
        "bytes(memoryview[...])": Plain(starts, python_new),
        "buffer[:] = memoryview[...]": Plain(starts, python_into),
        "memoryview[...] = page": Plain(starts, python_in),
    }


def files(
    setup: Setup, page: bytes, memory: mmap.mmap, source: bytearray, out: bytearray, stack: ExitStack, index: int
) -> dict[str, Contender]:
    """A file of the working set's size, laid in page-sized writes."""
    size, batch = setup.page_size, setup.batch
    fd, first = open_file(stack, setup, "overwritten"), open_file(stack, setup, f"first-{index}")
    floor, into = Floor(setup.library), [out]
    own = ctypes.CDLL(str(setup.own_library)).copy_and_write
    p, n = ctypes.c_void_p, ctypes.c_size_t
    own.argtypes = [p, ctypes.c_int, p, p, n, n]
    fresh = Fresh(setup.pages, lambda: os.ftruncate(first, 0))
    from_, pages = address_of(source), address_of(memory)

    def starts(which: Which) -> Any:
        return (which * size).tolist()

    def pread(positions: list[int]) -> None:
        for at in positions:
            os.pread(fd, size, at)

    def preadv(positions: list[int]) -> None:
        for at in positions:
            os.preadv(fd, into, at)

    def pwrite(positions: list[int]) -> None:
        for at in positions:
            os.pwrite(fd, page, at)

    def pwrite_first(positions: list[int]) -> None:
        for at in positions:
            os.pwrite(first, page, at)

    def c_pwrite(which: Which) -> None:
        floor.write_at(fd, from_, which.ctypes.data, batch, size)

    def c_copy_and_pwrite(which: Which) -> None:
        own(pages, fd, from_, which.ctypes.data, batch, size)

    return {
        "os.pread": Plain(starts, pread),
        "os.preadv": Plain(starts, preadv),
        "os.pwrite": Plain(starts, pwrite),
        "os.pwrite, first": Plain(lambda which: starts(fresh.next(which.size)), pwrite_first, renew=fresh.renew),
        "C pwrite": Plain(lambda which: which.copy(), c_pwrite, single=False),
        "C memcpy and pwrite": Plain(lambda which: which.copy(), c_copy_and_pwrite, single=False),
    }
