"""Another user: can neither map, nor connect, nor read what was spilled, nor stand in the broker's place. Tested as one."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import posix_ipc
import pytest

import gcma_shm
from gcma_shm import arena as arenas
from gcma_shm.broker.process import Settings, run
from gcma_shm.endpoint import arena_name, default_endpoint, default_spill_dir, private_dir, socket_path
from gcma_shm.errors import ArenaError
from tests.processes import Broker, Said, broker, in_fork
from tests.zmtp import Raw

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
    pytest.mark.skipif(os.getuid() != 0, reason="to be another user takes root"),
]

STRANGER = 65534
PAGE = b"a secret of ours" * 256


def as_stranger(function: Callable[[], object]) -> object:
    """What `function` returns in a process of another user; an OSError by its name."""

    def child(_said: Said) -> object:
        os.setgroups([])
        os.setresgid(STRANGER, STRANGER, STRANGER)
        os.setresuid(STRANGER, STRANGER, STRANGER)
        try:
            return function()
        except OSError as error:
            return type(error).__name__

    return in_fork(child)


@dataclass
class Place:
    broker: Broker
    name: str
    spill_dir: Path


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Place]:
    """A broker on the default endpoint of a user without a runtime directory: in /tmp, where everybody may look."""
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    Path(tempfile.gettempdir()).chmod(0o1777)
    endpoint = default_endpoint()
    assert endpoint == f"ipc://{tempfile.gettempdir()}/gcma-0/default"
    with broker(endpoint) as running, gcma_shm.connect(endpoint) as client:
        client.swap(0, 10).store(0, PAGE)
        yield Place(running, arena_name(endpoint), default_spill_dir(endpoint))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_everything_is_its_owners_alone(place: Place) -> None:
    path = socket_path(place.broker.endpoint)
    (spilled,) = place.spill_dir.iterdir()
    assert {path.parent: mode(path.parent), place.spill_dir: mode(place.spill_dir)} == {
        path.parent: 0o700,
        place.spill_dir: 0o700,
    }
    assert {file.name: mode(file) for file in (path, spilled, arenas.SHM_DIR / place.name[1:])} == {
        path.name: 0o600,
        spilled.name: 0o600,
        place.name[1:]: 0o600,
    }


def test_whatever_the_umask() -> None:
    before = os.umask(0)
    try:
        endpoint = f"ipc://{os.environ['XDG_RUNTIME_DIR']}/u/s"
        with broker(endpoint), gcma_shm.connect(endpoint) as client:
            client.swap(0, 10).store(0, PAGE)
            (spilled,) = default_spill_dir(endpoint).iterdir()
            found = [socket_path(endpoint), spilled, arenas.SHM_DIR / arena_name(endpoint)[1:]]
            assert [mode(file) for file in found] == [0o600] * 3
            assert mode(socket_path(endpoint).parent) == mode(spilled.parent) == 0o700
    finally:
        os.umask(before)


def test_another_user_cannot_map(place: Place) -> None:
    def shm_open() -> object:
        return posix_ipc.SharedMemory(place.name).fd

    def write_only() -> object:
        return os.open(arenas.SHM_DIR / place.name[1:], os.O_WRONLY)

    def unlink() -> object:
        return posix_ipc.unlink_shared_memory(place.name)

    def by_proc() -> object:
        return list(Path(f"/proc/{place.broker.pid}/fd").iterdir())

    def open_arena() -> object:
        return arenas.open_arena(place.name, bytes(16))

    for way in (write_only, by_proc, open_arena):
        assert as_stranger(way) in ("PermissionError", "ArenaError"), way.__name__
    for way in (shm_open, unlink):

        def caught(way: Callable[[], object] = way) -> object:
            try:
                return way()
            except posix_ipc.PermissionsError:
                return "refused"

        assert as_stranger(caught) == "refused", way.__name__
    assert (arenas.SHM_DIR / place.name[1:]).exists()


def test_another_user_cannot_connect_though_it_knows_the_endpoint(place: Place) -> None:
    endpoint = place.broker.endpoint
    assert as_stranger(lambda: Raw(endpoint)) == "PermissionError"

    def client() -> object:
        try:
            return repr(gcma_shm.connect(endpoint, mapped=False, timeout=0.5))
        except gcma_shm.GcmaError as error:
            return type(error).__name__

    assert as_stranger(client) in ("ArenaError", "BrokerUnavailable", "PermissionError")


def test_nor_when_it_gets_through_to_the_socket(place: Place) -> None:
    """Somebody has opened the directory, by mistake: the kernel says who connects, and whoever is another user has no rights."""
    path = socket_path(place.broker.endpoint)
    path.parent.chmod(0o711)
    path.chmod(0o666)

    def client() -> object:
        with Raw(place.broker.endpoint).greet() as raw:
            raw.request(1, "hello", {"pid": os.getpid(), "start": 1, "mapped": False})
            said = [raw.receive()]
            raw.request(2, "areas")
            return [*said, raw.receive()]

    said = as_stranger(client)
    path.parent.chmod(0o700)
    assert isinstance(said, list)
    assert [b"Forbidden" in one for one in said] == [True, True], said


def test_another_user_cannot_read_what_was_spilled(place: Place) -> None:
    (spilled,) = place.spill_dir.iterdir()
    assert PAGE in spilled.read_bytes()
    assert as_stranger(lambda: list(place.spill_dir.iterdir())) == "PermissionError"
    assert as_stranger(spilled.read_bytes) == "PermissionError"


def test_names_do_not_help_to_guess(place: Place) -> None:
    """What stands in /dev/shm is a hash: the name of an arena is no secret, the right to open it is not in its name."""
    names = as_stranger(lambda: [path.name for path in arenas.SHM_DIR.glob("gcma-0-*")])
    assert isinstance(names, list)
    assert place.name[1:] in names, "among those of other tests, which come and go"
    assert as_stranger((arenas.SHM_DIR / place.name[1:]).read_bytes) == "PermissionError"


# --- who was there first


@contextlib.contextmanager
def squatted(monkeypatch: pytest.MonkeyPatch, how: Callable[[Path], object]) -> Iterator[str]:
    """Another user makes our directory in /tmp before us."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    Path(tempfile.gettempdir()).chmod(0o1777)
    path = Path(tempfile.gettempdir()) / "gcma-0"
    assert as_stranger(lambda: how(path)) is None
    yield default_endpoint()


def make_directory(path: Path) -> None:
    path.mkdir(mode=0o777)
    path.chmod(0o777)


def make_private_directory(path: Path) -> None:
    path.mkdir(mode=0o700)


def make_link(path: Path) -> None:
    (path.parent / "theirs").mkdir(mode=0o777)
    path.symlink_to(path.parent / "theirs")


def make_file(path: Path) -> None:
    path.touch()


@pytest.mark.parametrize("how", [make_directory, make_private_directory, make_link, make_file])
def test_a_squatter_is_refused_by_both(monkeypatch: pytest.MonkeyPatch, how: Callable[[Path], object]) -> None:
    with squatted(monkeypatch, how) as endpoint:
        with pytest.raises((ArenaError, FileExistsError)):
            run(Settings(endpoint, 4 << 20))
        assert not (arenas.SHM_DIR / arena_name(endpoint)[1:]).exists()
        with pytest.raises((ArenaError, gcma_shm.BrokerUnavailable)):
            gcma_shm.connect(endpoint, timeout=0.5)


def test_pages_do_not_go_to_a_squatter_who_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def listen(path: Path) -> None:
        make_directory(path)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path / "default"))
            (path / "default").chmod(0o666)

    with squatted(monkeypatch, listen) as endpoint, pytest.raises(ArenaError, match="belongs to user 65534"):
        gcma_shm.connect(endpoint, timeout=0.5)
    socket_path(endpoint).unlink()


def test_a_spill_directory_of_others_is_refused(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, STRANGER, STRANGER)
    with pytest.raises(ArenaError, match="belongs to user"):
        private_dir(theirs)
