"""Clients of a broker that is killed: of this process, and of others that it speaks for. What each knows is kept by their world.

What a request's answer gave, or a store acknowledged, is noted; nothing else is.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from gcma_shm import layout, messages
from gcma_shm._core import Plane, Slots
from gcma_shm.arena import open_arena
from gcma_shm.clients import forks
from gcma_shm.clients.forks import Fork
from gcma_shm.clients.holds import Holds
from gcma_shm.clients.reservation import Claims, Reservation
from gcma_shm.messages import Reply, Request
from gcma_shm.presence import Presence
from gcma_shm.process import start_time
from tests.faults.crash_broker import dies_with_its_parent
from tests.faults.steps import Hook
from tests.processes import WAIT_S, Child, Said, forked
from tests.register import MISS, Kind, Log, make_page, read_page, value_id

if TYPE_CHECKING:
    from tests.faults.crash_world import World

PAGE = layout.PAGE_SIZE_MIN
TYPE_STEP = 1 << 32  # a register's number is type * TYPE_STEP + offset
JITTER = 50  # one step in so many loses the processor
ROUNDS_MORE = 3
FILLED_VALUE = 1 << 63  # from here on: pages that are a pattern, below are those of the register
OPERATIONS_MAX = 20_000
LONGER_S = 10_000.0  # than any handle holds on


@dataclass(eq=False)
class Guest:
    """A buffer or reservation that some client knows of. `bytes`: what its memory is to hold; None: whatever."""

    number: int
    first: int
    pages: int
    area: str
    name: str | None
    is_reservation: bool
    holders: set[Client] = field(default_factory=set)
    sharers: set[Client] = field(default_factory=set)
    claim: int = 0  # the generation of a claim that is shared by messages
    bytes: bytes | None = None


class Client:
    """One client: asks the broker through the world's pipe, and acts in shared memory by itself."""

    def __init__(self, world: World, name: str, number: int = 0, child: Child | None = None) -> None:
        """Says hello, unless it has a `number` already, and maps the arena, unless it lives in `child`."""
        self.world = world
        self.peer = name.encode()
        self.pid = child.pid if child is not None else os.getpid()
        self.closed = False
        self.handles: dict[tuple[int, int], Slots] = {}
        self._requests = 0
        self._plane: Plane | None = None
        self._claims: Claims | None = None
        self._presence: Presence | None = None
        self._channel = SimpleNamespace(lock=threading.Lock(), timeout=WAIT_S, holds=Holds(), give_up=lambda *_: None)
        self.number: int = number or self.ask("hello", **self._who())["client"]
        if child is None:
            self._map()
        world.clients.append(self)

    def _who(self) -> dict[str, Any]:
        return {"pid": self.pid, "start": start_time(self.pid) or 0, "mapped": True}

    def _map(self) -> None:
        arena = open_arena(self.world.site.name)
        self.memory, g = arena.memory, arena.geometry
        self._plane = Plane(arena.memory, g, self.number, os.fsencode(self.world.site.spill_dir))
        self._presence = cast(Presence, arena.presence)
        self._presence.take(self.number)
        self.plane.write(g.client_at(self.number) + layout.CLIENT_LOCKED_AT, 1)
        self._claims = Claims(self.plane, self._presence, cast(Any, self._channel))

    @property
    def plane(self) -> Plane:
        return cast(Plane, self._plane)

    def ask(self, operation: str, pages: tuple[bytes, ...] = (), **parameters: Any) -> dict[str, Any]:
        """The results. Raises what the broker answers, BrokerDied."""
        return self.exchange(operation, pages, **parameters).results

    def exchange(self, operation: str, pages: tuple[bytes, ...] = (), **parameters: Any) -> Reply:
        self._requests += 1
        frames = messages.encode_request(Request(self._requests, operation, parameters, pages))
        reply: Reply = self.world.broker.call("request", self.peer, [bytes(frame) for frame in frames])
        if reply.status != "ok":
            raise messages.reply_error(reply)
        return reply

    def hello_again(self) -> None:
        """Introduces itself to the next broker, with what it knows of."""
        guests = self.world.guests.values()
        g = self.world.site.geometry
        self.ask(
            "hello",
            **self._who(),
            client=self.number,
            buffers=[guest.number for guest in guests if self in guest.holders],
            claims=[guest.number for guest in guests if self in guest.sharers],
            made=self.world.first.plane.read(g.client_at(self.number) + layout.CLIENT_CLAIMS_AT),
        )

    # --- buffers and reservations

    def _take(self, told: dict[str, Any]) -> Guest:
        number = told["buffer"]
        if number not in self.world.guests:
            name, is_reservation = told.get("name"), "reservation" in told
            pages = told["nbytes"] // PAGE
            self.world.guests[number] = Guest(number, told["first"], pages, told["area"], name, is_reservation)
        return self.world.guests[number]

    def alloc(self, pages: int, area: str = "a", **more: Any) -> Guest:
        guest = self._take(self.ask("alloc_contig", nbytes=pages * PAGE, area=area, **more))
        guest.holders.add(self)
        self.write(guest)
        return guest

    def reserve(self, pages: int, area: str = "a", **more: Any) -> Guest:
        guest = self._take(self.ask("reserve", nbytes=pages * PAGE, area=area, **more))
        guest.holders.add(self)
        return guest

    def write(self, guest: Guest) -> None:
        """Other bytes than anybody else's."""
        guest.bytes = os.urandom(64) * (guest.pages * PAGE // 64)
        memoryview((self._plane or self.world.first.plane).span(guest.first, guest.pages * PAGE))[:] = guest.bytes

    def free(self, guest: Guest) -> None:
        """Forgotten before the broker is asked: what a hello does not list is freed by that."""
        self._forget(guest)
        self.ask("free_contig", buffer=guest.number)

    def _forget(self, guest: Guest) -> None:
        guest.holders.discard(self)
        self.world.forget_unheld(guest)

    def attach(self, guest: Guest, claim: int = 0, token: int = 0) -> None:
        more: dict[str, Any] = {name: value for name, value in (("claim", claim), ("token", token)) if value}
        self.ask("attach", buffer=guest.number, **more)
        if claim:
            guest.sharers.add(self)
        else:
            guest.holders.add(self)

    def attach_name(self, name: str) -> None:
        self._take(self.ask("attach_name", name=name)).holders.add(self)

    def hand_over(self, guest: Guest, claim: int = 0) -> int:
        more: dict[str, Any] = {"claim": claim} if claim else {}
        self.world.handles_under_way = True
        token: int = self.ask("hand_over", buffer=guest.number, timeout_ms=int(LONGER_S * 100), **more)["token"]
        return token

    def _reservation(self, guest: Guest) -> Reservation:
        state = guest.number >> layout.INDEX_BITS << layout.KIND_BITS | layout.RESERVATION
        index = guest.number & layout.ALLOCATIONS_MAX
        words = {"number": guest.number, "index": index, "state": state, "first": guest.first, "pages": guest.pages}
        return cast(Reservation, SimpleNamespace(**words, nbytes=guest.pages * PAGE, released=False))

    def try_claim(self, guest: Guest) -> bool:
        """Claims it in shared memory, with bytes of its own; False: another has it."""
        got = cast(Claims, self._claims).claim(self._reservation(guest))
        if isinstance(got, int):
            return False
        self._keep = got[0]
        guest.sharers, guest.claim = {self}, got[1]
        self.write(guest)
        return True

    def claim(self, guest: Guest) -> None:
        assert self.try_claim(guest), f"{guest} is claimed by somebody"

    def lend(self, guest: Guest) -> None:
        """Ends its claim, or its part in one."""

        def tell(number: int, claim: int, _hold: object) -> None:
            self.ask("free_claim", buffer=number, claim=claim)

        claim = guest.claim
        guest.sharers.discard(self)
        if not guest.sharers:
            guest.bytes, guest.claim = None, 0
        if self._claims is not None and guest.number in self._claims.live:
            self._claims.end(guest.number, claim, tell)
        else:
            tell(guest.number, claim, None)
            self.world.forget_unheld(guest)

    def claim_word(self, guest: Guest) -> int:
        """As it is now."""
        index = guest.number & layout.ALLOCATIONS_MAX
        return self.plane.read(self.plane.geometry.allocation_at(index) + layout.ALLOCATION_CLAIM_AT)

    # --- slots

    def slots(self, type_: int) -> Slots:
        life = self.world.lives[type_]
        if (type_, life) not in self.handles:
            self.handles[type_, life] = self.plane.slots(type_, life, WAIT_S)
        return self.handles[type_, life]

    def store(self, type_: int, offset: int) -> None:
        page, value = self.world.page(type_, offset)
        self.slots(type_).store(offset, page)
        self.world.values[type_, offset] = {value}

    def load(self, type_: int, offset: int) -> int:
        page = self.slots(type_).load(offset)
        if page is not None and page == page[:4] * (PAGE // 4):
            return filled_value(int.from_bytes(page[:4], "little"))
        return MISS if page is None else read_page(type_ * TYPE_STEP + offset, page)

    def store_filled(self, type_: int, offset: int, pattern: int) -> None:
        """A page that is four bytes over and over, and in its slot's word."""
        self.slots(type_).store(offset, pattern.to_bytes(4, "little") * (PAGE // 4))
        self.world.values[type_, offset] = {filled_value(pattern)}

    def invalidate(self, type_: int, offset: int) -> None:
        self.slots(type_).invalidate_page(offset)
        self.world.values[type_, offset] = {MISS}

    def store_by_message(self, type_: int, offset: int) -> None:
        page, value = self.world.page(type_, offset)
        self.world.values[type_, offset].add(value)
        self.ask("store", (page,), type=type_, life=self.world.lives[type_], offset=offset)
        self.world.values[type_, offset] = {value}

    def load_by_message(self, type_: int, offset: int) -> int:
        reply = self.exchange("load", type=type_, life=self.world.lives[type_], offset=offset)
        return read_page(type_ * TYPE_STEP + offset, bytes(reply.pages[0])) if reply.results["hit"] else MISS

    def invalidate_by_message(self, type_: int, offset: int) -> None:
        self.world.values[type_, offset].add(MISS)
        self.ask("invalidate_page", type=type_, life=self.world.lives[type_], offset=offset)
        self.world.values[type_, offset] = {MISS}

    # --- coming and going

    def bye(self) -> None:
        """Whatever comes of it, it is gone."""
        self.gone()
        self.plane.close(WAIT_S)
        cast(Presence, self._presence).close()
        self.ask("bye")

    def gone(self) -> None:
        """It holds nothing any more: it is dead, or has said so."""
        self.closed = True
        self.world.clients.remove(self)
        for guest in list(self.world.guests.values()):
            if self in guest.sharers:
                guest.sharers.discard(self)
                if not guest.sharers:
                    guest.bytes, guest.claim = None, 0
            self._forget(guest)

    @contextlib.contextmanager
    def forked(self, work: Callable[[Said], object]) -> Iterator[Remote]:
        """A forked child of this client, as `clients/forks.py` makes it, which then does `work`."""
        fork = Fork(cast(Any, self))
        forks._prepare(fork)

        def child(said: Said) -> object:
            dies_with_its_parent()
            self.world.let_go(but=self)
            forks._start(cast(Any, self), fork)
            said.say()
            return work(said)

        with forked(child) as born:
            for lock in fork.locks:
                lock.release()
            cast(Presence, fork.presence).close()
            born.receive()
            remote = Remote(self.world, f"child-{fork.number}", born, fork.number)
            for guest in self.world.guests.values():
                if self in guest.holders:
                    guest.holders.add(remote)
                if self in guest.sharers:
                    guest.sharers.add(remote)
            yield remote

    def _reset(self, presence: Presence | None) -> None:
        self._presence = presence
        cast(Claims, self._claims).reset(cast(Presence, presence))

    def _disown(self) -> None:
        raise AssertionError("the child could not begin")


def filled_value(pattern: int) -> int:
    """The value of a page that is those four bytes over and over."""
    return FILLED_VALUE + pattern


class Remote(Client):
    """A client in another process, which this one speaks for; it does in shared memory what it is told."""

    def __init__(self, world: World, name: str, child: Child, number: int = 0) -> None:
        self.child = child
        super().__init__(world, name, number, child)

    def kill(self) -> None:
        self.child.kill()
        if not self.closed:
            self.gone()

    def tell(self, what: str, *arguments: object) -> Any:
        """One word of `act`; its answer."""
        with contextlib.suppress(BrokenPipeError):  # what it says then is why
            self.child.tell((what, arguments))
        return self.child.receive()

    def claim(self, guest: Guest) -> None:
        guest.claim, guest.bytes = self.tell("claim", replace(guest, holders=set(), sharers=set()))
        guest.sharers = {self}

    def die_in_store(self, type_: int, offset: int, step: int) -> None:
        """Killed at that change of a store."""
        page, value = self.world.page(type_, offset)
        self.world.values[type_, offset].add(value)
        self.child.tell(("store", (type_, self.world.lives[type_], offset, page, step)))
        self.child.wait()


def act(world: World, said: Said) -> None:
    """A `Remote` in its own process."""
    dies_with_its_parent()
    world.let_go()
    client = Client(world, "itself", said.hear())
    said.say()
    while True:
        what, arguments = said.hear()
        if what == "claim":
            guest: Guest = arguments[0]
            client.claim(world.guests.setdefault(guest.number, guest))
            said.say((guest.claim, guest.bytes))
        elif what == "claim and lend":
            _goes_on(said, _claiming(client, *arguments))
        elif what == "store and load":
            _goes_on(said, _storing(client, *arguments))
        else:
            type_, life, offset, page, step = arguments
            slots = client.plane.slots(type_, life, WAIT_S)
            Hook().arm_to_kill(step)
            slots.store(offset, page)
            raise AssertionError("the store has fewer steps")


def _goes_on(said: Said, rounds: Iterator[None]) -> None:
    """Round after round, until there is another word; a few more then, and how many there were is the answer."""
    Hook().jitter.value = JITTER
    done = 0
    while not (done and said.has_more):
        next(rounds)
        done += 1
        if done == 1:
            said.say()
    said.hear()
    for _ in range(ROUNDS_MORE):
        next(rounds)
    said.say(done + ROUNDS_MORE)


def _claiming(client: Client, guest: Guest) -> Iterator[None]:
    """Claims and lends in turn with whoever else does; what it writes stays until it lends."""
    while True:
        while not client.try_claim(guest):
            time.sleep(0.0001)
        word = client.claim_word(guest)
        with memoryview(client.plane.span(guest.first, guest.pages * PAGE)) as memory:
            assert bytes(memory) == guest.bytes, "bytes of a claimed range have changed"
        now = client.claim_word(guest)
        assert now == word, f"client {client.number} had {word:#x}; somebody made it {now:#x}"
        client.lend(guest)
        yield


def _storing(client: Client, type_: int, life: int, slots: int, path: Path, writer: int) -> Iterator[None]:
    """Stores and loads, logged."""
    handle, log = client.plane.slots(type_, life, WAIT_S), Log(path, writer, OPERATIONS_MAX)
    for n in range(1, OPERATIONS_MAX):
        offset = n * 7919 % slots
        slot = type_ * TYPE_STEP + offset
        if n % 3:
            at = log.begin(Kind.LOAD, slot)
            page = handle.load(offset)
            log.end(at, read_page(slot, page) if page is not None else MISS)
        else:
            at = log.begin(Kind.STORE, slot, value := value_id(writer, n))
            handle.store(offset, make_page(slot, value, PAGE))
            log.end(at)
        yield
    raise AssertionError("the log is full")
