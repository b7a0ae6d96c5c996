"""`SwapMapping`: values of any length over one swap type, as a MutableMapping.

A value is written into free slots first; then its bucket's page, stored in one step, names it; then the slots of the value before are
invalidated. So whoever reads finds the old value or the new one, and whoever writes may die at any moment: what it leaves is
slots that no bucket names, and they are collected when the room is needed (`collect`).

A reader takes no lock: it reads bucket, head and pages, and the bucket again. The same entry there: nothing of the value had been given up when
its pages were read, since slots are invalidated only after the entry has gone. The checksum is over the whole value.

Writers, of any process that maps the arena, take turns by an open-file-description lock on the type's entry in the arena's object, which the
kernel takes away with its process. Which slots are free is what the slot table itself says.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, ItemsView, Iterator, MutableMapping, ValuesView
from typing import Any, Literal, cast

from gcma_shm import layout
from gcma_shm._core import Plane
from gcma_shm.clients import mapping_pages as pages
from gcma_shm.clients.client import Client
from gcma_shm.clients.mapping_pages import Entry, Head, Shape
from gcma_shm.clients.mapping_values import Values
from gcma_shm.clients.turn import Turn
from gcma_shm.errors import ArenaError, QuotaExceeded, SlotBusy, SpillCorrupt
from gcma_shm.sizes import check_seconds

SURROGATES = "surrogatepass"  # names of files that are no text (os.fsdecode) are keys like others
TRIES_MAX = 1000  # of a read whose value is replaced under it; each is a writer's progress


class SwapMapping(MutableMapping[str, bytes]):
    """A mapping of text to bytes, shared by all processes that open the same type. Safe across threads, processes and fork.

    Reading takes no lock and works by messages too; writing needs a client that maps the arena. Values come back as bytes. Keys are at most
    half a page long in UTF-8. `len` and iteration go through all buckets; what is written meanwhile may be in or not.

    Operations raise KeyError; SlotBusy when a value was replaced again and again while it was read, or another process that is
    writing is stopped; SpillCorrupt for a value that does not fit its checksum; QuotaExceeded when the type has too few free slots
    (nothing has changed); and what `Swap` raises.
    """

    def __init__(
        self,
        client: Client,
        type: int,
        slots: int,
        *,
        write: Literal["through", "behind"] = "behind",
        share: int = layout.SHARE_WHOLE,
        timeout: float = 5.0,
    ) -> None:
        """Opens the mapping in swap type `type` of `slots` slots, or makes it there. A value takes one slot, and one more for each page
        that it is longer than what its first holds; the table of buckets takes one slot in a hundred. `write` and `share` as for
        `client.swap`. `timeout`: seconds to wait for other writers.

        Raises ValueError when the type holds something else, or is declared otherwise; ArenaError when the mapping is new and the
        client does not map the arena; TypeError for a client that awaits.
        """
        _refuse_other_clients(client)
        check_seconds("timeout", timeout)
        self._shape = Shape(client.page_size, slots)
        if slots <= self._shape.first:
            raise ValueError(f"{slots} slots: a mapping needs more than {self._shape.first}, which its table takes")
        self._swap = client.swap(type, slots, write, share)
        self._turn: Turn | None = None
        if client.mapped:
            at = cast(Plane, client._plane).geometry.type_at(type)
            self._turn = Turn(client._open_file, at, f"the mapping in type {type}", timeout)
        self._values = Values(self._swap, self._shape)
        self._salt = self._open()

    def _open(self) -> bytes:
        own = self._swap.load(0)
        if own is None:
            with self._writing():
                own = self._swap.load(0)
                if own is None:
                    own = pages.own_page(self._shape, secrets.token_bytes(pages.SALT_BYTES))
                    self._swap.store(0, own)
        return pages.read_own(own, self._shape)

    # --- reading

    def __getitem__(self, key: str) -> bytes:
        found = self._look_up(key, self._values.read) if _is_text(key) else None
        if found is None:
            raise KeyError(key)
        return found

    def __contains__(self, key: object) -> bool:
        return _is_text(key) and self._look_up(cast(str, key), _nothing) is not None

    def _look_up(self, key: str, read: Callable[[Head], bytes | None]) -> bytes | None:
        """What `read` makes of the head of that key's value; None: there is no such key."""
        name, hash_, bucket = self._place(key)
        for _ in range(TRIES_MAX):
            entries = self._entries(bucket, hash_)
            found = damaged = None
            for entry in entries:
                head = self._values.head(entry)
                if head is None:
                    damaged = entry
                elif head.key == name:
                    found = read(head)
                    damaged = entry if found is None else None
                    break
            # Nothing of what they name was given up before this look, so what was read of it is whole. Of no entries there is
            # nothing to be read.
            if not entries or entries == self._entries(bucket, hash_):
                if damaged is not None:
                    raise SpillCorrupt(
                        0, f"the value of {key!r} at slot {damaged.slot} is not the one that was written"
                    )
                return found
        raise SlotBusy(f"the value of {key!r} was replaced {TRIES_MAX} times while it was read")

    def _place(self, key: str) -> tuple[bytes, int, int]:
        name = key.encode(errors=SURROGATES)
        hash_ = pages.hash_of(name, self._salt)
        return name, hash_, 1 + hash_ % self._shape.buckets

    def _entries(self, bucket: int, hash_: int) -> list[Entry]:
        return pages.find_in_bucket(self._swap.load(bucket), hash_, self._shape)

    # --- all of it

    def __len__(self) -> int:
        return sum(len(self._listed(bucket)) for bucket in self._buckets())

    def __iter__(self) -> Iterator[str]:
        for bucket in self._buckets():
            yield from self._names(bucket)

    def _names(self, bucket: int) -> list[str]:
        """The keys in a bucket, in its order; of one moment."""
        for _ in range(TRIES_MAX):
            entries = self._listed(bucket)
            heads = [self._values.head(entry) for entry in entries]
            if entries == self._listed(bucket):
                return [head.key.decode(errors=SURROGATES) for head in heads if head is not None]
        raise SlotBusy(f"bucket {bucket} of the mapping was changed {TRIES_MAX} times while it was read")

    def _buckets(self) -> range:
        return range(1, self._shape.first)

    def _listed(self, bucket: int) -> list[Entry]:
        return pages.read_bucket(self._swap.load(bucket), self._shape)

    def items(self) -> ItemsView[str, bytes]:
        """A view; what another process removes while it is gone through is left out."""
        return _Items(self)

    def values(self) -> ValuesView[bytes]:
        """A view; likewise."""
        return _Values(self)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a mapping cannot be pickled: pass client.endpoint, type and slots, and open it by SwapMapping in the other process"
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} on type {self._swap.type}, {self._shape.slots} slots>"

    # --- writing

    def __setitem__(self, key: str, value: Any) -> None:
        if not _is_text(key):
            raise TypeError(f"key of type {type(key).__name__}: expected text")
        name, hash_, bucket = self._place(key)
        if len(name) > self._shape.key_max:
            raise ValueError(f"a key of {len(name)} bytes in UTF-8: expected at most {self._shape.key_max}")
        with memoryview(value) as given, _bytes_of(given) as view, self._writing():
            others = self._listed(bucket)
            before = next((e for e in others if e.hash == hash_ and self._is_of(e, name)), None)
            others = [e for e in others if e is not before]
            if len(others) >= self._shape.entries_max:
                raise QuotaExceeded(f"bucket {bucket} of the mapping is full")
            slots = self._values.take(self._shape.slots_max(name, len(view)), self.collect)
            tag = secrets.randbits(64)
            try:
                entry = self._values.write(name, hash_, tag, view, slots)
                self._swap.store(bucket, pages.bucket_page([*others, entry], self._shape))
            except BaseException:
                # A store that fails after the page is visible has named the value.
                listed = self._listed(bucket)
                self._drop(before) if any(e.tag == tag for e in listed) else self._values.give_back(slots)
                raise
            self._drop(before)

    def __delitem__(self, key: str) -> None:
        if not _is_text(key):
            raise KeyError(key)
        name, hash_, bucket = self._place(key)
        with self._writing():
            entries = self._listed(bucket)
            gone = next((e for e in entries if e.hash == hash_ and self._is_of(e, name)), None)
            if gone is None:
                raise KeyError(key)
            slots = self._values.slots_of(gone)
            self._swap.store(bucket, pages.bucket_page([e for e in entries if e is not gone], self._shape))
            self._values.give_back(slots)

    def clear(self) -> None:
        """Removes all values."""
        with self._writing():
            for bucket in self._buckets():
                self._swap.invalidate_page(bucket)
            self.collect()

    def pop(self, key: str, *default: Any) -> Any:
        """As of a dict; no other writer comes in between."""
        with self._writing():
            return super().pop(key, *default)

    def setdefault(self, key: str, default: Any = b"") -> bytes:
        """As of a dict; no other writer comes in between."""
        with self._writing():
            return super().setdefault(key, default)

    def popitem(self) -> tuple[str, bytes]:
        """As of a dict; no other writer comes in between."""
        with self._writing():
            return super().popitem()

    def collect(self) -> int:
        """Frees the slots that no value has: those of writers that died while they wrote. Returns how many. Done by itself when a
        value finds no room.
        """
        with self._writing():
            return self._values.keep_only(entry for bucket in self._buckets() for entry in self._listed(bucket))

    def _writing(self) -> Turn:
        if self._turn is None:
            raise ArenaError(
                "writing a mapping needs a client that maps the arena; connect with mapped=True on the broker's host"
            )
        return self._turn

    def _is_of(self, entry: Entry, name: bytes) -> bool:
        """Of an entry with the hash of that name. What cannot be read is to be replaced, or removed."""
        try:
            head = self._values.head(entry)
        except SpillCorrupt:
            return True
        return head is None or head.key == name

    def _drop(self, entry: Entry | None) -> None:
        """Gives up a value that its bucket does not name any more."""
        if entry is not None:
            self._values.give_back(self._values.slots_of(entry))


def _is_text(key: object) -> bool:
    """Whatever the annotations say: a mapping is asked for keys of all kinds."""
    return isinstance(key, str)


def _refuse_other_clients(client: object) -> None:
    if not isinstance(client, Client):
        raise TypeError(
            f"a mapping over {client!r}: it needs a client that blocks, of gcma_shm.connect(); in a program of asyncio use it by "
            "asyncio.to_thread"
        )


def _bytes_of(given: memoryview) -> memoryview:
    """Raises TypeError for what is not contiguous."""
    return given.cast("B") if given.nbytes else memoryview(b"")  # of dimensions of which one is 0 there is no cast


def _nothing(_head: Head) -> bytes:
    return b""


class _Items(ItemsView[str, bytes]):
    _mapping: SwapMapping

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        for key in self._mapping:
            value = self._mapping.get(key)
            if value is not None:
                yield key, value


class _Values(ValuesView[bytes]):
    _mapping: SwapMapping

    def __iter__(self) -> Iterator[bytes]:
        return (value for _, value in self._mapping.items())
