"""bench/profile.py without a GPU: intervals with overlaps and gaps, names of kernels, and a profile of operators."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from int8kit import ops
from int8kit.bench import profile as module
from int8kit.bench.profile import GAPS, PARTS, Interval, divide, outermost, part_of, profile, summarize
from int8kit.errors import CheckFailed, InputError
from int8kit.kernels import (
    gemm_mma_sync,
    gemm_triton,
    gemm_wgmma,
    qk_norm_rope,
    quantize,
    residual_norm_quantize,
    rms_norm_quantize,
    swiglu_quantize,
)

GEMM, FLASH, ROW, ADD, COPY, ODD = (
    "nvjet_tst",
    "flash_fwd_kernel",
    "_quantize",
    "elementwise_kernel",
    "Memcpy DtoD",
    "k",
)

NAMES = json.loads((Path(__file__).parent / "data" / "kernel_names.json").read_text())
"""By part, as torch spells them on Hopper and on Ampere; long arguments are cut."""


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, names in NAMES.items() for name in names])
def test_names_of_kernels(part, name):
    assert part_of(name) == part


def test_every_part_and_every_pattern_has_a_name():
    assert tuple(sorted(NAMES)) == tuple(sorted(PARTS))
    tested = [name for names in NAMES.values() for name in names]
    operators = [pattern for pattern, _ in module.PATTERNS if "::" in pattern and pattern.startswith("^")]
    assert not [p for p, _ in module.PATTERNS if p not in operators and not any(re.search(p, name) for name in tested)]


def test_every_kernel_of_int8kit_is_known():
    gemms = (gemm_triton._gemm_triton, gemm_mma_sync._gemm_mma_sync, gemm_wgmma._gemm_wgmma)
    assert {part_of(kernel.fn.__name__) for kernel in gemms} == {"GEMM"}
    rows = (
        quantize._quantize, quantize._quantize_long, rms_norm_quantize._rms_norm_quantize,
        residual_norm_quantize._residual_norm_quantize, swiglu_quantize._swiglu_quantize, qk_norm_rope._qk_norm_rope,
    )  # fmt: skip
    assert {part_of(kernel.fn.__name__) for kernel in rows} == {"row kernels"}


def test_every_operator_of_int8kit_is_known():
    found = {name: part_of(f"int8kit::{name}") for name in ops.OPERATORS}
    gemms = {"scaled_mm", "scaled_mm_swiglu", "linear", "linear_swiglu"}
    assert {name for name, part in found.items() if part == "GEMM"} == gemms
    assert {name for name, part in found.items() if part == "row kernels"} == set(ops.OPERATORS) - gemms


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("GEMM", "linear addmm mm bmm matmul _int_mm _scaled_mm"),
        (
            "attention",
            "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu _flash_attention_forward",
        ),
        ("copies", "to copy_ clone contiguous cat empty empty_strided"),
        ("element-wise", "add mul_ silu mean softmax rms_norm view add_linear"),
    ],
)
def test_names_of_operators(part, names):
    assert {part_of(f"aten::{name}") for name in names.split()} == {part}


def parts(**us):
    return {part: us.get(part.replace("-", "_"), 0) for part in PARTS}


@pytest.mark.parametrize(
    ("intervals", "expected", "between"),
    [
        ([], parts(), 0),
        ([(GEMM, 10, 20)], parts(GEMM=10), 0),
        ([(GEMM, 0, 10), (FLASH, 13, 20), (GEMM, 20, 21)], parts(GEMM=11, attention=7), 3),
        # the next kernel starts before the end of the present one, as with programmatic dependent launch
        ([(GEMM, 0, 10), (FLASH, 8, 20), (ODD, 19, 25)], parts(GEMM=10, attention=10, other=5), 0),
        # a kernel inside another one, and one that covers two
        ([(GEMM, 0, 10), (COPY, 2, 5), (ADD, 12, 13)], parts(GEMM=10, element_wise=1), 2),
        ([(FLASH, 0, 10), (COPY, 1, 12), (GEMM, 2, 14), (ADD, 15, 16)],
         parts(attention=10, copies=2, GEMM=2, element_wise=1), 1),
        # two streams that start together: the longer kernel counts as the first
        ([(COPY, 0, 4), (GEMM, 0, 10)], parts(GEMM=10), 0),
        ([(ADD, 5, 5), (GEMM, 8, 9)], parts(GEMM=1), 3),
    ],
)  # fmt: skip
def test_division(intervals, expected, between):
    for order in (intervals, intervals[::-1]):
        found = divide([Interval(*one) for one in order])
        assert found.parts == expected
        assert found.busy == sum(expected.values())
        assert found.between == between


def test_the_union_equals_the_covered_microseconds():
    """Against a count of microseconds, one by one, with many random overlaps."""
    generator = torch.Generator().manual_seed(3)
    starts = torch.randint(0, 400, (200,), generator=generator).tolist()
    lengths = torch.randint(1, 9, (200,), generator=generator).tolist()
    names = [(GEMM, FLASH, ROW, ADD, COPY, ODD)[i % 6] for i in range(200)]
    intervals = [Interval(n, s, s + d) for n, s, d in zip(names, starts, lengths, strict=True)]
    owners = Counter()
    for us in range(410):
        running = [one for one in intervals if one.start <= us < one.end]
        if running:
            owners[part_of(min(running, key=lambda one: (one.start, -one.end)).name)] += 1
    found = divide(intervals)
    assert found.parts == {part: owners[part] for part in PARTS}
    span = max(one.end for one in intervals) - min(one.start for one in intervals)
    assert found.busy + found.between == span


def test_only_the_outermost_operator_counts():
    calls = [("aten::linear", 0, 10), ("aten::t", 1, 2), ("aten::addmm", 2, 9), ("aten::add", 10, 11), ("a", 20, 30)]
    inner = ("b", 21, 30)  # ends with its caller
    found = outermost([Interval(*one) for one in (*calls[::-1], inner)])
    assert [one.name for one in found] == ["aten::linear", "aten::add", "a"]


TIMELINE = [
    Interval(GEMM, 1000, 7000),
    Interval(FLASH, 7500, 9500),
    Interval(GEMM, 12000, 18000),
    Interval(ODD, 17000, 20000),
]


def summary(**ms):
    """Two calls of 10 ms each, of which the GPU works 6 + 2 ms and 6 + 2 ms."""
    return summarize(TIMELINE, repeats=2, device="cuda", **ms)


def test_gaps_are_those_of_the_recording_if_the_host_was_not_slowed():
    found = summary(profiled_ms=10.0, wall_ms=10.1)
    assert found.ms == {
        "GEMM": 6,
        "attention": 1,
        "row kernels": 0,
        "element-wise": 0,
        "copies": 0,
        "other": 1,
        GAPS: 2,
    }
    assert list(found.ms) == [*PARTS, GAPS]
    assert (found.busy_ms, found.between_ms) == (8, 1.5)
    assert found.sum_over_wall == pytest.approx(10 / 10.1)
    assert found.adds_up


def test_gaps_that_the_profiler_made_are_left_out():
    found = summary(profiled_ms=13.0, wall_ms=9.0)
    assert found.ms[GAPS] == 1
    assert found.sum_over_wall == 1
    assert found.document()["slowdown"] == round(13 / 9, 4)


@pytest.mark.parametrize(
    ("profiled_ms", "wall_ms", "ratio"),
    [(10.0, 11.0, 10 / 11), (8.0, 7.0, 8 / 7)],
    ids=["recorded calls were faster", "kernels were slower under the profiler"],
)
def test_a_sum_that_differs_is_reported(profiled_ms, wall_ms, ratio):
    found = summary(profiled_ms=profiled_ms, wall_ms=wall_ms)
    assert found.sum_over_wall == pytest.approx(ratio)
    assert not found.adds_up
    assert found.ms[GAPS] == max(min(profiled_ms, wall_ms) - 8, 0)


def test_on_a_cpu_the_recorded_wall_clock_counts():
    found = summarize(TIMELINE, repeats=2, profiled_ms=10, wall_ms=7, device="cpu")
    assert (found.ms[GAPS], found.sum_over_wall, found.document()["slowdown"]) == (2, 1, round(10 / 7, 4))


def test_kernels_are_listed_slowest_first_and_unknown_ones_by_name():
    found = summary(profiled_ms=10.0, wall_ms=10.0)
    listed = [(kernel.name, kernel.part, kernel.count, kernel.ms) for kernel in found.kernels]
    assert listed == [(GEMM, "GEMM", 1, 6), (ODD, "other", 0.5, 1.5), (FLASH, "attention", 0.5, 1)]
    assert found.unknown == (ODD,)
    many = [Interval(f"kernel {i}", 100 * i, 100 * i + i) for i in range(1, 50)]
    found = summarize(many, repeats=1, profiled_ms=9, wall_ms=9, device="cuda")
    assert [kernel.name for kernel in found.kernels] == [f"kernel {i}" for i in range(49, 19, -1)]
    assert len(found.unknown) == 49


def test_the_document_is_json():
    document = summary(profiled_ms=10.0, wall_ms=10.0).document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert sum(document["ms"].values()) == document["wall_ms"] == 10
    assert document["kernels"][0] == {"name": GEMM, "part": "GEMM", "count": 1, "ms": 6}
    long = summarize([Interval("x" * 5000, 0, 1)], repeats=1, profiled_ms=1, wall_ms=1, device="cuda").document()
    assert len(long["kernels"][0]["name"]) == len(long["unknown"][0]) == module.LONGEST_NAME


def test_operators_of_a_cpu():
    """A product, attention, a row kernel and a copy: each in its part, each as often as it is called."""
    x = torch.randn(64, 64)
    calls = []

    def call():
        calls.append(1)
        y = torch.nn.functional.linear(x, x)
        y = torch.nn.functional.scaled_dot_product_attention(y[None, None], y[None, None], y[None, None])[0, 0]
        q, _ = ops.quantize(y)
        return torch.cat([q, q]), y + y

    found = profile(call, repeats=4, warm_up=2, device="cpu")
    assert len(calls) == 2 + 4 + 1 + 4 + 4
    assert (found.device, found.repeats, found.unknown) == ("cpu", 4, ())
    assert all(found.ms[part] > 0 for part in PARTS if part != "other")
    assert found.ms["other"] == 0
    counts = {kernel.name: kernel.count for kernel in found.kernels}
    names = ("linear", "scaled_dot_product_attention", "cat", "add")
    assert [counts[f"aten::{name}"] for name in names] == [1, 1, 1, 1]
    assert counts["int8kit::quantize"] == 1
    assert "aten::addmm" not in counts  # inside linear
    assert 0 < found.between_ms < found.ms[GAPS]
    assert sum(found.ms.values()) == pytest.approx(found.profiled_ms)
    assert found.adds_up


def test_bad_calls(monkeypatch):
    with pytest.raises(InputError, match="0 repeats: expected 1 or more"):
        profile(lambda: None, repeats=0)
    with pytest.raises(InputError, match="device 'tpu': expected cuda or cpu"):
        profile(lambda: None, device="tpu")
    with pytest.raises(CheckFailed, match="recorded nothing on cpu"):
        profile(lambda: None, device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device"):
        profile(lambda: None, device="cuda")
