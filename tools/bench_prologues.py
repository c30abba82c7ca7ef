#!/usr/bin/env python3
"""The fused kernels under each of their tiles, beside a plain copy of as many bytes and the eager model's operations.

    python tools/bench_prologues.py --out out/prologues.json
    python tools/bench_prologues.py --dry-run                   tiny sizes, anywhere: proves that it runs

Ideogram 4's sizes: K = 4608, F = 12288, 18 heads of 256, bf16. The copy reads and writes half of a kernel's bytes each.
Eager ends in int8kit's own `quantize`. Every contestant is a CUDA graph of calls on different inputs and outputs, which
together pass twice the L2, so that neither the cache nor the interpreter's launches flatter or hide anything;
contestants are interleaved round by round in turning order, medians are printed. The last line is one JSON object.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is first imported

from int8kit import gpus
from int8kit.kernels.qk_norm_rope import HeadTile, qk_norm_rope
from int8kit.kernels.quantize import quantize
from int8kit.kernels.residual_norm_quantize import residual_norm_quantize
from int8kit.kernels.rms_norm_quantize import rms_norm_quantize
from int8kit.kernels.row_primitives import RowTile
from int8kit.kernels.swiglu_quantize import swiglu_quantize
from int8kit.timing import interleave

NORM_TILES = [RowTile(c, w) for c, w in ((256, 1), (512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 4), (2048, 8))]
SWIGLU_TILES = [RowTile(c, w) for c, w in ((512, 4), (1024, 4), (1024, 8), (2048, 8), (2048, 16), (4096, 16))]
HEAD_TILES = [
    HeadTile(*t) for t in ((2, 1, 1), (2, 3, 1), (2, 9, 1), (4, 1, 2), (4, 2, 2), (4, 3, 2), (4, 5, 2), (8, 3, 4))
]
MIN_CALLS = 8  # in a graph, so that its own launch does not count


@dataclass(frozen=True)
class Sizes:
    """Of the model; the dry run's are tiny."""

    k: int = 4608
    f: int = 12288
    heads: int = 18
    d: int = 256


@dataclass
class Contest:
    """One kernel at one M: who makes operands, the bytes that must be read and written, and the contestants."""

    name: str
    m: int
    make: Callable[[], tuple[Any, ...]]
    read: int
    write: int
    calls: dict[str, Callable[..., Any]] = field(default_factory=dict)


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm as the eager model makes it."""
    return (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def _eager_rms(x: Any, weight: Any, modulation: Any) -> Any:
    return quantize(_norm(x, weight) * (1 + modulation))


def _eager_residual(residual: Any, branch: Any, branch_weight: Any, gate: Any, weight: Any, modulation: Any) -> Any:
    new = residual + gate * _norm(branch, branch_weight)
    return new, *_eager_rms(new, weight, modulation)


def _eager_swiglu(gu: Any) -> Any:
    g, u = gu.unflatten(-1, (-1, 2)).unbind(-1)
    return quantize(torch.nn.functional.silu(g) * u)


def _eager_rope(qkv: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, heads: int) -> Any:
    out = []
    for third, weight in zip(qkv.chunk(3, -1), (q_weight, k_weight), strict=False):
        x = _norm(third.unflatten(-1, (heads, -1)), weight)
        first, second = x.chunk(2, -1)
        out.append(x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None])
    return out


def contests(m: int, sizes: Sizes, device: str) -> list[Contest]:
    """The four kernels at M rows."""
    k, f, h, d = sizes.k, sizes.f, sizes.heads, sizes.d

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    def tiles(kernel: Any, several: list[Any]) -> dict[str, Any]:
        return {str(tile): functools.partial(kernel, tile=tile) for tile in several}

    return [
        Contest(
            "rms_norm_quantize", m, lambda: (random(m, k), random(k), random(1, k)), 2 * m * k, m * k + 4 * m,
            {**tiles(rms_norm_quantize, NORM_TILES), "eager": _eager_rms},
        ),
        Contest(
            "residual_norm_quantize", m,
            lambda: (random(m, k), random(m, k), random(k), random(1, k), random(k), random(1, k)),
            4 * m * k, 3 * m * k + 4 * m,
            {**tiles(residual_norm_quantize, NORM_TILES), "eager": _eager_residual},
        ),
        Contest(
            "swiglu_quantize", m, lambda: (random(m, 2 * f),), 4 * m * f, m * f + 4 * m,
            {**tiles(swiglu_quantize, SWIGLU_TILES), "eager": _eager_swiglu},
        ),
        Contest(
            "qk_norm_rope", m,
            lambda: (random(m, 3 * h * d), random(d), random(d), random(m, d), random(m, d), h),
            4 * m * h * d + 4 * m * d, 4 * m * h * d,
            {**tiles(qk_norm_rope, HEAD_TILES), "eager": _eager_rope},
        ),
    ]  # fmt: skip


def _graph(call: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> Callable[[], Any]:
    """A replay of `call` on each of the inputs, each with outputs of its own."""
    call(*inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call(*args) for args in inputs]

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


def _wall(calls: list[Callable[[], Any]], rounds: int) -> list[interleave.Times]:
    """The dry run's stand-in for `measure.interleave`."""
    times = []
    for call in calls:
        start = time.perf_counter()
        for _ in range(rounds):
            call()
        us = 1e6 * (time.perf_counter() - start) / rounds
        times.append(interleave.Times(us, us, us))
    return times


def run(contest: Contest, rounds: int, l2_bytes: int, device: str) -> list[dict[str, Any]]:
    """Time the copy and every contestant; one record each."""
    count = max(MIN_CALLS, 1 + -(-2 * l2_bytes // contest.read)) if device == "cuda" else 1
    inputs = [contest.make() for _ in range(count)]
    half = (contest.read + contest.write) // 2
    blocks = [(torch.empty(half, dtype=torch.int8, device=device).random_(-128, 128),) for _ in range(count)]
    everyone = [("copy", lambda block: torch.empty_like(block).copy_(block), blocks)]
    everyone += [(name, call, inputs) for name, call in contest.calls.items()]
    if device == "cuda":
        times = interleave.interleave([_graph(call, args) for _, call, args in everyone], rounds)
    else:
        times = _wall([functools.partial(call, *args[0]) for _, call, args in everyone], rounds)
    total = contest.read + contest.write
    copy_us = times[0].p50 / count
    return [
        {
            "kernel": contest.name, "m": contest.m, "variant": name, "bytes": total,
            "us": round(t.p50 / count, 2), "us_p20": round(t.p20 / count, 2), "us_p80": round(t.p80 / count, 2),
            "tb_s": round(total / (t.p50 / count) / 1e6, 3), "of_copy": round(copy_us / (t.p50 / count), 3),
        }
        for (name, _, _), t in zip(everyone, times, strict=True)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, nargs="+", default=[4352, 2504, 6144])
    parser.add_argument("--only", nargs="+", help="names of kernels")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, wall clock: the figures mean nothing")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.dry_run:
        parser.error("no CUDA device; --dry-run runs tiny sizes on the CPU")
    sizes, rows, rounds = (Sizes(512, 256, 2, 32), [3], 1) if args.dry_run else (Sizes(), args.m, args.rounds)
    card = gpus.present()
    l2_bytes = card.l2_bytes if card else 50 << 20
    records = []
    print(f"{'kernel':24s} {'M':>5s} {'variant':10s} {'us':>9s} {'TB/s':>7s} {'of copy':>8s}")
    for m in rows:
        for contest in contests(m, sizes, device):
            if args.only and contest.name not in args.only:
                continue
            for r in run(contest, rounds, l2_bytes, device):
                records.append(r)
                print(
                    f"{r['kernel']:24s} {m:5d} {r['variant']:10s} {r['us']:9.2f} {r['tb_s']:7.3f} {r['of_copy']:8.3f}"
                )
    result = {
        "gpu": card.name if card else "none",
        "torch": torch.__version__,
        "dry_run": args.dry_run,
        "runs": records,
    }
    print(json.dumps(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
