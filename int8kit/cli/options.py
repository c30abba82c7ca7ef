"""Options that several verbs share, their parsing, and the requirements of a GPU verb."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from int8kit.errors import InputError

Sizes = Annotated[
    list[str] | None,
    typer.Option("--size", metavar="WxH", help="Only this image size in pixels. Repeatable."),
]
Shapes = Annotated[
    Path | None,
    typer.Option(help="A shapes file. Default: the file that `trace-shapes` wrote here, else the shipped one."),
]
Shape = Annotated[
    list[str] | None, typer.Option("--shape", metavar="MxNxK", help="This shape instead of a file's. Repeatable.")
]
Limit = Annotated[int | None, typer.Option(help="Number of shapes to take, spread over all of them.")]
Db = Annotated[
    Path | None, typer.Option("--db", help="A database file. Default: ./tuning_db or the shipped one, then your own.")
]

MAX_SIDE = 1 << 15  # M of such an image still fits the kernels' domain


def parse_size(text: str) -> tuple[int, int]:
    """WxH in pixels -> (height, width). Raises InputError."""
    width, x, height = text.lower().partition("x")
    if not (x and all(side.isascii() and side.isdecimal() and len(side) < 7 for side in (width, height))):
        raise InputError(f"size {text!r}: expected WIDTHxHEIGHT in pixels, multiples of 16, such as 1024x1024")
    if max(int(width), int(height)) > MAX_SIDE:
        raise InputError(f"size {text!r}: expected at most {MAX_SIDE} pixels a side")
    return int(height), int(width)


def need(verb: str, *packages: str) -> None:
    """Import `packages`, torch and triton among them. Raises InputError, with the reason and the remedy, if one fails.

    Called after the cheap checks of a verb, because these imports take a second.
    """
    for name in packages:
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:  # a missing module, a missing shared library
            raise InputError(f"{verb} needs {name} ({_first_line(error)}); {remedy_of(name)}") from None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def remedy_of(package: str) -> str:
    """How to get torch or triton on this system."""
    if package == "triton" and sys.platform != "linux":
        return "Triton runs on Linux and WSL; the verbs trace-shapes, run, db and doctor work without it"
    return f"install it with `pip install {package}`, and see `int8kit doctor`"


def named_gpu(name: str | None) -> Any:
    """The record of the GPU that an option names, or None without the option. Raises UnknownName."""
    from int8kit import gpus

    return None if name is None else gpus.get(name)


def serving(gpu: str | None, path: Path | None) -> tuple[Any, tuple[Path, ...], Any]:
    """The database that serves a GPU, its files, and the toolchain of this process.

    A file without a GPU's name serves the GPU that it names. Raises UnknownName, FileError.
    """
    from int8kit import gpus
    from int8kit.database import store

    named = named_gpu(gpu)
    base = (
        store.load(path, named.alias if named else None) if path is not None else None
    )  # a mistake shows before torch loads
    toolchain = noted_toolchain()
    if base is not None and path is not None:
        return base, (path,), toolchain
    return *store.merged_view(named or gpus.resolve(None), toolchain), toolchain


def noted_toolchain() -> Any:
    """The toolchain of this process; prints a note if it compares with nothing, since no kernel compiles."""
    from int8kit import kernels
    from int8kit.cli.terminal import note

    toolchain, reason = kernels.present_toolchain()
    if reason:
        note(f"no kernel compiles here ({reason}), so proofs of any Triton count; see `int8kit doctor`")
    return toolchain


def interpret_without_gpu() -> None:
    """Have Triton's interpreter execute kernels where no GPU does. Called before Triton is imported."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
