"""Another card's code on this one: where an entry's configuration can be executed, and what that proves.

native       a card's own code, from the entry's configuration; on the entry's own card it is what `run` runs
cross_arch   the launch option `arch="sm86"` makes Triton emit Ampere's code (mma.sync, cp.async) for a newer card:
             the instruction and the schedule of an RTX 3090, assembled for the card that is here
interpreter  the same source in Triton's interpreter on a CPU, at reduced M, N and K: proves indices, masks and the
             order of the epilogue, and nothing of the compiler
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from int8kit.errors import InputError
from int8kit.gpus import Gpu, present
from int8kit.kernels import gemm
from int8kit.toolchain import require_supported, runnable_archs


@dataclass(frozen=True)
class Executor:
    """What executes kernels here: the tensors' device, and the launch option that selects the code."""

    on: Literal["native", "cross_arch", "interpreter"]
    device: str  # torch device
    name: str  # for people and stamps
    arch: str | None = None
    code: int | None = None  # architecture whose code is compiled, 86 for sm_86; None in the interpreter

    def __str__(self) -> str:
        return f"{self.name}, {self.arch} code" if self.arch else self.name


def available(gpu: Gpu) -> list[Executor]:
    """What can execute configurations of `gpu` on this machine, the strongest proof first.

    On a newer card there are two: that card's code, and the newer card's own from the same configuration. Raises
    InputError on a machine without a card and without the interpreter.
    """
    require_supported()
    if gemm.interpreted():
        return [Executor("interpreter", "cpu", "Triton's interpreter on the CPU")]
    card = present()
    if card is None:
        raise InputError("no CUDA device here: set TRITON_INTERPRET=1 before triton is imported, as the verb does")
    own = Executor("native", "cuda", card.name, code=card.arch)
    if gpu.arch in runnable_archs(card.arch) and card.arch > gpu.arch:
        return [Executor("cross_arch", "cuda", card.name, f"sm{gpu.arch}", gpu.arch), own]
    return [own]


def tensor_core_instructions(ptx: str) -> set[str]:
    """The integer matrix instructions in `ptx`, without their shapes: {"mma.sync"} or {"wgmma.mma_async"}."""
    return set(re.findall(r"\b(mma\.sync|wgmma\.mma_async)\b[^;]*\.s32\.s8\.s8", ptx))
