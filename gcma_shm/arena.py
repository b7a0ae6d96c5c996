"""The shared-memory object: creating it with every page committed, finding it, mapping it, and the lock of its one
broker.

The lock is flock(2) on the object itself: it ends with the broker's process however that ends, and needs no file
beside the arena. A broker never forks, so no child of it keeps the lock. But whoever reads /proc/<pid>/maps, say, or smaps or cmdline, holds on
to that process's memory meanwhile: so the mapping, the open file and its lock may outlast the process, also after its parent has waited for it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import posix_ipc

from gcma_shm import layout
from gcma_shm.areas import Area
from gcma_shm.errors import ArenaError
from gcma_shm.layout import Geometry
from gcma_shm.presence import Presence
from gcma_shm.process import start_time
from gcma_shm.sizes import format_size

SHM_DIR = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory, see shm_overview(7)
MADV_POPULATE_WRITE = 23  # since Linux 5.14; mmap has no name for it
PREFAULT_BYTES = 4 << 20  # at a time: mmap's madvise keeps the interpreter from other threads
MODE = 0o600
LINGER_S = 5.0  # that the lock of a broker which has died may be held still
LINGER_NAP_S = 0.002  # between two tries
ROUNDS_MAX = 8  # each round lost means that another broker came or went just now


@dataclass
class Arena:
    """A mapped arena. `presence`: an open file of the object; the broker's has the arena's lock as well."""

    name: str
    memory: mmap.mmap
    geometry: Geometry
    areas: list[Area]
    arena_id: bytes
    presence: Presence | None = None
    fresh: bool = True  # False: another broker has served it

    def prefault(self, until: int | None = None) -> bool:
        """Fills this process's page table for the whole arena, or its first `until` bytes, so that no page costs a fault later; False
        where the kernel cannot.
        """
        end = self.geometry.size if until is None else until
        try:
            for start in range(0, end, PREFAULT_BYTES):
                self.memory.madvise(MADV_POPULATE_WRITE, start, min(PREFAULT_BYTES, end - start))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    def spill_dir(self) -> Path:
        """Where the spill files of an arena are that a broker has served. Raises ArenaError when that cannot be read."""
        found = self.memory[layout.SPILL_DIR_AT : layout.HEADER_BYTES].partition(b"\0")[0]
        path = Path(os.fsdecode(found))
        # What is there is going to be removed one day: never any other directory, whoever has written that into the header.
        if not path.is_absolute() or path.name != self.name.removeprefix("/"):
            raise ArenaError(f"the header of {self.name} is damaged: it does not say where the spill files are")
        return path

    def end_lives(self) -> None:
        """Ends the lives of all types: whoever still maps the arena without a broker cannot go on alone."""
        words = memoryview(self.memory)[: self.geometry.pages_at // 8 * 8].cast("Q")
        for type_ in range(self.geometry.types_max):
            at = (self.geometry.type_at(type_) + layout.TYPE_LIFE_AT) // 8
            words[at] += words[at] & 1

    def unlink(self) -> None:
        """Takes the object's name away. What processes have mapped stays mapped."""
        posix_ipc.unlink_shared_memory(self.name)

    def let_go(self) -> None:
        """Gives up the lock."""
        if self.presence is not None:
            self.presence.close()

    def destroy(self) -> None:
        """Unlinks the object and lets go of the lock."""
        self.unlink()
        self.let_go()


def acquire(name: str, geometry: Geometry, areas: list[Area], spilled: bool = False) -> Arena:
    """The arena of that name, locked by this process: what a broker that was killed has left, or a new one.

    What was left has the geometry and areas that it had. It is replaced only where nobody can be using it: its broker was killed
    before it had served, or while it was removing it. `spilled`: there are spill files of an arena of that name, so that one
    which says that it was never served has been damaged. Raises ArenaError when another broker has the name, when what is there is
    no arena of this version or damaged (it is left as it is), or there is too little shared memory.
    """
    for _ in range(ROUNDS_MAX):
        fd = _lock_new(name)
        if fd is not None:
            return _make(name, fd, geometry, areas)
        left = _lock_left(name, spilled)
        if left is not None:
            return left
    raise ArenaError(errno.EBUSY, f"other brokers are starting and stopping on the arena {name}; try again")


def create(name: str, geometry: Geometry, areas: list[Area]) -> Arena:
    """A new arena, all memory committed, locked by this process; what a dead broker left is removed first. Leaves nothing behind
    when it fails.

    Raises ArenaError when another broker has the name, or there is too little shared memory.
    """
    for _ in range(ROUNDS_MAX):
        fd = _lock_new(name)
        if fd is not None:
            return _make(name, fd, geometry, areas)
        remove_dead(name)
    raise ArenaError(errno.EBUSY, f"other brokers are starting and stopping on the arena {name}; try again")


def _make(name: str, fd: int, geometry: Geometry, areas: list[Area]) -> Arena:
    try:
        memory = _commit(fd, geometry.size)
        arena_id = secrets.token_bytes(16)
        with memoryview(memory) as view:
            layout.write_header(view, geometry, areas, arena_id)
    except BaseException:
        posix_ipc.unlink_shared_memory(name)
        os.close(fd)
        raise
    return Arena(name, memory, geometry, areas, arena_id, Presence(fd, geometry))


def open_arena(name: str, arena_id: bytes | None = None) -> Arena:
    """Maps an arena that a broker serves. Raises ArenaError when it is missing, not readable for us, damaged, or not
    `arena_id`.
    """
    try:
        found = posix_ipc.SharedMemory(name)
    except posix_ipc.ExistentialError:
        raise ArenaError(errno.ENOENT, f"there is no arena {name} in this machine's or container's {SHM_DIR}") from None
    except posix_ipc.PermissionsError:
        raise ArenaError(errno.EACCES, f"the arena {name} belongs to another user") from None
    try:
        arena = _map(name, found.fd)
        # Not a duplicate of this descriptor: the mapping keeps one, and with it the open file and its locks.
        arena.presence = Presence.of(found.fd, arena.geometry)
    finally:
        found.close_fd()
    if arena_id is not None and arena.arena_id != arena_id:
        raise ArenaError(
            f"{name} is not the arena that the broker serves: another container's {SHM_DIR}, or another arena since"
        )
    return arena


def _map(name: str, fd: int) -> Arena:
    size = os.fstat(fd).st_size
    if size < layout.HEADER_BYTES:
        raise ArenaError(f"{name} is not an arena: it has {size} bytes")
    memory = _mmap(fd, size)
    with memoryview(memory) as view:
        geometry, areas, found_id = layout.read_header(view, size)
    return Arena(name, memory, geometry, areas, found_id)


def _lock_new(name: str) -> int | None:
    """A new, empty object under `name`, locked; None: there is one, or another broker was quicker."""
    try:
        made = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=MODE)
    except posix_ipc.ExistentialError:
        return None
    except posix_ipc.PermissionsError:
        raise ArenaError(errno.EACCES, f"the arena {name} cannot be made in {SHM_DIR}: permission denied") from None
    if _try_lock(made.fd) and _is_named(made.fd, name):
        os.set_inheritable(made.fd, False)
        return int(made.fd)
    made.close_fd()
    return None


def _open_dead(name: str) -> int | None:
    """The object under `name`, locked; None: there is none, or another one by now. Raises ArenaError: a broker has its lock."""
    try:
        old = posix_ipc.SharedMemory(name)
    except posix_ipc.ExistentialError:
        return None
    except posix_ipc.PermissionsError:
        raise ArenaError(errno.EACCES, f"there is an arena {name} that belongs to another user") from None
    deadline = time.monotonic() + LINGER_S
    while not _try_lock(old.fd):
        # Its own still; or another looks at what it left, or begins just now, and has not said so.
        if _broker_is_dead(old.fd) and time.monotonic() < deadline:
            time.sleep(LINGER_NAP_S)
            continue
        old.close_fd()
        raise ArenaError(errno.EBUSY, f"another broker serves the arena {name}; stop it first, or use another endpoint")
    if not _is_named(old.fd, name):
        old.close_fd()
        return None
    os.set_inheritable(old.fd, False)
    return int(old.fd)


def _lock_left(name: str, spilled: bool) -> Arena | None:
    """What a killed broker left, locked; None: it was nothing to go on with, and is removed, or has gone meanwhile."""
    fd = _open_dead(name)
    if fd is None:
        return None
    try:
        left = None
        if _was_served(fd):
            left = _map(name, fd)
            if int.from_bytes(left.memory[layout.STOPPED_AT : layout.STOPPED_AT + 8], "little"):
                left.end_lives()
                left = None
        elif spilled:
            raise ArenaError(
                f"the arena {name} is damaged: its header is empty, and there are spill files of it; `gcma reap` removes both"
            )
        if left is None:
            posix_ipc.unlink_shared_memory(name)
            os.close(fd)
            return None
    except BaseException:
        os.close(fd)
        raise
    left.presence, left.fresh = Presence(fd, left.geometry), False
    return left


def _was_served(fd: int) -> bool:
    """Whether a broker came so far that clients may have mapped it: the magic is the last of the header, and all that stands behind
    geometry and checksum comes later.
    """
    head = os.pread(fd, layout.HEADER_BYTES, 0)
    if len(head) < layout.HEADER_BYTES:
        return any(head)
    return any(head[layout.EPOCH_AT :]) or (any(head[:8]) and head[:8] != layout.MAGIC)


def remove_dead(name: str) -> None:
    """Unlinks the arena `name` if no broker holds its lock; ends the lives of its types first, so that no client goes
    on alone in it. Raises ArenaError when a broker holds it.
    """
    fd = _open_dead(name)
    if fd is None:
        return
    try:
        end_dead(name, fd)
        posix_ipc.unlink_shared_memory(name)
    finally:
        os.close(fd)


def lock_dead(name: str) -> int:
    """A descriptor of the object under `name` with the broker's lock, so that no broker starts or takes over until it is closed; an
    empty object where there is none. Raises ArenaError when a broker has it.
    """
    for _ in range(ROUNDS_MAX):
        fd = _open_dead(name)
        fd = _lock_new(name) if fd is None else fd
        if fd is not None:
            return fd
    raise ArenaError(errno.EBUSY, f"other brokers are starting and stopping on the arena {name}; try again")


def end_dead(name: str, fd: int) -> None:
    """Ends the lives of all types in the locked object `fd`; of what is no arena, and so has no clients, nothing."""
    with contextlib.suppress(ArenaError):
        _map(name, fd).end_lives()


def _broker_is_dead(fd: int) -> bool:
    """Whether the last broker of which the header tells has gone. One that we do not see, in another PID namespace, counts as gone."""
    words = os.pread(fd, 16, layout.BROKER_PID_AT)
    pid, start = (int.from_bytes(words[n : n + 8], "little") for n in (0, 8))
    return pid != 0 and start_time(pid) != start


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_named(fd: int, name: str) -> bool:
    """Whether `name` still leads to this object: it may have been unlinked between opening and locking it."""
    try:
        return os.path.samestat(os.fstat(fd), (SHM_DIR / name.removeprefix("/")).stat())
    except FileNotFoundError:
        return False


def _mmap(fd: int, size: int) -> mmap.mmap:
    """The object, mapped by huge pages where the mount of /dev/shm grants them (tmpfs(5), `huge=`)."""
    memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _grants_huge_pages_when_asked() -> bool:
    mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    return any(mount[1] == str(SHM_DIR) and "huge=advise" in mount[3].split(",") for mount in mounts)


def _commit(fd: int, size: int) -> mmap.mmap:
    """Gives the object its size and all of its memory, now, or fails now: nobody gets a SIGBUS later. Returns it mapped."""
    free = os.statvfs(SHM_DIR)
    room = min(free.f_bavail * free.f_frsize, _memory_available())
    try:
        if size > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(fd, size)
        memory = _mmap(fd, size)
        if _grants_huge_pages_when_asked():  # only to whoever touches a mapping that has asked
            memory.madvise(MADV_POPULATE_WRITE)
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFAULT):
            raise
        raise ArenaError(
            errno.ENOSPC,
            f"too little shared memory: the arena needs {format_size(size)}, and {SHM_DIR} has {format_size(max(room, 0))} to give. Make "
            f"the arena smaller, or the place larger: as root `mount -o remount,size={(size >> 20) + 64}M {SHM_DIR}`; in a container "
            "`docker run --shm-size=…`; in Kubernetes mount an emptyDir with `medium: Memory` there",
        ) from None
    return memory


def _memory_available() -> int:
    """What the machine, or the container, can give without killing anybody for it."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    room = int(fields["MemAvailable"].split()[0]) * 1024
    own = next((line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), "/")
    group = Path("/sys/fs/cgroup") / own.lstrip("/")
    for directory in (group, *group.parents):
        try:
            limit = (directory / "memory.max").read_text().strip()
            if limit != "max":
                room = min(room, int(limit) - int((directory / "memory.current").read_text()))
        except (OSError, ValueError):
            continue  # the root has none, and nor has what is not a control group
    return room
