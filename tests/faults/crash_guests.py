"""Scenes of crashes.py: buffers, reservations and their claims, clients that come, fork and go."""

from __future__ import annotations

from tests.faults.crash_clients import LONGER_S, PAGE, Remote
from tests.faults.crash_scene import Play, cached, scene
from tests.faults.crash_world import AREAS, World
from tests.processes import forked

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
