"""Every invariant of an arena, looked at from outside: of one that a broker serves, or of what a killed one left.

Owns the order and the repetition of the looks, and who is asked. Never writes: memory and files are opened for reading, no lock is
taken, nobody is sent a word. What is wrong is told as `Finding`s:

- **damaged**: it cannot have come about by the protocol, or it stays so although a broker runs. Nobody puts it right.
- **pending**: what somebody left on his way who died, or is stopped: the broker puts it right, or the next one does.

An arena moves while it is read. Where nobody can be at work one look is enough; otherwise what looks wrong is looked at again, LOOKS
times over some two seconds, and told only if it was there each time, in the same words and with the same figures.

At every instant it holds that
- the header is whole, its numbers follow from each other, areas and types lie side by side, guests within one area and one each;
- a slot word has a state, is DIRTY only on a nursery page, and has a payload only where that says something; a word of a living type
  is not closed; the nursery page that it names has its key, and is published or granted;
- a nursery page is nobody's but for whom it is granted, and no buffer's; a page in no area holds nothing;
- a place in a file is claimed, and a page granted, by clients that there are; names are one guest's; what is kept has one;
- a living type has the file that its life began with, no longer than its slots; a clean value is in it, and fits its checksum, and the
  page in memory.

Only at rest, when no operation of the broker is under way, it holds that
- a slot of no living type is closed, or as it was made;
- a page in an area has its guest's number, a buffer's is in the state BUFFER, none is granted (but for the one that is announced);
- gauges are what they count; nothing is announced; each guest has a holder that there is; no claim is the broker's.

Whatever of the second list is not so when no broker runs, is *pending*. The broker may be stopped (SIGSTOP) in the middle of something:
that is told as pending, too.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from gcma_shm import layout
from gcma_shm._check_files import check_files
from gcma_shm._check_tables import (
    check_areas,
    check_clients,
    check_guests,
    check_types,
    check_words_of_header,
)
from gcma_shm._check_view import SUSPECTS_MAX, Finding, View
from gcma_shm._check_words import check_gauges, check_pages, check_slots
from gcma_shm._core import Survey
from gcma_shm.areas import Area
from gcma_shm.entries import word
from gcma_shm.errors import ArenaError
from gcma_shm.layout import Geometry
from gcma_shm.presence import Presence
from gcma_shm.standing import Standing

SHM_DIR = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory, see shm_overview(7)
LOOKS = 9  # at what looks wrong in an arena that may be moving
NAP_S = 0.01  # before the second look; before each further one twice as long


@dataclass(frozen=True)
class Report:
    """What was found. `figures`: what was looked at; `unsettled`: what moved too much to be told."""

    findings: list[Finding]
    figures: dict[str, int] = field(default_factory=dict)
    unsettled: list[str] = field(default_factory=list)
    served: bool = False  # by a broker that runs
    stopped: bool = False  # its broker lives, and is stopped
    moving: bool = False  # a broker or clients may be at work in it
    looks: int = 1

    @property
    def damaged(self) -> list[Finding]:
        """What nobody puts right."""
        return [finding for finding in self.findings if not finding.pending]

    @property
    def pending(self) -> list[Finding]:
        """What a broker puts right."""
        return [finding for finding in self.findings if finding.pending]


class Inspected:
    """An arena that is mapped for reading. To be closed."""

    def __init__(self, name: str, served: bool = True) -> None:
        """Raises ArenaError when there is none, it is another user's, no arena, or of another layout version; `served`: or no broker
        came so far as to serve it.
        """
        self.fd = _open(name)
        self._map = None
        self.memory = memoryview(b"")
        try:
            self.size = os.fstat(self.fd).st_size
            if self.size:
                self._map = mmap.mmap(self.fd, self.size, prot=mmap.PROT_READ)
                self.memory = memoryview(self._map)
            _refuse_others(name, self.memory, served)
        except BaseException:
            self.close()
            raise

    def read_header(self) -> tuple[Geometry, list[Area]]:
        """Raises ArenaError: it is damaged."""
        geometry, areas, _ = layout.read_header(self.memory, self.size)
        return geometry, areas

    def standing(self, geometry: Geometry) -> Standing:
        """Who is there."""
        return Standing(self.memory, geometry, Presence(os.dup(self.fd), geometry))

    def spill_dir(self) -> Path | None:
        """Where the header says that the spill files are; None: it says nothing that could be."""
        found = bytes(self.memory[layout.SPILL_DIR_AT : layout.HEADER_BYTES]).partition(b"\0")[0]
        return Path(os.fsdecode(found)) if found.startswith(b"/") else None

    def close(self) -> None:
        """Nothing of it is used any more."""
        self.memory.release()
        if self._map is not None:
            self._map.close()
        os.close(self.fd)


def geometry_faults(found: Geometry) -> list[str]:
    """Where the header's numbers do not follow from its sizes, as `layout.plan` computes them."""
    try:
        policy, spill_io = layout.POLICIES[found.policy], layout.SPILL_IO[found.spill_io]
        planned, _ = layout.plan(found.size, found.page_size, None, found.slots, found.clients_max, policy, spill_io)
    except (ArenaError, ValueError) as error:
        return [f"no arena can have these sizes: {error}"]
    grants = min(found.nursery_pages // 2 // (found.clients_max + 1), layout.GRANTS_MAX)
    expected = replace(planned, nursery_pages=found.nursery_pages, grants_max=grants)
    faults = [
        f"{name} is {value}, expected {getattr(expected, name)} in an arena of this size"
        for name, value in asdict(found).items()
        if value != getattr(expected, name)
    ]
    if not layout.NURSERY_PAGES_MIN <= found.nursery_pages < found.pages:
        faults.append(f"a nursery of {found.nursery_pages} pages, of {found.pages} in all")
    return faults


def check(name: str, values: bool = False) -> Report:
    """Looks at the arena of that name. `values`: also at every value in memory and in the spill files.

    Raises ArenaError for what cannot be checked: there is no such arena, it is another user's, no arena at all, or of another layout
    version.
    """
    inspected = Inspected(name)
    try:
        return _check(inspected, values)
    finally:
        inspected.close()


def _check(inspected: Inspected, values: bool) -> Report:
    def look(before: Report | None) -> Report:
        try:
            geometry, areas = inspected.read_header()
        except ArenaError as error:  # or a broker was about to write an area's entry
            return Report([Finding("header", error.strerror or str(error))], moving=True)
        faults = geometry_faults(geometry)
        if faults:  # the tables are not where it says
            return Report([Finding("header", text) for text in faults])
        directory = inspected.spill_dir()
        again = before is None or any(finding.kind == "value" for finding in before.findings)
        report = look_once(inspected.memory, geometry, areas, inspected.standing(geometry), directory, values and again)
        if directory is None:
            report.findings.append(Finding("header", "it does not say where the spill files are"))
        return report

    return repeated(look)


def repeated(look: Callable[[Report | None], Report]) -> Report:
    """What is found each time, if anything is found the first time and the arena may be moving. Each look is told what is left."""
    report = look(None)
    nap = NAP_S
    while report.findings and report.moving and report.looks < LOOKS:
        time.sleep(nap)
        nap *= 2
        again = look(report)
        found = {(finding.kind, finding.text): finding for finding in again.findings}
        kept = [found[key] for finding in report.findings if (key := (finding.kind, finding.text)) in found]
        report = replace(report, findings=kept, unsettled=again.unsettled, looks=report.looks + 1)
    return report


def look_once(
    memory: memoryview,
    geometry: Geometry,
    areas: list[Area],
    standing: Standing,
    spill_dir: Path | None = None,
    values: bool = False,
) -> Report:
    """One look. Of an arena that moves, some of what is found may have been under way. Its geometry must be without faults."""
    view = View.of(memory, geometry, areas, standing, Survey(memory, geometry, SUSPECTS_MAX))
    for examine in (
        check_words_of_header, check_areas, check_types, check_clients, check_guests, check_slots, check_pages, check_gauges,
    ):  # fmt: skip
        examine(view)
    if spill_dir is not None:
        check_files(view, spill_dir, values)
    has_broker = standing.is_served()
    moving = has_broker or any(standing.lives(client) is not False for client in view.clients.values())
    stopped = has_broker and standing.is_stopped()
    return Report(view.findings, view.figures, view.unsettled, view.served, stopped, moving)


def _open(name: str) -> int:
    path = SHM_DIR / name.removeprefix("/")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ArenaError(errno.ENOENT, f"there is no arena {name} in this machine's or container's {SHM_DIR}") from None
    except PermissionError:
        raise ArenaError(errno.EACCES, f"the arena {name} belongs to another user") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ArenaError(f"{path} is no plain file")
    return fd


def _refuse_others(name: str, memory: memoryview, served: bool) -> None:
    if memory[:8] != layout.MAGIC or len(memory) < layout.EPOCH_AT + 8:
        raise ArenaError(f"{name} is not an arena: it begins with {bytes(memory[:8])!r}, expected {layout.MAGIC!r}")
    version = int.from_bytes(memory[8:12], "little")
    if version != layout.LAYOUT_VERSION:
        raise ArenaError(
            f"{name} is an arena of layout version {version}: this gcma-shm knows version {layout.LAYOUT_VERSION}; use the same release"
        )
    if served and not word(memory, layout.EPOCH_AT):
        raise ArenaError(
            f"{name} is an arena that no broker has served yet: one is making it, or was killed before it was made"
        )
