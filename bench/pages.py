"""What does one page cost? Load and store against the copy itself, the file, and LMDB.

All in one run, in turns: load and load_into with the working set in memory, a store written through, a store written behind and sustained (the
nursery wrapped many times, everything counted), each page by page and in batches, by one process and by two at once.
"""

from __future__ import annotations

import argparse
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import lmdb
import numpy as np
import numpy.typing as npt
from _common import (
    OUT,
    Crew,
    Floor,
    Ratio,
    Summary,
    address_of,
    clock_cost_ns,
    compile_floor,
    cpu_seconds,
    crew,
    describe_machine,
    machine,
    scratch,
    table,
    write_json,
)

import gcma_shm
from gcma_shm.sizes import format_size, parse_size

Which = npt.NDArray[np.int64]
PLACES = ("hits_nursery", "hits_area", "hits_spill", "hits_zero", "misses")
PUT_BATCH = 64
FILL_PASSES = 8
THROUGH, BEHIND, FIRST = 0, 1, 2  # swap types


@dataclass(frozen=True)
class Setup:
    """What the worker processes of one page size share."""

    page_size: int
    pages: int
    batch: int
    endpoint: str
    directory: Path
    library: Path
    memory: str  # path of the floor's mapping
    seed: int


class Contender(Protocol):
    """One way to do a job. `prepare` turns page numbers into what `run` takes, outside the timing."""

    single: bool  # whether its single calls are timed; C's would show the cost of getting there

    def renew(self, pages: int) -> None:
        """Before a block of so many pages."""

    def prepare(self, which: Which) -> Any:
        """For one batch."""

    def run(self, prepared: Any) -> None:
        """One batch."""


@dataclass
class Plain:
    """A contender made of two functions."""

    prepare: Callable[[Which], Any]
    run: Callable[[Any], None]
    single: bool = True
    renew: Callable[[int], None] = field(default=lambda _pages: None)


def _offsets(which: Which) -> Any:
    return which.tolist()


def _keys(which: Which) -> Any:
    return [struct.pack(">Q", n) for n in which.tolist()]


class Worker:
    """All contenders of one process."""

    def __init__(self, index: int, stack: ExitStack, setup: Setup) -> None:
        self._setup = setup
        self._rng = np.random.default_rng([setup.seed, index])
        self._clock_ns = clock_cost_ns()
        self._page = np.random.default_rng(setup.seed).integers(1, 256, setup.page_size, np.uint8).tobytes()
        self._pages = self._page * PUT_BATCH if setup.page_size <= 1 << 16 else self._page * setup.batch
        self._out = bytearray(len(self._pages))
        self._client = stack.enter_context(gcma_shm.connect(setup.endpoint, mapped=True, prefault=True))
        self._floor = Floor(setup.library)
        fd = os.open(setup.memory, os.O_RDWR)
        self._memory = mmap.mmap(fd, setup.pages * setup.page_size)
        os.close(fd)
        for at in range(0, len(self._memory), mmap.PAGESIZE):
            self._memory[at] = 1
        self._file = self._open(stack, "overwritten")
        self._first_file = self._open(stack, f"first-{index}")
        self._lmdb = stack.enter_context(_open_lmdb(setup))
        self._contenders: dict[str, Contender] = self._floors() | self._files() | self._lmdbs() | self._ours(index)

    def _open(self, stack: ExitStack, name: str) -> int:
        fd = os.open(self._setup.directory / name, os.O_RDWR | os.O_CREAT, 0o600)
        stack.callback(os.close, fd)
        return fd

    def act(self, verb: str, *arguments: Any) -> Any:
        """Does what the parent asks: `block`, `singles`, `sync` or `fill`."""
        action: Callable[..., Any] = getattr(self, verb)
        return action(*arguments)

    def block(self, name: str, batches: int) -> tuple[list[float], float]:
        """Nanoseconds a page of each batch, and of the whole loop."""
        contender, size = self._contenders[name], self._setup.batch
        contender.renew(batches * size)
        prepared = [contender.prepare(which) for which in self._rng.integers(0, self._setup.pages, (batches, size))]
        run, clock = contender.run, time.perf_counter_ns
        times = [clock()]
        for one in prepared:
            run(one)
            times.append(clock())
        return (np.diff(times) / size).tolist(), (times[-1] - times[0]) / batches / size

    def singles(self, name: str, count: int) -> list[float]:
        """Nanoseconds of single calls."""
        contender = self._contenders[name]
        if not contender.single:
            return []
        contender.renew(count)
        prepared = [contender.prepare(which) for which in self._rng.integers(0, self._setup.pages, (count, 1))]
        run, clock, times = contender.run, time.perf_counter_ns, []
        for one in prepared:
            start = clock()
            run(one)
            times.append(clock() - start - self._clock_ns)
        return times

    def sync(self) -> float:
        """Nanoseconds until what was written behind is in the file."""
        start = time.perf_counter_ns()
        self._swap(BEHIND).sync(timeout=60)
        return float(time.perf_counter_ns() - start)

    def fill(self, type_: int) -> None:
        """Sees to it that the working set is stored and, as far as the arena takes it, in memory: a load brings back what was evicted."""
        swap = self._swap(type_)
        for n in range(self._setup.pages):
            if n not in swap:
                swap.store(n, self._page)
        for _ in range(FILL_PASSES):
            before = self._spill_hits()
            for n in range(self._setup.pages):
                swap.load(n)
            if self._spill_hits() == before:
                return
            time.sleep(0.2)  # the broker's sweep makes room for what comes back

    def _spill_hits(self) -> int:
        return int(self._client.stats()["clients"][str(self._client.number)]["hits_spill"])

    def _swap(self, type_: int) -> gcma_shm.Swap:
        return self._client.swap(type_, self._setup.pages, write="behind" if type_ == BEHIND else "through")

    def _floors(self) -> dict[str, Contender]:
        floor, size, batch = self._floor, self._setup.page_size, self._setup.batch
        pages, out = address_of(self._memory), address_of(self._out)
        self._source = bytearray(self._page)
        source = address_of(self._source)
        view = memoryview(self._memory)

        def starts(which: Which) -> Any:
            return (which * size).tolist()

        def python_new(positions: list[int]) -> None:
            for at in positions:
                bytes(view[at : at + size])

        target = memoryview(self._out)[:size]

        def python_into(positions: list[int]) -> None:
            for at in positions:
                target[:] = view[at : at + size]

        def python_in(positions: list[int], page: bytes = self._page) -> None:
            for at in positions:
                view[at : at + size] = page

        def c(function: Callable[..., Any], *arguments: int) -> Plain:
            def run(which: Which) -> None:
                function(*arguments, which.ctypes.data, batch, size)

            return Plain(lambda which: which.copy(), run, single=False)

        return {
            "C memcpy into a buffer": c(floor.copy_out, out, pages),
            "C memcpy, one at a time": c(floor.copy_out_apart, out, pages),
            "C memcpy into new bytes": c(floor.copy_new, pages),
            "C memcpy to a random page": c(floor.copy_in, pages, source),
            "bytes(memoryview[...])": Plain(starts, python_new),
            "buffer[:] = memoryview[...]": Plain(starts, python_into),
            "memoryview[...] = page": Plain(starts, python_in),
        }

    def _files(self) -> dict[str, Contender]:
        size, batch, page, fd, first = (
            self._setup.page_size,
            self._setup.batch,
            self._page,
            self._file,
            self._first_file,
        )
        floor, source, out = self._floor, address_of(self._source), [memoryview(self._out)[:size]]
        fresh = Fresh(self._setup.pages, lambda: os.ftruncate(first, 0))

        def starts(which: Which) -> Any:
            return (which * size).tolist()

        def pread(positions: list[int]) -> None:
            for at in positions:
                os.pread(fd, size, at)

        def preadv(positions: list[int]) -> None:
            for at in positions:
                os.preadv(fd, out, at)

        def pwrite(positions: list[int]) -> None:
            for at in positions:
                os.pwrite(fd, page, at)

        def pwrite_first(positions: list[int]) -> None:
            for at in positions:
                os.pwrite(first, page, at)

        def c_pwrite(which: Which) -> None:
            floor.write_at(fd, source, which.ctypes.data, batch, size)

        return {
            "os.pread": Plain(starts, pread),
            "os.preadv": Plain(starts, preadv),
            "os.pwrite": Plain(starts, pwrite),
            "os.pwrite, first": Plain(lambda which: starts(fresh.next(which.size)), pwrite_first, renew=fresh.renew),
            "C pwrite": Plain(lambda which: which.copy(), c_pwrite, single=False),
        }

    def _lmdbs(self) -> dict[str, Contender]:
        env, page = self._lmdb, self._page
        reading: list[lmdb.Transaction] = []

        def get(keys: list[bytes]) -> None:
            for key in keys:
                with env.begin() as txn:
                    txn.get(key)

        def get_reused(keys: list[bytes]) -> None:
            get = reading[0].get
            for key in keys:
                get(key)

        def get_batch(keys: list[bytes]) -> None:
            with env.begin() as txn:
                for key in keys:
                    txn.get(key)

        def put(keys: list[bytes]) -> None:
            for key in keys:
                with env.begin(write=True) as txn:
                    txn.put(key, page)

        def put_batch(keys: list[bytes]) -> None:
            with env.begin(write=True) as txn:
                for key in keys:
                    txn.put(key, page)

        def begin(pages: int) -> None:
            end(pages)
            reading.append(env.begin())

        def end(_pages: int) -> None:  # an old snapshot would keep LMDB from using its freed pages again
            while reading:
                reading.pop().abort()

        return {
            "LMDB get": Plain(_keys, get, renew=end),
            "LMDB get, reused transaction": Plain(_keys, get_reused, renew=begin),
            "LMDB get, batch": Plain(_keys, get_batch, single=False),
            "LMDB put": Plain(_keys, put, renew=end),
            "LMDB put, batch": Plain(_keys, put_batch, single=False, renew=end),
        }

    def _ours(self, index: int) -> dict[str, Contender]:
        page, pages, size = self._page, self._pages, self._setup.page_size
        through, behind = self._swap(THROUGH), self._swap(BEHIND)
        out = bytearray(size)
        out_many = memoryview(self._out)[: self._setup.batch * size]
        fresh = FreshType(self._client, FIRST + index, self._setup.pages)

        def load(offsets: list[int], load: Callable[[int], bytes | None] = through.load) -> None:
            for offset in offsets:
                load(offset)

        def load_into(offsets: list[int], load_into: Callable[[int, bytearray], bool] = through.load_into) -> None:
            for offset in offsets:
                load_into(offset, out)

        def load_many(offsets: list[int]) -> None:
            through.load_many(offsets, out_many)

        def store_first(offsets: list[int]) -> None:
            store = fresh.swap.store
            for offset in offsets:
                store(offset, page)

        def store_by(swap: gcma_shm.Swap) -> Plain:
            store = swap.store

            def run(offsets: list[int]) -> None:
                for offset in offsets:
                    store(offset, page)

            return Plain(_offsets, run)

        def store_many_by(swap: gcma_shm.Swap) -> Plain:
            source = memoryview(pages)[: self._setup.batch * size]
            return Plain(_offsets, lambda offsets: swap.store_many(offsets, source), single=False)

        return {
            "load": Plain(_offsets, load),
            "load_into": Plain(_offsets, load_into),
            "load_many": Plain(_offsets, load_many, single=False),
            "store through": store_by(through),
            "store through, first": Plain(
                lambda which: fresh.next(which.size).tolist(), store_first, renew=fresh.renew
            ),
            "store_many through": store_many_by(through),
            "store behind": store_by(behind),
            "store_many behind": store_many_by(behind),
        }


class Fresh:
    """Page numbers in random order, each once; then `reset` makes all places new."""

    def __init__(self, pages: int, reset: Callable[[], None]) -> None:
        self._pages = pages
        self._reset = reset
        self._rng = np.random.default_rng(1)
        self._left: Which = np.empty(0, np.int64)

    def renew(self, pages: int) -> None:
        """Sees to it that so many are left."""
        if self._left.size < min(pages, self._pages):
            self._reset()
            self._left = self._rng.permutation(self._pages)

    def next(self, count: int) -> Which:
        """The next ones."""
        taken, self._left = self._left[:count], self._left[count:]
        return taken


class FreshType(Fresh):
    """The same with a swap type, whose life ends and begins."""

    def __init__(self, client: gcma_shm.Client, type_: int, slots: int) -> None:
        super().__init__(slots, self._begin)
        self._client, self._type, self._slots = client, type_, slots
        self.swap = client.swap(type_, slots)

    def _begin(self) -> None:
        self.swap.invalidate_area()
        self.swap = self._client.swap(self._type, self._slots)


def make_worker(index: int, stack: ExitStack, setup: Setup) -> Callable[..., Any]:
    """A worker process's ear."""
    return Worker(index, stack, setup).act


@dataclass(frozen=True)
class Phase:
    """A comparison: its contenders and what each is compared with."""

    name: str
    against: tuple[str, ...]  # columns of ratios
    contenders: tuple[str, ...]
    sustained: bool = False


PHASES = (
    Phase(
        "load into a buffer",
        ("C memcpy into a buffer", "C memcpy, one at a time", "LMDB get"),
        (
            "C memcpy into a buffer", "C memcpy, one at a time", "buffer[:] = memoryview[...]", "load_into", "load_many", "os.preadv",
            "LMDB get", "LMDB get, batch",
        ),
    ),
    Phase(
        "load as new bytes",
        ("C memcpy into new bytes", "LMDB get"),
        ("C memcpy into new bytes", "bytes(memoryview[...])", "load", "os.pread", "LMDB get", "LMDB get, reused transaction"),
    ),
    Phase(
        "store, written through",
        ("os.pwrite", "C pwrite", "LMDB put"),
        ("C memcpy to a random page", "C pwrite", "os.pwrite", "store through", "store_many through", "LMDB put", "LMDB put, batch"),
    ),
    Phase(
        "store, written through, first",
        ("os.pwrite, first",),
        ("os.pwrite, first", "store through, first"),
    ),
    Phase(
        "store, written behind, sustained",
        ("LMDB put", "C memcpy to a random page"),
        (
            "C memcpy to a random page", "memoryview[...] = page", "os.pwrite", "store behind", "store_many behind", "LMDB put",
            "LMDB put, batch",
        ),
        sustained=True,
    ),
)  # fmt: skip


@dataclass
class Figures:
    """What one contender came to in one phase."""

    rounds: list[float] = field(default_factory=list)  # nanoseconds a page, one figure a round
    batches: list[float] = field(default_factory=list)
    singles: list[float] = field(default_factory=list)
    sync: list[float] = field(default_factory=list)  # nanoseconds a page more until the file has it
    broker_cpu: list[float] = field(default_factory=list)  # nanoseconds a page of the broker's time


class Measurement:
    """One page size with one number of processes."""

    def __init__(
        self, options: argparse.Namespace, client: gcma_shm.Client, broker_pid: int, team: Crew, setup: Setup
    ) -> None:
        self._options = options
        self._client = client
        self._broker_pid = broker_pid
        self._team = team
        self._setup = setup
        self._processes = len(team.connections)
        self._nursery_pages: int = client.stats()["arena"]["nursery"] // setup.page_size

    def run(self, phase: Phase) -> dict[str, Any]:
        """All rounds of one phase; prints its table."""
        type_ = BEHIND if phase.sustained else THROUGH
        Crew(self._team.connections[:1]).ask("fill", type_)
        batches = self._batches(phase)
        figures = {name: Figures() for name in phase.contenders}
        for name in phase.contenders:
            self._team.ask("block", name, max(batches // 8, 2))
        before = self._client.stats()["counters"]
        for turn in range(self._options.rounds if not phase.sustained else max(self._options.rounds // 3, 3)):
            shift = turn % len(phase.contenders)
            for name in phase.contenders[shift:] + phase.contenders[:shift]:
                self._block(phase, name, batches, figures[name])
        after = self._client.stats()["counters"]
        singles = min(batches * self._setup.batch, self._options.singles)
        for name in phase.contenders:
            for times in self._team.ask("singles", name, singles):
                figures[name].singles += times
        places = {name: after[name] - before[name] for name in PLACES}
        return self._tell(phase, figures, places)

    def _batches(self, phase: Phase) -> int:
        pages: int = self._options.block_bytes // self._setup.page_size
        if phase.sustained:
            pages = max(-(-self._options.wraps * self._nursery_pages // self._processes), pages)
        elif "first" in phase.name:
            pages = min(pages, self._setup.pages // 2)
        return max(-(-pages // self._setup.batch), 4)

    def _block(self, phase: Phase, name: str, batches: int, figures: Figures) -> None:
        pages = batches * self._setup.batch * self._processes
        cpu = cpu_seconds(self._broker_pid)
        answers = self._team.ask("block", name, batches)
        for times, _ in answers:
            figures.batches += times
        if phase.sustained:
            figures.rounds.append(float(np.mean([mean for _, mean in answers])))
        else:
            figures.rounds.append(float(np.median([time for times, _ in answers for time in times])))
        if phase.sustained and name.endswith(
            "behind"
        ):  # before the next one's turn, or our writing would be at its cost
            figures.sync.append(max(self._team.ask("sync")) / pages * self._processes)
            figures.broker_cpu.append((cpu_seconds(self._broker_pid) - cpu) * 1e9 / pages)

    def _tell(self, phase: Phase, figures: dict[str, Figures], places: dict[str, int]) -> dict[str, Any]:
        head = [
            f"{phase.name}, {format_size(self._setup.page_size)}, {self._processes} process{'es' if self._processes > 1 else ''}",
            "us a page" if not phase.sustained else "us a page, all in",
            "median",
            "p99 (call)",
            *(f"x {name}" for name in phase.against),
        ]
        rows, results = [], {}
        for name, found in figures.items():
            summary = Summary.of(np.asarray(found.batches))
            p99 = float(np.percentile(found.singles, 99)) if found.singles else None
            ratios = {other: Ratio.of(found.rounds, figures[other].rounds) for other in phase.against}
            whole = float(np.median(found.rounds))
            rows.append(
                [
                    name,
                    whole / 1e3,
                    summary.median / 1e3,
                    p99 / 1e3 if p99 is not None else "-",
                    *(str(r) for r in ratios.values()),
                ]
            )
            results[name] = {
                "us_per_page": whole / 1e3,
                "batches": asdict(summary),
                "single_p99_ns": p99,
                "ratios": {other: asdict(ratio) for other, ratio in ratios.items()},
                "rounds_ns": found.rounds,
            }
            if found.sync:
                results[name] |= {
                    "sync_us_per_page": np.median(found.sync) / 1e3,
                    "broker_cpu_us_per_page": np.mean(found.broker_cpu) / 1e3,
                }
        print("\n" + table(head, rows))
        for name, found in figures.items():
            if found.sync:
                print(
                    f"{name}: until the file has it too {np.median(found.sync) / 1e3:.2f} us a page more; "
                    f"the broker's processor time {np.mean(found.broker_cpu) / 1e3:.2f} us a page"
                )
        loads = sum(places.values())
        if phase.name.startswith("load"):
            shares = ", ".join(
                f"{name.removeprefix('hits_')} {count / loads:.1%}" for name, count in places.items() if count
            )
            print(f"loads by place: {shares} of {loads}")
        sys.stdout.flush()
        return {
            "page_size": self._setup.page_size,
            "processes": self._processes,
            "phase": phase.name,
            "pages_per_block": self._batches(phase) * self._setup.batch * self._processes,
            "nursery_pages": self._nursery_pages,
            "places": places,
            "contenders": results,
        }


def _open_lmdb(setup: Setup) -> lmdb.Environment:
    return lmdb.open(
        str(setup.directory / "lmdb"),
        map_size=4 * setup.pages * setup.page_size + (64 << 20),
        sync=False,
        writemap=True,
        max_dbs=0,
    )


def _lay(setup: Setup) -> None:
    """The file and the database, in page-sized writes, as a spill file is laid."""
    page = os.urandom(setup.page_size)
    fd = os.open(setup.directory / "overwritten", os.O_RDWR | os.O_CREAT, 0o600)
    for n in range(setup.pages):
        os.pwrite(fd, page, n * setup.page_size)
    os.close(fd)
    with _open_lmdb(setup) as env:
        for n in range(setup.pages):
            with env.begin(write=True) as txn:
                txn.put(struct.pack(">Q", n), page)


def measure(options: argparse.Namespace, page_size: int, floor_directory: Path, library: Path) -> list[dict[str, Any]]:
    """Everything for one page size: a broker, a file, a database, a mapping of their own."""
    results = []
    pages = options.working_set // page_size
    batch = max(min(PUT_BATCH, (8 << 20) // page_size), 1)
    with ExitStack() as stack:
        directory = floor_directory / f"pages-{page_size}"
        directory.mkdir()
        fd = os.memfd_create("gcma-bench-floor")
        stack.callback(os.close, fd)
        os.posix_fallocate(fd, 0, pages * page_size)
        client = stack.enter_context(
            gcma_shm.embedded(options.arena, page_size=page_size, slots=8 * pages, spill_dir=directory, prefault=True)
        )
        setup = Setup(
            page_size, pages, batch, client.endpoint, directory, library, f"/proc/{os.getpid()}/fd/{fd}", options.seed
        )
        _lay(setup)
        for processes in options.processes:
            with crew(processes, make_worker, setup) as team:
                measurement = Measurement(options, client, client.broker_pid, team, setup)
                for phase in PHASES:
                    if not options.phase or any(word in phase.name for word in options.phase):
                        results.append(measurement.run(phase))
    return results


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-size", type=parse_size, nargs="+", default=[4 << 10, 64 << 10, 1 << 20], metavar="SIZE")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], metavar="N", help="how many at once (default: 1 2)"
    )
    parser.add_argument(
        "--phase", nargs="+", metavar="WORD", help="only the comparisons whose name holds one of these words"
    )
    parser.add_argument("--working-set", type=parse_size, default=80 << 20, metavar="SIZE")
    parser.add_argument(
        "--arena", type=parse_size, default=224 << 20, metavar="SIZE", help="must hold the working set well"
    )
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    parser.add_argument(
        "--wraps", type=int, default=12, metavar="N", help="of the nursery, in a sustained block (default: 12)"
    )
    parser.add_argument(
        "--block-bytes", type=parse_size, default=16 << 20, metavar="SIZE", help="that a contender moves in its turn"
    )
    parser.add_argument("--singles", type=int, default=8192, metavar="N", help="calls timed one by one (default: 8192)")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--out", type=Path, default=OUT / "pages.json", metavar="FILE")
    options = parser.parse_args(argv)
    found = machine()
    print(describe_machine(found))
    with scratch() as directory:
        library = compile_floor(directory)
        results = [
            result for page_size in options.page_size for result in measure(options, page_size, directory, library)
        ]
    write_json(options.out, "What does one page cost?", found, vars(options), results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
