import pytest
from hypothesis import given
from hypothesis import strategies as st

from int8kit import spec
from int8kit.spec import ConfigError, GemmShape, Kernel, Plan, ShapeError, Source, TileConfig, UnknownName, why_illegal

RTX3090 = {"arch": 86, "shared_memory": 101376}
H200 = {"arch": 90, "shared_memory": 232448}


@pytest.mark.parametrize(("m", "n", "k"), [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-4, 1, 1)])
def test_shape_needs_positive_extents(m, n, k):
    with pytest.raises(ShapeError, match="must be at least 1"):
        GemmShape(m, n, k)


def test_shape_refuses_k_beyond_int32():
    GemmShape(1, 1, spec.K_MAX)
    assert 128 * 128 * spec.K_MAX < 2**31 <= 128 * 128 * (spec.K_MAX + 1)
    with pytest.raises(ShapeError, match="131072: legal is 1 to 131071"):
        GemmShape(1, 1, spec.K_MAX + 1)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (TileConfig(96, 128, 64, 4, 3), "block_m = 96: legal for the pointer kernel are 16, 32"),
        (TileConfig(128, 512, 64, 4, 3), "block_n = 512"),
        (TileConfig(128, 128, 16, 4, 3), "block_k = 16"),
        (TileConfig(128, 128, 64, 3, 3), "num_warps = 3"),
        (TileConfig(128, 128, 64, 4, 1), "num_stages = 1"),
        (TileConfig(128, 128, 64, 4, 3, 0), "group_m = 0"),
        (TileConfig(256, 256, 64, 8, 3), "256 accumulators a thread"),
        (TileConfig(16, 16, 64, 8, 3), "1 accumulators a thread"),
        (TileConfig(128, 256, 128, 8, 4), "147456 bytes of shared memory: a block has 101376"),
        (TileConfig(128, 128, 128, 8, 6, kernel=Kernel.HOPPER), "sm_90 only, not on sm_86"),
        (TileConfig(128, 128, 64, 4, 3, kernel=Kernel.POINTER, stream_k=1), "stream_k = 1: legal for the pointer"),
        (TileConfig(128, 128, 128, 4, 4, kernel=Kernel.AMPERE), "131072 bytes of shared memory"),
        (TileConfig(16, 64, 128, 8, 4, kernel=Kernel.AMPERE), "8 warps: a warp needs 16 rows and 16 columns"),
        (TileConfig(256, 256, 64, 8, 2, kernel=Kernel.AMPERE), "256 accumulators a thread"),
    ],
)
def test_illegal_says_why(config, reason):
    assert reason in (why_illegal(config, **RTX3090) or "")


def test_legality_depends_on_the_card():
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
    return st.builds(
        TileConfig, *map(st.sampled_from, values), st.integers(1, 64), st.just(kernel), st.sampled_from(domain.stream_k)
    )


CONFIGS = st.one_of([_of(kernel) for kernel in spec.Kernel])


@given(CONFIGS)
def test_warp_grid_covers_the_warps(config):
    m, n = spec.warp_grid(config)
    assert m * n == config.num_warps


@given(st.dictionaries(st.integers(1, 40000), CONFIGS, max_size=5))
def test_plan_survives_an_operators_schema(rungs):
    plan = Plan(tuple(sorted(rungs.items())))
    assert Plan.from_ints(plan.to_ints()) == plan


def test_plan_chooses_nearest_in_log():
    low, high = TileConfig(64, 64, 64, 4, 3), TileConfig(128, 128, 64, 8, 3)
    plan = Plan(((1000, low), (9000, high)))
    assert plan.choose(GemmShape(1000, 8, 8)) == low
    assert plan.choose(GemmShape(2999, 8, 8)) == low
    assert plan.choose(GemmShape(3001, 8, 8)) == high
    for far in (1, 249, 36001):
        assert plan.choose(GemmShape(far, 8, 8)) == spec.default_config(GemmShape(far, 8, 8))
    assert Plan().choose(GemmShape(5, 8, 8)) == spec.default_config(GemmShape(5, 8, 8))


def test_plan_of_a_wrong_length():
    with pytest.raises(ConfigError, match="multiple of 9"):
        Plan.from_ints([1, 2, 3])


def test_errors_form_one_tree():
    assert issubclass(ShapeError, spec.InputError)
    assert spec.CheckFailed.exit_status == 1
    assert spec.InputError.exit_status == 2
    assert "known: a, b; try c" in str(UnknownName("card", "x", ["b", "a"], "try c"))


def test_sources_are_ordered():
    assert Source.MEASURED.strength > Source.PROXY.strength > Source.MODELLED.strength
