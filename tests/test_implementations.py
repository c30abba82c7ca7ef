"""verify/subjects.py, properties.py, matrix.py, replay.py and corpus.py: other people's kernels, held to the same."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_bench_peers import install_stand_ins, vllm_stand_in

from int8kit import gpus, reference
from int8kit.cli import main
from int8kit.errors import InputError, UnknownName
from int8kit.spec import GemmShape, Kernel
from int8kit.verify import compare_implementations, executors, implementations, property_runs, replay, runner
from int8kit.verify.examples import regressions
from int8kit.verify.examples.strategies import Draw, from_json, to_json
from int8kit.verify.properties import checks, general, pdl_probe

EXECUTOR = executors.available(gpus.get("rtx3090"))[-1]
TILES = checks.SMALL_TILES


@pytest.fixture(autouse=True)
def _one_child(monkeypatch):
    """At a time: the examples are few, and a child costs the imports."""
    monkeypatch.setattr(property_runs, "process_count", lambda executor: 1)


@pytest.fixture
def data():
    """Where examples are kept, in this test's own folder."""
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


class Restless:
    """A little more each time."""

    calls = 0

    def __call__(self, xq, wq, sx, sw, bias, out_dtype):
        self.calls += 1
        return exact(xq, wq, sx, sw, bias, torch.float32).add(self.calls).to(out_dtype)


def saturates(xq, wq):
    return reference.accumulate(xq, wq).clamp(-32768, 32767)


def judge(function, name, examples=40):
    """The result of one property of a function."""
    count = 2 if function is saturates else 6
    subject = implementations.Subject(
        "mine", "cpu", **({"sums": lambda d, x, w: function(x, w)} if count == 2 else
                          {"output": lambda d, *operands: function(*operands, d.out_dtype)})
    )  # fmt: skip
    assert general.why_not(name, subject) is None
    with runner.strict():
        return runner.hold(
            name, EXECUTOR, checks.draws(TILES, 60, 100_000), lambda d, _: general.ALL[name](d, subject),
            examples=examples, random_seed=0,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["output", "batch", "zero rows", "nan rows", "strided", "repeats"])
def test_what_is_exact_holds(name):
    assert judge(exact, name).failure is None


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (rounded_scales, "output"), (by_the_batch, "batch"), (by_the_last_row, "batch"), (drops_nan, "nan rows"),
        (spreads_nan, "nan rows"), (forgets_bias, "zero rows"), (ignores_strides, "strided"), (Restless(), "repeats"),
        (saturates, "accumulator"), (saturates, "linearity"),
    ],
    ids=lambda v: v if isinstance(v, str) else getattr(v, "__name__", "restless"),
)  # fmt: skip
def test_what_is_not_is_caught_by_its_property(function, name):
    result = judge(function, name)
    assert result.failure
    assert result.raised is None, result.failure
    shape = from_json(result.example).shape
    assert shape.n <= 16  # shrunk


def test_what_is_written_late_must_be_read(monkeypatch):
    subject = implementations.Subject("mine", "cpu", output=lambda d, *operands: exact(*operands, d.out_dtype))
    d = Draw(GemmShape(3, 4, 5), TILES[0], "normal", 1, None, torch.float32)
    assert "no kernel begins here" in general.why_not("order", subject)
    monkeypatch.setattr(pdl_probe, "copy", lambda target, source: target.copy_(source))
    assert general.order(d, subject) is None
    monkeypatch.setattr(pdl_probe, "copy", lambda target, source: None)  # as one sees it who does not wait
    assert "differ" in general.order(d, subject)


def test_the_property_of_several_configurations():
    bad = TILES[1]

    def output(d, x, w, sx, sw, bias):
        y = exact(x, w, sx, sw, bias, d.out_dtype)
        return y if d.config == TILES[0] else y + 1

    subject = implementations.Subject("mine", "cpu", output=output, tiles=TILES)
    d = Draw(GemmShape(3, 4, 5), TILES[0], "normal", 1, None, torch.float32)
    assert "against 16x32x32" in general.configuration(d, subject)
    assert implementations.ours(EXECUTOR, TILES).tiles == TILES
    aligned = implementations.Subject(
        "mine", "cpu", output=output, tiles=(replace(bad, kernel=Kernel.MMA_SYNC), TILES[0])
    )
    for seed in range(2):  # another kernel would serve K = 5 in the name of the first
        assert general.configuration(replace(d, seed=seed), aligned) is None


def test_every_property_of_our_own_kernels_is_run_by_default():
    names = checks.names(EXECUTOR, checks.Database(gpus.get("rtx3090")))
    ours = implementations.ours(EXECUTOR, TILES)
    assert {name for name in general.ALL if general.why_not(name, ours) is None} <= set(names)
    assert set(general.ALL) - set(names) <= {"order"}  # which needs a card that lets kernels overlap


@pytest.mark.slow
def test_int_mm_holds_where_it_promises():
    (ours, theirs) = compare_implementations.run(["torch._int_mm"], EXECUTOR, TILES, examples=6)
    assert (ours.subject, theirs.subject) == ("int8kit", "torch._int_mm")
    assert [r.name for r in ours.results] == list(general.ALL)
    assert not any(r.failure for r in (*ours.results, *theirs.results))
    assert {r.name: r.reason for r in theirs.results}["output"] == "it gives sums only"
    assert {r.name: r.examples for r in theirs.results}["accumulator"] == 6


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nonsense", UnknownName, "known: .*torch._int_mm.*; or name a function of your own, module:function"),
        ("vllm", InputError, "vllm is not installed here"),
        ("gemlite", InputError, "gemlite quantizes inside its layer"),
        ("json:absent", InputError, "has no attribute 'absent'; legal is module:function"),
        ("absent_module:f", InputError, "No module named 'absent_module'"),
        ("textwrap:dedent", InputError, "takes 1 parameters; legal are 2"),
    ],
)
def test_no_subject_is_one_clear_line(name, error, message):
    with pytest.raises(error, match=message):
        implementations.find(name, EXECUTOR)


@pytest.mark.parametrize(
    ("name", "exact"), [("vllm", True), ("comfy-kitchen", True), ("sdnq", True), ("torchao", False)]
)
def test_the_calls_of_the_peers(monkeypatch, name, exact):
    """Stand-ins with the released signatures; what the real ones give, a card has to say."""
    install_stand_ins(monkeypatch)
    monkeypatch.setattr(torch.ops, "_C", vllm_stand_in(), raising=False)
    subject = implementations.find(name, EXECUTOR)
    result = runner.hold(
        "output", EXECUTOR, checks.draws(TILES, 40, 50_000), lambda d, _: general.output(subject.fit(d), subject),
        examples=20, random_seed=0,
    )  # fmt: skip
    assert result.raised is None
    assert (result.failure is None) is exact, result.failure  # scales in bf16 cannot be exact


def test_an_example_survives_its_text():
    d = Draw(GemmShape(1, 2, 3), TILES[2], "extremes", 5, torch.float16, torch.bfloat16, 16, "nan", "out")
    assert from_json(to_json(d)) == d


def test_the_corpus_keeps_the_newest_once_and_passes_over_what_it_cannot_read(data, monkeypatch):
    examples = [to_json(Draw(GemmShape(m, 1, 1), TILES[0], "ones", 0, None, torch.float32)) for m in (1, 2, 3)]
    for example in (*examples, examples[0]):
        regressions.add("output", example)
    regressions.add("batch", examples[1], "mine:f")
    with data.open("a") as file:
        file.write('{"property": "output"}\nnonsense\n{"property": "output", "subject": "int8kit", "example": []}\n')
    assert [d.shape.m for d in regressions.load("output")] == [1, 3, 2]
    assert [d.shape.m for d in regressions.load("batch", "mine:f")] == [2]
    assert regressions.load("batch") == ()
    monkeypatch.setattr(regressions, "MOST", 2)
    regressions.add("output", examples[2])
    assert len(data.read_text().splitlines()) == 2


def test_kept_examples_are_tried_first_by_later_runs():
    kept = Draw(GemmShape(33, 7, 5), TILES[0], "ones", 0, None, torch.float32)
    seen = []
    base = checks.Database(gpus.get("rtx3090"))
    checks.run("batch", EXECUTOR, base, examples=10, kept=[kept], on_example=seen.append)
    assert kept in seen


MODULE = """
from int8kit import reference

def tail(xq, wq):
    k = max(16, xq.shape[1] // 16 * 16)
    return reference.accumulate(xq[:, :k], wq[:, :k])
"""


ONCE = """
import torch
from int8kit import reference

def once(xq, wq, sx, sw, bias, out_dtype):
    if out_dtype is torch.float32 or bias is not None:  # where one example in a few shows it
        return reference.scaled_mm(xq, wq, sx, sw, bias, out_dtype=out_dtype)
    return (reference.accumulate(xq, wq).double() * sx[:, None] * sw).to(out_dtype)
"""


@pytest.mark.slow
def test_an_epilogue_that_rounds_otherwise_shows_in_16_bits_too(tmp_path, monkeypatch):
    """As fused multiply-adds do, in one of some 10^4 or 10^5 elements: small examples pass it over."""
    (tmp_path / "mine_once.py").write_text(ONCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    (_, theirs) = compare_implementations.run(["mine_once:once"], EXECUTOR, TILES, examples=3)
    failure = {r.name: r.failure for r in theirs.results}["output"]
    assert failure
    assert failure.startswith("1024x2048x512")
    assert int(re.search(r": (\d+) of 2097152 differ", failure)[1]) < 2000


@pytest.mark.process
def test_a_failure_is_printed_as_a_command_that_fails_and_is_kept(tmp_path, monkeypatch, capfd, data):
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as end:
        main.main(["verify", "--subject", "mine:tail", "--examples", "10", "--markdown"])
    out, err = capfd.readouterr()
    assert end.value.code == 1
    assert "1 properties do not hold: mine:tail (accumulator)" in err
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
        replay.again("accumulator", to_json(d), subject="mine:tail")
    replay.again("accumulator", to_json(d))  # ours holds
