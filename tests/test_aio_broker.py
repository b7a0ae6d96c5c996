"""The asyncio client when its broker does not answer, is killed, comes back, or does not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import gcma_shm
from gcma_shm import BrokerUnavailable, Closed, StaleHandle, aio, messages
from gcma_shm.clients.aio_channel import AsyncChannel
from gcma_shm.clients.embedded import EmbeddedClient
from tests.client import held
from tests.loops import PAGE, SIZE, Runs, nothing_is_left, soon, steps
from tests.processes import WAIT_S, Broker, broker, stop, stopped

pytestmark = pytest.mark.arena("16 pages")

SOAK_S = float(os.environ.get("GCMA_SOAK_S", "0"))


def test_no_answer(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        async with aio.connect(client.endpoint) as own:
            swap = await own.swap(3, 10)
            with stopped(client.broker_pid):
                own._channel.timeout = 0.2
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
        async with aio.connect(endpoint, timeout=WAIT_S, wait_for_broker=WAIT_S) as own:
            kept = await own.alloc_contig(PAGE, name="kept")
            kept.numpy(1)[:] = 42
            reservation = await own.reserve(PAGE)
            claimed = reservation.claim()
            stop(first.pid)
            asked = [asyncio.ensure_future(own.alloc_contig(PAGE)) for _ in range(5)]
            asked += [asyncio.ensure_future(own.attach("kept")) for _ in range(5)]
            told = [asyncio.ensure_future(own.areas()) for _ in range(5)]
            once = asyncio.ensure_future(kept.hand_over())
            dropped = [asyncio.ensure_future(own.alloc_contig(PAGE)) for _ in range(5)]
            assert await soon(lambda: len(own._channel._pending) == 21), "all are under way"
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


async def attach_whose_reply_is_lost(
    endpoint: str, first: Broker, maker: gcma_shm.Client, monkeypatch: pytest.MonkeyPatch
) -> tuple[aio.Client, asyncio.Future[aio.Buffer]]:
    """Of a handle that is spent: the broker has served it, and is dead. The memory begins with a 3."""
    own = await aio.connect(endpoint, timeout=WAIT_S, wait_for_broker=WAIT_S)
    buffer = maker.alloc_contig(PAGE)
    buffer.numpy(1)[:] = 3
    handle = buffer.hand_over()
    buffer.free()
    lost: list[Any] = []

    def lose(_channel: AsyncChannel, frames: Any) -> None:
        reply = messages.decode_reply([frames[0].bytes])
        if "buffer" in reply.results:
            lost.append(reply)

    with monkeypatch.context() as patched:
        patched.setattr(AsyncChannel, "take", lose)
        attaching = asyncio.ensure_future(own.attach(handle))
        assert await soon(lambda: bool(lost))  # or it may still be on its way when it is no longer to be lost
        first.stop(signal.SIGKILL)
        await steps(10)
    return own, attaching


def test_an_attach_that_was_served_by_a_broker_that_died(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hello tells of it, so the next broker keeps the memory until the attach comes again."""
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    options = ("--area", f"a={SIZE}")

    async def main(first: Broker, maker: gcma_shm.Client) -> None:
        own, attaching = await attach_whose_reply_is_lost(endpoint, first, maker, monkeypatch)
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
    """The hello has told of it: and the next broker is told as well that nobody wants it any more."""
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    options = ("--area", f"a={SIZE}")
    greeted_with = AsyncChannel._greeted_with

    async def main(first: Broker, maker: gcma_shm.Client) -> None:
        own, attaching = await attach_whose_reply_is_lost(endpoint, first, maker, monkeypatch)

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


async def all_are_served(own: aio.Client, tasks: Sequence[asyncio.Future[aio.Buffer]]) -> None:
    """By the next broker; and closes the client while that is there."""
    for buffer in await asyncio.gather(*tasks):
        await buffer.free()
    assert (await own.areas())[0].held == 0
    await own.close()


def test_a_broker_that_is_away_for_longer_than_the_timeout(run: Runs) -> None:
    """`wait_for_broker` is about all that wait: for a connection, for others' replies, and for the hello."""
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    options = ("--area", "a=4M")

    async def main(first: Any) -> None:
        async with aio.connect(endpoint, wait_for_broker=WAIT_S) as own:
            first.stop(signal.SIGKILL)
            own._channel.timeout = 0.2
            tasks = [asyncio.ensure_future(own.alloc_contig(PAGE)) for _ in range(100)]
            await asyncio.sleep(0.5)  # the time that is told
            assert not any(task.done() for task in tasks)
            own._channel.timeout = WAIT_S
            with broker(endpoint, *options):
                await all_are_served(own, tasks)

    with broker(endpoint, *options) as first:
        run(main(first))


def test_requests_under_way_when_the_broker_goes_for_longer_than_the_timeout(run: Runs) -> None:
    """The next one is asked whether it knows them before they are given up."""
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    options = ("--area", f"a={SIZE}")

    async def main(first: Broker) -> None:
        async with aio.connect(endpoint, timeout=WAIT_S, wait_for_broker=WAIT_S) as own:
            stop(first.pid)
            tasks = [asyncio.ensure_future(own.alloc_contig(PAGE)) for _ in range(5)]
            await steps(10)
            first.stop(signal.SIGKILL)
            assert len(own._channel._pending) == 5
            for one in own._channel._pending.values():
                one.deadline = asyncio.get_running_loop().time()
            assert await soon(lambda: own._channel._away)
            await steps(10)
            assert not any(task.done() for task in tasks)
            with broker(endpoint, *options):
                await all_are_served(own, tasks)

    with broker(endpoint, *options) as first:
        run(main(first))


def test_close_waits_for_no_broker_that_has_ended(run: Runs) -> None:
    """Nor do those whose requests are under way, or were never sent."""
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    for_ever = 1e6  # as long as no test lasts

    async def main(first: Broker) -> None:
        own = await aio.connect(endpoint, timeout=for_ever, wait_for_broker=for_ever)
        stop(first.pid)
        tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(own.alloc_contig(PAGE))]
        await steps(10)
        first.stop(signal.SIGKILL)
        assert await soon(lambda: own._channel._away)
        tasks.append(asyncio.ensure_future(own.areas()))
        await steps(10)
        await asyncio.wait_for(own.close(), WAIT_S)
        told = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), WAIT_S)
        assert all(isinstance(one, Closed | BrokerUnavailable) for one in told), told
        assert own.closed

    with broker(endpoint, "--area", f"a={SIZE}") as first:
        run(main(first))
    with broker(endpoint, "--area", f"a={SIZE}"):  # which finds the arena, and leaves nothing
        pass


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
            # A half of them, or on a slow machine hardly one would come to its end.
            mortal = random.permutation(len(tasks))[: len(tasks) // 2]

            async def cancel() -> None:
                while True:
                    tasks[int(random.choice(mortal))].cancel()
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
            assert done >= 12 * len(tasks) // 2
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
