"""The asyncio client: what it does beside what every client does (tests/test_swap_contract.py runs for it, too), under asyncio's own loop and under uvloop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pytest
import uvloop

import gcma_shm
from gcma_shm import ArenaError, ArenaExhausted, BrokerUnavailable, Closed, NoSuchBuffer, StaleHandle, aio
from gcma_shm.clients.aio_channel import AsyncChannel
from gcma_shm.clients.aio_exchange import Pending
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.handles import Handle
from tests.keys import Keys, tcp_of
from tests.processes import WAIT_S, Said, broker, eventually, forked, in_fork, start_python, stopped

PAGE = 4096
SOAK_S = float(os.environ.get("GCMA_SOAK_S", "0"))
AREA_PAGES = 16
SIZE = AREA_PAGES * PAGE
T = TypeVar("T")
Runs = Callable[[Coroutine[Any, Any, Any]], Any]
NEW_LOOP: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


@pytest.fixture
def client() -> Iterator[EmbeddedClient]:
    """One area of 16 pages."""
    with gcma_shm.embedded("8M", areas={"a": SIZE}, clients=12) as owner:
        yield owner


@pytest.fixture(params=list(NEW_LOOP))
def run(request: pytest.FixtureRequest) -> Runs:
    def run(main: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=NEW_LOOP[request.param]) as runner:
            return runner.run(main)

    return run


def held(client: gcma_shm.Client) -> int:
    return sum(area.held for area in client.areas())


def nothing_is_left(client: gcma_shm.Client) -> bool:
    return held(client) == 0 and client.stats()["broker"]["in_line"] == 0


async def soon(condition: Callable[[], bool]) -> bool:
    """As `eventually`, and the loop goes on meanwhile."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.002)
            return True
    return False


async def steps(count: int) -> None:
    """So many turns of the loop."""
    for _ in range(count):
        await asyncio.sleep(0)


# --- the same client


def test_it_is_told_the_same(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        async with aio.connect(client.endpoint) as own:
            assert own.mapped
            assert (own.page_size, own.endpoint, own.arena_id) == (PAGE, client.endpoint, client.arena_id)
            assert str(own.number) in repr(own)
            async with await own.alloc_contig(PAGE, name="frame"):
                assert await own.areas() == client.areas()
                assert await own.names() == client.names()
                assert await own.quota(client=own.number) == client.quota(client=own.number)
                assert set(await own.stats()) == set(client.stats())
            assert (await own.quota("1M")).quota == 1 << 20
            assert (await own.drain_area("a")).drained
            assert not (await own.resume_area("a")).drained
            assert (await own.resize_area("a", SIZE // 2)).size == SIZE // 2
            with pytest.raises(TypeError):
                pickle.dumps(own)
        assert own.closed
        assert "closed" in repr(own)
        with pytest.raises(Closed):
            await own.areas()
        await own.close()

    run(main())


def test_buffers(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        async with aio.connect(client.endpoint) as own:
            buffer = await own.alloc_contig(2 * PAGE, "a", offset=3, zero=True, name="b")
            assert (buffer.nbytes, buffer.area, buffer.offset, buffer.name) == (2 * PAGE, "a", 3, "b")
            array = buffer.numpy(8, "int32")
            array[:] = 7
            with pytest.raises(BufferError):
                await buffer.free()
            with pytest.raises(BufferError):
                await own.close()
            assert not own.closed
            del array
            with client.attach("b") as theirs:
                assert theirs.numpy(8, "int32").tolist() == [7] * 8
            await buffer.free()
            assert held(client) == 0, "free returns when it is done"
            await buffer.free()
            with pytest.raises(StaleHandle):
                _ = buffer.view
            with pytest.raises(ArenaExhausted) as raised:
                await own.alloc_contig(SIZE + 1)
            assert raised.value.largest_free == SIZE
            with pytest.raises(ValueError, match="expected at least 1"):
                await own.alloc_contig(0)
            async with await own.alloc_contig(PAGE) as scoped:
                assert held(client) == PAGE
            assert scoped.freed
            assert held(client) == 0

    run(main())


def test_what_nobody_refers_to_is_given_back(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        async with aio.connect(client.endpoint) as own:
            buffer = await own.alloc_contig(PAGE)
            array = buffer.numpy(8)
            reservation = await own.reserve(PAGE)
            del buffer, reservation
            gc.collect()
            assert await soon(lambda: held(client) + client.areas()[0].reserved == PAGE), "the array keeps its memory"
            # In another thread, as the collector may run anywhere.
            await asyncio.to_thread(lambda arrays: arrays.clear(), [array])
            del array
            assert await soon(lambda: nothing_is_left(client))

    run(main())


def test_reservations(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        async with aio.connect(client.endpoint) as own:
            async with await own.reserve(4 * PAGE, name="r") as reservation:
                before = client.stats()["broker"]["requests"]
                buffer = reservation.claim()
                with buffer.view as view:
                    view[:3] = b"abc"
                with pytest.raises(ArenaExhausted):
                    reservation.claim()
                await buffer.free()
                after = client.stats()["broker"]["requests"]
                assert {name for name in after if after[name] != before.get(name)} <= {"stats", "ping"}, (
                    "no message (but ours, and questions whether we are known)"
                )
                with pytest.raises(TypeError):
                    await own.attach("r")
                other = client.attach_reservation("r")
                with other.claim():
                    waiting = asyncio.ensure_future(reservation.claim_in_turn(WAIT_S))
                    with pytest.raises(ArenaExhausted):
                        await reservation.claim_in_turn(0.01)
                    cancelled = asyncio.ensure_future(reservation.claim_in_turn())
                    await asyncio.sleep(0.01)
                    assert not waiting.done(), "and the loop has gone on"
                    cancelled.cancel()
                claimed = await waiting
                assert cancelled.cancelled()
                await claimed.free()
                other.release()
                same = await own.attach_reservation("r")
                await same.release()
            with pytest.raises(StaleHandle):
                reservation.claim()
            assert client.areas()[0].reserved == 0

    run(main())


def test_handles(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        async with aio.connect(client.endpoint) as own, aio.connect(client.endpoint) as second:
            buffer = await own.alloc_contig(PAGE, name="named")
            buffer.numpy(3)[:] = (1, 2, 3)
            handle = await buffer.hand_over()
            await buffer.free()
            assert held(client) == PAGE
            attached = await second.attach(handle)
            assert attached.numpy(3).tolist() == [1, 2, 3]
            by_name = await own.attach("named")
            with pytest.raises(TypeError):
                await own.attach_reservation("named")
            handed = await attached.hand_over()
            await attached.free()
            await by_name.free()
            # Loading a handle asks the broker, so it is this process's client that blocks which has it.
            with await asyncio.to_thread(pickle.loads, pickle.dumps(handed)) as loaded:
                assert isinstance(loaded, gcma_shm.Buffer)
                assert held(client) == PAGE
            assert held(client) == 0
            with pytest.raises(StaleHandle):
                await second.attach(handle)
            reservation = await own.reserve(PAGE)
            with pytest.raises(TypeError):
                await own.attach(await reservation.hand_over(0.001))
            with pytest.raises(NoSuchBuffer):
                await own.attach("nobody")
        assert eventually(lambda: nothing_is_left(client))

    run(main())


def test_pages_are_plain_calls_and_what_waits_is_awaited(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        async with aio.connect(client.endpoint) as own:
            swap = await own.swap(3, 100, "behind")
            page = os.urandom(PAGE)
            assert swap.store(5, page) is None  # type: ignore[func-returns-value] # and no coroutine
            assert swap.load(5) == page
            assert client.swap(3, 100, "behind").load(5) == page
            assert (len(swap), 5 in swap) == (1, True)
            came: list[int] = []
            asyncio.get_running_loop().call_soon(came.append, 1)
            await swap.sync()
            assert came == [1], "the loop goes on while it waits for the file"
            await swap.invalidate_area()
            with pytest.raises(Closed):
                swap.load(5)

    run(main())


def test_a_client_that_does_not_map(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        async with aio.connect(client.endpoint, mapped=False) as own:
            assert not own.mapped
            with pytest.raises(ArenaError, match="swap_by_messages"):
                await own.swap(3, 1000)
            with pytest.raises(ArenaError):
                await own.alloc_contig(PAGE)
            swap = await own.swap_by_messages(3, 1000, "behind")
            pages = [os.urandom(PAGE) for _ in range(300)]
            # Far more at once than the broker lets one session have under way; all of them to their own slots.
            await asyncio.gather(*(swap.store(n, page) for n, page in enumerate(pages)))
            assert await asyncio.gather(*(swap.load(n) for n in range(300))) == pages
            assert await swap.count() == 300
            assert "ProtocolError" not in client.stats()["broker"]["refusals"]

    run(main())


def test_over_tcp(tmp_path: Path, run: Runs) -> None:
    keys = Keys(tmp_path / "keys")
    ours = keys.make("tests")
    keys.authorize(tests="")

    async def main(endpoint: str) -> None:
        async with aio.connect(endpoint, **ours) as own:
            swap = await own.swap_by_messages(3, 10)
            await swap.store(1, bytes(PAGE))
            assert await swap.load(1) == bytes(PAGE)

    with broker(f"ipc://{tempfile.gettempdir()}/b/broker", *keys.broker_options()) as running:
        run(main(tcp_of(running)))


# --- many tasks


def test_each_reply_goes_to_its_request(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        async with aio.connect(client.endpoint) as own:
            made = [await own.alloc_contig(PAGE, name=f"n{n}") for n in range(AREA_PAGES)]

            async def attach(n: int) -> None:
                async with await own.attach(f"n{n % AREA_PAGES}") as buffer:
                    assert (buffer.name, buffer.offset) == (f"n{n % AREA_PAGES}", made[n % AREA_PAGES].offset)

            await asyncio.gather(*(attach(n) for n in range(500)))
            largest = 0

            async def look() -> None:
                nonlocal largest
                while True:
                    largest = max(largest, len(own._channel._pending))
                    await asyncio.sleep(0)

            looking = asyncio.ensure_future(look())
            await asyncio.gather(*(own.areas() for _ in range(100)))
            looking.cancel()
            assert largest > 10, "they do not wait for one another"
            # Nor are there more replies under way than the broker's pipe takes, which drops what is too much.
            assert largest <= client._channel.greeting["window"]

    run(main())


def test_a_free_beside_an_attach_to_the_same(client: EmbeddedClient, run: Runs) -> None:
    """Whichever comes first at the broker, which counts one hold of a client: what the attach returns is held."""

    async def main() -> None:
        async with aio.connect(client.endpoint) as own:
            for count in range(12):
                buffer = await own.alloc_contig(PAGE, name="b")
                handle = await buffer.hand_over()
                by_handle = asyncio.ensure_future(own.attach(handle))
                by_name = asyncio.ensure_future(own.attach("b"))
                dropped = asyncio.ensure_future(own.attach("b"))
                await steps(count)
                dropped.cancel()
                await asyncio.wait_for(buffer.free(), WAIT_S)
                attached = await by_handle, await by_name
                assert [name.name for name in client.names()] == ["b"]
                await attached[0].free()
                assert held(client) == PAGE
                await attached[1].free()
                for result in await asyncio.gather(dropped, return_exceptions=True):
                    await give_back(result)
                assert await soon(lambda: nothing_is_left(client))

    run(main())


def test_waiting_in_line(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        async with aio.connect(client.endpoint) as own:
            first = await own.alloc_contig(SIZE)
            served: list[int] = []

            async def wait(n: int) -> None:
                async with await own.alloc_contig(SIZE, timeout=None):
                    served.append(n)
                    await asyncio.sleep(0)

            waiting = []
            for n in range(20):
                waiting.append(asyncio.ensure_future(wait(n)))
                assert await soon(lambda n=n: client.stats()["broker"]["in_line"] == n + 1)  # type: ignore[misc] # n is bound
            assert [thread.name for thread in threading.enumerate()].count("gcma-wake") == 1, "one sleeps for all"
            assert len(await own.areas()) == 1, "and everything else goes on"
            await first.free()
            await asyncio.wait_for(asyncio.gather(*waiting), WAIT_S)
            assert served == list(range(20))
            other = client.alloc_contig(SIZE)
            with pytest.raises(ArenaExhausted):
                await own.alloc_contig(SIZE, timeout=0.05)
            task = asyncio.ensure_future(own.reserve(SIZE, timeout=WAIT_S))
            assert await soon(lambda: client.stats()["broker"]["in_line"] == 1)
            other.free()
            await (await task).release()
        assert await soon(lambda: "gcma-wake" not in [thread.name for thread in threading.enumerate()])
        assert nothing_is_left(client)

    run(main())


# --- cancelled

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


async def give_back(result: Any) -> None:
    if isinstance(result, aio.Buffer):
        await result.free()
    elif isinstance(result, aio.Reservation):
        await result.release()


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
                assert client.stats()["broker"]["in_line"] == 0
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


def test_keep_and_unlink(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        async with aio.connect(client.endpoint) as own:
            buffer = await own.alloc_contig(PAGE)
            buffer.numpy(1)[:] = 5
            await buffer.keep("kept")
            assert buffer.name == "kept"
            await buffer.free()
            assert held(client) == PAGE
            async with await own.attach("kept") as again:
                assert again.numpy(1)[0] == 5
                await own.unlink("kept")
                with pytest.raises(NoSuchBuffer):
                    await own.attach("kept")
                with pytest.raises(NoSuchBuffer):
                    await own.unlink("kept")
            assert held(client) == 0
            with pytest.raises(StaleHandle):
                await again.keep("late")

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
                await asyncio.sleep(0.01)
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


# --- the broker goes, or does not answer


def test_no_answer(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        async with aio.connect(client.endpoint, timeout=0.2) as own:
            swap = await own.swap(3, 10)
            with stopped(client.broker_pid):
                results = await asyncio.gather(*(own.alloc_contig(PAGE) for _ in range(4)), return_exceptions=True)
                assert all(isinstance(one, BrokerUnavailable) for one in results)
                swap.store(1, bytes(PAGE))
                assert swap.load(1) == bytes(PAGE), "pages go on"
            own._channel.timeout = WAIT_S
            assert len(await own.areas()) == 1
            assert await soon(lambda: nothing_is_left(client)), "what came too late was given back"

    run(main())


def test_nobody_there(run: Runs) -> None:
    async def main() -> None:
        endpoint = f"ipc://{tempfile.gettempdir()}/nobody/broker"
        with pytest.raises(BrokerUnavailable, match="no broker listens"):
            await aio.connect(endpoint)
        with pytest.raises(BrokerUnavailable):
            async with aio.connect(endpoint, timeout=0.05, wait_for_broker=0.05):
                raise AssertionError
        with pytest.raises(ValueError, match="timeout"):
            aio.connect(endpoint, timeout=-1)

    run(main())


def test_a_takeover(run: Runs) -> None:
    """Requests that the old broker took with it are sent again, but for those that may not be done twice; what is held stays."""
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    options = ("--area", f"a={SIZE}")

    async def main(first: Any) -> None:
        async with aio.connect(endpoint, wait_for_broker=WAIT_S) as own:
            kept = await own.alloc_contig(PAGE, name="kept")
            kept.numpy(1)[:] = 42
            reservation = await own.reserve(PAGE)
            claimed = reservation.claim()
            os.kill(first.pid, signal.SIGSTOP)
            asked = [asyncio.ensure_future(own.alloc_contig(PAGE)) for _ in range(5)]
            asked += [asyncio.ensure_future(own.attach("kept")) for _ in range(5)]
            told = [asyncio.ensure_future(own.areas()) for _ in range(5)]
            once = asyncio.ensure_future(kept.hand_over())
            dropped = [asyncio.ensure_future(own.alloc_contig(PAGE)) for _ in range(5)]
            await asyncio.sleep(0.01)
            for task in dropped:
                task.cancel()
            first.stop(signal.SIGKILL)
            with broker(endpoint, *options):
                buffers = await asyncio.gather(*asked)
                assert len({buffer.offset for buffer in buffers}) == 6
                assert [buffer.numpy(1)[0] for buffer in buffers[5:]] == [42] * 5
                assert all(len(areas) == 1 for areas in await asyncio.gather(*told))
                with pytest.raises(BrokerUnavailable, match="may have been done"):
                    await once
                assert (await own.areas())[0].held == 7 * PAGE
                for buffer in (*buffers, claimed, kept):
                    await buffer.free()
                await reservation.release()
                assert (await own.areas())[0].held == 0
                await own.close()

    with broker(endpoint, *options) as first:
        run(main(first))


def test_an_attach_that_was_served_by_a_broker_that_died(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reply is lost, and its handle spent. The hello tells of it, so the next broker keeps the memory until the attach comes again."""
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    options = ("--area", f"a={SIZE}")

    async def main(first: Any, maker: gcma_shm.Client) -> None:
        own = await aio.connect(endpoint, timeout=WAIT_S, wait_for_broker=WAIT_S)
        buffer = maker.alloc_contig(PAGE)
        buffer.numpy(1)[:] = 3
        handle = buffer.hand_over()
        buffer.free()
        with monkeypatch.context() as patched:
            patched.setattr(AsyncChannel, "take", lambda _channel, _frames: None)
            attaching = asyncio.ensure_future(own.attach(handle))
            assert await soon(lambda: maker.stats()["broker"]["requests"].get("attach") == 1)
            first.stop(signal.SIGKILL)
            await steps(10)
        with broker(endpoint, *options):
            async with await attaching as attached:
                assert attached.numpy(1)[0] == 3
            assert (await own.areas())[0].held == 0
            await own.close()
            maker.close()

    with broker(endpoint, *options) as first:
        run(main(first, gcma_shm.connect(endpoint, wait_for_broker=WAIT_S)))


def test_an_attach_that_is_cancelled_while_the_next_broker_is_greeted(
    run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dead broker had served it, and the hello has told the next one: which is told as well that nobody wants it any more."""
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    options = ("--area", f"a={SIZE}")
    greeted_with = AsyncChannel._greeted_with

    async def main(first: Any, maker: gcma_shm.Client) -> None:
        own = await aio.connect(endpoint, timeout=WAIT_S, wait_for_broker=WAIT_S)
        buffer = maker.alloc_contig(PAGE)
        handle = buffer.hand_over()
        buffer.free()
        with monkeypatch.context() as patched:
            patched.setattr(AsyncChannel, "take", lambda _channel, _frames: None)
            attaching = asyncio.ensure_future(own.attach(handle))
            assert await soon(lambda: maker.stats()["broker"]["requests"].get("attach") == 1)
            first.stop(signal.SIGKILL)
            await steps(10)

        def and_cancel(channel: AsyncChannel, reply: Any) -> None:
            greeted_with(channel, reply)
            attaching.cancel()

        with monkeypatch.context() as patched, broker(endpoint, *options):
            patched.setattr(AsyncChannel, "_greeted_with", and_cancel)
            with pytest.raises(asyncio.CancelledError):
                await attaching
            assert await soon(lambda: held(maker) == 0)
            await own.close()
            maker.close()

    with broker(endpoint, *options) as first:
        run(main(first, gcma_shm.connect(endpoint, wait_for_broker=WAIT_S)))


def test_a_broker_that_is_away_for_longer_than_the_timeout(run: Runs) -> None:
    """`wait_for_broker` is about all that wait: for a connection, for others' replies, and for the hello."""
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    options = ("--area", "a=4M")

    async def main(first: Any) -> None:
        async with aio.connect(endpoint, timeout=0.2, wait_for_broker=WAIT_S) as own:
            first.stop(signal.SIGKILL)
            tasks = [asyncio.ensure_future(own.alloc_contig(PAGE)) for _ in range(100)]
            await asyncio.sleep(0.5)  # the time that is told
            assert not any(task.done() for task in tasks)
            own._channel.timeout = WAIT_S
            with broker(endpoint, *options):
                for buffer in await asyncio.gather(*tasks):
                    await buffer.free()
                assert (await own.areas())[0].held == 0
                await own.close()

    with broker(endpoint, *options) as first:
        run(main(first))


@pytest.mark.timeout(120 + 3 * SOAK_S)
@pytest.mark.parametrize("seed", range(2))
def test_everything_at_once(run: Runs, seed: int) -> None:
    """Hundreds of tasks, cancelled at random, and brokers that are killed and taken over from. In the end nothing is held but what the tasks hold, and each
    reply went to its request. Once, or for GCMA_SOAK_S seconds.
    """
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    options = ("--area", "a=4M")
    random = np.random.default_rng(seed)
    print(f"seed {seed}")

    async def main(first: Any, stack: contextlib.ExitStack) -> None:
        async with aio.connect(endpoint, timeout=WAIT_S, wait_for_broker=WAIT_S) as own:
            kept: list[aio.Buffer] = []
            names = [await own.alloc_contig(PAGE, name=f"n{n}") for n in range(8)]
            done = 0

            async def work(n: int) -> None:
                nonlocal done
                for lap in range(12):
                    kind = (n + lap) % 5
                    if kind == 0:
                        async with await own.alloc_contig((1 + n % 7) * PAGE, timeout=WAIT_S) as buffer:
                            assert buffer.nbytes == (1 + n % 7) * PAGE
                            buffer.numpy(8, "int64")[:] = n
                            await asyncio.sleep(0)
                            assert buffer.numpy(8, "int64").tolist() == [n] * 8, "nobody else's memory"
                    elif kind == 1:
                        async with await own.attach(f"n{n % 8}") as buffer:
                            assert buffer.offset == names[n % 8].offset
                    elif kind == 2:
                        await own.areas()
                    elif kind == 3:
                        async with await own.reserve(PAGE, timeout=WAIT_S) as reservation:
                            await reservation.claim().free()
                    elif n % 10 == 1:
                        # Not to be done twice; and what is handed over, and whose task is cancelled, is free when its time is over.
                        with contextlib.suppress(BrokerUnavailable, StaleHandle):
                            async with await own.alloc_contig(PAGE, timeout=WAIT_S) as buffer:
                                handle = await buffer.hand_over(1)
                                await buffer.free()
                                async with await own.attach(handle) as again:
                                    assert again.offset == buffer.offset
                    elif n % 10 == 0:
                        kept.append(await own.alloc_contig(PAGE, timeout=WAIT_S))
                    done += 1

            tasks = [asyncio.ensure_future(work(n)) for n in range(200)]

            async def cancel() -> None:
                while True:
                    tasks[int(random.integers(len(tasks)))].cancel()
                    await asyncio.sleep(float(random.random()) * 0.01)

            cancelling = asyncio.ensure_future(cancel())
            running = first
            for _ in range(2):
                await asyncio.sleep(0.2)
                running.stop(signal.SIGKILL)
                running = await asyncio.to_thread(stack.enter_context, broker(endpoint, *options, size="64M"))
            results = await asyncio.gather(*tasks, return_exceptions=True)
            cancelling.cancel()
            wrong = [one for one in results if one is not None and not isinstance(one, asyncio.CancelledError)]
            assert not wrong
            assert done > 500
            expected = sum(buffer.nbytes for buffer in (*kept, *names))
            with gcma_shm.connect(endpoint) as other:
                assert await soon(lambda: held(other) == expected and other.areas()[0].reserved == 0), (
                    held(other),
                    expected,
                )
                assert await soon(lambda: other.stats()["broker"]["in_line"] == 0)
            for buffer in (*kept, *names):
                await buffer.free()
            assert (await own.areas())[0].held == 0
            assert not own._channel._pending
            assert not own._channel.holds.buffers()

    ends = time.monotonic() + SOAK_S
    while True:
        with contextlib.ExitStack() as stack:
            run(main(stack.enter_context(broker(endpoint, *options, size="64M")), stack))
        if time.monotonic() >= ends:
            break


# --- loops, threads, forks, ends


def test_another_loop_and_another_thread(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> aio.Client:
        own = await aio.connect(client.endpoint)
        with pytest.raises(RuntimeError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, own.areas())
        assert len(await own.areas()) == 1
        return own

    own = run(main())
    for call in (own.areas(), own.close()):
        with pytest.raises(RuntimeError, match="another event loop"):
            run(call)
    assert not own.closed
    assert client.stats()["broker"]["clients"] == 2
    del own
    gc.collect()
    assert eventually(lambda: client.stats()["broker"]["clients"] == 1), "its loop is closed, and it said bye"


def test_a_forgotten_client(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        own = await aio.connect(client.endpoint)
        buffer = await own.alloc_contig(PAGE)
        array = buffer.numpy(8)
        del own, buffer
        gc.collect()
        await asyncio.sleep(0)
        assert held(client) == PAGE, "an array keeps it"
        del array
        gc.collect()
        assert await soon(lambda: client.stats()["broker"]["clients"] == 1)

    run(main())
    assert nothing_is_left(client)


def test_close_ends_what_others_wait_for(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        own = await aio.connect(client.endpoint)
        whole = await own.alloc_contig(SIZE)
        swap = await own.swap_by_messages(3, 1000)
        waiting: list[Awaitable[Any]] = [own.alloc_contig(PAGE, timeout=None) for _ in range(3)]
        tasks = [asyncio.ensure_future(one) for one in waiting]
        assert await soon(lambda: client.stats()["broker"]["in_line"] == 3)
        with stopped(client.broker_pid):
            own._channel.timeout = 0.1
            tasks += [asyncio.ensure_future(swap.load(n)) for n in range(100)]
            tasks += [asyncio.ensure_future(own.areas()) for n in range(3)]
            await steps(3)
            await asyncio.gather(own.close(), own.close())
            results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), WAIT_S)
        assert all(isinstance(one, Closed | BrokerUnavailable) for one in results), results
        assert await soon(lambda: nothing_is_left(client))
        assert whole.freed

    run(main())


class BusyPlane:
    """A plane where an operation of another thread is under way for as long as it is busy."""

    def __init__(self, plane: Any) -> None:
        self._plane = plane
        self.idle = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plane, name)

    def close(self, timeout: float) -> bool:
        return bool(self._plane.close(0)) and self.idle.wait(timeout)


def test_a_close_that_times_out(client: EmbeddedClient, run: Runs) -> None:
    """Nothing new begins, and who waits in line is told; the next `close` succeeds."""

    async def main() -> None:
        own = await aio.connect(client.endpoint, timeout=WAIT_S)
        swap = await own.swap(3, 10)
        own._plane = busy = cast(Any, BusyPlane(own._plane))
        buffer = await own.alloc_contig(SIZE)
        waiting = asyncio.ensure_future(own.alloc_contig(PAGE, timeout=None))
        assert await soon(lambda: client.stats()["broker"]["in_line"] == 1)
        own._channel.timeout = 0.05
        with pytest.raises(TimeoutError, match="call close"):
            await own.close()
        assert not own.closed
        assert not buffer.freed, "views can be made of it again"
        with pytest.raises(Closed):
            await asyncio.wait_for(waiting, WAIT_S)
        assert await soon(lambda: client.stats()["broker"]["in_line"] == 0)
        with pytest.raises(Closed):
            swap.load(0)
        own._channel.timeout = WAIT_S
        closing = asyncio.ensure_future(own.close())
        await steps(5)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert not own.closed
        assert not buffer.freed
        busy.idle.set()
        await own.close()
        with pytest.raises(Closed):
            await own.areas()
        assert await soon(lambda: nothing_is_left(client) and client.stats()["broker"]["clients"] == 1)

    run(main())


def test_what_was_granted_and_cannot_be_had_is_given_back(
    client: EmbeddedClient, run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with aio.connect(client.endpoint) as own:

            def take(*_: Any) -> Any:
                raise MemoryError

            monkeypatch.setattr(own, "_take", take)
            for ask in (own.alloc_contig, own.reserve):
                with pytest.raises(MemoryError):
                    await ask(PAGE)
            assert await soon(lambda: nothing_is_left(client) and client.areas()[0].reserved == 0)

    run(main())


def test_close_while_others_are_being_introduced(client: EmbeddedClient, run: Runs) -> None:
    """Whatever the others stand at, no session is left behind: neither by a hello under way nor by one after the bye."""

    async def main() -> None:
        for count in range(30):
            own = await aio.connect(client.endpoint, mapped=count % 2 == 0)
            own._channel._greeted = False
            tasks = [asyncio.ensure_future(own.swap_by_messages(n, 10)) for n in range(5)]
            await steps(count // 2)
            closing = asyncio.ensure_future(own.close())
            await steps(count // 4)
            tasks += [asyncio.ensure_future(own.swap_by_messages(n, 10)) for n in range(5)]
            await closing
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, aio.MessageSwap | Closed)
        assert await soon(lambda: client.stats()["broker"]["clients"] == 1)

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


def test_a_forked_child_is_a_client_of_its_own(client: EmbeddedClient, run: Runs) -> None:
    """In a loop of its own. It holds what its parent held, and its end leaves the parent's loop and socket alone."""

    async def main() -> None:
        async with aio.connect(client.endpoint) as own:
            buffer = await own.alloc_contig(PAGE, name="b")
            buffer.numpy(1)[:] = 9
            waiting = asyncio.ensure_future(own.alloc_contig(SIZE, timeout=None))
            assert await soon(lambda: client.stats()["broker"]["in_line"] == 1)

            def child(said: Said) -> None:
                async def use() -> None:
                    said.say(own.number)
                    said.hear()
                    assert buffer.numpy(1)[0] == 9
                    async with await own.alloc_contig(PAGE) as mine:
                        said.say(mine.offset)
                    await buffer.free()

                asyncio.set_event_loop(None)
                asyncio.run(use())
                gc.collect()
                said.say("freed")

            with forked(child) as running:
                number = await asyncio.to_thread(running.receive)
                assert number != own.number
                waiting.cancel()
                await buffer.free()
                assert held(client) == PAGE, "the child's"
                running.tell()
                assert await asyncio.to_thread(running.receive) != buffer.offset
                assert await asyncio.to_thread(running.receive) == "freed"
                assert held(client) == 0
                async with await own.alloc_contig(PAGE, timeout=1):
                    assert len(await own.areas()) == 1
            async with await own.alloc_contig(PAGE):
                pass

    run(main())


@pytest.mark.parametrize("turns", [1, 3, 6, 12, 100])
def test_a_child_forked_while_it_connects(client: EmbeddedClient, run: Runs, turns: int) -> None:
    """It collects what it finds, and runs and closes a loop of its own; the parent's session, socket and loop are as before. Nor does it keep
    the parent's lock: when the parent is closed, its number is free.
    """

    def child(said: Said) -> None:
        asyncio.set_event_loop(None)
        channel = connecting._client._channel
        if channel._socket is not None:
            channel._socket._part()  # as the collector would
        asyncio.run(asyncio.sleep(0))
        gc.collect()
        said.say("collected")
        said.hear()

    connecting = aio.connect(client.endpoint, prefault=True)

    async def main() -> None:
        task = asyncio.ensure_future(connecting._connected())
        await steps(turns)
        with forked(child) as running:
            assert await asyncio.to_thread(running.receive) == "collected"
            own = await asyncio.wait_for(task, WAIT_S)
            async with await own.alloc_contig(PAGE):
                await asyncio.gather(*(own.areas() for _ in range(50)))
            await own.close()
            assert held(client) == 0
            running.tell()

    run(main())
    assert eventually(lambda: client.stats()["broker"]["clients"] == 1)


def test_a_fork_in_another_thread(client: EmbeddedClient, run: Runs) -> None:
    """While the loop is busy: a child holds a buffer, or does not, and the broker thinks the same."""

    async def main() -> None:
        async with aio.connect(client.endpoint) as own:

            async def churn() -> None:
                while True:
                    async with await own.alloc_contig(PAGE):
                        pass

            churning = asyncio.ensure_future(churn())
            for _ in range(10):
                await asyncio.to_thread(in_fork, lambda _: own._channel.holds.buffers())
            churning.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await churning
        assert await soon(lambda: nothing_is_left(client))

    run(main())


CTRL_C = """
import asyncio, sys
import gcma_shm.aio

async def main():
    async with gcma_shm.aio.connect(sys.argv[1]) as client:
        try:
            await client.alloc_contig(int(sys.argv[2]), timeout=None)
        except asyncio.CancelledError:
            print((await client.areas())[0].held, (await client.stats())["broker"]["in_line"], flush=True)
            raise

if sys.argv[3] == "uvloop":
    import uvloop as loops
else:
    import asyncio as loops
try:
    loops.run(main())
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("loop", NEW_LOOP)
def test_ctrl_c(client: EmbeddedClient, loop: str) -> None:
    first = client.alloc_contig(SIZE)
    process = start_python(CTRL_C, client.endpoint, str(SIZE), loop)
    try:
        assert eventually(lambda: client.stats()["broker"]["in_line"] == 1)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
        process.wait()
    assert out.splitlines() == [f"{SIZE} 0", "interrupted"]
    first.free()
    assert nothing_is_left(client)


def test_ctrl_c_in_the_middle_of_a_reply(client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a loop that does not make a cancellation of it: whose reply is lost nobody knows, so all is begun again."""
    settle = AsyncChannel._settle
    interrupted: list[int] = []

    def interrupt(channel: AsyncChannel, reply: Any) -> None:
        if "buffer" in reply.results and not interrupted:
            interrupted.append(1)
            raise KeyboardInterrupt
        settle(channel, reply)

    loop = asyncio.new_event_loop()
    own = loop.run_until_complete(aio.connect(client.endpoint)._connected())
    monkeypatch.setattr(AsyncChannel, "_settle", interrupt)
    tasks = [loop.create_task(own.alloc_contig(PAGE)) for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(tasks[2])
    buffers = loop.run_until_complete(asyncio.wait_for(asyncio.gather(*tasks), WAIT_S))
    assert len({buffer.offset for buffer in buffers}) == 3
    assert eventually(lambda: held(client) == 3 * PAGE)
    for buffer in buffers:
        loop.run_until_complete(buffer.free())
    assert held(client) == 0
    loop.run_until_complete(own.close())
    loop.close()
