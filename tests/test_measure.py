"""tune/measure.py without a GPU: the checks in Triton's interpreter, and the launches that a graph would hold."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from int8kit import gpus, reference
from int8kit.errors import ConfigError
from int8kit.kernels import gemm
from int8kit.spec import GemmShape, SwigluShape, TileConfig
from int8kit.timing.interleave import Times
from int8kit.timing.operands import TimingOperands
from int8kit.tune import measure

SHAPE = GemmShape(33, 64, 96)
CONFIG = TileConfig(64, 64, 32, 4, 3)
GPU = replace(gpus.get("rtx3090"), l2_bytes=64 * 96)  # so small that the weight needs three copies


@pytest.fixture
def bench(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    monkeypatch.setattr(measure, "TimingOperands", partial(TimingOperands, device="cpu"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "stream")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return measure.ShapeBench(SHAPE, GPU)


@pytest.mark.parametrize("m", [33, 16])
def test_the_truth_is_the_references(bench, m):
    """torch._int_mm computes the accumulators, except for few rows."""
    one = measure.ShapeBench(GemmShape(m, 64, 96), GPU)
    assert torch.equal(one.truth, one.operands.truth("output"))


def test_an_exact_configuration_passes_and_others_have_a_reason(bench, monkeypatch):
    assert bench.launch_and_check(CONFIG) is None

    def incomplete(xq, wq, sx, sw, bias, *, config, out, arch):
        out[:, 1:] = bench.truth[:, 1:]

    def too_large(*args, **kwargs):
        raise ConfigError("does not fit")

    def broken(*args, **kwargs):
        raise RuntimeError("PassManager")

    for launcher, reason in ((incomplete, "wrong: "), (too_large, "resources: "), (broken, "compile: ")):
        monkeypatch.setattr(gemm, "scaled_mm", launcher)
        assert bench.launch_and_check(CONFIG).startswith(reason)


def test_a_swiglu_shape_runs_and_checks_that_epilogue(bench, monkeypatch):
    gated = measure.ShapeBench(SwigluShape(33, 64, 96), GPU)
    assert gated.truth.shape == (33, 32)
    o = gated.operands
    want = reference.scaled_mm_swiglu(o.xq, o.weights[0], o.sx, o.sw, o.bias)
    assert torch.equal(gated.truth, want)
    assert gated.launch_and_check(CONFIG) is None
    gated.launch_bf16(0)
    monkeypatch.setattr(gemm, "scaled_mm_swiglu", lambda *args, out, **_: out.copy_(want + 1))
    assert gated.launch_and_check(CONFIG).startswith("wrong: ")


def test_many_rows_are_timed_behind_their_quantization(bench, monkeypatch):
    """In long samples, and the quantization's own time is taken off."""
    made, timed = [], []
    monkeypatch.setattr(measure, "HOT_ROWS", SHAPE.m)
    monkeypatch.setattr(measure, "quantize", lambda x, out: made.append("quantize"))
    monkeypatch.setattr(gemm, "scaled_mm", lambda *_, config, **__: made.append(config))
    monkeypatch.setattr(torch, "mm", lambda x, w, out: made.append("bf16"))
    monkeypatch.setattr(measure, "capture", lambda launches, stream: (SimpleNamespace(replay=launches), None))

    def interleave(calls, rounds, sample_us, *, launches):
        timed.append(sample_us)
        for launches_of_a_graph in calls:
            made.clear()
            launches_of_a_graph[0]()
            timed.append(list(made))
        return [Times(10, 12, 14)] * (len(calls) - 2) + [Times(2, 3, 4), Times(20, 21, 22)]

    monkeypatch.setattr(measure, "interleave", interleave)
    assert bench.times([CONFIG], 3, sustained=True, bf16=True) == [Times(7, 9, 11), Times(20, 21, 22)]
    assert timed == [measure.HOT_US, ["quantize", CONFIG], ["quantize"], ["bf16"]]


def test_a_lost_context_is_an_error(bench, monkeypatch):
    def fault(*args, **kwargs):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(gemm, "scaled_mm", fault)
    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    with pytest.raises(measure.ContextLost, match="CUDA error"):
        bench.launch_and_check(CONFIG)


def test_a_graph_launches_every_copy_of_the_weight_once(bench, monkeypatch):
    made, captured, timed = [], [], []
    other = replace(CONFIG, group_m=4)

    def capture(launches, stream):
        made.clear()  # without the first launch, which initializes a library
        for launch in launches:
            launch()
        captured.append(list(made))
        return SimpleNamespace(replay=stream), None

    def interleave(calls, rounds, sample_us, *, launches):
        timed.append((calls, rounds, sample_us, launches))
        return [Times(1, 2, 3)] * len(calls)

    monkeypatch.setattr(measure, "capture", capture)
    monkeypatch.setattr(measure, "interleave", interleave)
    copies = {
        w.data_ptr(): i for pair in (bench.operands.weights, bench.operands.weights16) for i, w in enumerate(pair)
    }
    monkeypatch.setattr(
        gemm, "scaled_mm", lambda xq, wq, *_, config, **__: made.append((config, copies[wq.data_ptr()]))
    )
    monkeypatch.setattr(torch, "mm", lambda x, w, out: made.append(("bf16", copies[w.data_ptr()])))
    times = bench.times([CONFIG, other], 3, bf16=True)
    assert times == [Times(1, 2, 3)] * 3
    assert timed == [(["stream"] * 3, 3, 4000, 3)]
    assert captured == [[(name, copy) for copy in range(3)] for name in (CONFIG, other, "bf16")]
    assert len(copies) == 6
