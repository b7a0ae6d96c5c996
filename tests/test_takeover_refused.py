"""What a broker finds under its arena's name and does not take over, or not all of it; and what it is told that changes nothing."""

from __future__ import annotations

import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import gcma_shm
from gcma_shm import layout
from gcma_shm.arena import SHM_DIR
from gcma_shm.endpoint import arena_name, default_spill_dir
from gcma_shm.errors import BrokerUnavailable, Closed, NoSuchBuffer
from tests.client import filled_with
from tests.processes import WAIT_S, broker
from tests.takeover import AREAS, PAGE, killed_and_restarted


def damage_version(data: bytearray, _: layout.Geometry) -> None:
    data[8:12] = struct.pack("<I", 99)


def damage_header(data: bytearray, _: layout.Geometry) -> None:
    data[0x40] ^= 1


def damage_magic(data: bytearray, _: layout.Geometry) -> None:
    data[0:4] = b"HUGO"


def damage_magic_away(data: bytearray, _: layout.Geometry) -> None:
    data[0:8] = bytes(8)


def empty(data: bytearray, _: layout.Geometry) -> None:
    data.clear()


def damage_areas(data: bytearray, g: layout.Geometry) -> None:
    struct.pack_into("<Q", data, g.area_at(1) + 0x30, 1)


def damage_types(data: bytearray, g: layout.Geometry) -> None:
    struct.pack_into("<Q", data, g.type_at(0) + layout.TYPE_BASE_AT, g.slots)


def damage_allocations(data: bytearray, g: layout.Geometry) -> None:
    struct.pack_into("<Q", data, g.allocation_at(0) + layout.ALLOCATION_PAGES_AT, g.pages)


def damage_spill_dir(data: bytearray, _: layout.Geometry) -> None:
    data[layout.SPILL_DIR_AT] = 0


def truncate(data: bytearray, _: layout.Geometry) -> None:
    del data[len(data) // 2 :]


def truncate_within_header(data: bytearray, _: layout.Geometry) -> None:
    del data[100:]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_version, "layout version 99"),
        (damage_header, "header is damaged"),
        (damage_magic, "not an arena"),
        (damage_magic_away, "not an arena"),
        (empty, "its header is empty, and there are spill files"),
        (damage_areas, "table of areas is damaged"),
        (damage_types, "table of types is damaged"),
        (damage_allocations, "table of buffers is damaged"),
        (damage_spill_dir, "where the spill files are"),
        (truncate, "truncated"),
        (truncate_within_header, "it has 100 bytes"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_arena_is_refused_by_name_and_left(
    endpoint: str, damage: Callable[[bytearray, layout.Geometry], None], words: str
) -> None:
    path = SHM_DIR / arena_name(endpoint).removeprefix("/")
    with broker(endpoint, *AREAS) as first:
        client = gcma_shm.connect(endpoint)
        swap = client.swap(0, 10)
        swap.store(1, filled_with(1))
        buffer = client.alloc_contig(PAGE)
        assert client._plane is not None
        first.stop(signal.SIGKILL)
        data = bytearray(path.read_bytes())
        damage(data, client._plane.geometry)
        was_mapped = path.with_name(f"{path.name}.was")
        path.rename(was_mapped)  # or the client would be hit
        path.write_bytes(data)
        path.chmod(0o600)
        try:
            with pytest.raises(AssertionError, match=words), broker(endpoint, *AREAS):
                pass
            assert path.read_bytes()[layout.EPOCH_AT + 8 :] == data[layout.EPOCH_AT + 8 :] or damage is not truncate
            assert (default_spill_dir(endpoint) / "000.1").exists(), "nothing of it is removed"
            assert swap.load(1) == filled_with(1)
            assert not buffer.freed
        finally:
            was_mapped.unlink()
            path.unlink()
            client._channel.drop()


def test_an_arena_that_nobody_had_served_is_made_anew(endpoint: str) -> None:
    """Its broker was killed before it had come so far: no client can have seen it."""
    path = SHM_DIR / arena_name(endpoint).removeprefix("/")
    for content in (b"", bytes(8192)):
        path.write_bytes(content)
        path.chmod(0o600)
        with broker(endpoint, *AREAS), gcma_shm.connect(endpoint) as client:
            assert client.stats()["arena"]["epoch"] == 1


def test_an_arena_that_says_it_was_never_served_is_taken_over(endpoint: str) -> None:
    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint) as client:
        swap = client.swap(0, 10)
        swap.store(1, filled_with(1))
        first.stop(signal.SIGKILL)
        assert client._plane is not None
        client._plane.write(layout.EPOCH_AT, 0)
        with broker(endpoint, *AREAS):
            assert swap.load(1) == filled_with(1)
            assert client.areas()


def test_a_broker_killed_while_it_removed_its_arena(endpoint: str) -> None:
    with broker(endpoint, *AREAS) as first:
        client = gcma_shm.connect(endpoint, timeout=WAIT_S)
        swap = client.swap(0, 10)
        assert client._plane is not None
        client._plane.write(layout.STOPPED_AT, 1)
        with killed_and_restarted(first), gcma_shm.connect(endpoint) as other:
            assert other.stats()["arena"]["epoch"] == 1
            with pytest.raises(Closed):
                swap.load(1)
            with pytest.raises((Closed, BrokerUnavailable)):
                client.alloc_contig(PAGE)
            client.close()


def test_a_type_whose_file_has_gone_ends(endpoint: str) -> None:
    """What of it is in memory would be all that is left: never half of a type. Others go on."""
    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint) as client:
        lost, kept = client.swap(0, 10), client.swap(1, 10)
        lost.store(1, filled_with(1))
        kept.store(1, filled_with(2))
        first.stop(signal.SIGKILL)
        stray = default_spill_dir(endpoint) / "007.3"
        stray.write_bytes(b"left by a type that has ended")
        (default_spill_dir(endpoint) / "000.1").unlink()
        with broker(endpoint, *AREAS):
            assert not stray.exists()
            with pytest.raises(Closed):
                lost.load(1)
            assert kept.load(1) == filled_with(2)
            assert client.swap(0, 10).load(1) is None


def test_other_options_change_nothing_of_what_is_taken_over(endpoint: str, tmp_path: Path) -> None:
    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint) as client:
        swap = client.swap(0, 10)
        swap.store(1, filled_with(1))
        options = ("--area", "other=1M", "--spill-dir", str(tmp_path / "elsewhere"), "--page-size", "8K")
        with killed_and_restarted(first, *options) as second:
            assert [area.name for area in client.areas()] == ["a", "b"]
            assert swap.load(1) == filled_with(1)
            assert "epoch 2" in second.description
            assert not (tmp_path / "elsewhere").exists()
            with pytest.raises(NoSuchBuffer):
                client.attach("nothing")
