"""What `lent.py` tells of its slices: figures for the record, and the sections that are printed and published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from _common import Plot, Ratio, Section, Verdict
from lent_machine import Slice

from gcma_shm.sizes import format_size

IDLE, LENT, CMA, BOUND = "idle", "lent", "CMA", "no reserve"
GUESTED = (IDLE, LENT, CMA)
Cell = tuple[float, float, float]  # share of the reserve, period, duty; NEVER: no guests
NEVER: Cell = (0.0, 0.0, 0.0)
Found = Mapping[Cell, Mapping[str, Sequence[Slice]]]


def figures(found: Found) -> dict[str, Any]:
    """Of one kind of work."""
    cells = [_cell(cell, found[cell]) for cell in sorted(found)]
    every = [one for by_name in found.values() for many in by_name.values() for one in many]
    return {
        "cells": cells,
        "waits": {name: waits([one for by_name in found.values() for one in by_name[name]]) for name in GUESTED},
        "failures": sum(one.failures for one in every),
        "mismatches": sum(one.done.mismatches + one.damaged for one in every),
        "pages_compared": sum(one.done.pages_loaded for one in every),
    }


def _cell(cell: Cell, slices: Mapping[str, Sequence[Slice]]) -> dict[str, Any]:
    """Rates in operations a second, ratios, waits in microseconds."""
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
        "no reserve/idle, undelayed": Ratio.of(calm[BOUND], calm[IDLE]),
        "lent/no reserve": Ratio.of(rates[LENT], rates[BOUND]),
        "waits": {name: waits(many) for name, many in slices.items()},
    }  # fmt: skip


def waits(slices: Sequence[Slice]) -> dict[str, float]:
    """Of guests for their buffers, in microseconds."""
    times = np.concatenate([np.asarray(one.latencies_us) for one in slices])
    if not times.size:
        return {}
    return {
        "count": times.size,
        "p50": float(np.median(times)),
        "p99": float(np.percentile(times, 99)),
        "worst": float(times.max()),
    }


def sections(results: Mapping[str, Any], plotted: bool) -> list[Section]:
    """Of all kinds of work."""
    told: list[Section] = []
    for kind, of in results.items():
        plots = [Plot("lent.svg", "Speed-up of a lent reserve over an idle one")] if plotted and not told else []
        told += [_speed(kind, of, plots), _waits(kind, of)]
    return told


def _speed(kind: str, of: Mapping[str, Any], plots: Sequence[Plot]) -> Section:
    rows = [
        [
            _words(one), f"{one['rates'][IDLE]:.0f}", f"{one['rates'][LENT]:.0f}", one["lent/idle"], one["lent/idle, undelayed"],
            one["CMA/idle"], one["lent/no reserve"], *(f"{one['hits'][name]:.0%}" for name in (IDLE, LENT, BOUND)),
        ]
        for one in of["cells"]
    ]  # fmt: skip
    return Section(
        f"{kind}: what the workers get done",
        ("guests hold", "idle, a second", "lent, a second", "lent / idle", "undelayed", "CMA / idle", "lent / no reserve", "in memory: idle", "lent", "no reserve"),
        rows,
        f"A reserve of {format_size(of['sizes']['reserve'])}, {format_size(of['sizes']['nursery'])} beside it, a page from the disk {of['disk_us']:.0f} µs. Operations of all workers (a record, a module);"
        " in memory: of the pages loaded. Undelayed: with the time left out in which workers were ready to run and others had the processors."
        f" {of['pages_compared']:,} pages were compared with what was stored.",
        [Verdict("pages that were wrong, buffers that were written to", 0, of["mismatches"])],
        plots,
    )  # fmt: skip


def _waits(kind: str, of: Mapping[str, Any]) -> Section:
    quantiles = ("p50", "p99", "worst")
    rows = [
        [_words(one), *(one["waits"][name][p] for name in GUESTED for p in quantiles[:2])]
        for one in of["cells"]
        if one["share"]
    ]
    every = [[name, int(of["waits"][name]["count"]), *(of["waits"][name][p] for p in quantiles)] for name in GUESTED]
    return Section(
        f"{kind}: how long guests wait for their buffers, µs",
        ("guests hold", *(f"{name} {p}" for name in GUESTED for p in quantiles[:2])),
        rows,
        "Of all: " + "; ".join(f"{name} {count:,} buffers, p50 {p50:.0f}, p99 {p99:.0f}, worst {worst:.0f}" for name, count, p50, p99, worst in every) + ".",
        [Verdict("allocations that failed", 0, of["failures"])],
    )  # fmt: skip


def _words(one: Mapping[str, Any]) -> str:
    """Of a cell."""
    if not one["share"]:
        return "never"
    return f"{one['share']:.0%} of it for {one['duty'] * one['period_s']:.3g} s every {one['period_s']:g} s ({one['duty']:.0%})"
