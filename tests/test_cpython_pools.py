"""CPython's own tests of its pools, queues and pipes: with ArenaExecutor, and with the reducer registered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .cpython_futures import ABSENT

HERE = Path(__file__).parent
WAIT_S = 280.0  # a bound: each takes less than a minute on an idle machine


def run(program: str, *arguments: str, at_least: int) -> None:
    """Runs one of the programs beside this file, which run CPython's tests. Skips where they are not installed."""
    done = subprocess.run(
        [sys.executable, str(HERE / program), *arguments],
        cwd="/",
        env=os.environ | {"GCMA_SIZE": "32M"},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    if done.returncode == ABSENT:
        pytest.skip(f"CPython's tests are not installed (Debian: libpython3.X-testsuite): {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr[-20_000:]
    assert done.stderr.count("... ok") >= at_least, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("method", "at_least"), [("fork", 40), ("spawn", 25), ("forkserver", 25)])
def test_the_executor_passes_cpythons_tests(method: str, at_least: int) -> None:
    run("cpython_futures.py", method, at_least=at_least)
