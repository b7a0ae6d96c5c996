"""The extension module: checksums, single words, argument errors, counters, and the memory of a buffer."""

from __future__ import annotations

import errno
import mmap
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcma_shm import arena as arenas
from gcma_shm import layout
from gcma_shm._core import COUNTERS, Plane, Slots
from gcma_shm.errors import ArenaError, Closed, NurseryFull, SlotBusy, SpillCorrupt, SpillError
from gcma_shm.layout import Geometry
from gcma_shm.records import Records
from tests.conftest import Bare
from tests.invariants import check_at_rest
from tests.processes import Said, descriptors, files_refuse_writes, in_fork

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

PAGE_SIZES = {"4K": 4 << 10, "64K": 64 << 10, "2M": 2 << 20}


# --- CRC32C


def table() -> list[int]:
    entries = []
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)  # noqa: PLW2901 - the definition's own loop
        entries.append(n)
    return entries


TABLE = table()


def crc32c(data: bytes) -> int:
    """By the definition, a byte at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def test_the_naive_one_knows_the_vectors_of_rfc_3720() -> None:
    """Appendix B.4, which lists the bytes in the order of the wire; and the check value of the Rocksoft catalogue."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C
    assert crc32c(b"123456789") == 0xE3069283


def checksums(page_size: int, tmp_path: Path) -> tuple[Plane, Plane]:
    """The CPU's way (where it has one) and the table's."""
    geometry, areas = layout.plan(24 * page_size + (1 << 20), page_size, slots=100, clients_max=2)
    memory = mmap.mmap(-1, geometry.size)
    with memoryview(memory) as view:
        layout.write_header(view, geometry, areas, bytes(16))
    return tuple(Plane(memory, geometry, 1, os.fsencode(tmp_path), crc_hardware=hardware) for hardware in (True, False))  # type: ignore[return-value]


@pytest.mark.parametrize("page_size", PAGE_SIZES.values(), ids=PAGE_SIZES)
def test_known_patterns_as_pages(page_size: int, tmp_path: Path) -> None:
    hard, soft = checksums(page_size, tmp_path)
    ramp = bytes(range(256)) * (page_size // 256)
    pages = [
        bytes(page_size),
        b"\xff" * page_size,
        ramp,
        ramp[::-1],
        b"\1" + bytes(page_size - 1),
        bytes(page_size - 1) + b"\1",
    ]
    pages += [bytes(page_size // 4 - 1) + b"\2" + bytes(page_size - page_size // 4)]  # at the seam of two quarters
    pages += [np.random.default_rng(seed).bytes(page_size) for seed in range(3)]
    for page in pages:
        assert soft.checksum(page) == hard.checksum(page)
    for page in pages if page_size < 1 << 20 else pages[-2:]:
        assert soft.checksum(page) == crc32c(page)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_hardware_and_software_agree(data: st.DataObject) -> None:
    page_size = data.draw(st.sampled_from([4 << 10, 8 << 10, 64 << 10]))
    hard, soft = checksums(page_size, Path("/"))
    piece = data.draw(st.binary(min_size=1, max_size=200))
    page = (piece * (page_size // len(piece) + 1))[:page_size]
    assert hard.checksum(page) == soft.checksum(page) == crc32c(page)


def test_checksum_of_what_is_no_page(bare: Bare) -> None:
    for wrong in (b"", bytes(4095), bytes(4097)):
        with pytest.raises(ValueError, match="4096"):
            bare.plane.checksum(wrong)
    with pytest.raises(TypeError):
        bare.plane.checksum("x" * 4096)  # type: ignore[arg-type] # on purpose


# --- Plane


def refused_planes(bare: Bare, tmp_path: Path) -> None:
    geometry, memory, directory = bare.arena.geometry, bare.arena.memory, os.fsencode(bare.spill_dir)
    for number in (-1, 0, geometry.clients_max + 1):
        with pytest.raises(ValueError, match="client number"):
            Plane(memory, geometry, number, directory)
    with pytest.raises(ArenaError):
        Plane(bytearray(4096), geometry, 1, directory)
    with pytest.raises(BufferError):
        Plane(bytes(geometry.size), geometry, 1, directory)
    (tmp_path / "file").touch()
    for name, number in (("missing", errno.ENOENT), ("file", errno.ENOTDIR)):
        with pytest.raises(SpillError) as raised:
            Plane(memory, geometry, 1, os.fsencode(tmp_path / name))
        assert raised.value.errno == number
    for arguments in ((), (None, 0, 1, 1.0)):  # refused before the constructor begins
        with pytest.raises(TypeError):
            Slots(*arguments)


def test_what_a_plane_refuses_to_be(bare: Bare, tmp_path: Path) -> None:
    """In a child: a refusal that closed somebody else's descriptor would harm every later test."""

    def child(_: Said) -> tuple[list[str], list[str]]:
        before = sorted(path.name for path in Path("/proc/self/fd").iterdir())
        refused_planes(bare, tmp_path)
        return before, sorted(path.name for path in Path("/proc/self/fd").iterdir())

    before, after = in_fork(child)
    assert before == after


def test_a_plane_that_was_never_begun_leaves_no_descriptor(bare: Bare) -> None:
    before = descriptors()
    for _ in range(3):
        plane = Plane(bare.arena.memory, bare.arena.geometry, 2, os.fsencode(bare.spill_dir))
        plane.become(3)
        assert plane.number == 3
        del plane
    assert descriptors() <= before


def test_words(bare: Bare) -> None:
    plane, at = bare.plane, layout.EPOCH_AT
    plane.write(at, 41)
    assert plane.add(at, 1) == 41
    assert plane.read(at) == 42
    assert not plane.swap_word(at, 41, 7)
    assert plane.swap_word(at, 42, 2**64 - 1)
    assert plane.add(at, 2) == 2**64 - 1
    assert plane.read(at) == 1
    assert struct.unpack_from("<Q", bare.arena.memory, at) == (1,)
    for wrong in (-8, 1, 4, bare.arena.geometry.size, bare.arena.geometry.size - 4, 2**62):
        for call in (
            lambda w=wrong: plane.read(w),
            lambda w=wrong: plane.write(w, 1),
            lambda w=wrong: plane.swap_word(w, 0, 1),
            lambda w=wrong: plane.add(w, 1),
        ):
            with pytest.raises(IndexError):
                call()
    plane.write(bare.arena.geometry.size - 8, 5)


def test_ranges(bare: Bare) -> None:
    first, pages = bare.arena.areas[0].first, bare.arena.areas[0].pages
    for call in (bare.plane.take, bare.plane.give):
        for area, start, count in (
            (2, first, 1),
            (-1, first, 1),
            (0, first - 1, 1),
            (0, first, 0),
            (0, first, pages + 1),
            (0, first + pages, 1),
        ):
            with pytest.raises(IndexError):
                call(area, start, count)
    assert bare.plane.take(0, first, pages) == 0, "nothing was lent"
    bare.plane.give(0, first, pages)


def life(bare: Bare, page: int) -> tuple[int, int, int]:
    """State, owner, sequence."""
    word = bare.plane.read(bare.arena.geometry.life_at + 8 * page)
    return word >> 62, word >> 46 & 0xFFFF, word & (1 << 46) - 1


def test_each_change_of_hands_takes_the_next_sequence(bare: Bare) -> None:
    first = bare.arena.areas[0].first
    for n, (change, owner, state) in enumerate(
        ((bare.plane.take, 7, 3), (bare.plane.give, 7, 0), (bare.plane.take, 65535, 3), (bare.plane.give, 0, 0)), 1
    ):
        assert change(0, first + 1, 2, owner) == 0
        assert life(bare, first) == life(bare, first + 3) == (0, 0, 0)
        assert life(bare, first + 1) == life(bare, first + 2) == (state, owner, n)


def test_areas_are_where_the_broker_says(bare: Bare) -> None:
    plane, g = bare.plane, bare.arena.geometry
    for index, first, pages in (
        (-1, g.nursery_pages, 1),
        (layout.AREAS_MAX, g.nursery_pages, 1),
        (0, g.nursery_pages - 1, 1),
        (0, g.pages - 1, 2),
        (0, g.pages, 1),
        (0, g.nursery_pages, 2**63),
        (0, 2**63, 2**63),
    ):
        with pytest.raises(IndexError):
            plane.set_area(index, first, pages)
    plane.set_area(63, g.pages - 3, 3)
    plane.take(63, g.pages - 3, 3)
    plane.set_area(63, 0, 0)
    with pytest.raises(IndexError):
        plane.take(63, g.pages - 3, 3)
    other = Plane(bare.arena.memory, g, 2, os.fsencode(bare.spill_dir))
    other.set_area(0, g.nursery_pages, 5)
    with pytest.raises(ValueError, match="broker"):
        other.take(0, g.nursery_pages, 5)
    with pytest.raises(IndexError):
        other.lent_near(g.nursery_pages, 5)


# --- reservations

RESERVED = 9 << 8 | layout.RESERVATION  # the state word of the entry below


def reserved(bare: Bare, index: int = 3, pages: int = 50) -> tuple[int, int]:
    """An entry of the table as the broker writes it, in the middle of the first area; its pages."""
    g, first = bare.arena.geometry, bare.arena.areas[0].first + 20
    at = g.allocation_at(index)
    for offset, value in (
        (layout.ALLOCATION_FIRST_AT, first),
        (layout.ALLOCATION_PAGES_AT, pages),
        (layout.ALLOCATION_CLAIM_AT, 5 << 17),
        (layout.ALLOCATION_STATE_AT, RESERVED),
    ):
        bare.plane.write(at + offset, value)
    bare.plane.write(g.holders_at + index * g.holder_bytes, 1 << 2)
    bare.plane.entries_used(index + 1)
    bare.plane.give(0, first, pages, index + 1)
    return first, pages


def client(bare: Bare, number: int) -> Plane:
    return Plane(bare.arena.memory, bare.arena.geometry, number, os.fsencode(bare.spill_dir))


def test_a_claim_is_one_clients_until_it_lends(bare: Bare) -> None:
    first, pages = reserved(bare)
    two, three = client(bare, 2), client(bare, 3)
    for wrong in (RESERVED + 256, RESERVED & ~255 | layout.BUFFER, RESERVED & ~255, 0):
        assert two.claim(3, wrong, first, pages) == (0, None), "another reservation"
    word, span = two.claim(3, RESERVED, first, pages)
    assert word == 6 << 17 | 2
    assert span is not None
    assert span.nbytes == pages * 4096
    assert two.claim_settled(first, pages, 0)
    for plane in (two, three):
        assert plane.claim(3, RESERVED, first, pages) == (word, None)
        assert not three.unclaim(3, word + 1, first, pages)
    assert {life(bare, page)[1:] for page in range(first, first + pages)} == {(4, 1)}
    assert two.unclaim(3, word, first, pages)
    assert {life(bare, page) for page in range(first, first + pages)} == {(0, 4, 2)}
    assert not two.unclaim(3, word, first, pages), "once"
    again, span = three.claim(3, RESERVED, first, pages)
    assert again == 8 << 17 | 3
    assert three.yield_claim(3, again)
    assert not three.yield_claim(3, again)
    assert life(bare, first)[2] == 2, "nothing was written there"
    del span
    check_at_rest(bare.arena.name)


def test_a_shared_claim_is_lent_by_nobody_alone(bare: Bare) -> None:
    first, pages = reserved(bare)
    two = client(bare, 2)
    word, _ = two.claim(3, RESERVED, first, pages)
    assert two.share_claim(3, word)
    assert not two.share_claim(3, word)
    assert not two.unclaim(3, word, first, pages)
    assert not two.yield_claim(3, word)
    shared = word | layout.CLAIM_SHARED
    assert bare.plane.seize(3, word) == 0
    seized = bare.plane.seize(3, shared)
    assert seized == (word >> 17) + 1 << 17 | layout.BROKER
    assert two.claim(3, RESERVED, first, pages) == (seized, None)
    assert two.seize(3, seized) == (word >> 17) + 2 << 17 | 2, "from a broker that has died"


def test_a_claim_waits_for_the_page_that_is_being_filled(bare: Bare) -> None:
    first, pages = reserved(bare)
    two = client(bare, 2)
    for page, settled in ((first - 1, True), (first, False), (first + pages - 1, False), (first + pages, True)):
        bare.plane.write(layout.FILLING_AT, page + 1)
        assert two.claim_settled(first, pages, 0.001) == settled
    bare.plane.write(layout.FILLING_AT, 0)


@pytest.mark.parametrize(
    ("index", "first", "pages"), [(2**40, 0, 1), (64, 0, 1), (3, -1, 1), (3, 0, 0), (3, 250, 51), (3, 0, 2**63)]
)
def test_entries_and_pages_that_are_none(bare: Bare, index: int, first: int, pages: int) -> None:
    """`first`: from the first page behind the nursery."""
    assert bare.arena.geometry.allocations_max == 64
    first += bare.arena.geometry.nursery_pages
    with pytest.raises(IndexError):
        bare.plane.claim(index, RESERVED, first, pages)
    with pytest.raises(IndexError):
        bare.plane.unclaim(index, 0, first, pages)
    if index == 3:
        with pytest.raises(IndexError):
            bare.plane.claim_settled(first, pages, 0)
        return
    for call in (bare.plane.seize, bare.plane.share_claim, bare.plane.yield_claim):
        with pytest.raises(IndexError):
            call(index, 0)


def test_a_closed_plane_claims_nothing(bare: Bare) -> None:
    first, pages = reserved(bare)
    two = client(bare, 2)
    assert two.close(1.0)
    with pytest.raises(Closed):
        two.claim(3, RESERVED, first, pages)


def test_a_reservation_holds_cache_until_it_is_claimed(bare: Bare) -> None:
    """Its cache is gone the moment that it is claimed, heals when it is read, and is counted in its entry."""
    first, pages = reserved(bare)
    g, two, swap = bare.arena.geometry, client(bare, 2), declared(bare, slots=600)
    at_lent = g.allocation_at(3) + layout.ALLOCATION_LENT_AT
    for n in range(600):
        swap.store(n, struct.pack("<Q", n + 1) * 512)
        bare.plane.sweep(0)
    assert bare.plane.read(at_lent) == pages
    assert {life(bare, page)[:2] for page in range(first, first + pages)} == {(2, 4)}
    own = sum(bare.plane.read(g.area_at(index) + layout.AREA_LENT_AT) for index in range(2))
    assert own == 300 - pages
    check_at_rest(bare.arena.name, bare.spill_dir)
    word, span = two.claim(3, RESERVED, first, pages)
    assert span is not None
    assert two.claim_settled(first, pages, 0)
    memoryview(span)[:] = b"\xbb" * pages * 4096
    check_at_rest(bare.arena.name, bare.spill_dir)
    for n in range(600):
        assert swap.load(n) == struct.pack("<Q", n + 1) * 512
        bare.plane.sweep(0)
    assert counts(bare)["heals"] >= pages
    assert bytes(memoryview(span)) == b"\xbb" * pages * 4096, "nobody wrote there"
    assert two.unclaim(3, word, first, pages)
    assert bare.plane.read(at_lent) == 0
    for _ in range(3):
        for n in range(600):
            assert swap.load(n) == struct.pack("<Q", n + 1) * 512
            swap.store(n, struct.pack("<Q", n + 1) * 512)
            bare.plane.sweep(0)
    assert bare.plane.read(at_lent) > 0, "the cache has it again"
    check_at_rest(bare.arena.name, bare.spill_dir)


def test_how_much_cache_is_near_is_known_by_blocks(bare: Bare) -> None:
    swap = declared(bare, slots=600)
    plane, (a, b) = bare.plane, bare.arena.areas
    assert plane.lent_near(a.first, 300) == 0
    for n in range(600):
        swap.store(n, struct.pack("<Q", n + 1) * 512)
        plane.sweep(0)
    assert plane.lent_near(a.first, 300) == 300
    block = (b.first + 64) // 64 * 64
    assert plane.lent_near(block, 1) == plane.lent_near(block + 63, 1) == plane.lent_near(block, 64) == 64
    assert plane.lent_near(block + 63, 2) == 128
    plane.take(1, block + 10, 20)
    assert plane.lent_near(block + 10, 20) == 44, "about"
    plane.give(1, block + 10, 20)
    assert plane.lent_near(block, 1) == 44
    for first, count in ((a.first, 0), (496, 1), (495, 2), (0, 2**63)):
        with pytest.raises(IndexError):
            plane.lent_near(first, count)


def test_waking_counts_so_that_no_wake_is_lost(bare: Bare) -> None:
    two = client(bare, 2)
    seen = two.wake_count()
    bare.plane.wake(2)
    two.wait(seen, 100.0)  # woken before it slept: returns at once
    assert two.wake_count() == seen + 1
    two.wait(seen + 1, 0.001)
    bare.plane.wake(3)
    assert two.wake_count() == seen + 1
    for number in (0, 9, 2**40):
        with pytest.raises(IndexError):
            bare.plane.wake(number)


def test_populating_does_not_change_what_is_there(bare: Bare) -> None:
    g = bare.arena.geometry
    span = bare.plane.span(g.pages - 70, 70 * 4096)
    memoryview(span)[:] = b"\7" * 70 * 4096
    bare.plane.populate(g.pages - 70, 70 * 4096)
    bare.plane.populate(0, g.pages * 4096)
    assert bytes(memoryview(span)) == b"\7" * 70 * 4096
    for first, nbytes in ((0, 0), (g.pages, 1), (g.pages - 1, 4097), (0, 2**63)):
        with pytest.raises(IndexError):
            bare.plane.populate(first, nbytes)


def test_types_and_handles_that_are_none(bare: Bare) -> None:
    for type_ in (256, 2**40):
        with pytest.raises(IndexError):
            bare.plane.begin_type(type_, 0, 1, 0)
        with pytest.raises(IndexError):
            bare.plane.end_type(type_, 0, 1)
        with pytest.raises(IndexError):
            bare.plane.slots(type_, 1, None)
    (bare.spill_dir / "000.1").touch()
    for life in (1, 2, 3):  # never declared
        with pytest.raises((Closed, SpillError)):
            bare.plane.slots(0, life, None)


def test_spans(bare: Bare) -> None:
    geometry = bare.arena.geometry
    span = bare.plane.span(geometry.pages - 2, 2 * 4096)
    assert span.nbytes == 8192
    with memoryview(span) as view:
        assert span.exports == 1
        assert not view.readonly
        view[:] = b"\7" * 8192
        assert bare.arena.memory[geometry.page_at(geometry.pages - 1)] == 7
        with memoryview(span):
            assert span.exports == 2
        array = np.frombuffer(memoryview(span), np.uint8)
        assert span.exports == 2
        del array
    assert span.exports == 0
    span.zero()
    assert bytes(memoryview(span)) == bytes(8192)
    for first, nbytes in ((geometry.pages, 1), (geometry.pages - 1, 4097), (2**40, 0), (0, 2**63)):
        with pytest.raises(IndexError):
            bare.plane.span(first, nbytes)


# --- Slots


def declared(
    bare: Bare, slots: int = 100, flags: int = 0, type_: int = 0, base: int = 0, timeout: float | None = 5.0
) -> Slots:
    """Begins a life of a type as the registry does."""
    life = bare.plane.read(bare.arena.geometry.type_at(type_)) + 1
    (bare.spill_dir / f"{type_:03}.{life}").touch(0o600)
    assert bare.plane.begin_type(type_, base, slots, flags) == life
    return bare.plane.slots(type_, life, timeout)


def counts(bare: Bare, number: int = 1) -> dict[str, int]:
    return {name: count for name, count in Records(bare.plane).counters(number).items() if count}


def test_counters_tell_each_way_that_an_operation_went(bare: Bare) -> None:
    swap = declared(bare)
    swap.store(1, bytes(range(256)) * 16)
    swap.store(2, bytes(4096))
    assert counts(bare) == {"stores": 2, "stores_zero": 1, "cleaned": 1}
    swap.load(1)
    swap.load(2)
    swap.load(3)
    swap.invalidate_page(3)
    swap.invalidate_page(2)
    expected = {
        "stores": 2,
        "stores_zero": 1,
        "cleaned": 1,
        "hits_nursery": 1,
        "hits_zero": 1,
        "misses": 1,
        "invalidations": 1,
    }
    assert counts(bare) == expected
    assert set(expected) <= set(COUNTERS)
    swap.close()
    with pytest.raises(Closed):
        swap.load(1)


CACHED, FILLED = 1, 5


def page_of(first: bytes) -> bytes:
    """A page that takes memory: it repeats eight bytes, for which a slot's word has no room."""
    return (first + b"-gcma--") * 512


def slot(bare: Bare, number: int) -> tuple[int, bool, int]:
    """Of the word: state, whether it is dirty, payload."""
    word = bare.plane.read(bare.arena.geometry.slots_at + 16 * number)
    return word >> 33 & 7, bool(word >> 32 & 1), word & 0xFFFFFFFF


@pytest.mark.parametrize("pattern", [b"a", b"ab", b"abcd", b"\0\0\0\1", b"\0a"], ids=bytes.hex)
def test_a_pattern_of_up_to_four_bytes_takes_no_page(bare: Bare, pattern: bytes) -> None:
    swap = declared(bare)
    filled = pattern * (4096 // len(pattern))
    swap.store(1, filled)
    assert slot(bare, 1) == (FILLED, False, int.from_bytes(filled[:4], "little"))
    assert swap.load(1) == filled
    assert 1 in swap
    assert counts(bare) == {"stores": 1, "stores_filled": 1, "hits_filled": 1}
    assert all(life(bare, page)[0] == 0 for page in range(bare.arena.geometry.nursery_pages)), "no page was granted"


@pytest.mark.parametrize("at", [0, 1, 3, 4, 2048, 4091, 4092, 4095])
@pytest.mark.parametrize("pattern", [b"\0", b"a", b"ab", b"abcd"], ids=bytes.hex)
def test_a_byte_that_differs_takes_a_page(bare: Bare, pattern: bytes, at: int) -> None:
    swap = declared(bare)
    page = bytearray(pattern * (4096 // len(pattern)))
    page[at] ^= 0x80
    swap.store(1, page)
    assert slot(bare, 1)[0] == CACHED
    assert swap.load(1) == bytes(page)
    assert counts(bare) == {"stores": 1, "cleaned": 1, "hits_nursery": 1}


@pytest.mark.parametrize("unit", [b"abcdefgh", b"abc", b"abcdabce"], ids=bytes.hex)
def test_a_pattern_that_no_word_has_room_for_takes_a_page(bare: Bare, unit: bytes) -> None:
    """Also one whose first and last four bytes are the same."""
    swap = declared(bare)
    page = (unit * 4096)[:4092] + (unit + unit)[:4]
    swap.store(1, page)
    assert slot(bare, 1)[0] == CACHED
    assert swap.load(1) == page


def test_a_pattern_replaces_a_dirty_page_which_is_never_written(bare: Bare) -> None:
    swap = declared(bare, flags=layout.WRITE_BEHIND)
    swap.store(1, bytes(range(256)) * 16)
    swap.store(1, b"a" * 4096)
    assert swap.load(1) == b"a" * 4096
    swap.sync()
    assert counts(bare) == {"stores": 2, "stores_filled": 1, "overwrites_saved": 1, "hits_filled": 1}


def test_an_overwrite_of_a_dirty_page_costs_no_write(bare: Bare) -> None:
    swap = declared(bare, flags=layout.WRITE_BEHIND)
    for value in range(1, 6):
        swap.store(1, page_of(bytes([value])))
    assert counts(bare) == {"stores": 5, "overwrites_saved": 4}
    assert (bare.spill_dir / "000.1").read_bytes() == b""
    swap.sync()
    assert counts(bare)["cleaned"] == 1
    assert (bare.spill_dir / "000.1").read_bytes() == bytes(4096) + page_of(b"\5")


def test_counters_stay_within_their_record() -> None:
    assert layout.CLIENT_COUNTERS_AT + 8 * len(COUNTERS) <= layout.CLIENT_BYTES
    assert len(set(COUNTERS)) == len(COUNTERS)


def test_the_sweep_promotes_and_evicts_and_loads_find_it_all(bare: Bare) -> None:
    """No thread sweeps here but this one, so every step of the way is known."""
    swap = declared(bare, slots=600)
    nursery = bare.arena.geometry.nursery_pages
    pages = {n: struct.pack("<Q", n + 1) * 512 for n in range(600)}
    for n in range(nursery):
        swap.store(n, pages[n])
    for _ in range(3):
        bare.plane.sweep(0)
    after = counts(bare)
    assert after["promotions"] >= nursery // 4, "there was room in the areas"
    assert "evictions" not in after
    for n in range(nursery, 600):
        swap.store(n, pages[n])
        bare.plane.sweep(0)
    for n, page in reversed(
        pages.items()
    ):  # what comes from the file takes the places of clean pages, as nobody sweeps
        assert swap.load(n) == page
    after = counts(bare)
    for name in ("hits_nursery", "hits_area", "hits_spill", "promotions", "evictions", "refaults"):
        assert after[name], f"no {name}"
    check_at_rest(bare.arena.name, bare.spill_dir)


def test_without_a_sweep_stores_reclaim_for_themselves(bare: Bare) -> None:
    swap = declared(bare, slots=600)
    for n in range(600):
        swap.store(n, struct.pack("<Q", n + 1) * 512)
    after = counts(bare)
    assert after["direct_reclaims"] >= 600 - bare.arena.geometry.nursery_pages
    assert all(swap.load(n) == struct.pack("<Q", n + 1) * 512 for n in range(600))
    check_at_rest(bare.arena.name, bare.spill_dir)


def test_a_buffer_over_cached_pages_leaves_them_in_the_file(bare: Bare) -> None:
    swap = declared(bare, slots=600)
    for n in range(600):
        swap.store(n, struct.pack("<Q", n + 1) * 512)
        bare.plane.sweep(0)
    lent = sum(bare.plane.read(bare.arena.geometry.area_at(i) + layout.AREA_LENT_AT) for i in range(2))
    assert lent > 200
    discards = 0
    for index, area in enumerate(bare.arena.areas):
        discards += bare.plane.take(index, area.first, area.pages)
        memoryview(bare.plane.span(area.first, area.pages * 4096))[:] = b"\xbb" * area.pages * 4096
    assert discards == lent
    assert all(swap.load(n) == struct.pack("<Q", n + 1) * 512 for n in range(600))
    assert counts(bare)["heals"] > 0
    for area in bare.arena.areas:
        assert bytes(memoryview(bare.plane.span(area.first, area.pages * 4096))) == b"\xbb" * area.pages * 4096
    for index, area in enumerate(bare.arena.areas):
        bare.plane.give(index, area.first, area.pages)
    check_at_rest(bare.arena.name, bare.spill_dir)


def test_a_page_damaged_in_the_file_is_found(bare: Bare) -> None:
    swap = declared(bare, slots=600)
    for n in range(600):
        swap.store(n, struct.pack("<Q", n + 1) * 512)
    geometry = bare.arena.geometry
    spilled = [n for n in range(600) if bare.plane.read(geometry.slots_at + 16 * n) >> 33 & 7 == 2]
    with (bare.spill_dir / "000.1").open("r+b") as file:
        file.seek(spilled[0] * 4096 + 100)
        file.write(b"\xff")
    with pytest.raises(SpillCorrupt):
        swap.load(spilled[0])
    with pytest.raises(SpillCorrupt) as raised:
        swap.load_many([spilled[1], spilled[2], spilled[0]], bytearray(3 * 4096))
    assert raised.value.done == 2
    assert counts(bare)["refused_spill_corrupt"] == 2
    os.truncate(bare.spill_dir / "000.1", spilled[-1] * 4096 + 5)
    with pytest.raises(SpillCorrupt):
        swap.load(spilled[-1])
    swap.store(spilled[0], page_of(b"n"))
    assert swap.load(spilled[0]) == page_of(b"n"), "a new value heals the slot"


def test_a_nursery_of_pages_that_no_file_takes(bare: Bare) -> None:
    """Stores fail before they have changed anything, zeros go on, and all is well once the file takes pages again."""
    swap = declared(bare, slots=600, flags=layout.WRITE_BEHIND, timeout=0.0)
    nursery = bare.arena.geometry.nursery_pages * 15 // 16  # the last is for other types
    with files_refuse_writes(os.getpid()):
        for n in range(nursery):
            swap.store(n, struct.pack("<Q", n + 1) * 512)
        for n in (0, nursery):
            with pytest.raises(NurseryFull):
                swap.store(n, page_of(b"x"))
        assert swap.load(0) == struct.pack("<Q", 1) * 512
        assert swap.load(nursery) is None
        with pytest.raises(NurseryFull) as raised:
            swap.store_many([nursery + 1, nursery], bytes(4096) + page_of(b"x"))
        assert raised.value.done == 1
        assert swap.load(nursery + 1) == bytes(4096)
        assert swap.load(nursery) is None
        with pytest.raises(SpillError) as failed:
            swap.sync(0)
        assert failed.value.errno == errno.EFBIG
        assert counts(bare)["refused_nursery_full"] == 3
    swap.sync()
    swap.store(nursery, page_of(b"x"))
    assert all(swap.load(n) == struct.pack("<Q", n + 1) * 512 for n in range(nursery))
    check_at_rest(bare.arena.name, bare.spill_dir)


def test_the_end_of_a_type_and_its_next_life(bare: Bare) -> None:
    old = declared(bare)
    old.store(1, page_of(b"a"))
    other = declared(bare, type_=1, base=100)
    other.store(1, page_of(b"b"))
    bare.plane.end_type(0, 0, 100)
    with pytest.raises(Closed):
        old.load(1)
    check_at_rest(bare.arena.name, bare.spill_dir)
    anew = declared(bare)
    assert (old.life, anew.life) == (1, 3)
    assert anew.load(1) is None
    with pytest.raises(Closed):
        old.store(1, page_of(b"c"))
    assert anew.load(1) is None
    assert other.load(1) == page_of(b"b")
    check_at_rest(bare.arena.name, bare.spill_dir)


def test_bury_takes_back_grants_and_claims_of_the_dead_alone(bare: Bare) -> None:
    """The words that a client leaves when it is killed between two steps, written by hand."""
    g, plane = bare.arena.geometry, bare.plane
    swap = declared(bare, flags=layout.WRITE_BEHIND)
    swap.store(5, page_of(b"a"))
    word = plane.read(g.slots_at + 16 * 5)
    page = word & 0xFFFFFFFF
    granted = 1 << 62 | 3 << 46
    plane.write(
        g.life_at + 8 * page, granted | plane.read(g.life_at + 8 * page) & (1 << 46) - 1
    )  # killed before it published
    empty = (page + 1) % g.nursery_pages
    plane.write(g.life_at + 8 * empty, granted | 9)  # killed before the word named it
    theirs = (page + 2) % g.nursery_pages
    plane.write(g.life_at + 8 * theirs, 1 << 62 | 4 << 46 | 9)  # another client's
    plane.write(g.slots_at + 16 * 7 + 8, 3 << 52 | 11 << 32 | 0xABCD)
    plane.write(g.slots_at + 16 * 8 + 8, 4 << 52 | 11 << 32 | 0xABCD)
    plane.bury([3])
    assert plane.read(g.life_at + 8 * page) >> 62 == 2
    assert plane.read(g.life_at + 8 * empty) == 10
    assert plane.read(g.life_at + 8 * theirs) == 1 << 62 | 4 << 46 | 9
    assert plane.read(g.slots_at + 16 * 7 + 8) == 0xABCD
    assert plane.read(g.slots_at + 16 * 8 + 8) == 4 << 52 | 11 << 32 | 0xABCD
    assert swap.load(5) == page_of(b"a")
    plane.bury([4])
    swap.sync()
    check_at_rest(bare.arena.name, bare.spill_dir)


def test_a_claim_that_nobody_gives_back_bounds_the_store(bare: Bare) -> None:
    g, plane = bare.arena.geometry, bare.plane
    swap = declared(bare, timeout=0.0)
    side = g.slots_at + 16 * 3 + 8
    plane.write(side, 3 << 52 | 1 << 32)
    with pytest.raises(SlotBusy):
        swap.store(3, page_of(b"a"))
    assert swap.load(3) == page_of(b"a"), "stored and visible"
    with pytest.raises(SlotBusy) as raised:
        swap.store_many([1, 2, 3, 4], page_of(b"b") * 4)
    assert raised.value.done == 2
    with pytest.raises(SlotBusy):
        swap.sync(0)
    assert counts(bare)["refused_slot_busy"] == 3
    plane.bury([3])
    swap.sync(0)
    assert [swap.load(n) for n in range(1, 5)] == [page_of(b"b")] * 4
    check_at_rest(bare.arena.name, bare.spill_dir)


def test_a_sync_tells_of_a_file_that_refuses_rather_than_of_a_busy_slot(bare: Bare) -> None:
    swap = declared(bare, flags=layout.WRITE_BEHIND, timeout=0.0)
    for n in (3, 90):  # not in one batch
        swap.store(n, page_of(b"a"))
    side = bare.arena.geometry.slots_at + 16 * 3 + 8
    bare.plane.write(side, 3 << 52 | 1 << 32)
    with files_refuse_writes(os.getpid()):
        with pytest.raises(SpillError) as raised:
            swap.sync(0)
        assert raised.value.errno == errno.EFBIG
    with pytest.raises(SlotBusy):
        swap.sync(0)
    bare.plane.bury([3])
    swap.sync(0)


def test_what_a_file_refused_is_tried_again_when_it_is_asked_for(bare: Bare) -> None:
    """The sweep tries a page once; `retry_refused` counts what is left, and forgets what was overwritten, dropped, or has ended."""
    swap, ended = (
        declared(bare, flags=layout.WRITE_BEHIND),
        declared(bare, flags=layout.WRITE_BEHIND, type_=1, base=100),
    )
    for n in range(6):
        swap.store(n, page_of(b"a"))
    ended.store(0, page_of(b"e"))
    with files_refuse_writes(os.getpid()):
        for _ in range(3):
            bare.plane.clean_until(7)
            assert bare.plane.refused == 7
            assert counts(bare)["spill_failures"] == 7, "each once"
        assert bare.plane.retry_refused() == ({0: 6, 1: 1}, errno.EFBIG)
        assert counts(bare)["spill_failures"] == 14
        swap.store(0, page_of(b"b"))
        swap.invalidate_page(1)
        swap.store(2, bytes(4096))
        bare.plane.end_type(1, 100, 100)
        assert bare.plane.retry_refused() == ({0: 3}, errno.EFBIG)
        assert bare.plane.refused == 3
        bare.plane.clean_until(8)  # what replaced slot 0 is refused as well
        assert bare.plane.retry_refused() == ({0: 4}, errno.EFBIG)
    assert bare.plane.retry_refused()[0] == {}
    assert bare.plane.refused == 0
    check_at_rest(bare.arena.name, bare.spill_dir)


def test_only_the_file_that_a_life_began_with_is_opened(bare: Bare) -> None:
    swap = declared(bare)
    swap.store(1, page_of(b"a"))
    path = bare.spill_dir / "000.1"
    path.rename(bare.spill_dir / "aside")
    path.touch()
    with pytest.raises(SpillError) as raised:
        bare.plane.slots(0, 1, None)
    assert raised.value.errno == errno.ESTALE
    (bare.spill_dir / "aside").rename(path)
    assert bare.plane.slots(0, 1, None).load(1) == page_of(b"a")
    with pytest.raises(SpillError):
        bare.plane.begin_type(1, 100, 100, 0)  # there is no file
    assert bare.plane.read(bare.arena.geometry.type_at(1)) == 0, "nothing has begun"


def test_a_closed_plane(bare: Bare) -> None:
    swap = declared(bare)
    assert bare.plane.close(1.0)
    assert bare.plane.closed
    with pytest.raises(Closed):
        swap.load(1)


_words = st.integers(0, 2**64 - 1)


@settings(max_examples=200, deadline=None)
@given(word=_words, side=_words, life=_words, key=_words)
def test_no_content_of_the_tables_breaks_the_process(word: int, side: int, life: int, key: int) -> None:
    """A peer may write anything anywhere: a value, a miss or a typed error, never a crash."""
    with tempfile.TemporaryDirectory() as spill_dir:
        Path(spill_dir, "000.1").touch()
        _survives(word, side, life, key, Path(spill_dir))


def _survives(word: int, side: int, life: int, key: int, spill_dir: Path) -> None:
    g, plane, swap = _damaged(spill_dir)
    for state in range(8):
        plane.write(g.slots_at, word & ~(7 << 33) | state << 33)
        plane.write(g.slots_at + 8, side)
        page = word & 0xFFFFFFFF
        if page >= g.pages:
            page = 0
            plane.write(g.slots_at, word >> 33 << 33 & ~(7 << 33) | state << 33)
        plane.write(g.life_at + 8 * page, life)
        plane.write(g.key_at + 8 * page, key)
        try:
            found = swap.load(0)
        except (ArenaError, Closed, SpillError):
            pass
        else:
            assert found is None or len(found) == 4096
        plane.sweep(0)
        plane.bury([7])
    plane.write(g.slots_at + 8, 0)
    plane.write(g.slots_at, 0)
    swap.store(0, page_of(b"a"))
    assert swap.load(0) == page_of(b"a")


def _damaged(spill_dir: Path) -> tuple[Geometry, Plane, Slots]:
    geometry, areas = layout.plan(1 << 20, slots=64, clients_max=8)
    memory = bytearray(geometry.size)
    layout.write_header(memoryview(memory), geometry, areas, bytes(16))
    plane = Plane(memory, geometry, 1, os.fsencode(spill_dir))
    plane.begin_type(0, 0, 64, layout.WRITE_BEHIND)
    return geometry, plane, plane.slots(0, 1, 0.1)


def test_one_process_with_two_planes_is_two_clients(bare: Bare) -> None:
    declared(bare)
    second = Plane(arenas.open_arena(bare.arena.name).memory, bare.arena.geometry, 2, os.fsencode(bare.spill_dir))
    second.slots(0, 1, None).store(1, page_of(b"a"))
    assert counts(bare, 2) == {"stores": 1, "cleaned": 1}
    assert counts(bare, 1) == {}


def test_many_words_at_once(bare: Bare) -> None:
    at = bare.plane.geometry.allocations_at
    for n in range(4):
        bare.plane.write(at + 128 * n, n + 7)
    assert bare.plane.read_many(at, 4, 128) == [7, 8, 9, 10]
    assert bare.plane.read_many(at, 2) == [7, 0]
    assert bare.plane.read_many(at, 0) == []
    size = bare.plane.geometry.size
    for wrong in (
        (at + 1, 2, 8),
        (at, 2, 12),
        (at, 2, 4),
        (-8, 1, 8),
        (size - 8, 2, 8),
        (at, size, 8),
        (at, 2, size + 8),
    ):
        with pytest.raises(IndexError):
            bare.plane.read_many(*wrong)
    assert bare.plane.read_many(size - 8, 1) == [bare.plane.read(size - 8)]
