"""Pages that prove what they are: each line of one says whose it is, with a digest, so that no mix of two looks whole.

Owns the form of such a page and what a value is; knows nothing of swap types.
"""

from __future__ import annotations

import itertools
import struct
from hashlib import blake2b

MISS = 0  # the value of a slot that holds nothing
ZEROS = 1  # a page of zeros: the one page that several stores share
UNIQUE = 1 << 32  # from here on: writer << 32 | sequence, stored once

LINE_BYTES = 64
RUNS_MAX = 8  # that are told of a page that is not whole
_HEAD = struct.Struct("<8sQQ")
_MAGIC = b"register"


class TornPage(Exception):
    """A page that is not one whole page of its slot."""


def value_id(writer: int, sequence: int) -> int:
    """The value of a writer's page; writers count from 1."""
    assert writer >= 1
    assert 0 <= sequence < UNIQUE
    return writer << 32 | sequence


def _line(slot: int, value: int) -> bytes:
    head = _HEAD.pack(_MAGIC, slot, value)
    return head + blake2b(head, digest_size=LINE_BYTES - len(head)).digest()


def make_page(slot: int, value: int, size: int) -> bytes:
    """The page of `size` bytes that stands for `value` in `slot`."""
    return bytes(size) if value == ZEROS else _line(slot, value) * (size // LINE_BYTES)


def read_page(slot: int, page: bytes) -> int:
    """The value of a whole page of `slot`. Raises TornPage, saying which lines are whose."""
    first = page[:LINE_BYTES]
    if not any(first):
        if not any(page):
            return ZEROS
    else:
        magic, found, value = _HEAD.unpack_from(first)
        assert isinstance(value, int)
        if (
            magic == _MAGIC
            and found == slot
            and first == _line(slot, value)
            and page == first * (len(page) // LINE_BYTES)
        ):
            return value
    raise TornPage(f"slot {slot}: {describe(page)}")


def describe(page: bytes) -> str:
    """Runs of equal lines in a page that should have been one run."""
    lines = [page[at : at + LINE_BYTES] for at in range(0, len(page), LINE_BYTES)]
    runs = []
    at = 0
    for line, equal in itertools.groupby(lines):
        count = len(list(equal))
        magic, slot, value = _HEAD.unpack_from(line)
        whole = magic == _MAGIC and line == _line(slot, value)
        what = (
            f"slot {slot} value {value >> 32}.{value & 0xFFFFFFFF}"
            if whole
            else "zeros"
            if not any(line)
            else f"{line[:24]!r}"
        )
        runs.append(f"lines {at}-{at + count - 1}: {what}")
        at += count
    return "; ".join(runs[:RUNS_MAX]) + (f"; and {len(runs) - RUNS_MAX} more" if len(runs) > RUNS_MAX else "")
