"""trace.py: traced products against torch's FLOP counter, and shapes files."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from int8kit import files, models, shapes_file, trace
from int8kit.cli import main
from int8kit.errors import FileError, InputError
from int8kit.models import Case
from int8kit.spec import GemmShape

SHIPPED = files.shipped("shapes") / "ideogram4.json"


def product_flops(module, inputs):
    """FLOPs of mm, addmm and bmm by torch's own counter, which is independent of the tracer."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(**inputs)
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(getattr(torch.ops.aten, op), 0) for op in ("mm", "addmm", "bmm", "baddbmm"))


def _peak():
    """Peak resident memory of this process, in KiB."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.fixture
def grown():
    """Growth of this process's peak memory during the test, in KiB. Earlier tests do not count."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present value
    before = _peak()
    return lambda: _peak() - before


def test_growth_of_the_peak_is_measured(grown):
    torch.ones(50_000_000).sum()
    assert 190_000 < grown() < 300_000


@pytest.mark.parametrize(
    "case",
    [
        Case(1024, 1024),
        Case(1024, 1024, slots=2048),
        Case(768, 1280, batch=2, text_tokens=77),
        Case(512, 512, branch="uncond", batch=3),
    ],
    ids=str,
)
def test_totals_agree_with_torch(case, grown):
    model = models.get("ideogram4")
    [row] = trace.trace(model, [case])["cases"]
    with torch._subclasses.fake_tensor.FakeTensorMode():
        module = model.build()
        assert row["gemm_flops"] == product_flops(module, model.inputs(module, case))
    assert row["gemm_flops"] == sum(g["flops"] for g in row["gemms"])
    assert sum(g["share"] for g in row["gemms"]) == pytest.approx(1, abs=1e-4)
    assert grown() < 1_000_000  # KiB; the weights alone take 18 times that


def test_every_linear_of_the_full_model_is_found():
    case = Case(1024, 1024)
    model = models.get("ideogram4")
    [row] = trace.trace(model, [case])["cases"]
    gemms = {(g["m"], g["n"], g["k"], g["bias"]): g for g in row["gemms"]}
    length = 200 + 4096
    assert gemms[length, 4608, 4608, False]["count"] == 4 * 34
    assert gemms[length, 12288, 4608, False]["count"] == 2 * 34
    assert gemms[length, 4608, 12288, False]["count"] == 34
    assert gemms[length, 4608, 53248, True]["layers"] == ["llm_cond_proj"]
    assert gemms[1, 18432, 512, True]["layers"] == ["layers.*.adaln_modulation"]
    linears = sum(g["count"] for g in row["gemms"] if g["op"] != "bmm")
    assert linears == 279
    [attention] = row["attention"]
    assert (attention["count"], attention["heads"], attention["queries"]) == (34, 18, length)
    assert attention["mask"]


def test_joined_gemms_of_the_fused_forward():
    [row] = trace.trace(models.get("tiny"), [Case(64, 96, batch=2, text_tokens=9)])["cases"]
    assert [(g["m"], g["n"], g["k"], g["count"], g["epilogue"]) for g in row["joined"]] == [
        (66, 1536, 512, 2, "none"), (66, 2048, 512, 2, "swiglu"),
    ]  # fmt: skip
    assert row["joined"][0]["layers"] == [f"layers.*.attention.to_{name}" for name in "kqv"]
    assert row["gemm_flops"] == sum(g["flops"] for g in row["gemms"])  # no FLOPs count twice
    model = replace(models.get("tiny"), joins=())
    assert trace.trace(model, [Case(64, 96)])["cases"][0]["joined"] == []


def test_joined_gemms_of_the_full_model_are_the_shipped_ones():
    case = Case(1024, 1024)
    [row] = trace.trace(models.get("ideogram4"), [case])["cases"]
    assert [(g["m"], g["n"], g["k"], g["count"], g["epilogue"]) for g in row["joined"]] == [
        (4296, 13824, 4608, 34, "none"), (4296, 24576, 4608, 34, "swiglu"),
    ]  # fmt: skip
    for shipped in shapes_file.read(SHIPPED)["cases"]:
        shapes = [(g["m"], g["n"], g["k"]) for g in shipped["joined"]]
        assert shapes == [(shipped["tokens"], n, 4608) for n in (13824, 24576)]


def test_a_file_without_joined_gemms_loads(tmp_path):
    document = trace.trace(models.get("tiny"), [Case(64, 64)])
    shapes_file.write(document, tmp_path / "new.json")
    [joined] = [case.pop("joined") for case in document["cases"]]
    shapes_file.write(document, tmp_path / "old.json")
    assert shapes_file.read(tmp_path / "old.json") == document
    added = set(shapes_file.select(path=tmp_path / "new.json")) - set(shapes_file.select(path=tmp_path / "old.json"))
    assert added == {GemmShape(g["m"], g["n"], g["k"]) for g in joined}
    assert len(added) == 2


def test_joined_rows_of_a_file_are_checked(tmp_path):
    document = trace.trace(models.get("tiny"), [Case(64, 64)])
    document["cases"][0]["joined"][1]["n"] = 2047
    shapes_file.write(document, tmp_path / "s.json")
    with pytest.raises(FileError, match="swiglu with n = 2047; expected an even number"):
        shapes_file.read(tmp_path / "s.json")


def test_tracing_on_real_tensors_finds_the_same():
    model, case = models.get("tiny"), Case(64, 96, batch=2, text_tokens=9)
    [fake] = trace.trace(model, [case])["cases"]
    module = model.build()
    recorder = trace.record(module, model.inputs(module, case))
    real = trace._case_document(model, case, recorder)
    assert real == fake
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_records_products_outside_linears():
    class Odd(torch.nn.Module):
        def forward(self, a, b):
            c = torch.addmm(torch.zeros(3), a, b)
            return torch.baddbmm(torch.zeros(1), c.expand(2, 4, 3), torch.ones(2, 3, 5)) + (a @ b).sum()

    recorder = trace.record(Odd(), {"a": torch.ones(4, 6), "b": torch.ones(6, 3)})
    found = {(p.op, p.batch, p.m, p.n, p.k, p.bias) for p in recorder.products}
    assert found == {("addmm", 1, 4, 3, 6, True), ("baddbmm", 2, 4, 5, 3, True), ("mm", 1, 4, 3, 6, False)}


def test_patterns():
    assert trace.pattern("layers.17.attention.to_out.0") == "layers.*.attention.to_out.*"
    assert trace.pattern("w2") == "w2"


def test_shipped_file_equals_a_new_trace():
    document = shapes_file.read(SHIPPED)
    sizes = {(c["width"], c["slots"], c["branch"]) for c in document["cases"]}
    assert sizes == {
        (size, slots, branch)
        for size in (768, 1024, 1536, 2048)
        for slots, branch in ((200, "cond"), (2048, "cond"), (0, "uncond"))
    }
    case = Case(768, 768, slots=2048)
    [fresh] = trace.trace(models.get("ideogram4"), [case])["cases"]
    assert fresh in document["cases"]


@pytest.mark.slow
def test_default_call_writes_the_shipped_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main.main(["trace-shapes"])
    assert ended.value.code == 0
    assert (tmp_path / "out" / "shapes" / "ideogram4.json").read_text() == SHIPPED.read_text()
    assert "2048x2048 px" in capsys.readouterr().out


def test_round_trip(tmp_path):
    document = trace.trace(models.get("tiny"), [Case(64, 64), Case(64, 64, branch="uncond")])
    shapes_file.write(document, tmp_path / "s.json")
    assert shapes_file.read(tmp_path / "s.json") == document == json.loads(json.dumps(document))


@pytest.mark.parametrize("key", ["m", "count", "layers"])
def test_damaged_file_is_refused(tmp_path, key):
    document = trace.trace(models.get("tiny"), [Case(64, 64)])
    del document["cases"][0]["gemms"][0][key]
    shapes_file.write(document, tmp_path / "s.json")
    with pytest.raises(FileError, match=f"is damaged.*{key}.*trace-shapes"):
        shapes_file.read(tmp_path / "s.json")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: d["cases"][0]["gemms"][0].update(m=64.0), r"gemms\[0\].m = 64.0; expected a whole number"),
        (lambda d: d["cases"][0]["gemms"][0].update(bias=1), r"gemms\[0\].bias = 1; expected true or false"),
        (lambda d: d["cases"][0]["gemms"][0].update(host="pc"), r"unknown field cases\[0\].gemms\[0\].host"),
        (lambda d: d["cases"][0]["gemms"][0].update(layers="all"), r"gemms\[0\].layers = \"all\"; expected a list"),
        (lambda d: d["cases"][0]["gemms"][0].update(share=1.5), r"gemms\[0\].share = 1.5; expected at most 1"),
        (lambda d: d["cases"][0]["gemms"][0].update(flops=7), "7 FLOPs; expected"),
        (lambda d: d["cases"][0].update(gemm_flops=7), "7 FLOPs in GEMMs; expected"),
        (lambda d: d["cases"][0].update(attention_flops=7), "7 FLOPs in attention; expected"),
        (lambda d: d["cases"][0]["gemms"].append(d["cases"][0]["gemms"][0]), "occurs twice"),
        (lambda d: d["cases"][0].update(height=0), "height = 0; expected 1 or more"),
        (lambda d: d["cases"][0].pop("branch"), r"no cases\[0\].branch"),
        (lambda d: d.update(user="me"), "unknown field user"),
        (lambda d: d.pop("model"), "no model"),
        (lambda d: d.update(cases={}), "cases = {}; expected a list"),
    ],
)
def test_damaged_shapes_file_gives_a_one_line_error(tmp_path, damage, reason):
    document = trace.trace(models.get("tiny"), [Case(64, 64)])
    path = tmp_path / "s.json"
    shapes_file.write(document, path)
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(FileError, match=rf"is damaged \(.*{reason}.*; make one with `int8kit trace-shapes`") as caught:
        shapes_file.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [1.5, "64", float("inf"), True, 0, 2**31])
def test_extents_are_whole_numbers_in_range(tmp_path, value):
    document = trace.trace(models.get("tiny"), [Case(64, 64)])
    document["cases"][0]["gemms"][0] |= {"m": value, "flops": None}
    document["cases"][0]["gemm_flops"] = None
    shapes_file.write(document, tmp_path / "s.json")
    with pytest.raises(InputError):
        shapes_file.read(tmp_path / "s.json")


def test_int8_shapes():
    document = shapes_file.read(SHIPPED)
    shapes = shapes_file.int8_shapes(document, (1024, 1024))
    assert {s.m for s in shapes} == {4096, 4296, 6144}
    assert {(s.n, s.k) for s in shapes} == {
        (4608, 4608), (12288, 4608), (4608, 12288), (4608, 53248), (13824, 4608), (24576, 4608),
    }  # fmt: skip
    unmarked = {"cases": [{"height": 1, "width": 1, "gemms": [{"m": 500, "n": 512, "k": 512, "count": 2}]}]}
    assert shapes_file.int8_shapes(unmarked) == {GemmShape(500, 512, 512): 2 * 2 * 500 * 512 * 512}
    assert shapes_file.int8_shapes(unmarked, (2, 2)) == {}
