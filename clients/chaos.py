"""Chaos, chosen by a seed: who is killed, stopped and continued, when the disk is full, when the broker is killed and started again.

Owns what is done to processes, and undoes in time what is done for a while. The order of the acts and their parameters follow from the seed; which instruction of
whom they hit is up to the machine.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from gcma_shm.clients.stress_broker import BrokerProcess
from gcma_shm.clients.stress_children import Child
from gcma_shm.errors import ArenaError

KINDS = ("kill", "stop", "alloc", "claim", "drain", "type", "full", "restart")
_ACTS = {"kill": 10, "stop": 8, "full": 1, "restart": 1}  # how often, of those that are acts upon processes
PAUSE_S = 0.03  # between two acts, in the mean
STOPPED_MAX_S = 0.3
FULL_MAX_S = 0.4
AWAY_MAX_S = 0.5  # between a broker's end and the next one's start
BROKER_SHARE = 0.15  # of the stops
PROGRESS = 20  # operations that each mapped worker does while there is no broker
PROGRESS_S = 60.0  # a bound on what must come, never a measure


class Targets(Protocol):
    """Whom chaos may hit."""

    broker: BrokerProcess
    children: list[Child]
    meanwhile: Callable[[], None]  # called in every wait; may raise

    def replace(self, child: Child) -> None:
        """Another one like it, as it has ended."""

    def wrong(self, words: str) -> None:
        """Notes what must not be."""


class Chaos:
    """The acts upon the processes of one round."""

    def __init__(self, targets: Targets, kinds: frozenset[str], seed: str, counts: Counter[str]) -> None:
        self._targets = targets
        self._rng = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
        self._counts = counts
        acts: dict[str, Callable[[], None]] = {
            "kill": self._kill,
            "stop": self._stop,
            "full": self._fill_disk,
            "restart": self._restart,
        }
        self._acts = [acts[kind] for kind in _ACTS if kind in kinds]
        self._weights = [_ACTS[kind] for kind in _ACTS if kind in kinds]
        self._later: list[tuple[float, int, Callable[[], object]]] = []
        self._next = time.monotonic()
        self._number = 0
        self._full_until = 0.0

    def go_on(self) -> float:
        """Does what is due; returns for how many seconds nothing will be."""
        self._do_due()
        if self._acts and self._next <= time.monotonic():
            (act,) = self._rng.choices(self._acts, self._weights)
            act()
            self._next = time.monotonic() + self._rng.expovariate(1 / PAUSE_S)
        due = min(self._next, *(at for at, _, _ in self._later[:1]), time.monotonic() + PAUSE_S)
        return max(due - time.monotonic(), 0.0)

    def calm(self) -> None:
        """Undoes all that was done for a while only."""
        while self._later:
            heapq.heappop(self._later)[2]()

    def _do_due(self) -> None:
        while self._later and self._later[0][0] <= time.monotonic():
            heapq.heappop(self._later)[2]()

    def _undo(self, seconds: float, how: Callable[[], object]) -> None:
        self._number += 1
        heapq.heappush(self._later, (time.monotonic() + seconds, self._number, how))

    def _victim(self) -> Child:
        return self._rng.choice([child for child in self._targets.children if child.role != "operator"])

    def _kill(self) -> None:
        child = self._victim()
        for _ in range(self._rng.randrange(2000)):  # somewhere in an operation
            pass
        child.kill()
        self._counts["kills"] += 1
        self._targets.replace(child)

    def _stop(self) -> None:
        seconds = self._rng.uniform(0, STOPPED_MAX_S)
        if self._rng.random() < BROKER_SHARE:
            pid = self._targets.broker.pid
            if pid:
                os.kill(pid, signal.SIGSTOP)
                self._counts["stops"] += 1
                # The broker's number stays its own until we have waited for it; another broker is none the worse for a SIGCONT.
                self._undo(seconds, lambda: self._continue_broker(pid))
            return
        child = self._victim()
        if child.send(signal.SIGSTOP):
            self._counts["stops"] += 1
            self._undo(seconds, lambda: child.send(signal.SIGCONT))

    def _continue_broker(self, pid: int) -> None:
        if self._targets.broker.pid == pid:
            os.kill(pid, signal.SIGCONT)

    def _fill_disk(self) -> None:
        """Every write of these processes to a file fails with EFBIG meanwhile. (Logs are mapped, and words go through a pipe.)"""
        self._counts["full"] += 1
        broker = self._targets.broker.pid
        workers = [child for child in self._targets.children if child.role == "worker"]
        seconds = self._rng.uniform(0, FULL_MAX_S)
        self._full_until = max(self._full_until, time.monotonic() + seconds)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # ours, and so theirs
        self._limit(workers, broker, (0, limits[1]))
        self._undo(seconds, lambda: self._limit(workers, broker, limits))

    def _limit(self, workers: list[Child], broker: int, limits: tuple[int, int]) -> None:
        pids = [child.pid for child in workers if child.alive]
        for pid in pids + [broker] * (broker != 0 and self._targets.broker.pid == broker):
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)

    def _restart(self) -> None:
        """Kills the broker. While there is none, mapped workers go on; then another one takes over what it left."""
        broker = self._targets.broker
        broker.kill()
        self._counts["restarts"] += 1
        back = time.monotonic() + self._rng.uniform(0, AWAY_MAX_S)
        if time.monotonic() > self._full_until:  # else there may be no page to store into, as nothing can be written
            self._look_for_progress()
        while time.monotonic() < back:
            self._do_due()
            time.sleep(0.001)
        try:
            broker.start()
        except ArenaError as error:
            self._targets.wrong(str(error))

    def _look_for_progress(self) -> None:
        goals = {
            child: child.log.progress + PROGRESS
            for child in self._targets.children
            if child.role == "worker" and child.how != "messages" and child.log is not None and not child.stopped
        }
        deadline = time.monotonic() + PROGRESS_S
        for child, goal in goals.items():
            assert child.log is not None
            while child.log.progress < goal and child.log.progress and child.alive:
                if time.monotonic() > deadline:
                    child.where()
                    self._targets.wrong(f"a worker ({child.how}) stands still while there is no broker")
                    return
                self._do_due()
                self._targets.meanwhile()
                time.sleep(0.001)
