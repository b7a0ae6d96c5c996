"""The lock on a client's record: who has it, across forks, exec and PID namespaces."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import gcma_shm
from gcma_shm import layout, presence
from gcma_shm.arena import SHM_DIR, open_arena
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.errors import ArenaError
from gcma_shm.presence import Presence
from tests.client import held
from tests.conftest import Bare
from tests.processes import WAIT_S, Said, broker_command, eventually, forked, in_fork

IN_NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
HOLD = """
import sys, gcma_shm
client = gcma_shm.connect(sys.argv[1], mapped=True)
buffer = client.alloc_contig(1 << 20)
swap = client.swap(0, 16)
swap.store(3, b"n-gcma--" * (client.page_size // 8))
print(client.number, flush=True)
sys.stdin.read()
"""


def own(bare: Bare) -> Presence:
    assert bare.arena.presence is not None
    return bare.arena.presence


def open_files(bare: Bare) -> int:
    """How many of this process's are the arena: of others, threads of earlier tests may close some at any moment."""
    found = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += path.readlink() == SHM_DIR / bare.arena.name[1:]
    return found


def test_a_lock_is_seen_by_others_and_ends_with_its_file(bare: Bare) -> None:
    before = open_files(bare)
    first, second = own(bare).anew(), own(bare).anew()
    assert open_files(bare) == before + 2
    first.take(3)
    assert second.is_held(3)
    assert own(bare).is_held(3)
    assert not first.is_held(3), "one's own is no other's"
    assert not second.is_held(2)
    second.take(2)
    first.close()
    first.close()
    assert not second.is_held(3)
    second.take(3)
    second.close()
    assert open_files(bare) == before


def test_a_lock_that_another_keeps(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "TAKE_S", 0.0)
    first, second = own(bare).anew(), own(bare).anew()
    first.take(3)
    with pytest.raises(ArenaError, match="client 3 is locked by another"):
        second.take(3)
    first.close()
    second.close()


def test_a_mapping_does_not_keep_it(bare: Bare) -> None:
    """mmap keeps a duplicate of its descriptor, and that would keep the lock."""
    arena = open_arena(bare.arena.name)
    assert arena.presence is not None
    arena.presence.take(4)
    assert own(bare).is_held(4)
    arena.presence.close()
    assert not own(bare).is_held(4)
    arena.memory.close()


def test_a_forked_child_keeps_what_was_taken_for_it(bare: Bare) -> None:
    mine, its = own(bare).anew(), own(bare).anew()
    mine.take(3)
    its.take(4)

    def child(said: Said) -> None:
        mine.close()
        said.hear()

    with forked(child) as born:
        its.close()
        assert own(bare).is_held(4)
        mine.close()
        assert eventually(lambda: not own(bare).is_held(3))
        assert own(bare).is_held(4)
        born.kill()
        assert not own(bare).is_held(4)


def test_each_client_has_its_own(client: EmbeddedClient) -> None:
    assert client._presence is not None
    looking = client._presence.anew()
    assert looking.is_held(layout.BROKER)
    assert looking.is_held(client.number)
    assert in_fork(lambda _: client.number) != client.number
    assert looking.is_held(client.number), "a child's end does not end its parent's"
    with gcma_shm.connect(client.endpoint) as other:
        number = other.number
        assert looking.is_held(number)
    assert not looking.is_held(number)
    os.kill(client.broker_pid, signal.SIGKILL)
    assert eventually(lambda: not looking.is_held(layout.BROKER))
    looking.close()


def test_a_child_does_not_keep_its_parents() -> None:
    """Not even one for which no record was free, and which is no client: else a parent that nobody sees would be taken for alive
    as long as its child lives.
    """
    with gcma_shm.embedded("4M", clients=4) as client:
        _forks_and_dies(client)


def _forks_and_dies(client: EmbeddedClient) -> None:
    assert client._presence is not None
    looking = client._presence.anew()

    def parent(said: Said) -> None:
        own = gcma_shm.connect(client.endpoint)
        child = os.fork()
        if child == 0:
            signal.pause()
        said.say((own.number, child))
        said.hear()

    with forked(parent) as process:
        number, child = process.receive()
        try:
            assert looking.is_held(number)
            process.kill()
            assert eventually(lambda: not looking.is_held(number))
        finally:
            os.kill(child, signal.SIGKILL)
    looking.close()
    assert eventually(lambda: client.stats()["broker"]["clients"] == 1)


# --- containers: one /dev/shm, two PID namespaces


def _may_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*IN_NAMESPACE, "true"], capture_output=True, check=False).returncode == 0


namespaces = pytest.mark.skipif(not _may_unshare(), reason="this user may not make a PID namespace")


def _connects_and_dies(prefix: list[str], endpoint: str, looking: Callable[[], gcma_shm.Client]) -> None:
    process = subprocess.Popen(
        [*prefix, sys.executable, "-W", "error", "-c", HOLD, endpoint],
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert int(process.stdout.readline()) > layout.BROKER
        with looking() as client:
            assert held(client) == 1 << 20
            assert client.swap(0, 16).load(3) == b"n-gcma--" * (client.page_size // 8)
            process.kill()
            process.wait(WAIT_S)
            assert eventually(lambda: held(client) == 0)
            assert eventually(lambda: client.stats()["broker"]["clients"] == 1)
    finally:
        process.kill()
        process.communicate()


@namespaces
def test_a_client_in_a_namespace_below_the_brokers(client: EmbeddedClient) -> None:
    """The kernel tells the broker by which number it sees it."""

    def looking() -> gcma_shm.Client:
        return client

    _connects_and_dies(IN_NAMESPACE, client.endpoint, looking)


@namespaces
def test_a_client_that_the_broker_does_not_see() -> None:
    """The broker is in the namespace below: the lock alone tells."""
    endpoint = f"ipc://{tempfile.gettempdir()}/below/broker"
    process = subprocess.Popen(
        [*IN_NAMESPACE, *broker_command(endpoint, "--size", "8M")],
        cwd="/",
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert any(line.startswith("endpoint") for line in process.stdout), "it did not start"
        _connects_and_dies([], endpoint, lambda: gcma_shm.connect(endpoint, mapped=True, wait_for_broker=WAIT_S))
        with gcma_shm.connect(endpoint, mapped=True) as client, client.reserve(1 << 20) as reservation:
            reservation.claim().free()
            assert in_fork(lambda _: client.alloc_contig(4096).nbytes) == 4096
            assert eventually(lambda: client.stats()["broker"]["clients"] == 1)
    finally:
        below = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in below:
            os.kill(int(pid), signal.SIGTERM)
        if not below:  # it has not come so far
            process.kill()
        process.communicate(timeout=WAIT_S)


# --- what a dead client was writing


def test_a_dead_writers_claim_is_taken_over_without_a_broker(client: EmbeddedClient) -> None:
    """A store that is written through need not wait for a broker to find out who has died."""
    swap = client.swap(0, 16)
    swap.store(3, b"a-gcma--" * (client.page_size // 8))
    with gcma_shm.connect(client.endpoint, timeout=WAIT_S) as other:
        theirs, number, plane = other.swap(0, 16), 0, other._plane
        other._channel.timeout = 0.2  # of a handle that is made from now on
        impatient = other.swap(0, 16)
        assert plane is not None
        side = plane.geometry.slots_at + layout.SLOT_BYTES * (plane.read(plane.geometry.type_at(0) + 8) + 3) + 8

        def claim(said: Said) -> None:
            said.say(client.number)
            said.hear()

        os.kill(client.broker_pid, signal.SIGKILL)
        with forked(claim) as child:
            number = child.receive()
            before = plane.read(side)
            assert plane.swap_word(side, before, number << 52 | 7 << 32 | before)
            with pytest.raises(gcma_shm.SlotBusy):
                impatient.store(3, b"b-gcma--" * (client.page_size // 8))
            assert theirs.load(3) == b"b-gcma--" * (client.page_size // 8)
            child.kill()
            theirs.store(3, b"c-gcma--" * (client.page_size // 8))
            assert plane.read(side) >> 32 == 0
            plane.write(side, plane.read(side) | layout.BROKER << 52 | 9 << 32)  # and a broker that died at it
            theirs.store(3, b"d-gcma--" * (client.page_size // 8))
        assert theirs.load(3) == b"d-gcma--" * (client.page_size // 8)
