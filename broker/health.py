"""Whether the spill files take their pages: what `stats` and the log tell about it.

Pure. Decides from what each round of retries has left when the broker is degraded and when it is no more; writes no log, takes no clock.
The reclaim thread notes, the control loop reads: one reference, replaced as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class State:
    """What was true when the last round of retries had ended."""

    since: float  # seconds since the epoch
    unwritable: Mapping[int, int] = field(default_factory=dict)  # pages that the file of each type refuses
    errno: int = 0  # of the last refusal

    @property
    def pages(self) -> int:
        """How many pages are pinned in the nursery so."""
        return sum(self.unwritable.values())

    @property
    def why(self) -> str:
        """For people; empty when all is well."""
        if not self.unwritable:
            return ""
        types = ", ".join(str(type_) for type_ in sorted(self.unwritable))
        return f"the spill files of types {types} do not take their pages: {os.strerror(self.errno)}"


class Health:
    """The state now, and the two moments that are worth a line in the log."""

    def __init__(self, now: float) -> None:
        self.state = State(now)

    def note(self, unwritable: Mapping[int, int], error: int, now: float) -> str | None:
        """Takes what a round has left, and the errno of the last refusal; returns what to log when health began or ceased to be degraded."""
        before = self.state
        if not unwritable:
            if not before.unwritable:
                return None
            self.state = State(now)
            return f"healthy again after {now - before.since:.1f} s: every spill file takes its pages"
        self.state = State(before.since if before.unwritable else now, dict(unwritable), error)
        if before.unwritable:
            return None
        return f"degraded: {self.state.why}; {self.state.pages} pages stay in memory and are tried again"

    def describe(self) -> dict[str, Any]:
        """For statistics; docs/protocol.md lists the keys."""
        state = self.state
        return {
            "state": "degraded" if state.unwritable else "ok",
            "why": state.why,
            "since": state.since,
            "pages_unwritable": state.pages,
            "types": {str(type_): pages for type_, pages in sorted(state.unwritable.items())},
            "errno": state.errno,
        }
