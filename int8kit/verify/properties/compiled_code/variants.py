"""The launches whose code is checked: each kernel with each schedule, operation and output, in small tiles.

A variant is a value without tensors, so that it travels to the process that compiles it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from int8kit import files
from int8kit.database import store
from int8kit.kernels import gemm
from int8kit.kernels.qk_norm_rope import qk_norm_rope
from int8kit.kernels.quantize import quantize
from int8kit.kernels.residual_norm_quantize import residual_norm_quantize
from int8kit.kernels.rms_norm_quantize import rms_norm_quantize
from int8kit.kernels.swiglu_quantize import swiglu_quantize
from int8kit.spec import GROUP_M, Kernel, Schedule, TileConfig

SM_90 = 90  # of the wgmma kernel, whatever GPU was asked for

_Operation = Literal["plain", "int32", "swiglu"]
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class GemmVariant:
    """A launch of a GEMM kernel: its configuration, operation, output and bias, and whether K is a multiple of 16."""

    arch: int
    config: TileConfig
    operation: _Operation = "plain"
    out: torch.dtype = _BF16
    bias: torch.dtype | None = _BF16
    k: int = 4096

    def __str__(self) -> str:
        bias = f"{_name(self.bias)} bias" if self.bias else "no bias"
        output = "int32 accumulators" if self.operation == "int32" else f"{self.operation}, {_name(self.out)}, {bias}"
        return f"{self.config.kernel} kernel, {self.config}, {output}, K = {self.k}, sm_{self.arch} code"

    def launch(self) -> Any:
        """Call the public entry point, on CPU tensors."""
        m, n = 256, 256
        x, w = torch.zeros(m, self.k, dtype=torch.int8), torch.zeros(n, self.k, dtype=torch.int8)
        if self.operation == "int32":
            return gemm.accumulate(x, w, config=self.config)
        product = gemm.scaled_mm if self.operation == "plain" else gemm.scaled_mm_swiglu
        bias = None if self.bias is None else torch.zeros(n, dtype=self.bias)
        return product(x, w, torch.ones(m), torch.ones(n), bias, config=self.config, out_dtype=self.out)


@dataclass(frozen=True)
class RowVariant:
    """A launch of a row kernel."""

    arch: int
    kernel: Literal["quantize", "rms_norm_quantize", "residual_norm_quantize", "swiglu_quantize", "qk_norm_rope"]
    k: int
    dtype: torch.dtype = _BF16
    config: None = None

    def __str__(self) -> str:
        return f"{self.kernel} kernel, K = {self.k}, {_name(self.dtype)}, sm_{self.arch} code"

    def launch(self) -> Any:
        """Call the public entry point, on CPU tensors."""
        x, v = torch.zeros(4, self.k, dtype=self.dtype), torch.zeros(self.k, dtype=self.dtype)
        images = torch.zeros(2, self.k, dtype=self.dtype)
        if self.kernel == "quantize":
            return quantize(x)
        if self.kernel == "rms_norm_quantize":
            return rms_norm_quantize(x, v, images)
        if self.kernel == "residual_norm_quantize":
            return residual_norm_quantize(x, x, v, images, v, images)
        if self.kernel == "swiglu_quantize":
            return swiglu_quantize(x)
        heads = 6
        head = self.k // (3 * heads)
        return qk_norm_rope(x, v[:head].clone(), v[:head].clone(), x[:, :head].clone(), x[:, :head].clone(), heads)


Variant = GemmVariant | RowVariant


def _name(dtype: torch.dtype) -> str:
    return {_BF16: "bf16", _FP16: "fp16", _FP32: "fp32"}[dtype]


def _wgmma(rows: int, columns: int, stream_k: int) -> TileConfig:
    schedule = Schedule.COOPERATIVE if rows == 256 else Schedule.PINGPONG
    return TileConfig(
        rows, columns, 128, num_warps=8, num_stages=3, kernel=Kernel.WGMMA, stream_k=stream_k, schedule=schedule
    )


def _mma_sync(rows: int, block_k: int, stages: int, stream_k: int) -> TileConfig:
    return TileConfig(rows, 64, block_k, num_warps=4, num_stages=stages, kernel=Kernel.MMA_SYNC, stream_k=stream_k)


def gemms(arch: int) -> tuple[GemmVariant, ...]:
    """The GEMM kernels for `arch` (86 for sm_86), and the wgmma kernel for sm_90.

    The wgmma kernel has every schedule with every operation. The mma.sync kernel has every order of its copies.
    """
    triton = TileConfig(64, 64, 64, num_warps=4, num_stages=3)
    return (
        *(
            variant
            for rows in (64, 256)
            for stream_k in (0, 1)
            for variant in (
                GemmVariant(SM_90, _wgmma(rows, 64, stream_k)),
                GemmVariant(SM_90, _wgmma(rows, 64, stream_k), "int32"),
                GemmVariant(SM_90, _wgmma(rows, 64, stream_k), "swiglu", _FP32 if stream_k else _BF16, None),
            )
        ),
        GemmVariant(SM_90, _wgmma(128, 128, 0), "swiglu", _BF16, _FP32),
        GemmVariant(arch, _mma_sync(64, 64, 3, 0)),
        GemmVariant(arch, _mma_sync(16, 128, 2, 0), "int32"),
        GemmVariant(arch, _mma_sync(64, 64, 2, 0), "swiglu", _FP16, None),
        GemmVariant(arch, _mma_sync(64, 128, 3, 1), "plain", _FP32, _FP32),
        GemmVariant(arch, _mma_sync(64, 64, 4, 1), "int32"),
        GemmVariant(arch, _mma_sync(32, 64, 3, 1), "swiglu"),
        GemmVariant(arch, triton),
        GemmVariant(arch, replace(triton, block_m=16, block_k=128), "int32", k=4080),
        GemmVariant(arch, triton, "swiglu", _FP16, None),
        GemmVariant(arch, triton, "plain", _FP32, _FP16, k=33),
    )


def rows(arch: int) -> tuple[RowVariant, ...]:
    """The row kernels for `arch`; the last two have a masked chunk, and a row that registers do not hold."""
    return (
        RowVariant(arch, "quantize", 1536),
        RowVariant(arch, "rms_norm_quantize", 1536),
        RowVariant(arch, "residual_norm_quantize", 1536),
        RowVariant(arch, "swiglu_quantize", 1536),
        RowVariant(arch, "qk_norm_rope", 3 * 6 * 64),
        RowVariant(arch, "rms_norm_quantize", 1000, _FP32),
        RowVariant(arch, "quantize", 20480),
    )


def served(arch: int) -> tuple[GemmVariant, ...]:
    """The configurations that the shipped databases have for `arch`. One kernel serves all widths of group_m."""
    databases = [store.load(path) for path in sorted(files.shipped("tuning_db").glob("*.json"))]
    tiles = {entry.config for base in databases if base.gpu.arch == arch for entry in base.entries}
    kernels = {replace(tile, group_m=GROUP_M, stream_k=min(tile.stream_k, 1)) for tile in tiles}
    return tuple(GemmVariant(arch, tile) for tile in sorted(kernels, key=lambda tile: (tile.kernel, str(tile))))
