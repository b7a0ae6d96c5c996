"""One broker from start to end: lock and arena, spill directory, threads, loop, and the removal of it all."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from gcma_shm import arena as arenas
from gcma_shm import layout
from gcma_shm._core import Plane, scheduler_slice
from gcma_shm.areas import LENT, SHARE_WHOLE, Area, AreaSpec
from gcma_shm.broker.direct import refuse_directory
from gcma_shm.broker.door import Door, Doorway
from gcma_shm.broker.reclaim import ReclaimThread
from gcma_shm.broker.recovery import forget_announcements
from gcma_shm.broker.registry import TypeRegistry
from gcma_shm.broker.rights import Rights, Sender, no_rights
from gcma_shm.broker.server import STOP_S, Server
from gcma_shm.broker.service import Answer, Service
from gcma_shm.broker.stop import StopSignals
from gcma_shm.endpoint import arena_name, check_endpoint, default_spill_dir, is_tcp, private_dir, socket_path
from gcma_shm.errors import ArenaError
from gcma_shm.presence import Presence
from gcma_shm.process import start_time
from gcma_shm.records import Records, State
from gcma_shm.sizes import format_size

log = logging.getLogger(__name__)

SWITCH_INTERVAL_S = (
    0.0002  # a worker thread gives the GIL up to the control loop after so long; Python's default is 5 ms
)


SLICE_S = 0.0001  # the control loop has little to do at once, and somebody waits for it: let it preempt the others


@dataclass(frozen=True)
class Settings:
    """What a broker is started with. Sizes in bytes; None: the default that docs/operations.md tells."""

    endpoint: str
    size: int
    areas: dict[str, AreaSpec] = field(default_factory=dict)
    page_size: int = layout.PAGE_SIZE_MIN
    slots: int | None = None
    clients_max: int | None = None
    quota: int | None = None
    spill_dir: Path | None = None
    spill_io: str = layout.SPILL_IO[0]
    policy: str = layout.POLICIES[0]
    owner_pidfd: int = -1
    doorway: Doorway = field(default_factory=Doorway)


def run(settings: Settings, ready: Callable[[str], None] = lambda _: None) -> None:
    """Runs a broker until it is told to stop; `ready` is called with a description once it serves.

    Takes over what a broker on the same endpoint left when it was killed; its geometry and areas are what they were then.

    Raises ArenaError or ValueError when it cannot start, with nothing left behind, and nothing removed of what it found. What ends
    it later, but for a signal or its owner's end, leaves the arena to the next broker. The endpoint's directory is removed too when it is empty in the end and was made here.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _raise_descriptor_limit()
    geometry, areas = layout.plan(
        settings.size,
        settings.page_size,
        settings.areas,
        settings.slots,
        settings.clients_max,
        settings.policy,
        settings.spill_io,
    )
    check_endpoint(settings.endpoint)
    settings.doorway.check(settings.endpoint)
    path = None if is_tcp(settings.endpoint) else socket_path(settings.endpoint)
    with StopSignals() as stop, contextlib.ExitStack() as undo:
        if path is not None:
            _make_socket_dir(path.parent, undo)
        arena = arenas.acquire(arena_name(settings.endpoint), geometry, areas, _has_spilled(settings))
        undo.callback(arena.let_go)
        estate = undo.enter_context(contextlib.ExitStack())  # what is removed in the end
        try:
            estate.callback(arena.unlink)
            if path is not None:  # the lock is ours, so a socket there is a dead broker's, or ours
                estate.callback(path.unlink, missing_ok=True)
            spill_dir = _make_spill_dir(settings) if arena.fresh else _find_spill_dir(arena, settings)
            estate.callback(shutil.rmtree, spill_dir, ignore_errors=True)
            if not arena.fresh and arena.geometry != geometry:
                log.warning(
                    "taking over an arena of another size, or with other areas or ways of working, than asked for; it stays as it is"
                )
            plane = begin(arena, spill_dir)
            scheduler_slice(SLICE_S)  # of this thread, and of ZeroMQ's, which is started here
            page_size, clients_max = arena.geometry.page_size, arena.geometry.clients_max
            door = Door(settings.endpoint, settings.doorway, page_size, clients_max)
            undo.callback(door.close)
            server = Server(door, stop, page_size)
            undo.callback(server.close)
            rights = door.admission.rights if door.admission is not None else no_rights
            service = assemble(plane, arena, spill_dir, server.answer, server.watch, settings.quota, rights)
            reclaim = ReclaimThread(plane, service.health)
        except BaseException:
            if not arena.fresh:
                estate.pop_all()  # left for whoever finds out what is wrong with it
            raise
        try:
            over_tcp = [at for at in door.endpoints if is_tcp(at)]
            ready(describe(arena, settings.endpoint, spill_dir, plane.read(layout.EPOCH_AT), over_tcp))
            log.info("stopping: %s", server.run(service, settings.owner_pidfd))
        except BaseException:
            # As if it had been killed: whoever starts a broker again finds everything in place. The lock is kept until nothing of
            # this one runs any more.
            estate.pop_all()
            service.stop(STOP_S, for_good=False)
            reclaim.stop()
            raise
        plane.write(layout.STOPPED_AT, 1)
        service.stop(STOP_S)
        reclaim.stop()
        arena.end_lives()  # should the worker that ends types be stuck in a disk


def _make_socket_dir(path: Path, undo: contextlib.ExitStack) -> None:
    is_new = not path.exists()
    private_dir(path)
    if is_new:
        undo.callback(_remove_empty, path)


def begin(arena: arenas.Arena, spill_dir: Path) -> Plane:
    """The broker's view of an arena that it has the lock of, with its signature."""
    plane = Plane(arena.memory, arena.geometry, layout.BROKER, os.fsencode(spill_dir))
    forget_announcements(plane)
    _sign(plane, arena, spill_dir)
    return plane


def assemble(
    plane: Plane,
    arena: arenas.Arena,
    spill_dir: Path,
    answer: Answer,
    watch: Callable[[int], None],
    quota: int | None = None,
    rights: Callable[[Sender], Rights | None] = no_rights,
) -> Service:
    """What serves the arena, without a loop or a socket; what another broker left there is taken over. Raises ArenaError."""
    registry = TypeRegistry(plane, spill_dir)
    service = Service(plane, arena, registry, str(spill_dir), answer, watch, quota, rights)
    if not arena.fresh:
        service.recover()
    return service


def _raise_descriptor_limit() -> None:
    """A client costs a socket and a pidfd, a type two files: take what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def describe(arena: arenas.Arena, endpoint: str, spill_dir: Path, epoch: int, over_tcp: list[str]) -> str:
    """What an operator wants to know of a broker that has started."""
    geometry = arena.geometry
    slot_bytes = geometry.slots * layout.SLOT_BYTES
    tables = geometry.pages_at - slot_bytes
    rows = [
        ("arena", f"{arena.name}, {format_size(geometry.size)}, epoch {epoch}"),
        ("pages", f"{geometry.pages} of {format_size(geometry.page_size)}"),
        ("slots", f"{geometry.slots}, {format_size(slot_bytes)} ({slot_bytes / geometry.size:.2%} of the arena)"),
        (
            "descriptors",
            f"{format_size(tables)} ({tables / geometry.size:.2%} of the arena), for {geometry.clients_max} clients",
        ),
        (
            "nursery",
            f"{format_size(geometry.nursery_pages * geometry.page_size)}, {geometry.grants_max} pages a client at once",
        ),
        *((f"area {area.name}", _describe_area(area, geometry.page_size)) for area in arena.areas),
        ("policy", layout.POLICIES[geometry.policy]),
        ("spill files", f"{spill_dir}, {layout.SPILL_IO[geometry.spill_io]}"),
        *(("over tcp", at) for at in over_tcp),
        ("endpoint", endpoint),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _describe_area(area: Area, page_size: int) -> str:
    words = [format_size(area.pages * page_size)]
    if not area.policy & LENT:
        words.append("not lent to the cache")
    if area.alignment > 1:
        words.append(f"aligned to {format_size(area.alignment * page_size)}")
    if area.share != SHARE_WHOLE:
        words.append(f"{area.share} % for buffers")
    return ", ".join(words)


def _sign(plane: Plane, arena: arenas.Arena, spill_dir: Path) -> None:
    """Writes who serves the arena, and where its spill files are; the broker is a client too, of number 1, when it cleans, promotes
    and stores for others. Its lock first: by that others tell whether it lives. The epoch last: an arena without one nobody
    has served, and a broker that finds it makes a new one.
    """
    presence = cast(Presence, arena.presence)
    presence.take(layout.BROKER)  # @recover.sign
    plane.tell_presence(presence.fileno())
    arena.memory[layout.SPILL_DIR_AT : layout.HEADER_BYTES] = os.fsencode(spill_dir).ljust(
        layout.SPILL_DIR_BYTES, b"\0"
    )
    pid, start = os.getpid(), start_time(os.getpid()) or 0
    plane.write(layout.BROKER_PID_AT, pid)
    plane.write(layout.BROKER_START_AT, start)
    plane.write(layout.EPOCH_AT, plane.read(layout.EPOCH_AT) + 1)
    Records(plane).fill(layout.BROKER, State.ALIVE, pid, start)


def _make_spill_dir(settings: Settings) -> Path:
    """The arena's own directory, emptied: lives are numbered per arena, so no file of an earlier arena may be taken
    for one of this.
    """
    path = _spill_path(settings)
    _refuse_memory(path)
    private_dir(path)
    shutil.rmtree(path)
    made = private_dir(path).resolve()
    if len(os.fsencode(made)) >= layout.SPILL_DIR_BYTES:
        raise ArenaError(f"the spill directory's path is longer than {layout.SPILL_DIR_BYTES - 1} bytes: {made}")
    if settings.spill_io == "direct":
        try:
            refuse_directory(made, settings.page_size)
        except BaseException:
            made.rmdir()
            raise
    return made


def _spill_path(settings: Settings) -> Path:
    if settings.spill_dir is None:
        return default_spill_dir(settings.endpoint)
    return settings.spill_dir / arena_name(settings.endpoint).removeprefix("/")


def _has_spilled(settings: Settings) -> bool:
    try:
        return any(_spill_path(settings).iterdir())
    except OSError:
        return False


def _find_spill_dir(arena: arenas.Arena, settings: Settings) -> Path:
    """Where the broker that was killed had its files: they stay there, whatever this one was told. Made anew when it has gone."""
    path = arena.spill_dir()
    if path != _spill_path(settings).resolve():
        log.warning("the spill files of the arena that is taken over stay in %s", path)
    return private_dir(path)


def _refuse_memory(path: Path) -> None:
    existing = next(p for p in (path, *path.parents) if p.exists())
    if existing.stat().st_dev == arenas.SHM_DIR.stat().st_dev:
        raise ArenaError(
            f"the spill directory {path} is in shared memory, which it is there to relieve; choose a directory on a disk"
        )


def _remove_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()
