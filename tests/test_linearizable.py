"""The check of histories passes right ones and finds wrong ones; on small ones it says the same as trying every order."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcma_shm.clients import linearizable
from gcma_shm.clients.history import NEVER, Kind, Operation
from gcma_shm.clients.linearizable import check
from gcma_shm.clients.proof import MISS, UNIQUE, ZEROS, value_id

A, B, C = (value_id(1, n) for n in range(3))


def store(value: int, start: int, end: int = NEVER, slot: int = 0) -> Operation:
    return Operation(Kind.STORE, slot, value, start, end)


def load(value: int, start: int, end: int, slot: int = 0) -> Operation:
    return Operation(Kind.LOAD, slot, value, start, end)


RIGHT = {
    "nothing yet": [load(MISS, 1, 2)],
    "one after another": [store(A, 1, 2), load(A, 3, 4), store(B, 5, 6), load(B, 7, 8)],
    "overlap: old": [store(A, 1, 2), store(B, 3, 9), load(A, 4, 5)],
    "overlap: new": [store(A, 1, 2), store(B, 3, 9), load(B, 4, 5)],
    "during the whole load": [store(A, 1, 2), load(A, 3, 9), store(B, 4, 5)],
    "two at once, either": [store(A, 1, 5), store(B, 2, 6), load(A, 7, 8)],
    "failed store seen": [store(A, 1, 2), store(B, 3), load(B, 9, 10)],
    "failed store not seen": [store(A, 1, 2), store(B, 3), load(A, 9, 10)],
    "failed store lands late": [store(B, 1), store(A, 2, 3), load(A, 4, 5), load(B, 6, 7)],
    "invalidated": [store(A, 1, 2), store(MISS, 3, 4), load(MISS, 5, 6)],
    "invalidated meanwhile": [store(A, 1, 2), store(MISS, 3, 9), load(MISS, 4, 5), load(A, 4, 5)],
    "zeros again": [store(ZEROS, 1, 2), store(A, 3, 4), store(ZEROS, 5, 6), load(ZEROS, 7, 8)],
    "other slots": [store(A, 1, 2), store(B, 3, 4, slot=1), load(A, 5, 6), load(B, 5, 6, slot=1)],
    "refused and gone": [store(A, 1, 2), Operation(Kind.REFUSED, 0, B, 3, NEVER), load(A, 5, 6)],
    "unfinished load": [store(A, 1, 2), load(B, 3, NEVER)],
}
WRONG = {
    "never stored": [store(A, 1, 2), load(B, 3, 4)],
    "from the future": [load(A, 1, 2), store(A, 3, 4)],
    "stale": [store(A, 1, 2), store(B, 3, 4), load(A, 5, 6)],
    "lost": [store(A, 1, 2), load(MISS, 3, 4)],
    "back after an invalidation": [store(A, 1, 2), store(MISS, 3, 4), load(A, 5, 6)],
    "miss after a later store": [store(A, 1, 2), store(MISS, 3, 4), store(B, 5, 6), load(MISS, 7, 8)],
    "stale zeros": [store(ZEROS, 1, 2), store(A, 3, 4), load(ZEROS, 5, 6)],
    "new, then old": [store(A, 1, 2), store(B, 3, 20), load(B, 4, 5), load(A, 6, 7)],
    "new from the dead, then old": [store(A, 1, 2), store(B, 3), load(B, 4, 5), load(A, 6, 7)],
    "another slot's": [store(A, 1, 2, slot=1), load(A, 3, 4)],
    "refused and there": [store(A, 1, 2), Operation(Kind.REFUSED, 0, B, 3, NEVER), load(B, 5, 6)],
    "three deep": [store(A, 1, 2), store(B, 3, 4), store(C, 5, 6), load(B, 7, 8)],
}


@pytest.mark.parametrize("name", RIGHT)
def test_passes_right_histories(name: str) -> None:
    assert check(RIGHT[name]) == []


@pytest.mark.parametrize("name", WRONG)
def test_finds_planted_wrong_histories(name: str) -> None:
    assert len(check(WRONG[name])) == 1


@pytest.mark.parametrize("seed", range(5))
def test_history_of_a_real_register_passes_and_each_spoilt_load_is_found(seed: int) -> None:
    """A register that takes effect at one instant within each operation: right by construction. Then one load is made older."""
    rng = random.Random(seed)
    instants = sorted(rng.sample(range(10, 100_000, 10), 400))
    history: list[Operation] = []
    values, current = [MISS], MISS
    for sequence, at in enumerate(instants):
        start, end = at - rng.randrange(1, 400), at + rng.randrange(1, 400)
        if rng.random() < 0.5:
            history.append(load(current, start, end))
        else:
            current = value_id(7, sequence)
            values.append(current)
            history.append(store(current, start, end))
    rng.shuffle(history)
    assert check(history) == []
    spoilt = [
        (place, operation)
        for place, operation in enumerate(history)
        if operation.kind is Kind.LOAD and operation.value >= UNIQUE and values.index(operation.value) > 60
    ]
    for place, right in rng.sample(spoilt, 20):
        older = values[values.index(right.value) - 50]  # 50 stores ago: far outside of what overlaps
        assert check([*history[:place], load(older, right.start_ns, right.end_ns), *history[place + 1 :]])


# --- against every order there is


def explained(operations: frozenset[Operation], held: int = MISS) -> bool:
    """Whether some order of these explains them: the definition, word for word."""
    if all(operation.end_ns == NEVER for operation in operations):
        return True  # none of the stores that did not end need have happened, and loads that did not end say nothing
    for first in operations:
        if any(other.end_ns < first.start_ns for other in operations):
            continue
        if first.kind is Kind.STORE and explained(operations - {first}, first.value):
            return True
        if first.kind is Kind.LOAD and first.value == held and explained(operations - {first}, held):
            return True
    return False


TIMES = st.integers(0, 12)


@st.composite
def histories(draw: st.DrawFn, shared: bool) -> list[Operation]:
    """Up to eight operations on one slot: stores of values of their own, or of zeros and nothing, some without an end; and loads of any of
    those values.
    """
    found: list[Operation] = []
    values = [MISS, ZEROS] if shared else [MISS]
    for sequence in range(draw(st.integers(1, 4))):
        value = value_id(1, sequence)
        if shared and draw(st.booleans()):
            value = draw(st.sampled_from([MISS, ZEROS]))
        values.append(value)
        start = draw(TIMES)
        found.append(store(value, start, NEVER if draw(st.integers(0, 4)) == 0 else start + draw(TIMES)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(TIMES)
        found.append(load(draw(st.sampled_from(values)), start, start + draw(TIMES)))
    return found


@st.composite
def right_histories(draw: st.DrawFn) -> list[Operation]:
    """Right by construction: each operation is done at an instant of its own, within its times."""
    found: list[Operation] = []
    held = MISS
    for sequence in range(draw(st.integers(1, 12))):
        at = 4 * sequence
        start, end = max(at - draw(TIMES), 0), at + draw(TIMES)
        if draw(st.booleans()):
            held = draw(st.sampled_from([value_id(1, sequence), value_id(2, sequence), MISS, ZEROS]))
            found.append(store(held, start, NEVER if draw(st.integers(0, 6)) == 0 else end))
        else:
            found.append(load(held, start, end))
    return found


@pytest.mark.parametrize("shared", [False, True])
def test_it_says_what_every_order_says(shared: bool) -> None:
    verdicts = {True: 0, False: 0}

    @settings(max_examples=600, deadline=None)
    @given(histories(shared))
    def says_the_same(history: list[Operation]) -> None:
        right = explained(frozenset(history))
        verdicts[right] += 1
        assert (check(history) == []) == right, check(history)

    says_the_same()
    assert min(verdicts.values()) > 50, f"one-sided examples: {verdicts}"


@settings(max_examples=300, deadline=None)
@given(right_histories(), st.randoms(use_true_random=False))
def test_right_histories_pass_in_whatever_order_they_are_told(history: list[Operation], rng: random.Random) -> None:
    rng.shuffle(history)
    assert check(history) == []


def test_zones_alone_and_possibilities_alone_agree() -> None:
    """What is decided by zones where no value is stored twice is what following the possibilities would say."""
    verdicts = set()

    @settings(max_examples=300, deadline=None)
    @given(histories(shared=False))
    def agree(history: list[Operation]) -> None:
        by_zones = check(history)
        followed = linearizable._follow(history, frozenset(o.value for o in history if o.kind is Kind.LOAD))
        assert bool(by_zones) == bool(followed)
        verdicts.add(bool(by_zones))

    agree()
    assert verdicts == {True, False}


def test_what_takes_too_long_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linearizable, "POSSIBILITIES_MAX", 50)
    history = [store(ZEROS, 0, 100), *(store(value_id(1, n), 0, 100) for n in range(8)), load(ZEROS, 0, 1)]
    history += [load(value_id(1, n), 1, 100) for n in range(8)]
    history += [store(MISS, 0, 100), load(MISS, 2, 3), load(A, 2, 4)]
    (wrong,) = check(history)
    assert "undecided" in wrong


def test_stores_that_nobody_saw_are_no_possibilities() -> None:
    """Six stopped workers with a batch each for the same slot, while others store zeros and load them."""
    history = [store(value_id(2, n), 0, 1000) for n in range(36)]
    history += [
        operation
        for n in range(20)
        for operation in (store(ZEROS, 10 * n, 10 * n + 3), load(ZEROS, 10 * n + 5, 10 * n + 6))
    ]
    assert check(history) == []
    assert len(check([*history, load(MISS, 500, 501)])) == 1


def test_a_long_history_of_a_hot_slot_is_decided_in_time_that_grows_with_it() -> None:
    """Half a million operations are what a minute of a storm may come to."""

    def history(count: int) -> list[Operation]:
        return list(register(random.Random(count), count))

    def seconds(operations: list[Operation]) -> float:
        begun = time.process_time()
        assert check(operations) == []
        return time.process_time() - begun

    short, long = history(2_000), history(20_000)
    assert seconds(long) < 100 * max(seconds(short), 0.001), "more than ten times the time per operation"


def register(rng: random.Random, count: int) -> Iterator[Operation]:
    """What six clients of one slot would do; every sixth store is one of zeros, or of nothing, or does not end."""
    held = MISS
    for n in range(count):
        start, end = 100 * n - rng.randrange(300), 100 * n + rng.randrange(300)
        if rng.random() < 0.5:
            held = rng.choice([MISS, ZEROS]) if rng.random() < 0.15 else value_id(3, n)
            yield store(held, start, NEVER if rng.random() < 0.01 else end)
        else:
            yield load(held, start, end)
