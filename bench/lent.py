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
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from _common import OUT, Ratio, describe_machine, scratch, table, write_json
from _common import machine as this_machine
from lent_machine import Guests, Machine, Slice, dropped, machine, read_us
from lent_work import PAGE, Work, slots_of

from gcma_shm.sizes import format_size

MIB = 1 << 20
IDLE, LENT, CMA, BOUND = "idle", "lent", "CMA", "no reserve"
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
Cell = tuple[float, float, float]  # share of the reserve, period, duty; NEVER: no guests
NEVER: Cell = (0.0, 0.0, 0.0)


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


def tell(kind: str, found: dict[Cell, dict[str, list[Slice]]]) -> list[dict[str, Any]]:
    """Prints the tables of one kind of work; returns them as figures."""
    told = [figures(cell, found[cell]) for cell in sorted(found)]
    rows = [
        [
            words(one), f"{one['rates'][IDLE]:.0f}", f"{one['rates'][LENT]:.0f}", one["lent/idle"], one["lent/idle, undelayed"], one["CMA/idle"], one["lent/no reserve"],
            f"{one['hits'][IDLE]:.0%}", f"{one['hits'][LENT]:.0%}", f"{one['hits'][BOUND]:.0%}",
        ]
        for one in told
    ]  # fmt: skip
    head = (
        "guests hold",
        "idle /s",
        "lent /s",
        "lent / idle",
        "undelayed",
        "CMA / idle",
        "lent / no reserve",
        "hits: idle",
        "lent",
        "no reserve",
    )
    print(table(head, rows, f"\n{kind}: operations a second, and how many pages were in memory"))
    waits = [
        [words(one), *(one["waits"][name].get(p, "-") for name in (IDLE, LENT, CMA) for p in ("p50", "p99"))]
        for one in told
        if one["share"]
    ]
    columns = [f"{name} {p}" for name in (IDLE, LENT, CMA) for p in ("p50", "p99")]
    print(table(("guests hold", *columns), waits, f"\n{kind}: a guest's wait for its buffer, µs"))
    return told


def words(one: dict[str, Any]) -> str:
    """Of a cell."""
    if not one["share"]:
        return "never"
    return f"{one['share']:.0%} of it for {one['duty'] * one['period_s']:.3g} s every {one['period_s']:g} s ({one['duty']:.0%})"


def figures(cell: Cell, slices: dict[str, list[Slice]]) -> dict[str, Any]:
    """Of one cell: rates in operations a second, ratios, waits in microseconds."""
    rates = {name: [one.done.operations / one.done.seconds for one in many] for name, many in slices.items()}
    calm = {
        name: [one.done.operations / (one.done.seconds - one.done.delayed_s) for one in many]
        for name, many in slices.items()
    }
    pages = {name: [one.done.pages_loaded / one.done.seconds for one in many] for name, many in slices.items()}
    share, period, duty = cell
    return {
        "share": share, "period_s": period, "duty": duty,
        "rates": {name: float(np.median(many)) for name, many in rates.items()},
        "pages_loaded_a_second": {name: float(np.median(many)) for name, many in pages.items()},
        "hits": {name: float(np.median([one.hit_ratio for one in many])) for name, many in slices.items()},
        "lent/idle": Ratio.of(rates[LENT], rates[IDLE]),
        "CMA/idle": Ratio.of(rates[CMA], rates[IDLE]),
        "lent/idle, undelayed": Ratio.of(calm[LENT], calm[IDLE]),
        "lent/no reserve": Ratio.of(rates[LENT], rates[BOUND]),
        "waits": {name: waits(many) for name, many in slices.items()},
        "failures": {name: sum(one.failures for one in many) for name, many in slices.items()},
        "mismatches": sum(one.done.mismatches + one.damaged for many in slices.values() for one in many),
    }  # fmt: skip


def waits(slices: Sequence[Slice]) -> dict[str, float]:
    """Microseconds."""
    times = np.concatenate([np.asarray(one.latencies_us) for one in slices])
    if not times.size:
        return {}
    return {
        "count": times.size,
        "p50": float(np.median(times)),
        "p99": float(np.percentile(times, 99)),
        "worst": float(times.max()),
    }


def all_waits(found: dict[Cell, dict[str, list[Slice]]]) -> dict[str, dict[str, float]]:
    """Of all cells together."""
    return {name: waits([one for by_name in found.values() for one in by_name[name]]) for name in (IDLE, LENT, CMA)}


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison."""
    options = parse(argv)
    about = this_machine()
    print(describe_machine(about))
    results: dict[str, Any] = {}
    sound = True
    for kind in options.work:
        with scratch() as directory:
            found, disk_us = run(options, kind, directory)
        told = tell(kind, found)
        results[kind] = {
            "cells": told,
            "waits": all_waits(found),
            "sizes": dict(zip(("data", "nursery", "reserve"), WORKS[kind], strict=True)),
        }
        failures = sum(sum(one["failures"].values()) for one in told)
        mismatches = sum(one["mismatches"] for one in told)
        pages = sum(one.done.pages_loaded for by_name in found.values() for many in by_name.values() for one in many)
        together = ", ".join(
            f"{name} {of.get('count', 0)} buffers, p50 {of.get('p50', 0):.0f} µs, p99 {of.get('p99', 0):.0f}, worst {of.get('worst', 0):.0f}"
            for name, of in results[kind]["waits"].items()
        )
        print(
            f"\na page from the disk: {disk_us:.0f} µs; all guests: {together}\nfailures {failures}, of {pages:,} pages wrong {mismatches}",
            flush=True,
        )
        results[kind] |= {"failures": failures, "mismatches": mismatches, "pages_compared": pages, "disk_us": disk_us}
        sound = sound and not failures and not mismatches
    write_json(options.out, "What is a reserve worth that is lent to the cache?", about, vars(options), results)
    if options.plots:
        import plots

        plots.lent(options.out, plots.DOCS)
    return 0 if sound else 1


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
