"""The work that `lent.py` times: what the worker processes of a machine do through its cache, and what they found to be wrong.

Two kinds. The *pool*: records of a data set larger than memory, drawn by Zipf's law; each is loaded, looked at and now and then stored
back. The *build*: a job on the standard library as a caching compiler does it: hash a module and all that it imports, compile it,
compress and store the object, read all objects in the end, and begin anew; a slice is of whole builds. Everything that is loaded is compared with what was stored.
"""

from __future__ import annotations

import fcntl
import hashlib
import marshal
import mmap
import os
import re
import stat
import sysconfig
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from main_job import real_files

import gcma_shm

PAGE = 4096
RECORD_PAGES = 16  # of the pool, at most: 64 KiB
STORE_EVERY = 8  # one record in so many is stored back, its first page
STAMP = 8  # bytes at its beginning that change with each store
DRAW = 4096  # records that are drawn at once
ZIPF = 0.99  # as YCSB
OBJECT_MORE = 1  # pages that an object may have more than its source
COMPRESSION = 6
NOT_BUILT = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"})
POOL_TYPE, SOURCE_TYPE, OBJECT_TYPE = 0, 0, 1  # a worker's own type is so much plus its number
IMPORT = re.compile(rb"^[ \t]*(?:from|import)[ \t]+([\w.]+)", re.MULTILINE)


@dataclass(frozen=True)
class Work:
    """What each of `workers` does: "pool" on `data_bytes` of files, or "build". `write`: as of `client.swap`."""

    kind: str
    workers: int
    data_bytes: int
    write: str
    seed: int
    reads_direct: bool = False  # whether workers themselves see to it that what they read comes from the disk


@dataclass
class Done:
    """In one slice, or in a step; `delayed_s`: of `seconds`, ready to run while others had the processors; `whole`: after the last
    step of a round, if the work has rounds.
    """

    seconds: float = 0.0
    delayed_s: float = 0.0
    operations: int = 0
    pages_loaded: int = 0
    pages_stored: int = 0
    mismatches: int = 0
    whole: bool = True


@dataclass(frozen=True)
class Module:
    """A source file of the build: its slots, and what it imports."""

    path: str
    first: int
    pages: int
    size: int
    digest: bytes
    imports: tuple[int, ...]


def pages_of(size: int) -> int:
    """Of so many bytes."""
    return -(-size // PAGE)


# --- what there is to work on


def records(data_bytes: int) -> list[bytes]:
    """This Python's own files, in pieces of RECORD_PAGES pages at the most, so many bytes in all."""
    found: list[bytes] = []
    total = 0
    for path in real_files():
        data = path.read_bytes()
        for at in range(0, len(data), RECORD_PAGES * PAGE):
            piece = data[at : at + RECORD_PAGES * PAGE]
            whole = piece.ljust(pages_of(len(piece)) * PAGE, b"\0")
            if total + len(whole) > data_bytes:
                return found
            found.append(whole)
            total += len(whole)
    return found


def modules(limit: int = 1 << 30) -> list[Module]:
    """The standard library without its tests; what they import of each other, by their import lines."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if not NOT_BUILT & set(path.parts))[:limit]
    names = {_name(path.relative_to(root)): index for index, path in enumerate(paths)}
    found, first = [], 0
    for index, path in enumerate(paths):
        data = path.read_bytes()
        wanted = {names.get(name.decode()) for name in IMPORT.findall(data)} - {None, index}
        imports = tuple(sorted(number for number in wanted if number is not None))
        pages = pages_of(len(data)) or 1
        found.append(Module(str(path), first, pages, len(data), hashlib.sha256(data).digest(), imports))
        first += pages
    return found


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def slots_of(work: Work) -> int:
    """Slots that the arena needs for all types of the work."""
    if work.kind == "pool":
        return sum(len(data) // PAGE for data in records(work.data_bytes))
    sources = modules()
    return sum(one.pages + _object_pages(one) for one in sources)


def _object_pages(module: Module) -> int:
    return module.pages + OBJECT_MORE


# --- workers


def make_worker(index: int, stack: ExitStack, work: Work, endpoint: str, spill_dir: Path) -> Callable[..., Done]:
    """For `_common.crew`: takes ("run", seconds)."""
    client = stack.enter_context(gcma_shm.connect(endpoint, mapped=True, prefault=True))
    worker = (Pool if work.kind == "pool" else Build)(index, client, work)
    if work.reads_direct:
        read_direct(spill_dir)

    def act(_command: str, seconds: float) -> Done:
        return run(worker.steps, seconds)

    return act


def read_direct(spill_dir: Path) -> None:
    """Sets O_DIRECT on what this process has open there. What it loads into must lie at whole pages of its memory."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            if spill_dir in link.readlink().parents:
                fd = int(link.name)
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
                    found += 1
    if not found:
        raise FileNotFoundError(f"no spill file below {spill_dir} is open")


def run(steps: Iterator[Done], seconds: float) -> Done:
    """Goes on with a worker's steps for that long, and to the end of a round."""
    total = Done()
    start, delayed = time.perf_counter(), delayed_s()
    while (now := time.perf_counter()) - start < seconds or not total.whole:
        step = next(steps)
        total.whole = step.whole
        total.operations += step.operations
        total.pages_loaded += step.pages_loaded
        total.pages_stored += step.pages_stored
        total.mismatches += step.mismatches
    total.seconds, total.delayed_s = now - start, delayed_s() - delayed
    return total


def delayed_s() -> float:
    """How long this thread has been ready to run and did not."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


@dataclass
class _Record:
    first: int
    pages: int
    crc: int
    stamp: int = 0


class Pool:
    """One worker of the pool: every `workers`-th record is its own, in a type of its own."""

    def __init__(self, index: int, client: gcma_shm.Client, work: Work) -> None:
        mine = records(work.data_bytes)[index :: work.workers]
        self._rng = np.random.default_rng((work.seed, index))
        self._swap = client.swap(POOL_TYPE + index, sum(len(data) // PAGE for data in mine), write=work.write)  # type: ignore[arg-type] # from the command line
        self._records: list[_Record] = []
        self._out = memoryview(mmap.mmap(-1, RECORD_PAGES * PAGE))  # at whole pages
        first = 0
        for data in mine:
            pages = len(data) // PAGE
            self._swap.store_many(range(first, first + pages), data)
            self._records.append(_Record(first, pages, zlib.crc32(data)))
            first += pages
        self._swap.sync(timeout=600)
        weights = 1.0 / np.arange(1, len(mine) + 1) ** ZIPF
        self._shares = np.cumsum(weights) / weights.sum()
        self._by_rank = self._rng.permutation(len(mine))
        self.steps = self._work()

    def _drawn(self) -> Iterator[int]:
        while True:
            yield from self._by_rank[np.searchsorted(self._shares, self._rng.random(DRAW))].tolist()

    def _work(self) -> Iterator[Done]:
        for number, drawn in enumerate(self._drawn()):
            record = self._records[drawn]
            out = self._out[: record.pages * PAGE]
            hits = self._swap.load_many(range(record.first, record.first + record.pages), out)
            wrong = not all(hits) or zlib.crc32(out) != record.crc
            stored = number % STORE_EVERY == 0
            if stored and not wrong:
                record.stamp += 1
                out[:STAMP] = record.stamp.to_bytes(STAMP, "little")
                self._swap.store(record.first, out[:PAGE])
                record.crc = zlib.crc32(out)
            yield Done(operations=1, pages_loaded=record.pages, pages_stored=stored, mismatches=wrong)


@dataclass
class Build:
    """One worker of the build: reads all sources, makes the objects of every `workers`-th module, over and over."""

    index: int
    client: gcma_shm.Client
    work: Work
    _objects: dict[int, tuple[int, bytes]] = field(default_factory=dict)  # size and digest of what was stored last

    def __post_init__(self) -> None:
        self._modules = modules()
        sources = self._modules[-1].first + self._modules[-1].pages
        write: str = self.work.write
        self._sources = self.client.swap(SOURCE_TYPE, sources, write=write)  # type: ignore[arg-type] # from the command line
        self._mine = range(self.index, len(self._modules), self.work.workers)
        self._at: dict[int, int] = {}
        slots = 0
        for number in self._mine:
            self._at[number] = slots
            slots += _object_pages(self._modules[number])
            module = self._modules[number]
            data = Path(module.path).read_bytes().ljust(module.pages * PAGE, b"\0")
            self._sources.store_many(range(module.first, module.first + module.pages), data)
        self._sources.sync(timeout=600)
        self._made = self.client.swap(OBJECT_TYPE + self.index, slots, write=write)  # type: ignore[arg-type] # as above
        self._out = memoryview(mmap.mmap(-1, max(module.pages for module in self._modules) * PAGE))
        self.steps = self._build()

    def _load(self, swap: gcma_shm.Swap, first: int, size: int) -> memoryview | None:
        out = self._out[: pages_of(size) * PAGE]
        return out[:size] if all(swap.load_many(range(first, first + pages_of(size)), out)) else None

    def _build(self) -> Iterator[Done]:
        while True:
            for number in self._mine:
                yield self._compile(number)
            yield self._link()

    def _compile(self, number: int) -> Done:
        done = Done(operations=1, whole=False)
        for one in (*self._modules[number].imports, number):
            module = self._modules[one]
            source = self._load(self._sources, module.first, module.size)
            done.pages_loaded += module.pages
            done.mismatches += source is None or hashlib.sha256(source).digest() != module.digest
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = compile(bytes(source or b""), module.path, "exec", dont_inherit=True)
        made = zlib.compress(marshal.dumps(code), COMPRESSION)
        pages = pages_of(len(made))
        if pages > _object_pages(module):
            raise ValueError(f"{module.path}: its object has {pages} pages; raise OBJECT_MORE")
        first = self._at[number]
        self._made.store_many(range(first, first + pages), made.ljust(pages * PAGE, b"\0"))
        self._objects[number] = len(made), hashlib.sha256(made).digest()
        done.pages_stored = pages
        return done

    def _link(self) -> Done:
        done = Done()
        for number, (size, digest) in self._objects.items():
            made = self._load(self._made, self._at[number], size)
            done.pages_loaded += pages_of(size)
            done.mismatches += made is None or hashlib.sha256(made).digest() != digest
        return done


def total(parts: Sequence[Done]) -> Done:
    """Of all workers of a slice."""
    return Done(
        max(part.seconds for part in parts),
        sum(part.delayed_s for part in parts) / len(parts),
        sum(part.operations for part in parts),
        sum(part.pages_loaded for part in parts),
        sum(part.pages_stored for part in parts),
        sum(part.mismatches for part in parts),
    )
