"""What must be true of the spill files, and of the values in them. Owned by check.py; see there for what holds when."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from gcma_shm._check_view import View
from gcma_shm._check_words import CHUNK
from gcma_shm.entries import TypeEntry

_OF_VALUES = {
    "file-differs": "its place in the file does not fit its checksum",
    "memory-differs": "page {page} in memory is not what is in the file",
    "file-unreadable": "its place in the file cannot be read: {error}",
    "file-keeps": "its place in the file holds something that it has no need of, and does not say so",
}


def check_files(view: View, directory: Path, values: bool) -> None:
    """One file for each living type, and none else, as large as the slots need whose value is in it; `values`: all that is in them."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        view.always("spill file", f"the spill directory {directory} cannot be opened: {error.strerror}")
        return
    try:
        for type_ in view.types:
            _check_file(view, fd, type_, values)
        strays = sorted(set(os.listdir(fd)) - {type_.name for type_ in view.types})  # noqa: PTH208 - of a descriptor
        for name in strays:
            view.pending("spill file", f"{name}: of no living type")
    finally:
        os.close(fd)


def _check_file(view: View, directory: int, type_: TypeEntry, values: bool) -> None:
    try:
        fd = os.open(type_.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    except OSError as error:
        view.always("spill file", f"{type_.name}, of a living type, cannot be opened: {error.strerror}")
        return
    try:
        found, size = os.fstat(fd), view.geometry.page_size
        needed = view.clean_ends.get(type_.number, 0) * size  # counted before: the file only grows
        if not stat.S_ISREG(found.st_mode):
            view.always("spill file", f"{type_.name} is no plain file")
            return
        if (found.st_ino, found.st_dev) != (type_.inode, type_.device):
            view.always("spill file", f"{type_.name} is not the file that its life began with")
            return
        if found.st_size < needed:
            view.always("spill file", f"{type_.name} has {found.st_size} bytes, its values need {needed}")
        if found.st_size > type_.slots * size:
            view.always("spill file", f"{type_.name} has {found.st_size} bytes, its slots {type_.slots * size}")
        view.add("spill_files", 1)
        if values:
            _check_values(view, type_, fd)
    finally:
        os.close(fd)


def _check_values(view: View, type_: TypeEntry, fd: int) -> None:
    moving = 0
    for first in range(type_.base, type_.end, CHUNK):
        count = min(CHUNK, type_.end - first)
        looked, moved, total, suspects = view.survey.pages(type_.number, type_.base, first, count, fd)
        view.add("value_bytes", looked)
        moving += moved
        for why, slot, word, _, number in suspects:
            words = _OF_VALUES[why].format(page=word & 0xFFFFFFFF, error=os.strerror(number))
            view.always("value", f"slot {slot - type_.base} of type {type_.number}, word {word:#x}: {words}")
        view.note_more(total - len(suspects))
    if moving:
        view.unsettled.append(f"type {type_.number}: {moving} values that never stood still")
