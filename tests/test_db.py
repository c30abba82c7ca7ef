import json
import multiprocessing
from dataclasses import replace

import pytest

from int8kit import files, gpus
from int8kit.database import store
from int8kit.database.database import Database
from int8kit.database.problems import problems
from int8kit.database.schema import Entry, Resources, stamp
from int8kit.errors import FileError, Int8kitError
from int8kit.kernels import gemm
from int8kit.spec import GemmShape, Kernel, Operation, Source, TileConfig, default_config, why_illegal
from int8kit.toolchain import ANY_TOOLCHAIN, Toolchain, generation

GPU = gpus.get("rtx3090")
A, B, C = TileConfig(64, 64, 64, 4, 3), TileConfig(128, 128, 64, 8, 3), TileConfig(128, 64, 64, 4, 4)


def entry(m=4096, n=4608, k=4608, config=A, source=Source.MODELLED, triton="3.7.1", kernel="k1", **more):
    resources = Resources(registers=100, spill_bytes=0, shared_bytes=32768)
    return Entry(
        m=m, n=n, k=k, config=config, source=source, triton=triton, kernel=kernel, resources=resources, tried=9, **more
    )


def test_levels():
    base = Database(GPU).merged([entry(m=1000), entry(m=4000, config=B), entry(n=12288, config=C)])
    assert base.resolve(GemmShape(1000, 4608, 4608), ANY_TOOLCHAIN).level == "exact"
    near = base.resolve(GemmShape(3900, 4608, 4608), ANY_TOOLCHAIN)
    assert (near.level, near.config) == ("nearest-m", B)
    assert base.resolve(GemmShape(1100, 4608, 4608), ANY_TOOLCHAIN).config == A
    other = base.resolve(GemmShape(4096, 12000, 4608), ANY_TOOLCHAIN)
    assert (other.level, other.config) == ("nearest", C)
    for far in (GemmShape(17000, 4608, 4608), GemmShape(249, 4608, 4608), GemmShape(4096, 1000, 4608)):
        assert base.resolve(far, ANY_TOOLCHAIN).config == default_config(far)
        assert base.resolve(far, ANY_TOOLCHAIN).level == "default"
    assert Database(GPU).resolve(GemmShape(3, 3, 3), ANY_TOOLCHAIN).level == "default"


def test_another_toolchain_serves_with_a_remark():
    base = Database(GPU).merged([entry(config=A, triton="3.6.0"), entry(config=B, triton="3.9.0", kernel="k0")])
    shape = GemmShape(4096, 4608, 4608)
    assert base.resolve(shape, Toolchain("3.6.1", {})).config == A
    assert base.resolve(shape, Toolchain("3.9.2", {})).config == B
    k1 = {Kernel.TRITON: "k1"}
    assert base.resolve(shape, Toolchain("3.7.1", k1)).why == "modelled for 4096x4608x4608"
    old = Database(GPU).merged([entry(triton="3.6.0")]).resolve(shape, Toolchain("3.8.0", k1))
    assert old.config == A
    assert old.why == "modelled for 4096x4608x4608; tuned with Triton 3.6.0, running 3.8.0"
    assert "another kernel source" in base.resolve(shape, Toolchain("3.9.0", k1)).why
    other = Toolchain("3.9.0", {Kernel.MMA_SYNC: "k1"})  # of another kernel than the entry's
    assert "another kernel source" not in base.resolve(shape, other).why


def test_an_illegal_entry_is_never_chosen():
    big = TileConfig(128, 256, 128, 8, 4)
    assert why_illegal(big, arch=86, shared_memory=GPU.shared_memory)
    base = Database(GPU).merged([entry(config=big)])
    assert base.resolve(GemmShape(4096, 4608, 4608), ANY_TOOLCHAIN).level == "default"


def test_merge_keeps_the_stronger_source():
    base = Database(GPU).merged([entry(config=A, source=Source.PROXY)])
    assert base.merged([entry(config=B, source=Source.MODELLED)]).entries[0].config == A
    assert base.merged([entry(config=B, source=Source.MEASURED)]).entries[0].config == B
    assert base.merged([entry(config=B, source=Source.PROXY)]).entries[0].config == B
    stale = base.merged([entry(config=B, source=Source.MODELLED, kernel="k2")])
    assert stale.entries[0].config == B
    hopper = replace(B, kernel=Kernel.WGMMA)  # another kernel's source says nothing of this one's
    assert base.merged([entry(config=hopper, source=Source.MODELLED, kernel="k2")]).entries[0].config == A
    assert base.merged([entry(config=B, triton="3.6.0")]).entries[0].config == A  # 3.6 and 3.7 make the same code
    assert len(base.merged([entry(triton="3.9.0")]).entries) == 2


def test_generations_of_triton():
    assert [generation(v) for v in ("3.6.0", "3.7.1", "3.8.0", "3.9.0+git1", "3.12.0")] == [
        "3.6", "3.6", "3.8", "3.8", "3.8",
    ]  # fmt: skip


def stamped(base, executor="native", **change):
    """`base` with a stamp of its only entry."""
    (one,) = base.entries
    about = {"device": "RTX", "arch": 86, "kernel": one.kernel, "triton": one.triton, **change}
    numerics = about.pop("numerics", 1)
    new = stamp(executor, entry=one, **about).model_copy(update={"numerics": numerics})
    return base.stamped({one.key: [new]})


def test_stamps_follow_the_kernel_and_the_configuration():
    base = Database(GPU).merged([entry()])
    native = stamped(base)
    assert len(native.entries[0].verified) == 1
    assert stamped(stamped(base, "interpreter", arch=None)) == native
    assert stamped(native, "interpreter", arch=None) == native
    assert len(stamped(native, "interpreter", arch=None, triton="3.6.0").entries[0].verified) == 2
    both = stamped(native, "cross_arch", device="H200")
    assert {s.executor for s in both.entries[0].verified} == {"native", "cross_arch"}
    assert len(stamped(native, triton="3.6.0").entries[0].verified) == 2  # each Triton is proven by itself
    newer = stamped(native, "interpreter", arch=None, kernel="k2")
    assert [s.kernel for s in newer.entries[0].verified] == ["k2"]
    assert native.merged([entry()]).entries[0].verified == native.entries[0].verified
    assert native.merged([entry(config=B)]).entries[0].verified is None


def test_a_stamp_proves_one_configuration_kernel_triton_and_numerics():
    here = Toolchain("3.7.1", {Kernel.TRITON: "k1"})
    base = stamped(Database(GPU).merged([entry()]))
    (proven,) = base.entries
    assert len(proven.proofs(here, 86)) == 1
    for other in (
        Toolchain("3.7.0", here.kernels), Toolchain("3.6.0", here.kernels), Toolchain("3.7.1+git1", here.kernels),
        Toolchain("3.7.1", {Kernel.TRITON: "k2"}), Toolchain("3.7.1", here.kernels, numerics=2),
    ):  # fmt: skip
        assert proven.proofs(other, 86) == []
    for edit in ({"config": B}, {"m": 4097}, {"n": 4609}, {"operation": Operation.SWIGLU}):
        assert proven.model_copy(update=edit).proofs(here, 86) == []
    for change in ({"kernel": "k2"}, {"triton": "3.6.0"}, {"numerics": 2}):
        assert stamped(Database(GPU).merged([entry()]), **change).entries[0].proofs(here, 86) == []
    assert proven.proofs(here, 89) == []
    (only,) = stamped(Database(GPU).merged([entry()]), "interpreter", arch=None).entries
    assert only.proofs(here, 86) == []  # nothing was compiled
    assert len(only.stamps(here)) == 1


def test_what_serves_shapes_without_an_entry():
    base = Database(GPU).merged([entry(m=1000)])
    far = GemmShape(9, 64, 64)
    more = base.unlisted([GemmShape(1000, 4608, 4608), GemmShape(1500, 4608, 4608), far], ANY_TOOLCHAIN)
    assert [(choice.shape.m, choice.config) for choice in more] == [(9, default_config(far)), (1500, A)]
    assert base.unlisted([], ANY_TOOLCHAIN) == []


def test_of_two_generations_this_ones_entries_serve():
    here, there = entry(triton="3.7.1"), entry(triton="3.9.0")
    other = entry(m=100, triton="3.9.0")
    base = Database(GPU, (here, there, other))
    assert base.serving(Toolchain("3.6.0", {})) == [here, other]
    assert base.serving(Toolchain("3.8.0", {})) == [there, other]
    assert base.resolve(here.shape, Toolchain("3.8.0", {})).why.startswith("modelled")


def test_file_is_one_line_an_entry_and_round_trips(tmp_path):
    path = tmp_path / "rtx3090.json"
    written = store.update(path, GPU, [entry(m=m, time_us=1.5) for m in (3, 1, 2)])
    assert store.load(path, "rtx3090") == written
    lines = [line for line in path.read_text().splitlines() if '"config"' in line]
    assert [json.loads(line.rstrip(","))["m"] for line in lines] == [1, 2, 3]
    assert str(tmp_path) not in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: d.update(numerics=2), "numerics 2; expected 1"),
        (lambda d: d["entries"][0].update(host="pc"), "entries.0.host: Extra inputs"),
        (lambda d: d["entries"][0].pop("config"), "entries.0.config: Field required"),
        (lambda d: d["entries"][0].update(k=200000), "K = 200000"),
        (lambda d: d["entries"][0].update(m=0), "entries.0.m: Input should be greater"),
        (lambda d: d["entries"][0].update(triton="main"), "entries.0.triton: .*expected a version such as 3.7.1"),
        (
            lambda d: d["entries"][0]["config"].update(block_m=48),
            "4096x4608x4608: block_m = 48: legal for the triton kernel are",
        ),
        (lambda d: d["entries"][0].update(time_us=-4), "entries.0.time_us: Input should be greater"),
        (lambda d: d["entries"][0].update(source="measured"), "4096x4608x4608: measured without time_us"),
        (lambda d: d["entries"].append(d["entries"][0]), "gemm 4096x4608x4608 stands twice for Triton 3.6"),
        (lambda d: d["gpu"].update(sms=0), "sms: Input should be greater"),
        (lambda d: d.update(host="pc"), "Document.host: Extra inputs"),
        (lambda d: d.update(entries=3), "is damaged"),
        (lambda d: d.pop("gpu"), "is damaged"),
        (lambda d: d["gpu"].update(alias="rtx4090"), "is for the GPU 'rtx4090', not for 'rtx3090'"),
        (lambda d: d.update(format="int8kit.shapes/1"), "has the format 'int8kit.shapes/1'"),
    ],
)
def test_damage_is_one_clear_error(tmp_path, damage, reason):
    path = tmp_path / "a.json"
    store.update(path, GPU, [entry()])
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(Int8kitError, match=reason) as caught:
        store.load(path, "rtx3090")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2
    before = path.read_text()
    with pytest.raises(Int8kitError, match=reason):
        store.update(path, GPU, [entry()])
    assert path.read_text() == before


def test_force_replaces_a_file_that_is_not_ours(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("mine")
    with pytest.raises(FileError):
        store.update(path, GPU, [entry()])
    store.update(path, GPU, [entry()], force=True)
    store.update(path, GPU, [entry(m=7)], force=True)
    assert len(store.load(path).entries) == 2


def _write(path, first):
    for m in range(first, first + 20):
        store.update(path, GPU, [entry(m=m)])


@pytest.mark.process
def test_two_writers_lose_nothing(tmp_path):
    path = tmp_path / "a.json"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path, first)) for first in (1, 101)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [e.m for e in store.load(path).entries] == [*range(1, 21), *range(101, 121)]


def test_find(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert store.find("rtx3090") == files.shipped("tuning_db") / "rtx3090.json"
    assert store.find("nosuchcard") is None
    store.update(tmp_path / "tuning_db" / "rtx3090.json", GPU, [entry()])
    assert store.find("rtx3090").resolve() == tmp_path / "tuning_db" / "rtx3090.json"
    assert store.find("rtx3090", tmp_path / "x.json") == tmp_path / "x.json"


def test_a_card_without_a_record_keeps_its_identity(tmp_path):
    mine = replace(GPU, alias="mycard", name="My Card", sms=99)
    store.update(tmp_path / "a.json", mine, [entry()])
    loaded = store.load(tmp_path / "a.json").gpu
    assert (loaded.alias, loaded.sms, loaded.arch) == ("mycard", 99, 86)


@pytest.mark.parametrize("path", sorted(files.shipped("tuning_db").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_databases_are_sound(path):
    """Every entry is legal, without spills, of the present kernels, and proven under both tested versions of Triton."""
    base, kernels = store.load(path, path.stem), gemm.toolchain().kernels
    assert path.read_text() == base.dumps()
    assert base.gpu == gpus.get(path.stem)
    for triton in ("3.6.0", "3.7.1"):
        found = problems(base, Toolchain(triton, kernels))
        if base.gpu.arch > 90:  # no GPU that was at hand executes its code
            assert len(found) == 1
            assert f"not proven under Triton {triton} as sm_{base.gpu.arch} code" in found[0]
            assert "only as sm_90 code" in found[0]
        else:
            assert found == []
    for e in base.entries:
        assert e.resources.spill_bytes == 0
        assert not e.is_stale(Toolchain("", kernels)), "tune again: the kernel is another since"
    assert {e.m for e in base.entries} >= {4096, 4296, 6144}


@pytest.mark.parametrize("alias", ["rtx3090", "h200"])
def test_what_serves_for_another_m_is_never_slower_than_the_default(alias):
    """On what was timed: each entry left out in turn, the near one's kernel among those timed at its shape."""
    base = store.load(files.shipped("tuning_db") / f"{alias}.json")
    timed = [e for e in base.entries if e.time_us and e.default_us]
    ratios = []
    for e in timed:
        others = replace(base, entries=tuple(o for o in base.entries if o.shape != e.shape))
        near = {level: one for level, _, one in others.levels(e.shape, ANY_TOOLCHAIN)}["nearest-m"]
        known = {r.config: r.time_us for r in (e, *(e.runners_up or ()))}
        if near is not None:  # a band of another width is the same kernel: the slowest of those timed
            same = [us for config, us in known.items() if replace(config, group_m=near.config.group_m) == near.config]
            ratios += [known.get(near.config, max(same)) / e.default_us] if same else []
    assert len(ratios) > 0.5 * len(timed)
    assert max(ratios) <= 1.0
