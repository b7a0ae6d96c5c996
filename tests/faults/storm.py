"""A storm over one small arena: workers store, load and invalidate the same few slots and a wide set, while buffers come and go.

Every operation is logged (gcma_shm.clients.history) and every page proves what it is, so that afterwards the whole history can be checked. Also a
command, for hours of it: `python -m tests.faults.storm --seconds 600 --page-size 65536 --seed 7`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import gcma_shm
from gcma_shm.clients.client import Client
from gcma_shm.clients.history import Log, gather
from gcma_shm.clients.linearizable import check
from gcma_shm.clients.stress_guest import Guest
from gcma_shm.clients.stress_plan import BATCH_MAX, HOWS, TYPE_STEP, TYPES, How, Plan
from gcma_shm.clients.stress_work import Report, Worker, read_all
from gcma_shm.clients.swap import MappedSwap, Swap
from gcma_shm.records import Records
from tests.processes import WAIT_S, Child, Said, eventually, forked

__all__ = ["HOWS", "TYPES", "TYPE_STEP", "How", "Plan", "Report", "Storm", "progress", "rage"]


class Storm:
    """An embedded broker, its owner, and what is let loose on them. Use as a context manager."""

    def __init__(self, plan: Plan, directory: Path, seed: int, spill_io: str = "buffered") -> None:
        print(f"storm: seed {seed}, {plan}")
        self.plan = plan
        self.seed = seed
        self._directory = directory
        self._spill_io = spill_io
        self._stack = contextlib.ExitStack()
        self._logs: list[Log] = []
        self.children: list[Child] = []
        self.reports: list[Report] = []
        self.lost: list[str] = []
        directory.mkdir(exist_ok=True)
        self._over = Log(directory / "over", 0, 1)  # a word that all processes see

    def __enter__(self) -> Self:
        plan = self.plan
        self.owner = self._stack.enter_context(
            gcma_shm.embedded(
                plan.size(),
                page_size=plan.page_size,
                areas={f"a{n}": pages * plan.page_size for n, pages in enumerate(plan.area_pages)},
                slots=plan.slots,
                clients=plan.clients,
                spill_dir=self._directory,
                spill_io=self._spill_io,
                timeout=WAIT_S,
            )
        )
        lives = [self.owner.swap(type_, plan.wide, TYPES[type_]).life for type_ in range(plan.types)]  # type: ignore[attr-defined]
        assert self.owner._plane is not None
        self.swaps: list[Swap] = [
            MappedSwap(self.owner._plane, type_, life, plan.timeout_s, self.owner) for type_, life in enumerate(lives)
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        for log in (*self._logs, self._over):
            log.close()

    @contextlib.contextmanager
    def worker(self, how: How, operations: int) -> Iterator[tuple[Child, Log]]:
        """A worker process; its last word is its Report."""
        writer = len(self._logs) + 1
        path = self._directory / f"log.{writer}"
        log = Log(path, writer, operations * (BATCH_MAX + 1) // 2 + BATCH_MAX)
        self._logs.append(log)

        def work(said: Said) -> Report:
            with _client(self.owner, how, self.plan) as client:
                worker = Worker(client, self.plan, Log(path, writer), hash((self.seed, writer)))
                return worker.run(operations, self.over)

        with _forked(work) as child:
            yield child, log

    @contextlib.contextmanager
    def guest(self, rounds: int, alone: bool = True) -> Iterator[Child]:
        """A process that allocates buffers; its last word is how many it had. `alone`: nobody else's are in its way."""

        def work(said: Said) -> int:
            # Guests are refused nothing and wait for nobody but a stopped broker.
            with _client(self.owner, "mapped", replace(self.plan, timeout_s=WAIT_S)) as client:
                return Guest(client, self.plan, self.seed + (not alone) * os.getpid(), alone).run(rounds, self.over)

        with _forked(work) as child:
            yield child

    def over(self) -> bool:
        """Whether workers and guests are to stop."""
        return self._over.progress > 0

    def end(self) -> None:
        """Tells workers and guests to stop."""
        self._over.set_progress(1)

    def begin(self) -> None:
        """Takes `end` back."""
        self._over.set_progress(0)

    def report(self, child: Child) -> Report:
        """Waits for a worker's last word, and its end."""
        report = child.receive()
        assert isinstance(report, Report)
        child.wait()
        self.reports.append(report)
        return report

    def read_all(self) -> None:
        """Loads each slot once more, now that nobody writes: what was acknowledged and not overwritten must be there."""
        log = Log(self._directory / f"log.{len(self._logs) + 1}", len(self._logs) + 1, self.plan.slots)
        self._logs.append(log)
        self.lost += read_all(self.owner, self.plan, log)

    def check(self) -> int:
        """Raises AssertionError when a page was torn or a load wrong; returns how many operations were checked."""
        torn = [what for report in self.reports for what in report.torn]
        assert not torn, f"seed {self.seed}: torn pages: {torn[:5]}"
        assert not self.lost, f"seed {self.seed}: {self.lost[:5]}"
        operations = gather(self._logs)
        wrong = check(operations)
        assert not wrong, f"seed {self.seed}: {len(wrong)} slots were no atomic registers: {wrong[:5]}"
        return len(operations)

    def spill_dir(self) -> Path:
        """Where the broker keeps its spill files."""
        (found,) = (path for path in self._directory.iterdir() if path.is_dir())
        return found

    def counters(self) -> dict[str, int]:
        """All clients' counts together."""
        found: dict[str, int] = self.owner.stats()["counters"]
        return found

    def alone(self) -> bool:
        """Whether the owner's is the one client number in use, and no buffer is held: nothing of the dead is left."""
        assert self.owner._plane is not None
        held = any(area.held for area in self.owner.areas())  # first: a request has the broker look for forked children
        used = [record.number for record in Records(self.owner._plane).used()]
        return used == [self.owner.number] and not held


@contextlib.contextmanager
def _client(owner: Client, how: How, plan: Plan) -> Iterator[Client]:
    if how == "inherited":
        owner._channel.timeout = plan.timeout_s  # it is this process's own
        yield owner
        return
    owner.close()  # the fork's share of it: its record is free for another
    with gcma_shm.connect(owner.endpoint, mapped=how == "mapped", timeout=WAIT_S) as client:
        client._channel.timeout = plan.timeout_s  # nobody is stopped before it is connected
        yield client


@contextlib.contextmanager
def _forked(work: Callable[[Said], Any]) -> Iterator[Child]:
    with warnings.catch_warnings():
        # Since Python 3.12 os.fork warns in a process with threads; ZeroMQ's are made anew in the child, which uses nothing of the old.
        warnings.simplefilter("ignore", DeprecationWarning)
        with forked(work) as child:
            yield child


def progress(worker: tuple[Child, Log], more: int) -> None:
    """Waits until a worker has done so many more operations."""
    child, log = worker
    goal = log.progress + more
    came = eventually(lambda: log.progress >= goal or child.talk.poll())
    if log.progress < goal:
        assert came, f"worker {log.writer} has done {log.progress} operations, and stands still"
        raise AssertionError(f"worker {log.writer} ended with {child.receive()}")


def rage(storm: Storm, hows: tuple[How, ...], operations: int, guests: int = 1) -> None:
    """Workers and guests at once, until each worker has done its operations."""
    storm.begin()
    with contextlib.ExitStack() as stack:
        guests_ = [stack.enter_context(storm.guest(1 << 30, guests == 1)) for _ in range(guests)]
        workers = [stack.enter_context(storm.worker(how, operations)) for how in hows]
        for child, _ in workers:
            storm.report(child)
        storm.end()
        for guest in guests_:
            guest.receive()
            guest.wait()


def main(arguments: list[str] | None = None) -> int:
    """Rages in rounds of fresh arenas until the time is over; 1 when something was wrong, and says what."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=1 << 30)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--page-size", type=int, default=4096)
    parser.add_argument("--operations", type=int, default=4000, help="of each worker, in each round")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--guests", type=int, default=1)
    parser.add_argument("--how", choices=(*HOWS, "mixed"), default="mixed")
    parser.add_argument("--hot", type=int, default=4)
    parser.add_argument("--wide", type=int, default=200)
    parser.add_argument("--nursery", type=int, default=20)
    parser.add_argument("--area", type=int, action="append")
    parser.add_argument("--store-share", type=float, default=0.35)
    parsed = parser.parse_args(arguments)
    plan = Plan(
        page_size=parsed.page_size,
        nursery_pages=parsed.nursery,
        area_pages=tuple(parsed.area or (48, 24)),
        hot=parsed.hot,
        wide=parsed.wide,
        clients=max(8, 2 * (parsed.workers + parsed.guests) + 2),
        store_share=parsed.store_share,
    )
    deadline = time.monotonic() + parsed.seconds
    operations = rounds = 0
    while time.monotonic() < deadline and rounds < parsed.rounds:
        with (
            tempfile.TemporaryDirectory(prefix="gs-") as directory,
            Storm(plan, Path(directory), parsed.seed + rounds) as storm,
        ):
            hows = [HOWS[n % 3] if parsed.how == "mixed" else parsed.how for n in range(parsed.workers)]
            try:
                rage(storm, tuple(hows), parsed.operations, parsed.guests)
                storm.read_all()
                operations += storm.check()
                assert eventually(storm.alone), "a client or a buffer is left"
            except Exception as error:
                print(f"round {rounds}: {type(error).__name__}: {error}", flush=True)
                return 1
            finally:
                counters = storm.counters()
        rounds += 1
    print(f"{rounds} rounds, {operations} operations, nothing wrong; the last round's counters: {counters}")
    return 0


assert 2 * Plan.timeout_s <= WAIT_S, "a wait for a process outlasts each of its own waits"

if __name__ == "__main__":
    sys.exit(main())
