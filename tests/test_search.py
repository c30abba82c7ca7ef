"""tune/search.py: which configurations are timed next, and which one wins."""

from dataclasses import replace

import pytest

from int8kit import gpus
from int8kit.database.database import Database
from int8kit.database.schema import Resources
from int8kit.errors import CheckFailed
from int8kit.spec import GemmShape, Kernel, Operation, Source, SwigluShape, TileConfig, default_config
from int8kit.timing.interleave import Times
from int8kit.tune import search, space
from int8kit.tune.search import RoundTimes
from int8kit.tune.space import KernelVariant, variant_of

RTX3090, H200 = gpus.get("rtx3090"), gpus.get("h200")
SHAPE = GemmShape(4296, 4608, 4608)
FREE = Resources(registers=128, spill_bytes=0, shared_bytes=49152)
A, B, C = (TileConfig(128, 128, 128, 4, stages, kernel=Kernel.MMA_SYNC) for stages in (2, 3, 4))
DEFAULT = default_config(SHAPE)


def compiled(configs=(), resources=None):
    found = search.Compilations(RTX3090)
    for config in (*space.candidates(SHAPE, RTX3090), *configs):
        found.add(variant_of(config, SHAPE), FREE)
    found.resources.update({variant_of(config, SHAPE): value for config, value in (resources or {}).items()})
    return found


def exactly(us, spread=0.001):
    return Times(us * (1 - spread), us, us * (1 + spread))


def test_source_depends_on_the_present_gpus():
    a100, rtx5090 = gpus.get("a100"), gpus.get("rtx5090")
    assert search.source_of(RTX3090, []) == (Source.MODELLED, None)
    assert search.source_of(RTX3090, [H200, RTX3090]) == (Source.MEASURED, RTX3090)
    assert search.source_of(RTX3090, [H200, rtx5090]) == (Source.PROXY, H200)
    assert search.source_of(rtx5090, [H200]) == (Source.MODELLED, None)  # sm_120 code does not run on sm_90
    assert search.source_of(RTX3090, [a100]) == (Source.MODELLED, None)  # sm_86 code on sm_80


def test_modelled_entry_is_the_models_first_without_spills():
    best = search.rank(space.candidates(SHAPE, RTX3090), SHAPE, compiled())[0][1]
    entry = search.modelled_entry(SHAPE, RTX3090, compiled())
    assert (entry.config, entry.source) == (best, Source.MODELLED)
    assert entry.time_us is None
    spilled = FREE.model_copy(update={"spill_bytes": 8})
    assert search.modelled_entry(SHAPE, RTX3090, compiled(resources={best: spilled})).config != best


def test_nothing_compiled_is_one_clear_error():
    found = search.Compilations(
        RTX3090, failed={variant_of(space.candidates(SHAPE, RTX3090)[0], SHAPE): "compile: boom"}
    )
    with pytest.raises(CheckFailed, match=r"no configuration for 4296x4608x4608 on rtx3090: compile: boom"):
        search.modelled_entry(SHAPE, RTX3090, found)


def test_missing_kernels_are_distinct_and_sorted():
    odd = GemmShape(4296, 4608, 4600)
    kernels = [variant_of(c, s) for s in (SHAPE, odd, SHAPE) for c in (DEFAULT, A, replace(A, group_m=16))]
    missing = search.Compilations(RTX3090).missing(kernels)
    assert missing == sorted({KernelVariant(DEFAULT, False), KernelVariant(DEFAULT, True), KernelVariant(A)})
    assert compiled().missing(kernels) == [KernelVariant(DEFAULT, False)]


def test_round_0_has_the_default_the_models_choices_and_those_of_near_shapes():
    known = Database(RTX3090)
    far = GemmShape(64, 128, 4608)
    unusual = replace(C, stream_k=3, group_m=12)
    entry = search.modelled_entry(SHAPE, RTX3090, compiled()).model_copy(update={"config": unusual})
    known = Database(RTX3090, (entry, entry.model_copy(update={"m": far.m, "n": far.n, "config": A})))
    configs = search.initial_candidates(GemmShape(4096, 4608, 4608), RTX3090, compiled([unusual]), known)
    assert configs[0] == DEFAULT
    assert unusual in configs
    assert len(configs) == len(set(configs))
    triton = [c for c in configs if c.kernel is Kernel.TRITON]
    assert len(triton) <= search.TRITON_FIRST + 1
    assert unusual not in search.initial_candidates(far, RTX3090, compiled([unusual]), known)


def test_next_candidates_are_untried_and_near():
    history = search.ShapeHistory(SHAPE, [{DEFAULT: exactly(200), A: exactly(100), B: exactly(110), C: exactly(120)}])
    history.rejected[replace(A, num_warps=8)] = "wrong: no"
    unusual = TileConfig(64, 256, 128, 8, 2, kernel=Kernel.MMA_SYNC, stream_k=3)
    other = search.ShapeHistory(GemmShape(4096, 4608, 4608), [{unusual: exactly(90)}])
    found = search.next_candidates(history, RTX3090, [history, other])
    assert unusual in found
    assert replace(A, group_m=4) in found
    assert not set(found) & history.tried
    compiled_all = compiled(found)
    timed = search.prune_by_model(history, found, compiled_all)
    assert timed[:3] == [A, B, C]
    assert set(timed) <= {*found, A, B, C}
    assert (
        len(search.prune_by_model(history, space.legal(RTX3090), compiled(space.legal(RTX3090)))) <= 3 + search.NEW_MAX
    )
    spilling = {c: FREE.model_copy(update={"spill_bytes": 4}) for c in found}
    assert search.prune_by_model(history, found, compiled(resources=spilling)) == []


def test_a_shape_is_settled_when_a_round_gains_less_than_the_noise():
    one = {A: exactly(100), DEFAULT: exactly(200)}
    assert not search.ShapeHistory(SHAPE, [one]).settled
    assert search.ShapeHistory(SHAPE, [one, {A: exactly(100), B: exactly(99.8)}]).settled
    assert not search.ShapeHistory(SHAPE, [one, {A: exactly(100), B: exactly(97)}]).settled
    noisy = exactly(100, spread=0.05)
    assert search.ShapeHistory(SHAPE, [one, {A: noisy, B: exactly(97)}]).settled
    assert search.ShapeHistory(
        SHAPE, [one, {A: exactly(100), B: exactly(90)}, {B: exactly(90), C: exactly(80)}]
    ).settled
    assert search.next_candidates(search.ShapeHistory(SHAPE), RTX3090, []) == []


def final(times, wrong=None, bf16=None):
    return RoundTimes(times, wrong or {}, bf16)


def test_the_default_wins_a_tie():
    history = search.ShapeHistory(SHAPE, [{A: exactly(1), DEFAULT: exactly(1)}])

    def entry(default_us):
        times = {A: exactly(100), B: exactly(103), DEFAULT: exactly(default_us)}
        return search.entry(history, final(times, bf16=exactly(180)), compiled(), Source.PROXY, H200)

    tie, slower = entry(100.9), entry(101.1)
    assert (tie.config, slower.config) == (DEFAULT, A)
    assert [o.config for o in tie.runners_up] == [A, B]
    assert (slower.time_us, slower.default_us, slower.bf16_us) == (100, 101.1, 180)
    assert (slower.source, slower.measured_on, slower.tried) == (Source.PROXY, "NVIDIA H200", 2)


def test_a_shape_whose_default_is_not_exact_has_no_entry():
    with pytest.raises(CheckFailed, match="the default configuration failed: wrong: bits"):
        search.entry(
            search.ShapeHistory(SHAPE), final({A: exactly(1)}, {DEFAULT: "wrong: bits"}), compiled(), Source.PROXY,
            H200,
        )  # fmt: skip


def test_the_sustained_round_tries_every_swizzle_width_but_equal_programs_once():
    tall, low = (
        [search.ShapeHistory(GemmShape(m, 4608, 4608), [{A: exactly(100), B: exactly(110)}])] for m in (4296, 700)
    )
    assert {config.group_m for config in search.sustained_candidates(*tall)} == set(space.SWIZZLE_WIDTHS)
    assert search.sustained_candidates(*low) == [A, B, replace(A, group_m=4), replace(B, group_m=4)]  # six tile rows


def test_the_sustained_round_takes_each_kernel_once_before_more_widths_of_one():
    """Short samples had a kernel in the last place that led by 12 % in a running model."""
    widths = {replace(A, group_m=width): exactly(100 + width) for width in space.SWIZZLE_WIDTHS}
    history = search.ShapeHistory(GemmShape(4296, 4608, 4608), [{**widths, B: exactly(130), DEFAULT: exactly(140)}])
    assert {B, DEFAULT} < set(search.sustained_candidates(history))


def test_an_entry_names_the_operation_of_its_shape():
    for shape, operation in ((SHAPE, Operation.GEMM), (SwigluShape(SHAPE.m, SHAPE.n, SHAPE.k), Operation.SWIGLU)):
        history = search.ShapeHistory(shape, [{A: exactly(1), DEFAULT: exactly(2)}])
        resources = search.Compilations(H200, {variant_of(c, shape): FREE for c in (A, DEFAULT)})
        made = search.entry(history, final({A: exactly(1), DEFAULT: exactly(2)}), resources, Source.PROXY, H200)
        assert (made.operation, made.tuned, made.shape) == (operation, shape, SHAPE)
