"""Allocations and the line before them, asked as the broker asks them, for tests without a broker."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gcma_shm.broker.allocations import Allocations
from gcma_shm.broker.areas import Areas
from gcma_shm.broker.line import Line
from gcma_shm.broker.table import Allocation
from gcma_shm.layout import BUFFER

if TYPE_CHECKING:
    from tests.conftest import Bare

PAGE = 4096
FOREVER_S = 1e6
TURNS = 100  # of the control loop, after which all must have been served that can be


@dataclass
class Desk:
    """Allocations and their line, as the broker's service asks them: each request is followed by `advance`, and by as many more
    turns as it takes.
    """

    bare: Bare
    quota: int | None = None
    now: float = 1000.0
    woken: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        areas = Areas(self.bare.plane, self.bare.arena.areas, memoryview(self.bare.arena.memory))
        self.allocations = Allocations(self.bare.plane, areas, self.quota)
        self.line = Line(self.allocations, self.woken.append)

    def monotonic(self) -> float:
        return self.now

    def ask(
        self,
        client: int,
        pages: int,
        area: str | None = "a",
        timeout_s: float = FOREVER_S,
        *,
        offset: int | None = None,
        kind: int = BUFFER,
        name: str | None = None,
    ) -> Allocation | int:
        wanted = self.allocations.wanted(pages * PAGE, area, offset)
        try:
            return self.line.ask(client, 1, wanted, kind, name, timeout_s)
        finally:
            self.advance()

    def get(self, client: int, pages: int, area: str | None = "a", timeout_s: float = 0, **more: int) -> Allocation:
        """What does not have to wait."""
        got = self.ask(client, pages, area, timeout_s, **more)  # type: ignore[arg-type] # an offset or a kind
        assert isinstance(got, Allocation)
        return got

    def wait(self, client: int, pages: int, area: str | None = "a", timeout_s: float = FOREVER_S) -> int:
        """The ticket of what has to."""
        ticket = self.ask(client, pages, area, timeout_s)
        assert isinstance(ticket, int)
        return ticket

    def free(self, allocation: Allocation) -> None:
        for client in list(allocation.holders):
            self.allocations.free(client, allocation.number)
        self.advance()

    def collect(self, client: int, ticket: int, give_up: bool = False) -> Allocation | None:
        try:
            return self.line.collect(client, ticket, give_up)
        finally:
            self.advance()

    def die(self, client: int) -> None:
        self.line.drop(client)
        self.allocations.drop(client)
        self.advance()

    def tick(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.allocations.expire()
        self.line.expire()
        self.advance()

    def resize(self, area: str, pages: int) -> None:
        self.allocations.resize(area, pages)
        self.line.reconsider()
        self.advance()

    def come(self, *tickets: tuple[int, int]) -> None:
        """Clients that come for tickets, in vain."""
        for client, ticket in tickets:
            assert self.collect(client, ticket) is None

    def advance(self) -> None:
        for _ in range(TURNS):
            self.line.advance()
            if not self.line.pending:
                break
        self.check()

    def check(self) -> None:
        self.line._check()
        self.allocations._check()
