"""The number of a process that has died, used again at once by one that lives: nobody takes the second for the first.

clone3 makes a process with the very number that another just had (set_tid needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE; who has neither
runs these tests in a user and PID namespace). The broker is stopped meanwhile, so that it hears of nothing in between.
Stated in docs/usage.md, "When a process ends, or becomes another".
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.process import open_pidfd, start_time
from tests.client import held
from tests.processes import eventually, running_python, stopped

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

PAGE = 4096
SYS_CLONE3 = 435


def pids(client: EmbeddedClient) -> set[int]:
    """Whose the client records are, the broker's own left out, and nobody's."""
    return {one["pid"] for one in client.stats()["clients"].values()} - {client.broker_pid, 0}


def clone_as(pid: int) -> int:
    """A fork whose child has that number; called by ctypes without giving up the interpreter's lock, so the child has it, too."""
    number = (ctypes.c_int * 1)(pid)
    arguments = struct.pack("<11Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(number), 1, 0)
    found: int = ctypes.PyDLL(None, use_errno=True).syscall(
        ctypes.c_long(SYS_CLONE3), ctypes.c_char_p(arguments), ctypes.c_size_t(len(arguments))
    )
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


class Successor:
    """A Python process under the number that another had."""

    def __init__(self, pid: int, code: str, *arguments: str) -> None:
        command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments]
        hear, say = os.pipe(), os.pipe()
        self.pid = clone_as(pid)
        if self.pid == 0:
            try:
                os.dup2(hear[0], 0)
                os.dup2(say[1], 1)
                os.execv(command[0], command)
            finally:
                os._exit(127)
        os.close(hear[0])
        os.close(say[1])
        self.stdin: IO[str] = os.fdopen(hear[1], "w")
        self.stdout: IO[str] = os.fdopen(say[0])

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.stdin.close()
        self.stdout.close()


@contextlib.contextmanager
def successor(pid: int, code: str, *arguments: str) -> Iterator[Successor]:
    made = Successor(pid, code, *arguments)
    try:
        yield made
    finally:
        made.end()


def line(process: subprocess.Popen[str] | Successor) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str] | Successor) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def may_choose() -> bool:
    """Whether this process may say what number a process gets."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    try:
        made = clone_as(child)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOSYS):
            return False
        raise
    if made == 0:
        os._exit(0)
    os.waitpid(made, 0)
    return True


MAY_CHOOSE = may_choose()
NAMESPACE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
chosen = pytest.mark.skipif(not MAY_CHOOSE, reason="in a namespace of its own: the test below")


@chosen
def test_who_has_a_number() -> None:
    """A pidfd and the start time tell one process of that number from the next."""
    with running_python("print(1, flush=True); input()") as process:
        line(process)
        start = start_time(process.pid)
        assert start is not None
        pidfd = open_pidfd(process.pid, start)
        assert pidfd is not None
        process.kill()
        process.wait()
        with successor(process.pid, "print(2, flush=True); input()") as other:
            assert line(other) == "2"
            assert other.pid == process.pid
            assert open_pidfd(process.pid, start) is None
            with pytest.raises(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, 0)
            later = start_time(other.pid)
            assert later is not None
            assert later > start
            found = open_pidfd(other.pid, later)
            assert found is not None
            os.close(found)
        os.close(pidfd)


CONNECT = """
    import sys
    import gcma_shm
    client = gcma_shm.connect(sys.argv[1], timeout=60)
    buffer = client.alloc_contig(int(sys.argv[2]) * client.page_size)
    print(client.number, flush=True)
    input()
"""


@chosen
def test_a_client_whose_number_another_process_has(client: EmbeddedClient) -> None:
    """What the dead one held is back, though a process of its number lives; and with `hello` that one becomes a client of its own."""
    with running_python(CONNECT, client.endpoint, "10") as process:
        line(process)
        assert held(client) == 10 * PAGE
        with stopped(client.broker_pid):
            process.kill()
            process.wait()
            other = Successor(process.pid, "print(flush=True); input()")
            line(other)
        try:
            assert eventually(lambda: held(client) == 0)
            assert eventually(lambda: pids(client) == {os.getpid()})
        finally:
            other.end()
    with running_python(CONNECT, client.endpoint, "10") as process:
        line(process)
        with stopped(client.broker_pid):
            process.kill()
            process.wait()
            other = Successor(process.pid, CONNECT, client.endpoint, "3")
        try:
            line(other)
            assert eventually(lambda: held(client) == 3 * PAGE)
            assert eventually(lambda: pids(client) == {os.getpid(), other.pid})
        finally:
            other.end()
        assert eventually(lambda: held(client) == 0)


FORKS = """
    import os, signal, sys
    import gcma_shm
    client = gcma_shm.connect(sys.argv[1], timeout=60)
    buffer = client.alloc_contig(10 * client.page_size)
    print(client.number, flush=True)
    input()
    pid = os.fork()
    if pid == 0:
        os.write(1, b"child\\n")
        signal.pause()
    os.write(1, b"%d\\n" % pid)  # each in one piece: `print` may write the line's end by itself, behind the other's words
    input()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print("reaped", flush=True)
    input()
    buffer.free()
    print("freed", flush=True)
    input()
"""


@chosen
def test_a_forked_child_whose_number_another_process_has(client: EmbeddedClient) -> None:
    """The broker first looks at the child's record when the child is dead and its number another's: its part in the buffer is over."""
    with running_python(FORKS, client.endpoint) as process:
        line(process)
        with stopped(client.broker_pid):
            tell(process)
            said = {line(process), line(process)}  # in either order
            assert "child" in said
            (pid,) = (int(word) for word in said - {"child"})
            tell(process)
            assert line(process) == "reaped"
            other = Successor(pid, "print(flush=True); input()")
            line(other)
        try:
            assert held(client) == 10 * PAGE
            tell(process)
            assert line(process) == "freed"
            assert eventually(lambda: held(client) == 0)
            assert eventually(lambda: pids(client) == {os.getpid(), process.pid})
        finally:
            other.end()


@pytest.mark.skipif(MAY_CHOOSE, reason="the tests above need no namespace")
def test_in_a_namespace_of_its_own(tmp_path: Path) -> None:
    if subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to choose a process number, and none to a namespace in which there is one")
    own = ["--basetemp", str(tmp_path / "own"), "-p", "no:cacheprovider"]
    command = [*NAMESPACE, sys.executable, "-m", "pytest", "-q", *own, __file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
