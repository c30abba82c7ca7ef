"""Every bit pattern of a number format, in chunks, and the first difference of two results."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

EVERY_32_BITS = range(-(2**31), 2**31)
EVERY_16_BITS = range(-(2**15), 2**15)
CHUNK = 1 << 25  # elements: a reference in float64 then takes less than 2 GiB
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def chunks(domain: range, size: int = CHUNK) -> Iterator[range]:
    """`domain` in parts of at most `size` patterns."""
    return (domain[first : first + size] for first in range(0, len(domain), size))


def patterns(part: range, dtype: torch.dtype, device: str) -> torch.Tensor:
    """The numbers of `dtype` whose bits are the integers of `part`: [len(part)]."""
    bits = torch.arange(part.start, part.stop, part.step, dtype=torch.int64, device=device)
    return bits.to(_INTEGERS[dtype.itemsize]).view(dtype)


def first_difference(got: torch.Tensor, want: torch.Tensor) -> tuple[int, ...] | None:
    """Where two tensors differ first in a bit, or None. NaN equals NaN. `want` is broadcast."""
    integers = _INTEGERS[want.element_size()]
    wrong = got.view(integers) != want.view(integers)
    if want.is_floating_point():
        wrong &= ~(got.isnan() & want.isnan())
    return tuple(int(i) for i in wrong.nonzero()[0]) if bool(wrong.any()) else None


def compare(
    got: torch.Tensor, want: torch.Tensor, describe: Callable[[tuple[int, ...]], str]
) -> str | None:  # fmt: skip
    """The first difference in words, or None. describe: the input of the element at a place."""
    place = first_difference(got, want)
    if place is None:
        return None
    expected = want.expand_as(got)[place].item()
    return f"{describe(place)}: got {got[place].item()!r}, expected {expected!r}"


def named(x: torch.Tensor, name: str) -> Callable[[tuple[int, ...]], str]:
    """Describes an element of a result by the element of x in its row: "x = 1.0 (0x3f800000)"."""

    def describe(place: tuple[int, ...]) -> str:
        value = x.flatten()[place[0]]
        digits = 2 * value.element_size()
        bits = int(value.view(_INTEGERS[value.element_size()])) & (1 << 4 * digits) - 1
        return f"{name} = {value.item()!r} (0x{bits:0{digits}x} of {str(x.dtype).removeprefix('torch.')})"

    return describe
