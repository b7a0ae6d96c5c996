"""What the tests of `gcma check` share: an arena with something of everything in it, and a copy of its bytes at which a test does damage."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import gcma_shm
from gcma_shm import layout
from gcma_shm._check_view import Finding
from gcma_shm.arena import SHM_DIR
from gcma_shm.check import Report, check, look_once
from gcma_shm.endpoint import arena_name
from gcma_shm.entries import ClientEntry
from gcma_shm.standing import Standing
from tests.client import page_of
from tests.processes import WAIT_S, Broker, broker, eventually

PAGE = 4096
MIB = 1 << 20
AREAS = ("--area", "a=4M", "--area", "b=1M,cache=off", "--slots", "6000")
EMPTY, CACHED, SPILLED, ZERO, CLOSED, FILLED, FILLED_LAID = range(7)
FREE, GRANTED, PUBLISHED, BUFFER = range(4)
DIRTY = 1 << 32


def _is_swept(endpoint: str) -> bool:
    """Whether the sweep has come to its end, with a quarter of the nursery free, and has promoted something: stores that find no page,
    where it has not had its turn, free some as well, and promote nothing.
    """
    c = Copy((SHM_DIR / arena_name(endpoint)[1:]).read_bytes())
    room = c.read(layout.HAND_AT) + c.g.nursery_pages - c.read(layout.HEAD_AT)
    cached = (c.read(c.slot_at(slot)) for slot in range(3000))
    promoted = any(state(word) == CACHED and not word & DIRTY and not in_nursery(c, word) for word in cached)
    return room >= c.g.nursery_pages // 4 and promoted


@contextlib.contextmanager
def in_use(endpoint: str) -> Iterator[tuple[Broker, gcma_shm.Client]]:
    """An arena with something of everything, at rest. Its clients are numbers 2 and 3."""
    with (
        broker(endpoint, *AREAS) as first,
        gcma_shm.connect(endpoint, timeout=WAIT_S) as client,
        gcma_shm.connect(endpoint, timeout=WAIT_S) as other,
    ):
        assert (client.number, other.number) == (2, 3)
        through, behind = client.swap(0, 3000), client.swap(1, 1000, "behind")
        client.resize_area("a", 7 * MIB // 2)
        kept = [client.alloc_contig(5 * PAGE, area="a", name=f"buffer {n}") for n in range(3)]
        kept.append(client.alloc_contig(9 * PAGE, area="b"))
        lent, claimed = (client.reserve(40 * PAGE, area="a", name=name) for name in ("lent", "claimed"))
        mine = claimed.claim()
        for n in range(3000):
            through.store(n, page_of(n))
            through.load(n)
        through.store(2900, bytes(PAGE))
        through.store(2901, b"\7" * PAGE)
        for n in range(50):
            behind.store(n, page_of(n))

        def is_swept() -> bool:
            """The sweep begins when less than an eighth of the nursery is free: until it has, there is one page less."""
            if _is_swept(endpoint):
                return True
            through.store(0, page_of(0))
            return False

        assert eventually(is_swept)
        assert eventually(lambda: not look(endpoint).findings)
        # With a quarter of the nursery free the sweep promotes nothing, so what this leaves free in the area stays so.
        client.alloc_contig(20 * PAGE, area="a").free()
        assert eventually(lambda: not look(endpoint).findings)
        yield first, client
        assert (len(kept), lent.name, mine.nbytes) == (4, "lent", 40 * PAGE), "held until now"


def look(endpoint: str) -> Report:
    return check(arena_name(endpoint))


class Told(Standing):
    """Who lives, as a test says."""

    def __init__(self, served: bool = True, dead: tuple[int, ...] = ()) -> None:
        self.served = served
        self.dead = dead

    def is_served(self) -> bool:
        return self.served

    def is_stopped(self) -> bool:
        return False

    def lives(self, client: ClientEntry) -> bool | None:
        return client.number not in self.dead


class Copy:
    """An arena's bytes in private memory, at which a test does damage."""

    def __init__(self, image: bytes) -> None:
        self.bytes = bytearray(image)
        self.g, self.areas, _ = layout.read_header(memoryview(self.bytes), len(self.bytes))

    def read(self, at: int) -> int:
        return int.from_bytes(self.bytes[at : at + 8], "little")

    def write(self, at: int, value: int) -> None:
        self.bytes[at : at + 8] = (value % (1 << 64)).to_bytes(8, "little")

    def add(self, at: int, by: int) -> None:
        self.write(at, self.read(at) + by)

    def slot_at(self, slot: int) -> int:
        return self.g.slots_at + 16 * slot

    def slot(self, wanted: Callable[[int], bool], type_: int = 0) -> int:
        """Where the first slot word of the type is that is as wanted."""
        base, count = (self.read(self.g.type_at(type_) + 8 * n) for n in (1, 2))
        return next(at for n in range(base, base + count) if wanted(self.read(at := self.slot_at(n))))

    def life(self, wanted: Callable[[int, int], bool]) -> int:
        """Where the first life is of a page and in a life as wanted."""
        return next(at for page in range(self.g.pages) if wanted(page, self.read(at := self.g.life_at + 8 * page)))

    def entry(self, name: str) -> int:
        """Where the guest of that name is in the table."""
        return next(
            at
            for index in range(self.g.allocations_max)
            if self.bytes[(at := self.g.allocation_at(index)) + 0x40 : at + 0x70].rstrip(b"\0") == name.encode()
        )

    def look(self, served: bool = True, dead: tuple[int, ...] = ()) -> list[Finding]:
        return look_once(memoryview(bytes(self.bytes)), self.g, self.areas, Told(served, dead)).findings


def state(word: int) -> int:
    return word >> 33 & 7


def in_nursery(c: Copy, word: int) -> bool:
    return state(word) == CACHED and word & 0xFFFFFFFF < c.g.nursery_pages


def found(findings: list[Finding], kind: str, words: str) -> None:
    assert findings, "nothing found"
    assert [finding.kind for finding in findings] == [kind], f"more, or something else: {findings}"
    assert re.search(words, findings[0].text), findings[0].text
