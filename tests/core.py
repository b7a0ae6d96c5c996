"""What the tests of the extension share: a client's plane, a type that has begun, and what the tables say."""

from __future__ import annotations

import os

from gcma_shm._core import Plane, Slots
from gcma_shm.records import Records
from tests.conftest import Bare


def life(bare: Bare, page: int) -> tuple[int, int, int]:
    """State, owner, sequence."""
    word = bare.plane.read(bare.arena.geometry.life_at + 8 * page)
    return word >> 62, word >> 46 & 0xFFFF, word & (1 << 46) - 1


def client(bare: Bare, number: int) -> Plane:
    return Plane(bare.arena.memory, bare.arena.geometry, number, os.fsencode(bare.spill_dir))


def declared(
    bare: Bare, slots: int = 100, flags: int = 0, type_: int = 0, base: int = 0, timeout: float | None = 5.0
) -> Slots:
    """Begins a life of a type as the registry does."""
    life = bare.plane.read(bare.arena.geometry.type_at(type_)) + 1
    (bare.spill_dir / f"{type_:03}.{life}").touch(0o600)
    assert bare.plane.begin_type(type_, base, slots, flags) == life
    return bare.plane.slots(type_, life, timeout)


def counts(bare: Bare, number: int = 1) -> dict[str, int]:
    return {name: count for name, count in Records(bare.plane).counters(number).items() if count}


def page_of(first: bytes) -> bytes:
    """A page that takes memory: it repeats eight bytes, for which a slot's word has no room."""
    return (first + b"-gcma--") * 512
