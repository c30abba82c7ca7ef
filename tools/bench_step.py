#!/usr/bin/env python3
"""One forward of the full-size Ideogram 4 transformer on this card, bf16 and INT8: milliseconds and peak memory.

    python tools/bench_step.py --size 1024x1024 --text-tokens 200 --layers 34 --json out/step.json

Random weights, conditional branch, batch 1, eager. Columns: "stock" pads the text to 2048 slots as diffusers does,
"tight" packs it. The last line is one JSON object. On a CPU, use --model tiny to see that it runs.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from int8kit import db, gpus, models
from int8kit.kernels import gemm
from int8kit.runtime.linear import replace_linears


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
    with torch.device(device):
        transformer = model.build()
        cases = {
            "stock": models.Case(height, width, text_tokens=args.text_tokens, slots=2048),
            "tight": models.Case(height, width, text_tokens=args.text_tokens),
        }
        inputs = {name: model.inputs(transformer, case) for name, case in cases.items()}
    result = {"size": args.size, "text_tokens": args.text_tokens, "torch": torch.__version__, "ms": {}}

    def run(variant: str) -> None:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            for name in inputs:
                ms = milliseconds(lambda name=name: transformer(**inputs[name]), args.rounds)
                result["ms"][f"{variant} {name}"] = round(ms, 1)
        if device == "cuda":
            result[f"{variant} peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)

    run("bf16")
    card = gpus.present() or gpus.get("rtx3090")
    path = db.find(card.alias, args.db)
    database = db.load(path) if path else db.Database(card)
    tokens = [case.text_slots + case.image_tokens for case in cases.values()]
    kernel = gemm.kernel_hash()
    replace_linears(transformer, model.quantizes, lambda n, k: database.plan(n, k, tokens, kernel=kernel))
    if device == "cuda":
        torch.cuda.empty_cache()
    run("int8")
    result.update(gpu=card.name, database=len(database.entries))
    for name, ms in result["ms"].items():
        print(f"{name:12s} {ms:9.1f} ms")
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
