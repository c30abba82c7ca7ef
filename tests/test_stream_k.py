"""kernels/stream_k.py: the integer arithmetic of stream-K and of the L2 swizzle, as plain Python.

The device functions run on Python integers: their code objects are unchanged, and Python functions replace the few
functions that they use of Triton's language.
"""

from itertools import pairwise
from types import FunctionType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from int8kit import gpus, spec
from int8kit.kernels import l2_swizzle, stream_k
from int8kit.spec import Kernel, TileConfig

LANGUAGE = SimpleNamespace(
    cdiv=lambda a, b: -(-a // b), where=lambda condition, a, b: a if condition else b, minimum=min, maximum=max
)


def plain(*functions):
    """Device functions as Python functions, which call each other."""
    names = {"gl": LANGUAGE, "tl": LANGUAGE}
    for function in functions:
        names[function.fn.__name__] = FunctionType(function.fn.__code__, names)
    return [names[function.fn.__name__] for function in functions]


share, owner, parts_of, part = plain(
    stream_k.range_start, stream_k.range_owner, stream_k.segment_count, stream_k.segment
)
[tile_corner] = plain(l2_swizzle.tile_corner)


@st.composite
def leftovers(draw):
    """Workers, leftover tiles (fewer than workers), and steps per tile."""
    workers = draw(st.integers(2, 200))
    return workers, draw(st.integers(1, workers - 1)), draw(st.integers(1, 300))


@given(leftovers())
def test_ranges_are_even_and_cover_every_step_once(case):
    workers, leftover, steps = case
    total = leftover * steps
    starts = [share(worker, total, workers) for worker in range(workers + 1)]
    assert (starts[0], starts[-1]) == (0, total)
    sizes = {b - a for a, b in pairwise(starts)}
    assert sizes <= {total // workers, -(-total // workers)}


@given(leftovers(), st.data())
def test_owner_is_the_worker_with_the_step(case, data):
    workers, leftover, steps = case
    total = leftover * steps
    step = data.draw(st.integers(0, total - 1))
    worker = owner(step, total, workers)
    assert share(worker, total, workers) <= step < share(worker + 1, total, workers)


@given(leftovers())
def test_segments_cover_every_step_of_every_tile_once(case):
    """At most two segments per worker, each with a slot of its own, which the last worker of the tile finds."""
    workers, leftover, steps = case
    total = leftover * steps
    covered = [0] * total
    contributors = [set() for _ in range(leftover)]
    for worker in range(workers):
        count = parts_of(worker, total, workers, steps)
        assert count <= 2
        for i in range(count):
            index, first, last = part(worker, i, total, workers, steps)
            assert 0 <= first < last <= steps
            assert i == index - share(worker, total, workers) // steps  # the slot where the fix-up looks for it
            contributors[index].add(worker)
            for step in range(index * steps + first, index * steps + last):
                covered[step] += 1
    assert covered == [1] * total
    for index, found in enumerate(contributors):
        first, last = owner(index * steps, total, workers), owner(index * steps + steps - 1, total, workers)
        nonempty = [w for w in range(first, last + 1) if share(w + 1, total, workers) > share(w, total, workers)]
        assert found == set(nonempty)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 64))
def test_swizzle_goes_down_the_columns_of_groups_of_tile_rows(tiles_m, tiles_n, group_m):
    m, n = 16 * tiles_m - 3, 32 * tiles_n - 5
    corners = [tile_corner(tile, m, n, group_m, 16, 32) for tile in range(tiles_m * tiles_n)]
    every = [(16 * row, 32 * column) for row in range(tiles_m) for column in range(tiles_n)]
    assert corners == sorted(every, key=lambda corner: (corner[0] // 16 // group_m, corner[1], corner[0]))


@pytest.mark.parametrize("kernel", [kernel for kernel in Kernel if any(spec.DOMAINS[kernel].stream_k)])
def test_products_of_the_largest_launch_fit_int32(kernel):
    """For the longest K, the shortest step, and a GPU with 256 multiprocessors; the known ones have fewer."""
    assert max(gpu.sms for gpu in gpus.GPUS.values()) <= 256
    domain = spec.DOMAINS[kernel]
    workers = 256 * max(domain.stream_k)
    total = (workers - 1) * -(-spec.K_MAX // min(domain.block_k))
    assert total * workers < 2**31


def test_launch_buffers(monkeypatch):
    monkeypatch.setattr(stream_k, "multiprocessors", lambda device: 10)
    cpu, config = torch.device("cpu"), TileConfig(64, 128, 64, 4, 3, kernel=Kernel.MMA_SYNC, stream_k=2)
    workers, leftover, slots, done = stream_k.stream_k(47, config, cpu, pieces=2)
    assert (workers, leftover) == (20, 7)
    assert (slots.shape, slots.dtype) == ((40, 64 * 128), torch.int32)
    assert done.tolist() == [0] * 14
    workers, leftover, slots, done = stream_k.stream_k(40, config, cpu)
    assert (workers, leftover, slots.shape[0], done.tolist()) == (20, 0, 1, [0])
    assert stream_k.stream_k(47, TileConfig(64, 128, 64, 4, 3, kernel=Kernel.MMA_SYNC), cpu) is None
