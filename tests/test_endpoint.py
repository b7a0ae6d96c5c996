"""Names that follow from an endpoint."""

from __future__ import annotations

import os
import resource
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest

from gcma_shm import endpoint
from gcma_shm.errors import ArenaError


def test_the_default_endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert endpoint.default_endpoint() == f"ipc://{tmp_path}/gcma/default"
    monkeypatch.setenv("GCMA_ENDPOINT", "ipc:///elsewhere")
    assert endpoint.default_endpoint() == "ipc:///elsewhere"
    monkeypatch.setenv("GCMA_ENDPOINT", "")
    assert endpoint.default_endpoint() == f"ipc://{tmp_path}/gcma/default"


def test_without_a_runtime_directory_the_users_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert endpoint.runtime_dir().name == f"gcma-{os.getuid()}"


def test_a_socket_that_nobody_listens_on_any_more() -> None:
    path = Path(tempfile.gettempdir()) / "socket"
    assert endpoint.is_deserted(path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        assert endpoint.is_deserted(path), "bound, and not listening yet"
        listening.listen(0)
        for _ in range(3):  # the queue is full by then
            assert not endpoint.is_deserted(path)
    assert endpoint.is_deserted(path), "left behind"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert not endpoint.is_deserted(path), "nobody knows: there is no descriptor to ask with"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    path.unlink()


def test_socket_path() -> None:
    assert endpoint.socket_path("ipc:///run/x") == Path("/run/x")
    longest = "/" + "x" * (endpoint.IPC_PATH_MAX - 1)
    assert endpoint.socket_path(f"ipc://{longest}") == Path(longest)


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "ipc://",
        "ipc://relative",
        "tcp://127.0.0.1:1",
        "/run/x",
        "ipc:/run/x",
        "ipc:///" + "x" * 107,
        "ipc:///" + "é" * 54,
    ],
)
def test_what_is_no_endpoint(wrong: str) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        endpoint.socket_path(wrong)


@pytest.mark.parametrize("wrong", [None, 1, b"ipc:///x", Path("/x")])
def test_an_endpoint_is_text(wrong: Any) -> None:
    with pytest.raises(TypeError):
        endpoint.socket_path(wrong)


def test_names_differ_by_endpoint_and_not_by_time() -> None:
    a, b = (endpoint.arena_name(f"ipc:///run/{x}") for x in "ab")
    assert a != b
    assert a == endpoint.arena_name("ipc:///run/a")
    assert a.startswith(f"/gcma-{os.getuid()}-")
    assert len(a) < 255
    assert "/" not in a[1:]


def test_one_socket_is_one_arena_however_it_is_written() -> None:
    """Or two brokers would each have an arena of its own on one socket, and the second would take the socket from the first."""
    spellings = ["ipc:///run/a/b", "ipc:///run//a/b", "ipc:///run/./a/b", "ipc:///run/a/../a/b"]
    names = set()
    for spelling in spellings:
        try:
            endpoint.socket_path(spelling)
        except ValueError:
            continue  # refused is as good
        names.add(endpoint.arena_name(spelling))
    assert len(names) == 1


def test_the_default_spill_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = endpoint.default_spill_dir("ipc:///run/a")
    assert path.parent == tmp_path / "cache" / "gcma"
    assert path.name == endpoint.arena_name("ipc:///run/a")[1:]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert endpoint.default_spill_dir("ipc:///run/a").parent == tmp_path / "home" / ".cache" / "gcma"


def test_private_dir(tmp_path: Path) -> None:
    path = endpoint.private_dir(tmp_path / "a" / "b")
    assert path.stat().st_mode & 0o777 == 0o700
    assert endpoint.private_dir(path) == path
    path.chmod(0o750)
    with pytest.raises(ArenaError, match="700"):
        endpoint.private_dir(path)
    link = tmp_path / "link"
    (tmp_path / "c").mkdir(mode=0o700)
    link.symlink_to(tmp_path / "c")
    with pytest.raises(ArenaError):
        endpoint.private_dir(link)


def test_a_file_is_no_private_dir(tmp_path: Path) -> None:
    (tmp_path / "file").touch(mode=0o600)
    with pytest.raises(OSError, match="file"):
        endpoint.private_dir(tmp_path / "file")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_anothers_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(ArenaError, match="12345"):
        endpoint.private_dir(tmp_path / "theirs")
