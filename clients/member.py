"""What a client is, however it asks its broker: its record and memory, what it holds, how it says hello, and what becomes of it in a fork. Sends nothing."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any, cast

from gcma_shm import layout
from gcma_shm._core import Plane, Span
from gcma_shm.arena import Arena, open_arena
from gcma_shm.clients.handles import Reference
from gcma_shm.clients.living import Living
from gcma_shm.clients.reservation import Claims
from gcma_shm.endpoint import is_tcp
from gcma_shm.errors import ArenaError, Closed
from gcma_shm.presence import Presence
from gcma_shm.process import pid_namespace, start_time
from gcma_shm.sizes import check_seconds

if TYPE_CHECKING:
    from gcma_shm.clients.aio_channel import AsyncChannel
    from gcma_shm.clients.buffer import Held
    from gcma_shm.clients.channel import Channel


class Member:
    """One of an arena's clients. Whoever derives from it makes `_channel`, with `_introduce` for the hello."""

    page_size: int
    _channel: Channel | AsyncChannel

    def __init__(self, endpoint: str, mapped: bool | None, timeout: float, wait_for_broker: float) -> None:
        check_seconds("timeout", timeout, 0.001)
        check_seconds("wait_for_broker", wait_for_broker)
        if mapped and is_tcp(endpoint):
            raise ValueError(
                "over TCP a client maps nothing: pages go in messages; use the ipc endpoint on the broker's host"
            )
        self.endpoint = endpoint
        self._mapped = mapped is not False and not is_tcp(endpoint)
        self._plane: Plane | None = None
        self._claims: Claims | None = None
        self._presence: Presence | None = None
        self._greeted_pid = 0
        self._generation = 0  # of the record, while the arena is mapped
        # The memory and not the Buffer: an array that outlives its Buffer keeps the memory.
        self._spans: Living[Span] = Living()
        self._buffers: weakref.WeakValueDictionary[int, Held] = (
            weakref.WeakValueDictionary()
        )  # by their spans' identity

    @property
    def number(self) -> int:
        """This client's number, as statistics and ArenaExhausted.holders tell it."""
        return self._plane.number if self._plane is not None else int(self._channel.greeting["client"])

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._channel.closed

    @property
    def mapped(self) -> bool:
        """Whether pages go through shared memory; False: in messages."""
        return self._mapped

    @property
    def arena_id(self) -> bytes:
        """16 bytes that no other arena has."""
        return bytes(self._channel.greeting["arena_id"])

    def locate(self, address: int, nbytes: int) -> tuple[Reference, int] | None:
        """Which buffer of this client that memory of this process lies in, all of it, and how many bytes from its start; None: in
        none.
        """
        plane = self._plane
        at = -1 if plane is None or plane.closed else plane.place_of(address, nbytes)
        if plane is None or at < 0:
            return None
        claimed = [claim.span() for claim in list(self._claims.live.values())] if self._claims is not None else []
        for span in (*self._spans, *claimed):
            if span is None or span.sealed:  # freed, and its Buffer not forgotten yet: another one may lie there
                continue
            begin = span.first * plane.page_size
            if begin <= at and at + nbytes <= begin + span.nbytes:
                return Reference(self.endpoint, self.arena_id, *span.held), at - begin
        return None

    def _note(self, buffer: Held, span: Span) -> None:
        """A new buffer and its memory."""
        self._buffers[id(span)] = buffer
        self._spans.add(span)

    def _introduce(self) -> dict[str, Any]:
        pid = os.getpid()
        who: dict[str, Any] = {
            "pid": pid,
            "start": start_time(pid) or 0,
            "pidns": pid_namespace(),
            "mapped": self._mapped,
        }
        if self._channel.greeting:  # not the first time: no other arena will do
            who["arena_id"] = self._channel.greeting["arena_id"]
            # Not in a forked child, which is a new client, nor over TCP, where a session ends with its connection.
            if self._greeted_pid == pid and "client" in self._channel.greeting and not is_tcp(self.endpoint):
                who["client"] = self._channel.greeting["client"]
                who["generation"] = self._channel.greeting["generation"]
        self._greeted_pid = pid
        if self._plane is not None:  # a forked child, or one whose session was lost: say who we are and what we hold
            who |= {"client": self._plane.number, "generation": self._generation} | self._holding()
        return who

    def _holding(self) -> dict[str, Any]:
        """What this client knows that it holds; what else a broker thinks is taken back by the hello that says so."""
        plane, claims, holds = cast(Plane, self._plane), cast(Claims, self._claims), self._channel.holds
        with claims.lock:  # after the channel's, as before a fork
            own, made = list(claims.live), plane.read(self._record + layout.CLIENT_CLAIMS_AT)
        # Should a broker have let us attach, and died before it said so: we come for it again, and it must be there still.
        attaching = self._channel.attaching
        return {
            "buffers": [*holds.buffers(), *(p["buffer"] for p in attaching)],
            "claims": [*own, *holds.shares(), *(p["buffer"] for p in attaching if "claim" in p)],
            "made": made,
        }

    @property
    def _record(self) -> int:
        """Where this client's record is in the arena."""
        plane = cast(Plane, self._plane)
        return plane.geometry.client_at(plane.number)

    def _map(self) -> Arena:
        """Maps the arena that the broker has told of. Raises ArenaError, OSError when it may not be had."""
        greeting = self._channel.greeting
        arena = open_arena(greeting["arena"], greeting["arena_id"])
        plane = Plane(arena.memory, arena.geometry, greeting["client"], os.fsencode(greeting["spill_dir"]))
        presence = cast(Presence, arena.presence)
        presence.take(plane.number)
        plane.write(arena.geometry.client_at(plane.number) + layout.CLIENT_LOCKED_AT, 1)
        plane.tell_presence(presence.fileno())
        self._plane, self._presence, self._generation = plane, presence, greeting["generation"]
        self._claims = Claims(plane, presence, self._channel)
        return arena

    def _refuse_unmapped(self) -> None:
        if self._plane is None:
            raise ArenaError(
                "a buffer is memory of the arena, which this client does not map; connect with mapped=True on the broker's host"
            )

    def _give_up(self, *held: Any) -> None:
        """For finalizers: see `give_up` of the channel, which may be another one by then."""
        self._channel.give_up(*held)

    def _seal(self) -> list[Span]:
        """No view of a buffer can be made any more; all of them that were not sealed before. Raises BufferError when there is one."""
        claimed = [claim.span() for claim in list(self._claims.live.values())] if self._claims is not None else []
        sealed: list[Span] = []
        for span in (*self._spans, *claimed):
            if span is None or span.sealed:
                continue
            # Memory without a Buffer and without a view: something refers to the memory itself, as an array may on a closed SharedMemory.
            if (span in self._spans and id(span) not in self._buffers) or not span.seal():
                for other in sealed:
                    other.unseal()
                raise BufferError(
                    "the client cannot be closed: views or arrays of its buffers are alive; drop them first"
                )
            sealed.append(span)
        return sealed

    def _leave_arena(self) -> None:
        """At the end, after the plane was closed: the lock goes before the number may be another's."""
        if self._plane is not None and self._presence is not None:
            self._plane.tell_presence(-1)
            with self._channel.lock:  # no fork is under way
                self._presence.close()

    def _open_file(self) -> Presence:
        """The arena's object through another open file, with locks of its own. Raises Closed."""
        with self._channel.lock:  # `close` does not take the descriptor away meanwhile
            if self.closed or self._presence is None:
                raise Closed("this client is closed")
            return self._presence.anew()

    def __repr__(self) -> str:
        return f"<gcma client {self.number} on {self.endpoint}{', closed' if self.closed else '' if self.mapped else ', by messages'}>"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a client cannot be pickled: pass client.endpoint, and connect() to it in the other process")

    def _reset(self, presence: Presence | None) -> None:
        """In a forked child, after the plane has become another client's, which `presence` has the lock of."""
        self._channel.reset()
        if self._claims is not None and presence is not None:
            self._claims.reset(presence)
            self._presence = presence
            cast(Plane, self._plane).tell_presence(presence.fileno())

    def _disown(self) -> None:
        """In a forked child that is no client."""
        if self._plane is not None:
            self._plane.close(0)
        self._channel.disown()
