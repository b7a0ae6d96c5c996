"""What one session may have under way: requests until they are answered, batches of loads until their replies were read."""

from __future__ import annotations

import pytest

from gcma_shm.broker.window import Entry, Window
from gcma_shm.errors import ProtocolError
from gcma_shm.messages import BATCHES, Request

REQUESTS_MAX = 5


def enter(window: Window, operation: str, receipt: int | None = None, *, paged: bool = True) -> Entry:
    parameters = {} if receipt is None else {"receipt": receipt}
    entry = window.enter(Request(1, operation, parameters), REQUESTS_MAX, paged=paged)
    window._check()
    return entry


@pytest.mark.parametrize(
    ("operation", "bound"), [("load", REQUESTS_MAX), ("sync", REQUESTS_MAX), ("store_many", BATCHES)]
)
def test_so_many_until_one_is_answered(operation: str, bound: int) -> None:
    window = Window()
    entries = [enter(window, operation) for _ in range(bound)]
    for _ in range(3):
        with pytest.raises(ProtocolError, match=f"more than {bound} .* wait for replies"):
            enter(window, operation)
    window.leave(entries.pop())
    entries.append(enter(window, operation))
    with pytest.raises(ProtocolError):
        enter(window, operation)
    for entry in entries:
        window.leave(entry)
    assert (window.requests, window.stores, window.paged) == (0, 0, 0)


def test_each_kind_has_its_own_bound() -> None:
    window = Window()
    for _ in range(BATCHES):
        enter(window, "store_many")
        enter(window, "load_many")
    for _ in range(REQUESTS_MAX):
        enter(window, "load")
    assert window.paged == 2 * BATCHES + REQUESTS_MAX


def test_a_batch_of_loads_is_under_way_until_its_receipt_comes_back() -> None:
    window = Window()
    entries = [enter(window, "load_many") for _ in range(BATCHES)]
    assert len({entry.receipt for entry in entries} - {0}) == BATCHES, "nobody can guess the next one from the last"
    for entry in entries:
        window.leave(entry, has_pages=True)
    assert window.paged == 0
    for receipt in (None, 0, entries[0].receipt ^ 1, 2**63 - 1):
        with pytest.raises(ProtocolError, match="receipt"):
            enter(window, "load_many", receipt)
    enter(window, "load_many", entries[0].receipt)
    with pytest.raises(ProtocolError):
        enter(window, "load_many", entries[0].receipt)
    for _ in range(BATCHES - 1):  # one receipt stands for those before it
        enter(window, "load_many", entries[-1].receipt)


def test_an_answer_without_pages_needs_no_receipt() -> None:
    window = Window()
    for _ in range(3 * BATCHES):
        window.leave(enter(window, "load_many"), has_pages=False)
    assert not window.unread


def test_what_reaches_nobody_is_not_waited_for() -> None:
    window = Window()
    given, lost, under_way = (enter(window, "load_many") for _ in range(3))
    for entry in (given, lost):
        window.leave(entry, has_pages=True)
    window.lost(lost)
    window.lost(lost)
    assert list(window.unread) == [given.receipt, under_way.receipt]
    window.moved()
    assert list(window.unread) == [under_way.receipt], "a worker has it still"
    window._check()
    window.leave(under_way, has_pages=True)
    window.moved()
    assert not window.unread
    for _ in range(BATCHES):
        enter(window, "load_many")


def test_who_is_served_by_a_page_worker() -> None:
    window = Window()
    page, other = enter(window, "load"), enter(window, "sync", paged=False)
    assert window.paged == 1
    window.leave(page)
    assert window.paged == 0
    window.leave(other)
    window._check()
