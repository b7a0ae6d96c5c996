"""Tasks that are plainly small but for arrays: each array is told by where it lies, what by, and needs no pickle of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

# The memory of what a reference stands for, or a tuple that equals it.
ViewOf = Callable[[tuple[Any, ...]], memoryview]
# Which argument it is, the reference as a plain tuple (of a class pickle writes and looks up the name), the offset in bytes, the dtype, shape,
# order, and whether it is read-only.
Order = Literal["C", "F"]
Told = tuple[int, tuple[Any, ...], int, str, tuple[int, ...], Order, bool]


def told(at: int, array: np.ndarray[Any, Any], reference: tuple[Any, ...], start: int, readonly: bool) -> Told:
    """For an array of `plain.arrays_among`: argument `at` lies there."""
    order: Order = "C" if array.flags.c_contiguous else "F"
    return at, tuple(reference), start, array.dtype.str, array.shape, order, readonly


def without(args: Sequence[Any], arrays: Sequence[int]) -> list[Any]:
    """The arguments but for these."""
    rest = list(args)
    for at in arrays:
        rest[at] = None
    return rest


class Call:
    """A function with its arguments, of which those in `arrays` are left out."""

    def __init__(self, fn: Callable[..., Any], args: list[Any], arrays: Sequence[Told]) -> None:
        self._fn = fn
        self._args = args
        self._arrays = arrays

    @property
    def references(self) -> set[tuple[Any, ...]]:
        """Of the memory that the arrays lie on: tuples that equal them."""
        return {array[1] for array in self._arrays}

    def open(self, view_of: ViewOf) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
        """The function, arguments and named arguments. Raises what `view_of` raises."""
        import numpy as np

        # A copy: the pool's worker keeps the task, and so ours, until it has sent the result, and that must not keep the memory.
        args = list(self._args)
        for at, reference, start, dtype, shape, order, readonly in self._arrays:
            view = view_of(reference)
            args[at] = np.ndarray(shape, dtype, view.toreadonly() if readonly else view, start, order=order)
        return self._fn, args, {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Call, (self._fn, self._args, self._arrays)
