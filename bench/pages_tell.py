"""What `pages.py` compares and tells: its phases, its tables, and what was expected of the figures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from _common import Ratio, Section, Summary, Verdict
from report import cell

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

    def compared(self, of: str, other: Figures) -> Ratio:
        """Round by round."""
        return Ratio.of(self.rounds(of), other.rounds(of))


Found = Mapping[tuple[str, int, int], Mapping[str, Figures]]  # by phase, page size and number of processes


def told(phase: Phase) -> str:
    """Which figure of a round is told of it."""
    return "filed" if phase.sustained else "medians"


def section(phase: Phase, page_size: int, by_processes: Mapping[int, Mapping[str, Figures]], note: str) -> Section:
    """A phase with pages of one size: a row a contender, for each number of processes."""
    of = told(phase)
    columns = ["", "processes", "µs a page", "median batch", "p99 of a call", "processor", *(f"× {name}" for name in phase.against)]  # fmt: skip
    rows: list[list[object]] = [
        [
            name,
            processes,
            float(np.median(found.rounds(of))) / 1e3,
            float(np.median(found.batches)) / 1e3,
            float(np.percentile(found.singles, 99)) / 1e3 if found.singles else "-",
            float(np.median(found.cpu)) / 1e3,
            *(str(found.compared(of, figures[other])) for other in phase.against),
        ]
        for processes, figures in by_processes.items()
        for name, found in figures.items()
    ]
    counted = "µs a page: of the whole loop, until the file has it all. " if phase.sustained else ""
    return Section(f"{phase.name}, {format_size(page_size)}", columns, rows, counted + note)


def plain(phase: Phase, figures: Mapping[str, Figures]) -> dict[str, Any]:
    """For JSON: every round, but of batches and single calls only a summary."""
    return {
        name: {
            "rounds_ns": found.rounds(told(phase)),
            "batches": asdict(Summary.of(np.asarray(found.batches))),
            "single_p99_ns": float(np.percentile(found.singles, 99)) if found.singles else None,
            "cpu_ns": found.cpu,
            "broker_cpu_ns": found.broker_cpu,
        }
        for name, found in figures.items()
    }


@dataclass(frozen=True)
class Expectation:
    """A ratio of two contenders' times that was expected of a phase before it was measured: at most, or at least."""

    phase: str
    one: str
    other: str
    limit: float
    sizes: tuple[int, ...] = (4 << 10,)
    at_least: bool = False
    processes: int = 1
    of: tuple[str, ...] = ("medians",)


LARGE = (64 << 10, 1 << 20)
INTO, NEW, THROUGH, HAND, SUSTAINED = (PHASES[n].name for n in (0, 1, 2, 4, 5))
COPY, HANDY = "C memcpy to a random page", "store behind, page at hand"
BOTH = ("medians", "filed")
GET, PUT = "LMDB get", "LMDB put"
EXPECTED = (
    Expectation(INTO, "load_into", "C memcpy into a buffer", 1.15),
    Expectation(INTO, "load_many", "C memcpy into a buffer", 1.15),
    Expectation(NEW, "load", "C memcpy into new bytes", 1.3),
    Expectation(INTO, GET, "load_into", 1.5, at_least=True),
    Expectation(NEW, GET, "load", 1.5, at_least=True),
    Expectation(HAND, HANDY, COPY, 1.5),
    Expectation(HAND, PUT, HANDY, 3, at_least=True),
    Expectation(SUSTAINED, "store behind", COPY, 1.5, of=BOTH),
    Expectation(SUSTAINED, PUT, "store behind", 3, at_least=True, of=BOTH),
    Expectation(THROUGH, "store through", "C memcpy and pwrite", 1.2),
    Expectation(THROUGH, PUT, "store through", 1, at_least=True),
    Expectation(SUSTAINED, PUT, "store behind", 1.5, at_least=True, processes=2, of=("filed", "cpu")),
    Expectation(INTO, "load_into", "C memcpy into a buffer", 1.1, LARGE),
    Expectation(NEW, "load", "C memcpy into new bytes", 1.1, LARGE),
    Expectation(INTO, GET, "load_into", 1, LARGE, at_least=True),
    Expectation(NEW, GET, "load", 1, LARGE, at_least=True),
    Expectation(HAND, HANDY, COPY, 1.1, LARGE),
    Expectation(SUSTAINED, "store behind", COPY, 1.1, LARGE, of=BOTH),
    Expectation(SUSTAINED, PUT, "store behind", 1, LARGE, at_least=True, of=BOTH),
)
MEANING = {"medians": "", "filed": ", until the file has it all", "cpu": ", processor time"}


def expected(found: Found) -> Section:
    """Each expectation whose figures there are."""
    note = "Of times a page: medians of the rounds' ratios, beside the verdict their middle 80 %."
    return Section("What was expected", [], [], note, list(_verdicts(found)))


def _verdicts(found: Found) -> Iterator[Verdict]:
    for each in EXPECTED:
        for size, of in itertools.product(each.sizes, each.of):
            if figures := found.get((each.phase, size, each.processes)):
                ratio = figures[each.one].compared(of, figures[each.other])
                sustained = ", sustained" * (each.phase == SUSTAINED)
                many = f", {each.processes} processes" if each.processes > 1 else ""
                words = f"{each.one} / {each.other}{sustained}, {format_size(size)}{many}{MEANING[of]}"
                yield Verdict(
                    words, each.limit, ratio.median, each.at_least, f"{cell(ratio.low)} to {cell(ratio.high)}"
                )
