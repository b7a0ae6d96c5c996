"""`gcma reap`: what a killed broker left is gone, and nothing else is."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import gcma_shm
from gcma_shm import layout
from gcma_shm.arena import SHM_DIR, remove_dead
from gcma_shm.broker.cli import main
from gcma_shm.endpoint import arena_name, default_spill_dir
from tests.processes import WAIT_S, Said, broker, eventually, forked

PAGE = 4096
NAME = f"gcma-{os.getuid()}-{0xFEED << 32 | os.getpid():016x}"  # of an arena that no endpoint, and no other test's process, has


@pytest.fixture
def endpoint() -> Iterator[str]:
    """Whatever a test leaves there is removed by other means than those that it tests."""
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    yield endpoint
    Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)
    for name in (arena_name(endpoint), f"/{NAME}"):
        with contextlib.suppress(gcma_shm.ArenaError):
            remove_dead(name)
    for path in sorted(default_spill_dir(endpoint).parent.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def left_behind(endpoint: str, *options: str) -> None:
    """A killed broker's arena, with two types, and no client that lives."""

    def use(said: Said) -> None:
        client = gcma_shm.connect(endpoint)
        for type_ in (0, 200):
            client.swap(type_, 10).store(3, os.urandom(PAGE))
        said.say()
        said.hear()

    with broker(endpoint, *options) as first, forked(use) as child:
        child.receive()
        first.stop(signal.SIGKILL)


def reap(*options: str) -> int:
    return main(["reap", *options])


def show_only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Of all arenas on this machine, these alone: to look at others takes the locks with which other tests' brokers begin."""

    class Shown(type(SHM_DIR)):  # type: ignore[misc]
        def iterdir(self) -> Iterator[Path]:
            return iter(Path(SHM_DIR / name) for name in names)

    monkeypatch.setattr("gcma_shm.broker.reap.arenas.SHM_DIR", Shown(SHM_DIR))


def paths(endpoint: str) -> tuple[Path, Path, Path]:
    """Arena, socket, spill directory."""
    name = arena_name(endpoint)
    return SHM_DIR / name[1:], Path(endpoint.removeprefix("ipc://")), default_spill_dir(endpoint)


def test_all_that_a_broker_left(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    left_behind(endpoint)
    arena, sock, spill = paths(endpoint)
    size = arena.stat().st_blocks * 512
    assert (sock.exists(), len(list(spill.iterdir()))) == (True, 2)
    assert reap("--endpoint", endpoint, "--dry-run") == 0
    would = capsys.readouterr().out
    assert all(path.exists() for path in (arena, sock, spill / "000.1", spill / "200.1"))
    assert reap("--endpoint", endpoint) == 0
    told = capsys.readouterr().out
    assert told == would.replace("would remove", "removed")
    for what, path in (
        ("arena", arena), ("socket", sock), ("directory", sock.parent), ("spill directory", spill), ("spill file", spill / "200.1"),
    ):  # fmt: skip
        assert re.search(rf"^removed {what} {path}, \d+ bytes$", told, re.M), what
        assert not path.exists()
    assert f"removed arena {arena}, {size} bytes" in told
    assert reap("--endpoint", endpoint) == 0
    assert capsys.readouterr().out == "nothing to remove\n"
    with broker(endpoint) as again:
        assert "epoch 1" in again.description


def test_a_living_brokers_is_left_alone(
    endpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    show_only(monkeypatch, arena_name(endpoint)[1:])
    with broker(endpoint), gcma_shm.connect(endpoint) as client:
        swap = client.swap(0, 10)
        swap.store(1, b"x-gcma--" * (PAGE // 8))
        for options in (["--endpoint", endpoint], ["--endpoint", endpoint, "--force"]):
            assert reap(*options) == 1
            told = capsys.readouterr()
            assert f"a broker serves {arena_name(endpoint)}" in told.err
            assert told.out == ""
        assert reap("--all", "--force", "--dry-run") == 0
        assert f"a broker serves {arena_name(endpoint)}" in capsys.readouterr().out
        assert swap.load(1) == b"x-gcma--" * (PAGE // 8)
        assert all(path.exists() for path in paths(endpoint))
        client.alloc_contig(PAGE).free()


def test_living_clients_are_in_the_way(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with broker(endpoint) as first, gcma_shm.connect(endpoint) as client:
        swap = client.swap(0, 10)
        swap.store(1, b"x-gcma--" * (PAGE // 8))
        held, promised = client.alloc_contig(3 * PAGE), client.reserve(5 * PAGE)
        first.stop(signal.SIGKILL)
        for options in ([], ["--dry-run"]):
            assert reap("--endpoint", endpoint, *options) == 1
            words = capsys.readouterr().err
            assert f"(process {os.getpid()}), which holds 32 KiB: buffers 1, reservations 1" in words
            assert swap.load(1) == b"x-gcma--" * (PAGE // 8), "its type lives"
        assert all(path.exists() for path in paths(endpoint))
        assert reap("--endpoint", endpoint, "--force") == 0
        assert not any(path.exists() for path in paths(endpoint))
        with pytest.raises(gcma_shm.Closed):
            swap.load(1)
        client._channel.timeout = 0.5
        with pytest.raises(gcma_shm.BrokerUnavailable):
            client.alloc_contig(PAGE)
        held.view[:4] = b"mine"  # what it has mapped stays mapped
        assert promised.nbytes == 5 * PAGE


def test_a_broker_on_tcp_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """It has no socket of its own in the file system, nor a directory for it."""
    for _ in range(10):  # where another process has taken the port meanwhile, the next one
        with socket.create_server(("127.0.0.1", 0)) as free:
            endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        try:
            with broker(endpoint, "--insecure") as one:
                one.stop(signal.SIGKILL)
                assert reap("--endpoint", endpoint) == 0
            break
        except AssertionError as error:
            if "cannot listen" not in str(error):
                raise
    else:
        pytest.fail("no port is free")
    told = capsys.readouterr().out
    assert re.search(rf"^removed arena /dev/shm{arena_name(endpoint)}, \d+ bytes$", told, re.M)
    assert re.search(r"^removed spill directory ", told, re.M)
    assert "socket" not in told
    assert not default_spill_dir(endpoint).exists()


def test_a_client_that_died_is_not(endpoint: str) -> None:
    left_behind(endpoint)
    assert reap("--endpoint", endpoint) == 0


def test_spill_files_elsewhere(endpoint: str, tmp_path: Path) -> None:
    left_behind(endpoint, "--spill-dir", str(tmp_path / "disk"))
    spill = tmp_path / "disk" / arena_name(endpoint)[1:]
    assert (spill / "000.1").exists()
    assert reap("--endpoint", endpoint) == 0
    assert list((tmp_path / "disk").iterdir()) == []


def test_files_that_it_does_not_know_stay(endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left_behind(endpoint)
    arena, sock, spill = paths(endpoint)
    (spill / "notes.txt").write_text("mine")
    (spill / "1.1").write_text("mine")
    (spill / "003.1").mkdir()
    (tmp_path / "victim").write_text("mine")
    (spill / "004.1").symlink_to(tmp_path / "victim")
    (sock.parent / "other").write_text("mine")
    assert reap("--endpoint", endpoint) == 0
    assert not arena.exists()
    assert not sock.exists()
    assert sorted(path.name for path in spill.iterdir()) == ["003.1", "004.1", "1.1", "notes.txt"]
    assert (tmp_path / "victim").read_text() == "mine"
    assert (sock.parent / "other").read_text() == "mine"
    assert f"kept {spill}: it holds 003.1, 004.1, 1.1, notes.txt" in capsys.readouterr().out
    (sock.parent / "other").unlink()


@pytest.mark.parametrize("way", ["another-name", "link", "parent-link"])
def test_only_the_arenas_own_directory(
    endpoint: str, tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the header says."""
    left_behind(endpoint)
    arena, _, spill = paths(endpoint)
    real = tmp_path / "real" / spill.name
    real.mkdir(parents=True)
    (real / "000.1").write_text("another's")
    if way == "link":
        named = tmp_path / spill.name
        named.symlink_to(real)
    elif way == "parent-link":
        (tmp_path / "link").symlink_to(real.parent)
        named = tmp_path / "link" / spill.name
    else:
        named = real.rename(tmp_path / "real" / "another")
    with arena.open("r+b") as file:
        file.seek(layout.SPILL_DIR_AT)
        file.write(os.fsencode(named) + b"\0")
    assert reap("--endpoint", endpoint) == 0
    assert f"kept {named}: it is not the arena's own directory, or is reached through a link" in capsys.readouterr().out
    assert (named / "000.1").read_text() == "another's"
    assert not arena.exists()
    assert (spill / "000.1").exists(), "the header did not name it"
    assert reap("--endpoint", endpoint) == 0
    assert not spill.exists(), "it is left without an arena now"


def test_another_users_directory(
    endpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.getuid():
        pytest.skip("only root can give a directory away")
    left_behind(endpoint)
    arena, sock, spill = paths(endpoint)
    os.chown(spill / "000.1", 12345, 12345)
    os.chown(sock, 12345, 12345)
    assert reap("--endpoint", endpoint) == 0
    assert (spill / "000.1").exists()
    assert not (spill / "200.1").exists()
    assert sock.exists()
    os.chown(spill, 12345, 12345)
    left_behind_again = sorted(spill.iterdir())
    assert reap("--endpoint", endpoint) == 0
    assert sorted(spill.iterdir()) == left_behind_again
    words = capsys.readouterr().out
    assert f"kept {spill}: another user's, or no directory" in words
    assert f"kept {sock}: another user's, or no socket" in words
    assert not arena.exists()
    show_only(monkeypatch, NAME)
    (SHM_DIR / NAME).write_bytes(b"x")
    os.chown(SHM_DIR / NAME, 12345, 12345)
    assert reap("--all", "--dry-run") == 1
    assert f"{NAME} is another user's" in capsys.readouterr().err
    os.chown(SHM_DIR / NAME, 0, 0)
    os.chown(spill, 0, 0)


def test_a_socket_that_somebody_listens_on(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    left_behind(endpoint)
    _, sock, _ = paths(endpoint)
    sock.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(sock))
        listener.listen()
        assert reap("--endpoint", endpoint) == 0
        assert f"kept {sock}: somebody listens there" in capsys.readouterr().out
        assert sock.exists()
    sock.unlink()
    sock.write_text("no socket")
    assert reap("--endpoint", endpoint) == 0
    assert sock.read_text() == "no socket"


def damaged(arena: Path, how: str) -> None:
    with arena.open("r+b") as file:
        if how == "truncated":
            file.truncate(100_000)
        elif how == "empty":
            file.truncate(0)
        else:
            file.seek({"checksum": 40, "magic": 0, "version": 8}[how])
            file.write(b"\xee")


@pytest.mark.parametrize("how", ["checksum", "magic", "version", "truncated", "empty"])
def test_with_a_damaged_header_the_object_alone(endpoint: str, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    left_behind(endpoint)
    arena, sock, spill = paths(endpoint)
    damaged(arena, how)
    assert reap("--endpoint", endpoint) == 0
    assert f"kept whatever spill files /{arena.name} has: where they are cannot be read" in capsys.readouterr().out
    assert not arena.exists()
    assert not sock.exists()
    assert (spill / "000.1").exists()
    assert reap("--endpoint", endpoint) == 0, "left without an arena, in the default place"
    assert not spill.exists()


def test_a_damaged_arena_that_somebody_maps(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with broker(endpoint) as first, gcma_shm.connect(endpoint):
        first.stop(signal.SIGKILL)
        arena, _, _ = paths(endpoint)
        damaged(arena, "checksum")
        assert reap("--endpoint", endpoint) == 1
        assert f"process {os.getpid()}, which maps it" in capsys.readouterr().err
        assert arena.exists()
        assert reap("--endpoint", endpoint, "--force") == 0
        assert not arena.exists()
    assert reap("--endpoint", endpoint) == 0


def test_all_finds_arenas_and_directories_without_one(
    endpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left_behind(endpoint)
    arena, sock, spill = paths(endpoint)
    show_only(monkeypatch, arena.name)
    orphan, foreign = spill.parent / NAME, spill.parent / "gcma-somebody"
    for path in (orphan, foreign):
        path.mkdir()
        (path / "007.3").write_bytes(bytes(PAGE))
    assert reap("--all", "--dry-run", "--json") == 0
    would = json.loads(capsys.readouterr().out)
    assert would["dry_run"]
    found = {one["path"]: one["nbytes"] for one in would["removed"]}
    assert {str(path) for path in (arena, spill, spill / "000.1", orphan, orphan / "007.3")} <= found.keys()
    assert found[str(orphan / "007.3")] == PAGE
    assert not {str(foreign), str(foreign / "007.3"), str(sock)} & found.keys()
    assert arena.exists()
    assert orphan.exists()


def test_all_removes_them(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    left_behind(endpoint)
    arena, sock, spill = paths(endpoint)
    orphan = spill.parent / NAME
    orphan.mkdir()
    (orphan / "007.3").write_bytes(bytes(PAGE))
    show_only(monkeypatch, arena.name, f"gcma-{os.getuid() + 1}-{1:016x}", "gcma-test-1")
    assert reap("--all") == 0
    assert not arena.exists()
    assert not spill.exists()
    assert not orphan.exists()
    assert sock.exists(), "--all knows no endpoints"


def test_brokers_that_start_meanwhile(endpoint: str) -> None:
    """The lock on the name is held until the object has gone, so a broker that starts finds all of it, or nothing, or is refused."""
    left_behind(endpoint)
    refused = mmap.mmap(-1, mmap.PAGESIZE)

    def again_and_again(said: Said) -> None:
        said.say()
        with memoryview(refused).cast("Q") as counted:
            while not said.has_more:
                counted[0] += reap("--endpoint", endpoint)

    served, deadline = 0, time.monotonic() + WAIT_S
    with forked(again_and_again) as child, memoryview(refused).cast("Q") as counted:
        child.receive()
        while served < 2 and time.monotonic() < deadline:
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(broker(endpoint))
                except AssertionError:
                    continue  # the reaper had the lock
                client = stack.enter_context(gcma_shm.connect(endpoint))
                client.swap(0, 10).store(1, b"y-gcma--" * (PAGE // 8))
                assert client.swap(0, 10).load(1) == b"y-gcma--" * (PAGE // 8)
                before = counted[0]
                assert eventually(lambda before=before: counted[0] > before), "it was there while one served"  # type: ignore[misc]
                assert all(path.exists() for path in paths(endpoint))
                served += 1
        child.tell()
        child.receive()
    assert served == 2
    refused.close()
    reap("--endpoint", endpoint)
    assert not any(path.exists() for path in paths(endpoint))
