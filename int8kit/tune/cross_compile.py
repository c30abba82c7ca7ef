"""Compiling for a GPU that is not in this machine, and the resources that the kernel takes there.

    compile_for(86, kernel)  ->  Resources(registers=124, spill_bytes=0, shared_bytes=49152)

Triton compiles for any NVIDIA architecture without a driver. Registers and spills come from `cuobjdump -res-usage` on
the cubin, shared memory from the compiler's metadata: both are exact. `cost_model` estimates the time from them. Call
this in the processes of `workers`, since a compiler can abort its process.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from int8kit.database.schema import Resources
from int8kit.errors import ConfigError
from int8kit.tune.space import KernelVariant


def compile_for(arch: int, kernel: KernelVariant) -> Resources:
    """Resources of the bf16 GEMM with bias on `arch` (86 for sm_86). Raises ConfigError as `assemble` does."""
    compiled = assemble(arch, kernel)
    registers, spill = _usage(compiled.asm["cubin"])
    return Resources(registers=registers, spill_bytes=spill, shared_bytes=int(compiled.metadata.shared))


def assemble(arch: int, kernel: KernelVariant, *, code: str | None = None) -> Any:
    """Triton's compiled kernel for `arch`, with `asm` ("ptx", "cubin", ...) and `metadata`.

    code: an older architecture's code, such as "sm86", assembled to run on `arch`. Raises ConfigError with the
    compiler's message if the kernel does not compile, and under Triton's interpreter, which hides the compiler. Raises
    OSError if a file cannot be written.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    from int8kit.kernels import gemm
    from int8kit.kernels.launch import finalize_cache_keys

    if gemm.interpreted():
        raise ConfigError("TRITON_INTERPRET is set: compile in a process without it")
    config, even_k, swiglu = kernel
    variant = {} if even_k is None else {"even_k": even_k}
    source, options = gemm.module(config.kernel).compiler_source(config, swiglu=swiglu, **variant)
    finalize_cache_keys(source.fn)
    if code is not None:
        options["arch"] = code
    try:
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except OSError:  # of Triton's cache or of a temporary file, and not of the kernel
        raise
    except Exception as error:  # any error of the compiler is recorded as this configuration's failure
        raise ConfigError(f"{config} does not compile for sm_{arch}: {error}") from None


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and local memory bytes per thread. STACK counts spills; LOCAL is 0 in cubins of the new ABI."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise ConfigError(f"cuobjdump printed no resource usage: {text!r}")
    return int(found[1]), int(found[2]) + int(found[3])
