"""Reservations in workers' hands: promised, lent to the cache, claimed, and given back."""

from __future__ import annotations

import gc
import pickle
from typing import Any

import pytest

import gcma_shm
from gcma_shm import ArenaError, ArenaExhausted, BufferExists, NoSuchArea, NoSuchBuffer, QuotaExceeded, StaleHandle
from gcma_shm.clients.embedded import EmbeddedClient
from tests.lending import PAGE, figure, use_fully, use_until_lent, whole
from tests.processes import eventually
from tests.using_areas import all_there

pytestmark = pytest.mark.arena("small")


# --- what it is


def test_what_it_says_of_itself(client: EmbeddedClient) -> None:
    reservation = client.reserve(PAGE + 1, name="mine")
    told = reservation.nbytes, reservation.area, reservation.name, reservation.released
    assert told == (2 * PAGE, "default", "mine", False)
    assert "8192 bytes" in repr(reservation)
    with reservation.claim() as buffer:
        assert (buffer.nbytes, buffer.area, buffer.offset) == (2 * PAGE, "default", reservation.offset)
        assert len(buffer.view) == buffer.nbytes
    reservation.release()
    assert reservation.released
    assert "released" in repr(reservation)


def test_promised_lent_claimed_and_lent_again(client: EmbeddedClient) -> None:
    size = whole(client)
    reservation = client.reserve(size)
    (area,) = client.areas()
    assert (area.reserved, area.held, area.largest_free) == (size, 0, 0)
    swap = use_until_lent(client)
    assert all_there(swap)

    buffer = reservation.claim()
    (area,) = client.areas()
    assert (area.reserved, area.held, area.lent, area.free) == (size, size, 0, 0)
    assert all_there(swap), "right after the claim"
    with buffer.view as view:
        view[:] = b"\xbb" * size
        use_fully(client)
        assert all_there(swap), "while it is claimed"
        assert view == b"\xbb" * size

    buffer.free()
    (area,) = client.areas()
    assert (area.reserved, area.held) == (size, 0)
    assert all_there(swap), "after it was freed"
    use_until_lent(client)
    assert all_there(swap), "with the cache back"
    reservation.release()
    assert (figure(client, "reserved"), whole(client)) == (0, size)
    assert all_there(swap)


def test_its_place_does_not_change(client: EmbeddedClient) -> None:
    reservation = client.reserve(10 * PAGE)
    others = [client.alloc_contig(PAGE) for _ in range(5)]
    for round_ in range(5):
        with reservation.claim() as buffer:
            assert buffer.offset == reservation.offset
        others[round_].free()


def test_what_is_reserved_is_nobody_elses(client: EmbeddedClient) -> None:
    reservation = client.reserve(whole(client) - 3 * PAGE)
    assert client.areas()[0].largest_free == 3 * PAGE
    with pytest.raises(ArenaExhausted) as raised:
        client.alloc_contig(4 * PAGE)
    assert raised.value.holders == {client.number: reservation.nbytes}
    with pytest.raises(ArenaExhausted):
        client.reserve(4 * PAGE)
    first = client.alloc_contig(3 * PAGE)
    with reservation.claim() as second, first.view as a, second.view as b:
        a[:], b[:] = b"a" * len(a), b"b" * len(b)
        assert a == b"a" * len(a)


def test_alignment_and_exact_place(client: EmbeddedClient) -> None:
    for align in (1, PAGE, 64 * PAGE, 1 << 20):
        with client.reserve(PAGE), client.reserve(PAGE, align=align) as aligned:
            assert aligned.offset * PAGE % align == 0
    with client.reserve(PAGE, "default", offset=17) as there:
        assert there.offset == 17
        with pytest.raises(ArenaExhausted):
            client.alloc_contig(PAGE, "default", offset=17)
        with pytest.raises(ArenaExhausted):
            client.reserve(3 * PAGE, "default", offset=16)
        with client.reserve(PAGE, "default", offset=16), client.reserve(PAGE, "default", offset=18):
            pass
    assert figure(client, "reserved") == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"nbytes": 0}, ValueError),
        ({"nbytes": "4K"}, TypeError),
        ({"nbytes": 2**60}, ArenaExhausted),
        ({"area": "nowhere"}, NoSuchArea),
        ({"align": 3 * PAGE}, ValueError),
        ({"offset": 1, "align": 2 * PAGE, "area": "default"}, ValueError),
        ({"name": ""}, ValueError),
        ({"name": 7}, TypeError),
        ({"timeout": -1}, ValueError),
    ],
    ids=str,
)
def test_misuse(client: EmbeddedClient, options: dict[str, Any], error: Any) -> None:
    with pytest.raises(error):
        client.reserve(**({"nbytes": PAGE} | options))
    assert figure(client, "reserved") == 0


def test_a_client_by_messages_has_none(client: EmbeddedClient) -> None:
    with gcma_shm.connect(client.endpoint, mapped=False) as other, pytest.raises(ArenaError, match="map"):
        other.reserve(PAGE)


# --- giving back


def test_a_scope_and_a_second_free(client: EmbeddedClient) -> None:
    with client.reserve(3 * PAGE) as reservation:
        with reservation.claim() as buffer:
            assert figure(client, "held") == 3 * PAGE
        assert buffer.freed
        buffer.free()
        assert figure(client, "held") == 0
        again = reservation.claim()
        buffer.free()  # of the claim before: no effect on this one
        assert not again.freed
        assert figure(client, "held") == 3 * PAGE
        with pytest.raises(ArenaExhausted):
            reservation.claim()
        again.free()
    assert reservation.released
    assert figure(client, "reserved") == 0
    reservation.release()
    with pytest.raises(StaleHandle):
        reservation.claim()
    with pytest.raises(StaleHandle):
        pickle.dumps(reservation)
    with pytest.raises(StaleHandle):
        _ = again.view
    with pytest.raises(StaleHandle):
        pickle.dumps(again)


def test_free_and_release_are_refused_while_a_view_or_array_lives(client: EmbeddedClient) -> None:
    reservation = client.reserve(PAGE)
    buffer = reservation.claim()
    view, array = buffer.view, buffer.numpy(10)
    part = array[2:5]
    for refused in (buffer.free, reservation.release):
        with pytest.raises(BufferError, match="alive"):
            refused()
    view.release()
    del array
    for refused in (buffer.free, reservation.release):
        with pytest.raises(BufferError, match="alive"):
            refused()
    part[:] = 7
    assert part.tolist() == [7] * 3
    assert figure(client, "held") == PAGE
    assert (buffer.freed, reservation.released) == (False, False)
    del part
    reservation.release()
    assert buffer.freed
    assert figure(client, "reserved") == figure(client, "held") == 0


def test_release_frees_what_is_claimed(client: EmbeddedClient) -> None:
    size = whole(client)
    reservation = client.reserve(size)
    buffer = reservation.claim()
    reservation.release()
    assert buffer.freed
    assert whole(client) == size
    client.alloc_contig(size).free()


def test_an_array_keeps_the_memory_of_what_is_forgotten(client: EmbeddedClient) -> None:
    size = whole(client)
    array = client.reserve(size).claim().numpy(size)
    gc.collect()
    array[:] = 7
    swap = use_fully(client)
    (area,) = client.areas()
    assert (area.held, area.reserved, area.lent) == (size, size, 0)
    assert (array == 7).all()
    assert all_there(swap)
    del array
    gc.collect()
    assert eventually(lambda: figure(client, "reserved") == 0), "nothing refers to the reservation any more"
    use_until_lent(client)
    assert all_there(swap)


def test_an_array_keeps_the_claim_and_its_end_lends_the_range(client: EmbeddedClient) -> None:
    size = whole(client)
    reservation = client.reserve(size)
    array = reservation.claim().numpy(size)
    gc.collect()
    array[:] = 9
    use_fully(client)
    assert (array == 9).all()
    assert figure(client, "held") == size
    with pytest.raises(ArenaExhausted):
        reservation.claim()
    with pytest.raises(BufferError):
        reservation.release()
    del array
    gc.collect()
    assert figure(client, "held") == 0
    use_until_lent(client)
    reservation.claim().free()


def test_a_forgotten_claim_and_a_forgotten_reservation(client: EmbeddedClient) -> None:
    reservation = client.reserve(PAGE)
    cycle: list[object] = [reservation.claim()]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert figure(client, "held") == 0
    reservation.claim().free()
    del reservation
    gc.collect()
    assert eventually(lambda: figure(client, "reserved") == 0)
    for _ in range(50):  # the whole of it each time
        client.reserve(whole(client)).claim()
    gc.collect()
    assert eventually(lambda: figure(client, "reserved") == 0)


def test_close_is_refused_while_a_view_lives(client: EmbeddedClient) -> None:
    other = gcma_shm.connect(client.endpoint)
    reservation = other.reserve(PAGE)
    view = reservation.claim().view
    with pytest.raises(BufferError):
        other.close()
    assert not other.closed
    view.release()
    buffer = reservation.claim() if figure(client, "held") == 0 else None
    other.close()
    assert reservation.released
    assert buffer is None or buffer.freed
    with pytest.raises(StaleHandle):
        reservation.claim()
    reservation.release()
    assert figure(client, "reserved") == figure(client, "held") == 0


def test_close_gives_everything_back(client: EmbeddedClient) -> None:
    size = whole(client)
    with gcma_shm.connect(client.endpoint) as other:
        reservations = [other.reserve(n * PAGE) for n in range(1, 6)]
        buffers = [reservation.claim() for reservation in reservations[:3]]
        assert (figure(client, "reserved"), figure(client, "held")) == (15 * PAGE, 6 * PAGE)
    assert (figure(client, "reserved"), figure(client, "held"), whole(client)) == (0, 0, size)
    assert all(buffer.freed for buffer in buffers)
    swap = use_fully(client)
    assert all_there(swap)


# --- names and quotas


def test_names(client: EmbeddedClient) -> None:
    reservation = client.reserve(2 * PAGE, name="frames")
    with pytest.raises(BufferExists):
        client.reserve(PAGE, name="frames")
    with pytest.raises(BufferExists):
        client.alloc_contig(PAGE, name="frames")
    (told,) = client.names()
    assert (told.name, told.nbytes, told.reservation, told.holders) == ("frames", 2 * PAGE, True, 1)
    with gcma_shm.connect(client.endpoint) as other:
        with pytest.raises(TypeError, match="attach_reservation"):
            other.attach("frames")
        theirs = other.attach_reservation("frames")
        assert (theirs.nbytes, theirs.offset, theirs.name) == (2 * PAGE, reservation.offset, "frames")
        assert client.names()[0].holders == 2
        reservation.release()
        assert client.names()[0].holders == 1
        theirs.claim().free()
    assert client.names() == []
    with pytest.raises(NoSuchBuffer):
        client.attach_reservation("frames")
    client.reserve(PAGE, name="frames").release()


def test_a_buffers_name_is_no_reservations(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE, name="frames")
    with gcma_shm.connect(client.endpoint) as other:
        with pytest.raises(TypeError, match="attach"):
            other.attach_reservation("frames")
        buffer.free()
        assert figure(client, "held") == 0, "nothing is held after the refusal"


def test_quotas_count_what_is_promised(client: EmbeddedClient) -> None:
    assert client.quota(10 * PAGE).held == 0
    reservation = client.reserve(6 * PAGE)
    assert (client.quota().held, client.quota().quota) == (6 * PAGE, 10 * PAGE)
    for ask in (client.reserve, client.alloc_contig):
        with pytest.raises(QuotaExceeded):
            ask(5 * PAGE)
    with reservation.claim():
        assert client.quota().held == 6 * PAGE, "a claim is no second promise"
    buffer = client.alloc_contig(4 * PAGE)
    with pytest.raises(QuotaExceeded):
        client.reserve(1)
    reservation.release()
    assert client.quota().held == 4 * PAGE
    buffer.free()


# --- areas


@pytest.mark.parametrize("how", ["cache=off", "drained", "drained while claimed"])
def test_an_area_that_is_not_lent(how: str) -> None:
    with gcma_shm.embedded(
        "4M", areas={"pure": f"1M{',cache=off' if how == 'cache=off' else ''}", "other": "1M"}
    ) as client:
        size = 1 << 20
        reservation = client.reserve(size, "pure")
        swap = use_until_lent(client)
        first = reservation.claim() if how == "drained while claimed" else None
        if how != "cache=off":
            client.drain_area("pure")

        def pure() -> gcma_shm.AreaInfo:
            return next(area for area in client.areas() if area.name == "pure")

        assert pure().lent == 0
        if first is not None:
            with first.view as view:
                view[:] = b"\xdd" * size
                use_fully(client)
                assert view == b"\xdd" * size
            first.free()
        for round_ in range(3):
            with reservation.claim() as buffer, buffer.view as view:
                assert pure().held == size
                view[:] = bytes([round_]) * size
                use_fully(client)
                assert view == bytes([round_]) * size
            use_fully(client)
            assert (pure().held, pure().reserved) == (0, size)
            assert eventually(lambda: pure().lent == 0)
            assert all_there(swap)
        if how != "cache=off":
            client.resume_area("pure")

            def is_lent() -> bool:
                use_fully(client)
                return pure().lent > 0

            assert eventually(is_lent)
            with reservation.claim() as buffer, buffer.view as view:
                view[:] = b"\xee" * size
                assert all_there(swap)
        reservation.release()
        assert pure().largest_free == size
        assert all_there(swap)
