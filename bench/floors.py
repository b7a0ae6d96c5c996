"""What C needs for the same job: the floors that ours is held against, compiled where a script runs."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The floors. Each does a whole batch in one call, so that ctypes' own cost vanishes.
_C_SOURCE = """
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

extern void *PyBytes_FromStringAndSize(const char *, ssize_t);
extern char *PyBytes_AsString(void *);
extern void Py_DecRef(void *);

static inline void apart(void)
{
#if defined(__x86_64__)
    __asm__ __volatile__("mfence; lfence" ::: "memory");
#elif defined(__aarch64__)
    __asm__ __volatile__("dsb sy; isb" ::: "memory");
#endif
}

void copy_out(char *to, const char *pages, const int64_t *which, size_t n, size_t size)
{
    for (size_t i = 0; i < n; i++)
        memcpy(to, pages + which[i] * size, size);
}

/* The same with no overlap from page to page, as between calls: a copy begins when the one before has ended. */
void copy_out_apart(char *to, const char *pages, const int64_t *which, size_t n, size_t size)
{
    for (size_t i = 0; i < n; i++) {
        memcpy(to, pages + which[i] * size, size);
        apart();
    }
}

void copy_in(char *pages, const char *from, const int64_t *which, size_t n, size_t size)
{
    for (size_t i = 0; i < n; i++)
        memcpy(pages + which[i] * size, from, size);
}

void copy_new(const char *pages, const int64_t *which, size_t n, size_t size)
{
    for (size_t i = 0; i < n; i++) {
        void *bytes = PyBytes_FromStringAndSize(0, size);
        memcpy(PyBytes_AsString(bytes), pages + which[i] * size, size);
        Py_DecRef(bytes);
    }
}

int write_at(int fd, const char *from, const int64_t *which, size_t n, size_t size)
{
    for (size_t i = 0; i < n; i++)
        if (pwrite(fd, from, size, which[i] * size) != (ssize_t)size)
            return -1;
    return 0;
}

void touch(volatile char *memory, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 4096)
        memory[i] = 1;
}

void sweep(uint64_t *life, size_t n)
{
    for (size_t i = 0; i < n; i++)
        life[i] = (3ull << 62) | ((life[i] + 1) & ((1ull << 46) - 1));
}
"""


def compile_floor(directory: Path) -> Path:
    """Compiles the C floor there; returns the library's path, for `Floor` in any process."""
    return compile_c(directory, "floor", _C_SOURCE)


class Floor:
    """The C floor, loaded. Addresses come from `address_of`."""

    def __init__(self, library: Path) -> None:
        free = ctypes.CDLL(str(library))
        held = ctypes.PyDLL(str(library))  # with the GIL, for what makes Python objects
        p, n = ctypes.c_void_p, ctypes.c_size_t
        self.copy_out = self._function(free.copy_out, [p, p, p, n, n])
        self.copy_out_apart = self._function(free.copy_out_apart, [p, p, p, n, n])
        self.copy_in = self._function(free.copy_in, [p, p, p, n, n])
        self.copy_new = self._function(held.copy_new, [p, p, n, n])
        self.write_at = self._function(free.write_at, [ctypes.c_int, p, p, n, n], ctypes.c_int)
        self.touch = self._function(free.touch, [p, n])
        self.sweep = self._function(free.sweep, [p, n])

    @staticmethod
    def _function(function: Any, arguments: list[Any], result: Any = None) -> Callable[..., Any]:
        function.argtypes, function.restype = arguments, result
        call: Callable[..., Any] = function
        return call


def address_of(memory: Any) -> int:
    """Where a writable buffer begins. The caller keeps it alive; nothing stays exported."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def compile_c(directory: Path, name: str, source: str) -> Path:
    """Compiles a script's own C there; returns the library's path."""
    file, library = directory / f"{name}.c", directory / f"{name}.so"
    file.write_text(source)
    subprocess.run(
        [*os.environ.get("CC", "cc").split(), "-O2", "-shared", "-fPIC", "-o", str(library), str(file)], check=True
    )
    return library
