"""A fork while another thread of the client stands still at each single step of a batch: what the child may do, and what becomes of the batch.

Runs in a build of the extension with a hook at every atomic operation (steps.h): `python -m tests.faults.forks`. The hook raises a signal in
the batch's thread, whose handler lets this thread fork before it goes on.
"""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gcma_shm
from gcma_shm import Buffer, _core
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.swap import Swap
from gcma_shm.endpoint import arena_name
from tests.client import filled_with
from tests.invariants import check_at_rest
from tests.processes import WAIT_S, Said, eventually, forked

PAGE = 4096
BATCH = range(5, 8)
CHILDS = range(20, 40)  # the child's own slots: more than it may have in hand at once
LIVE_PAGES = 3

libc = ctypes.CDLL(None)
Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


class Hook:
    """The hook of steps.h: the thread that arms it waits at the step, in `at_step`, until `go_on`."""

    def __init__(self) -> None:
        core = ctypes.CDLL(_core.__file__)
        self._steps = ctypes.c_uint64.in_dll(core, "gcma_steps")
        self._at = ctypes.c_uint64.in_dll(core, "gcma_step_at")
        self._thread = ctypes.c_int.in_dll(core, "gcma_step_thread")
        self.where = ctypes.c_char_p.in_dll(core, "gcma_step_where")
        ctypes.c_int.in_dll(core, "gcma_step_signal").value = signal.SIGUSR2
        self.at_step, self.go_on = threading.Event(), threading.Event()
        self._handler = Handler(self._stand_still)  # kept: C calls it
        libc.signal(signal.SIGUSR2, self._handler)

    def _stand_still(self, _number: int) -> None:
        self.at_step.set()
        self.go_on.wait(WAIT_S)

    def arm(self, step: int) -> None:
        self.at_step.clear()
        self.go_on.clear()
        self._thread.value = threading.get_native_id()
        self._steps.value = 0
        self._at.value = step

    def disarm(self) -> None:
        self._at.value = 0


@dataclass
class Scene:
    """What the thread does; `stored`: the slots to which it gives the new value."""

    name: str
    act: Callable[[Swap, int], object]
    write: str = "through"
    stored: range = BATCH


def store(swap: Swap, value: int) -> None:
    swap.store_many(BATCH, filled_with(value) * len(BATCH))


def store_over(swap: Swap, value: int) -> None:
    """The same slots twice in one batch, and one outside."""
    swap.store_many([*BATCH, *BATCH], filled_with(value) * 2 * len(BATCH))


def load(swap: Swap, value: int) -> None:
    out = bytearray(len(BATCH) * PAGE)
    assert all(swap.load_many(BATCH, out))
    assert out == filled_with(value - 1) * len(BATCH)


def store_and_sync(swap: Swap, value: int) -> None:
    store(swap, value)
    swap.sync(WAIT_S)


SCENES = (
    Scene("store a batch through", store),
    Scene("store a batch over itself", store_over),
    Scene("load a batch", load, stored=range(0)),
    Scene("store behind and sync", store_and_sync, "behind"),
)


def child(owner: EmbeddedClient, swap: Swap, buffer: Buffer, value: int) -> bool:
    """A client of its own, with nothing of the batch in its hands, and the buffer in its own."""
    for offset in BATCH:
        assert swap.load(offset) in (filled_with(value - 1), filled_with(value)), f"slot {offset}"
    swap.store_many(CHILDS, filled_with(value) * len(CHILDS))
    assert {swap.load(offset) for offset in CHILDS} == {filled_with(value)}
    with buffer.view as view:
        assert bytes(view) == filled_with(7) * LIVE_PAGES
    buffer.free()
    with owner.alloc_contig(PAGE, zero=True) as own, own.view as view:
        assert not any(view)
    owner.close()  # waits for operations under way; none is, in this process
    assert owner.closed
    return True


def run(owner: EmbeddedClient, scene: Scene, hook: Hook) -> int:
    """Step after step, until the batch ends before the hook is reached; how many steps it had."""
    swap = owner.swap(0, 64, "behind" if scene.write == "behind" else "through")
    swap.store_many(BATCH, filled_with(1) * len(BATCH))
    buffer = owner.alloc_contig(LIVE_PAGES * PAGE)
    with buffer.view as view:
        view[:] = filled_with(7) * LIVE_PAGES
    value, step, failed = 1, 0, list[BaseException]()
    while True:
        step, value = step + 1, value + bool(scene.stored)
        new = value if scene.stored else value + 1
        ended = threading.Event()

        def act(step: int = step, new: int = new, ended: threading.Event = ended) -> None:
            hook.arm(step)
            try:
                scene.act(swap, new)
            except BaseException as error:
                failed.append(error)
            hook.disarm()
            ended.set()

        thread = threading.Thread(target=act)
        thread.start()
        assert eventually(lambda ended=ended: hook.at_step.is_set() or ended.is_set())  # type: ignore[misc]
        reached = hook.at_step.is_set()
        if reached:

            def body(_: Said, new: int = new) -> bool:
                return child(owner, swap, buffer, new)

            try:
                with forked(body) as running:
                    assert running.receive() is True
                    assert running.wait() == 0
            finally:
                hook.go_on.set()
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert not failed, f"{scene.name}, step {step} in {hook.where.value!r}: {failed}"
        for offset in scene.stored:
            assert swap.load(offset) == filled_with(value), f"{scene.name}, step {step}: acknowledged, and not there"
        if not reached:
            break
    buffer.free()
    assert eventually(lambda: owner.stats()["broker"]["clients"] == 1)
    assert eventually(lambda: owner.areas()[0].held == 0)
    check_at_rest(arena_name(owner.endpoint), Path(owner._channel.greeting["spill_dir"]))
    swap.invalidate_area()
    return step - 1


def main() -> int:
    hook = Hook()
    with gcma_shm.embedded("2M", slots=256, clients=8) as owner:
        for scene in SCENES:
            print(f"{scene.name}: {run(owner, scene, hook)} steps", flush=True)
    print("all well")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
