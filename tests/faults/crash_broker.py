"""A broker that is killed at a chosen change of the arena: the product's own parts in a forked child of the test, without a socket.

It serves what it is told over a pipe, one thing after another on its main thread: the jobs of its worker threads, and rounds of its
reclaim thread, too. So the changes of each thing that it does can be counted, and the n-th is the same one each time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

from gcma_shm import arena as arenas
from gcma_shm import layout
from gcma_shm._core import Plane
from gcma_shm.areas import Area
from gcma_shm.broker import allocations, process, reclaim, service
from gcma_shm.broker.reclaim import ReclaimThread
from gcma_shm.broker.service import Peer
from gcma_shm.broker.workers import Job
from gcma_shm.layout import Geometry
from gcma_shm.messages import Reply
from tests.faults.steps import Hook
from tests.processes import Said, forked

_PR_SET_PDEATHSIG = 1


class BrokerDied(Exception):
    """The broker was killed during what it was asked for."""


def put(owner: Any, name: str, value: object) -> None:
    """In a forked child, which is no one else's: another thing under that name."""
    setattr(owner, name, value)


def dies_with_its_parent() -> None:
    """For a forked child: killed when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass(frozen=True)
class Site:
    """Where the arena is, or is to be made."""

    name: str
    geometry: Geometry
    areas: list[Area]
    spill_dir: Path


class _Later:
    """Stands for a worker thread: its jobs are done when what was asked for is answered."""

    jobs: ClassVar[deque[Job]] = deque()

    def __init__(self, name: str, jobs_max: int) -> None:
        pass

    def submit(self, job: Job, whatever_the_queue: bool = False) -> bool:
        self.jobs.append(job)
        return True


class _Stepped:
    """An arena's memory for `layout.write_area`: each word that it writes is a step."""

    def __init__(self, plane: Plane, at: int = 0) -> None:
        self._plane = plane
        self._at = at

    def __getitem__(self, where: slice) -> _Stepped:
        return _Stepped(self._plane, where.start)

    @contextlib.contextmanager
    def cast(self, _format: str) -> Iterator[_Stepped]:
        yield self

    def __setitem__(self, word: int, value: int) -> None:
        self._plane.write(self._at + 8 * word, value)


class _Stand:
    """What the child is: the broker, and what it is told to do."""

    def __init__(self, site: Site, hook: Hook, step: int) -> None:
        put(service, "Worker", _Later)
        self._hook = hook
        self._skew_s = 0.0
        put(allocations, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + self._skew_s))
        self._answers: deque[Reply] = deque()
        arena = arenas.acquire(site.name, site.geometry, site.areas)
        if step:
            hook.arm_to_kill(step)
        self.plane = process.begin(arena, site.spill_dir)
        write_area = layout.write_area
        stepped = cast(memoryview, _Stepped(self.plane))
        put(layout, "write_area", lambda _memory, g, index, area: write_area(stepped, g, index, area))
        for owner, name in ((os, "open"), (os, "truncate"), (Path, "unlink")):
            self._before_each(owner, name)
        self.service = process.assemble(self.plane, arena, site.spill_dir, self._answer, lambda _: None)
        self._do_jobs()

    def _before_each(self, owner: Any, name: str) -> None:
        """Whatever changes a file is a step as well."""
        function = getattr(owner, name)

        def stepped(*arguments: Any, **more: Any) -> Any:
            self.plane.add(layout.STOPPED_AT, 0)
            return function(*arguments, **more)

        put(owner, name, stepped)

    def _answer(self, peer: Peer, reply: Reply) -> None:
        self.service.answered(peer, reply)
        self._answers.append(reply)

    def _do_jobs(self) -> None:
        while _Later.jobs:
            _Later.jobs.popleft()()
        while self.service.busy:
            self.service.advance()
            while _Later.jobs:
                _Later.jobs.popleft()()

    # --- what it can be told

    def arm(self, step: int) -> None:
        self._hook.arm_to_kill(step)

    def disarm(self) -> int:
        return self._hook.disarm()

    def request(self, peer: bytes, frames: list[bytes]) -> Reply:
        reply = self.service.request(peer, list(frames))
        self._do_jobs()
        return reply if reply is not None else self._answers.popleft()

    def sweep(self) -> None:
        self.plane.sweep(0)

    def reclaim(self, jitter: int) -> None:
        """The reclaim thread runs from now on, and each thread loses the processor at one step in so many."""
        self._hook.jitter.value = jitter
        put(reclaim, "PUNCH_S", 0.0)  # no pause: what is invalidated is stored to again at any moment of a punch
        ReclaimThread(self.plane, self.service.health)

    def clean(self) -> None:
        self.plane.clean_until(self.plane.read(layout.HEAD_AT))

    def punch(self) -> None:
        while not self.plane.punch():
            pass

    def tick(self) -> None:
        """And what the pidfds tell."""
        poll = select.poll()
        for pidfd in self.service.sessions.by_pidfd:
            poll.register(pidfd, select.POLLIN)
        for pidfd, _ in poll.poll(0):
            self.service.client_ended(pidfd)
        self.service.tick()
        self._do_jobs()

    def ended(self, number: int) -> None:
        """The pidfd of that client tells that its process has ended."""
        self.service.client_ended(self.service.sessions.clients[number].pidfd)
        self._do_jobs()

    def tick_later(self, seconds: float) -> None:
        """A tick when so much time has passed for the handles under way."""
        self._skew_s = seconds
        self.tick()
        self._skew_s = 0.0

    def check(self) -> None:
        self.service.allocations._check()
        self.service.sessions._check()
        self.service.line._check()

    def guests(self) -> dict[int, tuple[set[int], set[int], str | None, int]]:
        """By number: holders, those who share its claim, name, and how many handles are under way."""
        found = self.service.allocations._by_number
        return {n: (set(a.holders), set(a.claimers), a.name, len(a.handed_over)) for n, a in found.items()}

    def clients(self) -> set[int]:
        return set(self.service.sessions.clients)


class Broker:
    """A broker in a child of its own, as the test sees it; `changes`: of its takeover."""

    def __init__(self, site: Site, step: int = 0, first: Callable[[], None] = lambda: None) -> None:
        """It dies at that change of its takeover, if `step` is one. Raises BrokerDied. `first`: what the child does first."""

        def work(said: Said) -> None:
            dies_with_its_parent()
            first()
            hook = Hook()
            stand = _Stand(site, hook, step)
            said.say(hook.disarm())
            while True:
                word, arguments = said.hear()
                said.say(getattr(stand, word)(*arguments))

        self._stack = contextlib.ExitStack()
        self._child = self._stack.enter_context(forked(work))
        self.changes: int = self._hear()

    def call(self, word: str, *arguments: object) -> Any:
        """What it answers. Raises BrokerDied."""
        with contextlib.suppress(BrokenPipeError):
            self._child.tell((word, arguments))
        return self._hear()

    def _hear(self) -> Any:
        try:
            return self._child.receive()
        except AssertionError:  # it says so, and ends
            self._stack.close()
            raise
        except (EOFError, ConnectionResetError):
            status = self._child.wait()
            self._stack.close()
            assert status == -signal.SIGKILL, f"the broker ended with status {status}"
            raise BrokerDied from None

    def kill(self) -> None:
        """At rest."""
        self._stack.close()
