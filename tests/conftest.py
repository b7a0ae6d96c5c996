"""What every test gets: directories of its own, an embedded broker when it asks for one, and the check that nothing stays behind."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import gcma_shm
from gcma_shm.clients.embedded import EmbeddedClient

SHM = Path("/dev/shm")
GONE_S = 20.0  # a killed owner's broker takes a moment to notice


def _objects() -> set[str]:
    """Our shared-memory objects."""
    return {path.name for path in SHM.glob("gcma-*")}


def _brokers() -> set[int]:
    """Broker processes, whoever's child they are."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"gcma_shm.broker.cli" in words or any(word.endswith(b"/gcma") for word in words[:2]):
            found.add(int(path.parent.name))
    return found


def _eventually(gone: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + GONE_S
    while not gone() and time.monotonic() < deadline:
        time.sleep(0.01)
    return gone()


@pytest.fixture(autouse=True)
def _leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Private cache, runtime and temporary directories; afterwards no object, broker, socket or spill file of the test is left."""
    short = Path(tempfile.mkdtemp(prefix="gt-"))  # tmp_path is too long for a socket
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    monkeypatch.delenv("GCMA_ENDPOINT", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    objects, brokers = _objects(), _brokers()
    yield
    gc.collect()
    try:
        assert _eventually(lambda: _brokers() <= brokers), f"broker processes left: {_brokers() - brokers}"
        assert _eventually(lambda: _objects() <= objects), f"shared-memory objects left: {_objects() - objects}"
        cache = tmp_path / "cache" / "gcma"
        assert not cache.exists() or not list(cache.iterdir()), f"spill files left: {list(cache.rglob('*'))}"
        left = [path for path in short.rglob("*") if path.is_socket() or path.name == "broker"]
        assert not left, f"sockets left: {left}"
    finally:
        for path in sorted(short.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        short.rmdir()


@pytest.fixture
def client() -> Iterator[EmbeddedClient]:
    """The owner of a broker with a 16 MiB arena: 4 KiB pages, about 400 in the nursery, one area."""
    with gcma_shm.embedded("16M") as owner:
        yield owner
