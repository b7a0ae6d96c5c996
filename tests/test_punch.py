"""Disk space comes back: of pages that were invalidated or became zeros, in the background; of a type that was invalidated, at once."""

from __future__ import annotations

import itertools
import os
import random
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest

import gcma_shm
from gcma_shm import layout
from gcma_shm._core import Plane, Slots
from gcma_shm.broker.registry import TypeRegistry
from gcma_shm.check import check
from gcma_shm.endpoint import arena_name
from gcma_shm.records import Records
from tests.client import filled_with
from tests.conftest import Bare
from tests.faults.spilling import PAGE, check_values, data_pages, place
from tests.invariants import check_at_rest
from tests.processes import broker, eventually

RANGES_MAX = 64  # that one turn gives back
LIFE = 1
WAIT_S = 60.0


def pattern_of(number: int) -> bytes:
    """A page that is those four bytes over and over: it is in its slot's word."""
    return number.to_bytes(4, "little") * (PAGE // 4)


def store_all(swap: gcma_shm.Swap | Slots, count: int, first_value: int = 1) -> dict[int, int]:
    values = {n: first_value + n for n in range(count)}
    swap.store_many(values, b"".join(map(filled_with, values.values())))
    return values


@pytest.mark.parametrize("spill_io", layout.SPILL_IO)
def test_space_comes_back_while_the_broker_runs(spill_io: str, tmp_path: Path) -> None:
    with place(tmp_path, mapped=True, spill_io=spill_io) as p:
        swap = p.client.swap(3, 1500)
        values = store_all(swap, 1500)
        file = p.file(3)
        assert data_pages(file) == set(values)
        full = file.stat().st_blocks
        for n in (*range(0, 600, 3), *range(700, 1000)):
            swap.invalidate_page(n)
            del values[n]
        for n in range(1200, 1300):
            swap.store(n, bytes(PAGE))
            del values[n]
        for n in range(1300, 1350):
            swap.store(n, pattern_of(n))
            del values[n]
        assert eventually(lambda: data_pages(file) == set(values))
        given_back = (200 + 300 + 100 + 50) * PAGE // 512
        assert file.stat().st_blocks <= full - given_back + 16 * PAGE // 512, "but for what the file system notes down"
        assert file.stat().st_size == 1500 * PAGE
        assert eventually(lambda: p.owner.stats()["counters"]["punched"] == 650), "counted after each hole"
        check_values(swap, values)
        assert swap.load(0) is None
        assert swap.load(1250) == bytes(PAGE)
        assert all(swap.load(n) == pattern_of(n) for n in range(1300, 1350))
        for n in range(0, 600, 3):  # and is taken again
            swap.store(n, filled_with(10_000 + n))
            values[n] = 10_000 + n
        check_values(swap, values)
        assert data_pages(file) == set(values)
        p.check()


def test_check_finds_what_nobody_will_give_back(tmp_path: Path) -> None:
    """Something at the place of a slot that has no value there, and whose word says that there is nothing."""
    with place(tmp_path, mapped=True) as p:
        swap = p.client.swap(3, 100)
        store_all(swap, 50)
        for n in range(0, 40, 2):
            swap.invalidate_page(n)
        for n in range(40, 50, 2):
            swap.store(n, pattern_of(n))
        assert eventually(lambda: data_pages(p.file(3)) == set(range(1, 50, 2)))
        assert not check(p.arena, values=True).findings
        with p.file(3).open("r+b") as file:
            for n in (20, 44, 70):
                os.pwrite(file.fileno(), filled_with(9), n * PAGE)
        findings = [finding.text for finding in check(p.arena, values=True).findings]
        assert [text.partition(",")[0] for text in findings] == [f"slot {n} of type 3" for n in (20, 44, 70)]
        assert all("holds something that it has no need of" in text for text in findings)
        for n in (20, 44, 70):
            swap.store(n, filled_with(1))
        assert not check(p.arena, values=True).findings


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "messages"])
def test_a_type_gives_its_space_back_at_once(mapped: bool, tmp_path: Path) -> None:
    """Also what somebody has open: the type's handles here, and this test."""
    with place(tmp_path, mapped) as p:
        swap = p.client.swap(3, 1500)
        store_all(swap, 1500)
        file = p.file(3)
        with file.open("rb") as opened:
            assert os.fstat(opened.fileno()).st_blocks >= 1500 * PAGE // 512
            swap.invalidate_area()
            assert not file.exists()
            assert os.fstat(opened.fileno()).st_blocks == 0


def test_a_broker_that_was_killed_leaves_it_to_the_next(tmp_path: Path) -> None:
    """What is invalidated while none runs is found as well."""
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    options = ("--spill-dir", str(tmp_path / "spill"))
    with broker(endpoint, *options) as first, gcma_shm.connect(endpoint, wait_for_broker=WAIT_S) as client:
        swap = client.swap(3, 300)
        values = store_all(swap, 300)
        first.stop(signal.SIGKILL)
        for n in range(0, 300, 2):
            if n < 200:
                swap.invalidate_page(n)
            else:
                swap.store(n, pattern_of(n))
            del values[n]
        (file,) = (tmp_path / "spill").glob("*/003.*")
        assert data_pages(file) == set(range(300))
        left = check(arena_name(endpoint), values=True)
        assert left.figures["slots_filled"] == 50
        assert not [finding for finding in left.findings if finding.kind == "value"], "their words say so"
        with broker(endpoint, *options):
            assert eventually(lambda: data_pages(file) == set(values))
            check_values(swap, values)
            assert all(swap.load(n) == pattern_of(n) for n in range(200, 300, 2))
            sound = check(arena_name(endpoint), values=True)
            assert (sound.findings, sound.figures["slots_filled"]) == ([], 50)


# --- one turn after another, by hand


@pytest.fixture
def swap(bare: Bare) -> Slots:
    return TypeRegistry(bare.plane, bare.spill_dir).declare(3, 500, "through")


def file_of(bare: Bare) -> Path:
    return bare.spill_dir / f"003.{LIFE}"


def punch_all(plane: Plane) -> int:
    """A whole pass; how many turns it took."""
    turns = 1
    while not plane.punch():
        turns += 1
    return turns


def word_at(bare: Bare, offset: int) -> int:
    """Where the slot word is, and behind it the side word."""
    g = bare.plane.geometry
    return g.slots_at + layout.SLOT_BYTES * (bare.plane.read(g.type_at(3) + layout.TYPE_BASE_AT) + offset)


def punched(bare: Bare) -> int:
    return Records(bare.plane).counters(layout.BROKER)["punched"]


def test_a_turn_is_bounded(bare: Bare, swap: Slots) -> None:
    store_all(swap, 500)
    for n in range(0, 500, 2):
        swap.invalidate_page(n)
    assert not bare.plane.punch()
    assert punched(bare) == RANGES_MAX
    assert punch_all(bare.plane) == -(-250 // RANGES_MAX) - 1
    assert punched(bare) == 250
    assert data_pages(file_of(bare)) == set(range(1, 500, 2))
    assert punch_all(bare.plane) == 1
    assert punched(bare) == 250, "and nothing is left to do"


def test_what_was_never_in_the_file_or_is_in_use_is_left_alone(bare: Bare, swap: Slots) -> None:
    swap.store(0, filled_with(1))
    swap.store(1, bytes(PAGE))
    swap.invalidate_page(2)
    swap.store(3, filled_with(4))
    swap.invalidate_page(3)
    swap.store(3, filled_with(5))
    punch_all(bare.plane)
    assert punched(bare) == 0
    found = {0: 1, 3: 5}
    assert {n: int.from_bytes((swap.load(n) or b"")[:8], "little") for n in found} == found
    swap.store(0, bytes(PAGE))
    swap.invalidate_page(0)  # zeros, and then nothing, and a page in the file all the time
    punch_all(bare.plane)
    assert punched(bare) == 1
    assert data_pages(file_of(bare)) == {3}
    swap.store(3, pattern_of(7))
    swap.store(3, pattern_of(8))  # laid all the time
    swap.store(4, pattern_of(9))  # never was
    punch_all(bare.plane)
    assert punched(bare) == 2
    assert not data_pages(file_of(bare))
    assert (swap.load(3), swap.load(4)) == (pattern_of(8), pattern_of(9))


def test_a_place_that_somebody_writes_is_left_until_he_has(bare: Bare, swap: Slots) -> None:
    """By a client that is there; of one that is gone the claim is taken over."""
    store_all(swap, 3)
    for n in range(3):
        swap.invalidate_page(n)
    side = word_at(bare, 1) + 8
    claim = bare.plane.read(side) | 5 << 52
    bare.plane.write(side, claim)
    punch_all(bare.plane)
    assert data_pages(file_of(bare)) == {1}
    assert bare.plane.read(side) == claim
    bare.plane.write(side, claim & 0xFFFFFFFF)
    punch_all(bare.plane)
    assert not data_pages(file_of(bare))
    check_at_rest(bare.arena.name, bare.spill_dir)


def test_a_type_that_has_ended_is_passed_by(bare: Bare) -> None:
    registry = TypeRegistry(bare.plane, bare.spill_dir)
    swap = registry.declare(3, 100, "through")
    store_all(swap, 100)
    swap.invalidate_page(0)
    registry.end(3, swap.life)
    assert punch_all(bare.plane) == 1
    again = registry.declare(4, 100, "through")  # on the same slots
    store_all(again, 100)
    again.invalidate_page(1)
    punch_all(bare.plane)
    assert punched(bare) == 1
    assert data_pages(bare.spill_dir / "004.1") == {0, *range(2, 100)}


@pytest.fixture
def rivals(bare: Bare) -> list[Plane]:
    return [Plane(bare.arena.memory, bare.plane.geometry, n, os.fsencode(bare.spill_dir)) for n in (2, 3)]


def bytes_of(value: int) -> bytes:
    """Of the storm's values."""
    return filled_with(value) if value > 0 else pattern_of(-value)


def test_a_storm_over_places_that_are_given_back(bare: Bare, swap: Slots, rivals: list[Plane]) -> None:
    """Two clients store, invalidate and load neighbouring slots, each its own, while the broker sweeps, cleans and punches without a pause. A
    value is a page's number; 0: zeros; below: a pattern.
    """
    wrong: list[str] = []
    values: list[dict[int, int]] = [{}, {}]
    seed = random.randrange(1 << 30)
    deadline = time.monotonic() + WAIT_S
    print(f"seed {seed}")

    def client(which: int) -> None:
        dice, own = random.Random(seed + which), values[which]
        handle = rivals[which].slots(3, swap.life, WAIT_S)
        for step in itertools.count():
            if step >= 6000 and (punched(bare) > 500 or time.monotonic() > deadline):
                break
            offset = 2 * dice.randrange(250 if step % 2 else 20) + which
            found = handle.load(offset)
            expected = own.get(offset)
            if found != (None if expected is None else bytes_of(expected)):
                wrong.append(f"slot {offset}, step {step}: {found and found[:8]!r}, expected {expected}")
            match dice.randrange(4):
                case 0:
                    handle.invalidate_page(offset)
                    own.pop(offset, None)
                case 1 if dice.random() < 0.3:
                    handle.store(offset, bytes(PAGE))
                    own[offset] = 0
                case 2 if dice.random() < 0.3:
                    own[offset] = -1 - step
                    handle.store(offset, bytes_of(-1 - step))
                case _:
                    own[offset] = step + 1
                    handle.store(offset, filled_with(step + 1))

    threads = [threading.Thread(target=client, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        bare.plane.clean_until(bare.plane.sweep(0))
        bare.plane.punch()
    for thread in threads:
        thread.join()
    assert not wrong, f"seed {seed}: {wrong[:5]}"
    assert punched(bare) > 500
    swap.sync(WAIT_S)
    punch_all(bare.plane)
    everything = values[0] | values[1]
    assert data_pages(file_of(bare)) == {n for n, value in everything.items() if value > 0}
    for offset, value in everything.items():
        assert swap.load(offset) == bytes_of(value), f"seed {seed}"
    check_at_rest(bare.arena.name, bare.spill_dir)
