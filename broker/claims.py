"""The claims of reservations, as the broker reads and ends them. docs/data-plane.md has the protocol of the claim word.

A claim of one process is in its word alone: the broker hears of it when that process dies. One that several processes share (the
word says so) is ended by the broker, once all of them have left it. The broker changes a reserved range only under a claim of its
own, taken from nobody, or from clients that are dead or have left.
"""

from __future__ import annotations

from collections.abc import Container

from gcma_shm import layout
from gcma_shm._core import Plane
from gcma_shm.broker.table import Allocation, Table
from gcma_shm.errors import StaleHandle
from gcma_shm.layout import CLAIM_CLIENT, CLAIM_GENERATION_SHIFT, CLAIM_SHARED


class Claims:
    """The claims of one arena's reservations."""

    def __init__(self, plane: Plane, table: Table) -> None:
        self._plane = plane
        self._table = table
        self._geometry = plane.geometry

    def is_claimed(self, index: int) -> bool:
        """Whether anybody has the range of that entry."""
        return bool(self._word(index) & CLAIM_CLIENT)

    def is_made_by(self, allocation: Allocation, client: int) -> bool:
        """Whether it is claimed, and that client made the claim."""
        return self._word(allocation.index) & CLAIM_CLIENT == client

    def has_part(self, allocation: Allocation, client: int) -> bool:
        """Whether that client has claimed it, alone or with others."""
        if client in allocation.claimers:
            return True
        word = self._word(allocation.index)
        return word & CLAIM_CLIENT == client and not word & CLAIM_SHARED

    def ordinal(self, allocation: Allocation) -> int:
        """Which of its client's claims it is."""
        return self._plane.read(self._geometry.allocation_at(allocation.index) + layout.ALLOCATION_ORDINAL_AT)

    def lent(self, index: int) -> int:
        """Pages of a reservation that hold cache."""
        return self._plane.read(self._geometry.allocation_at(index) + layout.ALLOCATION_LENT_AT)

    def meet(self, allocation: Allocation) -> None:
        """Notes a claim that became shared without a message, by a fork: whoever made it is in its word."""
        word = self._word(allocation.index)
        if word & CLAIM_SHARED and allocation.claim_generation != word >> CLAIM_GENERATION_SHIFT:
            allocation.claim_generation = word >> CLAIM_GENERATION_SHIFT
            allocation.claimers = {word & CLAIM_CLIENT}
            # After the word became shared, and before anybody else's bit: a broker that takes over and finds no bits knows that
            # whoever the word names has it alone.
            self._table.write_claimers(allocation)

    def share(self, allocation: Allocation, client: int) -> None:
        """`client` has a part in the claim, which is shared already."""
        allocation.claimers.add(client)
        self._table.write_claimers(allocation)

    def join(self, allocation: Allocation, generation: int) -> None:
        """The claim of that generation is to be shared. Raises StaleHandle when it is over."""
        while True:
            word = self._word(allocation.index)
            if word >> CLAIM_GENERATION_SHIFT != generation or not word & CLAIM_CLIENT:
                raise StaleHandle(
                    f"claim {generation} of reservation {allocation.number} is over: its range was freed since"
                )
            if word & CLAIM_SHARED or self._plane.share_claim(allocation.index, word):
                self.meet(allocation)
                return

    def leave(self, allocation: Allocation, client: int) -> None:
        """`client` has no part in the shared claim any more; 0: a handle had. After the last one the range is lent."""
        generation = allocation.claim_generation
        if not generation:
            return
        allocation.claimers.discard(client)
        if allocation.claimers or any(one.claim == generation for one in allocation.handed_over.values()):
            self._table.write_claimers(allocation)
            return
        allocation.claim_generation = 0
        word = self._word(allocation.index)
        shared = word >> CLAIM_GENERATION_SHIFT == generation and word & CLAIM_SHARED
        if shared and self._plane.seize(allocation.index, word):
            self._lend(allocation)

    def end(self, allocation: Allocation, client: int) -> None:
        """Whatever part `client`, which is gone, has in a claim is over."""
        if allocation.is_reservation:
            self.meet(allocation)
            if client in allocation.claimers:
                self.leave(allocation, client)
            else:
                self.end_own(allocation, client)

    def end_own(self, allocation: Allocation, client: int) -> None:
        """Lends the range anew if exactly that client has claimed it, alone; 0: if nobody has."""
        while allocation.is_reservation:
            word = self._word(allocation.index)
            if word & CLAIM_CLIENT != client or word & CLAIM_SHARED:
                return
            if self._plane.seize(allocation.index, word):
                self._lend(allocation)
                return

    def seize(self, allocation: Allocation) -> None:
        """Claims the range in the broker's name, whoever had it: nobody holds the reservation any more."""
        while True:
            word = self._word(allocation.index)
            if word & CLAIM_CLIENT == layout.BROKER or self._plane.seize(allocation.index, word):
                return

    def restore(self, allocation: Allocation, clients: Container[int]) -> None:
        """Finds who shares a claim that another broker knew of; `clients`: those there are."""
        word = self._word(allocation.index)
        sharing = self._table.claimers(allocation, clients) if word & CLAIM_SHARED else set()
        if sharing:
            allocation.claim_generation = word >> CLAIM_GENERATION_SHIFT
            allocation.claimers = sharing - {layout.BROKER}
            for one in allocation.handed_over.values():
                one.claim = allocation.claim_generation if layout.BROKER in sharing else 0

    def put_right(self, allocation: Allocation, clients: Container[int]) -> None:
        """Makes the pages of a reservation what its claim word says, after the death of another broker."""
        index, place = allocation.index, allocation.place
        word = self._word(index)
        client = word & CLAIM_CLIENT
        if client != layout.BROKER:
            # What is claimed as well: its claimer may be waiting for the copy of a page that never goes on, and give up.
            claimed = client != layout.NOBODY
            self._plane.put_right(
                place.part.index, place.first, place.pages, place.area.lends, allocation.owner, claimed
            )
            self._plane.count_lent(index, place.first, place.pages)
            if allocation.claim_generation and not allocation.claimers:
                self.leave(allocation, layout.NOBODY)  # a handle had it whose time was over
            if claimed and client not in clients and not allocation.claim_generation and self._plane.seize(index, word):
                self._lend(allocation)
        else:
            # The dead one was lending it, or releasing it. Taken again, since a client may have seen that broker's end, and be
            # about to take it from him: of the two one loses.
            while word & CLAIM_CLIENT == layout.BROKER and not self._plane.seize(index, word):  # @recover.seize
                word = self._word(index)
            if word & CLAIM_CLIENT == layout.BROKER and allocation.is_held:
                self._lend(allocation)

    def _lend(self, allocation: Allocation) -> None:
        """Ends the broker's own claim."""
        place, at = allocation.place, self._geometry.allocation_at(allocation.index)
        # Not before the claim was ours: no bits mean something else while it is shared, see `meet`. And before anybody else's.
        allocation.claimers.clear()
        allocation.claim_generation = 0
        self._table.write_claimers(allocation)
        place.area.offer(place.part, place.first, place.pages, allocation.owner)
        self._plane.write(at + layout.ALLOCATION_LENT_AT, 0)
        generation = self._word(allocation.index) >> CLAIM_GENERATION_SHIFT
        self._plane.write(at + layout.ALLOCATION_CLAIM_AT, generation + 1 << CLAIM_GENERATION_SHIFT)

    def _word(self, index: int) -> int:
        return self._plane.read(self._geometry.allocation_at(index) + layout.ALLOCATION_CLAIM_AT)
