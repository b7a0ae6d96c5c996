"""Client records: who takes part, known by a number.

A record is taken by CAS, by the broker for a process that says hello, or by a client for the child that it is about to
fork: the child holds what its parent held from the instant of the fork, so its record is written before the fork and
completed in the child. The broker alone makes a record free again, after it has taken back everything held in its name.

    FREE → TAKEN (being written) → ALIVE → DEAD (being buried) → FREE
                     TAKEN → FORKED (no process yet) → STARTING (the child writes who it is) → ALIVE

The state word is `generation:40 · parent:16 · state:8`. The parent, who took the record (the broker, or a client about
to fork), stands in it from the first CAS on, so that a record whose taker died before it went on can be told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from gcma_shm import layout
from gcma_shm._core import COUNTERS, Plane
from gcma_shm.errors import QuotaExceeded
from gcma_shm.presence import Presence

_PARENT_SHIFT = 8
GENERATION_SHIFT = 24
_OWN = (layout.CLIENT_LOCKED_AT, layout.CLIENT_INHERITS_AT, layout.CLIENT_QUOTA_AT, layout.CLIENT_KEEPS_AT)


class State(IntEnum):
    """The low byte of a record's state word."""

    FREE = 0
    TAKEN = 1
    FORKED = 2
    ALIVE = 3
    DEAD = 4
    STARTING = 5


@dataclass(frozen=True)
class Record:
    """What a record says just now. `pid`: in the namespace `pidns`; 0: a forked child that has not begun yet. `is_locked`: its
    process took its lock, see presence.py. `keeps`: it is no client, but a process for as long as which something is kept.
    """

    number: int
    state: State
    parent: int
    generation: int
    pid: int
    start: int
    pidns: int
    is_locked: bool
    has_inherited: bool
    keeps: bool


class Records:
    """The table of client records in one arena."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._geometry = plane.geometry

    def read(self, number: int) -> Record:
        """One record. Raises IndexError for a number that the arena does not have."""
        if not 0 <= number <= self._geometry.clients_max:
            raise IndexError(f"client {number}: expected 0 to {self._geometry.clients_max}")
        at = self._geometry.client_at(number)
        word = self._plane.read(at + layout.CLIENT_STATE_AT)
        low = word & 0xFF
        return Record(
            number,
            State(low) if low in State._value2member_map_ else State.DEAD,  # survives any content
            word >> _PARENT_SHIFT & 0xFFFF,
            word >> GENERATION_SHIFT,
            self._plane.read(at + layout.CLIENT_PID_AT),
            self._plane.read(at + layout.CLIENT_START_AT),
            self._plane.read(at + layout.CLIENT_PIDNS_AT),
            bool(self._plane.read(at + layout.CLIENT_LOCKED_AT)),
            bool(self._plane.read(at + layout.CLIENT_INHERITS_AT)),
            bool(self._plane.read(at + layout.CLIENT_KEEPS_AT)),
        )

    def used(self) -> Iterator[Record]:
        """All records that are not FREE, but those of nobody and of the broker."""
        for number in range(layout.BROKER + 1, self._geometry.clients_max + 1):
            if self._plane.read(self._geometry.client_at(number)) & 0xFF:
                yield self.read(number)

    def take(self, parent: int, presence: Presence | None = None) -> int:
        """Takes a free record. Raises QuotaExceeded when there is none, which tells how many are about to be free. `presence`: passes
        over those whose lock is held still, by a process that inherited it unknowingly.
        """
        returning = 0
        for number in range(layout.BROKER + 1, self._geometry.clients_max + 1):
            at = self._geometry.client_at(number) + layout.CLIENT_STATE_AT
            word = self._plane.read(at)
            if presence is not None and word & 0xFF == State.FREE and presence.is_held(number):
                continue
            if word & 0xFF == State.FREE and self._plane.swap_word(
                at, word, word | parent << _PARENT_SHIFT | State.TAKEN
            ):
                return number
            returning += word & 0xFF == State.DEAD
        raise QuotaExceeded(
            f"all {self._geometry.clients_max - 1} client records of the arena are in use; start the broker with more --clients",
            returning,
        )

    def fill(self, number: int, state: State, pid: int, start: int, pidns: int = 0) -> None:
        """Writes a record; its state last, so that whoever reads the state finds the rest."""
        at = self._geometry.client_at(number)
        self._plane.write(at + layout.CLIENT_PIDNS_AT, pidns)
        self._plane.write(at + layout.CLIENT_PID_AT, pid)
        self._plane.write(at + layout.CLIENT_START_AT, start)
        self.mark(number, state)

    def word(self, number: int) -> int:
        """The whole state word, to be given to `start`."""
        return self._plane.read(self._geometry.client_at(number) + layout.CLIENT_STATE_AT)

    def start(self, number: int, forked: int, pid: int, start: int, pidns: int) -> bool:
        """A forked child takes over its record, which is to hold exactly the word `forked` still. False: it took too
        long to begin, was taken for dead, and the record may be somebody else's by now.
        """
        at = self._geometry.client_at(number) + layout.CLIENT_STATE_AT
        if not self._plane.swap_word(at, forked, forked & ~0xFF | State.STARTING):
            return False
        self.fill(number, State.ALIVE, pid, start, pidns)
        return True

    def mark(self, number: int, state: State) -> None:
        """Sets a record's state. The caller owns the record: it took it, is its process, or is the broker after that
        one's death.
        """
        at = self._geometry.client_at(number) + layout.CLIENT_STATE_AT
        self._plane.write(at, self._plane.read(at) & ~0xFF | state)

    def free(self, number: int) -> None:
        """Makes the record of a client that has been buried free, in the next generation; its counts go to nobody's
        record.
        """
        for name, counted in self.counters(number).items():
            index = COUNTERS.index(name)
            self._plane.add(self._counter_at(layout.NOBODY, index), counted)
            self._plane.write(self._counter_at(number, index), 0)
        at = self._geometry.client_at(number)
        for offset in _OWN:
            self._plane.write(at + offset, 0)
        generation = (self._plane.read(at + layout.CLIENT_STATE_AT) >> GENERATION_SHIFT) + 1
        self._plane.write(at + layout.CLIENT_STATE_AT, generation << GENERATION_SHIFT | State.FREE)

    def counters(self, number: int) -> dict[str, int]:
        """What this client has counted."""
        return {name: self._plane.read(self._counter_at(number, index)) for index, name in enumerate(COUNTERS)}

    def _counter_at(self, number: int, index: int) -> int:
        return self._geometry.client_at(number) + layout.CLIENT_COUNTERS_AT + 8 * index
