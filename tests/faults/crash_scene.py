"""What a scene of crashes.py is. It is made ready up to its `yield`; the broker dies in what comes behind.

What may have been done by then, or not, a scene says before it asks for it (`w.areas`, `w.quotas`, `w.values`, `w.after_death`); everything else is as
the clients of crash_clients.py know it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

from tests.faults.crash_world import World

Play = Generator[None, None, None]
Scene = Callable[[World], Play]
SCENES: dict[str, Scene] = {}


def scene(play: Scene) -> Scene:
    """What it does up to its `yield` makes it ready; the broker is killed in what comes behind."""
    SCENES[play.__name__] = play
    return play


def cached(w: World) -> None:
    """Two types with values in nursery, areas and files."""
    w.declare(0, 24, "through")
    w.declare(1, 24, "behind")
    for offset in range(24):
        for type_ in range(2):
            w.first.store(type_, offset)
            w.second.load(type_, offset)
        if offset % 12 == 11:
            w.broker.call("sweep")


def more(w: World, count: int = 6) -> None:
    """So many new values that were read, and values that were overwritten, until the next sweep has work to do."""
    for n in range(count):
        w.first.store(n % 2, n // 2)
        w.second.load(n % 2, n // 2)
    for _ in range(count, 26):
        w.first.store(0, 23)
