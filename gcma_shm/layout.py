"""Where everything lies in an arena.

Pure: computes a `Geometry` from what was asked for, writes it as a header, and reads it back once magic, version, size
and checksum fit. The layout (version 5), from the arena's first byte:

    header         4 KiB: identity, geometry and ways of working with a checksum, words that change, hot ones on lines of their own, and
                   where the spill files are
    areas          64 entries of 128 bytes: name, range, policy, clock hand, gauges; an area that was grown may have several
    types          256 entries of 128 bytes: life, slots, ways of writing, share; gauges
    clients        `clients_max` + 1 records of 512 bytes: state, process, then counters, counted up by the client alone
    allocations    `allocations_max` entries of 128 bytes: buffers and reservations, with the request that asked for it
    holders        one bit per allocation and client;  claimers: the same, for claims that several share
    slots          16 bytes each: slot word, side word
    life, key      8 bytes a page each;  visited: one byte a page
    pages          the nursery, then the areas, in order

Page numbers count through nursery and areas, from the nursery's first page, 0.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from gcma_shm.areas import LENT, Area, AreaSpec, parse_area
from gcma_shm.errors import ArenaError
from gcma_shm.sizes import format_size

MAGIC = b"GCMA-SHM"
LAYOUT_VERSION = 5

PAGE_SIZE_MIN = 4 << 10
PAGE_SIZE_MAX = 2 << 20
AREAS_MAX = 64
TYPES_MAX = 256
CLIENTS_MAX = 4095  # a slot's writer has 12 bits for a client number, and 0 means nobody
GRANTS_MAX = 32
NURSERY_PAGES_MIN = 16
NURSERY_SHARE = 10  # one page in ten: the size of the small queue in the S3-FIFO paper (Yang et al., SOSP 2023)
SLOTS_PER_PAGE = 4
POLICIES = ("s3fifo", "sieve", "clock")  # what stays in memory; the header has the index
SPILL_IO = ("buffered", "uncached", "direct")  # how spill files are read and written; likewise

HEADER_BYTES = 4096
AREA_BYTES = 128
TYPE_BYTES = 128
CLIENT_BYTES = 512
ALLOCATION_BYTES = 128
SLOT_BYTES = 16
DESCRIPTOR_BYTES = 8 + 8 + 1
CACHE_LINE = 64
NAME_BYTES = 48

# Words of the header that change, as offsets from the arena's start.
EPOCH_AT = 0x200
BROKER_PID_AT = 0x208
BROKER_START_AT = 0x210
STOPPED_AT = 0x218
HEAD_AT = 0x240
HAND_AT = 0x280
COUNTED_AT = 0x288  # nursery tickets whose pages are counted in the gauges of their types
CLOCK_AT = 0x2C0
CACHE_PAGES_AT = 0x2C8  # pages that cache may be in; 0: not known yet
FILLING_AT = 0x300
TAKING_AT = 0x308
WAKE_AT = 0x340
FORKS_AT = 0x380  # counts up after a client has written the record of a child that it is about to fork
SPILL_DIR_AT = 0x800  # the spill directory's path, with zeros behind it; written before the first epoch
SPILL_DIR_BYTES = HEADER_BYTES - SPILL_DIR_AT

# An area's entry.
AREA_ENTRY = struct.Struct(f"<{NAME_BYTES}sQQQQQQ")  # the fields of `Area`; no pages: not in use
AREA_PAGES_AT = 0x38
AREA_CLOCK_AT = 0x60
AREA_LENT_AT = 0x68
AREA_HELD_AT = 0x70
AREA_BASE_AT = 0x78
assert AREA_ENTRY.size <= AREA_CLOCK_AT

# A type's entry.
TYPE_LIFE_AT = 0x00
TYPE_BASE_AT = 0x08
TYPE_SLOTS_AT = 0x10
WRITE_BEHIND = 1
TYPE_SHARE_AT = 0x20  # percent
TYPE_CLOCK_AT = 0x40  # its own evictions, if it has a share of its own
TYPE_NURSERY_AT = 0x48  # pages of it in the nursery
SHARE_WHOLE = 100

# A client's record. Number 0 is nobody (its counters are those of the departed); number 1 is the broker itself.
CLIENT_STATE_AT = 0x00
CLIENT_PID_AT = 0x08
CLIENT_START_AT = 0x10
CLIENT_PIDNS_AT = 0x20
CLIENT_CLAIMS_AT = 0x28
CLIENT_INHERITED_AT = 0x38  # of a forked child: its parent's count of claims at the fork
CLIENT_WAKE_AT = 0x30  # counts up when the broker has served one of the client's requests that waited in line
CLIENT_COUNTERS_AT = 0x40
CLIENT_LOCKED_AT = 0x1C0  # 1: its process holds a lock on the record, see presence.py
CLIENT_INHERITS_AT = 0x1C8  # 1: of a forked child: the broker has let it inherit
CLIENT_QUOTA_AT = 0x1D0  # 0: the default; NO_QUOTA; or bytes
NO_QUOTA = (1 << 64) - 1
CLIENT_KEEPS_AT = 0x1D8  # 1: no client, but a process for as long as which something is kept
NOBODY = 0
BROKER = 1

# An allocation's entry: a buffer or a reservation.
ALLOCATION_STATE_AT = 0x00  # generation:56 · kind:8; written last
ALLOCATION_FIRST_AT = 0x08
ALLOCATION_PAGES_AT = 0x10
ALLOCATION_AREA_AT = 0x18
ALLOCATION_CLIENT_AT = 0x20
ALLOCATION_REQUEST_AT = 0x28
ALLOCATION_CLAIM_AT = 0x30
ALLOCATION_DEADLINE_AT = 0x38  # of a hand-over, in CLOCK_MONOTONIC nanoseconds; 0: none
ALLOCATION_NAME_AT = 0x40
ALLOCATION_LENT_AT = 0x70  # of a reservation: pages of it that hold cache
ALLOCATION_ORDINAL_AT = 0x78  # of its claim, among those of the client that made it
KIND_BITS = 8
BUFFER = 1
RESERVATION = 2
ALLOCATIONS_MAX = 65535  # the owner in a page's life has 16 bits for an entry's number, counted from 1
INDEX_BITS = 16  # of a buffer's or reservation's number; above it the entry's generation

# A reservation's claim word: generation:47 · shared:1 · client:16; client 0: lent.
CLAIM_CLIENT = 0xFFFF
CLAIM_SHARED = 1 << 16
CLAIM_GENERATION_SHIFT = 17


@dataclass(frozen=True)
class Geometry:
    """Sizes in bytes, counts, the offset (`…_at`) of each table from the arena's start; `policy` and `spill_io`: indexes into
    POLICIES and SPILL_IO.
    """

    size: int
    page_size: int
    pages: int
    nursery_pages: int
    slots: int
    types_max: int
    clients_max: int
    grants_max: int
    allocations_max: int
    areas_at: int
    types_at: int
    clients_at: int
    allocations_at: int
    holders_at: int
    claimers_at: int
    slots_at: int
    life_at: int
    key_at: int
    visited_at: int
    pages_at: int
    policy: int
    spill_io: int

    @property
    def holder_bytes(self) -> int:
        """Bytes of one allocation's bits, one bit per client."""
        return -(-(self.clients_max + 1) // 64) * 8

    def client_at(self, number: int) -> int:
        """Offset of a client's record."""
        return self.clients_at + number * CLIENT_BYTES

    def type_at(self, type_: int) -> int:
        """Offset of a type's entry."""
        return self.types_at + type_ * TYPE_BYTES

    def area_at(self, index: int) -> int:
        """Offset of an area's entry."""
        return self.areas_at + index * AREA_BYTES

    def allocation_at(self, index: int) -> int:
        """Offset of an allocation's entry."""
        return self.allocations_at + index * ALLOCATION_BYTES

    def page_at(self, page: int) -> int:
        """Offset of a page's first byte."""
        return self.pages_at + page * self.page_size


_IDENTITY = struct.Struct("<8sII16s")
_GEOMETRY = struct.Struct(f"<{len(fields(Geometry))}Q")
_CHECKSUM = struct.Struct("<I")
_CHECKED_BYTES = _IDENTITY.size + _GEOMETRY.size
assert _CHECKED_BYTES + _CHECKSUM.size <= EPOCH_AT


def _aligned(offset: int, to: int) -> int:
    return -(-offset // to) * to


def _place(size: int, page_size: int, slots: int, clients_max: int) -> dict[str, int]:
    """The tables' offsets, and how many pages the rest holds."""
    upper_pages = size // page_size
    allocations_max = min(max(upper_pages // 16, 64), ALLOCATIONS_MAX)
    at = {"areas_at": HEADER_BYTES}
    at["types_at"] = at["areas_at"] + AREAS_MAX * AREA_BYTES
    at["clients_at"] = at["types_at"] + TYPES_MAX * TYPE_BYTES
    at["allocations_at"] = at["clients_at"] + (clients_max + 1) * CLIENT_BYTES
    at["holders_at"] = at["allocations_at"] + allocations_max * ALLOCATION_BYTES
    holders = allocations_max * -(-(clients_max + 1) // 64) * 8
    at["claimers_at"] = at["holders_at"] + holders
    at["slots_at"] = _aligned(at["claimers_at"] + holders, CACHE_LINE)
    at["life_at"] = _aligned(at["slots_at"] + slots * SLOT_BYTES, CACHE_LINE)
    pages = (size - at["life_at"] - 2 * CACHE_LINE - page_size) // (page_size + DESCRIPTOR_BYTES)
    pages = max(pages, 0)
    at["key_at"] = _aligned(at["life_at"] + pages * 8, CACHE_LINE)
    at["visited_at"] = _aligned(at["key_at"] + pages * 8, CACHE_LINE)
    at["pages_at"] = _aligned(at["visited_at"] + pages, page_size)
    return at | {"pages": pages, "allocations_max": allocations_max}


def _parse_area(name: str, spec: int | str | AreaSpec) -> AreaSpec:
    try:
        return parse_area(spec)
    except ValueError as error:
        raise ValueError(f"area {name!r}: {error}") from None


def _refuse_areas(areas: dict[str, AreaSpec]) -> None:
    if len(areas) > AREAS_MAX:
        raise ValueError(f"{len(areas)} areas: an arena has at most {AREAS_MAX}")
    for name in areas:
        refuse_name("area", name)
        if "=" in name:
            raise ValueError(f"area name {name!r}: expected one without `=`")


def refuse_name(what: str, name: str) -> None:
    """Raises ValueError for a name that an area or buffer cannot have."""
    if not name or len(name.encode(errors="replace")) > NAME_BYTES or not name.isprintable():
        raise ValueError(f"{what} name {name[:80]!r}: expected 1 to {NAME_BYTES} bytes of printable text")


def _lay_out(areas: dict[str, AreaSpec], geometry: Geometry) -> list[Area]:
    """The areas side by side from the arena's end downwards: what alignment leaves between them is in none, and what is below
    the first is the nursery's.
    """
    placed: list[Area] = []
    end = geometry.pages
    for name, spec in reversed(areas.items()):
        count = -(-spec.size // geometry.page_size)
        first = end - count
        if spec.align > geometry.page_size:
            first -= (geometry.pages_at + first * geometry.page_size) % spec.align // geometry.page_size
        alignment = max(spec.align // geometry.page_size, 1)
        placed.insert(0, Area(name, first, count, LENT if spec.cache else 0, spec.share, alignment))
        end = first
    return [replace(area, index=index) for index, area in enumerate(placed)]


def plan(
    size: int,
    page_size: int = PAGE_SIZE_MIN,
    areas: Mapping[str, int | str | AreaSpec] | None = None,
    slots: int | None = None,
    clients_max: int | None = None,
    policy: str = POLICIES[0],
    spill_io: str = SPILL_IO[0],
) -> tuple[Geometry, list[Area]]:
    """The geometry of an arena of `size` bytes in all, tables included, and its areas (sizes rounded up to pages).

    No areas: one called `default` that takes all but the nursery. Raises ValueError for what is no geometry,
    ArenaError for one that does not fit, saying what would.
    """
    if page_size & (page_size - 1) or not PAGE_SIZE_MIN <= page_size <= PAGE_SIZE_MAX:
        raise ValueError(f"page size {page_size}: expected a power of two from {PAGE_SIZE_MIN} to {PAGE_SIZE_MAX}")
    if slots is None:
        slots = max(size // page_size * SLOTS_PER_PAGE, 1)
    if not 1 <= slots < 1 << 40:
        raise ValueError(f"{slots} slots: expected 1 to {1 << 40}")
    wanted_clients = min(max(size // page_size // 64, 8), 256) if clients_max is None else clients_max
    if not 2 <= wanted_clients <= CLIENTS_MAX:
        raise ValueError(f"{wanted_clients} clients: expected 2 to {CLIENTS_MAX}")
    for what, one, known in (("policy", policy, POLICIES), ("spill_io", spill_io, SPILL_IO)):
        if one not in known:
            raise ValueError(f"{what} {one!r}: expected one of {', '.join(known)}")
    specs = {name: _parse_area(name, spec) for name, spec in (areas or {}).items()}
    _refuse_areas(specs)

    at = _place(size, page_size, slots, wanted_clients)
    pages = at["pages"]
    if pages >= 1 << 32:
        raise ValueError(f"{pages} pages: an arena has fewer than 2^32; choose larger pages")
    # Half of the nursery must do for what all clients have in hand, so that no one starves the others by stopping (promise 5). The
    # reclaim thread may have an eighth besides.
    nursery_min = max(NURSERY_PAGES_MIN, 2 * (wanted_clients + 1))
    if not specs:
        specs = {"default": AreaSpec(max(pages - max(pages // NURSERY_SHARE, nursery_min), 1) * page_size)}
    geometry = Geometry(
        size=size,
        page_size=page_size,
        nursery_pages=0,
        slots=slots,
        types_max=TYPES_MAX,
        clients_max=wanted_clients,
        grants_max=0,
        policy=POLICIES.index(policy),
        spill_io=SPILL_IO.index(spill_io),
        **at,
    )
    placed = _lay_out(specs, geometry)
    nursery_pages = placed[0].first
    if nursery_pages < nursery_min:
        tables = size - pages * page_size
        needed = tables + (pages - nursery_pages + nursery_min) * (page_size + DESCRIPTOR_BYTES)
        raise ArenaError(
            f"an arena of {format_size(size)} is too small: its tables take {format_size(tables)} ({slots} slots, "
            f"{wanted_clients} clients), the nursery needs {format_size(nursery_min * page_size)}, and the areas were to have "
            f"{format_size(sum(spec.size for spec in specs.values())) if areas else 'at least one page'}; "
            f"make it about {format_size(_aligned(needed, 1 << 16))}, or the areas smaller, or ask for fewer slots or clients"
        )
    grants_max = min(nursery_pages // 2 // (wanted_clients + 1), GRANTS_MAX)
    return replace(geometry, nursery_pages=nursery_pages, grants_max=grants_max), placed


def write_area(memory: memoryview, geometry: Geometry, index: int, area: Area) -> None:
    """Writes one entry of the table of areas, its clock hand and gauges left as they are.

    Word by word, the count of pages last: whoever dies in here leaves what was before, or all of it.
    """
    at = geometry.area_at(index)
    packed = AREA_ENTRY.pack(
        area.name.encode(), area.first, area.pages, area.policy, area.share, area.alignment, area.state
    )
    values = dict(zip(range(0, AREA_ENTRY.size, 8), struct.unpack(f"<{AREA_ENTRY.size // 8}Q", packed), strict=True))
    values[AREA_BASE_AT] = area.base
    values[AREA_PAGES_AT] = values.pop(AREA_PAGES_AT)
    with memory[at : at + AREA_BYTES].cast("Q") as words:
        for offset, value in values.items():
            words[offset // 8] = value


def write_header(memory: memoryview, geometry: Geometry, areas: list[Area], arena_id: bytes) -> None:
    """Writes identity, geometry and areas into zeroed memory; the magic last."""
    for index, area in enumerate(areas):
        write_area(memory, geometry, index, area)
    values = [getattr(geometry, field.name) for field in fields(Geometry)]
    checked = _IDENTITY.pack(MAGIC, LAYOUT_VERSION, HEADER_BYTES, arena_id) + _GEOMETRY.pack(*values)
    memory[8 : _CHECKED_BYTES + _CHECKSUM.size] = checked[8:] + _CHECKSUM.pack(zlib.crc32(checked))
    memory[:8] = MAGIC


def read_header(memory: memoryview, mapped_bytes: int) -> tuple[Geometry, list[Area], bytes]:
    """Geometry, areas and identity of the arena in `memory`.

    Raises ArenaError when it is no arena, one of another layout version, truncated or damaged.
    """
    if mapped_bytes < HEADER_BYTES:
        raise ArenaError(f"not an arena: {mapped_bytes} bytes are less than its header's {HEADER_BYTES}")
    magic, version, _, arena_id = _IDENTITY.unpack_from(memory, 0)
    if magic != MAGIC:
        raise ArenaError(f"not an arena: it begins with {bytes(magic)!r}, expected {MAGIC!r}")
    if version != LAYOUT_VERSION:
        raise ArenaError(
            f"arena of layout version {version}: this gcma-shm knows version {LAYOUT_VERSION}; use the same release"
        )
    (checksum,) = _CHECKSUM.unpack_from(memory, _CHECKED_BYTES)
    if checksum != zlib.crc32(memory[:_CHECKED_BYTES]):
        raise ArenaError("the arena's header is damaged: its checksum does not fit")
    geometry = Geometry(*_GEOMETRY.unpack_from(memory, _IDENTITY.size))
    if geometry.size != mapped_bytes:
        raise ArenaError(f"the arena was truncated: {mapped_bytes} bytes, its header says {geometry.size}")
    if geometry.policy >= len(POLICIES) or geometry.spill_io >= len(SPILL_IO):
        raise ArenaError("the arena's header is damaged: it names ways of working that there are not")
    areas: list[Area] = []
    for index in range(AREAS_MAX):
        name, *numbers = AREA_ENTRY.unpack_from(memory, geometry.area_at(index))
        (base,) = struct.unpack_from("<Q", memory, geometry.area_at(index) + AREA_BASE_AT)
        area = Area(name.rstrip(b"\0").decode(errors="replace"), *numbers)
        if area.pages:
            areas.append(replace(area, base=base, index=index))
    end = geometry.nursery_pages
    for area in sorted(areas, key=lambda area: area.first):
        if area.first < end or area.pages > geometry.pages - area.first:
            raise ArenaError(
                f"the arena's table of areas is damaged: {area.name!r} is at page {area.first}, expected {end} or above"
            )
        end = area.first + area.pages
    return geometry, areas, arena_id
