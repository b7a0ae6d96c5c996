"""One look at an arena: what its tables said, who lived, and what was found wrong. Owned by check.py; see there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from gcma_shm import layout
from gcma_shm._core import Survey
from gcma_shm.areas import DRAINED, LENT, Area
from gcma_shm.entries import ClientEntry, Guest, TypeEntry, read_clients, read_guests, read_types, word
from gcma_shm.layout import Geometry
from gcma_shm.standing import Standing

SUSPECTS_MAX = 1000  # of a kind that one look lists; all are counted


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be. `kind`: what it is about; `pending`: a broker puts it right by itself, or the next one
    does. `more`: how many alike are not told one by one.
    """

    kind: str
    text: str
    pending: bool = False
    more: int = 0


@dataclass
class View:
    """The tables as they were a moment ago, and the arena's memory. `served`: a broker lives, and runs."""

    memory: memoryview
    geometry: Geometry
    areas: list[Area]
    standing: Standing
    survey: Survey
    served: bool
    types: list[TypeEntry] = field(default_factory=list)
    clients: dict[int, ClientEntry] = field(default_factory=dict)
    guests: list[Guest] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=dict)
    clean_ends: dict[int, int] = field(default_factory=dict)  # by type: behind the last slot whose value is in the file
    unsettled: list[str] = field(default_factory=list)  # what moved too much to be told

    @classmethod
    def of(cls, memory: memoryview, geometry: Geometry, areas: list[Area], standing: Standing, survey: Survey) -> View:
        """Reads the tables."""
        served = standing.is_served() and not standing.is_stopped()
        # Guests before clients: a holder that comes meanwhile is found. One that goes has another look to be gone in.
        guests, types = read_guests(memory, geometry), read_types(memory, geometry)
        return cls(
            memory, geometry, areas, standing, survey, served, types, read_clients(memory, geometry), guests
        )  # fmt: skip

    def word(self, at: int) -> int:
        """The word at byte `at` just now."""
        return word(self.memory, at)

    def always(self, kind: str, text: str, more: int = 0) -> None:
        """Wrong at any instant."""
        self.findings.append(Finding(kind, text, False, more))

    def at_rest(self, kind: str, text: str, more: int = 0) -> None:
        """Wrong once nothing is under way: where no broker runs, the next one puts it right."""
        self.findings.append(Finding(kind, text, not self.served, more))

    def pending(self, kind: str, text: str, more: int = 0) -> None:
        """Not wrong: to be put right."""
        self.findings.append(Finding(kind, text, True, more))

    def note_more(self, count: int) -> None:
        """So many more like what was told last."""
        if count > 0 and self.findings:
            last = self.findings[-1]
            self.findings[-1] = replace(last, more=last.more + count)

    def add(self, figure: str, count: int) -> None:
        """Counts what was looked at."""
        self.figures[figure] = self.figures.get(figure, 0) + count

    def of_whom(self, kind: str, client: int, what: str, more: int = 0) -> None:
        """Judges what is in the name of `client`: nothing is wrong as long as it lives."""
        if client == layout.BROKER:
            if not self.served:
                self.pending(kind, f"{what} the broker that has died, or is stopped", more)
        elif not layout.BROKER < client <= self.geometry.clients_max:
            self.always(kind, f"{what} client {client}, which cannot be", more)
        elif client not in self.clients:
            self.always(kind, f"{what} client {client}, which is not there", more)
        elif self.standing.lives(self.clients[client]) is False:
            self.pending(kind, f"{what} client {client}, which has died", more)

    def lends(self, area: Area) -> bool:
        """Whether what no guest has there is lent to the cache."""
        return bool(area.policy & LENT) and not area.state & DRAINED
