"""A child's work in a mutation campaign: the properties, checked on the copy of the package that the child imports.

    check({"executor": {...}, "properties": ["output", ...], "tiles": [{...}], "examples": None, "seed": 0}, report)

    {"package": "/tmp/.../int8kit"}    reported first, before a kernel is imported: the copy that is checked
    {"example": "1x1x33, ..."}         before each example
    {"property": "output", "examples": 7, "failure": "1x1x33, ...: 1 of 1 differ", "raised": None}
                                       after each property; the first that fails is the last

The request and the reports are made of built-in types: classes would tie the parent to the classes of a broken copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import int8kit
from int8kit.spec import config_from
from int8kit.verify.process_pool import Report


def check(request: dict[str, Any], report: Report) -> None:
    """Check the properties of `request` that apply, up to the first that fails. Without tiles: with DEFAULT_TILES."""
    report({"package": str(Path(int8kit.__file__).parent)})
    from int8kit.verify import implementations
    from int8kit.verify.executors import Executor
    from int8kit.verify.properties.registry import PROOFS, PROPERTIES
    from int8kit.verify.verify_kernels import DEFAULT_TILES, run_over_tiles

    executor = Executor(**request["executor"])
    tiles = [config_from(row) for row in request["tiles"]] or DEFAULT_TILES
    kernels = implementations.int8kit(executor, tuple(tile for tile in tiles if executor.runs(tile)))
    for name in request["properties"]:
        why_not = PROPERTIES[name].why_not(kernels) if name in PROPERTIES else PROOFS[name].why_not(executor)
        if why_not is not None:
            report({"property": name, "examples": 0, "failure": None, "raised": None})
            continue
        result = run_over_tiles(
            name, executor, tiles, examples=request["examples"], random_seed=request["seed"],
            on_example=lambda example: report({"example": str(example)}),
        )  # fmt: skip
        found = {"examples": result.examples, "failure": result.failure, "raised": result.raised}
        report({"property": name, **found})
        if result.failure:
            return
