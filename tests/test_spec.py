"""spec.py and errors.py: shapes, tile configurations, legality, ids, the error tree."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from int8kit import errors, spec
from int8kit.errors import ShapeError, UnknownName
from int8kit.spec import GemmShape, Kernel, Schedule, Source, TileConfig, why_illegal

RTX3090 = {"arch": 86, "shared_memory": 101376}
H200 = {"arch": 90, "shared_memory": 232448}


@pytest.mark.parametrize(("m", "n", "k"), [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-4, 1, 1)])
def test_shape_refuses_extents_below_1(m, n, k):
    with pytest.raises(ShapeError, match="at least 1"):
        GemmShape(m, n, k)


def test_shape_refuses_k_beyond_int32():
    GemmShape(1, 1, spec.K_MAX)
    assert 128 * 128 * spec.K_MAX < 2**31 <= 128 * 128 * (spec.K_MAX + 1)
    with pytest.raises(ShapeError, match=r"131072: .*1 to 131071"):
        GemmShape(1, 1, spec.K_MAX + 1)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (TileConfig(96, 128, 64, 4, 3), "block_m = 96: .* 16, 32"),
        (TileConfig(128, 512, 64, 4, 3), "block_n = 512"),
        (TileConfig(128, 128, 16, 4, 3), "block_k = 16"),
        (TileConfig(128, 128, 64, 3, 3), "num_warps = 3"),
        (TileConfig(128, 128, 64, 4, 1), "num_stages = 1"),
        (TileConfig(128, 128, 64, 4, 3, 0), "group_m = 0"),
        (TileConfig(256, 256, 64, 8, 3), "256 accumulators a thread"),
        (TileConfig(16, 16, 64, 8, 3), "1 accumulators a thread"),
        (TileConfig(128, 256, 128, 8, 4), "147456 bytes of shared memory: a block has 101376"),
        (TileConfig(128, 128, 128, 8, 6, kernel=Kernel.WGMMA), "sm_90 only, not on sm_86"),
        (TileConfig(128, 128, 64, 4, 3, kernel=Kernel.TRITON, stream_k=1), r"stream_k = 1: .*\b0\b"),
        (TileConfig(128, 128, 128, 4, 4, kernel=Kernel.MMA_SYNC), "131072 bytes of shared memory"),
        (TileConfig(16, 64, 128, 8, 4, kernel=Kernel.MMA_SYNC), "8 warps: a warp needs 16 rows and 16 columns"),
        (TileConfig(256, 256, 64, 8, 2, kernel=Kernel.MMA_SYNC), "256 accumulators a thread"),
    ],
)
def test_why_illegal_names_the_reason(config, reason):
    assert re.search(reason, why_illegal(config, **RTX3090))


def test_legality_depends_on_the_gpu():
    big = TileConfig(128, 256, 128, 8, 4)
    assert why_illegal(big, **RTX3090) is not None
    assert why_illegal(big, **H200) is None


@pytest.mark.parametrize("m", [1, 16, 17, 64, 65, 4296])
def test_default_is_legal_everywhere(m):
    config = spec.default_config(GemmShape(m, 4608, 4608))
    assert why_illegal(config, **RTX3090) is None
    assert why_illegal(config, **H200) is None


def _of(kernel):
    domain = spec.DOMAINS[kernel]
    values = (domain.block_m, domain.block_n, domain.block_k, domain.num_warps, domain.num_stages)
    schedules = (None, *Schedule) if kernel is Kernel.WGMMA else (None,)
    return st.builds(
        TileConfig, *map(st.sampled_from, values), st.integers(1, 64), st.just(kernel),
        st.sampled_from(domain.stream_k), st.sampled_from(schedules),
    )  # fmt: skip


CONFIGS = st.one_of([_of(kernel) for kernel in spec.Kernel])


@given(CONFIGS)
def test_warp_grid_covers_the_warps(config):
    m, n = spec.warp_grid(config)
    assert m * n == config.num_warps


@given(CONFIGS, CONFIGS)
def test_ids_are_equal_for_equal_configurations_only(a, b):
    assert (a.id == b.id) is (a == b)
    assert len(a.id) == 12


def test_ids_never_change():
    """Files contain ids: a new display text or a new field with a default must not change them."""
    assert TileConfig(128, 128, 64, 8, 4).id == "e77fa9334873"
    assert TileConfig(256, 128, 128, 8, 4, 12, Kernel.WGMMA, 1).id == "165dc9ca317b"
    assert [kernel.value for kernel in Kernel] == ["triton", "mma_sync", "wgmma"]
    assert [operation.value for operation in spec.Operation] == ["gemm", "swiglu"]


def test_text_of_a_configuration_shows_an_unusual_schedule():
    usual = TileConfig(256, 64, 128, 8, 4, kernel=Kernel.WGMMA)
    assert str(usual) == "wgmma 256x64x128 w8 s4 g8"
    assert str(replace(usual, schedule=Schedule.PINGPONG)) == "wgmma 256x64x128 w8 s4 g8 pingpong"
    assert str(replace(usual, schedule=Schedule.COOPERATIVE)) == str(usual)


def test_errors_form_one_tree():
    assert issubclass(ShapeError, errors.InputError)
    assert errors.CheckFailed.exit_status == 1
    assert errors.InputError.exit_status == 2
    assert str(UnknownName("gpu", "x", ["b", "a"], "try c")) == "unknown gpu 'x'; expected a, b; try c"
    names = [f"name-{number}" for number in range(76)]
    assert len(str(UnknownName("fault", "name", names)).split(", ")) == 6


def test_sources_are_ordered():
    assert Source.MEASURED.strength > Source.PROXY.strength > Source.MODELLED.strength


@pytest.mark.parametrize(
    ("arch", "shared_memory"), [(80, 166912), (86, 101376), (89, 101376), (90, 232448), (120, 101376)]
)
@pytest.mark.parametrize("m", [1, 16, 17, 64, 65, 40000])
def test_default_of_an_architecture_is_its_fastest_kernel(arch, shared_memory, m):
    fast = Kernel.WGMMA if arch == 90 else Kernel.MMA_SYNC

    def kernel(n=4608, k=4608, memory=shared_memory, operation=spec.Operation.GEMM):
        config = spec.architecture_default(GemmShape(m, n, k), arch, memory, operation)
        assert why_illegal(config, arch=arch, shared_memory=shared_memory) is None
        return config.kernel

    assert kernel() is fast
    assert kernel(k=4600) is Kernel.TRITON  # 4600 is no multiple of 16 bytes
    assert kernel(n=4612) is (Kernel.TRITON if arch == 90 else fast)  # rows of 9224 bytes, which TMA cannot write
    assert kernel(n=4616, operation=spec.Operation.SWIGLU) is (Kernel.TRITON if arch == 90 else fast)
    assert kernel(memory=49152) is Kernel.TRITON  # no room for the ring


def test_architectures_without_a_known_fastest_kernel_take_the_plain_one():
    shape = GemmShape(100, 512, 512)
    for arch in (100, 101, 103, 110):
        assert spec.architecture_default(shape, arch, 232448) == spec.default_config(shape)
