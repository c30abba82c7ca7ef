"""tools/measure_lookup.py: the draw of shapes, a dry run, and the steps of a run with stand-ins for tuner and GPU."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from int8kit import gpus
from int8kit.errors import InputError
from int8kit.spec import Operation, Source, default_config, supports
from int8kit.tune.session import Target

spec = importlib.util.spec_from_file_location(
    "measure_lookup", Path(__file__).parent.parent / "tools" / "measure_lookup.py"
)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@pytest.fixture
def main(monkeypatch, capsys):
    """Runs the tool -> its exit status, the last line's document, and its notes."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["measure_lookup.py", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            tool.main()
        out, err = capsys.readouterr()
        return end.value.code, json.loads(out.splitlines()[-1]) if out else None, err

    return call


def test_drawn_shapes():
    found = tool.drawn(22, 40)
    assert found == tool.drawn(22, 60)[:40]
    assert found != tool.drawn(23, 40)
    assert len({one.shape for one in found}) == 40
    assert all(one.shape.n % 512 or one.shape.k % 512 for one in found)
    assert {1, 2, 3, 4, 5} == {len(str(one.shape.m)) for one in found}  # rows of each magnitude
    assert sum(one.operation is Operation.SWIGLU for one in found) == 5
    assert all(one.shape.n % 4 == 0 for one in found)
    wgmma = tool.architecture_default(found[0].shape, 90, 232448).kernel
    assert sum(not supports(wgmma, *one) for one in found) >= 2


def test_dry_run_continues(main, tmp_path):
    out = tmp_path / "lookup.json"
    arguments = ("--gpu", "h100", "--dry-run", "--out", out)
    _, few, err = main(*arguments, "--count", 4, "--chunk", 3)
    assert few["count"] == 4
    assert err.count("shapes tuned") == 2
    before = json.loads(out.read_text())["shapes"]
    _, more, err = main(*arguments, "--count", 6)
    assert json.loads(out.read_text())["shapes"][:4] == before
    assert more["count"] == 6
    assert "2 shapes tuned" in err
    assert set(more["levels"]) <= {"borrowed", "default"}
    assert more["lookup_ms"]["median"] < 1
    code, _, err = main(*arguments, "--seed", 7)
    assert code == 2
    assert "is of another run: seed = 22" in err


def test_time_limit_ends_before_a_chunk(main, tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(tool, "time", SimpleNamespace(monotonic=lambda: next(clock), perf_counter=lambda: 0.0))
    arguments = ("--gpu", "h200", "--dry-run", "--count", 6, "--chunk", 2, "--time-limit", 500)
    _, document, err = main(*arguments, "--out", tmp_path / "lookup.json")
    assert document["count"] == 2  # a chunk takes 300 s
    assert "time limit: 4 shapes are left" in err


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ((), {"model", "default"}),
        (("--without-own",), {"borrowed", "default"}),
        (("--database", "tuning_db/h200.json", "--exclude", 4), {"model", "default"}),
        (("--database", "tuning_db/rtx3090.json"), {"borrowed", "default"}),
    ],
)
def test_databases_that_answer(main, monkeypatch, options, levels):
    monkeypatch.chdir(Path(__file__).parent.parent)
    _, document, _ = main("--gpu", "h200", "--dry-run", "--count", 8, *options)
    assert set(document["levels"]) <= levels
    assert document["count"] == 8


def test_entries_of_near_shapes_are_left_out():
    args = SimpleNamespace(database=None, without_own=False, figures_of_gpu=True)
    target = Target(gpus.get("h200"), Path("x"), Source.MODELLED, None)
    base = tool.lookup_database(target, args)
    question = tool.Question(base.entries[0].shape, Operation.GEMM)
    assert tool.looked_up(base, question, 0.0)[0].level == "exact"
    assert tool.looked_up(base, question, 1.0)[0].level != "exact"
    assert tool.looked_up(base, question, 4.0)[0].level in ("model", "default")


def test_code_of_an_older_architecture_is_ranked_for_the_gpu_that_runs_it():
    target = Target(gpus.get("rtx3090"), Path("x"), Source.PROXY, gpus.get("h200"))
    for own, sms in ((True, 82), (False, 132)):
        args = SimpleNamespace(database=None, without_own=False, figures_of_gpu=own)
        gpu = tool.lookup_database(target, args).gpu
        assert (gpu.sms, gpu.arch, gpu.shared_memory) == (sms, 86, 101376)


def test_steps_of_a_run(monkeypatch, tmp_path):
    """Needed kernels are compiled first; a shape that the tuner or the timing loses is listed and misses the target."""
    args = SimpleNamespace(
        database=None, without_own=False, figures_of_gpu=False, exclude=0.0, out=tmp_path / "l.json", seed=1,
        dry_run=False, chunk=4, time_limit=1e9,
    )  # fmt: skip
    target = Target(gpus.get("h200"), tmp_path / "t.json", Source.MEASURED, gpus.get("h200"))
    questions = tool.drawn(1, 4)
    lost, broken, *_ = [one.shape for one in questions]
    steps = []

    def tune(shapes, targets, pool, note):
        steps.append("tune")
        entries = [SimpleNamespace(shape=s, config=default_config(s)) for s in shapes if s != lost]
        return [SimpleNamespace(entries=entries, failed={lost: "no kernel"})]

    def measured(target, question, configs):
        if question.shape == broken:
            raise InputError("not exact")
        return {config: 10.0 if config == default_config(question.shape) else 11.0 for config in configs}

    monkeypatch.setattr(tool.session, "tune", tune)
    monkeypatch.setattr(tool, "measured", measured)
    pool = SimpleNamespace(drive=lambda jobs: steps.append([len(batch.calls) for job in jobs for batch in job]))
    run = tool.Run(args, target, pool)
    run.chunks(questions)
    assert steps == [[len({tool.looked_up(run.base, one, 0.0)[0].config for one in questions})], "tune"]
    assert run.failed == {str(lost): "no kernel", str(questions[1]): "not exact"}
    found = tool.summary(run.rows, run.failed)
    assert found["count"] == 2
    assert found["least"] == pytest.approx(10 / 11, abs=1e-4)
    assert not found["met"]
    assert tool.summary(run.rows, {})["met"]
    assert len(json.loads(args.out.read_text())["shapes"]) == 2
    again = tool.Run(args, target, pool)
    assert again.rows == run.rows
