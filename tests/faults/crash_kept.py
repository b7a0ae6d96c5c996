"""Scenes of crashes.py: buffers that are kept until they are unlinked, or until a process ends."""

from __future__ import annotations

from typing import Any

from gcma_shm import layout
from gcma_shm.errors import NoSuchBuffer
from gcma_shm.process import start_time
from tests.faults.crash_clients import Client, Guest
from tests.faults.crash_scene import Play, cached, scene
from tests.faults.crash_world import World
from tests.processes import Child, forked


class Keeper(Client):
    """Who keeps something, and asks for nothing: a process's stand-in, or the broker itself."""

    def __init__(self, world: World, number: int, child: Child | None = None) -> None:
        self.world, self.number, self.child = world, number, child
        self.closed = False
        self.handles = {}
        self._plane = self._claims = self._presence = None
        if child is not None:
            world.clients.append(self)

    def hello_again(self) -> None:
        """It has no session."""

    def free(self, guest: Guest) -> None:
        unlink(self.world, guest)

    def kill(self) -> None:
        """Its process ends."""
        assert self.child is not None
        self.child.kill()
        if not self.closed:
            self.gone()


def process_of(w: World) -> Child:
    """A process that does nothing."""
    return w.stack.enter_context(forked(lambda said: said.hear()))


def until(child: Child) -> dict[str, Any]:
    return {"pid": child.pid, "start": start_time(child.pid) or 0}


def kept(w: World, guest: Guest, number: int, child: Child | None) -> Keeper:
    """What the answer to `keep` says."""
    known = [one for one in w.clients if isinstance(one, Keeper) and one.number == number]
    keeper = known[0] if known else Keeper(w, number, child)
    guest.holders.add(keeper)
    return keeper


def keep(w: World, by: Client, guest: Guest, name: str, child: Child | None) -> Keeper:
    number = by.ask("keep", buffer=guest.number, name=name, **(until(child) if child is not None else {}))["keeper"]
    guest.name = name
    return kept(w, guest, number, child)


def unlink(w: World, guest: Guest) -> None:
    assert guest.name is not None
    name, guest.name = guest.name, None
    guest.holders = {one for one in guest.holders if not isinstance(one, Keeper)}
    w.forget_unheld(guest)
    w.first.ask("unlink", name=name)


def finish(w: World, guest: Guest, name: str, child: Child | None) -> None:
    """After the takeover: what was under way is wholly done or wholly not, or has the name alone; asked for again, it is done."""
    w.greet()
    holders, _, found, _ = w.broker.call("guests")[guest.number]
    others = holders - {one.number for one in guest.holders if not isinstance(one, Keeper)}
    assert found == name or not others, f"guest {guest.number} is called {found}, and kept by {others}"
    keep(w, w.first, guest, name, child)


def keeping(w: World, child: Child | None) -> Play:
    cached(w)
    w.first.free(w.first.alloc(3, "a", name="n" * 40))  # what is left of it is no part of the next name
    guest = w.first.alloc(3, "a")
    w.after_takeover = lambda: finish(w, guest, "kept", child)
    yield
    w.first.ask("keep", buffer=guest.number, name="kept", **(until(child) if child is not None else {}))


@scene
def keep_until_a_process_ends(w: World) -> Play:
    yield from keeping(w, process_of(w))


@scene
def keep_until_it_is_unlinked(w: World) -> Play:
    yield from keeping(w, None)


@scene
def keep_for_who_dies(w: World) -> Play:
    """Who asked for it is dead by then: it is kept, and can be unlinked, or it is gone."""
    child, victim = process_of(w), w.stack.enter_context(w.remote("victim"))
    guest = victim.alloc(3, "a")

    def after_takeover() -> None:
        victim.kill()
        w.broker.call("tick")
        new = w.broker.call("clients") - {one.number for one in w.clients}
        assert len(new) <= 1
        keepers = [Keeper(w, number, child) for number in new]
        found = w.broker.call("guests")
        if guest.number in found:
            holders, _, guest.name, _ = found[guest.number]
            assert (holders, guest.name) == ({keepers[0].number}, "kept")
            w.guests[guest.number] = guest
            guest.holders = {keepers[0]}

    w.after_takeover = after_takeover
    yield
    victim.ask("keep", buffer=guest.number, name="kept", **until(child))


def unlinking(w: World, child: Child | None, closed: bool) -> Play:
    cached(w)
    guest = w.first.alloc(3, "a")
    keeper = keep(w, w.first, guest, "kept", child)
    if closed:
        w.first.free(guest)

    def after_takeover() -> None:
        """Done, or to be done again."""
        w.greet()
        found = w.broker.call("guests").get(guest.number)
        assert found is None or found[2] == "kept" or keeper.number not in found[0], f"{found}: kept without its name"
        guest.holders.discard(keeper)
        guest.name = None
        w.forget_unheld(guest)
        try:
            w.first.ask("unlink", name="kept")
        except NoSuchBuffer:
            assert found is None or found[2] is None
        assert (guest.number in w.broker.call("guests")) == (not closed)

    w.after_takeover = after_takeover
    yield
    w.first.ask("unlink", name="kept")


@scene
def unlink_what_others_hold(w: World) -> Play:
    yield from unlinking(w, process_of(w), closed=False)


@scene
def unlink_the_last(w: World) -> Play:
    yield from unlinking(w, process_of(w), closed=True)


@scene
def unlink_what_is_kept_for_good(w: World) -> Play:
    yield from unlinking(w, None, closed=True)


@scene
def a_keeper_ends(w: World) -> Play:
    cached(w)
    child = process_of(w)
    alone, held = w.first.alloc(3, "a"), w.first.alloc(2, "b")
    keeper = keep(w, w.first, alone, "alone", child)
    assert keep(w, w.first, held, "held", child) is keeper
    w.first.free(alone)
    keep(w, w.first, w.first.alloc(2, "c"), "for good", None)
    assert layout.BROKER not in {one.number for one in w.clients}
    yield
    keeper.kill()
    w.broker.call("ended", keeper.number)
