"""What is a reserve worth that is lent to the cache? The same work on a machine that must keep N MiB for guests at any moment.

Contenders, with the same memory in all: an *idle* reserve, which serves nobody until a guest comes; a reserve *lent* to the cache, ours;
the same lent by *CMA*'s way, where half of a guest's pages must be written out first (cma.py); and *no reserve*: all is cache and no
guest comes, which is the upper bound. Guests take 50 or 90 % of the reserve, every so often, for a share of the time. All contenders
run side by side and take turns; a speed-up is of one turn. "Undelayed" is the speed-up with the time left out in which workers were ready
to run and other processes, the broker or a stranger, had the processors. Exit status 1 when an allocation fails or a page is wrong.

The pool works on records drawn by Zipf's law, the build compiles the standard library through the cache (lent_work.py). What the arena
does not hold is read from the disk (lent_machine.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from _common import OUT, describe_machine, scratch, tell, write_json
from _common import machine as this_machine
from lent_machine import Guests, Machine, Slice, dropped, machine, read_us
from lent_tell import BOUND, CMA, IDLE, LENT, NEVER, Cell, figures, sections
from lent_work import PAGE, Work, slots_of

from gcma_shm.sizes import format_size

MIB = 1 << 20
QUESTION = "What is a reserve worth that is lent to the cache, to the same work beside the same guests?"
WORKS = {  # data set, nursery, reserve: the build's data set is the standard library
    "pool": (96 * MIB, 8 * MIB, 48 * MIB),
    "build": (0, 2 * MIB, 12 * MIB),
}
RARE = (6.0, 0.02)  # period in seconds, share of the time: once a minute for a second, scaled down
PERIODS = (0.25, 1.0, 4.0)
DUTIES = (0.1, 0.3, 0.5, 0.7, 0.9)
SHARES = (0.5, 0.9)  # of the reserve that a guest takes
WARM_S = 1.0  # before what is measured, or a period if that is longer
ALONE_S = 8.0  # before what is measured without guests: the cache takes the reserve back only as it is read


def cells(options: argparse.Namespace) -> list[Cell]:
    """What guests do, from nothing upwards."""
    often = [(period, duty) for period in options.period for duty in options.duty]
    return [
        NEVER,
        *((share, period, duty) for share in SHARES for period, duty in ([RARE] if options.rare else []) + often),
    ]


def run(options: argparse.Namespace, kind: str, directory: Path) -> tuple[dict[Cell, dict[str, list[Slice]]], float]:
    """All cells of one kind of work, in an order of their own in each round; and what a page from the disk costs, in microseconds."""
    data, nursery, reserve = WORKS[kind]
    work = Work(kind, options.workers, data, options.write, options.seed, options.spill_io == "emulated")
    slots = slots_of(work)
    print(
        f"\n--- {kind}: {options.workers} workers, data of {format_size(slots * PAGE)}, a reserve of {format_size(reserve)} and "
        f"{format_size(nursery)} beside it, spill files {options.spill_io}",
        flush=True,
    )
    rng = np.random.default_rng(options.seed)
    found: dict[Cell, dict[str, list[Slice]]] = defaultdict(lambda: defaultdict(list))
    with ExitStack() as stack:
        stack.enter_context(dropped(directory) if options.spill_io == "emulated" else nullcontext())
        machines = {
            name: stack.enter_context(machine(name, work, slots, nursery, reserve, options.spill_io, directory))
            for name in (IDLE, LENT, CMA, BOUND)
        }
        for one in machines.values():
            one.run(None, 0.0, ALONE_S)
        todo = cells(options)
        for round_ in range(options.rounds):
            start = time.monotonic()
            for number in rng.permutation(len(todo)):
                take(options, todo[number], machines, found[todo[number]], reserve, rng)
            print(f"round {round_ + 1} of {options.rounds}: {time.monotonic() - start:.0f} s", flush=True)
        disk_us = read_us(directory)
    return found, disk_us


def take(
    options: argparse.Namespace,
    cell: Cell,
    machines: dict[str, Machine],
    found: dict[str, list[Slice]],
    reserve: int,
    rng: np.random.Generator,
) -> None:
    """One turn of each contender."""
    share, period, duty = cell
    guests = Guests(int(reserve * share) // PAGE * PAGE, period, duty, options.claims) if share else None
    seconds = max(round(options.seconds / period), 1) * period if guests else options.seconds
    for name in rng.permutation(list(machines)):
        comes = guests if name != BOUND else None
        warm_s = ALONE_S if guests is None else max(WARM_S, period)
        found[name].append(machines[name].run(comes, warm_s, seconds))


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison."""
    options = parse(argv)
    about = this_machine()
    print(describe_machine(about))
    results: dict[str, Any] = {}
    for kind in options.work:
        with scratch() as directory:
            found, disk_us = run(options, kind, directory)
        sizes = dict(zip(("data", "nursery", "reserve"), WORKS[kind], strict=True))
        results[kind] = figures(found) | {"sizes": sizes, "disk_us": disk_us}
    parts = sections(results, options.plots)
    for part in parts:
        tell(part)
    write_json(options.out, QUESTION, about, vars(options), results, parts)
    if options.plots:
        import plots

        plots.lent(options.out, plots.DOCS)
    return 1 if any(of["failures"] or of["mismatches"] for of in results.values()) else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", nargs="+", choices=WORKS, default=list(WORKS), metavar="KIND", help=", ".join(WORKS))
    add(
        "--spill-io",
        default="emulated",
        choices=("emulated", "direct", "uncached", "buffered"),
        help="buffered: not what this measures, as the page cache holds the whole file; default %(default)s",
    )
    add("--write", default="behind", choices=("behind", "through"), help="of the swap types (default %(default)s)")
    add("--claims", action="store_true", help="guests claim a reservation instead of allocating")
    add("--workers", type=int, default=2, metavar="N")
    add("--rounds", type=int, default=3, metavar="N")
    add(
        "--seconds",
        type=float,
        default=2.0,
        metavar="S",
        help="of a turn, at least, rounded to whole periods; before it as much or 1 s unmeasured (default %(default)s)",
    )
    add("--period", type=float, nargs="+", default=PERIODS, metavar="S", help="guests come every S seconds")
    add("--duty", type=float, nargs="+", default=DUTIES, metavar="SHARE", help="of the time that they stay")
    add("--rare", action=argparse.BooleanOptionalAction, default=True, help="also guests that come hardly ever")
    add("--plots", action="store_true", help="write docs/lent.svg; needs matplotlib")
    add("--seed", type=int, default=1, metavar="N")
    add("--out", type=Path, default=OUT / "lent.json", metavar="FILE")
    options = parser.parse_args(argv)
    if (
        options.rounds < 1
        or options.workers < 1
        or not all(0 < duty < 1 for duty in options.duty)
        or min(options.period) <= 0
    ):
        parser.error("--rounds and --workers: at least 1; --duty: between 0 and 1; --period: more than 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
