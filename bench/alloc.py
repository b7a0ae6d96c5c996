"""What does a contiguous buffer cost? Under a full cache, against a bare echo of the same messages and against SharedMemory.

Two latencies told apart: hand-over (request to address) and usable (the first byte of every 4 KiB written), the latter with and without
`prefault` at connect. Hand-over and echo are both told cold (the first message after the cache was filled) and warm (after some others). Then
the sweep by itself, per page. All in one run, in turns.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import stress
import zmq
from _common import (
    OUT,
    Crew,
    Floor,
    Ratio,
    Summary,
    address_of,
    compile_floor,
    crew,
    describe_machine,
    machine,
    scratch,
    table,
    write_json,
)

import gcma_shm
from gcma_shm import layout, messages
from gcma_shm._core import Plane
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.messages import Reply, Request
from gcma_shm.sizes import format_size, parse_size

SIZES = [64 << 10 << 2 * step for step in range(7)]  # 64 KiB to 256 MiB
CACHE_TYPE = 1
FULL = 0.97  # of what no buffer holds: the cache counts as full
FILL_S = 60.0
WARM_UP = 5  # messages before the one that is timed warm
PUBLISHED = 2 << 62
SWEEP_PAGES = [16, 256, 4096, 16384, 65536]
DEALER_ROUTER_LINGER_MS = 0


# --- the echo: what the transport alone costs


def make_echo(_index: int, stack: ExitStack, endpoint: str) -> Callable[..., Any]:
    """A ROUTER in another process that answers each message with one of the length of our reply."""
    context = stack.enter_context(zmq.Context())
    socket = stack.enter_context(context.socket(zmq.ROUTER))
    socket.setsockopt(zmq.LINGER, DEALER_ROUTER_LINGER_MS)
    socket.bind(endpoint)
    reply = encoded_reply()

    def serve(count: int) -> None:
        for _ in range(count):
            peer, _request = socket.recv_multipart()
            socket.send_multipart([peer, reply])

    return serve


def encoded_request() -> bytes:
    """An alloc_contig request as our client sends it."""
    return bytes(messages.encode_request(Request(1000, "alloc_contig", {"nbytes": 64 << 20}))[0])


def encoded_reply() -> bytes:
    """The broker's answer to it."""
    place = {"buffer": 1 << 24, "area": "default", "offset": 10_000, "first": 20_000, "nbytes": 64 << 20}
    return bytes(messages.encode_reply(Reply(1000, "ok", place))[0])


class Echo:
    """The DEALER's side."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        endpoint = f"ipc://{directory}/echo"
        self._crew = stack.enter_context(crew(1, make_echo, endpoint))
        context = stack.enter_context(zmq.Context())
        self._socket = stack.enter_context(context.socket(zmq.DEALER))
        self._socket.setsockopt(zmq.LINGER, DEALER_ROUTER_LINGER_MS)
        self._socket.connect(endpoint)
        self._request = encoded_request()

    def run(self, count: int) -> list[int]:
        """Nanoseconds of each round trip."""
        connection = self._crew.connections[0]
        connection.send((count,))
        times, clock = [], time.perf_counter_ns
        for _ in range(count):
            start = clock()
            self._socket.send_multipart([self._request])
            self._socket.recv_multipart()
            times.append(clock() - start)
        Crew.answer(connection)
        return times


# --- buffers


@dataclass
class Times:
    """Nanoseconds of one size, a list for each job, sample by sample."""

    echo: list[float] = field(default_factory=list)
    hand_over: list[float] = field(default_factory=list)
    echo_cold: list[float] = field(default_factory=list)
    hand_over_cold: list[float] = field(default_factory=list)
    free: list[float] = field(default_factory=list)
    usable: list[float] = field(default_factory=list)
    usable_prefault: list[float] = field(default_factory=list)
    shared_memory: list[float] = field(default_factory=list)
    shared_memory_create: list[float] = field(default_factory=list)
    lent: list[float] = field(default_factory=list)  # share of the area that was lent, before
    failures: int = 0


class Buffers:
    """Allocates under a full cache."""

    def __init__(self, options: argparse.Namespace, client: EmbeddedClient, floor: Floor, echo: Echo) -> None:
        self._options = options
        self._client = client  # connected with prefault
        self._floor = floor
        self._echo = echo
        self._area = client.areas()[0]
        self._slots = client.stats()["arena"]["slots"] // 2
        self._swap = client.swap(CACHE_TYPE, self._slots, write="behind")
        self._page = os.urandom(client.page_size - 1) + b"\1"
        self._next_slot = 0
        self._next_offset = 0

    def fill(self) -> float:
        """Stores new pages until the cache has all that no buffer holds; the share of the area that is lent."""
        deadline = time.monotonic() + FILL_S
        while (lent := self._lent()) < FULL and time.monotonic() < deadline:
            wanted = int((1 - lent) * self._area.size / self._client.page_size) + 64
            for _ in range(wanted):
                self._swap.store(self._next_slot % self._slots, self._page)
                self._next_slot += 1
            self._swap.sync(timeout=60)
        return lent

    def _lent(self) -> float:
        area = self._client.areas()[0]
        return area.lent / (area.size - area.held)

    def _offset(self, nbytes: int) -> int:
        """Where the next buffer goes: walking through the area, so that it always takes pages that are lent."""
        pages = nbytes // self._client.page_size
        if (self._next_offset + pages) * self._client.page_size > self._area.size:
            self._next_offset = 0
        offset = self._next_offset
        self._next_offset += pages
        return offset

    def sample(self, nbytes: int, times: Times) -> None:
        """One of each, in turn."""
        times.lent.append(self._refill())
        cold, *_ = self._echo.run(1)
        times.echo_cold.append(float(cold))
        times.hand_over_cold.append(self._allocate(self._client, nbytes, times)[0])
        self._refill()
        times.echo.append(float(self._echo.run(WARM_UP + 1)[-1]))
        for _ in range(WARM_UP):
            self._client.areas()
        hand_over, usable, free = self._allocate(self._client, nbytes, times)
        times.hand_over.append(hand_over)
        times.usable_prefault.append(usable)
        times.free.append(free)
        self._refill()
        with gcma_shm.connect(self._client.endpoint, mapped=True) as fresh:  # a page table of its own, empty
            times.usable.append(self._allocate(fresh, nbytes, times)[1])
        self._shared_memory(nbytes, times)

    def _refill(self) -> float:
        return self.fill() if self._options.load == 0 else self._lent()  # under load the workers fill it

    def _allocate(self, client: gcma_shm.Client, nbytes: int, times: Times) -> tuple[float, float, float]:
        offset, clock = self._offset(nbytes), time.perf_counter_ns
        start = clock()
        try:
            buffer = client.alloc_contig(nbytes, area=self._area.name, offset=offset)
        except gcma_shm.GcmaError as error:
            times.failures += 1
            print(f"allocation of {format_size(nbytes)} failed: {error}", file=sys.stderr)
            return np.nan, np.nan, np.nan
        handed_over = clock()
        view = buffer.view
        self._floor.touch(address_of(view), nbytes)
        used = clock()
        view.release()
        before = clock()
        buffer.free()
        return float(handed_over - start), float(used - start), float(clock() - before)

    def _shared_memory(self, nbytes: int, times: Times) -> None:
        clock = time.perf_counter_ns
        start = clock()
        shared = SharedMemory(create=True, size=nbytes)
        created = clock()
        try:
            self._floor.touch(address_of(shared.buf), nbytes)
            times.shared_memory.append(float(clock() - start))
            times.shared_memory_create.append(float(created - start))
        finally:
            shared.close()
            shared.unlink()


JOBS = {
    "echo_cold": "echo, cold",
    "hand_over_cold": "hand-over, cold",
    "echo": "echo",
    "hand_over": "hand-over",
    "free": "free",
    "usable_prefault": "usable, prefaulted",
    "usable": "usable",
    "shared_memory_create": "shm create",
    "shared_memory": "shm usable",
}
RATIOS = (
    ("hand_over_cold", "echo_cold"),
    ("hand_over", "echo"),
    ("usable", "shared_memory"),
    ("usable_prefault", "shared_memory"),
)


def tell(sizes: list[int], taken: dict[int, Times]) -> dict[str, Any]:
    """Prints the tables; returns the results for JSON."""
    results: dict[str, Any] = {}
    rows, ratio_rows = [], []
    for nbytes in sizes:
        times = taken[nbytes]
        summaries = {name: Summary.of(np.asarray(getattr(times, name))) for name in JOBS}
        ratios = {
            f"{ours} / {theirs}": Ratio.of(getattr(times, ours), getattr(times, theirs)) for ours, theirs in RATIOS
        }
        rows.append([format_size(nbytes), *(f"{s.median / 1e3:.0f} / {s.p99 / 1e3:.0f}" for s in summaries.values())])
        lent = float(np.mean(times.lent))
        ratio_rows.append(
            [format_size(nbytes), *(str(ratio) for ratio in ratios.values()), f"{lent:.0%}", times.failures]
        )
        results[format_size(nbytes)] = {
            "nbytes": nbytes,
            "ns": {name: asdict(summary) for name, summary in summaries.items()},
            "ratios": {name: asdict(ratio) for name, ratio in ratios.items()},
            "lent_before": lent,
            "failures": times.failures,
        }
    print("\n" + table(["us, median / p99; shm: SharedMemory", *JOBS.values()], rows))
    names = [f"{JOBS[ours]} / {JOBS[theirs]}" for ours, theirs in RATIOS]
    print("\n" + table(["median (middle 80 %)", *names, "lent before", "failures"], ratio_rows))
    sys.stdout.flush()
    return results


def buffers(options: argparse.Namespace, directory: Path, floor: Floor) -> dict[str, Any]:
    """Allocations of all sizes that the arena holds."""
    with ExitStack() as stack:
        client = stack.enter_context(
            gcma_shm.embedded(options.arena, slots=4 * options.arena // 4096, spill_dir=directory, prefault=True)
        )
        echo = Echo(stack, directory)
        allocator = Buffers(options, client, floor, echo)
        sizes = [nbytes for nbytes in options.size if nbytes <= client.areas()[0].size]
        print(f"filling the cache: {allocator.fill():.0%} of the area is lent", flush=True)
        if options.load:
            _start_load(options, stack, client.endpoint)
        taken = {nbytes: Times() for nbytes in sizes}
        for turn in range(options.rounds):
            for nbytes in sizes[turn % len(sizes) :] + sizes[: turn % len(sizes)]:
                allocator.sample(nbytes, taken[nbytes])
        return tell(sizes, taken)


def _start_load(options: argparse.Namespace, stack: ExitStack, endpoint: str) -> None:
    """Workers that store and load at full speed until the end."""
    load = stress.Load(endpoint, options.load, options.arena // 4096, "behind", (50.0, 50.0, 0.0), 0.0, 1, options.seed)
    team = stack.enter_context(crew(options.load, stress.make_worker, load))
    for connection in team.connections:
        connection.send(("run", 1e9))
    stack.callback(_end_load, team)


def _end_load(team: Crew) -> None:
    for connection in team.connections:
        with suppress(OSError):
            connection.close()
    for process in team.processes:
        process.terminate()


# --- the sweep by itself


def sweep(options: argparse.Namespace, directory: Path, floor: Floor) -> dict[str, Any]:
    """`Plane.take` and `Plane.give` on an arena of our own that nobody else maps, beside a C loop over the same words."""
    pages_max = max(SWEEP_PAGES)
    geometry, areas = layout.plan(pages_max * 4096 * 5 // 4, slots=1024, clients_max=8)
    memory = mmap.mmap(-1, geometry.size)
    with memoryview(memory) as view:
        layout.write_header(view, geometry, areas, bytes(16))
    plane = Plane(memory, geometry, layout.BROKER, os.fsencode(directory))
    area = areas[0]
    life: npt.NDArray[np.uint64] = np.frombuffer(memory, np.uint64, area.pages, geometry.life_at + 8 * area.first)
    own: npt.NDArray[np.uint64] = np.zeros(pages_max, np.uint64)
    own_at = own.ctypes.data
    rows, results = [], {}
    for pages in SWEEP_PAGES:
        repeats = max(8, 65536 // pages // 8)
        times: dict[str, list[float]] = {name: [] for name in ("C loop", "take FREE", "take PUBLISHED", "give")}
        for _ in range(options.rounds):
            times["C loop"].append(_each(pages, repeats, lambda pages=pages: floor.sweep(own_at, pages)))  # type: ignore[misc]
            for name, state in (("take FREE", 0), ("take PUBLISHED", PUBLISHED)):
                took = gave = 0.0
                for _ in range(repeats):
                    life[:pages] &= np.uint64((1 << 46) - 1)
                    life[:pages] |= np.uint64(state)
                    start = time.perf_counter_ns()
                    discards = plane.take(0, area.first, pages)
                    middle = time.perf_counter_ns()
                    plane.give(0, area.first, pages)
                    took += middle - start
                    gave += time.perf_counter_ns() - middle
                    assert discards == (pages if state else 0)
                times[name].append(took / repeats / pages)
                times["give"].append(gave / repeats / pages)
        summaries = {name: Summary.of(np.asarray(values)) for name, values in times.items()}
        ratio = Ratio.of(times["take PUBLISHED"], times["C loop"])
        rows.append([pages, *(f"{s.median:.2f} / {s.p99:.2f}" for s in summaries.values()), str(ratio)])
        results[str(pages)] = {
            "ns_per_page": {k: asdict(s) for k, s in summaries.items()},
            "take PUBLISHED / C loop": asdict(ratio),
        }
    print("\n" + table(["pages; ns a page, median / p99", *times, "take PUBLISHED / C loop"], rows))
    return results


def _each(pages: int, repeats: int, call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - start) / repeats / pages


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison; returns the exit status: 1 when an allocation failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", type=parse_size, nargs="+", default=SIZES, metavar="SIZE", help="default: 64K to 256M, times 4"
    )
    parser.add_argument("--arena", type=parse_size, default=320 << 20, metavar="SIZE")
    parser.add_argument(
        "--load", type=int, default=0, metavar="N", help="worker processes that store and load at full speed meanwhile"
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--out", type=Path, default=OUT / "alloc.json", metavar="FILE")
    options = parser.parse_args(argv)
    found = machine()
    print(describe_machine(found))
    with scratch() as directory:
        floor = Floor(compile_floor(directory))
        results = {"buffers": buffers(options, directory, floor), "sweep": sweep(options, directory, floor)}
    write_json(options.out, "What does a contiguous buffer cost?", found, vars(options), results)
    return 1 if any(size["failures"] for size in results["buffers"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
