"""What does a contiguous buffer cost? The latency of contiguous allocation, as in the GCMA paper: ours against CMA's way and Python's peers.

Compared sample by sample, in turns, while workers store and load at full speed and the areas are lent out:
  alloc_contig   a request to the broker, from an area that is lent; also with a fresh client whose page table is empty ("no prefault")
                 walking through the area, so that all of it is lent; "placed": where the broker chooses
  claim          of a reservation that is lent
  idle           alloc_contig from an area that lends nothing (cache=off): what lending costs
  CMA            dirty pages of the range are written out first (bench/cma.py says how, and where it favours CMA)
  SharedMemory, posix-ipc   a new object a buffer
  plasma         an object in a store full of 4 KiB objects (--plasma)
  echo           a bare ZeroMQ round trip of the same messages
Each comes after a pause of 2 ms, with caches as cold as the workers leave them; "warm": right after some others of its kind.
Two latencies are told apart: hand-over (request to address), and usable (the first byte of every 4 KiB written). Twice: with as many workers as
cores, and with one core left free. Then the sweep by itself.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import alloc_job
import numpy as np
from _common import OUT, Floor, Plot, compile_floor, describe_machine, machine, scratch, write_json
from alloc_job import NAN, Job, Sample, Samples, Taken
from alloc_ours import IDLE_AREA, Allocate, Claim, Stage, stage
from alloc_peers import PosixIpc, Shm
from alloc_tell import OURS, judge, section, tell
from cma import RUN, RUN_MAX, Cma
from echo import Echo, Transport
from plasma import NoPlasma, Plasma
from sweep import sweep

import gcma_shm
from gcma_shm.sizes import format_size, parse_size

KERNEL_PAGES = [1, 512, 1024, 2048, 4096, 8192, 16384, 32000]  # as in the evaluation of GCMA's kernel patches
SIZES = sorted([pages * 4096 for pages in KERNEL_PAGES] + [64 << 10, 256 << 10, 1 << 20, 256 << 20])
PLASMA_SIZES = [2 << 20, 64 << 20]
JOBS = ("alloc", "fresh", "claim", "idle", "cma", "shm", "posix", "echo", "plasma")
PLOTS = Path(__file__).parent.parent / "docs"
PLOTS_SHOWN = (Plot("alloc-cdf.svg", "Distribution at 64 MiB"), Plot("alloc-size.svg", "Median and p99 by size"))
ERRORS_TOLD_MAX = 20


def make_jobs(options: argparse.Namespace, at: Stage, directory: Path, library: Path, stack: ExitStack) -> list[Job]:
    """Those that were asked for."""
    choices: list[tuple[set[str], Callable[[], Iterable[Job]]]] = [
        ({"alloc"}, lambda: [Allocate(OURS, at, "alloc")]),
        ({"alloc"}, lambda: [Allocate(f"{OURS}, placed", at, "alloc", placed=True)]),
        ({"alloc", "fresh"}, lambda: [Allocate(f"{OURS}, no prefault", at, "alloc", prefault=False)]),
        ({"claim"}, lambda: [Claim("claim", at)]),
        ({"claim", "echo"}, lambda: [Claim("claim, warm", at, warm=True)]),
        ({"claim", "fresh"}, lambda: [Claim("claim, no prefault", at, prefault=False)]),
        ({"idle"}, lambda: [Allocate("idle", at, IDLE_AREA)]),
        ({"idle", "fresh"}, lambda: [Allocate("idle, no prefault", at, IDLE_AREA, prefault=False)]),
        ({"cma"}, lambda: cma_jobs(options, at, directory, stack)),
        ({"shm"}, lambda: [Shm(at.floor)]),
        ({"posix"}, lambda: [PosixIpc(at.floor)]),
        ({"echo"}, lambda: echo_jobs(Transport(stack, directory))),
        ({"alloc", "echo"}, lambda: [Allocate(f"{OURS}, warm", at, "alloc", warm=True)]),
        ({"plasma"}, lambda: plasma_jobs(options, library, stack)),
    ]
    return [job for needed, make in choices if needed <= set(options.jobs) for job in make()]


def cma_jobs(options: argparse.Namespace, at: Stage, directory: Path, stack: ExitStack) -> list[Job]:
    """Both ways of writing, for each share of dirty pages."""
    ways = [(share, direct) for share in options.cma_dirty for direct in (True, False)]
    return [Cma(at, directory, stack, share, direct, options.cma_run, options.seed) for share, direct in ways]


def echo_jobs(transport: Transport) -> list[Job]:
    """After a pause, and after other messages."""
    return [Echo("echo", transport, warm=False), Echo("echo, warm", transport, warm=True)]


def plasma_jobs(options: argparse.Namespace, library: Path, stack: ExitStack) -> list[Job]:
    """One, or none with the reason printed."""
    try:
        if not options.plasma:
            raise NoPlasma("it needs --plasma")
        return [Plasma(options.plasma_size, options.plasma_every, library, stack)]
    except NoPlasma as reason:
        print(f"plasma is left out: {reason}", file=sys.stderr, flush=True)
        return []


def run(options: argparse.Namespace, workers: int, directory: Path, library: Path) -> Taken:
    """All samples of one setting; what takes turns is in a new order each time."""
    with ExitStack() as stack:
        at = stack.enter_context(stage(max(options.size), workers, directory, Floor(library), options.seed))
        jobs = make_jobs(options, at, directory, library, stack)
        taken: Taken = {
            nbytes: {job.name: Samples() for job in jobs if any(job.takes(nbytes, turn) for turn in range(options.rounds))}
            for nbytes in options.size
        }  # fmt: skip
        rng = np.random.default_rng(options.seed)
        for turn in range(options.rounds):
            for size_index in rng.permutation(len(options.size)):
                nbytes = options.size[size_index]
                for job_index in rng.permutation(len(jobs)):
                    if jobs[job_index].name in taken[nbytes]:
                        _sample(jobs[job_index], nbytes, turn, taken[nbytes][jobs[job_index].name])
        return taken


def _sample(job: Job, nbytes: int, turn: int, samples: Samples) -> None:
    sample = Sample(NAN)
    if job.takes(nbytes, turn):
        try:
            sample = alloc_job.run(job, nbytes)
        except (gcma_shm.GcmaError, OSError) as error:
            samples.failures += 1
            if samples.failures <= ERRORS_TOLD_MAX:
                print(f"{job.name} of {format_size(nbytes)} failed: {error}", file=sys.stderr, flush=True)
    samples.add(sample)


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison; returns the exit status: 1 when an allocation of ours failed."""
    options = parse(argv)
    found = machine()
    print(describe_machine(found))
    results: dict[str, Any] = {"settings": []}
    sections = []
    failures = 0
    with scratch() as directory:
        library = compile_floor(directory)
        results["sweep"] = swept = sweep(max(options.rounds, 20), directory, Floor(library))
        for workers in options.workers:
            setting = f"{workers} worker{'s' * (workers != 1)} on {found['cores']} cores"
            print(f"\n--- {setting}", flush=True)
            taken = run(options, workers, directory, library)
            sizes = tell(setting, taken)
            verdicts = judge(setting, taken, swept)
            results["settings"].append(
                {"setting": setting, "workers": workers, "sizes": sizes, "expected": [asdict(v) for v in verdicts]}
            )
            plots_shown = PLOTS_SHOWN if workers == options.workers[-1] else ()
            sections.append(section(setting, sizes, verdicts, plots_shown))
            ours = [samples for jobs in taken.values() for name, samples in jobs.items() if name.startswith((OURS, "claim", "idle"))]  # fmt: skip
            failures += sum(samples.failures for samples in ours)
    write_json(options.out, "What does a contiguous buffer cost?", found, vars(options), results, sections)
    if options.plots:
        import plots

        plots.alloc(options.out, PLOTS)
    return 1 if failures else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", type=parse_size, nargs="+", default=SIZES, metavar="SIZE", help="default: the kernel's, and 64K to 256M; the arena is four times the largest")  # fmt: skip
    add("--pages", type=int, nargs="+", metavar="N", help="sizes in pages of 4 KiB, in place of --size")
    add("--workers", type=int, nargs="+", default=sorted({cores, max(cores - 1, 0)}, reverse=True), metavar="N", help="settings: so many workers at full speed; 0: the parent fills the areas; default: as many as cores, and one fewer")  # fmt: skip
    add("--rounds", type=int, default=20, metavar="N", help="samples of each job, size and setting; p99.9 needs a thousand")  # fmt: skip
    add("--jobs", nargs="+", choices=JOBS, default=list(JOBS), metavar="JOB", help=", ".join(JOBS))
    add("--cma-dirty", type=float, nargs="+", default=[0.5], metavar="SHARE", help="of a range's pages, that are dirty")
    add("--cma-run", type=int, default=RUN, metavar="PAGES", help="written to consecutive places of the file at once")
    add("--plasma", action="store_true", help="compare with plasma; installs pyarrow 11 in ~/.cache/gcma-bench")
    add("--plasma-size", type=parse_size, nargs="+", default=PLASMA_SIZES, metavar="SIZE", help="default: 2M 64M")
    add("--plasma-every", type=int, default=1, metavar="ROUNDS", help="its store takes a second or more to fill again")
    add("--plots", action="store_true", help="write docs/alloc-cdf.svg and docs/alloc-size.svg; needs matplotlib")
    add("--seed", type=int, default=1, metavar="N")
    add("--out", type=Path, default=OUT / "alloc.json", metavar="FILE")
    options = parser.parse_args(argv)
    if options.pages:
        options.size = [pages * 4096 for pages in options.pages]
    options.size = sorted(set(options.size))
    if options.rounds < 1 or min(options.workers) < 0 or options.plasma_every < 1 or min(options.size) < 1:
        parser.error("sizes, rounds and --plasma-every must be at least 1, workers not less than 0")
    if not 1 <= options.cma_run <= RUN_MAX or not all(0 <= share <= 1 for share in options.cma_dirty):
        parser.error(f"--cma-run: 1 to {RUN_MAX} pages; --cma-dirty: 0 to 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
