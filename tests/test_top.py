"""`gcma top`: figures a second, of the arena and of each client, from the counters in the arena."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

import gcma_shm
from gcma_shm._core import COUNTERS
from gcma_shm.broker import top
from gcma_shm.broker.cli import main
from gcma_shm.broker.top import Sample, _look, rates_between
from tests.processes import broker, eventually

PAGE = 4096


def sample(
    at: float,
    clients: dict[tuple[int, int], dict[str, int]],
    allocations: int = 0,
    epoch: int = 1,
    arena_id: bytes = b"a",
) -> Sample:
    nobody: dict[tuple[int, int], dict[str, int]] = {(0, 0): {}, (1, 0): {}}
    counters = {key: dict.fromkeys((*COUNTERS, "claims"), 0) | counted for key, counted in (nobody | clients).items()}
    return Sample(at, arena_id, epoch, counters, {number: 100 + number for number, _ in counters}, allocations)


def test_rates_are_differences_by_the_time_between() -> None:
    before = sample(10.0, {(2, 1): {"stores": 100, "hits_area": 7, "claims": 1}, (3, 1): {"stores": 5}}, 40)
    after = sample(12.0, {(2, 1): {"stores": 300, "hits_area": 8, "misses": 3, "claims": 5}, (3, 1): {"stores": 5}}, 45)
    rates = rates_between(before, after)
    assert rates is not None
    assert rates["seconds"] == 2.0
    assert {name: value for name, value in rates["arena"].items() if value} == {
        "stores": 100.0, "loads": 2.0, "hits_area": 0.5, "misses": 1.5, "claims": 2.0, "allocations": 2.5,
    }  # fmt: skip
    two, three = (one for one in rates["clients"] if one["client"] in (2, 3))
    assert (two["pid"], two["stores"], two["claims"]) == (102, 100.0, 2.0)
    assert not any(value for name, value in three.items() if name not in ("client", "pid"))


def test_a_client_that_leaves_or_comes_in_anothers_place() -> None:
    before = sample(0.0, {(2, 1): {"stores": 100}})
    gone = rates_between(before, sample(1.0, {(0, 0): {"stores": 130}}))
    assert gone is not None
    assert gone["arena"]["stores"] == 30.0, "what it did before it left counts"
    assert [one["client"] for one in gone["clients"]] == [1]
    another = rates_between(before, sample(1.0, {(0, 0): {"stores": 100}, (2, 2): {"stores": 4}}))
    assert another is not None
    assert another["arena"]["stores"] == 4.0
    assert another["clients"][-1]["stores"] == 4.0, "another one's record does not begin with what the last one did"
    moving = rates_between(before, sample(1.0, {}))
    assert moving is not None
    assert moving["arena"]["stores"] == 0.0, "seen while its counts moved to nobody's record"


def test_another_arena_is_not_compared() -> None:
    before = sample(0.0, {}, allocations=7, epoch=3)
    assert rates_between(before, sample(1.0, {}, allocations=7, epoch=2)) is None
    assert rates_between(before, sample(1.0, {}, allocations=6, epoch=3)) is None
    assert rates_between(before, sample(0.0, {}, allocations=7, epoch=3)) is None
    assert rates_between(before, sample(1.0, {}, allocations=7, epoch=3)) is not None
    assert rates_between(before, sample(1.0, {}, allocations=9, epoch=3, arena_id=b"b")) is None


def test_a_broker_that_is_started_again_has_another_arena() -> None:
    """Of the same epoch, and with as many allocations."""
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    looks = []
    for _ in range(2):
        with broker(endpoint):
            looks.append(_look(endpoint))
    before, after = looks
    assert (before.epoch, before.allocations) == (after.epoch, after.allocations)
    assert rates_between(before, after) is None


@dataclass
class Busy:
    """An arena in which one client stores, loads and allocates all the time."""

    endpoint: str
    client: int
    rounds: int = 0

    def sleep(self, seconds: float) -> None:
        """So long, and until the client had its turn."""
        time.sleep(seconds)
        before = self.rounds
        assert eventually(lambda: self.rounds >= before + 2)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@contextmanager
def busy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Busy]:
    """Between two looks its client has done something."""
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    stop = threading.Event()
    with broker(endpoint, "--area", "a=4M"), gcma_shm.connect(endpoint) as client:
        swap, arena = client.swap(0, 100), Busy(endpoint, client.number)
        monkeypatch.setattr(top, "time", arena)

        def work() -> None:
            while not stop.is_set():
                n = arena.rounds = arena.rounds + 1
                swap.store(n % 50, n.to_bytes(8, "little") * (PAGE // 8))
                swap.load(n % 50)
                swap.load(99)
                client.alloc_contig(PAGE).free()

        worker = threading.Thread(target=work)
        worker.start()
        try:
            yield arena
        finally:
            stop.set()
            worker.join()


def test_what_it_tells_of_an_arena_that_is_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with busy(monkeypatch) as arena_used:
        arguments = ["top", "--endpoint", arena_used.endpoint, "--interval", "0.2", "--count", "2"]
        assert main([*arguments, "--json"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(lines) == 2
        for told in lines:
            assert told["seconds"] >= 0.2
            arena: dict[str, Any] = told["arena"]
            assert arena["stores"] > 0
            assert arena["misses"] > 0
            assert arena["allocations"] > 0
            assert arena["loads"] == pytest.approx(
                arena["misses"] + sum(arena[name] for name in arena if name.startswith("hits_")), abs=1
            )
            (mine,) = [one for one in told["clients"] if one["pid"] == os.getpid()]
            assert mine["stores"] == pytest.approx(arena["stores"], rel=0.01)
        assert main(arguments) == 0
        head, *rows = capsys.readouterr().out.splitlines()
        assert head.split()[:5] == ["time", "client", "process", "loads", "nursery"]
        assert sum(re.match(r"\d\d:\d\d:\d\d +all ", row) is not None for row in rows) == 2
        assert any(re.match(rf"\d\d:\d\d:\d\d +\d+ +{os.getpid()} ", row) for row in rows)
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith("gcma top: there is no arena")


def test_a_terminal_is_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    with busy(monkeypatch) as used, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        assert main(["top", "--endpoint", used.endpoint, "--interval", "0.1", "--count", "2"]) == 0
    _, first, second = screen.getvalue().split("\x1b[H\x1b[J")
    for drawn in (first, second):
        lines = drawn.splitlines()
        assert lines[2].split()[:3] == ["client", "process", "loads"]
        assert [line.split()[0] for line in lines[3:]] == ["all", "broker", str(used.client)]


@pytest.mark.parametrize("wrong", [["--interval", "0"], ["--interval", "nan"], ["--count", "0"]], ids=" ".join)
def test_what_it_refuses(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["top", *wrong])
    assert "--interval must be more than 0, --count at least 1" in capsys.readouterr().err
