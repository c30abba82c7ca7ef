"""Equivalence of a mutant of device code: each kernel that it reaches compiles to the same PTX as the original.

    digests({"groups": ["quantize"], "archs": [86]}, report)  ->  {"quantize 0 sm_86": "9f3c...", ...}

Runs in a child, on the copy that it imports, without Triton's interpreter and without a GPU. Calls of the kernels with
small tensors are recorded instead of launched, and each recorded launch is compiled. So the compiled variants are the
ones that a caller gets: each dtype, bias or none, int32 output, SwiGLU, whole and partial chunks and k-steps.

Comments, names of files and line numbers are not part of the text that is compared. Host code is not compared in this
way: an equal launch of some tensors proves nothing about other tensors. There the syntax tree decides (`generate`).
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from int8kit.spec import Kernel
from int8kit.verify.process_pool import Report

ROW_KERNELS = ("quantize", "rms_norm_quantize", "residual_norm_quantize", "swiglu_quantize", "qk_norm_rope")
_GEMMS = ("gemm_triton", "gemm_mma_sync", "gemm_wgmma")
GROUPS: dict[str, tuple[str, ...]] = {
    "epilogue": _GEMMS,
    "l2_swizzle": _GEMMS,
    "stream_k": _GEMMS[1:],
    "activations": (*_GEMMS, "swiglu_quantize"),
    "row_primitives": ROW_KERNELS,
    "rms_norm_quantize": ("rms_norm_quantize", "residual_norm_quantize"),
}
"""The kernels that the device code of a file reaches, by the file's stem; of other files, the kernel of that name."""


def groups_of(stem: str) -> tuple[str, ...]:
    """The kernels that a fault in the device code of a file can change."""
    return GROUPS.get(stem, (stem,))


def digests(request: dict[str, Any], report: Report) -> None:
    """Report a hash of the PTX of the variants of the kernels in `request`: all, or the first `most` of each."""
    found: dict[str, str] = {}
    for group in request["groups"]:
        archs = (90,) if group == "gemm_wgmma" else request["archs"]
        for number, launch in enumerate(islice(_recorded(group), request.get("most"))):
            report({"variant": f"{group} {number}"})
            for arch in archs:
                found[f"{group} {number} sm_{arch}"] = hashlib.sha256(
                    stripped(_ptx(arch, *launch)).encode()
                ).hexdigest()
    report({"digests": found})


def stripped(ptx: str) -> str:
    """PTX without comments, debug information and blank lines."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL).partition(".section")[0]
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith((".loc", ".file")))


Launch = tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...], tuple[tuple[str, Any], ...]]
"""A kernel, its arguments, its constants and its options."""


def _recorded(group: str) -> Iterator[Launch]:
    """The launches of one kernel's variants."""
    import importlib

    from int8kit.kernels import row_primitives

    launches: list[Launch] = []

    def record(function: Any, grid: Any, args: Any, constants: Any, options: Any, key: Any) -> None:
        launches.append((function, args, constants, options))

    module = importlib.import_module(f"int8kit.kernels.{group}")
    for place in (module, row_primitives):
        if hasattr(place, "launch_cached"):
            vars(place)["launch_cached"] = record
    if group in ROW_KERNELS:
        _call_row_kernel(group, getattr(module, group))
    else:
        _call_gemm(Kernel(group.removeprefix("gemm_")), module)
    yield from launches


def _call_row_kernel(name: str, kernel: Callable[..., Any]) -> None:
    import torch

    from int8kit.kernels.qk_norm_rope import HeadTile
    from int8kit.kernels.row_primitives import RowTile

    for dtype in (torch.bfloat16, torch.float32):

        def ones(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.ones(*shape, dtype=dtype)

        if name == "qk_norm_rope":
            for heads, d, tile in ((3, 32, HeadTile(2, 1, 1)), (4, 64, HeadTile(1, 4, 1)), (2, 16, None)):
                kernel(ones(4, 3 * heads * d), ones(d), ones(d), ones(4, d), ones(4, d), heads, tile=tile)
            continue
        for k, row in ((300, None), (1500, RowTile(256, 1)), (5000, RowTile(2048, 8)), (1024, RowTile(1024, 4))):
            if name == "rms_norm_quantize":
                kernel(ones(4, k), ones(k), ones(2, k), tile=row)
                kernel(ones(4, k), None, None, tile=row) if k == 300 else None
            elif name == "residual_norm_quantize":
                kernel(ones(4, k), ones(4, k), ones(k), ones(2, k), ones(k), ones(2, k), tile=row)
            else:
                kernel(ones(4, 2 * k if name == "swiglu_quantize" else k), tile=row)
        if name == "quantize":
            kernel(ones(2, 20480))
            kernel(ones(2, 17001))


def _call_gemm(kernel: Kernel, module: Any) -> None:
    """Launches with bias and without, int32, SwiGLU, and of the Triton kernel whole and partial k-steps."""
    import torch

    from int8kit.kernels.operands import Operands
    from int8kit.verify.examples.fixed import SMALL_TILES
    from int8kit.verify.mutation.mutant import TILES

    for name, place in list(sys.modules.items()):
        if name.startswith("int8kit.kernels.") and hasattr(place, "multiprocessors"):
            vars(place)["multiprocessors"] = lambda device: 132
    for number, config in enumerate(TILES.get(kernel, SMALL_TILES)):
        for k in (4 * config.block_k, 4 * config.block_k + 16) if kernel is Kernel.TRITON else (512,):
            x, w = torch.ones(96, k, dtype=torch.int8), torch.ones(160, k, dtype=torch.int8)
            sx, sw, bias = torch.ones(96), torch.ones(160), torch.ones(160, dtype=torch.bfloat16)
            out = torch.empty(96, 160, dtype=torch.bfloat16)
            module.launch(Operands(x, w, sx, sw, bias, out), config, {})
            if number % 2 == 0:
                module.launch(Operands(x, w, sx, sw, None, out.float()), config, {})
                module.launch(Operands(x, w, None, None, None, out.int()), config, {})
                half = torch.empty(96, 80, dtype=torch.float16)
                module.launch(Operands(x, w, sx, sw, bias.float(), half, swiglu=True), config, {})


def _ptx(arch: int, function: Any, args: Any, constants: Any, options: Any) -> str:
    """The PTX of a launch for an architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from int8kit.kernels.launch import COMPILE_OPTIONS, DO_NOT_SPECIALIZE, finalize_cache_keys

    finalize_cache_keys(function)
    names = list(function.arg_names)
    values = dict(constants)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, (name, value) in enumerate(zip(names, args, strict=False)):
        signature[name] = _kind(value)
        free = name in DO_NOT_SPECIALIZE or name in ("PERIOD", "IMAGE_ROWS")
        whole = value % 16 == 0 if isinstance(value, int) else hasattr(value, "data_ptr")
        if whole and not free:
            attributes[i,] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(names[len(args) :], "constexpr")
    kind: Any = ASTSource
    if "gluon" in type(function).__module__:
        from triton.experimental.gluon._runtime import GluonASTSource

        kind = GluonASTSource
    source = kind(function, signature, values, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={**COMPILE_OPTIONS, **dict(options)})
    return str(compiled.asm["ptx"])


def _kind(value: Any) -> str:
    """Triton's name of the type of an argument."""
    import torch

    names = {torch.int8: "i8", torch.int32: "i32", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    if isinstance(value, torch.Tensor):
        return f"*{names[value.dtype]}"
    if hasattr(value, "block_shape"):
        return f"tensordesc<{names[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
    return "fp32" if isinstance(value, float) else "i32"
