"""`gcma check`: each kind of damage is found and named, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from gcma_shm import layout
from tests.inspected import (
    BUFFER,
    CACHED,
    CLOSED,
    DIRTY,
    FILLED,
    FILLED_LAID,
    FREE,
    GRANTED,
    PUBLISHED,
    SPILLED,
    ZERO,
    Copy,
    found,
    in_nursery,
    state,
)


def with_state(word: int, to: int) -> int:
    return word & ~(7 << 33) | to << 33


def slot_becomes(
    change: Callable[[Copy, int], int], wanted: Callable[[Copy, int], bool], type_: int = 0
) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        at = c.slot(lambda word: wanted(c, word), type_)
        c.write(at, change(c, c.read(at)))

    return plant


def header(at: int, value: Callable[[Copy], int]) -> Callable[[Copy], None]:
    return lambda c: c.write(at, value(c))


def word_of(name: str, offset: int, change: Callable[[Copy, int], int]) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        at = c.entry(name) + offset
        c.write(at, change(c, c.read(at)))

    return plant


def both(one: Callable[[Copy], None], other: Callable[[Copy], None]) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        one(c)
        other(c)

    return plant


def bits_of(name: str, table: str, change: Callable[[int], int]) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        index = (c.entry(name) - c.g.allocations_at) // layout.ALLOCATION_BYTES
        at = getattr(c.g, table) + index * c.g.holder_bytes
        c.write(at, change(c.read(at)))

    return plant


def of_type(number: int, offset: int, change: Callable[[Copy, int], int]) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        at = c.g.type_at(number) + offset
        c.write(at, change(c, c.read(at)))

    return plant


def of_client(number: int, offset: int, change: Callable[[int], int]) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        at = c.g.client_at(number) + offset
        c.write(at, change(c.read(at)))

    return plant


def of_area(index: int, offset: int, change: Callable[[int], int]) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        at = c.g.area_at(index) + offset
        c.write(at, change(c.read(at)))
        c.areas = layout.read_header(memoryview(c.bytes), len(c.bytes))[1]

    return plant


def life_becomes(where: Callable[[Copy, int, int], bool], change: Callable[[Copy, int], int]) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        at = c.life(lambda page, life: where(c, page, life))
        c.write(at, change(c, c.read(at)))

    return plant


def lives_as(state: int, owner: int = 0) -> Callable[[Copy, int], int]:
    return lambda _, life: life & (1 << 46) - 1 | state << 62 | owner << 46


def free_in_nursery(c: Copy, page: int, life: int) -> bool:
    return page < c.g.nursery_pages and life >> 62 == FREE


def named_in_nursery(c: Copy, page: int, life: int) -> bool:
    return page < c.g.nursery_pages and life >> 62 == PUBLISHED


def spare(c: Copy, page: int, _: int) -> bool:
    return page >= c.g.nursery_pages and not any(a.first <= page < a.first + a.pages for a in c.areas)


def of_guest(name: str) -> Callable[[Copy, int, int], bool]:
    def where(c: Copy, page: int, _: int) -> bool:
        at = c.entry(name)
        return page == c.read(at + 8) + 2

    return where


def free_in(name: str) -> Callable[[Copy, int, int], bool]:
    def where(c: Copy, page: int, life: int) -> bool:
        area = next(a for a in c.areas if a.name == name)
        return area.first <= page < area.first + area.pages and not life >> 46 & 0xFFFF

    return where


def made_free(c: Copy, name: str) -> int:
    """A page of that area that is nobody's and FREE: wherever the cache happens to lie, it gives one up, as if it had been discarded."""
    at = c.life(lambda page, life: free_in(name)(c, page, life) and life >> 62 in (FREE, PUBLISHED))
    life = c.read(at)
    if life >> 62 == PUBLISHED:
        lent = c.g.area_at(next(a.index for a in c.areas if a.name == name)) + layout.AREA_LENT_AT
        c.write(at, lives_as(FREE)(c, life + 1))
        c.write(lent, c.read(lent) - 1)
    return (at - c.g.life_at) // 8


def free_page_of_a_becomes(change: Callable[[Copy, int], int]) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        page = made_free(c, "a")
        life_becomes(lambda _, at, __: at == page, change)(c)

    return plant


def orphan_without_slot(c: Copy) -> None:
    at = c.life(lambda page, life: free_in_nursery(c, page, life))
    c.write(at, lives_as(PUBLISHED)(c, c.read(at)))
    c.write(c.g.key_at + at - c.g.life_at, c.g.slots)


def named_twice(c: Copy) -> None:
    named = c.read(c.slot(lambda word: in_nursery(c, word)))
    at = c.slot(lambda word: state(word) == SPILLED)
    c.write(at, with_state(c.read(at), CACHED) & ~0xFFFFFFFF | named & 0xFFFFFFFF)


def over_another(c: Copy) -> None:
    one, other = c.entry("buffer 0"), c.entry("buffer 1")
    if c.read(one + 8) > c.read(other + 8):
        one, other = other, one
    c.write(one + 16, c.read(one + 16) + 1)


def named_alike(c: Copy) -> None:
    at = c.entry("buffer 1")
    c.bytes[at + 0x40 : at + 0x48] = b"buffer 0"


def writes(client: int, tag: int = 1) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        at = c.slot(lambda word: state(word) == CACHED) + 8
        c.write(at, c.read(at) | (client << 20 | tag) << 32)

    return plant


# What is planted; of which kind it is; what is said.
DAMAGE: dict[str, tuple[Callable[[Copy], None], str, str]] = {
    "hand-past-head": (header(layout.HAND_AT, lambda c: c.read(layout.HEAD_AT) + 5), "header", "hand, at ticket .* has passed"),
    "filling-nowhere": (header(layout.FILLING_AT, lambda c: c.g.pages + 7), "header", "fill page .* in no area"),
    "taking-nowhere": (header(layout.TAKING_AT, lambda c: (c.g.pages - 1) << 32 | 2), "header", "take pages .* in no area"),
    "area-policy": (of_area(0, 0x40, lambda v: v | 8), "area", "policy 0x9 and state 0x0 are unknown"),
    "area-state": (of_area(1, 0x58, lambda v: v | 4), "area", "state 0x4"),
    "area-share": (of_area(0, 0x48, lambda _: 101), "area", "share of 101"),
    "area-alignment": (of_area(0, 0x50, lambda _: 3), "area", "alignment of 3"),
    "area-name": (of_area(0, 0, lambda _: 0xFF), "area", "name that cannot be"),
    "type-outside": (of_type(1, 8, lambda c, _: c.g.slots), "type", "of a table of 6000 slots"),
    "type-flags": (of_type(1, 24, lambda _, v: v | 6), "type", "flags 0x7"),
    "client-state": (of_client(2, 0, lambda v: v & ~0xFF | 9), "client", "state 9"),
    "client-parent": (of_client(2, 0, lambda v: v | 0xFFF << 8), "client", "taken by client 4095"),
    "client-nobody": (of_client(2, 8, lambda _: 0), "client", "alive, and no process"),
    "guest-kind": (word_of("buffer 2", 0, lambda _, v: v & ~0xFF | 7), "allocation", "of kind 7"),
    "guest-outside": (word_of("buffer 2", 8, lambda c, _: c.g.pages - 1), "allocation", "not within area 'a'"),
    "guest-kept-without-a-name": (
        both(bits_of("buffer 2", "holders_at", lambda v: v | 2), word_of("buffer 2", 0x40, lambda *_: 0)),
        "allocation", "kept by client 1, and without a name",
    ),
    "guest-no-area": (word_of("buffer 2", 0x18, lambda *_: 9), "allocation", "not within any area"),
    "guest-over-another": (over_another, "allocation", "buffer in entry . 'buffer .' and buffer in entry . 'buffer .' share pages"),
    "guests-named-alike": (named_alike, "allocation", "named like the buffer"),
    "claim-of-nobody": (word_of("lent", 0x30, lambda _, v: v | 1 << 16), "allocation", "that nobody has is shared"),
    "claim-cannot-be": (word_of("claimed", 0x30, lambda _, v: v & ~0xFFFF | 0xFFF), "allocation", "claimed by client 4095"),
    "slot-state": (slot_becomes(lambda _, w: with_state(w, 7), lambda _, w: state(w) == SPILLED), "slot", "state that is unknown"),
    "slot-dirty-nothing": (slot_becomes(lambda _, w: w | DIRTY, lambda _, w: state(w) == SPILLED), "slot", "dirty with nothing"),
    "slot-says-too-much": (slot_becomes(lambda _, w: w | 5, lambda _, w: state(w) == ZERO), "slot", "payload with nothing to say"),
    "slot-no-page": (
        slot_becomes(lambda c, w: w & ~0xFFFFFFFF | c.g.pages, lambda c, w: state(w) == CACHED and not in_nursery(c, w)),
        "slot", "names page .* of an arena of",
    ),
    "slot-dirty-in-area": (
        slot_becomes(lambda _, w: w | DIRTY, lambda c, w: state(w) == CACHED and not in_nursery(c, w)), "slot", "dirty on page",
    ),
    "slot-not-its-page": (named_twice, "slot", "whose life is .* and whose key"),
    "slot-closed-alive": (slot_becomes(lambda _, w: with_state(w, CLOSED) & ~0xFFFFFFFF, lambda _, w: state(w) in (FILLED, FILLED_LAID)), "slot", "closed in a living"),
    "slot-claimed-by-nobody": (writes(0), "slot", "claimed by client 0, which cannot be"),
    "slot-claimed-by-stranger": (writes(7), "slot", "claimed by client 7, which is not there"),
    "page-of-stranger": (life_becomes(free_in_nursery, lives_as(GRANTED, 7)), "page", "granted to client 7, which is not there"),
    "page-buffer-in-nursery": (life_becomes(free_in_nursery, lives_as(BUFFER)), "page", "cannot be so"),
    "page-orphan-of-no-slot": (orphan_without_slot, "page", "leads to no slot"),
    "page-named-and-free": (life_becomes(named_in_nursery, lives_as(FREE)), "slot", "names nursery page"),
    "page-spare-in-use": (life_becomes(spare, lives_as(GRANTED)), "page", "in no area, life .*: it is granted"),
}  # fmt: skip

# What only a broker at work may leave: damage where one runs, and else for the next one to put right.
AT_REST: dict[str, tuple[Callable[[Copy], None], str, str]] = {
    "filling": (header(layout.FILLING_AT, lambda c: c.g.nursery_pages + 1), "header", "announces to fill page"),
    "taking": (header(layout.TAKING_AT, lambda c: c.g.nursery_pages << 32 | 2), "header", "announces to take pages"),
    "area-base": (of_area(0, 0x78, lambda _: 4), "area", "begins at page 4 of the area, expected 0"),
    "client-taken": (of_client(9, 0, lambda v: v | layout.BROKER << 8 | 1), "client", "taken by the broker"),
    "guest-without-holders": (bits_of("buffer 2", "holders_at", lambda _: 0), "allocation", "nobody holds it"),
    "guest-held-by-stranger": (bits_of("buffer 2", "holders_at", lambda v: v | 1 << 9), "allocation", "held by client 9"),
    "claim-shared-by-stranger": (
        both(word_of("claimed", 0x30, lambda _, v: v | 1 << 16), bits_of("claimed", "claimers_at", lambda _: 1 << 9)),
        "allocation", "shared by client 9",
    ),
    "claim-not-shared": (bits_of("claimed", "claimers_at", lambda _: 1 << 2), "allocation", "a claim that is not shared"),
    "claim-of-broker": (word_of("claimed", 0x30, lambda _, v: v & ~0xFFFF | 1), "allocation", "the broker has it in its hands"),
    "claim-of-stranger": (word_of("claimed", 0x30, lambda _, v: v & ~0xFFFF | 3), "allocation", "claimed by client 3, which does not hold"),
    "slot-open-dead": (lambda c: c.write(c.slot_at(c.g.slots - 1), 3 << 36), "slot", "no living type, and is not closed"),
    "page-of-buffer-free": (life_becomes(of_guest("buffer 1"), lambda _, v: v & ~(3 << 62)), "page", "of the buffer .*: it is free"),
    "page-of-buffer-anothers": (life_becomes(of_guest("buffer 1"), lambda _, v: v & ~(0xFFFF << 46)), "page", "it is nobody's"),
    "page-of-reservation-granted": (
        life_becomes(of_guest("claimed"), lambda _, v: v & ~(3 << 62) | GRANTED << 62), "page", "of the reservation .*: it is granted",
    ),
    "page-free-of-entry": (
        free_page_of_a_becomes(lives_as(FREE, 9)), "page", "of area 'a', life .*: it is entry 8's",
    ),
    "page-kept-from-cache": (
        free_page_of_a_becomes(lives_as(BUFFER)), "page", "it is a buffer's",
    ),
    "page-lent-without-cache": (
        life_becomes(free_in("b"), lives_as(FREE)), "page", "of area 'b', life .*: it is free",
    ),
    "gauge-lent": (of_area(0, layout.AREA_LENT_AT, lambda v: v - 3), "gauge", "area 'a' .* lent pages says 3 fewer"),
    "gauge-lent-below-zero": (of_area(1, layout.AREA_LENT_AT, lambda v: v - 1), "gauge", "lent pages says 18446744073709551615"),
    "gauge-held": (of_area(1, layout.AREA_HELD_AT, lambda v: v + 2), "gauge", "held pages says 11, its buffers have 9"),
    "gauge-of-reservation": (word_of("lent", 0x70, lambda _, v: v + 4), "gauge", "reservation .*'lent'.* 4 more"),
}  # fmt: skip

# What is in the name of somebody who has died, while a broker lives: it puts that right.
OF_THE_DEAD: dict[str, tuple[Callable[[Copy], None], str, str]] = {
    "client": (lambda _: None, "client", "it has died"),
    "grant": (life_becomes(free_in_nursery, lives_as(GRANTED, 2)), "page", "granted to client 2, which has died"),
    "place": (writes(2), "slot", "claimed by client 2, which has died"),
    "burying": (of_client(2, 0, lambda v: v & ~0xFF | 4), "client", "about to be buried"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named_and_nothing_else(copy: Copy, name: str) -> None:
    plant, kind, words = DAMAGE[name]
    plant(copy)
    for served in (True, False):
        findings = [one for one in copy.look(served) if not (one.pending and not served)]
        # What leads somewhere else damages more than itself.
        told = [one for one in findings if re.search(words, one.text)]
        found(told, kind, words)
        assert not told[0].pending
        if name not in LEADS_ELSEWHERE:
            assert findings == told


# These take a range away from its pages or slots, which are then, rightly, said to be somebody else's.
LEADS_ELSEWHERE = {"type-outside", "guest-kind", "guest-outside", "guest-no-area", "guest-over-another", "page-spare-in-use"}  # fmt: skip


@pytest.mark.parametrize("name", AT_REST)
def test_what_a_broker_leaves_on_its_way_is_told_apart(copy: Copy, name: str) -> None:
    plant, kind, words = AT_REST[name]
    plant(copy)
    for served in (True, False):
        findings = copy.look(served)
        found(findings, kind, words)
        assert findings[0].pending is not served


@pytest.mark.parametrize("name", OF_THE_DEAD)
def test_what_the_dead_leave_is_for_the_broker(copy: Copy, name: str) -> None:
    plant, kind, words = OF_THE_DEAD[name]
    plant(copy)
    findings = copy.look(dead=(2,))
    found([one for one in findings if re.search(words, one.text)], kind, words)
    assert all(one.pending for one in findings)


def test_what_the_dead_broker_had_in_hand(copy: Copy) -> None:
    life_becomes(free_in_nursery, lives_as(GRANTED, layout.BROKER))(copy)
    assert not copy.look(served=True)
    found(copy.look(served=False), "page", "granted to the broker that has died")
    page = made_free(copy, "a")
    life_becomes(lambda _, at, __: at == page, lives_as(GRANTED))(copy)
    copy.write(layout.FILLING_AT, page + 1)
    found([one for one in copy.look(served=True) if one.kind == "page"] or copy.look(served=True), "header", "fill")
    assert all(one.pending for one in copy.look(served=False))


def test_an_arena_at_rest_is_sound(copy: Copy) -> None:
    assert not copy.look(served=True)
    assert not copy.look(served=False)
