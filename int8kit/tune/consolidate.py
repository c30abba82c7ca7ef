"""Fewer distinct kernels for the shapes of a run, which are then compiled and reviewed.

The winners of two shapes are often two tiles within the noise of each other. Each entry of a run holds its finalists
(`Entry.runners_up`). An entry may give its shape to any of them that takes at most 1 + SLACK times the best one's time.

`reduce` covers all shapes with few kernels. It is greedy: it takes the kernel that serves most of the remaining shapes,
and among equals the one that costs these shapes least. The result is at most ln(shapes) + 1 times the minimum (Chvatal
1979). An exact solver was not worth it, since no run needed more than a dozen tiles.

Two configurations that differ in group_m only share a kernel: group_m is an argument at run time.
"""

from __future__ import annotations

from collections.abc import Sequence

from int8kit.database.schema import Entry, RunnerUp
from int8kit.spec import TIE, TileConfig
from int8kit.tune.space import without_swizzle

SLACK = TIE


def variants(entries: Sequence[Entry]) -> set[TileConfig]:
    """The distinct kernels that `entries` need, each as a configuration."""
    return {without_swizzle(entry.config) for entry in entries}


def reduce(entries: Sequence[Entry], slack: float = SLACK) -> list[Entry]:
    """`entries` in their order, with configurations of fewer kernels. Entries without a time do not change."""
    options = [_options(entry, slack) for entry in entries]
    pending = {i for i, by_kernel in enumerate(options) if by_kernel}
    chosen: set[TileConfig] = set()

    def cost(kernel: TileConfig) -> tuple[int, float, TileConfig]:
        served = [i for i in pending if kernel in options[i]]
        return -len(served), sum(options[i][kernel].time_us / _best(options[i]) for i in served), kernel

    while pending:
        best = min({kernel for i in pending for kernel in options[i]}, key=cost)
        chosen.add(best)
        pending = {i for i in pending if best not in options[i]}
    timed = [entry for entry, by_kernel in zip(entries, options, strict=True) if by_kernel]
    if len(chosen) >= len(variants(timed)):
        return list(entries)
    reduced = []
    for entry, by_kernel in zip(entries, options, strict=True):
        allowed = [option for kernel, option in by_kernel.items() if kernel in chosen]
        reduced.append(_with_option(entry, min(allowed, key=lambda o: o.time_us)) if allowed else entry)
    return reduced


def _options(entry: Entry, slack: float) -> dict[TileConfig, RunnerUp]:
    """For each kernel, the fastest configuration that the entry's shape may take."""
    if entry.time_us is None:
        return {}
    finalists = [_winner(entry, entry.time_us), *(entry.runners_up or ())]
    bound = min(option.time_us for option in finalists) * (1 + slack)
    by_kernel: dict[TileConfig, RunnerUp] = {}
    for option in sorted(finalists, key=lambda option: option.time_us):
        # the winner may be a default that won a tie, and so may lie beyond the bound
        if option.time_us <= bound or option.config == entry.config:
            by_kernel.setdefault(without_swizzle(option.config), option)
    return by_kernel


def _best(options: dict[TileConfig, RunnerUp]) -> float:
    return min(option.time_us for option in options.values())


def _winner(entry: Entry, time_us: float) -> RunnerUp:
    return RunnerUp(
        config=entry.config, kernel=entry.kernel, resources=entry.resources, model_us=entry.model_us, time_us=time_us,
        p20_us=entry.p20_us, p80_us=entry.p80_us,
    )  # fmt: skip


def _with_option(entry: Entry, option: RunnerUp) -> Entry:
    """`entry` with the configuration of `option`; the previous winner becomes a runner-up."""
    if option.config == entry.config:
        return entry
    assert entry.time_us is not None
    others = [o for o in entry.runners_up or () if o.config != option.config]
    others.append(_winner(entry, entry.time_us))
    update = {name: getattr(option, name) for name in RunnerUp.model_fields}
    update |= {"runners_up": tuple(sorted(others, key=lambda o: o.time_us)), "verified": None}
    return entry.model_copy(update=update)
