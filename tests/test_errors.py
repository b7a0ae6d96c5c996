"""The hierarchy that API.md promises."""

from __future__ import annotations

import pickle

import pytest

import gcma_shm
from gcma_shm import errors

HIERARCHY = {
    "ArenaError": OSError,
    "ArenaExhausted": MemoryError,
    "QuotaExceeded": MemoryError,
    "NurseryFull": TimeoutError,
    "Closed": ValueError,
    "Forbidden": PermissionError,
    "NoSuchType": LookupError,
    "NoSuchArea": LookupError,
    "NoSuchBuffer": LookupError,
    "StaleHandle": ReferenceError,
    "SlotBusy": TimeoutError,
    "BrokerUnavailable": ConnectionError,
    "BufferExists": FileExistsError,
    "SpillError": OSError,
    "SpillCorrupt": errors.SpillError,
    "ProtocolError": ValueError,
}


@pytest.mark.parametrize("name", sorted(HIERARCHY))
def test_each_error_is_the_builtin_that_fits(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.GcmaError)
    assert issubclass(error, HIERARCHY[name])
    assert getattr(gcma_shm, name) is error
    assert error.__doc__


def test_there_are_no_others() -> None:
    found = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert found == {*HIERARCHY, "GcmaError"} == set(errors.__all__)
    assert errors.__all__ == sorted(errors.__all__)


def test_what_they_carry() -> None:
    exhausted = errors.ArenaExhausted("none", 8192, 4096, {3: 100})
    assert (exhausted.requested, exhausted.largest_free, exhausted.holders) == (8192, 4096, {3: 100})
    assert str(exhausted) == "none"
    spill = errors.SpillError(28, "full", stored=True)
    assert (spill.errno, spill.strerror, spill.stored) == (28, "full", True)
    assert errors.SpillError(5, "broken").stored is False
    assert errors.GcmaError().done == 0


@pytest.mark.parametrize(
    "error",
    [
        errors.ArenaExhausted("none", 8192, 4096, {3: 100}),
        errors.SpillError(28, "full", True),
        errors.SpillCorrupt(0, "bad", False),
        errors.ArenaError(28, "too small"),
        errors.Closed("closed"),
        errors.BufferExists("name"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_they_survive_the_way_back_from_a_worker_process(error: Exception) -> None:
    """`concurrent.futures` and `multiprocessing` pickle the errors of their workers."""
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    for attribute in ("requested", "largest_free", "holders", "errno", "stored"):
        assert getattr(back, attribute, None) == getattr(error, attribute, None)


def test_in_words() -> None:
    assert errors.in_words(errors.ArenaError(28, "too small")) == "too small"
    assert errors.in_words(errors.ArenaError("too small")) == "too small"
    assert errors.in_words(FileNotFoundError(2, "No such file", "/a")) == "/a: No such file"
    assert errors.in_words(ValueError("none")) == "none"
