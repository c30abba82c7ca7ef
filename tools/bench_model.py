#!/usr/bin/env python3
"""Command line of `int8kit.bench.model`.

    python tools/bench_model.py --size 1024x1024 --text-tokens 200 --out out/model.json
    python tools/bench_model.py --model tiny --size 64x64       on any machine: shows that it runs

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

from tabulate import tabulate

from int8kit import files
from int8kit.bench import model
from int8kit.errors import Int8kitError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ideogram4")
    parser.add_argument("--size", default="1024x1024", help="WIDTHxHEIGHT in pixels")
    parser.add_argument("--text-tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gpu", help="GPU whose database serves; default: the present one")
    parser.add_argument("--db", type=Path, help="a database file")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    setting = model.ModelSetting(args.model, height, width, args.text_tokens, args.rounds, args.gpu, args.db)
    try:
        document = model.measure(setting)
        print(tabulate(model.rows(document), ("variant", "ms", "GiB"), disable_numparse=True, stralign="right"))
        print(json.dumps(document))
        if args.out:
            files.write_text(args.out, json.dumps(document) + "\n")
    except Int8kitError as error:
        print(f"bench_model: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
