"""verify/: the examples of the row kernels reach every end, and a failing one is repeated by its command."""

import os
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from kernel_helpers import EXECUTOR

from int8kit import gpus, lookup, operand_checks, ops, spec
from int8kit.database.database import Database
from int8kit.kernels import gemm, launch, quantize, row_primitives
from int8kit.kernels.qk_norm_rope import HEAD_DIMS, HeadTile
from int8kit.kernels.row_primitives import K_MAX_HELD, RowTile
from int8kit.verify import property_runs, replay, runner, verify_kernels
from int8kit.verify.examples import encoding, limits, regressions, row_memory, strategies
from int8kit.verify.properties import lookups, proof, registry, row_kernels, row_launches, row_tables, stamps
from int8kit.verify.properties.budget import budget
from int8kit.verify.properties.launch_store import stored_kernels
from int8kit.verify.properties.registry import PROOFS, PROPERTIES
from int8kit.verify.properties.row_kernels import KERNELS, OPERANDS, RowExample

pytestmark = pytest.mark.usefixtures("quiet_interpreter")
FP32 = torch.float32
TABLES = {kernel: list(row_tables.always(kernel, huge_strides=True)) for kernel in KERNELS}
SOUND_QUANTIZE = quantize.quantize
SMALL = RowExample("quantize", 1, 2, 5, "normal", 0, FP32, FP32, given_out=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_examples_reach_both_ends_of_every_range(kernel):
    found = {}
    for e in TABLES[kernel]:
        if e.refused:
            continue
        for extent, value in row_tables.extents(e):
            found.setdefault(extent, set()).add(value)
    for extent in row_tables.RANGES:
        wanted = row_tables.range_of(kernel, extent)
        if wanted is not None:
            assert min(found[extent]) == wanted.least, extent
            assert max(found[extent]) >= wanted.most, extent


@pytest.mark.parametrize("kernel", KERNELS)
def test_examples_have_every_kind_and_dtype_and_operand(kernel):
    table, names = [e for e in TABLES[kernel] if not e.refused], set(OPERANDS[kernel])
    with_vectors = names & {*row_kernels.VECTORS, *row_kernels.PER_IMAGE, *row_kernels.TABLES}
    for kind in strategies.FLOAT_KINDS:
        pairs = {(e.dtype, e.vectors) for e in table if e.kind == kind}
        assert len(pairs) >= (9 if with_vectors else 3), kind
    assert {e.unaligned for e in table} == {"", *names}
    assert {e.other_dtype for e in table} == {"", *names}
    assert {e.special for e in table} == {"", *with_vectors, *(f"extreme {name}" for name in with_vectors)}
    laid_out = {tuple(e.layout.split()) for e in table if e.layout}
    outputs = {"q"} if kernel == "quantize" else set()
    assert {name for _, name in laid_out} == outputs | names - set(row_kernels.VECTORS)
    assert {layout for layout, _ in laid_out} >= {"expanded", "overlapping"}
    assert {e.huge_stride for e in table} == {"", *outputs, *names - set(row_kernels.VECTORS)}
    assert max(e.m * e.k * e.heads for e in table) > 2**31
    tails = {(e.tile.chunk, e.k % e.tile.chunk) for e in table if isinstance(e.tile, RowTile)}
    chunks = {chunk for chunk, _ in tails}
    assert {(chunk, tail) for chunk in chunks for tail in (1, 2, 15, 16)} <= tails


def test_each_operand_has_its_own_stride_and_offset():
    for kernel, names in OPERANDS.items():
        args = row_kernels.operands(row_tables.base(kernel), "cpu")[: len(names)]
        matrices = [t for t in args if t.dim() == 2]
        strides = [t.stride(0) for t in matrices]
        assert len({*strides, *(t.shape[1] for t in matrices)}) == len(strides) + len({t.shape[1] for t in matrices})
        assert len({t.storage_offset() for t in args}) == len(args)
        for t in args:
            buffer = t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), 0)
            assert buffer.isnan().sum() == len(buffer) - t.numel()


def test_only_picked_rows_are_executed_and_compared(monkeypatch):
    e = replace(SMALL, rows=70000)
    rows = row_memory.picked(e.m, e.m * e.k)
    assert rows[-2:] == [69998, 69999]
    assert {0, 4096, 65535, 65536} < set(rows)
    given_out = row_kernels._Given(e, "cpu")
    with row_memory.only_rows(rows):
        quantize.quantize(*row_kernels.operands(e, "cpu"), out=given_out.out)
    written = (given_out.out[1] != row_memory.SENTINEL).nonzero().flatten().tolist()
    assert written == rows
    whole = quantize.row_primitives.launch_rows

    def first_rows(function, grid, *args, **more):
        whole(function, (min(grid[0], 4096), 1), *args, **more)

    monkeypatch.setattr(quantize.row_primitives, "launch_rows", first_rows)
    assert "differ, first [" in row_kernels.check(e, EXECUTOR)
    assert row_kernels.check(SMALL, EXECUTOR) is None


def test_sentinels_lie_around_allocated_outputs():
    guarded = row_memory.GuardedAllocations(None)
    with guarded.active():
        out = torch.empty(3, 4, dtype=FP32, device="cpu")
    assert (out == row_memory.SENTINEL).all()
    assert guarded.written_outside() is None
    out.as_strided((13,), (1,), out.storage_offset())[12] = 0
    assert guarded.written_outside() == "1 elements outside the output were written"


@pytest.mark.parametrize(
    ("fault", "words"), [(0, "torch.float64, expected"), (1, "shape (1, 2)"), (2, "strides (10, 2)")]
)
def test_wrong_layout_of_an_output_is_caught(monkeypatch, fault, words):
    def broken(*args, **more):
        q, s = whole(*args, **more)
        return ((q, s.double()), (q, s[None]), (torch.stack((q, q), -1)[..., 0], s))[fault]

    whole = KERNELS["swiglu_quantize"]
    monkeypatch.setitem(KERNELS, "swiglu_quantize", broken)
    assert words in row_kernels.check(replace(SMALL, kernel="swiglu_quantize", given_out=False), EXECUTOR)


def test_each_field_has_pairs_of_launches():
    names = {f.name for f in fields(RowExample)} - set(row_launches.UNCHANGED)
    assert set(row_launches.CHANGES) == names
    pairs = list(row_launches.pairs(huge_strides=True))
    changed = {
        (pair.first.kernel, f.name)
        for pair in pairs for f in fields(RowExample) if getattr(pair.first, f.name) != getattr(pair.second, f.name)
    }  # fmt: skip
    assert {field for _, field in changed} == names
    assert {kernel for kernel, _ in changed} == set(KERNELS)
    for pair in pairs:  # else the launcher would not store its kernel
        tensors = [t for t in row_kernels.operands(pair.first, "cpu") if isinstance(t, torch.Tensor)]
        assert launch.aligned_dtypes(tensors, [t.stride(0) for t in tensors if t.dim() == 2]) is not None


def test_pairs_of_launches_run_in_both_orders(monkeypatch):
    """The interpreter stores no kernels, so the checks alone are executed here."""
    seen = []
    monkeypatch.setattr(
        row_kernels, "check", lambda e, on: seen.append(e.seed) or ("planted" if len(seen) == 5 else None)
    )
    pair = row_launches.LaunchPair(replace(SMALL, seed=1), replace(SMALL, seed=2))
    assert row_launches.executed(pair, EXECUTOR).startswith("launch 2, ")
    assert seen == [1, 2, 1, 2, 1]


def test_a_row_kernel_of_another_stride_is_seen_without_a_gpu(monkeypatch):
    """A key that lacks the strides after the first one: `layout` has pairs of each operand."""
    pairs = list(row_launches.pairs(huge_strides=False))
    loose = [pair for pair in pairs if pair.second.layout and pair.second.kernel == "residual_norm_quantize"]
    assert [row_launches.check(pair, EXECUTOR) for pair in loose] == [None] * 4
    whole = launch.aligned_dtypes
    monkeypatch.setattr(row_primitives, "aligned_dtypes", lambda tensors, strides: whole(tensors, strides[:1]))
    found = [row_launches.check(pair, EXECUTOR) for pair in loose]
    assert found[0] is None
    assert all("compiled for other arguments" in why for why in found[1:])


def _examples(name):
    row, limits = PROPERTIES[name], budget(EXECUTOR, None)
    yield from row.always(verify_kernels.DEFAULT_TILES, limits)
    drawn = []

    @settings(max_examples=10, database=None, suppress_health_check=list(HealthCheck))
    @given(row.strategy(verify_kernels.DEFAULT_TILES, limits))
    def draw(example):
        drawn.append(example)

    draw()
    yield from drawn


@pytest.mark.parametrize(
    "name", [name for name, row in PROPERTIES.items() if row.scope == "int8kit" or name == "output"]
)
def test_every_example_survives_its_json(name):
    seen = 0
    for example in _examples(name):
        text = encoding.to_json(example)
        assert "\n" not in text
        assert encoding.from_json(text) == example
        assert encoding.described(example) == (str(example), text)
        seen += 1
    assert seen


@pytest.mark.parametrize(
    "text",
    ["[]", '{"example": "Nothing"}', '{"example": "RowExample", "nonsense": 1}', "{}",
     '{"example": "StampCase", "kernel": "triton", "executor": "nobody", "differs": []}'],
)  # fmt: skip
def test_other_json_is_refused(text):
    with pytest.raises((ValueError, TypeError, KeyError)):
        encoding.from_json(text)


def test_what_is_no_example_has_no_json():
    assert encoding.described("step 3") == ("step 3", None)
    with pytest.raises(TypeError, match="class TileConfig: expected one of Draw, "):
        encoding.to_json(verify_kernels.DEFAULT_TILES[0])
    tiles = [replace(SMALL, tile=tile) for tile in (RowTile(512, 2), HeadTile(4, 2, 1), None)]
    assert [encoding.from_json(encoding.to_json(e)).tile for e in tiles] == [e.tile for e in tiles]


def _broken_norm(*args, **more):
    q, s = SOUND_QUANTIZE(args[0].contiguous().float())
    return q, s * 2


def _break_quantize(monkeypatch):
    monkeypatch.setattr(quantize, "quantize", lambda x, out=None, tile=None: _broken_norm(x))


def _break_norm(monkeypatch):
    monkeypatch.setitem(KERNELS, "rms_norm_quantize", _broken_norm)


def _break_operators(monkeypatch):
    monkeypatch.setattr(ops, "quantize", lambda x: ops.reference.quantize(x * 2))


def _break_lookup(monkeypatch):
    monkeypatch.setattr(lookup, "NEAR", 5.0)


def _break_stamps(monkeypatch):
    monkeypatch.setattr("int8kit.toolchain.Toolchain.is_stale", lambda self, kernel, kernel_hash: False)


def _break_gemm(monkeypatch):
    whole = gemm.accumulate
    monkeypatch.setattr(gemm, "accumulate", lambda *args, **more: whole(*args, **more).add_(1))


FAULTS = {
    "quantize": _break_quantize, "rms_norm_quantize": _break_norm, "operators": _break_operators,
    "lookup": _break_lookup, "stamps": _break_stamps, "accumulator": _break_gemm,
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_failure_is_repeated_by_its_command_and_stored(monkeypatch, name):
    with monkeypatch.context() as patch:
        FAULTS[name](patch)
        result, _ = verify_kernels.run(name, EXECUTOR, Database(gpus.get("rtx3090")), examples=20)
        assert result.failure
        printed = replay.command(result)
        assert "\n" not in printed
        *_, python, dash_c, call = shlex.split(printed)
        assert (python, dash_c) == ("python", "-c")
        raised = AssertionError if result.raised is None else Exception
        with pytest.raises(raised) as again:
            exec(call)
        assert result.failure.endswith(str(again.value).splitlines()[0]), again.value
    exec(call)
    regressions.add(name, result.example)
    assert [encoding.to_json(one) for one in regressions.load(name)] == [result.example]
    seen = []
    kept = regressions.load(name)
    monkeypatch.setattr(registry, "PROPERTIES", {name: replace(PROPERTIES[name], always=lambda *_: ())})
    monkeypatch.setattr(verify_kernels, "PROPERTIES", registry.PROPERTIES)
    verify_kernels.run_over_tiles(name, EXECUTOR, examples=1, kept=kept, on_example=seen.append)
    assert kept[0] in seen


def test_property_without_examples_is_repeated_by_the_verb(monkeypatch, verb):
    result = runner.Result("row scale", "CPU", 3, "step 2: differs")
    want = 'int8kit verify --gpu h200 --db "a b.json"'.replace('"', "'") + ' --only "row scale"'
    assert replay.command(result, gpu="h200", database=Path("a b.json")) == want
    planted = proof.Proof(
        "planted proof", "nothing holds", "every input", lambda executor, tiles, report: proof.Outcome(1, "it differs")
    )
    monkeypatch.setitem(PROOFS, planted.name, planted)
    monkeypatch.setattr(
        property_runs.process_pool, "run_all", lambda calls, **_: [
            property_runs.Ending("done", call.function(call.argument, lambda _: None)) for call in calls
        ]
    )  # fmt: skip
    out, _ = verb("verify", "--gpu", "rtx3090", "--only", planted.name, status=1)
    assert 'to repeat it:\n  int8kit verify --gpu rtx3090 --only "planted proof"' in out


CRASH = """
import os
from int8kit.verify.properties import row_kernels
whole = row_kernels.KERNELS["swiglu_quantize"]
row_kernels.KERNELS["swiglu_quantize"] = lambda gu, tile=None: whole(gu) if gu.shape[0] < 3 else os.abort()
"""


@pytest.mark.process
def test_command_of_a_crash_crashes_again(tmp_path, monkeypatch):
    """The child ends inside an example. Its report holds that example, and the command tries it in a new process."""
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    path = os.pathsep.join((str(tmp_path), *sys.path))
    monkeypatch.syspath_prepend(tmp_path)
    run = property_runs.PropertyRun("swiglu_quantize", EXECUTOR)
    verifier = property_runs.VerifyKernels(Database(gpus.get("rtx3090")), examples=20)
    [(result, _)] = property_runs.run_all([run], verifier)
    assert result.failure.endswith("the kernel ended its process (SIGABRT)")
    assert encoding.from_json(result.example).m >= 3
    printed = replay.command(result).replace("python -c", f"{sys.executable} -c")
    done = subprocess.run(printed, shell=True, env=os.environ | {"PYTHONPATH": path}, capture_output=True, timeout=120)
    assert done.returncode not in (0, 1)


def test_replay_finds_the_executor_of_any_architecture(monkeypatch):
    monkeypatch.setattr(gemm, "interpreted", lambda: False)
    monkeypatch.setattr(replay.executors, "present", lambda: gpus.get("h200"))
    assert [replay._executor(arch).arch for arch in (None, "sm80", "sm86", "sm89")] == [None, "sm80", "sm86", "sm89"]
    with pytest.raises(replay.InputError, match="sm120 code does not run here"):
        replay._executor("sm120")
    result = runner.Result("quantize", "GPU", 1, "differs", example=encoding.to_json(SMALL))
    assert replay.command(result, arch="sm80").startswith("python -c ")


def test_lookups_and_stamps_of_the_tables_hold():
    assert len(list(stamps.always())) > 100
    for case in stamps.always():
        assert stamps.check(case, EXECUTOR) is None, case
    levels = {lookups.expected(case)[0] for case in lookups.always()}
    assert levels == {level.name for level in lookup.LEVELS}
    for case in lookups.always():
        assert lookups.check(case, EXECUTOR) is None, case


@pytest.fixture
def compiled(monkeypatch):
    """A launcher that believes itself to compile, on device 1, and its store."""
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(launch, "_COMPILED", {})
    monkeypatch.setattr(launch, "_FINALIZED", {None})
    return launch._COMPILED


def test_a_kernel_that_is_stored_and_found_again(compiled):
    with stored_kernels() as first:
        launch.finalize_cache_keys(SimpleNamespace(fn=None))
        compiled["_quantize", 1, "key", ()] = "kernel"
    assert first.differs(aligned=True, again=False) is None
    with stored_kernels() as second:
        pass
    assert second.differs(aligned=True, again=True) is None
    assert not second.added


def test_kernels_that_are_not_stored_or_not_found_are_named(compiled):
    with stored_kernels() as launched:
        pass
    assert "is not stored" in launched.differs(aligned=True, again=False)
    assert launched.differs(aligned=False, again=False) is None
    compiled["_quantize", 1, "key", ()] = "kernel"
    with stored_kernels() as launched:
        launch.finalize_cache_keys(SimpleNamespace(fn=None))
    assert "is not found" in launched.differs(aligned=True, again=True)
    with stored_kernels() as launched:
        compiled["_quantize", -1, "key", ()] = "kernel"
    assert "device -1, expected 1" in launched.differs(aligned=True, again=False)


def test_long_rows_have_their_own_function():
    assert row_launches._function(replace(SMALL, kernel="quantize", k=K_MAX_HELD)) == "_quantize"
    assert row_launches._function(replace(SMALL, kernel="quantize", k=K_MAX_HELD + 1)) == "_quantize_long"
    assert row_launches._function(SMALL) == f"_{SMALL.kernel}"


def test_every_operand_is_refused_in_some_way():
    for kernel, names in row_kernels.OPERANDS.items():
        wrong = dict(row_tables.wrong_tensors(kernel))
        assert set(names) == {name for together in wrong for name in together.split(",")}
        assert {fault for faults in wrong.values() for fault in faults} <= set(row_kernels._FAULTS)


def test_an_operand_that_is_not_refused_is_found(monkeypatch):
    e = replace(row_tables.base("qk_norm_rope"), refused="cos,sin longer")
    assert row_kernels.check(e, EXECUTOR) is None
    monkeypatch.setitem(row_kernels.KERNELS, "qk_norm_rope", lambda *args: args)
    assert row_kernels.check(e, EXECUTOR) == "no error, expected InputError"


def test_a_stored_kernel_is_launched_once_for_each_program(compiled):
    seen = []
    compiled["_quantize", 1, "key", ()] = SimpleNamespace(run=lambda *args: seen.append(args), function="f")
    with stored_kernels() as launched:
        kernel = compiled["_quantize", 1, "key", ()]
        kernel.run(4, 1, 2, kernel.function)
    assert seen == [(4, 1, 2, "f")]
    assert "(4, 1, 2)" in launched.differs(aligned=True, again=True)
    assert type(compiled["_quantize", 1, "key", ()]) is SimpleNamespace
    assert row_launches._programs(row_launches.base("qk_norm_rope")) == 1
    assert row_launches._programs(replace(row_launches.base("qk_norm_rope"), heads=5)) == 2


def test_limits_are_the_kernels_limits():
    """The verifier has its own numbers, so that a narrower kernel fails; a wider one needs new numbers there."""
    assert limits.K_MAX == spec.K_MAX == row_tables.LONGEST
    assert limits.K_MAX_HELD == row_primitives.K_MAX_HELD == operand_checks.K_MAX_HELD
    assert limits.HEAD_DIMS == HEAD_DIMS == operand_checks.HEAD_DIMS
    assert (
        row_primitives.CHUNKS, row_primitives.WARPS, row_primitives.BLOCK.value
    ) == (limits.CHUNKS, limits.WARPS, limits.BLOCK)  # fmt: skip
