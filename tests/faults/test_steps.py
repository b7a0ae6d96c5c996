"""A client stopped, killed, or asleep while its types end, at each single step of each operation (steps.py, in a build of its own)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.builds import HERE, ROOT, build, environment
from tests.faults.disks import needs_direct

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension with a hook before every atomic operation."""
    return build(tmp_path_factory, "-include", str(HERE / "steps.h"))


@pytest.mark.parametrize("what", ["stop", "kill", "lives"])
def test_a_client_at_every_step(what: str, core: Path, tmp_path: Path) -> None:
    """stop, kill: whole areas are to be had, its slots are whole and current, all of it comes back. lives: whoever has its slots by the
    time that it wakes keeps what he stored.
    """
    command = [sys.executable, "-m", "tests.faults.steps", what]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(core) | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all well" in done.stdout
    if what != "lives":
        needs_direct(tmp_path)  # or the scenes that read so were left out
