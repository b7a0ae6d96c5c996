"""The broker's areas, and guests in them, for tests without a broker."""

from __future__ import annotations

from collections.abc import Mapping

from gcma_shm.areas import AreaSpec
from gcma_shm.broker.areas import Areas
from gcma_shm.broker.room import Place, Wanted
from tests.conftest import Bare, private_bare

PAGE = 4096
ANY = {"a": 40 * PAGE, "b": 80 * PAGE}


def areas_of(bare: Bare) -> Areas:
    areas = Areas(bare.plane, bare.arena.areas, memoryview(bare.arena.memory))
    areas._check()
    return areas


def made(specs: Mapping[str, int | str | AreaSpec]) -> tuple[Areas, Bare]:
    bare = private_bare(specs)
    return areas_of(bare), bare


def take(areas: Areas, name: str, offset: int, pages: int) -> Place:
    """A guest exactly there."""
    place = areas.find(Wanted(areas.of(name), pages, offset))
    assert place is not None
    place.area.take(place)
    areas._check()
    return place


def offset_of(areas: Areas, name: str | None, pages: int, align: int = 1) -> tuple[str, int] | None:
    place = areas.find(Wanted(areas.of(name), pages, None, align))
    return None if place is None else (place.area.name, place.offset)


def life(bare: Bare, page: int) -> int:
    return bare.plane.read(bare.arena.geometry.life_at + 8 * page)


def lives(bare: Bare, first: int, pages: int) -> set[int]:
    return {life(bare, page) >> 62 for page in range(first, first + pages)}
