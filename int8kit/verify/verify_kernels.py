"""Verification of int8kit's own kernels: one property over a database's configurations, or over given ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from int8kit.database.database import Choice, Database
from int8kit.database.schema import Entry
from int8kit.spec import GemmShape, Kernel, TileConfig, default_config
from int8kit.verify import implementations
from int8kit.verify.examples.fixed import SMALL_TILES
from int8kit.verify.examples.strategies import Draw
from int8kit.verify.executors import Executor
from int8kit.verify.properties import entries
from int8kit.verify.properties.budget import WHOLE, Share, budget
from int8kit.verify.properties.entries import Stamps
from int8kit.verify.properties.proof import Proof
from int8kit.verify.properties.registry import PROOFS, PROPERTIES
from int8kit.verify.runner import Result, forbid_fallback, run_property

DEFAULT_TILES = (*SMALL_TILES, default_config(GemmShape(1024, 1, 1)))
# in which two consumers share the fewest slots, so that a wrong order of theirs ends in a deadlock
SHORT_RING = TileConfig(256, 64, 128, num_warps=8, num_stages=2, kernel=Kernel.WGMMA)


def names(
    executor: Executor, database: Database, unlisted: Sequence[Choice] = (), *, exhaustive: bool = False
) -> list[str]:
    """The properties that apply, in the order in which they are run; exhaustive: with these of that level."""
    kernels = implementations.int8kit(executor, SMALL_TILES)
    wanted = ("default", "exhaustive") if exhaustive else ("default",)
    found = [row.name for row in PROPERTIES.values() if row.level in wanted and row.why_not(kernels) is None]
    found += [row.name for row in PROOFS.values() if row.level in wanted and row.why_not(executor) is None]
    return [*found, entries.NAME] if database.entries or unlisted else found


def shares(name: str, executor: Executor) -> tuple[Share, ...]:
    """The shares of a property. A GPU's children share the properties that compile most; a CPU has too few cores."""
    if executor.on == "interpreter" or name in PROOFS:
        return (WHOLE,)
    of = entries.SHARES if name == entries.NAME else PROPERTIES[name].shares
    return tuple(Share(number, of) for number in range(of))


def run(
    name: str,
    executor: Executor,
    database: Database,
    *,
    examples: int | None = None,
    random_seed: int = 0,
    more: Iterable[TileConfig] = (),
    kept: Iterable[Any] = (),
    unlisted: Sequence[Choice] = (),
    on_example: Callable[[object], None] = lambda _: None,
    share: Share = WHOLE,
) -> tuple[Result, Stamps]:
    """Verify one property of `names`: its result and, for "entries", the stamps of the entries that passed.

    The tiles come from the database, DEFAULT_TILES and `more`, on sm_90 also SHORT_RING. kept: examples that failed in
    earlier runs. unlisted: the configurations of shapes without an entry, checked like entries. on_example is given
    each example before it is tried. share: the part of the examples that is tried, see `shares`.
    """
    if name == entries.NAME:
        with forbid_fallback():
            return entries.run(executor, database, unlisted, on_example, share)
    served: tuple[Entry | Choice, ...] = (*database.entries, *unlisted)
    tiles = {*DEFAULT_TILES, *(one.config for one in served), *more}
    if executor.on == "native" and executor.code == 90:
        tiles.add(SHORT_RING)
    result = run_over_tiles(
        name, executor, tiles, examples=examples, random_seed=random_seed, kept=kept, on_example=on_example, share=share
    )
    return result, {}


def run_over_tiles(
    name: str,
    executor: Executor,
    tiles: Iterable[TileConfig] = DEFAULT_TILES,
    *,
    examples: int | None = None,
    random_seed: int = 0,
    kept: Iterable[Any] = (),
    on_example: Callable[[object], None] = lambda _: None,
    share: Share = WHOLE,
) -> Result:
    """Verify one property over the configurations that `executor` runs, without a database."""
    runnable = tuple(sorted({config for config in tiles if executor.runs(config)}))
    if name in PROOFS:
        with forbid_fallback():
            return run_proof(PROOFS[name], executor, runnable, on_example)
    row = PROPERTIES[name]
    limits = budget(executor, examples).divided(row.cost)
    kernels = implementations.int8kit(executor, runnable)
    with forbid_fallback():
        return run_property(
            name,
            executor,
            row.strategy(runnable, limits),
            lambda example: row.check(example, kernels),
            examples=share.count(limits.examples),
            random_seed=random_seed + 2**32 * share.number,  # shares draw other examples than each other
            always=share.pick((*(one for one in kept if _runs(executor, one)), *row.always(runnable, limits))),
            on_example=on_example,
        )


def _runs(executor: Executor, example: Any) -> bool:
    """Whether `executor` can try a stored example. One of a GEMM names one or two configurations."""
    if not isinstance(example, Draw):
        return True
    return all(executor.runs(config) for config in (example.config, example.other) if config)


def run_proof(
    proof: Proof, executor: Executor, tiles: tuple[TileConfig, ...], on_example: Callable[[object], None]
) -> Result:
    """Verify a property without examples. An exception of the kernel is its failure."""
    steps: list[str] = []

    def report(step: object) -> None:
        steps.append(str(step))
        on_example(step)

    try:
        outcome = proof.run(executor, tiles, report)
    except Exception as error:
        last = steps[-1] if steps else "before its first step"
        why = f"{last}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else error!r}"
        return Result(proof.name, str(executor), len(steps), why, raised=type(error).__name__, evidence=proof.evidence)
    return Result(proof.name, str(executor), outcome.count, outcome.failure, evidence=proof.evidence)
