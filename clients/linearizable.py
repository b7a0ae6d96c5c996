"""Decides whether a history could be that of atomic registers: each operation as if done at one instant between its start and its end.

Owns the check of histories; reads no clock, no memory and no file. Every slot is a register of its own and empty (MISS) at first. A load that did not
end says nothing. A store that did not end (NEVER) has happened at some instant after its start, or not at all. Instants in equal nanoseconds may be in either
order. A batch is so many operations with the same times.

What is decided: exactly that, neither more nor less, for each slot.

- Where no value was stored twice (MISS counts as stored once, at first), by *zones* (Gibbons and Korach, "Testing Shared Memories", 1997). A value's
  operations are its store and the loads that saw it. They must lie together, the store in front, in every order that explains the history. So value A
  is before value B when some operation of A ended before some operation of B began: earliest end of A < latest start of B. The history is that of
  a register if no two values are before each other. (Longer rings come down to pairs: in a ring, take the value with the earliest end of all and the two in
  front of it.) O(n log n).
- Where pages of zeros were stored, or slots invalidated, several stores share a value, and whose store a load saw is not known; in general that is NP-complete. Zones are
  looked at first, of the values that were stored once (leaving operations out cannot make a right history wrong), then all *possibilities* are followed through time: what
  the register may hold now, and which of the operations under way may be done already. There are no more of them than stores at the same time, on one slot, of values that were loaded allow; past
  POSSIBILITIES_MAX the slot is reported as undecided, which no test may pass over.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from gcma_shm.clients.history import NEVER, Kind, Operation
from gcma_shm.clients.proof import MISS, UNIQUE

POSSIBILITIES_MAX = 1 << 16  # that are looked at for the end of one operation
FIRST = -1  # when the slots were made empty


def check(operations: Iterable[Operation]) -> list[str]:
    """What is wrong, or undecided, in a history; nothing: each slot behaved as an atomic register."""
    slots: defaultdict[int, list[Operation]] = defaultdict(list)
    for operation in operations:
        if operation.kind is Kind.STORE or (operation.kind is Kind.LOAD and operation.end_ns != NEVER):
            slots[operation.slot].append(operation)
    return [wrong for slot in sorted(slots) for wrong in check_slot(slots[slot])]


def check_slot(history: list[Operation]) -> list[str]:
    """The same of the stores, and the loads that ended, of one slot."""
    loads: defaultdict[int, list[Operation]] = defaultdict(list)
    stores: defaultdict[int, list[Operation]] = defaultdict(list)
    stores[MISS].append(Operation(Kind.STORE, history[0].slot, MISS, FIRST, FIRST))
    for operation in history:
        (loads if operation.kind is Kind.LOAD else stores)[operation.value].append(operation)
    assert all(len(stores[value]) == 1 for value in stores if value >= UNIQUE), "values are to be stored once"

    wrong = _unfounded(loads, stores)
    if wrong:
        return wrong
    wrong = _zones([(*same, *loads[value]) for value, same in stores.items() if len(same) == 1])
    if wrong or all(len(same) == 1 for same in stores.values()):
        return wrong
    # A store that was seen has happened by the end of the first load that saw it; one that was not seen and did not end need not have
    # happened: so none of those has to be followed for ever.
    seen = [
        same[0]._replace(end_ns=min(operation.end_ns for operation in (*same, *loads[value])))
        for value, same in stores.items()
        if value >= UNIQUE
    ]
    shared = [store for value, same in stores.items() if value < UNIQUE for store in same if store.start_ns != FIRST]
    ended = [load for same in loads.values() for load in same]
    followed = [*ended, *shared, *(store for store in seen if store.end_ns != NEVER)]
    return _follow(followed, frozenset(load.value for load in ended))


def _unfounded(loads: dict[int, list[Operation]], stores: dict[int, list[Operation]]) -> list[str]:
    wrong = []
    for value, same in loads.items():
        begun = min((store.start_ns for store in stores.get(value, ())), default=None)
        for load in same:
            if begun is None:
                wrong.append(f"{load}: never stored there")
            elif load.end_ns < begun:
                wrong.append(f"{load}: stored only afterwards, from {begun}")
    return wrong


class Zone(NamedTuple):
    """A value's operations: the one that ended first and the one that began last."""

    first: Operation
    last: Operation


def _zones(values: list[tuple[Operation, ...]]) -> list[str]:
    """Pairs of values that would each have to be before the other."""
    zones = [Zone(min(same, key=lambda o: o.end_ns), max(same, key=lambda o: o.start_ns)) for same in values]
    # A zone is *forward* when an operation of the value began after another had ended: in between, the slot held nothing else.
    forward = sorted((z for z in zones if z.first.end_ns < z.last.start_ns), key=lambda z: z.first.end_ns)
    wrong = []
    longest: Zone | None = None
    for zone in forward:
        if longest is not None and zone.first.end_ns < longest.last.start_ns:
            wrong.append(_contradiction(longest, zone))
        if longest is None or zone.last.start_ns > longest.last.start_ns:
            longest = zone
    if wrong:
        return wrong
    begins = [zone.first.end_ns for zone in forward]  # apart from each other, as none was wrong
    for zone in zones:
        if zone.first.end_ns >= zone.last.start_ns:
            place = bisect.bisect_left(begins, zone.last.start_ns) - 1
            if place >= 0 and zone.first.end_ns < forward[place].last.start_ns:
                wrong.append(_contradiction(forward[place], zone))
    return wrong


def _contradiction(one: Zone, other: Zone) -> str:
    return (
        f"{one.last}: before it was {other.first}, which ended before it began; but {other.last} was after {one.first}, "
        "which had ended when it began"
    )


class _Possibilities:
    """What a register may hold at one moment, and which of the operations under way may be done: pairs of a value and a set of bits."""

    def __init__(self, seen: frozenset[int]) -> None:
        self._seen = seen
        self.all: set[tuple[int, int]] = {(MISS, 0)}
        self.loads: defaultdict[int, int] = defaultdict(int)  # value -> bits of the loads under way that will return it
        self.stores: dict[int, int] = {}  # bit -> value, of the stores under way that some load saw, or may have seen
        self.unseen = 0  # bits of the others: done right before whichever store is done next, they are in nobody's way
        # Stores that may be done at any time from now on: of equal ones the one that began first, so their order is no choice.
        self.late: defaultdict[int, list[int]] = defaultdict(list)
        self._free: list[int] = []
        self._bits = 0

    def begin(self, operation: Operation) -> int:
        """Takes a bit for it."""
        if not self._free:
            self._free.append(1 << self._bits)
            self._bits += 1
        bit = self._free.pop()
        if operation.kind is Kind.LOAD:
            self.loads[operation.value] |= bit
            # Done at once where it can be: a load changes nothing, so later is no better.
            self.all = {(held, done | bit if held == operation.value else done) for held, done in self.all}
        elif operation.end_ns == NEVER:
            self.late[operation.value].append(bit)
        elif operation.value in self._seen:
            self.stores[bit] = operation.value
        else:
            self.unseen |= bit
        return bit

    def end(self, operation: Operation, bit: int) -> bool:
        """Leaves those in which it is done, after as many stores under way as that takes; whatever else may be done stays undone, for it may be
        done later as well. False: there are too many.
        """
        waiting = [possibility for possibility in self.all if not possibility[1] & bit]
        found = {(held, done & ~bit) for held, done in self.all if done & bit}
        known = set(waiting)
        while waiting:
            if len(known) > POSSIBILITIES_MAX:
                return False
            _, done = waiting.pop()
            for store, value in self._undone(done, operation, bit):
                reached = (value, done | store | self.loads[value] | self.unseen)
                if reached[1] & bit:
                    found.add((value, reached[1] & ~bit))
                elif reached not in known:
                    known.add(reached)
                    waiting.append(reached)
        self.all = self._best(found) if self.late else found
        self.stores.pop(bit, None)
        self.unseen &= ~bit
        if operation.kind is Kind.LOAD:
            self.loads[operation.value] &= ~bit
        self._free.append(bit)
        return True

    def _best(self, found: set[tuple[int, int]]) -> set[tuple[int, int]]:
        """Without those that differ from another one only in that more of the late stores are done: what those may come to, that one may."""
        late = sum(bit for bits in self.late.values() for bit in bits)
        alike: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for held, done in found:
            alike[held, done & ~late].append(done)
        return {
            (held, done)
            for (held, _), same in alike.items()
            for done in same
            if not any(other & done == other and other != done for other in same)
        }

    def _undone(self, done: int, ending: Operation, ends: int) -> list[tuple[int, int]]:
        found = [(bit, value) for bit, value in self.stores.items() if not done & bit]
        if self.unseen & ends:
            found.append((ends, ending.value))
        for value, bits in self.late.items():
            if not self.loads[value] & ~done:
                continue  # nobody under way would see it; and for who comes later it can be done later
            undone = next((bit for bit in bits if not done & bit), None)
            if undone is not None:
                found.append((undone, value))
        return found


def _follow(operations: list[Operation], seen: frozenset[int]) -> list[str]:
    """The first operation that no possibility explains, if there is one. `seen`: the values that loads returned."""
    # Starts before ends where they are equal: then the two may be in either order.
    events = [(o.start_ns, 0, n) for n, o in enumerate(operations)]
    events += [(o.end_ns, 1, n) for n, o in enumerate(operations) if o.end_ns != NEVER]
    events.sort()
    possibilities = _Possibilities(seen)
    bits: dict[int, int] = {}
    for _, ends, n in events:
        operation = operations[n]
        if not ends:
            bits[n] = possibilities.begin(operation)
            continue
        before = possibilities.all
        if not possibilities.end(operation, bits.pop(n)):
            return [f"{operation}: undecided, more than {POSSIBILITIES_MAX} possibilities"]
        if not possibilities.all:
            held = sorted({value for value, _ in before})
            return [f"{operation}: the slot cannot have held that, but {' or '.join(_told(value) for value in held)}"]
    return []


def _told(value: int) -> str:
    return str(Operation(Kind.STORE, 0, value, 0, 0)).split(" = ")[1].split(" [")[0]
