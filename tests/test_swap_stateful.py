"""Random operations on a small arena, both ways in, against a dict; after every step the arena itself is looked at.

The arena has a tenth of the pages that the slots ask for, so values are promoted, evicted, read back from the file and put back; buffers
come and go all over the areas. One broker serves all examples, each of which ends its types.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test

import gcma_shm
from gcma_shm import ArenaExhausted, Buffer, Closed, Swap
from gcma_shm.arena import open_arena
from gcma_shm.endpoint import arena_name
from tests import invariants
from tests.invariants import check_at_rest
from tests.processes import WAIT_S, stopped

SLOTS = 300
BATCH_MAX = 90  # three times the nursery
OCCURRED = (
    "promotions", "evictions", "hits_spill", "hits_area", "hits_nursery", "hits_zero", "hits_filled", "misses", "discards",
    "orphans_freed",
)  # fmt: skip
TIMES_MAX = 5

offsets = st.integers(0, SLOTS - 1) | st.integers(0, 7)  # a few slots are met often
values = st.integers(0, 2**32 - 1) | st.just(0)
ways = st.sampled_from(["mapped", "messages"])
types = st.integers(0, 1)  # 0 writes through, 1 writes behind


def page_of(value: int, size: int) -> bytes:
    """Of every fourth value a page that repeats four bytes, which is stored in the slot's word; of the others one that takes memory."""
    unit = value.to_bytes(4, "little")
    return (unit + (unit if value % 4 == 0 else bytes(byte ^ 0x55 for byte in unit))) * (size // 8)


class Checked(RuleBasedStateMachine):
    """`model[type][offset]` is the value that a load must find; a missing one is a miss."""

    owner: gcma_shm.Client
    remote: gcma_shm.Client
    spill_dir: Path
    fills = 0

    buffers: Bundle[Any] = Bundle("buffers")

    def __init__(self) -> None:
        super().__init__()
        self.size = self.owner.page_size
        self.model: list[dict[int, int]] = [{}, {}]
        self.swaps: dict[tuple[int, str], Swap] = {}
        for type_ in range(2):
            self._declare(type_)
        self.held: list[tuple[Buffer, int]] = []

    def _declare(self, type_: int) -> None:
        for way, client in (("mapped", self.owner), ("messages", self.remote)):
            self.swaps[type_, way] = client.swap(type_, SLOTS, "behind" if type_ else "through")

    @rule(type_=types, way=ways, offset=offsets, value=values)
    def store(self, type_: int, way: str, offset: int, value: int) -> None:
        self.swaps[type_, way].store(offset, page_of(value, self.size))
        self.model[type_][offset] = value

    @rule(type_=types, way=ways, first=offsets, count=st.integers(1, BATCH_MAX), stride=st.integers(0, 7), value=values)
    def store_many(self, type_: int, way: str, first: int, count: int, stride: int, value: int) -> None:
        where = [(first + i * stride) % SLOTS for i in range(count)]
        what = [(value + i) % 2**32 for i in range(count)]
        self.swaps[type_, way].store_many(where, b"".join(page_of(v, self.size) for v in what))
        self.model[type_].update(zip(where, what, strict=True))

    @rule(type_=types, way=ways, offset=offsets)
    def load(self, type_: int, way: str, offset: int) -> None:
        expected = self.model[type_].get(offset)
        page = self.swaps[type_, way].load(offset)
        assert page == (None if expected is None else page_of(expected, self.size))

    @rule(type_=types, way=ways, first=offsets, count=st.integers(1, BATCH_MAX), stride=st.integers(0, 7))
    def load_many(self, type_: int, way: str, first: int, count: int, stride: int) -> None:
        where = [(first + i * stride) % SLOTS for i in range(count)]
        out = bytearray(count * self.size)
        mask = self.swaps[type_, way].load_many(where, out)
        for i, (offset, hit) in enumerate(zip(where, mask, strict=True)):
            assert hit is (offset in self.model[type_])
            if hit:
                assert out[i * self.size : (i + 1) * self.size] == page_of(self.model[type_][offset], self.size)

    @rule(type_=types, way=ways, offset=offsets)
    def invalidate_page(self, type_: int, way: str, offset: int) -> None:
        self.swaps[type_, way].invalidate_page(offset)
        self.model[type_].pop(offset, None)

    @rule(type_=types, way=ways)
    def invalidate_area(self, type_: int, way: str) -> None:
        old = [self.swaps[type_, w] for w in ("mapped", "messages")]
        self.swaps[type_, way].invalidate_area()
        for handle in old:
            with pytest.raises(Closed):
                handle.load(0)
        self.model[type_].clear()
        self._declare(type_)
        for handle in old:
            with pytest.raises(Closed):
                handle.store(0, page_of(1, self.size))

    @rule(type_=types, way=ways)
    def sync(self, type_: int, way: str) -> None:
        self.swaps[type_, way].sync()

    @rule(
        target=buffers,
        at=st.integers(0, 100),
        share=st.integers(1, 100),
        exactly=st.booleans(),
        area=st.sampled_from(["a", "b"]),
    )
    def alloc_contig(self, at: int, share: int, exactly: bool, area: str) -> Any:
        """Anywhere, of any size; only other buffers may be in the way."""
        (info,) = [info for info in self.owner.areas() if info.name == area]
        pages = info.size // self.size
        wanted = max(1, pages * share // 100)
        offset = min(pages * at // 100, pages - wanted)
        held = [
            range(b.offset, b.offset + b.nbytes // self.size) for b, _ in self.held if b.area == area and not b.freed
        ]
        free = not any(r.start < offset + wanted and offset < r.stop for r in held)
        try:
            buffer = self.owner.alloc_contig(wanted * self.size, area, offset if exactly else None)
        except ArenaExhausted as error:
            assert not free if exactly else error.largest_free < wanted * self.size  # noqa: PT017 - one of several right answers
            return None
        assert not exactly or free
        Checked.fills += 1
        with buffer.view as view:
            view[:] = page_of(Checked.fills, self.size) * wanted
        self.held.append((buffer, Checked.fills))
        return len(self.held) - 1

    @rule(chosen=consumes(buffers))
    def free(self, chosen: int | None) -> None:
        if chosen is None or self.held[chosen][0].freed:
            return
        self._untouched(chosen)
        self.held[chosen][0].free()

    def _untouched(self, chosen: int) -> None:
        buffer, value = self.held[chosen]
        with buffer.view as view:
            assert view == page_of(value, self.size) * (buffer.nbytes // self.size), "the cache wrote into a buffer"

    @invariant()
    def counts(self) -> None:
        for type_ in range(2):
            for way in ("mapped", "messages"):
                assert len(self.swaps[type_, way]) == len(self.model[type_])

    @invariant()
    def arena_is_sound(self) -> None:
        check_at_rest(arena_name(self.owner.endpoint), self.spill_dir)

    def teardown(self) -> None:
        try:
            for chosen, (buffer, _) in enumerate(self.held):
                if not buffer.freed:
                    self._untouched(chosen)
            for (type_, _way), swap in self.swaps.items():
                for offset, value in self.model[type_].items():
                    assert swap.load(offset) == page_of(value, self.size)
        finally:
            for type_ in range(2):
                self.swaps[type_, "mapped"].invalidate_area()
            for buffer, _ in self.held:
                buffer.free()
        assert all(info.held == 0 for info in self.owner.areas())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page_size", ["4K", "64K"])
def test_against_a_dict(tmp_path: Path, page_size: str) -> None:
    size = {"4K": 1 << 20, "64K": 12 << 20}[page_size]
    area = size // 5
    with (
        gcma_shm.embedded(
            size,
            areas={"a": area, "b": area},
            page_size=page_size,
            slots=2 * SLOTS,
            clients=5,
            spill_dir=tmp_path,
            timeout=WAIT_S,
        ) as owner,
        gcma_shm.connect(owner.endpoint, mapped=False, timeout=WAIT_S) as remote,
    ):
        (spill_dir,) = tmp_path.glob("gcma-*")

        class Machine(Checked):
            pass

        Machine.owner, Machine.remote, Machine.spill_dir = owner, remote, spill_dir
        for _ in range(TIMES_MAX):  # examples are chosen by chance, and who reclaims is
            run_state_machine_as_test(
                Machine,
                settings=settings(
                    max_examples=25,
                    stateful_step_count=40,
                    deadline=None,
                    derandomize=False,  # hypothesis's default where CI is set: the same examples each time
                    suppress_health_check=list(HealthCheck),
                    print_blob=True,
                ),
            )
            counters = owner.stats()["counters"]
            if all(counters[name] for name in OCCURRED):
                break
        for name in OCCURRED:
            assert counters[name], f"the examples never came to {name}: {counters}"


def test_the_checker_sees_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sound arena with one word changed is not sound any more: what the other test relies on."""
    with gcma_shm.embedded("1M", slots=SLOTS, clients=5, spill_dir=tmp_path) as owner:
        (spill_dir,) = tmp_path.glob("gcma-*")
        name = arena_name(owner.endpoint)
        swap = owner.swap(0, SLOTS)
        for n in range(5):
            swap.store(n, page_of(n + 1, owner.page_size))
        check_at_rest(name, spill_dir)
        arena = open_arena(name)
        g = arena.geometry
        words = memoryview(arena.memory).cast("Q")
        page = words[g.slots_at // 8] & 0xFFFFFFFF
        damages = {
            "dirty outside": (g.slots_at, 1 << 36 | 1 << 33 | 1 << 32 | g.nursery_pages),
            "names nursery page": (g.slots_at, words[g.slots_at // 8 + 2]),
            "names no page": (g.slots_at, 1 << 33 | g.pages),
            "somebody holds": (g.slots_at + 8, 3 << 52),
            "no such state": (g.slots_at, 7 << 33),
            "closed in a living": (g.slots_at, 4 << 33),
            "granted to nobody": (g.life_at + 8 * (g.nursery_pages - 1), 1 << 62),
            "its gauge says": (g.areas_at + 0x68, 5),
            "names nursery": (g.key_at + 8 * page, 99),
            "differ": (g.page_at(page), 12345),
            "still filling": (0x300, 77),
        }
        with monkeypatch.context() as impatient, stopped(owner.broker_pid):
            # Or its tick moves the tables between two looks, and puts some of this right.
            impatient.setattr(invariants, "REST_S", 0.0)
            for message, (at, value) in damages.items():
                before, words[at // 8] = words[at // 8], value
                with pytest.raises(AssertionError, match=message):
                    check_at_rest(name, spill_dir)
                words[at // 8] = before
        check_at_rest(name, spill_dir)
        words.release()
