"""Sizes, counts and times as people write them."""

from __future__ import annotations

import operator
import re

SECONDS_MAX = 1e6  # a week and a half: whatever takes longer is a mistake
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_PATTERN = re.compile(r"(\d+)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(size: int | str) -> int:
    """`"256M"`, `"4 GiB"`, `"4096"` or a number of bytes, as bytes. Units are powers of 1024.

    Raises ValueError for anything that is not a positive size, TypeError for neither text nor an integer.
    """
    if isinstance(size, str):
        match = _PATTERN.fullmatch(size.strip())
        if match is None:
            raise ValueError(f"{size!r} is not a size: expected bytes, or a number with K, M, G or T, such as '256M'")
        size_bytes = int(match[1]) * _UNITS[match[2].upper()]
    else:
        size_bytes = operator.index(size)
    if size_bytes <= 0:
        raise ValueError(f"{size!r} is not a size: expected more than zero bytes")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """Bytes for people: the largest unit that leaves at least one, one decimal at the most."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        unit_bytes = _UNITS[unit[0]]
        if size_bytes >= unit_bytes:
            return f"{size_bytes / unit_bytes:.1f}".removesuffix(".0") + f" {unit}"
    return f"{size_bytes} B"


def counted(count: int, one: str, many: str = "") -> str:
    """`"1 client"`, `"2 clients"`; `many`: where that is not `one` with an s."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def check_seconds(name: str, value: float, least: float = 0.0) -> float:
    """A number of seconds from `least` to SECONDS_MAX. Raises ValueError, TypeError."""
    if not isinstance(value, int | float):
        raise TypeError(f"{name} of type {type(value).__name__}: expected seconds")
    if not least <= value <= SECONDS_MAX:  # also refuses what is not a number
        raise ValueError(f"{name} {value}: expected {least} to {SECONDS_MAX:g} seconds")
    return value
