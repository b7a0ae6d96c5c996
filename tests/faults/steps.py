"""A client that stops or dies at each single step of each operation, and what everybody else may expect meanwhile and afterwards.

Runs in a build of the extension with a hook at every atomic operation (steps.h): `python -m tests.faults.steps stop|kill|lives [SCENE …]`.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gcma_shm
from gcma_shm import _core, layout
from gcma_shm.broker.direct import refuse_directory
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.swap import MappedSwap, Swap
from gcma_shm.errors import ArenaError
from tests.faults.storm import TYPE_STEP, TYPES, Plan, Storm
from tests.invariants import CACHED, SPILLED, check_at_rest
from tests.processes import WAIT_S, Child, Said, eventually, forked, stop
from tests.register import Kind, Log, Operation, check, make_page, read_page, value_id

PLAN = Plan(nursery_pages=16, area_pages=(24,), wide=64, slots_spare=64, timeout_s=WAIT_S / 4)
SLOT = 5  # where the victim works; its neighbours up to SLOT + 3 in batches
NOWHERE = 1 << 62
STOPS_MAX = 1000  # of the broker, until one falls between two writes to the file
BUSY_S = 0.01  # what the other client's write-through store waits for a place that the victim is writing


class Hook:
    """The hook of steps.h in this process."""

    def __init__(self) -> None:
        core = ctypes.CDLL(_core.__file__)
        self._steps = ctypes.c_uint64.in_dll(core, "gcma_steps")
        self._at = ctypes.c_uint64.in_dll(core, "gcma_step_at")
        self._signal = ctypes.c_int.in_dll(core, "gcma_step_signal")
        self._thread = ctypes.c_int.in_dll(core, "gcma_step_thread")
        self._changes = ctypes.c_int.in_dll(core, "gcma_step_changes")
        self.jitter = ctypes.c_uint32.in_dll(core, "gcma_jitter")

    def arm(self, step: int) -> None:
        """SIGSTOP at that step from now, the first being 1."""
        self._arm(step, signal.SIGSTOP, changes=False)

    def arm_to_kill(self, step: int) -> None:
        """SIGKILL before that change from now, of those of this thread. Steps that only look do not count: who dies before one leaves
        what he leaves before the next change.
        """
        self._thread.value = threading.get_native_id()
        self._arm(step, signal.SIGKILL, changes=True)

    def _arm(self, step: int, number: int, changes: bool) -> None:
        self._changes.value = changes
        self._signal.value = number
        self._steps.value = 0
        self._at.value = step

    def disarm(self) -> int:
        """No more; returns how many steps there were."""
        self._at.value = 0
        return self._steps.value


class Client:
    """Operations on the slots of both types, logged."""

    def __init__(
        self, owner: gcma_shm.Client, swaps: list[Swap], log: Log, reservation: gcma_shm.Reservation | None = None
    ) -> None:
        assert owner._plane is not None
        self.reservation = reservation
        self.owner = owner
        self.plane = owner._plane
        self.swaps = swaps
        self._log = log
        self._sequence = 0

    def is_in(self, place: str, slot: int = SLOT) -> bool:
        """Whether that slot of type 0 is in the "nursery", an "area" or the "file"."""
        g = self.plane.geometry
        base = self.plane.read(g.type_at(0) + layout.TYPE_BASE_AT)
        word = self.plane.read(g.slots_at + layout.SLOT_BYTES * (base + slot))
        if word >> 33 & 7 == CACHED:
            return place == ("nursery" if word & 0xFFFFFFFF < g.nursery_pages else "area")
        return place == "file" and word >> 33 & 7 == SPILLED

    def store(self, type_: int, offset: int, count: int = 1) -> None:
        """Stores a new value, or values in neighbours; one that is stored but not yet written through counts as stored."""
        slots = [type_ * TYPE_STEP + offset + n for n in range(count)]
        values = [value_id(self._log.writer, self._sequence + n + 1) for n in range(count)]
        self._sequence += count
        pages = b"".join(make_page(slot, value, PLAN.page_size) for slot, value in zip(slots, values, strict=True))
        begun = [self._log.begin(Kind.STORE, slot, value) for slot, value in zip(slots, values, strict=True)]
        with contextlib.suppress(gcma_shm.SlotBusy):
            if count == 1:
                self.swaps[type_].store(offset, pages)
            else:
                self.swaps[type_].store_many(range(offset, offset + count), pages)
        for at in begun:
            self._log.end(at)

    def load(self, type_: int, offset: int) -> bool:
        """Loads and proves; whether something was there."""
        slot = type_ * TYPE_STEP + offset
        at = self._log.begin(Kind.LOAD, slot)
        page = self.swaps[type_].load(offset)
        self._log.end(at, read_page(slot, page) if page is not None else None)
        return page is not None

    def claim_and_lend(self) -> None:
        """Claims the reservation, writes and proves its bytes, and lends it again."""
        assert self.reservation is not None
        with self.reservation.claim(timeout=WAIT_S) as buffer, buffer.view as view:
            view[:] = b"mine" * (buffer.nbytes // 4)
            assert view == b"mine" * (buffer.nbytes // 4), "bytes of a claimed range have changed"

    def invalidate(self, type_: int, offset: int) -> None:
        """Forgets."""
        at = self._log.begin(Kind.STORE, type_ * TYPE_STEP + offset)
        self.swaps[type_].invalidate_page(offset)
        self._log.end(at)


@dataclass(frozen=True)
class Scene:
    """An operation of the victim, and how the slot is made ready for it."""

    name: str
    prepare: Callable[[Client], None]
    act: Callable[[Client], object]
    broker_stopped: bool = False  # meanwhile, and no nursery page is free
    broker_needed: bool = False  # to make it ready
    reserved: bool = False  # the whole area is a reservation, claimed instead of allocated
    direct: bool = False  # spill files are read past the page cache, and ahead
    lent_again: bool = False  # what is claimed meanwhile is lent again before the victim goes on


def _until(client: Client, place: str, visit: bool) -> None:
    """Stores, and then elsewhere until the slot has moved to that place; not long ago, so that it may come back."""
    deadline = time.monotonic() + WAIT_S
    for n in itertools.count():
        if client.is_in(place):
            return
        if n % PLAN.nursery_pages == 0:
            # The broker moves pages, and where it has no processor our own reclaiming only drops them: let it come to its turn.
            time.sleep(0.0005)
            if time.monotonic() > deadline:
                break
        if n % 400 == 0:
            client.store(0, SLOT)
        if visit:
            client.load(0, SLOT)
        client.store(1, 16 + n % 48)
        if not visit:  # pages that are read again push out those that are not
            client.load(1, 16 + n * 7 % 48)
    raise AssertionError(f"the slot does not come into the {place}")


def _spilled(client: Client) -> None:
    client.store(0, SLOT)
    _until(client, "file", visit=False)


def _row_spilled(client: Client) -> None:
    """Four neighbours; a page is free."""
    for _ in range(100):
        client.store(0, SLOT, 4)
        _until(client, "file", visit=False)
        if all(client.is_in("file", SLOT + n) for n in range(4)):
            return
        for offset in range(16, PLAN.wide):  # some of them are in an area, where they had room
            client.store(1, offset)
        client.owner.alloc_contig(PLAN.area_pages[0] * PLAN.page_size).free()
        for n in range(4):
            client.load(0, SLOT + n)
    raise AssertionError("the slots do not come into the file together")


def _load_row(client: Client) -> None:
    for n in range(4):
        assert client.load(0, SLOT + n)


def _promoted(client: Client) -> None:
    client.store(0, SLOT)
    _until(client, "area", visit=True)


def _discarded(client: Client) -> None:
    _promoted(client)
    client.owner.alloc_contig(PLAN.area_pages[0] * PLAN.page_size).free()


def _fill(client: Client) -> None:
    for offset in range(16, PLAN.wide):
        client.store(1, offset)


SCENES = (
    Scene("store through", lambda c: None, lambda c: c.store(0, SLOT)),
    Scene("store behind", lambda c: None, lambda c: c.store(1, SLOT)),
    Scene("store over", lambda c: c.store(0, SLOT), lambda c: c.store(0, SLOT)),
    Scene("store a batch", lambda c: None, lambda c: c.store(0, SLOT, 4)),
    Scene("sync", lambda c: c.store(1, SLOT, 4), lambda c: c.swaps[1].sync(WAIT_S)),
    Scene("load", lambda c: c.store(0, SLOT), lambda c: c.load(0, SLOT)),
    Scene("load from an area", _promoted, lambda c: c.load(0, SLOT), broker_needed=True),
    Scene("load from the file", _spilled, lambda c: c.load(0, SLOT)),
    Scene("load what a buffer took", _discarded, lambda c: c.load(0, SLOT), broker_needed=True),
    Scene("load from a reservation", _promoted, lambda c: c.load(0, SLOT), broker_needed=True, reserved=True),
    Scene(
        "load while it is claimed and lent",
        _promoted,
        lambda c: c.load(0, SLOT),
        broker_needed=True,
        reserved=True,
        lent_again=True,
    ),
    Scene("claim and lend", _promoted, Client.claim_and_lend, broker_needed=True, reserved=True, lent_again=True),
    Scene("invalidate", lambda c: c.store(1, SLOT), lambda c: c.invalidate(1, SLOT)),
    Scene("load a row and ahead", _row_spilled, _load_row, broker_needed=True, direct=True),
    Scene("reclaim for a store", _fill, lambda c: c.store(1, SLOT), broker_stopped=True),
)


def stop_broker(owner: EmbeddedClient) -> None:
    """SIGSTOP, but not while it writes pages to the file: those could be cleaned by nobody else, and fill this tiny nursery."""
    assert owner._plane is not None
    g, plane = owner._plane.geometry, owner._plane

    def writes_nothing() -> bool:
        return not any(
            plane.read(g.slots_at + layout.SLOT_BYTES * n + 8) >> 52 == layout.BROKER for n in range(g.slots)
        )

    for _ in range(STOPS_MAX):
        # One that was woken and is stopped again at once has not had a turn in between: it would be where it was.
        assert eventually(writes_nothing), "the broker keeps what it writes to the file"
        stop(owner.broker_pid)
        if writes_nothing():
            return
        os.kill(owner.broker_pid, signal.SIGCONT)
    raise AssertionError(f"the broker was stopped {STOPS_MAX} times, and wrote to the file each time")


@contextlib.contextmanager
def victim(
    storm: Storm, scene: Scene, log: Path, writer: int, step: int, reservation: gcma_shm.Reservation | None = None
) -> Iterator[tuple[Child, Callable[[], bool]]]:
    """A forked client that acts, stopped at that step; the second value waits for that, False: it ended before."""

    def work(said: Said) -> int:
        client = Client(storm.owner, storm.swaps, Log(log, writer), reservation)
        hook = Hook()
        hook.arm(step)
        scene.act(client)
        return hook.disarm()

    with forked(work) as child:

        def stopped() -> bool:
            found = os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            assert found is not None
            return found.si_code == os.CLD_STOPPED

        yield child, stopped


def everybody_else_goes_on(
    storm: Storm, other: Client, reservation: gcma_shm.Reservation | None
) -> gcma_shm.Buffer | None:
    """While the victim stands still: the whole arena is to be had, its slots can be loaded and stored. Returns the buffer; None:
    the victim has claimed the reservation.
    """
    buffer = None
    if reservation is None:
        buffer = storm.owner.alloc_contig(PLAN.area_pages[0] * PLAN.page_size)
    else:
        with contextlib.suppress(gcma_shm.ArenaExhausted):
            buffer = reservation.claim()
    if buffer is not None:
        with buffer.view as view:
            view[:] = b"held" * (buffer.nbytes // 4)
    for type_ in range(2):
        for offset in range(SLOT, SLOT + 4):
            other.load(type_, offset)
        other.store(type_, SLOT)
        assert other.load(type_, SLOT)
    _fill(other)  # what the victim saw is overwritten now; and here its pages change hands
    return buffer


def take_back(buffer: gcma_shm.Buffer, where: str) -> None:
    """Nobody else has written there."""
    with buffer.view as view:
        assert view == b"held" * (buffer.nbytes // 4), f"{where}: a buffer's bytes changed"
    buffer.free()


class Steps:
    """Scene after scene on one arena, each once for each step that it has, and once more to its end."""

    def __init__(self, storm: Storm) -> None:
        self._storm = storm
        self._directory = storm.spill_dir().parent
        self._ours = Log(self._directory / "ours", 1, 1_000_000)
        # Waits hardly at all for what the victim is writing to the file: it will not go on before we have.
        quick: list[Swap] = [
            MappedSwap(storm.owner._plane, type_, swap.life, BUSY_S, storm.owner._channel)  # type: ignore[arg-type, attr-defined]
            for type_, swap in enumerate(storm.swaps)
        ]
        self._other = Client(storm.owner, quick, self._ours)
        self._history: list[Operation] = []
        self._writers = 1
        self.steps = 0

    def play(self, scene: Scene, end: str) -> None:
        """`end`: "stop", then the victim goes on; "kill", then it dies where it stands."""
        step = 1
        while self._at(scene, step, end):
            step += 1
        self.check(scene.name)
        self.steps += step - 1
        print(f"{scene.name}: {step - 1} steps", flush=True)

    def check(self, where: str) -> None:
        """The whole history, and the arena at rest."""
        wrong = check(self._history + self._ours.operations())
        assert not wrong, f"{where}: {wrong[:5]}"
        check_at_rest(self._storm.owner.stats()["arena"]["name"])

    def _at(self, scene: Scene, step: int, end: str) -> bool:
        """One step; whether there was one."""
        self._writers += 1
        storm, other, where = self._storm, self._other, f"{scene.name}, step {step}"
        path = self._directory / f"victim.{self._writers}"
        log = Log(path, self._writers, 64)
        reservation = storm.owner.reserve(PLAN.area_pages[0] * PLAN.page_size) if scene.reserved else None
        scene.prepare(other)
        if scene.broker_stopped:
            stop_broker(storm.owner)
            _fill(other)  # no page is free
        buffer = None
        with victim(storm, scene, path, self._writers, step, reservation) as (child, stopped):
            reached = stopped()
            if scene.broker_stopped:
                other.store(0, SLOT)
                other.load(1, SLOT)
                os.kill(storm.owner.broker_pid, signal.SIGCONT)
            if reached:
                buffer = everybody_else_goes_on(storm, other, reservation)
                if buffer is not None and scene.lent_again:
                    take_back(buffer, where)
                    buffer = None
                    _fill(other)  # into what was the claimer's
                os.kill(child.pid, signal.SIGKILL if end == "kill" else signal.SIGCONT)
            if not reached or end != "kill":
                child.receive()
            child.wait()
        if buffer is not None:
            take_back(buffer, where)
        if reservation is not None:
            reservation.claim(timeout=WAIT_S).free()  # whatever became of the victim
            reservation.release()
        for type_ in range(2):
            for offset in range(SLOT, SLOT + 4):
                other.load(type_, offset)
        if step % (PLAN.clients // 2) == 0 or not reached:  # before their numbers run out
            assert eventually(storm.alone), f"{where}: {storm.owner.stats()['broker']} {storm.owner.areas()}"
        self._history += log.operations()
        log.close()
        path.unlink()
        return reached


class Lives:
    """The victim sleeps at a step while its types end, others get their slots, and its types begin anew in other places."""

    def __init__(self, storm: Storm) -> None:
        self._storm = storm
        self._log = storm.spill_dir().parent / "victim"
        self.steps = 0

    def play(self, scene: Scene) -> None:
        """The scene once for each step."""
        step = 1
        while self._at(scene, step):
            step += 1
        self.steps += step - 1
        print(f"{scene.name}: {step - 1} steps", flush=True)

    def _at(self, scene: Scene, step: int) -> bool:
        storm, owner, where = self._storm, self._storm.owner, f"{scene.name}, step {step}"
        prepared = self._log.with_name("prepared")
        if not scene.broker_needed:
            stop_broker(owner)  # or it might clean before the victim does
        scene.prepare(Client(owner, storm.swaps, Log(prepared, 1, 20_000)))
        log = Log(self._log, 2, 64)
        with victim(storm, scene, self._log, 2, step) as (child, stopped):
            reached = stopped()
            os.kill(owner.broker_pid, signal.SIGCONT)
            if reached:
                for swap in storm.swaps:
                    swap.invalidate_area()
                # Best fit, the lowest first: type 1 lies over what was 0's, 2 over what was 1's, and 0 behind them.
                swaps = [owner.swap(1, 32, "behind"), owner.swap(2, 64, "behind"), owner.swap(0, 32, "through")]
                # Last those in the victim's own slots, dirty still when it wakes.
                places = [(swap, offset) for swap in swaps for offset in range(12)]
                places += [(swaps[0], SLOT + n) for n in range(4)] + [(swaps[1], 32 + SLOT + n) for n in range(4)]
                pages = [
                    (swap, offset, make_page(swap.type * TYPE_STEP + offset, value_id(9, step), PLAN.page_size))
                    for swap, offset in places
                ]
                stop_broker(owner)  # again
                for swap, offset, page in pages:
                    swap.store(offset, page)
                os.kill(child.pid, signal.SIGCONT)
                self._wakes(child)
                os.kill(owner.broker_pid, signal.SIGCONT)
                for swap, offset, page in pages:
                    assert swap.load(offset) == page, f"{where}: {swap!r} slot {offset}"
                self._forget(swaps[1])
                for swap, offset, page in pages:
                    assert swap.load(offset) == page, f"{where}: {swap!r} slot {offset}, when it was in the file only"
                for swap in swaps:
                    swap.invalidate_area()
                storm.swaps = [owner.swap(n, PLAN.wide, TYPES[n]) for n in range(2)]
            else:
                child.receive()
                child.wait()
        for path in (self._log, prepared):
            path.unlink()
        log.close()
        return reached

    @staticmethod
    def _wakes(child: Child) -> None:
        """It finds its type closed, or has done its work already."""
        try:
            child.receive()
        except AssertionError as error:
            if "Closed" not in str(error):
                raise
        child.wait()

    def _forget(self, swap: Swap) -> None:
        """Other pages, until none of those before is in memory."""
        for n in range(8 * PLAN.nursery_pages):
            swap.store(48 + n % 16, make_page(NOWHERE, value_id(8, n), PLAN.page_size))
        self._storm.owner.alloc_contig(PLAN.area_pages[0] * PLAN.page_size).free()


def main(what: str, names: list[str]) -> None:
    """Each scene, or those of these names; AssertionError when something is wrong."""
    steps = 0
    for spill_io in ("buffered", "direct"):
        scenes = [s for s in SCENES if (not names or s.name in names) and s.direct == (spill_io == "direct")]
        if what == "lives":
            scenes = [scene for scene in scenes if not (scene.broker_stopped or scene.reserved or scene.direct)]
        if scenes:
            steps += _play(what, scenes, spill_io)
    print(f"{what}: {steps} steps, all well")


def _play(what: str, scenes: list[Scene], spill_io: str) -> int:
    with tempfile.TemporaryDirectory(prefix="gs-") as directory:
        if spill_io == "direct":
            try:
                refuse_directory(Path(directory), PLAN.page_size)
            except ArenaError as error:
                print(f"{', '.join(scene.name for scene in scenes)} left out: {error.strerror}")
                return 0
        return _play_in(Path(directory), what, scenes, spill_io)


def _play_in(directory: Path, what: str, scenes: list[Scene], spill_io: str) -> int:
    with Storm(PLAN, directory, 0, spill_io) as storm:
        playing: Steps | Lives = Lives(storm) if what == "lives" else Steps(storm)
        try:
            for scene in scenes:
                if isinstance(playing, Steps):
                    playing.play(scene, what)
                else:
                    playing.play(scene)
            assert spill_io == "buffered" or storm.counters()["read_ahead"] >= playing.steps // 10
        finally:
            os.kill(storm.owner.broker_pid, signal.SIGCONT)  # where a failure left it stopped, it could not be ended
        return playing.steps


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
