"""What a contender of `peers.py` is: a store of pages, with its ways to load and to store them. No clock is read here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Which = npt.NDArray[np.int64]
LOAD, STORE, LOAD_MANY, STORE_MANY = "load", "store", "load in batches", "store in batches"
OPERATIONS = (LOAD, STORE, LOAD_MANY, STORE_MANY)


@dataclass(frozen=True)
class Place:
    """What the processes of one page size share."""

    page_size: int
    pages: int
    batch: int
    seed: int
    directory: Path  # on a disk
    endpoint: str  # of our broker
    sockets: dict[str, str]  # of the servers that run
    index: int = 0  # of this process; the first fills and proves

    @property
    def page(self) -> bytes:
        """What is stored while the clock runs. No two of its bytes' words are alike, so nobody can store it as less."""
        return np.random.default_rng(self.seed).bytes(self.page_size)

    def stamped(self, n: int) -> bytes:
        """What is stored at number n before."""
        return n.to_bytes(8, "little") + _tail(self.seed, self.page_size - 8)


@cache
def _tail(seed: int, size: int) -> bytes:
    return np.random.default_rng([seed, 1]).bytes(size)


@dataclass(frozen=True)
class Way:
    """One way to do an operation to the pages of `prepared`, which `prepare` made of their numbers outside of the timing."""

    prepare: Callable[[Which], Any]
    run: Callable[[Any], object]
    see: Callable[[Any], list[bytes]] | None = None  # of a way to load: what `run` would have got, for proof
    single: bool = True  # whether a single call's time says something


class Store(Protocol):
    """One place to keep pages in, as one process sees it."""

    def put(self, n: int, page: bytes) -> None:
        """For filling it, and for proof."""

    def get(self, n: int) -> bytes | None:
        """The same."""

    @property
    def ways(self) -> dict[str, dict[str, Way]]:
        """By operation and name. The first of an operation stands for the store in ratios."""


class NotHere(Exception):
    """It cannot be measured here; says why, and what would bring it."""


@dataclass
class Ways:
    """Builds a store's ways; what is done a page at a time runs in one plain loop, alike for all."""

    found: dict[str, dict[str, Way]] = field(default_factory=dict)

    def load(self, name: str, prepare: Callable[[Which], Any], get: Callable[[Any], Any]) -> None:
        """`get(key)` gives a page."""

        def run(keys: Iterable[Any]) -> None:
            for key in keys:
                get(key)

        self._add(LOAD, name, Way(prepare, run, lambda keys: [bytes(get(key)) for key in keys]))

    def load_into(
        self, name: str, prepare: Callable[[Which], Any], get: Callable[[Any], Any], out: bytearray | memoryview
    ) -> None:
        """`get(key)` puts a page into `out`."""

        def run(keys: Iterable[Any]) -> None:
            for key in keys:
                get(key)

        def see(keys: Iterable[Any]) -> list[bytes]:
            pages = []
            for key in keys:
                get(key)
                pages.append(bytes(out))
            return pages

        self._add(LOAD, name, Way(prepare, run, see))

    def store(self, name: str, prepare: Callable[[Which], Any], put: Callable[[Any], Any]) -> None:
        """`put(key)` stores the place's page there."""

        def run(keys: Iterable[Any]) -> None:
            for key in keys:
                put(key)

        self._add(STORE, name, Way(prepare, run))

    def load_many(
        self, name: str, prepare: Callable[[Which], Any], get: Callable[[Any], Any], see: Callable[[Any], Sequence[Any]]
    ) -> None:
        """`get(keys)` loads them all; `see(keys)` gives what it got, in order."""
        self._add(LOAD_MANY, name, Way(prepare, get, lambda keys: [bytes(page) for page in see(keys)]))

    def store_many(self, name: str, prepare: Callable[[Which], Any], put: Callable[[Any], Any]) -> None:
        """`put(prepared)` stores the place's page at all of them."""
        self._add(STORE_MANY, name, Way(prepare, put))

    def loop(
        self,
        operation: str,
        name: str,
        prepare: Callable[[Which], Any],
        run: Callable[[Any], Any],
        see: Callable[[Any], list[bytes]] | None,
    ) -> None:
        """`run(keys)` loops over them itself, elsewhere; so its single calls are not timed."""
        self._add(operation, name, Way(prepare, run, see, single=False))

    def _add(self, operation: str, name: str, way: Way) -> None:
        named = self.found.setdefault(operation, {})
        assert name not in named, name
        named[name] = way
