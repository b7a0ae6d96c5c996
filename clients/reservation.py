"""Reservations in a worker's hands: claimed and lent again in shared memory, without a message."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from gcma_shm import layout
from gcma_shm._core import Plane, Span
from gcma_shm.clients.buffer import Buffer
from gcma_shm.clients.channel import Channel
from gcma_shm.clients.handles import Ticket, load_reservation
from gcma_shm.errors import ArenaExhausted, BrokerUnavailable, StaleHandle
from gcma_shm.layout import CLAIM_CLIENT, CLAIM_GENERATION_SHIFT
from gcma_shm.process import has_ended

if TYPE_CHECKING:
    from gcma_shm.clients.client import Client

COPY_S = 0.002  # a page's copy takes a thousandth of that; what takes longer is looked into
NAP_MIN_S, NAP_MAX_S = 0.00005, 0.001


@dataclass
class Claimed:
    """A claim of this process."""

    word: int
    first: int
    pages: int
    span: weakref.ref[Span]

    @property
    def generation(self) -> int:
        """Of the claim."""
        return self.word >> CLAIM_GENERATION_SHIFT


class Claims:
    """What one client has claimed. `channel`: for the end of a claim that several processes share."""

    def __init__(self, plane: Plane, channel: Channel) -> None:
        self._plane = plane
        self._channel = channel
        self.live: dict[int, Claimed] = {}  # by number
        channel.claims = self.live
        self._given_up: deque[tuple[int, int]] = deque()
        self.lock = threading.Lock()

    def reset(self) -> None:
        """In a forked child: what the parent had claimed is shared with it."""
        self.lock = threading.Lock()

    def share(self) -> None:
        """Before a fork, with the lock held: from now on none of us lends these ranges by itself."""
        for number, claimed in self.live.items():
            self._plane.share_claim(number & layout.ALLOCATIONS_MAX, claimed.word)

    def claim(self, number: int, first: int, pages: int, timeout: float) -> tuple[Span, Claimed] | int:
        """The memory of a reservation; or the number of the client that has claimed it.

        Raises StaleHandle; BrokerUnavailable when a broker that is stopped in its copy of a page does not go on in time.
        """
        try:
            with self.lock:
                return self._claim(number, first, pages, timeout)
        finally:
            self.drain()

    def _claim(self, number: int, first: int, pages: int, timeout: float) -> tuple[Span, Claimed] | int:
        index = number & layout.ALLOCATIONS_MAX
        state = number >> layout.INDEX_BITS << layout.KIND_BITS | layout.RESERVATION
        self._lend_given_up()
        made, word = self._plane.claim(index, state)
        if not word:
            raise StaleHandle("this reservation was released, or its arena's broker took this process for dead")
        if not made and word & CLAIM_CLIENT == layout.BROKER and self._broker_has_ended():
            word = self._plane.seize(index, word)  # it died with the range in its hands
            made = bool(word)
        if not made:
            return word & CLAIM_CLIENT
        try:
            self._settle(first, pages, timeout)
            span = self._plane.span(first, pages * self._plane.page_size)
            claimed = self.live[number] = Claimed(word, first, pages, weakref.ref(span))
        except BaseException:
            self.live.pop(number, None)
            self._plane.unclaim(index, word, first, pages)
            raise
        return span, claimed

    def end(self, number: int, generation: int) -> None:
        """Lends a claimed range again, and waits for nobody. For finalizers, too: another thread may hold the lock, or this one
        where it was interrupted; then whoever holds it does this last.
        """
        self._given_up.append((number, generation))
        self.drain()

    def drain(self) -> None:
        """Lends what was given up while the lock was held."""
        while self._given_up and self.lock.acquire(blocking=False):
            try:
                self._lend_given_up()
            finally:
                self.lock.release()

    def _lend_given_up(self) -> None:
        while self._given_up:
            number, generation = self._given_up.popleft()
            claimed = self.live.get(number)
            if claimed is None or claimed.generation != generation:
                continue
            lent = self._plane.unclaim(number & layout.ALLOCATIONS_MAX, claimed.word, claimed.first, claimed.pages)
            del self.live[number]
            if not lent:
                self._channel.give_up(number, generation, 0)

    def _settle(self, first: int, pages: int, timeout: float) -> None:
        if self._plane.claim_settled(first, pages, COPY_S):
            return
        deadline = time.monotonic() + timeout
        while not self._broker_has_ended():  # a dead one's copy never goes on
            if self._plane.claim_settled(first, pages, 10 * COPY_S):
                return
            if time.monotonic() >= deadline:
                raise BrokerUnavailable(
                    f"the broker has been copying one page into this reservation for {timeout:g} s: is it stopped?"
                )

    def _broker_has_ended(self) -> bool:
        return has_ended(self._plane.read(layout.BROKER_PID_AT), self._plane.read(layout.BROKER_START_AT))


class Reservation:
    """A buffer promised in advance, at a place that does not change; lent to the cache until it is claimed.

    Made by `Client.reserve`. Safe across threads. A forked child holds it too, from the instant of the fork. Pickled and loaded
    in another process of the arena, that process holds it as well: several may claim it in turn, one at a time. One that
    nothing refers to any more is released.
    """

    def __init__(self, client: Client, place: dict[str, Any]) -> None:
        self._client = client
        self._claims = cast(Claims, client._claims)
        self._number = int(place["buffer"])
        self._first = int(place["first"])
        self._pages = int(place["nbytes"]) // client.page_size
        #: Bytes, whole pages.
        self.nbytes: int = place["nbytes"]
        #: The area's name.
        self.area: str = place["area"]
        #: Pages from the area's start.
        self.offset: int = place["offset"]
        #: The name that it was made with, or None.
        self.name: str | None = place.get("name")
        self._buffers: weakref.WeakSet[Buffer] = weakref.WeakSet()
        self._open = True
        self._give_up = weakref.finalize(self, client._give_up, self._number, 0)
        self._give_up.atexit = False  # the broker sees the process end

    def claim(self, timeout: float | None = 0) -> Buffer:
        """The buffer: in microseconds, without a message, whatever the cache, the clients and the broker do.

        It cannot fail for who holds the reservation alone. While another holder has it claimed, waits up to `timeout` seconds
        (None: for ever), then raises ArenaExhausted, whose `holders` tells who. Raises StaleHandle after `release`; and
        BrokerUnavailable when the broker is stopped in the middle of its copy of one page and does not go on in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        nap = NAP_MIN_S
        while True:
            if self.released:
                raise StaleHandle("this reservation was released")
            got = self._claims.claim(self._number, self._first, self._pages, self._client._channel.timeout)
            if not isinstance(got, int):
                return self._buffer(*got)
            waited_for_broker = got == layout.BROKER and deadline is not None and timeout is not None
            if (
                waited_for_broker
            ):  # cleaning up after a dead claimer: bounded, and not what the caller's timeout is about
                deadline = max(deadline or 0, time.monotonic() + NAP_MAX_S)
            if deadline is not None and time.monotonic() >= deadline:
                raise ArenaExhausted(
                    f"this reservation of {self.nbytes} bytes in {self.area!r} is claimed by client {got}; it is had in turn: wait with "
                    "timeout=, or reserve another",
                    self.nbytes,
                    0,
                    {got: self.nbytes},
                )
            time.sleep(nap)
            nap = min(2 * nap, NAP_MAX_S)

    def _buffer(self, span: Span, claimed: Claimed) -> Buffer:
        client, number = self._client, self._number
        # The span keeps the reservation: an array that outlives its Buffer keeps the memory.
        give_up = weakref.finalize(span, _end, self, claimed.generation)
        give_up.atexit = False

        def free() -> None:
            give_up.detach()
            self._claims.end(number, claimed.generation)

        place = {"area": self.area, "offset": self.offset, "name": self.name}
        buffer = Buffer(span, place, client, number, free, claimed.generation)
        self._buffers.add(buffer)
        return buffer

    def release(self) -> None:
        """Gives the promise back; a second time has no effect. The memory is free when its last holder has released it.

        Raises BufferError while a view or array of a buffer claimed from it is alive; other claimed buffers are freed.
        """
        if self.released:
            return
        for buffer in list(self._buffers):
            buffer.free()
        claimed = self._claims.live.get(self._number)
        span = claimed.span() if claimed is not None else None
        if span is not None and span.exports:
            raise BufferError(
                f"reservation of {self.nbytes} bytes in {self.area!r} cannot be released: {span.exports} arrays of its memory are alive"
            )
        self._open = False
        self._give_up.detach()
        self._client._channel.free(self._number)

    @property
    def released(self) -> bool:
        """Whether `release` was called, or the client closed."""
        return not self._open or self._client.closed

    def __reduce__(self) -> tuple[object, ...]:
        if self.released:
            raise StaleHandle("this reservation was released")
        return load_reservation, (Ticket(self._client.endpoint, self._client.arena_id, self._number),)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "released" if self.released else f"{self.nbytes} bytes at page {self.offset}"
        return f"<reservation in {self.area!r}: {state}>"


def _end(reservation: Reservation, generation: int) -> None:
    """For finalizers of a claimed span."""
    reservation._claims.end(reservation._number, generation)
