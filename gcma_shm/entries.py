"""What the tables of an arena say: its types, clients, buffers and reservations, read from memory that may be read-only.

Pure: reads words and judges nothing. An arena that is used moves meanwhile; an entry whose state word changed while it was read is read
again, so each is what it was at one moment, and the table as a whole is not.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from gcma_shm import layout
from gcma_shm.layout import Geometry

READS_MAX = 8  # of one entry that changes meanwhile
_TYPE = struct.Struct("<7Q")  # life, base, slots, flags, share, inode, device
_CLIENT = struct.Struct("<3QQQ")  # state, pid, start, tag, pidns
_ALLOCATION = struct.Struct(f"<8Q{layout.NAME_BYTES}s2Q")
_STATE_MASK = 0xFF


@dataclass(frozen=True)
class TypeEntry:
    """A swap type that lives: its slots and its file, `name` in the spill directory; `inode`, `device`: of the one that its life
    began with.
    """

    number: int
    life: int
    base: int
    slots: int
    flags: int
    share: int
    inode: int
    device: int

    @property
    def end(self) -> int:
        """Behind its last slot in the slot table."""
        return self.base + self.slots

    @property
    def name(self) -> str:
        """Of its spill file."""
        return f"{self.number:03}.{self.life}"


@dataclass(frozen=True)
class ClientEntry:
    """A client record that is not free. `state`: a number of `records.State`; `pid`: in the namespace `pidns`; `keeps`: it is no
    client, but a process for as long as which something is kept.
    """

    number: int
    state: int
    parent: int
    pid: int
    start: int
    pidns: int
    is_locked: bool
    keeps: bool


@dataclass(frozen=True)
class Guest:
    """A buffer or reservation. `claim`: its claim word; `deadline`: of handles under way, 0: none."""

    index: int
    generation: int
    kind: int
    first: int
    pages: int
    area: int
    claim: int
    deadline: int
    name: bytes
    lent: int
    holders: frozenset[int]
    claimers: frozenset[int]

    @property
    def end(self) -> int:
        """Behind its last page."""
        return self.first + self.pages

    @property
    def owner(self) -> int:
        """What the lives of its pages say."""
        return self.index + 1

    @property
    def claimant(self) -> int:
        """The client that its claim word names; 0: it is lent, or a buffer."""
        return self.claim & layout.CLAIM_CLIENT if self.kind == layout.RESERVATION else layout.NOBODY

    @property
    def is_shared(self) -> bool:
        """Whether several processes have the claim."""
        return bool(self.claim & layout.CLAIM_SHARED)

    def __str__(self) -> str:
        words = {layout.BUFFER: "buffer", layout.RESERVATION: "reservation"}
        name = f" {self.name.decode(errors='replace')!r}" if self.name else ""
        return f"{words.get(self.kind, 'allocation')} in entry {self.index}{name}"


def word(memory: memoryview, at: int) -> int:
    """The word at byte `at`."""
    return int.from_bytes(memory[at : at + 8], "little")


def read_types(memory: memoryview, geometry: Geometry) -> list[TypeEntry]:
    """The living types."""
    found = []
    for number in range(geometry.types_max):
        life, base, slots, flags, share, inode, device = _TYPE.unpack_from(memory, geometry.type_at(number))
        if life & 1:
            found.append(TypeEntry(number, life, base, slots, flags, share, inode, device))
    return found


def read_clients(memory: memoryview, geometry: Geometry) -> dict[int, ClientEntry]:
    """The records in use, but those of nobody and of the broker."""
    found = {}
    for number in range(layout.BROKER + 1, geometry.clients_max + 1):
        at = geometry.client_at(number)
        for _ in range(READS_MAX):
            state, pid, start, _tag, pidns = _CLIENT.unpack_from(memory, at)
            locked, keeps = (word(memory, at + offset) for offset in (layout.CLIENT_LOCKED_AT, layout.CLIENT_KEEPS_AT))
            if word(memory, at) == state:
                break
        if state & _STATE_MASK:
            parent = state >> 8 & 0xFFFF
            found[number] = ClientEntry(
                number, state & _STATE_MASK, parent, pid, start, pidns, bool(locked), bool(keeps)
            )
    return found


def read_guests(memory: memoryview, geometry: Geometry) -> list[Guest]:
    """The entries of the table of allocations that are in use, of whatever kind."""
    begin, end = geometry.allocations_at, geometry.allocation_at(geometry.allocations_max)
    with memory[begin:end].cast("Q") as words:
        states = words[:: layout.ALLOCATION_BYTES // 8].tolist()
    used = [index for index, state in enumerate(states) if state & _STATE_MASK]
    return [guest for index in used if (guest := _read_guest(memory, geometry, index)) is not None]


def _read_guest(memory: memoryview, geometry: Geometry, index: int) -> Guest | None:
    """None: it is not in use any more."""
    at = geometry.allocation_at(index)
    for _ in range(READS_MAX):
        state, first, pages, area, _client, _request, claim, deadline, name, lent, _ = _ALLOCATION.unpack_from(
            memory, at
        )
        holders, claimers = (
            _clients(memory, start + index * geometry.holder_bytes, geometry.holder_bytes)
            for start in (geometry.holders_at, geometry.claimers_at)
        )
        if word(memory, at) == state:
            break
    kind = state & _STATE_MASK
    if not kind:
        return None
    # Of the name what is before the first zero: behind it may be what is left of an older one, whose removal was cut off.
    return Guest(
        index, state >> layout.KIND_BITS, kind, first, pages, area, claim, deadline, name.partition(b"\0")[0], lent, holders,
        claimers if kind == layout.RESERVATION else frozenset(),
    )  # fmt: skip


def _clients(memory: memoryview, at: int, size: int) -> frozenset[int]:
    found, bits = [], int.from_bytes(memory[at : at + size], "little")
    while bits:
        found.append((bits & -bits).bit_length() - 1)
        bits &= bits - 1
    return frozenset(found)
