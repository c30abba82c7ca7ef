"""The verbs as a user calls them: in a process of their own, in an empty folder, on good and on bad input."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from int8kit import __main__, files, interrupt, models, shapes_file, shapes_schema
from int8kit.bench import gemm, results
from int8kit.cli import main
from int8kit.cli.terminal import RESULT_FORMAT
from int8kit.database import store
from int8kit.database.schema import FORMAT
from int8kit.kernels.gemm import kernel_hash
from int8kit.spec import GemmShape, Kernel, default_config
from int8kit.tune import session, workers
from int8kit.verify import property_runs

WITHOUT_A_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
HERE = "cuda" if torch.cuda.is_available() else "cpu"
VERIFY = "int8kit verify --gpu rtx3090"  # of the documents
TUNE = ("tune", "--gpu", "rtx3090", "--shape", "2x64x40", "-o", "t.json")
TUNED = {GemmShape(2, 64, 40)}  # few rows fit few tiles, and such a K only the Triton kernel: 33 compilations


def int8kit(*args, cwd, status=0, **env):
    done = subprocess.run(
        [sys.executable, "-m", "int8kit", *map(str, args)],
        cwd=cwd, capture_output=True, text=True, timeout=300,
        env={k: v for k, v in {**os.environ, **env}.items() if k != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.mark.slow
@pytest.mark.process
def test_trace_shapes(tmp_path, monkeypatch, verb):
    done = int8kit("trace-shapes", "ideogram4", "--size", "1024x768", "--batch", "2", "--json", cwd=tmp_path)
    assert done.stderr == ""  # no warning of another library
    document = json.loads(done.stdout)
    assert document == shapes_file.read(tmp_path / "out" / "shapes" / "ideogram4.json")
    assert [(c["height"], c["width"], c["batch"], c["branch"]) for c in document["cases"]] == [
        (768, 1024, 2, "cond"),
        (768, 1024, 2, "uncond"),
    ]
    assert {"m", "n", "k", "count", "bias", "layers"} <= set(document["cases"][0]["gemms"][0])
    monkeypatch.chdir(tmp_path)
    table, _ = verb("trace-shapes", "tiny", "--slots", "2048", "--branch", "cond")
    assert "layers.*.feed_forward.w2" in table
    assert "2048 text slots" in table


def of_the_workshop(test):
    """Mark a test of the folder that is tuned once: it costs that, and stays with the others."""
    for mark in (pytest.mark.slow, pytest.mark.process, pytest.mark.xdist_group("workshop")):
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A folder with t.json, written by a tuner that Ctrl-C ended and that continued; and the output of both runs."""
    folder = tmp_path_factory.mktemp("workshop")
    process = subprocess.Popen(
        [sys.executable, "-m", "int8kit", *TUNE], cwd=folder, text=True, start_new_session=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    journal = folder / "t.json.journal"

    def compiled():
        return journal.read_text().count('"compiled"') if journal.exists() else 0

    while compiled() < 6:  # in the middle of 33 kernels
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    out, err = process.communicate(timeout=60)
    ended = SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err, compiled=compiled())
    return SimpleNamespace(folder=folder, ended=ended, again=int8kit(*TUNE, "--json", cwd=folder))


@pytest.fixture
def workshop(walk):
    return walk.folder


@of_the_workshop
def test_ctrl_c_keeps_what_is_done(walk):
    ended, again = walk.ended, walk.again
    assert ended.returncode == 130
    assert "Traceback" not in ended.stdout + ended.stderr
    kept = "finished work is kept; run the same command again to continue from here"
    assert ended.stderr.endswith(f"int8kit: interrupted; {kept}\n")
    assert ended.compiled > 0
    assert f"resuming an interrupted run: {ended.compiled} kernels compiled" in again.stderr
    assert all(line.startswith("int8kit: ") for line in (ended.stderr + again.stderr).splitlines())
    assert len(store.load(walk.folder / "t.json").entries) == len(TUNED)


@of_the_workshop
def test_tune(workshop):
    base = store.load(workshop / "t.json", "rtx3090")
    assert {e.shape for e in base.entries} == TUNED
    assert len({e.triton for e in base.entries}) == 1


@of_the_workshop
def test_tune_reports_its_source(walk):
    document = json.loads(walk.again.stdout)
    assert document["format"] == RESULT_FORMAT
    [report] = document["targets"]
    assert report["source"] in ("modelled", "proxy", "measured")
    assert report["source"] in walk.again.stderr or "measuring" in walk.again.stderr
    again = store.load(walk.folder / "t.json")
    assert len(again.entries) == len(report["entries"])


@of_the_workshop
def test_run(workshop, monkeypatch, verb):
    done = int8kit("run", "--size", "64x48", "--steps", "2", "--gpu", "rtx3090", "--db", "t.json", cwd=workshop)
    assert "wrote out/image.png" in done.stdout
    assert all(line.startswith("int8kit: ") for line in done.stderr.splitlines()), done.stderr
    assert "peak memory" in done.stdout
    with Image.open(workshop / "out" / "image.png") as image:
        image.load()
        assert image.size == (64, 48)
    monkeypatch.chdir(workshop)
    out, err = verb("run", "--size", "64x48", "--steps", "2", "--json")  # ours: overwritten
    report = json.loads(out)
    assert report["configurations"]
    assert report["step_ms"] > 0
    assert all(line.startswith("int8kit: ") for line in err.splitlines())  # no bar of another library


@of_the_workshop
def test_verify_stamps_what_it_proved(workshop, tmp_path, monkeypatch, verb):
    """One entry of the plain kernel, which every machine executes, beside those that were tuned."""
    base = store.load(workshop / "t.json")
    config = default_config(GemmShape(333, 64, 64))
    plain = base.entries[0].model_copy(update={"m": 333, "config": config, "kernel": kernel_hash(config.kernel)})
    gluon = store.load(files.shipped("tuning_db") / "rtx3090.json").entries[0]  # which needs a GPU
    text = base.merged([plain, gluon.model_copy(update={"verified": None})]).dumps()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.json").write_text(text)
    shape = base.entries[0].shape
    write_shapes(tmp_path / "s.json", (shape.m, shape.n, shape.k))
    monkeypatch.setattr(property_runs, "run_all", lambda jobs, judge, **_: [judge(job, lambda _: None) for job in jobs])
    args = ("verify", "--gpu", "rtx3090", "--db", "p.json", "--shapes", "s.json", "--examples", "15")
    verb(*args, "--only", "batch")
    assert (tmp_path / "p.json").read_text() == text
    out, _ = verb(*args, "--only", "batch", "--only", "entries")
    assert "holds" in out
    assert "differs" not in out
    entries = store.load(tmp_path / "p.json").entries
    proven = [bool(e.verified) for e in entries]
    assert proven == [HERE == "cuda" or e.config.kernel is Kernel.TRITON for e in entries]
    assert any(proven)
    if not all(proven):
        assert f"{proven.count(False)} " in re.search(r"holds; \d+ needs? a GPU", out)[0]
    out, err = verb(*args, "--only", "batch", "--only", "entries", "--json", "-o", "r.json")
    assert [r["name"] for r in json.loads(out)["results"]] == ["batch", "entries"]
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(out)
    assert "up to date" in err
    (tmp_path / "tuning_db").mkdir()  # as in a clone, whose files are committed
    (tmp_path / "tuning_db" / "rtx3090.json").write_text(text)
    args = ("verify", "--gpu", "rtx3090", "--shapes", "s.json", "--only", "entries")
    _, err = verb(*args)
    assert f"stamped {proven.count(True)} entr" in err
    assert (tmp_path / "tuning_db" / "rtx3090.json").read_text() == text
    own = {entry.key: entry.verified for entry in store.load(store.user_path("rtx3090")).entries}
    assert own == {entry.key: entry.verified for entry in entries if entry.verified}
    assert "up to date" in verb(*args)[1]


@pytest.mark.slow
@pytest.mark.process
def test_verify_proves_every_property(tmp_path):
    """The documents' command in an empty folder, with fewer drawn examples; the fixed ones are all tried."""
    done = int8kit(*shlex.split(VERIFY)[1:], "--examples", "20", cwd=tmp_path)
    _, rule, *rows = done.stdout.splitlines()
    assert set(rule) == {"-", " "}
    names = {re.split("  +", row)[0] for row in rows if not row.startswith("the same in every row")}
    everywhere = {
        "accumulator", "output", "swiglu", "batch", "linearity", "zero rows", "nan rows", "strided", "repeats",
        "configuration", "quantize", "rms_norm_quantize", "residual_norm_quantize", "swiglu_quantize", "qk_norm_rope",
        "refusals", "fallback", "operators", "gradients", "layers", "modules", "lookup", "stamps",
        "launch cache", "row launches", "tile order", "tile scheduler",
        "barriers", "bias", "row scale", "silu", "triton code", "mma_sync code",
        "wgmma code", "row code", "entries",
    }  # fmt: skip
    assert names == everywhere if HERE == "cpu" else names > everywhere
    assert done.stdout.count("holds") == len(names)
    assert "the stamps of all entries are up to date" in done.stderr


@pytest.mark.process
def test_verify_fails_on_a_broken_kernel(tmp_path):
    """A copy of the package with one character of the kernel changed: exit status 1, and an example."""
    package = files.shipped("shapes").parent
    for name in ("int8kit", "tuning_db", "shapes"):
        source = package / name if (package / name).is_dir() else package
        subprocess.run(["cp", "-r", source, tmp_path / name], check=True)
    kernel = tmp_path / "int8kit" / "kernels" / "gemm_triton.py"
    text = kernel.read_text()
    assert text.count("mask=(ks < K - k)[:, None]") == 1
    kernel.write_text(text.replace("mask=(ks < K - k)[:, None]", "mask=(ks <= K - k)[:, None]"))
    kernel.write_text(kernel.read_text().replace("mask=(ks < K - k)[None, :]", "mask=(ks <= K - k)[None, :]"))
    done = int8kit("verify", "--gpu", "rtx3090", "--only", "accumulator", "--no-stamp", "--examples", "40",
                   cwd=tmp_path, status=1, PYTHONPATH=str(tmp_path))  # fmt: skip
    example = r"\n  1x1x\d+, .*: 1 of 1 differ, first \[0, 0\]: got "  # and not an exception, which is told here too
    assert re.search(rf"accumulator differs on .*smallest example:{example}", done.stdout)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "differs", "status"), [(None, 0, 0), (None, 7, 1), (KeyboardInterrupt(), 0, 130)], ids=str
)
def test_bench_prints_tables_and_json(monkeypatch, capfd, error, differs, status):
    """The verb around a run that used no GPU: its streams and its exit status."""

    def session(shapes, listed, setting, **_):
        rows = [
            {
                "name": c.name,
                "kind": c.kind,
                "timed_by": "graph",
                "differs": differs,
                "prepare_s": 0.1,
                "note": "",
                "unit": "us",
                "p20": 9.0,
                "p50": 10.0,
                "p80": 11.0,
                "rounds": 2,
                "tops": 1.0,
                "peak_share": 0.1,
            }
            for c in listed
        ]
        done = [{**vars(shape), "elements": 64, "gpu_state": None, "rows": rows, "absent": []} for shape in shapes]
        header = results.header("gemm", results.Policy(timing="known"))
        conditions = dict.fromkeys(["gpu", "health_tflops", "rounds", "timed_by"], "known")
        return gemm.BenchResult(header, conditions, listed, len(shapes), done, error=error)

    monkeypatch.setattr(gemm, "benchmark", session)
    monkeypatch.setattr(os, "_exit", sys.exit)
    for args in ((), ("--json",)):
        with pytest.raises(SystemExit) as ended:
            main.main(["bench", "gemm", "--shape", "8x8x8", "--only", "bf16", *args])
        assert ended.value.code == status
        out, err = capfd.readouterr()
        document = json.loads(out.splitlines()[-1])
        assert {row["over"] for row in document["details"]["summary"]} == {"bf16"}
        assert ("geometric mean" in err) is ("--json" in args)
        assert len(out.splitlines()) == 1 or not args
        assert ("differs from the reference in 7 of 64" in err) is (status == 1)
        assert ("interrupted" in err) is (status == 130)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), ["no verb", "doctor, trace-shapes, tune, verify, warmup, run", "bench, db", "`int8kit --help`"]),
        (("paint",), ["paint", "`int8kit --help`"]),
        (("tune", "--gpus", "x"), ["--gpus", "`int8kit tune --help`"]),
        (("run", "--steps", "x"), ["--steps 'x': expected a whole number", "`int8kit run --help`"]),
        (("run", "--guidance", "x"), ["--guidance 'x': expected a number", "`int8kit run --help`"]),
        (("trace-shapes", "sdxl"), ["'sdxl'", "ideogram4, tiny", "local folder"]),
        (("trace-shapes", "--size", "1000x1024"), ["width 1000", "multiple of 16", "992 and 1008"]),
        (("trace-shapes", "--size", "big"), ["'big'", "WIDTHxHEIGHT", "1024x1024", "`int8kit trace-shapes --help`"]),
        (("trace-shapes", "--slots", "10"), ["10 text slots", "200"]),
        (("trace-shapes", "--branch", "both?"), ["'both?'", "both, cond, uncond"]),
        (("trace-shapes", "--batch", "0"), ["batch 0", "at least 1"]),
        (("trace-shapes", ""), ["unknown model ''"]),
        (("trace-shapes", "x" * 5000), ["unknown model"]),
        (("trace-shapes", "folder"), ["'folder' holds no transformer/config.json"]),
        (("trace-shapes", "headed", "--size", "64x64"), ["headed/config.json", "settings do not fit together"]),
        (("trace-shapes", "--size", "99999x99999"), ["'99999x99999'", "at most 32768"]),
        (("trace-shapes", "tiny", "-o", "."), ["it is a folder"]),
        (("trace-shapes", "tiny", "-o", ""), ["it is a folder"]),
        (("trace-shapes", "tiny", "-o", "/dev/null"), ["it is a device"]),
        (("trace-shapes", "tiny", "-o", "fifo"), ["it is a FIFO"]),
        (("trace-shapes", "tiny", "-o", "mine.json"), ["was not written by int8kit", "--force"]),
        (("trace-shapes", "tiny", "-o", "/proc/x/s.json"), ["cannot write", "writable folder"]),
        (("tune", "--gpu", "rtx9"), ["unknown GPU 'rtx9'", "rtx3090", "--gpu-spec"]),
        (
            ("tune", "--gpu", "rtx3090", "--gpu-spec", "x.json"),
            ["--gpu rtx3090 and --gpu-spec x.json", "expected one of them"],
        ),
        (("tune", "--gpu-spec", "x.json"), ["no file 'x.json'", "int8kit.gpu/1"]),
        (("tune", "--gpu-spec", "mine.json"), ["has the format None", "int8kit.gpu/1"]),
        (("tune", "--gpu", "rtx3090", "--shapes", "no.json"), ["no file 'no.json'", "trace-shapes"]),
        (("tune", "--gpu", "rtx3090", "--shapes", "half.json"), ["damaged JSON", "half.json", "trace-shapes"]),
        (("tune", "--gpu", "rtx3090", "--shapes", "mine.json"), ["has the format None", "int8kit.shapes/1"]),
        (("tune", "--gpu", "rtx3090", "--shapes", "deep.json"), ["K = 131072", "1 to 131071", "split"]),
        (("tune", "--gpu", "rtx3090", "--size", "64x64"), ["no INT8 shape of 64x64 px", "trace-shapes"]),
        (
            ("tune", "--gpu", "rtx3090", "--size", "17x17"),
            ["no INT8 shape of 17x17 px", "; expected 768x768, 1024x1024"],
        ),
        (("tune", "--gpu", "rtx3090", "--shapes", "fifo"), ["it is a FIFO"]),
        (("tune", "--gpu", "rtx3090", "--shape", "1x2"), ["'1x2'", "expected MxNxK", "`int8kit tune --help`"]),
        (("tune", "--gpu", "rtx3090", "--shape", "1x2x3", "--size", "8x8"), ["--shape 1x2x3 and --size 8x8"]),
        (("tune", "--gpu", "rtx3090", "--shape", "1x2x3", "--shapes", "s"), ["--shape 1x2x3 and --shapes s"]),
        (("tune", "--gpu", "rtx3090", "--scheduler", "nowhere"), ["scheduler 'nowhere'", "tcp://host:8786"]),
        (("tune", "--gpu", "rtx3090", "--scheduler", "ftp://h:1"), ["scheduler 'ftp://h:1'", "tcp://host:8786"]),
        (("tune", "--gpu", "rtx3090", "--scheduler", "tcp://h:65536"), ["scheduler 'tcp://h:65536'"]),
        (("tune", "--gpu", "rtx3090", "--limit", "0"), ["limit 0", "1 or more"]),
        (("tune", "--gpu", "rtx3090", "--gpu", "a100", "-o", "x.json"), ["--output x.json and 2 GPUs"]),
        (("tune", "--gpu", "rtx3090", "-o", "mine.json"), ["was not written by int8kit", "--force"]),
        (("verify", "--gpu", "rtx9"), ["unknown GPU"]),
        (("verify", "--shapes", "deep.json"), ["'deep.json' is damaged", "K = 131072", "trace-shapes"]),
        (("verify", "--only", "batch", "-o", "mine.json"), ["was not written by int8kit"]),
        (("verify", "mutate", "-o", "fifo"), ["it is a FIFO"]),
        (("verify", "libraries", "torch._int_mm", "-o", "mine.json"), ["was not written by int8kit"]),
        (("compare", "foo"), ["unknown model 'foo'", "tiny"]),
        (("compare", "folder"), ["'folder'", "no model_index.json"]),
        (("compare", "tiny", "--seed", "9" * 20), ["seed 999", "64 bits"]),
        (("compare", "tiny", "--inputs", ""), ["it is a folder", "torch.save"]),
        (("compare", "tiny", "--inputs", "fifo"), ["it is a FIFO", "torch.save"]),
        (("compare", "tiny", "--inputs", "/dev/zero"), ["it is a device", "torch.save"]),
        (("compare", "tiny", "--inputs", "mine.json"), ["it has another format", "torch.save"]),
        (("compare", "tiny", "-o", "mine.json"), ["was not written by int8kit"]),
        (("verify", "--gpu", "rtx3090", "--db", "mine.json"), ["has the format None", "int8kit.tuning/1"]),
        (("verify", "--examples", "0"), ["--examples", "0"]),
        (("verify", "--exhaustive", "--mutate"), ["--mutate", "`int8kit verify mutate`"]),
        (("verify", "--gpu", "rtx3090", "--only", "x"), ["unknown property 'x'; expected one of", "such as "]),
        (("verify", "--only", "output", "--model", "tiny"), ["--model", "`int8kit compare tiny`"]),
        (("run", "--model", "sdxl"), ["'sdxl'", "tiny", "hub id"]),
        (("run", "--model", "ideogram4"), ["'ideogram4'", "no weights", "hub id", "local folder"]),
        (("run", "--model", "nobody/nothing"), ["cannot load 'nobody/nothing'", "hf auth login"]),
        (("run", "--size", "250x256"), ["width 250", "240 and 256"]),
        (("run", "--prompt", "x" * 3000), ["tokens; "]),
        (("run", "-o", "mine.png"), ["was not written by int8kit"]),
        (("run", "-o", "a.jpg"), ["'a.jpg'", "name it a.png"]),
        (("run", "-o", "out/noext"), ["'out/noext'", "name it noext.png"]),
        (("run", "--prompt", "\udcff"), ["prompt '\\udcff'", "UTF-8"]),
        (("run", "--size", "32768x32768"), ["size 32768x32768", "GiB", "smaller --size"]),
        (("run", "--model", "./nofolder"), ["no folder './nofolder'", "hub id"]),
        (("run", "--model", "mine.json"), ["'mine.json'", "it is a file"]),
        (("run", "--preset", "best"), ["unknown preset 'best'", "quality"]),
        (("run", "--db", "mine.json"), ["has the format None"]),
        (("run", "--steps", "-3"), ["-3 steps", "expected 1 to"]),
        (("run", "--seed", "9" * 30), ["seed 999", "64 bits"]),
        (("run", "--guidance", "nan"), ["guidance nan"]),
        (("run", "-o", "-"), ["--output -", "name a PNG file"]),
        (("run", "--model", ""), ["unknown model ''"]),
        (("run", "--model", "folder"), ["'folder'", "no model_index.json"]),
        (("run", "--gpu", ""), ["unknown GPU ''"]),
        (("doctor", "--gpu", "rtx9"), ["unknown GPU 'rtx9'"]),
        (("doctor", "-o", "mine.json"), ["was not written by int8kit"]),
        (("db",), ["no command", "show, check, merge, explain, migrate, upgrade or schema"]),
        (("db", "show", "--gpu", "rtx9"), ["unknown GPU 'rtx9'"]),
        (("db", "show", "--db", "no.json"), ["no file 'no.json'", "int8kit tune"]),
        (("db", "explain", "0", "64", "64"), ["M = 0", "at least 1"]),
        (("db", "explain", "1", "64"), ["no K; expected `int8kit db explain M N K`", "`int8kit db explain --help`"]),
        (("db", "explain", "a", "1", "1"), ["M 'a': expected a whole number", "`int8kit db explain --help`"]),
        (("db", "explain", "1_000", "1", "1"), ["M '1_000': expected a whole number"]),
        (("db", "explain", "-16", "1", "1"), ["-16: expected a number of 1 or more", "`int8kit db explain --help`"]),
        (("db", "check", "no.json"), ["no file 'no.json'", "int8kit tune"]),
        (("db", "check", "folder"), ["it is a folder"]),
        (("db", "foo"), ["no command 'foo'; expected show, check", "`int8kit db --help`"]),
        (("foo",), ["no verb 'foo'; expected doctor, trace-shapes, tune", "`int8kit --help`"]),
        (("db", "show", "--kernel", "cutlass"), ["unknown kernel 'cutlass'", "mma_sync, triton, wgmma"]),
        (("db", "show", "--source", "guessed"), ["unknown source 'guessed'", "measured, modelled, proxy"]),
        (("db", "show", "--shape", "1x2"), ["'1x2'", "expected MxNxK"]),
        (("db", "show", "-o", "mine.json"), ["was not written by int8kit"]),
        (("db", "merge", "no.json", "--user", "-o", "x.json"), ["two targets", "--output x.json and --user"]),
        (("db", "merge", "no.json", "-o", "x.json"), ["no file 'no.json'"]),
        (("db", "merge", "mine.json", "--user"), ["has the format None"]),
        (("db", "merge", "mine.json"), ["no target", "-o FILE or --user"]),
        (("bench",), ["no command", "gemm, fused or model"]),
        (("bench", "conv"), ["conv", "`int8kit bench --help`"]),
        (("bench", "gemm", "--shape", "big"), ["'big'", "MxNxK", "4352x12288x4608"]),
        (("bench", "gemm", "--shape", "0x64x64"), ["M = 0", "at least 1"]),
        (("bench", "gemm", "--shapes", "mine.json"), ["has the format None", "int8kit.shapes/1"]),
        (("bench", "gemm", "--limit", "0"), ["limit 0", "1 or more"]),
        (("bench", "gemm", "--rounds", "0"), ["0 rounds", "1 or more"]),
        (("bench", "gemm", "--only", "cublas"), ["unknown contestant 'cublas'", "bf16", "int_mm"]),
        (("bench", "gemm", "--gpu", "rtx9"), ["unknown GPU 'rtx9'", "rtx3090"]),
        (("bench", "gemm", "--arch", "sm61"), ["'sm61'", "sm80, sm86"]),
        (("bench", "gemm", "--arch", "sm1"), ["architecture 'sm1'", "sm80, sm86"]),
        (("bench", "gemm", "--db", "mine.json"), ["has the format None", "int8kit.tuning/1"]),
        (("bench", "gemm", "--out", "mine.json"), ["was not written by int8kit", "--force"]),
        (("bench", "gemm", "--output", "mine.json"), ["was not written by int8kit", "--force"]),
        (("bench", "gemm", "--output", "a", "--out", "b"), ["--output a and --out b"]),
        (("bench", "gemm", "--sample-ms", "nan"), ["samples of nan ms"]),
        (("bench", "gemm", "--shape", "1x1x1", "--shapes", "s"), ["--shape 1x1x1 and --shapes s"]),
        pytest.param(("bench", "gemm"), ["no CUDA device here"], marks=WITHOUT_A_GPU),
        (("bench", "fused", "--rounds", "0"), ["0 rounds", "1 or more"]),
        (("bench", "fused", "--m", "0"), ["M = 0", "at least 1"]),
        (("bench", "fused", "-o", "mine.json"), ["was not written by int8kit", "--force"]),
        (("bench", "fused", "--dry-run", "--only", "x"), ["unknown row kernel 'x'", "qk_norm_rope"]),
        pytest.param(("bench", "fused"), ["no CUDA device", "--dry-run"], marks=WITHOUT_A_GPU),
        (("bench", "model", "sdxl"), ["sdxl", "ideogram4"]),
        (("bench", "model", "--size", "9"), ["size '9'", "WIDTHxHEIGHT"]),
        (("bench", "model", "--rounds", "0"), ["0 rounds", "1 or more"]),
        (("bench", "model", "--text-tokens", "-1"), ["-1 text tokens", "1 or more"]),
        (("bench", "model", "--gpu", "rtx9"), ["unknown GPU 'rtx9'", "rtx3090"]),
        (("bench", "model", "--db", "mine.json"), ["has the format None", "int8kit.tuning/1"]),
        pytest.param(("bench", "model"), ["no CUDA device", "tiny"], marks=WITHOUT_A_GPU),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capfd, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "mine.png").write_bytes(b"\x89PNG")
    (tmp_path / "folder").mkdir()
    (tmp_path / "headed").mkdir()
    config = {"_class_name": "Ideogram4Transformer2DModel", **models.TINY_TRANSFORMER, "attention_head_dim": 7}
    (tmp_path / "headed" / "config.json").write_text(json.dumps(config))
    (tmp_path / "half.json").write_text('{"format": "int8kit.shapes/1", "cas')
    deep = {"m": 64, "n": 64, "k": 131072, "count": 1, "bias": False, "layers": ["a"]}
    case = {"height": 64, "width": 64, "batch": 1, "text_tokens": 1, "branch": "cond", "gemms": [deep]}
    (tmp_path / "deep.json").write_text(json.dumps({"format": shapes_schema.FORMAT, "model": "m", "cases": [case]}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as ended:
        main.main(list(args))
    assert ended.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("int8kit: ")
    for word in words:
        assert word in line
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - set(before)
    assert written == set()
    assert all(path.read_bytes() == content for path, content in before.items())


def write_shapes(path, *shapes):
    """A shapes file of one case."""
    rows = [{**vars(GemmShape(*s)), "count": 1, "bias": False, "layers": ["a"], "int8": True} for s in shapes]
    case = {"height": 64, "width": 64, "batch": 1, "text_tokens": 1, "branch": "cond", "gemms": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": shapes_schema.FORMAT, "model": "m", "cases": [case]}))
    return path


class Stopped(Exception):
    """Raised in place of the work."""


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """A folder and a function: the shapes and targets that a call of `tune` comes to."""
    monkeypatch.chdir(tmp_path)

    class Workers(contextlib.nullcontext):
        def __enter__(self):
            return self

        def gpus(self):
            return []

    def run(shapes, targets, pool, **_):
        found.append((list(shapes), [(target.gpu.alias, target.path) for target in targets]))
        raise Stopped

    def call(*args):
        with pytest.raises(Stopped):
            main.main(["tune", *map(str, args)])
        return found.pop()

    found = []
    monkeypatch.setattr(workers, "Workers", Workers)
    monkeypatch.setattr(session, "tune", run)
    return call


def test_tune_finds_the_shapes_that_were_traced_here(tuned, tmp_path, capfd):
    """Those that `trace-shapes` wrote, else those of this folder, else the shipped ones."""
    every, targets = tuned("--gpu", "RTX 3090")
    assert len(every) == 72
    assert targets == [("rtx3090", store.user_path("rtx3090"))]
    write_shapes(tmp_path / "shapes" / "ideogram4.json", (1, 2, 3))
    assert tuned("--gpu", "rtx3090")[0] == [GemmShape(1, 2, 3)]
    write_shapes(tmp_path / "out" / "shapes" / "ideogram4.json", (4, 5, 6), (7, 8, 9))
    capfd.readouterr()
    assert tuned("--gpu", "rtx3090")[0] == [GemmShape(4, 5, 6), GemmShape(7, 8, 9)]
    assert "tuning 2 shapes of out/shapes/ideogram4.json" in capfd.readouterr().err
    assert tuned("--gpu", "rtx3090", "--shapes", "shapes/ideogram4.json")[0] == [GemmShape(1, 2, 3)]
    assert tuned("--gpu", "rtx3090", "--limit", "1")[0] == [GemmShape(7, 8, 9)]


def test_tune_takes_shapes_of_the_call_and_a_number_of_them(tuned):
    shapes, targets = tuned("--gpu", "a100", "--gpu", "A100", "--shape", "1x2x3", "--shape", "4X5x6", "-o", "t.json")
    assert shapes == [GemmShape(1, 2, 3), GemmShape(4, 5, 6)]
    assert targets == [("a100", Path("t.json"))]
    shapes, targets = tuned("--gpu", "a100", "--gpu", "h200", "--limit", "5")
    assert len(shapes) == 5
    assert targets == [(alias, store.user_path(alias)) for alias in ("a100", "h200")]


def test_json_of_tune_is_an_object_for_each_number_of_gpus(tuned, monkeypatch, verb):
    def run(shapes, targets, pool, **_):
        return [SimpleNamespace(target=target, **dict.fromkeys(fields, ()), failed={}) for target in targets]

    fields = ("entries", "rejected", "not_replaced", "resumed", "variant_counts")
    monkeypatch.setattr(session, "tune", run)
    for aliases in (["rtx3090"], ["rtx3090", "a100"]):
        options = [word for alias in aliases for word in ("--gpu", alias)]
        document = json.loads(verb("tune", *options, "--shape", "1x2x3", "--json")[0])
        assert document["format"] == RESULT_FORMAT
        assert [target["gpu"] for target in document["targets"]] == aliases


def test_tune_writes_the_database_to_stdout(tuned, monkeypatch, verb):
    """`-o -`: the database of the run alone, and no file of the user's."""
    base = store.load(files.shipped("tuning_db") / "rtx3090.json")

    def run(shapes, targets, pool, **_):
        store.update(targets[0].path, targets[0].gpu, base.entries[:1])
        return []

    monkeypatch.setattr(session, "tune", run)
    out, _ = verb("tune", "--gpu", "rtx3090", "--shape", "1x2x3", "-o", "-")
    document = json.loads(out)
    assert document["format"] == FORMAT
    assert len(document["entries"]) == 1
    assert not store.user_path("rtx3090").exists()


def test_an_interrupt_during_the_import_is_one_line(monkeypatch, capfd):
    class Interrupted:
        def find_spec(self, name, path=None, target=None):
            if name == "int8kit.cli.main":
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "int8kit.cli.main")
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(interrupt, "install", lambda: None)
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 130
    assert capfd.readouterr() == ("", "int8kit: interrupted\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_tune_without_a_gpu_starts_no_worker(monkeypatch, verb):
    monkeypatch.setattr(workers, "Workers", None)  # which cannot be called
    _, err = verb("tune", status=2)
    assert "no GPU here to tune for; name one with --gpu: a10, a100" in err


def test_the_defaults_overwrite_no_committed_file(tmp_path, monkeypatch, verb):
    """In a clone: the commands of the quick start leave the folders that are under version control alone."""
    monkeypatch.chdir(tmp_path)
    committed = write_shapes(tmp_path / "shapes" / "tiny.json", (1, 2, 3))
    before = committed.read_bytes()
    verb("trace-shapes", "tiny", "--size", "64x64")
    assert committed.read_bytes() == before
    assert shapes_file.read(tmp_path / "out" / "shapes" / "tiny.json")["model"] == "tiny"
    out, _ = verb("trace-shapes", "tiny", "--size", "64x64", "-o", "-")
    assert json.loads(out) == shapes_file.read(tmp_path / "out" / "shapes" / "tiny.json")


def test_a_mistake_is_reported_before_torch_is_imported():
    """Every check that needs no torch comes first: a wrong option costs a fraction of a second."""
    calls = (
        "tune --gpu rtx9", "tune --gpu rtx3090 --shapes no.json", "tune --gpu rtx3090 -o .", "run --preset x",
        "run --db no.json", "run -o .", "run --gpu x", "run --size 1x1", "trace-shapes --size 1x1", "trace-shapes x",
        "trace-shapes -o .", "bench gemm --gpu x", "bench gemm --rounds 0", "bench fused --m 0",
        "bench model --gpu x", "db show --db no.json",
        "db merge no.json --user", "db check no.json", "verify --shapes no.json", "verify foo", "db show --kernel x",
        "db explain 0 1 1", "db migrate no.json", "doctor --gpu x",
    )  # fmt: skip
    code = f"""
import sys
from int8kit.cli.main import main
for call in {[call.split() for call in calls]}:
    try:
        main(call)
    except SystemExit as ended:
        assert ended.code == 2, call
    heavy = {{"torch", "triton", "diffusers", "transformers", "distributed"}} & set(sys.modules)
    assert not heavy, (call, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == len(calls)


def test_the_root_help_lists_verbs_in_the_order_of_work(verb):
    text, _ = verb("--help")
    assert text == verb("-h")[0]
    verbs = re.findall(r"^  ([a-z][a-z-]+)  +[A-Z]", text, re.MULTILINE)
    order = ["doctor", "trace-shapes", "tune", "verify", "warmup", "run", "compare", "bench", "db"]
    assert verbs == [name for name in order if name in verbs]
    assert {"doctor", "tune", "verify", "db"} <= set(verbs)
    assert "..." not in text.replace("[ARGS]...", "")
    assert text.index("Verbs:") < text.index("--install-completion")
    for status in ("0 done", "1 the check failed", "2 usage error", "130 interrupted"):
        assert status in text


def test_completion_knows_the_verbs(monkeypatch, verb):
    monkeypatch.setenv("_INT8KIT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "int8kit db sh")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert verb()[0].split() == ["show"]


@pytest.mark.process
def test_a_missing_package_names_its_extra(tmp_path):
    (tmp_path / "diffusers.py").write_text("raise ModuleNotFoundError(name='diffusers')")
    done = int8kit("trace-shapes", "tiny", cwd=tmp_path, status=2, PYTHONPATH=str(tmp_path))
    assert "pip install 'int8kit[run]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.process
def test_bad_input_in_a_process_of_its_own(tmp_path):
    done = int8kit("tune", "--gpu", "rtx9", cwd=tmp_path, status=2)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


def test_force_overwrites(tmp_path, verb):
    (tmp_path / "mine.json").write_text("precious")
    verb("trace-shapes", "tiny", "--size", "64x64", "-o", tmp_path / "mine.json", "--force")
    assert files.is_ours(tmp_path / "mine.json", shapes_schema.FORMAT)


def test_verbs_show_an_example(verb):
    for name in (
        "doctor",
        "trace-shapes",
        "tune",
        "verify",
        "verify mutate",
        "verify libraries",
        "compare",
        "warmup",
        "run",
        "bench gemm",
        "bench fused",
        "bench model",
        "db show",
        "db check",
        "db merge",
        "db explain",
        "db migrate",
        "db upgrade",
        "db schema",
    ):
        text, _ = verb(*name.split(), "--help")
        assert f"Example: int8kit {name}" in text
        assert verb(*name.split(), "-h")[0] == text
        assert max(map(len, text.splitlines())) <= 80
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", verb("--version")[0])
