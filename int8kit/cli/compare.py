"""The verb `compare`: the error of INT8 in a model, layer by layer and in its output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from int8kit import files
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
    from dataclasses import asdict

    from int8kit import models

    models.check_pipeline(model)
    models.check_seed(seed)
    if inputs is not None:
        _check_inputs(inputs)
    check_output(output, force)
    quiet_libraries()
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


def _check_inputs(path: Path) -> None:
    """Raise FileError for a file that torch.save did not write, as its first bytes show."""
    remedy = "expected a file that torch.save wrote"
    if not path.name:  # "" and "." name the present folder
        raise FileError(f"--inputs {str(path)!r}: it is a folder; {remedy}")
    if (kind := files.kind_of(path)) is not None:
        raise FileError(f"--inputs {str(path)!r}: it is a {kind}; {remedy}")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError:
        raise FileError(f"--inputs {str(path)!r}: no such file; {remedy}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(f"--inputs {str(path)!r}: cannot read it ({reason}); {remedy}") from None
    if not start.startswith((b"PK\x03\x04", b"\x80")):  # a zip archive, or a pickle of older versions
        found = "it has another format" if start else "it is empty"
        raise FileError(f"--inputs {str(path)!r}: {found}; {remedy}")
