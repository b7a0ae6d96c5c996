"""What a stress rages over: an arena so small that everything happens all the time, its types and areas, and who uses them how."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

from gcma_shm import layout
from gcma_shm.errors import ArenaError

How = Literal["inherited", "mapped", "messages"]  # the forked owner's client; one of its own; one that sends its pages
HOWS: tuple[How, ...] = ("inherited", "mapped", "messages")
TYPES: tuple[Literal["through", "behind"], ...] = ("through", "behind", "through")  # how each type is written
TYPE_STEP = 1 << 32  # a register's number is type * TYPE_STEP + offset
BATCH_MAX = 6
NURSERY_PAGES = 20
AREA_PAGES = (48, 24, 24)


@dataclass(frozen=True)
class Plan:
    """Sizes in pages; `hot` slots of each type are fought for, `wide` ones are all."""

    page_size: int = 4096
    nursery_pages: int = NURSERY_PAGES
    area_pages: tuple[int, ...] = AREA_PAGES[:2]
    hot: int = 4
    wide: int = 200
    clients: int = 14
    timeout_s: float = 20.0
    store_share: float = 0.35
    types: int = 2
    slots_spare: int = 0  # that no type has
    mortal: frozenset[int] = frozenset()  # types that may end and begin anew at any time

    def size(self) -> int:
        """Bytes of an arena with such a nursery."""
        pages = sum(self.area_pages) + self.nursery_pages
        size = pages * self.page_size
        areas = {f"a{n}": count * self.page_size for n, count in enumerate(self.area_pages)}
        while True:
            with contextlib.suppress(ArenaError):
                geometry, _ = layout.plan(size, self.page_size, areas, self.slots, self.clients)
                if geometry.nursery_pages >= self.nursery_pages:
                    return size
            size += self.page_size

    @property
    def slots(self) -> int:
        """All slots of the arena."""
        return self.types * self.wide + self.slots_spare


assert 2 * BATCH_MAX < NURSERY_PAGES, "a batch must not need the nursery for itself"
