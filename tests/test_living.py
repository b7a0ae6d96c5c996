"""What is alive: by identity, collected, and looked through while other threads add."""

from __future__ import annotations

import gc
import threading

from gcma_shm.clients.living import Living


class Thing:
    def __eq__(self, other: object) -> bool:
        return True  # all are equal, and none is another

    __hash__ = None  # type: ignore[assignment]


def test_members_are_known_by_identity_and_collected() -> None:
    found: Living[Thing] = Living()
    one, other = Thing(), Thing()
    found.add(one)
    found.add(one)
    assert one in found
    assert other not in found
    found.add(other)
    assert len(list(found)) == 2
    found.discard(other)
    found.discard(other)
    assert len(list(found)) == 1
    del one
    gc.collect()
    assert not list(found)


def test_others_may_be_added_while_it_is_looked_through() -> None:
    found: Living[Thing] = Living()
    kept = [Thing() for _ in range(200)]
    for thing in kept:
        found.add(thing)
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            more = [Thing() for _ in range(50)]
            for thing in more:
                found.add(thing)
            for thing in more[::2]:
                found.discard(thing)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(500):
            seen = {id(thing) for thing in found}
            assert seen >= {id(thing) for thing in kept}
    finally:
        done.set()
        thread.join()
