"""One round of stress: a fresh arena, workers, a guest and an operator, chaos among them; then everything that must hold is looked at.

Owns the round's processes and files; whatever happens, none of them is left.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from gcma_shm.clients import linearizable
from gcma_shm.clients.chaos import KINDS, Chaos
from gcma_shm.clients.client import connect
from gcma_shm.clients.history import Log, Operation
from gcma_shm.clients.stress_broker import BrokerProcess
from gcma_shm.clients.stress_children import Child, Role, Shared, client_of, fork
from gcma_shm.clients.stress_guest import Guest, Operator
from gcma_shm.clients.stress_plan import AREA_PAGES, HOWS, TYPES, How, Plan
from gcma_shm.clients.stress_rest import Rest
from gcma_shm.clients.stress_work import Worker, read_all

OPERATIONS_MAX = 50_000  # of one process; then another takes its place
LOST_MAX = 20  # that are told of one round
WAIT_S = 90.0  # for what must come, never a measure
KEPT = "kept"  # a file beside logs that somebody is to look at
CHECKERS = 2  # processes that check a history
CHECKED_S = 0.2  # between two looks whether they have, or whether a child has ended
OTHERS_S = 5.0  # what guest and operator let the broker take
WORKER_S = 2.0  # what a worker lets the broker, or a busy slot, take


@dataclass(frozen=True)
class Rage:
    """What a round is to be."""

    page_size: int = 4096
    workers: int = 6
    kinds: frozenset[str] = frozenset(KINDS)
    seed: int = 0

    def plan(self) -> Plan:
        """With room for the dead of whom the broker does not know yet."""
        mortal = frozenset({2}) if "type" in self.kinds else frozenset()
        clients = 4 * (self.workers + 2) + 8
        return Plan(self.page_size, area_pages=AREA_PAGES, clients=clients, types=len(TYPES), mortal=mortal)


@dataclass
class Result:
    """What one round, or all, came to."""

    operations: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    losses: int = 0

    def wrong(self, words: str) -> None:
        """Notes a loss."""
        self.losses += 1
        if len(self.lost) < LOST_MAX:
            self.lost.append(words)

    def merge(self, other: Result) -> None:
        """Adds another one's."""
        self.operations += other.operations
        self.counts.update(other.counts)
        self.losses += other.losses
        self.lost = (self.lost + other.lost)[:LOST_MAX]


class Round:
    """Use as a context manager; `rage`, then `judge`."""

    def __init__(self, rage: Rage, directory: Path) -> None:
        """`directory`: where its logs are to lie, and the broker's words. `meanwhile`, an attribute, is called many times a second, in every
        wait, and may raise.
        """
        self.meanwhile: Callable[[], None] = lambda: None
        self._rage = rage
        self.plan = rage.plan()
        self._directory = directory
        self._rng = random.Random(f"{rage.seed} round")  # noqa: S311 - to be repeated, not to be secret
        self.result = Result()
        self.children: list[Child] = []
        self.logs: list[Log] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._shared = Shared()
            stack.callback(self._shared.close)
            self.broker = BrokerProcess(self.plan, self._directory / "broker.log")
            stack.callback(self.broker.close)
            self.owner = stack.enter_context(connect(self.broker.endpoint, mapped=True, timeout=WAIT_S))
            stack.callback(self._end_children)
            self._chaos = Chaos(self, self._rage.kinds, f"{self._rage.seed} chaos", self.result.counts)
            stack.callback(self._chaos.calm)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        for log in self.logs:
            log.close()

    def rage(self, seconds: float) -> None:
        """Lets all loose for so long, or until something is wrong; may be called again."""
        self._shared.begin()
        for number in range(self._rage.workers):
            self._start("worker", HOWS[number % len(HOWS)])
        self._start("guest", "mapped")
        self._start("operator", "mapped")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.result.losses:
            time.sleep(min(self._chaos.go_on(), max(deadline - time.monotonic(), 0)))
            self._hear()
            self.meanwhile()
            for child in [child for child in self.children if not child.alive]:
                self._look_at_end(child)
                self.replace(child)
            if not self.broker.pid:
                self.wrong(f"the broker has ended by itself: {self.broker.words()}")
        self._end()

    @property
    def operations(self) -> int:
        """Ended so far."""
        return sum(log.progress for log in self.logs)

    def counts(self) -> Counter[str]:
        """Acts so far, whoever did them."""
        return self.result.counts + Counter(self._shared.counted())

    def judge(
        self,
        at_rest: Callable[[str, Path], None] = lambda _name, _spill_dir: None,
    ) -> Result:
        """Looks at everything that must hold now. `at_rest`: more that must, of the arena of that name and its spill directory; raises AssertionError."""
        if self.broker.pid:
            log = self._log(self.plan.types * self.plan.wide)
            for wrong in read_all(self.owner, self.plan, log):
                self.wrong(wrong)
            for wrong in Rest(self.owner, self.plan, WAIT_S, self.meanwhile).wrong():
                self.wrong(wrong)
            stats = self.owner.stats()
            self.result.counts["spill_failures"] = stats["counters"]["spill_failures"]
            try:
                at_rest(stats["arena"]["name"], self.broker.spill_dir)
            except AssertionError as error:
                self.wrong(f"at rest: {error}")
        self.owner.close()
        status = self.broker.stop()
        if status or "Traceback" in self.broker.words():
            self.wrong(f"the broker ended with status {status}: {self.broker.words()}")
        # In processes of their own: a history is large, and whoever forks should be small.
        logs = [(log.path, log.writer) for log in self.logs]
        with multiprocessing.get_context("fork").Pool(CHECKERS, _default_signals) as pool:
            parts = pool.starmap_async(_check_part, [(logs, part) for part in range(CHECKERS)])
            while not parts.ready():
                parts.wait(CHECKED_S)
                self.meanwhile()
            pool.close()  # they end by themselves: what `with` does, SIGTERM, would reach one that still has our handler
            pool.join()
        for operations, lost in parts.get():
            self.result.operations += operations
            for wrong in lost:
                self.wrong(wrong)
        self.result.counts = self.counts()
        return self.result

    def keep(self) -> None:
        """The round's logs are to stay where they are."""
        (self._directory / KEPT).touch()

    # --- for Chaos

    def replace(self, child: Child) -> None:
        """Another one like it, as it has ended."""
        child.process.join()
        self.children.remove(child)
        self._start(child.role, child.how)

    def wrong(self, words: str) -> None:
        """Notes what must not be."""
        self.result.wrong(words)

    def _start(self, role: Role, how: How) -> None:
        log = None if role == "guest" else self._log(OPERATIONS_MAX)
        seed = f"{self._rage.seed} {role} {self._rng.random()}"

        def work() -> None:
            timeout_s = WORKER_S if role == "worker" else OTHERS_S
            with client_of(self.owner, how, timeout_s, shared.stop) as client:
                if client is None:
                    return
                if role == "guest":
                    sure = frozenset(range(len(self.plan.area_pages) - ("drain" in self._rage.kinds)))
                    Guest(
                        client, self.plan, seed, sure=sure, patience_s=self.plan.timeout_s, kinds=self._rage.kinds,
                        tell=shared.tell, count=shared.count,
                    ).run(OPERATIONS_MAX, shared.stop)  # fmt: skip
                elif log is not None and role == "operator":
                    Operator(client, self.plan, log, seed, self._rage.kinds, shared.count).run(shared.stop)
                elif log is not None:
                    Worker(client, self.plan, log, seed, shared.tell).run(OPERATIONS_MAX, shared.stop)

        shared = self._shared
        self.children.append(fork(role, how, shared, work, log))

    def _log(self, operations_max: int) -> Log:
        log = Log(self._directory / f"log.{len(self.logs) + 1}", len(self.logs) + 1, operations_max)
        self.logs.append(log)
        return log

    def _hear(self) -> None:
        for words in self._shared.heard():
            self.wrong(words)

    def _look_at_end(self, child: Child) -> None:
        """Of one that nobody killed."""
        if child.process.exitcode:
            self.wrong(f"a {child.role} ({child.how}) ended with status {child.process.exitcode}")

    def _end(self) -> None:
        """Calms the chaos, tells all to stop, and waits for them."""
        self._chaos.calm()
        self._shared.end()
        deadline = time.monotonic() + WAIT_S
        for child in self.children:
            while child.alive and time.monotonic() < deadline:
                child.process.join(CHECKED_S)
                self.meanwhile()
            self._hear()
            if child.alive:
                child.where()
                self.wrong(f"a {child.role} ({child.how}) stands still")
            else:
                self._look_at_end(child)
        self.children = [child for child in self.children if child.alive]

    def _end_children(self) -> None:
        for child in self.children:
            child.kill()


def _default_signals() -> None:
    """In a process that checks: SIGTERM ends it, and Ctrl-C is the parent's to act on."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _check_part(logs: list[tuple[Path, int]], part: int) -> tuple[int, list[str]]:
    """How many operations there were on every so many-th slot, and what is wrong with them."""
    history: list[Operation] = []
    for path, writer in logs:
        log = Log(path, writer)
        history += log.operations(part, CHECKERS)
        log.close()
    return len(history), linearizable.check(history)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory for one round's logs; what is marked to be kept (`Round.keep`) is left there."""
    path = Path(tempfile.mkdtemp(prefix="gcma-stress-"))
    try:
        yield path
    finally:
        if not (path / KEPT).exists():
            shutil.rmtree(path)
