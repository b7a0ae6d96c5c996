"""Areas: the named parts of an arena from which contiguous buffers come, and how people write them."""

from __future__ import annotations

from dataclasses import dataclass, field

from gcma_shm.sizes import parse_size

LENT = 1  # policy: what no buffer holds is lent to the cache
DRAINED = 1  # state: out of service

SHARE_WHOLE = 100


@dataclass(frozen=True)
class AreaSpec:
    """What an area is to be. Sizes in bytes.

    `cache`: whether what no buffer holds is lent to the cache; False: a pure reserve. `align`: what every buffer in it is
    aligned to, counted from the area's start, which is aligned alike in the arena; 0: to pages. `share`: how much of it, in
    percent, guests (buffers and reservations) may have at once; the rest is always the cache's.
    """

    size: int
    cache: bool = True
    align: int = 0
    share: int = SHARE_WHOLE

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise ValueError(f"an area of {self.size} bytes: expected more than zero")
        if self.align < 0 or self.align & (self.align - 1):
            raise ValueError(f"an area aligned to {self.align} bytes: expected a power of two")
        if not 1 <= self.share <= SHARE_WHOLE:
            raise ValueError(f"a share of {self.share}: expected 1 to {SHARE_WHOLE}, percent of the area")

    def __str__(self) -> str:
        """As `parse_area` reads it."""
        return (
            f"{self.size}{'' if self.cache else ',cache=off'}"
            + (f",align={self.align}" if self.align else "")
            + (f",share={self.share}" if self.share != SHARE_WHOLE else "")
        )


@dataclass(frozen=True)
class Area:
    """An area, or a part of one that was grown: a range of pages under its name. `share` in percent, `alignment` in
    pages.
    """

    name: str
    first: int  # page number
    pages: int
    policy: int = LENT
    share: int = SHARE_WHOLE
    alignment: int = 1
    state: int = 0
    base: int = 0  # pages of the same area in the parts before
    index: int = field(default=0, compare=False)  # of its entry in the arena's table


def parse_area(spec: int | str | AreaSpec) -> AreaSpec:
    """`"512M"`, `"512M,cache=off,align=2M,share=75"`, bytes, or what is a specification already.

    Raises ValueError, TypeError.
    """
    if isinstance(spec, AreaSpec):
        return spec
    if not isinstance(spec, str):
        return AreaSpec(parse_size(spec))
    size, *options = spec.split(",")
    values: dict[str, int] = {}
    for option in options:
        name, _, value = option.strip().partition("=")
        if name in values:
            raise ValueError(f"area {spec!r}: {name} is given twice")
        if name == "cache" and value in ("on", "off"):
            values[name] = value == "on"
        elif name == "align" and value:
            values[name] = parse_size(value)
        elif name == "share" and value.removesuffix("%").isdecimal():
            values[name] = int(value.removesuffix("%"))
        else:
            raise ValueError(
                f"area {spec!r}: {option.strip()!r} is no option; expected SIZE[,cache=on|off][,align=SIZE][,share=PERCENT]"
            )
    return AreaSpec(parse_size(size), bool(values.get("cache", 1)), values.get("align", 0), values.get("share", 100))
