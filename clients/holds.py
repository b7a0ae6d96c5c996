"""What one process holds of an arena's buffers and reservations, how often, and which of it is to be given back.

Pure of sockets. `Channel` owns one of these and guards it by its lock, which a fork takes too: a child has the memory and its
hold, or neither. Only `give_up` and `leave` may be called without: by finalizers, at any moment.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol


class Claimed(Protocol):
    """A claim that this process made."""

    @property
    def generation(self) -> int:
        """Of the claim."""


class Hold:
    """One hold of this process, which is ended once, however often and by whomever it is given up."""

    __slots__ = ("counted",)

    def __init__(self) -> None:
        self.counted = True


Tell = Callable[[str, dict[str, Any]], None]  # an operation with its parameters


class Holds:
    """Holds by number and claim; claim 0: of the buffer or reservation itself."""

    def __init__(self) -> None:
        self._counted: Counter[tuple[int, int]] = Counter()
        self.claims: Mapping[int, Claimed] = {}  # what this process has claimed itself, by number; see Claims
        self._places: dict[tuple[int, int], Mapping[str, Any]] = {}  # of what is counted, where it was told
        # Nobody refers to them any more, or nobody knows how their free ended.
        self._given_up: deque[tuple[int, int, Hold | None]] = deque()
        self._left: deque[int] = deque()  # tickets of those that nobody waits for any more

    def __bool__(self) -> bool:
        """Whether any are to be given back."""
        return bool(self._given_up or self._left)

    def add(self, number: int, claim: int) -> None:
        """Counts one more."""
        self._counted[number, claim] += 1

    def note(self, number: int, claim: int, place: Mapping[str, Any]) -> None:
        """Where something is that is held, as the broker told it. May be called without the lock, by who has a hold of it."""
        self._places[number, claim] = place

    def place_of(self, number: int, claim: int) -> Mapping[str, Any] | None:
        """Where it is, if it is held and nobody was told that the last hold ends: then one more may be added, and the broker need not
        know. None: it is to be asked.
        """
        return self._places.get((number, claim))

    def give_up(self, number: int, claim: int, hold: Hold | None) -> None:
        """One is to be given back. `hold`: a hold that was ended before is not ended again; None: one that was not counted, as the
        claim that this process made itself.
        """
        self._given_up.append((number, claim, hold))

    def leave(self, ticket: int) -> None:
        """A place in line is to be given back, or what was served there meanwhile."""
        self._left.append(ticket)

    def buffers(self) -> list[int]:
        """The numbers of the buffers and reservations that are held."""
        return [number for number, claim in self._counted if not claim]

    def shares(self) -> list[int]:
        """The numbers of reservations of which a claim is held that was attached to."""
        return [number for number, claim in self._counted if claim]

    def give_back(self, tell: Tell) -> None:
        """Ends all that was given up; `tell` sends the request that ends the last hold of something. What it raises leaves that
        hold, and those behind it, to the next time.
        """
        while self._left:
            tell("collect", {"ticket": self._left[0], "give_up": True})
            self._left.popleft()
        while self._given_up:
            number, claim, hold = self._given_up[0]
            if hold is None or hold.counted:
                counted = 0 if hold is None else 1
                if self._is_last(number, claim, counted):
                    tell(*_freeing(number, claim))
                if hold is not None:
                    hold.counted = False
                self._counted[number, claim] -= counted
                if self._counted[number, claim] <= 0:
                    del self._counted[number, claim]
                    self._places.pop((number, claim), None)
            self._given_up.popleft()

    def _is_last(self, number: int, claim: int, holds: int) -> bool:
        """Whether nothing in this process holds it after so many holds less."""
        own = self.claims.get(number) if claim else None
        return self._counted[number, claim] <= holds and (own is None or own.generation != claim)


def _freeing(number: int, claim: int) -> tuple[str, dict[str, Any]]:
    """The request that ends a hold."""
    return ("free_claim", {"buffer": number, "claim": claim}) if claim else ("free_contig", {"buffer": number})
