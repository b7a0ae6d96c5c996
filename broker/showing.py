"""The commands `gcma status` and `gcma holders`: what an arena holds and who has it, read from the arena itself.

No request is sent: they work without a client record, and of an arena whose broker has died or is stopped. What they tell is read
word by word while it may be moving.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gcma_shm import layout
from gcma_shm.areas import DRAINED, Area
from gcma_shm.check import Inspected, geometry_faults
from gcma_shm.endpoint import arena_name, default_endpoint
from gcma_shm.entries import ClientEntry, Guest, read_clients, read_guests, read_types, word
from gcma_shm.errors import ArenaError
from gcma_shm.layout import Geometry
from gcma_shm.records import State
from gcma_shm.sizes import format_size
from gcma_shm.standing import Standing

Figures = dict[str, Any]
Show = Callable[[argparse.ArgumentParser, argparse.Namespace], int]
Look = Callable[[Inspected, Geometry, list[Area], Standing], Figures]


def add_showing(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands to the parser of `gcma`."""
    for name, words, show in (
        ("status", "what an arena holds, and whether a broker serves it", _status),
        ("holders", "who holds which buffers and reservations", _holders),
    ):
        add_command(commands, name, words, show)


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, words: str, show: Show
) -> argparse.ArgumentParser:
    """Adds a command that shows something of an arena; more options are its own."""
    parser = commands.add_parser(name, help=words)
    parser.set_defaults(run=show)
    parser.add_argument("--endpoint", default=default_endpoint(), help="whose arena (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="figures in bytes, for programs")
    return parser


def _status(_parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    figures = looked_at(parsed.endpoint, _status_figures)
    if parsed.json:
        print(json.dumps(figures))
        return 0
    served = f"served by process {figures['pid']}" + (", which is stopped" if figures["stopped"] else "")
    print(
        f"arena {figures['arena']}, {format_size(figures['size'])}, epoch {figures['epoch']}, "
        f"{served if figures['served'] else 'without a broker: it has died'}"
    )
    print(f"clients {figures['clients']['living']} of {figures['clients']['max']}, types {len(figures['types'])}")
    rows = [
        (area["area"], *(format_size(area[figure]) for figure in ("size", "held", "reserved", "lent")), "drained" * area["drained"])
        for area in figures["areas"]
    ]  # fmt: skip
    print_table(("area", "size", "held", "reserved", "lent", ""), rows)
    return 0


def _holders(_parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    figures = looked_at(parsed.endpoint, _holders_figures)
    if parsed.json:
        print(json.dumps(figures))
        return 0
    clients = [
        (one["client"], one["pid"] or "", one["buffers"], one["reservations"], format_size(one["held"]),
         _LIVES[one["lives"]] or ("keeps it until it ends" if one["keeper"] else ""))
        for one in figures["clients"]
    ]  # fmt: skip
    print_table(("client", "process", "buffers", "reservations", "held", ""), clients)
    if figures["guests"]:
        print()
    guests = [
        (one["name"] or "", one["kind"], one["area"], format_size(one["offset"]), format_size(one["size"]),
         ", ".join(map(str, one["holders"])) or ("" if one["kept"] else "a handle"),
         f"claimed by {one['claimed_by']}" if one["claimed_by"] else _KEPT[one["kept"]])
        for one in figures["guests"]
    ]  # fmt: skip
    if guests:
        print_table(("name", "", "area", "offset", "size", "clients", ""), guests)
    return 0


_KEPT = {None: "", "process": "kept", "unlink": "kept until unlinked"}
_LIVES = {True: "", False: "has died", None: "cannot be seen from here"}


def looked_at(endpoint: str, figures: Look) -> Figures:
    """What that finds in the endpoint's arena, and the arena's name. Raises ArenaError when there is no arena, or it cannot be read."""
    name = arena_name(endpoint)
    inspected = Inspected(name)
    try:
        geometry, areas = inspected.read_header()
        faults = geometry_faults(geometry)
        if faults:
            raise ArenaError(f"{name} is damaged: {faults[0]}")
        return {"arena": name} | figures(inspected, geometry, areas, inspected.standing(geometry))
    finally:
        inspected.close()


def _status_figures(inspected: Inspected, geometry: Geometry, areas: list[Area], standing: Standing) -> Figures:
    memory, page = inspected.memory, geometry.page_size
    guests = read_guests(memory, geometry)
    told: dict[str, Figures] = {}
    for area in areas:
        at = geometry.area_at(area.index)
        figures = told.setdefault(
            area.name, {"area": area.name, "size": 0, "held": 0, "reserved": 0, "lent": 0, "drained": bool(area.state & DRAINED)}
        )  # fmt: skip
        reserved = [guest for guest in guests if guest.area == area.index and guest.kind == layout.RESERVATION]
        lent = word(memory, at + layout.AREA_LENT_AT) + sum(guest.lent for guest in reserved if not guest.claimant)
        held = word(memory, at + layout.AREA_HELD_AT) + sum(guest.pages for guest in reserved if guest.claimant)
        figures["size"] += area.pages * page
        figures["held"] += held * page
        figures["reserved"] += sum(guest.pages for guest in reserved) * page
        figures["lent"] += lent * page
    clients = read_clients(memory, geometry).values()
    return {
        "size": geometry.size,
        "page_size": page,
        "epoch": word(memory, layout.EPOCH_AT),
        "served": standing.is_served(),
        "stopped": standing.is_stopped(),
        "pid": word(memory, layout.BROKER_PID_AT),
        "spill_dir": str(inspected.spill_dir() or Path()),
        "policy": layout.POLICIES[geometry.policy],
        "spill_io": layout.SPILL_IO[geometry.spill_io],
        "clients": {
            "living": sum(standing.lives(client) is not False for client in clients),
            "max": geometry.clients_max - 1,
        },
        "types": [
            {
                "type": type_.number,
                "slots": type_.slots,
                "write": "behind" if type_.flags & layout.WRITE_BEHIND else "through",
                "share": type_.share,
            }
            for type_ in read_types(memory, geometry)
        ],
        "areas": list(told.values()),
    }  # fmt: skip


def _holders_figures(inspected: Inspected, geometry: Geometry, areas: list[Area], standing: Standing) -> Figures:
    page, parts = geometry.page_size, {area.index: area for area in areas}
    guests = [guest for guest in read_guests(inspected.memory, geometry) if guest.area in parts]
    clients = [one for one in read_clients(inspected.memory, geometry).values() if one.state != State.TAKEN]
    keepers = {one.number for one in clients if one.keeps}
    return {
        "clients": [_client_figures(client, guests, page, standing) for client in clients],
        "guests": [
            {
                "name": guest.name.decode(errors="replace") or None,
                "kind": "reservation" if guest.kind == layout.RESERVATION else "buffer",
                "area": parts[guest.area].name,
                "offset": (guest.first - parts[guest.area].first + parts[guest.area].base) * page,
                "size": guest.pages * page,
                "holders": sorted(guest.holders | guest.claimers - {layout.BROKER}),
                "claimed_by": guest.claimant,
                "kept": "unlink" if layout.BROKER in guest.holders else "process" if guest.holders & keepers else None,
            }
            for guest in guests
        ],
    }


def _client_figures(client: ClientEntry, guests: Sequence[Guest], page: int, standing: Standing) -> Figures:
    mine = [guest for guest in guests if client.number in guest.holders | guest.claimers]
    reservations = sum(guest.kind == layout.RESERVATION for guest in mine)
    return {
        "client": client.number,
        "pid": client.pid,
        "lives": standing.lives(client),
        "keeper": client.keeps,
        "buffers": len(mine) - reservations,
        "reservations": reservations,
        "held": sum(guest.pages for guest in mine) * page,
    }


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns, to the left."""
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
