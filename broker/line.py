"""The line: requests for memory that wait until somebody frees some.

Runs on the control thread alone. First come, first served; who comes later may pass only where that can not delay the one in
front, as in EASY backfilling (Lifka, 1995), but by proof and not by estimate: see `room.delays`. Nobody waits in it for a
client: what is in the way is always a guest, and each waiter has its time.

A request that has to wait is answered with a ticket at once. Its client sleeps on a word in the arena and comes for the result
when it is woken; so no socket, and no other thread of that client, is held up meanwhile.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from gcma_shm.broker.allocations import Allocations
from gcma_shm.broker.room import Place, Wanted
from gcma_shm.broker.table import Allocation
from gcma_shm.errors import GcmaError, NoSuchBuffer

LINE_MAX = 1024
LINE_MAX_CLIENT = 64
ASKED_S = 5.0  # a client comes every second; who has not for so long loses its place, or what it was served
TRIES_MAX = 16  # places that are looked for in one turn of the control loop


@dataclass
class Waiting:
    """One request in line, or served and not collected."""

    ticket: int
    client: int
    request: int
    wanted: Wanted
    kind: int
    name: str | None
    deadline: float
    asked: float  # when its client last came, or was served
    result: Allocation | GcmaError | None = None


class Line:
    """Who waits for memory. `wake(client)` is called when one of its requests was served. `tickets`: none of them was given before."""

    def __init__(self, allocations: Allocations, wake: Callable[[int], None], tickets: int = 0) -> None:
        self._allocations = allocations
        self._wake = wake
        self._waiting: dict[int, Waiting] = {}  # by ticket, in order
        self._served: dict[int, Waiting] = {}
        self._tickets = tickets
        allocations.when_freed = self._freed
        self._unlooked = 0  # of those in line, since memory was freed
        self._cursor = 0  # the last ticket that was looked at

    def __len__(self) -> int:
        return len(self._waiting)

    def ask(
        self, client: int, request: int, wanted: Wanted, kind: int, name: str | None, timeout_s: float
    ) -> Allocation | int:
        """The allocation; or a ticket, when it has to wait. Raises ArenaExhausted: it may not wait, or the line is full."""
        self._allocations.check(client, wanted, name)
        front = next(iter(self._waiting.values()), None)
        if front is None:
            place = self._allocations.areas.find(wanted)
        else:
            place = self._allocations.areas.find_passing(wanted, front.wanted)
        if place is not None:
            return self._allocations.settle(client, request, place, kind, name)
        if timeout_s <= 0:
            only_later = front is not None and self._allocations.areas.find(wanted) is not None
            raise self._allocations.exhausted(wanted, in_line=len(self._waiting) if only_later else 0)
        own = sum(one.client == client for one in self._waiting.values())
        if len(self._waiting) >= LINE_MAX or own >= LINE_MAX_CLIENT:
            error = self._allocations.exhausted(wanted)
            error.args = (f"the line is full ({len(self._waiting)} requests, {own} of this client): {error}",)
            raise error
        self._tickets += 1
        now = time.monotonic()
        self._waiting[self._tickets] = Waiting(self._tickets, client, request, wanted, kind, name, now + timeout_s, now)
        return self._tickets

    def collect(self, client: int, ticket: int, give_up: bool) -> Allocation | None:
        """The result of a ticket; None: not yet. `give_up`: it leaves the line, with its result if there is one by now.

        Raises what came of it, ArenaExhausted when its time is over, NoSuchBuffer for a ticket that is not the client's.
        """
        served = self._served.get(ticket)
        if served is not None and served.client == client:
            del self._served[ticket]
            if isinstance(served.result, Allocation):
                return served.result
            assert served.result is not None
            raise served.result
        waiting = self._waiting.get(ticket)
        if waiting is None or waiting.client != client:
            raise NoSuchBuffer(f"ticket {ticket} is not in line for this client: collected before, or given up")
        waiting.asked = time.monotonic()
        if not give_up and waiting.asked < waiting.deadline:
            return None
        del self._waiting[ticket]
        self._freed()  # who stood behind it may be in front now
        raise self._allocations.exhausted(waiting.wanted)

    def uncollected(self, client: int) -> list[int]:
        """The numbers of what was allocated for the client and not collected yet."""
        return [
            waiting.result.number
            for waiting in self._served.values()
            if waiting.client == client and isinstance(waiting.result, Allocation)
        ]

    def drop(self, client: int) -> None:
        """A client that is gone leaves the line. What was served and not collected is among what it held."""
        for tickets in (self._waiting, self._served):
            for ticket in [ticket for ticket, waiting in tickets.items() if waiting.client == client]:
                del tickets[ticket]
                self._freed()

    def expire(self) -> None:
        """Ends what has waited too long; and what its client has not come for: it was stopped, or never got its ticket."""
        now = time.monotonic()
        for waiting in list(self._waiting.values()):
            if waiting.deadline <= now:
                self._end(waiting, self._allocations.exhausted(waiting.wanted))
            elif waiting.asked + ASKED_S <= now:
                del self._waiting[waiting.ticket]
                self._freed()
        for waiting in [one for one in self._served.values() if one.asked + ASKED_S <= now]:
            del self._served[waiting.ticket]
            if isinstance(waiting.result, Allocation):
                self._allocations.give_back(waiting.client, waiting.result)

    def reconsider(self) -> None:
        """After an area was shrunk: ends what could never be served any more."""
        for waiting in list(self._waiting.values()):
            if not any(area.could_ever(waiting.wanted) for area in waiting.wanted.areas):
                self._end(waiting, self._allocations.exhausted(waiting.wanted))

    @property
    def pending(self) -> bool:
        """Whether somebody in line has not been looked at since memory was freed."""
        return self._unlooked > 0 and bool(self._waiting)

    def rest(self) -> None:
        """Nobody is looked at until memory is freed."""
        self._unlooked = 0

    def _freed(self) -> None:
        self._unlooked = len(self._waiting)

    def advance(self) -> None:
        """Serves who can be served, after each request or death that may have freed something. When many wait, some in one turn of
        the loop: the one in front each time, and others from where the last turn stopped.
        """
        tries = 0
        while self.pending and tries < TRIES_MAX:
            tickets = list(self._waiting)
            front = self._waiting[tickets[0]]
            tries += 1
            place = self._find(front, None)
            if place is not None:
                self._end(front, self._settle(front, place))
                continue
            tries = self._look_behind(front, tickets, tries)

    def _look_behind(self, front: Waiting, tickets: list[int], tries: int) -> int:
        """Serves one who may pass, if there is one; returns how many places were looked for by then."""
        refused = {front.wanted}  # and so is whoever wants the same
        begin = max(bisect_right(tickets, self._cursor), 1)
        for ticket in tickets[begin:] + tickets[1:begin]:
            if tries >= TRIES_MAX:
                return tries
            self._cursor = ticket
            self._unlooked -= 1
            waiting = self._waiting[ticket]
            if waiting.wanted in refused:
                continue
            tries += 1
            place = self._find(waiting, front)
            if place is not None:
                self._end(waiting, self._settle(waiting, place))
                return tries
            refused.add(waiting.wanted)
        self._unlooked = self._cursor = 0
        return tries

    def _find(self, waiting: Waiting, front: Waiting | None) -> Place | None:
        areas = self._allocations.areas
        if waiting.wanted.pages > max(area.largest for area in waiting.wanted.areas):
            return None
        return areas.find(waiting.wanted) if front is None else areas.find_passing(waiting.wanted, front.wanted)

    def _settle(self, waiting: Waiting, place: Place) -> Allocation | GcmaError:
        try:
            self._allocations.check(waiting.client, waiting.wanted, waiting.name)
        except GcmaError as error:  # its quota, or its name, was used up meanwhile
            return error
        return self._allocations.settle(waiting.client, waiting.request, place, waiting.kind, waiting.name)

    def _end(self, waiting: Waiting, result: Allocation | GcmaError) -> None:
        del self._waiting[waiting.ticket]
        self._freed()
        waiting.result = result
        waiting.asked = time.monotonic()
        self._served[waiting.ticket] = waiting
        self._wake(waiting.client)

    def _check(self) -> None:
        """Raises AssertionError when an invariant is broken."""
        assert not self._waiting.keys() & self._served.keys(), "a ticket that is both in line and served"
        assert len(self._waiting) <= LINE_MAX, "a line beyond its bound"
        front = next(iter(self._waiting.values()), None)
        assert front is None or self.pending or self._allocations.areas.find(front.wanted) is None, (
            "the first in line could be served"
        )
