#!/usr/bin/env python3
"""One forward of the full-size Ideogram 4 transformer on this card, bf16 and INT8: milliseconds and peak memory.

    python tools/bench_step.py --size 1024x1024 --text-tokens 200 --json out/step.json

Random weights, conditional branch, batch 1, eager. diffusers pads the text to 2048 slots; int8kit packs it tight. The
last line is one JSON object. On a CPU, use --model tiny to see that it runs.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from int8kit import gpus, models
from int8kit.database import store
from int8kit.kernels import gemm
from int8kit.layers import replace_linears
from int8kit.runtime import ideogram4


def milliseconds(call, rounds: int) -> float:
    """Median of `rounds` calls after two to warm up, by the wall clock around a synchronized call."""
    times = []
    for i in range(rounds + 2):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i >= 2:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ideogram4")
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--text-tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--db", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = models.get(args.model)
    card = gpus.present() or gpus.get("rtx3090")
    database, _ = store.merged_view(card, gemm.toolchain(), args.db)
    with torch.device(device):
        transformer = model.build()
        stock = models.Case(height, width, text_tokens=args.text_tokens, slots=2048)
        tight = models.Case(height, width, text_tokens=args.text_tokens)
        inputs = {case: model.inputs(transformer, case) for case in (stock, tight)}
    result = {"size": args.size, "text_tokens": args.text_tokens, "torch": torch.__version__, "ms": {}, "peak_gib": {}}

    def run(name: str, case: models.Case) -> None:
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            result["ms"][name] = round(milliseconds(lambda: transformer(**inputs[case]), args.rounds), 1)
        if device == "cuda":
            result["peak_gib"][name] = round(torch.cuda.max_memory_allocated() / 2**30, 2)

    run("bf16, as diffusers ships it", stock)
    run("bf16, text packed tight", tight)
    replace_linears(transformer, model.quantizes, lambda n, k: database.plan(n, k, gemm.toolchain()))
    run("int8, as diffusers packs it", stock)
    run("int8, text packed tight", tight)
    ideogram4.unmask(transformer)
    run("int8, tight, no mask: int8kit run", tight)
    result.update(gpu=card.name, database=len(database.entries))
    for name, ms in result["ms"].items():
        print(f"{name:36s} {ms:9.1f} ms  {result['peak_gib'].get(name, 0):6.2f} GiB")
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
