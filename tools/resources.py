"""What the kernels of a database take under the Triton that is here, and beside other versions.

    python tools/resources.py --gpu rtx3090 --out 3.7.json
    python tools/resources.py --gpu rtx3090 --beside 3.7.json         # in an environment with another Triton

Registers a thread, bytes of spills a thread and KiB of shared memory a block, of each distinct kernel that an entry or
a default names; compiled for the card, which need not be here. The table is Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton
from tabulate import tabulate

from int8kit import files, gpus
from int8kit.database import store
from int8kit.database.schema import Resources
from int8kit.errors import Int8kitError
from int8kit.spec import GemmShape, default_config
from int8kit.toolchain import ANY_TOOLCHAIN
from int8kit.tune import workers

FORMAT = "int8kit.resources/1"


def compiled(alias: str) -> dict[str, Any]:
    """Each distinct kernel of the card's database and defaults -> registers, spills, shared memory, or why not."""
    gpu = gpus.get(alias)
    base, _ = store.merged_view(gpu, ANY_TOOLCHAIN)
    configs = {default_config(GemmShape(m, 4608, 4608)) for m in (16, 64, 4096)} | {e.config for e in base.entries}
    jobs = sorted({(replace(config, group_m=8), True) for config in configs})
    with workers.Workers() as pool:
        found = pool.compile_all(gpu.arch, jobs)
    rows = {str(config): _row(found[config, even_k]) for config, even_k in jobs}
    return {"format": FORMAT, "gpu": alias, "arch": gpu.arch, "triton": triton.__version__, "kernels": rows}


def _row(outcome: workers.Outcome) -> list[int] | str:
    if isinstance(outcome, Resources):
        return [outcome.registers, outcome.spill_bytes, outcome.shared_bytes // 1024]
    return outcome[:80]


def table(documents: list[dict[str, Any]]) -> str:
    """A row a kernel, a column a version: registers/spills/KiB."""
    names = list(dict.fromkeys(name for document in documents for name in document["kernels"]))

    def cell(document: dict[str, Any], name: str) -> str:
        row = document["kernels"].get(name, "")
        return row if isinstance(row, str) else "/".join(map(str, row))

    rows = [[f"`{name}`", *(cell(document, name) for document in documents)] for name in names]
    head = ["kernel", *(f"Triton {document['triton']}" for document in documents)]
    return tabulate(rows, head, tablefmt="pipe", disable_numparse=True, colalign=("left", *["right"] * len(documents)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="rtx3090", help="default: rtx3090")
    parser.add_argument("--beside", type=Path, action="append", default=[], help="an earlier --out; repeatable")
    parser.add_argument("--out", type=Path, help="the JSON document")
    args = parser.parse_args()
    try:
        others = [files.read_json(path, FORMAT, remedy="make one with --out") for path in args.beside]
        document = compiled(args.gpu)
        if args.out:
            files.write_text(args.out, json.dumps(document, indent=1) + "\n")
    except Int8kitError as error:
        print(f"resources: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    print(table([*others, document]))


if __name__ == "__main__":
    main()
