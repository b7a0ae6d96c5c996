"""`gcma check` of whole arenas: headers, spill files and values, one that moves or whose processes died; and the command."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import struct
import threading
import zlib
from collections.abc import Callable

import pytest

import gcma_shm
from gcma_shm import layout
from gcma_shm._check_view import Finding
from gcma_shm.arena import SHM_DIR, open_arena
from gcma_shm.broker.checking import DAMAGED, LINES_MAX, SOUND, UNCHECKED
from gcma_shm.broker.cli import main
from gcma_shm.check import LOOKS, Inspected, Report, check, repeated
from gcma_shm.endpoint import arena_name, default_spill_dir
from gcma_shm.entries import read_guests
from tests.client import page_of
from tests.inspected import (
    AREAS,
    CACHED,
    DIRTY,
    PAGE,
    SPILLED,
    Copy,
    found,
    in_use,
    look,
    state,
)
from tests.processes import WAIT_S, Said, broker, eventually, forked

CHURN_LOOKS = 40


# --- headers


def resealed(c: Copy) -> bytes:
    """With the checksum that fits."""
    size = struct.calcsize("<8sII16s") + 8 * len(layout.Geometry.__dataclass_fields__)
    c.bytes[size : size + 4] = struct.pack("<I", zlib.crc32(c.bytes[:size]))
    return bytes(c.bytes)


def bytes_with(at: int, new: bytes) -> Callable[[Copy], bytes]:
    return lambda c: bytes(c.bytes[:at]) + new + bytes(c.bytes[at + len(new) :])


def another_geometry(**changes: int) -> Callable[[Copy], bytes]:
    def make(c: Copy) -> bytes:
        for number, name in enumerate(layout.Geometry.__dataclass_fields__):
            if name in changes:
                c.write(32 + 8 * number, changes[name])
        return resealed(c)

    return make


HEADERS: dict[str, tuple[Callable[[Copy], bytes], int, str]] = {
    "checksum": (bytes_with(40, b"\x01"), DAMAGED, "its checksum does not fit"),
    "truncated": (lambda c: bytes(c.bytes[:-PAGE]), DAMAGED, "was truncated"),
    "truncated-in-header": (lambda c: bytes(c.bytes[:2048]), DAMAGED, "less than its header"),
    "areas": (lambda c: bytes_with(c.g.area_at(0) + 0x38, struct.pack("<Q", c.g.pages))(c), DAMAGED, "table of areas is damaged"),
    "page-size": (another_geometry(page_size=4097), DAMAGED, "no arena can have these sizes"),
    "offset": (another_geometry(slots_at=1 << 60), DAMAGED, "slots_at is 1152921504606846976, expected"),
    "count": (another_geometry(allocations_max=1 << 40), DAMAGED, "allocations_max is"),
    "grants": (another_geometry(grants_max=31), DAMAGED, "grants_max is 31"),
    "nursery": (another_geometry(nursery_pages=3), DAMAGED, "a nursery of 3 pages"),
    "spill-dir": (bytes_with(layout.SPILL_DIR_AT, b"\0"), DAMAGED, "does not say where the spill files are"),
    "version": (bytes_with(8, b"\x09"), UNCHECKED, "layout version 9: this gcma-shm knows version"),
    "magic": (bytes_with(0, b"ANOTHER!"), UNCHECKED, "is not an arena: it begins with b'ANOTHER!'"),
    "empty": (lambda _: b"", UNCHECKED, "is not an arena"),
    "never-served": (bytes_with(layout.EPOCH_AT, bytes(8)), UNCHECKED, "no broker has served yet"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.usefixtures("quick")
def test_headers(copy: Copy, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, status, words = HEADERS[name]
    path = SHM_DIR / f"gcma-test-{os.getpid()}"
    path.write_bytes(make(copy))
    try:
        assert main(["check", "--arena", path.name]) == status
    finally:
        path.unlink()
    assert words in "".join(capsys.readouterr())


def test_there_is_none(capsys: pytest.CaptureFixture[str], endpoint: str) -> None:
    assert main(["check", "--endpoint", endpoint]) == UNCHECKED
    assert "there is no arena" in capsys.readouterr().err


def test_a_name_ends_at_its_first_zero(copy: Copy) -> None:
    """What is behind it is left of an older name, whose removal was cut off."""
    at = copy.entry("buffer 1") + layout.ALLOCATION_NAME_AT
    copy.bytes[at : at + layout.NAME_BYTES] = b"new\0r 1".ljust(layout.NAME_BYTES - 3, b"\0") + b"old"
    names = {guest.name for guest in read_guests(memoryview(copy.bytes), copy.g)}
    assert b"new" in names
    assert not any(b"\0" in name for name in names)
    copy.write(at, 0)
    unnamed = [guest.index for guest in read_guests(memoryview(copy.bytes), copy.g) if not guest.name]
    assert (at - layout.ALLOCATION_NAME_AT - copy.g.allocations_at) // layout.ALLOCATION_BYTES in unnamed
    assert not copy.look()


# --- files and values


@pytest.mark.usefixtures("quick")
def test_spill_files(endpoint: str) -> None:
    with in_use(endpoint):
        directory = default_spill_dir(endpoint)
        through = directory / "000.1"
        # What comes back below must be what is there: the broker gives back the places of the pages that became zeros, or a pattern.
        assert eventually(lambda: not any(through.read_bytes()[2900 * PAGE : 2902 * PAGE]))
        whole, kept = through.read_bytes(), directory / "kept"
        (directory / "009.5").write_bytes(b"stray")
        found(look(endpoint).findings, "spill file", "009.5: of no living type")
        assert not look(endpoint).damaged
        (directory / "009.5").unlink()
        os.truncate(through, 100 * PAGE)
        found(look(endpoint).findings, "spill file", f"has {100 * PAGE} bytes, its values need")
        through.write_bytes(whole + bytes(4000 * PAGE))
        found(look(endpoint).findings, "spill file", f"its slots {3000 * PAGE}")
        through.rename(kept)
        found(look(endpoint).damaged, "spill file", "000.1, of a living type, cannot be opened: No such file")
        through.symlink_to(kept)
        assert look(endpoint).damaged, "a link is not the file"
        through.unlink()
        shutil.copy(kept, through)
        found(look(endpoint).damaged, "spill file", "000.1 is not the file that its life began with")
        through.unlink()
        kept.rename(through)
        through.write_bytes(whole)
        assert not check(arena_name(endpoint), values=True).findings


@pytest.mark.usefixtures("quick")
def test_values(endpoint: str) -> None:
    with in_use(endpoint):
        name, file = arena_name(endpoint), default_spill_dir(endpoint) / "000.1"
        assert not check(name, values=True).findings
        arena = open_arena(name)
        c = Copy(arena.memory[:])
        spilled = (c.slot(lambda word: state(word) == SPILLED) - c.slot_at(0)) // 16
        with file.open("r+b") as opened:
            opened.seek(spilled * PAGE + 9)
            before = opened.read(1)
            opened.seek(spilled * PAGE + 9)
            opened.write(bytes([before[0] ^ 1]))
        assert not look(endpoint).findings, "the tables are whole"
        found(check(name, values=True).findings, "value", f"slot {spilled} of type 0.*does not fit its checksum")
        with file.open("r+b") as opened:
            opened.seek(spilled * PAGE + 9)
            opened.write(before)
        at = c.slot(lambda word: state(word) == CACHED and not word & DIRTY)
        byte = c.g.page_at(c.read(at) & 0xFFFFFFFF) + 77
        arena.memory[byte] ^= 1
        found(
            check(name, values=True).findings,
            "value",
            f"slot {(at - c.slot_at(0)) // 16} of type 0.*in memory is not what is in the file",
        )
        arena.memory[byte] ^= 1
        assert not check(name, values=True).findings
        arena.memory.close()


# --- while it moves, and after deaths


def churn(endpoint: str, said: Said | None, over: Callable[[], bool]) -> None:
    """Of everything, until it is over."""
    chance = random.Random(os.getpid())
    with gcma_shm.connect(endpoint, timeout=WAIT_S) as client:
        swaps = client.swap(0, 3000), client.swap(1, 1000, "behind")
        reservation = client.reserve(64 * PAGE, area="a")
        if said is not None:
            said.say()
        while not over():
            for swap in swaps:
                for _ in range(20):
                    n = chance.randrange(swap.slots)
                    swap.store(n, page_of(n))
                    swap.load(chance.randrange(swap.slots))
                swap.invalidate_page(chance.randrange(swap.slots))
            try:
                client.alloc_contig(chance.randrange(1, 200) * PAGE).free()
                reservation.claim().free()
                short = client.swap(chance.randrange(2, 9), 200)
                short.store(7, page_of(6))
                short.invalidate_area()
            except (gcma_shm.Closed, gcma_shm.BrokerUnavailable, gcma_shm.ArenaExhausted):
                continue  # another's invalidate_area, or no broker just now


def test_an_arena_under_churn_is_sound_many_times_in_a_row(endpoint: str) -> None:
    with in_use(endpoint):
        over = threading.Event()
        with forked(lambda said: churn(endpoint, said, lambda: False)) as child:
            child.receive()
            thread = threading.Thread(target=churn, args=(endpoint, None, over.is_set))
            thread.start()
            try:
                for count in range(CHURN_LOOKS):
                    report = check(arena_name(endpoint), values=count % 4 == 0)
                    assert report.served
                    assert not report.damaged, f"look {count}"
            finally:
                over.set()
                thread.join()


def test_after_a_death_and_after_a_takeover(endpoint: str) -> None:
    with in_use(endpoint) as (first, _), forked(lambda said: churn(endpoint, said, lambda: False)) as child:
        child.receive()
        first.stop(signal.SIGKILL)
        for _ in range(5):
            report = check(arena_name(endpoint), values=True)
            assert not report.served
            assert not report.damaged, "clients go on"
        child.kill()
        report = check(arena_name(endpoint), values=True)
        assert not report.damaged
        assert any(one.kind == "client" and "it has died" in one.text for one in report.pending)
        with broker(endpoint, *AREAS):
            assert eventually(lambda: not look(endpoint).findings)
            assert not check(arena_name(endpoint), values=True).findings


def test_a_stopped_broker_is_no_damage(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with in_use(endpoint) as (first, _), forked(lambda said: churn(endpoint, said, lambda: False)) as child:
        child.receive()
        for _ in range(5):
            os.kill(first.pid, signal.SIGSTOP)
            try:
                assert eventually(lambda: not look(endpoint).served)
                assert not look(endpoint).damaged
                assert main(["check", "--endpoint", endpoint]) == SOUND
                assert ", its broker is stopped\n" in capsys.readouterr().out
            finally:
                os.kill(first.pid, signal.SIGCONT)


# --- looks


def test_what_is_there_but_once_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcma_shm.check.NAP_S", 0.0)
    findings = [Finding("page", f"page {n}") for n in range(3)]
    looks = iter([findings, findings[1:], *[findings[1:2]] * LOOKS])
    report = repeated(lambda _: Report(next(looks), moving=True))
    assert report.findings == findings[1:2]
    assert report.looks == LOOKS
    assert len(list(looks)) == 2, "no more looks than that"
    assert repeated(lambda _: Report(findings)).looks == 1, "nothing moves"


def test_it_cannot_write(endpoint: str) -> None:
    """Neither through its mapping nor to what it looks at."""
    with in_use(endpoint) as (first, _):
        first.stop(signal.SIGKILL)
        path = SHM_DIR / arena_name(endpoint)[1:]
        before = path.read_bytes()
        check(arena_name(endpoint), values=True)
        assert path.read_bytes() == before
        inspected = Inspected(arena_name(endpoint))
        assert inspected.memory.readonly
        inspected.close()
        with broker(endpoint, *AREAS):
            pass


# --- the command


def test_what_it_prints(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with in_use(endpoint):
        capsys.readouterr()
        assert main(["check", "--endpoint", endpoint, "--pages"]) == SOUND
        told = capsys.readouterr().out
        assert "served by a broker" in told
        assert re.search(r"2 areas, 2 types, 2 clients, 4 buffers, 2 reservations, 6000 slots \(", told)
        assert re.search(r"2 spill files, .* of values\nsound; \d+ ms", told)
        assert main(["check", "--endpoint", endpoint, "--json"]) == SOUND
        figures = json.loads(capsys.readouterr().out)
        assert figures["sound"]
        assert figures["figures"]["slots"] == 6000
        assert figures["findings"] == []


@pytest.mark.usefixtures("quick")
def test_at_most_so_many_lines_of_a_kind(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(2000):
        copy.write(copy.slot_at(n), 7 << 33)
    path = SHM_DIR / f"gcma-test-{os.getpid()}"
    path.write_bytes(copy.bytes)
    try:
        assert main(["check", "--arena", f"/{path.name}"]) == DAMAGED
    finally:
        path.unlink()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged: slot")]
    assert len(told) == LINES_MAX + 1
    assert told[-1] == f"damaged: slot: {2000 - LINES_MAX} more"
