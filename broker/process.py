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

from gcma_shm import arena as arenas
from gcma_shm import layout
from gcma_shm._core import Plane, scheduler_slice
from gcma_shm.areas import LENT, SHARE_WHOLE, Area, AreaSpec
from gcma_shm.broker.door import Door, Doorway
from gcma_shm.broker.growth import growth_max
from gcma_shm.broker.reclaim import ReclaimThread
from gcma_shm.broker.registry import TypeRegistry
from gcma_shm.broker.server import STOP_S, Server
from gcma_shm.broker.service import Service
from gcma_shm.broker.stop import StopSignals
from gcma_shm.endpoint import arena_name, check_endpoint, default_spill_dir, is_tcp, private_dir, socket_path
from gcma_shm.errors import ArenaError
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
    owner_pidfd: int = -1
    doorway: Doorway = field(default_factory=Doorway)


def run(settings: Settings, ready: Callable[[str], None] = lambda _: None) -> None:
    """Runs a broker until it is told to stop; `ready` is called with a description once it serves.

    Raises ArenaError or ValueError when it cannot start, with nothing left behind. The endpoint's directory is removed
    too when it is empty in the end and was made here.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _raise_descriptor_limit()
    geometry, areas = layout.plan(
        settings.size, settings.page_size, settings.areas, settings.slots, settings.clients_max
    )
    check_endpoint(settings.endpoint)
    settings.doorway.check(settings.endpoint)
    path = None if is_tcp(settings.endpoint) else socket_path(settings.endpoint)
    with StopSignals() as stop, contextlib.ExitStack() as undo:
        if path is not None:
            made_dir = not path.parent.exists()
            private_dir(path.parent)
            if made_dir:
                undo.callback(_remove_empty, path.parent)
        arena = arenas.create(arena_name(settings.endpoint), geometry, areas)
        undo.callback(arena.destroy)
        if path is not None:
            undo.callback(
                path.unlink, missing_ok=True
            )  # the lock is ours, so a socket there is a dead broker's, and then ours
        spill_dir = _make_spill_dir(settings)
        undo.callback(shutil.rmtree, spill_dir, ignore_errors=True)
        plane = Plane(arena.memory, geometry, layout.BROKER, os.fsencode(spill_dir))
        _sign(plane)
        scheduler_slice(SLICE_S)  # of this thread, and of ZeroMQ's, which is started here
        door = Door(settings.endpoint, settings.doorway, geometry.page_size, geometry.clients_max)
        undo.callback(door.close)
        server = Server(door, stop, growth_max(geometry.page_size, geometry.clients_max))
        undo.callback(server.close)
        registry = TypeRegistry(plane, spill_dir)
        rights = door.admission.rights if door.admission is not None else lambda _: None
        service = Service(plane, arena, registry, str(spill_dir), server.answer, server.watch, settings.quota, rights)
        reclaim = ReclaimThread(plane)
        try:
            ready(describe(arena, settings.endpoint, spill_dir, [at for at in door.endpoints if is_tcp(at)]))
            log.info("stopping: %s", server.run(service, settings.owner_pidfd))
        finally:
            plane.write(layout.STOPPED_AT, 1)
            service.stop(STOP_S)
            reclaim.stop()


def _raise_descriptor_limit() -> None:
    """A client costs a socket and a pidfd, a type two files: take what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def describe(arena: arenas.Arena, endpoint: str, spill_dir: Path, over_tcp: list[str]) -> str:
    """What an operator wants to know of a broker that has started."""
    geometry = arena.geometry
    slot_bytes = geometry.slots * layout.SLOT_BYTES
    tables = geometry.pages_at - slot_bytes
    rows = [
        ("arena", f"{arena.name}, {format_size(geometry.size)}, epoch 1"),
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
        ("spill files", f"{spill_dir}"),
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


def _sign(plane: Plane) -> None:
    """Writes who serves the arena; the broker is a client too, of number 1, when it cleans, promotes and stores for
    others.
    """
    pid, start = os.getpid(), start_time(os.getpid()) or 0
    plane.write(layout.BROKER_PID_AT, pid)
    plane.write(layout.BROKER_START_AT, start)
    plane.write(layout.EPOCH_AT, plane.read(layout.EPOCH_AT) + 1)
    Records(plane).fill(layout.BROKER, State.ALIVE, pid, start)


def _make_spill_dir(settings: Settings) -> Path:
    """The arena's own directory, emptied: lives are numbered per arena, so no file of an earlier arena may be taken
    for one of this.
    """
    if settings.spill_dir is None:
        path = default_spill_dir(settings.endpoint)
    else:
        path = settings.spill_dir / arena_name(settings.endpoint).removeprefix("/")
    _refuse_memory(path)
    private_dir(path)
    shutil.rmtree(path)
    return private_dir(path).resolve()


def _refuse_memory(path: Path) -> None:
    existing = next(p for p in (path, *path.parents) if p.exists())
    if existing.stat().st_dev == arenas.SHM_DIR.stat().st_dev:
        raise ArenaError(
            f"the spill directory {path} is in shared memory, which it is there to relieve; choose a directory on a disk"
        )


def _remove_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()
