"""Errors, short writes and short reads of spill files, injected while broker and clients run (files.py, in a build of its own)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.builds import HERE, ROOT, build, environment

pytestmark = pytest.mark.timeout(300)
SCENES = (
    "errors_of_writing",
    "a_bad_block",
    "short_writes",
    "errors_of_reading",
    "one_file_of_two",
    "retries_have_a_pace",
)


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension whose pwritev and pread fail by command."""
    return build(tmp_path_factory.mktemp("files"), "-include", str(HERE / "files.h"))


@pytest.mark.parametrize("scene", SCENES)
def test_files_that_fail_by_command(scene: str, core: Path, tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.write_bytes(bytes(4096))
    variables = environment(core) | {"GCMA_TEST_FILES": str(words)}
    command = [sys.executable, "-m", "tests.faults.files", scene]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all well" in done.stdout
