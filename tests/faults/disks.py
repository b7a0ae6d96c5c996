"""Real faults of real files: small file systems that fill up or lose their disk, and files that nobody may change.

A small file system is mounted below the test's directory, which needs root; where that is not permitted the test is skipped, with the reason.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcma_shm.broker.direct import refuse_directory
from gcma_shm.errors import ArenaError
from tests.processes import eventually

_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = 0x80086601, 0x40086602  # linux/fs.h
_FS_IMMUTABLE = 0x10
CHUNK = 4096
UMOUNT_S = 10.0  # how long what is still open may take to be closed


def needs_direct(directory: Path, page_size: int = 4096) -> None:
    """Skips the test where files of `directory` cannot be read and written past the page cache: on a tmpfs, say, as /tmp is in Debian 13."""
    try:
        refuse_directory(directory, page_size)
    except ArenaError as error:
        pytest.skip(f"{error.strerror}; --basetemp chooses another directory")


class Disk:
    """A small file system; `path` is where it is mounted."""

    def __init__(self, path: Path, image: Path | None) -> None:
        self.path = path
        self._image = image
        self._ballast = path / "ballast"

    def fill(self) -> None:
        """Leaves not one free block."""
        with self._ballast.open("ab", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(CHUNK))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    return

    def relieve(self) -> None:
        """Makes room again."""
        self._ballast.unlink()

    @contextlib.contextmanager
    def gone(self, *files: Path) -> Iterator[None]:
        """Reads of what is not in memory fail with EIO meanwhile; these files are not. Of an ext4 file system alone."""
        assert self._image is not None
        for file in files:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        whole = self._image.read_bytes()
        os.truncate(self._image, 0)
        try:
            yield
        finally:
            self._image.write_bytes(whole)


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system of our own: {' '.join(map(str, command))}: {done.stderr.strip()}")


@contextlib.contextmanager
def small_disk(kind: str, directory: Path, nbytes: int) -> Iterator[Disk]:
    """`kind`: "tmpfs", one that is not /dev/shm; or "ext4", in a file."""
    if os.geteuid():
        pytest.skip("mounting a file system of our own needs root")
    path, image = directory / "disk", None
    path.mkdir()
    if kind == "tmpfs":
        _run("mount", "-t", "tmpfs", "-o", f"size={nbytes},mode=700", "tmpfs", path)
    else:
        image = directory / "image"
        with image.open("wb") as file:
            file.truncate(nbytes)
        _run("mkfs.ext4", "-q", "-b", "4096", "-m", "0", "-O", "^has_journal", image)
        _run("mount", "-o", "loop", image, path)
    try:
        yield Disk(path, image)
    finally:

        def unmounted() -> bool:  # closed clients keep files open until they are collected, brokers until they end
            gc.collect()
            return subprocess.run(["umount", path], capture_output=True, check=False).returncode == 0

        if not eventually(unmounted, UMOUNT_S):  # a test that failed: what it had open lives on in its traceback
            _run("umount", "--lazy", path)
        path.rmdir()


@contextlib.contextmanager
def immutable(path: Path) -> Iterator[None]:
    """Nobody can write this file, or make one in this directory, meanwhile, not even who has it open (EPERM)."""
    if os.geteuid():
        pytest.skip("making a file immutable needs root")
    fd = os.open(path, os.O_RDONLY)

    def flags(change: int) -> None:
        (found,) = struct.unpack("L", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(struct.calcsize("L"))))
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("L", found & ~_FS_IMMUTABLE | change))

    try:
        try:
            flags(_FS_IMMUTABLE)
        except OSError as error:
            pytest.skip(f"this file system has no immutable files: {error}")
        try:
            yield
        finally:
            flags(0)
    finally:
        os.close(fd)
