"""Reservations in a worker's hands: claimed and lent again in shared memory, without a message."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from gcma_shm import layout
from gcma_shm._core import Plane, Span, Trying
from gcma_shm.clients.buffer import Buffer, yielding_to
from gcma_shm.clients.handles import Handle, Reference, load_reservation
from gcma_shm.clients.holds import Hold
from gcma_shm.errors import ArenaExhausted, BrokerUnavailable, StaleHandle
from gcma_shm.layout import CLAIM_CLIENT, CLAIM_GENERATION_SHIFT
from gcma_shm.presence import Presence
from gcma_shm.sizes import check_seconds

if TYPE_CHECKING:
    from gcma_shm.clients.aio_channel import AsyncChannel
    from gcma_shm.clients.allocator import Allocator
    from gcma_shm.clients.channel import Channel
    from gcma_shm.clients.member import Member

COPY_S = 0.002  # a page's copy takes a thousandth of that; what takes longer is looked into
NAP_MIN_S, NAP_MAX_S = 0.00005, 0.001


Tell = Callable[[int, int, Hold | None], None]


class Claimed:
    """A claim of this process; keeps the reservation."""

    __slots__ = ("generation", "reservation", "span", "word")

    def __init__(self, reservation: Promised, word: int, span: weakref.ref[Span]) -> None:
        self.reservation = reservation
        self.word = word
        self.generation = word >> CLAIM_GENERATION_SHIFT
        self.span = span


class Claims:
    """What one client has claimed. `channel`: for the end of a claim that several processes share."""

    def __init__(self, plane: Plane, presence: Presence, channel: Channel | AsyncChannel) -> None:
        self._plane = plane
        self._presence = presence
        self._channel = channel
        self.live: dict[int, Claimed] = {}  # by number
        channel.holds.claims = self.live
        self._given_up: deque[tuple[int, int]] = deque()
        self._shared: deque[tuple[int, int]] = deque()  # given up, and to be told to the broker
        self.lock = threading.Lock()

    def reset(self, presence: Presence) -> None:
        """In a forked child: what the parent had claimed is shared with it."""
        self._presence = presence
        self.lock = threading.Lock()

    def share(self) -> None:
        """Before a fork, with the lock held: from now on none of us lends these ranges by itself."""
        for claimed in list(self.live.values()):
            self._plane.share_claim(claimed.reservation.index, claimed.word)

    def claim(self, reservation: Promised) -> tuple[Span, int] | int:
        """The memory of a reservation and its claim's generation; or the number of the client that has claimed it.

        Raises StaleHandle; BrokerUnavailable when a broker that is stopped in its copy of a page does not go on in time.
        """
        try:
            with self.lock:
                self._lend_given_up()
                return self._claim(reservation)
        finally:
            self.drain()

    def _claim(self, reservation: Promised) -> tuple[Span, int] | int:
        number, index, first, pages = reservation.number, reservation.index, reservation.first, reservation.pages
        if reservation.released:
            raise StaleHandle("this reservation was released")
        word, span = self._plane.claim(index, reservation.state, first, pages)
        if not word:
            raise StaleHandle("this reservation was released, or its arena's broker took this process for dead")
        if span is None and word & ~(-1 << CLAIM_GENERATION_SHIFT) == self._plane.number and number not in self.live:
            span = self._plane.span(first, reservation.nbytes)  # ours, of a claim that a signal interrupted
        if span is None:
            if word & CLAIM_CLIENT != layout.BROKER or not self._broker_has_ended():
                return word & CLAIM_CLIENT
            word = self._plane.seize(index, word, reservation.state)  # it died with the range in its hands
            if not word:
                return layout.BROKER
            return self._seized(reservation, word)
        try:
            noted = self._note(reservation, word, span)
            if not self._plane.claim_settled(first, pages, COPY_S):
                self._settle(first, pages)
        except BaseException:
            self.live.pop(number, None)
            self._plane.yield_claim(index, word)  # nobody has written there
            raise
        return noted

    def _seized(self, reservation: Promised, word: int) -> tuple[Span, int]:
        """What the claim of a dead broker becomes. Nobody copies into the range any more, and whoever had it before may have
        written there: so there is nothing to wait for, and the only way back is to lend it, with its sweep.
        """
        try:
            # Who shared the claim before is none of ours, should we share this one.
            geometry = self._plane.geometry
            at = geometry.claimers_at + reservation.index * geometry.holder_bytes
            for bits_at in range(at, at + geometry.holder_bytes, 8):
                self._plane.write(bits_at, 0)
            span = self._plane.span(reservation.first, reservation.nbytes)
            return self._note(reservation, word, span)
        except BaseException:
            self.live.pop(reservation.number, None)
            self._plane.unclaim(reservation.index, word, reservation.first, reservation.pages)
            raise

    def _note(self, reservation: Promised, word: int, span: Span) -> tuple[Span, int]:
        number, generation = reservation.number, word >> CLAIM_GENERATION_SHIFT
        # An array that outlives its Buffer keeps the memory; when nothing refers to that any more, it is lent again.
        reference = weakref.ref(span, lambda _: self.end(number, generation))
        self.live[number] = Claimed(reservation, word, reference)
        return span, generation

    def end(self, number: int, generation: int, tell: Tell | None = None) -> None:
        """Lends a claimed range again. For finalizers, too, and waits for nobody then: another thread may hold the lock, or this one
        where it was interrupted; then whoever holds it does this last. `tell`: how the broker is told of a part in a shared
        claim; by default with the next request, if not at once.
        """
        self._given_up.append((number, generation))
        self.drain(tell)

    def drain(self, tell: Tell | None = None) -> None:
        """Lends what was given up while the lock was held."""
        while self._given_up:
            with Trying(self.lock) as got:
                if not got:
                    return  # its holder does this last
                self._lend_given_up()
        while self._shared:
            (tell or self._channel.give_up)(*self._shared.popleft(), None)

    def retire(self, reservation: Promised) -> bool:
        """Nothing is claimed from this Reservation any more, nor will be; False, and nothing has changed: an array of its memory is
        alive.
        """
        with self.lock:
            self._lend_given_up()
            claimed = self.live.get(reservation.number)
            if claimed is not None and claimed.reservation is reservation:
                span = claimed.span()
                if span is not None and not span.seal():
                    return False
                self._given_up.append((reservation.number, claimed.generation))
                self._lend_given_up()
            reservation.retired = True
        self.drain()
        return True

    def _lend_given_up(self) -> None:
        while self._given_up:
            number, generation = self._given_up[0]
            claimed = self.live.get(number)
            # After the client was closed the broker has it all back, and may have given it to others.
            if claimed is not None and claimed.generation == generation and not self._plane.closed:
                reservation = claimed.reservation
                lent = self._plane.unclaim(reservation.index, claimed.word, reservation.first, reservation.pages)
                del self.live[number]
                if not lent:
                    self._shared.append((number, generation))
            self._given_up.popleft()

    def _settle(self, first: int, pages: int) -> None:
        deadline = time.monotonic() + self._channel.timeout
        while not self._broker_has_ended():  # a dead one's copy never goes on
            if self._plane.claim_settled(first, pages, 10 * COPY_S):
                return
            if time.monotonic() >= deadline:
                raise BrokerUnavailable(
                    f"the broker has been copying one page into this reservation for {self._channel.timeout:g} s: is it stopped?"
                )

    def _broker_has_ended(self) -> bool:
        return not self._presence.is_held(layout.BROKER)


class Promised:
    """What a reservation is, however its client asks the broker."""

    def __init__(self, client: Member, place: dict[str, Any]) -> None:
        self._client = client
        self._claims = cast(Claims, client._claims)
        number = int(place["buffer"])
        self.number = number
        self.index = number & layout.ALLOCATIONS_MAX  # of its entry in the arena's table
        self.state = number >> layout.INDEX_BITS << layout.KIND_BITS | layout.RESERVATION  # that entry's word
        self.first = int(place["first"])
        self.pages = int(place["nbytes"]) // client.page_size
        self._place = {"area": place["area"], "offset": place["offset"], "name": place.get("name")}
        #: Bytes, whole pages.
        self.nbytes: int = place["nbytes"]
        #: The area's name.
        self.area: str = place["area"]
        #: Pages from the area's start.
        self.offset: int = place["offset"]
        #: The name that it was made with, or None.
        self.name: str | None = place.get("name")
        self.retired = False
        self._hold: Hold = place["hold"]
        give_up = weakref.finalize(self, client._give_up, self.number, 0, self._hold)
        give_up.atexit = False  # the broker sees the process end

    def _in_turn(self, claimer: int, timeout: float | None) -> Generator[float, None, tuple[Span, int]]:
        """Until whoever has claimed it has lent it again. Yields for how long to sleep before the next look."""
        begun = time.monotonic()
        nap = NAP_MIN_S
        while True:
            waited = time.monotonic() - begun
            if (
                claimer == layout.BROKER
            ):  # it cleans up after a dead claimer, or drains the area: not what the timeout is about
                if waited >= self._client._channel.timeout:
                    raise BrokerUnavailable(
                        f"the broker has had this reservation in its hands for {waited:.1f} s: is it stopped?"
                    )
            elif timeout is not None and waited >= timeout:
                own = " (this process: free that buffer first)" if claimer == self._client.number else ""
                raise ArenaExhausted(
                    f"this reservation of {self.nbytes} bytes in {self.area!r} is claimed by client {claimer}{own}; it is had in turn: "
                    "wait with timeout=, or reserve another",
                    self.nbytes,
                    0,
                    {claimer: self.nbytes},
                )
            yield nap
            nap = min(2 * nap, NAP_MAX_S)
            got = self._claims.claim(self)
            if not isinstance(got, int):
                return got
            claimer = got

    def _retire(self) -> None:
        if not self._claims.retire(self):
            raise BufferError(
                f"reservation of {self.nbytes} bytes in {self.area!r} cannot be released: views or arrays of its memory are alive"
            )

    @property
    def released(self) -> bool:
        """Whether `release` was called, or the client closed."""
        return self.retired or self._client.closed

    def __reduce__(self) -> tuple[object, ...]:
        if self.released:
            raise StaleHandle("this reservation was released")
        return load_reservation, (Reference(self._client.endpoint, self._client.arena_id, self.number),)

    def __repr__(self) -> str:
        state = "released" if self.released else f"{self.nbytes} bytes at page {self.offset}"
        return f"<reservation in {self.area!r}: {state}>"


class Reservation(Promised):
    """A buffer promised in advance, at a place that does not change; lent to the cache until it is claimed.

    Made by `Client.reserve`. Safe across threads. A forked child holds it too, from the instant of the fork. Pickled and loaded
    in another process of the arena, that process holds it as well: several may claim it in turn, one at a time. One that
    nothing refers to any more is released.
    """

    _client: Allocator

    def claim(self, timeout: float | None = 0) -> Buffer:
        """The buffer: in microseconds, without a message, whatever the cache, the clients and the broker do.

        It cannot fail for who holds the reservation alone. While another holder has it claimed, waits up to `timeout` seconds
        (None: for ever; in no order among those that wait), then raises ArenaExhausted, whose `holders` tells who. Raises StaleHandle after `release`; and
        BrokerUnavailable when the broker is stopped in the middle of its copy of one page and does not go on in time.
        """
        got = self._claims.claim(self)
        if isinstance(got, int):
            got = nap_through(self._in_turn(got, None if timeout is None else check_seconds("timeout", timeout)))
        span, generation = got
        claims, number = self._claims, self.number
        return Buffer(
            span,
            self._place,
            self._client,
            number,
            lambda: claims.end(number, generation, self._client._channel.free),
            generation,
        )

    def release(self) -> None:
        """Gives the promise back; a second time has no effect. The memory is free when its last holder has released it.

        Raises BufferError while a view or array of a buffer claimed from it is alive; a claimed buffer without is freed.
        """
        if self.released:
            return
        self._retire()
        self._client._channel.free(self.number, 0, self._hold)

    def hand_over(self, timeout: float = 60) -> Handle:
        """A handle that holds the reservation until another process has attached with it, or for `timeout` seconds; see
        `Buffer.hand_over`.
        """
        if self.released:
            raise StaleHandle("this reservation was released")
        return self._client._hand_over(self.number, 0, timeout, reservation=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with yielding_to(error):
            self.release()


def nap_through(turns: Generator[float, None, tuple[Span, int]]) -> tuple[Span, int]:
    """Sleeps in this thread as long as `_in_turn` says, and returns what it returns."""
    try:
        while True:
            time.sleep(next(turns))
    except StopIteration as done:
        return cast(tuple[Span, int], done.value)
