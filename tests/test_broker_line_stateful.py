"""The line of those who wait for memory, whatever happens in any order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from gcma_shm.areas import AreaSpec
from gcma_shm.broker import line as line_module
from gcma_shm.broker.line import ASKED_S
from gcma_shm.broker.room import Wanted
from gcma_shm.broker.table import Allocation
from gcma_shm.errors import ArenaExhausted, BufferExists, NoSuchBuffer, QuotaExceeded
from gcma_shm.layout import BUFFER, RESERVATION
from tests.conftest import private_bare
from tests.desk import FOREVER_S, PAGE, Desk
from tests.invariants import check_tables


@dataclass
class Asked:
    """A request that waits, or was served and not collected."""

    client: int
    ticket: int
    wanted: Wanted
    deadline: float
    asked: float  # when its client last came for it; it may have been served since


class Machine(RuleBasedStateMachine):
    """Whatever happens, in any order: nobody in front could be served, every ticket has one end, and all comes back."""

    clients = st.integers(2, 6)
    which = st.integers(0, 1 << 10)

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(private_bare({"a": 40 * PAGE, "b": AreaSpec(80 * PAGE, align=4 * PAGE)}, 1 << 20), 120 * PAGE)
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(line_module, "time", self.desk)
        self.asked: list[Asked] = []
        self.held: list[tuple[int, Allocation]] = []
        self.woken: dict[int, int] = {}

    def _pages(self, client: int) -> int:
        return sum(allocation.place.pages for who, allocation in self.held if who == client)

    @rule(
        client=clients,
        pages=st.integers(1, 20) | st.integers(1, 70),
        area=st.sampled_from([None, "a", "b"]),
        timeout_s=st.sampled_from([0.0, 3.0, 5.0, 50.0, FOREVER_S]),
        kind=st.sampled_from([BUFFER, RESERVATION]),
        name=st.none() | st.none() | st.sampled_from("xy"),
    )
    def ask(self, client: int, pages: int, area: str | None, timeout_s: float, kind: int, name: str | None) -> None:
        try:
            got = self.desk.ask(client, pages, area, timeout_s, kind=kind, name=name)
        except (ArenaExhausted, BufferExists, QuotaExceeded):
            return
        if isinstance(got, Allocation):
            self.held.append((client, got))
        else:
            assert timeout_s > 0
            wanted = self.desk.line._waiting[got].wanted
            self.asked.append(Asked(client, got, wanted, self.desk.now + timeout_s, self.desk.now))

    @precondition(lambda self: self.held)
    @rule(which=which)
    def free(self, which: int) -> None:
        client, allocation = self.held.pop(which % len(self.held))
        self.desk.allocations.free(client, allocation.number)
        self.desk.advance()

    @precondition(lambda self: self.asked)
    @rule(which=which, give_up=st.booleans())
    def collect(self, which: int, give_up: bool) -> None:
        asked = self.asked[which % len(self.asked)]
        try:
            got = self.desk.collect(asked.client, asked.ticket, give_up)
        except (ArenaExhausted, QuotaExceeded, BufferExists):
            self.asked.remove(asked)
            return
        except NoSuchBuffer:
            assert self.desk.now >= asked.asked + ASKED_S
            self.asked.remove(asked)
            return
        if got is not None:
            assert got.holders == {asked.client}
            assert got.place.area in asked.wanted.areas
            assert got.place.pages == asked.wanted.pages
            self.held.append((asked.client, got))
            self.asked.remove(asked)
        else:
            assert not give_up
            assert self.desk.now < asked.deadline
            asked.asked = self.desk.now

    @rule(but_for=clients)
    def come(self, but_for: int) -> None:
        """As clients do once a second: all that wait, but for one."""
        for asked in list(self.asked):
            if asked.client != but_for and asked.ticket in self.desk.line._waiting:
                self.collect(self.asked.index(asked), False)

    @rule(client=clients)
    def die(self, client: int) -> None:
        self.held = [(who, allocation) for who, allocation in self.held if who != client]
        self.asked = [asked for asked in self.asked if asked.client != client]
        self.desk.die(client)
        assert self.desk.allocations.holders.of(client) == []

    @rule(seconds=st.sampled_from([0.0, 1.0, 2.0, 4.0, 5.0, 40.0]))
    def pass_time(self, seconds: float) -> None:
        self.desk.tick(seconds)
        for asked in self.asked:
            if asked.ticket in self.desk.line._waiting:
                assert self.desk.now < min(asked.deadline, asked.asked + ASKED_S)
        assert all(self.desk.now < served.asked + ASKED_S for served in self.desk.line._served.values())

    @rule(name=st.sampled_from("ab"), change=st.sampled_from(["drain", "resume", "resume"]))
    def drain_or_resume(self, name: str, change: str) -> None:
        getattr(self.desk.allocations, change)(name)
        self.desk.advance()

    @rule(name=st.sampled_from("ab"), pages=st.integers(1, 90))
    def resize(self, name: str, pages: int) -> None:
        with contextlib.suppress(ArenaExhausted):
            self.desk.resize(name, pages)

    def _waiting(self) -> Iterator[Wanted]:
        return (waiting.wanted for waiting in self.desk.line._waiting.values())

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        self.desk.check()
        front = next(self._waiting(), None)
        for wanted in self._waiting():
            assert front is not None
            if not set(front.areas) & set(wanted.areas) or wanted is front:
                assert self.desk.allocations.areas.find(wanted) is None

    @invariant()
    def nobody_waits_for_what_will_never_be(self) -> None:
        for wanted in self._waiting():
            assert any(wanted.pages <= part.pages for area in wanted.areas for part in area.parts)

    @invariant()
    def every_ticket_is_in_line_or_served(self) -> None:
        tickets = {asked.ticket for asked in self.asked if self.desk.now < asked.asked + ASKED_S}
        assert tickets <= self.desk.line._waiting.keys() | self.desk.line._served.keys()
        assert self.desk.line._waiting.keys() | self.desk.line._served.keys() <= {asked.ticket for asked in self.asked}
        assert len(self.desk.line) == len(self.desk.line._waiting)

    @invariant()
    def what_is_held_is_what_was_given(self) -> None:
        known: dict[int, set[int]] = {client: set(self.desk.line.uncollected(client)) for client in range(2, 7)}
        for client, allocation in self.held:
            known[client].add(allocation.number)
        for client in range(2, 7):
            assert set(self.desk.allocations.holders.of(client)) == known[client]

    def teardown(self) -> None:
        for client in range(2, 7):
            self.desk.die(client)
        assert len(self.desk.line) == 0
        arena = self.desk.bare.arena
        assert len(self.desk.allocations._table._free) == arena.geometry.allocations_max
        check_tables(memoryview(arena.memory), arena.geometry)
        self.patch.undo()


@pytest.mark.timeout(600)
def test_any_order_serves_them_all() -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None))
