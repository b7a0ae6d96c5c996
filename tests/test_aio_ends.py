"""How the asyncio client ends: closed, forgotten, in the middle of others' calls, by Ctrl-C; and in whose loop, thread and process it may be used."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable
from typing import Any, cast

import pytest

from gcma_shm import BrokerUnavailable, Closed, aio
from gcma_shm.clients.aio_channel import AsyncChannel
from gcma_shm.clients.embedded import EmbeddedClient
from tests.client import held
from tests.loops import NEW_LOOP, PAGE, SIZE, Runs, nothing_is_left, soon, steps
from tests.processes import WAIT_S, Said, eventually, forked, in_fork, start_python, stopped

pytestmark = pytest.mark.arena("16 pages")


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
        assert await soon(lambda: client.stats()["broker"]["clients"] == 1 and nothing_is_left(client))

    run(main())


def test_an_error_that_ends_a_block_is_not_replaced(client: EmbeddedClient, run: Runs) -> None:
    """Nor is a timeout, by the BufferError of an array in a frame that it comes through."""

    async def work(bound: asyncio.Timeout) -> None:
        async with (
            aio.connect(client.endpoint) as own,
            own,
            await own.reserve(PAGE) as reservation,
            await own.alloc_contig(PAGE) as buffer,
            reservation.claim() as claimed,
        ):
            arrays = buffer.numpy(8), claimed.numpy(8)
            bound.reschedule(asyncio.get_running_loop().time())  # here, and not on the way here
            await asyncio.sleep(WAIT_S)
            del arrays

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as bound:
                await work(bound)
        gc.collect()
        assert await soon(lambda: client.stats()["broker"]["clients"] == 1)
        with pytest.raises(BufferError):
            async with aio.connect(client.endpoint) as own:
                array = (await own.alloc_contig(PAGE)).numpy(8)
        del array
        await own.close()

    run(main())
    assert nothing_is_left(client)
    assert client.areas()[0].reserved == 0


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


def test_who_waits_for_room_is_told_of_the_end(client: EmbeddedClient, run: Runs) -> None:
    """At once, and not when its own time is over."""

    async def main() -> None:
        own = await aio.connect(client.endpoint, mapped=False, timeout=2 * WAIT_S)
        swap = await own.swap_by_messages(3, 1000)
        with stopped(client.broker_pid):
            tasks = [asyncio.ensure_future(swap.load(n)) for n in range(200)]
            await steps(3)
            own._channel.part()
            results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), WAIT_S)
        assert [type(one) for one in results] == [Closed] * 200
        assert await soon(lambda: client.stats()["broker"]["clients"] == 1)

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


def test_nobody_is_introduced_again_once_the_goodbye_is_on_its_way(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        own = await aio.connect(client.endpoint, timeout=WAIT_S)
        with stopped(client.broker_pid):
            closing = asyncio.ensure_future(own.close())
            await steps(5)
            assert not closing.done()
            own._channel._greeted = False  # as when the broker does not know us
            with pytest.raises(Closed):
                await own.areas()
            assert own._channel._greeting_task is None
        await closing
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
                assert await soon(lambda: client.stats()["broker"]["in_line"] == 0), "or it would be in the child's way"
                running.tell()
                assert await asyncio.to_thread(running.receive) != buffer.offset
                assert await asyncio.to_thread(running.receive) == "freed"
                assert held(client) == 0
                async with await own.alloc_contig(PAGE, timeout=WAIT_S):
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


LEFT_OPEN = """
import asyncio, sys
import gcma_shm.aio

async def main():
    global client, buffer, array
    client = await gcma_shm.aio.connect(sys.argv[1])
    buffer = await client.alloc_contig(int(sys.argv[2]))
    array = buffer.numpy(4)

if sys.argv[3] == "uvloop":
    import uvloop as loops
else:
    import asyncio as loops
loops.run(main())
"""


@pytest.mark.parametrize("loop", NEW_LOOP)
def test_the_interpreter_ends_without_a_word(client: EmbeddedClient, loop: str) -> None:
    """With a client that nobody closed, its array, and a loop that is closed before."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", LEFT_OPEN, client.endpoint, str(SIZE), loop],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    said = [
        line for line in done.stderr.splitlines() if not line.startswith("Executing ")
    ]  # asyncio's, of a slow machine
    assert (done.returncode, done.stdout, said) == (0, "", [])
    assert eventually(lambda: nothing_is_left(client) and client.stats()["broker"]["clients"] == 1)
