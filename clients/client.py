"""A client: one process's session with a broker, its swap types and buffers."""

from __future__ import annotations

import operator
import os
import threading
import weakref
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, cast

from gcma_shm import layout
from gcma_shm._core import Plane
from gcma_shm.arena import Arena, open_arena
from gcma_shm.clients.buffer import Buffer
from gcma_shm.clients.channel import Channel
from gcma_shm.clients.swap import MappedSwap, MessageSwap, Swap
from gcma_shm.endpoint import default_endpoint
from gcma_shm.errors import ArenaError
from gcma_shm.process import start_time
from gcma_shm.records import Records, State

SLOTS_MAX = 1 << 40  # of a type, in the protocol
BYTES_MAX = 1 << 62  # of a buffer, in the protocol; whatever is larger is refused like this


@dataclass(frozen=True)
class AreaInfo:
    """An area just now; all but the name in bytes."""

    name: str
    size: int
    held: int  # by buffers
    lent: int  # to the cache
    free: int  # neither
    largest_free: int  # range that no buffer holds: what alloc_contig could return


class Client:
    """Made by `connect` or `embedded`. Safe across threads; a forked child is a client of its own and holds what its
    parent held.
    """

    def __init__(
        self, endpoint: str, mapped: bool | None, prefault: bool, timeout: float, wait_for_broker: float
    ) -> None:
        if timeout <= 0:
            raise ValueError(f"timeout {timeout}: expected more than zero seconds")
        self.endpoint = endpoint
        self._mapped = mapped is not False
        self._plane: Plane | None = None
        self._buffers: weakref.WeakSet[Buffer] = weakref.WeakSet()
        self._swaps: weakref.WeakSet[MappedSwap | MessageSwap] = weakref.WeakSet()
        self._children: dict[int, int] = {}  # forking thread -> the child's number
        self._channel = Channel(endpoint, timeout, wait_for_broker, self._introduce)
        try:
            self._channel.request("ping")
            self.page_size: int = self._channel.greeting["page_size"]
            if self._mapped:
                self._map(required=mapped is True, prefault=prefault)
        except BaseException:
            self._channel.close()
            raise
        _clients.add(self)

    def _introduce(self) -> dict[str, Any]:
        pid = os.getpid()
        who: dict[str, Any] = {"pid": pid, "start": start_time(pid) or 0, "mapped": self._mapped}
        if (
            self._plane is not None
        ):  # a forked child, or a broker that lost this session: say who we are and what we hold
            who |= {
                "client": self._plane.number,
                "buffers": [buffer.number for buffer in self._buffers if not buffer.freed],
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
        if prefault:
            arena.prefault()

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
        return self._channel.request("stats").results

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
            swap = MappedSwap(self._plane, type_, declared["life"], self._channel.timeout, self._channel)
        else:
            swap = MessageSwap(self._channel, type_, declared["life"], slots, write == "through")
        self._swaps.add(swap)
        return cast(Swap, swap)

    def alloc_contig(
        self,
        nbytes: int,
        area: str | None = None,
        offset: int | None = None,
        align: int | None = None,
        zero: bool = False,
    ) -> Buffer:
        """A contiguous buffer of `nbytes`, rounded up to whole pages. Only other buffers can be in its way, never
        cache, never a client.

        `area`: by default the one where it fits best. `offset`: exactly that many pages from the area's start (the
        kernel's start_pfn). `align`: of its place in the area, in bytes, a power of two. `zero`: cleared; otherwise it
        holds what the cache left there.

        Raises ArenaExhausted, NoSuchArea, ValueError; ArenaError for a client that does not map the arena;
        BrokerUnavailable, Closed.
        """
        wanted: dict[str, Any] = {"nbytes": min(operator.index(nbytes), BYTES_MAX)}
        if wanted["nbytes"] < 1:
            raise ValueError(f"{nbytes} bytes: expected at least 1")
        if area is not None:
            if not isinstance(area, str):
                raise TypeError(f"area of type {type(area).__name__}: expected a name")
            wanted["area"] = area
        for name, value, least in (("offset", offset, 0), ("align", align, 1)):
            if value is not None:
                wanted[name] = min(operator.index(value), BYTES_MAX)
                if wanted[name] < least:
                    raise ValueError(f"{name} {value}: expected at least {least}")
        if self._plane is None:
            raise ArenaError(
                "a buffer is memory of the arena, which this client does not map; connect with mapped=True on the broker's host"
            )
        place = self._channel.request("alloc_contig", wanted).results
        span = self._plane.span(place["first"], place["nbytes"])
        if zero:
            span.zero()
        buffer = Buffer(span, place["buffer"], place["area"], place["offset"], self._free, self._channel.give_up)
        self._buffers.add(buffer)
        return buffer

    def _free(self, number: int) -> None:
        self._channel.request("free_contig", {"buffer": number})

    def close(self) -> None:
        """Gives back every buffer and says goodbye; a second time has no effect.

        Raises BufferError while a view of a buffer is alive, TimeoutError when another thread's store or load does not
        end in time; then the client stays open, but for that nothing new begins after a TimeoutError.
        """
        if self._channel.closed:
            return
        in_use = [buffer for buffer in self._buffers if buffer.exports]
        if in_use:
            raise BufferError(
                f"the client cannot be closed: views or arrays of {len(in_use)} buffers are alive, of {in_use[0]!r} for one"
            )
        if self._plane is not None and not self._plane.close(self._channel.timeout):
            raise TimeoutError("a store or load in another thread has not ended; call close() again")
        for swap in list(self._swaps):
            swap.close()
        self._channel.close()
        for buffer in list(self._buffers):
            buffer._forget()
        _clients.discard(self)

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

    # --- fork: the child's record is written before, because afterwards the parent may end before the child has run at
    # all

    def _before_fork(self) -> None:
        if self._plane is not None and not self.closed:
            records = Records(self._plane)
            number = records.take(self._plane.number)
            records.fill(number, State.FORKED, 0, 0)
            self._plane.add(layout.FORKS_AT, 1)
            self._children[threading.get_ident()] = number

    def _after_fork_in_parent(self) -> None:
        self._children.pop(threading.get_ident(), None)

    def _after_fork_in_child(self) -> None:
        number = self._children.pop(threading.get_ident(), None)
        self._children.clear()
        if self.closed:
            return
        self._channel.reset()
        if self._plane is None:
            return
        if number is None:  # no record was free: nothing of this client may be used here
            self._plane.close(0)
            self._channel.close()
            return
        pid = os.getpid()
        self._plane.become(number)
        Records(self._plane).fill(number, State.ALIVE, pid, start_time(pid) or 0)


_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _at_fork(step: str) -> None:
    for client in list(_clients):
        getattr(client, step)()


os.register_at_fork(
    before=lambda: _at_fork("_before_fork"),
    after_in_parent=lambda: _at_fork("_after_fork_in_parent"),
    after_in_child=lambda: _at_fork("_after_fork_in_child"),
)


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
