#!/usr/bin/env python3
"""`int8kit bench gemm` with the INT8 kernels of other projects among the contestants, if they can be imported.

    python tools/bench_peers.py --peers DIR --limit 12 --arch sm86 --out out/peers.json
    python tools/bench_peers.py --shapes shapes/other_models.json --only vllm --only bf16
    python tools/bench_peers.py --dry-run        # no GPU: every path that a CPU can take, with invented times

--peers DIR: a folder that goes first on sys.path; `vllm_C_sm90.so` in it is loaded as vLLM's operators. This repository
has no code of these projects. A library that is missing, cannot run or declines a shape is listed with the reason. Each
library is called as its own layer calls it, and tunes itself before it is timed. Its GEMM adapter is in
`int8kit/peers.py`. The field "what" says if a GEMM adds no bias or multiplies by scales of lower precision, which is
less work. The last line is one JSON object.
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from int8kit import gpus, peers, shapes_file
from int8kit.bench import contestants, gemm
from int8kit.bench.contestants import Contestant
from int8kit.cli import tables
from int8kit.errors import Int8kitError, UnknownName
from int8kit.timing import interleave
from int8kit.timing.captured import PreparedContestant
from int8kit.timing.operands import TimingOperands as Operands

BF16 = torch.bfloat16
COMFY_CONFIGS = range(14)
DRY_SHAPES = ["64x128x96", "33x64x64"]
RESULTS = {"output": "output", "output without bias": "no bias", "accumulators": "sums"}  # as `Contestant` names them


def product(o: Operands, peer: peers.Peer) -> PreparedContestant:
    """The GEMM of a library, which tunes itself where it can."""
    prepare, out = peer.load(str(o.device), True), o.output()
    note = comfy_note(o) if peer.name == "comfy-kitchen" else ""
    return PreparedContestant([prepare(o.xq, w, o.sx, o.sw, o.bias, out) for w in o.weights], note)


def comfy_note(o: Operands) -> str:
    """The configuration that comfy-kitchen's own heuristic selects."""
    selected = getattr(peers.comfy_backend()._C, "cutlass_int8_selected_config", lambda *_: "unknown")
    return f"configuration {selected(o.shape.m, o.shape.n, o.shape.k)}"


def vllm_linear(o: Operands) -> PreparedContestant:
    """Its dynamic quantization of rows, then the GEMM."""
    c, out, sw = peers.vllm_ops(), o.output(), o.sw[None]

    def launch(w: torch.Tensor) -> torch.Tensor:
        xq = torch.empty_like(o.x, dtype=torch.int8)
        sx = torch.empty(o.shape.m, 1, dtype=torch.float32, device=o.device)
        c.dynamic_scaled_int8_quant(xq, o.x, sx, None)
        c.cutlass_scaled_mm(out, xq, w.t(), sx, sw, o.bias)
        return out

    return PreparedContestant([partial(launch, w) for w in o.weights])


def comfy_best(o: Operands, timer: gemm.Timer) -> PreparedContestant | str:
    """The fastest of its 14 tiles, timed here in three interleaved rounds; this entry point takes no bias."""
    cuda, out, sx = peers.comfy_backend(), o.output(), o.sx[:, None]
    wrap = cuda._wrap_for_dlpack

    def launch(w: torch.Tensor, config: int) -> torch.Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        arguments = map(wrap, (o.xq, w, sx, o.sw, out))
        if not cuda._C.cutlass_int8_dequant_config(*arguments, cuda.DTYPE_TO_CODE[BF16], config, stream):
            raise RuntimeError(peers.DECLINED)
        return out

    runs = {}
    for config in COMFY_CONFIGS:
        try:
            launch(o.weights[0], config)
        except RuntimeError:
            continue
        runs[config] = partial(launch, o.weights[0], config)
    if not runs:
        return peers.DECLINED
    times = timer(list(runs.values()), 3)
    best = min(zip(times, runs, strict=True), key=lambda pair: pair[0].p50)[1]
    return PreparedContestant([partial(launch, w, best) for w in o.weights], f"configuration {best} of {len(runs)}")


def comfy_linear(o: Operands, backend: str) -> PreparedContestant:
    """int8_linear of one back end, without rotation."""
    import comfy_kitchen

    def launch(w: torch.Tensor) -> torch.Tensor:
        with comfy_kitchen.use_backend(backend):
            return comfy_kitchen.int8_linear(o.x, w, o.sw, o.bias, BF16, convrot=False)

    return PreparedContestant([partial(launch, w) for w in o.weights])


def torchao_linear(o: Operands, compiled: bool) -> PreparedContestant:
    """An nn.Linear after quantize_ with Int8DynamicActivationInt8WeightConfig."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layers = []
    for w in o.weights16:
        layer = torch.nn.Linear(o.shape.k, o.shape.n, device="meta", dtype=BF16)
        layer.weight = torch.nn.Parameter(w, requires_grad=False)
        layer.bias = torch.nn.Parameter(o.bias, requires_grad=False)
        quantize_(layer, Int8DynamicActivationInt8WeightConfig(set_inductor_config=compiled))
        layers.append(contestants.compiled(layer, o.x) if compiled else layer)
    return PreparedContestant([partial(layer, o.x) for layer in layers])


def sdnq_linear(o: Operands) -> PreparedContestant:
    """The function under its quantized linear: its own quantization, then the kernel."""
    from sdnq.layers.linear.linear_int8 import int8_matmul

    peers.give_triton_scratch(str(o.device))
    sw = o.sw[None].contiguous()
    return PreparedContestant([partial(int8_matmul, o.x, w.t(), sw, bias=o.bias) for w in o.weights])


def gemlite_linear(o: Operands) -> PreparedContestant:
    """A8W8 with dynamic activations; quantization is part of its forward."""
    from gemlite.helper import A8W8_INT8_dynamic

    maker = A8W8_INT8_dynamic(device=str(o.x.device), dtype=BF16)
    layers = [maker.from_weights(w, bias=o.bias, scales=o.sw.view(-1, 1)) for w in o.weights]
    return PreparedContestant([partial(layer, o.x) for layer in layers])


def bitsandbytes_linear(o: Operands) -> PreparedContestant:
    """As LLM.int8() without outliers: fp16 in, its row quantization, the GEMM."""
    from bitsandbytes.functional import int8_vectorwise_quant

    product = torch.ops.bitsandbytes.int8_scaled_mm.default
    stats, bias = o.sw * 127, o.bias.half()

    def launch(w: torch.Tensor) -> torch.Tensor:
        xq, top, _ = int8_vectorwise_quant(o.x.half())
        return product(xq, w, top, stats, bias=bias, dtype=BF16)

    return PreparedContestant([partial(launch, w) for w in o.weights])


def contestants_of(inductor: bool, timer: gemm.Timer = interleave.interleave) -> list[Contestant]:
    """Every library that has an adapter, whether or not it is installed."""
    best = partial(comfy_best, timer=timer)
    found = [
        Contestant(peer.name, "gemm", peer.summary, partial(product, peer=peer), result=RESULTS[peer.returns])
        for peer in peers.PEERS.values()
        if not peer.name.startswith("torch.")  # which `contestants.standard` has
    ]
    found += [
        Contestant("comfy-best-of-14", "gemm", "the fastest tile of comfy-kitchen; no bias", best, result="no bias"),
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
    """The timer of a dry run: it calls everything and measures nothing."""
    for call in calls:
        call()
    return [interleave.Times(10.0 + i, 11.0 + i, 12.0 + i) for i in range(len(calls))]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of `int8kit bench gemm`, with --peers, --skip and --dry-run added."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder with the packages of the other projects")
    parser.add_argument("--shapes", type=Path, help="a shapes file; default: Ideogram 4's")
    parser.add_argument("--shape", action="append", metavar="MxNxK", help="a shape, instead of a file; repeatable")
    parser.add_argument("--limit", type=int, help="at most this many shapes of the file, spread over it")
    parser.add_argument("--gpu", help="GPU whose database is used; for an older GPU, its code runs on this one")
    parser.add_argument("--db", type=Path, help="a database file")
    parser.add_argument("--arch", help="such as sm86: also the code of this architecture")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="only int8kit and this contestant; repeatable"
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="NAME", help="leave this contestant out; repeatable"
    )
    parser.add_argument("--inductor", action="store_true", help="also torch.compile's max-autotune")
    parser.add_argument("--rounds", type=int, default=gemm.ROUNDS)
    parser.add_argument(
        "--sample-ms", type=float, default=4.0, help="length of a sample; from 20 on, power limits have an effect"
    )
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="launch everything from the host")
    parser.add_argument("--out", type=Path, help="file of the JSON document, written after each shape")
    parser.add_argument("--json", action="store_true", help="only the JSON on stdout")
    parser.add_argument("--force", action="store_true", help="overwrite a file that int8kit did not write")
    parser.add_argument(
        "--dry-run", action="store_true", help="on the CPU, in Triton's interpreter, with invented times"
    )
    return parser.parse_args(argv)


def bench(args: argparse.Namespace) -> gemm.BenchResult:
    """The benchmark that the arguments describe."""
    gpu = gpus.present() or gpus.get("h200")
    listed = contestants.ours(gpu, gpu=args.gpu, path=args.db, arch=args.arch)
    timer = invented if args.dry_run else interleave.interleave
    listed += contestants.standard(args.inductor) + contestants_of(args.inductor, timer)
    for name in set(args.skip) - {c.name for c in listed}:
        raise UnknownName("contestant", name, {c.name for c in listed})
    listed = [c for c in contestants.only(listed, args.only) if c.ours or c.name not in args.skip]
    note = partial(print, "bench_peers:", file=sys.stderr, flush=True)
    if args.dry_run:
        setting = gemm.Setting(args.rounds, device="cpu", copies=2, timer=timer)
        todo = shapes_file.select(args.shape or (None if args.shapes else DRY_SHAPES), args.shapes, args.limit)
        return gemm.measure_shapes(todo, listed, gpu, setting, on_shape=gemm.keeper(args.out, note))
    todo = shapes_file.select(args.shape, args.shapes, args.limit)
    setting = gemm.Setting(args.rounds, args.graph, sample_us=round(args.sample_ms * 1000))
    return gemm.benchmark(todo, listed, setting, output=args.out, force=args.force, note=note)


def main() -> None:
    args = arguments()
    if args.dry_run and "TRITON_INTERPRET" not in os.environ:  # triton has read it at its import
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
