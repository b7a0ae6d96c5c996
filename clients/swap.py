"""Swap types as their users see them: one interface, two ways in.

`MappedSwap` does everything in shared memory and asks the broker only to end the type. `MessageSwap` sends every page
in a message. The difference shows in speed alone; one contract suite tests both.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex, cast

from gcma_shm import messages
from gcma_shm._core import Plane, Slots
from gcma_shm.clients.channel import Channel
from gcma_shm.clients.correspondence import Wanted
from gcma_shm.errors import Closed, GcmaError
from gcma_shm.messages import Frame, Reply

if TYPE_CHECKING:
    from gcma_shm.clients.aio_channel import AsyncChannel

Page = bytes | bytearray | memoryview
SYNC_MAX_S = 60.0  # of a sync by message; the broker waits no longer


class Swap(Protocol):
    """One life of a swap type: pages of `page_size` bytes in slots 0 to `slots` - 1. Safe across threads and fork."""

    @property
    def type(self) -> int:
        """The type's number."""

    @property
    def slots(self) -> int:
        """How many slots it has."""

    @property
    def page_size(self) -> int:
        """Bytes of a page."""

    @property
    def write_through(self) -> bool:
        """Whether a store returns only when the page is also in the spill file."""

    def store(self, offset: SupportsIndex, page: Any, /) -> None:
        """Stores a page, bytes-like and exactly `page_size` long, in place of what was there."""

    def sync(self, timeout: float | None = None) -> None:
        """Returns when all that was stored before is in the spill file. Raises SlotBusy, SpillError."""

    def load(self, offset: SupportsIndex, /) -> bytes | None:
        """The page as bytes; None when nothing is stored there."""

    def load_into(self, offset: SupportsIndex, buffer: Any, /) -> bool:
        """Copies the page into a writable buffer of `page_size` bytes; False when nothing is stored there."""

    def invalidate_page(self, offset: SupportsIndex, /) -> None:
        """Forgets what is stored there; no error when there is nothing."""

    def invalidate_area(self) -> None:
        """Ends the type's life with all of its pages; this handle is closed, `client.swap` declares the type anew."""

    def store_many(self, offsets: Iterable[SupportsIndex], pages: Any, /) -> None:
        """Stores pages from one contiguous buffer, in order; an error tells in `.done` how many were stored before
        it.
        """

    def load_many(self, offsets: Iterable[SupportsIndex], out: Any, /) -> list[bool]:
        """Loads pages into one contiguous buffer; returns the mask of hits."""

    def close(self) -> None:
        """Closes this handle; the type and its pages live on."""

    def __len__(self) -> int:
        """How many slots hold a page."""

    def __contains__(self, offset: object, /) -> bool:
        """Whether a page is stored there."""


class Owner(Protocol):
    """The client that a handle belongs to, and which lives as long as the handle."""

    _channel: Channel


class AsyncOwner(Protocol):
    """The same for a client that awaits."""

    _channel: AsyncChannel


class MappedSwap(Slots):
    """A swap type of a client that maps the arena."""

    def __init__(self, _plane: Plane, _type: int, _life: int, _timeout: float, owner: Owner) -> None:
        self._owner = owner  # the handle itself is made in `__new__`

    def invalidate_area(self) -> None:
        """Ends the type's life with all of its pages; this handle is closed. Raises Closed, BrokerUnavailable."""
        len(self)  # raises Closed for a handle that has ended, without a message
        self._owner._channel.request("invalidate_area", {"type": self.type, "life": self.life})
        self.close()

    def __repr__(self) -> str:
        return f"<swap type {self.type}: {self.slots} slots of {self.page_size} bytes, mapped>"


class MessagePages:
    """What pages by message have in common, whether their client blocks or awaits: what is checked before, and how a batch is laid out."""

    def __init__(self, owner: Owner | AsyncOwner, type_: int, life: int, slots: int, write_through: bool) -> None:
        self._owner = owner
        self.type = type_
        self.life = life
        self.slots = slots
        self.write_through = write_through
        self.page_size: int = owner._channel.greeting["page_size"]
        self._closed = False

    @property
    def batch(self) -> int:
        """How many pages the broker takes in one message."""
        return int(self._owner._channel.greeting["batch"])

    def close(self) -> None:
        """See `Swap.close`."""
        self._closed = True

    def _lay_out(self, pages: Frame, hits: list[bool], out: memoryview) -> None:
        """Puts the pages of the hits, which lie one after another, into their places."""
        size = self.page_size
        if len(pages) == len(out):
            out[:] = pages
            return
        places = (i for i, hit in enumerate(hits) if hit)
        for at, i in enumerate(places):
            out[i * size : (i + 1) * size] = pages[at * size : (at + 1) * size]

    def _split(self, offsets: list[int]) -> Iterator[tuple[int, int, bytes]]:
        """A batch of any length as the broker takes them: where each begins, how many pages, and their offsets, packed."""
        for first in range(0, len(offsets), self.batch):
            some = offsets[first : first + self.batch]
            yield first, len(some), messages.pack_offsets(some)

    def _offsets(self, offsets: Iterable[SupportsIndex]) -> list[int]:
        """Checked, all of them before the first page moves."""
        self._life()
        found = list(map(operator.index, offsets))
        wrong = next((n for n in (min(found, default=0), max(found, default=0)) if not 0 <= n < self.slots), None)
        if wrong is not None:
            raise IndexError(f"offset {wrong}: type {self.type} has slots 0 to {self.slots - 1}")
        return found

    def _life(self) -> dict[str, Any]:
        if self._closed:
            raise Closed(f"this handle on type {self.type} is closed")
        return {"type": self.type, "life": self.life}

    def _slot(self, offset: object) -> dict[str, Any]:
        n = operator.index(offset)  # type: ignore[arg-type] # raises TypeError for what is none
        found = self._life()
        if not 0 <= n < self.slots:
            raise IndexError(f"offset {n}: type {self.type} has slots 0 to {self.slots - 1}")
        found["offset"] = n
        return found

    def _pages(self, data: Any, pages: int, *, writable: bool = False) -> memoryview:
        view = memoryview(data)
        if writable and view.readonly:
            raise BufferError("the buffer is read-only")
        if not view.c_contiguous:
            raise BufferError("the buffer is not contiguous")
        if view.nbytes != pages * self.page_size:
            raise ValueError(
                f"{view.nbytes} bytes: expected {pages} page{'s' if pages != 1 else ''} of {self.page_size} bytes in one buffer"
            )
        return view.cast("B") if view.nbytes else view

    def _sync_parameters(self, timeout: float | None) -> tuple[dict[str, Any], float]:
        """Of the request, and how long the broker may take for it."""
        patience = SYNC_MAX_S if timeout is None else min(max(timeout, 0.0), SYNC_MAX_S)
        return self._life() | {"timeout_ms": int(patience * 1000)}, patience

    def __repr__(self) -> str:
        return f"<swap type {self.type}: {self.slots} slots of {self.page_size} bytes, by messages>"


class MessageSwap(MessagePages):
    """A swap type of a client that does not map the arena: every page travels in a message, those of a batch in long frames,
    several under way at once. Where a batch could hold one page only, it is faster page by page.
    """

    def __init__(self, owner: Owner, type_: int, life: int, slots: int, write_through: bool) -> None:
        super().__init__(owner, type_, life, slots, write_through)
        self._channel = owner._channel

    def store(self, offset: SupportsIndex, page: Page) -> None:
        """See `Swap.store`."""
        slot = self._slot(offset)
        whole = page if type(page) is bytes and len(page) == self.page_size else self._pages(page, 1)
        self._request("store", slot, (whole,))

    def load(self, offset: SupportsIndex) -> bytes | None:
        """See `Swap.load`."""
        reply = self._request("load", self._slot(offset))
        return bytes(reply.pages[0]) if reply.results["hit"] else None

    def load_into(self, offset: SupportsIndex, buffer: Any) -> bool:
        """See `Swap.load_into`."""
        slot = self._slot(offset)
        out = self._pages(buffer, 1, writable=True)
        reply = self._request("load", slot)
        if reply.results["hit"]:
            out[:] = reply.pages[0]
        return bool(reply.results["hit"])

    def invalidate_page(self, offset: SupportsIndex) -> None:
        """See `Swap.invalidate_page`."""
        self._request("invalidate_page", self._slot(offset))

    def invalidate_area(self) -> None:
        """See `Swap.invalidate_area`."""
        self._request("invalidate_area", self._life())
        self._closed = True

    def sync(self, timeout: float | None = None) -> None:
        """See `Swap.sync`. The broker waits for other processes' writes for a minute at the most."""
        parameters, patience = self._sync_parameters(timeout)
        self._channel.request("sync", parameters, patience=patience)

    def __len__(self) -> int:
        return int(self._request("count", self._life()).results["count"])

    def __bool__(self) -> bool:
        return True

    def __contains__(self, offset: object) -> bool:
        try:
            slot = self._slot(offset)
        except IndexError:
            return False
        return bool(self._request("contains", slot).results["contains"])

    def store_many(self, offsets: Iterable[SupportsIndex], pages: Page) -> None:
        """See `Swap.store_many`. The broker serves one session's requests in order."""
        wanted = self._offsets(offsets)
        source = self._pages(pages, len(wanted))
        size, life = self.page_size, self._life()
        if self.batch == 1:
            with counting() as done:
                for i, offset in enumerate(wanted):
                    self.store(offset, source[i * size : (i + 1) * size])
                    done.append(1)
            return
        batches = (
            ("store_many", life | {"offsets": packed}, (source[first * size : (first + count) * size],))
            for first, count, packed in self._split(wanted)
        )
        for _ in self._replies(batches, len(wanted)):
            pass

    def load_many(self, offsets: Iterable[SupportsIndex], out: Any) -> list[bool]:
        """See `Swap.load_many`."""
        wanted = self._offsets(offsets)
        target = self._pages(out, len(wanted), writable=True)
        life = self._life()
        if self.batch == 1:
            size = self.page_size
            with counting() as served:
                for i, offset in enumerate(wanted):
                    reply = self._request("load", self._slot(offset))
                    if reply.results["hit"]:
                        target[i * size : (i + 1) * size] = reply.pages[0]
                    served.append(bool(reply.results["hit"]))
            return served
        batches = (("load_many", life | {"offsets": packed}, ()) for _, _, packed in self._split(wanted))
        hits: list[bool] = []
        for reply in self._replies(batches, len(wanted)):
            first = len(hits)
            hits += map(bool, reply.results["hits"])
            if reply.pages:
                self._lay_out(reply.pages[0], hits[first:], target[first * self.page_size : len(hits) * self.page_size])
        return hits

    def _replies(self, batches: Iterable[Wanted], pages: int) -> Iterator[Reply]:
        """The replies in order. The first error is raised when all replies are in, so that none is left over; it tells
        how many pages were served before.
        """
        done, batch = 0, self.batch
        first: Exception | None = None
        try:
            for reply in self._channel.requests(batches, messages.BATCHES):
                if isinstance(reply, Exception):
                    if first is None:
                        first = reply
                        done += getattr(reply, "done", 0)
                elif first is None:
                    done = min(done + batch, pages)
                    yield reply
        except GcmaError as error:  # no answer, say
            first = first or error
        if first is not None:
            first.done = done  # type: ignore[attr-defined] # plain errors take the attribute as well
            raise first

    def _request(self, operation: str, parameters: dict[str, Any], pages: Sequence[Frame] = ()) -> Reply:
        return cast(Reply, self._channel.request(operation, parameters, pages))


@contextlib.contextmanager
def counting() -> Iterator[list[Any]]:
    """A list with one item for each page that was served: the error that ends a batch page by page tells how many."""
    done: list[Any] = []
    try:
        yield done
    except Exception as error:
        error.done = len(done)  # type: ignore[attr-defined] # plain errors take the attribute as well
        raise
