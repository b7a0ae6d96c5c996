"""Which swap types are declared, their slots and their files."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from gcma_shm import layout
from gcma_shm.broker import reclaim
from gcma_shm.broker.direct import refuse_directory
from gcma_shm.broker.health import Health
from gcma_shm.broker.reclaim import ReclaimThread
from gcma_shm.broker.registry import TypeRegistry
from gcma_shm.errors import ArenaError, Closed, NoSuchType, SpillError
from tests.conftest import Bare
from tests.invariants import check_at_rest
from tests.processes import eventually


@pytest.fixture
def registry(bare: Bare) -> TypeRegistry:
    return TypeRegistry(bare.plane, bare.spill_dir)


def test_declared_and_found(registry: TypeRegistry, bare: Bare) -> None:
    slots = registry.declare(3, 100, "through")
    assert (slots.type, slots.life, slots.slots, slots.write_through) == (3, 1, 100, True)
    assert registry.find(3, 1) is slots
    assert registry.declare(3, 100, "through") is slots
    behind = registry.declare(4, 50, "behind")
    assert not behind.write_through
    assert registry.describe() == {
        3: {"slots": 100, "life": 1, "write": "through", "share": 100},
        4: {"slots": 50, "life": 1, "write": "behind", "share": 100},
    }
    files = sorted(bare.spill_dir.iterdir())
    assert [file.name for file in files] == ["003.1", "004.1"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


@pytest.mark.parametrize(("slots", "write"), [(99, "through"), (101, "through"), (100, "behind")])
def test_declared_otherwise(registry: TypeRegistry, slots: int, write: str) -> None:
    registry.declare(3, 100, "through")
    with pytest.raises(ValueError, match="100 slots"):
        registry.declare(3, slots, write)


def test_what_is_not_declared(registry: TypeRegistry) -> None:
    with pytest.raises(NoSuchType):
        registry.find(3, 1)
    registry.declare(3, 100, "through")
    registry.end(3, 1)
    with pytest.raises(Closed):
        registry.find(3, 1)
    with pytest.raises(NoSuchType):
        registry.find(3, 3)  # a life that never was
    with pytest.raises(Closed):
        registry.end(3, 1)


def test_the_lives_of_a_type(registry: TypeRegistry, bare: Bare) -> None:
    for life in (1, 3, 5):
        slots = registry.declare(3, 100, "through")
        assert slots.life == life
        assert [file.name for file in bare.spill_dir.iterdir()] == [f"003.{life}"]
        assert len(slots) == 0
        slots.store(0, b"x-gcma--" * 512)
        registry.end(3, life)
        assert not list(bare.spill_dir.iterdir())
        with pytest.raises(Closed):
            slots.load(0)
        check_at_rest(bare.arena.name)


def test_slots_are_bounded_and_given_back(registry: TypeRegistry) -> None:
    registry.declare(0, 400, "through")
    with pytest.raises(ValueError, match="at most 200"):
        registry.declare(1, 201, "through")
    assert registry.describe().keys() == {0}
    registry.declare(1, 200, "through")
    registry.end(0, 1)
    registry.declare(2, 400, "behind")


def test_a_file_that_cannot_be_made_changes_nothing(registry: TypeRegistry, bare: Bare) -> None:
    (bare.spill_dir / "003.1").mkdir()
    with pytest.raises(SpillError) as raised:
        registry.declare(3, 600, "through")
    assert raised.value.errno == 17
    assert registry.describe() == {}
    (bare.spill_dir / "003.1").rmdir()
    registry.declare(3, 600, "through")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EINVAL])
def test_a_question_for_direct_that_fails_changes_nothing(
    bare: Bare, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    geometry = dataclasses.replace(bare.plane.geometry, spill_io=layout.SPILL_IO.index("direct"))
    registry = TypeRegistry(bare.plane, bare.spill_dir)
    monkeypatch.setattr(registry, "_geometry", geometry)

    def failing(_file: Path, _page_size: int) -> str | None:
        if number == errno.EINVAL:
            return "not on this disk"
        raise OSError(number, os.strerror(number))

    for _ in range(2):
        with monkeypatch.context() as asked:
            asked.setattr("gcma_shm.broker.registry.why_not", failing)
            with pytest.raises(SpillError, match="--spill-io direct") as raised:
                registry.declare(3, 600, "through")
        assert raised.value.errno == number, "that of the question, not that of a file in the way"
        assert registry.describe() == {}
        assert not list(bare.spill_dir.iterdir())
        with monkeypatch.context() as asked:
            asked.setattr("gcma_shm.broker.direct.why_not", failing)
            with pytest.raises(ArenaError, match="--spill-io direct") as refused:
                refuse_directory(bare.spill_dir, 4096)
        assert refused.value.errno == number
        assert not list(bare.spill_dir.iterdir())
    monkeypatch.setattr("gcma_shm.broker.registry.why_not", lambda _file, _page_size: None)
    assert registry.declare(3, 600, "through").life == 1


def test_a_file_that_has_gone_is_no_obstacle_to_the_end(registry: TypeRegistry, bare: Bare) -> None:
    registry.declare(3, 10, "through")
    (bare.spill_dir / "003.1").unlink()
    registry.end(3, 1)
    assert registry.declare(3, 10, "through").life == 3


def test_the_reclaim_thread_outlives_what_fails(
    bare: Bare, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each part of a turn; the others have theirs all the same, and the thread ends when it is told to."""
    for pause in ("FAILED_S", "PUNCH_S", "WRITE_BEHIND_S", "DROP_S"):
        monkeypatch.setattr(f"gcma_shm.broker.reclaim.{pause}", 0.01)
    failed, served = Counter[str](), Counter[str]()

    class Failing:
        geometry = dataclasses.replace(bare.plane.geometry, spill_io=layout.SPILL_IO.index("uncached"))
        refused = 1

        def wake_sweep(self) -> None:
            served["wake_sweep"] += 1

        def __getattr__(self, part: str) -> Callable[..., Any]:
            def call(*_: Any) -> Any:
                if not failed[part]:
                    failed[part] += 1
                    raise OSError(errno.EIO, f"no {part}")
                served[part] += 1
                return {"sweep": 1, "punch": True, "retry_refused": ({}, 0)}.get(part)

            return call

    plane: Any = Failing()
    parts = {"sweep", "clean_until", "punch", "drop_cached", "retry_refused"}
    thread = ReclaimThread(plane, Health(0.0))
    try:
        assert eventually(lambda: set(served) == parts)
    finally:
        thread.stop()
    assert not thread._thread.is_alive()
    assert served["wake_sweep"] == 1
    assert set(failed) == parts
    assert {str(record.exc_info[1]) for record in caplog.records if record.exc_info} == {
        f"[Errno 5] no {part}" for part in parts
    }


def test_the_reclaim_thread_is_stopped_in_the_middle_of_its_nap(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reclaim, "NAP_S", 3600.0)
    thread = ReclaimThread(bare.plane, Health(0.0))
    # It says so before it sleeps; who takes that back from then on wakes it.
    assert eventually(lambda: bare.plane.read(layout.WAKE_AT) == 1)
    thread.stop()
    assert not thread._thread.is_alive()


def test_end_all(registry: TypeRegistry, bare: Bare) -> None:
    handles = [registry.declare(type_, 50, "behind") for type_ in range(10)]
    for handle in handles:
        handle.store(1, b"x-gcma--" * 512)
    registry.end_all()
    registry.end_all()
    assert registry.describe() == {}
    assert not list(bare.spill_dir.iterdir())
    for handle in handles:
        with pytest.raises(Closed):
            handle.load(1)


class Machine(RuleBasedStateMachine):
    """Any order of declaring and ending."""

    bare: Bare
    begun: dict[int, int]  # over all examples: lives go on counting in one arena

    def __init__(self) -> None:
        super().__init__()
        self.registry = TypeRegistry(self.bare.plane, self.bare.spill_dir)
        self.living: dict[int, int] = {}

    @rule(type_=st.integers(0, 5), slots=st.sampled_from([1, 60, 100, 250]))
    def declare(self, type_: int, slots: int) -> None:
        try:
            handle = self.registry.declare(type_, slots, "through")
        except ValueError:
            assert self.living.get(type_, slots) != slots or type_ not in self.living
            return
        assert self.living.get(type_, slots) == slots
        if type_ not in self.living:
            assert handle.life == self.begun.get(type_, -1) + 2
            assert len(handle) == 0
            self.begun[type_] = handle.life
            self.living[type_] = slots
        handle.store(slots - 1, (bytes([type_ + 1]) + b"-gcma--") * 512)

    @rule(type_=st.integers(0, 5))
    def end(self, type_: int) -> None:
        if type_ in self.living:
            self.registry.end(type_, self.begun[type_])
            del self.living[type_]
        else:
            with pytest.raises((Closed, NoSuchType)):
                self.registry.end(type_, self.begun.get(type_, 1))

    @invariant()
    def agree(self) -> None:
        assert {type_: d["slots"] for type_, d in self.registry.describe().items()} == self.living
        for type_, slots in self.living.items():
            assert (
                self.registry.find(type_, self.begun[type_]).load(slots - 1) == (bytes([type_ + 1]) + b"-gcma--") * 512
            )
        check_at_rest(self.bare.arena.name, self.bare.spill_dir)

    def teardown(self) -> None:
        self.registry.end_all()


def test_any_order_keeps_the_slots(bare: Bare) -> None:
    Machine.bare, Machine.begun = bare, {}
    run_state_machine_as_test(Machine, settings=settings(max_examples=25, stateful_step_count=20, deadline=None))
