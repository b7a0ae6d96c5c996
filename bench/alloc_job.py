"""What `alloc.py` times: a *job* is one way to get contiguous memory; a *sample* is one time that it was done."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

PAUSE_S = 0.002
NAN = float("nan")
POINTS = np.concatenate([np.linspace(0, 90, 46), np.linspace(91, 99, 9), np.linspace(99.1, 100, 10)])  # of a CDF


@dataclass(frozen=True)
class Sample:
    """Nanoseconds from the request: to the address, and to the last page's first byte written (NaN: not a thing here)."""

    hand_over: float
    usable: float = NAN
    lent: float = NAN  # share of the area that the cache had just before


class Job(ABC):
    """One contender. Does every size in every round, unless it says otherwise."""

    name: str

    def takes(self, nbytes: int, turn: int) -> bool:  # noqa: ARG002 - for those that say otherwise
        """Whether it does this size in this round."""
        return True

    @abstractmethod
    def ready(self, nbytes: int) -> AbstractContextManager[Callable[[], Sample]]:
        """Prepares one sample, and clears up after it; what it gives does it. Both may raise GcmaError or OSError."""


@dataclass
class Samples:
    """Of one job, size and setting: one entry a round, NaN where there is none, so that rounds can be compared."""

    hand_over: list[float] = field(default_factory=list)
    usable: list[float] = field(default_factory=list)
    lent: list[float] = field(default_factory=list)
    failures: int = 0

    def add(self, sample: Sample) -> None:
        """Of the next round."""
        self.hand_over.append(sample.hand_over)
        self.usable.append(sample.usable)
        self.lent.append(sample.lent)


Taken = dict[int, dict[str, Samples]]  # by size, by job


def run(job: Job, nbytes: int) -> Sample:
    """One sample, after a pause, so that nobody profits from what was done just before."""
    with job.ready(nbytes) as act:
        time.sleep(PAUSE_S)
        return act()


def finite(values: list[float]) -> npt.NDArray[np.float64]:
    """Those that were measured."""
    array = np.asarray(values, np.float64)
    return array[np.isfinite(array)]


def figures(values: list[float]) -> dict[str, float] | None:
    """Nanoseconds: median, p99, p99.9, worst, and how many samples they are of; None: there are none."""
    measured = finite(values)
    if not measured.size:
        return None
    median, p99, p999 = (float(value) for value in np.percentile(measured, (50, 99, 99.9)))
    return {"samples": measured.size, "median": median, "p99": p99, "p99.9": p999, "worst": float(measured.max())}


def curve(values: list[float]) -> list[float]:
    """The samples at each of POINTS per cent, for a plot."""
    measured = finite(values)
    return [round(float(value)) for value in np.percentile(measured, POINTS)] if measured.size else []


def times_slower(theirs: list[float], ours: list[float]) -> tuple[float, float, float] | None:
    """Theirs over ours, round by round: the median and the middle 80 %; None: never measured in one round."""
    both = np.asarray(theirs, np.float64)[: len(ours)] / np.asarray(ours, np.float64)[: len(theirs)]
    both = both[np.isfinite(both)]
    if not both.size:
        return None
    low, median, high = (float(value) for value in np.percentile(both, (10, 50, 90)))
    return median, low, high
