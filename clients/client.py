"""A client: one process's session with a broker, its swap types and buffers."""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import threading
import weakref
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, cast

from gcma_shm import layout
from gcma_shm._core import Plane, Span
from gcma_shm.arena import Arena, open_arena
from gcma_shm.clients.buffer import Buffer
from gcma_shm.clients.channel import Channel
from gcma_shm.clients.swap import MappedSwap, MessageSwap, Swap
from gcma_shm.endpoint import default_endpoint
from gcma_shm.errors import ArenaError, NoSuchBuffer, QuotaExceeded
from gcma_shm.messages import Reply
from gcma_shm.process import start_time
from gcma_shm.records import Records, State

log = logging.getLogger(__name__)

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
    largest_free: int  # range that no buffer holds: what alloc_contig could return


class Client:
    """Made by `connect` or `embedded`. Safe across threads; a forked child is a client of its own and holds what its
    parent held.
    """

    def __init__(
        self, endpoint: str, mapped: bool | None, prefault: bool, timeout: float, wait_for_broker: float
    ) -> None:
        for name, seconds, least in (("timeout", timeout, 0.001), ("wait_for_broker", wait_for_broker, 0.0)):
            if not least <= seconds <= SECONDS_MAX:  # also refuses what is not a number
                raise ValueError(f"{name} {seconds}: expected {least} to {SECONDS_MAX:g} seconds")
        self.endpoint = endpoint
        self._mapped = mapped is not False
        self._plane: Plane | None = None
        # By the memory and not by the Buffer: an array that outlives its Buffer keeps the memory.
        self._held: weakref.WeakValueDictionary[int, Span] = weakref.WeakValueDictionary()
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
        _clients.add(self)

    def _introduce(self) -> dict[str, Any]:
        pid = os.getpid()
        who: dict[str, Any] = {"pid": pid, "start": start_time(pid) or 0, "mapped": self._mapped}
        if self._channel.greeting:  # not the first time: no other arena will do
            who["arena_id"] = self._channel.greeting["arena_id"]
        if self._plane is not None:  # a forked child, or one whose session was lost: say who we are and what we hold
            who |= {"client": self._plane.number, "buffers": list(self._held)}
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
        span, place = self._channel.request("alloc_contig", wanted, then=self._hold)
        if zero:
            span.zero()
        number = place["buffer"]
        held = self._held
        # When nothing refers to the memory any more, neither a Buffer nor a view or array, it is given back; and the
        # client lives as long as that.
        give_up = weakref.finalize(span, self._give_up, number)
        give_up.atexit = False  # the broker sees the process end

        def free() -> None:
            held.pop(number, None)
            give_up.detach()
            try:
                with contextlib.suppress(NoSuchBuffer):  # the first hello of a forked child has given it back already
                    self._channel.request("free_contig", {"buffer": number})
            except BaseException:  # whether it was freed nobody knows; it will be, and is not ours to use
                self._channel.give_up(number)
                raise

        return Buffer(span, place["area"], place["offset"], free, lambda: held.get(number) is not span)

    def _hold(self, reply: Reply) -> tuple[Span, dict[str, Any]]:
        """Under the channel's lock, which a fork takes too: a child has the memory and its hold, or neither."""
        place = reply.results
        span = cast(Plane, self._plane).span(place["first"], place["nbytes"])
        self._held[place["buffer"]] = span
        return span, place

    def _give_up(self, number: int) -> None:
        self._channel.give_up(number)

    def close(self) -> None:
        """Gives back every buffer and says goodbye; a second time has no effect.

        Raises BufferError while a view of a buffer is alive, TimeoutError when another thread's store or load does not
        end in time; then the client stays open, but for that nothing new begins after a TimeoutError.
        """
        if self._channel.closed:
            return
        in_use = [number for number, span in self._held.items() if span.exports]
        if in_use:
            raise BufferError(
                f"the client cannot be closed: views or arrays of {len(in_use)} of its buffers are alive; drop them first"
            )
        if self._plane is not None and not self._plane.close(self._channel.timeout):
            raise TimeoutError("a store or load in another thread has not ended; call close() again")
        for swap in list(self._swaps):
            swap.close()
        self._channel.close()
        self._held.clear()
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

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a client cannot be pickled: pass client.endpoint, and connect() to it in the other process")

    # --- fork: the child's record is written before, because afterwards the parent may end before the child has run at
    # all. The channel's lock is held meanwhile, so that what the child finds and what the broker lets it inherit are
    # the same.

    def _before_fork(self) -> Fork:
        fork = Fork(self, self._channel.lock, self._channel.lock.acquire(timeout=self._channel.timeout))
        if self._plane is None or self.closed:
            return fork
        records = Records(self._plane)
        try:
            fork.number = records.take(self._plane.number)
        except QuotaExceeded as error:
            log.warning("the child that is about to be forked cannot use %r: %s", self, error)
            return fork
        records.fill(fork.number, State.FORKED, 0, 0)
        fork.word = records.word(fork.number)
        self._plane.add(layout.FORKS_AT, 1)
        return fork

    def _after_fork_in_child(self, fork: Fork | None) -> None:
        """`fork`: None for a client that another thread was just making."""
        if self.closed:
            return
        try:
            if self._plane is not None:
                pid = os.getpid()
                # Refused when no record was free, or this child was stopped for so long that it was taken for dead.
                if fork is None or not fork.number:
                    raise QuotaExceeded("no client record was free at the fork")
                if not Records(self._plane).start(fork.number, fork.word, pid, start_time(pid) or 0):
                    raise QuotaExceeded("this child began too late")
                self._plane.become(fork.number)
            self._channel.reset()
        except BaseException:  # better no client than one that acts under its parent's number
            if self._plane is not None:
                self._plane.close(0)
            self._channel.disown()


@dataclass
class Fork:
    """What was prepared for one client before a fork: its lock, and the record of the child (number 0: none)."""

    client: Client
    lock: threading.Lock
    locked: bool
    number: int = 0
    word: int = 0


_clients: weakref.WeakSet[Client] = weakref.WeakSet()
_forks = threading.local()  # of each thread that forks: threads may prepare forks at the same time


def _before_fork() -> None:
    # Sorted: one order of locks, whichever threads fork.
    _forks.prepared = []
    for client in sorted(_clients, key=id):
        _forks.prepared.append(client._before_fork())


def _take_prepared() -> list[Fork]:
    """What this thread prepared for its fork, kept no longer: it refers to the clients, which must stay collectable."""
    prepared: list[Fork] = _forks.prepared
    _forks.prepared = []
    return prepared


def _after_fork_in_parent() -> None:
    for fork in _take_prepared():
        if fork.locked:
            fork.lock.release()


def _after_fork_in_child() -> None:
    prepared = {fork.client: fork for fork in _take_prepared()}
    for client in list(_clients):
        client._after_fork_in_child(prepared.get(client))


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


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
