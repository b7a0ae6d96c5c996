"""Ours as contenders of `peers.py`: a client that maps the arena, and one that sends its pages in messages."""

from __future__ import annotations

from contextlib import ExitStack

from peers_ways import Place, Way, Ways, Which

import gcma_shm

BEHIND, THROUGH = 0, 1  # swap types
SYNC_S = 60.0
PASSES_MAX = 8  # of loading all pages, until all are in memory


def offsets(which: Which) -> list[int]:
    """What our calls take."""
    found: list[int] = which.tolist()
    return found


class Ours:
    """Mapped: the data plane, without the broker."""

    LOAD, STORE, BEHIND_AND_SYNC = "ours, load", "ours, store behind", "ours, store behind and sync"

    def __init__(self, place: Place, stack: ExitStack) -> None:
        self._place = place
        self._client = stack.enter_context(gcma_shm.connect(place.endpoint, mapped=True, prefault=True))
        self._swap = self._client.swap(BEHIND, place.pages, write="behind")
        self._through = self._client.swap(THROUGH, place.pages, write="through")
        size, page = place.page_size, place.page
        out, many = bytearray(size), bytearray(size * place.batch)
        pages = page * place.batch
        swap, through = self._swap, self._through
        load_into, store, store_through = swap.load_into, swap.store, through.store
        add = Ways()
        add.load(self.LOAD, offsets, swap.load)
        add.load_into("ours, load_into", offsets, lambda n: load_into(n, out), out)
        add.store(self.STORE, offsets, lambda n: store(n, page))
        add.store("ours, store through", offsets, lambda n: store_through(n, page))
        add.load_many("ours, load_many", offsets, lambda ns: swap.load_many(ns, many), lambda ns: self._seen(ns, many))
        add.store_many("ours, store_many behind", offsets, lambda ns: swap.store_many(ns, pages))
        add.store_many("ours, store_many through", offsets, lambda ns: through.store_many(ns, pages))
        self.ways: dict[str, dict[str, Way]] = add.found

    def put(self, n: int, page: bytes) -> None:
        """To both types."""
        self._swap.store(n, page)
        self._through.store(n, page)

    def get(self, n: int) -> bytes | None:
        """Of the type that is written behind."""
        return self._swap.load(n)

    def get_through(self, n: int) -> bytes | None:
        """Of the other one."""
        return self._through.load(n)

    def sync(self) -> None:
        """Returns when all is in the spill files."""
        self._swap.sync(timeout=SYNC_S)

    def settle(self) -> None:
        """Sees to it that what is loaded from is in memory: a load brings back what was evicted."""
        for _ in range(PASSES_MAX):
            before = self._from_the_file()
            for n in range(self._place.pages):
                self._swap.load(n)
            if self._from_the_file() == before:
                return

    def _from_the_file(self) -> int:
        return int(self._client.stats()["clients"][str(self._client.number)]["hits_spill"])

    def _seen(self, ns: list[int], many: bytearray) -> list[bytes]:
        hits = self._swap.load_many(ns, many)
        assert all(hits)
        size = self._place.page_size
        return [bytes(many[i * size : (i + 1) * size]) for i in range(len(ns))]


class Messages:
    """Every page in a message, through the broker: what a client does that may not map the arena."""

    def __init__(self, place: Place, stack: ExitStack) -> None:
        client = stack.enter_context(gcma_shm.connect(place.endpoint, mapped=False))
        self._swap = swap = client.swap(BEHIND, place.pages, write="behind")
        size, page = place.page_size, place.page
        many, pages = bytearray(size * place.batch), page * place.batch

        def seen(ns: list[int]) -> list[bytes]:
            assert all(swap.load_many(ns, many))
            return [bytes(many[i * size : (i + 1) * size]) for i in range(len(ns))]

        add = Ways()
        add.load("ours by message, load", offsets, swap.load)
        add.store("ours by message, store", offsets, lambda n: swap.store(n, page))
        add.load_many("ours by message, load_many", offsets, lambda ns: swap.load_many(ns, many), seen)
        add.store_many("ours by message, store_many", offsets, lambda ns: swap.store_many(ns, pages))
        self.ways: dict[str, dict[str, Way]] = add.found

    def put(self, n: int, page: bytes) -> None:
        """See `Store.put`. It is `Ours`' type: filled twice."""
        self._swap.store(n, page)

    def get(self, n: int) -> bytes | None:
        """See `Store.get`."""
        return self._swap.load(n)
