"""Pages prove what they are, logs survive a kill, and a recorded swap type notes what each operation may have done."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

import gcma_shm
from gcma_shm.clients.history import NEVER, Kind, Log, RecordedSwap
from gcma_shm.clients.proof import MISS, ZEROS, TornPage, make_page, read_page, value_id
from tests.processes import Said, forked

A, B = (value_id(1, n) for n in range(2))
SIZE = 4096


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


class Swap:
    """Stands for a swap type: says what it is told to say."""

    slots, page_size, type, write_through = 8, SIZE, 0, True

    def __init__(self) -> None:
        self.error: gcma_shm.GcmaError | None = None
        self.page: bytes | None = None

    def _say(self) -> None:
        if self.error is not None:
            raise self.error

    def store(self, offset: int, page: object) -> None:
        self._say()

    def store_many(self, offsets: list[int], pages: object) -> None:
        self._say()

    def invalidate_page(self, offset: int) -> None:
        self._say()

    def invalidate_area(self) -> None:
        self._say()

    def load(self, offset: int) -> bytes | None:
        self._say()
        return self.page

    def load_into(self, offset: int, out: bytearray) -> bool:
        out[:] = self.page or b""
        return self.page is not None

    def load_many(self, offsets: list[int], out: bytearray) -> list[bool]:
        out[:] = (self.page or b"") * len(offsets)
        return [self.page is not None] * len(offsets)


def error_of(kind: type[gcma_shm.GcmaError], done: int = 0) -> gcma_shm.GcmaError:
    error = kind("planted")
    error.done = done
    return error


@pytest.fixture
def recorded(tmp_path: Path) -> Iterator[tuple[Swap, RecordedSwap, Log]]:
    log = Log(tmp_path / "log", 1, 100)
    swap = Swap()
    yield swap, RecordedSwap(cast(gcma_shm.Swap, swap), log, 10), log
    log.close()


@pytest.mark.parametrize(
    ("error", "kind", "ended"),
    [
        (None, Kind.STORE, True),
        (error_of(gcma_shm.NurseryFull), Kind.REFUSED, False),  # nothing has changed
        (error_of(gcma_shm.SlotBusy), Kind.STORE, True),  # stored and visible
        (gcma_shm.SpillError(27, "planted", stored=True), Kind.STORE, True),
        (gcma_shm.SpillError(5, "planted", stored=False), Kind.STORE, False),
        (error_of(gcma_shm.BrokerUnavailable), Kind.STORE, False),  # perhaps, and perhaps later
        (error_of(gcma_shm.Closed), Kind.STORE, False),
    ],
)
def test_a_store_is_noted_as_what_it_may_have_done(
    recorded: tuple[Swap, RecordedSwap, Log], error: gcma_shm.GcmaError | None, kind: Kind, ended: bool
) -> None:
    swap, recorder, log = recorded
    swap.error = error
    if error is None:
        recorder.store(3, make_page(13, A, SIZE))
    else:
        with pytest.raises(type(error)):
            recorder.store(3, make_page(13, A, SIZE))
    (noted,) = log.operations()
    assert (noted.kind, noted.slot, noted.value) == (kind, 13, A)
    assert (noted.end_ns != NEVER) == ended


def test_a_batch_is_noted_page_by_page_up_to_where_it_failed(recorded: tuple[Swap, RecordedSwap, Log]) -> None:
    swap, recorder, log = recorded
    pages = make_page(12, A, SIZE) + make_page(11, B, SIZE) + bytes(SIZE)
    recorder.store_many([2, 1, 0], pages)
    swap.error = error_of(gcma_shm.SlotBusy, done=2)
    with pytest.raises(gcma_shm.SlotBusy):
        recorder.store_many([2, 1, 0], pages)
    noted = log.operations()
    assert [(o.slot, o.value) for o in noted] == [(12, A), (11, B), (10, ZEROS)] * 2
    assert [o.end_ns != NEVER for o in noted] == [True, True, True, True, True, False]


def test_loads_are_noted_with_what_they_returned(recorded: tuple[Swap, RecordedSwap, Log]) -> None:
    swap, recorder, log = recorded
    assert recorder.load(1) is None
    swap.page = make_page(11, B, SIZE)
    assert recorder.load(1) == swap.page
    assert recorder.load_into(1, bytearray(SIZE))
    assert recorder.load_many([1], bytearray(SIZE)) == [True]
    with pytest.raises(TornPage):
        recorder.load(2)  # another slot's page
    swap.error = error_of(gcma_shm.SpillError)
    with pytest.raises(gcma_shm.SpillError):
        recorder.load(1)
    noted = log.operations()
    assert [o.value for o in noted[:4]] == [MISS, B, B, B]
    assert [o.end_ns != NEVER for o in noted] == [True] * 4 + [False] * 2


def test_the_end_of_a_type_is_an_invalidation_of_each_slot(recorded: tuple[Swap, RecordedSwap, Log]) -> None:
    swap, recorder, log = recorded
    recorder.invalidate_page(7)
    recorder.invalidate_area()
    swap.error = error_of(gcma_shm.BrokerUnavailable)
    with pytest.raises(gcma_shm.BrokerUnavailable):
        recorder.invalidate_area()
    noted = log.operations()
    assert [(o.kind, o.value) for o in noted] == [(Kind.STORE, MISS)] * 17
    assert [o.slot for o in noted] == [17, *range(10, 18), *range(10, 18)]
    assert [o.end_ns != NEVER for o in noted] == [True] * 9 + [False] * 8
