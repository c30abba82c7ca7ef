"""Shapes files: read, write, find, and select the shapes to tune, verify or time. `trace` explains the format.

    select(["64x4608x4608"])                    [GemmShape(64, 4608, 4608)]
    select(path=find(), limit=8)                8 of the INT8 shapes of the file that `trace-shapes` wrote

This module imports neither torch nor triton, so a verb checks its shapes before it loads them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from int8kit import damage, files
from int8kit.errors import FileError, InputError, ShapeError
from int8kit.shapes_schema import FORMAT, ShapesDocument, check
from int8kit.spec import GemmShape, Operation, SwigluShape, plain

TRACED = Path("out") / "shapes"
"""Folder that `trace-shapes` writes to. `out` holds results, so no committed file is overwritten."""
_REMEDY = "make one with `int8kit trace-shapes`"


def traced(model: str) -> Path:
    """The file that `trace-shapes` writes for a model by default."""
    return TRACED / f"{model}.json"


def find(model: str = "ideogram4") -> Path:
    """The shapes file of a model: ./out/shapes, where `trace-shapes` writes, then ./shapes, then the shipped one."""
    for path in (traced(model), Path("shapes") / f"{model}.json"):
        if path.is_file():
            return path
    return files.shipped("shapes") / f"{model}.json"


def write(document: dict[str, Any], path: Path) -> None:
    """Write a shapes document with one GEMM per line. Raises FileError."""
    files.write_text(path, dumps(document))


def dumps(document: dict[str, Any]) -> str:
    """The text of a shapes file, with one GEMM per line."""
    cases = []
    for case in document["cases"]:
        inner = files.dump_rows({**case, "attention": case["attention"], "gemms": case["gemms"]}, "gemms")
        cases.append("\n".join("    " + line for line in inner.splitlines()))
    head = files.dump_rows({**document, "cases": []}, "cases")
    return head.replace('"cases": []', '"cases": [\n' + ",\n".join(cases) + "\n  ]")


def read(path: Path) -> dict[str, Any]:
    """The shapes document in `path`. Raises FileError if it is damaged or holds a GEMM that no kernel can run."""
    document = files.read_json(path, FORMAT, remedy=_REMEDY)
    try:
        check(ShapesDocument.model_validate_json(json.dumps(document), strict=True))
    except ValidationError as error:
        raise FileError(f"{str(path)!r} is damaged ({damage.first(error)}); {_REMEDY}") from None
    except (ValueError, ShapeError) as error:
        raise FileError(f"{str(path)!r} is damaged ({error}); {_REMEDY}") from None
    return document


def int8_shapes(document: dict[str, Any], size: tuple[int, int] | None = None) -> dict[GemmShape, int]:
    """The shapes that `run` quantizes, joined or not, with their FLOPs summed over the cases.

    size: height and width in pixels; only cases of this size count. In documents of other tracers, without the "int8"
    field, every product with M, N and K over 128 counts. A joined GEMM with SwiGLU is a `SwigluShape`.
    """
    shapes: Counter[GemmShape] = Counter()
    for case in document["cases"]:
        if size is not None and (case["height"], case["width"]) != size:
            continue
        for gemm in case["gemms"]:
            shape = GemmShape(gemm["m"], gemm["n"], gemm["k"])
            if gemm.get("int8", min(shape.m, shape.n, shape.k) > 128):
                shapes[shape] += shape.flops * gemm["count"]
        for joined in case.get("joined", ()):
            kind = SwigluShape if joined["epilogue"] == Operation.SWIGLU else GemmShape
            shape = kind(joined["m"], joined["n"], joined["k"])
            shapes[shape] += shape.flops * joined["count"]
    return dict(shapes)


def parse_shape(text: str, *, epilogues: bool = False) -> GemmShape:
    """MxNxK -> GemmShape, and with `epilogues` MxNxK+swiglu -> SwigluShape. Raises InputError."""
    extents, plus, epilogue = text.lower().partition("+")
    parts = extents.split("x")
    if plus and not epilogues:
        raise InputError(f"shape {text!r}: expected MxNxK; the epilogue is a part of a shape for `tune` alone")
    if plus and epilogue != Operation.SWIGLU:
        raise InputError(f"shape {text!r}: expected MxNxK or MxNxK+swiglu, such as 4096x24576x4608+swiglu")
    if len(parts) != 3 or not all(part.isascii() and part.isdecimal() and len(part) < 11 for part in parts):
        raise InputError(f"shape {text!r}: expected MxNxK, such as 4352x12288x4608")
    return (SwigluShape if plus else GemmShape)(*map(int, parts))


def select(
    texts: Iterable[str] | None = None,
    path: Path | None = None,
    limit: int | None = None,
    sizes: Sequence[tuple[int, int]] = (),
    *,
    epilogues: bool = False,
) -> list[GemmShape]:
    """The shapes given as MxNxK, else the INT8 shapes of a shapes file; `limit` of them, spread over them. Sorted.

    path: the shapes file, None for `find()`; sizes: only the cases of these heights and widths. epilogues: with SwiGLU
    a shape is a SwigluShape; otherwise all are plain. Raises InputError.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: expected 1 or more shapes")
    flops_by_shape = dict.fromkeys((parse_shape(text, epilogues=epilogues) for text in texts or ()), 1)
    if not flops_by_shape:
        flops_by_shape = _of_file(path or find(), sizes)
    if not epilogues:
        flops_by_shape = _plain(flops_by_shape)
    return sorted(flops_by_shape) if limit is None else representative(flops_by_shape, limit)


def _plain(flops_by_shape: dict[GemmShape, int]) -> dict[GemmShape, int]:
    found: Counter[GemmShape] = Counter()
    for shape, flops in flops_by_shape.items():
        found[plain(shape)] += flops
    return dict(found)


def _of_file(path: Path, sizes: Sequence[tuple[int, int] | None]) -> dict[GemmShape, int]:
    document = read(path)
    flops_by_shape: Counter[GemmShape] = Counter()
    for size in sizes or [None]:
        found = int8_shapes(document, size)
        if not found:
            raise InputError(_none_in(path, document, size))
        flops_by_shape.update(found)
    return dict(flops_by_shape)


def _none_in(path: Path, document: dict[str, Any], size: tuple[int, int] | None) -> str:
    """The message about a file without an INT8 shape of a size, with the sizes that it has."""
    if size is None:
        return f"no INT8 shape in {str(path)!r}; trace one with `int8kit trace-shapes`"
    height, width = size
    sizes = sorted({(case["height"], case["width"]) for case in document["cases"] if int8_shapes({"cases": [case]})})
    has = f"; expected {', '.join(f'{w}x{h}' for h, w in sizes[:10])}" if sizes else ""
    more = (
        "" if height % 16 or width % 16 else f"; or trace it with `int8kit trace-shapes MODEL --size {width}x{height}`"
    )
    return f"no INT8 shape of {width}x{height} px in {str(path)!r}{has}{more}"


def representative(flops_by_shape: dict[GemmShape, int], limit: int) -> list[GemmShape]:
    """`limit` of the shapes, sorted: layers in turn by their FLOPs, and of each the m furthest from those taken."""
    layers: dict[tuple[int, int], list[GemmShape]] = {}
    for shape in sorted(flops_by_shape, key=lambda s: (-flops_by_shape[s], s)):
        layers.setdefault((shape.n, shape.k), []).append(shape)
    taken: list[GemmShape] = []
    while len(taken) < min(limit, len(flops_by_shape)):
        for (n, k), left in layers.items():
            if left and len(taken) < limit:
                same = [s.m for s in taken if (s.n, s.k) == (n, k)]
                far = [min((abs(math.log(s.m / m)) for m in same), default=0.0) for s in left]
                taken.append(left.pop(far.index(max(far))))
    return sorted(taken)
