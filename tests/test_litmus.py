"""The protocol's fence patterns, run on this machine: a forbidden outcome is never seen, and would be if the fence were missing.

tests/litmus/README.md tells the patterns. Here each runs for a moment; `GCMA_SOAK_S` makes it run for that many seconds.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "litmus" / "litmus.c"
PATTERNS = (
    "claim_filling",
    "taking_filling",
    "taking_life",
    "life_bytes",
    "publish_load",
    "lend_load",
    "claim_bytes",
    "load_claim_lend",
)
STORE_BUFFERING = {"claim_filling", "taking_filling", "taking_life"}
RUNS = 50_000
RUNS_MAX = 64 * RUNS  # until the variant shows itself, when something else takes the processors
SOAK_S = float(os.environ.get("GCMA_SOAK_S", "0"))
pytestmark = [
    pytest.mark.timeout(900 + 3 * SOAK_S),
    pytest.mark.skipif(
        len(os.sched_getaffinity(0)) < 2,
        reason="two threads have to run at once, and this process may use one processor",
    ),
]


@dataclass(frozen=True)
class Count:
    expected: str  # "never", "sometimes", "perhaps" or "unobservable"
    forbidden: int
    runs: int
    outcomes: str


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled as the product is: with Python's compiler and its optimisation."""
    target = tmp_path_factory.mktemp("litmus") / "litmus"
    compiler = shlex.split(sysconfig.get_config_var("CC"))
    options = ["-O2", "-std=c11", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{ROOT / 'gcma_shm'}"]
    command = [*compiler, *options, "-o", str(target), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    return target


def run(program: Path, pattern: str, runs: int) -> dict[str, Count]:
    """The counts of the pattern as it is, "whole", and of its variant, "without"."""
    done = subprocess.run([program, str(runs), pattern], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    counts = {}
    for line in done.stdout.splitlines():
        name, variant, expected, forbidden, times, outcomes = line.split(maxsplit=5)
        assert name == pattern
        counts[variant] = Count(expected, int(forbidden), int(times), outcomes)
    return counts


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_forbidden_outcome_is_never_seen(program: Path, pattern: str) -> None:
    ends = time.monotonic() + SOAK_S / len(PATTERNS)
    while True:
        count = run(program, pattern, RUNS_MAX if SOAK_S else RUNS)["whole"]
        assert count.runs >= RUNS
        assert count.forbidden == 0, f"{pattern}: {count.outcomes}"
        if time.monotonic() >= ends:
            break


@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_its_fence_it_is_seen_where_the_machine_can_show_it(program: Path, pattern: str) -> None:
    runs = RUNS
    while True:
        count = run(program, pattern, runs)["without"]
        if count.expected != "sometimes" or count.forbidden:
            break
        assert runs < RUNS_MAX, f"{pattern}: not once in {runs} runs: this harness would see nothing: {count.outcomes}"
        runs *= 4
    if count.expected == "unobservable":
        assert count.forbidden == 0, f"{pattern}: this architecture cannot show that: {count.outcomes}"
    if pattern in STORE_BUFFERING and platform.machine() == "x86_64":
        assert count.forbidden


def test_every_pattern_is_tested_and_told(program: Path) -> None:
    done = subprocess.run([program, "1"], capture_output=True, text=True, check=True)
    assert list(dict.fromkeys(line.split()[0] for line in done.stdout.splitlines())) == list(PATTERNS)
    readme = (SOURCE.parent / "README.md").read_text()
    for pattern in PATTERNS:
        assert (SOURCE.parent / f"{pattern}.litmus").exists()
        assert f"`{pattern}`" in readme
