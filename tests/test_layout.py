"""Where everything lies in an arena: bounds of a plan, the header there and back, and every kind of damage to it."""

from __future__ import annotations

import struct
from dataclasses import fields
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gcma_shm import layout
from gcma_shm.areas import LENT, Area, AreaSpec, parse_area
from gcma_shm.errors import ArenaError
from gcma_shm.layout import Geometry, plan, read_header, write_header

M = 1 << 20
ID = bytes(range(16))
page_sizes = st.sampled_from([1 << n for n in range(12, 22)])


def check(geometry: Geometry, areas: list[Area]) -> None:
    """No table overlaps another, everything is aligned, and the pages fit."""
    g = geometry
    sizes = [
        (0, layout.HEADER_BYTES),
        (g.areas_at, layout.AREAS_MAX * layout.AREA_BYTES),
        (g.types_at, g.types_max * layout.TYPE_BYTES),
        (g.clients_at, (g.clients_max + 1) * layout.CLIENT_BYTES),
        (g.allocations_at, g.allocations_max * layout.ALLOCATION_BYTES),
        (g.holders_at, g.allocations_max * g.holder_bytes),
        (g.slots_at, g.slots * layout.SLOT_BYTES),
        (g.life_at, 8 * g.pages),
        (g.key_at, 8 * g.pages),
        (g.visited_at, g.pages),
        (g.pages_at, g.pages * g.page_size),
        (g.size, 0),
    ]
    for (at, size), (after, _) in pairwise(sizes):
        assert at + size <= after, "tables overlap"
        assert at % 8 == 0
    assert g.pages_at % g.page_size == 0
    assert g.slots_at % layout.CACHE_LINE == g.life_at % layout.CACHE_LINE == g.key_at % layout.CACHE_LINE == 0
    assert g.clients_max * g.grants_max <= g.nursery_pages // 2, "clients could starve one another by stopping"
    assert 1 <= g.grants_max <= layout.GRANTS_MAX
    assert g.holder_bytes * 8 > g.clients_max
    assert 64 <= g.allocations_max <= layout.ALLOCATIONS_MAX < 1 << layout.INDEX_BITS
    assert areas[0].first == g.nursery_pages
    ends = [*(area.first for area in areas[1:]), g.pages]
    for area, end in zip(areas, ends, strict=True):
        assert g.page_at(area.first) % (area.alignment * g.page_size) == 0, "an area that is not aligned in the arena"
        assert 0 <= end - area.first - area.pages < area.alignment, "more between two areas than alignment needs"
    assert len(areas) <= layout.AREAS_MAX
    assert g.client_at(g.clients_max) + layout.CLIENT_BYTES <= g.allocations_at
    assert g.page_at(g.pages) <= g.size


@settings(max_examples=300)
@given(
    size=st.integers(64 << 10, 1 << 40),
    page_size=page_sizes,
    slots=st.none() | st.integers(1, 1 << 30),
    clients=st.none() | st.integers(2, layout.CLIENTS_MAX),
    shares=st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0, 1, 1 << 13, 1 << 16, 1 << 21])), max_size=6),
)
@example(size=1 << 20, page_size=4096, slots=None, clients=None, shares=[])
@example(size=(1 << 20) + 1, page_size=4096, slots=1, clients=2, shares=[(99, 0)])
@example(size=1 << 20, page_size=4096, slots=64, clients=8, shares=[(10, 1 << 16), (10, 0), (10, 1 << 13)])
def test_a_plan_is_sound_or_refused(
    size: int, page_size: int, slots: int | None, clients: int | None, shares: list[tuple[int, int]]
) -> None:
    wanted = {
        f"area {i}": AreaSpec(max(size * share // 100, 1), align=align) for i, (share, align) in enumerate(shares)
    }
    try:
        geometry, areas = plan(size, page_size, wanted, slots, clients)
    except ArenaError as error:
        assert "make it about" in str(error)  # noqa: PT017 - one of several right answers
        return
    check(geometry, areas)
    assert geometry.size == size
    assert geometry.page_size == page_size
    if slots is not None:
        assert geometry.slots == slots
    if clients is not None:
        assert geometry.clients_max == clients
    for area in areas:
        if wanted:
            spec = wanted[area.name]
            assert area.pages == -(-spec.size // page_size), "sizes are rounded up to pages"
            assert area.alignment == max(spec.align // page_size, 1)


@pytest.mark.parametrize("size", [64 * M, 100 * M, 256 * M, 1024 * M, 4 << 30, 64 << 30, 1 << 40])
def test_descriptors_take_less_than_one_percent(size: int) -> None:
    geometry, areas = plan(size)
    check(geometry, areas)
    slot_bytes = geometry.slots * layout.SLOT_BYTES
    assert geometry.pages_at - slot_bytes < size / 100
    assert geometry.slots == size // 4096 * 4
    unused = size - geometry.pages_at - geometry.pages * 4096
    assert 0 <= unused < 2 * 4096 + geometry.pages


def test_what_an_error_recommends_is_enough() -> None:
    with pytest.raises(ArenaError) as raised:
        plan(4 * M, areas={"a": 6 * M}, slots=1000, clients_max=8)
    recommended = float(str(raised.value).split("make it about ")[1].split()[0])
    geometry, _ = plan(int(recommended * M) + (1 << 17), areas={"a": 6 * M}, slots=1000, clients_max=8)
    assert geometry.pages * 4096 >= 6 * M


@pytest.mark.parametrize("page_size", [0, 1, 1000, 2048, 4097, 12288, 4 * M])
def test_page_sizes_refused(page_size: int) -> None:
    with pytest.raises(ValueError, match="page size"):
        plan(64 * M, page_size)


@pytest.mark.parametrize(
    "areas",
    [
        {"": M},
        {"x" * 49: M},
        {"é" * 25: M},
        {"a\n": M},
        {"a": 0},
        {"a": -1},
        {f"area{i}": 4096 for i in range(65)},
    ],
    ids=["no name", "long", "long in bytes", "not printable", "nothing", "negative", "65"],
)
def test_areas_refused(areas: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"area|size"):
        plan(64 * M, areas=areas)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("4096", AreaSpec(4096)),
        ("512M", AreaSpec(512 * M)),
        ("512M,cache=off", AreaSpec(512 * M, cache=False)),
        ("512M,cache=on", AreaSpec(512 * M)),
        ("1G, align=2M , share=75%", AreaSpec(1024 * M, align=2 * M, share=75)),
        ("1M,share=1,align=4096,cache=off", AreaSpec(M, False, 4096, 1)),
    ],
)
def test_areas_as_people_write_them(text: str, spec: AreaSpec) -> None:
    assert parse_area(text) == spec
    assert parse_area(str(spec)) == spec
    assert parse_area(spec) is spec
    if spec == AreaSpec(spec.size):
        assert parse_area(spec.size) == spec


@pytest.mark.parametrize(
    "text",
    [
        "", ",", "0", "-1", "1M,", "1M,cache", "1M,cache=", "1M,cache=yes", "1M,align=3", "1M,align=0", "1M,share=0",
        "1M,share=101", "1M,share=1.5", "1M,share=%", "1M,cache=on,cache=off", "1M,colour=red", "cache=off",
    ],
)  # fmt: skip
def test_areas_as_people_miswrite_them(text: str) -> None:
    with pytest.raises(ValueError):
        parse_area(text)


def test_an_area_is_not_any_object() -> None:
    for wrong in (None, 1.5, [4096]):
        with pytest.raises(TypeError):
            parse_area(wrong)  # type: ignore[arg-type] # on purpose


@pytest.mark.parametrize(
    ("slots", "clients"), [(0, None), (-1, None), (1 << 41, None), (None, 1), (None, 0), (None, 4096)]
)
def test_counts_refused(slots: int | None, clients: int | None) -> None:
    with pytest.raises(ValueError):
        plan(64 * M, slots=slots, clients_max=clients)


@pytest.mark.parametrize("size", [-1, 0, 1, 4096, 65536])
def test_too_small(size: int) -> None:
    with pytest.raises((ArenaError, ValueError)):
        plan(size)


def written(areas: dict[str, int | str] | None = None) -> tuple[bytearray, Geometry, list[Area]]:
    geometry, placed = plan(2 * M, areas=areas, slots=500, clients_max=8)
    memory = bytearray(geometry.size)
    write_header(memoryview(memory), geometry, placed, ID)
    return memory, geometry, placed


@pytest.mark.parametrize(
    "areas",
    [None, {"frames": 300_000, "é" * 24: 4096}, {"a": "64K,cache=off,share=50", "b": "64K,align=16K", "c": 4096}],
)
def test_there_and_back(areas: dict[str, int | str] | None) -> None:
    memory, geometry, placed = written(areas)
    assert read_header(memoryview(memory), len(memory)) == (geometry, placed, ID)
    if areas:
        assert [area.name for area in placed] == list(areas)


def test_what_is_said_of_an_area_is_in_its_entry() -> None:
    _, _, (a, b) = written({"a": "64K,cache=off,share=50", "b": "64K,align=16K"})
    assert (a.policy, a.share, a.alignment, a.state) == (0, 50, 1, 0)
    assert (b.policy, b.share, b.alignment, b.state) == (LENT, 100, 4, 0)


@pytest.mark.parametrize(
    ("index", "first", "pages"),
    [(0, -1, 1), (0, 1, 300), (1, -1, 10), (0, 0, 1 << 63), (1, 0, 11), (2, 0, 1), (63, 40, 1)],
)
def test_a_damaged_table_of_areas_is_found(index: int, first: int, pages: int) -> None:
    """`first`: from where the second area is. What lies before the first area, behind the last page, or in two areas."""
    memory, geometry, (a, b) = written({"a": 40960, "b": 40960})
    read_header(memoryview(memory), len(memory))
    at = (a.first, b.first, a.first)[index] + first if index < 3 else a.first
    layout.write_area(memoryview(memory), geometry, index, Area("x", at, pages))
    with pytest.raises(ArenaError, match="table of areas"):
        read_header(memoryview(memory), len(memory))


def test_parts_of_an_area_in_any_order() -> None:
    """An area that was grown, shrunk and grown again has entries anywhere in the table."""
    memory, geometry, (a, b) = written({"a": 40960, "b": 40960})
    for index, area in (
        (0, Area("a", b.first, 5)),
        (1, Area("", 0, 0)),
        (63, Area("a", a.first, 3)),
    ):
        layout.write_area(memoryview(memory), geometry, index, area)
    _, areas, _ = read_header(memoryview(memory), len(memory))
    assert areas == [Area("a", b.first, 5), Area("a", a.first, 3)]


def test_the_header_leaves_the_words_that_change_alone() -> None:
    memory, _, _ = written()
    assert not any(memory[layout.EPOCH_AT : layout.HEADER_BYTES])


def checked_bytes() -> int:
    return struct.calcsize("<8sII16s") + 8 * len(fields(Geometry)) + 4


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_each_flip_in_the_checked_header_is_found(mask: int) -> None:
    memory, _, _ = written()
    for at in range(checked_bytes()):
        memory[at] ^= mask
        with pytest.raises(ArenaError):
            read_header(memoryview(memory), len(memory))
        memory[at] ^= mask
    read_header(memoryview(memory), len(memory))


def test_another_version_is_said_so() -> None:
    memory, _, _ = written()
    memory[8:12] = struct.pack("<I", layout.LAYOUT_VERSION + 1)
    with pytest.raises(ArenaError, match=rf"version {layout.LAYOUT_VERSION + 1}.*version {layout.LAYOUT_VERSION}"):
        read_header(memoryview(memory), len(memory))


@pytest.mark.parametrize("size", [0, 7, 100, 4095, 4096, 2 * M - 4096, 2 * M - 1])
def test_truncated(size: int) -> None:
    memory, _, _ = written()
    with pytest.raises(ArenaError):
        read_header(memoryview(memory)[:size], size)


def test_grown() -> None:
    memory, _, _ = written()
    memory += bytes(4096)
    with pytest.raises(ArenaError):
        read_header(memoryview(memory), len(memory))


@given(st.binary(max_size=400))
def test_any_bytes_are_no_arena(data: bytes) -> None:
    with pytest.raises(ArenaError):
        read_header(memoryview(data.ljust(4096, b"\0")), 4096)


@settings(max_examples=50)
@given(st.binary(min_size=0, max_size=400))
def test_any_bytes_behind_the_magic_are_no_arena(data: bytes) -> None:
    head = layout.MAGIC + struct.pack("<I", layout.LAYOUT_VERSION) + data
    with pytest.raises(ArenaError):
        read_header(memoryview(head.ljust(8192, b"\0")), 8192)
