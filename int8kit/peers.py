"""INT8 GEMMs of other projects: one adapter for each library, used by `verify libraries` and by the benchmarks.

    prepare = PEERS["vllm"].load("cuda", autotune=False)        imports the library; ImportError if it is missing
    launch = prepare(xq, wq, sx, sw, bias, out)                 xq [M, K] and wq [N, K] int8, sx [M] and sw [N] fp32
    y = launch()                                                [M, N]; `out` itself where the library takes it

A preparation does everything that a caller does once, such as casting scales. A launch is the call that is timed. A
library that allocates its result ignores `out`, apart from its dtype. `Peer.returns` says which result `y` is, and
`Peer.domain` which operands the library's documentation supports.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from int8kit.errors import InputError, UnknownName

if TYPE_CHECKING:  # the names are known without torch, so that a wrong name costs no slow import
    import torch

    Launch = Callable[[], torch.Tensor]
    Prepare = Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], Launch
    ]

OURS = "int8kit"
DECLINED = "declined: no CUTLASS configuration for this shape"
WITHOUT_GEMM = {"gemlite": "gemlite quantizes inside its layer and offers no GEMM of int8 operands; leave it out"}


@dataclass(frozen=True)
class Domain:
    """The operands that a library documents as supported."""

    min_m: int = 1
    multiple: int = 1  # N and K are multiples of it
    out_dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    bias: Literal["optional", "always", "never"] = "optional"
    bias_dtype: Literal["any", "output", "float16"] = "any"


HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Peer:
    """One library's GEMM."""

    name: str
    summary: str
    load: Callable[[str, bool], Prepare]  # (device, autotune); without autotune a kernel keeps its first tile
    domain: Domain
    returns: Literal["output", "output without bias", "accumulators"] = "output"


def _int_mm(device: str, autotune: bool) -> Prepare:
    import torch

    def prepare(xq: Any, wq: Any, sx: Any, sw: Any, bias: Any, out: Any) -> Launch:
        return partial(torch._int_mm, xq.contiguous(), wq.contiguous().t())

    return prepare


def vllm_ops() -> Any:
    """torch.ops._C with vLLM's operators: loaded before, from a `vllm_C_sm90.so` on sys.path, or an installed vLLM."""
    import torch

    if not hasattr(torch.ops._C, "cutlass_scaled_mm"):
        libraries = (Path(folder) / "vllm_C_sm90.so" for folder in sys.path)
        if found := next((path for path in libraries if path.is_file()), None):
            torch.ops.load_library(str(found))
        else:
            import vllm._custom_ops  # noqa: F401
    return torch.ops._C


def _vllm(device: str, autotune: bool) -> Prepare:
    ops = vllm_ops()

    def prepare(xq: Any, wq: Any, sx: Any, sw: Any, bias: Any, out: Any) -> Launch:
        arguments = out, xq.contiguous(), wq.contiguous().t(), sx[:, None], sw[None], bias

        def launch() -> torch.Tensor:
            ops.cutlass_scaled_mm(*arguments)
            return out  # type: ignore[no-any-return]

        return launch

    return prepare


def comfy_backend() -> Any:
    """comfy-kitchen's CUDA back end, whose `_C` has the kernels. Raises ImportError."""
    from comfy_kitchen.backends import cuda

    if getattr(cuda, "_C", None) is None:
        raise ImportError("comfy_kitchen.backends.cuda has no _C")
    return cuda


def _comfy_kitchen(device: str, autotune: bool) -> Prepare:
    import torch

    cuda = comfy_backend()

    def prepare(xq: Any, wq: Any, sx: Any, sw: Any, bias: Any, out: Any) -> Launch:
        tensors = xq.contiguous(), wq.contiguous(), sx[:, None], sw, bias, out

        def launch() -> torch.Tensor:
            stream = torch.cuda.current_stream().cuda_stream
            arguments = map(cuda._wrap_for_dlpack, tensors)
            if not cuda._C.cutlass_int8_dequant(*arguments, cuda.DTYPE_TO_CODE[out.dtype], stream):
                raise RuntimeError(DECLINED)
            return out  # type: ignore[no-any-return]

        return launch

    return prepare


def _torchao(device: str, autotune: bool) -> Prepare:
    from torchao.prototype.quantized_training.int8_mm import _scaled_int8_mm_kernel, scaled_int8_mm

    if not autotune:
        _keep_first_tile(_scaled_int8_mm_kernel)

    def prepare(xq: Any, wq: Any, sx: Any, sw: Any, bias: Any, out: Any) -> Launch:
        return partial(scaled_int8_mm, xq.contiguous(), wq.contiguous().t(), sx.bfloat16(), sw.bfloat16())

    return prepare


def give_triton_scratch(device: str) -> None:
    """Let Triton kernels allocate on `device`: SDNQ makes its descriptors there, and sets no allocator."""
    import torch
    import triton

    triton.set_allocator(lambda size, _align, _stream: torch.empty(size, dtype=torch.int8, device=device))


def _sdnq(device: str, autotune: bool) -> Prepare:
    from sdnq.kernels.triton_scaled_mm import sdnq_scaled_mm, sdnq_scaled_mm_kernel

    if not autotune:
        _keep_first_tile(sdnq_scaled_mm_kernel)
    give_triton_scratch(device)

    def prepare(xq: Any, wq: Any, sx: Any, sw: Any, bias: Any, out: Any) -> Launch:
        scales = sx[:, None].contiguous(), sw[None].contiguous()
        return partial(
            sdnq_scaled_mm, xq.contiguous(), wq.contiguous().t(), *scales, bias=bias, out_dtype=out.dtype
        )  # fmt: skip

    return prepare


def _keep_first_tile(kernel: Any) -> None:
    """Leave Triton's autotuner one configuration: it would compile and time all of them for each new shape."""
    kernel.configs = kernel.configs[:1]


def _bitsandbytes(device: str, autotune: bool) -> Prepare:
    import bitsandbytes  # noqa: F401
    import torch

    product = torch.ops.bitsandbytes.int8_scaled_mm.default

    def prepare(xq: Any, wq: Any, sx: Any, sw: Any, bias: Any, out: Any) -> Launch:
        half = None if bias is None else bias.half()
        maxima = {"row_stats": sx * 127, "col_stats": sw * 127}
        return partial(product, xq.contiguous(), wq.contiguous(), **maxima, bias=half, dtype=torch.bfloat16)

    return prepare


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("torch._int_mm", "torch._int_mm: int32 accumulators, no epilogue", _int_mm, Domain(17, 8),
             returns="accumulators"),
        Peer("vllm", "CUTLASS, scales and bias fused", _vllm, Domain(1, 16, HALF, bias_dtype="output")),
        Peer("comfy-kitchen", "CUTLASS for sm_80, its own pick", _comfy_kitchen,
             Domain(1, 16, ("bfloat16",), "always", "output")),
        Peer("torchao", "Triton, self-tuned; no bias, bf16 scales", _torchao, Domain(2, 16, ("bfloat16",), "never"),
             returns="output without bias"),
        Peer("sdnq", "Triton, self-tuned", _sdnq, Domain(1, 16, HALF, bias_dtype="output")),
        Peer("bitsandbytes", "cuBLASLt, then scales and bias", _bitsandbytes,
             Domain(1, 16, ("bfloat16",), bias_dtype="float16")),
    )
}  # fmt: skip


def check_names(names: Iterable[str]) -> None:
    """Raise UnknownName or InputError for a name that `verify libraries` cannot know. It imports nothing."""
    for name in names:
        if name in WITHOUT_GEMM:
            raise InputError(WITHOUT_GEMM[name])
        if name != OURS and name not in PEERS and ":" not in name:
            raise UnknownName("library", name, [OURS, *PEERS], "or name your own function, module:function")
