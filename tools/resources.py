"""Table of the resources that a database's kernels take under the installed Triton, and under other versions.

    python tools/resources.py --gpu rtx3090 --out 3.7.json
    python tools/resources.py --gpu rtx3090 --beside 3.7.json         # in an environment with another Triton

Each distinct kernel of an entry or a default gets one row: registers and bytes of spills per thread, and KiB of shared
memory per block. The kernels are compiled for the GPU, which need not be present. The table is Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
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
from int8kit.tune.space import Compilation, kernel_variant

FORMAT = "int8kit.resources/1"


def compiled(alias: str) -> dict[str, Any]:
    """The document: for each distinct kernel of the GPU's database and defaults its resources, or an error."""
    gpu = gpus.get(alias)
    base, _ = store.merged_view(gpu, ANY_TOOLCHAIN)
    configs = {default_config(GemmShape(m, 4608, 4608)) for m in (16, 64, 4096)} | {e.config for e in base.entries}
    kernels = sorted({kernel_variant(config, True) for config in configs})
    with workers.Workers() as pool:
        compilations = pool.compile_all(gpu.arch, kernels)
    rows = {str(kernel.config): _row(compilations[kernel]) for kernel in kernels}
    return {"format": FORMAT, "gpu": alias, "arch": gpu.arch, "triton": triton.__version__, "kernels": rows}


def _row(compilation: Compilation) -> list[int] | str:
    if isinstance(compilation, Resources):
        return [compilation.registers, compilation.spill_bytes, compilation.shared_bytes // 1024]
    return compilation[:80]


def table(documents: list[dict[str, Any]]) -> str:
    """Markdown table with a row per kernel and a column per Triton version: registers/spills/KiB."""
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
    parser.add_argument(
        "--beside", type=Path, action="append", default=[], help="a document of an earlier run; repeatable"
    )
    parser.add_argument("--out", type=Path, help="file for the JSON document")
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
