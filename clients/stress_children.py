"""The processes of a stress: forked, told when to stop, heard at once, counted across their deaths.

Owns the memory and the pipe that they share with their parent. What a child says is one write of the pipe, whole or not at all, so that a child which is killed
while it speaks leaves no half of a word.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import mmap
import multiprocessing
import os
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Literal

import gcma_shm.clients.forks  # noqa: F401 - a client follows its process through os.fork
from gcma_shm.clients.client import Client, connect
from gcma_shm.clients.history import Log
from gcma_shm.clients.stress_plan import How
from gcma_shm.errors import BrokerUnavailable, QuotaExceeded

WORDS_MAX = select.PIPE_BUF - 8  # bytes of what a child says at once
READ_MAX = 1 << 20
PR_SET_PDEATHSIG = 1  # prctl(2)
STDERR = 2
WHERE_S = 0.5  # for a child to say what it is doing
COUNTED = ("allocations", "claims", "drains", "ends")
_OVER = 8 * len(COUNTED)
Role = Literal["worker", "guest", "operator"]


class Shared:
    """What the children and their parent share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._words = memoryview(self._memory).cast("Q")
        self._parent = os.getpid()
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        fcntl.fcntl(self._write_end, fcntl.F_SETPIPE_SZ, READ_MAX)

    def stop(self) -> bool:
        """In a child: whether to stop."""
        return self._memory[_OVER] != 0

    def end_with_parent(self) -> None:
        """In a child: SIGKILL when the parent ends, however that ends, and also while the child is stopped."""
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._parent:  # it had ended before
            os._exit(1)

    def begin(self) -> None:
        """Those that are started from now on are not to stop."""
        self._memory[_OVER] = 0

    def end(self) -> None:
        """Tells all of them to stop."""
        self._memory[_OVER] = 1

    def count(self, what: str) -> None:
        """By the one child of its role that lives."""
        self._words[COUNTED.index(what)] += 1

    def counted(self) -> dict[str, int]:
        """By all that there were."""
        return dict(zip(COUNTED, self._words, strict=False))

    def tell(self, wrong: str) -> None:
        """In a child: says what is wrong."""
        os.write(self._write_end, wrong.encode(errors="replace").replace(b"\0", b"?")[:WORDS_MAX] + b"\0")

    def heard(self) -> list[str]:
        """What was said since."""
        said = b""
        with contextlib.suppress(BlockingIOError):
            said = os.read(self._read_end, READ_MAX)
        return [words.decode(errors="replace") for words in said.split(b"\0") if words]

    def close(self) -> None:
        """In the parent, when the children have ended."""
        self._words.release()
        self._memory.close()
        os.close(self._read_end)
        os.close(self._write_end)


@dataclass(eq=False)
class Child:
    """A process under stress, seen from its parent."""

    role: Role
    how: How
    process: BaseProcess
    sign: mmap.mmap  # shared with it: its first byte is set when it has begun
    log: Log | None = None
    stopped: bool = field(default=False)

    @property
    def alive(self) -> bool:
        """Until it has ended; its number is nobody else's before we have seen that."""
        return self.process.is_alive()

    @property
    def pid(self) -> int:
        """Its number."""
        assert self.process.pid is not None
        return self.process.pid

    @property
    def begun(self) -> bool:
        """Whether it ends with its parent, and has its handlers. One that was stopped before, with its parent killed, would stay for ever."""
        return self.sign[0] != 0

    def send(self, number: int) -> bool:
        """A signal, if it has begun and lives: whether it was sent."""
        if not (self.begun and self.alive):
            return False
        os.kill(self.pid, number)
        self.stopped = (self.stopped and number != signal.SIGCONT) or number == signal.SIGSTOP
        return True

    def where(self) -> None:
        """Has it say on standard error what it is doing."""
        self.send(signal.SIGUSR1)
        time.sleep(WHERE_S)

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        self.process.kill()
        self.process.join()


def fork(role: Role, how: How, shared: Shared, work: Callable[[], object], log: Log | None = None) -> Child:
    """A child that does `work`; whatever it raises is told."""

    def run() -> None:
        shared.end_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to act on
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        faulthandler.register(signal.SIGUSR1, file=STDERR)
        sign[0] = 1
        try:
            work()
        except BaseException:
            shared.tell(f"a {role} ({how}) failed: {traceback.format_exc()[-WORDS_MAX // 2 :]}")

    sign = mmap.mmap(-1, mmap.PAGESIZE)
    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    return Child(role, how, process, sign, log)


@contextlib.contextmanager
def client_of(owner: Client, how: How, timeout_s: float, stop: Callable[[], bool]) -> Iterator[Client | None]:
    """In a child: the client that it works with; None when it was told to stop before there was one."""
    if how == "inherited" and not owner.closed:  # closed: no record was free at the fork
        owner._channel.timeout = timeout_s
        yield owner
        return
    owner.close()  # the fork's share of it: its record is free for another
    while not stop():
        try:
            client = connect(owner.endpoint, mapped=how != "messages", timeout=timeout_s, wait_for_broker=timeout_s)
        except (BrokerUnavailable, QuotaExceeded):  # it is stopped, or away; or has not seen yet who has died
            continue
        with client:
            yield client
        return
    yield None
