"""Several threads over one arena under ThreadSanitizer, which reports no race but those that are planted.

Twice: as it is, and with a lock of the interpreter that orders nothing (gil.h), so that only what the protocol itself orders is in order.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.disks import needs_direct
from tests.sanitize.runtime import FOUND, HERE, THREADS, Sanitized, blind_options, preloaded

SECONDS = float(os.environ.get("GCMA_SANITIZE_S", "3"))
PLANTED_S = 400.0  # a bound: the first report ends the run
WHY_NOT = preloaded(THREADS)
pytestmark = [
    pytest.mark.slow,  # with its build
    pytest.mark.timeout(900 + 3 * SECONDS),
    pytest.mark.skipif(isinstance(WHY_NOT, str), reason=str(WHY_NOT)),
]


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Sanitized:
    return Sanitized(THREADS, tmp_path_factory)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Sanitized:
    return Sanitized(THREADS, tmp_path_factory, "-include", str(HERE / "planted.h"))


def test_what_python_orders(core: Sanitized, tmp_path: Path) -> None:
    done = core.run("tests.sanitize.threads", tmp_path, "--seconds", SECONDS)
    assert done.returncode == 0, done.stdout


def test_what_the_protocol_orders(core: Sanitized, tmp_path: Path) -> None:
    needs_direct(tmp_path)
    spill_dir = tmp_path / "spill"
    spill_dir.mkdir()
    done = core.run(
        "tests.sanitize.threads",
        spill_dir,
        "--seconds",
        SECONDS,
        "--blind",
        "--spill-io",
        "direct",
        options=blind_options(tmp_path),
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("plant", "where"),
    [
        ("plain_store", ["_publish", "_fill", "_begin_type", "_abandon", "_promote", "_sweep_nursery", "Span_"]),
        ("relaxed_cas", ["_store_page", "_refault", "gcma_copy", "Span_"]),
        ("relaxed_done", ["Span_"]),
        ("no_announcement", ["Span_"]),
        ("untold_copy", ["gcma_copy"]),
        ("untold_checksum", ["gcma_look"]),
        ("untold_write", ["_spill_write", "pwritev"]),
    ],
)
def test_a_planted_race_is_reported(plant: str, where: list[str], planted: Sanitized, tmp_path: Path) -> None:
    spill_dir = tmp_path / "spill"
    spill_dir.mkdir()
    done = planted.run(
        "tests.sanitize.threads", spill_dir, "--seconds", PLANTED_S, "--blind", plant=plant,
        options=f"halt_on_error=1:{blind_options(tmp_path)}",
    )  # fmt: skip
    assert done.returncode == FOUND, done.stdout
    assert "WARNING: ThreadSanitizer: data race" in done.stdout
    assert any(function in done.stdout for function in where), "another race than the planted one"
