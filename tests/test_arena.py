"""The shared-memory object: created whole or not at all, locked by one broker, found by those whom it is for."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import posix_ipc
import pytest

from gcma_shm import arena as arenas
from gcma_shm import layout
from gcma_shm.areas import Area
from gcma_shm.errors import ArenaError
from gcma_shm.layout import Geometry
from gcma_shm.process import start_time
from tests.conftest import Bare
from tests.processes import WAIT_S, descriptors, eventually, in_fork

NAME = f"/gcma-test-{os.getpid()}-arena"
OBJECT = arenas.SHM_DIR / NAME[1:]
M = 1 << 20

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _unlinked() -> Iterator[None]:
    yield
    assert not OBJECT.exists(), "the test left its arena"


def planned(size: int = 2 * M) -> tuple[Geometry, list[Area]]:
    return layout.plan(size, slots=500, clients_max=8)


def test_created_private_committed_and_found() -> None:
    geometry, areas = planned()
    arena = arenas.create(NAME, geometry, areas)
    try:
        status = OBJECT.stat()
        assert status.st_mode & 0o777 == 0o600
        assert status.st_size == geometry.size
        assert status.st_blocks * 512 >= geometry.size, "every page is committed"
        found = arenas.open_arena(NAME, arena.arena_id)
        assert (found.geometry, found.areas, found.arena_id) == (geometry, areas, arena.arena_id)
        arena.memory[geometry.page_at(3)] = 77
        assert found.memory[geometry.page_at(3)] == 77
        assert not any(found.memory[geometry.page_at(4) : geometry.page_at(5)])
    finally:
        arena.destroy()


def test_no_umask_opens_it_to_others() -> None:
    before = os.umask(0)
    try:
        arena = arenas.create(NAME, *planned())
        mode = OBJECT.stat().st_mode & 0o777
        arena.destroy()
    finally:
        os.umask(before)
    assert mode == 0o600


def test_what_is_mapped_outlives_destroy() -> None:
    arena = arenas.create(NAME, *planned())
    arena.memory[arena.geometry.pages_at] = 5
    arena.destroy()
    assert arena.memory[arena.geometry.pages_at] == 5
    with pytest.raises(ArenaError, match="no arena"):
        arenas.open_arena(NAME)


def test_two_arenas_have_two_identities() -> None:
    found = set()
    for _ in range(2):
        arena = arenas.create(NAME, *planned())
        found.add(arena.arena_id)
        arena.destroy()
    assert len(found) == 2


def test_too_little_shared_memory() -> None:
    geometry, areas = layout.plan(1 << 44)
    with pytest.raises(ArenaError) as raised:
        arenas.create(NAME, geometry, areas)
    message = str(raised.value)
    assert "needs 16 TiB" in message
    assert " has " in message
    for word in ("too little shared memory", "mount -o remount,size=", "--shm-size", "Kubernetes", "smaller"):
        assert word in message
    assert isinstance(raised.value, OSError)
    assert not OBJECT.exists(), "nothing is left behind"


@pytest.mark.parametrize("room", [0, 1 * M, 2 * M - 1])
def test_a_full_dev_shm_is_told_with_both_figures(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(arenas, "_memory_available", lambda: room)
    with pytest.raises(ArenaError, match=r"needs 2 MiB, and /dev/shm has"):
        arenas.create(NAME, *planned())
    assert not OBJECT.exists()


def test_memory_that_is_refused_at_the_last_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ArenaError, match="too little shared memory"):
        arenas.create(NAME, *planned())
    assert not OBJECT.exists()


def test_one_broker_an_arena() -> None:
    geometry, areas = planned()
    arena = arenas.create(NAME, geometry, areas)
    try:
        inode = OBJECT.stat().st_ino
        assert "another broker" in refusal(geometry, areas)
        assert "another broker" in in_fork(lambda _: refusal(geometry, areas))
        assert OBJECT.stat().st_ino == inode, "the first one is undisturbed"
        assert arenas.open_arena(NAME).arena_id == arena.arena_id
    finally:
        arena.destroy()


def refusal(geometry: Geometry, areas: list[Area]) -> str:
    with pytest.raises(ArenaError) as raised:
        arenas.create(NAME, geometry, areas)
    return str(raised.value)


@contextlib.contextmanager
def locked_by_another(pid: int, start: int) -> Iterator[int]:
    """What a broker of that process left, and its lock, held on another open file: the descriptor that holds it."""
    geometry, areas = planned()

    def serve(_: object) -> None:
        arena = arenas.create(NAME, geometry, areas)
        with memoryview(arena.memory).cast("Q") as words:
            for at, value in ((layout.BROKER_PID_AT, pid), (layout.BROKER_START_AT, start), (layout.EPOCH_AT, 1)):
                words[at // 8] = value

    in_fork(serve)
    with OBJECT.open("r+b") as held:
        assert eventually(lambda: arenas._try_lock(held.fileno()))
        yield held.fileno()


def test_the_lock_of_a_dead_broker_is_waited_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who looks into /proc of the process keeps its memory, and so the lock, for longer than it lives."""
    geometry, areas = planned()
    waits = threading.Event()

    def nap(seconds: float) -> None:
        waits.set()
        time.sleep(seconds)

    monkeypatch.setattr(arenas, "LINGER_S", WAIT_S)
    monkeypatch.setattr(arenas, "time", SimpleNamespace(monotonic=time.monotonic, sleep=nap))
    with locked_by_another(os.getpid(), 1) as held, ThreadPoolExecutor(1) as thread:  # we began later
        starting = thread.submit(arenas.acquire, NAME, geometry, areas)
        assert eventually(lambda: waits.is_set() or starting.done())
        assert not starting.done(), starting.exception()
        fcntl.flock(held, fcntl.LOCK_UN)
        arena = starting.result(WAIT_S)
        assert not arena.fresh, "it goes on with what was left"
        arena.destroy()


def test_the_lock_of_a_living_broker_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "time", SimpleNamespace(monotonic=time.monotonic))  # nobody sleeps
    start = start_time(os.getpid())
    assert start is not None
    with locked_by_another(os.getpid(), start):
        assert "another broker" in refusal(*planned())
    arenas.remove_dead(NAME)


def test_a_lock_that_lingers_for_ever_is_another_brokers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "LINGER_S", 0.05)
    with locked_by_another(os.getpid(), 1):
        assert "another broker" in refusal(*planned())
    arenas.remove_dead(NAME)


def test_what_a_dead_broker_left_is_replaced_and_its_types_end() -> None:
    geometry, areas = planned()

    def die_holding(_: object) -> bytes:
        arena = arenas.create(NAME, geometry, areas)
        words = memoryview(arena.memory).cast("Q")
        words[(geometry.type_at(0) + layout.TYPE_LIFE_AT) // 8] = 1
        words[(geometry.type_at(7) + layout.TYPE_LIFE_AT) // 8] = 9
        words[(geometry.type_at(8) + layout.TYPE_LIFE_AT) // 8] = 8
        return arena.arena_id

    old_id = in_fork(die_holding)
    survivor = arenas.open_arena(NAME)  # a client that goes on in the old arena
    assert survivor.arena_id == old_id
    arena = arenas.create(NAME, geometry, areas)
    try:
        words = memoryview(survivor.memory).cast("Q")
        lives = [words[(geometry.type_at(t) + layout.TYPE_LIFE_AT) // 8] for t in range(256)]
        assert [(t, life) for t, life in enumerate(lives) if life] == [(0, 2), (7, 10), (8, 8)]
        assert arena.arena_id != old_id
        with pytest.raises(ArenaError, match="not the arena"):
            arenas.open_arena(NAME, old_id)
    finally:
        arena.destroy()


@pytest.mark.parametrize("content", [b"", b"garbage", b"GCMA-SHM" + bytes(5000)], ids=["empty", "short", "damaged"])
def test_anything_dead_under_the_name_is_replaced(content: bytes) -> None:
    OBJECT.write_bytes(content)
    arena = arenas.create(NAME, *planned())
    try:
        assert arenas.open_arena(NAME).arena_id == arena.arena_id
    finally:
        arena.destroy()


@pytest.mark.parametrize(
    "content", [b"", b"short", b"x" * 8192, b"GCMA-SHM" + bytes(8184)], ids=["empty", "short", "other", "damaged"]
)
def test_what_is_no_arena_is_not_opened(content: bytes) -> None:
    OBJECT.write_bytes(content)
    try:
        with pytest.raises(ArenaError):
            arenas.open_arena(NAME)
    finally:
        OBJECT.unlink()


def test_truncated_under_its_name() -> None:
    arena = arenas.create(NAME, *planned())
    try:
        os.truncate(OBJECT, arena.geometry.size - 4096)
        with pytest.raises(ArenaError, match="truncated"):
            arenas.open_arena(NAME)
    finally:
        arena.destroy()


def test_an_arena_that_is_not_there() -> None:
    with pytest.raises(ArenaError, match="no arena") as raised:
        arenas.open_arena("/gcma-test-nowhere")
    assert raised.value.errno == 2


def test_no_descriptor_is_left_open(bare: Bare) -> None:
    before = descriptors()
    for _ in range(3):
        with pytest.raises(ArenaError):
            arenas.create(bare.arena.name, *planned())
        with pytest.raises(ArenaError):
            arenas.create(NAME, *layout.plan(1 << 44))
        with pytest.raises(ArenaError):
            arenas.open_arena(bare.arena.name, b"another id 16byt")
        with pytest.raises(ArenaError):
            arenas.open_arena("/gcma-test-nowhere")
        arena = arenas.create(NAME, *planned())
        arenas.open_arena(NAME)
        arena.destroy()
        arena.memory.close()
    assert descriptors() <= before


def test_prefault_maps_every_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "PREFAULT_BYTES", M)
    arena = arenas.create(NAME, *planned(8 * M))
    try:
        found = arenas.open_arena(NAME)
        for until in (3 * M + 4096, None):
            if not found.prefault(until):
                pytest.skip("this kernel has no MADV_POPULATE_WRITE")
            ours = [part.splitlines() for part in Path("/proc/self/smaps").read_text().split(NAME[1:])[1:]]
            resident = [next(int(line.split()[1]) for line in part if line.startswith("Rss:")) for part in ours]
            assert len(resident) == 2, "this process has mapped it twice"
            assert max(resident) >= (until or found.geometry.size) // 1024
    finally:
        arena.destroy()


def test_posix_names_are_ours_alone() -> None:
    with pytest.raises(posix_ipc.ExistentialError):
        posix_ipc.SharedMemory(NAME)
