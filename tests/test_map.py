"""`gcma map`: what each page of the areas holds, drawn and in bytes."""

from __future__ import annotations

import json
import struct
import tempfile
import tracemalloc
from collections.abc import Sequence
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest

import gcma_shm
from gcma_shm.broker.cli import main
from gcma_shm.broker.mapping import Run, _between, _cached, drawn
from tests.processes import broker, eventually

PAGE = 4096
MIB = 1 << 20
SETTLED_S = 1.0  # without stores, until there are more of them


def ranges(capsys: pytest.CaptureFixture[str], endpoint: str) -> dict[str, list[dict[str, Any]]]:
    assert main(["map", "--endpoint", endpoint, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["page_size"] == PAGE
    for area in found["areas"]:
        ends = [0, *(one["offset"] + one["size"] for one in area["ranges"])]
        assert [one["offset"] for one in area["ranges"]] == ends[:-1], "in order, without a gap"
        assert ends[-1] == area["size"]
    return {area["area"]: area["ranges"] for area in found["areas"]}


def bytes_of(kind: str, found: list[dict[str, Any]]) -> int:
    return sum(one["size"] for one in found if one["kind"] == kind)


def test_what_each_page_holds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    with (
        broker(endpoint, "--area", "a=4M", "--area", "b=1M,cache=off"),
        gcma_shm.connect(endpoint) as client,
    ):
        assert ranges(capsys, endpoint)["a"] == [{"kind": "free", "offset": 0, "size": 4 * MIB}]
        assert ranges(capsys, endpoint)["b"] == [{"kind": "kept", "offset": 0, "size": MIB}]
        buffer = client.alloc_contig(3 * PAGE, area="b", name="frame")
        lent, claimed = client.reserve(MIB, area="a", name="lent"), client.reserve(MIB // 2, area="a")
        mine = claimed.claim()
        expected = {"kind": "buffer", "offset": buffer.offset * PAGE, "size": 3 * PAGE, "name": "frame", "cached": 0}
        assert expected in ranges(capsys, endpoint)["b"]
        swap = client.swap(0, 2000)

        def whole() -> bool:
            """A client that is faster than the broker evicts pages itself, which then come to no area: so more are stored."""
            for n in range(2000):
                swap.store(n, n.to_bytes(8, "little") * (PAGE // 8))
                swap.load(n)
            (info,) = [info for info in client.areas() if info.name == "a"]
            return info.lent >= info.size - MIB // 2

        found: list[dict[str, Any]] = []

        def settled() -> bool:
            """A page that is just being replaced is no cache; and the broker may go on replacing some after any look."""
            found[:] = ranges(capsys, endpoint)["a"]
            return bytes_of("cache", found) == 4 * MIB - MIB - MIB // 2 and any(
                one.get("cached") == MIB for one in found
            )

        # One that was free when the stores ended, since its copy came too late, is filled by more of them.
        assert eventually(lambda: whole() and eventually(settled, SETTLED_S))
        (one,) = [one for one in found if one["kind"] == "reserved"]
        assert (one["size"], one["name"], one["cached"], one["offset"]) == (MIB, "lent", MIB, lent.offset * PAGE)
        (one,) = [one for one in found if one["kind"] == "claimed"]
        assert (one["size"], one["name"], one["cached"], one["offset"]) == (MIB // 2, None, 0, claimed.offset * PAGE)
        assert bytes_of("free", found) == 0
        monkeypatch.setenv("COLUMNS", "89")
        assert main(["map", "--endpoint", endpoint]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0][:9] == "a 4 MiB  "
        assert {mark: lines[0].count(mark) for mark in "█▓▒░·"} == {"█": 0, "▓": 10, "▒": 20, "░": 50, "·": 0}
        assert lines[1] == "b 1 MiB  " + "-" * 20, "three pages are not what most of a character holds"
        assert lines[3] == "█ buffer   ▓ reservation, claimed   ▒ reservation, lent   ░ cache   - kept from the cache"
        assert lines[4] == "a character: up to 51.2 KiB, and what most of it holds"
        mine.free()
    assert main(["map", "--endpoint", endpoint]) == 1
    assert capsys.readouterr().err.startswith("gcma map: there is no arena")


def test_an_area_in_parts_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    with broker(endpoint, "--area", "a=1M", "--area", "b=1M"), gcma_shm.connect(endpoint) as client:
        client.resize_area("b", MIB // 2)
        client.resize_area("a", 3 * MIB // 2)
        found = ranges(capsys, endpoint)
        assert list(found) == ["a", "b"]
        assert bytes_of("free", found["a"]) == 3 * MIB // 2
        buffer = client.alloc_contig(MIB, area="a")
        (one,) = [one for one in ranges(capsys, endpoint)["a"] if one["kind"] == "buffer"]
        assert (one["offset"], one["size"]) == (buffer.offset * PAGE, MIB)


def test_runs_are_found_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the plain way: a word at a time."""
    states = [0] * 5 + [2] * 9 + [3] * 3 + [2, 0, 1, 3] + [1, 0] * 2 + [2] * 16 + [3]
    lives = [state << 62 | number for number, state in enumerate(states)]
    memory = memoryview(struct.pack(f"<8x{len(lives)}Q", *lives))
    geometry: Any = SimpleNamespace(life_at=8)
    kinds = ["cache" if state == 2 else "kept" if state == 3 else "free" for state in states]
    for chunk in (1, 3, 8, 1 << 16):
        monkeypatch.setattr("gcma_shm.broker.mapping.CHUNK_PAGES", chunk)
        for first, end in ((0, len(states)), (3, 20), (9, 10), (7, 7)):
            expected, at = [], first
            for kind, pages in groupby(kinds[first:end]):
                expected.append(Run(kind, at, len(list(pages))))
                at += expected[-1].pages
            assert list(_between(memory, geometry, first, end)) == expected
            assert _cached(memory, geometry, first, end) == kinds[first:end].count("cache")


def test_an_area_is_read_in_little_memory() -> None:
    """A byte a page of one chunk, not a number each of all of them."""
    pages = 1 << 20
    memory: Any = memoryview(bytes(8 * pages))
    geometry: Any = SimpleNamespace(life_at=0)
    tracemalloc.start()
    try:
        assert list(_between(memory, geometry, 0, pages)) == [Run("free", 0, pages)]
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def area(size: int, *parts: tuple[str, int]) -> dict[str, Any]:
    offset, found = 0, []
    for kind, length in parts:
        found.append({"kind": kind, "offset": offset, "size": length})
        offset += length
    assert offset == size
    return {"area": "a", "size": size, "ranges": found}


@pytest.mark.parametrize(
    ("areas", "width", "line"),
    [
        ([area(4000, ("buffer", 1000), ("free", 3000))], 50, "a 3.9 KiB  " + "█" * 10 + "·" * 29),
        ([area(1000, ("cache", 499), ("buffer", 501))], 20, "a 1000 B  " + "░" * 5 + "█" * 5),
        ([area(1000, ("cache", 949), ("buffer", 51))], 20, "a 1000 B  " + "░" * 9 + "█"),
        ([area(1000, ("cache", 951), ("buffer", 49))], 20, "a 1000 B  " + "░" * 10),
        ([area(1000, ("cache", 1000))], 0, "a 1000 B  " + "░" * 10),
        ([area(1000, ("reserved", 10), ("free", 10), ("kept", 980))], 20, "a 1000 B  " + "-" * 10),
        ([area(100, ("claimed", 100)), area(1000, ("free", 1000))], 20, "a 100 B   ▓"),
    ],
    ids=["wide", "halves", "most", "least", "narrow", "kept", "a tenth of the largest"],
)
def test_each_character_is_what_most_of_it_holds(areas: Sequence[dict[str, Any]], width: int, line: str) -> None:
    assert next(iter(drawn(areas, width))) == line
