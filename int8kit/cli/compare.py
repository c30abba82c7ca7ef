"""The verb `compare`: the error of INT8 in a model, layer by layer and in its output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from int8kit.cli.terminal import Force, Json, Output, check_output, progress, quiet_libraries, show
from int8kit.errors import FileError


def compare(
    model: Annotated[str, typer.Argument(help="tiny, a local folder in diffusers' layout, or a hub id.")],
    inputs: Annotated[
        Path | None,
        typer.Option(help="File by torch.save with the arguments of the model's forward passes. Default: random ones."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the inputs.")] = 0,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    output: Output = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Compare a model's linears in INT8 with the originals, layer by layer: the layers with the largest error first.

    Example: int8kit compare tiny
    """
    if inputs is not None and not inputs.is_file():
        raise FileError(f"--inputs {inputs}: no such file; expected one that torch.save wrote")
    check_output(output, force)
    from dataclasses import asdict

    quiet_libraries()
    from int8kit import models
    from int8kit.cli import tables
    from int8kit.runtime import layer_errors

    tiny = model == models.TINY
    side = 256 if tiny else 1024
    case = models.Case(side, side, text_tokens=32 if tiny else 200)
    with progress("comparing") as (bar, task):

        def on_layer(total: int) -> None:
            bar.update(task, total=total)
            bar.advance(task)

        branches = layer_errors.compare(model, case, seed=seed, inputs=inputs, on_layer=on_layer)
    document = {"model": model, "inputs": "given" if inputs else "random", "branches": [asdict(b) for b in branches]}
    show(document, tables.layers_table(branches, markdown), as_json, output)
