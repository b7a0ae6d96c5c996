"""What every test gets: directories of its own, an embedded broker when it asks for one, and the check that nothing stays behind.

Several test runs may share a machine, so what stays behind is looked for by whose it is: a broker of this test has the test's own cache
directory in its environment, an arena belongs to whoever has it mapped, and a dead one's spill directory has its name.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import mmap
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import util as multiprocessing_util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import gcma_shm
from gcma_shm import arena as arenas
from gcma_shm import layout
from gcma_shm._core import Plane
from gcma_shm.areas import AreaSpec
from gcma_shm.broker import allocations as allocations_module
from gcma_shm.broker import line as line_module
from gcma_shm.broker.allocations import Allocations
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.shared_memory import using
from gcma_shm.endpoint import arena_name, default_spill_dir
from tests.books import Clock, allocations_of
from tests.desk import Desk
from tests.inspected import Copy, in_use
from tests.loops import NEW_LOOP, SIZE, Runs
from tests.processes import broker

# multiprocessing makes its temporary directory once and removes it at the very end: not in the directory of the one test
# that happens to be the first to want it.
multiprocessing_util.get_temp_dir()

# Whoever runs the tests in a shell's background may have had SIGINT ignored, in all that they start as well; some send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# With it `print` writes the end of a line by itself, and the lines of processes that tell by one pipe run into one another.
os.environ.pop("PYTHONUNBUFFERED", None)

# How long an example takes says how busy the machine is: by default one of 200 ms fails, and so does making ten in more than a second.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")

SHM = Path("/dev/shm")
GONE_S = 60.0  # a killed owner's broker takes a moment to notice


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests come first, dealt out to the workers, each of which begins with its part of the list: one that is begun last is waited
    for alone. Those of a file stay together, as they may share what takes long. (An order for `--dist worksteal`; any order does.)
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = [item for item in items if not item.get_closest_marker("slow")]
    count, files = len(items), list(dict.fromkeys(item.path for item in slow))
    items.clear()
    for worker in range(workers):
        part = [item for item in slow if item.path in files[worker::workers]]
        room = max((count - len(items)) // (workers - worker) - len(part), 0)
        items += part + quick[:room]
        del quick[:room]
    items += quick


def _objects() -> set[str]:
    """All arenas."""
    return {path.name for path in SHM.glob("gcma-*")}


def _is_of(pid: int, cache: Path) -> bool:
    """Whether that process was started by the test that has this cache directory."""
    if pid == os.getpid():
        return True
    try:
        return f"XDG_CACHE_HOME={cache}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False


def _mapped_by(pid: int) -> str:
    """What files a process has mapped, as the kernel lists them."""
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def _objects_of(tmp_path: Path, before: set[str]) -> set[str]:
    """Arenas that this test's processes have mapped, or have left, and that were not there before.

    (Who has a lock, /proc/locks tells: but who reads that waits until all processors have had their turn, and everyone who locks anything
    waits for him. With some runs on a busy machine, looking there for each arena took a minute of each test.)
    """
    new = _objects() - before
    if not new:
        return set()
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    maps = "".join(_mapped_by(pid) for pid in pids if _is_of(pid, tmp_path / "cache"))
    return {
        name
        for name in new
        if (f"/{name}" in maps or any(tmp_path.rglob(name)) or name.startswith(f"gcma-test-{os.getpid()}"))
        and (SHM / name).exists()
    }


def _brokers(cache: Path) -> set[int]:
    """Broker processes that this test has started, whoever's child they are now."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        pid = int(path.parent.name)
        if (b"gcma_shm.broker.cli" in words or any(word.endswith(b"/gcma") for word in words[:2])) and _is_of(
            pid, cache
        ):
            found.add(pid)
    return found


def _eventually(gone: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + GONE_S
    while not gone() and time.monotonic() < deadline:
        time.sleep(0.01)
    return gone()


_modules_set_aside = 0


def _set_aside_what_stays() -> None:
    """Modules and collected tests, of which there are more each time that something is imported, are garbage never: to look through
    them for what the test has left takes 50 ms and more, of every test.
    """
    global _modules_set_aside  # noqa: PLW0603 - one a process
    if len(sys.modules) > _modules_set_aside:
        gc.collect()
        gc.freeze()
        _modules_set_aside = len(sys.modules)


@pytest.fixture(autouse=True)
def _leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Private cache, runtime and temporary directories; afterwards no object, broker, socket or spill file of the test is left."""
    short = Path(tempfile.mkdtemp(prefix="gt-"))  # tmp_path is too long for a socket
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    monkeypatch.delenv("GCMA_ENDPOINT", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    objects = _objects()
    _set_aside_what_stays()
    yield
    gc.collect()
    try:
        assert _eventually(lambda: not _brokers(cache)), f"broker processes left: {_brokers(cache)}"
        assert _eventually(lambda: not _objects_of(tmp_path, objects)), (
            f"shared-memory objects left: {_objects_of(tmp_path, objects)}"
        )
        spilled = cache / "gcma"
        assert not spilled.exists() or not list(spilled.iterdir()), f"spill files left: {list(spilled.rglob('*'))}"
        left = [
            path for path in short.rglob("*") if path.is_socket() and not path.name.startswith("listener-")
        ]  # multiprocessing's
        assert not left, f"sockets left: {left}"
    finally:
        for path in sorted(short.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        short.rmdir()


ARENAS = {
    "usual": partial(gcma_shm.embedded, "16M"),  # 4 KiB pages, about 400 in the nursery, one area
    "small": partial(gcma_shm.embedded, "4M", timeout=20),  # full at once: about 900 pages in one area
    "two areas": partial(gcma_shm.embedded, "4M", areas={"a": "1M", "b": "1M"}),  # a nursery of a bit over one MiB
    "16 pages": partial(gcma_shm.embedded, "8M", areas={"a": SIZE}, clients=12),  # in one area
}


@pytest.fixture
def client(request: pytest.FixtureRequest) -> Iterator[EmbeddedClient]:
    """The owner of a broker with the usual arena, or with another of these that the test or its file is marked with."""
    mark = request.node.get_closest_marker("arena")
    with ARENAS[mark.args[0] if mark else "usual"]() as owner:
        yield owner


@pytest.fixture(params=[True, False], ids=["mapped", "messages"])
def either(request: pytest.FixtureRequest, client: EmbeddedClient) -> Iterator[gcma_shm.Client]:
    """Another client of that broker, which maps the arena or sends messages."""
    with gcma_shm.connect(client.endpoint, mapped=request.param) as found:
        yield found


@pytest.fixture
def endpoint() -> Iterator[str]:
    """Of brokers that are killed, too: what they leave is removed in the end."""
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    yield endpoint
    Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)
    with contextlib.suppress(gcma_shm.ArenaError):
        arenas.remove_dead(arena_name(endpoint))
    for path in sorted(default_spill_dir(endpoint).parent.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


_images: list[bytes] = []


@pytest.fixture
def copy(endpoint: str) -> Copy:
    """Of an arena with something of everything in it."""
    if not _images:  # made once: it takes a second
        with in_use(endpoint):
            _images.append((SHM / arena_name(endpoint)[1:]).read_bytes())
    return Copy(_images[0])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """`gcma check` looks three times: for what is wrong for good."""
    monkeypatch.setattr("gcma_shm.check.LOOKS", 3)


@pytest.fixture
def at() -> Iterator[gcma_shm.Client]:
    """A client of a broker that is a process of its own, by which children find it, too; segments are there."""
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    with broker(endpoint), gcma_shm.connect(endpoint) as client, using(client):
        yield client


@dataclass
class Bare:
    """An arena of this process without a broker around it."""

    arena: arenas.Arena
    plane: Plane
    spill_dir: Path


def private_bare(areas: Mapping[str, int | str | AreaSpec], size: int = 2 << 20) -> Bare:
    """As `bare`, with those areas, in memory that goes with the last reference to it: one for each example of a property test."""
    geometry, placed = layout.plan(size, areas=areas, slots=64, clients_max=8)
    memory = mmap.mmap(-1, geometry.size)
    with memoryview(memory) as view:
        layout.write_header(view, geometry, placed, bytes(16))
    arena = arenas.Arena("private", memory, geometry, placed, bytes(16))
    directory = Path(tempfile.gettempdir())
    return Bare(arena, Plane(memory, geometry, layout.BROKER, os.fsencode(directory)), directory)


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Bare]:
    """The broker's view of an arena of 2 MiB: 600 slots, 8 clients, areas `a` (100 pages) and `b` (200 pages)."""
    geometry, areas = layout.plan(2 << 20, areas={"a": 100 * 4096, "b": 200 * 4096}, slots=600, clients_max=8)
    arena = arenas.create(f"/gcma-test-{os.getpid()}", geometry, areas)
    (tmp_path / "spill").mkdir()
    try:
        plane = Plane(arena.memory, geometry, layout.BROKER, os.fsencode(tmp_path / "spill"))
        for index, area in enumerate(areas):  # what the broker's `Areas` do
            plane.set_area(index, area.first, area.pages)
        yield Bare(arena, plane, tmp_path / "spill")
    finally:
        arena.destroy()


@pytest.fixture
def allocations(bare: Bare) -> Allocations:
    """Of that arena, all of them."""
    return allocations_of(bare)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that they read."""
    clock = Clock()
    monkeypatch.setattr(allocations_module, "time", clock)
    return clock


@pytest.fixture
def desk(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """Allocations of that arena, and the line before them."""
    desk = Desk(bare)
    monkeypatch.setattr(line_module, "time", desk)
    return desk


@pytest.fixture(params=list(NEW_LOOP))
def run(request: pytest.FixtureRequest) -> Runs:
    """Runs a coroutine in a new loop, asyncio's own and uvloop's."""

    def run(main: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=NEW_LOOP[request.param]) as runner:
            return runner.run(main)

    return run
