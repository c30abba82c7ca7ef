"""verify/properties/exhaustive: the proofs pass on sound kernels, on parts of their domains, and fail on seeded faults.

The proofs of 2**32 inputs run here on a thousand, in the interpreter: tests/gpu has them whole.
"""

import inspect
import textwrap
from pathlib import Path
from types import FunctionType

import exhaustive_faults
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from int8kit import reference
from int8kit.kernels import epilogue, gemm_mma_sync, gemm_triton, gemm_wgmma, l2_swizzle, stream_k
from int8kit.kernels import gemm as gemm_module
from int8kit.kernels import quantize as quantize_module
from int8kit.spec import Kernel, TileConfig
from int8kit.verify import verify_kernels
from int8kit.verify.executors import Executor
from int8kit.verify.mutation import campaign
from int8kit.verify.mutation.catalogue import CATALOGUE
from int8kit.verify.mutation.mutant import Mutant
from int8kit.verify.properties.exhaustive import (
    PROOFS,
    barriers,
    bits,
    device_kernels,
    device_python,
    epilogues,
    launches,
    quantization,
    scheduler,
)

HERE = Executor("interpreter", "cpu", "the interpreter")
GPU = Executor("native", "cuda", "a GPU", code=90)
EMULATED = Executor("cross_arch", "cuda", "a GPU", "sm86", 86)
SPARSE = range(-(2**31), 2**31, (1 << 22) - 1)  # about a thousand patterns of 32 bits
TRITON = (Kernel.TRITON,)
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where a GPU is"),
    pytest.mark.usefixtures("quiet_interpreter"),
]


def ignore(step):
    pass


@pytest.fixture
def small(monkeypatch):
    """A smaller domain of the tile scheduler's proof."""
    monkeypatch.setattr(scheduler, "WORKERS", range(1, 9))
    monkeypatch.setattr(scheduler, "STEPS", range(1, 7))
    monkeypatch.setattr(scheduler, "LARGEST_SMS", 20)
    monkeypatch.setattr(scheduler, "K_MAX", 3000)
    monkeypatch.setattr(scheduler, "GRIDS", ((1, 1), (3, 2), (5, 4), (2, 65), (65, 1)))
    monkeypatch.setattr(scheduler, "SMALL_GRIDS", ((1, 2), (3, 3)))
    monkeypatch.setattr(scheduler, "SMALL_SMS", (2, 5))
    monkeypatch.setattr(scheduler, "SMALL_STEPS", (1, 3))


@pytest.fixture
def plant(monkeypatch):
    """plant(module, function, old, new): a device or host function whose source has `new` instead of `old`."""

    def seed(module, name, old, new):
        function = getattr(module, name)
        host = isinstance(function, FunctionType)
        source = textwrap.dedent(inspect.getsource(function if host else function.fn))
        assert source.count(old) == 1
        text = "from __future__ import annotations\n" + source[source.index("def ") :].replace(old, new)
        space = dict(module.__dict__)
        exec(text, space)
        code = space[name].__code__
        faulty = FunctionType(code, module.__dict__, name, (function if host else function.fn).__defaults__)
        if host:
            monkeypatch.setattr(module, name, faulty)
        else:
            monkeypatch.setattr(function, "fn", faulty)

    return seed


def test_the_table():
    """Each executor has the proofs that it can run; the interpreter's are cheap enough for `verify mutate`."""
    here = [proof for proof in PROOFS if proof.why_not(HERE) is None]
    assert [proof.name for proof in here] == ["tile scheduler", "barriers", "row scale", "silu", "bias"]
    assert all(proof.mutants_of for proof in here)
    assert all(proof.why_not(GPU) is None for proof in PROOFS)
    emulated = {proof.name for proof in PROOFS if proof.why_not(EMULATED) is None}
    assert {"epilogue conversion", "swiglu epilogue", "tile scheduler"} <= emulated
    assert not any("quantize" in name or "row scale" in name for name in emulated)
    assert {proof.evidence for proof in PROOFS} == {"every input"}


@pytest.mark.parametrize("name", ["row scale", "silu"])
def test_cheap_proofs_hold(name):
    result = verify_kernels.run_over_tiles(name, HERE)
    assert (result.failure, result.examples, result.evidence) == (None, 2 * 65536, "every input")


def test_tile_scheduler_holds(small):
    steps = []
    outcome = scheduler.prove(HERE, (), steps.append)
    assert outcome.failure is None
    assert outcome.count > 5000
    assert steps == ["corners", "stream_k_ranges", "launches"]


FAULTS = [
    (l2_swizzle, "tile_corner", "tiles_m - first, group_m", "tiles_m, group_m"),
    (l2_swizzle, "tile_corner", "group_m * tl.cdiv(N, BLOCK_N)", "group_m * tl.minimum(tl.cdiv(N, BLOCK_N), 64)"),
    (l2_swizzle, "tile_corner", "tile % group // height * BLOCK_N", "(tile % group // height * BLOCK_N) % 4096"),
    (stream_k, "range_start", "total * worker // workers", "total // workers * worker"),
    (stream_k, "range_owner", "(step + 1) * workers", "step * workers"),
    (
        stream_k,
        "segment_count",
        "gl.where(hi > lo, (hi - 1) // steps - lo // steps + 1, 0)",
        "gl.where(hi > lo, 2, 0)",
    ),
    (stream_k, "segment", "gl.minimum(hi - index * steps, steps)", "steps"),
    (stream_k, "fix_up", "2 * worker + i", "worker + i"),
    (stream_k, "fix_up", "slot = 2 * other + index - start // steps", "slot = 2 * other"),
    (stream_k, "fix_up", "other != worker and", "other <= worker and"),
    (stream_k, "fix_up", "range(first, last + 1)", "range(first, last)"),
    (stream_k, "fix_up", "    barrier()", "    pass"),
    (stream_k, "fix_up", 'sem="acq_rel"', 'sem="relaxed"'),
    (stream_k, "fix_up", 'cache_modifier=".cg"', 'cache_modifier=""'),
    (stream_k, "fix_up", "PIECES * index + PIECE", "index"),
    (stream_k, "fix_up", "workspace_ptr + PIECE * SIZE", "workspace_ptr"),
    (stream_k, "fix_up", "+ taken == steps", "+ taken >= steps - 1"),
    (gemm_mma_sync, "_gemm_mma_sync", "pid - workers", "pid"),
    (gemm_mma_sync, "_gemm_mma_sync", "gl.minimum(k1 * BLOCK_K, K)", "k1 * BLOCK_K"),
    (gemm_mma_sync, "_gemm_mma_sync", "if k1 - k0 < steps:", "if k1 - k0 < steps - 1:"),
    (gemm_mma_sync, "launch", "tiles - leftover + workers", "tiles - leftover"),
    (gemm_wgmma, "_work", "gl.cdiv(tiles - pid, programs)", "tiles // programs"),
    (gemm_wgmma, "_work", "gl.where(pid < halves, 1, 0)", "gl.where(pid < halves - 1, 1, 0)"),
    (gemm_wgmma, "_item", "index * steps + k0 - first", "k0"),
    (gemm_wgmma, "_item", "whole_tiles * programs + pid // 2", "whole_tiles * programs + pid % 2"),
    (gemm_wgmma, "_item", "i * steps", "i * (steps - 1)"),
    (gemm_wgmma, "_produce", "gl.program_id(0) % 2 * ROWS", "0"),
    (gemm_wgmma, "_produce", "range(segments + whole_tiles + half)", "range(segments + whole_tiles)"),
    (gemm_wgmma, "_produce", "((box + 1) * ROWS + BLOCK_N) * BLOCK_K", "(box * ROWS + BLOCK_N) * BLOCK_K"),
    (gemm_wgmma, "_produce", "gl.minimum(gl.cdiv(M - row, ROWS), BOXES)", "gl.minimum((M - row) // ROWS, BOXES)"),
    (gemm_wgmma, "_produce", "[row + box * ROWS, k * BLOCK_K]", "[row + box * ROWS, step * BLOCK_K]"),
    (gemm_wgmma, "_consume", "gl.where(alone, gl.program_id(0) % 2, CONSUMER) * ROWS", "CONSUMER * ROWS"),
    (gemm_wgmma, "_consume", "0 if COOPERATIVE else CONSUMER, items", "CONSUMER, items"),
    (gemm_wgmma, "_consume", "2 if COOPERATIVE else 1, CONSUMER if COOPERATIVE else 0", "1, 0"),
    (gemm_wgmma, "_gemm_wgmma", "    gdc_wait()", "    if not SWIGLU:\n        gdc_wait()"),
    (gemm_wgmma, "launch", "min(tiles * pieces, multiprocessors(o.xq.device))", "min(tiles, 2)"),
    (gemm_wgmma, "launch", "cdiv(o.m, config.block_m)", "(o.m // config.block_m)"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[1]}: {fault[3]}")
def test_tile_scheduler_fails(fault, small, plant):
    plant(*fault)
    outcome = scheduler.prove(HERE, (), ignore)
    if fault[3] == "min(tiles, 2)":  # another number of programs is slower, and right
        assert outcome.failure is None
    else:
        assert outcome.failure


def test_int32_sums_that_overflow_are_found(plant):
    plant(stream_k, "range_start", "total * worker // workers", "total * (worker * 2) // (workers * 2)")
    assert "partition" in scheduler.stream_k_ranges(HERE).failure


def test_compiled_functions_are_compared(small, monkeypatch):
    """The GPU's part, with Python in place of the compiled kernels, and with a wrong number in each."""

    def values(cases, arch):
        return torch.from_numpy(np.stack(scheduler.stream_k_python(tuple(cases.numpy()))))

    def items(cases, *args):
        return torch.from_numpy(scheduler.work_python(tuple(cases.numpy()), *args[:-1]))

    def wrong(function):
        def call(*args):
            result = function(*args)
            result[..., 3 if result.dim() == 3 else 40] += 1
            return result

        return call

    right = {"stream_k_values": values, "work_items": items, "corners": device_kernels.corners}
    for name, function in right.items():
        monkeypatch.setattr(device_kernels, name, function)
    assert scheduler.compiled(HERE).failure is None
    for name, function in right.items():
        monkeypatch.setattr(device_kernels, name, wrong(function))
        assert scheduler.compiled(HERE).failure
        monkeypatch.setattr(device_kernels, name, function)


@triton.jit
def _scale_by_reciprocal(top):
    largest = tl.max(top.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    return tl.where(largest < 0x7F800000, largest.to(tl.float32, bitcast=True) * (1.0 / 127.0), float("nan"))


@triton.jit
def _silu_of_less(g):
    return tl.where(g == 1.5, g, g / (1.0 + tl.exp(-g)))


def test_row_scale_fails(monkeypatch):
    monkeypatch.setattr(device_kernels, "row_scale", _scale_by_reciprocal)
    result = verify_kernels.run_over_tiles("row scale", HERE)
    assert "amax = " in result.failure
    assert "of bfloat16" in result.failure


def test_silu_fails(monkeypatch):
    monkeypatch.setattr(device_kernels, "silu", _silu_of_less)
    assert "gate = " in verify_kernels.run_over_tiles("silu", HERE).failure


def test_silu_fails_where_reference_and_kernel_are_both_inexact(monkeypatch):
    silu, factor = reference.silu, 1 + 2.0**-21
    monkeypatch.setattr(reference, "silu", lambda g: silu(g) * factor)
    monkeypatch.setattr(device_kernels, "silus", lambda g, arch: silu(g) * factor)
    assert "within 4 ulp" in epilogues.silu_halves(HERE, ignore).failure


@triton.jit
def _add_half_bias(y, bias):
    return y + tl.where(bias == 3.0, bias.to(tl.float32) + 0.5, bias.to(tl.float32))


def test_bias(monkeypatch):
    domain = range(0x4000, 0x4080)  # 3.0 among them, as bf16
    assert epilogues.bias(HERE, TRITON, ignore, domain).failure is None
    monkeypatch.setattr(gemm_triton, "add_bias", _add_half_bias)
    assert (
        "bias = 3.0 (0x4040 of bfloat16): got 3.5, expected 3.0" in epilogues.bias(HERE, TRITON, ignore, domain).failure
    )


def test_interpreters_conversion_of_subnormal_bfloat16_is_left_out():
    outcome = epilogues.bias(HERE, TRITON, ignore, range(0x90))
    assert outcome.failure is None
    assert outcome.count == 0x90 + 0x11


AMAXES = {torch.bfloat16: range(0, 0x7F80, 0x4400), torch.float16: range(0x5C00, 0x5C01)}


def test_pairs(monkeypatch):
    outcome = quantization.pairs(HERE, ignore, AMAXES)
    assert outcome.failure is None
    each = [2 * (amax + 1) for domain in AMAXES.values() for amax in domain]
    assert outcome.count == sum(each) * len(quantization.WIDTHS)
    quantize = quantize_module.quantize

    def one_wrong(x):
        q, s = quantize(x)
        q[x == -256.0] += 1
        return q, s

    monkeypatch.setattr(quantize_module, "quantize", one_wrong)
    assert "x = -256.0" in quantization.pairs(HERE, ignore, AMAXES).failure


def test_every_pair_is_in_a_row():
    """Rows of 8 numbers have each number up to the amax, of both signs, once."""
    amax = torch.tensor([9, 9, 9])
    x, count = quantization._rows(amax, torch.tensor([0, 7, 14]), 8, torch.float16)
    numbers = x.view(torch.int16).long() & 0xFFFF
    assert (numbers[:, 0] == 9).all()
    assert count == 20
    expected = {magnitude | sign for magnitude in range(10) for sign in (0, 0x8000)}
    assert sorted(numbers[:, 1:].flatten().tolist()) == sorted([*expected, 0])


def test_row_scale_of_fp32(monkeypatch):
    domain = range(-(2**31), 2**31, 2**29 + 12345)
    assert quantization.row_scale_fp32(HERE, ignore, domain) == quantization.Outcome(len(domain))
    quantize = quantize_module.quantize
    monkeypatch.setattr(quantize_module, "quantize", lambda x: (quantize(x)[0], x.abs()[:, 0] * (1 / 126)))
    assert "s of a row" in quantization.row_scale_fp32(HERE, ignore, domain).failure
    monkeypatch.setattr(quantize_module, "quantize", lambda x: (quantize(x)[0] * 0, quantize(x)[1]))
    assert "q of a row" in quantization.row_scale_fp32(HERE, ignore, domain).failure


def test_conversions(monkeypatch):
    assert epilogues.conversion(HERE, TRITON, ignore, SPARSE, rows=400) == quantization.Outcome(len(SPARSE))
    product = gemm_module.scaled_mm

    def truncated(*args, out_dtype, **options):
        y = product(*args, out_dtype=torch.float32, **options)
        return (y.view(torch.int32) & -0x2000).view(torch.float32).to(out_dtype)

    monkeypatch.setattr(gemm_module, "scaled_mm", truncated)
    assert "triton, torch.float16: y = " in epilogues.conversion(HERE, TRITON, ignore, SPARSE, rows=400).failure


def test_accumulator_conversion(monkeypatch):
    assert epilogues.accumulator(HERE, ignore, SPARSE) == quantization.Outcome(len(SPARSE))
    monkeypatch.setattr(device_kernels, "dequantize", _truncated)
    assert "accumulator = " in epilogues.accumulator(HERE, ignore, SPARSE).failure


@triton.jit
def _truncated(acc, sx, sw):
    return (acc >> 7 << 7).to(tl.float32) * sx * sw


def test_swiglu_epilogue(monkeypatch):
    assert epilogues.swiglu(HERE, TRITON, ignore, SPARSE, rows=400) == quantization.Outcome(len(SPARSE))
    assert epilogues.silu_fp32(HERE, ignore, SPARSE) == quantization.Outcome(len(SPARSE))
    monkeypatch.setattr(epilogue, "silu", _silu_of_less)
    assert "gate = " in epilogues.swiglu(HERE, TRITON, ignore, SPARSE, rows=400).failure


@pytest.mark.parametrize("mutant", exhaustive_faults.FAULTS, ids=lambda mutant: mutant.name)
def test_faults_of_the_gpus_tests_have_one_place(mutant):
    assert campaign.mutated(mutant, campaign.PACKAGE)
    assert mutant.expected in {proof.name for proof in PROOFS}


@pytest.mark.process
def test_a_fault_in_a_copy_is_caught():
    """As the tests on a GPU do it."""
    wrong = "tl.where((bits < 0x7F800000) & (bits != 0x3F800000),"
    mutant = Mutant("one", exhaustive_faults.ROWS, "tl.where(bits < 0x7F800000,", wrong, "1.0 is lost", "row scale")
    found = exhaustive_faults.verdict(mutant, "row scale", Kernel.TRITON, HERE)
    assert (found.ending, found.how) == ("killed", "differs")
    assert "amax = -1.0 (0xbf80 of bfloat16): got nan" in found.evidence


def test_the_page_lists_the_proofs():
    page = (Path(__file__).parent.parent / "docs" / "verification.md").read_text()
    assert [proof.name for proof in PROOFS if f"`{proof.name}`" not in page] == []


def test_kernels_that_an_executor_runs():
    tiles = tuple(epilogues.TILES.values())
    assert epilogues.kernels_of(HERE, tiles) == TRITON
    assert epilogues.kernels_of(GPU, tiles) == tuple(epilogues.TILES)
    assert epilogues.kernels_of(EMULATED, tiles) == (Kernel.TRITON, Kernel.MMA_SYNC)
    assert epilogues.kernels_of(GPU, tiles[:1]) == TRITON


def test_no_kernel_is_no_proof():
    gluon = TileConfig(64, 64, 128, 8, 4, kernel=Kernel.WGMMA)
    assert verify_kernels.run_over_tiles("bias", HERE, [gluon]).examples == 0


def test_lanes_are_int32():
    """Sums wrap and quotients truncate."""
    lanes = device_python.Lanes([2**31 - 1, -7])
    assert (lanes + 1).values.tolist() == [-(2**31), -6]
    assert (lanes // 2).values.tolist() == [2**30 - 1, -3]
    assert (lanes % 2).values.tolist() == [1, -1]
    assert (1 - lanes).values.tolist() == [2 - 2**31, 8]


def test_branches_of_lanes_are_split():
    def smaller(a, b):
        if a < b:
            return a, 1
        return b, 0

    found = device_python.evaluate(smaller, np.array([1, 5, 3]), np.array([2, 4, 9]))
    assert [column.tolist() for column in found] == [[1, 4, 3], [1, 0, 1]]


def test_bits():
    assert [len(part) for part in bits.chunks(range(10), 4)] == [4, 4, 2]
    assert bits.patterns(range(0x3F80, 0x3F81), torch.bfloat16, "cpu").tolist() == [1.0]
    x = torch.tensor([1.0, torch.nan, -0.0])
    assert bits.first_difference(x, x.clone()) is None
    assert bits.first_difference(x, torch.tensor([1.0, torch.nan, 0.0])) == (2,)
    assert bits.named(x, "x")((2,)) == "x = -0.0 (0x80000000 of float32)"


def test_memory_of_a_launch_refuses_addresses_outside_it():
    gl = launches.Gluon()
    with pytest.raises(launches.Fault, match="offset 4"):
        gl.store(launches.Pointer(launches.Memory(4, zero=False)) + np.arange(5), 1)


def test_barriers_of_the_wgmma_kernel():
    assert barriers.prove(HERE, (), ignore) == quantization.Outcome(1800)


FULL, EMPTY, ORDER = (0, 0), (1, 0), (2, 0)
COUNTS = {FULL: 1, EMPTY: 1, ORDER: 1}


def fills(number):
    """Turns of a producer that fills one slot again and again."""
    return [barriers.Turn(EMPTY, step & 1 ^ 1, filled=[FULL]) for step in range(number)]


def multiplies(number, **more):
    """Turns of a consumer that multiplies each step and then releases the slot."""
    return [barriers.Turn(FULL, step & 1, step, [EMPTY], read=[step], **more) for step in range(number)]


def test_sound_groups_end():
    assert barriers.explore([multiplies(4), [], fills(4)], COUNTS) == 9  # one slot leaves one order


@pytest.mark.parametrize(
    ("traces", "counts", "why"),
    [
        ([multiplies(3), [], fills(2)], COUNTS, "nothing can go on: consumer 0 behind 2 waits"),
        ([multiplies(2), [barriers.Turn(EMPTY, 1)], [barriers.Turn(EMPTY, 0, filled=[FULL])]], COUNTS, "the producer"),
        # a slot that one of two consumers releases
        ([multiplies(2), multiplies(2), fills(2)], COUNTS, "finds step 1 in a slot, expected step 0|may read step 0"),
        # two phases that a slow group does not see
        ([[barriers.Turn(FULL, 0, 0, [ORDER, ORDER], read=[0])], [barriers.Turn(ORDER, 0)], fills(1)], COUNTS,
         "nothing can go on: consumer 1 behind 0 waits"),
        ([[barriers.Turn(FULL, 1, 0, read=[0])], [], fills(1)], COUNTS, "finds step -1 in a slot, expected step 0"),
    ],
)  # fmt: skip
def test_unsound_groups_are_found(traces, counts, why):
    with pytest.raises(launches.Fault, match=why):
        barriers.explore(traces, counts)


@pytest.mark.process
@pytest.mark.parametrize("name", ["wgmma-two-tiles-ahead", "wgmma-deadlock"])
def test_faults_of_barriers_are_caught_without_a_gpu(name):
    mutant = next(mutant for mutant in CATALOGUE if mutant.name == name)
    found = exhaustive_faults.verdict(mutant, "barriers", Kernel.WGMMA, HERE)
    assert (found.ending, found.how) == ("killed", "differs")
    assert "nothing can go on" in found.evidence
