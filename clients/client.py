"""A client: one process's session with a broker, its swap types and buffers."""

from __future__ import annotations

import contextlib
import operator
import os
import time
import weakref
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, cast

from gcma_shm import layout
from gcma_shm._core import Plane, Span
from gcma_shm.arena import Arena, open_arena
from gcma_shm.clients.buffer import Buffer
from gcma_shm.clients.channel import Channel
from gcma_shm.clients.handles import Handle, Ticket, clients
from gcma_shm.clients.reservation import Claims, Reservation
from gcma_shm.clients.swap import MappedSwap, MessageSwap, Swap
from gcma_shm.endpoint import default_endpoint
from gcma_shm.errors import ArenaError, ArenaExhausted, GcmaError, StaleHandle
from gcma_shm.messages import Reply
from gcma_shm.process import start_time
from gcma_shm.sizes import parse_size

WAIT_SLICE_S = 1.0  # between two looks at the broker while a request waits in line
SLOTS_MAX = 1 << 40  # of a type, in the protocol
SECONDS_MAX = 1e6  # a week and a half: whatever takes longer is a mistake
BYTES_MAX = 1 << 62  # of a buffer, in the protocol; whatever is larger is refused like this


@dataclass(frozen=True)
class AreaInfo:
    """An area just now; all but the name in bytes."""

    name: str
    size: int
    held: int  # by buffers
    lent: int  # to the cache
    free: int  # neither
    largest_free: int  # range that no buffer or reservation has: what alloc_contig could return
    reserved: int = 0  # by reservations, claimed or not
    cache: bool = True  # lent to the cache as far as no buffer holds it
    drained: bool = False  # out of service
    align: int = 0  # of every buffer in it
    share: int = 100  # percent of it that buffers and reservations may have at once


@dataclass(frozen=True)
class NameInfo:
    """A named buffer or reservation; sizes in bytes, `offset` in pages from the area's start."""

    name: str
    area: str
    offset: int
    nbytes: int
    holders: int  # clients
    reservation: bool


@dataclass(frozen=True)
class QuotaInfo:
    """Bytes that a client holds in buffers and reservations, and may hold; None: no bound."""

    held: int
    quota: int | None


class Client:
    """Made by `connect` or `embedded`. Safe across threads; a forked child is a client of its own and holds what its
    parent held.
    """

    def __init__(
        self, endpoint: str, mapped: bool | None, prefault: bool, timeout: float, wait_for_broker: float
    ) -> None:
        _seconds("timeout", timeout, 0.001)
        _seconds("wait_for_broker", wait_for_broker)
        self.endpoint = endpoint
        self._mapped = mapped is not False
        self._plane: Plane | None = None
        self._claims: Claims | None = None
        # The memory and not the Buffer: an array that outlives its Buffer keeps the memory.
        self._spans: weakref.WeakSet[Span] = weakref.WeakSet()
        self._swaps: weakref.WeakSet[MappedSwap | MessageSwap] = weakref.WeakSet()
        owner = weakref.ref(self)
        self._channel = Channel(endpoint, timeout, wait_for_broker, lambda: cast(Client, owner())._introduce())
        try:
            self._channel.request("ping")
            self.page_size: int = self._channel.greeting["page_size"]
            if self._mapped:
                self._map(required=mapped is True, prefault=prefault)
        except BaseException:
            if self._channel.greeting:
                self._channel.close()
            else:
                self._channel.drop()
            raise
        clients.add(self)

    def _introduce(self) -> dict[str, Any]:
        pid = os.getpid()
        who: dict[str, Any] = {"pid": pid, "start": start_time(pid) or 0, "mapped": self._mapped}
        if self._channel.greeting:  # not the first time: no other arena will do
            who["arena_id"] = self._channel.greeting["arena_id"]
        if self._plane is not None:  # a forked child, or one whose session was lost: say who we are and what we hold
            held = self._channel.held
            claims = [*(self._claims.live if self._claims is not None else ())]
            who |= {
                "client": self._plane.number,
                "buffers": [number for number, claim in held if not claim],
                "claims": [*claims, *(number for number, claim in held if claim)],
            }
        return who

    def _map(self, required: bool, prefault: bool) -> None:
        greeting = self._channel.greeting
        try:
            arena: Arena = open_arena(greeting["arena"], greeting["arena_id"])
            self._plane = Plane(arena.memory, arena.geometry, greeting["client"], os.fsencode(greeting["spill_dir"]))
        except (ArenaError, OSError):
            if required:
                raise
            # Not ours to map (another container, say): start over as one that sends its pages in messages.
            self._channel.request("bye")
            self._mapped = False
            self._channel.request("ping")
            return
        self._claims = Claims(self._plane, self._channel)
        if prefault:
            arena.prefault()
            self._plane.populate(0, arena.geometry.pages * self.page_size)

    @property
    def mapped(self) -> bool:
        """Whether pages go through shared memory; False: in messages."""
        return self._mapped

    @property
    def number(self) -> int:
        """This client's number, as statistics and ArenaExhausted.holders tell it."""
        return self._plane.number if self._plane is not None else int(self._channel.greeting["client"])

    def areas(self) -> list[AreaInfo]:
        """The arena's areas as they are now."""
        return [AreaInfo(**info) for info in self._channel.request("areas").results["areas"]]

    def stats(self) -> dict[str, Any]:
        """Counters and gauges of the arena, its clients and its broker; docs/protocol.md lists the keys."""
        return cast(dict[str, Any], self._channel.request("stats").results)

    def swap(self, type: int, slots: int, write: Literal["through", "behind"] = "through") -> Swap:
        """Declares swap type `type` (0 to 255) with `slots` slots, or opens it as it was declared.

        Raises ValueError when it is declared otherwise or the arena has too few slots left, TypeError, Closed,
        BrokerUnavailable.
        """
        type_, slots = operator.index(type), operator.index(slots)
        if not 0 <= type_ < layout.TYPES_MAX:
            raise ValueError(f"type {type_}: expected 0 to {layout.TYPES_MAX - 1}")
        if not 1 <= slots <= SLOTS_MAX:
            raise ValueError(f"{slots} slots: expected 1 to {SLOTS_MAX}")
        if write not in ("through", "behind"):
            raise ValueError(f"write={write!r}: expected 'through' or 'behind'")
        declared = self._channel.request("swap_init", {"type": type_, "slots": slots, "write": write}).results
        swap: MappedSwap | MessageSwap
        if self._plane is not None:
            swap = MappedSwap(self._plane, type_, declared["life"], self._channel.timeout, self)
        else:
            swap = MessageSwap(self, type_, declared["life"], slots, write == "through")
        self._swaps.add(swap)
        return cast(Swap, swap)

    def alloc_contig(
        self,
        nbytes: int,
        area: str | None = None,
        offset: int | None = None,
        align: int | None = None,
        zero: bool = False,
        timeout: float | None = 0,
        name: str | None = None,
    ) -> Buffer:
        """A contiguous buffer of `nbytes`, rounded up to whole pages. Only other buffers and reservations can be in its way,
        never cache, never a client.

        `area`: by default the one where it fits best. `offset`: exactly that many pages from the area's start (the
        kernel's start_pfn). `align`: of its place in the area, in bytes, a power of two. `zero`: cleared; otherwise it
        holds what the cache left there. `timeout`: seconds to wait in line, first come, first served, for others to free
        memory; 0: not at all, None: for ever. `name`: what other processes `attach` it by.

        Raises ArenaExhausted, QuotaExceeded, NoSuchArea, BufferExists, ValueError; ArenaError for a client that does not
        map the arena; BrokerUnavailable, Closed.
        """
        place, span = self._ask("alloc_contig", nbytes, area, offset, align, timeout, name)
        if zero:
            span.zero()
        return self._buffer(place, span)

    def reserve(
        self,
        nbytes: int,
        area: str | None = None,
        align: int | None = None,
        name: str | None = None,
        *,
        offset: int | None = None,
        timeout: float | None = 0,
    ) -> Reservation:
        """A buffer promised: its place is decided now and the cache uses it meanwhile; `claim` on it takes microseconds,
        sends no message and cannot fail.

        Parameters and errors as for `alloc_contig`.
        """
        place, _ = self._ask("reserve", nbytes, area, offset, align, timeout, name)
        return Reservation(self, place)

    def attach(self, name: str | Handle) -> Buffer:
        """The buffer of that name, or of a handle: this process holds it as well.

        Raises NoSuchBuffer, TypeError for the name of a reservation, StaleHandle, QuotaExceeded, BrokerUnavailable.
        """
        if isinstance(name, Handle):
            return name.attach(self)
        place, span = self._attach_name(name)
        if "reservation" in place:
            self._channel.free(place["buffer"])
            raise TypeError(f"{name!r} is a reservation: use attach_reservation()")
        return self._buffer(place, span)

    def attach_reservation(self, name: str) -> Reservation:
        """The reservation of that name: this process holds it as well, and may claim it in turn with the others.

        Raises NoSuchBuffer, TypeError for the name of a buffer, QuotaExceeded, BrokerUnavailable.
        """
        place, _ = self._attach_name(name)
        if "reservation" not in place:
            self._channel.free(place["buffer"])
            raise TypeError(f"{name!r} is a buffer: use attach()")
        return Reservation(self, place)

    def names(self) -> list[NameInfo]:
        """The named buffers and reservations of the arena, in the order of their names."""
        found: list[NameInfo] = []
        more = True
        while more:
            after = {"after": found[-1].name} if found else {}
            results = self._channel.request("names", after).results
            found += [
                NameInfo(
                    told["name"], told["area"], told["offset"], told["nbytes"], told["holders"], "reservation" in told
                )
                for told in results["names"]
            ]
            more = results["more"]
        return found

    def quota(self, nbytes: int | None = None, client: int | None = None) -> QuotaInfo:
        """What a client, by default this one, holds and may hold; `nbytes` sets that, 0: no bound.

        A quota is there to find mistakes, not to stop malice: any process of this user may set it. Raises ValueError.
        """
        wanted = {
            name: operator.index(value) for name, value in (("nbytes", nbytes), ("client", client)) if value is not None
        }
        told = self._channel.request("quota", wanted).results
        return QuotaInfo(told["held"], told["quota"] or None)

    def drain_area(self, name: str) -> AreaInfo:
        """Takes an area out of service: no new buffers, no cache; who holds something there is not disturbed. Raises
        NoSuchArea.
        """
        return AreaInfo(**self._channel.request("area_drain", {"area": name}).results)

    def resume_area(self, name: str) -> AreaInfo:
        """Puts a drained area back into service. Raises NoSuchArea."""
        return AreaInfo(**self._channel.request("area_resume", {"area": name}).results)

    def resize_area(self, name: str, size: int | str) -> AreaInfo:
        """Grows an area by memory that is in no area, or shrinks it at its end.

        Raises NoSuchArea, ValueError; ArenaExhausted when a buffer, or too little memory, is in the way.
        """
        return AreaInfo(**self._channel.request("area_resize", {"area": name, "nbytes": parse_size(size)}).results)

    # --- for Buffer, Reservation and Handle

    @property
    def arena_id(self) -> bytes:
        """16 bytes that no other arena has."""
        return bytes(self._channel.greeting["arena_id"])

    def attach_handle(self, ticket: Ticket) -> Buffer:
        """For `Handle`. Raises StaleHandle."""
        return self._buffer(*self._attach_ticket(ticket), ticket.claim)

    def attach_reservation_handle(self, ticket: Ticket) -> Reservation:
        """For a pickled reservation. Raises StaleHandle."""
        return Reservation(self, self._attach_ticket(ticket)[0])

    def _attach_ticket(self, ticket: Ticket) -> tuple[dict[str, Any], Span]:
        self._refuse_unmapped()
        if ticket.arena_id != self.arena_id:
            raise StaleHandle("this handle is of another arena, or of one that its broker has replaced")
        parameters = {"buffer": ticket.number}
        parameters |= {name: value for name, value in (("claim", ticket.claim), ("token", ticket.token)) if value}
        taken: tuple[dict[str, Any], Span] = self._channel.request(
            "attach", parameters, then=lambda reply: self._take(reply, ticket.claim)
        )
        return taken

    def _attach_name(self, name: str) -> tuple[dict[str, Any], Span]:
        if not isinstance(name, str):
            raise TypeError(f"name of type {type(name).__name__}: expected text, or a Handle")
        layout.refuse_name("buffer", name)
        self._refuse_unmapped()
        taken: tuple[dict[str, Any], Span] = self._channel.request("attach_name", {"name": name}, then=self._take)
        return taken

    def _hand_over(self, number: int, claim: int, timeout: float) -> Handle:
        wanted = {"buffer": number, "timeout_ms": int(_seconds("timeout", timeout) * 1000)} | (
            {"claim": claim} if claim else {}
        )
        token = self._channel.request("hand_over", wanted).results["token"]
        return Handle(Ticket(self.endpoint, self.arena_id, number, claim, token))

    def _refuse_unmapped(self) -> None:
        if self._plane is None:
            raise ArenaError(
                "a buffer is memory of the arena, which this client does not map; connect with mapped=True on the broker's host"
            )

    def _ask(
        self,
        operation: str,
        nbytes: int,
        area: str | None,
        offset: int | None,
        align: int | None,
        timeout: float | None,
        name: str | None,
    ) -> tuple[dict[str, Any], Span]:
        """The place and memory of a new buffer or reservation."""
        wanted: dict[str, Any] = {"nbytes": min(operator.index(nbytes), BYTES_MAX)}
        if wanted["nbytes"] < 1:
            raise ValueError(f"{nbytes} bytes: expected at least 1")
        for what, text in (("area", area), ("name", name)):
            if text is not None:
                if not isinstance(text, str):
                    raise TypeError(f"{what} of type {type(text).__name__}: expected a name")
                layout.refuse_name(what, text)
                wanted[what] = text
        for what, value, least in (("offset", offset, 0), ("align", align, 1)):
            if value is not None:
                wanted[what] = min(operator.index(value), BYTES_MAX)
                if wanted[what] < least:
                    raise ValueError(f"{what} {value}: expected at least {least}")
        self._refuse_unmapped()
        seconds = _seconds("timeout", SECONDS_MAX if timeout is None else timeout)
        if seconds:
            wanted["timeout_ms"] = max(int(seconds * 1000), 1)
        deadline = time.monotonic() + seconds
        got = self._channel.request(operation, wanted, then=self._take)
        return got if isinstance(got, tuple) else self._wait(got, deadline)

    def _take(self, reply: Reply, claim: int = 0) -> tuple[dict[str, Any], Span] | int:
        """Under the channel's lock, which a fork takes too: a child has the memory and its hold, or neither. An int: the
        ticket of a request that waits in line.
        """
        place = reply.results
        if "ticket" in place:
            return int(place["ticket"])
        span = cast(Plane, self._plane).span(place["first"], place["nbytes"])
        self._channel.hold(place["buffer"], claim)
        return place, span

    def _wait(self, ticket: int, deadline: float) -> tuple[dict[str, Any], Span]:
        """Until a request in line was served. No lock and no socket is held meanwhile: the broker wakes us by a word in the
        arena.
        """
        plane = cast(Plane, self._plane)
        try:
            while True:
                seen = plane.wake_count()
                left = deadline - time.monotonic()
                wanted = {"ticket": ticket, "give_up": left <= 0}
                got = self._channel.request("collect", wanted, then=self._take)
                if isinstance(got, tuple):
                    return got
                plane.wait(seen, min(left, WAIT_SLICE_S))
        except ArenaExhausted:
            raise
        except BaseException:  # Ctrl-C, say: leave the line, and give back what was served meanwhile
            with contextlib.suppress(GcmaError):
                late = self._channel.request("collect", {"ticket": ticket, "give_up": True}, then=self._take)
                if isinstance(late, tuple):
                    self._channel.free(late[0]["buffer"])
            raise

    def _buffer(self, place: dict[str, Any], span: Span, claim: int = 0) -> Buffer:
        number, channel = place["buffer"], self._channel
        # When nothing refers to the memory any more, neither a Buffer nor a view or array, it is given back; and the
        # client lives as long as that.
        give_up = weakref.finalize(span, self._give_up, number, claim)
        give_up.atexit = False  # the broker sees the process end

        def free() -> None:
            if give_up.detach() is not None:  # of two threads that free, one does
                channel.free(number, claim)

        self._spans.add(span)
        return Buffer(span, place, self, number, free, claim)

    def _give_up(self, number: int, claim: int) -> None:
        self._channel.give_up(number, claim)

    def close(self) -> None:
        """Gives back every buffer and says goodbye; a second time has no effect.

        Raises BufferError while a view of a buffer is alive, TimeoutError when another thread's store or load does not
        end in time; then the client stays open, but for that nothing new begins after a TimeoutError.
        """
        if self._channel.closed:
            return
        claimed = [claim.span() for claim in self._claims.live.values()] if self._claims is not None else []
        in_use = [span for span in (*self._spans, *claimed) if span is not None and span.exports]
        if in_use:
            raise BufferError(
                f"the client cannot be closed: views or arrays of {len(in_use)} of its buffers are alive; drop them first"
            )
        if self._plane is not None and not self._plane.close(self._channel.timeout):
            raise TimeoutError("a store or load in another thread has not ended; call close() again")
        for swap in list(self._swaps):
            swap.close()
        self._channel.close()
        clients.discard(self)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._channel.closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<gcma client {self.number} on {self.endpoint}{', closed' if self.closed else '' if self.mapped else ', by messages'}>"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a client cannot be pickled: pass client.endpoint, and connect() to it in the other process")

    def _reset(self) -> None:
        """In a forked child, after the plane has become another client's."""
        self._channel.reset()
        if self._claims is not None:
            self._claims.reset()

    def _disown(self) -> None:
        """In a forked child that is no client."""
        if self._plane is not None:
            self._plane.close(0)
        self._channel.disown()


def _seconds(name: str, seconds: float, least: float = 0.0) -> float:
    if not least <= seconds <= SECONDS_MAX:  # also refuses what is not a number
        raise ValueError(f"{name} {seconds}: expected {least} to {SECONDS_MAX:g} seconds")
    return seconds


def connect(
    endpoint: str | None = None,
    *,
    mapped: bool | None = None,
    prefault: bool = False,
    timeout: float = 5.0,
    wait_for_broker: float = 0.0,
) -> Client:
    """Connects to the broker on `endpoint`, by default `$GCMA_ENDPOINT` or this user's default one.

    `mapped`: None maps the arena when it may, else sends pages in messages; True insists; False sends messages.
    `prefault`: fills this process's page table for the whole arena now, so that no buffer costs a fault later.
    `timeout`: seconds that one request, or one store, may wait. `wait_for_broker`: seconds to wait for a broker that
    is not there yet.

    Raises BrokerUnavailable, ArenaError, QuotaExceeded (too many clients), ValueError for a malformed endpoint.
    """
    return Client(endpoint or default_endpoint(), mapped, prefault, timeout, wait_for_broker)
