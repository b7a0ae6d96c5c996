"""The recorded counts hold, and would not hold for a build that takes forty instructions more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gcma_shm import _core
from tests.faults.builds import build, environment
from tests.instructions import counts
from tests.instructions.driver import OPERATIONS

needs_valgrind = pytest.mark.skipif(counts.missing() is not None, reason=counts.missing() or "")
pytestmark = pytest.mark.timeout(counts.RUN_S)
PRODUCT = Path(_core.__file__)


def expected() -> tuple[counts.Counts, float]:
    return counts.recorded(json.loads(counts.RECORD.read_text()), counts.built_by(PRODUCT))


@needs_valgrind
def test_an_operation_takes_as_many_instructions_as_were_recorded() -> None:
    found, (record, margin) = counts.measure(PRODUCT), expected()
    print(found)
    wrong = counts.beyond(found, record, margin)
    assert not wrong, f"{wrong}; if that is meant: python -m tests.instructions.counts --record"


@needs_valgrind
def test_forty_instructions_more_are_noticed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """In each single store and load; in a batch as well."""
    header = Path(__file__).with_name("slower.h")
    core = build(tmp_path_factory, "-O2", "-include", str(header))
    record, _ = expected()
    wrong = counts.beyond(counts.measure(core, environment(core)), record, counts.MARGIN)
    slower = ("load", "load_into", "store_behind", "load_many", "store_many_behind")
    assert {line.partition(":")[0] for line in wrong} >= set(slower)


def test_a_build_without_a_record_is_held_against_the_nearest() -> None:
    record = {
        name: dict.fromkeys(OPERATIONS, float(n))
        for n, name in enumerate(("cpython-3.11 gcc-12", "cpython-3.13 gcc-14"))
    }
    assert counts.recorded(record, "cpython-3.13 gcc-14") == (record["cpython-3.13 gcc-14"], counts.MARGIN)
    assert counts.recorded(record, "cpython-3.13 clang-19") == (record["cpython-3.13 gcc-14"], counts.MARGIN_UNKNOWN)
    assert counts.recorded(record, "cpython-3.15 gcc-16") == (record["cpython-3.11 gcc-12"], counts.MARGIN_UNKNOWN)


def test_a_count_is_of_the_extension_alone(tmp_path: Path) -> None:
    """Neither what it calls, nor what copies the page."""
    part = tmp_path / "part"
    part.write_text(
        "ob=/lib/python\nfn=eval\n0 1000\ncob=/x/_core.so\ncfn=load\ncalls=2 0\n0 70\n\n"
        "ob=/x/_core.so\nfn=load\n0 50\ncfn=copy_ahead\ncalls=2 0\n0 20\n\nfn=copy_ahead\n0 20\n\nfn=load'2\n0 3\n\n"
        "ob=/lib/libc.so\nfn=memcpy\n0 9\n\ntotals: 1082\n"
    )
    assert counts.own_cost(part, Path("/y/_core.so")) == 53
