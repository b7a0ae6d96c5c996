"""Sizes as people write them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcma_shm.sizes import counted, format_size, parse_size


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [
        ("1", 1),
        ("4096", 4096),
        (4096, 4096),
        ("4K", 4 << 10),
        ("4k", 4 << 10),
        ("4KB", 4 << 10),
        ("4KiB", 4 << 10),
        ("256M", 256 << 20),
        ("256 MiB", 256 << 20),
        (" 4G ", 4 << 30),
        ("2T", 2 << 40),
        ("17B", 17),
        ("0001", 1),
    ],
)
def test_read(written: str | int, size_bytes: int) -> None:
    assert parse_size(written) == size_bytes


@pytest.mark.parametrize(
    "written",
    ["", " ", "M", "1.5G", "-1", "-1M", "0", "0M", 0, -4096, "1P", "1 M M", "0x10", "1e6", "4K4K", "M4", "1iM"],
)
def test_refused(written: str | int) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(written)


@pytest.mark.parametrize("wrong", [None, 1.5, b"4K", [4096]])
def test_neither_text_nor_integer(wrong: Any) -> None:
    with pytest.raises(TypeError):
        parse_size(wrong)


@pytest.mark.parametrize(
    ("size_bytes", "written"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (256 << 20, "256 MiB"),
        (3 << 39, "1.5 TiB"),
        (4 << 30, "4 GiB"),
    ],
)
def test_written(size_bytes: int, written: str) -> None:
    assert format_size(size_bytes) == written


@given(st.integers(1, 2**50))
def test_what_is_written_can_be_read_where_it_is_exact(size_bytes: int) -> None:
    assert parse_size(size_bytes) == parse_size(str(size_bytes)) == size_bytes
    written = format_size(size_bytes)
    if "." not in written:
        number, unit = written.split()
        unit_bytes = parse_size(f"1{unit}")
        assert int(number) * unit_bytes <= size_bytes * 1.05 + 1
        assert parse_size(written) == int(number) * unit_bytes


def test_counts() -> None:
    assert [counted(n, "client") for n in (0, 1, 2)] == ["0 clients", "1 client", "2 clients"]
    assert [counted(n, "key or name", "keys and names") for n in (1, 2)] == ["1 key or name", "2 keys and names"]
