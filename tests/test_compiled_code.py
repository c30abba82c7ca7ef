"""verify/properties/compiled_code: each check passes on the kernels, and fails when its instruction is gone or weak."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import int8kit
from int8kit import gpus
from int8kit.spec import Kernel
from int8kit.verify import executors, process_pool
from int8kit.verify.process_pool import Call, Ending
from int8kit.verify.properties import compiled_code, proof
from int8kit.verify.properties.compiled_code import inspection, launched, offsets, variants
from int8kit.verify.properties.compiled_code.launched import Code
from int8kit.verify.properties.compiled_code.ptx import parse
from int8kit.verify.properties.compiled_code.values import Values
from int8kit.verify.properties.compiled_code.variants import GemmVariant, RowVariant

GEMMS = variants.gemms(86)
WGMMA = next(v for v in GEMMS if v.config.stream_k and v.config.kernel is Kernel.WGMMA)
COOPERATIVE = next(v for v in GEMMS if v.config.block_m == 256 and v.operation == "int32")
MMA_SYNC = next(v for v in GEMMS if v.config.stream_k and v.config.block_m == 32)
TRITON = next(v for v in GEMMS if v.config.kernel is Kernel.TRITON and v.operation == "swiglu")
ROW = RowVariant(86, "rms_norm_quantize", 600)
ONE_CHUNK = replace(WGMMA, operation="swiglu")  # of 64 columns, whose outputs fill one staging buffer
COMPILED = (WGMMA, COOPERATIVE, MMA_SYNC, TRITON, ROW, ONE_CHUNK)


PACKAGE = str(Path(int8kit.__file__).parent)


def compile_all(wanted, report):
    """The code of each variant and the finding of `inspect`, in a child process in which Triton compiles."""
    found = [launched.code(variant.arch, variant.launch) for variant in wanted]
    return found, inspection.inspect((PACKAGE, (TRITON, ROW)), report)


@pytest.fixture(scope="module")
def child():
    """The ending of a child process that compiles the variants above."""
    [ending] = process_pool.run_all([Call(compile_all, COMPILED)], open_place=compiled_code.compiling)
    assert ending.kind == "done", ending
    return ending


@pytest.fixture(scope="module")
def codes(child):
    """The code of the variants above, by variant."""
    return dict(zip(COMPILED, child.result[0], strict=True))


def fault(name, variant, code):
    """How the check called `name` finds `code` faulty, or None."""
    return inspection.checks()[name](code, variant.config)


def edit(pattern, new, *, count=1):
    """A change of the PTX: each match of the pattern becomes `new`; of several, the first `count`."""
    return lambda ptx: re.sub(pattern, new, ptx, count=count)


def each(pattern, new):
    """The changes of the single matches of a pattern, one at a time."""

    def texts(ptx):
        for match in re.finditer(pattern, ptx):
            yield ptx[: match.start()] + match.expand(new) + ptx[match.end() :]

    return texts


pytestmark = [pytest.mark.process, pytest.mark.xdist_group("compiled-code")]
GROUP_BARRIER = r"\n\tbar\.sync \t\d(, 128)?;"


@pytest.mark.parametrize("variant", COMPILED[:-1], ids=str)
def test_the_kernels_pass(codes, variant):
    assert inspection.failure(codes[variant], variant.config) is None
    assert codes[variant].early_start == (getattr(variant.config, "kernel", None) is Kernel.WGMMA)


def test_a_product_of_one_chunk_passes(codes):
    assert fault("staging buffers", ONE_CHUNK, codes[ONE_CHUNK]) is None


DELETED = [
    ("early start", (WGMMA, COOPERATIVE), edit(r"griddepcontrol\.wait;", "")),
    ("early start", (WGMMA, COOPERATIVE), edit(r"griddepcontrol\.wait;", "@%p44 griddepcontrol.wait;")),
    # only the producer waits
    ("early start", (WGMMA, COOPERATIVE), lambda ptx: re.sub(
        r"(\n\t@%p\d+ cp\.async\.bulk\.tensor\.2d\.shared)", r"\n\tgriddepcontrol.wait;\1",
        ptx.replace("griddepcontrol.wait;", ""), count=1)),
    ("stream-K counters", (WGMMA, MMA_SYNC), edit(r"\.acq_rel\.add", ".relaxed.add")),
    ("stream-K counters", (WGMMA, MMA_SYNC), edit(r"\.acq_rel\.add", ".release.add")),
    ("stream-K counters", (WGMMA, MMA_SYNC), edit(r"global\.gpu\.acq_rel", "global.cta.acq_rel")),
    ("stream-K counters", (WGMMA, MMA_SYNC), edit(r"ld\.global\.cg\.", "ld.global.")),
    ("stream-K counters", (WGMMA, MMA_SYNC), edit(r"ld\.global\.cg\.", "ld.global.nc.")),
    ("stream-K counters", (WGMMA, MMA_SYNC), edit(r"\n\t@%p\d+ atom\.[^\n]*", "", count=0)),
    ("stream-K counters", (WGMMA, MMA_SYNC), edit(GROUP_BARRIER + r"((?:\n[^\n]*){,12}?\n\t@%p\d+ atom\.)", r"\2")),
    ("stream-K counters", (WGMMA, MMA_SYNC), edit(r"(atom\.(?:[^\n]*\n){,12}?[^\n]*)" + GROUP_BARRIER, r"\1")),
    ("mbarrier setup", (WGMMA, COOPERATIVE), edit(r"\n\tbarrier\.sync \t1;", "", count=0)),
    ("ring", (WGMMA, COOPERATIVE), edit(r"mbarrier\.try_wait[^\n]*", "", count=0)),
    ("staging buffers", (WGMMA, COOPERATIVE), edit(r"bulk\.wait_group\.read \t0;", "bulk.wait_group.read \t1;")),
    ("output masks", (MMA_SYNC, TRITON), edit(r"@%p\d+ st\.global", "st.global")),
    ("rounding", (WGMMA, MMA_SYNC, TRITON, ROW), edit(r"add\.rn\.f32", "add.f32")),
    ("rounding", (WGMMA, MMA_SYNC, TRITON, ROW), edit(r"mul\.rn\.f32", "mul.rn.ftz.f32")),
    ("rounding", (WGMMA, MMA_SYNC, TRITON), edit(r"cvt\.rn\.f32\.s32", "cvt.rz.f32.s32")),
    ("rounding", (WGMMA, MMA_SYNC, TRITON), edit(r"cvt\.rn\.(b?f16x2)\.f32", r"cvt.rz.\1.f32")),
    ("rounding", (ROW,), edit(r"div\.rn\.f32", "div.full.f32")),
    ("rounding", (TRITON, MMA_SYNC, ROW), edit(r"max\.NaN\.f32", "max.f32")),
    ("rounding", (ROW,), edit(r"sqrt\.rn\.f32", "sqrt.approx.f32")),
    ("rounding", (MMA_SYNC, ROW), edit(r"(fma|div)\.rn\.f32", "rcp.approx.ftz.f32")),
    ("operations", (WGMMA, MMA_SYNC), edit(r"add\.rn\.f32 ([^;]*);", r"fma.rn.f32 \1, %r1;")),
    ("operations", (WGMMA, MMA_SYNC, TRITON), edit(r"mul\.rn\.f32 ", "add.rn.f32 ")),
    ("operations", (MMA_SYNC, TRITON, ROW), edit(r"\n\tfma\.rn\.f32 [^;]*;", "")),
    ("operations", (MMA_SYNC, TRITON), edit(r"rcp\.approx\.ftz\.f32 r, [^;]*;", "")),
    ("operations", (WGMMA, MMA_SYNC), edit(r"\n\tadd\.rn\.f32 [^;]*;", "", count=0)),
    ("tensor cores", (WGMMA, COOPERATIVE, MMA_SYNC, TRITON), edit(r"\.s32\.s8\.s8", ".f32.f16.f16")),
    ("tensor cores", (WGMMA, COOPERATIVE, MMA_SYNC, TRITON), edit(r"\n\t(wg)?mma\.(mma_as|s)ync[^\n]*", "", count=0)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "variant", "change"),
    [
        pytest.param(name, variant, change, id=f"{i} {name}, {variant}")
        for i, (name, of, change) in enumerate(DELETED) for variant in of
    ],
)  # fmt: skip
def test_a_deleted_or_weak_instruction_is_found(codes, name, variant, change):
    code = codes[variant]
    changed = change(code.ptx)
    assert changed != code.ptx
    assert fault(name, variant, code) is None
    assert fault(name, variant, replace(code, ptx=changed))


EACH = [
    ("staging buffers", (WGMMA, COOPERATIVE), r"fence\.proxy\.async[^\n]*", "", 4),
    (
        "staging buffers",
        (WGMMA, COOPERATIVE),
        r"(fence\.proxy\.async(?:[^\n]*\n){,6}?[^\n]*)" + GROUP_BARRIER,
        r"\1",
        4,
    ),
    ("staging buffers", (WGMMA, COOPERATIVE), r"bulk\.wait_group\.read \t0;", "bulk.wait_group.read \t1;", 2),
    ("staging buffers", (WGMMA, COOPERATIVE), r"bulk\.wait_group\.read \t1;", "bulk.wait_group.read \t2;", 4),
    ("slots", (MMA_SYNC,), r"wait_group \t1;", "wait_group \t2;", 8),
    ("slots", (MMA_SYNC,), r"(wait_group \t1;)" + GROUP_BARRIER, r"\1", 8),
    ("wgmma", (WGMMA, COOPERATIVE), r"wgmma\.wait_group\.sync\.aligned 0;", "wgmma.wait_group.sync.aligned 1;", 2),
    ("wgmma", (WGMMA, COOPERATIVE), r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 2;", 2),
    ("wgmma", (WGMMA, COOPERATIVE), r"wgmma\.fence[^\n]*", "", 2),
    ("wgmma", (WGMMA, COOPERATIVE), r"wgmma\.commit_group[^\n]*", "", 2),
    ("stream-K counters", (WGMMA, MMA_SYNC), r"global\.gpu\.acq_rel", "global.gpu.relaxed", 1),
]


@pytest.mark.parametrize(
    ("name", "variant", "pattern", "new", "least"),
    [
        pytest.param(name, variant, *rest, id=f"{i} {name}, {variant}")
        for i, (name, of, *rest) in enumerate(EACH) for variant in of
    ],
)  # fmt: skip
def test_every_one_of_these_instructions_is_needed(codes, name, variant, pattern, new, least):
    code = codes[variant]
    found = [fault(name, variant, replace(code, ptx=ptx)) for ptx in each(pattern, new)(code.ptx)]
    assert len(found) >= least
    assert all(found), found


def test_a_slot_released_before_the_last_product_is_found(codes):
    code = codes[COOPERATIVE]
    wait = r"(\n\twgmma\.wait_group\.sync\.aligned 0;(?:[^\n]*\n)*?)(\t@%p\d+ mbarrier\.arrive\.[^\n]*)"
    changed = re.sub(wait, r"\n\2\1", code.ptx)
    assert changed != code.ptx
    assert "releases the last slot" in fault("wgmma", COOPERATIVE, replace(code, ptx=changed))


WIDE = r"(mul|mad)\.(?:wide\.s32|lo\.s64) \t(%rd\d+), (%rd?\d+), (%rd?\d+)((?:, %rd\d+)?);"


def in_32_bits(match):
    """The same product of two registers in 32 bits, and its sum with a third one, if any, in 64 bits."""
    _, to, *factors, term = match.groups()
    short = [f"cvt.u32.u64 \t%r9000{i}, {one};\n\t" if "d" in one else f"mov.b32 \t%r9000{i}, {one};\n\t"
             for i, one in enumerate(factors)]  # fmt: skip
    sum_of = f"\n\tadd.s64 \t{to}, {to}{term};" if term else ""
    return f"{''.join(short)}mul.lo.s32 \t%r90002, %r90000, %r90001;\n\tcvt.s64.s32 \t{to}, %r90002;{sum_of}"


@pytest.mark.parametrize("variant", [MMA_SYNC, TRITON, ROW], ids=str)
def test_every_product_with_a_stride_needs_64_bits(codes, variant):
    code = codes[variant]
    matches = list(re.finditer(WIDE, code.ptx))
    found = [
        fault("offsets", variant, replace(code, ptx=code.ptx[: one.start()] + in_32_bits(one) + code.ptx[one.end() :]))
        for one in matches
    ]
    assert len(found) >= 2
    assert all(why and "more than 32 bits" in why for why in found), found


def test_the_offsets_of_every_matrix_are_followed(codes):
    """Of the kernels in which TMA does not compute the addresses."""
    matrices = {MMA_SYNC: {"x_ptr", "w_ptr", "out_ptr"}, TRITON: {"x_ptr", "w_ptr", "out_ptr"},
                ROW: {"x_ptr", "mod_ptr", "q_ptr"}}  # fmt: skip
    for variant, wanted in matrices.items():
        assert wanted <= offsets.followed(codes[variant], variant.config), variant
        assert fault("offsets", variant, codes[variant]) is None


def test_a_staging_buffer_of_both_consumers_is_found(codes):
    """The addresses of one consumer's buffers become the other consumer's."""
    code = codes[WGMMA]
    first, *_, last = sorted(
        {int(n) for n in re.findall(r"add\.s32 \t%r\d+, %r\d+, (\d+);", code.ptx) if 49152 <= int(n) < 65536}
    )
    size = 64 * 64
    changed = re.sub(
        r"(add\.s32 \t%r\d+, %r\d+, )(\d+);",
        lambda m: m[1] + str(int(m[2]) - 2 * size if first + 2 * size <= int(m[2]) <= last else int(m[2])) + ";",
        code.ptx,
    )
    assert changed != code.ptx
    assert "another group of warps" in fault("staging buffers", WGMMA, replace(code, ptx=changed))


def test_contraction_by_the_launch_is_found(codes):
    assert "enable_fp_fusion" in fault("rounding", ROW, replace(codes[ROW], contraction=True))


def test_a_failure_names_check_kernel_variant_and_configuration(codes, monkeypatch):
    broken = replace(codes[MMA_SYNC], ptx=codes[MMA_SYNC].ptx.replace(".acq_rel", ".relaxed"))
    monkeypatch.setattr(launched, "code", lambda arch, launch: broken)
    seen = []
    failure = inspection.inspect((PACKAGE, (MMA_SYNC,)), seen.append)
    assert seen == [str(MMA_SYNC)]
    assert failure.startswith(f"mma_sync kernel, {MMA_SYNC.config}, swiglu, bf16, bf16 bias, K = 4096, sm_86 code: "
                              "stream-K counters: @%p")  # fmt: skip
    with pytest.raises(AssertionError, match="expected the package /elsewhere"):
        inspection.inspect(("/elsewhere", ()), seen.append)


def test_a_launch_that_does_not_compile_is_a_failure(monkeypatch):
    def raises(arch, launch):
        raise ValueError("planted\nmore")

    monkeypatch.setattr(launched, "code", raises)
    assert inspection.inspect((PACKAGE, (ROW,)), lambda text: None) == f"{ROW}: ValueError: planted"


def test_the_child_inspects_every_variant(child):
    assert child.result[1] is None
    assert child.reports == (str(TRITON), str(ROW))


def test_the_proof_gives_the_first_failure_of_its_children(monkeypatch):
    """The variants are shared out, and a child that ends early fails the kernel that it had announced."""
    endings = {
        2: [Ending("done", None, reports=("a", "b")), Ending("done", None, reports=("c",))],
        1: [Ending("done", "c: slots: late", reports=("a", "b", "c"))],
    }
    monkeypatch.setattr(process_pool, "run_all", lambda calls, **more: endings[len(calls)])
    monkeypatch.setattr(compiled_code, "MAX_PROCESSES", 1)
    wanted = variants.rows(86)[:3]
    assert compiled_code.inspect(wanted, print) == proof.Outcome(3, "c: slots: late")
    endings[1] = [Ending("signal", detail="SIGABRT", reports=("a",))]
    assert compiled_code.inspect(wanted, print).failure == "a: the process that compiles ended: signal SIGABRT"
    endings[1] = [Ending("exited", detail="no module")]
    assert "before the first kernel: the process" in compiled_code.inspect(wanted, print).failure
    monkeypatch.setattr(compiled_code, "MAX_PROCESSES", 2)
    monkeypatch.setattr(compiled_code, "PER_PROCESS", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    assert compiled_code.inspect(wanted, print) == proof.Outcome(3)


def test_the_variants_follow_the_gpu_that_was_asked_for():
    asked = executors.available(gpus.get("rtx4090"))[-1]
    assert asked.asked == 89
    for arch in (86, 120):
        gemms = variants.gemms(arch)
        assert {v.arch for v in gemms if v.config.kernel is not Kernel.WGMMA} == {arch}
        assert {v.arch for v in gemms if v.config.kernel is Kernel.WGMMA} == {90}
        every = {(v.config.kernel, v.config.stream_k > 0, v.operation) for v in gemms}
        wanted = {(k, s, o) for k in Kernel for s in (False, True) for o in ("plain", "int32", "swiglu")}
        assert every == {one for one in wanted if one[0] is not Kernel.TRITON or not one[1]}
    assert {v.kernel for v in variants.rows(86)} == {
        "quantize", "rms_norm_quantize", "residual_norm_quantize", "swiglu_quantize", "qk_norm_rope"
    }  # fmt: skip


@pytest.mark.parametrize("arch", [86, 90])
def test_shipped_configurations_are_compiled_once(arch):
    found = variants.served(arch)
    assert len(set(found)) == len(found) > 5
    assert {v.arch for v in found} == {arch}
    assert {v.config.kernel for v in found} == {Kernel.TRITON, Kernel.WGMMA if arch == 90 else Kernel.MMA_SYNC}
    assert {v.config.group_m for v in found} == {8}


HEAD = ".visible .entry k(\n\t.param .u64 k_param_0\n)\n{\n\tmov.u32 %r1, %tid.x;\n\tld.param.b64 %rd1, [k_param_0];\n"
COMPARED = "\tsetp.lt.s32 %p1, {}, 4;\n\t@%p1 bra $A;\n\tbra.uni $B;\n"
WAIT, READ = "\tgriddepcontrol.wait;\n", "\tld.global.b32 %r9, [%rd1];\n"


def early(body):
    """The finding of "early start" about a kernel of this body."""
    code = Code("k", HEAD + body + "\tret;\n}\n", True, False, 90, {}, {})
    return inspection.checks()["early start"](code, None)


def test_the_wait_is_needed_on_every_path():
    of_thread, of_data = COMPARED.format("%r1"), "\tld.param.b32 %r2, [k_param_0];\n" + COMPARED.format("%r2")
    assert early(WAIT + READ) is None
    assert early(READ + WAIT)
    assert early("\t@%p1 griddepcontrol.wait;\n" + READ)
    for branches in (of_thread, of_data):
        assert early(branches + "$A:\n" + WAIT + "\tbra.uni $C;\n$B:\n" + WAIT + "$C:\n" + READ) is None
        assert early(branches + "$A:\n" + WAIT + "\tbra.uni $C;\n$B:\n$C:\n" + READ)
    # a barrier of all threads passes on the wait of some, if some wait in every run
    joined = "$A:\n" + WAIT + "\tbarrier.sync 1;\n\tbra.uni $C;\n$B:\n\tbarrier.sync 1;\n$C:\n" + READ
    assert early(of_thread + joined) is None
    assert early(of_data + joined)
    assert early(of_thread + joined.replace("sync 1", "sync 1, 128"))
    assert early(of_thread + "$A:\n\tbarrier.sync 1;\n" + WAIT + "\tbra.uni $C;\n$B:\n\tbarrier.sync 1;\n$C:\n" + READ)


def test_a_program_has_scopes_tables_and_lines():
    body = (
        "\t.loc\t1 7 3  // a.py:7:3 @[ b.py:9:1 ]\n"
        "\t{ .reg .pred c;\nagain:\n\ttest.one c, %r1;\n\t@!c bra.uni again;\n\t}\n"
        "\t{\nagain:\n\ttest.two %r1;\n\t@%p1 bra.uni again;\n\t}\n"
        "$T: .branchtargets\n\t$A,\n\t$B;\n\tbrx.idx %r1, $T;\n"
        "$A:\n\tst.shared.b32 [%r3+8], {%r4, %r5};\n$B:\n"
    )
    program = parse(HEAD + body + "\tret;\n}\n")
    names = [one.op for one in program.instructions]
    assert names[2:] == ["test.one", "bra.uni", "test.two", "bra.uni", "brx.idx", "st.shared.b32", "ret"]
    assert program.following == ((1,), (2,), (3,), (2, 4), (5,), (4, 6), (7, 8), (8,), ())
    assert program.instructions[2].lines == (("a.py", 7), ("b.py", 9))
    assert "%r4" not in program.definitions


def test_values_of_thread_0():
    body = (
        "\tshl.b32 %r2, %r1, 4;\n\tor.b32 %r3, %r2, 64;\n\tmov.b32 %r4, global_smem;\n\tadd.s32 %r5, %r4, %r3;\n"
        "\tbfe.u32 %r6, %r5, 4, 3;\n\tsetp.eq.b32 %p1, %r1, 0;\n\tselp.b32 %r7, 144, 0, %p1;\n"
        "\tmad.lo.s32 %r8, %r6, 3, 1;\n"
        "\tadd.s32 %r10, %r9, 1;\n\tmov.b32 %r11, 0;\n\tadd.s32 %r11, %r11, 1;\n"
    )
    values = Values(parse(HEAD + body + "\tret;\n}\n"))
    assert [values.of(f"%r{i}") for i in range(1, 9)] == [0, 0, 64, 0, 64, 4, 144, 13]
    assert values.address("{%r1}, [%r5+8192], 4") == 64 + 8192
    assert values.of("%r10") is values.of("%r11") is None
    assert Values(parse(HEAD + body + "\tret;\n}\n"), {"%r9": 4}).of("%r10") == 5
    assert Values(parse(HEAD + body + "\tret;\n}\n"), in_first_round=True).of("%r11") == 0
    contrary = "\tsetp.eq.b32 %p1, %r1, 0;\n\tnot.pred %p2, %p1;\n\tselp.b32 %r2, 3, 4, %p2;\n"
    assert Values(parse(HEAD + contrary + "\tret;\n}\n")).of("%r2") == 4


def test_dtypes_of_variants_have_names():
    assert "fp16, fp32 bias" in str(GemmVariant(86, TRITON.config, "plain", torch.float16, torch.float32))
