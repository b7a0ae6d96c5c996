"""CPython's own tests of its pools, queues and pipes: with ArenaExecutor, and with the reducer registered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpython.where import HOW, has

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 900.0  # a bound: each takes less than a minute on an idle machine, and a loaded one ten times as long


def run(program: str, *arguments: str, at_least: int) -> None:
    """Runs one of the programs in tests/cpython (which put things in others' places, so they are not imported here)."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.cpython.{program}", *arguments],
        cwd="/",
        env=os.environ | {"GCMA_SIZE": "32M", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-20_000:]
    assert done.stderr.count("... ok") >= at_least, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not has("test_concurrent_futures"), reason=HOW)
@pytest.mark.timeout(WAIT_S + 60)
@pytest.mark.parametrize(("method", "at_least"), [("fork", 40), ("spawn", 25), ("forkserver", 25)])
def test_the_executor_passes_cpythons_tests(method: str, at_least: int) -> None:
    run("futures", method, at_least=at_least)


@pytest.mark.slow
@pytest.mark.skipif(not has("_test_multiprocessing"), reason=HOW)
@pytest.mark.timeout(WAIT_S + 60)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_reducer_breaks_none_of_cpythons_tests(method: str) -> None:
    run("queues", method, at_least=80)
