"""Checks of the arithmetic in the code: its roundings, the operations of each source function, its tensor cores.

An operation belongs to the innermost source function of int8kit's kernels that its line is in. So a product and a sum
that the compiler joined, or an operation that it replaced, show at their function.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from functools import cache
from math import gcd
from pathlib import Path

from int8kit import kernels
from int8kit.spec import Kernel, TileConfig
from int8kit.verify.properties.compiled_code.launched import Code
from int8kit.verify.properties.compiled_code.ptx import Instruction, Program, parse, split

_ROUNDED = ("add", "sub", "mul", "fma", "mad", "div", "sqrt", "rcp", "ex2", "lg2", "rsqrt", "sin", "cos", "tanh")
_FLOATS = re.compile(r"\.(f32|f64|f16|bf16|f32x2|f16x2|bf16x2|tf32)\b")
APPROXIMATE = "rcp.approx.ftz.f32"  # in activations.reciprocal, which corrects it

DROPS_NAN = {("silu", "min"), ("clamped_quotient", "max"), ("clamped_quotient", "min")}
"""Maxima and minima that may drop a NaN: another operand or a later step has it."""

EXACT: dict[str, dict[str, int]] = {
    "dequantize": {"cvt.s32": 1, "mul": 2},
    "add_bias": {"add": 1},
    "swiglu": {"mul": 1},
    "silu": {"add": 6, "mul": 5, "fma": 5, "rcp": 1},
    "row_scale": {"div": 1},
    "reciprocal_root": {"add": 1, "sqrt": 1, "div": 1},
    "reciprocal_and_rest": {"div": 1, "fma": 1, "mul": 1},
    "quotient": {"mul": 1, "fma": 3, "add": 1},
    "clamped_quotient": {"div": 1, "add": 1},
    "norm_and_quantize": {"mul": 3, "add": 1},
    "_residual_norm_quantize": {"mul": 3, "add": 1},
    "_swiglu_quantize": {"mul": 1},
}
"""Rounded operations of functions that compute each element by itself: their numbers, up to a common factor."""

PARTS = {"_rounded": "silu", "reciprocal": "silu"}
"""Functions that count as parts of another one, so that each of its elements has all of them."""

AMONG: dict[str, frozenset[str]] = {
    "mean_square": frozenset({"mul", "add", "div"}),
    "_rotate_tiles": frozenset({"mul", "add", "div"}),
    **dict.fromkeys(("_neighbours", "_halves", "_fold", "sums_of_rows", "_sum_eighths"), frozenset({"add"})),
    "tl.sum": frozenset({"add", "mul"}),  # Triton's sum of squares: it may move the square to its addition
}
"""Rounded operations of functions that add up a row: their kinds. Their numbers depend on the row and the tile."""


def rounding(code: Code, config: TileConfig | None) -> str | None:
    """Each operation on fp32 is rounded to the nearest, keeps subnormal numbers and NaN, and stays alone."""
    if code.contraction:
        return "the launch lets the compiler join a product and a sum in one rounding: expected enable_fp_fusion=False"
    for one in parse(code.ptx).instructions:
        if not _FLOATS.search(one.op) or (one.op == APPROXIMATE and _function(one) == "reciprocal"):
            continue
        if re.search(r"\.(ftz|approx|full|sat|rz|rm|rp|rna|rzi|rmi|rpi)\b", one.op):
            return f"{one}: expected an operation rounded to the nearest, with subnormal numbers"
        if one.starts(*_ROUNDED) and not re.search(r"\.rn\.f32(x2|\.bf16|\.f16)?$", one.op):
            return f"{one}: expected .rn.f32"
        if one.starts("max", "min") and ".NaN." not in one.op and (_function(one), one.op[:3]) not in DROPS_NAN:
            return f"{one}: expected .NaN, so that a NaN stays one"
        if one.starts("cvt") and _narrows(one.op) and ".rn." not in one.op:
            return f"{one}: expected .rn"
    return None


def _narrows(op: str) -> bool:
    """Whether a conversion rounds: to a narrower number, or from an integer."""
    *_, to, of = op.split(".")
    return to != of and not (to == "f32" and of in ("f16", "bf16"))


def operations(code: Code, config: TileConfig | None) -> str | None:
    """Every source function has its own rounded operations and no other."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    example: dict[tuple[str, str], Instruction] = {}
    program = parse(code.ptx)
    for one in program.instructions:
        if (kind := _kind(one)) and not _negates(program, one):
            name = PARTS.get(where := _function(one), where)
            found[name][kind] += 2 if one.op.endswith("x2") else 1
            example.setdefault((name, kind), one)
    for name, counts in found.items():
        expected = set(EXACT.get(name, ())) | AMONG.get(name, frozenset())
        if other := set(counts) - expected:
            return f"{example[name, min(other)]} in {name}: expected {', '.join(sorted(expected)) or 'no arithmetic'}"
        if name in EXACT:
            common = gcd(*counts.values()) // gcd(*EXACT[name].values())
            if counts != Counter({kind: common * number for kind, number in EXACT[name].items()}):
                return f"{name} has {_text(counts)}: expected the ratio {_text(EXACT[name])}"
    return _missing(code, found)


def _missing(code: Code, found: dict[str, Counter[str]]) -> str | None:
    """A function that the kernel's constants ask for and the code does not have."""
    constants = code.constants
    if "INT32_OUT" not in constants:
        return None
    wanted = set() if constants["INT32_OUT"] else {"dequantize"}
    wanted |= {"add_bias"} if constants["HAS_BIAS"] else set()
    wanted |= {"swiglu", "silu"} if constants["SWIGLU"] else set()
    if wanted != set(found):
        return f"arithmetic of {_names(set(found))}: expected {_names(wanted)}"
    return None


def tensor_cores(code: Code, config: TileConfig | None) -> str | None:
    """Products run on the integer tensor cores, with the instruction of the kernel and the GPU."""
    if config is None:
        return None
    warpgroups = config.kernel is Kernel.WGMMA or (
        config.kernel is Kernel.TRITON and code.arch == 90 and config.num_warps >= 4 and config.block_m >= 64
    )
    expected = "wgmma.mma_async" if warpgroups else "mma.sync"
    products = parse(code.ptx).find("mma", "wgmma.mma_async", "wmma", "tcgen05.mma", "dp4a")
    for one in products:
        if not one.starts(expected) or not re.search(r"\.s32\.s8\.s8(\.s32)?$", one.op):
            return f"{one.op}: expected {expected} of s8 with sums in s32"
    return None if products else f"no product of tensor cores: expected {expected}"


def _kind(one: Instruction) -> str | None:
    """The kind of a rounded operation; an addition of the negative number is a subtraction, and both are "add"."""
    if not _FLOATS.search(one.op):
        return None
    if one.op.startswith("cvt.") and one.op.endswith((".s32", ".u32", ".s64")):
        return "cvt.s32" if _FLOATS.search(one.op) and not re.match(r"cvt\.\w+\.[su]\d+\.f", one.op) else None
    name = one.op.split(".")[0]
    return {"sub": "add", "mad": "fma"}.get(name, name) if name in _ROUNDED else None


def _negates(program: Program, one: Instruction) -> bool:
    """Whether an operation is 0 - x, as which Triton 3.6 to 3.8 write -x: it rounds nothing."""
    if not one.starts("sub"):
        return False
    first = split(one.operands)[1]
    definitions = program.definitions.get(first, [])
    if len(definitions) == 1 and definitions[0].starts("mov"):
        first = split(definitions[0].operands)[1]
    return re.fullmatch("0f[08]0000000|-?0|-2147483648|0x80000000", first) is not None


def _function(one: Instruction) -> str:
    """The innermost function of int8kit's kernels that the instruction's source line is in; "" if it is in none.

    Triton 3.9 loses the callers of operations inside its own reductions, which count as "tl.sum".
    """
    for file, line in one.lines:
        for start, end, name in _functions().get(file, ()):
            if start <= line <= end:
                return name
    return "tl.sum" if one.lines and one.lines[0][0] == "standard.py" else ""


@cache
def _functions() -> dict[str, list[tuple[int, int, str]]]:
    """First line, last line and name of every function, by the file's name."""
    return {
        path.name: [
            (node.lineno, node.end_lineno or node.lineno, node.name)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef)
        ]
        for path in Path(kernels.__path__[0]).glob("*.py")
    }


def _text(counts: Counter[str] | dict[str, int]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))


def _names(functions: set[str]) -> str:
    return ", ".join(sorted(functions)) or "no function"
