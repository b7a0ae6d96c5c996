"""Several processes on the same slots while buffers come and go over their pages, some of them stopped or killed meanwhile.

Each load is checked to be a whole value that was current at some moment between its start and its end (gcma_shm.clients.linearizable), and no buffer's
bytes may change. Each test is one round over a fresh arena; GCMA_SOAK_S=600 makes it as many as fit into that many seconds.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.storm import HOWS, How, Plan, Storm, progress, rage
from tests.invariants import check_at_rest
from tests.processes import Child, eventually, stopped
from tests.register import Log

SOAK_S = float(os.environ.get("GCMA_SOAK_S", "0"))
OPERATIONS = 1500
ENDLESS = 100_000  # of a worker that is told when to stop
pytestmark = pytest.mark.timeout(600 + 3 * SOAK_S)

# What must have happened, or the test has not tested it.
OCCURRED = (
    "stores", "stores_zero", "overwrites_saved", "hits_nursery", "hits_area", "hits_zero", "hits_spill", "misses", "invalidations",
    "cleaned", "refaults", "promotions", "evictions", "discards", "orphans_freed", "heals", "direct_reclaims",
)  # fmt: skip
NEVER_OCCURRED = ("refused_closed", "refused_spill_error", "refused_spill_corrupt", "refused_damaged")


def seeds() -> Iterator[int]:
    """One seed, or seeds until the time of a soak is over. GCMA_SEED repeats the one that a storm printed."""
    deadline = time.monotonic() + SOAK_S
    seed = int(os.environ.get("GCMA_SEED", random.SystemRandom().randrange(1 << 32)))
    yield seed
    while time.monotonic() < deadline:
        seed += 1
        yield seed


def finish(storm: Storm) -> None:
    """Everything that must hold when the storm is over."""
    storm.read_all()
    assert storm.check() > 0
    assert eventually(storm.alone), (
        f"clients or buffers are left: {storm.owner.stats()['broker']}, {storm.owner.areas()}"
    )
    for swap in storm.swaps:
        swap.sync(storm.plan.timeout_s)
    check_at_rest(storm.owner.stats()["arena"]["name"], storm.spill_dir())
    counters = storm.counters()
    assert not {name: counters[name] for name in NEVER_OCCURRED if counters[name]}


@pytest.mark.parametrize("page_size", [4096, 65536])
def test_every_load_returns_a_whole_value_that_was_current(page_size: int, tmp_path: Path) -> None:
    plan = Plan(page_size=page_size, wide=200 if page_size == 4096 else 120)
    for seed in seeds():
        with Storm(plan, tmp_path / str(seed), seed) as storm:
            rage(storm, (*HOWS, "mapped"), OPERATIONS)
            for _ in range(10):
                if all(storm.counters()[name] for name in OCCURRED):
                    break
                rage(storm, ("mapped", "inherited"), 500)
            finish(storm)
            missing = [name for name in OCCURRED if not storm.counters()[name]]
            assert not missing, f"did not occur: {missing}"
            refused = sum((report.refused for report in storm.reports), Counter())
            assert not refused, "nobody was stopped, so nobody had to be waited for"


def test_whole_areas_are_to_be_had_while_clients_are_stopped(tmp_path: Path) -> None:
    """Promise 1, and 5: a client stopped at any point of a store or load, often in the middle of a page's copy, is in nobody's way."""
    plan = Plan(page_size=65536, wide=100, store_share=0.7, timeout_s=2.0)
    for seed in seeds():
        rng = random.Random(seed)
        with Storm(plan, tmp_path / str(seed), seed) as storm, contextlib.ExitStack() as stack:
            workers = [stack.enter_context(storm.worker(how, ENDLESS)) for how in ("mapped", "inherited", "mapped")]
            for worker in workers:
                progress(worker, 20)
            for number in range(60):
                worker, other = rng.sample(workers, 2)
                progress(worker, rng.randrange(3))
                with stopped(worker[0].pid), contextlib.ExitStack() as held:
                    for area, pages in enumerate(plan.area_pages):
                        buffer = held.enter_context(storm.owner.alloc_contig(pages * plan.page_size, f"a{area}"))
                        with buffer.view as view:
                            view[:] = b"stop" * (buffer.nbytes // 4)
                            if number % 5 == 0:
                                progress(other, 20)
                            assert view == b"stop" * (buffer.nbytes // 4), (
                                "a stopped client's store, or another's, went into a buffer"
                            )
            storm.end()
            for child, _ in workers:
                storm.report(child)
            finish(storm)


def test_kill_at_any_moment_loses_nothing_stored_and_leaks_nothing(tmp_path: Path) -> None:
    """More processes die than there are client numbers, workers with grants and claims in their hands and guests with buffers."""
    plan = Plan(wide=120, clients=12, store_share=0.6)
    for seed in seeds():
        rng = random.Random(seed)
        with Storm(plan, tmp_path / str(seed), seed) as storm:
            for number in range(12):
                storm.begin()
                with contextlib.ExitStack() as stack:
                    guest = stack.enter_context(storm.guest(1 << 30))
                    workers = [stack.enter_context(storm.worker(how, ENDLESS)) for how in _pick(rng, number)]
                    for worker in workers[1:]:
                        _kill_soon(worker, rng)
                    if number % 2:
                        guest.kill()
                    storm.end()
                    storm.report(workers[0][0])
                    if not number % 2:
                        guest.receive()
                        guest.wait()
                assert eventually(storm.alone), (
                    f"clients or buffers are left: {storm.owner.stats()['broker']}, {storm.owner.areas()}"
                )
            finish(storm)


def _pick(rng: random.Random, number: int) -> tuple[How, ...]:
    return HOWS[number % 3], rng.choice(("mapped", "inherited")), rng.choice(HOWS)


def _kill_soon(worker: tuple[Child, Log], rng: random.Random) -> None:
    progress(worker, rng.randrange(1, 60))
    for _ in range(rng.randrange(2000)):  # somewhere in an operation, not only where one has just ended
        pass
    worker[0].kill()


def test_pages_go_on_while_the_broker_is_stopped(tmp_path: Path) -> None:
    """Mapped clients reclaim nursery pages themselves; clients by messages wait, and their failed stores may land later, whole."""
    plan = Plan(page_size=65536, wide=100, timeout_s=1.0)
    for seed in seeds():
        rng = random.Random(seed)
        with Storm(plan, tmp_path / str(seed), seed) as storm, contextlib.ExitStack() as stack:
            mapped = [stack.enter_context(storm.worker(how, ENDLESS)) for how in ("mapped", "inherited")]
            by_messages = stack.enter_context(storm.worker("messages", ENDLESS))
            for worker in (*mapped, by_messages):
                progress(worker, 20)
            for _ in range(8):
                before = storm.counters()["direct_reclaims"]
                with stopped(storm.owner.broker_pid):
                    for worker in mapped:
                        progress(worker, 6 * plan.nursery_pages + rng.randrange(100))
                assert storm.counters()["direct_reclaims"] > before
                progress(by_messages, 1)
            storm.end()
            for child, _ in (*mapped, by_messages):
                storm.report(child)
            finish(storm)


@pytest.mark.parametrize("page_size", [4096, 65536])
def test_stops_and_kills_of_everyone_at_once(page_size: int, tmp_path: Path) -> None:
    """Clients stopped and killed, also while stopped, the broker stopped, guests coming and going: the whole history holds."""
    plan = Plan(page_size=page_size, wide=100, timeout_s=2.0, store_share=0.5)
    for seed in seeds():
        rng = random.Random(seed)
        with Storm(plan, tmp_path / str(seed), seed) as storm:
            for number in range(6):
                storm.begin()
                with contextlib.ExitStack() as stack:
                    stack.enter_context(storm.guest(1 << 30))  # killed in the end, whatever it holds
                    workers = [stack.enter_context(storm.worker(how, ENDLESS)) for how in ("mapped", *HOWS)]
                    killed = set()
                    for worker in workers:
                        progress(worker, 1)  # connected
                    for worker in workers[1:]:
                        child = worker[0]
                        progress(worker, rng.randrange(1, 30))
                        with stopped(storm.owner.broker_pid if rng.random() < 0.3 else child.pid):
                            if rng.random() < 0.5:
                                os.kill(child.pid, signal.SIGKILL)
                                killed.add(child)
                            progress(workers[0], 5)
                        if child in killed:
                            child.wait()
                    storm.end()
                    for child, _ in workers:
                        if child not in killed:
                            storm.report(child)
                assert eventually(storm.alone), (
                    f"round {number}: {storm.owner.stats()['broker']}, {storm.owner.areas()}"
                )
            finish(storm)
