"""bench/gemm.py and timing/ without a GPU: real contestants in Triton's interpreter, invented times."""

import contextlib
import dataclasses
import json
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

from int8kit import gpus, shapes_file
from int8kit.bench import contestants, gemm, results
from int8kit.bench.contestants import Contestant
from int8kit.cli import tables
from int8kit.database import store
from int8kit.errors import CheckFailed, FileError, InputError, ShapeError, UnknownName
from int8kit.kernels.gemm import Fallback
from int8kit.spec import GemmShape, SwigluShape
from int8kit.timing import captured, gpu_state, interleave
from int8kit.timing.captured import PreparedContestant
from int8kit.timing.interleave import Times
from int8kit.timing.operands import COPIES_MAX, TimingOperands, differing, poison, poisoned, weight_copies
from int8kit.toolchain import ANY_TOOLCHAIN

H200 = gpus.get("h200")
SHAPE = GemmShape(33, 64, 96)
SHAPES = Path(__file__).parent.parent / "shapes"
OTHER_MODELS, FEW_ROWS = SHAPES / "other_models.json", SHAPES / "few_rows.json"


def timer(calls, rounds):
    """The first contestant takes 10 us, the second 20 us and so on; p20 and p80 lie 4 us apart from it."""
    for call in calls:
        call()
    return [Times(us - 4, us, us + 4) for us in (10.0 * (i + 1) for i in range(len(calls)))]


SETTING = gemm.Setting(rounds=3, device="cpu", copies=3, timer=timer)


@pytest.fixture(scope="module")
def result():
    listed = contestants.ours(H200, arch="sm86") + contestants.standard()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Fallback)  # the interpreter does not run the kernels that the lookup chooses
        return gemm.measure_shapes([SHAPE, GemmShape(17, 32, 64)], listed, H200, SETTING)


def right(o):
    return PreparedContestant([partial(torch.clone, o.truth("output")) for _ in o.weights], "exact")


def wrong(o):
    made = o.truth("output").clone()
    made[3, 5:7] += 1
    return PreparedContestant([lambda: made])


def crash(o):
    raise ImportError("/home/somebody/lib/peer.so: undefined symbol")


def run(*listed):
    return gemm.measure_shapes([SHAPE], listed, H200, SETTING)


def test_contestants_are_known_by_name_and_kind():
    listed = contestants.ours(H200, arch="sm86") + contestants.standard(inductor=True)
    assert len({(c.name, c.kind) for c in listed}) == len(listed)
    assert [c.name for c in listed if c.ours] == ["int8kit", "int8kit", "int8kit-sm86", "int8kit-sm86"]
    assert {c.name for c in contestants.only(listed, ["bf16"])} == {"int8kit", "int8kit-sm86", "bf16"}
    assert contestants.only(listed, []) == listed
    with pytest.raises(UnknownName, match="'cublas'; expected bf16, fp8-row"):
        contestants.only(listed, ["cublas"])


def test_another_architectures_code_takes_a_timed_database_before_a_modelled_one(monkeypatch):
    asked = []
    monkeypatch.setattr(contestants, "int8kit", lambda base, arch=None: asked.append((base.gpu.alias, arch)) or [])
    contestants.ours(H200, arch="sm86")
    assert asked == [("h200", None), ("rtx3090", "sm86")]
    contestants.ours(H200, gpu="rtx3060")
    assert asked[2:] == [("h200", None), ("rtx3060", "sm86")]


def test_which_architectures_code_is_timed():
    def names(*args, **kwargs):
        return {c.name for c in contestants.ours(*args, **kwargs)}

    assert names(H200) == {"int8kit"}
    assert names(H200, gpu="rtx3090") == {"int8kit", "int8kit-sm86"}
    assert names(H200, path=SHAPES.parent / "tuning_db" / "rtx3090.json") == {"int8kit", "int8kit-sm86"}
    assert names(gpus.get("rtx3090"), arch="sm86") == {"int8kit"}  # its own code
    with pytest.raises(InputError, match="'sm90' does not run on NVIDIA GeForce RTX 3090: expected one of sm80, sm86"):
        contestants.ours(gpus.get("rtx3090"), gpu="h200")
    with pytest.raises(UnknownName):
        contestants.ours(H200, gpu="rtx9")
    with pytest.raises(FileError):
        contestants.ours(H200, path=OTHER_MODELS)


@pytest.mark.slow
@pytest.mark.xdist_group("bench-result")
def test_every_contestant_is_compared_with_the_reference(result):
    assert len(result.shapes) == 2
    for shape in result.shapes:
        rows = {(row["name"], row["kind"]): row for row in shape["rows"]}
        own = [row for (name, _), row in rows.items() if name.startswith("int8kit")]
        assert len(own) == 4
        assert all(row["differs"] == 0 for row in own)
        assert rows["int_mm", "gemm"]["differs"] == 0  # int32 accumulators
        assert rows["bf16", "gemm"]["differs"] > shape["elements"] // 2
        assert rows["int8kit", "gemm"]["note"].endswith("model")  # the level of the lookup
    result.conclude()


@pytest.mark.slow
@pytest.mark.xdist_group("bench-result")
def test_document(result):
    document = result.document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert next(iter(document)) == "format"
    assert document["complete"]
    details, [row, *others] = document["details"], document["rows"][1:]
    assert (row["p20"], row["p50"], row["p80"], row["unit"], row["rounds"]) == (16, 20, 24, "us", 3)
    assert (row["shape"], row["m"], row["n"], row["k"], row["timed_by"]) == (0, 33, 64, 96, "host")
    assert row["tops"] == round(SHAPE.flops / 20 / 1e6, 1)
    assert [other["shape"] for other in others] == sorted(other["shape"] for other in others)
    assert len(document["rows"]) == sum(len(shape["rows"]) for shape in result.shapes)
    assert [set(shape) for shape in details["shapes"]] == [{"m", "n", "k", "elements", "gpu_state", "absent"}] * 2
    assert details["contestants"][0]["what"]
    assert details["contestants"][0]["entries"] == len(store.merged_view(H200, ANY_TOOLCHAIN)[0].entries)
    assert (details["gpu"], details["int8_tops"], details["rounds"]) == ("NVIDIA H200", H200.int8_tops, 3)
    assert document["policy"]["timing"] == interleave.shared_policy()


@pytest.mark.slow
@pytest.mark.xdist_group("bench-result")
def test_a_document_is_a_result_file(result, tmp_path):
    results.write(tmp_path / "r.json", result.document())
    read = results.read(tmp_path / "r.json")
    assert (read.benchmark, read.device, read.gpu, read.complete) == ("gemm", "cpu", None, True)
    assert [row.p50 for row in read.rows] == [row["p50"] for shape in result.shapes for row in shape["rows"]]


@pytest.mark.slow
@pytest.mark.xdist_group("bench-result")
def test_tables(result, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = tables.bench_tables(result.document())
    for word in (
        "33x64x96",
        "17x32x64",
        "int8kit-sm86 is",
        "of int8 peak",
        "geometric mean",
        "NVIDIA H200",
        "3 rounds",
    ):
        assert word in text
    empty = gemm.measure_shapes([], result.contestants, H200, SETTING).document()
    assert "NVIDIA H200" in tables.bench_tables(empty)


def test_ratios_and_ties():
    own, other = (Contestant(name, "gemm", "", right, ours=name == "a") for name in "ab")

    def times(us):
        return dict(zip(("p20", "p50", "p80"), us, strict=True))

    def shape(m, a, b):
        rows = [
            {"name": n, "kind": "gemm", "timed_by": by, "differs": 0} | times(us)
            for n, us, by in (("a", a, "graph"), ("b", b, "host" if m == 3 else "graph"))
        ]
        return {"m": m, "n": 1, "k": 1, "rows": rows}

    shapes = [shape(1, (9, 10, 11), (38, 40, 42)), shape(2, (9, 10, 11), (4, 5, 6)), shape(3, (9, 10, 11), (8, 10, 12))]
    [row] = gemm.summary(shapes, [own, other])
    assert (row["of"], row["over"], row["shapes"]) == ("a", "b", 3)
    assert row["geomean"] == pytest.approx((4 * 0.5 * 1) ** (1 / 3), abs=1e-4)
    assert (row["min"], row["min_at"], row["max"], row["max_at"]) == (0.5, "2x1x1", 4, "1x1x1")
    assert (row["faster"], row["ties"], row["slower"], row["timed_differently"]) == (1, 1, 1, 1)


def test_an_absent_contestant_is_listed_with_its_reason():
    listed = [
        Contestant("int8kit", "gemm", "", right, ours=True),
        Contestant("crash", "gemm", "", crash),
        Contestant("declines", "gemm", "", lambda o: "not today"),
        Contestant("narrow", "gemm", "", lambda o: PreparedContestant([lambda: o.truth("output")[:, 1:]])),
        Contestant("late", "gemm", "", lambda o: PreparedContestant([partial(crash, o)])),
    ]
    result = run(*listed)
    result.conclude()
    [shape] = result.shapes
    assert [row["name"] for row in shape["rows"]] == ["int8kit"]
    reasons = {row["name"]: row["reason"] for row in shape["absent"]}
    assert reasons["crash"] == reasons["late"] == "ImportError: peer.so: undefined symbol"  # without the folder
    assert reasons["declines"] == "not today"
    assert "returned torch.bfloat16 (33, 63)" in reasons["narrow"]
    assert "not today" in tables.bench_tables(result.document())


def test_a_wrong_result_of_int8kit_fails_the_check():
    run(Contestant("int8kit", "gemm", "", right, ours=True), Contestant("peer", "gemm", "", wrong)).conclude()
    result = run(Contestant("int8kit", "gemm", "", wrong, ours=True))
    with pytest.raises(CheckFailed, match=r"int8kit \(gemm\) differs .* in 2 of 2112 elements of 33x64x96"):
        result.conclude()
    result = run(Contestant("int8kit", "gemm", "", crash, ours=True))
    with pytest.raises(CheckFailed, match="did not run on 33x64x96: ImportError"):
        result.conclude()


def test_an_interrupt_keeps_the_finished_shapes(tmp_path):
    def interrupted(calls, rounds):
        if len(heard):
            raise KeyboardInterrupt
        return timer(calls, rounds)

    heard = []
    keep = gemm.keeper(tmp_path / "b.json", heard.append)
    setting = dataclasses.replace(SETTING, timer=interrupted)
    result = gemm.measure_shapes(
        [SHAPE, SHAPE], [Contestant("a", "gemm", "", right, ours=True)], H200, setting, on_shape=keep
    )
    assert heard == ["[1/2] 33x64x96: a gemm 10.0 us; 0 absent"]
    kept = json.loads((tmp_path / "b.json").read_text())
    assert (kept["format"], kept["benchmark"]) == (results.FORMAT, "gemm")
    assert (kept["complete"], len(kept["details"]["shapes"]), len(kept["rows"])) == (False, 1, 1)
    with pytest.raises(KeyboardInterrupt):
        result.conclude()


def test_a_gpu_in_error_ends_the_run():
    def faulty(calls, rounds):
        raise RuntimeError("CUDA error: an illegal memory access")

    setting = dataclasses.replace(SETTING, timer=faulty)
    result = gemm.measure_shapes([SHAPE], [Contestant("a", "gemm", "", right)], H200, setting)
    with pytest.raises(CheckFailed, match="illegal memory access"):
        result.conclude()


def test_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(InputError, match="no CUDA device here"):
        gemm.benchmark([SHAPE], [])
    with pytest.raises(InputError, match="0 rounds: expected 1 or more"):
        gemm.benchmark([SHAPE], [], gemm.Setting(rounds=0))
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(FileError, match="--force"):
        gemm.benchmark([SHAPE], [], output=tmp_path / "mine.json")
    assert gpu_state.Sensors().read() is None


def test_weight_copies_exceed_twice_the_l2():
    """Between two launches with one copy, the others are read: at least twice the L2."""
    weight = 64 * 96
    assert [weight_copies(SHAPE, l2) for l2 in (weight // 2, weight // 2 + 1, weight, 10_000)] == [1, 3, 3, 5]
    assert weight_copies(GemmShape(1, 16, 16), H200.l2_bytes) == COPIES_MAX
    traced = [*shapes_file.select(None), *shapes_file.select(None, FEW_ROWS), *shapes_file.select(None, OTHER_MODELS)]
    for gpu in gpus.GPUS.values():
        assert max(weight_copies(shape, gpu.l2_bytes) for shape in traced) < COPIES_MAX


def test_the_shared_policy_is_the_databases_without_its_own_conditions():
    assert interleave.shared_policy() == (
        "operands quantized from normal data; weights rotated past twice the L2; contestants interleaved round by "
        "round in an order shuffled anew each time; CUDA events; medians with p20 and p80"
    )


def test_operands_have_equal_copies_and_are_reproducible():
    small = dataclasses.replace(H200, l2_bytes=10_000)
    operands = TimingOperands(SHAPE, small, device="cpu")
    assert len({w.data_ptr() for w in operands.weights}) == operands.copies == len(operands.weights16)
    assert all(torch.equal(w, operands.weights[0]) for w in operands.weights)
    assert torch.equal(operands.xq, TimingOperands(SHAPE, small, device="cpu").xq)


def test_differing_counts_bits():
    want = torch.tensor([1.0, torch.nan, 0.0, 2.0]).bfloat16()
    assert differing(want.clone(), want) == 0
    assert differing(torch.tensor([1.0, 0.0, -0.0, torch.nan]).bfloat16(), want) == 3
    assert differing(torch.tensor([1, 2]), torch.tensor([1, 3])) == 1
    with pytest.raises(ValueError, match="float32"):
        differing(want.float(), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32])
def test_poison(dtype):
    with torch.inference_mode():
        tensor = torch.zeros(3, dtype=dtype)
    assert not poisoned(tensor)
    assert poisoned(poison(tensor))


def test_shapes_to_measure():
    assert shapes_file.parse_shape("1x2X3") == GemmShape(1, 2, 3)
    for text in ("1x2", "1x2x", "axbxc", "1x2x3x4", "-1x2x3", "1x2x" + "9" * 5000):
        with pytest.raises(InputError, match="expected MxNxK"):
            shapes_file.parse_shape(text)
    assert shapes_file.select(["4x6x8", "4x6x8+swiglu"], epilogues=True) == [GemmShape(4, 6, 8), SwigluShape(4, 6, 8)]
    for text, words in (("4x6x8+swiglu", "for `tune` alone"), ("4x6x8+gelu", "for `tune` alone")):
        with pytest.raises(InputError, match=words):
            shapes_file.select([text])
    with pytest.raises(InputError, match=r"expected MxNxK or MxNxK\+swiglu"):
        shapes_file.select(["4x6x8+gelu"], epilogues=True)
    with pytest.raises(ShapeError, match="N = 5 with SwiGLU: expected an even number"):
        shapes_file.select(["4x5x8+swiglu"], epilogues=True)
    joined = set(shapes_file.select(None, epilogues=True)) - set(shapes_file.select(None))
    assert {type(shape) for shape in joined} == {SwigluShape}
    assert len(joined) == 12
    assert shapes_file.select(["4x5x6", "1x2x3"]) == [GemmShape(1, 2, 3), GemmShape(4, 5, 6)]
    every = shapes_file.select(None)
    assert len(every) == 72
    few = shapes_file.select(None, limit=8)
    assert len(few) == 8 == len(set(few))
    assert {(s.n, s.k) for s in few} == {(s.n, s.k) for s in every}  # every layer is there
    assert max(s.m for s in few) > 4 * min(s.m for s in few)
    assert shapes_file.select(None, limit=1000) == every
    with pytest.raises(InputError, match="limit 0"):
        shapes_file.select(None, limit=0)


def test_shapes_of_other_models():
    shapes = shapes_file.select(None, OTHER_MODELS)
    assert len(shapes) == 16
    document = shapes_file.read(OTHER_MODELS)
    assert all(case["source"] for case in document["cases"])
    assert not set(shapes) & set(shapes_file.select(None))


@pytest.mark.parametrize(
    ("replays", "refuses", "by", "note"),
    [
        (True, False, "graph", "n"),
        (False, False, "host", "n; from the host: RuntimeError: a captured graph does not write the result"),
        (True, True, "host", "n; from the host: ValueError: legacy stream"),
    ],
)
def test_a_graph_is_trusted_only_if_it_writes(monkeypatch, replays, refuses, by, note):
    """CUDA's graphs are replaced by one that replays the last launch, replays nothing, or cannot capture."""
    out, streams = torch.zeros(4), []

    def launch():
        if refuses and capturing:
            raise ValueError("legacy stream")
        return out.fill_(3)

    class Graph:
        def capture_begin(self):
            capturing.append(self)

        def capture_end(self):
            capturing.clear()

        def replay(self):
            return replays and launch()

    capturing = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "new")
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "mine")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    call = captured.RepeatableCall(PreparedContestant([launch] * 3, "n"), graph=True, least=4)
    assert (call.by, call.note, call.launches) == (by, note, 6 if by == "graph" else 1)
    assert streams == (["mine"] if by == "host" else [])
    assert call.result.tolist() == [3] * 4
    poison(out)
    call()
    assert call.result.tolist() == [3] * 4


def test_one_line():
    assert captured.one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert captured.one_line(OSError("cannot load '/a/b.c/d.so': no")) == "OSError: cannot load 'd.so': no"
    assert captured.one_line(KeyError()) == "KeyError"
    assert len(captured.one_line(ValueError("x" * 999))) == 160


def test_throttle_bits_have_names():
    assert gpu_state.throttling(0x1 | 0x2) == []  # idle, and clocks that the user has set
    assert gpu_state.throttling(0x4 | 0x40) == ["power cap", "hardware thermal"]


def test_the_length_of_a_sample_reaches_the_timer(monkeypatch):
    seen = []
    monkeypatch.setattr(
        gemm.interleave, "interleave", lambda calls, rounds, sample_us: seen.append((rounds, sample_us))
    )
    gemm.Setting(rounds=5, sample_us=80000).time([])
    assert seen == [(5, 80000)]
    with pytest.raises(InputError, match=r"samples of 0.05 ms: expected 0.1 to 10000 ms"):
        gemm.benchmark([SHAPE], [], gemm.Setting(sample_us=50))
