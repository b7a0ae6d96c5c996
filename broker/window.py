"""What one session has under way, and how much it may have. Pure; on the control thread alone.

Single requests and batches of stores are under way until their reply is handed to ZeroMQ. A batch of loads is small to ask for
and large to answer, and ZeroMQ counts messages, not bytes: who asks and never reads would have a hundred of them kept for him.
So it is under way until its reply was read. The reply carries a receipt, a number that nobody can guess, and the next request
brings the last one back; since replies come in order, it stands for those before it as well. A reply that is lost on the way can
be read by nobody, and needs no receipt: one that ZeroMQ does not take, or that went to an address that the session has left.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from gcma_shm.errors import ProtocolError
from gcma_shm.messages import BATCHES, Request

RECEIPT_BITS = 63


@dataclass(slots=True)
class Entry:
    """One request that was let in. `paged`: it went to a page worker. `receipt` 0: its reply carries none."""

    operation: str
    paged: bool
    receipt: int = 0


@dataclass(slots=True)
class Window:
    """One session's. Each request that `enter` lets in must `leave`."""

    requests: int = 0  # single ones
    stores: int = 0  # batches whose reply was not given
    # Receipts of batches of loads, the oldest first; and whether the reply has been given.
    unread: dict[int, bool] = field(default_factory=dict)
    paged: int = 0  # of all these, the ones that a page worker has not answered

    def enter(self, request: Request, requests_max: int, *, paged: bool) -> Entry:
        """Lets a request in. Raises ProtocolError when there are too many."""
        entry = self._enter(request, requests_max, paged)
        self.paged += paged
        return entry

    def _enter(self, request: Request, requests_max: int, paged: bool) -> Entry:
        if request.operation == "load_many":
            self._read(request.parameters.get("receipt", 0))
            self._bound(
                len(self.unread), BATCHES, "batches of loads", "send the receipt of the last reply that you have read"
            )
            receipt = secrets.randbits(RECEIPT_BITS) or 1
            self.unread[receipt] = False
            return Entry(request.operation, paged, receipt)
        if request.operation == "store_many":
            self._bound(self.stores, BATCHES, "batches of stores", "wait for replies first")
            self.stores += 1
        else:
            self._bound(self.requests, requests_max, "requests", "wait for replies first")
            self.requests += 1
        return Entry(request.operation, paged)

    def leave(self, entry: Entry, *, has_pages: bool = False) -> None:
        """Its reply goes out. What carries no pages needs no receipt."""
        self.paged -= entry.paged
        if entry.operation == "store_many":
            self.stores -= 1
        elif entry.operation != "load_many":
            self.requests -= 1
        elif not has_pages:
            self.unread.pop(entry.receipt, None)
        elif entry.receipt in self.unread:
            self.unread[entry.receipt] = True

    def lost(self, entry: Entry) -> None:
        """Its reply, given already, reaches nobody."""
        self.unread.pop(entry.receipt, None)

    def moved(self) -> None:
        """The session has another address: what was given went to the old one. What a worker has still leaves later, and is lost then."""
        for receipt in [receipt for receipt, is_given in self.unread.items() if is_given]:
            del self.unread[receipt]

    def _read(self, receipt: int) -> None:
        """One that is not known is an earlier session's, or was brought before."""
        if receipt in self.unread:
            for older in list(self.unread):
                del self.unread[older]
                if older == receipt:
                    break

    @staticmethod
    def _bound(under_way: int, under_way_max: int, what: str, advice: str) -> None:
        if under_way >= under_way_max:
            raise ProtocolError(f"more than {under_way_max} {what} under way in one session; {advice}")

    def _check(self) -> None:
        """Raises AssertionError when an invariant is broken."""
        assert 0 <= self.stores <= BATCHES, "more batches of stores than may be"
        assert len(self.unread) <= BATCHES, "more batches of loads than may be"
        assert self.requests >= 0, "a request that left twice"
        assert 0 <= self.paged <= self.requests + self.stores + len(self.unread), (
            "a request of no kind on a page worker"
        )
