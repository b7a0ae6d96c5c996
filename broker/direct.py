"""Whether files can be read and written past the page cache, a page at a time: what `--spill-io direct` needs.

Asks the file itself, by the kernel's word on its alignment (statx, Linux 6.1) and by a write. Decides nothing else, and keeps nothing.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from pathlib import Path

from gcma_shm._core import direct_alignment
from gcma_shm.errors import ArenaError
from gcma_shm.sizes import format_size

_MOUNTS = Path("/proc/self/mountinfo")
_IN_MEMORY = ("tmpfs", "ramfs", "hugetlbfs")  # newer kernels take O_DIRECT there, and copy from memory to memory
_OTHERWISE = "choose a --spill-dir on a disk's file system, or --spill-io uncached, which needs nothing of it"


def refuse_directory(directory: Path, page_size: int) -> None:
    """Raises ArenaError, which says what to do, where files of `directory` cannot be used so."""
    probe = directory / "probe"
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    try:
        why = why_not(probe, page_size)
    except OSError as error:  # out of descriptors, say
        raise ArenaError(
            error.errno or errno.EIO,
            f"whether files of {directory} take --spill-io direct cannot be asked: {error.strerror}",
        ) from error
    finally:
        probe.unlink()
    if why is not None:
        raise ArenaError(errno.EINVAL, f"--spill-io direct: {why}")


def why_not(file: Path, page_size: int) -> str | None:
    """What is in the way for this empty file, and what to do; None: nothing. Raises OSError where it cannot be asked."""
    kind = _file_system(file)
    if kind in _IN_MEMORY:
        return f"{file.parent} is on {kind}, which is memory; {_OTHERWISE}"
    try:
        fd = os.open(file, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return f"the file system of {file.parent} ({kind}) does not take O_DIRECT; {_OTHERWISE}"
    try:
        return _misaligned(fd, page_size) or _refused(fd, page_size, f"{file.parent} ({kind})")
    finally:
        os.close(fd)


def _misaligned(fd: int, page_size: int) -> str | None:
    told = direct_alignment(fd)
    if told is None:
        return None
    memory, offset = told
    if not offset:
        return f"the kernel does not pass the page cache by for files there; {_OTHERWISE}"
    if page_size % offset or memory > mmap.PAGESIZE:
        needed = max(offset, memory)
        return (
            f"files there are written in pieces of {format_size(needed)} past the page cache, a page has {format_size(page_size)}; "
            f"choose --page-size {format_size(needed).replace(' ', '').removesuffix('iB')} or larger, or --spill-io uncached"
        )
    return None


def _refused(fd: int, page_size: int, where: str) -> str | None:
    with contextlib.closing(mmap.mmap(-1, page_size)) as page:  # aligned as the arena's pages are
        try:
            os.pwrite(fd, page, 0)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return f"a page of {format_size(page_size)} cannot be written past the page cache in {where}: {error.strerror}; {_OTHERWISE}"
            return None  # a full disk, say: every store will tell
        os.ftruncate(fd, 0)
    return None


def _file_system(file: Path) -> str:
    """Its name, as mounted; "unknown file system" where nobody tells."""
    device = file.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in _MOUNTS.read_text().splitlines():
            words = line.split()
            if words[2] == wanted:
                return words[words.index("-") + 1]
    return "unknown file system"
