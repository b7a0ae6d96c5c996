"""What is large in an object, where it is placed, and that the object is the same again."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest

import gcma_shm
from gcma_shm.clients import packers, reducer
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.handles import Reference, load_buffer
from gcma_shm.clients.packers import ITEMS_MAX, Giving, Packer, Sharing, large_in
from gcma_shm.clients.parcels import Parcel
from gcma_shm.clients.places import hand_over

from .client import held
from .processes import eventually

THRESHOLD = 4096
LARGE = b"x" * 10_000


@pytest.fixture(params=["shared", "given away"])
def packer(request: pytest.FixtureRequest, client: EmbeddedClient) -> Packer:
    if request.param == "shared":
        return Sharing(lambda: client, THRESHOLD)
    return Giving(lambda: client, THRESHOLD, 60.0)


def travel(packer: Packer, value: Any) -> tuple[Any, int]:
    """The value on the other side, and how many bytes of it went through the pipe."""
    parcel, kept = packer.pack(value, large_in(value, THRESHOLD))
    sent = ForkingPickler.dumps(parcel)
    got = ForkingPickler.loads(sent).open()
    del kept
    return got, len(sent)


def test_what_is_looked_at() -> None:
    array, both = np.ones(1000), bytearray(LARGE)
    found = large_in(
        [{"a": LARGE, "b": (both, [array])}, array[::2], np.ones(5), "x" * 10_000, memoryview(LARGE)], 4096
    )
    assert {id(value) for value in found} >= {id(LARGE), id(both), id(array)}
    assert len(found) == 4
    assert large_in(LARGE, len(LARGE)) == [LARGE]
    assert large_in(LARGE, len(LARGE) + 1) == []
    endless: list[Any] = [LARGE]
    endless.append(endless)
    assert large_in(endless, 4096)
    assert large_in([[0] * ITEMS_MAX, LARGE], 4096) == [LARGE]
    assert large_in([[0] * ITEMS_MAX, [LARGE]], 4096) == [], "too many before it"
    assert len(large_in([LARGE] * 5 * ITEMS_MAX, 4096)) == ITEMS_MAX - 1


VALUES: list[Any] = [
    LARGE,
    bytearray(LARGE),
    {"deep": [(LARGE, 1), {"er": bytearray(LARGE)}]},
    [[[[LARGE]]]] + [0] * ITEMS_MAX,
    {LARGE},
    "text" * 10_000,
    list(np.arange(2000.0)),
    np.arange(10_000),
    np.asfortranarray(np.arange(10_000.0).reshape(100, 100)),
    np.arange(10_000)[::2],
    np.arange(10_000)[::-1],
    np.array([LARGE, None, {"a": 1}], dtype=object),
    np.ma.masked_greater(np.arange(10_000), 5000),
    np.zeros((0, 5)),
    np.zeros(2000, [("a", "i4"), ("b", "f8", 3)]),
    np.arange(2000).astype("datetime64[s]"),
    np.broadcast_to(np.arange(100.0), (100, 100)),
    np.rec.array(np.zeros(2000, [("a", "i4"), ("b", "f8", 3)])),
    [np.zeros(1000)] * 3,
]


def test_all_that_is_large_goes_through_the_arena(packer: Packer, client: EmbeddedClient) -> None:
    for value in VALUES:
        got, sent = travel(packer, value)
        assert type(got) is type(value)
        np.testing.assert_equal(got, value)
        assert sent < THRESHOLD, value
        assert packer.fallbacks == 0
        del got
        assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_the_same_object_is_the_same_on_the_other_side(packer: Packer) -> None:
    both, array = bytearray(LARGE), np.ones(10_000)
    got, _ = travel(packer, (both, [both], {"array": array}, array))
    assert got[0] is got[1][0]
    assert got[2]["array"] is got[3]
    assert packer.copied == len(both) + array.nbytes


def test_one_copy_of_the_same_memory_for_parcels_at_the_same_time(client: EmbeddedClient) -> None:
    packer, array = Sharing(lambda: client, THRESHOLD), np.arange(50_000)
    start, packed = threading.Barrier(8), []

    def pack() -> None:
        start.wait()
        packed.append(packer.pack({"array": array, "bytes": LARGE}, [LARGE]))

    threads = [threading.Thread(target=pack) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(packed) == 8
    assert packer.copied == array.nbytes + len(LARGE)
    opened = [parcel.open() for parcel, _ in packed]
    assert all((one["array"] == array).all() and not one["array"].flags.writeable for one in opened)
    packed.clear()
    assert eventually(lambda: not packer._copies)
    array[0] = 7
    parcel, kept = packer.pack(array)
    assert parcel.open()[0] == 7, "a copy of what was once there"
    del kept
    assert opened[0]["array"][0] == 0


def test_a_copy_that_is_expected_stays_until_nobody_expects_it(client: EmbeddedClient) -> None:
    packer, array = Sharing(lambda: client, THRESHOLD), np.arange(50_000)
    expected = [packer.expect([array, LARGE]) for _ in range(3)]
    assert packer.copied == 0
    for _ in range(3):
        parcel, kept = packer.pack(array)
        assert (parcel.open() == array).all()
        del kept
        expected.pop()
    assert packer.copied == array.nbytes
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_what_is_given_away_holds_itself(client: EmbeddedClient) -> None:
    packer, array = Giving(lambda: client, THRESHOLD, 60.0), np.arange(50_000)
    parcel, kept = packer.pack([array, LARGE])
    del kept
    client.stats()
    assert held(client) >= array.nbytes
    got = parcel.open()
    assert got[0].flags.writeable
    got[0][0] = 5
    assert array[0] == 0
    del got
    assert eventually(lambda: client.stats() is not None and held(client) == 0)
    with pytest.raises(gcma_shm.StaleHandle):
        parcel.open()


def test_parts_of_one_buffer_are_given_away_by_one_handle(client: EmbeddedClient) -> None:
    """However many they are: the broker bounds the handles of a buffer."""
    packer = Giving(lambda: client, THRESHOLD, 60.0)
    buffer = client.alloc_contig(1100 * 8192)
    parts = [buffer.numpy(1100 * 8192)[8192 * n :][:8192] for n in range(1100)]
    parts[5][0] = 7
    parcel = packer.pack([*parts[:3], LARGE, "text" * 5000, *parts[3:]], [LARGE])[0]
    del parts
    buffer.free()
    assert (packer.fallbacks, parcel.in_pipe) == (0, 0)
    got = ForkingPickler.loads(ForkingPickler.dumps(parcel)).open()
    assert got[7][0] == 7
    got[7][0] += 1
    del got, parcel
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_what_comes_too_late_in_part_leaves_nothing_of_the_rest(client: EmbeddedClient) -> None:
    packer = Giving(lambda: client, THRESHOLD, 60.0)
    parcel = packer.pack([np.ones(1000), np.ones(2000)])[0]
    load_buffer(parcel._buffers[0].reference).free()
    assert held(client) > 0
    with pytest.raises(gcma_shm.StaleHandle):
        parcel.open()
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_what_cannot_all_be_given_away_goes_through_the_pipe_and_nothing_is_left(
    client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    packer = Giving(lambda: client, THRESHOLD, 60.0)
    given: list[Reference] = []

    def give_two(*arguments: Any) -> Reference:
        if len(given) == 2:
            raise gcma_shm.QuotaExceeded("planted")
        given.append(hand_over(*arguments))
        return given[-1]

    monkeypatch.setattr(packers, "hand_over", give_two)
    parcel, _ = packer.pack([np.full(1000, n) for n in range(3)])
    assert (len(given), parcel.in_pipe, packer.fallbacks) == (2, 3, 3)
    assert [array[0] for array in parcel.open()] == [0, 1, 2]
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


@pytest.fixture
def _registered() -> Iterator[None]:
    """The reducer, for this test alone."""
    registered: dict[type, Any] = vars(ForkingPickler)["_extra_reducers"]
    before = dict(registered)
    reducer.register()
    yield
    registered.clear()
    registered.update(before)


@pytest.mark.usefixtures("_registered")
def test_the_reducer_and_the_packers_leave_each_other_alone(client: EmbeddedClient, packer: Packer) -> None:
    array = client.alloc_contig(80_000).numpy(10_000, "f8")
    array[:] = 3
    for _ in range(2):
        got, sent = travel(packer, array[10:])
        got[0] = 4
        assert array[10] == 4, "another memory"
        assert packer.copied == 0
        assert len(ForkingPickler.dumps(array)) < 1000, "the reducer has gone"
        assert sent < 1000


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, client: EmbeddedClient) -> list[int]:
    """A client that may not be had; how often it was asked for."""
    asked: list[int] = []

    def refuse() -> gcma_shm.Client:
        asked.append(1)
        raise gcma_shm.BrokerUnavailable("planted")

    monkeypatch.setattr(packers, "RETRY_S", 1e6)
    monkeypatch.setattr(Packer, "_client", property(lambda _: refuse, lambda *_: None), raising=False)
    return asked


@pytest.mark.parametrize("make", [lambda: Sharing(lambda: None, 4096), lambda: Giving(lambda: None, 4096, 1)])  # type: ignore[arg-type,return-value]
def test_without_a_broker_all_goes_through_the_pipe(
    refused: list[int], make: Callable[[], Packer], caplog: pytest.LogCaptureFixture
) -> None:
    packer = make()
    value = [np.ones(10_000), LARGE, "text" * 10_000]
    for _ in range(3):
        got, sent = travel(packer, value)
        np.testing.assert_equal(got, value)
        assert sent > 130_000
    assert len(refused) == 1, "each would wait for the broker"
    assert packer.fallbacks == 6
    assert caplog.text.count("planted") == 1


def test_what_was_built_through_another_client_is_not_copied(client: EmbeddedClient) -> None:
    with gcma_shm.connect(client.endpoint) as other:
        array = other.alloc_contig(80_000).numpy(10_000, "float64")
        array[:] = 1
        for packer in (Sharing(lambda: client, THRESHOLD), Giving(lambda: client, THRESHOLD, 60.0)):
            got, sent = travel(packer, array)
            assert (packer.copied, packer.fallbacks, sent < 1000) == (0, 0, True)
            got[0] += 1
            del got
        assert array[0] == 3
        del array
    assert eventually(lambda: held(client) == 0)


def test_without_room_some_goes_through_the_pipe(packer: Packer, client: EmbeddedClient) -> None:
    guest = client.alloc_contig(client.areas()[0].largest_free - (64 << 10))
    parcel, kept = packer.pack([np.ones(4000), np.ones(100_000)])
    assert parcel.in_pipe == packer.fallbacks == 1
    assert [array.size for array in parcel.open()] == [4000, 100_000]
    guest.free()
    del kept


def test_a_refusal_keeps_nothing_of_what_was_packed(
    packer: Packer, client: EmbeddedClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Not the packer, nor a log that keeps its records: an exception's frames have the parcel, and what else is in it."""
    with client.alloc_contig(client.areas()[0].largest_free - 65_536):
        got, _ = travel(packer, [np.ones(1000), np.ones(100_000)])
        assert packer.fallbacks == 1
        assert "no room" in caplog.text
        del got
        assert eventually(lambda: client.stats() is not None and held(client) == client.areas()[0].size - 65_536)


def test_a_pickle_that_fails_leaves_nothing(packer: Packer, client: EmbeddedClient) -> None:
    for value in (lambda: None, memoryview(LARGE)):
        with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
            packer.pack([np.ones(10_000), value], [])
    assert eventually(lambda: client.stats() is not None and held(client) == 0)
    assert isinstance(packer.pack(1)[0], Parcel)
