"""A broker killed before each change that it makes in the arena (crashes.py, in a build of its own), and recoveries that leave something out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.builds import HERE, ROOT, build, environment

pytestmark = pytest.mark.timeout(3600)

# Of each thing that a broker does, twice so many changes are all tried, and of those behind them some by chance; 0: all (`make soak`). The
# planted faults show that it is enough.
DENSE = os.environ.get("GCMA_CRASH_DENSE", "8")
ROUNDS = "40" if DENSE != "0" else "3000"
SEED = "11"  # for faults that some changes alone bring to light: another might, once in a thousand, try none of them


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension with a hook before every atomic operation."""
    return build(tmp_path_factory, "-include", str(HERE / "steps.h"))


def run(core: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.faults.crashes", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(core), capture_output=True, text=True, check=False)
    print(done.stdout)
    return done


@pytest.mark.slow
def test_a_broker_killed_at_every_change(core: Path) -> None:
    """Acknowledged pages, buffers, names, claims and clients are there; what was under way is wholly done or wholly not; nothing is held by
    nobody; and in the end everything can be had again.
    """
    done = run(core, "--dense", DENSE, "--rounds", ROUNDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all well" in done.stdout


@pytest.mark.parametrize(
    ("fault", "scene", "expected"),
    [
        ("filling", "promote", "still filling area page"),
        ("claims", "clean", "somebody holds its place in the file"),
        ("words", "invalidate_area", "a slot of no living type"),
        ("range", "alloc", "its gauge says"),
        ("count", "drain", "pages hold cache"),
        ("entries", "alloc", "its gauge says"),
        ("seize", "lend_after_a_dead_claimer", "the broker has it in its hands"),
        ("records", "hello", "State.TAKEN"),
        ("files", "swap_init", "spill files"),
        ("sharers", "share_a_claim_and_leave_it", "claim word"),
        ("burying", "lend_after_a_dead_claimer", "State.DEAD"),
        ("forks", "inherit", "is not process"),
        ("heirs", "inherit", "holders"),
        ("for good", "a_keeper_ends", "holders"),
        ("keepers", "unlink_what_others_hold", "kept"),
        ("names", "keep_until_it_is_unlinked", "kept"),
        ("names", "unlink_what_others_hold", "kept"),
    ],
)
def test_a_recovery_that_leaves_something_out_is_found(fault: str, scene: str, expected: str, core: Path) -> None:
    """The proof above can fail."""
    done = run(core, "--dense", DENSE, "--no-takeovers", "--seed", SEED, "--fault", fault, scene)
    assert done.returncode != 0, f"not found: {done.stdout}"
    assert f"{scene}, killed at change" in done.stderr, done.stderr
    assert expected in done.stderr, done.stderr
