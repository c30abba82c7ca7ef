"""Device functions as Python functions: the code of the kernels, run on int32 vectors or on Python integers.

    share = plain(stream_k.range_start, Language())
    evaluate(share, workers, totals, counts)        -> (int32 array,), an element per case

The code object of a device function is unchanged. Its copy sees other global names: `gl` and `tl` are a `Language`, and
each device function that it calls is such a copy, too. So a fault in a kernel's source is a fault of the copy. A copy
of the arithmetic would need none of this, and would prove nothing about the kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
import triton.language as tl

Array = np.ndarray[Any, Any]
INT32 = np.int32


class Mixed(Exception):
    """A branch that some lanes take and others do not."""

    def __init__(self, taken: Array) -> None:
        super().__init__("some lanes take a branch and others do not; expected a call by `evaluate`")
        self.taken = taken


class Lanes:
    """A vector of int32 or of truth values, an element per case. Sums wrap, and quotients truncate, as on a GPU."""

    def __init__(self, values: Any) -> None:
        array = np.asarray(values)
        self.values: Array = array if array.dtype == np.bool_ else array.astype(INT32)

    def __bool__(self) -> bool:
        if self.values.size and self.values.all() != self.values.any():
            raise Mixed(self.values)
        return bool(self.values.all())

    def __floordiv__(self, other: Any) -> Lanes:
        return _divide(self, other)[0]

    def __rfloordiv__(self, other: Any) -> Lanes:
        return _divide(other, self)[0]

    def __mod__(self, other: Any) -> Lanes:
        return _divide(self, other)[1]

    def __rmod__(self, other: Any) -> Lanes:
        return _divide(other, self)[1]

    def __invert__(self) -> Lanes:
        return Lanes(~self.values)


def _values(x: Any) -> Array:
    """The elements of lanes or of a number: in int64, so that no operation overflows before it wraps."""
    array = x.values if isinstance(x, Lanes) else np.asarray(x)
    return array if array.dtype == np.bool_ else array.astype(np.int64)


def _operation(name: str, *, swapped: bool = False) -> Callable[[Lanes, Any], Lanes]:
    function = getattr(operator, name)
    if swapped:
        return lambda self, other: Lanes(function(_values(other), _values(self)))
    return lambda self, other: Lanes(function(_values(self), _values(other)))


for _name in ("add", "sub", "mul", "lt", "le", "gt", "ge", "eq", "ne", "and_", "or_", "xor", "lshift", "rshift"):
    _bare = _name.strip("_")
    setattr(Lanes, f"__{_bare}__", _operation(_name))
    if _name not in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Lanes, f"__r{_bare}__", _operation(_name, swapped=True))


def _divide(a: Any, b: Any) -> tuple[Lanes, Lanes]:
    """Quotient and remainder, truncated; 0 for a divisor of 0, where a GPU gives any number."""
    x, y = np.broadcast_arrays(_values(a).astype(np.int64), _values(b).astype(np.int64))
    safe = np.where(y == 0, 1, y)
    quotient = np.where(y == 0, 0, np.sign(x) * np.sign(safe) * (np.abs(x) // np.abs(safe)))
    return Lanes(quotient), Lanes(x - quotient * y)


class Language:
    """The functions of `gl` and `tl` that integer code uses, for lanes and for Python integers."""

    def __init__(self) -> None:
        self.pid: Any = 0
        self.programs: Any = 1
        self.static_range = range

    def program_id(self, axis: int) -> Any:
        """The number of this program, or of each lane's program."""
        return self.pid

    def num_programs(self, axis: int) -> Any:
        """The number of programs, or of each lane's programs."""
        return self.programs

    def cdiv(self, a: Any, b: Any) -> Any:
        """a / b rounded up, by the operations of `tl.cdiv`: the sum may wrap."""
        return (a + (b - 1)) // b

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """a where the condition holds, else b."""
        if isinstance(condition, Lanes):
            return Lanes(np.where(condition.values, _values(a), _values(b)))
        return a if condition else b

    def minimum(self, a: Any, b: Any) -> Any:
        """The smaller of two numbers."""
        return self.where(a < b, a, b)

    def maximum(self, a: Any, b: Any) -> Any:
        """The larger of two numbers."""
        return self.where(a < b, b, a)


def plain(function: Any, language: Language, **replaced: Any) -> Callable[..., Any]:
    """A device function as a Python function. replaced: other objects for global names, also of what it calls."""
    return _plain(function, language, replaced, {})


def _plain(function: Any, language: Language, replaced: dict[str, Any], made: dict[Any, Any]) -> Callable[..., Any]:
    code = function.fn.__code__
    if code in made:
        return made[code]  # type: ignore[no-any-return]
    space = dict(function.fn.__globals__)
    copy = made[code] = FunctionType(code, space, code.co_name, function.fn.__defaults__)
    for name in code.co_names:
        value: Any = space.get(name)
        if name in replaced:
            space[name] = replaced[name]
        elif isinstance(value, tl.constexpr):
            space[name] = value.value
        elif hasattr(value, "fn") and hasattr(value.fn, "__code__"):
            space[name] = _plain(value, language, replaced, made)
    space["gl"] = space["tl"] = language
    return copy


def evaluate(call: Callable[..., Any], *columns: Array) -> tuple[Array, ...]:
    """The results of `call` for each case: an int32 array for each number that it returns.

    Where cases take both ways of a branch, each way is evaluated with its own cases.
    """
    try:
        results = call(*(Lanes(column) for column in columns))
    except Mixed as mixed:
        size = max(column.size for column in columns)
        taken = np.broadcast_to(mixed.taken, size)
        one, other = (evaluate(call, *(c[way] for c in columns)) for way in (taken, ~taken))
        merged = [np.empty(size, INT32) for _ in one]
        for array, a, b in zip(merged, one, other, strict=True):
            array[taken], array[~taken] = a, b
        return tuple(merged)
    size = max(column.size for column in columns)
    several = results if isinstance(results, tuple) else (results,)
    return tuple(np.broadcast_to(Lanes(r).values if not isinstance(r, Lanes) else r.values, size) for r in several)


def in_programs(function: Callable[..., Any], language: Language) -> Callable[..., Any]:
    """`function` with two more arguments in front: the number of the program, and the number of programs."""

    def call(pid: Any, programs: Any, *args: Any) -> Any:
        language.pid, language.programs = pid, programs
        return function(*args)

    return call
