"""What `pages.py` compares and tells: its phases, its tables, and what was expected of the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from _common import Ratio, Summary, table

from gcma_shm.sizes import format_size


@dataclass(frozen=True)
class Phase:
    """A comparison: its contenders and what each is compared with."""

    name: str
    against: tuple[str, ...]  # columns of ratios
    contenders: tuple[str, ...]
    sustained: bool = False  # the nursery is wrapped many times, and the figure is of the whole loop
    at_hand: bool = False  # a block is short enough for the nursery to have a page at hand for each store


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
        ("C memcpy and pwrite", "os.pwrite", "LMDB put"),
        (
            "C memcpy to a random page", "C pwrite", "C memcpy and pwrite", "os.pwrite", "store through", "store_many through", "LMDB put",
            "LMDB put, batch",
        ),
    ),
    Phase(
        "store, written through, first",
        ("os.pwrite, first",),
        ("os.pwrite, first", "store through, first"),
    ),
    Phase(
        "store, written behind, page at hand",
        ("C memcpy to a random page", "LMDB put"),
        ("C memcpy to a random page", "memoryview[...] = page", "store behind, page at hand", "LMDB put"),
        at_hand=True,
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
    """What one contender came to in one phase: nanoseconds a page, one figure a round, but for `batches` and `singles`."""

    medians: list[float] = field(default_factory=list)  # of the batches
    wholes: list[float] = field(default_factory=list)  # of the loop
    filed: list[float] = field(default_factory=list)  # of the loop, and until the spill file has it all
    cpu: list[float] = field(default_factory=list)  # processor time of the workers and the broker, up to there
    broker_cpu: list[float] = field(default_factory=list)
    batches: list[float] = field(default_factory=list)
    singles: list[float] = field(default_factory=list)

    def rounds(self, of: str) -> list[float]:
        """One of the four by name."""
        found: list[float] = getattr(self, of)
        return found


def tell(phase: Phase, page_size: int, processes: int, figures: Mapping[str, Figures]) -> dict[str, Any]:
    """Prints the phase's table; returns it as figures."""
    of = "filed" if phase.sustained else "medians"
    head = [
        f"{phase.name}, {format_size(page_size)}, {processes} process{'es' if processes > 1 else ''}",
        "us a page" + (", in the file" if phase.sustained else ""),
        "median",
        "p99 (call)",
        "cpu us",
        *(f"x {name}" for name in phase.against),
    ]
    rows, results = [], {}
    for name, found in figures.items():
        summary = Summary.of(np.asarray(found.batches))
        p99 = float(np.percentile(found.singles, 99)) if found.singles else None
        ratios = {other: Ratio.of(found.rounds(of), figures[other].rounds(of)) for other in phase.against}
        figure, cpu = float(np.median(found.rounds(of))), float(np.median(found.cpu))
        rows.append(
            [
                name,
                figure / 1e3,
                summary.median / 1e3,
                p99 / 1e3 if p99 is not None else "-",
                cpu / 1e3,
                *(str(r) for r in ratios.values()),
            ]
        )
        results[name] = {
            "us_per_page": figure / 1e3,
            "batches": asdict(summary),
            "single_p99_ns": p99,
            "cpu_us_per_page": cpu / 1e3,
            "broker_cpu_us_per_page": float(np.median(found.broker_cpu)) / 1e3,
            "ratios": {other: asdict(ratio) for other, ratio in ratios.items()},
            "rounds_ns": found.rounds(of),
        }
    print("\n" + table(head, rows))
    return results


@dataclass(frozen=True)
class Expectation:
    """A ratio that was expected of a phase before it was measured."""

    phase: str
    ours: str
    theirs: str
    most: float
    sizes: tuple[int, ...] = (4 << 10,)
    processes: int = 1
    of: str = "medians"


LARGE = (64 << 10, 1 << 20)
INTO, NEW, THROUGH, HAND, SUSTAINED = (PHASES[n].name for n in (0, 1, 2, 4, 5))
COPY = "C memcpy to a random page"
EXPECTED = (
    Expectation(INTO, "load_into", "C memcpy into a buffer", 1.15),
    Expectation(INTO, "load_many", "C memcpy into a buffer", 1.15),
    Expectation(NEW, "load", "C memcpy into new bytes", 1.3),
    Expectation(INTO, "load_into", "LMDB get", 1 / 1.5),
    Expectation(NEW, "load", "LMDB get", 1 / 1.5),
    Expectation(HAND, "store behind, page at hand", COPY, 1.5),
    Expectation(HAND, "store behind, page at hand", "LMDB put", 1 / 3),
    Expectation(SUSTAINED, "store behind", COPY, 1.5),
    Expectation(SUSTAINED, "store behind", "LMDB put", 1 / 3),
    Expectation(THROUGH, "store through", "C memcpy and pwrite", 1.2),
    Expectation(THROUGH, "store through", "LMDB put", 1.0),
    Expectation(SUSTAINED, "store behind", "LMDB put", 1 / 1.5, processes=2, of="filed"),
    Expectation(SUSTAINED, "store behind", "LMDB put", 1 / 1.5, processes=2, of="cpu"),
    Expectation(INTO, "load_into", "C memcpy into a buffer", 1.1, LARGE),
    Expectation(NEW, "load", "C memcpy into new bytes", 1.1, LARGE),
    Expectation(INTO, "load_into", "LMDB get", 1.0, LARGE),
    Expectation(NEW, "load", "LMDB get", 1.0, LARGE),
    Expectation(HAND, "store behind, page at hand", COPY, 1.1, LARGE),
    Expectation(SUSTAINED, "store behind", COPY, 1.1, LARGE),
    Expectation(SUSTAINED, "store behind", "LMDB put", 1.0, LARGE),
)
MEANING = {"medians": "median", "filed": "in the file", "cpu": "processor time"}


def verdicts(found: Mapping[tuple[str, int, int], Mapping[str, Figures]]) -> list[dict[str, Any]]:
    """Each expectation whose figures there are, met or missed; prints them. Keys: phase, page size, processes."""
    results: list[dict[str, Any]] = []
    rows: list[Sequence[object]] = []
    for expected in EXPECTED:
        for size in expected.sizes:
            figures = found.get((expected.phase, size, expected.processes))
            if figures is None:
                continue
            ours, theirs = (figures[name].rounds(expected.of) for name in (expected.ours, expected.theirs))
            ratio = Ratio.of(ours, theirs)
            met = ratio.median <= expected.most
            rows.append(
                [
                    f"{expected.ours} / {expected.theirs}",
                    format_size(size),
                    expected.processes,
                    MEANING[expected.of],
                    f"{expected.most:.2f}",
                    str(ratio),
                    "met" if met else "MISSED",
                ]
            )
            results.append(asdict(expected) | {"size": size, "ratio": asdict(ratio), "met": met})
    if rows:
        print("\n" + table(["expected", "page", "processes", "of", "at most", "found", ""], rows))
    return results
