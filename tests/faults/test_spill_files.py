"""Spill files that are truncated, changed, replaced, removed or unreadable behind our back, for real: a page comes back as it was stored, or
an error does, never another page.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import gcma_shm
from gcma_shm.clients.swap import Swap
from gcma_shm.errors import SpillCorrupt, SpillError
from tests.client import filled_with
from tests.faults.disks import Disk, immutable, small_disk
from tests.faults.spilling import PAGE, SLOTS, check_values, place
from tests.processes import eventually

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(params=[True, False], ids=["mapped", "messages"])
def mapped(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


def store_all(swap: Swap, first_value: int) -> dict[int, int]:
    """Twice what the arena holds, so that half of it is in the file alone."""
    values = {n: first_value + n for n in range(SLOTS)}
    swap.store_many(values, b"".join(map(filled_with, values.values())))
    return values


def load_all(swap: Swap, values: dict[int, int], number: int = 0) -> set[int]:
    """The slots that cannot be loaded, each with the same error: SpillCorrupt, or SpillError of this number. All others are right."""
    lost = set()
    for offset, value in values.items():
        try:
            page = swap.load(offset)
        except SpillError as error:
            assert error.errno == number  # noqa: PT017 - one of two right answers
            assert isinstance(error, SpillCorrupt) == (number == 0)  # noqa: PT017
            assert not error.stored  # noqa: PT017
            lost.add(offset)
        else:
            assert page == filled_with(value), f"slot {offset}: another page"
    return lost


def truncate(file: Path, _old: bytes) -> None:
    os.truncate(file, SLOTS * PAGE // 2 + 1000)


def cut_and_grow(file: Path, _old: bytes) -> None:
    os.truncate(file, 0)
    os.truncate(file, SLOTS * PAGE)


def flip_bits(file: Path, _old: bytes) -> None:
    data = bytearray(file.read_bytes())
    for n in range(0, SLOTS, 2):
        data[n * PAGE + n % PAGE] ^= 1 << n % 8
    with file.open("r+b") as opened:
        opened.write(data)


def shift(file: Path, _old: bytes) -> None:
    """Whole pages, each in its neighbour's place."""
    data = file.read_bytes()
    with file.open("r+b") as opened:
        opened.write(data[PAGE:] + data[:PAGE])


def turn_back(file: Path, old: bytes) -> None:
    """What was there before the last store of each slot."""
    with file.open("r+b") as opened:
        opened.write(old)


@pytest.mark.parametrize("damage", [truncate, cut_and_grow, flip_bits, shift, turn_back])
def test_a_damaged_file(damage: Callable[[Path, bytes], None], tmp_path: Path, mapped: bool) -> None:
    with place(tmp_path, mapped) as p:
        swap = p.client.swap(3, SLOTS)
        store_all(swap, 1)
        old = p.file(3).read_bytes()
        values = store_all(swap, 10_000)
        damage(p.file(3), old)
        lost = load_all(swap, values)
        assert len(lost) >= SLOTS // 8, "nothing was in the file alone"
        first = min(lost)
        with pytest.raises(SpillCorrupt) as raised:
            swap.load_many([first, first], bytearray(2 * PAGE))
        assert raised.value.done == 0
        assert p.owner.stats()["counters"]["refused_spill_corrupt"] > len(lost)
        assert p.health()["state"] == "ok", "writes are taken"
        for offset in lost:
            swap.store(offset, filled_with(offset + 20_000))  # heals the slot
            values[offset] = offset + 20_000
        newly_lost = load_all(swap, values)  # what was in memory before, and in the file only since
        assert not newly_lost & lost, "a new value is safe"
        for offset in newly_lost:
            swap.invalidate_page(offset)
            assert swap.load(offset) is None
        store_all(swap, 30_000)
        assert not load_all(swap, {n: 30_000 + n for n in range(SLOTS)})
        p.check()


def by_a_copy(file: Path) -> None:
    shutil.copy(file, file.with_suffix(".copy"))
    file.with_suffix(".copy").replace(file)


def by_a_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/full")


def by_a_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def by_a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def by_a_device(file: Path) -> None:
    if os.geteuid():
        pytest.skip("making a device needs root")
    file.unlink()
    os.mknod(file, stat.S_IFCHR | 0o600, Path("/dev/full").stat().st_rdev)


def by_a_link_to_a_file_of_value(file: Path) -> None:
    treasure = file.parents[1] / "treasure"
    treasure.write_text("not to be touched")
    file.unlink()
    file.symlink_to(treasure)


def by_nothing(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize(
    ("replace", "number"),
    [
        (by_a_copy, errno.ESTALE),
        (by_a_link, errno.ELOOP),
        (by_a_link_to_a_file_of_value, errno.ELOOP),
        (by_a_fifo, errno.ESTALE),
        (by_a_directory, errno.EISDIR),
        (by_a_device, errno.ESTALE),
        (by_nothing, errno.ENOENT),
    ],
)
def test_a_replaced_file(replace: Callable[[Path], None], number: int, tmp_path: Path, mapped: bool) -> None:
    """Whoever has the right one open goes on with it, the broker among them; a newcomer is refused what is not the life's file."""
    with place(tmp_path, mapped) as p:
        swap, behind = p.client.swap(3, SLOTS), p.client.swap(4, SLOTS, "behind")
        with p.file(4).open("rb", buffering=0) as right_one:
            replace(p.file(3))
            replace(p.file(4))
            values = store_all(swap, 1)
            behind.store_many(range(10), b"".join(map(filled_with, range(100, 110))))
            assert eventually(lambda: os.pread(right_one.fileno(), PAGE, 9 * PAGE) == filled_with(109)), "by the broker"
        assert not load_all(swap, values)
        with gcma_shm.connect(p.owner.endpoint, mapped=True) as stranger:
            for write, type_ in (("through", 3), ("behind", 4)):
                with pytest.raises(SpillError, match="cannot be opened") as raised:
                    stranger.swap(type_, SLOTS, write)  # type: ignore[arg-type]
                assert raised.value.errno == number
            fresh = stranger.swap(5, SLOTS, "behind")
            # Cleans what it finds in its way, also of types that it cannot open: those are the broker's.
            assert not load_all(fresh, store_all(fresh, 5000))
        with gcma_shm.connect(p.owner.endpoint, mapped=False) as stranger:
            assert not load_all(stranger.swap(3, SLOTS), values)
        assert p.health()["state"] == "ok"
        assert not load_all(swap, values)
        check_values(behind, {n: 100 + n for n in range(10)})
        swap.invalidate_area()
        again = p.client.swap(3, SLOTS)  # a new life, a new file
        again.store(1, filled_with(1))
        assert (p.spill_dir / "003.3").read_bytes()[PAGE:] == filled_with(1)
        if replace is by_a_link_to_a_file_of_value:
            assert (tmp_path / "treasure").read_text() == "not to be touched"
        if replace is by_a_directory:
            (p.spill_dir / "004.1").rmdir()


def test_a_removed_directory(tmp_path: Path, mapped: bool) -> None:
    """What is open goes on; newcomers that map the arena are refused, or send messages; types that begin now have it made again."""
    with place(tmp_path, mapped) as p:
        swap = p.client.swap(3, SLOTS)
        shutil.rmtree(p.spill_dir)
        values = store_all(swap, 1)
        assert not load_all(swap, values)
        with pytest.raises(SpillError, match="spill directory") as raised:
            gcma_shm.connect(p.owner.endpoint, mapped=True)
        assert raised.value.errno == errno.ENOENT
        with gcma_shm.connect(p.owner.endpoint) as stranger:
            assert not stranger.mapped
            assert not load_all(stranger.swap(3, SLOTS), values)
        fresh = p.client.swap(4, SLOTS)
        assert not load_all(fresh, store_all(fresh, 5000))
        assert p.spill_dir.stat().st_mode & 0o777 == 0o700
        with gcma_shm.connect(p.owner.endpoint, mapped=True) as stranger:
            other = stranger.swap(4, SLOTS)
            other.store(1, filled_with(1))
            assert fresh.load(1) == filled_with(1)
        assert not load_all(swap, values)
        assert p.health()["state"] == "ok"


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[int]:
    """Nobody makes a file there meanwhile; the errno of whoever tries."""
    if os.geteuid() == 0:  # modes mean nothing to root
        with immutable(directory):
            yield errno.EPERM
        return
    directory.chmod(0o500)
    try:
        yield errno.EACCES
    finally:
        directory.chmod(0o700)


def test_a_read_only_directory(tmp_path: Path, mapped: bool) -> None:
    """No new type; all others go on."""
    with place(tmp_path, mapped) as p:
        swap = p.client.swap(3, SLOTS)
        with read_only(p.spill_dir) as number:
            with pytest.raises(SpillError, match="cannot be made") as raised:
                p.client.swap(4, SLOTS)
            assert raised.value.errno == number
            assert not load_all(swap, store_all(swap, 1))
        p.client.swap(4, SLOTS).store(1, filled_with(1))
        p.check()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk("ext4", tmp_path, 32 << 20) as found:
        yield found


def test_a_disk_that_cannot_be_read(disk: Disk, mapped: bool) -> None:
    """EIO from the kernel: the disk below the file system is gone for a while."""
    with place(disk.path, mapped) as p:
        swap = p.client.swap(3, SLOTS)
        values = store_all(swap, 1)
        with disk.gone(p.file(3)):
            lost = load_all(swap, values, errno.EIO)
            assert len(lost) >= SLOTS // 8
            with pytest.raises(SpillError) as raised:
                swap.load_many([min(lost)], bytearray(PAGE))
            assert raised.value.errno == errno.EIO
            assert raised.value.done == 0
            assert min(lost) in swap
            assert len(swap) == SLOTS
        assert not load_all(swap, values), "nothing was lost"
        p.check()
