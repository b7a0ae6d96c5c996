"""Scenes of crashes.py: areas, types and their pages, and clients that go on meanwhile."""

from __future__ import annotations

from dataclasses import replace

from gcma_shm import layout
from tests.faults.crash_clients import JITTER, PAGE, Remote
from tests.faults.crash_scene import Play, cached, more, scene
from tests.faults.crash_world import AREAS, World
from tests.register import Log, check

# --- areas


def _guests_in_a(w: World) -> None:
    w.first.reserve(3, "a")
    w.second.claim(claimed := w.second.reserve(2, "a"))
    assert claimed.sharers
    w.first.alloc(2, "a")
    cached(w)


@scene
def drain(w: World) -> Play:
    _guests_in_a(w)
    w.areas["a"] = {(AREAS["a"], False), (AREAS["a"], True)}
    yield
    w.first.ask("area_drain", area="a")
    w.areas["a"] = {(AREAS["a"], True)}


@scene
def resume(w: World) -> Play:
    _guests_in_a(w)
    w.first.ask("area_drain", area="a")
    w.areas["a"] = {(AREAS["a"], False), (AREAS["a"], True)}
    yield
    w.first.ask("area_resume", area="a")
    w.areas["a"] = {(AREAS["a"], False)}


@scene
def shrink(w: World) -> Play:
    w.first.alloc(2, "a", offset=0)
    cached(w)
    w.areas["a"] = {(AREAS["a"], False), (7, False)}
    yield
    w.first.ask("area_resize", area="a", nbytes=7 * PAGE)
    w.areas["a"] = {(7, False)}


@scene
def grow(w: World) -> Play:
    """At its end, and by a part elsewhere. A growth that was cut off between the two has got as far as that."""
    w.first.ask("area_resize", area="a", nbytes=8 * PAGE)
    w.first.ask("area_resize", area="b", nbytes=5 * PAGE)
    w.areas = {"a": {(8, False), (12, False), (14, False)}, "b": {(5, False)}}
    cached(w)
    yield
    w.first.ask("area_resize", area="a", nbytes=14 * PAGE)
    w.areas["a"] = {(14, False)}


@scene
def shrink_by_a_part(w: World) -> Play:
    w.first.ask("area_resize", area="b", nbytes=5 * PAGE)
    w.first.ask("area_resize", area="a", nbytes=14 * PAGE)
    w.areas = {"a": {(14, False), (12, False), (9, False)}, "b": {(5, False)}}
    w.first.alloc(2, "a", offset=0)
    cached(w)
    yield
    w.first.ask("area_resize", area="a", nbytes=9 * PAGE)
    w.areas["a"] = {(9, False)}


@scene
def drain_parts(w: World) -> Play:
    w.first.ask("area_resize", area="b", nbytes=5 * PAGE)
    w.first.ask("area_resize", area="a", nbytes=14 * PAGE)
    w.areas = {"a": {(14, False), (14, True)}, "b": {(5, False)}}
    cached(w)
    yield
    w.first.ask("area_drain", area="a")
    w.first.ask("area_resume", area="a")


# --- types and pages


@scene
def swap_init(w: World) -> Play:
    w.declare(2, 6, "through")
    w.end(2)
    yield

    def after_death() -> None:
        """It lives, or it does not."""
        life = w.first.plane.read(w.site.geometry.type_at(3) + layout.TYPE_LIFE_AT)
        if life & 1:
            w.lives[3] = life

    w.after_death = after_death
    w.declare(3, 5, "behind")


@scene
def invalidate_area(w: World) -> Play:
    cached(w)
    w.declare(2, 6, "behind")
    for offset in range(5):
        w.first.store(2, offset)
    life, values = w.lives[2], dict(w.values)

    def after_death() -> None:
        """Its life has ended wholly, or not at all."""
        if w.first.plane.read(w.site.geometry.type_at(2) + layout.TYPE_LIFE_AT) == life:
            w.lives[2], w.values = life, values
        else:
            w.lives.pop(2, None)

    yield
    w.forget_type(2)
    w.after_death = after_death
    w.first.ask("invalidate_area", type=2, life=life)


@scene
def promote(w: World) -> Play:
    cached(w)
    w.first.alloc(4, "b")
    more(w)
    w.first.free(w.first.alloc(5, "a"))  # there is room
    yield
    w.broker.call("sweep")


@scene
def promote_into_a_reservation(w: World) -> Play:
    w.first.reserve(AREAS["a"], "a")
    w.first.reserve(AREAS["b"], "b")
    w.declare(0, 24, "through")
    w.declare(1, 24, "behind")
    more(w)
    yield
    w.broker.call("sweep")


@scene
def evict(w: World) -> Play:
    """No area has room: what was read takes the place of what was not."""
    cached(w)
    more(w)
    w.broker.call("sweep")
    more(w)
    yield
    w.broker.call("sweep")


@scene
def clean(w: World) -> Play:
    cached(w)
    for offset in range(0, 24, 2):
        w.first.store(1, offset)
        w.first.store(1, offset + offset // 12)
    yield
    w.broker.call("clean")


@scene
def punch(w: World) -> Play:
    """Places in a row, alone, of zeros, of a pattern, and one that has been stored to again."""
    cached(w)
    w.broker.call("clean")
    for offset in (*range(8), 10, 12, 20):
        w.first.invalidate(offset % 2, offset)
    for offset in (14, 15):
        w.first.store_filled(0, offset, 0)
        w.first.store_filled(1, offset, 0x01020304)
    w.first.invalidate(1, 4)
    w.first.store(1, 4)

    def after_takeover() -> None:
        """What the dead broker had not given back, the next one gives."""
        w.broker.call("punch")

    w.after_takeover = after_takeover
    yield
    w.broker.call("punch")


@scene
def store_by_message(w: World) -> Play:
    cached(w)
    yield
    w.first.store_by_message(0, 3)
    w.first.store_by_message(1, 3)
    w.first.invalidate_by_message(0, 3)
    w.first.load_by_message(1, 5)


@scene
def load_by_message(w: World) -> Play:
    """From the file, and back into the nursery."""
    cached(w)
    w.first.free(w.first.alloc(AREAS["a"], "a"))
    w.first.free(w.first.alloc(AREAS["b"], "b"))
    yield
    for offset in range(24):
        assert w.first.load_by_message(0, offset) in w.values[0, offset]


# --- while clients go on


def busy(w: World) -> None:
    """One client claims and lends a reservation over and over, with another one in turn; two store and load in the same slots. The broker
    has a thread of its own meanwhile. The clients go on during the takeover and after it, and are stopped for the proof.
    """
    w.declare(4, 8, "behind")
    w.values = {at: values for at, values in w.values.items() if at[0] != 4}
    guest = w.first.reserve(5, "b")
    cached(w)
    clients = [w.stack.enter_context(w.remote(f"busy-{n}")) for n in range(4)]
    logs = {writer: w.site.spill_dir.with_name(f"log-{writer}") for writer in (2, 3)}
    for client in clients[:2]:
        client.attach(guest)
        client.tell("claim and lend", replace(guest, holders=set(), sharers=set()))
    for client, (writer, path) in zip(clients[2:], logs.items(), strict=True):
        client.tell("store and load", 4, w.lives[4], 8, path, writer)

    def after() -> None:
        for client in clients:
            assert client.closed or client.tell("enough") > 0
        operations = [o for writer, path in logs.items() for o in Log(path, writer).operations()]
        wrong = check(operations)
        assert not wrong, wrong[:5]
        for path in logs.values():
            path.unlink()

    w.after_takeover, w.is_restless = after, True
    w.broker.call("reclaim", JITTER)


@scene
def busy_allocations(w: World) -> Play:
    busy(w)
    yield
    guest = w.first.alloc(7, "a")
    more(w)
    w.first.free(guest)
    w.first.free(w.first.reserve(3, "b"))


@scene
def busy_areas(w: World) -> Play:
    busy(w)
    w.areas = {"b": {(AREAS["b"], False), (AREAS["b"], True), (6, False)}}
    yield
    w.first.ask("area_drain", area="b")
    more(w)
    w.first.ask("area_resume", area="b")
    w.first.ask("area_resize", area="b", nbytes=6 * PAGE)


@scene
def busy_bury(w: World) -> Play:
    """One that claims in turn is killed with the claim, or at the wrong moment."""
    busy(w)
    victim = w.clients[3]
    assert isinstance(victim, Remote)
    yield
    victim.child.kill()
    number = victim.number
    victim.gone()
    w.broker.call("ended", number)
