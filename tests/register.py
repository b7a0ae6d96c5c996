"""The names of `gcma_shm.clients.proof`, `history` and `linearizable` in one place, for tests."""

from __future__ import annotations

from gcma_shm.clients.history import NEVER, Kind, Log, Operation, RecordedSwap, gather
from gcma_shm.clients.linearizable import check
from gcma_shm.clients.proof import LINE_BYTES, MISS, UNIQUE, ZEROS, TornPage, make_page, read_page, value_id

__all__ = [
    "LINE_BYTES",
    "MISS",
    "NEVER",
    "UNIQUE",
    "ZEROS",
    "Kind",
    "Log",
    "Operation",
    "RecordedSwap",
    "TornPage",
    "check",
    "gather",
    "make_page",
    "read_page",
    "value_id",
]
