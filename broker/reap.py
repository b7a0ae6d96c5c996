"""The command `gcma reap`: removes what brokers left behind that nobody started again, and only that.

What it removes: the object in shared memory, the spill files and their directory, the endpoint's socket and its directory when that is
empty then. It holds the broker's lock on the arena's name all the while, so no broker starts or takes over in between, and removes the
object last. Never: what a living broker serves, another user's, what is reached through a symbolic link, a file that it does not know;
and, unless told to, an arena in which clients live.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import stat
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import posix_ipc

from gcma_shm import arena as arenas
from gcma_shm import layout
from gcma_shm.check import Inspected, geometry_faults
from gcma_shm.endpoint import arena_name, default_endpoint, default_spill_base, is_tcp, socket_path
from gcma_shm.entries import ClientEntry, Guest, read_clients, read_guests
from gcma_shm.errors import ArenaError
from gcma_shm.sizes import format_size

SPILL_FILE = re.compile(r"[0-9]{3}\.[0-9]+")
BLOCK_BYTES = 512  # of stat(2), st_blocks


@dataclass(frozen=True)
class Removed:
    """Something that is gone, or would be. `nbytes`: of memory or disk."""

    what: str
    path: str
    nbytes: int


@dataclass
class Outcome:
    """`kept`: what was left, and why; `refused`: why an arena was left as it is; `served`: arenas whose brokers live."""

    removed: list[Removed] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    served: list[str] = field(default_factory=list)


def add_reap(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser of `gcma`."""
    parser = commands.add_parser(
        "reap",
        help="remove what a broker left behind that nobody starts again",
        description="Exit status 1: an arena was left as it is, because a broker serves it or clients live in it.",
    )
    parser.set_defaults(run=_reap)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--endpoint", default=default_endpoint(), help="of the broker (default %(default)s)")
    which.add_argument("--all", action="store_true", help="of all brokers of this user that have died")
    parser.add_argument("--force", action="store_true", help="also when clients live that still hold the arena")
    parser.add_argument("--dry-run", action="store_true", help="say what would be removed")
    parser.add_argument("--json", action="store_true", help="for programs")


def _reap(_parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    reaper = Reaper(parsed.force, parsed.dry_run)
    if parsed.all:
        reaper.reap_all()
    else:
        reaper.reap_endpoint(parsed.endpoint)
    outcome = reaper.outcome
    if parsed.json:
        print(json.dumps(asdict(outcome) | {"dry_run": parsed.dry_run}))
    else:
        _print(outcome, "would remove" if parsed.dry_run else "removed")
    return 1 if outcome.refused else 0


def _print(outcome: Outcome, verb: str) -> None:
    for one in outcome.removed:
        print(f"{verb} {one.what} {one.path}, {one.nbytes} bytes")
    for words in outcome.kept:
        print(f"kept {words}")
    for name in outcome.served:
        print(f"a broker serves {name}")
    total = sum(one.nbytes for one in outcome.removed)
    if outcome.removed:
        print(f"{verb} {format_size(total)} in all")
    elif not outcome.refused:
        print("nothing to remove")
    for words in outcome.refused:
        print(f"gcma reap: {words}", file=sys.stderr)


class Reaper:
    """Removes and notes in `outcome`. `force`: also where clients live; `dry_run`: removes nothing."""

    def __init__(self, force: bool = False, dry_run: bool = False) -> None:
        self._force = force
        self._dry_run = dry_run
        self.outcome = Outcome()

    def reap_endpoint(self, endpoint: str) -> None:
        """What a broker on that endpoint left. Raises ValueError for a malformed endpoint."""
        name = arena_name(endpoint)
        path = None if is_tcp(endpoint) else socket_path(endpoint)  # over TCP nothing is left of a socket
        self._reap_arena(name, refuse_served=True, socket=path, spill_dir=_resolved(default_spill_base()) / name[1:])

    def reap_all(self) -> None:
        """What all dead brokers of this user left in shared memory and, of spill files, in the default place."""
        ours = re.compile(rf"gcma-{os.getuid()}-[0-9a-f]{{16}}")
        for path in sorted(arenas.SHM_DIR.iterdir()):
            if ours.fullmatch(path.name):
                self._reap_arena(f"/{path.name}")
        base = _resolved(default_spill_base())
        for path in sorted(base.iterdir()) if base.is_dir() else []:
            if ours.fullmatch(path.name) and not (arenas.SHM_DIR / path.name).exists():
                self._reap_arena(f"/{path.name}", spill_dir=path)

    def _reap_arena(
        self, name: str, refuse_served: bool = False, socket: Path | None = None, spill_dir: Path | None = None
    ) -> None:
        """`spill_dir`: where the spill files may be if there is no arena that says where."""
        found = _lstat(arenas.SHM_DIR / name[1:])
        if found is not None and not (stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()):
            self.outcome.refused.append(f"{arenas.SHM_DIR / name[1:]} is another user's, or no plain file")
            return
        if found is None and not (_exists(socket) or _exists(spill_dir)):
            return
        if found is None and self._dry_run:
            self._remove_around(name, spill_dir, socket)
            return
        try:
            fd = arenas.lock_dead(name)
        except ArenaError:
            if refuse_served:
                self.outcome.refused.append(f"a broker serves {name}; stop it first")
            else:
                self.outcome.served.append(name)
            return
        try:
            self._reap_locked(name, fd, found, socket, spill_dir)
        finally:
            os.close(fd)

    def _reap_locked(
        self, name: str, fd: int, found: os.stat_result | None, socket: Path | None, spill_dir: Path | None
    ) -> None:
        now = os.fstat(fd)
        found = now if now.st_size else found  # it may have come since; an empty one is ours
        if found is not None:
            trouble = None
            try:
                where, holders = _examine(name)
            except ArenaError as error:
                where, holders, trouble = None, _mappers(name), error.strerror or str(error)
            if holders and not self._force:
                self.outcome.refused.append(
                    f"{name} is in use by {'; '.join(holders)}. Start its broker again, end them, or use --force"
                )
                return
            if trouble is not None:
                self.outcome.kept.append(f"whatever spill files {name} has: where they are cannot be read ({trouble})")
                spill_dir = None
            elif not self._dry_run:
                arenas.end_dead(name, fd)
            spill_dir = where or spill_dir
        self._remove_around(name, spill_dir, socket)
        if found is not None:
            self._note("arena", arenas.SHM_DIR / name[1:], found)
        if not self._dry_run:
            posix_ipc.unlink_shared_memory(name)

    def _remove_around(self, name: str, spill_dir: Path | None, socket: Path | None) -> None:
        if spill_dir is not None:
            self._remove_spill_dir(spill_dir, name[1:])
        if socket is not None:
            self._remove_socket(socket)

    def _remove_spill_dir(self, path: Path, own_name: str) -> None:
        found = _lstat(path)
        if found is None:
            return
        if path.name != own_name or _resolved(path) != path:
            self.outcome.kept.append(f"{path}: it is not the arena's own directory, or is reached through a link")
            return
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            self.outcome.kept.append(f"{path}: another user's, or no directory")
            return
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            left = [name for name in sorted(os.listdir(fd)) if not self._remove_spill_file(fd, path, name)]  # noqa: PTH208
        finally:
            os.close(fd)
        if left:
            self.outcome.kept.append(f"{path}: it holds {', '.join(left[:5])}{' and more' if left[5:] else ''}")
        elif self._dry_run or _remove_empty(path):
            self._note("spill directory", path, found)

    def _remove_spill_file(self, directory: int, path: Path, name: str) -> bool:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if not (SPILL_FILE.fullmatch(name) and stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()):
            return False
        if not self._dry_run:
            os.unlink(name, dir_fd=directory)
        self._note("spill file", path / name, found)
        return True

    def _remove_socket(self, path: Path) -> None:
        """And its directory, if it is empty then. The arena's lock is ours, so no broker listens there, but somebody else may."""
        found = _lstat(path)
        if found is not None:
            if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.getuid():
                self.outcome.kept.append(f"{path}: another user's, or no socket")
                return
            if _answers(path):
                self.outcome.kept.append(f"{path}: somebody listens there")
                return
            if not self._dry_run:
                path.unlink()
            self._note("socket", path, found)
        directory = _lstat(path.parent)
        if directory is None or not stat.S_ISDIR(directory.st_mode) or directory.st_uid != os.getuid():
            return
        private = not directory.st_mode & 0o077  # as brokers make it
        if private and (set(path.parent.iterdir()) <= {path} if self._dry_run else _remove_empty(path.parent)):
            self._note("directory", path.parent, directory)

    def _note(self, what: str, path: Path, found: os.stat_result) -> None:
        self.outcome.removed.append(Removed(what, str(path), found.st_blocks * BLOCK_BYTES))


def _examine(name: str) -> tuple[Path | None, list[str]]:
    """Where its spill files are, and who lives that has it. Raises ArenaError when that cannot be read."""
    inspected = Inspected(name, served=False)
    try:
        geometry, _ = inspected.read_header()
        if faults := geometry_faults(geometry):
            raise ArenaError(faults[0])
        standing = inspected.standing(geometry)
        clients = read_clients(inspected.memory, geometry).values()
        living = [client for client in clients if standing.lives(client) is not False]
        guests = read_guests(inspected.memory, geometry) if living else []
        return inspected.spill_dir(), [_describe(client, guests, geometry.page_size) for client in living]
    finally:
        inspected.close()


def _describe(client: ClientEntry, guests: Iterable[Guest], page_size: int) -> str:
    mine = [guest for guest in guests if client.number in guest.holders | guest.claimers]
    reserved = sum(guest.kind == layout.RESERVATION for guest in mine)
    size = format_size(sum(guest.pages for guest in mine) * page_size)
    holds = f"holds {size}: buffers {len(mine) - reserved}, reservations {reserved}" if mine else "holds nothing"
    return f"client {client.number} (process {client.pid or 'unknown'}), which {holds}"


def _mappers(name: str) -> list[str]:
    """The processes that map the object, as far as we may look."""
    found = []
    for path in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if f" {arenas.SHM_DIR / name[1:]}\n" in path.read_text():
                found.append(f"process {path.parent.name}, which maps it")
    return found


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        one.setblocking(False)
        try:
            one.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:  # its queue is full
            return True
    return True


def _resolved(path: Path) -> Path:
    """The default place may lie behind a link of the user's; what is in it may not."""
    return path.resolve()


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _exists(path: Path | None) -> bool:
    return path is not None and _lstat(path) is not None


def _remove_empty(path: Path) -> bool:
    try:
        path.rmdir()
    except OSError:
        return False
    return True
