"""iceoryx2's blackboard as a contender of `peers.py`: values in shared memory under keys that are all known beforehand, one writer, many readers.

Its Python binding compares keys by a call into Python, one after another, when an entry is added and when a handle to it is made: 2,000 of them take
8 s and 18 s, and 20,000 were not made within 100 s. So it is left out where there would be more than ENTRIES_MAX.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from peers_local import numbers
from peers_ways import NotHere, Place, Way, Ways

ENTRIES_MAX = 1500
SHM = Path("/dev/shm")
SERVICE = "pages"


def _node(home: Path, prefix: str) -> Any:
    """One whose files are in a directory of ours, and whose shared memory has a name of ours."""
    try:
        import iceoryx2
    except ImportError:
        raise NotHere("PyPI: iceoryx2") from None
    iceoryx2.set_log_level(iceoryx2.LogLevel.Error)
    config = iceoryx2.config.default()
    config.global_cfg.root_path = iceoryx2.Path.new(str(home / "iceoryx2"))
    config.global_cfg.prefix = iceoryx2.FileName.new(prefix)
    return iceoryx2.NodeBuilder.new().config(config).create(iceoryx2.ServiceType.Ipc)


def _type(page_size: int) -> type[ctypes.Structure]:
    return type("Page", (ctypes.Structure,), {"_fields_": [("bytes", ctypes.c_uint8 * page_size)]})


@contextmanager
def board(home: Path, page_size: int, pages: int) -> Iterator[str]:
    """Makes one with an entry a page, empty; gives the prefix of its names. Raises NotHere."""
    if pages > ENTRIES_MAX:
        raise NotHere(f"its Python binding takes minutes to make {pages} entries; larger pages are fewer")
    prefix = f"bench-{os.getpid()}_"
    try:
        import iceoryx2

        node = _node(home, prefix)
        making = node.service_builder(iceoryx2.ServiceName.new(SERVICE)).blackboard_creator(ctypes.c_uint64)
        empty = _type(page_size)()
        for n in range(pages):
            making = making.add(ctypes.c_uint64(n), empty)
        service = making.create()
        yield prefix
        service.delete()
    except ImportError:
        raise NotHere("PyPI: iceoryx2") from None
    finally:
        for path in SHM.glob(f"{prefix}*"):
            path.unlink(missing_ok=True)


class Blackboard:
    """Handles to all entries, made before: a load or a store looks no key up. The first process is the writer, the only one that there may be."""

    def __init__(self, place: Place, stack: ExitStack) -> None:
        import iceoryx2

        node = _node(place.directory, place.sockets["iceoryx2"])
        service = node.service_builder(iceoryx2.ServiceName.new(SERVICE)).blackboard_opener(ctypes.c_uint64).open()
        kind = _type(place.page_size)
        keys = [ctypes.c_uint64(n) for n in range(place.pages)]
        reader = service.reader_builder().create()
        self._kind = kind
        self._read = read = [reader.entry(key, kind) for key in keys]
        self._write: list[Any] = []
        self._kept = (node, service, reader)
        add = Ways()
        add.load("iceoryx2 blackboard, get", numbers, lambda n: read[n].get().data)
        if not place.index:
            writer = service.writer_builder().create()
            self._write = write = [writer.entry(key, kind) for key in keys]
            page = kind.from_buffer_copy(place.page)
            add.store("iceoryx2 blackboard, update_with_copy", numbers, lambda n: write[n].update_with_copy(page))
            stack.callback(writer.delete)
        stack.callback(reader.delete)
        self.ways: dict[str, dict[str, Way]] = add.found

    def put(self, n: int, page: bytes) -> None:
        """See `Store.put`."""
        self._write[n].update_with_copy(self._kind.from_buffer_copy(page))

    def get(self, n: int) -> bytes | None:
        """See `Store.get`."""
        page: bytes = self._read[n].get().data
        return page
