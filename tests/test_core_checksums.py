"""The extension's CRC32C: by the CPU and by table, against the definition."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcma_shm import layout
from gcma_shm._core import Plane
from tests.conftest import Bare

PAGE_SIZES = {"4K": 4 << 10, "64K": 64 << 10, "2M": 2 << 20}


def table() -> list[int]:
    entries = []
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)  # noqa: PLW2901 - the definition's own loop
        entries.append(n)
    return entries


TABLE = table()


def crc32c(data: bytes) -> int:
    """By the definition, a byte at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def test_the_naive_one_knows_the_vectors_of_rfc_3720() -> None:
    """Appendix B.4, which lists the bytes in the order of the wire; and the check value of the Rocksoft catalogue."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C
    assert crc32c(b"123456789") == 0xE3069283


def checksums(page_size: int, tmp_path: Path) -> tuple[Plane, Plane]:
    """The CPU's way (where it has one) and the table's."""
    geometry, areas = layout.plan(24 * page_size + (1 << 20), page_size, slots=100, clients_max=2)
    memory = mmap.mmap(-1, geometry.size)
    with memoryview(memory) as view:
        layout.write_header(view, geometry, areas, bytes(16))
    return tuple(Plane(memory, geometry, 1, os.fsencode(tmp_path), crc_hardware=hardware) for hardware in (True, False))  # type: ignore[return-value]


@pytest.mark.parametrize("page_size", PAGE_SIZES.values(), ids=PAGE_SIZES)
def test_known_patterns_as_pages(page_size: int, tmp_path: Path) -> None:
    hard, soft = checksums(page_size, tmp_path)
    ramp = bytes(range(256)) * (page_size // 256)
    pages = [
        bytes(page_size),
        b"\xff" * page_size,
        ramp,
        ramp[::-1],
        b"\1" + bytes(page_size - 1),
        bytes(page_size - 1) + b"\1",
    ]
    pages += [bytes(page_size // 4 - 1) + b"\2" + bytes(page_size - page_size // 4)]  # at the seam of two quarters
    pages += [np.random.default_rng(seed).bytes(page_size) for seed in range(3)]
    for page in pages:
        assert soft.checksum(page) == hard.checksum(page)
    for page in pages if page_size < 1 << 20 else pages[-2:]:
        assert soft.checksum(page) == crc32c(page)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_hardware_and_software_agree(data: st.DataObject) -> None:
    page_size = data.draw(st.sampled_from([4 << 10, 8 << 10, 64 << 10]))
    hard, soft = checksums(page_size, Path("/"))
    piece = data.draw(st.binary(min_size=1, max_size=200))
    page = (piece * (page_size // len(piece) + 1))[:page_size]
    assert hard.checksum(page) == soft.checksum(page) == crc32c(page)


def test_checksum_of_what_is_no_page(bare: Bare) -> None:
    for wrong in (b"", bytes(4095), bytes(4097)):
        with pytest.raises(ValueError, match="4096"):
            bare.plane.checksum(wrong)
    with pytest.raises(TypeError):
        bare.plane.checksum("x" * 4096)  # type: ignore[arg-type] # on purpose
