"""tune/space.py: its configurations are legal and distinct; the illegal ones would not run."""

import random
from dataclasses import replace
from itertools import product

import pytest

from int8kit import gpus
from int8kit.spec import (
    DOMAINS,
    GROUP_M,
    GemmShape,
    Kernel,
    SwigluShape,
    TileConfig,
    default_config,
    kernels_of,
    shared_memory_bound,
    why_illegal,
)
from int8kit.tune import space
from int8kit.tune.space import KernelVariant

LIMITS = {(gpu.arch, gpu.shared_memory): gpu for gpu in gpus.GPUS.values()}  # of which the space depends


@pytest.mark.parametrize("gpu", LIMITS.values(), ids=lambda g: g.alias)
def test_the_space_is_legal_distinct_and_contains_the_default(gpu):
    configs = space.legal(gpu)
    assert len(configs) == len(set(configs)) > 1000
    assert set(space.seeds(gpu)) <= set(configs)
    assert all(why_illegal(c, arch=gpu.arch, shared_memory=gpu.shared_memory) is None for c in configs)
    for m in (1, 16, 64, 100, 4096):
        assert default_config(GemmShape(m, 4608, 4608)) in space.candidates(GemmShape(m, 4608, 4608), gpu)


def _pruned(gpu):
    """Illegal configurations of the kernels' domains, by reason."""
    found = {"shared memory": [], "accumulators": [], "warps": []}
    for kernel in kernels_of(gpu.arch):
        d = DOMAINS[kernel]
        for *tile, stream_k in product(d.block_m, d.block_n, d.block_k, d.num_warps, d.num_stages, d.stream_k):
            config = TileConfig(*tile, GROUP_M, kernel, stream_k)
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
def test_illegal_configurations_would_not_run(compilers, alias):
    """Compiled nevertheless, they take more shared memory than the GPU has, or spill, or have warps without work.

    Of the configurations that should spill, those with the shortest steps are compiled. They need the fewest registers
    beside the accumulators, and compile the fastest.
    """
    gpu = gpus.get(alias)
    pruned = _pruned(gpu)
    tight = sorted(  # nearest to the limit first; among equals the fastest to compile: few accumulators per thread
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
    assert len(spilling) == (3 if gpu.arch < 90 else 2)  # the wgmma kernel has none
    compilations = compilers.compile_all(gpu.arch, [space.kernel_variant(c, True) for c in {*over, *spilling}])
    for config in over:
        assert compilations[space.kernel_variant(config, True)].shared_bytes > gpu.shared_memory, config
    for config in spilling:
        assert compilations[space.kernel_variant(config, True)].spill_bytes > 0, config
    for config in pruned["warps"]:  # a warp computes at least 16 x 8, in the mma_sync kernel 16 x 16
        width = 8 if config.kernel is Kernel.TRITON else 16
        assert config.block_m * config.block_n < 16 * width * config.num_warps or config.block_n < width * 8, config


@pytest.mark.parametrize("alias", ["rtx3090", "h200"])
def test_neighbours_are_legal_and_reach_everything(alias):
    gpu = gpus.get(alias)
    for config in random.Random(0).sample(space.legal(gpu), 50):
        for other in space.neighbours(config, gpu):
            assert replace(other, group_m=GROUP_M) in space.legal(gpu)
            assert other != config
            assert config in space.neighbours(other, gpu)
    for kernel in kernels_of(gpu.arch):
        inside = {c for c in space.legal(gpu) if c.kernel is kernel}
        reached, edge = set(), {min(inside)}
        while edge:
            reached |= edge
            edge = {replace(n, group_m=GROUP_M) for c in edge for n in space.neighbours(c, gpu)} - reached
        assert reached == inside


def test_candidates_for_few_rows_and_for_an_odd_k():
    gpu = gpus.get("rtx3090")
    assert max(c.block_m for c in space.candidates(GemmShape(1, 4608, 4608), gpu)) == 64
    assert {c.kernel for c in space.candidates(GemmShape(64, 4608, 4600), gpu)} == {Kernel.TRITON}


def test_a_kernel_is_shared_by_configurations_and_shapes():
    """Only the Triton kernel is compiled differently where K is not a multiple of block_k. SwiGLU is another kernel."""
    triton, mma_sync = TileConfig(128, 128, 64, 8, 4), TileConfig(128, 128, 64, 4, 3, kernel=Kernel.MMA_SYNC)
    even, odd = GemmShape(64, 64, 4608), GemmShape(64, 64, 4624)
    assert space.variant_of(triton, even) == space.variant_of(replace(triton, group_m=16), even)
    assert space.variant_of(triton, even) == KernelVariant(triton, True)
    assert space.variant_of(triton, odd) == KernelVariant(triton, False)
    assert space.variant_of(mma_sync, even) == space.variant_of(mma_sync, odd) == KernelVariant(mma_sync)
    gated = SwigluShape(64, 64, 4608)
    assert space.variant_of(mma_sync, gated) == KernelVariant(mma_sync, swiglu=True)
