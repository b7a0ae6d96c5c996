"""What a client that blocks allocates, reserves and attaches to. How that is asked for is `steps`'s."""

from __future__ import annotations

import contextlib
from typing import Any

from gcma_shm._core import Span
from gcma_shm.clients.buffer import Buffer
from gcma_shm.clients.channel import Channel
from gcma_shm.clients.handles import Handle, Reference
from gcma_shm.clients.info import AreaInfo, NameInfo, QuotaInfo
from gcma_shm.clients.reservation import Reservation
from gcma_shm.clients.steps import Ask, Free, Sleep, Step, Stepping, Steps, T, drive
from gcma_shm.errors import GcmaError
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

    def hand_over(self, reference: Reference, timeout: float) -> Handle:
        """For what this client holds, as `Buffer.hand_over`."""
        return self._hand_over(reference.number, reference.claim, timeout)

    def attach_handle(self, reference: Reference) -> Buffer:
        """For `Handle`. Raises StaleHandle."""
        return self._buffer(*self._run(self._attaching_reference(reference)), reference.claim)

    def attach_reservation_handle(self, reference: Reference) -> Reservation:
        """For a pickled reservation. Raises StaleHandle."""
        return self._reservation(self._run(self._attaching_reference(reference))[0])

    def _hand_over(self, number: int, claim: int, timeout: float, reservation: bool = False) -> Handle:
        return self._run(self._handing_over(number, claim, timeout, reservation))

    def _buffer(self, place: dict[str, Any], span: Span, claim: int = 0) -> Buffer:
        number, channel = place["buffer"], self._channel
        hold = place["hold"]

        def free() -> None:
            channel.free(number, claim, hold)

        self._spans.add(span)
        return Buffer(span, place, self, number, free, claim)

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
