"""Several processes on the same slots while buffers come and go over their pages, some of them stopped or killed meanwhile.

Each load is checked to be a whole value that was current at some moment between its start and its end (tests/register.py), and no buffer's
bytes may change. GCMA_SOAK_S=600 makes each test rage that many seconds instead of a few thousand operations.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.storm import HOWS, How, Plan, Storm, progress, rage
from tests.invariants import check_at_rest
from tests.processes import Child, eventually
from tests.register import Log

SOAK_S = float(os.environ.get("GCMA_SOAK_S", "0"))
OPERATIONS = 250_000 if SOAK_S else 1500
pytestmark = pytest.mark.timeout(120 + 3 * SOAK_S)

# What must have happened, or the test has not tested it.
OCCURRED = (
    "stores", "stores_zero", "overwrites_saved", "hits_nursery", "hits_area", "hits_zero", "hits_spill", "misses", "invalidations",
    "cleaned", "refaults", "promotions", "evictions", "discards", "orphans_freed", "heals", "direct_reclaims",
)  # fmt: skip
NEVER_OCCURRED = ("refused_closed", "refused_spill_error", "refused_spill_corrupt", "refused_damaged")


@pytest.fixture
def seed() -> int:
    """Printed by the storm; GCMA_SEED repeats one."""
    return int(os.environ.get("GCMA_SEED", random.SystemRandom().randrange(1 << 32)))


def finish(storm: Storm) -> None:
    """Everything that must hold when the storm is over."""
    storm.read_all()
    assert storm.check() > 0
    assert eventually(storm.alone), f"clients or buffers are left: {storm.owner.stats()['broker']}, {storm.owner.areas()}"
    for swap in storm.swaps:
        swap.sync(storm.plan.timeout_s)
    check_at_rest(storm.owner.stats()["arena"]["name"], storm.spill_dir())
    counters = storm.counters()
    assert not {name: counters[name] for name in NEVER_OCCURRED if counters[name]}


def soak_s() -> float | None:
    return SOAK_S or None


@contextlib.contextmanager
def stopped(pid: int) -> "contextlib.AbstractContextManager[None]":  # type: ignore[misc]
    """SIGSTOP, until SIGCONT."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
