"""What `pools.py` times: a *job* is what a pool is asked to do; a *contender* is one pool, used in one way, that does it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from _common import Ratio

Array = npt.NDArray[np.float64]

EXCHANGE, FAN_OUT, WHOLE, SMALL, CHUNKS = "exchange", "fan-out", "fan-out, whole", "small", "chunks"
JOBS = (EXCHANGE, FAN_OUT, WHOLE, SMALL, CHUNKS)
CHUNK = 100  # tasks
SLOW = (
    (5.0, 2),
    (2.0, 4),
)  # a contender that takes longer than so many seconds does its job in so many of the rounds only
NAN = float("nan")


class NotHere(Exception):
    """A peer that is not installed, or does not start; the words say so."""


@dataclass(frozen=True)
class Given:
    """What all contenders work on."""

    array: Array
    tasks: int  # of a fan-out
    small: int  # tasks
    workers: int

    def fans(self) -> dict[str, list[tuple[int, int]]]:
        """The arguments of each task, beside the array, by job: which part of how many."""
        return {FAN_OUT: [(index, self.tasks) for index in range(self.tasks)], WHOLE: [(0, 1)] * self.tasks}

    def right(self, job: str, result: Any) -> bool:
        """Whether that is what the job should have come to."""
        if job == EXCHANGE:
            return isinstance(result, np.ndarray) and bool(np.array_equal(result, self.array * 2.0))
        if job == FAN_OUT:
            return len(result) == self.tasks and _close(
                result, [part.sum() for part in np.array_split(self.array, self.tasks)]
            )
        if job == WHOLE:
            return len(result) == self.tasks and _close(result, self.array.sum())
        return list(result) == [n * n for n in range(self.small)]


def _close(result: Any, expected: Any) -> bool:
    return bool(np.allclose(result, expected, rtol=1e-12, atol=0))


@dataclass
class Contender:
    """`run` does the job and gives what came back, `drop` gives that back; both are timed. `prepare` goes before, untimed."""

    name: str
    run: Callable[[], Any]
    drop: Callable[[], None] = lambda: None
    prepare: Callable[[], None] = lambda: None
    rounds_s: list[float] = field(default_factory=list)  # NaN: it took no part

    def time(self, right: Callable[[Any], bool]) -> float:
        """Seconds of one time. Raises AssertionError when what came back was wrong."""
        self.prepare()
        clock = time.perf_counter
        start = clock()
        result = self.run()
        took = clock() - start
        assert right(result), f"{self.name}: a wrong result"
        start = clock()
        del result
        self.drop()
        return took + clock() - start

    @property
    def median_s(self) -> float:
        """Of the rounds that it took part in."""
        return float(np.nanmedian(self.rounds_s))

    def over(self, other: Contender) -> Ratio:
        """This one's time over the other's, of the rounds in which both took part."""
        pairs = [
            (mine, its)
            for mine, its in zip(self.rounds_s, other.rounds_s, strict=True)
            if not math.isnan(mine) and not math.isnan(its)
        ]
        return Ratio.of(*zip(*pairs, strict=True))


def take_turns(contenders: Sequence[Contender], right: Callable[[Any], bool], rounds: int) -> None:
    """Each does its job once, untimed; then rounds, in a new order each time. A slow one does it in a few of them, evenly spread."""
    every = [_every(contender.time(right), rounds) for contender in contenders]
    rng = np.random.default_rng(1)
    for turn in range(rounds):
        for index in rng.permutation(len(contenders)):
            takes_part = turn % every[index] == every[index] - 1
            contenders[index].rounds_s.append(contenders[index].time(right) if takes_part else NAN)


def _every(seconds: float, rounds: int) -> int:
    return next((max(rounds // few, 1) for longer, few in SLOW if seconds > longer), 1)
