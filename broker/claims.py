"""The claim words of reservations, as the broker reads and changes them. docs/data-plane.md has the protocol.

The broker changes a reserved range only under a claim of its own, taken from nobody or from a client that is dead or has no
part in the reservation any more.
"""

from __future__ import annotations

from gcma_shm import layout
from gcma_shm._core import Plane
from gcma_shm.layout import CLAIM_CLIENT, CLAIM_GENERATION_SHIFT, CLAIM_SHARED


class Claims:
    """The claim words of one arena, by the index of their entries."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._geometry = plane.geometry

    def is_claimed(self, index: int) -> bool:
        """Whether anybody has the range."""
        return bool(self._word(index) & CLAIM_CLIENT)

    def is_claimed_by(self, index: int, client: int) -> bool:
        """Whether that client made the claim."""
        return self._word(index) & CLAIM_CLIENT == client

    def ordinal(self, index: int) -> int:
        """Which of its client's claims it is."""
        return self._plane.read(self._geometry.allocation_at(index) + layout.ALLOCATION_ORDINAL_AT)

    def lent(self, index: int) -> int:
        """Pages of a reservation that hold cache."""
        return self._plane.read(self._geometry.allocation_at(index) + layout.ALLOCATION_LENT_AT)

    def shared_by(self, index: int) -> tuple[int, int]:
        """Who made a claim that several share, and its generation; 0, 0: it is claimed by one, or nobody."""
        word = self._word(index)
        return (word & CLAIM_CLIENT, word >> CLAIM_GENERATION_SHIFT) if word & CLAIM_SHARED else (0, 0)

    def share(self, index: int, generation: int) -> int:
        """Marks the claim of that generation as several clients'; returns who made it, 0: it is over."""
        while True:
            word = self._word(index)
            if word >> CLAIM_GENERATION_SHIFT != generation or not word & CLAIM_CLIENT:
                return 0
            if word & CLAIM_SHARED or self._plane.share_claim(index, word):
                return word & CLAIM_CLIENT

    def seize(self, index: int) -> None:
        """Claims the range in the broker's name, whoever had it: for a reservation that nobody holds any more."""
        while True:
            word = self._word(index)
            if word & CLAIM_CLIENT == layout.BROKER or self._plane.seize(index, word):
                return

    def seize_from(self, index: int, client: int) -> bool:
        """Claims it in the broker's name from exactly that client, and only if it does not share its claim; 0: from nobody."""
        while True:
            word = self._word(index)
            if word & CLAIM_CLIENT != client or word & CLAIM_SHARED:
                return False
            if self._plane.seize(index, word):
                return True

    def seize_shared(self, index: int, generation: int) -> bool:
        """Claims it in the broker's name from those that share the claim of that generation."""
        word = self._word(index)
        shared = word >> CLAIM_GENERATION_SHIFT == generation and bool(word & CLAIM_SHARED)
        return shared and bool(self._plane.seize(index, word))

    def lend(self, index: int) -> None:
        """Ends the broker's own claim; the range's pages are lent, or kept from the cache, by now."""
        self._plane.write(self._geometry.allocation_at(index) + layout.ALLOCATION_LENT_AT, 0)
        self._plane.write(self._at(index), self._next(self._word(index)))

    def _word(self, index: int) -> int:
        return self._plane.read(self._at(index))

    def _at(self, index: int) -> int:
        return self._geometry.allocation_at(index) + layout.ALLOCATION_CLAIM_AT

    @staticmethod
    def _next(word: int) -> int:
        """Lent, in the next generation."""
        return (word >> CLAIM_GENERATION_SHIFT) + 1 << CLAIM_GENERATION_SHIFT
