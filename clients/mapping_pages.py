"""What the pages of a `SwapMapping` look like. Pure.

Slot 0 is the mapping's own page, slots 1 to `buckets` are the hash table's buckets, the others hold values. A bucket page lists the values
whose keys fall into it: hash, head slot and tag of each, as three arrays. A value's head page has its tag, key, length, checksum and, as
far as they fit, its first bytes; the rest is in whole pages, in *runs* of neighbouring slots. Runs that do not fit into the head go on
in list pages, each of which names the next.

A tag is 64 random bits, new with each write of a value: an entry that is found again unchanged is the same value.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

MAGIC = b"GCMA-MAP"
VERSION = 1
SALT_BYTES = 16
RUNS_INLINE = 16  # runs in a head page; more go on in list pages

_OWN = struct.Struct(f"<8sIIQ{SALT_BYTES}s")  # magic, version, page size, slots, salt
_BUCKET = struct.Struct("<Q")  # entries
_HEAD = struct.Struct("<QQIIII")  # tag, length, crc32, key bytes, runs, next list page (0: none)
_LIST = struct.Struct("<QII")  # tag, runs, next list page
_RUN = struct.Struct("<II")  # first slot, slots
_ENTRY_BYTES = 8 + 8 + 4

Run = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """How a type's slots are divided."""

    page_size: int
    slots: int

    @property
    def entries_max(self) -> int:
        """Values that one bucket page lists."""
        return (self.page_size - _BUCKET.size) // _ENTRY_BYTES

    @property
    def buckets(self) -> int:
        """So many that a bucket is half full, on the average, when every slot has a value: none overflows."""
        return -(-self.slots // (self.entries_max // 2))

    @property
    def first(self) -> int:
        """The first slot that holds values."""
        return 1 + self.buckets

    @property
    def key_max(self) -> int:
        """Bytes of a key."""
        return self.page_size // 2

    @property
    def runs_per_list(self) -> int:
        """Runs that one list page holds."""
        return (self.page_size - _LIST.size) // _RUN.size

    def inline(self, key: bytes, length: int) -> int:
        """How many of a value's bytes are in its head page."""
        room = self.page_size - _HEAD.size - len(key)
        return length if length <= room else room - RUNS_INLINE * _RUN.size

    def pages_for(self, nbytes: int) -> int:
        """Whole pages that so many bytes take."""
        return -(-nbytes // self.page_size)

    def pages_beside(self, head: Head) -> int:
        """The pages of a value that are not its head."""
        return self.pages_for(head.length - len(head.inline))

    def slots_max(self, key: bytes, length: int) -> int:
        """What a value takes at the most: its head, its other pages, and list pages for as many runs as there are of these."""
        count = self.pages_for(length - self.inline(key, length))
        return 1 + count + -(-max(count - RUNS_INLINE, 0) // self.runs_per_list)


@dataclass(frozen=True)
class Entry:
    """One value, as its bucket lists it."""

    hash: int
    slot: int
    tag: int


@dataclass(frozen=True)
class Head:
    """A head page, read."""

    tag: int
    key: bytes
    length: int
    crc: int
    runs: list[Run]
    more: int
    inline: memoryview


def own_page(shape: Shape, salt: bytes) -> bytes:
    """The mapping's own page."""
    return _OWN.pack(MAGIC, VERSION, shape.page_size, shape.slots, salt).ljust(shape.page_size, b"\0")


def read_own(page: bytes, shape: Shape) -> bytes:
    """The salt. Raises ValueError for what is no mapping of this shape."""
    magic, version, page_size, slots, salt = _OWN.unpack_from(page)
    if magic != MAGIC or version != VERSION or (page_size, slots) != (shape.page_size, shape.slots):
        raise ValueError(
            "the type holds something else than a mapping of this release: slot 0 begins with "
            f"{bytes(page[:8])!r}; use another type, or invalidate_area() this one"
        )
    return bytes(salt)


def hash_of(key: bytes, salt: bytes) -> int:
    """Keyed, so that nobody can choose keys that all fall into one bucket."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8, key=salt).digest(), "little")


def read_bucket(page: bytes | None, shape: Shape) -> list[Entry]:
    """All entries of a bucket; None: a bucket that was never stored."""
    if page is None:
        return []
    count = min(_BUCKET.unpack_from(page)[0], shape.entries_max)
    hashes = struct.unpack_from(f"<{count}Q", page, _BUCKET.size)
    tags = struct.unpack_from(f"<{count}Q", page, _BUCKET.size + 8 * count)
    slots = struct.unpack_from(f"<{count}I", page, _BUCKET.size + 16 * count)
    return [Entry(*values) for values in zip(hashes, slots, tags, strict=True)]


def find_in_bucket(page: bytes | None, hash_: int, shape: Shape) -> list[Entry]:
    """The entries of that hash: the others are not looked at one by one."""
    if page is None:
        return []
    count = min(_BUCKET.unpack_from(page)[0], shape.entries_max)
    wanted, begin, end = hash_.to_bytes(8, "little"), _BUCKET.size, _BUCKET.size + 8 * count
    found = []
    at = page.find(wanted, begin, end)
    while at >= 0:
        index, rest = divmod(at - begin, 8)
        if not rest:
            (tag,) = struct.unpack_from("<Q", page, end + 8 * index)
            (slot,) = struct.unpack_from("<I", page, end + 8 * count + 4 * index)
            found.append(Entry(hash_, slot, tag))
        at = page.find(wanted, at + 1, end)
    return found


def bucket_page(entries: Sequence[Entry], shape: Shape) -> bytes:
    """A bucket page with these entries, at most `entries_max`."""
    count = len(entries)
    return (
        _BUCKET.pack(count)
        + struct.pack(f"<{count}Q", *(entry.hash for entry in entries))
        + struct.pack(f"<{count}Q", *(entry.tag for entry in entries))
        + struct.pack(f"<{count}I", *(entry.slot for entry in entries))
    ).ljust(shape.page_size, b"\0")


def head_page(tag: int, key: bytes, value: memoryview, runs: Sequence[Run], more: int, shape: Shape) -> bytes:
    """A value's head. `runs`: the first RUNS_INLINE at most; `more`: the first list page, or 0."""
    inline = shape.inline(key, len(value))
    return b"".join(
        (
            _HEAD.pack(tag, len(value), zlib.crc32(value), len(key), len(runs), more),
            key,
            *(_RUN.pack(*run) for run in runs),
            bytes(shape.page_size - _HEAD.size - len(key) - len(runs) * _RUN.size - inline),
            value[:inline],
        )
    )


def read_head(page: bytes, shape: Shape) -> Head | None:
    """What a head page says; None for what cannot be one."""
    tag, length, crc, key_bytes, runs, more = _HEAD.unpack_from(page)
    if key_bytes > shape.key_max or runs > RUNS_INLINE:
        return None
    at = _HEAD.size + key_bytes
    key = bytes(page[_HEAD.size : at])
    inline = shape.inline(key, length)
    return Head(tag, key, length, crc, _runs(page, at, runs), more, memoryview(page)[shape.page_size - inline :])


def list_page(tag: int, runs: Sequence[Run], more: int, shape: Shape) -> bytes:
    """A list page with at most `runs_per_list` runs."""
    return (_LIST.pack(tag, len(runs), more) + b"".join(_RUN.pack(*run) for run in runs)).ljust(shape.page_size, b"\0")


def read_list(page: bytes, tag: int, shape: Shape) -> tuple[list[Run], int] | None:
    """The runs of a list page, and the next one; None when it is not of that value."""
    found, runs, more = _LIST.unpack_from(page)
    if found != tag or runs > shape.runs_per_list:
        return None
    return _runs(page, _LIST.size, runs), more


def _runs(page: bytes, at: int, count: int) -> list[Run]:
    return [_RUN.unpack_from(page, at + i * _RUN.size) for i in range(count)]


def runs_of(slots: Sequence[int]) -> list[Run]:
    """Neighbours together, in the order that they have."""
    runs: list[Run] = []
    for slot in slots:
        if runs and slot == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((slot, 1))
    return runs
