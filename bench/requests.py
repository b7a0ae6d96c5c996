"""What does a request to the broker cost beyond ZeroMQ itself, and how fast do pages travel in messages? Against a bare echo of the same frames.

The echo is a ROUTER in a process of its own that decodes and encodes the same msgpack headers; contenders take turns. "One core": client and server
are pinned to the same one. Bandwidth is told by the clock, and by the processor time of all threads of both processes: what one core that does
nothing else would reach.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from _common import (
    OUT,
    Crew,
    Ratio,
    Section,
    Summary,
    Verdict,
    crew,
    describe_machine,
    machine,
    scratch,
    tell,
    write_json,
)
from report import cell
from requests_aio import beside, beside_section
from requests_echo import Bare, Wanted, make_echo

import gcma_shm
from gcma_shm import messages
from gcma_shm.process import start_time

RATIO_MAX = 1.25
BANDWIDTH_MIN = 1.0  # GB/s
IN_FLIGHT = 64
PAGE, LARGE = 4096, 65536
BATCH = messages.batch_max(LARGE)
SLOTS = 64  # large pages that take turns: 4 MiB
BUFFER = 1 << 16

BATCHES = {
    "load_many": "load_many",
    "store_many behind": "store_many",
    "store_many through": "store_many",
}  # and the frames' name
PIPELINED = ("load, pipelined", "store behind, pipelined")  # page by page

Figures = dict[str, Any]


@contextmanager
def echo(page_size: int, copies: bool) -> Iterator[tuple[Bare, int]]:
    """A client of the echo, and the pid of its process."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        endpoint = f"ipc://{directory}/echo"
        team = stack.enter_context(crew(1, make_echo, endpoint, page_size, copies))
        team.connections[0].send(())
        bare = Bare(stack, endpoint)
        pid = team.processes[0].pid
        assert pid is not None
        yield bare, pid
        bare.stop()
        Crew.answer(team.connections[0])


def introduced(stack: ExitStack, endpoint: str) -> Bare:
    """A client by hand that has a session."""
    bare = Bare(stack, endpoint)
    bare.request("hello", {"pid": os.getpid(), "start": start_time(os.getpid()) or 0, "mapped": False})
    return bare


def timed(act: Callable[[], object]) -> Callable[[int], list[int]]:
    """Nanoseconds of each of so many calls."""

    def run(count: int) -> list[int]:
        clock, times = time.perf_counter_ns, []
        for _ in range(count):
            begun = clock()
            act()
            times.append(clock() - begun)
        return times

    return run


def one_at_a_time(rounds: int, count: int, spill_dir: Path) -> Figures:
    """Requests with one outstanding: ours through the public interface, and the same frames to the echo."""
    page = os.urandom(PAGE)
    with (
        gcma_shm.embedded("64M", spill_dir=spill_dir) as owner,
        gcma_shm.connect(owner.endpoint, mapped=False) as by_messages,
        gcma_shm.connect(owner.endpoint) as mapped,
        echo(PAGE, copies=True) as (bare, _),
    ):
        behind, through = by_messages.swap(1, 100, "behind"), by_messages.swap(2, 100)
        behind.store(7, page)
        through.store(7, page)
        behind.sync()
        slot = {"type": 1, "life": 1, "offset": 7}
        place: list[Wanted] = [("alloc_contig", {"nbytes": BUFFER}, ()), ("free_contig", {"buffer": 1 << 24}, ())]
        jobs: dict[str, tuple[Callable[[], object], list[Wanted]]] = {
            "ping": (lambda: by_messages._channel.request("ping"), [("ping", {}, ())]),
            "load 4 KiB": (lambda: behind.load(7), [("load", slot, ())]),
            "store 4 KiB, behind": (lambda: behind.store(7, page), [("store", slot, (page,))]),
            "store 4 KiB, through": (lambda: through.store(7, page), [("store", slot, (page,))]),
            "alloc + free 64 KiB": (lambda: mapped.alloc_contig(BUFFER).free(), place),
        }
        found: Figures = {}
        for name, (act, frames) in jobs.items():
            ours, theirs = [], []
            timed(act)(count)
            bare.times(frames, count)
            for _ in range(rounds):
                ours += [timed(act)(count)]
                theirs += [bare.times(frames, count)]
            medians = [[statistics.median(times) for times in side] for side in (ours, theirs)]
            found[name] = {
                "ours": Summary.of(_flat(ours)),
                "echo": Summary.of(_flat(theirs)),
                "ratio": Ratio.of(*medians),
            }
        return found


def many_at_once(rounds: int, count: int, spill_dir: Path) -> Figures:
    """Requests a second with IN_FLIGHT under way; the same client by hand for both."""
    page = os.urandom(PAGE)
    with (
        ExitStack() as stack,
        gcma_shm.embedded("64M", spill_dir=spill_dir) as owner,
        echo(PAGE, copies=True) as (bare, _),
    ):
        swap = owner.swap(1, 100, "behind")
        swap.store(7, page)
        ours = introduced(stack, owner.endpoint)
        slot = {"type": 1, "life": 1, "offset": 7}
        jobs: dict[str, Wanted] = {
            "ping": ("ping", {}, ()),
            "load 4 KiB": ("load", slot, ()),
            "store 4 KiB, behind": ("store", slot, (page,)),
        }
        found: Figures = {}
        for name, wanted in jobs.items():
            seconds: list[list[float]] = [[], []]
            for _ in range(rounds):
                for side, peer in zip(seconds, (ours, bare), strict=True):
                    side.append(peer.seconds(wanted, IN_FLIGHT, count))
            found[name] = {
                "ours": count / statistics.median(seconds[0]),
                "echo": count / statistics.median(seconds[1]),
                "ratio": Ratio.of(*seconds),
            }
        return found


def bandwidth(rounds: int, laps: int, spill_dir: Path) -> Figures:
    """Seconds a GB of pages of 64 KiB, for each way that they, or the same frames, may go: by the clock, and of processors."""
    data, out = os.urandom(SLOTS * LARGE), bytearray(SLOTS * LARGE)
    source, target = memoryview(data), memoryview(out)
    window = min(messages.WINDOW, (1 << 20) // LARGE)
    packed = messages.pack_offsets(range(BATCH))
    with (
        ExitStack() as stack,
        gcma_shm.embedded("128M", page_size=LARGE, spill_dir=spill_dir) as owner,
        gcma_shm.connect(owner.endpoint, mapped=False) as by_messages,
        echo(LARGE, copies=False) as (idle, idle_pid),
        echo(LARGE, copies=True) as (copying, copying_pid),
    ):
        pids = [owner.broker_pid, idle_pid, copying_pid]
        by_hand = introduced(stack, owner.endpoint)
        slots = range(SLOTS)
        swaps = {
            (way, write): client.swap(1, SLOTS, "behind") if write == "behind" else client.swap(2, SLOTS)
            for way, client in (("messages", by_messages), ("mapped", owner))
            for write in ("behind", "through")
        }
        for write in ("behind", "through"):
            swaps["mapped", write].store_many(slots, data)
            swaps["mapped", write].sync()
        batch = {"type": 1, "life": 1, "offsets": packed}
        page = {"type": 1, "life": 1, "offset": 7}
        single = bytes(source[:LARGE])

        def exchange(peer: Bare, operation: str, pages: int, in_flight: int, copied: bool) -> Callable[[], None]:
            stored = (source[: pages * LARGE],) if operation.startswith("store") else ()
            wanted: Wanted = (operation, batch if operation.endswith("many") else page, stored or ())
            into = target if copied else None
            return lambda: void(peer.seconds(wanted, in_flight, SLOTS // pages, into))

        ways: dict[str, Callable[[], object]] = {
            "load_many": lambda: swaps["messages", "behind"].load_many(slots, out),
            "load_many: ZeroMQ alone": exchange(idle, "load_many", BATCH, messages.BATCHES, False),
            "load_many: and the copies": exchange(copying, "load_many", BATCH, messages.BATCHES, True),
            "load_many: mapped": lambda: swaps["mapped", "behind"].load_many(slots, out),
            "store_many behind": lambda: swaps["messages", "behind"].store_many(slots, data),
            "store_many through": lambda: swaps["messages", "through"].store_many(slots, data),
            "store_many: ZeroMQ alone": exchange(idle, "store_many", BATCH, messages.BATCHES, False),
            "store_many: and the copies": exchange(copying, "store_many", BATCH, messages.BATCHES, False),
            "store_many behind: mapped": lambda: swaps["mapped", "behind"].store_many(slots, data),
            "store_many through: mapped": lambda: swaps["mapped", "through"].store_many(slots, data),
            "load, pipelined": exchange(by_hand, "load", 1, window, True),
            "load, pipelined: ZeroMQ alone": exchange(idle, "load", 1, window, False),
            "store behind, pipelined": exchange(by_hand, "store", 1, window, False),
            "store, pipelined: ZeroMQ alone": exchange(idle, "store", 1, window, False),
            "load, one at a time": lambda: [swaps["messages", "behind"].load(n) for n in slots],
            "store behind, one at a time": lambda: store_each(swaps["messages", "behind"], single),
            "copy": lambda: copy(target, source),
        }
        clock: dict[str, list[float]] = {name: [] for name in ways}
        processors: dict[str, list[float]] = {name: [] for name in ways}
        for act in ways.values():
            act()
        for _ in range(rounds):
            for name, act in ways.items():
                begun, used = time.perf_counter(), processor_seconds(pids)
                for _ in range(laps):
                    act()
                gigabytes = laps * SLOTS * LARGE / 1e9
                clock[name].append((time.perf_counter() - begun) / gigabytes)
                processors[name].append((processor_seconds(pids) - used) / gigabytes)
        return {"clock": clock, "processors": processors}


def processor_seconds(pids: Sequence[int]) -> float:
    """That this process and the threads of these have had so far, by the scheduler's own account (cpu_seconds counts ticks)."""
    nanoseconds = time.process_time_ns()
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            nanoseconds += int((task / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9


def void(_value: object) -> None:
    """For a figure that is taken from outside."""


def store_each(swap: gcma_shm.Swap, page: bytes) -> None:
    """The same page everywhere."""
    for offset in range(SLOTS):
        swap.store(offset, page)


def copy(target: memoryview, source: memoryview) -> None:
    """Page by page, as the data plane would."""
    for at in range(0, len(source), LARGE):
        target[at : at + LARGE] = source[at : at + LARGE]


def _flat(rows: Sequence[Sequence[int]]) -> Any:
    import numpy as np

    return np.asarray(list(itertools.chain.from_iterable(rows)), float)


# --- what is told


def latency_section(where: str, found: Figures, judged: bool) -> Section:
    """Round trips."""
    rows = [
        [name, one["ours"].median / 1e3, one["ours"].p99 / 1e3, one["echo"].median / 1e3, one["echo"].p99 / 1e3, str(one["ratio"])]
        for name, one in found.items()
    ]  # fmt: skip
    columns = ["", "µs", "p99", "echo, µs", "p99", "ours / echo"]
    verdicts = [
        Verdict(f"{name} / echo, {where}", RATIO_MAX, one["ratio"].median, why=spread(one["ratio"]))
        for name, one in found.items()
        if judged
    ]
    return Section(f"One outstanding, {where}", columns, rows, verdicts=verdicts)


def rate_section(where: str, found: Figures) -> Section:
    """Requests a second."""
    rows = [[name, one["ours"], one["echo"], str(one["ratio"])] for name, one in found.items()]
    return Section(f"{IN_FLIGHT} in flight, {where}", ["", "requests/s", "echo", "time, ours / echo"], rows)


def bandwidth_section(where: str, found: Figures, judged: bool) -> Section:
    """Pages of 64 KiB by each way."""
    rates = {how: {name: 1 / statistics.median(each) for name, each in of.items()} for how, of in found.items()}
    rows = [
        [name, rate, 1 / min(found["clock"][name]), rates["processors"][name], 1e3 / rates["processors"][name]]
        for name, rate in rates["clock"].items()
    ]
    words = {"clock": "GB/s", "processors": "GB a processor second"}
    verdicts = [
        Verdict(f"{name}, {words[how]}, {where}", BANDWIDTH_MIN, rates[how][name], at_least=True)
        for name in (*BATCHES, *PIPELINED)
        for how in words
        if judged
    ]
    columns = ["", "GB/s", "best round", "GB a processor second", "processor ms a GB"]
    note = (
        "“ZeroMQ alone”: the same frames, by a bare client to a bare echo; “and the copies”: which copies them as well."
    )
    return Section(f"Pages of 64 KiB, {where}", columns, rows, note, verdicts)


def shares_section(where: str, found: Figures) -> Section:
    """Where the processor time of a batch goes."""
    seconds = {name: statistics.median(each) for name, each in found["processors"].items()}
    rows: list[list[object]] = []
    for name, plain in BATCHES.items():
        all_of_it, alone = seconds[name], seconds[f"{plain}: ZeroMQ alone"]
        copies = seconds[f"{plain}: and the copies"] - alone
        beyond = max(seconds[f"{name}: mapped"] - seconds["copy"], 0.0)
        rest = all_of_it - alone - copies - beyond
        rows.append([name, all_of_it * 1e3, *(f"{part / all_of_it:.0%}" for part in (alone, copies, beyond, rest))])
    columns = ["", "ms a GB", "ZeroMQ and sockets", "copies", "data plane beyond its copy", "the rest"]
    return Section(f"Where the processor time of a batch goes, {where}", columns, rows)


def spread(ratio: Ratio) -> str:
    """The middle 80 % of the rounds."""
    return f"{cell(ratio.low)} to {cell(ratio.high)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--count", type=int, default=200, help="requests of one contender in a round (default %(default)s)"
    )
    parser.add_argument("--laps", type=int, default=8, help="of 4 MiB, in a round (default %(default)s)")
    parser.add_argument(
        "--part", choices=["latency", "rate", "asyncio", "bandwidth"], action="append", help="only this"
    )
    parser.add_argument("--out", type=Path, default=OUT / "requests.json")
    options = parser.parse_args()
    print(describe_machine(found := machine()))
    parts = options.part or ["latency", "rate", "asyncio", "bandwidth"]
    everywhere = os.sched_getaffinity(0)
    figures: dict[str, Figures] = {}
    sections: list[Section] = []
    for where, cores in (("one core", {min(everywhere)}), (f"{len(everywhere)} cores", everywhere)):
        os.sched_setaffinity(0, cores)
        judged = len(cores) == 1  # what was expected is of one core
        figures[where] = here = {}
        with scratch() as directory:
            if "latency" in parts:
                here["latency"] = one_at_a_time(options.rounds, options.count, directory)
                sections.append(latency_section(where, here["latency"], judged))
            if "rate" in parts:
                here["rate"] = many_at_once(options.rounds, 5 * options.count, directory)
                sections.append(rate_section(where, here["rate"]))
            if "asyncio" in parts:
                with echo(PAGE, copies=True) as (bare, _):
                    here["asyncio"] = beside(options.rounds, options.count, directory, bare)
                sections.append(beside_section(where, here["asyncio"]))
            if "bandwidth" in parts:
                here["bandwidth"] = found_here = bandwidth(options.rounds, options.laps, directory)
                sections += [bandwidth_section(where, found_here, judged), shares_section(where, found_here)]
    os.sched_setaffinity(0, everywhere)
    for section in sections:
        tell(section)
    write_json(options.out, (__doc__ or "").splitlines()[0], found, vars(options), figures, sections)


if __name__ == "__main__":
    main()
