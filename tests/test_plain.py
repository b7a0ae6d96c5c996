"""What takes but a look: that it is right about what is small, and about which arrays are told by where they lie."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import numpy as np
import pytest

from gcma_shm.clients.plain import PLAIN_MAX, arrays_among, goes_by_name, plainly_small

ITEMS_MAX = 1000


@pytest.mark.parametrize(
    "value",
    [
        None, True, 7, 0.5, "text", b"bytes", (), [1, 2.0, None], ((1, 2), [3.0]), (1, (2,), [True]), [[]] * ITEMS_MAX, "x" * 256,
        (1.5,) * ITEMS_MAX, ((1.5,),) * ITEMS_MAX,
    ],
)  # fmt: skip
def test_what_is_plainly_small(value: Any) -> None:
    assert plainly_small((value,) * 16)
    assert not plainly_small((value,) * 17)
    assert arrays_among((value,) * 16) == []
    assert arrays_among((value,) * 17) is None
    assert len(pickle.dumps((value,) * 16, 5)) < PLAIN_MAX


class Whole(int):
    """Equal to a number, and may carry anything."""


class Row(tuple[int, ...]):
    """The same of a tuple."""


@pytest.mark.parametrize(
    "value",
    [
        "x" * 257, b"x" * 257, bytearray(5), {}, {1: 2}, np.float64(1), 1j, object(), [np.ones(1)], [b""], [""], ([1], [np.ones(1)]), [[[]]],
        (1,) * (ITEMS_MAX + 1), ([1] * ITEMS_MAX, [1]), [[]] * (ITEMS_MAX + 1), int, len, Whole(1), [Whole(1)], Row((1,)), [Row((1,))],
    ],
)  # fmt: skip
def test_what_may_not_be(value: Any) -> None:
    assert not plainly_small((1, value))
    assert arrays_among((1, value)) is None
    assert arrays_among((np.ones(1), value)) is None


def test_functions_that_go_by_name() -> None:
    class Squarer:
        def __call__(self, number: int) -> int:
            return number

    assert goes_by_name(test_what_may_not_be)
    assert goes_by_name(len)
    assert goes_by_name(functools.partial(pytest.raises, len)), "as map makes it"
    assert not goes_by_name(functools.partial(pytest.raises, np.ones(1)))
    assert not goes_by_name(functools.partial(np.ones(1).sum))
    assert not goes_by_name(functools.partial(pytest.raises, match="1"))
    assert not goes_by_name(np.ones(1).sum)
    assert not goes_by_name(Squarer())


def test_arrays_that_are_told_by_where_they_lie() -> None:
    array = np.ones((3, 4))
    assert arrays_among((1, array, "a", np.asfortranarray(array), array[1:], np.array(1, "f4"))) == [1, 3, 4, 5]
    assert arrays_among((array.astype(">i2"), array.astype(bool), array.astype("c8"))) == [0, 1, 2]


@pytest.mark.parametrize(
    "array",
    [
        np.ones((3, 4))[:, ::2], np.ones(4)[::-1], np.array([None]), np.ones(3).astype("datetime64[s]"), np.array(["text"]),
        np.zeros(3, [("a", "i4")]), np.ones(3, np.dtype("f8", metadata={"unit": "m"})), np.ma.ones(3), np.ones(3).view(np.recarray),
    ],
)  # fmt: skip
def test_arrays_that_are_not(array: Any) -> None:
    assert arrays_among((1, array)) is None
