"""What the scripts here share: timing, statistics, tables, the machine's description, JSON, a C floor, worker processes.

A *contender* is one way to do a job. Contenders take turns within rounds, so that the machine's drift hits all alike; a ratio is taken within
each round, and its median and spread over the rounds are told.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

OUT = Path(__file__).parent / "out"
STOP_S = 20.0  # how long a worker process may take to end
REPLY_S = 600.0  # ... or to answer

Samples = npt.NDArray[np.float64]  # nanoseconds an operation


# --- figures


@dataclass
class Summary:
    """Nanoseconds an operation: `median` of batches (the clock's cost vanishes), `p99` and `worst` of single calls."""

    median: float
    p99: float
    worst: float
    samples: int

    @classmethod
    def of(cls, samples: Samples) -> Summary:
        """Of samples that were all taken alike."""
        return cls(float(np.median(samples)), float(np.percentile(samples, 99)), float(samples.max()), samples.size)


@dataclass
class Ratio:
    """One contender's time over another's, in each round: the median, and the middle 80 % of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        """Of the figures of each round, in order."""
        ratios = np.asarray(ours, float) / np.asarray(theirs, float)
        return cls(float(np.median(ratios)), float(np.percentile(ratios, 10)), float(np.percentile(ratios, 90)))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


class Histogram:
    """Times in buckets of 1.1 % width, so that any number of them takes the same memory."""

    PER_OCTAVE = 64
    BUCKETS = 48 * PER_OCTAVE

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(self.BUCKETS, np.int64)
        self.worst = 0.0

    def add(self, times_ns: npt.ArrayLike) -> None:
        """Counts many times at once."""
        times = np.maximum(np.asarray(times_ns, np.float64), 1.0)
        if times.size:
            buckets = np.minimum(np.log2(times) * self.PER_OCTAVE, self.BUCKETS - 1).astype(np.int64)
            self.counts += np.bincount(buckets, minlength=self.BUCKETS)
            self.worst = max(self.worst, float(times.max()))

    def merge(self, other: Histogram) -> None:
        """Adds what another one counted."""
        self.counts += other.counts
        self.worst = max(self.worst, other.worst)

    def percentile(self, percent: float) -> float:
        """Nanoseconds; 0.0 when nothing was counted."""
        total = int(self.counts.sum())
        if not total:
            return 0.0
        bucket = int(np.searchsorted(np.cumsum(self.counts), total * percent / 100))
        return min(float(2 ** ((bucket + 0.5) / self.PER_OCTAVE)), self.worst)

    def describe(self) -> dict[str, float]:
        """Microseconds: median, p99, p99.9, worst."""
        return {
            "count": int(self.counts.sum()),
            "median_us": self.percentile(50) / 1e3,
            "p99_us": self.percentile(99) / 1e3,
            "p99.9_us": self.percentile(99.9) / 1e3,
            "worst_us": self.worst / 1e3,
        }


def clock_cost_ns() -> float:
    """What two readings of the clock cost, to be taken off a single call's time."""
    clock = time.perf_counter_ns
    costs = []
    for _ in range(2001):
        start = clock()
        costs.append(clock() - start)
    return float(np.median(costs))


# --- output


def table(head: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> str:
    """Aligned columns; the first to the left, the others to the right."""
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*([title] if title else []), *(line.rstrip() for line in lines)])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory_kb = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": memory_kb >> 10,
        "kernel": platform.release(),
        "shmem_huge_pages": "".join(_lines("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("gcma-shm", "numpy", "lmdb", "pyzmq", "msgpack")},
        "load_average_before": os.getloadavg(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def describe_machine(found: Mapping[str, Any]) -> str:
    """One line about it."""
    load = ", ".join(f"{value:.1f}" for value in found["load_average_before"])
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['memory_mib']} MiB, Linux {found['kernel']}, Python {found['python']}; "
        f"load before the run {load}"
    )


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def write_json(
    path: Path, question: str, found: Mapping[str, Any], options: Mapping[str, Any], results: object
) -> None:
    """The run's record, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"question": question, "machine": found, "options": options, "results": results}
    draft = path.with_suffix(path.suffix + ".tmp")
    draft.write_text(json.dumps(record, indent=1, default=_plain) + "\n")
    draft.replace(path)
    print(f"\nwritten to {path}")


def _plain(value: object) -> object:
    if isinstance(value, (Summary, Ratio)):
        return asdict(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


# --- surroundings


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory on a disk, where spill files lie by default too; removed in the end, also on SIGTERM."""
    parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="gcma-bench-", dir=parent))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield path
    finally:
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(path, ignore_errors=True)


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
    source, library = directory / "floor.c", directory / "floor.so"
    source.write_text(_C_SOURCE)
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run([*compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


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


# --- processes


@dataclass
class Crew:
    """Worker processes that do what the parent tells them, all at once."""

    connections: list[Connection] = field(default_factory=list)
    processes: list[SpawnProcess] = field(default_factory=list)

    def ask(self, *command: Any) -> list[Any]:
        """Sends the same command to all; their answers in order. Raises RuntimeError when one fails or dies."""
        for connection in self.connections:
            connection.send(command)
        return [self.answer(connection) for connection in self.connections]

    @staticmethod
    def answer(connection: Connection) -> Any:
        """Of one of them, to what was sent before."""
        if not connection.poll(REPLY_S):
            raise RuntimeError(f"a worker process gave no answer within {REPLY_S:g} s")
        try:
            good, answer = connection.recv()
        except EOFError:
            raise RuntimeError("a worker process died") from None
        if not good:
            raise RuntimeError(f"a worker process failed: {answer}")
        return answer


@contextmanager
def crew(count: int, make: Callable[..., Callable[..., Any]], *arguments: Any) -> Iterator[Crew]:
    """`count` processes; each calls `make(index, stack, *arguments)` once, then what that returned for each command."""
    context = multiprocessing.get_context("spawn")
    team = Crew()
    try:
        for index in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, index, make, arguments), daemon=True)
            process.start()
            theirs.close()
            team.processes.append(process)
            team.connections.append(ours)
        for connection in team.connections:
            team.answer(connection)
        yield team
    finally:
        for connection in team.connections:
            connection.close()
        for process in team.processes:
            process.join(STOP_S)
            if process.is_alive():
                process.kill()
                process.join()


def _work(
    connection: Connection, index: int, make: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us by closing the pipe
    with ExitStack() as stack:
        try:
            act = make(index, stack, *arguments)
            connection.send((True, None))
            while True:
                command = connection.recv()
                connection.send((True, act(*command)))
        except (EOFError, BrokenPipeError):
            pass
        except Exception as error:
            connection.send((False, f"{type(error).__name__}: {error}"))
            raise


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def compile_c(directory: Path, name: str, source: str) -> Path:
    """Compiles a script's own C there; returns the library's path."""
    file, library = directory / f"{name}.c", directory / f"{name}.so"
    file.write_text(source)
    subprocess.run(
        [*os.environ.get("CC", "cc").split(), "-O2", "-shared", "-fPIC", "-o", str(library), str(file)], check=True
    )
    return library
