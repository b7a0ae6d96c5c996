"""A fork in the middle of a batch, at each single step of it (forks.py, in a build with hooks)."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.faults.builds import HERE, ROOT, build, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_fork_at_every_step_of_a_batch(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The child uses types and buffers as a client of its own; the batch ends as if nobody had forked, and is acknowledged."""
    core = build(tmp_path_factory, "-include", str(HERE / "steps.h"))
    command = [sys.executable, "-m", "tests.faults.forks"]
    done = subprocess.run(command, cwd=ROOT, env=environment(core), capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all well" in done.stdout
