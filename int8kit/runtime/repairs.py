"""Switches of the repairs that the fused forward of Ideogram 4 makes beside the stock forward.

    Repairs()                       all of them
    Repairs.without(["trim-text"])  all but one
    Repairs.none()                  the stock forward's order of work

Each repair saves time or memory. A repair whose arithmetic is the stock model's changes a result by rounding at most.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from int8kit.errors import UnknownName


def _repair(text: str) -> bool:
    made: bool = field(default=True, metadata={"text": text})
    return made


@dataclass(frozen=True)
class Repairs:
    """One switch for each repair, on by default."""

    trim_text: bool = _repair("rows of padding are left out")
    no_mask: bool = _repair("attention takes no mask: each prompt's rows are one dense problem")
    text_once: bool = _repair("text projection and RoPE tables once per prompt, on text rows only")
    modulation_ahead: bool = _repair("adaLN of all steps in one product before the first step")
    image_rows: bool = _repair("the final layer runs on image rows only")
    joined: bool = _repair("one GEMM for q, k and v, and one for w1 and w3")
    fused_rows: bool = _repair("norm, gate, residual, RoPE and SwiGLU in int8kit's kernels; needs INT8 linears")

    @classmethod
    def none(cls) -> Repairs:
        """No repair."""
        return cls(**dict.fromkeys(_names().values(), False))

    @classmethod
    def without(cls, names: Iterable[str]) -> Repairs:
        """All repairs but these, named as in `described`. Raises UnknownName."""
        known = _names()
        for name in names:
            if name not in known:
                raise UnknownName("repair", name, known)
        return cls(**{known[name]: False for name in names})


def described() -> dict[str, str]:
    """The repairs by name, such as "trim-text", each with a line of text."""
    return {name: next(f for f in fields(Repairs) if f.name == own).metadata["text"] for name, own in _names().items()}


def _names() -> dict[str, str]:
    return {f.name.replace("_", "-"): f.name for f in fields(Repairs)}
