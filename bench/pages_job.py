"""What the contenders of `pages.py` are: ways to load or store pages, each with its own preparation outside the timing."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Which = npt.NDArray[np.int64]  # numbers of pages
PUT_BATCH = 64


@dataclass(frozen=True)
class Setup:
    """What the worker processes of one page size share."""

    page_size: int
    pages: int  # of the working set
    batch: int  # pages between two looks at the clock, and in a batch of those who have batches
    endpoint: str
    directory: Path
    library: Path  # the floors of _common.py
    own_library: Path  # and those of pages_floor.py
    memory: str  # path of the floor's mapping
    seed: int


class Contender(Protocol):
    """One way to do a job. `prepare` turns page numbers into what `run` takes, outside the timing."""

    single: bool  # whether its single calls are timed; C's would show the cost of getting there

    def renew(self, pages: int) -> None:
        """Before a block of so many pages."""

    def prepare(self, which: Which) -> Any:
        """For one batch."""

    def run(self, prepared: Any) -> None:
        """One batch."""


@dataclass
class Plain:
    """A contender made of functions."""

    prepare: Callable[[Which], Any]
    run: Callable[[Any], None]
    single: bool = True
    renew: Callable[[int], None] = field(default=lambda _pages: None)


def as_offsets(which: Which) -> Any:
    """Slots."""
    return which.tolist()


def as_keys(which: Which) -> Any:
    """Keys of a database."""
    return [struct.pack(">Q", n) for n in which.tolist()]


class Fresh:
    """Page numbers in random order, each once; then `reset` makes all places new."""

    def __init__(self, pages: int, reset: Callable[[], None]) -> None:
        self._pages = pages
        self._reset = reset
        self._rng = np.random.default_rng(1)
        self._left: Which = np.empty(0, np.int64)

    def renew(self, pages: int) -> None:
        """Sees to it that so many are left."""
        if self._left.size < min(pages, self._pages):
            self._reset()
            self._left = self._rng.permutation(self._pages)

    def next(self, count: int) -> Which:
        """The next ones."""
        taken, self._left = self._left[:count], self._left[count:]
        return taken
