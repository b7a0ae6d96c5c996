"""Calls of the asyncio client that are cancelled at any moment: what was granted meanwhile comes back, and nobody else is disturbed."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from gcma_shm import NoSuchBuffer, aio
from gcma_shm.clients.aio_exchange import Pending
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.handles import Handle
from tests.client import held
from tests.loops import PAGE, SIZE, Runs, give_back, nothing_is_left, soon, steps
from tests.processes import WAIT_S, stopped

pytestmark = pytest.mark.arena("16 pages")


ASKED: dict[str, Callable[[aio.Client, Any], Coroutine[Any, Any, Any]]] = {
    "alloc": lambda own, _: own.alloc_contig(PAGE),
    "reserve": lambda own, _: own.reserve(PAGE),
    "attach": lambda own, _: own.attach("b"),
    "attach a reservation": lambda own, _: own.attach_reservation("r"),
    "line": lambda own, _: own.alloc_contig(SIZE - 2 * PAGE, timeout=WAIT_S),
    "reservation in line": lambda own, _: own.reserve(SIZE - 2 * PAGE, timeout=WAIT_S),
    "free": lambda own, buffer: buffer.free(),
    "swap": lambda own, _: own.swap(7, 10),
}


@pytest.mark.parametrize("what", ASKED)
def test_cancelled_after_any_number_of_steps(client: EmbeddedClient, run: Runs, what: str) -> None:
    """And what was granted comes back, whether the reply came before, after, or just then."""

    async def main() -> None:
        async with aio.connect(client.endpoint) as own:
            named = client.alloc_contig(PAGE, name="b"), client.reserve(PAGE, name="r")
            cancelled = 0
            for count in range(60):
                buffer = await own.alloc_contig(PAGE)
                task = asyncio.ensure_future(ASKED[what](own, buffer))
                beside = asyncio.ensure_future(own.areas())
                await steps(count // 2)
                if what != "free":
                    freeing = asyncio.ensure_future(buffer.free())
                await steps(count - count // 2)
                task.cancel()
                try:
                    await give_back(await task)
                except asyncio.CancelledError:
                    cancelled += 1
                    if what == "free" and not buffer.freed:  # cancelled before it began
                        await buffer.free()
                assert len(await beside) == 1, "nobody else is disturbed"
                if what != "free":
                    await freeing
                assert await soon(lambda: (held(client), client.areas()[0].reserved) == (PAGE, PAGE))
                assert await soon(lambda: client.stats()["broker"]["in_line"] == 0)
            assert cancelled, "some were too late, but not all"
            named[0].free()
            named[1].release()

    run(main())


@pytest.mark.parametrize("what", ["alloc", "reserve", "attach", "attach a reservation", "line"])
def test_cancelled_between_the_reply_and_the_task(
    client: EmbeddedClient, run: Runs, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply is read, and its grant taken; the task is cancelled before it has seen that."""
    settle = Pending.settle

    async def main() -> None:
        async with aio.connect(client.endpoint) as own:
            named = client.alloc_contig(PAGE, name="b"), client.reserve(PAGE, name="r")
            task: asyncio.Future[Any]

            def and_cancel(one: Pending, reply: Any) -> None:
                settle(one, reply)
                if one.request.operation.startswith(("alloc", "reserve", "attach", "collect")):
                    task.cancel()

            for _ in range(3):
                buffer = await own.alloc_contig(PAGE)
                monkeypatch.setattr(Pending, "settle", and_cancel)
                task = asyncio.ensure_future(ASKED[what](own, buffer))
                with pytest.raises(asyncio.CancelledError):
                    await task
                monkeypatch.undo()
                await buffer.free()
                assert await soon(lambda: (held(client), client.areas()[0].reserved) == (PAGE, PAGE))
                assert await soon(lambda: client.stats()["broker"]["in_line"] == 0)
            named[0].free()
            named[1].release()

    run(main())


def test_a_claims_handle_that_is_cancelled(client: EmbeddedClient, run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back is the part in the claim, and nothing of the reservation: it can be claimed again as soon as its maker has freed it."""
    settle = Pending.settle

    async def main() -> None:
        async with aio.connect(client.endpoint) as own:
            reservation = client.reserve(PAGE)
            task: asyncio.Future[aio.Buffer]

            def and_cancel(one: Pending, reply: Any) -> None:
                settle(one, reply)
                task.cancel()

            for count in range(40):
                claimed = await asyncio.to_thread(reservation.claim, WAIT_S)
                handle = Handle(claimed.reference)
                task = asyncio.ensure_future(own.attach(handle))
                if count % 2:
                    monkeypatch.setattr(Pending, "settle", and_cancel)
                else:
                    await steps(count // 2)
                    task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await (await task).free()
                monkeypatch.undo()
                claimed.free()
                assert await soon(lambda: not own._channel.holds.shares())
            (await asyncio.to_thread(reservation.claim, WAIT_S)).free()
            reservation.release()
            assert await soon(lambda: client.areas()[0].reserved == 0)

    run(main())


def test_keep_and_unlink_that_are_cancelled(client: EmbeddedClient, run: Runs) -> None:
    """Done, or not; and whoever asks next is told which."""

    async def main() -> None:
        async with aio.connect(client.endpoint) as own:
            for count in range(20):
                buffer = await own.alloc_contig(PAGE)
                task = asyncio.ensure_future(buffer.keep("kept"))
                await steps(count)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await buffer.keep("kept")  # a second time has no effect
                await buffer.free()
                task = asyncio.ensure_future(own.unlink("kept"))
                await steps(count)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                with contextlib.suppress(NoSuchBuffer):
                    await own.unlink("kept")
                assert nothing_is_left(client)

    run(main())


def test_cancelled_while_the_broker_is_stopped(client: EmbeddedClient, run: Runs) -> None:
    """What it grants when it goes on is given back without anybody asking."""

    async def main() -> None:
        async with aio.connect(client.endpoint) as own:
            with stopped(client.broker_pid):
                tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(own.alloc_contig(PAGE)) for _ in range(5)]
                tasks += [asyncio.ensure_future(own.reserve(PAGE)) for _ in range(5)]
                tasks += [asyncio.ensure_future(own.alloc_contig(SIZE, timeout=WAIT_S)) for _ in range(5)]
                assert await soon(lambda: len(own._channel._pending) == 15), "all are under way"
                for task in tasks:
                    task.cancel()
                assert all(
                    isinstance(one, asyncio.CancelledError)
                    for one in await asyncio.gather(*tasks, return_exceptions=True)
                )
            assert await soon(lambda: client.stats()["broker"]["requests"].get("free_contig", 0) >= 10)
            assert await soon(lambda: nothing_is_left(client) and client.areas()[0].reserved == 0)
            async with await own.alloc_contig(SIZE):
                pass

    run(main())


def test_timeouts_of_asyncio(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        async with aio.connect(client.endpoint) as own, await own.alloc_contig(SIZE):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await own.alloc_contig(SIZE, timeout=None)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(own.reserve(PAGE, timeout=None), 0.05)
            assert await soon(lambda: client.stats()["broker"]["in_line"] == 0)
        assert nothing_is_left(client)

    run(main())


def test_a_batch_that_is_cancelled(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        async with aio.connect(client.endpoint, mapped=False) as own:
            swap = await own.swap_by_messages(3, 2000, "behind")
            pages = os.urandom(PAGE) * 2000
            out = bytearray(len(pages))
            for count in range(0, 40, 2):
                for call in (swap.store_many(range(2000), pages), swap.load_many(range(2000), out)):
                    task = asyncio.ensure_future(call)
                    await steps(count)
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
            await swap.store_many(range(2000), pages)
            assert all(await swap.load_many(range(2000), out))
            assert out == pages
            assert "ProtocolError" not in client.stats()["broker"]["refusals"]

    run(main())


def test_a_connect_that_is_cancelled_leaves_no_session(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        for count in range(40):
            task = asyncio.ensure_future(aio.connect(client.endpoint)._connected())
            await steps(count)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await (await task).close()
        assert await soon(lambda: client.stats()["broker"]["clients"] == 1)

    run(main())
