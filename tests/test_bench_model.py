"""bench/model.py and bench/fused.py on a machine without a GPU: the tiny model, and dry runs."""

import json

import pytest
import torch

from int8kit.bench import fused, model, results
from int8kit.cli import tables
from int8kit.errors import InputError, UnknownName

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@needs_no_gpu
@pytest.mark.slow
def test_a_forward_of_the_tiny_model_in_every_variant(quiet_interpreter, monkeypatch):
    replaced = []
    replace_linears = model.replace_linears
    monkeypatch.setattr(model, "replace_linears", lambda *args: replaced.append(replace_linears(*args)))
    notes = []
    setting = model.ModelSetting("tiny", 64, 64, text_tokens=5, rounds=1, stock_slots=9)
    document = model.measure(setting, note=notes.append)
    assert document == json.loads(json.dumps(document))
    variants = [model.BF16_STOCK, model.BF16_TIGHT, model.INT8_STOCK, model.INT8_TIGHT, model.INT8_UNMASKED]
    assert [row["name"] for row in document["rows"]] == variants
    assert all(0 < row["p20"] <= row["p50"] <= row["p80"] for row in document["rows"])
    assert {(row["unit"], row["rounds"]) for row in document["rows"]} == {("ms", 1)}
    assert not any("peak_gib" in row for row in document["rows"])
    assert [note.rpartition(":")[0] for note in notes] == variants
    assert len(replaced) == 1
    assert document["details"] == {"model": "tiny", "size": "64x64", "text_tokens": 5}
    assert (document["benchmark"], document["device"]) == ("model", "cpu")
    assert document["policy"]["database"]["files"] == ["rtx3090.json"]
    assert document["policy"]["database"]["entries"] > 0
    table = tables.bench_model_table(document).splitlines()[2:]
    assert [row.rpartition("  ")[0].strip() for row in table] == variants


@needs_no_gpu
def test_a_full_size_model_needs_a_gpu():
    with pytest.raises(InputError, match="no CUDA device for the model 'ideogram4'"):
        model.measure()
    with pytest.raises(InputError, match="0 rounds: expected 1 or more"):
        model.measure(model.ModelSetting("tiny", rounds=0))
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


@needs_no_gpu
def test_bench_model_passes_its_options(monkeypatch, tmp_path, verb):
    heard = []

    def measure(setting, note):
        heard.append(setting)
        note("bf16: 1.5 ms")
        return {"benchmark": "model", "rows": [{"name": "bf16", "p50": 1.5}, {"name": "int8", "p50": 1}]}

    monkeypatch.setattr(model, "measure", measure)
    options = ("--size", "64x32", "--text-tokens", "5", "--rounds", "2", "--gpu", "H200")
    table, err = verb("bench", "model", "tiny", *options, "-o", tmp_path / "m.json")
    assert heard == [model.ModelSetting("tiny", 32, 64, text_tokens=5, rounds=2, gpu="H200")]
    assert "1.5 ms" in err
    assert [line.split() for line in table.splitlines()[2:]] == [["bf16", "1.5"], ["int8", "1.0"]]
    assert json.loads((tmp_path / "m.json").read_text())["format"] == results.FORMAT


def test_the_table_of_a_gpus_result_has_its_peak_memory():
    table = tables.bench_model_table({"rows": [{"name": "bf16", "p50": 1.5, "peak_gib": 21.456}]})
    assert [line.split() for line in table.splitlines()[::2]] == [
        ["variant", "ms", "peak", "GiB"],
        ["bf16", "1.5", "21.46"],
    ]
