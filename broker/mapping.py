"""The command `gcma map`: which pages of each area hold what, drawn to the terminal's width, read from the arena itself.

No request is sent, and nothing is written. Pages are read one after the other while they may be moving, so a range whose state changes
just then may be told as it was or as it will be.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from gcma_shm import layout
from gcma_shm.areas import Area
from gcma_shm.broker.showing import Figures, add_command, looked_at
from gcma_shm.check import Inspected
from gcma_shm.entries import Guest, read_guests
from gcma_shm.layout import Geometry
from gcma_shm.sizes import format_size
from gcma_shm.standing import Standing

# What a page holds; of a cell in which two are as frequent, the first. `kept`: from the cache, though no buffer has it.
MARKS = {"buffer": "█", "claimed": "▓", "reserved": "▒", "cache": "░", "free": "·", "kept": "-"}
WORDS = {
    "buffer": "buffer",
    "claimed": "reservation, claimed",
    "reserved": "reservation, lent",
    "cache": "cache",
    "free": "free",
    "kept": "kept from the cache",
}
KINDS = ("free", "cache", "kept")  # of a page that no guest has
FREE, CACHE, KEPT = range(len(KINDS))
STATE_SHIFT = 6  # above it, in the highest byte of a page's life word, its state
PUBLISHED, BUFFER = 2, 3
_KIND_OF = bytes({PUBLISHED: CACHE, BUFFER: KEPT}.get(byte >> STATE_SHIFT, FREE) for byte in range(256))
RUNS = re.compile(b"%c+|%c+|%c+" % (FREE, CACHE, KEPT))
CHUNK_PAGES = 1 << 16  # looked at together: a byte each
CELLS_MIN = 10  # of a line, however narrow the terminal


@dataclass(frozen=True)
class Run:
    """Neighbouring pages that hold the same; `cached`: of them, pages that hold cache; `name`: of the guest."""

    kind: str
    first: int
    pages: int
    cached: int = 0
    name: str | None = None


def add_map(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser of `gcma`."""
    add_command(commands, "map", "which pages of each area hold what", _map)


def _map(_parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    figures = looked_at(parsed.endpoint, _figures)
    if parsed.json:
        print(json.dumps(figures))
        return 0
    for line in drawn(figures["areas"], shutil.get_terminal_size().columns):
        print(line)
    return 0


def drawn(areas: Sequence[Figures], width: int) -> Iterator[str]:
    """A line an area, as wide as that; each as long as its area is large, the largest fills the line; then a legend."""
    heads = [f"{area['area']} {format_size(area['size'])}" for area in areas]
    room = max(width - max(map(len, heads), default=0) - 2, CELLS_MIN)
    largest = max((area["size"] for area in areas), default=1)
    for head, area in zip(heads, areas, strict=True):
        cells = max(room * area["size"] // largest, 1)
        yield f"{head:<{max(map(len, heads))}}  {''.join(_cells(area['ranges'], area['size'], cells))}"
    shown = {run["kind"] for area in areas for run in area["ranges"]}
    yield ""
    yield "   ".join(f"{MARKS[kind]} {WORDS[kind]}" for kind in MARKS if kind in shown)
    if areas:
        yield f"a character: up to {format_size(-(-largest // room))}, and what most of it holds"


def _cells(ranges: Sequence[Figures], size: int, cells: int) -> Iterator[str]:
    """What most of each cell holds. The ranges are in order, and cover all of it."""
    at = 0
    for cell in range(cells):
        begin, end = size * cell // cells, size * (cell + 1) // cells
        while ranges[at]["offset"] + ranges[at]["size"] <= begin:
            at += 1
        held: Counter[str] = Counter()
        here = at
        while here < len(ranges) and ranges[here]["offset"] < max(end, begin + 1):
            run = ranges[here]
            held[run["kind"]] += max(min(run["offset"] + run["size"], end) - max(run["offset"], begin), 1)
            here += 1
        yield MARKS[max(MARKS, key=lambda kind: held[kind])]


def _figures(inspected: Inspected, geometry: Geometry, areas: list[Area], _standing: Standing) -> Figures:
    guests = sorted(read_guests(inspected.memory, geometry), key=lambda guest: guest.first)
    told: list[Figures] = []
    by_name = {
        name: list(parts) for name, parts in groupby(sorted(areas, key=lambda a: (a.name, a.base)), lambda a: a.name)
    }
    for name in dict.fromkeys(area.name for area in areas):
        ranges = [
            {"kind": run.kind, "offset": (run.first - area.first + area.base) * geometry.page_size, "size": run.pages * geometry.page_size}
            | ({"name": run.name, "cached": run.cached * geometry.page_size} if run.kind in ("buffer", "claimed", "reserved") else {})
            for area in by_name[name]
            for run in _runs(inspected.memory, geometry, area, guests)
        ]  # fmt: skip
        told.append(
            {"area": name, "size": sum(area.pages for area in by_name[name]) * geometry.page_size, "ranges": ranges}
        )
    return {"page_size": geometry.page_size, "areas": told}


def _runs(memory: memoryview, geometry: Geometry, area: Area, guests: Sequence[Guest]) -> Iterator[Run]:
    """Of one part of an area: its guests in order, and what is between them."""
    end = area.first
    for guest in guests:
        # A table that moves may say what cannot be: nothing is told twice, and nothing outside the area.
        if guest.area != area.index or guest.first < end or guest.end > area.first + area.pages:
            continue
        yield from _between(memory, geometry, end, guest.first)
        kind = "buffer" if guest.kind == layout.BUFFER else "claimed" if guest.claimant else "reserved"
        cached = _cached(memory, geometry, guest.first, guest.end) if kind == "reserved" else 0
        yield Run(kind, guest.first, guest.pages, cached, guest.name.decode(errors="replace") or None)
        end = guest.end
    yield from _between(memory, geometry, end, area.first + area.pages)


def _between(memory: memoryview, geometry: Geometry, first: int, end: int) -> Iterator[Run]:
    """Neighbours across the end of a chunk are one run."""
    kind, begun = "", first
    for at in range(first, end, CHUNK_PAGES):
        for run in RUNS.finditer(_kinds(memory, geometry, at, min(at + CHUNK_PAGES, end))):
            if KINDS[run[0][0]] != kind:
                if kind:
                    yield Run(kind, begun, at + run.start() - begun)
                kind, begun = KINDS[run[0][0]], at + run.start()
    if kind:
        yield Run(kind, begun, end - begun)


def _cached(memory: memoryview, geometry: Geometry, first: int, end: int) -> int:
    """How many pages hold cache."""
    return sum(
        _kinds(memory, geometry, at, min(at + CHUNK_PAGES, end)).count(CACHE) for at in range(first, end, CHUNK_PAGES)
    )


def _kinds(memory: memoryview, geometry: Geometry, first: int, end: int) -> bytes:
    """A byte a page, an index into KINDS: made of the highest byte of its word alone, in which the state is."""
    at = geometry.life_at
    return memory[at + 8 * first + 7 : at + 8 * end : 8].tobytes().translate(_KIND_OF)
