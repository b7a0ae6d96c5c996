"""How spill files are read and written: what stays in the page cache, memory of any alignment, reading ahead, and where `direct` is refused."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import gcma_shm
from gcma_shm.broker import direct
from gcma_shm.check import check
from gcma_shm.endpoint import arena_name
from gcma_shm.errors import ArenaError, SpillCorrupt, SpillError
from gcma_shm.sizes import parse_size
from tests.client import filled_with
from tests.faults.disks import needs_direct, small_disk
from tests.faults.spilling import PAGE, SLOTS, Place, cached_pages, check_values, place, spilled
from tests.processes import broker, broker_command, eventually

AHEAD_MAX = 16  # pages that are read ahead at once


def store_all(swap: gcma_shm.Swap, count: int = SLOTS, first_value: int = 1) -> dict[int, int]:
    values = {n: first_value + n for n in range(count)}
    swap.store_many(values, b"".join(map(filled_with, values.values())))
    return values


def counter(p: Place, name: str) -> int:
    return int(p.owner.stats()["counters"][name])


# --- the page cache


def test_buffered_files_stay_in_the_page_cache(tmp_path: Path) -> None:
    with place(tmp_path, mapped=True) as p:
        store_all(p.client.swap(3, SLOTS))
        assert cached_pages(p.file(3)) > SLOTS // 2, "but for what the kernel has taken back meanwhile"


@pytest.mark.parametrize("write", ["through", "behind"])
@pytest.mark.parametrize("spill_io", ["uncached", "direct"])
def test_the_others_do_not(spill_io: str, write: str, tmp_path: Path) -> None:
    """Neither what clients and broker have written, nor what they have read; direct files at no moment."""
    needs_direct(tmp_path)  # or all that is in the file is memory
    with place(tmp_path, mapped=True, spill_io=spill_io) as p:
        swap = p.client.swap(3, SLOTS, write)  # type: ignore[arg-type]
        values = store_all(swap)
        swap.sync()
        if spill_io == "direct":
            assert cached_pages(p.file(3)) == 0
        assert eventually(lambda: cached_pages(p.file(3)) == 0)
        before = counter(p, "hits_spill")
        check_values(swap, values)
        assert counter(p, "hits_spill") > before
        if spill_io == "direct":
            assert cached_pages(p.file(3)) == 0
        assert eventually(lambda: cached_pages(p.file(3)) == 0)
        p.check()


def test_what_others_have_read_there_is_dropped(tmp_path: Path) -> None:
    """Once a second, by the broker: `gcma check` reads through the page cache, say."""
    needs_direct(tmp_path)  # or all that is in the file is memory
    with place(tmp_path, mapped=True, spill_io="uncached") as p:
        store_all(p.client.swap(3, SLOTS))
        assert p.file(3).read_bytes()
        assert eventually(lambda: cached_pages(p.file(3)) == 0)
        assert not check(p.arena, values=True).findings


# --- direct


@pytest.fixture(params=["4K", "64K"])
def page_size(request: pytest.FixtureRequest) -> int:
    return parse_size(str(request.param))


def test_memory_of_any_alignment(page_size: int, tmp_path: Path) -> None:
    needs_direct(tmp_path, page_size)
    with gcma_shm.embedded(
        300 * page_size, page_size=page_size, slots=2000, clients=4, spill_dir=tmp_path, spill_io="direct"
    ) as client:
        swap = client.swap(3, 1000)
        pages = [os.urandom(page_size) for _ in range(8)]
        for n in range(1000):
            swap.store(n, pages[n % 8])
        before = client.stats()["counters"]["hits_spill"]
        around, whole = bytearray(2 * page_size + 4096), mmap.mmap(-1, page_size)
        for n in range(0, 1000, 3):
            for start in (0, 1, 511, 512):
                view = memoryview(around)[start : start + page_size]
                view[:] = bytes(page_size)
                assert swap.load_into(n, view)
                assert view == pages[n % 8]
                assert not any(around[start + page_size :])
                around[:] = bytes(len(around))
            assert swap.load_into((n * 7) % 1000, whole)
            assert whole[:] == pages[n * 7 % 1000 % 8]
        assert client.stats()["counters"]["hits_spill"] - before > 100


def test_a_file_that_was_cut_off_in_the_middle_of_a_block(tmp_path: Path) -> None:
    """The page that it cuts, and those behind, are corrupt, not an error of the kernel's about an odd offset."""
    with place(tmp_path, mapped=True, spill_io="direct") as p:
        swap = p.client.swap(3, SLOTS)
        values = store_all(swap)
        cut, *behind = spilled(p.owner, 3)[100:]
        os.truncate(p.file(3), cut * PAGE + 1000)
        for n in (cut, behind[0], behind[-1]):
            with pytest.raises(SpillCorrupt):
                swap.load(n)
        intact = {n: value for n, value in values.items() if n < cut}
        check_values(swap, intact)


def test_reading_ahead(tmp_path: Path) -> None:
    """A sequence in the file costs a read for a window of pages, of all of which the values are right; what moves meanwhile is not touched."""
    with place(tmp_path, mapped=True, spill_io="direct") as p:
        swap = p.client.swap(3, SLOTS)
        values = store_all(swap)
        reads, ahead = counter(p, "hits_spill"), counter(p, "read_ahead")
        check_values(swap, values)
        read, brought = counter(p, "hits_spill") - reads, counter(p, "read_ahead") - ahead
        assert brought > SLOTS // 4
        assert read < SLOTS // 2
        assert brought <= AHEAD_MAX * read
        before = counter(p, "read_ahead")
        for n in range(0, SLOTS, 19):  # no sequence
            assert swap.load(n) == filled_with(values[n])
        assert counter(p, "read_ahead") == before
        for n in range(0, SLOTS, 3):  # neither what was stored to, nor what is gone, comes back from the file
            if n % 2:
                swap.invalidate_page(n)
                del values[n]
            else:
                values[n] = 10_000 + n
                swap.store(n, filled_with(values[n]))
        for n in range(SLOTS):
            assert swap.load(n) == (filled_with(values[n]) if n in values else None)
        p.check()


def test_a_scan_does_not_push_out_what_is_used(tmp_path: Path) -> None:
    """Pages that were read ahead leave the nursery as if nobody had read them."""
    with place(tmp_path, mapped=True, spill_io="direct") as p:
        swap = p.client.swap(3, SLOTS)
        hot = range(100)
        values = store_all(swap, 100)
        for _ in range(2):
            check_values(swap, values)
        store_all(p.client.swap(4, SLOTS), SLOTS)
        for _ in range(3):
            check_values(swap, values)
        cold = p.client.swap(4, SLOTS)
        promotions = counter(p, "promotions")
        for n in range(SLOTS):
            assert cold.load(n) == filled_with(n + 1)
            if n % 20 == 0:
                check_values(swap, {hot[n // 20 % 100]: hot[n // 20 % 100] + 1})
        assert counter(p, "read_ahead") > SLOTS // 4
        assert counter(p, "promotions") - promotions < SLOTS // 2
        before = counter(p, "hits_spill")
        check_values(swap, values)
        assert counter(p, "hits_spill") - before < 50


# --- where direct is refused


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory on a tmpfs."""
    with small_disk("tmpfs", tmp_path, 4 << 20) as disk:
        yield disk.path


def test_memory_is_no_disk(memory: Path) -> None:
    """When the broker starts: nothing is left, and it says what to do."""
    command = broker_command(f"ipc://{tempfile.gettempdir()}/b/broker", "--size", "8M", "--spill-dir", str(memory))
    done = subprocess.run([*command, "--spill-io", "direct"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is on tmpfs, which is memory; choose a --spill-dir on a disk" in done.stderr
    assert "--spill-io uncached" in done.stderr
    assert not list(memory.iterdir())
    with place(memory, mapped=True, spill_io="uncached") as p:  # needs nothing of it
        swap = p.client.swap(3, SLOTS)
        check_values(swap, store_all(swap, 500))


def test_a_spill_directory_that_became_memory(memory: Path, tmp_path: Path) -> None:
    """When a type is declared: none begins there, and those that live go on."""
    with place(tmp_path, mapped=True, spill_io="direct") as p:
        swap = p.client.swap(3, SLOTS)
        values = store_all(swap)
        moved = p.spill_dir.rename(p.spill_dir.with_name("moved"))
        p.spill_dir.symlink_to(memory)
        try:
            with pytest.raises(SpillError, match=r"type 4 cannot begin: --spill-io direct: .* is memory") as raised:
                p.client.swap(4, SLOTS)
            assert raised.value.errno == errno.EINVAL
            assert not list(memory.iterdir())
        finally:
            p.spill_dir.unlink()
            moved.rename(p.spill_dir)
        check_values(swap, values)
        p.client.swap(4, SLOTS).store(0, filled_with(1))


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Path]:
    needs_direct(tmp_path)
    file = tmp_path / "empty"
    file.touch()
    yield file
    assert file.stat().st_size == 0


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ((512, 4096), None),
        (None, None),  # an old kernel: a write is tried
        ((0, 0), "the kernel does not pass the page cache by for files there; choose a --spill-dir on a disk"),
        ((512, 16384), "in pieces of 16 KiB past the page cache, a page has 4 KiB; choose --page-size 16"),
        ((65536, 512), "choose --page-size 64"),
    ],
)
def test_what_the_file_system_asks_for(
    told: tuple[int, int] | None, words: str | None, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "direct_alignment", lambda _fd: told)
    why = direct.why_not(empty, PAGE)
    assert why is None if words is None else words in str(why)


@pytest.mark.parametrize("call", ["open", "pwrite"])
def test_a_file_system_without_direct_input_and_output(call: str, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, call, refuse)
    why = direct.why_not(empty, PAGE)
    assert why is not None
    assert "--spill-io uncached" in why
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "why_not", lambda *_: "words")
        with pytest.raises(ArenaError, match="--spill-io direct: words"):
            direct.refuse_directory(empty.parent, PAGE)
    assert list(empty.parent.iterdir()) == [empty]


def test_a_full_disk_is_no_reason(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    assert direct.why_not(empty, PAGE) is None


# --- one way for all


@pytest.mark.parametrize(("first", "second"), [("direct", "buffered"), ("buffered", "direct")])
def test_an_arena_that_is_taken_over_keeps_its_way(first: str, second: str, tmp_path: Path) -> None:
    needs_direct(tmp_path)
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    options = ("--spill-dir", str(tmp_path / "spill"))
    with (
        broker(endpoint, *options, "--spill-io", first) as one,
        gcma_shm.connect(endpoint, wait_for_broker=60.0) as client,
    ):
        values = store_all(client.swap(3, SLOTS))
        one.stop(signal.SIGKILL)
        with broker(endpoint, *options, "--spill-io", second) as two:
            assert client.stats()["arena"]["spill_io"] == first
            assert first in two.description
            swap = client.swap(3, SLOTS)
            check_values(swap, values)
            values = store_all(swap, first_value=50_000)
            (file,) = (tmp_path / "spill").glob("*/003.*")
            assert (cached_pages(file) == 0) == (first == "direct")
            with gcma_shm.connect(endpoint, mapped=True) as other:
                check_values(other.swap(3, SLOTS), values)
            assert not check(arena_name(endpoint), values=True).findings
