"""INT8 GEMMs that can be judged: int8kit's own, torch's, other projects', and any function that a user names.

    find("torch._int_mm", executor)        find("mypackage.gemm:scaled", executor)

A `Subject` is one or two functions and the domain that its documentation promises: `fit` moves an example into it, so
that a refusal that is documented is no failure. An adapter is some ten lines, and imports what it adapts when it is
asked for. A user's function has one of two signatures:

    sums(xq, wq) -> int32 [M, N]                                        two parameters
    scaled_mm(xq, wq, sx, sw, bias, out_dtype) -> out_dtype [M, N]      six, bias may be None

with xq [M, K] and wq [N, K] int8, sx [M] and sw [N] fp32. One that takes other operands is adapted in a few lines of
the user's own; guessing from names was rejected.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from int8kit.errors import InputError, UnknownName
from int8kit.kernels import gemm
from int8kit.spec import TileConfig
from int8kit.verify.examples.strategies import Draw
from int8kit.verify.executors import Executor

Sums = Callable[[Draw, torch.Tensor, torch.Tensor], torch.Tensor]
Output = Callable[[Draw, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """An INT8 GEMM under judgement; at least one of sums and output."""

    name: str
    device: str
    sums: Sums | None = None  # (example, xq, wq) -> int32 [M, N]
    output: Output | None = None  # (example, xq, wq, sx, sw, bias) -> [M, N] of the example's out_dtype
    fit: Callable[[Draw], Draw] = lambda d: d  # the example moved into the documented domain
    tiles: tuple[TileConfig, ...] = ()  # configurations, of int8kit's own
    strides: bool = True  # takes rows that are further apart than K

    def run(
        self, d: Draw, x: torch.Tensor, w: torch.Tensor, sx: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Its output, or its sums if it gives no more."""
        if self.output is not None:
            return self.output(d, x, w, sx, sw, bias)
        assert self.sums is not None
        return self.sums(d, x, w)


def ours(executor: Executor, tiles: tuple[TileConfig, ...]) -> Subject:
    """The kernels of `tiles` on an executor."""

    def sums(d: Draw, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return gemm.accumulate(x, w, config=d.config, arch=executor.arch)

    def output(d: Draw, x: torch.Tensor, w: torch.Tensor, *vectors: Any) -> torch.Tensor:
        return gemm.scaled_mm(x, w, *vectors, config=d.config, out_dtype=d.out_dtype, arch=executor.arch)

    return Subject("int8kit", executor.device, sums, output, tiles=tiles)


def _int_mm(device: str) -> Subject:
    """torch._int_mm: M above 16, N and K multiples of 8."""

    def sums(d: Draw, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch._int_mm(x.contiguous(), w.contiguous().t())

    return Subject("torch._int_mm", device, sums, fit=partial(_rounded, least=17, step=8), strides=False)


def _vllm(device: str) -> Subject:
    """vLLM's cutlass_scaled_mm: N and K multiples of 16, bf16 or fp16 out, a bias of the output's dtype."""
    if not hasattr(torch.ops._C, "cutlass_scaled_mm"):  # the library may have been loaded without the package
        import vllm._custom_ops  # noqa: F401

    def output(d: Draw, x: torch.Tensor, w: torch.Tensor, sx: torch.Tensor, sw: torch.Tensor, bias: Any) -> Any:
        out = torch.empty(len(x), len(w), dtype=d.out_dtype, device=x.device)
        torch.ops._C.cutlass_scaled_mm(out, x.contiguous(), w.contiguous().t(), sx[:, None], sw[None], bias)
        return out

    return Subject("vllm", device, output=output, fit=partial(_half, step=16), strides=False)


def _bitsandbytes(device: str) -> Subject:
    """bitsandbytes' int8_scaled_mm: scales as row maxima, a bias in fp16, bf16 out."""
    import bitsandbytes  # noqa: F401

    def output(d: Draw, x: torch.Tensor, w: torch.Tensor, sx: torch.Tensor, sw: torch.Tensor, bias: Any) -> Any:
        product = torch.ops.bitsandbytes.int8_scaled_mm.default
        half = None if bias is None else bias.half()
        return product(x.contiguous(), w.contiguous(), sx * 127, sw * 127, bias=half, dtype=torch.bfloat16)

    def fit(d: Draw) -> Draw:
        bias = None if d.bias is None else torch.float16
        return replace(_half(d, step=16), out_dtype=torch.bfloat16, bias=bias)

    return Subject("bitsandbytes", device, output=output, fit=fit, strides=False)


def _torchao(device: str) -> Subject:
    """torchao's scaled_int8_mm: M from 2 on, scales in bf16, no bias, bf16 out; one of its tiles."""
    from torchao.prototype.quantized_training.int8_mm import _scaled_int8_mm_kernel, scaled_int8_mm

    _untuned(_scaled_int8_mm_kernel)

    def output(d: Draw, x: torch.Tensor, w: torch.Tensor, sx: torch.Tensor, sw: torch.Tensor, bias: Any) -> Any:
        return scaled_int8_mm(x.contiguous(), w.contiguous().t(), sx.bfloat16(), sw.bfloat16())

    def fit(d: Draw) -> Draw:
        return replace(_half(d, least=2, step=16), out_dtype=torch.bfloat16, bias=None)

    return Subject("torchao", device, output=output, fit=fit, strides=False)


def _comfy_kitchen(device: str) -> Subject:
    """comfy-kitchen's CUTLASS for sm_80, by its own heuristic: K a multiple of 16, always a bias, of bf16."""
    from comfy_kitchen.backends import cuda

    def output(d: Draw, x: torch.Tensor, w: torch.Tensor, sx: torch.Tensor, sw: torch.Tensor, bias: Any) -> Any:
        out = torch.empty(len(x), len(w), dtype=d.out_dtype, device=x.device)
        arguments = map(cuda._wrap_for_dlpack, (x.contiguous(), w.contiguous(), sx[:, None], sw, bias, out))
        stream = torch.cuda.current_stream().cuda_stream
        if not cuda._C.cutlass_int8_dequant(*arguments, cuda.DTYPE_TO_CODE[d.out_dtype], stream):
            raise RuntimeError(f"declined {d.shape}")
        return out

    def fit(d: Draw) -> Draw:
        return replace(_rounded(d, step=16), out_dtype=torch.bfloat16, bias=torch.bfloat16)

    return Subject("comfy-kitchen", device, output=output, fit=fit, strides=False)


def _sdnq(device: str) -> Subject:
    """SDNQ's Triton kernel, which asks for scratch memory on the device: N, K multiples of 16, 16-bit out; one tile."""
    import triton
    from sdnq.kernels.triton_scaled_mm import sdnq_scaled_mm, sdnq_scaled_mm_kernel

    _untuned(sdnq_scaled_mm_kernel)
    triton.set_allocator(lambda size, _align, _stream: torch.empty(size, dtype=torch.int8, device=device))

    def output(d: Draw, x: torch.Tensor, w: torch.Tensor, sx: torch.Tensor, sw: torch.Tensor, bias: Any) -> Any:
        rows, columns = sx[:, None].contiguous(), sw[None].contiguous()
        return sdnq_scaled_mm(x.contiguous(), w.contiguous().t(), rows, columns, bias=bias, out_dtype=d.out_dtype)

    return Subject("sdnq", device, output=output, fit=partial(_half, step=16), strides=False)


def _untuned(kernel: Any) -> None:
    """Leave Triton's autotuner `kernel` its first configuration: it would compile and time all for each new shape."""
    kernel.configs = kernel.configs[:1]


def _gemlite(device: str) -> Subject:
    """None: raises InputError."""
    raise InputError("gemlite quantizes inside its layer: no GEMM of int8 operands to judge; leave it out")


KNOWN: dict[str, Callable[[str], Subject]] = {
    "torch._int_mm": _int_mm, "vllm": _vllm, "comfy-kitchen": _comfy_kitchen, "torchao": _torchao, "sdnq": _sdnq,
    "gemlite": _gemlite, "bitsandbytes": _bitsandbytes,
}  # fmt: skip


def find(name: str, executor: Executor, tiles: tuple[TileConfig, ...] = ()) -> Subject:
    """The subject of that name: int8kit, one of KNOWN, or module:function. Raises UnknownName or InputError."""
    if name == "int8kit":
        return ours(executor, tiles)
    if name in KNOWN:
        try:
            return KNOWN[name](executor.device)
        except ImportError as error:
            raise InputError(f"{name} is not installed here ({error}); install it, or leave it out") from None
    module, colon, function = name.partition(":")
    if not colon:
        raise UnknownName("subject", name, ["int8kit", *KNOWN], "or name a function of your own, module:function")
    return _users(name, module, function, executor.device)


def _users(name: str, module: str, function: str, device: str) -> Subject:
    try:
        call = getattr(importlib.import_module(module), function)
        count = len(inspect.signature(call).parameters)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"subject {name!r}: {error}; legal is module:function of something on PYTHONPATH") from None
    if count == 2:
        return Subject(name, device, sums=lambda d, x, w: call(x, w))
    if count == 6:
        return Subject(name, device, output=lambda d, *operands: call(*operands, d.out_dtype))
    raise InputError(
        f"subject {name!r} takes {count} parameters; legal are 2, (xq, wq) for sums, "
        "and 6, (xq, wq, sx, sw, bias, out_dtype)"
    )


def _rounded(d: Draw, *, least: int = 1, step: int = 1) -> Draw:
    """With M of at least `least`, N and K rounded up to multiples of `step`."""
    m, n, k = d.shape.m, d.shape.n, d.shape.k
    return replace(d, shape=replace(d.shape, m=max(m, least), n=-(-n // step) * step, k=-(-k // step) * step))


def _half(d: Draw, *, least: int = 1, step: int) -> Draw:
    """`_rounded`, to 16-bit output and a bias of its dtype."""
    out = torch.bfloat16 if d.out_dtype is torch.float32 else d.out_dtype
    return replace(_rounded(d, least=least, step=step), out_dtype=out, bias=None if d.bias is None else out)
