"""What a client that blocks allocates, reserves and attaches to. How that is asked for is `steps`'s."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, cast

from gcma_shm._core import Span
from gcma_shm.clients.buffer import Buffer
from gcma_shm.clients.channel import WINDOW, Channel
from gcma_shm.clients.correspondence import Wanted
from gcma_shm.clients.handles import Handle, Reference
from gcma_shm.clients.info import AreaInfo, NameInfo, QuotaInfo
from gcma_shm.clients.reservation import Reservation
from gcma_shm.clients.steps import Ask, Free, Granted, Sleep, Step, Stepping, Steps, T, drive
from gcma_shm.errors import Closed, GcmaError, StaleHandle
from gcma_shm.messages import Reply
from gcma_shm.sizes import parse_size


class Allocator(Stepping[Buffer, Reservation]):
    """The part of a client that has to do with buffers and reservations."""

    _channel: Channel

    def areas(self) -> list[AreaInfo]:
        """The arena's areas as they are now."""
        return self._run(self._areas())

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
        place, span = self._run(self._placing("alloc_contig", nbytes, area, offset, align, timeout, name))
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
        place, _ = self._run(self._placing("reserve", nbytes, area, offset, align, timeout, name))
        return self._reservation(place)

    def attach(self, name: str | Handle) -> Buffer:
        """The buffer of that name, or of a handle: this process holds it as well.

        Raises NoSuchBuffer, TypeError for the name of a reservation, StaleHandle, QuotaExceeded, BrokerUnavailable.
        """
        return self._run(self._attaching(name))

    def attach_reservation(self, name: str) -> Reservation:
        """The reservation of that name: this process holds it as well, and may claim it in turn with the others.

        Raises NoSuchBuffer, TypeError for the name of a buffer, QuotaExceeded, BrokerUnavailable.
        """
        return self._run(self._attaching_reservation(name))

    def unlink(self, name: str) -> None:
        """Takes the name off a buffer, and ends its being kept (`Buffer.keep`). Who holds it goes on; the name is free at once, the
        memory when the last one has freed it or died.

        Raises NoSuchBuffer, ValueError, BrokerUnavailable: it may have been done.
        """
        self._run(self._unlinking(name))

    def names(self) -> list[NameInfo]:
        """The named buffers and reservations of the arena, in the order of their names."""
        return self._run(self._names())

    def quota(self, nbytes: int | str | None = None, client: int | None = None) -> QuotaInfo:
        """What a client, by default this one, holds and may hold; `nbytes` sets that, 0 or "none": no bound.

        A quota is there to find mistakes, not to stop malice: any process of this user may set it. Raises ValueError.
        """
        return self._run(self._quota(nbytes, client))

    def drain_area(self, name: str) -> AreaInfo:
        """Takes an area out of service: no new buffers, no cache; who holds something there is not disturbed. Raises
        NoSuchArea.
        """
        return self._run(self._changing_area("area_drain", {"area": name}))

    def resume_area(self, name: str) -> AreaInfo:
        """Puts a drained area back into service. Raises NoSuchArea."""
        return self._run(self._changing_area("area_resume", {"area": name}))

    def resize_area(self, name: str, size: int | str) -> AreaInfo:
        """Grows an area by memory that is in no area, or shrinks it at its end.

        Raises NoSuchArea, ValueError; ArenaExhausted when a buffer, or too little memory, is in the way.
        """
        return self._run(self._changing_area("area_resize", {"area": name, "nbytes": parse_size(size)}))

    # --- for Buffer, Reservation and Handle

    def hand_over(self, reference: Reference, timeout: float, after_end: float | None = None) -> Handle:
        """For what this client holds, as `Buffer.hand_over`."""
        return self._hand_over(reference.number, reference.claim, timeout, after_end)

    def attach_handle(self, reference: Reference) -> Buffer:
        """For `Handle`. Raises StaleHandle."""
        taken = self._hold_again(reference) or self._run(self._attaching_reference(reference))
        return self._buffer(*taken, reference.claim)

    def attach_handles(self, references: Sequence[Reference]) -> list[Buffer]:
        """As `attach_handle`, of several: asked for together, in about the time of one. All of them, or what is wrong with the first."""
        wanted: list[Wanted] = [("attach", self._attach_parameters(reference), ()) for reference in references]
        taken: list[Granted] = []
        try:
            for begin in range(0, len(wanted), WINDOW):
                some = references[begin : begin + WINDOW]
                taken += self._channel.request_together(
                    wanted[begin : begin + WINDOW],
                    lambda at, reply, some=some: cast(Granted, self._take(reply, some[at].claim)),  # type: ignore[misc]
                )
        except BaseException as error:
            taken.clear()  # also while the error is looked at
            if not isinstance(error, Closed) or self.closed:
                raise
            raise StaleHandle(str(error)) from error  # the broker serves another arena now
        return [self._buffer(*each, reference.claim) for each, reference in zip(taken, references, strict=True)]

    def attach_reservation_handle(self, reference: Reference) -> Reservation:
        """For a pickled reservation. Raises StaleHandle."""
        return self._reservation(self._run(self._attaching_reference(reference))[0])

    def _hold_again(self, reference: Reference) -> Granted | None:
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
            return cast(Granted, self._take(Reply(0, "ok", dict(place)), reference.claim))

    def _hand_over(
        self, number: int, claim: int, timeout: float, after_end: float | None = None, reservation: bool = False
    ) -> Handle:
        return self._run(self._handing_over(number, claim, timeout, after_end, reservation))

    def _keep(self, number: int, name: str, process: tuple[int, int] | None) -> None:
        self._run(self._keeping(number, name, process))

    def _unkeep(self, number: int, name: str) -> None:
        """Undoes a `keep` of a buffer that had no name, if it was done. Raises what `unlink` does."""
        self._run(self._unlinking(name, number))

    def _buffer(self, place: dict[str, Any], span: Span, claim: int = 0) -> Buffer:
        number, channel = place["buffer"], self._channel
        hold = place["hold"]
        if not channel.holds.place_of(number, claim):
            channel.holds.note(number, claim, {name: value for name, value in place.items() if name != "hold"})

        def free() -> None:
            channel.free(number, claim, hold)

        buffer = Buffer(span, place, self, number, free, claim)
        self._note(buffer, span)
        return buffer

    def _reservation(self, place: dict[str, Any]) -> Reservation:
        return Reservation(self, place)

    # --- steps

    def _run(self, steps: Steps[T]) -> T:
        return drive(steps, self._do)

    def _do(self, step: Step) -> Any:
        if isinstance(step, Ask):
            return self._channel.request(step.operation, step.parameters, then=step.then)
        if isinstance(step, Sleep):
            assert self._plane is not None
            return self._plane.wait(step.seen, step.seconds)
        if isinstance(step, Free):
            return self._channel.free(step.number, 0, step.hold)
        return self._leave(step.ticket)

    def _leave(self, ticket: int) -> None:
        """Ctrl-C, say, has ended the wait: when this returns, nothing of it is left at the broker."""
        with contextlib.suppress(GcmaError):
            late = self._channel.request("collect", {"ticket": ticket, "give_up": True}, then=self._take)
            if isinstance(late, tuple):
                self._channel.free(late[0]["buffer"], 0, late[0]["hold"])
