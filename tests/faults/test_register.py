"""The checker of histories finds planted wrong ones and passes right ones."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from tests.processes import Said, forked
from tests.register import (
    MISS,
    NEVER,
    UNIQUE,
    ZEROS,
    Kind,
    Log,
    Operation,
    TornPage,
    check,
    make_page,
    read_page,
    value_id,
)

A, B, C = (value_id(1, n) for n in range(3))
SIZE = 4096


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


def test_pages_prove_what_they_are() -> None:
    page, other = make_page(3, A, SIZE), make_page(3, B, SIZE)
    assert read_page(3, page) == A
    assert read_page(3, bytes(SIZE)) == ZEROS
    for at in (64, SIZE // 2, SIZE - 64):
        for mixed in (
            page[:at] + other[at:],
            page[:at] + bytes(SIZE - at),
            bytes(at) + page[at:],
            page[:at] + b"G" * (SIZE - at),
        ):
            with pytest.raises(TornPage, match="lines 0-"):
                read_page(3, mixed)
    with pytest.raises(TornPage):
        read_page(4, page)
    with pytest.raises(TornPage):
        read_page(3, b"G" * SIZE)
    for bit in range(64):
        spoilt = bytearray(page)
        spoilt[bit * 63] ^= 1
        with pytest.raises(TornPage):
            read_page(3, bytes(spoilt))


def test_log_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = Log(path, 5, 100)

    def work(_said: Said) -> None:
        mine = Log(path, 5)
        mine.end(mine.begin(Kind.STORE, 1, A))
        mine.end(mine.begin(Kind.LOAD, 1), A)
        mine.begin(Kind.STORE, 2, B)
        os.kill(os.getpid(), signal.SIGKILL)

    with forked(work) as child:
        assert child.wait() == -signal.SIGKILL
    done = log.operations()
    assert [(o.kind, o.slot, o.value, o.writer) for o in done] == [
        (Kind.STORE, 1, A, 5),
        (Kind.LOAD, 1, A, 5),
        (Kind.STORE, 2, B, 5),
    ]
    assert done[0].start_ns <= done[0].end_ns <= done[1].start_ns <= done[1].end_ns <= done[2].start_ns
    assert done[2].end_ns == NEVER
    assert log.progress == 2
    log.close()
