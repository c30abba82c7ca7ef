"""The ways to execute a configuration on this machine, and the proof that each of them gives.

Executors:

    native       the present GPU's own code; on the GPU of a database entry, `run` executes this code
    cross_arch   the code of an older architecture, by the launch option `arch="sm86"`: the instructions and the
                 schedule of an RTX 3090 (mma.sync, cp.async), assembled for the present GPU
    interpreter  the same source in Triton's interpreter on a CPU, at reduced M, N and K: it proves indices, masks and
                 the order of the epilogue, and nothing about the compiler
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from int8kit.errors import InputError
from int8kit.gpus import Gpu, present
from int8kit.kernels import gemm
from int8kit.spec import Kernel, TileConfig
from int8kit.toolchain import require_supported, runnable_archs


@dataclass(frozen=True)
class Executor:
    """One way to execute kernels: the device of the tensors, and the launch option that selects the code."""

    on: Literal["native", "cross_arch", "interpreter"]
    device: str  # torch device
    name: str  # the device, in messages and stamps
    arch: str | None = None
    code: int | None = None  # architecture whose code is compiled, 86 for sm_86; None in the interpreter
    asked: int | None = None  # architecture of the GPU whose configurations are executed

    def __str__(self) -> str:
        return f"{self.name}, {self.arch} code" if self.arch else self.name

    def runs(self, config: TileConfig) -> bool:
        """False for a Gluon kernel in the interpreter, which executes plain Triton alone."""
        return self.on != "interpreter" or config.kernel is Kernel.TRITON


def available(gpu: Gpu) -> list[Executor]:
    """The executors of `gpu`'s configurations on this machine, the strongest proof first.

    A newer GPU has two: `gpu`'s code, and its own code from the same configuration. Raises InputError on a machine
    without a GPU and without the interpreter.
    """
    require_supported()
    if gemm.interpreted():
        return [Executor("interpreter", "cpu", "Triton's interpreter on the CPU", asked=gpu.arch)]
    here = present()
    if here is None:
        raise InputError(
            "no CUDA device here: set TRITON_INTERPRET=1 before triton is imported, as `int8kit verify` does"
        )
    own = Executor("native", "cuda", here.name, code=here.arch, asked=gpu.arch)
    if gpu.arch in runnable_archs(here.arch) and here.arch > gpu.arch:
        return [Executor("cross_arch", "cuda", here.name, f"sm{gpu.arch}", gpu.arch, gpu.arch), own]
    return [own]
