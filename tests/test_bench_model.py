"""bench/model.py and bench/fused.py on a machine without a GPU: the tiny model, and dry runs."""

import json
import re

import pytest
import torch

from int8kit import gpus, models
from int8kit.bench import fused, model, results
from int8kit.cli import tables
from int8kit.database.database import Database
from int8kit.errors import InputError, UnknownName
from int8kit.runtime.repairs import described

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@needs_no_gpu
@pytest.mark.slow
def test_a_step_of_the_tiny_model_by_each_contestant(quiet_interpreter):
    notes = []
    shape = {"text_tokens": (5, 3), "rounds": 1, "stock_slots": 9}
    setting = model.ModelSetting("tiny", 64, 64, variants=("int8", "bf16"), each_repair=True, **shape)
    document = model.measure(setting, note=notes.append)
    assert document == json.loads(json.dumps(document))
    names = [
        "stock, 9 text slots",
        "stock, 5 text slots",
        "int8",
        *(f"int8 without {one}" for one in described()),
        "bf16",
    ]
    assert [row["name"] for row in document["rows"]] == names
    assert all(0 < row["p20"] <= row["p50"] <= row["p80"] for row in document["rows"])
    assert all(row["of_stock"] > 0 and row["first_ms"] > 0 for row in document["rows"])
    assert {(row["unit"], row["rounds"]) for row in document["rows"]} == {("ms", 1)}
    assert [note.partition(": first")[0] for note in notes[: len(names)]] == names
    details = document["details"]
    assert (details["model"], details["size"], details["prompts"]) == ("tiny", "64x64", [5, 3])
    assert (document["benchmark"], document["device"]) == ("model", "cpu")
    assert document["policy"]["database"]["files"] == ["rtx3090.json"]
    table = tables.bench_model_table(document).splitlines()[2:]
    assert [re.split("  +", row.strip())[0] for row in table] == names
    document = model.measure(model.ModelSetting("tiny", 64, 64, variants=("int8",), profiled=True, **shape))
    profiles = document["details"]["profile"]
    assert list(profiles) == [names[0], names[1], "int8"]
    assert profiles["int8"]["ms"]["row kernels"] > 0
    assert profiles[names[0]]["ms"]["row kernels"] == 0
    assert all(one["adds_up"] for one in profiles.values())
    second = tables.bench_model_table(document).split("\n\n")[1]
    assert [re.split("  +", row.strip())[0] for row in second.splitlines()[2:]] == list(profiles)


@needs_no_gpu
def test_contestants_agree():
    """Every contestant computes the guided velocity of the same model."""
    tiny = models.get("tiny")
    setting = model.ModelSetting("tiny", 64, 64, text_tokens=(5,), stock_slots=9, variants=("int8", "fake-quant"))
    torch.manual_seed(0)
    found = {
        name: step()
        for name, step in model._contestants(tiny, setting, torch.device("cpu"), Database(gpus.get("rtx3090")))
    }
    assert len(found) == 4
    assert {tuple(one.shape) for one in found.values()} == {(1, 16, 128)}
    assert all(one.dtype is torch.float32 and one.isfinite().all() for one in found.values())


@needs_no_gpu
def test_a_full_size_model_needs_a_gpu():
    with pytest.raises(InputError, match="no CUDA device for the model 'ideogram4'"):
        model.measure()
    with pytest.raises(InputError, match="0 rounds: expected 1 or more"):
        model.measure(model.ModelSetting("tiny", rounds=0))
    with pytest.raises(InputError, match="0 text tokens: expected 1 or more"):
        model.measure(model.ModelSetting("tiny", text_tokens=(0,)))
    with pytest.raises(UnknownName, match="unknown variant 'int4'"):
        model.measure(model.ModelSetting("tiny", variants=("int4",)))
    with pytest.raises(UnknownName, match="sdxl"):
        model.measure(model.ModelSetting("sdxl"))


@needs_no_gpu
def test_fused_kernels_dry_run(quiet_interpreter):
    heard = []
    document = fused.measure(only=["swiglu_quantize"], dry_run=True, on_record=heard.append)
    assert document["rows"] == heard
    assert [run["variant"] for run in heard] == ["copy", *map(str, fused.SWIGLU_TILES), "eager"]
    assert {(run["kernel"], run["m"]) for run in heard} == {("swiglu_quantize", 3)}
    assert {run["bytes"] for run in heard} == {5 * 3 * 256 + 4 * 3}
    with pytest.raises(UnknownName, match="unknown row kernel 'softmax'"):
        fused.measure(only=["softmax"], dry_run=True)
    with pytest.raises(InputError, match="--dry-run runs tiny sizes"):
        fused.measure()
    with pytest.raises(InputError, match="expected 1 or more rounds"):
        fused.measure(rounds=0, dry_run=True)


@needs_no_gpu
def test_bench_fused_prints_a_table_and_writes_a_document(quiet_interpreter, tmp_path, verb):
    out = tmp_path / "out" / "fused.json"
    only = ("--only", "rms_norm_quantize", "--only", "qk_norm_rope")
    out.parent.mkdir()
    out.write_text('{"format": "int8kit.bench-fused/1"}')  # of an earlier version
    for _ in range(2):  # a second call may overwrite the first one's file
        table, _ = verb("bench", "fused", "--dry-run", *only, "-o", out)
    document = json.loads(out.read_text())
    assert (document["format"], document["benchmark"]) == (results.FORMAT, "fused")
    assert document["details"]["dry_run"]
    assert {run["kernel"] for run in document["rows"]} == {"rms_norm_quantize", "qk_norm_rope"}
    assert all(run["p50"] > 0 and {"tb_s", "of_copy", "bytes"} <= set(run) for run in document["rows"])
    assert len(table.splitlines()) == 2 + len(document["rows"])
    assert json.loads(verb("bench", "fused", "--dry-run", *only, "--json")[0])["benchmark"] == "fused"


ROWS = [
    {"name": "stock", "p20": 5.0, "p50": 6.0, "p80": 7.0, "of_stock": 1.0, "first_ms": 9.0},
    {"name": "int8", "p20": 1.0, "p50": 1.5, "p80": 2.0, "of_stock": 4.0, "first_ms": 3.0},
]


@needs_no_gpu
def test_bench_model_passes_its_options(monkeypatch, tmp_path, verb):
    heard = []

    def measure(setting, note):
        heard.append(setting)
        note("bf16: 1.5 ms")
        return {"benchmark": "model", "rows": ROWS, "details": {}}

    monkeypatch.setattr(model, "measure", measure)
    options = ("--size", "64x32", "--text-tokens", "5", "--text-tokens", "7", "--rounds", "2", "--gpu", "H200")
    more = ("--variant", "fp8", "--compile", "--repairs", "--profile")
    table, err = verb("bench", "model", "tiny", *options, *more, "-o", tmp_path / "m.json")
    assert heard == [
        model.ModelSetting(
            "tiny", 32, 64, text_tokens=(5, 7), rounds=2, variants=("fp8",), compiled=True, each_repair=True,
            profiled=True, gpu="H200",
        )
    ]  # fmt: skip
    assert "1.5 ms" in err
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["stock", "5.0", "6.0", "7.0", "1.00", "9"],
        ["int8", "1.0", "1.5", "2.0", "4.00", "3"],
    ]
    assert json.loads((tmp_path / "m.json").read_text())["format"] == results.FORMAT


def test_the_table_of_a_gpus_result_has_its_memory():
    rows = [{**row, "activations_gib": 0.987} for row in ROWS]
    table = tables.bench_model_table({"rows": rows, "details": {}})
    assert [line.split()[-1] for line in table.splitlines()[2:]] == ["0.99", "0.99"]
