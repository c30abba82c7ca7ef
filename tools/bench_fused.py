#!/usr/bin/env python3
"""Command line of `int8kit.bench.fused`.

    python tools/bench_fused.py --out out/fused.json
    python tools/bench_fused.py --dry-run                   tiny sizes on any machine: shows that it runs

The last line is one JSON object.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is first imported

from int8kit import files
from int8kit.bench import fused
from int8kit.errors import Int8kitError


def show(r: fused.Record) -> None:
    print(f"{r['kernel']:24s} {r['m']:5d} {r['variant']:10s} {r['us']:9.2f} {r['tb_s']:7.3f} {r['of_copy']:8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, nargs="+", default=list(fused.ROWS))
    parser.add_argument("--only", nargs="+", default=[], help="names of kernels")
    parser.add_argument("--rounds", type=int, default=fused.ROUNDS)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, wall clock: the times mean nothing")
    args = parser.parse_args()
    print(f"{'kernel':24s} {'M':>5s} {'variant':10s} {'us':>9s} {'TB/s':>7s} {'of copy':>8s}")
    try:
        document = fused.measure(args.m, only=args.only, rounds=args.rounds, dry_run=args.dry_run, on_record=show)
        print(json.dumps(document))
        if args.out:
            files.write_text(args.out, json.dumps(document, indent=1) + "\n")
    except Int8kitError as error:
        print(f"bench_fused: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
