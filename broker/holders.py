"""Who holds how much: by client, by area, and how much each may.

Pure; kept up to date by `Allocations`. A client holds an allocation once, however it came by it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from gcma_shm.broker.table import Allocation
from gcma_shm.errors import QuotaExceeded
from gcma_shm.sizes import format_size


class Holders:
    """What each client of one arena holds. `quota`: bytes that a client may hold where nothing else is said; None: no bound."""

    def __init__(self, page_size: int, quota: int | None) -> None:
        self._page_size = page_size
        self._quota = quota
        self._quotas: dict[int, int | None] = {}
        self._numbers: defaultdict[int, set[int]] = defaultdict(set)
        self._pages: Counter[int] = Counter()
        self._in_area: defaultdict[str, Counter[int]] = defaultdict(Counter)

    def of(self, client: int) -> list[int]:
        """The numbers of what the client holds."""
        return list(self._numbers.get(client, ()))

    def held_bytes(self, client: int) -> int:
        """What that is together, reservations included."""
        return self._pages[client] * self._page_size

    def in_areas(self, names: Iterable[str]) -> dict[int, int]:
        """Bytes by client, of what lies in those areas."""
        found: Counter[int] = Counter()
        for name in names:
            for client, pages in self._in_area[name].items():
                found[client] += pages * self._page_size
        return dict(found)

    def add(self, client: int, allocation: Allocation) -> bool:
        """The client holds it; False: it did already."""
        if allocation.number in self._numbers[client]:
            return False
        self._numbers[client].add(allocation.number)
        self._count(client, allocation, allocation.place.pages)
        return True

    def discard(self, client: int, allocation: Allocation) -> bool:
        """The client holds it no longer; False: it did not."""
        if allocation.number not in self._numbers.get(client, ()):
            return False
        self._numbers[client].discard(allocation.number)
        if not self._numbers[client]:
            del self._numbers[client]
        self._count(client, allocation, -allocation.place.pages)
        return True

    def quota_of(self, client: int) -> int | None:
        """Bytes that it may hold; None: no bound."""
        return self._quotas.get(client, self._quota)

    def set_quota(self, client: int, quota: int | None) -> None:
        """Its own bound, until it leaves."""
        self._quotas[client] = quota

    def copy_quota(self, parent: int, child: int) -> None:
        """A forked child's is its parent's."""
        if parent in self._quotas:
            self._quotas[child] = self._quotas[parent]

    def forget(self, client: int) -> None:
        """Its number will be another's."""
        self._quotas.pop(client, None)

    def check_quota(self, client: int, pages: int) -> None:
        """Raises QuotaExceeded when so many pages more are too much."""
        quota, more = self.quota_of(client), pages * self._page_size
        if quota is not None and self.held_bytes(client) + more > quota:
            raise QuotaExceeded(
                f"client {client} may hold {format_size(quota)} and holds {format_size(self.held_bytes(client))}: "
                f"{format_size(more)} more are too much; free some, or raise its quota"
            )

    def _count(self, client: int, allocation: Allocation, pages: int) -> None:
        for counts in (self._pages, self._in_area[allocation.place.area.name]):
            counts[client] += pages
            if not counts[client]:
                del counts[client]

    def _check(self, allocations: Iterable[Allocation]) -> None:
        """Raises AssertionError when this is not who holds these allocations."""
        numbers: defaultdict[int, set[int]] = defaultdict(set)
        pages: Counter[int] = Counter()
        for allocation in allocations:
            for client in allocation.known_to():
                numbers[client].add(allocation.number)
                pages[client] += allocation.place.pages
        assert numbers == self._numbers, "a holder that does not know, or knows too much"
        assert pages == self._pages, "what clients hold does not add up"
        assert sum(pages.values()) == sum(sum(counts.values()) for counts in self._in_area.values()), "areas differ"
