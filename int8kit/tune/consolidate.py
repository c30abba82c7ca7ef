"""The fewest kernels that serve all shapes well: what a run compiles, and a person reviews.

Two shapes' winners are often two tiles within the noise of each other. Each entry of a run holds its finalists
(`Entry.runners_up`); an entry may give its shape to any of them that takes at most 1 + SLACK times the best one's time.
`reduce` picks few kernels such that every shape has one it may take: greedily the kernel that most of the shapes left
may take, of equals the one that costs them least. That is at most ln(shapes) + 1 times the fewest (Chvatal 1979); the
exact minimum was not worth a solver, since a dozen tiles are the most that was seen.

Two configurations that differ in group_m are one kernel: it is an argument at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from int8kit.database.schema import Entry, RunnerUp
from int8kit.spec import TIE, TileConfig

SLACK = TIE


def kernel(config: TileConfig) -> TileConfig:
    """What is compiled: `config` without what it takes at run time."""
    return replace(config, group_m=1)


def kernels(entries: Sequence[Entry]) -> set[TileConfig]:
    """The distinct kernels that `entries` need."""
    return {kernel(entry.config) for entry in entries}


def reduce(entries: Sequence[Entry], slack: float = SLACK) -> list[Entry]:
    """`entries` in their order, each under a configuration of the portfolio; untimed ones stay as they are."""
    options = [_options(entry, slack) for entry in entries]
    left = {i for i, found in enumerate(options) if found}
    chosen: set[TileConfig] = set()

    def merit(name: TileConfig) -> tuple[int, float, TileConfig]:
        served = [i for i in left if name in options[i]]
        return -len(served), sum(options[i][name].time_us / _best(options[i]) for i in served), name

    while left:
        best = min({name for i in left for name in options[i]}, key=merit)
        chosen.add(best)
        left = {i for i in left if best not in options[i]}
    if len(chosen) >= len(kernels([entry for entry, found in zip(entries, options, strict=True) if found])):
        return list(entries)
    reduced = []
    for entry, found in zip(entries, options, strict=True):
        legal = [option for name, option in found.items() if name in chosen]
        reduced.append(_under(entry, min(legal, key=lambda o: o.time_us)) if legal else entry)
    return reduced


def _options(entry: Entry, slack: float) -> dict[TileConfig, RunnerUp]:
    """By kernel, the fastest configuration that the entry's shape may take."""
    if entry.time_us is None:
        return {}
    all_ = [_winner(entry, entry.time_us), *(entry.runners_up or ())]
    bound = min(option.time_us for option in all_) * (1 + slack)
    found: dict[TileConfig, RunnerUp] = {}
    for option in sorted(all_, key=lambda option: option.time_us):
        # the winner may be a default that is kept within a margin
        if option.time_us <= bound or option.config == entry.config:
            found.setdefault(kernel(option.config), option)
    return found


def _best(options: dict[TileConfig, RunnerUp]) -> float:
    return min(option.time_us for option in options.values())


def _winner(entry: Entry, time_us: float) -> RunnerUp:
    return RunnerUp(
        config=entry.config, kernel=entry.kernel, resources=entry.resources, model_us=entry.model_us, time_us=time_us,
        p20_us=entry.p20_us, p80_us=entry.p80_us,
    )  # fmt: skip


def _under(entry: Entry, option: RunnerUp) -> Entry:
    """`entry` with `option` for its configuration, which takes its place among the others."""
    if option.config == entry.config:
        return entry
    assert entry.time_us is not None
    others = [o for o in entry.runners_up or () if o.config != option.config]
    others.append(_winner(entry, entry.time_us))
    update = {name: getattr(option, name) for name in RunnerUp.model_fields}
    update |= {"runners_up": tuple(sorted(others, key=lambda o: o.time_us)), "verified": None}
    return entry.model_copy(update=update)
