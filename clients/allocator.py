"""What a client allocates, reserves and attaches to: buffers by requests, waiting in line, handles and names."""

from __future__ import annotations

import contextlib
import operator
import time
import weakref
from typing import Any, cast

from gcma_shm import layout
from gcma_shm._core import Plane, Span
from gcma_shm.clients.buffer import Buffer
from gcma_shm.clients.channel import Channel
from gcma_shm.clients.handles import Handle, Reference
from gcma_shm.clients.holds import Hold
from gcma_shm.clients.info import AreaInfo, NameInfo, QuotaInfo
from gcma_shm.clients.reservation import Claims, Reservation
from gcma_shm.errors import ArenaError, ArenaExhausted, BrokerUnavailable, Closed, GcmaError, NoSuchBuffer, StaleHandle
from gcma_shm.messages import Reply
from gcma_shm.sizes import SECONDS_MAX, check_seconds, parse_size

WAIT_SLICE_S = 1.0  # between two looks at the broker while a request waits in line
BYTES_MAX = 1 << 62  # of a buffer, in the protocol; whatever is larger is refused like this


class Allocator:
    """The part of a client that has to do with buffers and reservations."""

    endpoint: str
    page_size: int
    _channel: Channel
    _plane: Plane | None
    _claims: Claims | None
    _spans: weakref.WeakValueDictionary[int, Span]  # by identity

    @property
    def number(self) -> int:
        """This client's number, as statistics and ArenaExhausted.holders tell it."""
        return self._plane.number if self._plane is not None else int(self._channel.greeting["client"])

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._channel.closed

    def areas(self) -> list[AreaInfo]:
        """The arena's areas as they are now."""
        return [AreaInfo(**info) for info in self._ask_openly("areas", {})["areas"]]

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
        buffer = self._buffer(place, span)
        if zero:
            span.zero()
        return buffer

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
            self._channel.free(place["buffer"], 0, Hold())
            raise TypeError(f"{name!r} is a reservation: use attach_reservation()")
        return self._buffer(place, span)

    def attach_reservation(self, name: str) -> Reservation:
        """The reservation of that name: this process holds it as well, and may claim it in turn with the others.

        Raises NoSuchBuffer, TypeError for the name of a buffer, QuotaExceeded, BrokerUnavailable.
        """
        place, span = self._attach_name(name)
        if "reservation" not in place:
            self._buffer(place, span).free()
            raise TypeError(f"{name!r} is a buffer: use attach()")
        return Reservation(self, place)

    def locate(self, address: int, nbytes: int) -> tuple[Reference, int] | None:
        """Which buffer of this client that memory of this process lies in, all of it, and how many bytes from its start; None: in
        none.
        """
        plane = self._plane
        at = -1 if plane is None or plane.closed else plane.place_of(address, nbytes)
        if plane is None or at < 0:
            return None
        claimed = [claim.span() for claim in list(self._claims.live.values())] if self._claims is not None else []
        for span in (*self._living_spans(), *claimed):
            begin = 0 if span is None else span.first * plane.page_size
            if span is not None and begin <= at and at + nbytes <= begin + span.nbytes:
                return Reference(self.endpoint, self.arena_id, *span.held), at - begin
        return None

    def unlink(self, name: str) -> None:
        """Takes the name off a buffer, and ends its being kept (`Buffer.keep`). Who holds it goes on; the name is free at once, the
        memory when the last one has freed it or died.

        Raises NoSuchBuffer, ValueError, BrokerUnavailable: it may have been done.
        """
        layout.refuse_name("buffer", name)
        self._refuse_unmapped()
        self._channel.request("unlink", {"name": name})

    def names(self) -> list[NameInfo]:
        """The named buffers and reservations of the arena, in the order of their names."""
        found: list[NameInfo] = []
        more = True
        while more:
            after = {"after": found[-1].name} if found else {}
            results = self._channel.request("names", after).results
            found += [
                NameInfo(
                    told["name"],
                    told["area"],
                    told["offset"],
                    told["nbytes"],
                    told["holders"],
                    "reservation" in told,
                    tuple(told.get("kept_by", ())),
                )
                for told in results["names"]
            ]
            more = results["more"]
        return found

    def quota(self, nbytes: int | str | None = None, client: int | None = None) -> QuotaInfo:
        """What a client, by default this one, holds and may hold; `nbytes` sets that, 0 or "none": no bound.

        A quota is there to find mistakes, not to stop malice: any process of this user may set it. Raises ValueError.
        """
        wanted = {} if client is None else {"client": operator.index(client)}
        if nbytes is not None:
            wanted["nbytes"] = 0 if nbytes in (0, "none") else parse_size(nbytes)
        told = self._ask_openly("quota", wanted)
        return QuotaInfo(told["held"], told["quota"] or None)

    def drain_area(self, name: str) -> AreaInfo:
        """Takes an area out of service: no new buffers, no cache; who holds something there is not disturbed. Raises
        NoSuchArea.
        """
        return AreaInfo(**self._ask_openly("area_drain", {"area": name}))

    def resume_area(self, name: str) -> AreaInfo:
        """Puts a drained area back into service. Raises NoSuchArea."""
        return AreaInfo(**self._ask_openly("area_resume", {"area": name}))

    def resize_area(self, name: str, size: int | str) -> AreaInfo:
        """Grows an area by memory that is in no area, or shrinks it at its end.

        Raises NoSuchArea, ValueError; ArenaExhausted when a buffer, or too little memory, is in the way.
        """
        return AreaInfo(**self._ask_openly("area_resize", {"area": name, "nbytes": parse_size(size)}))

    def _ask_openly(self, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """The results of a request that a broker serves without a session too: of this arena, and no other that came since."""
        found: dict[str, Any] = self._channel.request(operation, parameters | {"arena_id": self.arena_id}).results
        return found

    # --- for Buffer, Reservation and Handle

    @property
    def arena_id(self) -> bytes:
        """16 bytes that no other arena has."""
        return bytes(self._channel.greeting["arena_id"])

    def hand_over(self, reference: Reference, timeout: float, after_end: float | None = None) -> Handle:
        """For what this client holds, as `Buffer.hand_over`."""
        return self._hand_over(reference.number, reference.claim, timeout, after_end)

    def attach_handle(self, reference: Reference) -> Buffer:
        """For `Handle`. Raises StaleHandle."""
        taken = self._hold_again(reference) or self._attach_reference(reference)
        return self._buffer(*taken, reference.claim)

    def attach_reservation_handle(self, reference: Reference) -> Reservation:
        """For a pickled reservation. Raises StaleHandle."""
        return Reservation(self, self._attach_reference(reference)[0])

    def _hold_again(self, reference: Reference) -> tuple[dict[str, Any], Span] | None:
        """What this process holds is held once more, without a word to the broker, which counts no more than one hold of a client. None:
        it does not, or a hand-over's own hold is to be ended.

        Under the channel's lock, under which the last hold ends as well: what is held here is held until it is given back.
        """
        if reference.token or self._plane is None or reference.arena_id != self.arena_id:
            return None
        with self._channel.lock:
            place = None if self.closed else self._channel.holds.place_of(reference.number, reference.claim)
            if place is None:
                return None
            taken = self._take(Reply(0, "ok", dict(place)), reference.claim)
        return cast("tuple[dict[str, Any], Span]", taken)

    def _attach_reference(self, reference: Reference) -> tuple[dict[str, Any], Span]:
        self._refuse_unmapped()
        if reference.arena_id != self.arena_id:
            raise StaleHandle("this handle is of another arena, or of one that its broker has replaced")
        parameters = {"buffer": reference.number}
        parameters |= {name: value for name, value in (("claim", reference.claim), ("token", reference.token)) if value}
        try:
            taken: tuple[dict[str, Any], Span] = self._channel.request(
                "attach", parameters, then=lambda reply: self._take(reply, reference.claim)
            )
        except Closed as error:
            if self.closed:
                raise
            raise StaleHandle(str(error)) from error  # the broker serves another arena now
        return taken

    def _attach_name(self, name: str) -> tuple[dict[str, Any], Span]:
        if not isinstance(name, str):
            raise TypeError(f"name of type {type(name).__name__}: expected text, or a Handle")
        layout.refuse_name("buffer", name)
        self._refuse_unmapped()
        taken: tuple[dict[str, Any], Span] = self._channel.request("attach_name", {"name": name}, then=self._take)
        return taken

    def _hand_over(
        self, number: int, claim: int, timeout: float, after_end: float | None = None, reservation: bool = False
    ) -> Handle:
        wanted = {"buffer": number, "timeout_ms": int(check_seconds("timeout", timeout) * 1000)}
        if claim:
            wanted["claim"] = claim
        if after_end is not None:
            wanted["after_end_ms"] = int(check_seconds("after_end", after_end) * 1000)
        token = self._channel.request("hand_over", wanted).results["token"]
        return Handle(Reference(self.endpoint, self.arena_id, number, claim, token), reservation)

    def _keep(self, number: int, name: str, process: tuple[int, int] | None) -> None:
        layout.refuse_name("buffer", name)
        until = {} if process is None else {"pid": process[0], "start": process[1]}
        self._channel.request("keep", {"buffer": number, "name": name} | until)

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
                layout.refuse_name("area" if what == "area" else "buffer", text)
                wanted[what] = text
        for what, value, least in (("offset", offset, 0), ("align", align, 1)):
            if value is not None:
                wanted[what] = min(operator.index(value), BYTES_MAX)
                if wanted[what] < least:
                    raise ValueError(f"{what} {value}: expected at least {least}")
        if not self.closed:
            self._refuse_unmapped()
        patience = check_seconds("timeout", SECONDS_MAX if timeout is None else timeout)
        if patience:
            wanted["timeout_ms"] = max(int(patience * 1000), 1)
        deadline = time.monotonic() + patience
        while True:
            got = self._channel.request(operation, wanted, then=self._take)
            if isinstance(got, tuple):
                return got
            with contextlib.suppress(NoSuchBuffer):  # we were stopped for so long that we lost our place: ask again
                return self._wait(got, deadline)
            wanted["timeout_ms"] = max(int((deadline - time.monotonic()) * 1000), 0)

    def _take(self, reply: Reply, claim: int = 0) -> tuple[dict[str, Any], Span] | int:
        """Under the channel's lock, which a fork takes too: a child has the memory and its hold, or neither. An int: the
        ticket of a request that waits in line. `claim`: the generation of a claim that was attached to.
        """
        place = reply.results
        if "ticket" in place:
            return int(place["ticket"])
        number = place["buffer"]
        span = cast(Plane, self._plane).span(place["first"], place["nbytes"])
        if claim or "reservation" not in place:
            # When nothing refers to the memory any more, neither a Buffer nor a view or array, it is given back; and the
            # client lives as long as that.
            place["hold"] = hold = Hold()
            give_up = weakref.finalize(span, self._give_up, number, claim, hold)
            give_up.atexit = False  # the broker sees the process end
        self._channel.holds.add(number, claim)
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
        except (ArenaExhausted, BrokerUnavailable, NoSuchBuffer):
            raise
        except BaseException:  # Ctrl-C, say: leave the line, and give back what was served meanwhile
            with contextlib.suppress(GcmaError):
                late = self._channel.request("collect", {"ticket": ticket, "give_up": True}, then=self._take)
                if isinstance(late, tuple):
                    self._channel.free(late[0]["buffer"], 0, late[0].get("hold") or Hold())
            raise

    def _buffer(self, place: dict[str, Any], span: Span, claim: int = 0) -> Buffer:
        number, channel = place["buffer"], self._channel
        hold = place["hold"]
        if not channel.holds.place_of(number, claim):
            channel.holds.note(number, claim, {name: value for name, value in place.items() if name != "hold"})

        def free() -> None:
            channel.free(number, claim, hold)

        self._spans[id(span)] = span
        return Buffer(span, place, self, number, free, claim)

    def _living_spans(self) -> list[Span]:
        """Taken at once: another thread may be about to add one."""
        return [span for reference in self._spans.valuerefs() if (span := reference()) is not None]

    def _give_up(self, number: int, claim: int, hold: Hold) -> None:
        self._channel.give_up(number, claim, hold)
