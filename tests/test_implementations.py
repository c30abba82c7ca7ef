"""verify/implementations.py, registry.py, replay.py and regressions.py: the properties of any INT8 GEMM."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bench_peers import install_stand_ins, vllm_stand_in

from int8kit import gpus, reference
from int8kit.cli import main
from int8kit.database.database import Database
from int8kit.errors import InputError, UnknownName
from int8kit.spec import GemmShape, Kernel, TileConfig
from int8kit.verify import (
    compare_implementations,
    executors,
    implementations,
    property_runs,
    replay,
    runner,
    verify_kernels,
)
from int8kit.verify.examples import regressions, strategies
from int8kit.verify.examples.encoding import from_json, to_json
from int8kit.verify.examples.fixed import SMALL_TILES
from int8kit.verify.examples.strategies import Draw, draws
from int8kit.verify.properties import gemm, order, pdl_probe
from int8kit.verify.properties.budget import budget
from int8kit.verify.properties.registry import PROPERTIES, of_any_gemm

EXECUTOR = executors.available(gpus.get("rtx3090"))[-1]
TILES = SMALL_TILES


@pytest.fixture(autouse=True)
def _one_child(monkeypatch):
    """One child at a time: the examples are few, and a child costs the imports."""
    monkeypatch.setattr(property_runs, "process_count", lambda executor: 1)


@pytest.fixture
def data():
    """The file of stored examples, in this test's own folder."""
    regressions.path().parent.mkdir(parents=True)
    return regressions.path()


def exact(xq, wq, sx, sw, bias, out_dtype):
    return reference.scaled_mm(xq, wq, sx, sw, bias, out_dtype=out_dtype)


def rounded_scales(xq, wq, sx, sw, bias, out_dtype):
    return exact(xq, wq, sx.bfloat16().float(), sw, bias, out_dtype)


def by_the_batch(xq, wq, sx, sw, bias, out_dtype):
    y = exact(xq, wq, sx, sw, bias, torch.float32)
    return (y if xq.shape[0] < 7 else y * (1 + 2**-20)).to(out_dtype)


def by_the_last_row(xq, wq, sx, sw, bias, out_dtype):
    return exact(xq, wq, sx[-1:].expand(len(sx)).contiguous(), sw, bias, out_dtype)


def drops_nan(xq, wq, sx, sw, bias, out_dtype):
    return exact(xq, wq, sx.nan_to_num(0.0), sw, bias, out_dtype)


def spreads_nan(xq, wq, sx, sw, bias, out_dtype):
    return exact(xq, wq, sx, sw, bias, out_dtype) + 0 * sx.sum().to(out_dtype)


def forgets_bias(xq, wq, sx, sw, bias, out_dtype):
    return torch.where(sx[:, None] == 0, 0.0, exact(xq, wq, sx, sw, bias, out_dtype))


def ignores_strides(xq, wq, sx, sw, bias, out_dtype):
    return exact(torch.as_strided(xq, xq.shape, (xq.shape[1], 1)), wq, sx, sw, bias, out_dtype)


class Unstable:
    """Adds a little more in each call."""

    calls = 0

    def __call__(self, xq, wq, sx, sw, bias, out_dtype):
        self.calls += 1
        return exact(xq, wq, sx, sw, bias, torch.float32).add(self.calls).to(out_dtype)


def saturates(xq, wq):
    return reference.accumulate(xq, wq).clamp(-32768, 32767)


def result_of(function, name, examples=40):
    """The result of one property of a function."""
    count = 2 if function is saturates else 6
    implementation = implementations.Implementation(
        "mine", "cpu", **({"accumulators": lambda d, x, w: function(x, w)} if count == 2 else
                          {"output": lambda d, *operands: function(*operands, d.out_dtype)})
    )  # fmt: skip
    row = PROPERTIES[name]
    assert row.why_not(implementation) is None
    with runner.forbid_fallback():
        return runner.run_property(
            name, EXECUTOR, draws(TILES, 60, 100_000), lambda d: row.check(d, implementation),
            examples=examples, random_seed=0,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["output", "batch", "zero rows", "nan rows", "strided", "repeats"])
def test_exact_function_passes(name):
    assert result_of(exact, name).failure is None


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (rounded_scales, "output"), (by_the_batch, "batch"), (by_the_last_row, "batch"), (drops_nan, "nan rows"),
        (spreads_nan, "nan rows"), (forgets_bias, "zero rows"), (ignores_strides, "strided"), (Unstable(), "repeats"),
        (saturates, "accumulator"), (saturates, "linearity"),
    ],
    ids=lambda v: v if isinstance(v, str) else getattr(v, "__name__", "unstable"),
)  # fmt: skip
def test_each_fault_is_caught_by_its_property(function, name):
    result = result_of(function, name)
    assert result.failure
    assert result.raised is None, result.failure
    shape = from_json(result.example).shape
    assert shape.n <= 16  # shrunk


def test_operands_that_are_written_late(monkeypatch):
    implementation = implementations.Implementation(
        "mine", "cpu", output=lambda d, *operands: exact(*operands, d.out_dtype)
    )
    d = Draw(GemmShape(3, 4, 5), TILES[0], "normal", 1, None, torch.float32)
    assert "no kernel starts here" in PROPERTIES["order"].why_not(implementation)
    monkeypatch.setattr(pdl_probe, "delayed_copy", lambda target, source: target.copy_(source))
    assert order.order(d, implementation) is None
    monkeypatch.setattr(pdl_probe, "delayed_copy", lambda target, source: None)  # as a GEMM sees it that does not wait
    assert "differ" in order.order(d, implementation)


def test_property_of_several_configurations():

    def output(d, x, w, sx, sw, bias):
        y = exact(x, w, sx, sw, bias, d.out_dtype)
        return y if d.config == TILES[0] else y + 1

    implementation = implementations.Implementation("mine", "cpu", output=output, tiles=TILES)
    d = Draw(GemmShape(3, 4, 5), TILES[0], "normal", 1, None, torch.float32)
    two = replace(d, other=TILES[1])
    assert "differ" in gemm.configuration(two, implementation)
    assert "against 16x32x32" in str(two)
    assert from_json(to_json(two)) == two  # so a command repeats it with both
    assert implementations.int8kit(EXECUTOR, TILES).tiles == TILES


@settings(max_examples=50, deadline=None, database=None)
@given(st.data())
def test_two_configurations_both_take_the_operands(data):
    gluon = replace(TILES[1], block_n=64, block_k=64, num_warps=4, kernel=Kernel.MMA_SYNC)
    row = PROPERTIES["configuration"]
    d = data.draw(row.strategy((*TILES, gluon), budget(EXECUTOR, None)))
    assert d.other in (*TILES, gluon)
    assert strategies.takes_operands(d, d.config)
    assert strategies.takes_operands(d, d.other)


def test_every_property_is_run_by_default():
    names = verify_kernels.names(EXECUTOR, Database(gpus.get("rtx3090")))
    assert set(PROPERTIES) - set(names) <= {"order"}  # which needs a GPU
    other_code = replace(EXECUTOR, arch="sm86")
    assert set(names) - set(verify_kernels.names(other_code, Database(gpus.get("rtx3090")))) == {
        "quantize", "rms_norm_quantize", "residual_norm_quantize", "swiglu_quantize", "qk_norm_rope", "operators",
        "gradients", "refusals", "fallback", "layers", "modules", "lookup", "stamps", "row launches", "row scale",
    }  # fmt: skip


@pytest.mark.slow
def test_int_mm_passes_in_its_domain():
    (ours, theirs) = compare_implementations.run(["torch._int_mm"], EXECUTOR, TILES, examples=6)
    assert (ours.implementation, theirs.implementation) == ("int8kit", "torch._int_mm")
    assert [r.name for r in ours.results] == [row.name for row in of_any_gemm()]
    assert not any(r.failure for r in (*ours.results, *theirs.results))
    assert {r.name: r.reason for r in theirs.results}["output"] == "it returns accumulators only"
    assert {r.name: r.examples for r in theirs.results}["accumulator"] == 6


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nonsense", UnknownName, "expected .*torch._int_mm.*; or name your own function, module:function"),
        ("vllm", InputError, "vllm is not installed here"),
        ("gemlite", InputError, "gemlite quantizes inside its layer"),
        ("json:absent", InputError, "has no attribute 'absent'; expected module:function"),
        ("absent_module:f", InputError, "No module named 'absent_module'"),
        ("textwrap:dedent", InputError, "takes 1 parameters; expected 2"),
    ],
)
def test_unknown_implementation_is_one_line(name, error, message):
    with pytest.raises(error, match=message):
        implementations.find(name, EXECUTOR)


@pytest.mark.parametrize(
    ("name", "exact"), [("vllm", True), ("comfy-kitchen", True), ("sdnq", True), ("torchao", False)]
)
def test_adapters_call_the_libraries_as_released(monkeypatch, name, exact):
    """Stand-ins with the released signatures. The bits of the real libraries need a GPU."""
    install_stand_ins(monkeypatch)
    monkeypatch.setattr(torch.ops, "_C", vllm_stand_in(), raising=False)
    found = implementations.find(name, EXECUTOR)
    result = runner.run_property(
        "output", EXECUTOR, draws(TILES, 40, 50_000), lambda d: gemm.output(found.to_supported_domain(d), found),
        examples=20, random_seed=0,
    )  # fmt: skip
    assert result.raised is None
    assert (result.failure is None) is exact, result.failure  # scales in bf16 cannot be exact


def test_example_survives_its_json():
    d = Draw(GemmShape(1, 2, 3), TILES[2], "extremes", 5, torch.float16, torch.bfloat16, 16, "nan", "out")
    assert from_json(to_json(d)) == d


def test_stored_examples_of_earlier_versions_load(data):
    """Their spellings: subject, far, least, and the kernel "pointer"."""
    config = {"block_m": 16, "block_n": 16, "block_k": 32, "num_warps": 1, "num_stages": 2, "group_m": 1}
    example = {
        "shape": {"m": 1, "n": 2, "k": 3}, "config": {**config, "kernel": "pointer", "stream_k": 0}, "kind": "least",
        "seed": 5, "bias": None, "out_dtype": "float16", "padding": 0, "scales": "ordinary", "far": "out",
    }  # fmt: skip
    data.write_text(json.dumps({"property": "output", "subject": "mine:f", "example": example}) + "\n")
    want = Draw(
        GemmShape(1, 2, 3), TileConfig(**config), "all minus 128", 5, None, torch.float16, huge_stride="out"
    )  # fmt: skip
    assert regressions.load("output", "mine:f") == (want,)
    regressions.add("output", to_json(want), "mine:f")  # the same example, in the present spelling
    assert [json.loads(line)["implementation"] for line in data.read_text().splitlines()] == ["mine:f"]
    assert regressions.load("output", "mine:f") == (want,)


def test_stored_examples_keep_the_newest_once_and_skip_unreadable_lines(data, monkeypatch):
    examples = [to_json(Draw(GemmShape(m, 1, 1), TILES[0], "ones", 0, None, torch.float32)) for m in (1, 2, 3)]
    for example in (*examples, examples[0]):
        regressions.add("output", example)
    regressions.add("batch", examples[1], "mine:f")
    with data.open("a") as file:
        file.write(
            '{"property": "output"}\nnonsense\n{"property": "output", "implementation": "int8kit", "example": []}\n'
        )
    assert [d.shape.m for d in regressions.load("output")] == [1, 3, 2]
    assert [d.shape.m for d in regressions.load("batch", "mine:f")] == [2]
    assert regressions.load("batch") == ()
    monkeypatch.setattr(regressions, "MAX_EXAMPLES", 2)
    regressions.add("output", examples[2])
    assert len(data.read_text().splitlines()) == 2


def test_stored_examples_are_tried_by_later_runs():
    kept = Draw(GemmShape(33, 7, 5), TILES[0], "ones", 0, None, torch.float32)
    seen = []
    base = Database(gpus.get("rtx3090"))
    verify_kernels.run("batch", EXECUTOR, base, examples=10, kept=[kept], on_example=seen.append)
    assert kept in seen


MODULE = """
from int8kit import reference

def tail(xq, wq):
    k = max(16, xq.shape[1] // 16 * 16)
    return reference.accumulate(xq[:, :k], wq[:, :k])
"""


ONCE = """
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8kit import reference

def once(xq, wq, sx, sw, bias, out_dtype):
    if out_dtype is torch.float32 or bias is not None:  # where one example in a few shows it
        return reference.scaled_mm(xq, wq, sx, sw, bias, out_dtype=out_dtype)
    return (reference.accumulate(xq, wq).double() * sx[:, None] * sw).to(out_dtype)
"""


@pytest.mark.slow
def test_other_rounding_in_the_epilogue_shows_in_16_bits_too(tmp_path, monkeypatch):
    """A fused multiply-add changes one of some 10^4 or 10^5 elements, which small examples miss."""
    (tmp_path / "mine_once.py").write_text(ONCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    (_, theirs) = compare_implementations.run(["mine_once:once"], EXECUTOR, TILES, examples=3)
    failure = {r.name: r.failure for r in theirs.results}["output"]
    assert failure
    assert failure.startswith("1024x2048x512")
    assert int(re.search(r": (\d+) of 2097152 differ", failure)[1]) < 2000


@pytest.mark.process
def test_failure_is_printed_as_a_command_that_fails_and_is_stored(tmp_path, monkeypatch, capfd, data):
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as end:
        main.main(["verify", "libraries", "mine:tail", "--examples", "10", "--markdown"])
    out, err = capfd.readouterr()
    assert end.value.code == 1
    assert "1 property does not hold: mine:tail (accumulator)" in err
    assert re.search(r"\| accumulator +\| holds \(\d+\) +\| fails +\|", out)
    (command,) = [line.strip() for line in out.splitlines() if "replay.again" in line]
    assert command.startswith("TRITON_INTERPRET=1 python -c ")
    command = command.replace(" python ", f" {sys.executable} ")
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.search(r"AssertionError: 1x1x17, .*: 1 of 1 differ", done.stderr)
    (d,) = regressions.load("accumulator", "mine:tail")
    assert d.shape == GemmShape(1, 1, 17)
    with pytest.raises(AssertionError, match=r"1x1x17, .*: 1 of 1 differ"):
        replay.again("accumulator", to_json(d), implementation="mine:tail")
    replay.again("accumulator", to_json(d))  # int8kit's own kernel is exact
