"""Clients that become another program, and children that die before their first instruction: neither keeps anything.

Both are told by the kernel's lock on the client's record, not by the process's end: the process lives on, or has never said who it is.
Stated in docs/usage.md, "When a process ends, or becomes another".
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from gcma_shm.clients.embedded import EmbeddedClient
from tests.client import clients, held
from tests.processes import Said, eventually, forked, running_python

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

PAGE = 4096
SOON_S = 20.0  # a bound, and far below the minute after which a child that never began was given up
ANOTHER = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]


def is_another(pid: int) -> bool:
    return b"-S" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")


# --- exec


def test_a_client_that_becomes_another_program(client: EmbeddedClient) -> None:
    """By exec its session ends, as by its death: the program that it has become has no part in the arena."""
    code = """
        import os, sys
        import gcma_shm
        client = gcma_shm.connect(sys.argv[1])
        buffer = client.alloc_contig(10 * client.page_size, name="theirs")
        view = buffer.view
        claimed = client.reserve(5 * client.page_size).claim()
        client.swap(0, 10).store(1, b"a-gcma--" * (client.page_size // 8))
        client.swap(1, 10, "behind").store(1, b"b-gcma--" * (client.page_size // 8))
        print("ready", flush=True)
        sys.stdin.readline()
        os.execv(sys.argv[2], sys.argv[2:])
    """
    with running_python(code, client.endpoint, *ANOTHER) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert held(client) == 15 * PAGE
        process.stdin.write("\n")
        process.stdin.flush()
        assert eventually(lambda: is_another(process.pid), SOON_S)
        assert eventually(lambda: held(client) == 0, SOON_S)
        assert eventually(lambda: clients(client) == 1, SOON_S)
        assert not client.names()
        assert process.poll() is None, "it lives"
        assert client.swap(0, 10).load(1) == b"a-gcma--" * (PAGE // 8)
        assert client.swap(1, 10, "behind").load(1) == b"b-gcma--" * (PAGE // 8)


def test_a_forked_child_that_becomes_another_program(client: EmbeddedClient) -> None:
    """It had its parent's buffers from the fork to the exec; not longer, and its parent has them still."""
    buffer = client.alloc_contig(10 * PAGE)
    read, write = os.pipe()

    def child(said: Said) -> None:
        said.say(client.number)
        said.hear()
        os.dup2(read, 0)
        os.execv(ANOTHER[0], ANOTHER)

    with forked(child) as running_child:
        assert running_child.receive() != client.number
        assert eventually(lambda: clients(client) == 2, SOON_S)
        running_child.tell()
        assert eventually(lambda: is_another(running_child.pid), SOON_S)
        assert eventually(lambda: clients(client) == 1, SOON_S)
        assert held(client) == 10 * PAGE
        with buffer.view as view:
            view[:] = b"mine" * (10 * PAGE // 4)
        buffer.free()
        assert held(client) == 0, "the child, which lives, has no part in it"
    os.close(read)
    os.close(write)


def test_a_fork_and_exec_without_a_word(client: EmbeddedClient) -> None:
    """What a shell does: the child runs nothing of Python's between the two but what the fork itself brings."""
    buffer = client.alloc_contig(10 * PAGE)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(read, 0)
            os.execv(ANOTHER[0], ANOTHER)
        finally:
            os._exit(127)
    try:
        assert eventually(lambda: is_another(pid), SOON_S)
        buffer.free()
        assert eventually(lambda: held(client) == 0, SOON_S)
        assert eventually(lambda: clients(client) == 1, SOON_S)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)


# --- killed before the first instruction


@pytest.mark.parametrize("parent_lives", [True, False])
def test_a_child_that_is_killed_before_its_first_instruction(parent_lives: bool, client: EmbeddedClient) -> None:
    """Its record says FORKED and no process: what it was to hold is given back all the same, and at once."""
    code = """
        import os, signal, sys
        os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGKILL))  # before the client's own
        import gcma_shm
        client = gcma_shm.connect(sys.argv[1])
        buffer = client.alloc_contig(10 * client.page_size)
        for _ in range(3):
            assert os.waitpid(os.fork(), 0)[1] == signal.SIGKILL
        print("forked", flush=True)
        sys.stdin.readline()
        buffer.free()
        print("freed", flush=True)
        sys.stdin.readline()
    """
    with running_python(code, client.endpoint) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "forked\n"
        if parent_lives:
            assert eventually(lambda: clients(client) == 2, SOON_S)
            assert held(client) == 10 * PAGE
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "freed\n"
        else:
            process.kill()
        assert eventually(lambda: held(client) == 0, SOON_S)
        assert eventually(lambda: clients(client) == (2 if parent_lives else 1), SOON_S)
