"""A client: one process's session with a broker, its swap types and buffers."""

from __future__ import annotations

import contextlib
import operator
import os
import weakref
from types import TracebackType
from typing import Any, Literal, Self, cast

from gcma_shm import layout
from gcma_shm._core import Plane, Span
from gcma_shm.arena import Arena, open_arena
from gcma_shm.clients.allocator import Allocator
from gcma_shm.clients.channel import Channel
from gcma_shm.clients.handles import clients
from gcma_shm.clients.reservation import Claims
from gcma_shm.clients.swap import MappedSwap, MessageSwap, Swap
from gcma_shm.curve import Credentials, credentials_of
from gcma_shm.endpoint import default_endpoint, is_tcp
from gcma_shm.errors import ArenaError
from gcma_shm.presence import Presence
from gcma_shm.process import pid_namespace, start_time
from gcma_shm.sizes import check_seconds

SLOTS_MAX = 1 << 40  # of a type, in the protocol


class Client(Allocator):
    """Made by `connect` or `embedded`. Safe across threads; a forked child is a client of its own and holds what its
    parent held.
    """

    def __init__(
        self,
        endpoint: str,
        mapped: bool | None,
        prefault: bool,
        timeout: float,
        wait_for_broker: float,
        credentials: Credentials | None = None,
    ) -> None:
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
        self._spans: weakref.WeakValueDictionary[int, Span] = weakref.WeakValueDictionary()
        self._swaps: weakref.WeakSet[MappedSwap | MessageSwap] = weakref.WeakSet()
        owner = weakref.ref(self)
        self._channel = Channel(
            endpoint, timeout, wait_for_broker, lambda: cast(Client, owner())._introduce(), credentials
        )
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

    def _map(self, required: bool, prefault: bool) -> None:
        greeting = self._channel.greeting
        try:
            arena: Arena = open_arena(greeting["arena"], greeting["arena_id"])
            plane = Plane(arena.memory, arena.geometry, greeting["client"], os.fsencode(greeting["spill_dir"]))
            presence = cast(Presence, arena.presence)
            presence.take(plane.number)
            plane.write(arena.geometry.client_at(plane.number) + layout.CLIENT_LOCKED_AT, 1)
            plane.tell_presence(presence.fileno())
            self._plane, self._presence, self._generation = plane, presence, greeting["generation"]
        except (ArenaError, OSError):
            if required:
                raise
            # Not ours to map (another container, say): start over as one that sends its pages in messages.
            self._channel.request("bye")
            del self._channel.greeting["client"]
            self._mapped = False
            self._channel.request("ping")
            return
        self._claims = Claims(self._plane, presence, self._channel)
        if prefault:
            arena.prefault()
            self._plane.populate(0, arena.geometry.pages * self.page_size)

    @property
    def mapped(self) -> bool:
        """Whether pages go through shared memory; False: in messages."""
        return self._mapped

    def stats(self) -> dict[str, Any]:
        """Counters and gauges of the arena, its clients and its broker; docs/protocol.md lists the keys."""
        return cast(dict[str, Any], self._channel.request("stats").results)

    def swap(
        self, type: int, slots: int, write: Literal["through", "behind"] = "through", share: int = layout.SHARE_WHOLE
    ) -> Swap:
        """Declares swap type `type` (0 to 255) with `slots` slots, or opens it as it was declared. `share`: how many percent of the
        cache its pages may have at once.

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
        if not 1 <= operator.index(share) <= layout.SHARE_WHOLE:
            raise ValueError(f"share={share}: expected 1 to {layout.SHARE_WHOLE} percent of the cache")
        wanted = {"type": type_, "slots": slots, "write": write, "share": operator.index(share)}
        declared = self._channel.request("swap_init", wanted).results
        swap: MappedSwap | MessageSwap
        if self._plane is not None:
            swap = MappedSwap(self._plane, type_, declared["life"], self._channel.timeout, self)
        else:
            swap = MessageSwap(self, type_, declared["life"], slots, write == "through")
        self._swaps.add(swap)
        return cast(Swap, swap)

    def close(self) -> None:
        """Gives back every buffer and says goodbye; a second time has no effect.

        Raises BufferError while a view of a buffer is alive, TimeoutError when another thread's store or load does not
        end in time; then the client stays open, but for that nothing new begins after a TimeoutError.
        """
        if self._channel.closed:
            return
        sealed = self._seal()
        # No claim is under way, nor the sweep that ends one, when the plane closes: after `bye` the broker takes all of it back.
        with self._claims.lock if self._claims is not None else contextlib.nullcontext():
            done = self._plane is None or self._plane.close(self._channel.timeout)
        if not done:
            for span in sealed:
                span.unseal()
            raise TimeoutError("a store or load in another thread has not ended; call close() again")
        for swap in list(self._swaps):
            swap.close()
        if self._plane is not None and self._presence is not None:
            self._plane.tell_presence(-1)
            with self._channel.lock:  # no fork is under way
                self._presence.close()  # before the number may be another's
        self._channel.close()
        clients.discard(self)

    def _seal(self) -> list[Span]:
        """No view of a buffer can be made any more; all of them that were not sealed before. Raises BufferError when there is one."""
        claimed = [claim.span() for claim in list(self._claims.live.values())] if self._claims is not None else []
        sealed: list[Span] = []
        for span in (*self._living_spans(), *claimed):
            if span is None or span.sealed:
                continue
            if not span.seal():
                for other in sealed:
                    other.unseal()
                raise BufferError(
                    "the client cannot be closed: views or arrays of its buffers are alive; drop them first"
                )
            sealed.append(span)
        return sealed

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


def connect(
    endpoint: str | None = None,
    *,
    mapped: bool | None = None,
    prefault: bool = False,
    timeout: float = 5.0,
    wait_for_broker: float = 0.0,
    curve_key: str | os.PathLike[str] | None = None,
    server_key: str | os.PathLike[str] | None = None,
) -> Client:
    """Connects to the broker on `endpoint`, by default `$GCMA_ENDPOINT` or this user's default one.

    `mapped`: None maps the arena when it may, else sends pages in messages; True insists; False sends messages.
    `prefault`: fills this process's page table for the whole arena now, so that no buffer costs a fault later.
    `timeout`: seconds that one request, or one store, may wait. `wait_for_broker`: seconds to wait for a broker that
    is not there yet.

    Over `tcp://`: `curve_key` is the file with this client's secret key, by default `$GCMA_CURVE_KEY`; `server_key` the broker's
    public key, 40 characters or a file, by default `$GCMA_SERVER_KEY` (both made by `gcma keygen`). Such a client sends its pages
    in messages, encrypted, and may do what the broker's file of authorized keys says: anything else raises Forbidden.

    Raises BrokerUnavailable (also when the keys do not fit), ArenaError (also for a key file that others may read),
    QuotaExceeded (too many clients), ValueError for a malformed endpoint or key, FileNotFoundError.
    """
    where = endpoint or default_endpoint()
    credentials = credentials_of(where, curve_key, server_key)
    return Client(where, mapped, prefault, timeout, wait_for_broker, credentials)
