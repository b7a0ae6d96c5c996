"""What must be true of the tables of areas, types, clients and guests. Owned by check.py; see there for what holds when.

Pure: a `View` in, findings out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gcma_shm import layout
from gcma_shm._check_view import View
from gcma_shm.areas import DRAINED, LENT, SHARE_WHOLE
from gcma_shm.entries import Guest
from gcma_shm.records import State


def check_words_of_header(view: View) -> None:
    """What changes in the header: the nursery's ring, what the broker announces."""
    hand = view.word(layout.HAND_AT)  # first: both only grow
    head = view.word(layout.HEAD_AT)
    if hand > head:
        view.always("header", f"the nursery's hand, at ticket {hand}, has passed its head, at {head}")
    filling, taking = view.word(layout.FILLING_AT), view.word(layout.TAKING_AT)
    first, pages = taking >> 32, taking & 0xFFFFFFFF
    if filling and not view.geometry.nursery_pages <= filling - 1 < view.geometry.pages:
        view.always("header", f"the broker announces to fill page {filling - 1}, which is in no area")
    elif filling:
        view.at_rest("header", f"the broker announces to fill page {filling - 1}")
    if taking and (first < view.geometry.nursery_pages or first + pages > view.geometry.pages):
        view.always("header", f"the broker announces to take pages {first} to {first + pages}, which are in no area")
    elif taking:
        view.at_rest("header", f"the broker announces to take pages {first} to {first + pages}")


def check_areas(view: View) -> None:
    """Policies, and parts that follow each other. Ranges have been looked at with the header."""
    parts: dict[str, int] = {}
    for area in sorted(view.areas, key=lambda area: area.base):
        where = f"area {area.name!r} in entry {area.index}"
        if "�" in area.name or not area.name:
            view.always("area", f"{where}: a name that cannot be")
        if area.policy & ~LENT or area.state & ~DRAINED:
            view.always("area", f"{where}: policy {area.policy:#x} and state {area.state:#x} are unknown")
        if not 1 <= area.share <= SHARE_WHOLE:
            view.always("area", f"{where}: a share of {area.share} percent")
        if not area.alignment or area.alignment & (area.alignment - 1):
            view.always("area", f"{where}: an alignment of {area.alignment} pages")
        before = parts.get(area.name, 0)
        if area.base != before:
            view.at_rest("area", f"{where}: it begins at page {area.base} of the area, expected {before}")
        parts[area.name] = before + area.pages
    view.add("areas", len(parts))


def check_types(view: View) -> None:
    """Ranges of slots in the table, which do not overlap, and ways of writing."""
    inside = []
    for type_ in view.types:
        where = f"type {type_.number}, life {type_.life}"
        if not 1 <= type_.slots <= view.geometry.slots or type_.end > view.geometry.slots:
            view.always("type", f"{where}: slots {type_.base} to {type_.end} of a table of {view.geometry.slots} slots")
            continue
        if type_.flags & ~layout.WRITE_BEHIND:
            view.always("type", f"{where}: flags {type_.flags:#x} are unknown")
        if not 1 <= type_.share <= layout.SHARE_WHOLE:
            view.always("type", f"{where}: a share of {type_.share} %")
        inside.append(type_)
    for text in _overlapping("slots", ((type_.base, type_.end, f"type {type_.number}") for type_ in inside)):
        view.always("type", text)
    view.types = inside
    view.add("types", len(inside))


def check_clients(view: View) -> None:
    """States that there are, of processes that there are."""
    states = {int(state) for state in State}
    for client in view.clients.values():
        where = f"client {client.number}, process {client.pid}"
        if client.state not in states:
            view.always("client", f"{where}: its record is in state {client.state}, which is unknown")
        elif client.parent > view.geometry.clients_max:
            view.always("client", f"{where}: taken by client {client.parent}, which cannot be")
        elif client.state == State.ALIVE and not client.pid:
            view.always("client", f"client {client.number}: alive, and no process")
        elif client.state == State.DEAD:
            view.pending("client", f"{where}: about to be buried")
        elif client.state != State.TAKEN and view.standing.lives(client) is False:
            view.pending("client", f"{where}: it has died")
        elif client.state == State.TAKEN and client.parent == layout.BROKER:
            view.at_rest("client", f"client {client.number}: taken by the broker, for nobody yet")
    view.add("clients", len(view.clients))


def check_guests(view: View) -> None:
    """Buffers and reservations: in one area each, none over another, named once, held by somebody."""
    inside = []
    parts = {area.index: area for area in view.areas}
    names: dict[bytes, Guest] = {}
    for guest in view.guests:
        if guest.kind not in (layout.BUFFER, layout.RESERVATION):
            view.always("allocation", f"{guest}: of kind {guest.kind}, which is unknown")
            continue
        area = parts.get(guest.area)
        if area is None or not (area.first <= guest.first < guest.end <= area.first + area.pages):
            place = f"area {area.name!r}" if area is not None else "any area"
            view.always("allocation", f"{guest}: pages {guest.first} to {guest.end} are not within {place}")
            continue
        inside.append(guest)
        if guest.name and guest.name in names:
            view.always("allocation", f"{guest}: named like the {names[guest.name]}")
        names.setdefault(guest.name, guest)
        _check_holders(view, guest)
    for text in _overlapping("pages", ((guest.first, guest.end, str(guest)) for guest in inside)):
        view.always("allocation", text)
    view.guests = inside
    view.add("buffers", sum(guest.kind == layout.BUFFER for guest in inside))
    view.add("reservations", sum(guest.kind == layout.RESERVATION for guest in inside))


def _check_holders(view: View, guest: Guest) -> None:
    known = view.clients.keys()
    if not (guest.holders or guest.claimers or guest.deadline):
        view.at_rest("allocation", f"{guest}: nobody holds it")
    keepers = {client.number for client in view.clients.values() if client.keeps and client.state == State.ALIVE}
    keeping = sorted(guest.holders & (keepers | {layout.BROKER}))
    if keeping and (guest.kind == layout.RESERVATION or not guest.name):
        what = "a reservation" if guest.kind == layout.RESERVATION else "without a name"
        view.always("allocation", f"{guest}: kept by client {keeping[0]}, and {what}")
    for client in sorted(guest.holders - known - {layout.BROKER}):
        view.at_rest("allocation", f"{guest}: held by client {client}, which is not there")
    for client in sorted(guest.claimers - known - {layout.BROKER}):
        view.at_rest("allocation", f"{guest}: its claim is shared by client {client}, which is not there")
    if guest.kind == layout.BUFFER:
        return
    if guest.claimers and not guest.is_shared:
        view.at_rest("allocation", f"{guest}: several share a claim that is not shared")
    if guest.is_shared:
        if not guest.claimant:
            view.always("allocation", f"{guest}: a claim that nobody has is shared")
    elif guest.claimant == layout.BROKER:
        view.at_rest("allocation", f"{guest}: the broker has it in its hands")
    elif guest.claimant > view.geometry.clients_max:
        view.always("allocation", f"{guest}: claimed by client {guest.claimant}, which cannot be")
    elif guest.claimant and guest.claimant not in guest.holders:
        view.at_rest("allocation", f"{guest}: claimed by client {guest.claimant}, which does not hold it")


def _overlapping(unit: str, ranges: Iterable[tuple[int, int, str]]) -> Iterator[str]:
    """Ranges as first, end and whose; yields who shares which `unit`."""
    last_end, last = 0, ""
    for first, end, whose in sorted(ranges):
        if first < last_end:
            yield f"{last} and {whose} share {unit} {first} to {min(end, last_end)}"
        if end > last_end:
            last_end, last = end, whose
