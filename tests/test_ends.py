"""How a client may leave without a word, and what that leaves: by any kind of exit, by a lost socket, by a program that it starts.

Stated in docs/usage.md, "When a process ends, or becomes another".
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

import gcma_shm
from gcma_shm import BrokerUnavailable, Client
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.endpoint import arena_name, socket_path
from tests.client import clients, held, reserved
from tests.invariants import check_at_rest
from tests.processes import WAIT_S, Said, eventually, in_fork, start_python, stopped

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

T = TypeVar("T")
PAGE = 4096
ABRUPT = """
import os, sys, threading
import gcma_shm
client = gcma_shm.connect(sys.argv[1])
page = lambda n: (bytes([n]) + b'-gcma--') * (client.page_size // 8)
buffer = client.alloc_contig(10 * client.page_size, name="theirs")
view = buffer.view
reservation = client.reserve(5 * client.page_size)
claimed = reservation.claim()
through, behind = client.swap(0, 100), client.swap(1, 100, "behind")
for n in range(1, 20):
    through.store(n, page(n))
    behind.store(n, page(n))
def store_on():
    while True:
        behind.store_many(range(50, 60), page(7) * 10)
thread = threading.Thread(target=store_on, daemon=True)
thread.start()
print("ready", flush=True)
input()
exec(sys.argv[2])
"""


# --- exits without close


@pytest.mark.parametrize(
    ("last_words", "status"),
    [
        ("pass", 0),
        ("sys.exit(3)", 3),
        ("raise RuntimeError", 1),
        ("os._exit(4)", 4),
        ("os.kill(os.getpid(), 15)", -signal.SIGTERM),
        ("os.abort()", -signal.SIGABRT),
        ("client._channel.drop(); os._exit(5)", 5),  # the socket first, the process later
    ],
)
def test_an_exit_without_close(last_words: str, status: int, client: EmbeddedClient) -> None:
    """However it ends, with a view, a claim and a thread in the middle of batches: all that it had is back, what it stored is there."""
    process = start_python(ABRUPT, client.endpoint, last_words)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        assert clients(client) == 2
        assert held(client) == 15 * PAGE
        process.communicate("\n", WAIT_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == status
    assert eventually(lambda: clients(client) == 1)
    assert eventually(lambda: held(client) == reserved(client) == 0)
    assert client.names() == []
    with client.alloc_contig(client.areas()[0].largest_free):
        pass
    through, behind = client.swap(0, 100), client.swap(1, 100, "behind")
    for n in range(1, 20):
        assert through.load(n) == behind.load(n) == (bytes([n]) + b"-gcma--") * (PAGE // 8)
    assert {behind.load(n) for n in range(50, 60)} <= {(bytes([7]) + b"-gcma--") * (PAGE // 8), None}
    check_at_rest(arena_name(client.endpoint))


# --- a session that only lost its socket


def connections(endpoint: str) -> set[int]:
    """This process's connections to that broker."""
    path, found = str(socket_path(endpoint)), set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - one descriptor is this loop's own, and gone when it is looked at
        if not os.path.realpath(f"/proc/self/fd/{name}").rpartition("/")[2].startswith("socket:"):
            continue
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as one:
            if one.family == socket.AF_UNIX and one.getpeername() == path:
                found.add(int(name))
    return found


class Cut:
    """A client whose connection can be cut, as a network or a proxy would."""

    def __init__(self, owner: Client, mapped: bool = True) -> None:
        self._others = connections(owner.endpoint)
        self._endpoint = owner.endpoint
        self.client = gcma_shm.connect(owner.endpoint, mapped=mapped, timeout=WAIT_S)

    def cut(self) -> None:
        (mine,) = connections(self._endpoint) - self._others
        with socket.socket(fileno=os.dup(mine)) as one:
            one.shutdown(socket.SHUT_RDWR)


def patiently(call: Callable[[], T]) -> T:
    """The request that was under way when the connection was lost is lost with it; no other is."""
    with contextlib.suppress(BrokerUnavailable):
        return call()
    return call()


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "messages"])
def test_a_lost_socket(mapped: bool, client: EmbeddedClient) -> None:
    """A client that maps is the same one after it: by number, with its buffers and its reservation. One that sends messages holds
    nothing, and its session ends with the connection; it goes on as another.
    """
    lossy = Cut(client, mapped)
    with lossy.client as other:
        number, swap = other.number, other.swap(0, 10)
        swap.store(1, (bytes([1]) + b"-gcma--") * (PAGE // 8))
        if mapped:
            buffer = other.alloc_contig(10 * PAGE, name="kept")
            with buffer.view as view:
                view[:] = bytes([5]) * 10 * PAGE
            claimed = other.reserve(5 * PAGE, name="reserved").claim()
        for _ in range(3):
            lossy.cut()
            assert clients(client) == 2 or not mapped, "no client less"
            assert held(client) == (15 * PAGE if mapped else 0)
            assert patiently(lambda: swap.load(1)) == (bytes([1]) + b"-gcma--") * (PAGE // 8)
            assert patiently(lambda: other.swap(0, 10)).load(1) == (bytes([1]) + b"-gcma--") * (PAGE // 8)
            assert other.number == number or not mapped
            assert eventually(lambda: clients(client) == 2), "and none more"
        if mapped:
            with buffer.view as view:
                assert bytes(view) == bytes([5]) * 10 * PAGE
            claimed.free()
            buffer.free()
            assert held(client) == 0
            assert reserved(client) == 5 * PAGE
    assert eventually(lambda: clients(client) == 1)


def test_what_was_allocated_by_a_request_that_was_lost_is_given_back(client: EmbeddedClient) -> None:
    lossy = Cut(client)
    with lossy.client as other:
        with stopped(client.broker_pid):
            other._channel.timeout = 0.5
            with pytest.raises(BrokerUnavailable):
                other.alloc_contig(10 * PAGE)
            other._channel.timeout = WAIT_S
            lossy.cut()
        assert patiently(lambda: other.alloc_contig(PAGE).nbytes) == PAGE
        assert eventually(lambda: held(client) == 0)


def test_a_waiter_that_lost_its_socket_keeps_its_place_in_the_line(client: EmbeddedClient) -> None:
    whole = client.areas()[0].largest_free
    lossy = Cut(client)
    with lossy.client as other:
        buffer = client.alloc_contig(whole)
        got: list[int] = []

        def wait() -> None:
            with other.alloc_contig(whole, timeout=WAIT_S) as mine:
                got.append(mine.nbytes)

        thread = threading.Thread(target=wait)
        thread.start()
        assert eventually(lambda: client.stats()["broker"]["in_line"] == 1)
        # Its reply has come too, or a second place would be asked for.
        assert eventually(lambda: client.stats()["broker"]["requests"].get("collect", 0) >= 1)
        lossy.cut()
        patiently(lambda: other.swap(0, 10))  # over a new one
        assert client.stats()["broker"]["in_line"] == 1
        assert not got
        buffer.free()
        thread.join(WAIT_S)
        assert got == [whole]


# --- programs that a client starts


@pytest.mark.parametrize("how", ["subprocess", "posix_spawn"])
def test_a_program_that_a_client_starts_holds_nothing(how: str, client: EmbeddedClient) -> None:
    """It is no client, maps nothing, has no descriptor of the client's, and the client goes on."""
    buffer = client.alloc_contig(10 * PAGE)
    read, write = os.pipe()
    command = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]
    started = None
    if how == "subprocess":
        started = subprocess.Popen(command, stdin=read)
        pid = started.pid
    else:
        pid = os.posix_spawn(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)])
    os.close(read)
    try:
        assert eventually(lambda: b"-S" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
        assert "gcma-" not in Path(f"/proc/{pid}/maps").read_text()
        targets = []
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it begins still, and reads what it imports
                targets.append(str(path.readlink()))
        assert not [target for target in targets if "gcma" in target or "socket:" in target or "pidfd" in target]
        assert clients(client) == 1
        buffer.free()
        assert held(client) == 0
        with client.alloc_contig(PAGE) as mine, mine.view as view:
            view[:] = bytes([1]) * PAGE
    finally:
        os.close(write)
        assert (started.wait() if started is not None else os.waitpid(pid, 0)[1]) == 0


# --- a fork in the middle of a batch by message


def test_a_fork_in_the_middle_of_a_batch_by_message(client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork waits for the batch, its client's timeout long; then the child has a socket of its own, and the batch its error."""
    # And for as long on top of it as it may take here to notice that the time is over.
    monkeypatch.setattr("gcma_shm.clients.forks.PROBE_S", WAIT_S / 2)
    with gcma_shm.connect(client.endpoint, mapped=False, timeout=WAIT_S) as other:
        swap = other.swap(0, 100)
        swap.store(1, (bytes([1]) + b"-gcma--") * (PAGE // 8))
        failed: list[BaseException] = []

        def load() -> None:
            try:
                swap.load_many(range(100), bytearray(100 * PAGE))
            except BrokerUnavailable as error:
                failed.append(error)

        def child(said: Said) -> tuple[bytes | None, int]:
            os.kill(client.broker_pid, signal.SIGCONT)
            other._channel.timeout = WAIT_S
            return swap.load(1), len(other.areas())

        thread = threading.Thread(target=load)
        with stopped(client.broker_pid):
            other._channel.timeout = 0.5
            thread.start()
            assert eventually(other._channel.lock.locked)
            assert in_fork(child) == ((bytes([1]) + b"-gcma--") * (PAGE // 8), 1)
            thread.join(WAIT_S)
        assert len(failed) == 1
        other._channel.timeout = WAIT_S
        assert swap.load(1) == (bytes([1]) + b"-gcma--") * (PAGE // 8)
        assert eventually(lambda: clients(client) == 2)


def test_children_that_become_other_programs_by_preexec_fn(client: EmbeddedClient) -> None:
    """Between fork and exec they are clients, whose descriptors are closed: nothing of ours is to mind."""
    for _ in range(60):
        done = subprocess.run(
            ["/bin/echo", "1"],
            preexec_fn=lambda: None,
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, b"1\n"), done.stderr
    assert eventually(lambda: client.stats()["broker"]["clients"] == 1)


BUSY = """
import sys, threading
import gcma_shm
client = gcma_shm.connect(sys.argv[1], timeout=2 * float(sys.argv[2]))
print("connected", flush=True)
sys.stdin.readline()
threading.Thread(target=client.stats, daemon=True).start()
while not client._channel.lock.locked():
    pass
print("asking", flush=True)
"""


def test_a_daemon_thread_that_waits_for_the_broker_keeps_nobody_from_leaving(client: EmbeddedClient) -> None:
    program = start_python(BUSY, client.endpoint, str(WAIT_S))
    assert program.stdin is not None
    assert program.stdout is not None
    try:
        assert program.stdout.readline() == "connected\n"
        with stopped(client.broker_pid):
            assert program.communicate("go\n", timeout=WAIT_S)[0] == "asking\n"
            assert program.returncode == 0
    finally:
        program.kill()
        program.communicate()
