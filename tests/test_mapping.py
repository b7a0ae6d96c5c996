"""SwapMapping: a mapping as zict describes one, whole values under concurrent writers, writers that are killed anywhere."""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zict.tests.utils_test import check_mapping

import gcma_shm.aio
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.mapping import SwapMapping
from gcma_shm.clients.mapping_pages import (
    MAGIC,
    RUNS_INLINE,
    Shape,
    find_in_bucket,
    head_page,
    list_page,
    read_bucket,
    read_head,
    read_list,
)
from gcma_shm.clients.swap import Swap
from gcma_shm.presence import Presence

from .faults.spilling import spilled
from .processes import WAIT_S, Said, eventually, forked, in_fork

PAGE = 4096
SLOTS = 2000
LENGTHS = [0, 1, 100, PAGE - 1000, PAGE - 33, PAGE - 32, PAGE, 3 * PAGE, 100_000]


@pytest.fixture
def mapping(client: EmbeddedClient) -> SwapMapping:
    return SwapMapping(client, 1, SLOTS)


def stored(client: EmbeddedClient) -> Swap:
    """The type under the mapping."""
    return client.swap(1, SLOTS, "behind")


def test_what_zict_expects_of_a_mapping(mapping: SwapMapping) -> None:
    check_mapping(mapping)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("key", ["", "k", "ä" * 900, "x" * (PAGE // 2)])
def test_values_of_any_length(mapping: SwapMapping, client: EmbeddedClient, key: str, length: int) -> None:
    value = random.Random(length).randbytes(length)
    mapping[key] = value
    assert mapping[key] == value
    assert SwapMapping(client, 1, SLOTS)[key] == value
    del mapping[key]
    assert key not in mapping
    assert len(stored(client)) == 2  # its own page, and a bucket


@pytest.mark.parametrize(
    "value",
    [b"abc", bytearray(b"abc"), memoryview(b"abc"), memoryview(bytes(12)).cast("I")],
    ids=["bytes", "bytearray", "view", "ints"],
)
def test_bytes_like_values(mapping: SwapMapping, value: bytes | bytearray | memoryview) -> None:
    mapping["a"] = value
    assert mapping["a"] == bytes(value)


@pytest.mark.parametrize("dtype", ["u1", ">i4", "f2", "c16", "i4,f8", "?"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (0, 3), (3, 0), (2, 3)])
def test_arrays_as_values(mapping: SwapMapping, dtype: str, shape: tuple[int, ...]) -> None:
    value = np.zeros(shape, dtype)
    mapping["a"] = value
    assert mapping["a"] == value.tobytes()
    with pytest.raises(TypeError):
        mapping["a"] = np.zeros((4, 4), dtype)[::2, ::2]
    assert mapping["a"] == value.tobytes()


@pytest.mark.parametrize("key", ["\ud800", os.fsdecode(b"caf\xe9.jpg"), "\0", "\U0001f600"])
def test_keys_of_any_text(mapping: SwapMapping, key: str) -> None:
    """Also names of files that are none: they are looked for like others, and found."""
    assert key not in mapping
    assert mapping.get(key) is None
    with pytest.raises(KeyError):
        mapping[key]
    with pytest.raises(KeyError):
        del mapping[key]
    mapping[key] = b"value"
    assert list(mapping.items()) == [(key, b"value")]
    assert mapping.pop(key) == b"value"


def test_keys_of_other_types_are_not_there(mapping: SwapMapping) -> None:
    keys: list[Any] = [b"a", 3, None, ("a",), [], {}]
    for key in keys:
        assert key not in mapping
        assert mapping.get(key) is None
        assert mapping.pop(key, b"none") == b"none"
        for call in (mapping.__getitem__, mapping.__delitem__, mapping.pop):
            with pytest.raises(KeyError):
                call(key)
        with pytest.raises(TypeError, match="expected text"):
            mapping[key] = b""
    assert "x" * PAGE not in mapping


def test_misuse(mapping: SwapMapping, client: EmbeddedClient) -> None:
    with pytest.raises(TypeError, match="expected text"):
        mapping[3] = b""  # type: ignore[index]
    with pytest.raises(TypeError):
        mapping["a"] = "text"
    with pytest.raises(ValueError, match="at most 2048"):
        mapping["x" * (PAGE // 2 + 1)] = b""
    with pytest.raises(KeyError):
        del mapping["x"]
    with pytest.raises(KeyError):
        mapping[3]  # type: ignore[index]
    with pytest.raises(ValueError, match="needs more than"):
        SwapMapping(client, 2, 2)
    with pytest.raises(ValueError, match="declared"):
        SwapMapping(client, 1, SLOTS + 1)
    client.swap(3, 500, "behind").store(0, b"\1" * PAGE)
    with pytest.raises(ValueError, match="something else"):
        SwapMapping(client, 3, 500)
    assert not mapping
    for timeout, error in (
        (-1, ValueError),
        (float("nan"), ValueError),
        (1e9, ValueError),
        ("5", TypeError),
        (None, TypeError),
    ):
        with pytest.raises(error, match="timeout"):
            SwapMapping(client, 1, SLOTS, timeout=timeout)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pass client"):
        pickle.dumps(mapping)


def test_a_client_that_awaits_is_refused(client: EmbeddedClient) -> None:
    async def main() -> None:
        async with gcma_shm.aio.connect(client.endpoint) as own:
            with pytest.raises(TypeError, match="needs a client that blocks"):
                SwapMapping(own, 1, SLOTS)  # type: ignore[arg-type]

    asyncio.run(main())


def test_a_mapping_of_another_shape_is_refused(client: EmbeddedClient) -> None:
    client.swap(3, 500, "behind").store(0, (MAGIC + bytes(8) + bytes(PAGE))[:PAGE])
    with pytest.raises(ValueError, match="something else"):
        SwapMapping(client, 3, 500)


def test_pop_and_setdefault(mapping: SwapMapping) -> None:
    assert mapping.setdefault("a", b"1") == b"1"
    assert mapping.setdefault("a", b"2") == b"1"
    assert mapping.pop("a") == b"1"
    assert mapping.pop("a", b"none") == b"none"
    mapping["b"] = b"3"
    assert mapping.popitem() == ("b", b"3")


def test_full_and_nothing_changed(mapping: SwapMapping, client: EmbeddedClient) -> None:
    mapping["kept"] = b"kept" * 5000
    before = len(stored(client))
    with pytest.raises(gcma_shm.QuotaExceeded, match="remove some"):
        mapping["kept"] = bytes(SLOTS * PAGE)
    assert mapping["kept"] == b"kept" * 5000
    assert len(stored(client)) == before


def test_no_room_in_the_nursery_leaves_the_old_value(mapping: SwapMapping, monkeypatch: pytest.MonkeyPatch) -> None:
    mapping["a"] = b"old" * 3000
    count = len(mapping._swap)

    def refuse(*_: object) -> None:
        raise gcma_shm.NurseryFull("planted")

    with monkeypatch.context() as patch, pytest.raises(gcma_shm.NurseryFull):
        patch.setattr("gcma_shm.clients.mapping.pages.head_page", refuse)
        mapping["a"] = b"new" * 3000
    assert mapping["a"] == b"old" * 3000
    assert len(mapping._swap) == count


def test_runs_that_do_not_fit_into_the_head(mapping: SwapMapping, client: EmbeddedClient) -> None:
    free = SLOTS - Shape(PAGE, SLOTS).first
    for n in range(free):
        mapping[str(n)] = b"x"
    with pytest.raises(gcma_shm.QuotaExceeded):
        mapping["more"] = b"x"
    for n in range(0, free, 2):
        del mapping[str(n)]
    value = random.Random(1).randbytes(PAGE * (free // 2 - 20))
    mapping["big"] = value
    assert free // 2 - 20 > RUNS_INLINE + Shape(PAGE, SLOTS).runs_per_list  # so that there are two list pages
    assert mapping["big"] == value
    before = len(stored(client))
    del mapping["big"]
    assert before - len(stored(client)) >= len(value) // PAGE
    assert mapping.collect() == 0


def test_a_full_bucket_page_is_found_in(mapping: SwapMapping) -> None:
    for n in range(500):
        mapping[f"key {n}"] = str(n).encode()
    shape = mapping._shape
    listed = [read_bucket(mapping._swap.load(bucket), shape) for bucket in range(1, shape.first)]
    assert sum(map(len, listed)) == 500 == len(mapping)
    for bucket, entries in enumerate(listed, 1):
        for entry in entries:
            assert find_in_bucket(mapping._swap.load(bucket), entry.hash, shape) == [entry]
    assert dict(mapping) == {f"key {n}": str(n).encode() for n in range(500)}


def test_by_messages_it_can_be_read(mapping: SwapMapping, client: EmbeddedClient) -> None:
    mapping["a"] = b"value" * 10_000
    with gcma_shm.connect(client.endpoint, mapped=False) as other:
        reader = SwapMapping(other, 1, SLOTS)
        assert reader["a"] == b"value" * 10_000
        assert list(reader) == ["a"]
        with pytest.raises(gcma_shm.ArenaError, match="maps the arena"):
            reader["a"] = b""
        with pytest.raises(gcma_shm.ArenaError, match="maps the arena"):
            SwapMapping(other, 2, SLOTS)


def test_a_damaged_value_is_told_and_can_be_replaced(mapping: SwapMapping, client: EmbeddedClient) -> None:
    mapping["a"] = b"value" * 10_000
    swap = stored(client)
    victim = next(
        n for n in range(mapping._shape.first, SLOTS) if swap.load(n) and b"value" * 800 in (swap.load(n) or b"")
    )
    swap.store(victim, b"\7" * PAGE)
    with pytest.raises(gcma_shm.SpillCorrupt, match="'a'"):
        mapping["a"]
    mapping["a"] = b"new"
    assert mapping["a"] == b"new"
    assert "a" in mapping


@pytest.mark.parametrize("what", ["data", "head", "bucket"])
def test_a_damaged_file_is_told_and_what_was_there_can_be_replaced(
    client: EmbeddedClient, what: str, tmp_path: Path
) -> None:
    """The page itself is told of by the type under the mapping. Values in other slots are whole."""
    mapping = SwapMapping(client, 1, SLOTS, write="through")
    mapping["a"] = value = random.Random(1).randbytes(100_000)
    bucket = mapping._place("a")[2]
    elsewhere = next(key for key in map(str, range(SLOTS)) if mapping._place(key)[2] != bucket)
    mapping[elsewhere] = other = random.Random(2).randbytes(100_000)
    (entry,) = (e for e in mapping._listed(bucket) if mapping._is_of(e, b"a"))
    slot = {"data": mapping._values.slots_of(entry)[-1], "head": entry.slot, "bucket": bucket}[what]
    others, pages = client.swap(2, SLOTS), random.Random(3).randbytes(SLOTS * PAGE)

    def is_in_the_file_alone() -> bool:
        """Others push it out, and the sweep, when it has its turn, what has been loaded."""
        others.store_many(range(SLOTS), pages)
        return slot in spilled(client, 1, SLOTS)

    with client.alloc_contig(client.areas()[0].size):  # no page is in an area
        assert eventually(is_in_the_file_alone)
    (file,) = (tmp_path / "cache" / "gcma").glob("*/001.*")
    with file.open("r+b") as opened:
        opened.seek(slot * PAGE + PAGE // 2)
        opened.write(b"damage")
    with pytest.raises(gcma_shm.SpillCorrupt, match=f"slot {slot} "):
        mapping["a"]
    assert mapping[elsewhere] == other
    if what == "bucket":
        with pytest.raises(gcma_shm.SpillCorrupt):
            mapping["a"] = value
        with pytest.raises(gcma_shm.SpillCorrupt):
            mapping.collect()  # it does not know whose slots are whose
        mapping.clear()
        assert len(mapping._swap) == 1
    mapping["a"] = value
    assert mapping["a"] == value
    del mapping["a"]
    mapping.collect()
    assert "a" not in mapping


def test_a_child_has_it_and_writes(mapping: SwapMapping) -> None:
    mapping["a"] = b"parent"

    def work(_: Said) -> bytes:
        value = mapping["a"]
        mapping["b"] = b"child"
        return value

    assert in_fork(work) == b"parent"
    assert mapping["b"] == b"child"


def test_a_childs_child_does_not_keep_the_turn_of_a_writer_that_was_killed(
    mapping: SwapMapping, client: EmbeddedClient
) -> None:
    """Its open file would, were it its parent's: a pool's master that is killed while it writes, and its workers live on."""

    def sleep_on(said: Said) -> None:
        said.say("here")
        said.hear()

    def work(said: Said) -> None:
        with SwapMapping(client, 1, SLOTS)._writing(), forked(sleep_on) as grandchild:
            assert grandchild.receive() == "here"
            said.say(grandchild.pid)
            said.hear()

    with forked(work) as child:
        grandchild = child.receive()
        os.kill(grandchild, signal.SIGSTOP)  # or it would end when its parent does
        try:
            child.kill()
            mapping["a"] = b"mine"
        finally:
            os.kill(grandchild, signal.SIGKILL)
    assert mapping["a"] == b"mine"


def test_an_interrupted_writer_keeps_nobody(mapping: SwapMapping, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, just after the kernel has given it the lock."""
    lock = Presence.lock

    def and_interrupt(own: Presence, at: int) -> None:
        lock(own, at)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Presence, "lock", and_interrupt)
        mapping["a"] = b"never"

    def work(_: Said) -> None:
        mapping._turn._timeout = 1  # type: ignore[union-attr]
        mapping["b"] = b"child"

    in_fork(work)
    mapping["a"] = b"mine"
    assert dict(mapping) == {"a": b"mine", "b": b"child"}


def test_a_closed_client_writes_no_more(client: EmbeddedClient) -> None:
    with gcma_shm.connect(client.endpoint) as other:
        mapping = SwapMapping(other, 1, SLOTS)
    for write in (lambda: mapping.__setitem__("a", b""), mapping.clear, mapping.popitem):
        with pytest.raises(gcma_shm.Closed):
            write()


def test_a_child_does_not_share_the_turn_of_its_parent(mapping: SwapMapping) -> None:
    mapping._turn._timeout = 0.2  # type: ignore[union-attr]

    def work(said: Said) -> str:
        try:
            mapping["b"] = b"child"
        except gcma_shm.SlotBusy as error:
            return str(error)
        return "written"

    with mapping._writing():
        assert "another process" in in_fork(work)
    assert in_fork(work) == "written"


def test_a_stopped_writer_keeps_others_for_a_bounded_time_only(mapping: SwapMapping) -> None:
    mapping["a"] = b"before"

    def work(said: Said) -> None:
        with mapping._writing():
            said.say("mine")
            said.hear()

    with forked(work) as child:
        assert child.receive() == "mine"
        mapping._turn._timeout = 0.1  # type: ignore[union-attr]
        with pytest.raises(gcma_shm.SlotBusy):
            mapping["a"] = b"after"
        assert mapping["a"] == b"before"  # readers take no turn
        child.kill()
    mapping["a"] = b"after"
    assert mapping["a"] == b"after"


def whole(n: int, length: int) -> bytes:
    """Each part of it says which value it is of."""
    return n.to_bytes(8, "little") * (length // 8)


def is_whole(value: bytes) -> bool:
    return value == value[:8] * (len(value) // 8)


def write_on(mapping: SwapMapping, said: Said, seed: int) -> None:
    chance = random.Random(seed)
    said.say("ready")
    for n in range(1_000_000):
        key = f"key {chance.randrange(12)}"
        if chance.random() < 0.1:
            mapping.pop(key, None)
        else:
            mapping[key] = whole(n * 10 + seed, 8 * chance.choice([1, 100, 600, 3000]))


def test_readers_never_see_a_mix_of_two_writers(mapping: SwapMapping) -> None:
    with forked(lambda said: write_on(mapping, said, 1)) as one, forked(lambda said: write_on(mapping, said, 2)) as two:
        one.receive(), two.receive()
        seen: set[bytes] = set()
        writers: set[int] = set()
        begun = time.monotonic()
        # However long one of them is not let run.
        while (ago := time.monotonic() - begun) < 1.5 or (ago < WAIT_S and (len(seen) < 100 or writers != {1, 2})):
            for n in range(12):
                value = mapping.get(f"key {n}")
                if value is not None:
                    assert is_whole(value)
                    seen.add(value[:8])
                    writers.add(int.from_bytes(value[:8], "little") % 10)
        one.kill()
        two.kill()
    assert len(seen) >= 100
    assert writers == {1, 2}
    for _, value in mapping.items():
        assert is_whole(value)


@pytest.fixture
def small(client: EmbeddedClient) -> SwapMapping:
    return SwapMapping(client, 5, 200)


def test_a_writer_killed_at_any_moment_leaves_values_whole_and_no_slot_lost(small: SwapMapping) -> None:
    chance = random.Random(7)
    small["kept"] = whole(77, 8 * 2000)
    collected = 0
    deadline = time.monotonic() + WAIT_S
    for round_ in itertools.count():
        # Or no kill has fallen into a write yet: for each that is a matter of luck.
        if round_ >= 40 and (collected or time.monotonic() > deadline):
            break
        with forked(lambda said, seed=round_: write_on(small, said, seed)) as child:  # type: ignore[misc]
            child.receive()
            time.sleep(chance.random() * 0.02)  # not to wait for anything: where the kill falls
            os.kill(child.pid, signal.SIGKILL)
        assert small["kept"] == whole(77, 8 * 2000)
        assert all(is_whole(value) for value in small.values())
        collected += small.collect()
        assert small.collect() == 0
    assert collected > 0, "no kill has fallen into a write"
    small.clear()
    small["last"] = b"x" * PAGE * 150
    assert small["last"] == b"x" * PAGE * 150


def test_it_outlives_the_one_who_wrote(mapping: SwapMapping) -> None:
    def work(_: Said) -> None:
        mapping["a"] = b"left behind" * 1000

    in_fork(work)
    assert eventually(lambda: mapping["a"] == b"left behind" * 1000)


def test_nothing_but_slots_is_used(client: EmbeddedClient, tmp_path: Path) -> None:
    mapping = SwapMapping(client, 1, SLOTS, write="through")
    mapping["a"] = b"x" * 50_000
    assert mapping._swap.write_through
    assert repr(mapping) == "<SwapMapping on type 1, 2000 slots>"


def test_pages_that_are_not_of_a_value_are_not_read_as_such() -> None:
    """Or removing a damaged value would free the slots of another."""
    shape = Shape(PAGE, SLOTS)
    runs = [(100 + 2 * n, 1) for n in range(RUNS_INLINE + 3)]
    listed = list_page(7, runs, 5, shape)
    assert read_list(listed, 7, shape) == (runs, 5)
    assert read_list(listed, 8, shape) is None
    too_many = list_page(7, [(1, 1)] * shape.runs_per_list, 0, shape)
    assert read_list(too_many, 7, shape) is not None
    assert read_list(too_many[:8] + (shape.runs_per_list + 1).to_bytes(4, "little") + too_many[12:], 7, shape) is None
    head = head_page(7, b"key", memoryview(bytes(10)), [], 0, shape)
    found = read_head(head, shape)
    assert found is not None
    assert (found.tag, found.key, found.length, bytes(found.inline)) == (7, b"key", 10, bytes(10))
    for at, wrong in ((20, shape.key_max + 1), (24, RUNS_INLINE + 1)):
        assert read_head(head[:at] + wrong.to_bytes(4, "little") + head[at + 4 :], shape) is None


def test_nobody_knows_which_keys_share_a_bucket(mapping: SwapMapping, client: EmbeddedClient) -> None:
    """Before there is the mapping: each has a hash of its own, which all that open it share."""
    assert mapping._place("key") != SwapMapping(client, 2, SLOTS)._place("key")
    assert mapping._place("key") == SwapMapping(client, 1, SLOTS)._place("key")
