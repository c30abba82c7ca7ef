"""The tables of the verbs: within the width, and without a word broken in the middle."""

from dataclasses import fields
from types import SimpleNamespace

import pytest

from int8kit import files, gpus
from int8kit.cli import layout, tables
from int8kit.database import store
from int8kit.runtime.generate import GeneratedImages
from int8kit.spec import GemmShape, default_config
from int8kit.toolchain import ANY_TOOLCHAIN

SHIPPED = sorted(files.shipped("tuning_db").glob("*.json"))


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def assert_fits(text, *words, width=80):
    assert max(map(len, text.splitlines())) <= width
    for word in words:
        assert word in text


def test_a_plural_has_a_number_other_than_one():
    assert [layout.count(n, "entry", "entries") for n in (0, 1, 2)] == ["0 entries", "1 entry", "2 entries"]
    assert [layout.count(n, "shape") for n in (0, 1, 2)] == ["0 shapes", "1 shape", "2 shapes"]


ROWS = [("a" * 20, "same", "b" * 20, "one two three"), ("c" * 20, "same", "d" * 20, "four five six")]
HEAD = ("name", "constant", "other", "text")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (200, [HEAD[1], "one two three"]),
        (64, ["the same in every row: constant: same", "d" * 20, "four five six"]),
        (55, ["b" * 20, "four five\n", " six"]),
        (46, ["in a wider terminal also: other", "four five six"]),
        (40, ["terminal also:\nother", "four five", "c" * 20]),
    ],
)
def test_columns_go_in_turn(monkeypatch, columns, words):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert_fits(layout.fit(ROWS, HEAD, drop=("other", "constant"), wrap="text"), *words, width=columns)


def test_words_are_not_broken(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = layout.fit([("x", "a-word-of-thirty-six-characters-here and more")], ("a", "b"), wrap="b", left="*")
    assert "a-word-of-thirty-six-characters-here\n" in text


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_database_fits(path):
    base = store.load(path)
    text = tables.database_table(base, ANY_TOOLCHAIN)
    assert_fits(text, "M x N x K", "tile", "proven")
    assert all(str(entry.shape) in text and str(entry.config) in text for entry in base.entries)
    assert_fits(tables.tuning_table(base.entries), "tile", "times by")
    for shape in (base.entries[0].shape, GemmShape(4000, 12288, 4608), GemmShape(1, 2, 3)):
        assert_fits(tables.levels_table(base.levels(shape, ANY_TOOLCHAIN)), "->", "default")


def test_a_case_of_many_layers_fits():
    gemm = {"m": 16584, "n": 53248, "k": 12288, "count": 136, "bias": True, "int8": True, "flops": 10**15,
            "share": 0.43, "layers": ["layers.*.feed_forward.a_module_with_a_long_name", "b", "c"]}  # fmt: skip
    case = {"width": 2048, "height": 2048, "batch": 1, "branch": "cond", "slots": 2048, "tokens": 18432,
            "gemm_flops": 10**15, "attention_flops": 10**14, "gemms": [gemm]}  # fmt: skip
    text = tables.shapes_table({"cases": [case]})
    assert_fits(text, "2048 text slots", "1000 TFLOP in GEMMs", "and 2 more")


def test_configurations_of_an_image_fit():
    base = store.load(SHIPPED[0])
    choices = [(base.resolve(GemmShape(m, 12288, 4608), ANY_TOOLCHAIN), 34) for m in (4096, 4000, 7)]
    times = dict.fromkeys([f.name for f in fields(GeneratedImages) if f.name.endswith(("_s", "_ms", "_gib"))], 1.0)
    more = {"request": SimpleNamespace(variant="fake-quant"), "fused": True, "graphs": True, "attention": "cudnn"}
    outcome = SimpleNamespace(choices=choices, steps=1, device="NVIDIA H200", until_first_step_s=6.0, **times, **more)
    assert_fits(tables.run_tables(outcome), "nearest-m", "1 step ", "fused, CUDA graphs, cudnn")


def test_a_benchmark_fits():
    names = [("int8kit", True), ("int8kit-sm86", True), ("int_mm-eager", False)]
    contestants = [{"name": n, "kind": "linear", "ours": ours, "arithmetic": "int8"} for n, ours in names]
    rows = [
        {"name": n, "kind": "linear", "p20": 1000.5, "p50": 1001.5, "p80": 1002.5, "tops": 812.0, "shape": 0,
         "peak_share": 0.41, "differs": 0, "timed_by": "graph", "note": str(default_config(GemmShape(64, 64, 64)))}
        for n, _ in names
    ]  # fmt: skip
    absent = [{"name": "fp8-row", "kind": "linear", "reason": "a long reason " * 20}]
    gpu = {"sm_mhz": 1545, "power_w": 698, "throttle": ["power cap"]}
    shape = {"m": 18432, "n": 12288, "k": 4608, "gpu_state": gpu, "absent": absent}
    summary = {"of": "int8kit-sm86", "over": "int_mm-eager", "kind": "linear", "shapes": 48, "geomean": 1.5,
               "min": 1.0, "min_at": "18432x12288x4608", "max": 2.0, "max_at": "18432x12288x4608", "faster": 40,
               "ties": 4, "slower": 4, "timed_differently": 0}  # fmt: skip
    details = {**dict.fromkeys(("gpu", "health_tflops", "rounds", "timed_by"), "text " * 9), "shapes": [shape],
               "contestants": contestants, "summary": [summary]}  # fmt: skip
    versions = dict.fromkeys(("torch", "cuda", "driver", "triton"), "text " * 9)
    document = {"versions": versions, "policy": {"timing": "text " * 9}, "rows": rows, "details": details}
    assert_fits(tables.bench_tables(document), "int8kit-sm86", "p50 us", "geometric mean", "power cap", "40/4/4")


def test_verdicts_fit():
    result = SimpleNamespace(
        name="residual_norm_quantize", on="interpreter on the CPU as sm_86 code of a long name", examples=150,
        failure=None, skipped=1, reason=None, evidence="sampled",
    )  # fmt: skip
    assert_fits(tables.verify_table([result]), "residual_norm_quantize", "holds; 1 needs a GPU")
    found = [SimpleNamespace(implementation=f"a.package.{n}:function", results=[result]) for n in range(5)]
    assert_fits(tables.implementations_table(found), *(one.implementation for one in found))
    verdict = SimpleNamespace(name="a-mutant", file="int8kit/kernels/gemm_mma_sync.py", fault="a fault " * 9,
                              ending="needs a GPU", evidence="", how="", by="", seconds=1.0, tried={})  # fmt: skip
    score = {"killed": 0, "ran": 0, "idle": {"needs a GPU": 1}, "score": 1.0}
    assert_fits(tables.mutation_table([verdict], score), "a-mutant", "1 need a GPU")
    error = SimpleNamespace(sqnr_db=41.0, cosine=0.99999, max_error=0.01)
    layer = SimpleNamespace(
        name="layers.33.feed_forward.w2.of_some_module", n=4608, k=12288, error=error, saturated=0.1
    )
    branch = SimpleNamespace(name="cond", layers=[layer], output=error)
    assert_fits(tables.layers_table([branch]), layer.name, "1 of 1 layer ")


def test_findings_fit():
    findings = [SimpleNamespace(name="C compiler", status="failed", found="word " * 40, remedy="remedy " * 30)]
    assert_fits(tables.doctor_table(findings), "failed  C compiler", "-> remedy")
    assert gpus.get("rtx3090")
