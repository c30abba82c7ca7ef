"""The property `entries`: the configuration of each database entry gives the reference's bits, and gets a stamp."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from int8kit import reference
from int8kit.database.database import Choice, Database, Key
from int8kit.database.schema import Entry, Stamp, stamp
from int8kit.kernels import gemm
from int8kit.spec import GemmShape, Operation, TileConfig
from int8kit.verify import implementations
from int8kit.verify.compare import bitwise_diff, operands
from int8kit.verify.examples.strategies import Draw
from int8kit.verify.executors import Executor
from int8kit.verify.properties import gemm as gemm_properties
from int8kit.verify.properties.budget import WHOLE, Share
from int8kit.verify.runner import Result

NAME = "entries"
SHARES = 4  # of a GPU's work: children that share it
Stamps = dict[Key, list[Stamp]]
"""The stamps of the entries that passed, by entry key."""


def run(
    executor: Executor,
    database: Database,
    unlisted: Sequence[Choice] = (),
    on_example: Callable[[object], None] = lambda _: None,
    share: Share = WHOLE,
) -> tuple[Result, Stamps]:
    """Check the usable entries of `database`, and `unlisted` choices; the stamps are for the entries that passed.

    share: the part of the configurations that is checked.
    """
    import triton

    verdicts: dict[tuple[GemmShape, TileConfig, bool], str | None] = {}
    stamps: Stamps = {}
    failure = None
    # code from another Triton is not proven here
    serving: list[Entry | Choice] = [*database.usable_entries(gemm.toolchain()), *unlisted]
    # entries of one configuration are in one share, which compiles it once
    mine = set(share.pick(sorted({one.config for one in serving})))
    serving = [one for one in serving if one.config in mine]
    runnable = [one for one in serving if executor.runs(one.config)]
    for one in sorted(runnable, key=lambda e: e.shape.flops):
        shape = reduced(one.shape, one.config) if executor.on == "interpreter" else one.shape
        on_example(f"{shape}, {one.config}")
        key = shape, one.config, _is_swiglu(one)
        if key not in verdicts:
            torch.cuda.empty_cache()  # shapes differ, so the next cannot use the memory; no effect without a GPU
            try:
                verdicts[key] = check_entry(one, executor)
            except Exception as error:
                verdicts[key] = f"{one.shape}, {one.config}: {type(error).__name__}: {error}"
        why = verdicts[key]
        if why is None and isinstance(one, Entry):
            stamps[one.key] = [
                stamp(
                    executor.on, device=executor.name, arch=executor.code, entry=one,
                    kernel=gemm.kernel_hash(one.config.kernel), triton=triton.__version__,
                )
            ]  # fmt: skip
        failure = failure or why
    return Result(NAME, str(executor), len(runnable), failure, skipped=len(serving) - len(runnable)), stamps


def check_entry(entry: Entry | Choice, executor: Executor) -> str | None:
    """How an entry's configuration differs from the reference on normal and on extreme data, or None.

    On a GPU the check has the entry's size: every element against `torch._int_mm`, and sampled rows against int64-exact
    arithmetic. In the interpreter it has the `reduced` size, and every element is compared with exact arithmetic.
    """
    shape = reduced(entry.shape, entry.config) if executor.on == "interpreter" else entry.shape
    for kind in ("normal", "extremes"):
        d = Draw(shape, entry.config, kind, 3, torch.bfloat16, torch.bfloat16)
        if executor.on == "interpreter":
            kernels = implementations.int8kit(executor)
            why = gemm_properties.accumulators(d, kernels) or gemm_properties.output(d, kernels)
            if why is None and _is_swiglu(entry):
                why = gemm_properties.swiglu(d, kernels)
        else:
            why = _check_full(d, executor, _is_swiglu(entry))
        if why:
            return f"{d}: {why}"
    return None


def _is_swiglu(one: Entry | Choice) -> bool:
    return isinstance(one, Entry) and one.operation is Operation.SWIGLU


def _check_full(d: Draw, executor: Executor, swiglu: bool) -> str | None:
    x, w, sx, sw, bias = operands(d, executor.device)
    got = gemm.accumulate(x, w, config=d.config, arch=executor.arch)
    picks = torch.linspace(0, d.shape.m - 1, min(d.shape.m, 32), device=x.device).long()
    why = bitwise_diff(got[picks], reference.accumulate(x[picks], w))
    if why is None and d.shape.m > 16 and d.shape.n % 8 == 0 and d.shape.k % 8 == 0:
        why = bitwise_diff(got, torch._int_mm(x, w.t()))
    if why:
        return f"accumulator: {why}"
    want = reference.dequantize(got, sx, sw, bias, d.out_dtype)
    out = gemm.scaled_mm(x, w, sx, sw, bias, config=d.config, out_dtype=d.out_dtype, arch=executor.arch)
    why = bitwise_diff(out, want)
    if why or not swiglu:
        return why and f"output: {why}"
    half = gemm.scaled_mm_swiglu(x, w, sx, sw, bias, config=d.config, out_dtype=d.out_dtype, arch=executor.arch)
    wide = reference.dequantize(got, sx, sw, bias, torch.float32)
    why = bitwise_diff(half, (reference.silu(wide[:, 0::2]) * wide[:, 1::2]).to(d.out_dtype))
    return why and f"SwiGLU: {why}"


def reduced(shape: GemmShape, config: TileConfig) -> GemmShape:
    """A small shape with the same tails: at most two tiles in M and N and three k-steps, and the same remainders."""

    def cut(size: int, block: int, most: int) -> int:
        tail = size % block
        return min(size, (most - 1) * block + tail if tail else most * block)

    return GemmShape(
        cut(shape.m, config.block_m, 2), cut(shape.n, config.block_n, 2), cut(shape.k, config.block_k, 3)
    )  # fmt: skip
