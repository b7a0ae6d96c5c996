"""Swap types: which are declared, their slots, and the spill file of each life.

Runs on one worker thread, one job after another: declaring and ending sweep all words of a type, which is no work for
the control loop. Spill files are laid sparse, slot n at n × page size, named `<type>.<life>`, mode 0600, one per life.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from pathlib import Path

from gcma_shm import layout
from gcma_shm._core import Plane, Slots
from gcma_shm.broker.direct import why_not
from gcma_shm.broker.extents import Extents
from gcma_shm.endpoint import private_dir
from gcma_shm.errors import ArenaError, Closed, NoSuchType, SpillError

log = logging.getLogger(__name__)

STORE_TIMEOUT_S = 3.0  # of a store by message; less than a client waits for its reply by default


class TypeRegistry:
    """The types of one arena."""

    def __init__(self, plane: Plane, spill_dir: Path) -> None:
        self._plane = plane
        self._geometry = plane.geometry
        self._spill_dir = spill_dir
        self._extents = Extents(0, self._geometry.slots)
        self._living: dict[int, Slots] = {}
        self._base: dict[int, int] = {}  # where a living type's slots begin in the slot table

    def declare(self, type_: int, slots: int, write: str, share: int = layout.SHARE_WHOLE) -> Slots:
        """Begins a life of `type_`, or finds the one that was declared alike. Raises ValueError, SpillError."""
        living = self._living.get(type_)
        if living is not None:
            if (living.slots, living.write_through, living.share) != (slots, write == "through", share):
                raise ValueError(
                    f"type {type_} is declared with {living.slots} slots, write={'through' if living.write_through else 'behind'!r}, "
                    f"share={living.share}; asked for {slots} slots, write={write!r}, share={share}. Open it as declared, or "
                    "invalidate_area() it first"
                )
            return living
        base = self._extents.choose(slots)
        if base is None:
            raise ValueError(
                f"type {type_} of {slots} slots: the arena's slot table of {self._geometry.slots} has no {slots} in a row left "
                f"(at most {self._extents.largest}); start the broker with more --slots"
            )
        life = self._plane.read(self._geometry.type_at(type_) + layout.TYPE_LIFE_AT) + 1
        self._make_file(type_, life)
        self._extents.take(base, slots)
        self._plane.begin_type(type_, base, slots, 0 if write == "through" else layout.WRITE_BEHIND, share)
        try:
            living = self._plane.slots(type_, life, STORE_TIMEOUT_S)
        except BaseException:  # out of descriptors, say
            self._close(type_, life, base, slots)
            raise
        self._living[type_], self._base[type_] = living, base
        return living

    def restore(self) -> None:
        """Takes in the living types of an arena that another broker left, and finishes the end of the others.

        A type whose file has gone is ended: what of it is in memory would be all that is left. Raises ArenaError when the table
        contradicts itself.
        """
        for type_ in range(self._geometry.types_max):
            at = self._geometry.type_at(type_)
            life, base, slots = (
                self._plane.read(at + offset)
                for offset in (layout.TYPE_LIFE_AT, layout.TYPE_BASE_AT, layout.TYPE_SLOTS_AT)
            )
            if not life & 1:
                continue
            try:
                self._extents.take(base, slots)
            except ValueError:
                raise ArenaError(
                    f"the arena's table of types is damaged: type {type_} has slots {base} to {base + slots}, which are "
                    "another's or none"
                ) from None
            try:
                self._living[type_], self._base[type_] = self._plane.slots(type_, life, STORE_TIMEOUT_S), base
            except SpillError as error:
                if error.errno not in (
                    errno.ENOENT,
                    errno.ESTALE,
                ):  # out of descriptors, say: no reason to lose anything
                    raise ArenaError(
                        error.errno,
                        f"the spill file of type {type_} cannot be opened, and nothing was changed: {error}",
                    ) from error
                log.error("type %d ends, and what was stored there is lost: its spill file: %s", type_, error)
                self._close(type_, life, base, slots)
        for base, slots in self._extents.ranges():
            self._plane.close_words(base, slots)
        self._remove_stray_files()

    def _remove_stray_files(self) -> None:
        """After the words of ended types are closed: until then a load may be reading there."""
        living = {self._file(type_, slots.life) for type_, slots in self._living.items()}
        for path in self._spill_dir.iterdir():
            if path not in living:
                _remove_stray(path)

    def __len__(self) -> int:
        """How many types live."""
        return len(self._living)

    def end(self, type_: int, life: int) -> None:
        """Ends that life: every handle on it is refused, its file is gone. Raises Closed, NoSuchType."""
        slots = self.find(type_, life)
        del self._living[type_]
        self._close(type_, life, self._base.pop(type_), slots.slots)
        # Emptied, too: whoever still has it open must not keep the disk full. Its words are closed, so nobody reads it. By our own
        # descriptor: what has its name may be anybody's.
        slots.empty_file()

    def _close(self, type_: int, life: int, base: int, slots: int) -> None:
        self._plane.end_type(type_, base, slots)
        self._extents.give(base, slots)
        with contextlib.suppress(OSError):
            self._file(type_, life).unlink()

    def end_all(self) -> None:
        """Ends every life, so that nobody goes on alone in an arena without a broker."""
        for type_, slots in list(self._living.items()):
            self.end(type_, slots.life)

    def find(self, type_: int, life: int) -> Slots:
        """The handle on that life. Also for other threads than this one's: one look-up. Raises NoSuchType, Closed."""
        slots = self._living.get(type_)
        if slots is None:
            if self._plane.read(self._geometry.type_at(type_) + layout.TYPE_LIFE_AT) >= life:
                raise Closed(
                    f"the life of type {type_} that this handle opened has ended; declare it again with client.swap()"
                )
            raise NoSuchType(f"type {type_} is not declared; declare it with client.swap()")
        if slots.life != life:
            raise Closed(
                f"the life of type {type_} that this handle opened has ended; declare it again with client.swap()"
            )
        return slots

    def describe(self) -> dict[int, dict[str, int | str]]:
        """The declared types, for statistics."""
        return {
            type_: {
                "slots": slots.slots,
                "life": slots.life,
                "write": "through" if slots.write_through else "behind",
                "share": slots.share,
            }
            for type_, slots in sorted(self._living.items())
        }

    def _file(self, type_: int, life: int) -> Path:
        return self._spill_dir / f"{type_:03}.{life}"

    def _make_file(self, type_: int, life: int) -> None:
        path = self._file(type_, life)
        try:
            if not self._spill_dir.exists():  # somebody has cleared the cache directory
                private_dir(self._spill_dir)
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise SpillError(
                error.errno or errno.EIO, f"the spill file {path} cannot be made: {error.strerror}"
            ) from error
        if layout.SPILL_IO[self._geometry.spill_io] == "direct":
            try:
                self._ask_for_direct(type_, path)  # the directory may have been made anew, elsewhere
            except BaseException:  # or the next declaration finds a file in its place
                with contextlib.suppress(OSError):
                    path.unlink()
                raise

    def _ask_for_direct(self, type_: int, path: Path) -> None:
        try:
            why = why_not(path, self._geometry.page_size)
        except OSError as error:  # out of descriptors, say
            raise SpillError(
                error.errno or errno.EIO,
                f"type {type_} cannot begin: whether {path} takes --spill-io direct cannot be asked: {error.strerror}",
            ) from error
        if why is not None:
            raise SpillError(errno.EINVAL, f"type {type_} cannot begin: --spill-io direct: {why}")


def _remove_stray(path: Path) -> None:
    """Emptied first, as a client of the life that has ended may have it open; but nothing of what it may lead to."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode) and os.fstat(fd).st_nlink == 1:
                os.ftruncate(fd, 0)
        finally:
            os.close(fd)
    with contextlib.suppress(OSError):
        path.unlink()
