"""Disks that are full and files that refuse writes, for real: what each caller is told, that no value is lost, and that the broker cleans
up by itself once the fault has ended.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import gcma_shm
from gcma_shm.clients.swap import Swap
from gcma_shm.errors import NurseryFull, SpillError
from tests.client import filled_with
from tests.faults.disks import Disk, immutable, small_disk
from tests.faults.spilling import PAGE, SLOTS, TIMEOUT_S, check_values, place
from tests.processes import broker, cpu_seconds, eventually, files_refuse_writes

pytestmark = pytest.mark.timeout(600)
DISK_BYTES = 4 << 20


@pytest.fixture
def disk(mapped: bool, tmp_path: Path) -> Iterator[Disk]:
    """One kind of file system for each way in."""
    with small_disk("ext4" if mapped else "tmpfs", tmp_path, DISK_BYTES) as found:
        yield found


@pytest.fixture(params=[True, False], ids=["mapped", "messages"])
def mapped(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


def refused(error: SpillError, number: int) -> None:
    """What the caller of a write-through store is told."""
    assert error.errno == number
    assert error.stored
    assert "stored, readable, and pinned in memory" in str(error)
    assert os.strerror(number) in str(error)


def test_a_full_disk_under_stores_that_are_written_through(disk: Disk, mapped: bool) -> None:
    """At a first store, at an overwrite of a slot that has no place yet, and in a batch."""
    with place(disk.path, mapped) as p:
        swap = p.client.swap(3, SLOTS)
        for n in range(10):
            swap.store(n, filled_with(n + 1))
        swap.store(10, bytes(PAGE))  # zeros take no place
        disk.fill()
        for offset in (100, 10):
            with pytest.raises(SpillError) as raised:
                swap.store(offset, filled_with(7))
            refused(raised.value, errno.ENOSPC)
        offsets = [0, 1, 200, 2, 201]
        with pytest.raises(SpillError) as raised:
            swap.store_many(offsets, b"".join(filled_with(50 + n) for n in range(5)))
        refused(raised.value, errno.ENOSPC)
        assert raised.value.done == 2, "what has its place is written, and counted"
        values = {n: n + 1 for n in range(3, 10)} | {100: 7, 10: 7} | {n: 50 + i for i, n in enumerate(offsets)}
        p.seen_by_all(3, values)
        with pytest.raises(SpillError) as raised:
            swap.sync()
        assert raised.value.errno == errno.ENOSPC
        assert raised.value.stored
        p.degraded(4, errno.ENOSPC, type_=3)
        p.seen_by_all(3, values)
        written = p.file(3).read_bytes()
        assert all(written[n * PAGE : (n + 1) * PAGE] == filled_with(values[n]) for n in range(10))
        disk.relieve()
        p.healthy()
        written = p.file(3).read_bytes()
        assert all(written[n * PAGE : (n + 1) * PAGE] == filled_with(value) for n, value in values.items())
        swap.sync()
        swap.store(300, filled_with(9))
        p.seen_by_all(3, values | {300: 9})
        p.check()


def test_a_nursery_full_of_pages_that_no_file_takes(disk: Disk, mapped: bool) -> None:
    """A store fails whole, says why, and at once where the broker knows; everything else goes on."""
    with place(disk.path, mapped) as p:
        swap = p.hurried(p.client.swap(3, SLOTS, "behind"))
        disk.fill()
        values: dict[int, int] = {}
        with pytest.raises(NurseryFull, match=os.strerror(errno.ENOSPC)):
            for n in range(2 * p.nursery_pages):
                swap.store(n, filled_with(n + 1))
                values[n] = n + 1
        assert p.is_bounded(len(values))
        p.degraded(len(values), errno.ENOSPC, type_=3)
        assert p.owner.stats()["arena"]["nursery_free"] <= (p.nursery_pages - len(values)) * PAGE
        begun, failures = time.monotonic(), p.owner.stats()["counters"]["spill_failures"]
        for offset in (5, len(values)):
            with pytest.raises(NurseryFull, match=os.strerror(errno.ENOSPC)):
                swap.store(offset, filled_with(999))
        if mapped:  # each has waited for its bound, and has not hammered the disk meanwhile: 16 tries to a sleep of a millisecond
            waited = time.monotonic() - begun
            assert waited >= 2 * TIMEOUT_S
            failures = p.owner.stats()["counters"]["spill_failures"] - failures
            assert failures < 16_000 * waited, f"{failures} in {waited:.1f} s"
        with pytest.raises(NurseryFull) as raised:
            swap.store_many([500, 501], bytes(PAGE) + filled_with(1))
        assert raised.value.done == 1, "zeros need no page"
        assert swap.load(500) == bytes(PAGE)
        assert swap.load(501) is None
        assert swap.load(len(values)) is None
        p.seen_by_all(3, values, "behind")
        buffer = p.owner.alloc_contig(PAGE)  # areas have nothing to do with it
        buffer.free()
        swap.invalidate_page(0)  # makes room for one
        swap.store(600, filled_with(600))
        del values[0]
        values[600] = 600
        check_values(swap, values)
        if not mapped:  # the workers that serve the messages of all do not wait for each of these
            begun = time.monotonic()
            for _ in range(20):
                with pytest.raises(NurseryFull):
                    swap.store(700, filled_with(1))
            assert time.monotonic() - begun < 40, "20 stores waited 3 s each"
        disk.relieve()
        p.healthy()
        swap = p.client.swap(3, SLOTS, "behind")
        swap.sync()
        for n in range(1000, 1200):
            swap.store(n, filled_with(n))
            values[n] = n
        swap.sync()
        p.seen_by_all(3, values, "behind")
        p.check()


def test_files_that_refuse_even_what_has_its_place(tmp_path: Path, mapped: bool) -> None:
    """An overwrite that no file takes: the new value is there, the old one in the file is never loaded again."""
    with place(tmp_path, mapped) as p:
        swap = p.client.swap(3, SLOTS)
        for n in range(8):
            swap.store(n, filled_with(n + 1))
        with files_refuse_writes(os.getpid(), p.owner.broker_pid):
            for n in range(4):
                with pytest.raises(SpillError) as raised:
                    swap.store(n, filled_with(100 + n))
                refused(raised.value, errno.EFBIG)
            values = {n: 100 + n if n < 4 else n + 1 for n in range(8)}
            p.degraded(4, errno.EFBIG, type_=3)
            with pytest.raises(SpillError):
                swap.store(0, filled_with(200))  # what was pinned is superseded: one page still
            values[0] = 200
            swap.invalidate_page(1)
            del values[1]
            p.degraded(3, errno.EFBIG, type_=3)
            p.seen_by_all(3, values)
        p.healthy()
        swap.sync()
        p.seen_by_all(3, values)
        p.check()


def test_an_immutable_file(tmp_path: Path, mapped: bool) -> None:
    """Made read-only behind our back, while it is open."""
    with place(tmp_path, mapped) as p:
        swap = p.client.swap(3, SLOTS)
        swap.store(1, filled_with(1))
        with immutable(p.file(3)):
            with pytest.raises(SpillError) as raised:
                swap.store(1, filled_with(2))
            refused(raised.value, errno.EPERM)
            p.degraded(1, errno.EPERM, type_=3)
            assert swap.load(1) == filled_with(2)
        p.healthy()
        assert p.file(3).read_bytes()[PAGE : 2 * PAGE] == filled_with(2)


def test_a_place_that_refuses_its_page_keeps_no_neighbour_from_being_written(tmp_path: Path, mapped: bool) -> None:
    """From slot 16 on the file takes nothing; a write of neighbours across that line is short."""
    with place(tmp_path, mapped) as p, ExitStack() as fault:
        fault.enter_context(files_refuse_writes(os.getpid(), p.owner.broker_pid, above=16 * PAGE))
        swap = p.client.swap(3, SLOTS)
        with pytest.raises(SpillError) as raised:
            swap.store_many(range(14, 18), b"".join(filled_with(n) for n in range(14, 18)))
        refused(raised.value, errno.EFBIG)
        assert raised.value.done == 2
        p.degraded(2, errno.EFBIG, type_=3)
        behind = p.client.swap(4, SLOTS, "behind")
        behind.store_many([20, 3, 19, 2, 18, 1], b"".join(filled_with(n) for n in (20, 3, 19, 2, 18, 1)))
        with pytest.raises(SpillError) as raised:
            behind.sync()
        assert raised.value.errno == errno.EFBIG
        written = p.file(4).read_bytes()
        assert written == bytes(PAGE) + filled_with(1) + filled_with(2) + filled_with(3), (
            "all others are tried before it is told"
        )
        fault.close()
        p.healthy()
        behind.sync()
        assert p.file(4).read_bytes()[18 * PAGE :] == filled_with(18) + filled_with(19) + filled_with(20)
        p.check()


def test_a_type_whose_file_refuses_leaves_others_what_it_does_not_fill(tmp_path: Path, mapped: bool) -> None:
    """Three quarters of the nursery are pinned by one type; another stores many times what is left."""
    with place(tmp_path, mapped) as p:
        bad, good = p.client.swap(1, SLOTS, "behind"), p.client.swap(2, SLOTS)
        pinned = p.nursery_pages * 3 // 4
        with files_refuse_writes(os.getpid(), p.owner.broker_pid, above=16 * PAGE):
            for n in range(pinned):
                bad.store(16 + n, filled_with(n + 1))
            p.degraded(pinned, errno.EFBIG, type_=1)
            values = {}
            for n in range(6 * p.nursery_pages):
                values[n % 16] = n + 1
                good.store(n % 16, filled_with(n + 1))
            check_values(good, values)
            assert p.health()["types"] == {"1": pinned}
            good.sync()
            check_values(bad, {16 + n: n + 1 for n in range(pinned)})
        p.healthy()
        bad.sync()
        p.seen_by_all(2, values)
        p.check()


def pin_all(bad: Swap, pinned: int) -> int:
    """Stores from slot 16 + `pinned` on until it is refused; how many are pinned then."""
    with pytest.raises(NurseryFull, match=os.strerror(errno.EFBIG)):
        while pinned < SLOTS - 16:
            bad.store(16 + pinned, filled_with(pinned + 1))
            pinned += 1
    return pinned


@pytest.mark.parametrize("share", [100, 25])
def test_a_type_whose_file_refuses_stays_within_its_share(share: int, tmp_path: Path, mapped: bool) -> None:
    """It stores into ever new slots: refused before anything has changed, while another type stores through as if nothing were."""
    with place(tmp_path, mapped) as p:
        bad, good = p.hurried(p.client.swap(1, SLOTS, "behind", share=share)), p.client.swap(2, SLOTS)
        with files_refuse_writes(os.getpid(), p.owner.broker_pid, above=16 * PAGE):
            pinned = pin_all(bad, 0)
            p.degraded(pinned, errno.EFBIG, type_=1)
            assert bad.load(16 + pinned) is None
            values = {}
            for n in range(6 * p.nursery_pages):
                values[n % 16] = n + 1
                good.store(n % 16, filled_with(n + 1))
            check_values(good, values)
            pinned = pin_all(bad, pinned)
            assert p.is_bounded(pinned, share), f"{pinned} of {p.nursery_pages}"
            p.degraded(pinned, errno.EFBIG, type_=1)
            check_values(bad, {16 + n: n + 1 for n in range(pinned)})
        p.healthy()
        bad = p.client.swap(1, SLOTS, "behind", share=share)
        bad.store(16 + pinned, filled_with(pinned + 1))
        bad.sync()
        p.seen_by_all(2, values)
        p.check()


def test_who_waits_for_a_file_keeps_no_other_thread_from_storing(tmp_path: Path) -> None:
    """More threads than a process may have pages in hand store into a type whose file refuses; one stores into another."""
    with place(tmp_path, mapped=True) as p, ExitStack() as ends:
        bad, good, stop = p.hurried(p.client.swap(1, SLOTS, "behind")), p.client.swap(2, SLOTS), threading.Event()
        ends.enter_context(files_refuse_writes(os.getpid(), p.owner.broker_pid, above=16 * PAGE))
        pinned = pin_all(bad, 0)
        refused: list[int] = []

        def wait() -> None:
            while not stop.is_set():
                try:
                    bad.store(
                        16 + pinned + 50, filled_with(1)
                    )  # a few fit still: the bound is exact but for stores in flight
                except NurseryFull:
                    refused.append(1)

        threads = [threading.Thread(target=wait) for _ in range(40)]
        for thread in threads:
            thread.start()
        try:
            for n in range(2000):
                good.store(n % 16, filled_with(n + 1))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert len(refused) >= len(threads) // 2
        assert good.load(1999 % 16) == filled_with(2000)
        ends.close()
        p.healthy()
        p.check()


def test_a_sweep_in_vain_costs_no_more_than_what_calls_it(tmp_path: Path) -> None:
    """The nursery is full of pages that no file takes, and loads from the file want one each: the broker's sweep looks, and writes nothing."""
    with place(tmp_path, mapped=True) as p:
        swap, bad = p.client.swap(3, SLOTS), p.hurried(p.client.swap(4, SLOTS, "behind"))
        swap.store_many(range(SLOTS), b"".join(map(filled_with, range(1, SLOTS + 1))))
        with files_refuse_writes(os.getpid(), p.owner.broker_pid):
            p.degraded(pin_all(bad, 0), errno.EFBIG, type_=4)
            ours, theirs = time.thread_time(), cpu_seconds(p.owner.broker_pid)
            page, n, read = bytearray(PAGE), 0, p.owner.stats()["counters"]["hits_spill"]
            while time.thread_time() - ours < 0.5:
                swap.load_into(n % SLOTS, page)
                n += 1
            theirs = cpu_seconds(p.owner.broker_pid) - theirs
            assert theirs < 0.5, f"{theirs} s"
            assert p.owner.stats()["counters"]["hits_spill"] - read > n // 4
        p.healthy()


def test_what_only_one_process_cannot_write_the_broker_writes(tmp_path: Path) -> None:
    """The caller gets its error; the page is clean within a moment, and the broker was never degraded."""
    with place(tmp_path, mapped=True) as p:
        swap = p.client.swap(3, SLOTS)
        with files_refuse_writes(os.getpid()):
            for n in range(p.nursery_pages // 2):
                with pytest.raises(SpillError) as raised:
                    swap.store(n, filled_with(n + 1))
                refused(raised.value, errno.EFBIG)

            def written() -> bool:
                data = p.file(3).read_bytes()
                return all(data[n * PAGE : (n + 1) * PAGE] == filled_with(n + 1) for n in range(p.nursery_pages // 2))

            assert eventually(written)
            swap.sync()
        assert p.health()["state"] == "ok"
        p.check()


def test_the_log_tells_the_beginning_and_the_end_once(tmp_path: Path) -> None:
    with broker(f"ipc://{tmp_path}/s/b", "--spill-dir", str(tmp_path / "spill")) as process:
        with gcma_shm.connect(process.endpoint) as client:
            swap = client.swap(3, SLOTS, "behind")

            def state() -> str:
                return str(client.stats()["broker"]["health"]["state"])

            for fault in range(2):
                with files_refuse_writes(process.pid):
                    for n in range(20):
                        swap.store(n, filled_with(20 * fault + n + 1))
                    assert eventually(lambda: state() == "degraded")
                    failures = client.stats()["counters"]["spill_failures"]
                    assert eventually(lambda: client.stats()["counters"]["spill_failures"] > failures + 20)  # noqa: B023
                    assert state() == "degraded"
                assert eventually(lambda: state() == "ok")
        assert process.stop(signal.SIGTERM) == 0
        assert process.process.stderr is not None
        log = process.process.stderr.read()
    assert log.count("degraded: the spill files of types 3 do not take their pages: File too large") == 2, log
    assert log.count("healthy again after") == 2, log
