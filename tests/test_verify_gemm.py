"""verify/ of GEMMs: the examples reach their ranges, cross all kinds, and leave no operand and no field out."""

from dataclasses import fields, replace

import pytest
import torch

from int8kit import gpus, reference
from int8kit.kernels import launch
from int8kit.kernels.operands import Operands
from int8kit.spec import DOMAINS, GemmShape, Kernel, Schedule, TileConfig, why_illegal
from int8kit.verify import executors, implementations
from int8kit.verify.compare import Output, columns, fronts, operands, strides
from int8kit.verify.examples import epilogue_table, fixed
from int8kit.verify.examples.strategies import VARIANTS, Draw, admitted, int8_matrix, takes_operands
from int8kit.verify.properties import launch_cache, launch_keys, order, pdl_probe, tile_order
from int8kit.verify.properties.budget import budget
from int8kit.verify.properties.registry import PROPERTIES
from int8kit.verify.runner import run_property
from int8kit.verify.verify_kernels import DEFAULT_TILES

EXECUTOR = executors.available(gpus.get("rtx3090"))[-1]
GLUON = (
    *fixed.LATE_TILES[Kernel.WGMMA], *fixed.LATE_TILES[Kernel.MMA_SYNC],
    replace(fixed.LATE_TILES[Kernel.MMA_SYNC][0], stream_k=1),
)  # fmt: skip
ALL_TILES = tuple(sorted({*DEFAULT_TILES, *GLUON}))
INT8KIT = implementations.int8kit(EXECUTOR, fixed.SMALL_TILES)


def tried(name, tiles=DEFAULT_TILES):
    """The fixed examples of a property, and 40 of the drawn ones."""
    row, limits, seen = PROPERTIES[name], budget(EXECUTOR, None), []
    tiles = tuple(sorted(tiles))
    run_property(
        name, EXECUTOR, row.strategy(tiles, limits), lambda d: None, examples=40, random_seed=0,
        always=row.always(tiles, limits), on_example=seen.append,
    )  # fmt: skip
    return seen


def measures(d, name):
    m, n, k, c = d.shape.m, d.shape.n, d.shape.k, d.config
    rows, cols = -(-m // c.block_m), -(-n // c.block_n)
    found = {"M": m, "N": n, "K": k, "tile rows": rows, "tile columns": cols, "tiles": rows * cols}
    found |= {"group_m": c.group_m, "k-steps": -(-k // c.block_k)}
    if name == "output" and d.bias is not None:
        found["N with bias"] = n
    if name == "swiglu":
        found["N with SwiGLU"] = admitted(replace(d, variant="swiglu")).shape.n
    return found


@pytest.mark.parametrize(
    ("name", "ranges"),
    [
        ("accumulator", ("M", "N", "K", "tile rows", "tile columns", "tiles", "group_m", "k-steps")),
        ("output", ("M", "N", "N with bias", "K", "tile rows", "tile columns", "tiles", "group_m", "k-steps")),
        ("swiglu", ("M", "N with SwiGLU")),
    ],
)
def test_examples_reach_the_ends_of_the_ranges(name, ranges):
    found = [measures(d, name) for d in tried(name)]
    reached = {r: (min(f[r] for f in found if r in f), max(f[r] for f in found if r in f)) for r in ranges}
    assert reached == {r: fixed.RANGES[r] for r in ranges}


def test_every_range_is_measured():
    assert set(fixed.RANGES) == {"M", "N", "K", "tile rows", "tile columns", "tiles", "group_m", "k-steps"} | {
        "N with bias", "N with SwiGLU"
    }  # fmt: skip
    assert fixed.RANGES["M"][1] >= 2**16 < fixed.RANGES["N"][1]
    assert fixed.RANGES["tile columns"][1] > 256 < fixed.RANGES["tiles"][1]
    assert set(range(1, 65)) == set(tile_order.GROUP_M)
    assert all(rows * cols > 2**8 for rows, cols in tile_order.LARGE_GRIDS)


def test_operands_have_their_own_strides_and_addresses():
    for d in tried("output", ALL_TILES):
        d = admitted(d)
        found = strides(d)
        if d.padding:
            assert len({*found.values(), d.shape.k, d.shape.n}) == 3 + len({d.shape.k, d.shape.n})
        at = fronts(d)
        if d.config.kernel is not Kernel.TRITON:
            assert d.shape.k % 16 == found["x"] % 16 == found["w"] % 16 == at["x"] % 16 == at["w"] % 16 == 0
        if d.config.kernel is Kernel.WGMMA:
            assert found["out"] % 16 == at["out"] % 16 == 0
        if d.config.kernel is Kernel.TRITON and d.offset % 16:
            assert {at[name] % 16 for name in ("x", "w", "out")} != {0}
        assert len({at["sx"], at["sw"], at["bias"]}) == 3


def test_places_of_operands():
    fp16 = torch.float16
    d = Draw(GemmShape(5, 6, 33), fixed.SMALL_TILES[0], "uniform", 1, fp16, fp16, 3, offset=1, shift=1)
    x, w, sx, sw, bias = operands(d, "cpu")
    assert {t.data_ptr() % 16 for t in (x, w)} == {1, 2}
    assert len({x.stride(0), w.stride(0), 5, 6, 33}) == 5
    assert len({t.data_ptr() % 16 for t in (sx, sw, bias)}) == 3
    for vector in (sx, sw, bias):
        around = vector.as_strided((len(vector) + 2,), (1,), vector.storage_offset() - 1)
        assert around[0].isnan()
        assert around[-1].isnan()
    out = Output(d, 5, "cpu")
    assert out.written_outside() is None
    out.view.zero_()
    assert out.written_outside() is None
    out.view.as_strided((1,), (1,), out.view.storage_offset() - 1).zero_()
    assert out.written_outside() == "1 elements outside [M, N] were written"


def test_the_table_crosses_all_kinds():
    table, n = epilogue_table, epilogue_table.TABLE_N
    i = torch.arange(n)
    kinds = torch.where(i % 2 == 0, i // 2, i // 2 // 13) % 13
    assert len(table.SCALES) == 13
    assert len(set(zip(kinds[0::2].tolist(), kinds[1::2].tolist(), strict=True))) == 169
    assert len(set(zip(kinds.tolist(), (i % 11).tolist(), strict=True))) == 13 * 11
    assert 13 * len(table.SUMS) == table.TABLE_M
    for scales in (table.row_scales(65, 0, "cpu"), table.column_scales(n, 0, "cpu")):
        zero = scales == 0
        assert {bool(sign) for sign in scales[zero].signbit()} == {True, False}
        assert scales.isnan().any()
        assert (scales == torch.inf).any()
        assert (scales == -torch.inf).any()
        assert (scales == 2.0**-149).any()
        assert ((scales.abs() < 2.0**-126) & (scales.abs() > 2.0**-140)).any()


def _kinds_of_results(y, smallest):
    finite = y[y.isfinite()]
    return {
        "nan": y.isnan().any(), "inf": (y == torch.inf).any(), "-inf": (y == -torch.inf).any(),
        "0": ((y == 0) & ~y.signbit()).any(), "-0": ((y == 0) & y.signbit()).any(),
        "subnormal": ((finite != 0) & (finite.abs() < smallest)).any(),
    }  # fmt: skip


def test_the_table_gives_every_kind_of_result_in_every_dtype():
    found, sums = {}, set()
    for d in fixed.epilogue_tables(DEFAULT_TILES):
        x, w, sx, sw, bias = operands(d, "cpu")
        sums |= set(reference.accumulate(x, w).unique().tolist())
        results = (
            reference.scaled_mm(x, w, sx, sw, bias, out_dtype=d.out_dtype),
            reference.scaled_mm_swiglu(x, w, sx, sw, bias, out_dtype=d.out_dtype),
        )
        for epilogue, y in zip(("plain", "swiglu"), results, strict=True):
            key = d.config, d.out_dtype, epilogue
            kinds = _kinds_of_results(y.double(), torch.finfo(d.out_dtype).smallest_normal)
            found.setdefault(key, set()).update(kind for kind, seen in kinds.items() if seen)
    assert {config for config, *_ in found} == {fixed.SMALL_TILES[0], DEFAULT_TILES[-1]}
    assert len(found) == 2 * 3 * 2
    for key, kinds in found.items():
        assert len(kinds) == 6, (key, kinds)
    assert {0, 1, -1} < sums
    assert max(sums) > 2**19
    assert min(sums) < -(2**19)


def test_each_kernel_has_each_bias_and_output_dtype():
    for kernel in Kernel:
        examples = [d for d in fixed.epilogue_tables(ALL_TILES) if d.config.kernel is kernel]
        by_tile = {c: [d for d in examples if d.config == c] for c in {d.config for d in examples}}
        assert len(by_tile) == 2
        for some in by_tile.values():
            assert {d.bias for d in some} == set(fixed.BIAS_DTYPES)
            assert {d.out_dtype for d in some} == {torch.float32, torch.float16, torch.bfloat16}
        assert max(len(some) for some in by_tile.values()) == 12


def test_large_sums_have_low_bits_and_both_signs():
    x, w = int8_matrix(2, 131071, "opposed", 1, "cpu"), int8_matrix(3, 131071, "opposed", 101, "cpu")
    sums = reference.accumulate(x, w)
    assert sums.max() > 2**30
    assert sums.min() < -(2**30)
    assert len(set((sums % 16).flatten().tolist())) > 3
    for kernel in Kernel:
        examples = [d for d in fixed.large_sums(ALL_TILES, roomy=True) if d.config.kernel is kernel]
        assert max(d.shape.k for d in examples) == (131071 if kernel is Kernel.TRITON else 131056)
    streamed = {d.config.kernel for d in fixed.large_sums(ALL_TILES, roomy=True) if d.config.stream_k}
    assert streamed == {Kernel.MMA_SYNC, Kernel.WGMMA}


def test_huge_strides_of_every_kernel():
    seen = set()
    for d in fixed.over_2gib_strides(ALL_TILES, "x", "w", "out"):
        rows, block = (d.shape.n, d.config.block_n) if d.huge_stride == "w" else (d.shape.m, d.config.block_m)
        stride = 2**23 - 16 if d.config.kernel is Kernel.MMA_SYNC and d.huge_stride != "out" else 2**30 + 16
        last_tile = (rows - 1) // block * block
        assert (rows - 1) * stride >= 2**31
        assert stride != 2**23 - 16 or last_tile * stride >= 2**31
        seen.add((d.config.kernel, d.huge_stride))
    assert len(seen) == 9


def test_each_operand_of_each_variant_is_late_in_each_schedule():
    by_kernel = {kernel: [d for d in fixed.late_operands(ALL_TILES) if d.config.kernel is kernel] for kernel in Kernel}
    names = {{"xq": "x", "wq": "w"}.get(f.name, f.name) for f in fields(Operands)} - {"swiglu"}
    assert set().union(*fixed.LATE_OPERANDS.values()) == names
    schedules = {(d.config.schedule, d.config.stream_k) for d in by_kernel[Kernel.WGMMA]}
    assert schedules == {(s, k) for s in Schedule for k in (0, 1)}
    assert len(by_kernel[Kernel.WGMMA]) == 4 * 15 + 2 * 3 * 2
    assert all(len(some) == 15 for kernel, some in by_kernel.items() if kernel is not Kernel.WGMMA)
    for d in by_kernel[Kernel.WGMMA]:
        assert why_illegal(d.config, arch=90, shared_memory=232448) is None


def late(which, variant="output"):
    [d] = [d for d in fixed.late_operands(fixed.SMALL_TILES) if d.late == which and d.variant == variant]
    return d


@pytest.mark.parametrize("which", ["x", "w", "sx", "sw", "bias"])
def test_late_operand_is_seen(monkeypatch, quiet_interpreter, which):
    """The copies happen at once, and then never: as a kernel sees them that waits, and that does not."""
    monkeypatch.setattr(pdl_probe, "delayed_copy", lambda target, source: target.copy_(source))
    assert order.order(late(which), INT8KIT) is None
    monkeypatch.setattr(pdl_probe, "delayed_copy", lambda target, source: None)
    assert f"{which} late: " in order.order(late(which), INT8KIT)


def test_late_output_and_buffers(monkeypatch, quiet_interpreter):
    given = []
    monkeypatch.setattr(pdl_probe, "delayed_copy", lambda target, source: given.append((target, source)))
    assert order.order(late("out", "int32"), INT8KIT) is None
    [(target, source)] = given
    assert target.dtype is source.dtype is torch.int32
    assert (source == order.GARBAGE).all()

    class Module:
        stream_k = staticmethod(lambda tiles: (tiles, object()))

    before, buffers = Module.stream_k, order.Buffers()
    with buffers.shared_by(Module):
        first = Module.stream_k(3)
        assert Module.stream_k(4) is first is buffers.made
    assert Module.stream_k is before


def test_pairs_of_launches_cover_every_field():
    assert {change.field for change in launch_cache.CHANGES.values()} == {f.name for f in fields(Operands)}
    found = list(launch_cache.pairs(ALL_TILES))
    assert len(found) == len(set(found))
    for kernel in Kernel:
        mine = [p for p in found if p.first.kernel is kernel]
        assert sum(p.reverse for p in mine) * 2 == len(mine)
        differ = set()
        for pair in mine:
            for config in (pair.first, pair.second):
                arch, memory = (90, 232448) if config.kernel is Kernel.WGMMA else (86, 101376)
                assert why_illegal(config, arch=arch, shared_memory=memory) is None
            changed = {
                f.name for f in fields(TileConfig) if getattr(pair.first, f.name) != getattr(pair.second, f.name)
            }
            changed -= {"schedule"} if "kernel" in changed else set()
            assert len(changed) == (0 if pair.change else 1), pair
            differ |= changed
        one_value = {f.name for f in fields(TileConfig) if len(getattr(DOMAINS[kernel], f.name, (1, 2))) == 1}
        no_schedule = set() if kernel is Kernel.WGMMA else {"schedule"}
        assert differ == {f.name for f in fields(TileConfig)} - one_value - no_schedule


def test_a_launch_of_another_launch_is_seen(quiet_interpreter):
    """The kernel of the first launch serves the second one, too, as with a key that lacks the bias."""
    pair = next(p for p in launch_cache.pairs(fixed.SMALL_TILES) if p.change == "no bias")
    kept = dict(launch._COMPILED)

    def output(d, x, w, sx, sw, bias, out):
        kernel = launch._COMPILED.setdefault("key", bias is not None)
        with_bias = getattr(kernel, "kernel", kernel)  # itself, or the one that the property observes
        b = bias if bias is not None else torch.ones(len(w))
        return out.copy_(reference.scaled_mm(x, w, sx, sw, b if with_bias else None, out_dtype=out.dtype))

    broken = replace(INT8KIT, output=output)
    assert "the second: " in launch_cache.executed(pair, broken)
    assert "the first: " in launch_cache.executed(replace(pair, reverse=True), broken)
    assert kept == launch._COMPILED
    assert launch_cache.executed(pair, INT8KIT) is None


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ("out in float16", lambda key: key[-3:]),
        ("SwiGLU", lambda key: key[:-1]),
        ("M", lambda key: None),
    ],
)
def test_a_key_that_lacks_something_is_seen_without_a_gpu(monkeypatch, change, broken):
    pair = next(p for p in launch_cache.pairs(fixed.SMALL_TILES) if p.change == change)
    kept = dict(launch._COMPILED)
    assert launch_cache.check(pair, INT8KIT) is None
    whole = Operands.key.func
    monkeypatch.setattr(Operands, "key", property(lambda self: broken(whole(self))))
    words = "the stored kernel is not found" if change == "M" else "compiled for other"
    assert words in launch_cache.check(pair, INT8KIT)
    assert kept == launch._COMPILED


def test_other_values_than_the_launchers_are_seen():
    """A launch that hands another grid, other arguments or other options to Triton, at its first or second run."""
    x, seen = torch.zeros(16), launch_keys.Observed()
    function = launch_keys._Function(seen, launch._probe.fn)
    seen.needs = launch._probe.fn, (), (), ()
    seen.present = ((3, 1), (x,), (("BLOCK", 16),), (("num_warps", 4),))
    for _ in range(2):
        function[3, 1](x, BLOCK=16, num_warps=4, enable_fp_fusion=False).run(
            3, 1, 1, (launch_keys._STREAM, launch_keys._DEVICE), "handle", "metadata", None, None, None, x, 16
        )
    assert not seen.problems
    function[2, 1](x.clone(), BLOCK=16, num_warps=4).run(x)
    assert [problem.split()[3] for problem in seen.problems] == ["a", "arguments", "constants", "values"]


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("N", 1, (False, True, False)),
        ("N", 32, (False, False, True)),
        ("stride_xm", 2**31, (True, False, True)),
        ("M", 1, False),
        ("M", 2**31, True),
        ("eps", 1e-5, float),
    ],
)
def test_kinds_of_arguments(name, value, kind):
    assert launch_keys.kind_of(name, value) == kind


@pytest.mark.slow
def test_every_pair_of_launches_passes_in_the_interpreter(quiet_interpreter):
    for pair in list(launch_cache.pairs(fixed.SMALL_TILES))[::16]:
        assert launch_cache.executed(pair, INT8KIT) is None


def test_a_tile_without_a_number_is_seen(monkeypatch):
    assert tile_order._differs(33, 65, 2, 3, 3, EXECUTOR.device) is None
    _first_two_alike(monkeypatch)
    assert tile_order._differs(33, 65, 2, 3, 3, "cpu") == "no number gives the tile at [0, 0]"
    monkeypatch.setattr(tile_order, "GRIDS", ((2, 3),))
    outcome = tile_order.run(EXECUTOR, (), lambda _: None)
    assert outcome.count == 1
    assert outcome.failure.startswith("2 x 3 tiles of 32 x 96 elements, group_m = 1: no number gives")


def _first_two_alike(monkeypatch):
    """The kernel gives the first two tiles one corner."""

    class Broken:
        def __getitem__(self, grid):
            def fill(corners, m, n, group_m, total, **_):
                i = torch.arange(total).clamp(min=1)
                columns = -(-n // tile_order.BLOCK_N)
                corners[0] = i // columns * tile_order.BLOCK_M
                corners[1] = i % columns * tile_order.BLOCK_N

            return fill

    monkeypatch.setattr(tile_order, "_corners", Broken())


def test_columns_of_a_result():
    d = Draw(GemmShape(2, 7, 5), fixed.SMALL_TILES[0], "ones", 0, None, torch.float16, variant="swiglu")
    assert columns(admitted(d)) == 4
    of = {config.kernel: config for config in GLUON}
    assert admitted(replace(d, config=of[Kernel.MMA_SYNC], offset=1)).shape == GemmShape(2, 8, 16)
    assert admitted(replace(d, config=of[Kernel.WGMMA], offset=1)).shape == GemmShape(2, 16, 16)
    wide = replace(d, config=of[Kernel.WGMMA])
    ends = {v: admitted(replace(wide, variant=v, out_dtype=torch.float32)).shape.n for v in VARIANTS}
    assert ends == {"output": 8, "int32": 8, "swiglu": 8}
    assert admitted(replace(wide, variant="int32", shape=GemmShape(2, 4, 16))).shape.n == 4
    assert not takes_operands(replace(d, shape=GemmShape(2, 8, 16)), of[Kernel.WGMMA])


def test_tails_of_every_extent():
    for kernel in Kernel:
        examples = [d for d in fixed.tails(ALL_TILES, roomy=False) if d.config.kernel is kernel]
        for config in {d.config for d in examples}:
            mine = [admitted(d) for d in examples if d.config == config]
            c = config
            assert {d.shape.m % c.block_m for d in mine} >= {c.block_m - 1, 0, 1, 8, c.block_m // 2}
            ends = {c.block_n - 8, 4} if kernel is Kernel.WGMMA else {c.block_n - 1, 1}
            assert {d.shape.n % c.block_n for d in mine} >= {*ends, 0, 8, c.block_n // 2}
            tails = {0, c.block_k // 2} | ({1, c.block_k - 1} if kernel is Kernel.TRITON else {16, c.block_k - 16})
            assert {d.shape.k % c.block_k for d in mine} >= tails
            assert {d.padding == 0 for d in mine} == {True, False}
