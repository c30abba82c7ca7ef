"""W8A8 GEMM with fused dequantization: the entry point of the three GEMM kernels.

    out[m, n] = out_dtype((fp32(sum_k x[m, k] * w[n, k]) * sx[m]) * sw[n] + fp32(bias[n]))

    x [M, K] int8, w [N, K] int8    contiguous along K, any stride between rows
    sx [M] fp32, sw [N] fp32, bias [N] bf16 | fp16 | fp32 or absent
    out [M, N] bf16 | fp16 | fp32, or the int32 accumulators, contiguous along N, any stride between rows

`TileConfig.kernel` names the module: `gemm_triton`, `gemm_mma_sync` or `gemm_wgmma`. All compute the same bits. The
named kernel may be unable to serve: this Triton's Gluon is missing or different, or the rows of the tensors are not
aligned. Then the Triton kernel serves with `spec.default_config`, and a warning names each reason once. Each module is
a `KernelModule`.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from functools import lru_cache
from typing import Any, Protocol, cast

import torch
import triton

from int8kit.errors import ConfigError
from int8kit.fingerprint import fingerprint
from int8kit.kernels.launch import interpreted, on_device
from int8kit.kernels.operands import OUT_DTYPES, Operands
from int8kit.spec import GemmShape, Kernel, TileConfig, default_config
from int8kit.toolchain import Toolchain

__all__ = [
    "OUT_DTYPES",
    "Fallback",
    "accumulate",
    "interpreted",
    "kernel_hash",
    "module",
    "scaled_mm",
    "scaled_mm_swiglu",
    "toolchain",
    "why_not",
]


class Fallback(UserWarning):
    """Warning that the Triton kernel serves instead of the named one. Tuner and verifier treat it as an error."""


class KernelModule(Protocol):
    """Functions of a GEMM kernel's module."""

    def why_not(self, operands: Operands) -> str | None:
        """The reason why the kernel cannot serve these tensors, or None."""

    def launch(self, operands: Operands, config: TileConfig, options: dict[str, Any]) -> None:
        """Launch the kernel on the current device and stream. options: further compile options of Triton."""

    def compiler_source(self, config: TileConfig, **variant: bool) -> tuple[Any, dict[str, Any]]:
        """Source and options for the cross-compiler. variant: even_k, which only the Triton kernel takes."""


@lru_cache(maxsize=len(Kernel))
def module(kernel: Kernel) -> KernelModule:
    """The module of a kernel. Raises ConfigError if this Triton cannot import it."""
    try:
        return cast(KernelModule, importlib.import_module(f"int8kit.kernels.gemm_{kernel}"))
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"Triton {triton.__version__} lacks Gluon features that the {kernel} kernel needs: {error}"
        ) from None


@lru_cache(maxsize=len(Kernel))
def kernel_hash(kernel: Kernel = Kernel.TRITON) -> str:
    """12 hexadecimal digits of everything that decides a kernel's result: host code, device code, constants, options.

    `fingerprint` lists the edits that keep it. Raises OSError where the source cannot be read, and ConfigError if this
    Triton has no Gluon.
    """
    of = module(kernel)
    return fingerprint(of.launch, of.why_not, scaled_mm, scaled_mm_swiglu, accumulate)


def toolchain() -> Toolchain:
    """The toolchain of this process, with which the entries of a database are compared."""
    hashes = {}
    for kernel in Kernel:
        with contextlib.suppress(ConfigError):
            hashes[kernel] = kernel_hash(kernel)
    return Toolchain(triton.__version__, hashes)


def why_not(operands: Operands, kernel: Kernel) -> str | None:
    """The reason why `kernel` cannot serve these tensors here, or None."""
    if kernel is not Kernel.TRITON and interpreted():
        return "Triton's interpreter does not run Gluon"
    try:
        return module(kernel).why_not(operands)
    except ConfigError as error:
        return str(error)


def accumulate(
    xq: torch.Tensor,
    wq: torch.Tensor,
    *,
    config: TileConfig,
    out: torch.Tensor | None = None,
    arch: str | None = None,
) -> torch.Tensor:
    """The int32 accumulators `xq @ wq.T`, for proofs.

    xq: [M, K] int8; wq: [N, K] int8; out: [M, N] int32, allocated if absent. arch: run the code of another GPU, such as
    "sm86" on sm_90. Raises ShapeError for tensors outside the kernel's domain, ConfigError if `config` cannot run.
    """
    out = _empty(xq, wq.shape[:1], torch.int32) if out is None else out
    _launch(Operands(xq, wq, None, None, None, out), config, arch)
    return out


def scaled_mm(
    xq: torch.Tensor,
    wq: torch.Tensor,
    sx: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    config: TileConfig,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    arch: str | None = None,
) -> torch.Tensor:
    """The dequantized GEMM, bit-equal to `int8kit.reference.scaled_mm` under every legal `config`.

    xq: [M, K] int8; wq: [N, K] int8; sx: [M] fp32; sw: [N] fp32; bias: [N] bf16, fp16 or fp32, or None. out: [M, N] of
    out_dtype (bf16, fp16 or fp32), allocated if absent. arch: run the code of another GPU, such as "sm86" on sm_90.
    Raises ShapeError for tensors outside the kernel's domain, ConfigError if `config` cannot run.
    """
    out = _empty(xq, wq.shape[:1], out_dtype) if out is None else out
    return _rounded(Operands(xq, wq, sx, sw, bias, out), config, arch)


def scaled_mm_swiglu(
    xq: torch.Tensor,
    wq: torch.Tensor,
    sx: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    config: TileConfig,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    arch: str | None = None,
) -> torch.Tensor:
    """silu(gate) * up of the dequantized GEMM, whose even columns are gates and whose odd columns are ups: [M, N / 2].

    Arguments as for `scaled_mm`. Bit-equal to `int8kit.reference.scaled_mm_swiglu`. Nothing is rounded to out_dtype
    between the GEMM and this output, and half as much is written.
    """
    out = _empty(xq, (wq.shape[0] // 2,), out_dtype) if out is None else out
    return _rounded(Operands(xq, wq, sx, sw, bias, out, swiglu=True), config, arch)


def _empty(xq: torch.Tensor, columns: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(xq.shape[0], *columns, dtype=dtype, device=xq.device)


def _rounded(operands: Operands, config: TileConfig, arch: str | None) -> torch.Tensor:
    out = operands.out
    if interpreted() and out.dtype is torch.bfloat16:
        # Triton's interpreter truncates float32 to bfloat16 instead of rounding; let torch do that step.
        single = torch.empty_like(out, dtype=torch.float32)
        o = operands
        _launch(Operands(o.xq, o.wq, o.sx, o.sw, o.bias, single, o.swiglu), config, arch)
        return out.copy_(single)
    _launch(operands, config, arch)
    return out


def _launch(operands: Operands, config: TileConfig, arch: str | None) -> None:
    if operands.m == 0:
        return
    options = {} if arch is None else {"arch": arch}
    reason = why_not(operands, config.kernel)
    try:
        with on_device(operands.xq):
            if reason is None:
                try:
                    module(config.kernel).launch(operands, config, options)
                    return
                except Exception as error:
                    if config.kernel is Kernel.TRITON or not _is_compilers(error):
                        raise
                    reason = f"Triton {triton.__version__} does not compile {config}"
            _notice(config.kernel, reason)
            config = default_config(GemmShape(operands.m, operands.n, operands.k))
            module(config.kernel).launch(operands, config, options)
    except triton.runtime.errors.OutOfResources as error:
        raise ConfigError(f"{config} does not fit this GPU: {error}; use a smaller tile or fewer stages") from None


def _is_compilers(error: Exception) -> bool:
    """Whether the compiler failed. Gluon changes between versions of Triton, and that must not end a run."""
    return isinstance(error, triton.compiler.errors.CompilationError) or "PassManager::run failed" in str(error)


@lru_cache(maxsize=256)
def _notice(kernel: Kernel, reason: str) -> None:
    """Warn once for each reason."""
    warnings.warn(
        f"the {Kernel.TRITON} kernel serves instead of the {kernel} kernel, same bits but slower: {reason}",
        Fallback,
        stacklevel=4,
    )
