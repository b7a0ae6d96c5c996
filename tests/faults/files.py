"""Files that fail by command, and what everybody is told and may expect then. Runs in a build of the extension whose writes and reads of
spill files obey files.h: `python -m tests.faults.files [SCENE …]`, in the way that `--spill-io` says.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gcma_shm import layout
from gcma_shm.clients.swap import Swap
from gcma_shm.errors import NurseryFull, SpillCorrupt, SpillError
from tests.client import filled_with
from tests.faults.spilling import PAGE, SLOTS, Place, cached_pages, check_values, data_pages, place
from tests.processes import Said, eventually, in_fork, stopped

ENVIRONMENT = "GCMA_TEST_FILES"
EVERYWHERE = 1 << 62
RETRIES_MAX = 16  # once more refused pages of one type in one round (gcma_shm/_arena.pxi)


class Fault:
    """The fault of one kind of call, as all processes have it."""

    _FIELDS = ("number", "from_", "to", "inode", "most", "calls", "failed")
    BYTES = 8 * len(_FIELDS)

    def __init__(self, memory: mmap.mmap, at: int) -> None:
        self._memory = memory
        self._at = at

    def _word(self, name: str) -> int:
        return self._at + 8 * self._FIELDS.index(name)

    def get(self, name: str) -> int:
        """A word of it."""
        (value,) = struct.unpack_from("<q", self._memory, self._word(name))
        return int(value)

    def set(self, **words: int) -> None:
        """Writes words of it."""
        for name, value in words.items():
            struct.pack_into("<q", self._memory, self._word(name), value)

    @contextlib.contextmanager
    def on(
        self, number: int = 0, *, slots: range = range(0), file: Path | None = None, most: int = 0
    ) -> Iterator[None]:
        """Meanwhile calls at these slots, by default all, fail with `number`; or do at most `most` bytes, -1: none."""
        start, end = (slots.start * PAGE, slots.stop * PAGE) if slots else (0, EVERYWHERE)
        self.set(from_=start, to=end, inode=file.stat().st_ino if file is not None else 0)
        self.set(most=most, number=number)  # last: it is on from here
        try:
            yield
        finally:
            self.set(number=0, most=0)


class Faults:
    """Those of writes, of reads, of punching holes, and of what a file system may not know; `block.most`: the size of its blocks."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 4096)
        self.write, self.read, self.punch, self.flags, self.block = (Fault(memory, n * Fault.BYTES) for n in range(5))


def refused(store: Callable[[], object], number: int) -> SpillError:
    """What a write-through store raises that the file does not take."""
    with pytest.raises(SpillError, match="pinned in memory until the file takes it") as raised:
        store()
    assert raised.value.errno == number
    assert raised.value.stored
    return raised.value


def unreadable(load: Callable[[], object], number: int) -> SpillError:
    """What a load raises that the file does not serve; 0: SpillCorrupt."""
    with pytest.raises(SpillError) as raised:
        load()
    assert raised.value.errno == number
    assert isinstance(raised.value, SpillCorrupt) == (number == 0)
    assert not raised.value.stored
    return raised.value


def fill(swap: Swap, first_value: int = 1) -> dict[int, int]:
    """Twice what the arena holds."""
    values = {n: first_value + n for n in range(SLOTS)}
    swap.store_many(values, b"".join(map(filled_with, values.values())))
    return values


def in_file(p: Place, type_: int, values: dict[int, int]) -> None:
    """The file has these values, or gets them by itself: what it refused to a client alone the broker writes a moment later."""

    def wrong() -> list[int]:
        data = p.file(type_).read_bytes()
        return [n for n, value in values.items() if data[n * PAGE : (n + 1) * PAGE] != filled_with(value)]

    assert eventually(lambda: not wrong()), wrong()


def on_disk_alone(faults: Faults, swap: Swap, values: dict[int, int]) -> list[int]:
    """The slots that no page in memory holds: those that cannot be loaded while the file cannot be read. All others are right."""
    found = []
    with faults.read.on(errno.EIO):
        for offset, value in values.items():
            failed = faults.read.get("failed")
            try:
                assert swap.load(offset) == filled_with(value)
            except SpillError:
                assert faults.read.get("failed") > failed
                found.append(offset)
    assert len(found) >= SLOTS // 8, len(found)
    return found


def errors_of_writing(p: Place, faults: Faults) -> None:
    """ENOSPC and EIO, at a first store, at an overwrite and in a batch: for us and for a forked child."""
    swap = p.client.swap(3, SLOTS)
    values = {n: n + 1 for n in range(8)}
    for n, value in values.items():
        swap.store(n, filled_with(value))
    for number in (errno.ENOSPC, errno.EIO) if p.client.mapped else (errno.ENOSPC,):
        with faults.write.on(number):
            refused(lambda: swap.store(2, filled_with(200 + number)), number)  # noqa: B023
            refused(lambda: swap.store(50, filled_with(300 + number)), number)  # noqa: B023
            batch = b"".join(filled_with(400 + number + n) for n in range(4))
            error = refused(lambda: swap.store_many(range(100, 104), batch), number)  # noqa: B023
            assert error.done == 0
            values |= {2: 200 + number, 50: 300 + number} | {100 + n: 400 + number + n for n in range(4)}
            refused(swap.sync, number)
            in_file(p, 3, {0: 1, 1: 2, 3: 4})
            p.degraded(6, number, type_=3)
            p.seen_by_all(3, values)
            if p.client.mapped:

                def child(_: Said) -> None:
                    check_values(swap, values)  # noqa: B023
                    refused(lambda: swap.store(51, filled_with(7)), number)  # noqa: B023

                in_fork(child)
                values[51] = 7
        p.healthy()
        in_file(p, 3, values)
        swap.sync()
        check_values(swap, values)


def a_bad_block(p: Place, faults: Faults) -> None:
    """EIO at one slot for ever: its neighbours in the same write are written, by stores, by sync, and by the broker."""
    through, behind = p.client.swap(3, SLOTS), p.client.swap(4, SLOTS, "behind")
    batch = b"".join(filled_with(n + 1) for n in range(8))
    with faults.write.on(errno.EIO, slots=range(2, 3)):
        error = refused(lambda: through.store_many(range(8), batch), errno.EIO)
        assert error.done == 2
        in_file(p, 3, {n: n + 1 for n in range(8) if n != 2})
        behind.store_many(range(8), batch)
        refused(behind.sync, errno.EIO)
        in_file(p, 4, {n: n + 1 for n in range(8) if n != 2})
        behind.store_many(range(8, 16), batch)
        assert eventually(lambda: p.file(4).stat().st_size == 16 * PAGE)  # by the broker
        assert eventually(lambda: p.health()["types"] == {"3": 1, "4": 1})
        p.seen_by_all(3, {n: n + 1 for n in range(8)})
    p.healthy()
    in_file(p, 3, {2: 3})
    in_file(p, 4, {2: 3})
    # Each round tries a few of those that are left: all of them have their turn.
    values = {n: 100 + n for n in range(100, 100 + 3 * RETRIES_MAX)}
    with faults.write.on(errno.EIO, slots=range(100, 200)):
        behind.store_many(values, b"".join(map(filled_with, values.values())))
        p.degraded(len(values), errno.EIO, type_=4)
        faults.write.set(to=(100 + 2 * RETRIES_MAX) * PAGE)
        p.degraded(2 * RETRIES_MAX, errno.EIO, type_=4)
    p.healthy()
    in_file(p, 4, values)


def short_writes(p: Place, faults: Faults) -> None:
    """However little a call writes, the page is written; one that says that it wrote nothing is a full disk, and nobody spins."""
    swap = p.client.swap(3, SLOTS)
    values = {n: n + 1 for n in range(12)}
    for most in (1000, PAGE, PAGE + 1, 3 * PAGE - 1):
        values = {n: value + 100 for n, value in values.items()}
        with faults.write.on(most=most):
            swap.store_many(values, b"".join(map(filled_with, values.values())))
        in_file(p, 3, values)
    with faults.write.on(most=-1):
        refused(lambda: swap.store(0, filled_with(7)), errno.ENOSPC)
        p.degraded(1, errno.ENOSPC, type_=3)
    p.healthy()
    in_file(p, 3, values | {0: 7})
    # A page that was torn in the file by a write that went wrong half-way.
    with faults.write.on(errno.EIO, slots=range(5, 6)):
        faults.write.set(from_=5 * PAGE + 1024)
        refused(lambda: swap.store(5, filled_with(9)), errno.EIO)
        torn = p.file(3).read_bytes()[5 * PAGE : 6 * PAGE]
        assert torn == filled_with(9)[:1024] + filled_with(values[5])[1024:]
        p.seen_by_all(3, {5: 9})
    p.healthy()
    in_file(p, 3, {5: 9})


def errors_of_reading(p: Place, faults: Faults) -> None:
    """EIO: what is in memory is served, what is not is refused; short reads are read to the end; a file that ends too early is corrupt."""
    swap = p.client.swap(3, SLOTS)
    values = fill(swap)
    first, *_, last = on_disk_alone(faults, swap, values)
    with faults.read.on(errno.EIO):
        unreadable(lambda: swap.load(first), errno.EIO)
        error = unreadable(lambda: swap.load_many([last, first], bytearray(2 * PAGE)), errno.EIO)
        assert error.done == 0
    assert swap.load(first) == filled_with(values[first])
    with faults.read.on(most=1000):
        check_values(swap, values)
    first, *_, last = on_disk_alone(faults, swap, values)
    with faults.read.on(most=-1):
        unreadable(lambda: swap.load(last), 0)  # a file that ends too early
    with faults.read.on(errno.EIO, slots=range(first, first + 1)):
        faults.read.set(from_=first * PAGE + 1024)  # a part of the page can be read
        unreadable(lambda: swap.load(first), errno.EIO)
        swap.store(first, filled_with(7))  # needs no reading
        assert swap.load(first) == filled_with(7)
    check_values(swap, values | {first: 7})


def one_file_of_two(p: Place, faults: Faults) -> None:
    """The file of one type fails: the other's pages are written and read as if nothing were."""
    bad, good = p.client.swap(3, SLOTS, "behind"), p.client.swap(4, SLOTS)
    bad.store(0, filled_with(1))
    bad.sync()
    with faults.write.on(errno.EIO, file=p.file(3)):
        pinned = {n: n + 1 for n in range(p.nursery_pages // 2)}
        bad.store_many(pinned, b"".join(map(filled_with, pinned.values())))
        values = fill(good, 5000)
        p.degraded(len(pinned), errno.EIO, type_=3)
        check_values(good, values)
        good.sync()
    p.healthy()
    bad.sync()
    in_file(p, 3, pinned)


def retries_have_a_pace(p: Place, faults: Faults) -> None:
    """A nursery full of refused pages costs so many writes a second, and no more; a file that heals has them all at once."""
    swap = p.hurried(p.client.swap(3, SLOTS, "behind"))
    values: dict[int, int] = {}
    with faults.write.on(errno.EIO):
        with contextlib.suppress(NurseryFull):
            for n in range(p.nursery_pages + 1):
                swap.store(n, filled_with(n + 1))
                values[n] = n + 1
        assert p.is_bounded(len(values))
        p.degraded(len(values), errno.EIO, type_=3)
        assert p.nursery_pages > 4 * RETRIES_MAX
        if p.client.mapped:
            seen = faults.write.get("failed")
            assert eventually(
                lambda: faults.write.get("failed") > seen + 2 * RETRIES_MAX
            )  # the pause is at its longest by now
            seen, begun = faults.write.get("failed"), time.monotonic()
            assert eventually(lambda: faults.write.get("failed") >= seen + 2 * RETRIES_MAX)
            rounds = 2 * (time.monotonic() - begun) + 2  # a second apart, or half of one
            assert faults.write.get("failed") - seen <= RETRIES_MAX * rounds
        else:  # the broker's own stores make no writes that the sweep has found to be in vain
            seen = faults.write.get("failed")
            for _ in range(20):
                with contextlib.suppress(NurseryFull):
                    swap.store(SLOTS - 1, filled_with(1))
                    raise AssertionError("a page became free")
            assert faults.write.get("failed") - seen <= 10 * RETRIES_MAX
    seen = faults.write.get("calls")
    p.healthy()
    assert faults.write.get("calls") - seen <= p.nursery_pages
    in_file(p, 3, values)


def holes(p: Place, faults: Faults) -> None:
    """Disk space that cannot be given back: asked for again at a pace, or, where the file system cannot, once for each life."""
    swap = p.client.swap(3, SLOTS)
    values = fill(swap)
    swap.sync()
    with faults.punch.on(errno.EIO):
        for n in range(0, 200, 2):
            swap.invalidate_page(n)
            del values[n]
        begun = time.monotonic()
        assert eventually(lambda: faults.punch.get("failed") >= 5)
        assert faults.punch.get("failed") <= 10 * (time.monotonic() - begun) + 7, "one a turn, and ten turns a second"
        check_values(swap, values)
    assert eventually(lambda: data_pages(p.file(3)) == set(values))
    with faults.punch.on(errno.EOPNOTSUPP):
        seen = faults.punch.get("failed")
        for type_ in (4, 5, 6):  # in this order a pass comes by them
            other = p.client.swap(type_, 20)
            other.store_many(range(20), b"".join(map(filled_with, range(1, 21))))
            for n in range(0, 20, 2):
                other.invalidate_page(n)
            asked = seen + type_ - 3
            assert eventually(lambda: faults.punch.get("failed") == asked)  # noqa: B023
        assert data_pages(p.file(4)) == set(range(20))
    p.client.swap(4, 20).invalidate_area()
    swap = p.client.swap(4, 20)  # another life, another file
    swap.store_many(range(20), b"".join(map(filled_with, range(1, 21))))
    swap.invalidate_page(3)
    assert eventually(lambda: data_pages(p.file(4)) == {*range(3), *range(4, 20)})
    assert data_pages(p.file(5)) == set(range(20)), "never asked again"
    check_values(p.client.swap(5, 20), {n: n + 1 for n in range(1, 20, 2)})


def larger_blocks(p: Place, faults: Faults) -> None:
    """A block of the file system goes back as a whole, or it would be written with zeros, and not given back."""
    faults.block.set(most=4 * PAGE)
    swap = p.client.swap(3, 62)  # the last block is of two pages
    swap.store_many(range(62), b"".join(map(filled_with, range(1, 63))))
    for n in (*range(6), *range(8, 12), 20, 60, 61):
        swap.invalidate_page(n)
    swap.store(30, bytes(PAGE))
    left = set(range(4, 62)) - {*range(8, 12), 60, 61}
    assert eventually(lambda: data_pages(p.file(3)) == left)
    swap.store(6, bytes(PAGE))
    swap.invalidate_page(7)
    assert eventually(lambda: data_pages(p.file(3)) == left - {*range(4, 8)})
    check_values(swap, {n: n + 1 for n in left - {*range(4, 8), 20, 30}})
    faults.block.set(most=1 << 30)  # more than anybody may claim at once: then page by page
    swap.invalidate_page(50)
    assert eventually(lambda: data_pages(p.file(3)) == left - {*range(4, 8), 20, 30, 50})
    faults.block.set(most=0)


def flags_that_nobody_knows(p: Place, faults: Faults) -> None:
    """Neither kernel nor file system knows RWF_DONTCACHE: found out once for each open file, and little stays in the page cache all the same."""
    with faults.flags.on(errno.EOPNOTSUPP):
        swap = p.client.swap(3, SLOTS)
        values = fill(swap)
        check_values(swap, values)
        assert 1 <= faults.flags.get("failed") <= 8
        p.seen_by_all(3, values)
        assert faults.flags.get("failed") <= 12
        assert eventually(lambda: cached_pages(p.file(3)) == 0)
    p.check()


def neighbours_in_one_write(p: Place, faults: Faults) -> None:
    """A batch, and what the broker writes by itself, in as few writes as the arena's way allows, and as many claims as one may have."""
    assert p.owner._plane is not None
    g = p.owner._plane.geometry
    most = 4 if g.spill_io == layout.SPILL_IO.index("buffered") else 64

    def writes(pages: int, claims: int) -> int:
        whole, rest = divmod(pages, min(claims, 64))
        return whole * -(-min(claims, 64) // most) + -(-rest // most)

    batch = b"".join(map(filled_with, range(1, 65)))
    through, behind = p.client.swap(3, 64), p.client.swap(4, 64, "behind")
    calls = faults.write.get("calls")
    with stopped(p.owner.broker_pid):  # or it writes some of it, should we be kept from that for a second
        through.store_many(range(64), batch)
    # A batch of stores is of no more pages than a quarter of the nursery.
    size = min(64, g.nursery_pages // 4)
    expected = sum(writes(min(size, 64 - first), g.grants_max) for first in range(0, 64, size))
    assert faults.write.get("calls") - calls == expected
    calls = faults.write.get("calls")
    with stopped(p.owner.broker_pid):
        behind.store_many(range(64), batch)
    assert eventually(lambda: p.owner.stats()["counters"]["cleaned"] == 128)
    expected = writes(64, min(64, max(g.grants_max, g.nursery_pages // 8)))
    assert expected <= faults.write.get("calls") - calls <= 3 * expected, "in two or three rounds of the broker's"
    check_values(behind, {n: n + 1 for n in range(64)})


SCENES = (
    errors_of_writing,
    a_bad_block,
    short_writes,
    errors_of_reading,
    one_file_of_two,
    retries_have_a_pace,
    holes,
    larger_blocks,
    flags_that_nobody_knows,
    neighbours_in_one_write,
)
OF_FILES = SCENES[-4:]  # no matter who asks for what


def main(spill_io: str, names: list[str]) -> None:
    """Plays the scenes of these names, by default all, in that way of reading and writing: mapped, and where that makes a difference by messages."""
    with tempfile.TemporaryDirectory() as directory:
        words = Path(os.environ[ENVIRONMENT])
        faults = Faults(words)
        for scene in SCENES:
            if names and scene.__name__ not in names:
                continue
            for mapped in (True, False) if spill_io == "buffered" and scene not in OF_FILES else (True,):
                begun = time.monotonic()
                with place(Path(directory), mapped, spill_io=spill_io) as p:
                    scene(p, faults)
                    p.check()
                print(
                    f"{scene.__name__}, {'mapped' if mapped else 'messages'}: {time.monotonic() - begun:.1f} s",
                    flush=True,
                )
    assert faults.write.get("calls"), "not the build that fails"
    print("all well")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenes", nargs="*")
    parser.add_argument("--spill-io", default=layout.SPILL_IO[0], choices=layout.SPILL_IO)
    asked = parser.parse_args()
    main(asked.spill_io, asked.scenes)
