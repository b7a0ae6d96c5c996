"""Every operation of the data plane, at once, by threads of one process over one mapping of one arena.

Run under a sanitizer (`runtime.py`) as `python -m tests.sanitize.threads`. The broker's plane and several clients' planes share one
mapping on purpose: a sanitizer knows memory by its address, and would see nothing of a race between two mappings of one object.
The threads check themselves, too: each page that is loaded is whole and was stored in that slot, each buffer keeps what its holder wrote.

Prints how often each mechanism was at work; status 1, with the reason, when something was wrong. What the sanitizer finds is its to report.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from gcma_shm import _core, layout
from gcma_shm._core import Plane, Slots, Span
from gcma_shm.errors import Closed, NurseryFull
from gcma_shm.records import Records
from tests.invariants import check_tables
from tests.sanitize.arena import (
    BEHIND,
    CLIENTS_MAX,
    FLEETING,
    MORTAL,
    PAGE,
    RESERVED,
    RESERVED_INDEX,
    RESERVED_PAGES,
    SLOTS,
    THROUGH,
    TIMEOUT_S,
    Arena,
    allocated,
    check_page,
    mapped,
    page_of,
)

EDGE = 8  # pages at the end of the second area that it loses and wins again
# What must have been at work, and how often, before a run may end; and how long it may take to get there on a busy machine.
AT_WORK = (
    "stores", "stores_zero", "hits_nursery", "hits_area", "hits_zero", "hits_spill", "misses", "invalidations", "cleaned", "refaults",
    "promotions", "evictions", "discards", "orphans_freed", "heals", "retries", "direct_reclaims", "refused_closed", "claims", "buffers", "lives", "punched",
    "stores_at_hand", "loads_at_hand",
)  # fmt: skip
AT_LEAST = 50
AT_WORK_S = 400.0


def work(arena: Arena, plane: Plane, random_: random.Random, stop: threading.Event) -> None:
    """A client: stores, loads, batches, invalidates, syncs; what the broker's control thread does for those who send messages, too."""
    handles = {type_: arena.open(plane, type_) for type_ in SLOTS}
    many = bytearray(8 * PAGE)
    n = 0
    while not stop.is_set():
        type_ = random_.choice((THROUGH, THROUGH, BEHIND, BEHIND, FLEETING))
        n += 1
        try:
            work_once(handles[type_], random_, n, many, arena.done)
        except Closed:
            assert type_ == FLEETING, f"type {type_} has ended"
            handles[type_] = arena.open(plane, type_)
        except NurseryFull:
            pass  # other threads of the process had all of its pins


def work_once(swap: Slots, random_: random.Random, n: int, many: bytearray, done: Counter[str]) -> None:
    type_, slots = swap.type, swap.slots
    offset = random_.randrange(slots) if random_.random() < 0.5 else random_.randrange(8)
    match random_.randrange(20):
        case 16 | 17 | 18 | 19:
            at_hand(swap, offset, n, done)
        case 0 | 1 | 2 | 3:
            swap.store(offset, page_of(type_, offset, n))
        case 4:
            swap.store(offset, bytes(PAGE))
        case 5 | 6:
            offsets = [(offset + k) % slots for k in range(8)]
            swap.store_many(offsets, b"".join(page_of(type_, at, n) for at in offsets))
        case 7 | 8:
            offsets = [random_.randrange(slots) for _ in range(8)]
            for k, hit in enumerate(swap.load_many(offsets, many)):
                if hit:
                    check_page(type_, offsets[k], bytes(many[k * PAGE : (k + 1) * PAGE]))
        case 9:
            swap.invalidate_page(offset)
        case 10:
            assert 0 <= len(swap) <= slots
            if random_.random() < 0.2:
                swap.sync(TIMEOUT_S)
        case _:
            page = swap.load(offset)
            if page is not None:
                check_page(type_, offset, page)


def at_hand(swap: Slots, offset: int, n: int, done: Counter[str]) -> None:
    """Under the interpreter's lock all the time, also in this build."""
    done["stores_at_hand"] += swap.store_at_hand(offset, page_of(swap.type, offset, n))
    found = swap.load_at_hand((offset + 1) % swap.slots)
    if isinstance(found, bytes):
        check_page(swap.type, (offset + 1) % swap.slots, found)
        done["loads_at_hand"] += 1


def fill(span: Span) -> None:
    """What a guest does with memory that is its own: writes it, and finds what it wrote."""
    span.zero()
    with memoryview(span) as view:
        assert not any(view), "somebody wrote into a guest's memory"


def claim(arena: Arena, plane: Plane, random_: random.Random, stop: threading.Event) -> None:
    """A client with a part in the reservation: claims, writes, lends; sometimes shares the claim, or gives it up at once."""
    first = arena.reserved_first
    while not stop.is_set():
        word, span = plane.claim(RESERVED_INDEX, RESERVED, first, RESERVED_PAGES)
        if span is None:
            time.sleep(0.0005)
            continue
        if random_.random() < 0.1:
            assert plane.yield_claim(RESERVED_INDEX, word)
            continue
        assert plane.claim_settled(first, RESERVED_PAGES, TIMEOUT_S)
        fill(span)
        arena.done["claims"] += 1
        if random_.random() < 0.3:
            assert plane.share_claim(RESERVED_INDEX, word)  # the control thread ends it
        else:
            assert plane.unclaim(RESERVED_INDEX, word, first, RESERVED_PAGES)
        time.sleep(random_.random() * 0.002)


def end_shared_claim(arena: Arena) -> None:
    """As `Claims.leave` and `_lend`, after the last of those who share it."""
    plane, at = arena.broker, arena.reserved_at + layout.ALLOCATION_CLAIM_AT
    word = plane.read(at)
    if word & layout.CLAIM_SHARED and plane.seize(RESERVED_INDEX, word):
        plane.give(0, arena.reserved_first, RESERVED_PAGES, RESERVED_INDEX + 1)
        plane.write(arena.reserved_at + layout.ALLOCATION_LENT_AT, 0)
        plane.write(at, (plane.read(at) >> layout.CLAIM_GENERATION_SHIFT) + 1 << layout.CLAIM_GENERATION_SHIFT)


def control(arena: Arena, plane: Plane, random_: random.Random, stop: threading.Event) -> None:
    """The broker's control thread: buffers come and go in the second area, which also shrinks and grows; ends shared claims."""
    area = arena.areas[1]
    held_at = arena.geometry.area_at(1) + layout.AREA_HELD_AT
    while not stop.is_set():
        pages = random_.randrange(1, area.pages - EDGE + 1)
        first = area.first + random_.randrange(area.pages - EDGE - pages + 1)
        plane.lent_near(first, pages)
        plane.take(1, first, pages, 1)
        plane.add(held_at, pages)
        for _ in range(random_.randrange(1, 4)):
            fill(plane.span(first, pages * PAGE))
        arena.done["buffers"] += 1
        plane.add(held_at, (1 << 64) - pages)
        plane.give(1, first, pages)
        if random_.random() < 0.2:
            edge = area.first + area.pages - EDGE
            plane.take(1, edge, EDGE)
            plane.set_area(1, area.first, area.pages - EDGE)
            plane.set_area(1, area.first, area.pages)
            plane.give(1, edge, EDGE)
        end_shared_claim(arena)
        plane.entries_used(RESERVED_INDEX + 1)
        for number in range(1, CLIENTS_MAX + 1):
            Records(plane).counters(number)
        time.sleep(random_.random() * 0.002)


def lives(arena: Arena, plane: Plane, random_: random.Random, stop: threading.Event) -> None:
    """The broker's worker for types: one ends and begins again, a client says goodbye and is buried."""
    while not stop.is_set():
        arena.registry.end(FLEETING, arena.registry.declare(FLEETING, SLOTS[FLEETING], "through").life)
        time.sleep(random_.random() * 0.002)
        arena.declare(FLEETING)
        mortal = arena.plane(MORTAL)
        swap = arena.open(mortal, THROUGH)
        swap.store(3, page_of(THROUGH, 3, 1))
        assert mortal.close(TIMEOUT_S)
        plane.bury([MORTAL])
        arena.done["lives"] += 1
        time.sleep(random_.random() * 0.005)


def reclaim(arena: Arena, plane: Plane, random_: random.Random, stop: threading.Event) -> None:
    """The broker's reclaim thread, which also gives back places in the files; it rests now and then, so that clients reclaim for themselves."""
    while not stop.is_set():
        head = plane.sweep(0.002)
        if random_.random() < 0.05:
            plane.clean_until(head)
        if random_.random() < 0.1:
            plane.punch()
        if random_.random() < 0.02:
            time.sleep(0.02)


Work = Callable[[Arena, Plane, random.Random, threading.Event], None]


class Blind:
    """Whether the sanitizer is blind to what the interpreter's lock orders (gil.h); only its build has the switch."""

    def __init__(self, wanted: bool) -> None:
        core = ctypes.CDLL(_core.__file__)
        self._begin: Callable[[], object] = core.gcma_blind if wanted else lambda: None
        self._end: Callable[[], object] = core.gcma_see if wanted else lambda: None

    def __enter__(self) -> None:
        self._begin()

    def __exit__(self, *_error: object) -> None:
        self._end()


def run(arena: Arena, seed: int, seconds: float, blind: bool) -> list[str]:
    """Runs all threads; what was wrong."""
    stop = threading.Event()
    wrong: list[str] = []

    def body(part: Work, plane: Plane, seed: int) -> None:
        with Blind(blind):
            try:
                part(arena, plane, random.Random(seed), stop)
            except BaseException:
                wrong.append(traceback.format_exc())
                stop.set()
            arena.leave()

    parts: list[tuple[Work, Plane]] = [
        (control, arena.broker), (lives, arena.broker), (reclaim, arena.broker), (work, arena.broker),
        *((work, arena.clients[number]) for number in (2, 2, 3, 4)),
        *((claim, arena.clients[number]) for number in (5, 6)),
    ]  # fmt: skip
    threads = [threading.Thread(target=body, args=(*part, seed + n)) for n, part in enumerate(parts)]
    for thread in threads:
        thread.start()
    stop.wait(seconds)
    deadline = time.monotonic() + AT_WORK_S
    while idle(arena) and time.monotonic() < deadline and not stop.wait(0.1):
        pass
    stop.set()
    for thread in threads:
        thread.join()
    assert arena.meet() == len(threads)
    return wrong


def counted(arena: Arena) -> Counter[str]:
    total = Counter(arena.done)
    for number in range(CLIENTS_MAX + 1):
        total.update(Records(arena.broker).counters(number))
    return total


def idle(arena: Arena) -> list[str]:
    """The mechanisms that have not been at work enough."""
    count = counted(arena)
    return [name for name in AT_WORK if count[name] < AT_LEAST]


def main_thread(options: argparse.Namespace, seed: int) -> list[str]:
    arena = Arena(options.directory, allocated if options.allocated else mapped, options.spill_io)
    wrong = run(arena, seed, options.seconds, options.blind)
    print(json.dumps(counted(arena)))
    if wrong:
        return wrong
    end_shared_claim(arena)
    for type_ in SLOTS:
        arena.open(arena.broker, type_).sync(TIMEOUT_S)
    with memoryview(arena.memory) as view:
        check_tables(view.cast("B"), arena.geometry)
    return [f"hardly at work: {idle(arena)}"] if idle(arena) else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--blind", action="store_true")
    parser.add_argument("--allocated", action="store_true")
    parser.add_argument("--spill-io", default=layout.SPILL_IO[0], choices=layout.SPILL_IO)
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(1 << 30)
    print(f"seed {seed}", flush=True)
    with Blind(options.blind):
        wrong = main_thread(options, seed)
    for one in wrong:
        print(one)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
