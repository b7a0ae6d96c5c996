"""Areas with policies, and what can be done to them while they are in use."""

from __future__ import annotations

import contextlib
import itertools
import json
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest

import gcma_shm
from gcma_shm import AreaInfo, ArenaExhausted, NoSuchArea
from gcma_shm.areas import AreaSpec
from gcma_shm.arena import open_arena
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.endpoint import arena_name
from tests.client import page_of
from tests.using_areas import PAGE, SLOTS, K, M, all_there, area, fill, fill_until_lent, gcma

pytestmark = pytest.mark.arena("two areas")


def add_up(info: AreaInfo) -> None:
    assert info.size == info.held + info.lent + info.free
    assert min(info.held, info.lent, info.free, info.reserved, info.largest_free) >= 0
    assert info.held + info.largest_free <= info.size
    assert info.reserved + info.largest_free <= info.size
    assert all(figure % PAGE == 0 for figure in (info.size, info.held, info.lent, info.reserved, info.largest_free))
    if not info.cache or info.drained:
        assert info.lent == 0
    if info.drained:
        assert info.largest_free == 0


# --- figures


POLICIES: dict[str, tuple[int | str | AreaSpec, dict[str, Any]]] = {
    "plain": ("1M", {}),
    "bytes": (M, {}),
    "rounded": (M - 1, {}),
    "off": ("1M,cache=off", {"cache": False}),
    "on": ("1 MiB, cache=on", {"cache": True}),
    "aligned": ("1M,align=64K", {"align": 64 * K}),
    "shared": ("1M,share=50", {"share": 50}),
    "percent": ("1M,share=50%", {"share": 50}),
    "all": ("1M,cache=off,align=64K,share=75", {"cache": False, "align": 64 * K, "share": 75}),
    "object": (AreaSpec(M, cache=False, share=25), {"cache": False, "share": 25}),
}


@pytest.mark.parametrize(("spec", "told"), POLICIES.values(), ids=POLICIES)
def test_figures_add_up_for_every_policy(spec: int | str | AreaSpec, told: dict[str, Any]) -> None:
    with gcma_shm.embedded("4M", areas={"x": spec, "rest": "512K"}) as client:

        def look(**expected: int) -> AreaInfo:
            for info in client.areas():
                add_up(info)
            found = area(client, "x")
            assert {name: getattr(found, name) for name in expected} == expected
            return found

        share = told.get("share", 100) * M // 100
        first = look(size=M, held=0, reserved=0, lent=0, free=M, largest_free=share)
        assert (first.cache, first.drained, first.align, first.share) == (
            told.get("cache", True),
            False,
            told.get("align", PAGE),
            told.get("share", 100),
        )
        swap = fill(client)
        if first.cache:
            fill_until_lent(client, "x")
        buffer = client.alloc_contig(10 * PAGE, "x")
        look(held=10 * PAGE, reserved=0)
        reservation = client.reserve(10 * PAGE, "x")
        look(held=10 * PAGE, reserved=10 * PAGE)
        fill(client)
        with reservation.claim():
            look(held=20 * PAGE, reserved=10 * PAGE)
        fill(client)
        look(held=10 * PAGE, reserved=10 * PAGE)
        assert all_there(swap)
        reservation.release()
        buffer.free()
        look(held=0, reserved=0, largest_free=share)
        with client.alloc_contig(share, "x"):
            look(held=share, largest_free=0)
            fill(client)
            look(held=share, largest_free=0)
        assert all_there(swap)
        stats = client.stats()["areas"]["x"]
        assert (stats["size"], stats["share"], stats["cache"]) == (M, first.share, first.cache)


def test_figures_add_up_under_random_use() -> None:
    specs = {"a": "1M", "b": "512K,cache=off", "c": "512K,align=16K,share=60"}
    with gcma_shm.embedded("4M", areas=specs) as client:
        rng = random.Random(3)
        swap = fill(client)
        asks: list[Callable[..., Any]] = [client.alloc_contig, client.reserve]
        kept: list[Any] = []
        for n in range(300):
            with contextlib.suppress(ArenaExhausted):
                ask = rng.choice(asks)
                kept.append(ask(rng.randint(1, 30) * PAGE, rng.choice([None, "a", "b", "c"])))
            if kept and rng.random() < 0.5:
                kept.pop(rng.randrange(len(kept))).__exit__(None, None, None)
            for k in range(20):
                slot = (20 * n + k) % SLOTS
                swap.store(slot, page_of(slot))
            for info in client.areas():
                add_up(info)
            places = sorted((one.area, one.offset, one.nbytes // PAGE) for one in kept)
            for (area_, at, count), (next_area, next_at, _) in itertools.pairwise(places):
                assert area_ != next_area or at + count <= next_at, "two guests overlap"
        total = client.areas()
        assert sum(info.held + info.reserved for info in total) == sum(one.nbytes for one in kept)
        for one in kept:
            one.__exit__(None, None, None)
        assert all((info.held, info.reserved) == (0, 0) for info in client.areas())
        assert all_there(swap)


# --- where a buffer goes


def test_without_area_it_goes_where_it_fits_best() -> None:
    with gcma_shm.embedded("8M", areas={"large": "2M", "small": "512K", "middle": "1M"}) as client:
        for ask in (client.alloc_contig, client.reserve):
            for nbytes, expected in ((PAGE, "small"), (512 * K, "small"), (513 * K, "middle"), (2 * M, "large")):
                with ask(nbytes) as got:
                    assert got.area == expected
        with (
            client.alloc_contig(500 * K),
            client.alloc_contig(500 * K) as second,
            client.alloc_contig(500 * K) as third,
        ):
            assert [second.area, third.area] == ["middle", "middle"]
            with client.alloc_contig(12 * K) as fourth:
                assert fourth.area == "small", "its last pages"
        client.drain_area("small")
        with client.alloc_contig(PAGE) as got:
            assert got.area == "middle"
        with pytest.raises(ArenaExhausted) as raised:
            client.alloc_contig(2 * M + 1)
        assert raised.value.largest_free == 2 * M


def test_a_share_is_what_guests_may_have() -> None:
    with gcma_shm.embedded("4M", areas={"x": "1M,share=50"}) as client:
        first = client.alloc_contig(256 * K)
        second = client.reserve(256 * K)
        for ask in (client.alloc_contig, client.reserve):
            with pytest.raises(ArenaExhausted) as raised:
                ask(PAGE)
            assert raised.value.largest_free == 0
        fill_until_lent(client, "x")
        with second.claim():
            fill(client)
            info = area(client, "x")
            assert (info.held, info.largest_free) == (512 * K, 0)
            assert info.lent + info.free == 512 * K, "always the cache's"
        first.free()
        assert area(client, "x").largest_free == 256 * K
        client.alloc_contig(256 * K).free()
        second.release()
        client.alloc_contig(512 * K).free()
        with pytest.raises(ArenaExhausted):
            client.alloc_contig(512 * K + 1)


def test_align_up_to_the_areas_size(client: EmbeddedClient) -> None:
    for align in (PAGE << n for n in range(9)):
        with (
            client.alloc_contig(PAGE, "a") as first,
            client.alloc_contig(PAGE, "a", align=min(align, M // 2)) as second,
        ):
            assert second.offset * PAGE % min(align, M // 2) == 0
            assert first.offset != second.offset
    with client.alloc_contig(PAGE, "a", align=M) as whole:
        assert whole.offset == 0
        with pytest.raises(ArenaExhausted):
            client.alloc_contig(PAGE, "a", align=M)
    with client.alloc_contig(M, "a", align=M) as whole:
        assert (whole.offset, whole.nbytes) == (0, M)


def test_an_areas_own_alignment() -> None:
    with gcma_shm.embedded("4M", areas={"x": "1M,align=128K"}) as client:
        kept: list[Any] = [client.alloc_contig(PAGE), *(client.reserve(PAGE) for _ in range(3))]
        assert sorted(one.offset * PAGE for one in kept) == [0, 128 * K, 256 * K, 384 * K]
        with client.alloc_contig(PAGE, align=256 * K) as more:
            assert more.offset * PAGE == 512 * K
        with pytest.raises(ValueError, match="offset"):
            client.alloc_contig(PAGE, "x", offset=1)
        with client.alloc_contig(PAGE, "x", offset=7 * 32):
            pass
        arena = open_arena(arena_name(client.endpoint))
        assert arena.geometry.page_at(arena.areas[0].first) % (128 * K) == 0, "aligned alike in the arena"
        arena.memory.close()


def test_exactly_there(client: EmbeddedClient) -> None:
    with client.alloc_contig(4 * PAGE, "b", offset=100) as buffer:
        assert (buffer.area, buffer.offset) == ("b", 100)
        for offset in (97, 100, 103):
            with pytest.raises(ArenaExhausted, match=f"page {offset} in b"):
                client.alloc_contig(4 * PAGE, "b", offset=offset)
        with client.alloc_contig(4 * PAGE, "b", offset=96), client.alloc_contig(4 * PAGE, "b", offset=104):
            pass
        with client.alloc_contig(4 * PAGE, "a", offset=100):
            pass
    client.alloc_contig(PAGE, "b", offset=255).free()
    for offset in (256, 10**9):
        with pytest.raises(ValueError, match="256 pages"):
            client.alloc_contig(PAGE, "b", offset=offset)
    with pytest.raises(ValueError, match="area="):
        client.alloc_contig(PAGE, offset=0)


# --- drain


def drain_by_api(client: EmbeddedClient, name: str, word: str) -> dict[str, Any]:
    return vars((client.drain_area if word == "drain" else client.resume_area)(name))


def drain_by_command(client: EmbeddedClient, name: str, word: str) -> dict[str, Any]:
    told = json.loads(gcma("area", word, name, "--json", "--endpoint", client.endpoint))
    assert isinstance(told, dict)
    return told


@pytest.mark.parametrize("change", [drain_by_api, drain_by_command], ids=["api", "command"])
def test_drain_and_resume(client: EmbeddedClient, change: Callable[[EmbeddedClient, str, str], dict[str, Any]]) -> None:
    buffer = client.alloc_contig(50 * PAGE, "a", name="kept")
    with buffer.view as view:
        view[:] = b"\xaa" * len(view)
        swap = fill_until_lent(client, "a")
        told = change(client, "a", "drain")
        assert (told["drained"], told["held"], told["lent"], told["largest_free"]) == (True, 50 * PAGE, 0, 0)
        assert all_there(swap), "what was lent is in the file"
        fill(client)
        assert view == b"\xaa" * len(view)
    assert all_there(swap)
    assert (area(client, "a").lent, area(client, "a").drained, area(client, "b").drained) == (0, True, False)

    for ask in (client.alloc_contig, client.reserve):
        with pytest.raises(ArenaExhausted, match="drained"):
            ask(PAGE, "a")
        with ask(PAGE) as elsewhere:
            assert elsewhere.area == "b"
    with pytest.raises(ArenaExhausted):
        client.alloc_contig(PAGE, "a", offset=200)
    with client.attach("kept") as again, pickle.loads(pickle.dumps(buffer)) as loaded:
        assert again.offset == loaded.offset == buffer.offset, "holders may be more"
    assert change(client, "a", "drain")["drained"], "twice: no effect"

    buffer.free()
    fill(client)
    assert (area(client, "a").held, area(client, "a").lent) == (0, 0), "freed later, and not lent"
    assert all_there(swap)

    told = change(client, "a", "resume")
    assert (told["drained"], told["largest_free"]) == (False, M)
    assert not change(client, "a", "resume")["drained"]
    fill_until_lent(client, "a")
    with client.alloc_contig(M, "a"):
        assert all_there(swap)
    assert all_there(swap)


def test_a_drain_of_what_is_not_lent() -> None:
    with gcma_shm.embedded("4M", areas={"x": "1M,cache=off"}) as client:
        with client.alloc_contig(PAGE):
            assert client.drain_area("x").held == PAGE
        assert client.resume_area("x").largest_free == M
        fill(client)
        assert area(client, "x").lent == 0
        client.alloc_contig(M).free()


def test_every_area_drained(client: EmbeddedClient) -> None:
    for name in ("a", "b"):
        client.drain_area(name)
    with pytest.raises(ArenaExhausted):
        client.alloc_contig(PAGE)
    swap = fill(client)
    assert all_there(swap), "by the nursery and the file alone"
    client.resume_area("b")
    client.alloc_contig(M).free()


# --- grow and shrink


def test_shrink_and_grow_again(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(10 * PAGE, "a", offset=0)
    with buffer.view as view:
        view[:] = b"\xaa" * len(view)
        swap = fill_until_lent(client, "a")
        info = client.resize_area("a", 512 * K)
        assert (info.size, info.held, info.largest_free) == (512 * K, 10 * PAGE, 512 * K - 10 * PAGE)
        add_up(info)
        fill(client)
        assert all_there(swap)
        assert view == b"\xaa" * len(view)
        with pytest.raises(ArenaExhausted):
            client.alloc_contig(512 * K, "a")
        with pytest.raises(ValueError, match="128 pages"):
            client.alloc_contig(PAGE, "a", offset=128)
        assert client.resize_area("a", "512K").size == 512 * K, "as it is: no effect"
        info = client.resize_area("a", "1M")
        assert (info.size, info.largest_free) == (M, M - 10 * PAGE)
        assert view == b"\xaa" * len(view)
    buffer.free()
    with client.alloc_contig(M, "a"):
        assert all_there(swap)
    fill_until_lent(client, "a")
    assert all_there(swap)


def test_one_grows_by_what_another_gave(client: EmbeddedClient) -> None:
    """Not beside it: an area of two parts, in which no buffer crosses the gap."""
    swap = fill_until_lent(client, "b")
    client.resize_area("a", 256 * K)
    info = client.resize_area("b", M + 768 * K)
    assert (info.size, info.largest_free) == (M + 768 * K, M)
    add_up(info)
    assert all_there(swap)
    with pytest.raises(ArenaExhausted) as raised:
        client.alloc_contig(M + PAGE, "b", timeout=None)
    assert raised.value.largest_free == M
    with (
        client.alloc_contig(M, "b", offset=0) as first,
        client.alloc_contig(768 * K, "b", offset=256) as second,
        first.view as one,
        second.view as two,
    ):
        one[:], two[:] = b"1" * len(one), b"2" * len(two)
        assert one == b"1" * len(one)
        assert area(client, "b").largest_free == 0
        assert all_there(swap)
    fill_until_lent(client, "b")
    assert client.resize_area("b", M).size == M
    assert client.resize_area("a", M).largest_free == M
    assert all_there(swap)


def test_what_is_in_the_way_of_a_shrink(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE, "a", offset=200)
    with client.reserve(PAGE, "a", offset=100):
        for nbytes in (200 * PAGE, PAGE):
            with pytest.raises(ArenaExhausted, match="in the way; 804 KiB is the least"):
                client.resize_area("a", nbytes)
            assert area(client, "a").size == M, "nothing has changed"
        assert client.resize_area("a", 201 * PAGE).size == 201 * PAGE
        buffer.free()
        with pytest.raises(ArenaExhausted):
            client.resize_area("a", 100 * PAGE)
        assert client.resize_area("a", 101 * PAGE).size == 101 * PAGE
    assert client.resize_area("a", PAGE).size == PAGE
    client.alloc_contig(PAGE, "a").free()


def test_what_cannot_be(client: EmbeddedClient) -> None:
    with pytest.raises(ArenaExhausted, match="in no area"):
        client.resize_area("a", 2 * M)
    client.resize_area("b", 512 * K)
    with pytest.raises(ArenaExhausted, match="512 KiB of the arena"):
        client.resize_area("a", 2 * M)
    for size in (0, -1, "much", ""):
        with pytest.raises(ValueError, match="size"):
            client.resize_area("a", size)
    with pytest.raises(TypeError):
        client.resize_area("a", 1.5)  # type: ignore[arg-type] # on purpose
    for change in (client.drain_area, client.resume_area, lambda name: client.resize_area(name, M)):
        with pytest.raises(NoSuchArea, match="a, b"):
            change("c")
    assert [info.size for info in client.areas()] == [M, 512 * K]


def test_a_drained_area_grows_and_stays_drained(client: EmbeddedClient) -> None:
    client.drain_area("a")
    assert client.resize_area("a", 512 * K).drained
    info = client.resize_area("a", M)
    assert (info.drained, info.largest_free) == (True, 0)
    fill(client)
    assert area(client, "a").lent == 0
    assert client.resume_area("a").largest_free == M
    fill_until_lent(client, "a")


def test_an_aligned_area_stays_aligned() -> None:
    with gcma_shm.embedded("4M", areas={"x": "512K,align=64K", "y": "512K"}) as client:
        client.resize_area("y", 256 * K)
        client.resize_area("x", 768 * K)
        kept = []
        with contextlib.suppress(ArenaExhausted):
            while True:
                kept.append(client.alloc_contig(PAGE, "x"))
        assert len(kept) >= 8
        assert all(buffer.offset % 16 == 0 for buffer in kept)
        assert len({buffer.offset for buffer in kept}) == len(kept)
