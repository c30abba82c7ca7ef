"""`int8kit bench fused`: the row kernels under each of their tiles, beside a copy of as many bytes and eager torch.

    {"format": "int8kit.result/1", "benchmark": "fused", ...,
     "rows": [{"name": "rms_norm_quantize 4352 c512 w1", "unit": "us", "p20": ..., "p50": 28.9, "p80": ...,
               "rounds": 15, "kernel": "rms_norm_quantize", "m": 4352, "variant": "c512 w1", "bytes": 60179456,
               "tb_s": 2.08, "of_copy": 0.82}, ...],
     "details": {"dry_run": false}}

`bench.results` has the fields that are left out.

The sizes are Ideogram 4's: K = 4608, F = 12288, 18 heads of 256, bf16. The copy reads and writes half of a kernel's
bytes each; "of_copy" is its time over the variant's. Eager torch ends in int8kit's own `quantize`.

Each variant is a CUDA graph of calls with different inputs and outputs, which together exceed twice the L2. So neither
the cache nor launches from Python distort a time. Variants are interleaved (`timing.interleave`).

On a machine without a GPU, `dry_run` shows that the benchmark runs: tiny sizes, wall clock, meaningless times. It needs
Triton's interpreter (TRITON_INTERPRET=1 before triton is imported).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import silu

from int8kit import gpus
from int8kit.bench import results
from int8kit.errors import InputError, UnknownName
from int8kit.kernels.launch import interpreted
from int8kit.kernels.qk_norm_rope import HeadTile, qk_norm_rope
from int8kit.kernels.quantize import quantize
from int8kit.kernels.residual_norm_quantize import residual_norm_quantize
from int8kit.kernels.rms_norm_quantize import rms_norm_quantize
from int8kit.kernels.row_primitives import RowTile
from int8kit.kernels.swiglu_quantize import swiglu_quantize
from int8kit.timing import interleave
from int8kit.timing.captured import capture
from int8kit.timing.operands import copies_past_l2

ROUNDS = 15
ROWS = (4352, 2504, 6144)
NORM_TILES = [RowTile(c, w) for c, w in ((256, 1), (512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 4), (2048, 8))]
SWIGLU_TILES = [RowTile(c, w) for c, w in ((512, 4), (1024, 4), (1024, 8), (2048, 8), (2048, 16), (4096, 16))]
HEAD_TILES = [
    HeadTile(*t) for t in ((2, 1, 1), (2, 3, 1), (2, 9, 1), (4, 1, 2), (4, 2, 2), (4, 3, 2), (4, 5, 2), (8, 3, 4))
]
CALLS_MIN = 8
"""Least number of calls in a graph, so that the graph's own launch does not count."""


@dataclass(frozen=True)
class Sizes:
    """Widths of the model."""

    k: int = 4608
    f: int = 12288
    heads: int = 18
    d: int = 256


DRY_SIZES, DRY_ROWS = Sizes(512, 256, 2, 32), (3,)


@dataclass(frozen=True)
class KernelCase:
    """One row kernel at one M: new operands, the bytes that must be read and written, and the variants."""

    name: str
    m: int
    operands: Callable[[], tuple[Any, ...]]
    read: int
    write: int
    variants: dict[str, Callable[..., Any]]


Record = dict[str, Any]
"""One item of the document's "rows"."""


def measure(
    row_counts: Sequence[int] = ROWS,
    *,
    only: Iterable[str] = (),
    rounds: int = ROUNDS,
    dry_run: bool = False,
    on_record: Callable[[Record], None] = lambda _: None,
) -> dict[str, Any]:
    """The JSON document. row_counts: values of M; only: names of kernels, all without; on_record: called per variant.

    Raises InputError without a CUDA device unless `dry_run`, UnknownName for a name in `only`.
    """
    gpu = gpus.present()
    if gpu is None and not dry_run:
        raise InputError("no CUDA device: expected one; --dry-run runs tiny sizes on a CPU")
    if gpu is None and not interpreted():
        raise InputError("no CUDA device: set TRITON_INTERPRET=1 before triton is imported")
    if rounds < 1 or min(row_counts, default=0) < 1:
        raise InputError(f"{rounds} rounds of M = {list(row_counts)}: expected 1 or more rounds, and M of 1 or more")
    sizes, row_counts, rounds = (DRY_SIZES, DRY_ROWS, 1) if dry_run else (Sizes(), row_counts, rounds)
    policy = results.Policy(timing=interleave.shared_policy() if gpu else "wall clock; a dry run measures nothing")
    header = results.header("fused", policy)
    chosen, records = set(only), []
    for m in row_counts:
        cases = kernel_cases(m, sizes, "cuda" if gpu else "cpu")
        names = [case.name for case in cases]
        for name in sorted(chosen - set(names)):
            raise UnknownName("row kernel", name, names)
        for case in cases:
            if not chosen or case.name in chosen:
                for record in _measure_case(case, rounds, gpu):
                    records.append(record)
                    on_record(record)
    return results.document(header, records, details={"dry_run": dry_run}, after=results.gpu_state())


def kernel_cases(m: int, sizes: Sizes, device: str) -> list[KernelCase]:
    """The four kernels at M rows."""
    k, f, h, d = sizes.k, sizes.f, sizes.heads, sizes.d

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    def variants(kernel: Any, tiles: list[Any], eager: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        return {**{str(tile): partial(kernel, tile=tile) for tile in tiles}, "eager": eager}

    return [
        KernelCase(
            "rms_norm_quantize", m, lambda: (random(m, k), random(k), random(1, k)), 2 * m * k, m * k + 4 * m,
            variants(rms_norm_quantize, NORM_TILES, _eager_rms),
        ),
        KernelCase(
            "residual_norm_quantize", m,
            lambda: (random(m, k), random(m, k), random(k), random(1, k), random(k), random(1, k)),
            4 * m * k, 3 * m * k + 4 * m, variants(residual_norm_quantize, NORM_TILES, _eager_residual),
        ),
        KernelCase(
            "swiglu_quantize", m, lambda: (random(m, 2 * f),), 4 * m * f, m * f + 4 * m,
            variants(swiglu_quantize, SWIGLU_TILES, _eager_swiglu),
        ),
        KernelCase(
            "qk_norm_rope", m,
            lambda: (random(m, 3 * h * d), random(d), random(d), random(m, d), random(m, d), h),
            4 * m * h * d + 4 * m * d, 4 * m * h * d, variants(qk_norm_rope, HEAD_TILES, _eager_rope),
        ),
    ]  # fmt: skip


def _measure_case(case: KernelCase, rounds: int, gpu: gpus.Gpu | None) -> list[Record]:
    """Time the copy and every variant of one case."""
    device = "cuda" if gpu else "cpu"
    count = max(CALLS_MIN, copies_past_l2(case.read, gpu.l2_bytes)) if gpu else 1
    inputs = [case.operands() for _ in range(count)]
    half = (case.read + case.write) // 2
    blocks = [(torch.empty(half, dtype=torch.int8, device=device).random_(-128, 128),) for _ in range(count)]
    contestants = [("copy", _copy, blocks), *((name, call, inputs) for name, call in case.variants.items())]
    if gpu:
        times = interleave.interleave([_graph(call, args) for _, call, args in contestants], rounds, launches=count)
    else:
        times = _wall_clock([partial(call, *args[0]) for _, call, args in contestants], rounds)
    total, copy_us = case.read + case.write, times[0].p50
    return [
        results.row(
            f"{case.name} {case.m} {name}", "us", t, rounds, digits=2, kernel=case.name, m=case.m, variant=name,
            bytes=total, tb_s=round(total / t.p50 / 1e6, 3), of_copy=round(copy_us / t.p50, 3),
        )
        for (name, _, _), t in zip(contestants, times, strict=True)
    ]  # fmt: skip


def _graph(call: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> Callable[[], Any]:
    """Replay of one call for each of the inputs, each with its own outputs."""
    call(*inputs[0])
    outputs: list[Any] = []  # kept, so that no call reuses the memory of another's output

    def launch(args: tuple[Any, ...]) -> None:
        outputs.append(call(*args))

    graph, _ = capture([partial(launch, args) for args in inputs])

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


def _wall_clock(calls: list[Callable[[], Any]], rounds: int) -> list[interleave.Times]:
    """Replacement of `interleave` for the dry run."""
    times = []
    for call in calls:
        start = time.perf_counter()
        for _ in range(rounds):
            call()
        us = 1e6 * (time.perf_counter() - start) / rounds
        times.append(interleave.Times(us, us, us))
    return times


def _copy(block: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(block).copy_(block)


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm as the eager model computes it."""
    return (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def _eager_rms(x: torch.Tensor, weight: torch.Tensor, modulation: torch.Tensor) -> Any:
    return quantize(_norm(x, weight) * (1 + modulation))


def _eager_residual(
    residual: torch.Tensor, branch: torch.Tensor, branch_weight: torch.Tensor, gate: torch.Tensor,
    weight: torch.Tensor, modulation: torch.Tensor,
) -> Any:  # fmt: skip
    new = residual + gate * _norm(branch, branch_weight)
    return new, *_eager_rms(new, weight, modulation)


def _eager_swiglu(gu: torch.Tensor) -> Any:
    g, u = gu.unflatten(-1, (-1, 2)).unbind(-1)
    return quantize(silu(g) * u)


def _eager_rope(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int
) -> Any:
    out = []
    for third, weight in zip(qkv.chunk(3, -1), (q_weight, k_weight), strict=False):  # v has no norm and no rotation
        x = _norm(third.unflatten(-1, (heads, -1)), weight)
        first, second = x.chunk(2, -1)
        out.append(x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None])
    return out
