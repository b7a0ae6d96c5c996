"""What a broker does while it is killed. Each scene is made ready up to its `yield`; the broker dies in what comes behind.

What may have been done by then, or not, a scene says before it asks for it (`w.areas`, `w.quotas`, `w.values`, `w.after_death`); everything else is as
the clients of tests/faults/crash_clients.py know it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace

from gcma_shm import layout
from tests.faults.crash_clients import JITTER, LONGER_S, PAGE, Remote
from tests.faults.crash_world import AREAS, World
from tests.processes import forked
from tests.register import Log, check

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


# --- buffers and reservations


@scene
def alloc(w: World) -> Play:
    cached(w)
    w.first.alloc(2, "b", name="another")
    yield
    w.second.alloc(7, "a", name="new")


@scene
def alloc_without_a_name_where_one_had_been(w: World) -> Play:
    w.first.free(w.first.alloc(3, "a", name="n" * 40))

    def after() -> None:
        """Whatever is left of the old name, the next one is not called that."""
        w.greet()
        w.second.alloc(3, "a")
        w.take_over()

    w.after_takeover = after
    yield
    w.second.alloc(3, "a")


@scene
def alloc_after_a_wait(w: World) -> Play:
    cached(w)
    whole = w.first.alloc(AREAS["a"], "a")
    ticket = w.second.ask("alloc_contig", nbytes=5 * PAGE, area="a", timeout_ms=60_000)["ticket"]
    yield
    w.first.free(whole)
    w.second._take(w.second.ask("collect", ticket=ticket)).holders.add(w.second)


@scene
def free_the_last(w: World) -> Play:
    guest = w.first.alloc(7, "a", name="old")
    cached(w)
    yield
    w.first.free(guest)


@scene
def free_one_of_two(w: World) -> Play:
    guest = w.first.alloc(7, "a", name="old")
    w.second.attach(guest)
    yield
    w.first.free(guest)


@scene
def reserve(w: World) -> Play:
    cached(w)
    yield
    w.first.reserve(7, "a", name="promised")


@scene
def reserve_where_there_is_no_cache(w: World) -> Play:
    yield
    w.first.reserve(3, "c")


@scene
def release(w: World) -> Play:
    guest = w.first.reserve(7, "a", name="promised")
    cached(w)
    yield
    w.first.free(guest)


@scene
def release_what_is_claimed(w: World) -> Play:
    guest = w.first.reserve(7, "a")
    cached(w)
    w.first.claim(guest)
    yield
    guest.sharers.clear()
    guest.bytes = None
    w.first.free(guest)


@scene
def attach(w: World) -> Play:
    guest = w.first.alloc(3, "a", name="shown")
    yield
    w.second.attach(guest)
    w.third.attach_name("shown")


@scene
def hand_over_and_attach(w: World) -> Play:
    guest = w.first.alloc(3, "a")
    yield
    token = w.first.hand_over(guest)
    w.second.attach(guest, token=token)


@scene
def hand_over_and_expire(w: World) -> Play:
    guest = w.first.alloc(3, "a")
    w.first.hand_over(guest)
    w.first.free(guest)
    yield
    w.broker.call("tick_later", LONGER_S)


# --- claims


@scene
def share_a_claim_and_leave_it(w: World) -> Play:
    guest = w.first.reserve(7, "a")
    cached(w)
    w.first.claim(guest)
    yield
    w.second.attach(guest, claim=guest.claim)
    w.first.lend(guest)
    w.second.lend(guest)


@scene
def hand_over_a_claim(w: World) -> Play:
    guest = w.first.reserve(7, "a")
    w.first.claim(guest)
    yield
    token = w.first.hand_over(guest, guest.claim)
    w.second.attach(guest, guest.claim, token)


@scene
def lend_after_a_dead_claimer(w: World) -> Play:
    guest = w.first.reserve(7, "a")
    cached(w)
    victim = w.stack.enter_context(w.remote("victim"))
    victim.attach(guest)
    victim.claim(guest)
    yield
    victim.kill()
    w.broker.call("ended", victim.number)


@scene
def bury(w: World) -> Play:
    """A client with a buffer, a promise and a handle under way, killed in the middle of a store."""
    cached(w)
    victim = w.stack.enter_context(w.remote("victim"))
    victim.alloc(3, "a", name="victim's")
    victim.reserve(2, "b")
    victim.hand_over(victim.alloc(2, "c"))
    victim.die_in_store(0, 5, 5)
    other = w.stack.enter_context(w.remote("other"))
    other.die_in_store(0, 6, 12)
    yield
    victim.gone()
    other.gone()
    w.broker.call("tick")


@scene
def hello(w: World) -> Play:
    yield
    w.stack.enter_context(w.remote("new"))


@scene
def hello_of_who_goes_on(w: World) -> Play:
    """It says hello anew. The record of the hello without an answer comes back with its process, too."""
    process = w.stack.enter_context(forked(lambda said: said.hear()))

    def anew() -> None:
        new = Remote(w, "new", process)
        assert new.number in w.broker.call("clients")
        new.kill()

    def after_death() -> None:
        w.after_takeover = anew

    w.after_death = after_death
    yield
    Remote(w, "new", process)


@scene
def hello_again(w: World) -> Play:
    """Of who does not know of all that it has: the answers were lost."""
    w.second.ask("alloc_contig", nbytes=3 * PAGE, area="a", name="lost")
    number = w.second.ask("reserve", nbytes=3 * PAGE, area="b")["buffer"]
    kept = w.second.alloc(2, "a", name="kept")
    shared = w.first.reserve(2, "b")
    w.first.claim(shared)
    w.second.ask("attach", buffer=shared.number, claim=shared.claim)
    assert number != kept.number
    yield
    w.second.hello_again()


@scene
def bye(w: World) -> Play:
    w.third.alloc(3, "a", name="mine")
    guest = w.third.reserve(3, "b")
    w.second.attach(guest)
    w.third.claim(guest)
    yield
    w.third.bye()


@scene
def inherit(w: World) -> Play:
    w.first.alloc(3, "a", name="both")
    guest, shared = w.first.reserve(3, "b"), w.first.reserve(2, "b")
    w.first.claim(shared)
    assert guest.is_reservation
    w.first.ask("quota", nbytes=20 * PAGE)
    child = w.stack.enter_context(w.first.forked(lambda said: said.hear()))
    w.quotas = {w.first: {20 * PAGE}, child: {20 * PAGE}}
    yield
    w.second.ask("ping")


@scene
def inherit_from_who_is_dead(w: World) -> Play:
    parent = w.third
    guest = parent.alloc(3, "a", name="both")
    shared = parent.reserve(2, "b")
    parent.claim(shared)
    child = w.stack.enter_context(parent.forked(lambda said: said.hear()))
    yield
    parent.gone()
    parent._presence.close()  # type: ignore[union-attr]
    w.broker.call("tick")
    assert child in guest.holders


@scene
def quota(w: World) -> Play:
    w.first.ask("quota", nbytes=9 * PAGE)
    w.quotas[w.first] = {9 * PAGE, 5 * PAGE}
    yield
    w.first.ask("quota", nbytes=5 * PAGE)
    w.quotas[w.first] = {5 * PAGE}


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


# At which share of a scene's changes the broker dies whose successor dies at each of its own.
TAKEOVERS = {
    "alloc": (0.6,),
    "release": (0.5, 0.9),
    "lend_after_a_dead_claimer": (0.5,),
    "share_a_claim_and_leave_it": (0.8,),
    "bury": (0.3, 0.8),
    "inherit": (0.5,),
    "drain_parts": (0.3,),
    "invalidate_area": (0.5,),
    "swap_init": (0.5,),
    "promote": (0.3,),
    "clean": (0.5,),
    "busy_allocations": (0.5,),
}
