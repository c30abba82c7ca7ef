"""tune/space.py: legal, unique, and what legality leaves out would not have run."""

import random
from dataclasses import replace
from itertools import product

import pytest

from int8kit import gpus
from int8kit.spec import (
    DOMAINS,
    GemmShape,
    Kernel,
    TileConfig,
    default_config,
    kernels_of,
    shared_memory_bound,
    why_illegal,
)
from int8kit.tune import space


@pytest.mark.parametrize("gpu", gpus.GPUS.values(), ids=lambda g: g.alias)
def test_space_is_legal_unique_and_holds_the_default(gpu):
    configs = space.legal(gpu)
    assert len(configs) == len(set(configs)) > 1000
    assert set(space.seeds(gpu)) <= set(configs)
    assert all(why_illegal(c, arch=gpu.arch, shared_memory=gpu.shared_memory) is None for c in configs)
    for m in (1, 16, 64, 100, 4096):
        assert default_config(GemmShape(m, 4608, 4608)) in space.candidates(GemmShape(m, 4608, 4608), gpu)


def _pruned(gpu):
    """What legality leaves out of the kernels' domains, by reason."""
    found = {"shared memory": [], "accumulators": [], "warps": []}
    for kernel in kernels_of(gpu.arch):
        d = DOMAINS[kernel]
        for *tile, stream_k in product(d.block_m, d.block_n, d.block_k, d.num_warps, d.num_stages, d.stream_k):
            config = TileConfig(*tile, 8, kernel, stream_k)
            reason = why_illegal(config, arch=gpu.arch, shared_memory=gpu.shared_memory)
            if reason is None:
                continue
            if "of shared memory" in reason:
                found["shared memory"].append(config)
            else:
                assert "accumulators a thread" in reason or "a warp needs" in reason, reason
                found["accumulators" if "at most 128" in reason else "warps"].append(config)
    return found


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.xdist_group("compilers")
@pytest.mark.parametrize("alias", ["rtx3090", "a100", "h200"])
def test_what_legality_leaves_out_would_not_run(compilers, alias):
    """Compiled all the same: it takes more shared memory than there is, or spills; or has warps without a part.

    Of what should spill, the kernels with the shortest steps: these need the fewest registers beside the accumulators,
    and are compiled the fastest.
    """
    gpu = gpus.get(alias)
    pruned = _pruned(gpu)
    tight = sorted(  # of those that are equally near, what compiles fast: few accumulators a thread
        pruned["shared memory"],
        key=lambda c: (shared_memory_bound(c, arch=gpu.arch), c.block_m * c.block_n / c.num_warps),
    )
    over = [c for kernel in kernels_of(gpu.arch) for c in [c for c in tight if c.kernel is kernel][:3]]
    many = [c for c in pruned["accumulators"] if c.block_m * c.block_n == 256 * 32 * c.num_warps and c.num_warps >= 4]
    spilling = []
    for kernel in kernels_of(gpu.arch):
        of = [c for c in many if c.kernel is kernel and c.block_k == min(DOMAINS[kernel].block_k)]
        spilling += random.Random(0).sample(of, min(2 if kernel is Kernel.TRITON else 1, len(of)))
    assert len(over) == 6
    assert len(spilling) == (3 if gpu.arch < 90 else 2)  # of wgmma's there are none
    outcomes = compilers.compile_all(gpu.arch, [(c, True) for c in {*over, *spilling}])
    for config in over:
        assert outcomes[config, True].shared_bytes > gpu.shared_memory, config
    for config in spilling:
        assert outcomes[config, True].spill_bytes > 0, config
    for config in pruned["warps"]:  # a warp makes at least 16 x 8, of the mma_sync kernel 16 x 16
        width = 8 if config.kernel is Kernel.TRITON else 16
        assert config.block_m * config.block_n < 16 * width * config.num_warps or config.block_n < width * 8, config


@pytest.mark.parametrize("alias", ["rtx3090", "h200"])
def test_neighbours_are_legal_and_reach_everything(alias):
    gpu = gpus.get(alias)
    for config in random.Random(0).sample(space.legal(gpu), 50):
        for other in space.neighbours(config, gpu):
            assert replace(other, group_m=8) in space.legal(gpu)
            assert other != config
            assert config in space.neighbours(other, gpu)
    for kernel in kernels_of(gpu.arch):
        inside = {c for c in space.legal(gpu) if c.kernel is kernel}
        reached, edge = set(), {min(inside)}
        while edge:
            reached |= edge
            edge = {replace(n, group_m=8) for c in edge for n in space.neighbours(c, gpu)} - reached
        assert reached == inside


def test_a_tile_for_few_rows_or_an_odd_k():
    gpu = gpus.get("rtx3090")
    assert max(c.block_m for c in space.candidates(GemmShape(1, 4608, 4608), gpu)) == 64
    assert {c.kernel for c in space.candidates(GemmShape(64, 4608, 4600), gpu)} == {Kernel.TRITON}
