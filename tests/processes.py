"""Other processes for tests: forked children that talk to the test, and brokers run as the command that users run."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Talk = Connection
WAIT_S = 60.0  # a bound on what must come, never a measure


def eventually(condition: Callable[[], bool], wait_s: float = WAIT_S) -> bool:
    """Whether `condition` comes true within the bound."""
    deadline = time.monotonic() + wait_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def descriptors(pid: int | str = "self") -> int:
    """How many file descriptors a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def runs(pid: int) -> bool:
    """Whether there is such a process. (One that has ended may wait for long to be waited for, by a parent that is none of ours.)"""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def stop(pid: int) -> None:
    """SIGSTOP, for good. Returns once each thread of the process stands still, in the middle of whatever it was doing."""
    os.kill(pid, signal.SIGSTOP)
    assert eventually(lambda: stands_still(pid)), f"process {pid} does not stop"


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The same, until SIGCONT."""
    try:
        stop(pid)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def stands_still(pid: int) -> bool:
    """Whether each thread of the process is stopped, or has ended: SIGSTOP takes a moment for each."""
    try:
        states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):  # one has just ended
        return False
    return bool(states) and set(states) <= set("TZ")


@contextlib.contextmanager
def files_refuse_writes(*pids: int, above: int = 0) -> Iterator[None]:
    """Every write of these processes to a file fails with EFBIG meanwhile (Python ignores the signal that comes with it), or to the
    part of a file from byte `above` on; one that begins below it is short.
    """
    before = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
    try:
        for pid, (_, hard) in before.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (above, hard))
        yield
    finally:
        for pid, limits in before.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


class Child:
    """A forked child, seen from its parent."""

    def __init__(self, pid: int, talk: Talk) -> None:
        self.pid = pid
        self.talk = talk
        self._ended = False

    def receive(self) -> Any:
        """The child's next word: what it sent, or what its function returned; an exception of it is raised here."""
        assert self.talk.poll(WAIT_S), "the child says nothing"
        kind, value = self.talk.recv()
        if kind == "raised":
            raise AssertionError(f"in the child:\n{value}")
        return value

    def tell(self, value: object = None) -> None:
        """Sends a word to the child, which waits for it in `talk.recv()`."""
        self.talk.send(value)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if not self._ended:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self) -> int:
        """The exit status; negative: the signal that ended it."""
        self._ended = True
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Said:
    """The parent, seen from a forked child."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk

    def say(self, value: object = None) -> None:
        """Sends a word to the parent's `receive`."""
        self._talk.send(("said", value))

    def hear(self) -> Any:
        """Waits for the parent's `tell`."""
        return self._talk.recv()

    @property
    def has_more(self) -> bool:
        """Whether the parent has told something that was not heard yet."""
        return self._talk.poll()


@contextlib.contextmanager
def forked(function: Callable[[Said], object]) -> Iterator[Child]:
    """Runs `function` in a forked child, which ends without any cleaning up; what it returns is its last word. Killed in the end."""
    ours, theirs = Pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            ours.close()
            theirs.send(("returned", function(Said(theirs))))
            status = 0
        except BaseException:
            with contextlib.suppress(OSError):
                theirs.send(("raised", traceback.format_exc()))
        finally:
            os._exit(status)
    theirs.close()
    child = Child(pid, ours)
    try:
        yield child
    finally:
        child.kill()
        ours.close()


def in_fork(function: Callable[[Said], object]) -> Any:
    """What `function` returns in a forked child."""
    with forked(function) as child:
        value = child.receive()
        assert child.wait() == 0
        return value


def run_python(code: str, *arguments: str, cwd: str | Path = "/", wait_s: float = WAIT_S) -> str:
    """Runs `code` in a fresh interpreter, warnings as errors; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=wait_s,
        check=False,
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def start_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """The same, running; the caller ends it."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def running_python(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The same, killed in the end. (Its pipes are closed, not read to their end: children of it may have them, and live on.)"""
    process = start_python(textwrap.dedent(code), *arguments)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()


class Broker:
    """A `gcma broker` process that serves; `description` is what it printed."""

    def __init__(self, process: subprocess.Popen[str], endpoint: str, description: str) -> None:
        self.process = process
        self.pid = process.pid
        self.endpoint = endpoint
        self.description = description

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends the signal, waits for the end; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)


def broker_command(endpoint: str, *options: str) -> list[str]:
    """The command line of `gcma broker` on `endpoint`."""
    return [sys.executable, "-m", "gcma_shm.broker.cli", "broker", "--endpoint", endpoint, *options]


@contextlib.contextmanager
def broker(endpoint: str, *options: str, size: str = "8M") -> Iterator[Broker]:
    """Runs `gcma broker` until it serves; stopped in the end if it still runs."""
    process = subprocess.Popen(
        broker_command(endpoint, "--size", size, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("endpoint"):
                break
        else:
            raise AssertionError(f"the broker did not start: {process.stderr.read()}")
        found = Broker(process, endpoint, "".join(lines))
        # "Serves" means that it answers; what comes between that and the words above is a test of its own. Asked by nobody: the record of
        # a client that has left is not free until the broker has come to bury it.
        from gcma_shm import BrokerUnavailable
        from gcma_shm.broker.ask import ask

        def answers() -> bool:
            """Within the few seconds that users wait; a busy machine's broker may take longer."""
            assert process.poll() is None, f"the broker has ended: {process.communicate()[1]}"
            with contextlib.suppress(BrokerUnavailable):
                ask(endpoint, "areas", {})
                return True
            return False

        assert eventually(answers), "the broker does not answer"
        yield found
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        process.stderr.close()
