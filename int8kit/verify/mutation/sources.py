"""The source files that the rules mutate, and the parts that are left out, each with the reason.

    FILES["kernels/quantize.py"]         the kernels of its configurations
    why_left_out("gemm_triton", "source")   "it serves the cross-compiler alone"

A part is left out if no fault of it changes a result: names, texts, types, and values that change only the time.
"""

from __future__ import annotations

from int8kit.spec import Kernel

_PLAIN = (Kernel.TRITON,)
_GLUON = (Kernel.MMA_SYNC, Kernel.WGMMA)
FILES: dict[str, tuple[Kernel, ...]] = {
    "kernels/gemm_triton.py": _PLAIN,
    "kernels/gemm_mma_sync.py": (Kernel.MMA_SYNC,),
    "kernels/gemm_wgmma.py": (Kernel.WGMMA,),
    "kernels/epilogue.py": tuple(Kernel),
    "kernels/l2_swizzle.py": tuple(Kernel),
    "kernels/stream_k.py": _GLUON,
    "kernels/activations.py": tuple(Kernel),
    "kernels/row_primitives.py": _PLAIN,
    "kernels/quantize.py": _PLAIN,
    "kernels/rms_norm_quantize.py": _PLAIN,
    "kernels/residual_norm_quantize.py": _PLAIN,
    "kernels/swiglu_quantize.py": _PLAIN,
    "kernels/qk_norm_rope.py": _PLAIN,
    "kernels/launch.py": tuple(Kernel),
    "kernels/operands.py": tuple(Kernel),
    "kernels/gemm.py": tuple(Kernel),
    "ops.py": _PLAIN,
    "operand_checks.py": _PLAIN,
    "gradient.py": _PLAIN,
    "lookup.py": _PLAIN,
}
"""The files that are mutated, and the kernels whose configurations run them. Row kernels have no configurations."""

_TUNING = "it changes the time alone: every tile and every value gives the same bits"
_COMPILER = "it serves the cross-compiler or the compiler's cache alone"
_TEXT = "its result is a text or a hash that no kernel reads"
_DEVICES = "it needs two GPUs"
_PARTS: dict[tuple[str, str], str] = {
    ("", "source"): _COMPILER,
    ("", "compiler_source"): _COMPILER,
    ("", "default_tile"): _TUNING,
    ("", "__str__"): _TEXT,
    ("", "__all__"): _TEXT,
    ("launch", "divisibility"): _COMPILER,
    ("launch", "finalize_cache_keys"): _COMPILER,
    ("launch", "interpreted"): "it selects the interpreter and not a result",
    ("launch", "_probe"): "it selects the interpreter and not a result",
    ("launch", "on_device"): _DEVICES,
    ("gemm", "module"): "it serves versions of Triton without Gluon",
    ("gemm", "KernelModule"): "it is a type",
    ("gemm", "kernel_hash"): _TEXT,
    ("gemm", "toolchain"): _TEXT,
    ("gemm", "_rounded"): "it serves the interpreter alone, and passes everything else on",
    ("gemm", "_is_compilers"): "it serves versions of Triton that do not compile a kernel",
    ("gemm", "_notice"): _TEXT,
    ("gemm_mma_sync", "PASS_K"): _TUNING,
    ("gemm_wgmma", "CONSUMER_LAG"): _TUNING,
    ("gemm_wgmma", "tma"): "it serves other versions of Triton",
    ("gemm_mma_sync", "async_copy"): "it serves other versions of Triton",
    ("row_primitives", "CHUNKS"): _TUNING,
    ("row_primitives", "WARPS"): _TUNING,
    ("row_primitives", "K_MAX_HELD"): "rows on both sides of the limit get the same bits",
    ("row_primitives", "RowTile"): _TUNING,
    ("row_primitives", "INTERPRETED"): "it selects the interpreter and not a result",
    ("row_primitives", "interpreter_fp32"): "it serves the interpreter alone",
    ("row_primitives", "check_one_device"): _DEVICES,
    ("qk_norm_rope", "HeadTile"): _TUNING,
    ("quantize", "LONG_CHUNK"): _TUNING,
    ("quantize", "LONG_WARPS"): _TUNING,
    ("lookup", "Candidate"): "it is a type",
    ("lookup", "Match"): "it is a type",
    ("lookup", "Level"): "it is a type",
    ("lookup", "DEFAULT"): _TEXT,
    ("lookup", "matches"): _TEXT,
    ("lookup", "Request"): _TUNING,
    ("lookup", "_nearest"): _TUNING,
    ("lookup", "_nearest_m"): _TUNING,
    ("lookup", "_is_near"): _TUNING,
    ("lookup", "_model"): _TUNING,
    ("lookup", "_borrowed"): _TUNING,
    ("lookup", "_ranked"): _TUNING,
    ("lookup", "configs"): "it serves warnings and `warmup`",
    ("lookup", "choosable"): "it serves `warmup` alone",
    ("lookup", "_exact"): _TUNING,
    ("lookup", "LEVELS"): _TUNING,
    ("ops", "Operator"): "it is a type",
    ("operand_checks", "_not_floats"): _TEXT,
}
"""Functions, classes and constants that are left out, by the stem of the file ("" for each) and their name."""

KEYWORDS_LEFT_OUT = frozenset(
    ("maxsize", "num_warps", "num_stages", "strict", "stacklevel", "cache_modifier", "is_pure", "repr", "compare")
)
"""Keyword arguments that change the time, a text or a check of lengths alone."""

WORDS_LEFT_OUT = ("group_m", "num_stages", "num_warps", "[240, 24]")
"""Expressions that change the time alone, or the registers of a group of warps."""

CHOICES_LEFT_OUT = ("tile or ", "default_config(")
"""Beginnings of expressions that choose a tile: every tile gives the same bits. Their statements are mutated."""

_ON_GPU: tuple[tuple[str, str, str], ...] = (  # stem, function ("" for all), text of the line ("" for all)
    ("gemm_mma_sync", "", ""),
    ("gemm_wgmma", "", ""),
    ("stream_k", "", ""),
    ("launch", "aligned_dtypes", ""),
    ("launch", "launch_cached", ""),
    ("launch", "COMPILE_OPTIONS", ""),
    ("launch", "DO_NOT_SPECIALIZE", ""),
    ("operands", "Operands.key", ""),
    ("row_primitives", "quotient", ""),
    ("row_primitives", "reciprocal_and_rest", ""),
    ("row_primitives", "S_ORDINARY", ""),
    ("row_primitives", "is_ordinary", "ordinary = (s"),
    ("row_primitives", "launch_rows", "dtypes"),
    ("activations", "reciprocal", "inline_asm"),
    ("activations", "_rounded", "return tl.fma"),
    ("", "", "do_not_specialize"),
    ("gemm", "_launch", "options"),
    ("gemm", "_launch", "reason"),
    ("gemm", "_launch", "on_device"),
    ("gemm", "why_not", "module(kernel)"),
    ("gemm", "why_not", "ConfigError"),
    ("gemm", "why_not", "str(error)"),
)
_IN_INTERPRETER: tuple[tuple[str, str, str], ...] = (
    ("activations", "ROUNDER_64", ""),
    ("activations", "_rounded", "if INTERPRETED"),
    ("row_primitives", "round_to", "if INTERPRETED"),
    ("qk_norm_rope", "qk_norm_rope", "return outs[0]"),
    ("", "", "row_primitives.interpreter_fp32("),
    ("gemm", "why_not", "interpreted()"),
)
_GPU_BRANCHES = ("is_ordinary(s)", "x.dtype == tl.bfloat16 and (not INTERPRETED)")
_INTERPRETER_BRANCHES = ("INTERPRETED", "INTERPRETED and tl.bfloat16 == DTYPE")


def why_left_out(stem: str, qualified: str) -> str | None:
    """The reason why a function, class or constant is not mutated, or None. qualified: `Class.method`, or a name."""
    names = qualified.split(".")
    for name in names:
        found = _PARTS.get((stem, name)) or _PARTS.get(("", name))
        if found:
            return found
    return None


def needs_two_gpus(line: str) -> bool:
    """True for a statement that begins with `line` and whose faults show only with tensors of two devices."""
    return any(text in line for text in ("check_one_device(", "if len({t.device for t in"))


def runs_on_gpu_alone(file: str, qualified: str, line: str, branches: tuple[str, ...] = ()) -> bool:
    """True if no CPU executes this line, inside `branches`: Gluon, launch caches, fused operations, PTX."""
    return any(branch in _GPU_BRANCHES for branch in branches) or _listed(_ON_GPU, file, qualified, line)


def is_dtype_of_rows(file: str, after: str) -> bool:
    """True if a pointer's dtype follows, in a row kernel: in the interpreter all its matrices are fp32."""
    return after.startswith(".dtype.element_ty") and stem(file) in ("residual_norm_quantize", "qk_norm_rope")


def runs_in_interpreter_alone(file: str, qualified: str, line: str, branches: tuple[str, ...] = ()) -> bool:
    """True if no GPU executes this line."""
    return any(branch in _INTERPRETER_BRANCHES for branch in branches) or _listed(
        _IN_INTERPRETER, file, qualified, line
    )


def stem(file: str) -> str:
    """`gemm_triton` of "kernels/gemm_triton.py"."""
    return file.rpartition("/")[2].removesuffix(".py")


def _listed(rows: tuple[tuple[str, str, str], ...], file: str, qualified: str, line: str) -> bool:
    name = stem(file)
    return any(of in ("", name) and at in ("", qualified) and text in line for of, at, text in rows)
