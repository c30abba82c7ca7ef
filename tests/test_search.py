"""tune/search.py: which configurations are timed next, and which one wins."""

from dataclasses import replace

import pytest

from int8kit import gpus
from int8kit.database.database import Database
from int8kit.database.schema import Resources
from int8kit.errors import CheckFailed
from int8kit.spec import GemmShape, Kernel, Source, TileConfig, default_config
from int8kit.timing.interleave import Times
from int8kit.tune import search, space, workers
from int8kit.tune.tasks import Timed

RTX3090, H200 = gpus.get("rtx3090"), gpus.get("h200")
SHAPE = GemmShape(4296, 4608, 4608)
FREE = Resources(registers=128, spill_bytes=0, shared_bytes=49152)
A, B, C = (TileConfig(128, 128, 128, 4, stages, kernel=Kernel.MMA_SYNC) for stages in (2, 3, 4))
DEFAULT = default_config(SHAPE)


def compiled(configs=(), **over):
    found = search.Space(RTX3090)
    for config in (*space.candidates(SHAPE, RTX3090), *configs):
        found.add(workers.job(config, SHAPE), FREE)
    found.resources.update({workers.job(config, SHAPE): value for config, value in over.get("resources", {}).items()})
    return found


def exactly(us, spread=0.001):
    return Times(us * (1 - spread), us, us * (1 + spread))


def test_how_by_the_cards_that_are_here():
    a100, rtx5090 = gpus.get("a100"), gpus.get("rtx5090")
    assert search.how(RTX3090, []) == (Source.MODELLED, None)
    assert search.how(RTX3090, [H200, RTX3090]) == (Source.MEASURED, RTX3090)
    assert search.how(RTX3090, [H200, rtx5090]) == (Source.PROXY, H200)
    assert search.how(rtx5090, [H200]) == (Source.MODELLED, None)  # sm_120 code does not run on sm_90
    assert search.how(RTX3090, [a100]) == (Source.MODELLED, None)  # sm_86 code on sm_80


def test_modelled_is_the_models_first_without_spills():
    best = search.rank(space.candidates(SHAPE, RTX3090), SHAPE, compiled())[0][1]
    entry = search.modelled(SHAPE, RTX3090, compiled())
    assert (entry.config, entry.source) == (best, Source.MODELLED)
    assert entry.time_us is None
    spilled = FREE.model_copy(update={"spill_bytes": 8})
    assert search.modelled(SHAPE, RTX3090, compiled(resources={best: spilled})).config != best


def test_nothing_compiled_is_one_clear_error():
    found = search.Space(RTX3090, failed={workers.job(space.candidates(SHAPE, RTX3090)[0], SHAPE): "compile: boom"})
    with pytest.raises(CheckFailed, match=r"no configuration for 4296x4608x4608 on rtx3090: compile: boom"):
        search.modelled(SHAPE, RTX3090, found)


def test_odd_k_is_compiled_apart_and_bands_together():
    odd = GemmShape(4296, 4608, 4600)
    assert workers.job(A, SHAPE) == workers.job(replace(A, group_m=16), SHAPE) == (A, True)
    assert workers.job(A, odd) == (A, False)
    assert search.Space(RTX3090).lacks([workers.job(A, s) for s in (SHAPE, odd, SHAPE)]) == [(A, False), (A, True)]


def test_the_first_round_has_the_default_the_models_and_what_is_known_of_near_shapes():
    known = Database(RTX3090)
    far = GemmShape(64, 128, 4608)
    unusual = replace(C, stream_k=3, group_m=12)
    entry = search.modelled(SHAPE, RTX3090, compiled()).model_copy(update={"config": unusual})
    known = Database(RTX3090, (entry, entry.model_copy(update={"m": far.m, "n": far.n, "config": A})))
    configs = search.first(GemmShape(4096, 4608, 4608), RTX3090, compiled([unusual]), known)
    assert configs[0] == DEFAULT
    assert unusual in configs
    assert len(configs) == len(set(configs))
    plain = [c for c in configs if c.kernel is Kernel.TRITON]
    assert len(plain) <= search.CONTESTANTS + 1
    assert unusual not in search.first(far, RTX3090, compiled([unusual]), known)


def test_what_is_ahead_is_untried_and_near():
    trail = search.Trail(SHAPE, [{DEFAULT: exactly(200), A: exactly(100), B: exactly(110), C: exactly(120)}])
    trail.wrong[replace(A, num_warps=8)] = "wrong: no"
    unusual = TileConfig(64, 256, 128, 8, 2, kernel=Kernel.MMA_SYNC, stream_k=3)
    other = search.Trail(GemmShape(4096, 4608, 4608), [{unusual: exactly(90)}])
    found = search.ahead(trail, RTX3090, [trail, other])
    assert unusual in found
    assert replace(A, group_m=4) in found
    assert not set(found) & trail.tried
    compiled_all = compiled(found)
    timed = search.worthwhile(trail, found, compiled_all)
    assert timed[:3] == [A, B, C]
    assert set(timed) <= {*found, A, B, C}
    assert len(search.worthwhile(trail, space.legal(RTX3090), compiled(space.legal(RTX3090)))) <= 3 + search.FRESH
    spilling = {c: FREE.model_copy(update={"spill_bytes": 4}) for c in found}
    assert search.worthwhile(trail, found, compiled(resources=spilling)) == []


def test_a_shape_is_settled_when_a_round_gains_less_than_the_noise():
    one = {A: exactly(100), DEFAULT: exactly(200)}
    assert not search.Trail(SHAPE, [one]).settled
    assert search.Trail(SHAPE, [one, {A: exactly(100), B: exactly(99.8)}]).settled
    assert not search.Trail(SHAPE, [one, {A: exactly(100), B: exactly(97)}]).settled
    noisy = exactly(100, spread=0.05)
    assert search.Trail(SHAPE, [one, {A: noisy, B: exactly(97)}]).settled
    assert search.Trail(SHAPE, [one, {A: exactly(100), B: exactly(90)}, {B: exactly(90), C: exactly(80)}]).settled
    assert search.ahead(search.Trail(SHAPE), RTX3090, []) == []


def final(times, wrong=None, bf16=None):
    return Timed(times, wrong or {}, bf16)


def test_the_default_keeps_its_place_within_the_margin():
    trail = search.Trail(SHAPE, [{A: exactly(1), DEFAULT: exactly(1)}])

    def entry(default_us):
        times = {A: exactly(100), B: exactly(103), DEFAULT: exactly(default_us)}
        return search.entry(trail, final(times, bf16=exactly(180)), compiled(), Source.PROXY, H200)

    tie, slower = entry(100.9), entry(101.1)
    assert (tie.config, slower.config) == (DEFAULT, A)
    assert [o.config for o in tie.runners_up] == [A, B]
    assert (slower.time_us, slower.default_us, slower.bf16_us) == (100, 101.1, 180)
    assert (slower.source, slower.measured_on, slower.tried) == (Source.PROXY, "NVIDIA H200", 2)


def test_a_default_that_is_not_exact_ends_the_shape():
    with pytest.raises(CheckFailed, match="the default is out: wrong: bits"):
        search.entry(
            search.Trail(SHAPE), final({A: exactly(1)}, {DEFAULT: "wrong: bits"}), compiled(), Source.PROXY,
            H200,
        )  # fmt: skip


def test_bands_are_timed_hot_but_equal_programs_once():
    tall, low = ([search.Trail(GemmShape(m, 4608, 4608), [{A: exactly(100), B: exactly(110)}])] for m in (4296, 700))
    assert {config.group_m for config in search.hot(*tall)} == set(space.BANDS)
    assert search.hot(*low) == [A, B, replace(A, group_m=4), replace(B, group_m=4)]  # six tile rows
