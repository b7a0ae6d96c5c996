"""What does one page cost? Load and store against the copy itself, the file, and LMDB.

All in one run, in turns: load and load_into with the working set in memory, a store written through, a store written behind while pages are
at hand, and sustained (the nursery wrapped many times, everything counted), each page by page and in batches, by one process and by two at
once. Each contender has a block of its own before the one that counts. What was expected is told as met or missed.
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from _common import OUT, Crew, Section, compile_floor, crew, describe_machine, machine, scratch, tell, write_json
from pages_floor import compile_own
from pages_job import PUT_BATCH, Setup
from pages_lmdb import open_lmdb
from pages_ours import BEHIND, THROUGH
from pages_tell import PHASES, Figures, Phase, expected, plain, section
from pages_worker import Block, make_worker

import gcma_shm
from gcma_shm.sizes import parse_size

PLACES = ("hits_nursery", "hits_area", "hits_spill", "hits_zero", "hits_filled", "misses")


def process_cpu_ns(pid: int) -> int:
    """What all threads of a process have run."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))


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

    def run(self, phase: Phase) -> tuple[dict[str, Any], dict[str, Figures]]:
        """All rounds of one phase."""
        Crew(self._team.connections[:1]).ask("fill", BEHIND if "behind" in phase.name else THROUGH)
        batches = self._batches(phase)
        figures = {name: Figures() for name in phase.contenders}
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
        return {
            "page_size": self._setup.page_size,
            "processes": self._processes,
            "phase": phase.name,
            "pages_per_block": batches * self._setup.batch * self._processes,
            "nursery_pages": self._nursery_pages,
            "places": places,
            "contenders": plain(phase, figures),
        }, figures

    def _batches(self, phase: Phase) -> int:
        pages: int = self._options.block_bytes // self._setup.page_size
        if phase.sustained:
            pages = max(-(-self._options.wraps * self._nursery_pages // self._processes), pages)
        elif (
            phase.at_hand
        ):  # a sweep stops when a quarter of the nursery is free, so an eighth and its warm-up find pages
            return max(self._nursery_pages // 8 // self._setup.batch // self._processes, 1)
        elif "first" in phase.name:
            pages = min(pages, self._setup.pages // 2)
        return max(-(-pages // self._setup.batch), 4)

    def _block(self, phase: Phase, name: str, batches: int, figures: Figures) -> None:
        warm = 0 if "first" in phase.name else batches // 8 if phase.sustained or phase.at_hand else batches
        pages = batches * self._setup.batch
        broker = process_cpu_ns(self._broker_pid)
        blocks: list[Block] = self._team.ask("block", name, batches, warm)
        sync = 0.0
        if phase.sustained and name.endswith("behind"):  # in its turn, or our writing would be at the next one's cost
            sync = max(self._team.ask("sync"))
        broker_cpu = (process_cpu_ns(self._broker_pid) - broker) / (batches + warm) / self._setup.batch
        figures.batches += [time for block in blocks for time in block.batches]
        figures.medians.append(float(np.median([time for block in blocks for time in block.batches])))
        figures.wholes.append(float(np.mean([block.whole for block in blocks])))
        figures.filed.append(max(block.whole for block in blocks) + sync / pages)
        figures.broker_cpu.append(broker_cpu / self._processes)
        figures.cpu.append(float(np.mean([block.cpu for block in blocks])) + broker_cpu / self._processes)


def _lay(setup: Setup) -> None:
    """The file and the database, in page-sized writes, as a spill file is laid."""
    page = os.urandom(setup.page_size)
    fd = os.open(setup.directory / "overwritten", os.O_RDWR | os.O_CREAT, 0o600)
    for n in range(setup.pages):
        os.pwrite(fd, page, n * setup.page_size)
    os.close(fd)
    with open_lmdb(setup) as env:
        for n in range(setup.pages):
            with env.begin(write=True) as txn:
                txn.put(struct.pack(">Q", n), page)


def by_place(result: dict[str, Any]) -> str:
    """Where the loads of a phase found their pages."""
    places, loads = result["places"], sum(result["places"].values())
    if not loads or not result["phase"].startswith("load"):
        return ""
    shares = [f"{place.removeprefix('hits_')} {n / loads:.1%}" for place, n in places.items() if n]
    return f"Our loads by place, {result['processes']} at once: {', '.join(shares)}. "


Found = dict[tuple[str, int, int], dict[str, Figures]]


def measure(
    options: argparse.Namespace, page_size: int, parent: Path, libraries: tuple[Path, Path], found: Found
) -> tuple[list[dict[str, Any]], list[Section]]:
    """Everything for one page size: a broker, a file, a database, a mapping of their own."""
    results: list[dict[str, Any]] = []
    phases = [phase for phase in PHASES if not options.phase or any(word in phase.name for word in options.phase)]
    pages = options.working_set // page_size
    batch = max(min(PUT_BATCH, (2 << 20) // page_size), 1)
    with ExitStack() as stack:
        directory = parent / f"pages-{page_size}"
        directory.mkdir()
        fd = os.memfd_create("gcma-bench-floor")
        stack.callback(os.close, fd)
        os.posix_fallocate(fd, 0, pages * page_size)
        client = stack.enter_context(
            gcma_shm.embedded(options.arena, page_size=page_size, slots=8 * pages, spill_dir=directory, prefault=True)
        )
        memory = f"/proc/{os.getpid()}/fd/{fd}"
        setup = Setup(page_size, pages, batch, client.endpoint, directory, *libraries, memory, options.seed)
        _lay(setup)
        for processes in options.processes:
            with crew(processes, make_worker, setup) as team:
                measurement = Measurement(options, client, client.broker_pid, team, setup)
                for phase in phases:
                    result, found[phase.name, page_size, processes] = measurement.run(phase)
                    results.append(result)
    sections = []
    for phase in phases:
        by_processes = {processes: found[phase.name, page_size, processes] for processes in options.processes}
        note = "".join(by_place(result) for result in results if result["phase"] == phase.name)
        sections.append(section(phase, page_size, by_processes, note.strip()))
        tell(sections[-1])
    return results, sections


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--page-size", type=parse_size, nargs="+", default=[4 << 10, 64 << 10, 1 << 20], metavar="SIZE")
    add("--processes", type=int, nargs="+", default=[1, 2], metavar="N", help="how many at once (default: 1 2)")
    add("--phase", nargs="+", metavar="WORD", help="only the comparisons whose name holds one of these words")
    add("--working-set", type=parse_size, default=80 << 20, metavar="SIZE")
    add("--arena", type=parse_size, default=224 << 20, metavar="SIZE", help="must hold the working set well")
    add("--rounds", type=int, default=15, metavar="N")
    add("--wraps", type=int, default=12, metavar="N", help="of the nursery, in a sustained block (default: 12)")
    add("--block-bytes", type=parse_size, default=16 << 20, metavar="SIZE", help="that a contender moves in its turn")
    add("--singles", type=int, default=8192, metavar="N", help="calls timed one by one (default: 8192)")
    add("--seed", type=int, default=1, metavar="N")
    add("--out", type=Path, default=OUT / "pages.json", metavar="FILE")
    options = parser.parse_args(argv)
    about = machine()
    print(describe_machine(about))
    results, found = [], Found()
    tables: list[Section] = []
    with scratch() as directory:
        libraries = compile_floor(directory), compile_own(directory)
        for page_size in options.page_size:
            of_size, sections = measure(options, page_size, directory, libraries, found)
            results += of_size
            tables += sections
    judged = expected(found)
    tell(judged)
    write_json(options.out, "What does one page cost?", about, vars(options), results, [judged, *tables])
    return 0


if __name__ == "__main__":
    sys.exit(main())
