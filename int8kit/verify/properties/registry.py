"""The tables of all properties. To add a property, write its check and add one row here.

PROPERTIES have drawn examples, PROOFS have none: see `proof`.

`int8kit verify`, `verify --only`, `verify mutate` and `verify libraries` read this table. The property `entries` is not
in it: it draws no examples, and it stamps the database (see `entries`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from hypothesis.strategies import SearchStrategy, sampled_from

from int8kit.spec import Kernel, TileConfig
from int8kit.verify.examples import fixed
from int8kit.verify.examples.strategies import Draw, HugeStride, draws, takes_operands
from int8kit.verify.implementations import Implementation
from int8kit.verify.properties import (
    choices,
    compiled_code,
    exhaustive,
    gemm,
    gemm_calls,
    gradients,
    kernel_needs,
    launch_cache,
    layers,
    lookups,
    modules,
    operator_tables,
    operators,
    order,
    pdl_probe,
    row_kernels,
    row_launches,
    row_tables,
    stamps,
    tile_order,
)
from int8kit.verify.properties.budget import Budget
from int8kit.verify.properties.proof import Level, Proof

REPEAT_COST = 10  # these run the kernel several times, and look for faults that show at any extent
ROW_COST = 5
Tiles = tuple[TileConfig, ...]


def _gemms(tiles: Tiles, budget: Budget) -> SearchStrategy[Draw]:
    return draws(tiles, budget.max_m_n, budget.max_ops)


def _two_configurations(tiles: Tiles, budget: Budget) -> SearchStrategy[Draw]:
    def others(d: Draw) -> SearchStrategy[Draw]:
        return sampled_from([config for config in tiles if takes_operands(d, config)]).map(
            lambda c: replace(d, other=c)
        )

    return _gemms(tiles, budget).flatmap(others)


def _nothing(tiles: Tiles, budget: Budget) -> Iterable[Any]:
    return ()


def _extreme_sums(tiles: Tiles, budget: Budget) -> Iterable[Draw]:
    yield from fixed.layouts(tiles)
    yield from _extreme_gemms(tiles, budget, "x", "w", "out")
    yield from fixed.middle_sums(tiles)
    yield from fixed.large_sums(tiles, roomy=budget.large_k)
    yield from fixed.stream_k_examples(tiles)


def _extreme_outputs(tiles: Tiles, budget: Budget) -> Iterable[Draw]:
    yield from fixed.epilogue_tables(tiles)
    yield from fixed.middle_extents(tiles)
    yield from _extreme_sums(tiles, budget)


def _extreme_swiglus(tiles: Tiles, budget: Budget) -> Iterable[Draw]:
    yield from fixed.epilogue_tables(tiles)
    yield from fixed.middle_extents(tiles) if budget.large_k else ()
    yield from _extreme_gemms(tiles, budget, "out", swizzle=budget.large_k)
    yield from fixed.stream_k_examples(tiles)


def _extreme_gemms(tiles: Tiles, budget: Budget, *huge_strides: HugeStride, swizzle: bool = True) -> Iterable[Draw]:
    yield from fixed.tails(tiles, roomy=budget.large_k)
    yield from fixed.extents(tiles, roomy=budget.large_k, swizzle=swizzle)
    yield from fixed.over_2gib_strides(tiles, *huge_strides) if budget.huge_strides else ()


def _needs_nothing(implementation: Implementation) -> str | None:
    return None


def _needs_accumulators(implementation: Implementation) -> str | None:
    return None if implementation.accumulators else "it returns no accumulators"


def _needs_output(implementation: Implementation) -> str | None:
    return None if implementation.output else "it returns accumulators only"


def _needs_swiglu(implementation: Implementation) -> str | None:
    return None if implementation.swiglu else "it has no SwiGLU epilogue"


def _needs_strides(implementation: Implementation) -> str | None:
    return None if implementation.strides else "it takes contiguous operands"


def _needs_configurations(implementation: Implementation) -> str | None:
    return None if implementation.tiles else "it has no configurations"


def _needs_early_starts(implementation: Implementation) -> str | None:
    return None if pdl_probe.overlaps(implementation.device) else "no kernel starts here before the one ahead has ended"


def _needs_row_kernels(implementation: Implementation) -> str | None:
    return None if implementation.row_kernels else "it has no row kernels, or the same as the native executor"


@dataclass(frozen=True)
class Property:
    """One row of the table."""

    name: str
    statement: str  # true of every correct implementation
    check: Callable[[Any, Implementation], str | None]  # how an example breaks the property, or None
    why_not: Callable[[Implementation], str | None] = _needs_nothing  # why it does not apply, or None
    strategy: Callable[[Tiles, Budget], SearchStrategy[Any]] = _gemms
    always: Callable[[Tiles, Budget], Iterable[Any]] = _nothing  # examples that every run of int8kit's kernels tries
    cost: int = REPEAT_COST  # of an example; the number and the size of the examples are divided by it
    scope: Literal["any GEMM", "int8kit"] = "any GEMM"  # `verify libraries` has the first
    mutants_of: tuple[Kernel, ...] = ()  # `verify mutate` tries it on faults of these kernels
    level: Level = "default"
    shares: int = 1  # children that share its examples on a GPU, where most examples compile a kernel


_ROW_SHARES = {"residual_norm_quantize": 4, "rms_norm_quantize": 2, "swiglu_quantize": 2, "qk_norm_rope": 2}
"""Alone, `residual_norm_quantize` took 117 s of a run of 146 s on an H200."""


def _row_kernel(name: str) -> Property:
    return Property(
        name,
        f"the outputs of `{name}` are bit-equal to its reference",
        row_kernels.check,
        _needs_row_kernels,
        strategy=lambda tiles, budget: row_kernels.examples(name),
        always=lambda tiles, budget: row_tables.always(name, huge_strides=budget.huge_strides),
        cost=ROW_COST,
        scope="int8kit",
        mutants_of=(Kernel.TRITON,),
        shares=_ROW_SHARES.get(name, 1),
    )


_all_of_int8kit = partial(
    Property, why_not=_needs_row_kernels, cost=ROW_COST, scope="int8kit", mutants_of=(Kernel.TRITON,)
)
_all_kernels = partial(Property, cost=1, mutants_of=tuple(Kernel))
PROPERTIES: dict[str, Property] = {
    row.name: row
    for row in (
        _all_kernels(
            "accumulator", "the int32 accumulators equal int64-exact arithmetic", gemm.accumulators,
            _needs_accumulators, always=_extreme_sums, shares=4,
        ),
        _all_kernels(
            "output", "the dequantized output is bit-equal to the reference; NaN equals NaN", gemm.output,
            _needs_output, always=_extreme_outputs, shares=6,
        ),
        _all_kernels(
            "swiglu", "the output of the SwiGLU epilogue is bit-equal to the reference", gemm.swiglu, _needs_swiglu,
            always=_extreme_swiglus, scope="int8kit", shares=4,
        ),
        Property("batch", "a row gives the same bits alone, permuted, and with more rows below it", gemm.batch),
        Property("linearity", "accumulators(a + b) = accumulators(a) + accumulators(b)", gemm.linearity,
                 _needs_accumulators),
        Property("zero rows", "a row of zeros with scale 0 gives the bias and nothing else", gemm.zero_rows,
                 _needs_output),
        Property("nan rows", "a row whose scale is NaN is NaN, and changes no other row", gemm.nan_rows, _needs_output),
        Property("strided", "parts of larger matrices give the same bits as copies of them", gemm.strided,
                 _needs_strides),
        Property("repeats", "three runs give the same bits", gemm.repeats),
        Property("order", "operands that the kernel ahead writes late are read as it leaves them", order.order,
                 _needs_early_starts, always=lambda tiles, budget: fixed.late_operands(tiles),
                 mutants_of=(Kernel.WGMMA,), shares=3),
        Property(
            "launch cache", "a launch never runs the kernel of another launch", launch_cache.check, _needs_swiglu,
            strategy=lambda tiles, budget: sampled_from(tuple(launch_cache.pairs(tiles))),
            always=lambda tiles, budget: launch_cache.pairs(tiles),
            cost=50, scope="int8kit", mutants_of=tuple(Kernel), shares=4,
        ),
        Property("configuration", "any two configurations give the same bits", gemm.configuration,
                 _needs_configurations, strategy=_two_configurations),
        *map(_row_kernel, row_kernels.KERNELS),
        _all_of_int8kit(
            "row launches", "a compiled row kernel serves no example that needs other code", row_launches.check,
            strategy=lambda tiles, budget: row_launches.examples(),
            always=lambda tiles, budget: row_launches.pairs(huge_strides=budget.huge_strides), cost=REPEAT_COST,
            shares=2,
        ),
        _all_of_int8kit(
            "refusals", "a GEMM refuses each operand that is wrong in any way", gemm_calls.check_refused,
            strategy=lambda tiles, budget: sampled_from(tuple(gemm_calls.refused())),
            always=lambda tiles, budget: gemm_calls.refused(), cost=50,
        ),
        _all_of_int8kit(
            "fallback", "the Triton kernel serves operands that the named kernel cannot", kernel_needs.check,
            strategy=lambda tiles, budget: sampled_from(tuple(gemm_calls.fallbacks("cuda"))),
            always=lambda tiles, budget: (
                *gemm_calls.fallbacks("cuda" if budget.large_k else "cpu"), *kernel_needs.calls()
            ), cost=50, mutants_of=tuple(Kernel),
        ),
        _all_of_int8kit(
            "operators", "each half of a torch operator has the bits and the layout of the reference",
            operators.check, strategy=lambda tiles, budget: operator_tables.examples(),
            always=lambda tiles, budget: operator_tables.always(), shares=2,
        ),
        _all_of_int8kit(
            "gradients", "derivatives of the linears, and x under autocast, are as defined", gradients.check,
            strategy=lambda tiles, budget: gradients.examples(), always=lambda tiles, budget: gradients.always(),
        ),
        _all_of_int8kit(
            "layers", "an INT8 layer computes the linear of the weights and biases that it was made of", layers.check,
            strategy=lambda tiles, budget: layers.examples(), always=lambda tiles, budget: layers.always(),
        ),
        _all_of_int8kit(
            "modules", "a module computes each linear that was exchanged as its weight, its scales and its hooks say",
            choices.check, strategy=lambda tiles, budget: modules.examples(),
            always=lambda tiles, budget: choices.always(),
        ),
        _all_of_int8kit(
            "lookup", "a plan and its text choose the configuration that the rule names", lookups.check,
            strategy=lambda tiles, budget: lookups.examples(), always=lambda tiles, budget: lookups.always(), cost=1,
        ),
        _all_of_int8kit(
            "stamps", "a stamp proves one kernel source, Triton, GPU, configuration and numerics alone", stamps.check,
            strategy=lambda tiles, budget: stamps.examples(), always=lambda tiles, budget: stamps.always(), cost=1,
        ),
    )
}  # fmt: skip
"""Every property with examples by its name, in the order in which `int8kit verify` runs them."""

PROOFS: dict[str, Proof] = {row.name: row for row in (*tile_order.PROOFS, *exhaustive.PROOFS, *compiled_code.PROOFS)}
"""Every property without examples by its name. They run after PROPERTIES."""


def of_any_gemm() -> tuple[Property, ...]:
    """The properties that `verify libraries` checks."""
    return tuple(row for row in PROPERTIES.values() if row.scope == "any GEMM")


def of_mutants(kernel: Kernel) -> tuple[str, ...]:
    """The names of the properties that may catch a fault of `kernel`."""
    rows: tuple[Property | Proof, ...] = (*PROPERTIES.values(), *PROOFS.values())
    return tuple(row.name for row in rows if kernel in row.mutants_of)
