"""verify/mutation/: the catalogue matches the kernels, and each fault gets its verdict."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from int8kit import gpus, interrupt
from int8kit.cli import main, verify_mutate
from int8kit.errors import CheckFailed, UnknownName
from int8kit.spec import Kernel, why_illegal
from int8kit.verify import executors, verify_kernels
from int8kit.verify.examples.fixed import SMALL_TILES
from int8kit.verify.mutation import campaign
from int8kit.verify.mutation.campaign import Verdict
from int8kit.verify.mutation.catalogue import CATALOGUE, find
from int8kit.verify.mutation.mutant import TILES, Mutant
from int8kit.verify.properties import registry

NEW_PROPERTIES = ("operators", "stamps", "launch cache", "row launches")  # where the registry has them
GPU = gpus.present() or gpus.get("rtx3090")
POINTER, ROWS = "kernels/gemm_triton.py", "kernels/quantize.py"
SHAM = Mutant("sham", POINTER, "# int64: M * K", "# 64 bits: M * K", "another comment", "accumulator")
BROKEN = Mutant("broken", POINTER, "import triton.language as tl", "import triton.language as", "no Python", "output")


def in_the_launcher(name, statement):
    """A mutant whose launcher of `quantize` executes a Python statement first."""
    return Mutant(name, ROWS, "    held = k <=", f"    {statement}\n    held = k <=", statement, "quantize")


RAISES = in_the_launcher("raises", "raise ValueError('planted')")
ABORTS = in_the_launcher("aborts", "import os; os.abort()")
HANGS = in_the_launcher("hangs", "import time; time.sleep(9999)")


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """An empty folder, in which temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_catalogue_covers_every_kernel():
    names = [mutant.name for mutant in CATALOGUE]
    assert len(set(names)) == len(names) >= 30
    assert sum(not mutant.needs_gpu for mutant in CATALOGUE) >= 20
    assert {mutant.kernel for mutant in CATALOGUE} == set(Kernel)


def test_faults_that_a_proof_finds_need_no_gpu():
    here = executors.available(gpus.get("rtx3090"))
    by_name = {mutant.name: mutant for mutant in CATALOGUE}
    for name, proof in (
        ("stale-workspace-slot", "tile scheduler"),
        ("wgmma-epilogue-too-early", "wgmma code"),
        ("wgmma-end-of-8-bytes", "fallback"),
    ):
        assert by_name[name].needs_gpu
        assert campaign._not_runnable(by_name[name], here) is None
        assert campaign._trial(by_name[name], here).properties == (proof,)
    assert campaign._not_runnable(by_name["wgmma-racy-store"], here).ending == "needs a GPU"


@pytest.mark.parametrize("mutant", CATALOGUE, ids=lambda mutant: mutant.name)
def test_each_fault_has_one_place_in_the_source(mutant):
    source = campaign.mutated(mutant, campaign.PACKAGE)
    assert ast.dump(ast.parse(source)) != ast.dump(ast.parse((campaign.PACKAGE / mutant.file).read_text()))
    assert mutant.expected in (*registry.of_mutants(mutant.kernel), *NEW_PROPERTIES)
    assert not mutant.fault.endswith(".")


def test_tiles_of_the_mutants_can_run():
    assert set(TILES) == set(Kernel) - {Kernel.TRITON}
    for kernel, tiles in TILES.items():
        arch, memory = (90, 232448) if kernel is Kernel.WGMMA else (86, 101376)
        assert {tile.kernel for tile in tiles} == {kernel}
        assert [why_illegal(tile, arch=arch, shared_memory=memory) for tile in tiles] == [None] * len(tiles)
        assert any(tile.stream_k for tile in tiles)


def test_stale_catalogue_is_refused_before_any_work():
    with pytest.raises(CheckFailed, match=r"'no such text' was found 0 times in kernels/gemm_triton.py"):
        campaign.run([Mutant("stale", POINTER, "no such text", "", "", "output")], GPU)
    with pytest.raises(UnknownName, match=r"unknown fault 'scale-swap'; expected one of \d+, such as scales-swapped"):
        find(["scale-swap"])
    assert find([]) == CATALOGUE


@pytest.mark.slow
@pytest.mark.process
def test_verdict_of_each_ending(scratch, monkeypatch):
    """A wrong bit, an exception, a signal, a syntax error and a hang are caught; a sham survives every property.

    Two properties stand for all, which take minutes.
    """
    names = ("fallback", "quantize")
    monkeypatch.setattr(registry, "of_mutants", lambda kernel: names)
    todo = [*find(["k-tail-dropped"]), RAISES, ABORTS, BROKEN, HANGS, SHAM]
    steps = []
    verdicts = campaign.run(todo, GPU, examples=5, silence=15, on_step=lambda *step: steps.append(step))
    assert [(v.name, v.ending, v.by, v.how) for v in verdicts] == [
        ("k-tail-dropped", "killed", "fallback", "differs"), ("raises", "killed", "quantize", "crash"),
        ("aborts", "killed", "quantize", "crash"), ("broken", "killed", "fallback", "compile"),
        ("hangs", "killed", "quantize", "timeout"), ("sham", "survived", None, None),
    ]  # fmt: skip
    differs, raises, aborts, broken, hangs, sham = (v.evidence for v in verdicts)
    assert "differ, first [" in differs
    assert "ValueError: planted" in raises
    assert aborts.endswith("the process was ended by SIGABRT")
    assert "SyntaxError" in broken
    assert hangs.endswith("no end in 15 s")
    assert not sham
    assert list(verdicts[-1].tried) == list(names)
    assert min(verdicts[-1].tried.values()) >= 5
    total = len(names) + len(todo)  # the unchanged kernels, then these
    assert (steps[0], steps[-1]) == ((0, total), (total, total))
    assert not list(scratch.iterdir())


@pytest.mark.process
def test_unsound_kernels_are_refused(monkeypatch, scratch):
    package = scratch / "installed" / "int8kit"
    shutil.copytree(campaign.PACKAGE, package)
    (package / "kernels" / "row_primitives.py").write_text("no Python")
    monkeypatch.setattr(campaign, "PACKAGE", package)
    with pytest.raises(CheckFailed, match=r"the unchanged kernels fail accumulator \(compile\): SyntaxError"):
        campaign.run([SHAM], GPU, processes=1)
    assert [path.name for path in scratch.iterdir()] == ["installed"]


@pytest.mark.process
def test_child_that_checks_another_copy_is_refused(monkeypatch, scratch):
    monkeypatch.setattr(
        shutil, "copytree", lambda _, to, ignore: to.mkdir(parents=True)
    )  # so that the installed one is found
    with pytest.raises(CheckFailed, match=r"the child checked .*int8kit, not its own copy"):
        campaign.run([SHAM], GPU, processes=1)
    assert not list(scratch.iterdir())


def test_faults_that_this_machine_cannot_run(monkeypatch):
    """They count neither as killed nor as survived."""
    interpreter = [executors.Executor("interpreter", "cpu", "CPU")]
    monkeypatch.setattr(executors, "available", lambda gpu: interpreter)
    todo = find(["wgmma-racy-store", "fma-contraction"])
    verdicts = campaign.run(todo, GPU)
    assert [v.ending for v in verdicts] == ["needs a GPU"] * 2
    assert "interpreter" in verdicts[0].evidence
    assert campaign.score(verdicts) == {"killed": 0, "ran": 0, "score": None, "idle": {"needs a GPU": 2}}

    gpu = [executors.Executor("cross_arch", "cuda", "a GPU", "sm86"), executors.Executor("native", "cuda", "a GPU")]
    monkeypatch.setattr(executors, "available", lambda _: gpu)
    monkeypatch.setattr(campaign, "present", lambda: gpus.get("rtx4090"))
    [verdict] = campaign.run(find(["wgmma-racy-store"]), GPU, processes=1)
    assert verdict.ending == "not applicable"
    assert "sm_90 only" in verdict.evidence
    for name, executor in (("naive-owner", gpu[0]), ("fma-contraction", gpu[1])):
        [mutant] = find([name])
        job = campaign._trial(mutant, gpu)
        assert job.executor == executor
        assert job.properties[0] == mutant.expected
        request = job.request(None, 0)
        assert {tile["kernel"] for tile in request["tiles"]} <= {Kernel.MMA_SYNC}
    monkeypatch.setattr(campaign, "present", lambda: gpus.get("h200"))
    assert campaign._not_runnable(find(["wgmma-racy-store"])[0], gpu) is None


@pytest.mark.slow
def test_properties_over_given_tiles():
    """A child draws its kernel's configurations alone, so that no other kernel hides the fault."""
    seen = []
    executor = executors.available(GPU)[-1]
    tiles = (SMALL_TILES[1],)
    result = verify_kernels.run_over_tiles("batch", executor, tiles, examples=50, on_example=seen.append)
    assert result.failure is None
    assert {d.config for d in seen[:5]} == set(tiles)


@pytest.mark.process
def test_verify_mutate(monkeypatch, scratch, verb):
    """With one property; a test above has all of them."""
    monkeypatch.setattr(registry, "of_mutants", lambda kernel: ("fallback",))
    out, _ = verb(
        "verify",
        "mutate",
        "--only",
        "k-tail-dropped",
        "--only",
        "mma-sync-copy-past-k",
        "--examples",
        "5",
        "--json",
    )
    document = json.loads(out)
    killed, gluon = document["mutants"]
    assert (killed["name"], killed["by"], killed["how"]) == ("k-tail-dropped", "fallback", "differs")
    assert document["killed"] >= 1
    assert document["score"] == 1.0
    assert gluon["ending"] == ("killed" if torch.cuda.is_available() else "needs a GPU")
    assert not list(scratch.iterdir())


def test_survivor_is_listed_and_exit_status_is_1(monkeypatch, capfd):
    canned = [
        Verdict("a", POINTER, "fault a", "killed", "output", "differs", "1x1x1: 1 of 1 differ", {}, 1.2),
        Verdict("b", POINTER, "fault b", "killed", "output", "timeout", "no end in 9 s", {}, 9.0),
        Verdict("c", POINTER, "fault c", "survived", tried={"output": 7}, seconds=3.0),
        Verdict("d", POINTER, "fault d", "needs a GPU", evidence="PTX"),
        Verdict("e", POINTER, "fault e", "not applicable", evidence="no sm_90"),
    ]
    monkeypatch.setattr(campaign, "run", lambda *_, **__: canned)
    with pytest.raises(SystemExit) as exit_:
        main.main(["verify", "mutate"])
    out, err = capfd.readouterr()
    assert exit_.value.code == 1
    assert "caught by output (timeout)" in out
    assert "needs a GPU: PTX" in out
    assert "2 of 3 caught (67%), 1 need a GPU, 1 not applicable here" in out
    assert out.endswith("survived: c (fault c); tried 7 examples of output\n")
    assert err == "int8kit: 1 of 3 faults survived: c\n"


def test_interrupt_prints_the_verdicts_so_far(monkeypatch, capfd):
    def run(*_, on_verdict, **__):
        on_verdict(Verdict("a", POINTER, "fault a", "killed", "output", "differs", "1x1x1: 1 of 1 differ", {}, 1.2))
        raise KeyboardInterrupt

    monkeypatch.setattr(campaign, "run", run)
    with pytest.raises(KeyboardInterrupt):
        verify_mutate.mutate()
    out, err = capfd.readouterr()
    assert "fault a" in out
    assert err == ""
    assert interrupt.line() == f"interrupted; 1 of {len(CATALOGUE)} faults were tried"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("mutate", "--db", "x.json"), ["--db", "--help"]),
        (("mutate", "--examples", "0"), ["--examples 0", "1 or more"]),
        (("mutate", "--only", "x"), ["unknown fault 'x'; expected one of", "such as "]),
        (("mutate", "--gpu", "rtx9"), ["'rtx9'", "rtx3090"]),
        (("--gpu", "rtx3090", "mutate"), ["--gpu before mutate", "after the command"]),
        (("--json", "libraries"), ["--json before libraries"]),
        (("--only", "scales-joined"), ["--only scales-joined", "`int8kit verify mutate --only scales-joined`"]),
        (("--mutate", "--only", "scales-joined"), ["--mutate", "`int8kit verify mutate`"]),
        (("--subject", "vllm", "--subject", "a:b"), ["--subject", "`int8kit verify libraries vllm a:b`"]),
        (("--model", "tiny", "--inputs", "x.pt"), ["--model", "`int8kit compare tiny --inputs x.pt`"]),
        (("libraries",), ["name one or more of torch._int_mm"]),
        (("libraries", "nonsense"), ["unknown library 'nonsense'", "torch._int_mm", "module:function"]),
        (("libraries", "gemlite"), ["gemlite quantizes inside its layer"]),
        (("--shapes", "no.json"), ["no file 'no.json'", "trace-shapes"]),
    ],
    ids=" ".join,
)
def test_usage_errors_are_one_line(capfd, args, words):
    with pytest.raises(SystemExit) as exit_:
        main.main(["verify", *args])
    _, err = capfd.readouterr()
    assert exit_.value.code == 2
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


def living_in(folder):
    """The processes whose working folder is in `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        try:
            found += [entry] if str(entry.readlink()).startswith(f"{folder}/") else []
        except OSError:  # it has ended, or belongs to another user
            continue
    return found


@pytest.mark.process
def test_ctrl_c_leaves_nothing_behind(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "int8kit", "verify", "mutate", "--only", "k-tail-dropped"], cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(scratch)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    while not living_in(scratch):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not living_in(scratch)
    assert not list(scratch.iterdir())
