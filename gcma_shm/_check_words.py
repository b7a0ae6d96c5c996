"""What must be true of slot words, of pages' lives and of the gauges that count them. Owned by check.py; see there for what holds
when. The passes themselves are in C (`_survey.pxi`).

Pure: a `View` in, findings out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gcma_shm import layout
from gcma_shm._check_view import View
from gcma_shm._core import COUNTERS
from gcma_shm.areas import Area
from gcma_shm.entries import Guest

FREE, GRANTED, PUBLISHED, BUFFER = range(4)  # states of a page's life
LIFE_SHIFT, OWNER_SHIFT = 62, 46
STATES = ("free", "granted", "published", "a buffer's")
# The last one: the same, and LAID. Any above is damage.
SLOT_STATES = ("empty", "cached", "spilled", "zero", "closed", "filled", "filled")
CHUNK = 1 << 18  # slots in one pass without the GIL, so that Ctrl-C is heard
QUIET_TRIES = 20  # at a gauge and what it counts, in one look
Suspect = tuple[str, int, int, int, int]  # why, slot or page, word, life, key
_MOVED_BY = (
    "promotions",
    "evictions",
    "orphans_freed",
    "discards",
)  # what the broker counts when an area's pages change

_OF_SLOTS = {
    "no-state": "has a state that is unknown",
    "dirty-nothing": "is dirty with nothing to write",
    "says-too-much": "has a payload with nothing to say",
    "no-page": "names page {page} of an arena of {pages} pages",
    "dirty-in-area": "is dirty on page {page}, which is in an area",
    "not-its-page": "names nursery page {page}, whose life is {life:#x} and whose key {key:#x}",
    "closed-alive": "is closed in a living type",
    "open-dead": "belongs to no living type, and is not closed",
}


def check_slots(view: View) -> None:
    """Every slot word, by type and between them, and who is writing places in the files."""
    end = 0
    for type_ in sorted(view.types, key=lambda type_: type_.base):
        _check_slots(view, end, type_.base - end, -1, "slot {} of no type")
        _check_slots(view, type_.base, type_.slots, type_.number, f"slot {{}} of type {type_.number}", type_.base)
        end = max(end, type_.end)
    _check_slots(view, end, view.geometry.slots - end, -1, "slot {} of no type")


def _check_slots(view: View, base: int, count: int, type_: int, where: str, origin: int = 0) -> None:
    writers: dict[int, tuple[int, int]] = {}
    for first in range(base, base + max(count, 0), CHUNK):
        size = min(CHUNK, base + count - first)
        states, dirty, clean_end, writing, found, suspects = view.survey.slots(first, size, type_)
        for name, number in zip(SLOT_STATES, states[: len(SLOT_STATES)], strict=True):
            view.add(f"slots_{name}", number)
        view.add("slots_dirty", dirty)
        view.add("slots", size)
        if type_ >= 0 and clean_end:
            view.clean_ends[type_] = first + clean_end - base
        for client, (number, slot) in writing.items():
            before, first_slot = writers.get(client, (0, slot))
            writers[client] = before + number, first_slot
        for suspect in suspects:
            _tell_slot(view, suspect, where.format(suspect[1] - origin))
        view.note_more(found - len(suspects))
    for client, (number, slot) in writers.items():
        view.of_whom("slot", client, f"{where.format(slot - origin)}: its place in the file is claimed by", number - 1)


def _tell_slot(view: View, suspect: Suspect, where: str) -> None:
    why, _, word, life, key = suspect
    words = _OF_SLOTS[why].format(page=word & 0xFFFFFFFF, pages=view.geometry.pages, life=life, key=key)
    tell = view.at_rest if why == "open-dead" else view.always
    tell("slot", f"{where}, word {word:#x}: it {words}")


def check_pages(view: View) -> None:
    """Every page's life: the nursery's, those of guests, the rest of the areas, and those in no area."""
    states, granted, total, suspects = view.survey.nursery()
    for why, page, _, life, key in suspects:
        if why == "no-page":
            view.always(
                "page", f"nursery page {page}, life {life:#x}: published under key {key:#x}, which leads to no slot"
            )
        else:
            view.always("page", f"nursery page {page}, life {life:#x}: a nursery page cannot be so")
    view.note_more(total - len(suspects))
    for client, (count, page) in granted.items():
        view.of_whom("page", client, f"nursery page {page}: granted to", count - 1)
    view.add("pages", view.geometry.pages)
    view.add("nursery_published", states[PUBLISHED])
    view.add("nursery_granted", states[GRANTED])
    end = view.geometry.nursery_pages
    guests = sorted(view.guests, key=lambda guest: guest.first)
    for area in sorted(view.areas, key=lambda area: area.first):
        _check_lives(view, end, area.first - end, 0, (FREE, BUFFER), "in no area", view.always)
        _check_area(view, area, [guest for guest in guests if guest.area == area.index])
        end = area.first + area.pages
    _check_lives(view, end, view.geometry.pages - end, 0, (FREE, BUFFER), "in no area", view.always)


def _check_area(view: View, area: Area, guests: list[Guest]) -> None:
    end = area.first
    free = (FREE, PUBLISHED) if view.lends(area) else (BUFFER,)
    for guest in guests:
        _check_lives(view, end, guest.first - end, 0, free, f"of area {area.name!r}", view.at_rest)
        # A reservation may be left from when its area was drained, or it was claimed.
        states = (BUFFER,) if guest.kind == layout.BUFFER else (FREE, PUBLISHED, BUFFER)
        _check_lives(view, guest.first, guest.pages, guest.owner, states, f"of the {guest}", view.at_rest)
        end = max(end, guest.end)
    _check_lives(view, end, area.first + area.pages - end, 0, free, f"of area {area.name!r}", view.at_rest)


def _check_lives(
    view: View,
    first: int,
    count: int,
    owner: int,
    allowed: tuple[int, ...],
    where: str,
    tell: Callable[[str, str], None],
) -> None:
    if count <= 0:
        return
    total, suspects = view.survey.lives(first, count, owner, sum(1 << state for state in allowed))
    for _, page, _, life, _ in suspects:
        state, found = life >> LIFE_SHIFT, life >> OWNER_SHIFT & 0xFFFF
        if state == GRANTED and found == owner and view.word(layout.FILLING_AT) == page + 1:
            if not view.served:
                view.pending("page", f"page {page} {where}: half copied by the broker that has died, or is stopped")
            continue  # it is being filled
        words = [STATES[state]] if state not in allowed else []
        words += [f"entry {found - 1}'s" if found else "nobody's"] if found != owner else []
        tell("page", f"page {page} {where}, life {life:#x}: it is {' and '.join(words)}")
    view.note_more(total - len(suspects))


def check_gauges(view: View) -> None:
    """What areas and reservations say of the pages in them. Told only of what stood still while it was counted."""
    for area in view.areas:
        _check_area_gauges(view, area)
    for guest in view.guests:
        if guest.kind == layout.RESERVATION and not guest.claimant:
            at = view.geometry.allocation_at(guest.index)
            gauge_at, also = at + layout.ALLOCATION_LENT_AT, (at, at + layout.ALLOCATION_CLAIM_AT)
            _compare(view, str(guest), gauge_at, guest.first, guest.pages, guest.owner, also)


def _check_area_gauges(view: View, area: Area) -> None:
    at, where = view.geometry.area_at(area.index), f"area {area.name!r} in entry {area.index}"
    lent, held = view.word(at + layout.AREA_LENT_AT), view.word(at + layout.AREA_HELD_AT)
    for what, gauge in (("lent", lent), ("held", held)):
        if gauge > area.pages:
            view.at_rest("gauge", f"{where}: its gauge of {what} pages says {gauge}, of {area.pages} in all")
    _compare(view, where, at + layout.AREA_LENT_AT, area.first, area.pages, 0, (at + layout.AREA_CLOCK_AT,))
    expected = sum(guest.pages for guest in view.guests if guest.area == area.index and guest.kind == layout.BUFFER)
    if held != expected and held <= area.pages:
        view.at_rest("gauge", f"{where}: its gauge of held pages says {held}, its buffers have {expected}")
    view.add("pages_held", expected)


def _compare(view: View, where: str, at: int, first: int, pages: int, owner: int, also: tuple[int, ...]) -> None:
    """Whether the gauge at `at` says how many pages are published under `owner`. `also`: words that move with them. The difference is told, not the figures: it stays the same
    over several looks when it is wrong, also of an arena that moves between them.
    """
    for before, gauge in _stills(view, at, also):
        found = view.survey.published(first, pages, owner)
        if _still(view, at, also) == (before, gauge):
            view.add("pages_lent", found)
            if gauge != found and gauge <= view.geometry.pages:
                words = f"{abs(gauge - found)} {'more' if gauge > found else 'fewer'}"
                view.at_rest("gauge", f"{where}: its gauge of lent pages says {words} than there are")
            return
    view.unsettled.append(f"{where}: its gauge of lent pages")


def _still(view: View, at: int, also: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    counters = view.geometry.client_at(layout.BROKER) + layout.CLIENT_COUNTERS_AT
    moved = (view.word(counters + 8 * COUNTERS.index(name)) for name in _MOVED_BY)
    announced = (view.word(layout.FILLING_AT), view.word(layout.TAKING_AT))
    return (*announced, *moved, *map(view.word, also)), view.word(at)


def _stills(view: View, at: int, also: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], int]]:
    """What tells that nothing moved, as often as it is worth a try: not while the broker announces that it is at it."""
    for _ in range(QUIET_TRIES):
        still = _still(view, at, also)
        if not (view.served and any(still[0][:2])):
            yield still
