"""What takes but a look: which tasks and results are plainly small, so that they need no parcel, and which are but for a few arrays.

Each task is looked at, and most are small: so this knows a few exact types only, and leaves whatever else there is to the packers.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, cast

from gcma_shm._core import not_plain

if TYPE_CHECKING:
    import numpy as np

PLAIN_MAX = 256 << 10  # bytes: no pickle of what is plainly small has as many, unless an int has thousands of digits
_ARGUMENTS_MAX = 16
_DTYPES = frozenset("biufc")  # the kinds of which each dtype is told by its name and size


def plainly_small(values: Sequence[Any]) -> bool:
    """Whether these are a few numbers, short text, tuples and lists of numbers, or of tuples and lists of numbers."""
    return len(values) <= _ARGUMENTS_MAX and not not_plain(values)


def goes_by_name(fn: Callable[..., Any]) -> bool:
    """Whether that is how it is pickled, or a part of one as `map` makes it of two that are: no method, which takes what it is bound to along."""
    kind = type(fn)
    if kind is functools.partial:
        partial = cast(Any, fn)
        return not partial.keywords and all(map(_is_function, (partial.func, *partial.args)))
    return kind is FunctionType or _is_function(fn)


def _is_function(fn: object) -> bool:
    kind = type(fn)
    return kind is FunctionType or (kind is BuiltinFunctionType and type(cast(Any, fn).__self__) is ModuleType)


def arrays_among(values: Sequence[Any]) -> list[int] | None:
    """The indices of arrays, where all else is plainly small. None: it is not, or an array is none that is told by where it lies, its dtype,
    shape and order alone.
    """
    if len(values) > _ARGUMENTS_MAX:
        return None
    found = not_plain(values)
    if found:
        numpy = sys.modules.get("numpy")
        if numpy is None or not all(type(values[at]) is numpy.ndarray and _is_simple(values[at]) for at in found):
            return None
    return found


def _is_simple(array: np.ndarray[Any, Any]) -> bool:
    return array.dtype.kind in _DTYPES and array.dtype.metadata is None and array.flags.forc
