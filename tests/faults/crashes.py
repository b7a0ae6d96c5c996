"""A broker killed before each single change that it makes in the arena, in each thing that it does, and its successor put to the proof.

Runs in a build of the extension with a hook at every atomic operation (steps.h): `python -m tests.faults.crashes [SCENE …]`, or with
`--fault FAULT`, one of crash_faults.py: then the proof has to fail. `--dense N`: of what has more than N changes only the first N and, by
chance, some of the others, the fewer the farther on; 0: all.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
import time
from pathlib import Path

from gcma_shm import layout
from gcma_shm.arena import remove_dead
from gcma_shm.errors import ArenaError
from tests.faults import crash_guests, crash_kept, crash_pages  # noqa: F401 - the scenes
from tests.faults.crash_broker import Broker, BrokerDied, Site
from tests.faults.crash_clients import PAGE
from tests.faults.crash_faults import FAULTS
from tests.faults.crash_scene import SCENES
from tests.faults.crash_world import AREAS, World

NURSERY = 32
SLOTS = 80
CLIENTS = 8
TAKEOVER_CHANGES = 100  # about
# At which share of a scene's changes the broker dies whose successor dies at each of its own.
TAKEOVERS = {
    "alloc": (0.6,),
    "release": (0.5, 0.9),
    "lend_after_a_dead_claimer": (0.5,),
    "share_a_claim_and_leave_it": (0.8,),
    "bury": (0.3, 0.8),
    "inherit": (0.5,),
    "keep_until_a_process_ends": (0.6,),
    "unlink_the_last": (0.5,),
    "a_keeper_ends": (0.5,),
    "drain_parts": (0.3,),
    "invalidate_area": (0.5,),
    "swap_init": (0.5,),
    "promote": (0.3,),
    "clean": (0.5,),
    "punch": (0.5,),
    "busy_allocations": (0.5,),
}


class Steps:
    """Which changes a broker dies at."""

    def __init__(self, dense: int, seed: int) -> None:
        self._dense = dense
        self._random = random.Random(seed)

    def after(self, step: int) -> int:
        """The next one."""
        gap = step // self._dense if self._dense else 1
        return step + (self._random.randint(1, 2 * gap - 1) if gap > 1 else 1)


class Crashes:
    """Scene after scene, each once for each change that the broker makes in it, and once more to its end."""

    def __init__(self, world: World, steps: Steps) -> None:
        self._world = world
        self._steps = steps
        self._counts: dict[str, int] = {}  # of changes, by scene
        self.deaths = 0

    def play(self, name: str) -> None:
        begun = time.monotonic()
        step, deaths = 1, 0
        while self._dies_at(name, step):
            step = self._steps.after(step)
            deaths += 1
        self._counts[name] = step
        self.deaths += deaths
        print(f"{name}: {deaths} deaths, {time.monotonic() - begun:.1f} s", flush=True)

    def play_takeover(self, name: str, share: float) -> None:
        """The broker dies in the scene once so far on its way, and the next one at each change of its takeover."""
        begun = time.monotonic()
        at = max(int(self._changes(name) * share), 1)
        step, deaths = 1, 0
        while self._dies_at(name, at, step):
            step = self._steps.after(step)
            deaths += 1
        self.deaths += deaths
        print(f"takeover of {name} at {at}: {deaths} deaths, {time.monotonic() - begun:.1f} s", flush=True)

    def play_by_chance(self, rounds: int, seed: int) -> None:
        """Scenes that were played, cut off anywhere, and the takeover, too."""
        begun, dice = time.monotonic(), random.Random(seed)
        for _ in range(rounds):
            name = dice.choice(list(self._counts))
            self.deaths += self._dies_at(name, dice.randint(1, self._counts[name]), dice.randint(1, TAKEOVER_CHANGES))
        print(f"by chance: {rounds} rounds, {time.monotonic() - begun:.1f} s", flush=True)

    def _changes(self, name: str) -> int:
        w = self._world
        play = SCENES[name](w)
        next(play)
        w.broker.call("arm", 1 << 40)
        with contextlib.suppress(StopIteration):
            next(play)
        changes: int = w.broker.call("disarm")
        if w.is_restless:
            w.take_over()
        w.after_takeover()
        w.prove()
        w.clear()
        return changes

    def _dies_at(self, name: str, step: int, next_step: int = 0) -> bool:
        """Whether the scene, or with a `next_step` the takeover, has such a step."""
        w = self._world
        try:
            play = SCENES[name](w)
            next(play)
            w.broker.call("arm", step)
            dies = False
            try:
                next(play)
            except StopIteration:
                w.broker.call("disarm")
                if w.is_restless:
                    w.take_over()
            except BrokerDied:
                dies = True
                w.after_death()
                if next_step:
                    dies = self._next_dies(next_step)
                w.take_over()
            w.after_takeover()
            w.prove()
            w.clear()
        except Exception as error:
            error.add_note(f"{name}, killed at change {step}, the next one at {next_step}")
            raise
        return dies

    def _next_dies(self, step: int) -> bool:
        try:
            self._world.take_over(step)
        except BrokerDied:
            return True
        return False


def play_start(place: Site, steps: Steps) -> int:
    """The broker that makes the arena dies at each change of its start; returns how many there were."""
    begun, step, deaths, dies = time.monotonic(), 1, 0, True
    while dies:
        try:
            Broker(place, step).kill()
            dies = False
        except BrokerDied:
            step = steps.after(step)
            deaths += 1
        try:
            with World(place) as world:
                world.prove()
                world.clear()
        finally:
            remove_dead(place.name)
    print(f"start: {deaths} deaths, {time.monotonic() - begun:.1f} s", flush=True)
    return deaths


def site(directory: Path) -> Site:
    """A tiny arena."""
    areas = {name: f"{pages * PAGE},cache=off" if name == "c" else pages * PAGE for name, pages in AREAS.items()}
    size = (sum(AREAS.values()) + NURSERY) * PAGE
    while True:
        size += PAGE
        with contextlib.suppress(ArenaError):
            geometry, placed = layout.plan(size, areas=areas, slots=SLOTS, clients_max=CLIENTS)
            if geometry.nursery_pages == NURSERY:
                break
    spill_dir = directory / "spill"
    spill_dir.mkdir()
    return Site(f"/gcma-test-{directory.name}", geometry, placed, spill_dir)


def main() -> None:
    """AssertionError when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenes", nargs="*")
    parser.add_argument("--fault", default="", choices=["", *FAULTS])
    parser.add_argument("--dense", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=0, help="scenes and takeovers cut off by chance, in the end")
    parser.add_argument("--no-takeovers", action="store_true")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    asked = parser.parse_args()
    print(f"seed {asked.seed}, the first {asked.dense or 'n'} changes of each", flush=True)
    steps = Steps(asked.dense, asked.seed)
    with tempfile.TemporaryDirectory(prefix="gs-") as directory:
        place, deaths = site(Path(directory)), 0
        if not asked.scenes:
            deaths = play_start(place, steps)
        try:
            with World(place, asked.fault) as world:
                crashes = Crashes(world, steps)
                for name in asked.scenes or SCENES:
                    crashes.play(name)
                for name, shares in TAKEOVERS.items():
                    if not asked.no_takeovers and (not asked.scenes or name in asked.scenes):
                        for share in shares:
                            crashes.play_takeover(name, share)
                crashes.play_by_chance(asked.rounds, asked.seed)
        finally:
            remove_dead(place.name)
    print(f"{deaths + crashes.deaths} deaths, all well")


if __name__ == "__main__":
    main()
