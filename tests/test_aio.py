"""The asyncio client: what it does beside what every client does (tests/test_swap_contract.py runs for it, too), under asyncio's own loop and under uvloop."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import tempfile
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

import gcma_shm
from gcma_shm import (
    ArenaError,
    ArenaExhausted,
    BrokerUnavailable,
    Closed,
    NoSuchBuffer,
    ProtocolError,
    StaleHandle,
    aio,
)
from gcma_shm.clients import aio_client
from gcma_shm.clients.embedded import EmbeddedClient
from tests.client import held
from tests.keys import Keys, tcp_of
from tests.loops import AREA_PAGES, PAGE, SIZE, Runs, give_back, nothing_is_left, soon, steps
from tests.processes import WAIT_S, broker, eventually

pytestmark = pytest.mark.arena("16 pages")


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


def test_a_free_is_not_kept_waiting_by_attaches(client: EmbeddedClient, run: Runs) -> None:
    """However many there are, one after the other: the next ones let it pass."""

    async def main() -> None:
        async with aio.connect(client.endpoint) as own:
            named = client.alloc_contig(PAGE, name="b")
            buffer = await own.alloc_contig(PAGE)

            async def attach() -> None:
                while True:
                    await own.attach("b")

            attaching = [asyncio.ensure_future(attach()) for _ in range(4)]
            await steps(20)
            await asyncio.wait_for(buffer.free(), WAIT_S)
            for task in attaching:
                task.cancel()
            await asyncio.wait(attaching)
            named.free()
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


def test_what_connects_is_awaited_once(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        connecting = aio.connect(client.endpoint)
        own = await connecting
        with pytest.raises(RuntimeError, match="awaited before"):
            await connecting
        with pytest.raises(RuntimeError, match="awaited before"):
            async with connecting:
                raise AssertionError
        assert client.stats()["broker"]["clients"] == 2
        async with own:
            assert len(await own.areas()) == 1, "the first one is as before"
        failing = aio.connect(f"{client.endpoint}-of-nobody")
        with pytest.raises(BrokerUnavailable):
            await failing
        with pytest.raises(RuntimeError, match="awaited before"):
            await failing

    run(main())


def test_what_no_message_can_say_leaves_nothing_under_way(client: EmbeddedClient, run: Runs) -> None:
    async def main() -> None:
        async with aio.connect(client.endpoint) as own:
            unsayable: list[Coroutine[Any, Any, Any]] = [
                own.quota(client=1 << 70),
                own.quota(1 << 80),
                own.drain_area("\ud800"),
            ]
            for call in unsayable:
                with pytest.raises(ProtocolError):
                    await call
                assert not own._channel._pending
            buffer = await own.alloc_contig(PAGE)
            no_name: Any = 5
            misused: list[Coroutine[Any, Any, Any]] = [
                own.unlink(no_name),
                own.attach(no_name),
                own.attach_reservation(no_name),
                buffer.keep(no_name),
                own.alloc_contig(PAGE, name=no_name),
                own.reserve(PAGE, area=no_name),
            ]
            for call in misused:
                with pytest.raises(TypeError, match="name of type int"):
                    await call
            await buffer.free()

    run(main())
    with pytest.raises(ProtocolError):
        client.quota(client=1 << 70)
    assert client._channel._greeted, "and nobody is introduced again for it"


class SlowlyCleared:
    """Memory that is being cleared, by whichever thread, until it is told to end."""

    def __init__(self, span: Any) -> None:
        self._span = span
        self.nbytes = span.nbytes
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None

    def zero(self) -> None:
        self.thread = threading.current_thread()
        with memoryview(self._span):
            self.begun.set()
            assert self.go_on.wait(WAIT_S)


def test_memory_is_cleared_beside_the_loop(client: EmbeddedClient, run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """But little of it. Who is cancelled waits for nothing, and close for the thread: nobody else is given what it still writes to."""

    async def main() -> None:
        own = await aio.connect(client.endpoint)
        for at_once_max in (PAGE, 0):
            monkeypatch.setattr(aio_client, "CLEARED_AT_ONCE_MAX", at_once_max)
            async with await own.alloc_contig(PAGE, "a", offset=0) as buffer:
                buffer.numpy(PAGE)[:] = 7
            async with await own.alloc_contig(PAGE, "a", offset=0, zero=True) as buffer:
                assert not buffer.numpy(PAGE).any()
        buffer = await own.alloc_contig(PAGE)
        slow: Any = SlowlyCleared(buffer._span)
        clearing = asyncio.ensure_future(own._clear(buffer, slow))
        del buffer
        assert await soon(slow.begun.is_set)
        assert slow.thread is not threading.main_thread()
        clearing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await clearing
        del clearing
        gc.collect()
        assert held(client) == PAGE
        closing = asyncio.ensure_future(own.close())
        await steps(10)
        assert not closing.done()
        assert held(client) == PAGE
        late = await own.alloc_contig(PAGE)
        later: Any = SlowlyCleared(late._span)
        clearing = asyncio.ensure_future(own._clear(late, later))
        assert await soon(later.begun.is_set)
        slow.go_on.set()
        assert await soon(lambda: len(own._clearing) == 1)
        await steps(10)
        assert not closing.done(), "others began meanwhile"
        later.go_on.set()
        await asyncio.wait_for(closing, WAIT_S)
        await clearing
        assert held(client) == 0

    run(main())


def test_no_thread_to_sleep_in_just_now(client: EmbeddedClient, run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who would have to wait is told; who waits next has one."""

    async def main() -> None:
        async with aio.connect(client.endpoint) as own:
            whole = await own.alloc_contig(SIZE)

            def refuse(_thread: threading.Thread) -> None:
                raise RuntimeError("can't start new thread")

            with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="new thread"):
                patched.setattr(threading.Thread, "start", refuse)
                await own.alloc_contig(PAGE, timeout=None)
            assert await soon(lambda: client.stats()["broker"]["in_line"] == 0)
            waiting = asyncio.ensure_future(own.alloc_contig(PAGE, timeout=None))
            assert await soon(lambda: "gcma-wake" in [thread.name for thread in threading.enumerate()])
            await whole.free()
            await (await waiting).free()

    run(main())
