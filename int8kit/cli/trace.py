"""The verb `trace-shapes`: the GEMMs of a model -> a shapes file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from int8kit import interrupt
from int8kit.cli.options import parse_size
from int8kit.cli.terminal import STDOUT, Force, Json, progress, quiet_libraries, show
from int8kit.errors import InputError, UnknownName

SIZES = ("768x768", "1024x1024", "1536x1536", "2048x2048")  # of the shapes files that are committed


def trace_shapes(
    model: Annotated[str, typer.Argument(help="A model's name, or a local folder in diffusers' layout.")] = "ideogram4",
    size: Annotated[
        list[str] | None, typer.Option("--size", metavar="WxH", help="Image size in pixels. Repeatable.")
    ] = None,
    text_tokens: Annotated[int, typer.Option(help="Number of tokens of the prompt.")] = 200,
    batch: Annotated[int, typer.Option(help="Number of prompts in one forward.")] = 1,
    slots: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            help="Text positions of the sequence, 2048 in the stock pipeline. Repeatable. Default: the tokens.",
        ),
    ] = None,
    branch: Annotated[str, typer.Option(help="Branch of guidance: cond, uncond or both.")] = "both",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The shapes file, or `-` for stdout. Default: out/shapes/<model>.json"),
    ] = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Record every GEMM of one forward of a model in a shapes file, without weights and without a GPU.

    Without --size and --slots it records the cases of the shipped file: 768 to 2048 px, with tight text and with the
    stock 2048 text slots. `int8kit tune` in the same folder finds the file.

    Example: int8kit trace-shapes ideogram4 --size 1024x1024 --text-tokens 200
    """
    from int8kit import files, models, shapes_file, shapes_schema
    from int8kit.cli import tables

    known = models.get(model)
    cases = _cases(size, text_tokens, batch, slots, branch)
    path = output or shapes_file.traced(known.name)
    if path != STDOUT:
        files.check_target(path, ours=lambda p: files.is_ours(p, shapes_schema.FORMAT), force=force)
    with progress("tracing") as (bar, task), interrupt.at_once():
        bar.update(task, total=len(cases))
        quiet_libraries()
        from int8kit import trace

        with models.blaming(known.config):
            document = trace.trace(known, cases, on_case=lambda _: bar.advance(task))
    if path == STDOUT:
        print(shapes_file.dumps(document), end="")
        return
    shapes_file.write(document, path)
    show(document, f"{tables.shapes_table(document)}\n\nwrote {path}", as_json)


def _cases(size: list[str] | None, text_tokens: int, batch: int, slots: list[int] | None, branch: str) -> list[Any]:
    """The forwards to trace, each once. Raises InputError or UnknownName."""
    from int8kit import models

    if branch not in (*models.BRANCHES, "both"):
        raise UnknownName("branch", branch, [*models.BRANCHES, "both"])
    if max(batch, text_tokens, *(slots or [0])) > 1 << 20:
        raise InputError(f"batch {batch}, {text_tokens} text tokens, slots {slots}: expected at most {1 << 20}")
    if not size and not slots:
        slots = [text_tokens, max(text_tokens, models.STOCK_SLOTS)]
    cases: dict[models.Case, None] = {}
    for height, width in map(parse_size, size or SIZES):
        for one in models.BRANCHES if branch == "both" else (branch,):
            for padded in slots if slots and one == "cond" else (None,):
                cases[models.Case(height, width, batch, text_tokens, padded, one)] = None
    return list(cases)
