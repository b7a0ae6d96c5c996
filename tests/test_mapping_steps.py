"""SwapMapping step by step: its writer killed before each page that it stores or invalidates, or looked at there by a reader; its reader overtaken by
whole writes before each page that it loads. Kills inside the store of one page are those of tests/faults.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import pytest

import gcma_shm
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.mapping import SwapMapping
from gcma_shm.clients.mapping_pages import RUNS_INLINE, Shape

from .processes import Said, forked

PAGE = 4096
SLOTS = 150
STEPS_MAX = 300


class Stepped:
    """A swap type page by page, with a call before each page that is changed, or before each that is loaded."""

    def __init__(
        self, swap: Any, changing: Callable[[], None] | None = None, loading: Callable[[], None] | None = None
    ) -> None:
        self._swap = swap
        self._changing = changing or (lambda: None)
        self._loading = loading or (lambda: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._swap, name)

    def __contains__(self, offset: object) -> bool:
        return offset in self._swap

    def store(self, offset: int, page: Any) -> None:
        self._changing()
        self._swap.store(offset, page)

    def store_many(self, offsets: Any, pages: memoryview) -> None:
        for i, offset in enumerate(offsets):
            self.store(offset, pages[i * PAGE : (i + 1) * PAGE])

    def invalidate_page(self, offset: int) -> None:
        self._changing()
        self._swap.invalidate_page(offset)

    def load(self, offset: int) -> bytes | None:
        self._loading()
        page: bytes | None = self._swap.load(offset)
        return page

    def load_many(self, offsets: Any, out: memoryview) -> list[bool]:
        hits = []
        for i, offset in enumerate(offsets):
            self._loading()
            hits.append(bool(self._swap.load_into(offset, out[i * PAGE : (i + 1) * PAGE])))
        return hits


def step_through(mapping: SwapMapping, **calls: Callable[[], None]) -> None:
    """From now on."""
    stepped: Any = Stepped(mapping._swap, **calls)
    mapping._swap = mapping._values._swap = stepped


def value_of(number: int, pages: int) -> bytes:
    """It begins in the head page and ends in the middle of another."""
    return random.Random(number).randbytes(pages * PAGE + 100)


# Of so many pieces that a list page goes on where the head ends.
LARGE, OTHER, SMALL = value_of(1, RUNS_INLINE + 3), value_of(2, RUNS_INLINE + 4), b"small"
ANOTHER = value_of(4, 40)
BEFORE = {"kept": value_of(3, 2), "large": LARGE, "small": SMALL}

# What is done, and what may be found of the keys that it is about, before and afterwards.
Change = tuple[Callable[[SwapMapping], object], dict[str, bytes | None]]
CHANGES: dict[str, Change] = {
    "a new one": (lambda m: m.__setitem__("new", OTHER), {"new": OTHER}),
    "an empty one": (lambda m: m.setdefault("new", b""), {"new": b""}),
    "large by large": (lambda m: m.__setitem__("large", OTHER), {"large": OTHER}),
    "large by small": (lambda m: m.__setitem__("large", b""), {"large": b""}),
    "small by large": (lambda m: m.update(small=OTHER), {"small": OTHER}),
    "del": (lambda m: m.__delitem__("large"), {"large": None}),
    "pop": (lambda m: m.pop("small"), {"small": None}),
    "two": (lambda m: m.update(large=SMALL, new=LARGE), {"large": SMALL, "new": LARGE}),
}  # fmt: skip


def slots_used(mapping: SwapMapping) -> int:
    """By what its buckets name, its own page and the buckets."""
    values = sum(
        len(mapping._values.slots_of(entry)) for bucket in mapping._buckets() for entry in mapping._listed(bucket)
    )
    return values + 1 + sum(bucket in mapping._swap for bucket in mapping._buckets())


def scattered(mapping: SwapMapping) -> SwapMapping:
    """Whose values have no two slots side by side: so each page is a piece of its own."""
    values: Any = mapping._values
    take = values.take
    values.take = lambda count, collect: take(2 * count, collect)[::2]
    return mapping


def begin(mapping: SwapMapping) -> None:
    mapping.clear()
    mapping._values._next = mapping._shape.first
    mapping.update(BEFORE)


def is_as_before_or_after(mapping: SwapMapping, after: Mapping[str, bytes | None]) -> dict[str, bool]:
    """Which keys are as after the change; all others are as before."""
    changed = {}
    for key in {*BEFORE, *after}:
        found, before = mapping.get(key), BEFORE.get(key)
        assert found in (before, after.get(key, before)), key
        if key in after:
            changed[key] = found == after[key]
    return changed


@pytest.fixture
def mapping(client: EmbeddedClient) -> SwapMapping:
    return scattered(SwapMapping(client, 1, SLOTS))


def killed_at(last: int, work: Callable[[Callable[[], None]], object]) -> bool:
    """Does it in a forked child that kills itself when it is about to take that step; `work` is given what counts them. Whether it came to
    its end before.
    """
    steps = itertools.count()

    def kill() -> None:
        if next(steps) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def child(_: Said) -> None:
        work(kill)

    with forked(child) as running:
        return running.wait() == 0


def test_the_values_are_in_pieces(mapping: SwapMapping) -> None:
    """Or the others would not go through list pages."""
    begin(mapping)
    lists = [
        mapping._values._runs(head)[1]  # type: ignore[index]
        for bucket in mapping._buckets()
        for entry in mapping._listed(bucket)
        if (head := mapping._values.head(entry)) is not None and head.key == b"large"
    ]
    assert len(lists[0]) == 1


@pytest.mark.parametrize("what", CHANGES)
def test_a_writer_that_is_killed_at_each_step(mapping: SwapMapping, what: str) -> None:
    """The old values or the new, whole; whoever writes next has the turn; no slot is lost."""
    change, after = CHANGES[what]

    def work(kill: Callable[[], None]) -> None:
        step_through(mapping, changing=kill)
        change(mapping)

    found: list[dict[str, bool]] = []
    for last in range(STEPS_MAX):
        begin(mapping)
        done = killed_at(last, work)
        found.append(is_as_before_or_after(mapping, after))
        mapping.collect()
        assert len(mapping._swap) == slots_used(mapping)
        if done:
            break
    assert done
    assert not any(found[0].values())
    assert all(found[-1].values())
    for key in after:
        assert [one[key] for one in found] == sorted(one[key] for one in found), "from one step on, and not back again"


def test_clear_that_is_killed_at_each_step(mapping: SwapMapping) -> None:
    """Each value is there, whole, or not; what is left is cleared by the next."""

    def work(kill: Callable[[], None]) -> None:
        step_through(mapping, changing=kill)
        mapping.clear()

    for last in range(STEPS_MAX):
        begin(mapping)
        done = killed_at(last, work)
        assert all(value == BEFORE[key] for key, value in mapping.items())
        assert done == (len(mapping._swap) == 1)
        mapping.clear()
        assert len(mapping._swap) == 1, "its own page"
        if done:
            break
    assert last > len(BEFORE)


def test_a_maker_that_is_killed_at_each_step(client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    swap = EmbeddedClient.swap

    for last in range(STEPS_MAX):

        def work(kill: Callable[[], None], last: int = last) -> None:
            monkeypatch.setattr(EmbeddedClient, "swap", lambda *arguments: Stepped(swap(*arguments), changing=kill))
            SwapMapping(client, 10 + last, SLOTS)

        done = killed_at(last, work)
        mapping = SwapMapping(client, 10 + last, SLOTS)
        mapping["a"] = LARGE
        assert dict(mapping) == {"a": LARGE}
        if done:
            break
    assert last == 1


@pytest.mark.parametrize("what", CHANGES)
def test_a_reader_at_each_step_of_a_writer(mapping: SwapMapping, client: EmbeddedClient, what: str) -> None:
    change, after = CHANGES[what]
    begin(mapping)
    reader = SwapMapping(client, 1, SLOTS)
    seen: list[dict[str, bool]] = []
    step_through(mapping, changing=lambda: seen.append(is_as_before_or_after(reader, after)))
    change(mapping)
    seen.append(is_as_before_or_after(reader, after))
    assert not any(seen[0].values())
    assert all(seen[-1].values())
    for key in after:
        order = [one[key] for one in seen]
        assert order == sorted(order), "once new, never old again"
    assert len(reader._swap) == slots_used(reader), "what it replaced is given back"


def overtaking(client: EmbeddedClient, change: Callable[[SwapMapping], object]) -> Iterator[SwapMapping]:
    """Readers, each of which is overtaken, before one of the pages that it loads, by the change, and by other values in the slots that were given
    up by that.
    """
    writer = scattered(SwapMapping(client, 1, SLOTS))
    for last in range(STEPS_MAX):
        begin(writer)
        reader = SwapMapping(client, 1, SLOTS)
        steps = itertools.count()

        def overtake(steps: Iterator[int] = steps, last: int = last) -> None:
            if next(steps) == last:
                change(writer)
                writer._values._next = writer._shape.first
                writer["another"] = ANOTHER
                del writer["another"]

        step_through(reader, loading=overtake)
        yield reader
        if next(steps) <= last:  # it had loaded all before
            return
    raise AssertionError(f"a read of more than {STEPS_MAX} pages")


@pytest.mark.parametrize("what", CHANGES)
def test_a_reader_that_is_overtaken_at_each_step(client: EmbeddedClient, what: str) -> None:
    """What it returns was the key's value, or there was none, at some moment of the call."""
    change, after = CHANGES[what]
    for key, new in after.items():
        found = [reader.get(key) for reader in overtaking(client, change)]
        assert set(found) <= {BEFORE.get(key), new}
        assert found[0] == new
        assert found[-1] == BEFORE.get(key)
        assert len(found) > 1


@pytest.mark.parametrize("what", ["large by large", "del", "two"])
def test_an_iteration_that_is_overtaken_at_each_step(client: EmbeddedClient, what: str) -> None:
    """A key that was there all the time is in it, once, whichever value it has; and each value is its key's."""
    change, after = CHANGES[what]
    stay = {key for key in BEFORE if after.get(key, b"") is not None}
    for reader in overtaking(client, change):
        found = list(reader.items())
        assert len({key for key, _ in found}) == len(found)
        assert stay <= {key for key, _ in found}
        assert all(value in (BEFORE.get(key), after.get(key)) for key, value in found)
    for reader in overtaking(client, change):
        assert stay <= {*reader}
    for reader in overtaking(client, change):
        assert len(stay) <= len(reader) <= len({*BEFORE, *after})


WITHOUT_OTHERS: dict[str, Callable[[SwapMapping], object]] = {
    "pop": lambda m: m.pop("large"),
    "popitem": lambda m: m.popitem(),
    "setdefault": lambda m: m.setdefault("new", SMALL),
    "del": lambda m: m.__delitem__("large"),
    "set": lambda m: m.__setitem__("large", SMALL),
}


@pytest.mark.parametrize("what", WITHOUT_OTHERS)
def test_no_other_writer_comes_in_between(mapping: SwapMapping, client: EmbeddedClient, what: str) -> None:
    begin(mapping)
    other = SwapMapping(client, 1, SLOTS, timeout=0.001)
    tried = 0

    def attempt() -> None:
        nonlocal tried
        tried += 1
        with pytest.raises(gcma_shm.SlotBusy):
            other["large"] = OTHER

    step_through(mapping, loading=attempt)
    WITHOUT_OTHERS[what](mapping)
    assert tried > 1
    other["large"] = OTHER


def test_the_type_ends_under_a_reader(mapping: SwapMapping, client: EmbeddedClient) -> None:
    begin(mapping)
    step_through(mapping, loading=client.swap(1, SLOTS, "behind").invalidate_area)
    with pytest.raises(gcma_shm.Closed):
        mapping["large"]


class SlowToBeWritten(Stepped):
    """A table whose pages are stored, and visible, when their store fails."""

    def store(self, offset: int, page: Any) -> None:
        super().store(offset, page)
        if offset < Shape(PAGE, SLOTS).first:
            raise gcma_shm.SlotBusy("planted")


def test_a_store_that_fails_when_the_value_is_visible(mapping: SwapMapping) -> None:
    """The value is there, and the slots of the one before are given back."""
    begin(mapping)
    swap = mapping._swap
    mapping._swap = cast(Any, SlowToBeWritten(swap))
    for key in ("large", "new"):
        with pytest.raises(gcma_shm.SlotBusy):
            mapping[key] = OTHER
    mapping._swap = swap
    assert (mapping["large"], mapping["new"]) == (OTHER, OTHER)
    assert len(swap) == slots_used(mapping)


def test_slots_that_a_dead_writer_took_are_found_when_they_are_needed(client: EmbeddedClient) -> None:
    mapping = SwapMapping(client, 1, SLOTS)
    begin(mapping)

    def work(kill: Callable[[], None]) -> None:
        step_through(mapping, changing=kill)
        mapping["new"] = OTHER

    assert not killed_at(10, work)
    assert len(mapping._swap) == slots_used(mapping) + 10
    values = slots_used(mapping) - sum(slot in mapping._swap for slot in range(mapping._shape.first))
    free = SLOTS - mapping._shape.first - values
    mapping["new"] = value = value_of(5, free - 2)
    assert mapping._shape.slots_max(b"new", len(value)) == free, "all that is left"
    assert mapping["new"] == value
    mapping["one more"] = b""  # it took no list page, as it might have
    with pytest.raises(gcma_shm.QuotaExceeded):
        mapping["another"] = b""
    assert mapping["large"] == LARGE
