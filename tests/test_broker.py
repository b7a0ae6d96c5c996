"""The command `gcma broker` as an operator runs it: what it prints, how it ends, what it refuses, what it leaves behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

import gcma_shm
from gcma_shm import arena as arenas
from gcma_shm import layout, messages
from gcma_shm.arena import remove_dead
from gcma_shm.endpoint import arena_name, default_spill_dir, socket_path
from gcma_shm.errors import ArenaError, BrokerUnavailable, Closed
from gcma_shm.process import start_time
from tests.patience import impatient
from tests.processes import WAIT_S, broker, broker_command, descriptors, eventually, stopped


@pytest.fixture
def endpoint() -> str:
    return f"ipc://{os.environ['XDG_RUNTIME_DIR']}/b"


def is_gone(endpoint: str) -> bool:
    return not (
        (arenas.SHM_DIR / arena_name(endpoint)[1:]).exists()
        or socket_path(endpoint).exists()
        or default_spill_dir(endpoint).exists()
    )


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(arguments), capture_output=True, text=True, timeout=WAIT_S, check=False, cwd="/")


def test_it_says_what_it_serves(endpoint: str, tmp_path: Path) -> None:
    options = [
        "--area",
        "frames=2M",
        "--area",
        "batches=1M",
        "--slots",
        "3000",
        "--spill-dir",
        str(tmp_path),
        "--clients",
        "20",
    ]
    with broker(endpoint, *options) as running:
        said = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in running.description.splitlines())
        assert said["area frames"] == "2 MiB"
        assert said["area batches"] == "1 MiB"
        assert said["slots"].startswith("3000, 46.9 KiB (")
        assert re.search(r"\(0\.\d+% of the arena\)", said["slots"])
        assert re.search(r"KiB \(\d\.\d+% of the arena\), for 20 clients", said["descriptors"])
        assert re.match(r"4\.\d MiB", said["nursery"])
        assert said["arena"].startswith(arena_name(endpoint))
        assert said["spill files"].startswith(str(tmp_path.resolve()))
        assert said["endpoint"] == endpoint
        with gcma_shm.connect(endpoint) as client:
            assert [(area.name, area.size) for area in client.areas()] == [("frames", 2 << 20), ("batches", 1 << 20)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly_with_everything_in_use(endpoint: str, number: signal.Signals) -> None:
    with broker(endpoint) as running:
        client = gcma_shm.connect(endpoint, timeout=WAIT_S)
        swaps = [client.swap(0, 100), client.swap(1, 100, "behind")]
        for swap in swaps:
            for n in range(100):
                swap.store(n, (bytes([n + 1]) + b"-gcma--") * 512)
        buffer = client.alloc_contig(1 << 20)
        view = buffer.view
        view[:5] = b"mine."
        assert not is_gone(endpoint)
        assert running.stop(number) == 0
        assert is_gone(endpoint)
        for swap in swaps:
            with pytest.raises(Closed):
                swap.store(1, b"x-gcma--" * 512)
            with pytest.raises(Closed):
                swap.load(1)
        assert bytes(view[:5]) == b"mine.", "what is mapped stays mapped"
        view.release()
        with impatient(client), pytest.raises(BrokerUnavailable):
            client.areas()
        client.close()
        assert running.process.stderr is not None
        assert number.name in running.process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_as_soon_as_it_serves(endpoint: str, number: signal.Signals) -> None:
    """An operator's script may stop what it has just started: the signal comes while the description is printed."""
    code = (
        "import os, sys\n"
        "from gcma_shm.broker.process import Settings, run\n"
        f"run(Settings({endpoint!r}, 4 << 20), lambda description: os.kill(os.getpid(), {int(number)}))\n"
    )
    done = run(sys.executable, "-c", code)
    gone = is_gone(endpoint)
    if not gone:  # for the tests after this one: the next broker of this name removes what the dead one left
        with broker(endpoint):
            pass
    assert gone, "it left its arena, socket or spill files"
    assert done.returncode == 0, done.stderr


def test_a_second_broker_is_refused_and_the_first_undisturbed(endpoint: str) -> None:
    with broker(endpoint) as running, gcma_shm.connect(endpoint) as client:
        swap = client.swap(0, 10)
        swap.store(1, b"a-gcma--" * 512)
        refused = run(*broker_command(endpoint, "--size", "4M"))
        assert refused.returncode == 1
        assert "another broker" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert refused.stdout == ""
        assert swap.load(1) == b"a-gcma--" * 512
        swap.store(2, b"b-gcma--" * 512)
        swap.sync()
        assert client.alloc_contig(1 << 20).nbytes == 1 << 20
        with gcma_shm.connect(endpoint) as another:
            assert another.swap(0, 10).load(2) == b"b-gcma--" * 512
        assert running.process.poll() is None
    assert is_gone(endpoint)


def test_a_second_broker_on_the_same_socket_written_otherwise(endpoint: str) -> None:
    other = endpoint.replace("/b", "/./b")
    assert socket_path(other) == socket_path(endpoint)
    with broker(endpoint, size="4M"), gcma_shm.connect(endpoint) as client:
        second = subprocess.Popen(
            broker_command(other, "--size", "4M"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert second.stdout is not None
        serves = second.stdout.readline()
        second.terminate()
        second.communicate()
        assert not serves, "a second broker took the first one's socket"
        assert client.stats()
        gcma_shm.connect(endpoint, timeout=WAIT_S).close()


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ([], 2, "--size"),
        (["--size", "nonsense"], 2, "not a size"),
        (["--size", "0"], 2, "not a size"),
        (["--size", "4M", "--area", "frames"], 2, "NAME=SIZE"),
        (["--size", "4M", "--area", "a=1M", "--area", "a=1M"], 2, "once"),
        (["--size", "4M", "--area", "a=much"], 2, "not a size"),
        (["--size", "4M", "--area", "a=8M"], 1, "make it about"),
        (["--size", "4M", "--page-size", "5000"], 1, "power of two"),
        (["--size", "4M", "--page-size", "4M"], 1, "power of two"),
        (["--size", "64K"], 1, "too small"),
        (["--size", "4M", "--slots", "0"], 1, "slots"),
        (["--size", "4M", "--slots", "many"], 2, "slots"),
        (["--size", "4M", "--clients", "1"], 1, "clients"),
        (["--size", "8T"], 1, "too little shared memory"),
        (["--size", "4M", "--endpoint", "nonsense"], 1, "ipc://"),
        (["--size", "4M", "--endpoint", "ipc:///" + "x" * 120], 1, "at most"),
        (["--size", "4M", "--spill-dir", "/dev/shm/here"], 1, "shared memory"),
        (["--size", "4M", "--spill-dir", "/proc/here"], 1, "/proc/here"),
        (["--size", "4M", "--log-level", "loud"], 2, "loud"),
        (["--size", "4M", "--colour", "red"], 2, "colour"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_arguments(endpoint: str, options: list[str], status: int, words: str) -> None:
    refused = run(*broker_command(endpoint, *options))
    assert refused.returncode == status
    assert words in refused.stderr
    assert "Traceback" not in refused.stderr
    assert refused.stdout == ""
    assert is_gone(endpoint)
    assert not Path("/dev/shm/here").exists()


def test_an_endpoint_in_a_directory_of_others(endpoint: str) -> None:
    shared = socket_path(endpoint).parent / "shared"
    shared.mkdir(mode=0o755)
    shared.chmod(0o755)
    refused = run(*broker_command(f"ipc://{shared}/b", "--size", "4M"))
    assert refused.returncode == 1
    assert "chmod 700" in refused.stderr
    assert list(shared.iterdir()) == []


def test_a_missing_directory_of_the_endpoint_is_made_and_removed() -> None:
    parent = Path(os.environ["XDG_RUNTIME_DIR"]) / "new" / "newer"
    with broker(f"ipc://{parent}/b", size="4M"):
        assert parent.stat().st_mode & 0o777 == 0o700
    assert not parent.exists()


def test_the_default_endpoint_is_the_clients_default() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gcma_shm.broker.cli", "broker", "--size", "4M"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        with gcma_shm.connect(wait_for_broker=WAIT_S) as client:
            assert client.endpoint == f"ipc://{os.environ['XDG_RUNTIME_DIR']}/gcma/default"
            assert client.mapped
    finally:
        process.terminate()
        process.communicate(timeout=WAIT_S)
    assert process.returncode == 0


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "messages"])
def test_an_old_handle_never_reaches_another_arenas_type(endpoint: str, mapped: bool) -> None:
    """Lives are counted per arena, so the same type may live the same life there: an old handle must not take it for its own."""
    with broker(endpoint) as first:
        client = gcma_shm.connect(endpoint, mapped=mapped, timeout=WAIT_S)
        old = client.swap(0, 10)
        old.store(1, b"a-gcma--" * 512)
        first.stop(signal.SIGKILL)
        remove_dead(arena_name(endpoint))
        with broker(endpoint), gcma_shm.connect(endpoint) as stranger:
            theirs = stranger.swap(0, 10)
            theirs.store(1, b"b-gcma--" * 512)
            calls: list[Callable[[], object]] = [
                lambda: old.load(1),
                lambda: old.store(1, b"c-gcma--" * 512),
                lambda: old.invalidate_page(1),
                old.invalidate_area,
            ]
            for call in calls:
                with pytest.raises(Closed):
                    call()
            assert theirs.load(1) == b"b-gcma--" * 512
            client.close()


def test_a_client_of_another_broker_than_now_serves(endpoint: str) -> None:
    """It maps the arena of the dead one: nothing of the new one may be done with it, and it can be closed."""
    with broker(endpoint) as first:
        client = gcma_shm.connect(endpoint, timeout=WAIT_S)
        first.stop(signal.SIGKILL)
        remove_dead(arena_name(endpoint))
        with broker(endpoint), gcma_shm.connect(endpoint) as stranger:
            with pytest.raises((Closed, BrokerUnavailable)):
                client.swap(0, 10)
            with pytest.raises((Closed, BrokerUnavailable)):
                client.alloc_contig(4096)
            for call in (client.areas, client.quota, lambda: client.drain_area("default")):
                with pytest.raises((Closed, BrokerUnavailable)):
                    call()
            client.close()
            assert sum(area.held for area in stranger.areas()) == 0
            assert not any(area.drained for area in stranger.areas())


def test_a_client_of_a_dead_broker_is_told_and_can_close(endpoint: str) -> None:
    with broker(endpoint) as first:
        client = gcma_shm.connect(endpoint, timeout=WAIT_S)
        buffer = client.alloc_contig(4096)
        first.stop(signal.SIGKILL)
        with impatient(client):
            with pytest.raises(BrokerUnavailable, match="no answer"):
                client.areas()
            with pytest.raises(BrokerUnavailable):
                buffer.free()
        client.close()
        with pytest.raises(BrokerUnavailable):
            gcma_shm.connect(endpoint, timeout=0.3)
        with broker(endpoint):
            pass


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_close_waits_for_no_broker_that_has_ended(number: signal.Signals, mapped: bool, endpoint: str) -> None:
    with broker(endpoint) as first:
        clients = [gcma_shm.connect(endpoint, mapped=mapped, timeout=3600) for _ in range(2)]
        first.stop(number)
        for client in clients:  # the second one's socket knows by then
            client.close()
    if number == signal.SIGKILL:
        with broker(endpoint):
            pass


def test_close_waits_for_a_broker_that_is_stopped(endpoint: str) -> None:
    """It has not ended: it is told."""
    with broker(endpoint) as first:
        client = gcma_shm.connect(endpoint, timeout=WAIT_S)
        with stopped(first.pid), ThreadPoolExecutor(1) as threads:
            closing = threads.submit(client.close)
            assert not closing.done()
            os.kill(first.pid, signal.SIGCONT)
            closing.result(WAIT_S)
        with gcma_shm.connect(endpoint) as other:
            assert other.stats()["broker"]["clients"] == 1


def test_nobody_listens(endpoint: str) -> None:
    with pytest.raises(BrokerUnavailable, match="gcma broker"):
        gcma_shm.connect(endpoint)
    with pytest.raises(BrokerUnavailable):
        gcma_shm.connect(endpoint, wait_for_broker=0.1, timeout=0.1)


# --- peers that nobody trusts


class Peer:
    """A peer that speaks the wire's own language, and may lie."""

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint)

    def send(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def receive(self) -> list[Any]:
        assert self._socket.poll(int(WAIT_S * 1000)), "the broker does not answer"
        header = msgpack.unpackb(self._socket.recv_multipart()[0])
        assert isinstance(header, list)
        return header

    def ask(self, number: int, operation: str, parameters: dict[str, Any], *pages: bytes) -> list[Any]:
        packed = msgpack.packb([messages.VERSION, number, operation, parameters])
        assert packed is not None
        self.send(packed, *pages)
        while (reply := self.receive())[1] != number:  # an answer to something else that it sent
            pass
        return reply

    def hello(self, **change: Any) -> list[Any]:
        pid = os.getpid()
        return self.ask(1, "hello", {"pid": pid, "start": start_time(pid), "mapped": False} | change)

    def close(self) -> None:
        self._socket.close()
        self._context.term()


def test_no_message_ends_the_broker(endpoint: str) -> None:
    with broker(endpoint) as running:
        liar = Peer(endpoint)
        for junk in (
            [b""],
            [b"junk"],
            [b"\xc1"],
            [b"", b"", b""],
            [bytes(70_000)],
            [b"\x91" * 60_000],
            [msgpack.packb([1, 2])],
        ):
            liar.send(*junk)
        for change in (
            {"pid": 2**31},
            {"pid": 2**31 - 1},
            {"pid": 1},
            {"start": 2**63 - 1},
            {"client": 4095},
            {"client": 2},
            {"buffers": [2**63 - 1, 0]},
            {"buffers": list(range(9000))},
            {"mapped": 1},
        ):
            status = liar.hello(**change)[2]
            if status == "ok":
                assert liar.ask(2, "bye", {})[2] == "ok"
            else:
                assert status in ("ProtocolError", "IndexError", "ArenaError", "GcmaError"), f"{change}: {status}"
            assert running.process.poll() is None
        assert liar.ask(3, "ping", {})[1:3] == [3, "HelloNeeded"]
        assert liar.hello(mapped=True)[2] == "ok"
        for number, operation, parameters, pages, status in (
            (10, "nonsense", {}, [], "ProtocolError"),
            (11, "load", {"type": 0, "life": 1, "offset": 0}, [], "NoSuchType"),
            (12, "store", {"type": 0, "life": 1, "offset": 0}, [b"short"], "ProtocolError"),
            (13, "free_contig", {"buffer": 2**63 - 1}, [], "NoSuchBuffer"),
            (14, "alloc_contig", {"nbytes": 2**62}, [], "ArenaExhausted"),
            (15, "alloc_contig", {"nbytes": 1, "area": "nowhere"}, [], "NoSuchArea"),
            (16, "alloc_contig", {"nbytes": 1, "area": "default", "offset": 2**62}, [], "ValueError"),
            (17, "alloc_contig", {"nbytes": 1, "align": 2**62 - 1}, [], "ValueError"),
            (18, "swap_init", {"type": 0, "slots": 2**40, "write": "through"}, [], "ValueError"),
            (19, "invalidate_area", {"type": 0, "life": 5}, [], "NoSuchType"),
            (20, "swap_init", {"type": 0, "slots": 10, "write": "through"}, [], "ok"),
            (21, "load", {"type": 0, "life": 1, "offset": 10}, [], "IndexError"),
            (22, "store", {"type": 0, "life": 1, "offset": 2**40}, [b"x" * 4096], "IndexError"),
            (23, "load", {"type": 0, "life": 2**63 - 1, "offset": 0}, [], "Closed"),
            (24, "sync", {"type": 0, "life": 1, "timeout_ms": 2**40}, [], "ok"),
            (25, "hello", {"pid": 1, "start": 0, "mapped": True}, [], "ProtocolError"),
            (2**63 - 1, "ping", {}, [], "ok"),
        ):
            assert liar.ask(number, operation, parameters, *pages)[1:3] == [number, status]
        liar.send(b"x" * (1 << 20))  # larger than any message may be: the connection is cut
        liar.close()
        with gcma_shm.connect(endpoint) as client:
            client.alloc_contig(4096).free()
        assert running.stop() == 0


def test_a_peer_that_asks_and_never_reads_harms_nobody_else(endpoint: str) -> None:
    with broker(endpoint), gcma_shm.connect(endpoint) as client:
        deaf = Peer(endpoint)
        assert deaf.hello()[2] == "ok"
        request = msgpack.packb([messages.VERSION, 5, "stats", {}])
        assert request is not None
        sent = 0
        while sent < 3000:
            try:
                deaf._socket.send(request, zmq.NOBLOCK)
            except zmq.Again:
                break
            sent += 1
        for _ in range(20):
            client.areas()
        deaf.close()


def test_a_session_that_vanishes_with_its_process_is_counted_out(endpoint: str) -> None:
    with broker(endpoint, "--clients", "4"), gcma_shm.connect(endpoint) as client:
        code = f"import gcma_shm, os; c = gcma_shm.connect({endpoint!r}, mapped=False); c.areas(); os._exit(0)"
        for _ in range(6):  # more than there are records
            assert run(sys.executable, "-c", code).returncode == 0
        assert eventually(lambda: client.stats()["broker"]["clients"] == 1)


def test_no_descriptor_of_the_broker_is_inherited_or_leaked(endpoint: str) -> None:
    with broker(endpoint) as running:
        with gcma_shm.connect(endpoint) as client:
            client.swap(0, 10).invalidate_area()
        before = descriptors(running.pid)
        for _ in range(20):
            with gcma_shm.connect(endpoint) as client:
                swap = client.swap(0, 10)
                swap.store(1, b"x-gcma--" * 512)
                client.swap(1, 10, "behind").store(1, b"x-gcma--" * 512)
                client.alloc_contig(4096)
                swap.invalidate_area()
                client.swap(1, 10, "behind").invalidate_area()
        assert eventually(lambda: descriptors(running.pid) <= before + 4)  # one spill file per type may stay open


def test_the_layouts_words_of_a_running_broker(endpoint: str) -> None:
    with broker(endpoint) as running:
        arena = arenas.open_arena(arena_name(endpoint))
        words = memoryview(arena.memory).cast("Q")
        assert words[layout.BROKER_PID_AT // 8] == running.pid
        assert words[layout.BROKER_START_AT // 8] == start_time(running.pid)
        assert words[layout.EPOCH_AT // 8] >= 1
        assert words[layout.STOPPED_AT // 8] == 0
        with pytest.raises(ArenaError, match="another broker"):
            arenas.create(arena.name, arena.geometry, arena.areas)
        assert running.stop() == 0
        assert words[layout.STOPPED_AT // 8] == 1
        words.release()
