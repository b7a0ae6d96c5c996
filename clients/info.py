"""What a client is told about its arena."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AreaInfo:
    """An area just now; all but the name in bytes."""

    name: str
    size: int
    held: int  # by buffers and claimed reservations
    lent: int  # to the cache
    free: int  # neither
    largest_free: int  # range that no buffer or reservation has: what alloc_contig could return, but for alignment
    reserved: int = 0  # by reservations, claimed or not
    cache: bool = True  # lent to the cache as far as no buffer holds it
    drained: bool = False  # out of service
    align: int = 0  # of every buffer in it
    share: int = 100  # percent of it that buffers and reservations may have at once


@dataclass(frozen=True)
class NameInfo:
    """A named buffer or reservation; sizes in bytes, `offset` in pages from the area's start."""

    name: str
    area: str
    offset: int
    nbytes: int
    holders: int  # clients
    reservation: bool
    kept_by: tuple[
        int, ...
    ] = ()  # numbers of those that keep it and are no clients: 1 until it is unlinked, others until they end


@dataclass(frozen=True)
class QuotaInfo:
    """Bytes that a client holds in buffers and reservations, and may hold; None: no bound."""

    held: int
    quota: int | None
