"""An arena, its broker, its clients, what they must find when the broker was killed, and the proof of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import cast

from gcma_shm import layout
from gcma_shm.layout import CLAIM_CLIENT
from gcma_shm.records import Records, State
from tests.faults.crash_broker import Broker, Site
from tests.faults.crash_clients import LONGER_S, PAGE, TYPE_STEP, Client, Guest, Remote, act
from tests.faults.crash_faults import FAULTS
from tests.invariants import Snapshot, _check_files, check_tables
from tests.processes import forked
from tests.register import MISS, make_page, value_id

AREAS = {"a": 12, "b": 8, "c": 4}  # pages; c has no cache


class World:
    """An arena, its clients, and what they know."""

    def __init__(self, site: Site, fault: str = "") -> None:
        self.site = site
        self.fault = fault
        self.clients: list[Client] = []
        self.guests: dict[int, Guest] = {}
        self.lives: dict[int, int] = {}
        self.values: dict[tuple[int, int], set[int]] = {}  # what a slot may hold, by type and offset
        self.areas: dict[str, set[tuple[int, bool]]] = {}  # pages, and whether drained: what an area may be like
        self.quotas: dict[Client, set[int]] = {}
        self.handles_under_way = False
        self.after_death: Callable[[], None] = lambda: None  # before the next broker
        self.after_takeover: Callable[[], None] = lambda: None  # before the proof
        self.is_restless = False  # the broker's own threads run: it is at rest only when it is dead
        self.stack = contextlib.ExitStack()  # processes of a scene
        self._sequence = 0
        self.broker = Broker(site)
        self._everybody = [Client(self, f"client-{n}") for n in range(3)]
        self.first, self.second, self.third = self._everybody

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.broker.kill()
        self.stack.close()

    # --- brokers

    def take_over(self, step: int = 0) -> int:
        """A new broker, killed at that change of its takeover, if there is one; returns how many there were."""
        self.broker.kill()

        def first() -> None:
            self.let_go()
            if self.fault:
                FAULTS[self.fault]()

        self.broker = Broker(self.site, step, first)
        return self.broker.changes

    def let_go(self, but: Client | None = None) -> None:
        """In a forked child: the locks that it shares with this process are this one's alone."""
        for client in self.clients:
            if client is not but and client._presence is not None:
                client._presence.close()

    def greet(self) -> None:
        """All clients introduce themselves again."""
        for client in list(self.clients):
            client.hello_again()

    # --- clients

    @contextlib.contextmanager
    def remote(self, name: str) -> Iterator[Remote]:
        """A client in another process."""
        with forked(lambda said: act(self, said)) as child:
            client = Remote(self, name, child)
            child.tell(client.number)
            child.receive()
            yield client

    def forget_unheld(self, guest: Guest) -> None:
        if not guest.holders and not guest.sharers:
            self.guests.pop(guest.number, None)

    def page(self, type_: int, offset: int) -> tuple[bytes, int]:
        """A page that was never stored, and its value."""
        self._sequence += 1
        value = value_id(1, self._sequence)
        return make_page(type_ * TYPE_STEP + offset, value, PAGE), value

    def declare(self, type_: int, slots: int, write: str) -> None:
        self.lives[type_] = self.first.ask("swap_init", type=type_, slots=slots, write=write)["life"]
        self.values |= {(type_, offset): {MISS} for offset in range(slots)}

    def end(self, type_: int) -> None:
        self.first.ask("invalidate_area", type=type_, life=self.lives[type_])
        self.forget_type(type_)

    def forget_type(self, type_: int) -> None:
        del self.lives[type_]
        self.values = {at: values for at, values in self.values.items() if at[0] != type_}

    # --- the proof

    def prove_tables(self) -> None:
        """At rest: the arena, the broker's view of it, and the files."""
        first = self.first.plane
        with memoryview(self.first.memory) as memory:
            check_tables(memory, first.geometry)
            _check_files(Snapshot(memory, first.geometry), memory, self.site.spill_dir)
        self.broker.call("check")
        files = {path.name for path in self.site.spill_dir.iterdir()}
        assert files == {f"{type_:03}.{life}" for type_, life in self.lives.items()}, f"spill files: {files}"

    def prove_memory(self) -> None:
        """What was acknowledged is loaded; what is held has its bytes."""
        for n, ((type_, offset), values) in enumerate(self.values.items()):
            value = self._everybody[n % 2].load(type_, offset)
            assert value in values, (
                f"type {type_} slot {offset}: loaded {value:#x}, expected {[hex(v) for v in values]}"
            )
        for guest in self.guests.values():
            if guest.bytes is not None:
                with memoryview(self.first.plane.span(guest.first, guest.pages * PAGE)) as memory:
                    assert memory == guest.bytes, f"{guest.number}: a guest's bytes have changed"

    def prove_holders(self) -> None:
        """After everybody has said hello: held are exactly the guests that somebody knows of, and by whom."""
        found = self.broker.call("guests")
        handles = {number for number, (_, _, _, handles) in found.items() if handles}
        assert self.handles_under_way or not handles, f"handles under way: {found}"
        unknown = found.keys() - self.guests.keys() - handles
        assert not unknown, f"held by nobody who knows: {[found[number] for number in unknown]}"
        for number, guest in self.guests.items():
            assert number in found, f"guest {number} is lost"
            holders, sharers, name, _ = found[number]
            assert holders == {client.number for client in guest.holders}, f"guest {number}: holders {holders}"
            assert not sharers or sharers == {client.number for client in guest.sharers}, f"guest {number}: {sharers}"
            assert name == guest.name, f"guest {number} is called {name}"
            self._prove_claim(guest)
        known = {guest.name for guest in self.guests.values()} - {None}
        names = {told["name"] for told in self.first.ask("names")["names"]}
        assert names - {found[number][2] for number in handles} <= known <= names, f"names {names}, expected {known}"
        numbers = self.broker.call("clients")
        assert numbers == {client.number for client in self.clients}, f"clients {numbers}, known {self.clients}"

    def _prove_claim(self, guest: Guest) -> None:
        if not guest.is_reservation:
            return
        word = self.first.claim_word(guest)
        assert bool(word & CLAIM_CLIENT) == bool(guest.sharers), f"guest {guest.number}: claim word {word:#x}"
        if guest.sharers:
            assert word >> layout.CLAIM_GENERATION_SHIFT == guest.claim, f"guest {guest.number}: another claim"

    def prove_areas(self) -> None:
        for told in self.first.ask("areas")["areas"]:
            allowed = self.areas.get(told["name"], {(AREAS[told["name"]], False)})
            assert (told["size"] // PAGE, told["drained"]) in allowed, f"area {told}, expected {allowed}"
        for client, allowed_quotas in self.quotas.items():
            assert self.first.ask("quota", client=client.number)["quota"] in allowed_quotas

    def prove(self) -> None:
        """After a takeover; and that everything goes on."""
        self.prove_tables()
        self.prove_memory()
        self.greet()
        self.broker.call("tick")
        self.prove_tables()
        self.prove_holders()
        self.prove_areas()
        self.prove_memory()

    # --- and the end of it

    def clear(self) -> None:
        """Everything is given back, and nothing is left."""
        for guest in list(self.guests.values()):
            for sharer in list(guest.sharers):
                sharer.lend(guest)
            for holder in list(guest.holders):
                holder.free(guest)
        for client in list(self.clients):
            if client not in self._everybody:
                cast(Remote, client).kill()
        self.stack.close()
        self._everybody = [client if not client.closed else self._anew(client) for client in self._everybody]
        self.first, self.second, self.third = self._everybody
        self.broker.call("tick_later", LONGER_S)
        for client in self.quotas:
            if not client.closed:
                self.first.ask("quota", client=client.number, nbytes=0)
        self._restore_areas()
        for type_ in list(self.lives):
            self.end(type_)
        for client in self.clients:
            client.handles.clear()  # and with them their files
        self.handles_under_way = False
        self.areas, self.quotas = {}, {}
        self.after_death = self.after_takeover = lambda: None
        self.is_restless = False
        self.prove_tables()
        assert not self.broker.call("guests"), "guests that nobody holds"
        self.prove_holders()
        self.prove_areas()
        records = [(record.number, record.state) for record in Records(self.first.plane).used()]
        assert records == [(n, State.ALIVE) for n in sorted(client.number for client in self.clients)], records
        self._prove_areas_whole()

    def _anew(self, client: Client) -> Client:
        return Client(self, client.peer.decode())

    def _restore_areas(self) -> None:
        told = {area["name"]: area for area in self.first.ask("areas")["areas"]}
        for name, area in told.items():
            if area["drained"]:
                self.first.ask("area_resume", area=name)
        for name in sorted(told, key=lambda name: AREAS[name] * PAGE - told[name]["size"]):
            self.first.ask("area_resize", area=name, nbytes=AREAS[name] * PAGE)

    def _prove_areas_whole(self) -> None:
        """Each can be had whole, and under a name; and all pages of the nursery can be stored to."""
        for area, pages in AREAS.items():
            guest = self.second.alloc(pages, area, offset=0, name="whole")
            self.second.free(guest)
        nursery = self.site.geometry.nursery_pages
        self.declare(0, nursery, "through")
        for offset in range(nursery):
            self.first.store(0, offset)
        self.prove_memory()
        self.end(0)
