"""Figures of a run: summaries of samples, ratios with their spread over rounds, a histogram of bounded size, what the clock itself costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float64]  # nanoseconds an operation


@dataclass
class Summary:
    """Nanoseconds an operation: `median` of batches (the clock's cost vanishes), `p99` and `worst` of single calls."""

    median: float
    p99: float
    worst: float
    samples: int

    @classmethod
    def of(cls, samples: Samples) -> Summary:
        """Of samples that were all taken alike."""
        return cls(float(np.median(samples)), float(np.percentile(samples, 99)), float(samples.max()), samples.size)


@dataclass
class Ratio:
    """One contender's time over another's, in each round: the median, and the middle 80 % of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        """Of the figures of each round, in order."""
        ratios = np.asarray(ours, float) / np.asarray(theirs, float)
        return cls(float(np.median(ratios)), float(np.percentile(ratios, 10)), float(np.percentile(ratios, 90)))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


class Histogram:
    """Times in buckets of 1.1 % width, so that any number of them takes the same memory."""

    PER_OCTAVE = 64
    BUCKETS = 48 * PER_OCTAVE

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(self.BUCKETS, np.int64)
        self.worst = 0.0

    def add(self, times_ns: npt.ArrayLike) -> None:
        """Counts many times at once."""
        times = np.maximum(np.asarray(times_ns, np.float64), 1.0)
        if times.size:
            buckets = np.minimum(np.log2(times) * self.PER_OCTAVE, self.BUCKETS - 1).astype(np.int64)
            self.counts += np.bincount(buckets, minlength=self.BUCKETS)
            self.worst = max(self.worst, float(times.max()))

    def merge(self, other: Histogram) -> None:
        """Adds what another one counted."""
        self.counts += other.counts
        self.worst = max(self.worst, other.worst)

    def percentile(self, percent: float) -> float:
        """Nanoseconds; 0.0 when nothing was counted."""
        total = int(self.counts.sum())
        if not total:
            return 0.0
        bucket = int(np.searchsorted(np.cumsum(self.counts), total * percent / 100))
        return min(float(2 ** ((bucket + 0.5) / self.PER_OCTAVE)), self.worst)

    def describe(self) -> dict[str, float]:
        """Microseconds: median, p99, p99.9, worst."""
        return {
            "count": int(self.counts.sum()),
            "median_us": self.percentile(50) / 1e3,
            "p99_us": self.percentile(99) / 1e3,
            "p99.9_us": self.percentile(99.9) / 1e3,
            "worst_us": self.worst / 1e3,
        }


def readings_ns(run: Callable[[Any], object], prepared: Iterable[Any]) -> list[int]:
    """The clock before the first batch, and after each."""
    clock = time.perf_counter_ns
    readings = [clock()]
    for one in prepared:
        run(one)
        readings.append(clock())
    return readings


def singles_ns(run: Callable[[Any], object], prepared: Iterable[Any], clock_ns: float) -> list[float]:
    """Nanoseconds of calls timed one by one, without the `clock_ns` that reading the clock costs."""
    clock, times = time.perf_counter_ns, []
    for one in prepared:
        start = clock()
        run(one)
        times.append(clock() - start - clock_ns)
    return times


def clock_cost_ns() -> float:
    """What two readings of the clock cost, to be taken off a single call's time."""
    clock = time.perf_counter_ns
    costs = []
    for _ in range(2001):
        start = clock()
        costs.append(clock() - start)
    return float(np.median(costs))
