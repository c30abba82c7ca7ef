"""Verification of int8kit's own kernels: one property over a database's configurations, or over given ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from int8kit.database.database import Choice, Database
from int8kit.database.schema import Entry
from int8kit.spec import GemmShape, TileConfig, default_config
from int8kit.verify import implementations
from int8kit.verify.examples.fixed import SMALL_TILES
from int8kit.verify.examples.strategies import Draw
from int8kit.verify.executors import Executor
from int8kit.verify.properties import entries
from int8kit.verify.properties.budget import budget
from int8kit.verify.properties.entries import Stamps
from int8kit.verify.properties.registry import PROPERTIES
from int8kit.verify.runner import Result, forbid_fallback, run_property

DEFAULT_TILES = (*SMALL_TILES, default_config(GemmShape(1024, 1, 1)))


def names(executor: Executor, database: Database, unlisted: Sequence[Choice] = ()) -> list[str]:
    """The properties that apply, in the order in which they are run."""
    kernels = implementations.int8kit(executor, SMALL_TILES)
    found = [row.name for row in PROPERTIES.values() if row.why_not(kernels) is None]
    return [*found, entries.NAME] if database.entries or unlisted else found


def run(
    name: str,
    executor: Executor,
    database: Database,
    *,
    examples: int | None = None,
    random_seed: int = 0,
    more: Iterable[TileConfig] = (),
    kept: Iterable[Draw] = (),
    unlisted: Sequence[Choice] = (),
    on_example: Callable[[object], None] = lambda _: None,
) -> tuple[Result, Stamps]:
    """Verify one property of `names`: its result and, for "entries", the stamps of the entries that passed.

    The tiles come from the database, DEFAULT_TILES and `more`. kept: examples that failed in earlier runs. unlisted:
    the configurations of shapes without an entry, checked like entries. on_example is given each example before it is
    tried.
    """
    if name == entries.NAME:
        with forbid_fallback():
            return entries.run(executor, database, unlisted, on_example)
    served: tuple[Entry | Choice, ...] = (*database.entries, *unlisted)
    tiles = {*DEFAULT_TILES, *(one.config for one in served), *more}
    result = run_over_tiles(
        name, executor, tiles, examples=examples, random_seed=random_seed, kept=kept, on_example=on_example
    )
    return result, {}


def run_over_tiles(
    name: str,
    executor: Executor,
    tiles: Iterable[TileConfig] = DEFAULT_TILES,
    *,
    examples: int | None = None,
    random_seed: int = 0,
    kept: Iterable[Draw] = (),
    on_example: Callable[[object], None] = lambda _: None,
) -> Result:
    """Verify one property over the configurations that `executor` runs, without a database."""
    row = PROPERTIES[name]
    limits = budget(executor, examples).divided(row.cost)
    runnable = tuple(sorted({config for config in tiles if executor.runs(config)}))
    kernels = implementations.int8kit(executor, runnable)
    with forbid_fallback():
        return run_property(
            name,
            executor,
            row.strategy(runnable, limits),
            lambda example: row.check(example, kernels),
            examples=limits.examples,
            random_seed=random_seed,
            always=(*(d for d in kept if executor.runs(d.config)), *row.always(runnable, limits)),
            on_example=on_example,
        )
