"""Errors, short writes and short reads of spill files, in each way of reading and writing them, and what file systems cannot do: injected while broker and clients run (files.py, in a build of its own)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.builds import HERE, ROOT, build, environment
from tests.faults.disks import needs_direct

pytestmark = pytest.mark.timeout(1200)
SCENES = (
    "errors_of_writing",
    "a_bad_block",
    "short_writes",
    "errors_of_reading",
    "one_file_of_two",
    "retries_have_a_pace",
    "holes",
    "larger_blocks",
    "neighbours_in_one_write",
)
# In the other ways those of reading and writing; who asks for them makes no difference there.
IN_OTHER_WAYS = ("short_writes", "errors_of_reading", "neighbours_in_one_write")
RUNS = [
    *(("buffered", (scene,)) for scene in SCENES),
    ("uncached", (*IN_OTHER_WAYS, "flags_that_nobody_knows")),
    ("direct", (*IN_OTHER_WAYS, "a_bad_block")),
]


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension whose calls to the kernel fail by command."""
    return build(tmp_path_factory, "-include", str(HERE / "files.h"))


@pytest.mark.parametrize(
    ("spill_io", "scenes"), RUNS, ids=lambda value: value if isinstance(value, str) else "+".join(value)[:30]
)
def test_files_that_fail_by_command(spill_io: str, scenes: tuple[str, ...], core: Path, tmp_path: Path) -> None:
    if spill_io == "direct":
        needs_direct(tmp_path)
    words = tmp_path / "words"
    words.write_bytes(bytes(4096))
    variables = environment(core) | {"GCMA_TEST_FILES": str(words), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.faults.files", f"--spill-io={spill_io}", *scenes]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all well" in done.stdout
