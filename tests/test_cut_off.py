"""A broker that ends at a chosen place, or fails there: what the next one, and clients with old knowledge, make of it."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import gcma_shm
from gcma_shm import layout
from gcma_shm.arena import SHM_DIR, remove_dead
from gcma_shm.endpoint import arena_name, default_spill_dir
from gcma_shm.errors import BrokerUnavailable, ProtocolError
from gcma_shm.process import start_time
from tests.client import filled_with
from tests.conftest import Bare
from tests.processes import WAIT_S, broker, broker_command, eventually, forked, stopped
from tests.takeover import AREAS, MIB, held_by_area
from tests.test_sessions import Kept

DIES_AT = """
import os, signal, sys
from gcma_shm.broker import cli
from gcma_shm.broker.{module} import {name}
original = {name}.{method}
def dying(*arguments):
    original(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
{name}.{method} = dying
sys.exit(cli.main(sys.argv[1:]))
"""


@contextlib.contextmanager
def dying_broker(endpoint: str, module: str, name: str, method: str) -> Iterator[subprocess.Popen[bytes]]:
    """A broker that is killed as soon as it has done `method`."""
    _, _, _, *arguments = broker_command(endpoint, "--size", "8M", *AREAS)
    code = DIES_AT.format(module=module, name=name, method=method)
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, cwd="/")
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_what_was_handed_over_comes_though_the_broker_died_before_it_said_so(endpoint: str) -> None:
    """It had written down that the receiver holds it, and the giver held it no more."""
    with dying_broker(endpoint, "service", "Service", "_attach") as first:
        giver = gcma_shm.connect(endpoint, wait_for_broker=WAIT_S)
        buffer = giver.alloc_contig(MIB, area="a")
        buffer.view[:4] = b"sent"
        handle = pickle.dumps(buffer.hand_over(WAIT_S))
        buffer.free()
        giver.close()
        receiver = gcma_shm.connect(endpoint, wait_for_broker=WAIT_S)
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(pickle.loads, handle)
            assert first.wait(WAIT_S) == -signal.SIGKILL
            with broker(endpoint, *AREAS):
                with coming.result(WAIT_S) as came:
                    assert bytes(came.view[:4]) == b"sent"
                assert eventually(lambda: held_by_area(receiver)["a"] == 0)
                receiver.close()


def test_a_claim_whose_handle_expired_with_the_broker(endpoint: str) -> None:
    with dying_broker(endpoint, "allocations", "Allocations", "_end_hand_over") as first:
        client = gcma_shm.connect(endpoint, wait_for_broker=WAIT_S)
        reservation = client.reserve(MIB, area="b")
        claimed = reservation.claim()
        claimed.hand_over(0.5)
        with ThreadPoolExecutor(1) as pool:
            freed = pool.submit(claimed.free)  # of the next broker, should the handle's time be over already
            assert first.wait(WAIT_S) == -signal.SIGKILL
            with broker(endpoint, *AREAS):
                freed.result(WAIT_S)
                reservation.claim(timeout=WAIT_S).free()
                client.close()


def test_a_shared_claim_that_was_freed_without_a_broker(endpoint: str) -> None:
    """Shared by a fork whose child got no record, so no bits tell of it; and the message that freed it was lost."""
    with broker(endpoint, *AREAS, "--clients", "3") as first:
        client = gcma_shm.connect(endpoint, timeout=WAIT_S)
        reservation = client.reserve(MIB, area="b")
        claimed = reservation.claim()
        with gcma_shm.connect(endpoint), forked(lambda _: None) as child:  # no record is free
            child.receive()
            child.wait()
        with stopped(first.pid):
            client._channel.timeout = 0.5  # of what is not answered
            with pytest.raises(BrokerUnavailable):
                claimed.free()
            client._channel.timeout = WAIT_S
            os.kill(first.pid, signal.SIGKILL)
        first.stop(signal.SIGKILL)
        with broker(endpoint, *AREAS, "--clients", "3"):
            client.alloc_contig(4096).free()
            reservation.claim(timeout=WAIT_S).free()
            client.close()


def test_tickets_of_two_brokers_are_not_taken_for_each_other(endpoint: str) -> None:
    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint) as client, ThreadPoolExecutor(2) as pool:
        everything = client.alloc_contig(4 * MIB, area="a")
        other = gcma_shm.connect(endpoint, wait_for_broker=WAIT_S)
        early = pool.submit(other.alloc_contig, MIB, area="a", timeout=WAIT_S)
        assert eventually(lambda: client.stats()["broker"]["in_line"] == 1)
        first.stop(signal.SIGKILL)
        with broker(endpoint, *AREAS):
            late = pool.submit(other.alloc_contig, MIB // 2, area="a", timeout=WAIT_S)
            assert eventually(lambda: client.stats()["broker"]["in_line"] == 2)
            everything.free()
            sizes = [waiting.result(WAIT_S).nbytes for waiting in (early, late)]
            assert sizes == [MIB, MIB // 2]
            other.close()


def test_a_number_used_again_in_the_same_process_is_another_client(kept: Kept) -> None:
    first = kept.hello(b"a")
    generation = kept.sessions.generation(first)
    kept.end(first)
    second = kept.hello(b"b")
    assert second.number == first.number
    me, began = os.getpid(), start_time(os.getpid()) or 0
    with pytest.raises(ProtocolError, match="not process"):
        kept.sessions.hello(b"c", me, began, True, first.number, generation=generation)
    again = kept.sessions.hello(b"c", me, began, True, first.number, generation=generation + 1)
    assert again is second
    kept.sessions.close()


def test_a_number_whose_lock_somebody_keeps_is_passed_over(kept: Kept, bare: Bare) -> None:
    assert bare.arena.presence is not None
    keeper = bare.arena.presence.anew()
    keeper.take(layout.BROKER + 1)
    first = kept.hello(b"a")
    assert first.number == layout.BROKER + 2
    keeper.close()
    assert kept.hello(b"b").number == layout.BROKER + 1
    kept.sessions.close()


@pytest.fixture
def kept(bare: Bare) -> Kept:
    return Kept(bare)


# --- what fails is left to the next


def test_a_broker_that_fails_leaves_all_to_the_next(endpoint: str) -> None:
    """Not as one that was told to stop: its types live, its buffers are held, its arena is there."""
    code = DIES_AT.format(module="server", name="Server", method="_look").replace(
        "os.kill(os.getpid(), signal.SIGKILL)", "os.path.exists(sys.argv[0]) or 1 / 0"
    )
    code = code.replace(
        "os.path.exists(sys.argv[0])", f"not os.path.exists({str(Path(tempfile.gettempdir(), 'fail'))!r})"
    )
    _, _, _, *arguments = broker_command(endpoint, "--size", "8M", *AREAS)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/"
    )
    try:
        client = gcma_shm.connect(endpoint, wait_for_broker=WAIT_S)
        swap, buffer = client.swap(0, 10), client.alloc_contig(MIB, area="a")
        swap.store(1, filled_with(1))
        Path(tempfile.gettempdir(), "fail").touch()
        _, words = process.communicate(timeout=WAIT_S)
        assert b"ZeroDivisionError" in words
        assert process.returncode not in (0, -signal.SIGKILL)
        Path(tempfile.gettempdir(), "fail").unlink()
        assert swap.load(1) == filled_with(1)
        with broker(endpoint, *AREAS):
            assert held_by_area(client)["a"] == MIB
            assert swap.load(1) == filled_with(1)
            swap.store(2, filled_with(2))
            buffer.free()
            client.close()
    finally:
        process.kill()
        process.communicate()


def test_a_successor_without_descriptors_ends_no_type(endpoint: str) -> None:
    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint, wait_for_broker=WAIT_S) as client:
        swaps = [client.swap(n, 4) for n in range(60)]
        for n, swap in enumerate(swaps):
            swap.store(0, filled_with(n))
        first.stop(signal.SIGKILL)
        done = subprocess.run(
            ["prlimit", "--nofile=50:50", *broker_command(endpoint, "--size", "8M", *AREAS)],
            capture_output=True,
            cwd="/",
            check=False,
            timeout=WAIT_S,
        )
        assert done.returncode == 1, done.stderr
        assert len(list(default_spill_dir(endpoint).iterdir())) == len(swaps)
        with broker(endpoint, *AREAS):
            assert [swap.load(0) for swap in swaps] == [filled_with(n) for n in range(60)]


def test_a_header_that_names_another_directory(endpoint: str, tmp_path: Path) -> None:
    """Whatever a client has written there: nothing of it is removed."""
    precious = tmp_path / "precious"
    precious.mkdir(mode=0o700)
    (precious / "file").write_bytes(b"mine")
    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint) as client:
        client.swap(0, 10).store(1, filled_with(1))
        first.stop(signal.SIGKILL)
        path = SHM_DIR / arena_name(endpoint).removeprefix("/")
        with path.open("r+b") as arena:
            arena.seek(layout.SPILL_DIR_AT)
            arena.write(os.fsencode(precious) + b"\0")
        with pytest.raises(AssertionError, match="where the spill files are"), broker(endpoint, *AREAS):
            pass
        assert (precious / "file").read_bytes() == b"mine"
        remove_dead(arena_name(endpoint))
