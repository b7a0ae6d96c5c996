"""When a broker counts as degraded, and what it says about it."""

from __future__ import annotations

import errno

from gcma_shm.broker.health import Health


def test_all_is_well() -> None:
    health = Health(5.0)
    assert health.note({}, 0, 6.0) is None
    assert health.describe() == {"state": "ok", "why": "", "since": 5.0, "pages_unwritable": 0, "types": {}, "errno": 0}


def test_the_beginning_and_the_end_are_told_once() -> None:
    health = Health(5.0)
    begun = health.note({7: 2, 3: 1}, errno.ENOSPC, 6.0)
    assert begun is not None
    assert "degraded" in begun
    assert "types 3, 7 do not take their pages: No space left on device; 3 pages" in begun
    assert health.describe() == {
        "state": "degraded",
        "why": "the spill files of types 3, 7 do not take their pages: No space left on device",
        "since": 6.0,
        "pages_unwritable": 3,
        "types": {"3": 1, "7": 2},
        "errno": errno.ENOSPC,
    }
    assert health.note({7: 4}, errno.EIO, 7.0) is None, "told already"
    described = health.describe()
    assert (described["since"], described["pages_unwritable"], described["errno"]) == (6.0, 4, errno.EIO)
    assert health.note({}, errno.EIO, 9.5) == "healthy again after 3.5 s: every spill file takes its pages"
    assert health.describe()["since"] == 9.5
    assert health.describe()["errno"] == 0
    assert health.note({}, errno.EIO, 10.0) is None
    assert health.note({1: 1}, errno.EIO, 11.0) is not None
