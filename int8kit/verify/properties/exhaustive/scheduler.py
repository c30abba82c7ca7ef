"""The proof of the tile scheduler, over all small launches and the largest ones.

    tile corners   `tile_corner` is a bijection of tile numbers onto tiles
    stream-K       the workers' ranges partition the leftover steps, evenly; the segments of a range partition it; a
                   worker has at most two; `range_owner` finds the range of a step
    launches       each tile of a launch of the Gluon kernels is stored once, with each of its steps, see `launches`

The kernels' own functions run in Python, see `device_python`. On a GPU they are also compiled, and give the same
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import torch

from int8kit.kernels import gemm_wgmma, l2_swizzle, stream_k
from int8kit.spec import DOMAINS, Kernel, TileConfig
from int8kit.verify.examples.limits import K_MAX
from int8kit.verify.executors import Executor
from int8kit.verify.properties.exhaustive import device_kernels
from int8kit.verify.properties.exhaustive.device_python import Array, Language, evaluate, in_programs, plain
from int8kit.verify.properties.exhaustive.launches import Kind, Launch
from int8kit.verify.properties.proof import Outcome, Report

LARGEST_SMS = 256  # more multiprocessors than any supported GPU has
WORKERS, STEPS = range(1, 21), range(1, 17)
GROUPS = (*range(1, 12), 16, 64)
GRIDS = (
    *product(range(1, 14), range(1, 14)),
    *product((1, 2, 9), (64, 65, 127, 128, 129, 1000)),
    *product((64, 65, 127, 128, 129, 1000), (1, 2, 9)),
)  # tile rows and columns
EDGE = 2**31 - 256  # M or N of the largest matrices whose tile numbers are checked
SMALL = {  # of each kernel: whole tiles, and each way to share the last ones
    Kernel.MMA_SYNC: (
        TileConfig(16, 64, 64, 4, 2, 2, Kernel.MMA_SYNC),
        TileConfig(16, 64, 64, 4, 3, 3, Kernel.MMA_SYNC, 1),
        TileConfig(32, 64, 128, 4, 2, 1, Kernel.MMA_SYNC, 2),
    ),
    Kernel.WGMMA: (
        TileConfig(64, 64, 128, 8, 3, 2, Kernel.WGMMA),
        TileConfig(64, 64, 128, 8, 4, 3, Kernel.WGMMA, 1),
        TileConfig(256, 64, 128, 8, 3, 1, Kernel.WGMMA),
        TileConfig(256, 64, 128, 8, 2, 2, Kernel.WGMMA, 1),
    ),
}
SMALL_GRIDS = ((1, 1), (1, 2), (3, 1), (2, 2), (5, 1), (3, 3), (2, 7))
SMALL_SMS = (1, 2, 3, 5, 8, 13)
SMALL_STEPS = (1, 2, 3, 4, 9)
ORDERS = (1, -1, 3)
KINDS: tuple[Kind, ...] = ("accumulators", "output", "swiglu")
Cases = tuple[Array, ...]


def prove(executor: Executor, tiles: tuple[TileConfig, ...], report: Report) -> Outcome:
    """All parts of the proof; on a GPU also with compiled functions."""
    count = 0
    for part in (corners, stream_k_ranges, launches, *([compiled] if executor.on != "interpreter" else [])):
        report(part.__name__)
        outcome = part(executor)
        count += outcome.count
        if outcome.failure:
            return Outcome(count, outcome.failure)
    return Outcome(count)


def corner_cases() -> Iterator[tuple[Cases, int, int]]:
    """(tile, M, N, group_m) of every tile of each launch, and the tile's extents."""
    for block_m, block_n in ((16, 32), (128, 64)):
        lots = []
        for (rows, columns), group_m in product(GRIDS, GROUPS):
            tile = np.arange(rows * columns, dtype=np.int32)
            # a partial tile at each edge, and whole ones
            m, n = rows * block_m - 3 * (group_m % 2), columns * block_n - 5 * (rows % 2)
            lots.append(np.stack([tile, *(np.full_like(tile, value) for value in (m, n, group_m))]))
        yield tuple(np.concatenate(lots, 1)), block_m, block_n


def edge_cases(block: int = 16) -> Cases:
    """The same for some tiles of the tallest and of the widest matrix."""
    lots = []
    count = EDGE // block
    for m, n in ((EDGE, 7), (7, EDGE)):
        tile = np.concatenate([np.arange(1000), np.arange(count - 1000, count)]).astype(np.int32)
        lots.append(np.stack([tile, *(np.full_like(tile, value) for value in (m, n, 8))]))
    return tuple(np.concatenate(lots, 1))


def corners(executor: Executor) -> Outcome:
    """`tile_corner` is a bijection onto the tiles."""
    corner, count = plain(l2_swizzle.tile_corner, Language()), 0
    for cases, block_m, block_n in corner_cases():
        row, column = evaluate(lambda *c, m=block_m, n=block_n: corner(*c, m, n), *cases)
        tile, m, n, group_m = cases
        rows, columns = -(-m // block_m), -(-n // block_n)
        wrong = (row % block_m != 0) | (column % block_n != 0)
        wrong |= (row < 0) | (row // block_m >= rows) | (column < 0) | (column // block_n >= columns)
        # each launch has as many tile numbers as tiles, so no two tile numbers may share a tile
        launch = np.cumsum(tile == 0)
        name = (launch * 1024 + row // block_m) * 1024 + column // block_n
        order = np.argsort(name, kind="stable")
        wrong[order[1:]] |= name[order[1:]] == name[order[:-1]]
        count += len(tile)
        if wrong.any():
            at = int(wrong.argmax())
            of = f"tile {tile[at]} of M = {m[at]}, N = {n[at]}, group_m = {group_m[at]}, {block_m}x{block_n} each"
            return Outcome(count, f"{of}: corner ({row[at]}, {column[at]}) is another tile's or no tile's")
    cases = edge_cases()
    row, column = evaluate(lambda *c: corner(*c, 16, 16), *cases)
    tile, m = cases[0], cases[1]
    wrong = (row != np.where(m == EDGE, tile * 16, 0)) | (column != np.where(m == EDGE, 0, tile * 16))
    if wrong.any():
        at = int(wrong.argmax())
        return Outcome(count, f"tile {tile[at]} of M = {m[at]}: corner ({row[at]}, {column[at]}); int32 overflows")
    return Outcome(count + len(tile))


def leftovers() -> Iterator[tuple[int, int, int]]:
    """(workers, leftover tiles, steps of a tile): all small ones, and the largest of each kernel."""
    for workers, steps in product(WORKERS, STEPS):
        for leftover in range(1, workers):
            yield workers, leftover, steps
    for kernel in SMALL:
        workers = LARGEST_SMS * max(DOMAINS[kernel].stream_k)
        most = -(-K_MAX // min(DOMAINS[kernel].block_k))
        yield from product((workers,), (1, workers - 1), (1, most))


def _columns(rows: list[tuple[int, int, int]], repeats: Array) -> list[Array]:
    """The columns of `rows`, each row `repeats` times, and the number of the repetition."""
    first = np.cumsum(repeats) - repeats
    number = np.arange(repeats.sum()) - np.repeat(first, repeats)
    return [np.repeat(column, repeats).astype(np.int32) for column in np.array(rows).T] + [number.astype(np.int32)]


def stream_k_ranges(executor: Executor) -> Outcome:
    """Ranges, segments and owners."""
    rows = list(leftovers())
    workers, leftover, steps, worker = _columns(rows, np.array([row[0] for row in rows]))
    total = leftover * steps
    start, owner, parts, part = _stream_k_functions()
    lo, hi, segments = evaluate(
        lambda c, t, w, s: (start(c, t, w), start(c + 1, t, w), parts(c, t, w, s)), worker, total, workers, steps
    )
    next_lo = np.append(lo[1:], 0)
    sound = (hi == np.where(worker == workers - 1, total, next_lo)) & ((worker > 0) | (lo == 0))
    sound &= (hi - lo >= total // workers) & (hi - lo <= -(-total // workers))
    sound &= (segments <= 2) & ((segments == 0) == (hi == lo))
    end = lo.copy()  # of the segments so far
    for i in range(2):
        index, k0, k1 = evaluate(lambda c, t, w, s, i=i: part(c, i, t, w, s), worker, total, workers, steps)
        within = (index >= 0) & (index < leftover) & (k0 >= 0) & (k0 < k1) & (k1 <= steps)
        within &= (index * steps + k0 == end) & (index - lo // steps == i)  # the slot where the fix-up looks for it
        sound &= within | (segments <= i)
        end = np.where(segments > i, index * steps + k1, end)
    sound &= end == hi
    if not sound.all():
        at = int(sound.argmin())
        return Outcome(
            len(worker), f"worker {worker[at]} of {workers[at]}, {leftover[at]} leftover tiles of {steps[at]} steps: "
            f"range {lo[at]} to {hi[at]} in {segments[at]} segments is no part of a partition",
        )  # fmt: skip
    workers, leftover, steps, step = _columns(rows, np.array([row[1] * row[2] for row in rows]))
    total = leftover * steps
    (found,) = evaluate(owner, step, total, workers)
    lo, hi = evaluate(lambda c, t, w: (start(c, t, w), start(c + 1, t, w)), found, total, workers)
    sound = (lo <= step) & (step < hi)
    if not sound.all():
        at = int(sound.argmin())
        why = f"owner of step {step[at]} of {total[at]}, {workers[at]} workers: {found[at]}, whose range is {lo[at]} to"
        return Outcome(len(step), f"{why} {hi[at]}")
    return Outcome(len(worker) + len(step))


def _stream_k_functions() -> list[Callable[..., Any]]:
    names, language = ("range_start", "range_owner", "segment_count", "segment"), Language()
    return [plain(getattr(stream_k, name), language) for name in names]


def launches(executor: Executor) -> Outcome:
    """All small launches of the Gluon kernels."""
    count = 0
    for config in (config for configs in SMALL.values() for config in configs):
        for (rows, columns), sms, steps in product(SMALL_GRIDS, SMALL_SMS, SMALL_STEPS):
            missing = 5 if sms % 2 else config.block_m // 2 + 5  # rows of the last tile row
            shape = rows * config.block_m - missing, columns * config.block_n - 4, steps * config.block_k - 16
            for order in ORDERS if config.stream_k else ORDERS[:1]:
                count += 1
                if why := Launch(config, *shape, sms, KINDS[(sms + steps) % 3], order).run():
                    return Outcome(count, why)
    return Outcome(count)


def compiled(executor: Executor) -> Outcome:
    """The compiled functions give the numbers of the functions in Python."""
    parts = (_compiled_corners, _compiled_stream_k, _compiled_work)
    outcomes = [part(executor) for part in parts]
    why = next((outcome.failure for outcome in outcomes if outcome.failure), None)
    return Outcome(sum(outcome.count for outcome in outcomes), why)


def _on(executor: Executor, cases: Cases) -> torch.Tensor:
    return torch.from_numpy(np.stack(cases).astype(np.int32)).to(executor.device)


def _same(name: str, got: torch.Tensor, want: Any, cases: Cases) -> Outcome:
    """got and want: [results, cases]."""
    wrong = got.cpu().numpy() != np.stack(want)
    if not wrong.any():
        return Outcome(wrong.shape[1])
    result, at = (int(i[0]) for i in np.nonzero(wrong))
    case = ", ".join(str(column[at]) for column in cases)
    compiled_value = int(got[result, at])
    return Outcome(
        wrong.shape[1], f"{name} of {case}: result {result} is {compiled_value}, expected {want[result][at]}"
    )


def _compiled_corners(executor: Executor) -> Outcome:
    corner, count = plain(l2_swizzle.tile_corner, Language()), 0
    for cases, m, n in (*corner_cases(), (edge_cases(), 16, 16)):
        want = evaluate(lambda *c, m=m, n=n: corner(*c, m, n), *cases)
        outcome = _same("tile_corner", device_kernels.corners(_on(executor, cases), m, n, executor.arch), want, cases)
        count += outcome.count
        if outcome.failure:
            return Outcome(count, outcome.failure)
    return Outcome(count)


def stream_k_python(cases: Cases) -> tuple[Array, ...]:
    """`device_kernels.stream_k_values` in Python."""
    start, owner, parts, part = _stream_k_functions()
    return evaluate(
        lambda c, i, k, t, w, s: (start(c, t, w), owner(k, t, w), parts(c, t, w, s), *part(c, i, t, w, s)), *cases
    )


def _compiled_stream_k(executor: Executor) -> Outcome:
    rows = list(leftovers())
    workers, leftover, steps, number = _columns(rows, np.array([max(w, t * s) if w <= WORKERS[-1] else w
                                                                for w, t, s in rows]))  # fmt: skip
    total = leftover * steps
    cases = (number % workers, number % 2, number % total, total, workers, steps)
    got = device_kernels.stream_k_values(_on(executor, cases), executor.arch)
    return _same("stream-K of worker, i, step, total, workers, steps", got, stream_k_python(cases), cases)


def work_python(cases: Cases, programs: int, items: int, stream: bool, cooperative: bool) -> Array:
    """`device_kernels.work_items` in Python."""
    language = Language()
    work, item = (in_programs(plain(getattr(gemm_wgmma, name), language), language) for name in ("_work", "_item"))
    pid = np.tile(np.arange(programs, dtype=np.int32), len(cases[0]))
    each = [np.repeat(column, programs) for column in cases]
    every = np.full_like(pid, programs)
    blocks = device_kernels.WORK_BLOCKS
    found = evaluate(lambda p, q, *c: work(p, q, *c, *blocks, stream, cooperative), pid, every, *each)
    columns = list(found)
    for i in range(items):
        columns += evaluate(lambda p, q, *c, i=i: item(p, q, i, *c, stream), pid, every, *found[:4])
    return np.stack(columns, 1).reshape(len(cases[0]), programs, -1)


def _compiled_work(executor: Executor) -> Outcome:
    count, items = 0, 8
    block_m, block_n, block_k = device_kernels.WORK_BLOCKS
    grid = np.array(list(product(range(1, 7), range(1, 5), range(1, 5))), np.int32).T
    cases = (grid[0] * block_m - 5, grid[1] * block_n - 4, grid[2] * block_k - 16)
    for stream, cooperative, programs in product((False, True), (False, True), range(1, 13)):
        got = device_kernels.work_items(_on(executor, cases), programs, items, stream, cooperative, executor.arch)
        want = work_python(cases, programs, items, stream, cooperative)
        number = want[..., 2] + want[..., 3] + want[..., 4]
        used = np.arange(5 + 4 * items) < 5 + 4 * number[..., None]
        wrong = (got.cpu().numpy() != want) & used
        count += wrong[..., 0].size
        if wrong.any():
            case, program, value = (int(i[0]) for i in np.nonzero(wrong))
            return Outcome(count, f"work of program {program} of {programs}, stream_k {stream}, cooperative "
                           f"{cooperative}, tiles {grid[:2, case]}, steps {grid[2, case]}: value {value} is "
                           f"{int(got[case, program, value])}, expected {want[case, program, value]}")  # fmt: skip
    return Outcome(count)
