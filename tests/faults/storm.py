"""A storm over one small arena: workers store, load and invalidate the same few slots and a wide set, while buffers come and go.

Every operation is logged (tests/register.py) and every page proves what it is, so that afterwards the whole history can be checked. Also a
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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import gcma_shm
from gcma_shm import layout
from gcma_shm.clients.client import Client
from gcma_shm.clients.swap import Swap
from gcma_shm.records import Records
from tests.processes import WAIT_S, Child, Said, eventually, forked
from tests.register import ZEROS, Kind, Log, TornPage, check, make_page, read_page, value_id

How = Literal[
    "inherited", "mapped", "messages"
]  # the forked owner's client; a client of its own; one that sends its pages
HOWS: tuple[How, ...] = ("inherited", "mapped", "messages")
TYPES: tuple[Literal["through", "behind"], ...] = ("through", "behind")
TYPE_STEP = 1 << 32  # a register's number is type * TYPE_STEP + offset
BATCH_MAX = 6
EXPECTED = (
    gcma_shm.NurseryFull,
    gcma_shm.SlotBusy,
    gcma_shm.BrokerUnavailable,
)  # bounds that a stopped process may use up


@dataclass(frozen=True)
class Plan:
    """What the storm rages over."""

    page_size: int = 4096
    nursery_pages: int = 20
    area_pages: tuple[int, ...] = (48, 24)
    hot: int = 4  # slots of each type that all fight for
    wide: int = 200  # slots of each type, hot ones included
    clients: int = 14
    timeout_s: float = 20.0
    store_share: float = 0.35
    types: int = 2
    slots_spare: int = 0  # that no type has

    def size(self) -> int:
        """Bytes of an arena with such a nursery."""
        pages = sum(self.area_pages) + self.nursery_pages
        size = pages * self.page_size
        areas = {f"a{n}": count * self.page_size for n, count in enumerate(self.area_pages)}
        while True:
            with contextlib.suppress(gcma_shm.ArenaError):
                geometry, _ = layout.plan(size, self.page_size, areas, self.slots, self.clients)
                if geometry.nursery_pages >= self.nursery_pages:
                    return size
            size += self.page_size

    @property
    def slots(self) -> int:
        """All slots of the arena."""
        return self.types * self.wide + self.slots_spare


@dataclass
class Report:
    """What one worker says in the end."""

    operations: int = 0
    torn: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)


class Worker:
    """One process's loop of operations."""

    def __init__(self, client: Client, plan: Plan, log: Log, seed: int) -> None:
        self._plan = plan
        self._log = log
        self._rng = random.Random(seed)
        self._swaps: list[Swap] = [client.swap(type_, plan.wide, TYPES[type_]) for type_ in range(plan.types)]
        self._sequence = 0
        self._scratch = bytearray(plan.page_size)
        self.report = Report()

    def run(self, operations: int, stop: Callable[[], bool] = lambda: False) -> Report:
        """Does so many, or fewer when told to stop or a page was torn."""
        share = self._plan.store_share
        steps: list[tuple[Callable[[], None], float]] = [
            (self._store, share * 0.75),
            (self._store_many, share * 0.1),
            (self._store_zeros, share * 0.15),
            (self._load, (0.95 - share) * 0.6),
            (self._load_into, (0.95 - share) * 0.3),
            (self._load_many, (0.95 - share) * 0.1),
            (self._invalidate, 0.045),
            (self._sync, 0.005),
        ]
        done, weights = zip(*steps, strict=True)
        while (
            self.report.operations < operations and self._log.room > BATCH_MAX and not self.report.torn and not stop()
        ):
            (step,) = self._rng.choices(done, weights)
            try:
                step()
            except EXPECTED as error:
                self.report.refused[type(error).__name__] += 1
            self.report.operations += 1
        return self.report

    def _place(self) -> tuple[Swap, int, int]:
        type_ = self._rng.randrange(self._plan.types)
        offset = self._rng.randrange(self._plan.hot if self._rng.random() < 0.5 else self._plan.wide)
        return self._swaps[type_], offset, type_ * TYPE_STEP + offset

    def _next(self) -> int:
        self._sequence += 1
        return value_id(self._log.writer, self._sequence)

    def _read(self, slot: int, page: bytes, at: int) -> None:
        try:
            self._log.end(at, read_page(slot, page))
        except TornPage as torn:
            self.report.torn.append(str(torn))

    def _store(self) -> None:
        swap, offset, slot = self._place()
        value = self._next()
        # In one buffer that is used again and again, as callers do: whatever a failed store left under way must not see the next page.
        self._scratch[:] = make_page(slot, value, self._plan.page_size)
        at = self._log.begin(Kind.STORE, slot, value)
        try:
            swap.store(offset, self._scratch)
        except gcma_shm.NurseryFull:
            self._log.refused(at)
            raise
        self._log.end(at)

    def _store_zeros(self) -> None:
        swap, offset, slot = self._place()
        at = self._log.begin(Kind.STORE, slot, ZEROS)
        swap.store(offset, bytes(self._plan.page_size))
        self._log.end(at)

    def _store_many(self) -> None:
        swap, first, slot = self._place()
        count = min(self._rng.randint(1, BATCH_MAX), self._plan.wide - first)
        step = self._rng.choice((0, 1, 1, 1))  # all into one slot, or neighbours
        values = [self._next() for _ in range(count)]
        slots = [slot + step * n for n in range(count)]
        pages = b"".join(make_page(s, v, self._plan.page_size) for s, v in zip(slots, values, strict=True))
        begun = [self._log.begin(Kind.STORE, s, v) for s, v in zip(slots, values, strict=True)]
        try:
            swap.store_many([first + step * n for n in range(count)], pages)
        except EXPECTED as error:
            for at in begun[: error.done]:
                self._log.end(at)
            raise
        for at in begun:
            self._log.end(at)

    def _load(self) -> None:
        swap, offset, slot = self._place()
        at = self._log.begin(Kind.LOAD, slot)
        page = swap.load(offset)
        if page is None:
            self._log.end(at)
        else:
            self._read(slot, page, at)

    def _load_into(self) -> None:
        swap, offset, slot = self._place()
        out = bytearray(self._plan.page_size)
        at = self._log.begin(Kind.LOAD, slot)
        if swap.load_into(offset, out):
            self._read(slot, bytes(out), at)
        else:
            self._log.end(at)

    def _load_many(self) -> None:
        swap, first, slot = self._place()
        count = min(self._rng.randint(1, BATCH_MAX), self._plan.wide - first)
        size = self._plan.page_size
        out = bytearray(count * size)
        begun = [self._log.begin(Kind.LOAD, slot + n) for n in range(count)]
        hits = swap.load_many(range(first, first + count), out)
        for n, (at, hit) in enumerate(zip(begun, hits, strict=True)):
            if hit:
                self._read(slot + n, bytes(out[n * size : (n + 1) * size]), at)
            else:
                self._log.end(at)

    def _invalidate(self) -> None:
        swap, offset, slot = self._place()
        at = self._log.begin(Kind.STORE, slot)
        swap.invalidate_page(offset)
        self._log.end(at)

    def _sync(self) -> None:
        self._swaps[self._rng.randrange(self._plan.types)].sync(self._plan.timeout_s)


class Guest:
    """A client that allocates and reserves over the cache, fills its buffers, and proves that nobody else wrote into them."""

    def __init__(self, client: Client, plan: Plan, seed: int, alone: bool) -> None:
        self._alone = alone
        self._client = client
        self._plan = plan
        self._rng = random.Random(seed)
        self._held: list[tuple[gcma_shm.Buffer, bytes]] = []
        self._reservations: list[gcma_shm.Reservation] = []
        self._filled = 0
        self.rounds = 0

    def run(self, rounds: int, stop: Callable[[], bool] = lambda: False) -> int:
        """Comes and goes so many times, or until told to stop; returns how many buffers it had."""
        while self.rounds < rounds and not stop():
            self.rounds += 1
            if self._held and self._rng.random() < 0.5:
                self._leave(self._rng.randrange(len(self._held)))
            elif self._rng.random() < 0.3:
                self._claim()
            elif self._rng.random() < 0.2:
                self._leave_all()
                for area in range(len(self._plan.area_pages)):  # with nothing held every area is to be had as a whole
                    with contextlib.nullcontext() if self._alone else contextlib.suppress(gcma_shm.ArenaExhausted):
                        self._come(area, self._plan.area_pages[area])
            else:
                area = self._rng.randrange(len(self._plan.area_pages))
                with contextlib.suppress(gcma_shm.ArenaExhausted):
                    self._come(area, self._rng.randint(1, max(self._plan.area_pages[area] * 2 // 3, 1)))
        self._leave_all()
        return self._filled

    def _claim(self) -> None:
        """Claims a reservation of before, or makes one; which is lent for a while then."""
        if len(self._reservations) > 3 and not any(
            buffer.offset == self._reservations[0].offset for buffer, _ in self._held
        ):
            self._reservations.pop(0).release()
        for reservation in self._reservations:
            with contextlib.suppress(gcma_shm.ArenaExhausted):  # claimed already
                self._fill(reservation.claim())
                return
        area = self._rng.randrange(len(self._plan.area_pages))
        with contextlib.suppress(gcma_shm.ArenaExhausted):
            pages = self._rng.randint(1, max(self._plan.area_pages[area] // 3, 1))
            self._reservations.append(self._client.reserve(pages * self._plan.page_size, f"a{area}"))

    def _come(self, area: int, pages: int) -> None:
        self._fill(self._client.alloc_contig(pages * self._plan.page_size, f"a{area}"))

    def _fill(self, buffer: gcma_shm.Buffer) -> None:
        self._filled += 1
        line = f"guest {os.getpid()} {self._filled}".encode().ljust(64, b"g")
        with buffer.view as view:
            view[:] = line * (buffer.nbytes // 64)
        self._held.append((buffer, line))

    def _leave_all(self) -> None:
        while self._held:
            self._leave(0)
        while self._reservations:
            self._reservations.pop().release()

    def _leave(self, which: int) -> None:
        buffer, line = self._held.pop(which)
        with buffer.view as view:
            assert view == line * (buffer.nbytes // 64), f"bytes of {buffer} have changed while it was held"
        buffer.free()


class Storm:
    """An embedded broker, its owner, and what is let loose on them. Use as a context manager."""

    def __init__(self, plan: Plan, directory: Path, seed: int) -> None:
        print(f"storm: seed {seed}, {plan}")
        self.plan = plan
        self.seed = seed
        self._directory = directory
        self._stack = contextlib.ExitStack()
        self._logs: list[Log] = []
        self.children: list[Child] = []
        self.reports: list[Report] = []
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
                timeout=plan.timeout_s,
            )
        )
        self.swaps: list[Swap] = [self.owner.swap(type_, plan.wide, TYPES[type_]) for type_ in range(plan.types)]
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
        self._over._words[0] = 1

    def begin(self) -> None:
        """Takes `end` back."""
        self._over._words[0] = 0

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
        for type_, swap in enumerate(self.swaps):
            for offset in range(self.plan.wide):
                slot = type_ * TYPE_STEP + offset
                at = log.begin(Kind.LOAD, slot)
                page = swap.load(offset)
                log.end(at, read_page(slot, page) if page is not None else None)

    def check(self) -> int:
        """Raises AssertionError when a page was torn or a load wrong; returns how many operations were checked."""
        torn = [what for report in self.reports for what in report.torn]
        assert not torn, f"seed {self.seed}: torn pages: {torn[:5]}"
        operations = [operation for log in self._logs for operation in log.operations()]
        wrong = check(operations)
        assert not wrong, f"seed {self.seed}: {len(wrong)} loads were wrong, such as {wrong[:5]}"
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
        yield owner
        return
    owner.close()  # the fork's share of it: its record is free for another
    with gcma_shm.connect(owner.endpoint, mapped=how == "mapped", timeout=plan.timeout_s) as client:
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
