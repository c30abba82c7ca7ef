#!/usr/bin/env python3
"""`int8kit bench gemm` with other projects' INT8 kernels among the contestants, each where it can be imported.

    python tools/bench_peers.py --peers DIR --limit 12 --arch sm86 --out out/peers.json
    python tools/bench_peers.py --shapes tools/other_models.json --only vllm --only bf16
    python tools/bench_peers.py --dry-run        # no GPU: every path that a CPU can take, with invented times

--peers DIR: a folder that goes first on sys.path; `vllm_C_sm90.so` in it is loaded as vLLM's operators. Nothing of the
peers is in this repository. Which one is missing, cannot run or declines a shape is listed with its reason. Each peer
is called as its own layer calls it, and tunes itself before it is timed. Those whose GEMM adds no bias, or multiplies
by scales of lower precision, say so in "what"; they have less to do. The last line is one JSON object.
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from int8kit import gpus, shapes_file
from int8kit.bench import contestants, gemm
from int8kit.bench.contestants import Contestant
from int8kit.cli import tables
from int8kit.errors import Int8kitError, UnknownName
from int8kit.timing import interleave
from int8kit.timing.captured import Entrant
from int8kit.timing.operands import Operands

BF16 = torch.bfloat16
COMFY_CONFIGS = range(14)
DRY_SHAPES = ["64x128x96", "33x64x64"]


def vllm_ops() -> Any:
    """torch.ops._C with vLLM's operators, from the folder of --peers or an installed vLLM."""
    if not hasattr(torch.ops._C, "cutlass_scaled_mm"):
        libraries = [Path(folder) / "vllm_C_sm90.so" for folder in sys.path]
        found = next((path for path in libraries if path.is_file()), None)
        if found is not None:
            torch.ops.load_library(str(found))
        else:
            import vllm._custom_ops  # noqa: F401
    return torch.ops._C


def vllm_gemm(o: Operands) -> Entrant:
    """CUTLASS with scales and bias in the epilogue; on sm_90 TMA and wgmma."""
    c, out = vllm_ops(), o.output()
    sx, sw = o.sx[:, None], o.sw[None]

    def launch(w: torch.Tensor) -> torch.Tensor:
        c.cutlass_scaled_mm(out, o.xq, w.t(), sx, sw, o.bias)
        return out

    return Entrant([partial(launch, w) for w in o.weights])


def vllm_linear(o: Operands) -> Entrant:
    """Its dynamic quantization of rows, then the GEMM."""
    c, out, sw = vllm_ops(), o.output(), o.sw[None]

    def launch(w: torch.Tensor) -> torch.Tensor:
        xq = torch.empty_like(o.x, dtype=torch.int8)
        sx = torch.empty(o.shape.m, 1, dtype=torch.float32, device=o.device)
        c.dynamic_scaled_int8_quant(xq, o.x, sx, None)
        c.cutlass_scaled_mm(out, xq, w.t(), sx, sw, o.bias)
        return out

    return Entrant([partial(launch, w) for w in o.weights])


def comfy() -> Any:
    """comfy-kitchen's CUDA back end, whose `_C` holds the kernels."""
    from comfy_kitchen.backends import cuda

    if getattr(cuda, "_C", None) is None:
        raise RuntimeError("comfy_kitchen.backends.cuda has no _C")
    return cuda


def comfy_gemm(o: Operands) -> Entrant:
    """CUTLASS for sm_80 (mma.sync), the tile that its own heuristic picks."""
    cuda, out, sx = comfy(), o.output(), o.sx[:, None]
    wrap = cuda._wrap_for_dlpack

    def launch(w: torch.Tensor) -> torch.Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        arguments = map(wrap, (o.xq, w, sx, o.sw, o.bias, out))
        if not cuda._C.cutlass_int8_dequant(*arguments, cuda.DTYPE_TO_CODE[BF16], stream):
            raise RuntimeError("declined: no CUTLASS configuration for this shape")
        return out

    picked = getattr(cuda._C, "cutlass_int8_selected_config", lambda *_: "unknown")
    return Entrant([partial(launch, w) for w in o.weights], f"configuration {picked(o.shape.m, o.shape.n, o.shape.k)}")


def comfy_best(o: Operands, timer: gemm.Timer) -> Entrant | str:
    """The fastest of its 14 tiles, timed from outside in three interleaved rounds; its entry point takes no bias."""
    cuda, out, sx = comfy(), o.output(), o.sx[:, None]
    wrap = cuda._wrap_for_dlpack

    def launch(w: torch.Tensor, config: int) -> torch.Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        arguments = map(wrap, (o.xq, w, sx, o.sw, out))
        if not cuda._C.cutlass_int8_dequant_config(*arguments, cuda.DTYPE_TO_CODE[BF16], config, stream):
            raise RuntimeError("declined: no CUTLASS configuration for this shape")
        return out

    runs = {}
    for config in COMFY_CONFIGS:
        try:
            launch(o.weights[0], config)
        except RuntimeError:
            continue
        runs[config] = partial(launch, o.weights[0], config)
    if not runs:
        return "declined: no CUTLASS configuration for this shape"
    times = timer(list(runs.values()), 3)
    best = min(zip(times, runs, strict=True), key=lambda pair: pair[0].p50)[1]
    return Entrant([partial(launch, w, best) for w in o.weights], f"configuration {best} of {len(runs)}")


def comfy_linear(o: Operands, backend: str) -> Entrant:
    """int8_linear of one of its back ends, without rotation."""
    import comfy_kitchen

    def launch(w: torch.Tensor) -> torch.Tensor:
        with comfy_kitchen.use_backend(backend):
            return comfy_kitchen.int8_linear(o.x, w, o.sw, o.bias, BF16, convrot=False)

    return Entrant([partial(launch, w) for w in o.weights])


def torchao_gemm(o: Operands) -> Entrant:
    """Its Triton kernel, which tunes itself over 27 tiles."""
    from torchao.prototype.quantized_training.int8_mm import scaled_int8_mm

    sx, sw = o.sx.to(BF16), o.sw.to(BF16)
    return Entrant([partial(scaled_int8_mm, o.xq, w.t(), sx, sw) for w in o.weights])


def torchao_linear(o: Operands, compiled: bool) -> Entrant:
    """An nn.Linear after quantize_ with Int8DynamicActivationInt8WeightConfig."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layers = []
    for w in o.weights16:
        layer = torch.nn.Linear(o.shape.k, o.shape.n, device="meta", dtype=BF16)
        layer.weight = torch.nn.Parameter(w, requires_grad=False)
        layer.bias = torch.nn.Parameter(o.bias, requires_grad=False)
        quantize_(layer, Int8DynamicActivationInt8WeightConfig(set_inductor_config=compiled))
        layers.append(contestants.compiled(layer, o.x) if compiled else layer)
    return Entrant([partial(layer, o.x) for layer in layers])


def sdnq_scratch() -> None:
    """Its descriptors are made on the device and need scratch memory that it never arranges for."""
    import triton

    triton.set_allocator(lambda size, _align, _stream: torch.empty(size, dtype=torch.int8, device="cuda"))


def sdnq_gemm(o: Operands) -> Entrant:
    """Its Triton kernel, which tunes itself over 18 tiles and compiles for every shape."""
    from sdnq.kernels.triton_scaled_mm import sdnq_scaled_mm

    sdnq_scratch()
    sx, sw = o.sx[:, None].contiguous(), o.sw[None].contiguous()
    call = partial(sdnq_scaled_mm, bias=o.bias, out_dtype=BF16)
    return Entrant([partial(call, o.xq, w.t(), sx, sw) for w in o.weights])


def sdnq_linear(o: Operands) -> Entrant:
    """The function under its quantized linear: quantization as it does it, then the kernel."""
    from sdnq.layers.linear.linear_int8 import int8_matmul

    sdnq_scratch()
    sw = o.sw[None].contiguous()
    return Entrant([partial(int8_matmul, o.x, w.t(), sw, bias=o.bias) for w in o.weights])


def gemlite_linear(o: Operands) -> Entrant:
    """A8W8 with dynamic activations; quantization is part of its forward."""
    from gemlite.helper import A8W8_INT8_dynamic

    maker = A8W8_INT8_dynamic(device=str(o.x.device), dtype=BF16)
    layers = [maker.from_weights(w, bias=o.bias, scales=o.sw.view(-1, 1)) for w in o.weights]
    return Entrant([partial(layer, o.x) for layer in layers])


def bitsandbytes_gemm(o: Operands) -> Entrant:
    """cuBLASLt to int32, then its kernel for scales and bias, in fp16 inside."""
    import bitsandbytes  # noqa: F401

    product = torch.ops.bitsandbytes.int8_scaled_mm.default
    call = partial(product, row_stats=o.sx * 127, col_stats=o.sw * 127, bias=o.bias.half(), dtype=BF16)
    return Entrant([partial(call, o.xq, w) for w in o.weights])


def bitsandbytes_linear(o: Operands) -> Entrant:
    """As LLM.int8() without outliers: fp16 in, its row quantization, the GEMM."""
    from bitsandbytes.functional import int8_vectorwise_quant

    product = torch.ops.bitsandbytes.int8_scaled_mm.default
    stats, bias = o.sw * 127, o.bias.half()

    def launch(w: torch.Tensor) -> torch.Tensor:
        xq, top, _ = int8_vectorwise_quant(o.x.half())
        return product(xq, w, top, stats, bias=bias, dtype=BF16)

    return Entrant([partial(launch, w) for w in o.weights])


def peers(inductor: bool, timer: gemm.Timer = interleave.interleave) -> list[Contestant]:
    """Every peer that has an adapter, whether or not it is here."""
    best = partial(comfy_best, timer=timer)
    found = [
        Contestant("vllm", "gemm", "CUTLASS, scales and bias fused", vllm_gemm),
        Contestant("comfy-kitchen", "gemm", "CUTLASS for sm_80, its own pick", comfy_gemm),
        Contestant("comfy-best-of-14", "gemm", "the same, its fastest tile; no bias", best, result="no bias"),
        Contestant("torchao", "gemm", "Triton, self-tuned; no bias, bf16 scales", torchao_gemm, result="no bias"),
        Contestant("sdnq", "gemm", "Triton, self-tuned", sdnq_gemm),
        Contestant("bitsandbytes", "gemm", "cuBLASLt, then scales and bias", bitsandbytes_gemm),
        Contestant("vllm", "linear", "its row quantization and GEMM", vllm_linear),
        Contestant("comfy-kitchen", "linear", "int8_linear, CUDA", partial(comfy_linear, backend="cuda")),
        Contestant("comfy-triton", "linear", "int8_linear, Triton", partial(comfy_linear, backend="triton")),
        Contestant("torchao", "linear", "quantize_, eager", partial(torchao_linear, compiled=False)),
        Contestant("sdnq", "linear", "its quantization, compiled, and GEMM", sdnq_linear),
        Contestant("gemlite", "linear", "A8W8_INT8_dynamic", gemlite_linear),
        Contestant("bitsandbytes", "linear", "fp16 row quantization and GEMM", bitsandbytes_linear),
    ]
    if inductor:
        layer = partial(torchao_linear, compiled=True)
        found.append(Contestant("torchao-compiled", "linear", "quantize_, torch.compile(max-autotune)", layer))
    return found


def invented(calls: Any, rounds: int) -> list[interleave.Times]:
    """The dry run's timer: calls everything, measures nothing."""
    for call in calls:
        call()
    return [interleave.Times(10.0 + i, 11.0 + i, 12.0 + i) for i in range(len(calls))]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; as `int8kit bench gemm`, and --peers, --skip and --dry-run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder with the peers' packages")
    parser.add_argument("--shapes", type=Path, help="a shapes file; default: Ideogram 4's")
    parser.add_argument("--shape", action="append", metavar="MxNxK", help="instead of a file's; repeatable")
    parser.add_argument("--limit", type=int, help="so many of the file's shapes, spread over them")
    parser.add_argument("--gpu", help="whose database")
    parser.add_argument("--db", type=Path, help="a database file")
    parser.add_argument("--arch", help="sm86: that architecture's code beside the card's own")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="int8kit and this one; repeatable")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="all but this one; repeatable")
    parser.add_argument("--inductor", action="store_true", help="also torch.compile's max-autotune")
    parser.add_argument("--rounds", type=int, default=gemm.ROUNDS)
    parser.add_argument("--sample-ms", type=float, default=4.0, help="length of a sample; from 20, power limits count")
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="launch everything from the host")
    parser.add_argument("--out", type=Path, help="the JSON document, kept after each shape")
    parser.add_argument("--json", action="store_true", help="only the JSON on stdout")
    parser.add_argument("--force", action="store_true", help="overwrite a file that int8kit did not write")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in Triton's interpreter, times invented")
    return parser.parse_args(argv)


def bench(args: argparse.Namespace) -> gemm.Outcome:
    """What the arguments ask for."""
    card = gpus.present() or gpus.get("h200")
    listed = contestants.ours(card, gpu=args.gpu, path=args.db, arch=args.arch)
    timer = invented if args.dry_run else interleave.interleave
    listed += contestants.standard(args.inductor) + peers(args.inductor, timer)
    for name in set(args.skip) - {c.name for c in listed}:
        raise UnknownName("contestant", name, {c.name for c in listed})
    listed = [c for c in contestants.only(listed, args.only) if c.ours or c.name not in args.skip]
    note = partial(print, "bench_peers:", file=sys.stderr, flush=True)
    if args.dry_run:
        setting = gemm.Setting(args.rounds, device="cpu", copies=2, timer=timer)
        todo = shapes_file.select(args.shape or (None if args.shapes else DRY_SHAPES), args.shapes, args.limit)
        return gemm.run(todo, listed, card, setting, on_shape=gemm.keeper(args.out, note))
    todo = shapes_file.select(args.shape, args.shapes, args.limit)
    setting = gemm.Setting(args.rounds, args.graph, sample_us=round(args.sample_ms * 1000))
    return gemm.session(todo, listed, setting, output=args.out, force=args.force, note=note)


def main() -> None:
    args = arguments()
    if args.dry_run and "TRITON_INTERPRET" not in os.environ:  # triton reads it when imported, which has happened
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    if args.peers:
        sys.path.insert(0, str(args.peers))
    try:
        outcome = bench(args)
        print(tables.bench_tables(outcome.document()), file=sys.stderr if args.json else sys.stdout)
        print(json.dumps(outcome.document()), flush=True)
        outcome.conclude()
    except Int8kitError as error:
        print(f"bench_peers: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("bench_peers: interrupted; what was finished is above", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
