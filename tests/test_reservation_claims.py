"""Claims of reservations: made without a message, whatever the broker and the cache do, and nobody else's bytes while they last."""

from __future__ import annotations

import os
import signal

import pytest

import gcma_shm
from gcma_shm import BrokerUnavailable
from gcma_shm.clients.embedded import EmbeddedClient
from tests.client import page_of
from tests.lending import (
    PAGE,
    broker_stopped,
    churning,
    figure,
    filling,
    rounds_of,
    use_fully,
    use_until_lent,
    whole,
)
from tests.patience import impatient
from tests.processes import WAIT_S, eventually, stands_still
from tests.using_areas import SLOTS, all_there

pytestmark = pytest.mark.arena("small")


# --- no message


def test_neither_claim_nor_free_is_a_request(client: EmbeddedClient) -> None:
    reservation = client.reserve(whole(client))
    use_fully(client)

    def asked() -> dict[str, int]:
        """But for the questions whether it is there still, of who waits for its answer for long."""
        requests: dict[str, int] = client.stats()["broker"]["requests"]
        return {operation: count for operation, count in requests.items() if operation != "ping"}

    before = asked()
    for _ in range(20):
        reservation.claim().free()
    assert asked() == before | {"stats": before["stats"] + 1}


def claim_in_rounds(reservation: gcma_shm.Reservation, size: int, swap: gcma_shm.Swap, rounds: int) -> None:
    """All of the area each time; the pages are there all the same, and nobody else's bytes in the claim."""
    for round_ in range(rounds):
        with reservation.claim() as buffer, buffer.view as view:
            view[:] = bytes([round_]) * size
            assert all(swap.load(n) == page_of(n) for n in range(round_, SLOTS, rounds))
            assert view == bytes([round_]) * size


def test_a_stopped_broker_is_not_waited_for(client: EmbeddedClient) -> None:
    size = whole(client)
    reservation = client.reserve(size)
    swap = use_until_lent(client)
    with broker_stopped(client) as in_copy:
        assert not in_copy
        claim_in_rounds(reservation, size, swap, 20)
        assert all_there(swap)
        assert stands_still(client.broker_pid)
    use_until_lent(client)
    assert all_there(swap)


def test_a_killed_broker_is_not_needed() -> None:
    with gcma_shm.embedded("4M", timeout=WAIT_S) as client:
        size = whole(client)
        reservation = client.reserve(size)
        swap = use_until_lent(client)
        swap.sync()
        os.kill(client.broker_pid, signal.SIGKILL)
        claim_in_rounds(reservation, size, swap, 10)
        assert all_there(swap)


def test_a_broker_killed_in_its_copy_is_recognised() -> None:
    """Stopped in the copy of a page into the range it is waited for, within the bound; killed there it is not."""
    with gcma_shm.embedded("4M", timeout=WAIT_S) as client:
        size = whole(client)
        swap = client.swap(0, SLOTS, "behind")
        with churning(client):
            reservation = client.reserve(size)
            with broker_stopped(client, in_copy=True) as in_copy:
                if in_copy:  # nearly always
                    with impatient(client, timeout=1.0), pytest.raises(BrokerUnavailable, match="stopped"):
                        reservation.claim()
                os.kill(client.broker_pid, signal.SIGKILL)
            assert bool(filling(client)) == in_copy, "the copy goes on for ever"
            for round_ in range(5):
                with reservation.claim() as buffer, buffer.view as view:
                    view[:] = bytes([round_]) * size
                    assert all_there(swap)
                    assert view == bytes([round_]) * size
        assert all_there(swap)


def test_a_broker_stopped_in_its_copy_goes_on(client: EmbeddedClient) -> None:
    with gcma_shm.connect(client.endpoint, timeout=WAIT_S) as other, churning(client) as counts:
        reservation = other.reserve(whole(client))
        with broker_stopped(client, in_copy=True) as in_copy:
            if in_copy:
                with impatient(other, timeout=0.3), pytest.raises(BrokerUnavailable, match="stopped"):
                    reservation.claim()
        seen = rounds_of(counts)
        with reservation.claim() as buffer, buffer.view as view:
            view[:] = b"\xcc" * len(view)
            assert eventually(lambda: rounds_of(counts) > seen + 5)
            assert view == b"\xcc" * len(view)


# --- the bytes


def test_a_claimed_ranges_bytes_never_change_while_workers_churn(client: EmbeddedClient) -> None:
    with churning(client) as counts:
        reservation = client.reserve(whole(client) - 50 * PAGE)
        for round_ in range(30):
            seen = rounds_of(counts)
            expected = bytes([round_ + 1]) * reservation.nbytes
            with reservation.claim() as buffer, buffer.view as view:
                view[:] = expected
                assert view == expected
                assert eventually(lambda seen=seen: rounds_of(counts) > seen + 2)  # type: ignore[misc]
                assert view == expected
        assert eventually(lambda: figure(client, "lent") > 0)
    assert all_there(client.swap(0, SLOTS, "behind"))


def test_old_content_is_never_a_page_of_the_cache(client: EmbeddedClient) -> None:
    """Slots whose pages were in the range, never loaded in between: they must be read from the file after the range was lent again."""
    reservation = client.reserve(whole(client))
    for round_ in range(5):
        swap = use_until_lent(client)
        with reservation.claim() as buffer, buffer.view as view:
            view[:] = page_of(5_000_000 + round_) * (reservation.nbytes // PAGE)
        assert all_there(swap)
