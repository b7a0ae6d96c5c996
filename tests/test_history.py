"""Pages prove what they are, logs survive a kill, and a recorded swap type notes what each operation may have done."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from gcma_shm.clients.history import NEVER, Kind, Log
from gcma_shm.clients.proof import ZEROS, TornPage, make_page, read_page, value_id
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
