"""`int8kit db`, and the user's own database over the shipped one."""

import contextlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from int8kit import files, gpus, shapes_file
from int8kit.cli import main
from int8kit.database import store
from int8kit.database.database import Database
from int8kit.database.schema import FORMAT, Entry, Resources, json_schema, stamp
from int8kit.errors import FileError
from int8kit.kernels import gemm
from int8kit.spec import GemmShape, Kernel, Operation, Source, TileConfig
from int8kit.toolchain import ANY_TOOLCHAIN, generation
from int8kit.tune import workers

SHIPPED = files.shipped("tuning_db") / "rtx3090.json"
RTX3090 = gpus.get("rtx3090")
TILE = TileConfig(64, 128, 128, 4, 3, kernel=Kernel.MMA_SYNC)
V1 = Path(__file__).parent / "data" / "tuning_v1"
SHAPE = GemmShape(4296, 12288, 4608)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty folder to work in, and an empty home for the user's own databases."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store, "user_path", lambda alias: tmp_path / "home" / f"{alias}.json")
    return tmp_path


def entry(kernel=None, **over):
    resources = Resources(registers=128, spill_bytes=0, shared_bytes=49152)
    values = {"source": Source.PROXY, "triton": "3.6.0", "tried": 1, "time_us": 9.0, "default_us": 10.0, **over}
    kernel = kernel or gemm.kernel_hash(TILE.kernel)
    return Entry(m=SHAPE.m, n=SHAPE.n, k=SHAPE.k, config=TILE, resources=resources, kernel=kernel, **values)


def call(capfd, *args, status=0):
    with pytest.raises(SystemExit) as ended:
        main.main(list(map(str, args)))
    out, err = capfd.readouterr()
    assert ended.value.code == status, out + err
    return out, err


def test_the_users_entry_lies_over_the_shipped_one():
    shipped, paths = store.merged_view(RTX3090, ANY_TOOLCHAIN)
    assert paths == (SHIPPED,)
    store.update(store.user_path("rtx3090"), RTX3090, [entry()])
    both, paths = store.merged_view(RTX3090, ANY_TOOLCHAIN)
    assert paths == (SHIPPED, store.user_path("rtx3090"))
    assert both.resolve(SHAPE, ANY_TOOLCHAIN).config == TILE != shipped.resolve(SHAPE, ANY_TOOLCHAIN).config
    assert len(both.entries) == len(shipped.entries)
    assert store.merged_view(RTX3090, ANY_TOOLCHAIN, SHIPPED) == (shipped, (SHIPPED,))


def test_show_without_a_database(capfd):
    out, _ = call(capfd, "db", "show", "--gpu", "h100")
    assert out == "no database for h100; make one with `int8kit tune --gpu h100`\n"


@pytest.mark.parametrize("name", ["arch", "sms", "shared_memory"])
def test_the_users_file_for_another_gpu_of_the_name_is_refused(name):
    """It would change the lookup of the known GPU: its entries, and the figures that choose among them."""
    other = replace(RTX3090, **{name: getattr(RTX3090, name) + 1})
    store.update(store.user_path("rtx3090"), other, [entry()])
    with pytest.raises(FileError, match=rf"another GPU named 'rtx3090': {name} = \d+, but .*; delete the file"):
        store.merged_view(RTX3090, ANY_TOOLCHAIN)
    given = store.user_path("rtx3090")
    assert store.merged_view(RTX3090, ANY_TOOLCHAIN, given)[0].gpu == other


def test_the_record_of_a_known_gpu_holds_over_the_users_header():
    store.update(store.user_path("rtx3090"), replace(RTX3090, memory_gib=12), [entry()])
    both, _ = store.merged_view(RTX3090, ANY_TOOLCHAIN)
    assert both.gpu == RTX3090
    assert both.header.memory_gib == 24


def test_a_weaker_or_outdated_entry_of_the_users_covers_nothing():
    shipped, _ = store.merged_view(RTX3090, ANY_TOOLCHAIN)
    for weak in (entry(source=Source.MODELLED), entry(kernel="another")):
        store.user_path("rtx3090").unlink(missing_ok=True)
        store.update(store.user_path("rtx3090"), RTX3090, [weak])
        assert store.merged_view(RTX3090, gemm.toolchain())[0] == shipped


def test_stamps_go_to_entries_of_the_configuration_that_was_proven(home):
    path = home / "a.json"
    store.update(path, RTX3090, [entry()])
    new = stamp("cross_arch", device="d", arch=86, entry=entry(), kernel="k", triton="3.6.0")
    stamps = {entry().key: [new]}
    other = Database(RTX3090, (entry().model_copy(update={"config": replace(TILE, num_stages=4)}),))
    assert not store.stamp(path, stamps, other)
    assert store.stamp(path, stamps, Database(RTX3090, (entry(),)))


def test_show(capfd):
    out, _ = call(capfd, "db", "show", "--gpu", "rtx3090")
    assert "4296x12288x4608" in out
    assert str(SHIPPED) in out
    document = json.loads(call(capfd, "db", "show", "--gpu", "h200", "--json")[0])
    assert document["gpu"]["alias"] == "h200"
    assert len(document["entries"]) == len(store.load(files.shipped("tuning_db") / "h200.json").entries)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--shape", "4296x12288x4608"], lambda e: e.shape == SHAPE),
        (
            ["--shape", "4296X12288X4608", "--shape", "1x4608x4608"],
            lambda e: e.shape in (SHAPE, GemmShape(1, 4608, 4608)),
        ),
        (["--kernel", "MMA-sync"], lambda e: e.config.kernel is Kernel.MMA_SYNC),
        (["--kernel", "triton", "--kernel", "mma_sync"], lambda e: True),
        (["--source", "measured"], lambda e: False),
        (["--source", "proxy", "--shape", "1x4608x4608"], lambda e: e.shape == GemmShape(1, 4608, 4608)),
        (["--unproven"], lambda e: not e.proofs(gemm.toolchain(), 86)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_show_filters(capfd, options, wanted):
    every = store.load(SHIPPED).entries
    document = json.loads(call(capfd, "db", "show", "--gpu", "RTX 3090", *options, "--json")[0])
    found = [Entry.model_validate(row) for row in document["entries"]]
    assert [e.identity for e in found] == [e.identity for e in every if wanted(e)]
    out, _ = call(capfd, "db", "show", "--gpu", "rtx3090", *options)
    assert f"{len(found)} entries of {len(every)} for NVIDIA GeForce RTX 3090" in out


def test_show_counts_one_entry(home, capfd):
    store.update(home / "a.json", RTX3090, [entry()])
    assert "\n1 entry for NVIDIA GeForce RTX 3090, from a.json" in call(capfd, "db", "show", "--db", "a.json")[0]


def test_results_go_to_a_file_or_to_stdout(home, capfd):
    out, err = call(capfd, "db", "explain", 1, 2, 3, "--gpu", "a100", "-o", "e.json")
    assert "->" in out
    assert "wrote e.json" in err
    text = (home / "e.json").read_text()
    assert call(capfd, "db", "explain", 1, 2, 3, "--gpu", "a100", "-o", "-")[0] == text
    assert call(capfd, "db", "explain", 1, 2, 3, "--gpu", "a100", "--json")[0] == text
    merged = call(capfd, "db", "merge", SHIPPED, SHIPPED, "-o", "-")[0]
    assert merged == store.load(SHIPPED).dumps()
    call(capfd, "db", "schema", "-o", "s.json")
    assert (home / "s.json").read_text() == call(capfd, "db", "schema")[0]
    (home / "mine.json").write_text("{}")
    call(capfd, "db", "schema", "-o", "mine.json", status=2)
    assert (home / "mine.json").read_text() == "{}"


def test_check(home, capfd):
    out, _ = call(capfd, "db", "check", status=1)
    assert out.count("no problem") == len(out.splitlines()) - 1 == len(list(SHIPPED.parent.glob("*.json"))) - 1
    assert "rtx5090.json: 4096x128x4608" in out  # whose own code nobody has executed yet
    timed = {"p20_us": 88.0, "p80_us": 92.0, "measured_on": "NVIDIA H200", "policy": 3}
    store.update(home / "bad.json", RTX3090, [entry(time_us=90.0, default_us=80.0, **timed)])
    (home / "broken.json").write_text("{")
    out, err = call(capfd, "db", "check", "bad.json", "broken.json", status=1)
    name = f"bad.json: 4296x12288x4608 ({TILE}): "
    assert f"{name}slower than the default configuration: 90.0 us against 80.0 us" in out
    assert (
        f"{name}not proven under Triton {triton.__version__} as sm_86 code with the present kernel; run `int8kit verify"
        in out
    )
    assert "broken.json: damaged JSON" in out
    assert "problems in 2 of 2 databases" in err


def test_upgrade(home, capfd):
    shutil.copy(V1 / "rtx3090.json", home / "a.json")
    out, _ = call(capfd, "db", "check", "a.json", status=1)
    assert "a.json: format int8kit.tuning/1; run `int8kit db upgrade a.json`" in out
    call(capfd, "db", "show", "--db", "a.json")  # read as it is
    (home / "broken.json").write_text("{")
    before = (home / "a.json").read_bytes()
    call(capfd, "db", "upgrade", "a.json", "broken.json", status=2)
    assert (home / "a.json").read_bytes() == before
    out, _ = call(capfd, "db", "upgrade", "a.json")
    assert out == "a.json: 138 entries upgraded, 138 stamps dropped\n"
    once = (home / "a.json").read_bytes()
    assert store.read(home / "a.json")["format"] == FORMAT
    assert "has the present format already" in call(capfd, "db", "upgrade", "a.json")[0]
    assert (home / "a.json").read_bytes() == once


def test_merge(home, capfd):
    shutil.copy(SHIPPED, home / "a.json")
    store.update(home / "b.json", RTX3090, [entry()])
    call(capfd, "db", "merge", "a.json", "b.json", "-o", "c.json")
    merged = store.load(home / "c.json")
    assert merged.resolve(SHAPE, ANY_TOOLCHAIN).config == TILE
    assert len(merged.entries) == len(store.load(SHIPPED).entries)
    call(capfd, "db", "merge", "b.json", "--user")
    assert store.load(store.user_path("rtx3090")).entries == (entry().with_id(),)
    before = (home / "c.json").read_bytes()
    shutil.copy(files.shipped("tuning_db") / "h200.json", home / "h.json")
    _, err = call(capfd, "db", "merge", "a.json", "h.json", "-o", "c.json", status=2)
    assert "'h.json' is for the GPU 'h200', 'a.json' for 'rtx3090'" in err
    assert (home / "c.json").read_bytes() == before


def test_explain_names_an_exact_entry_of_each_joined_shape(capfd):
    document = shapes_file.read(files.shipped("shapes") / "ideogram4.json")
    joined = {(g["m"], g["n"], g["k"]) for case in document["cases"] for g in case["joined"]}
    assert len(joined) == 24
    for path in sorted(SHIPPED.parent.glob("*.json")):
        call(capfd, "db", "explain", *max(joined), "--gpu", path.stem, "--strict")
        base = store.load(path)
        for shape in joined:
            for operation in Operation:
                assert base.resolve(GemmShape(*shape), gemm.toolchain(), operation).level == "exact"


def test_explain(capfd):
    out, _ = call(capfd, "db", "explain", 4296, 12288, 4608, "--gpu", "rtx3090", "--strict")
    assert "->  exact" in out
    assert f"proven: cross_arch on NVIDIA H200 (Triton {triton.__version__}" in out
    assert out.count("->") == 1
    out, err = call(capfd, "db", "explain", 4000, 12288, 4608, "--gpu", "rtx3090", "--strict", status=1)
    assert "->  nearest-m" in out
    assert (
        "was not tuned for rtx3090, nearest-m serves; tune it with `int8kit tune --gpu rtx3090 --shape 4000x12288x4608`"
        in err
    )
    document = json.loads(call(capfd, "db", "explain", 700, 3000, 2040, "--gpu", "rtx4090", "--json")[0])
    assert (document["level"], document["proven"]) == ("default", False)
    assert document["levels"] == dict.fromkeys(("exact", "nearest-m", "nearest", "model", "borrowed", "default"))
    assert "no entry of rtx4090 is near; estimated" in document["why"]


def test_explain_names_the_reason_of_a_rank(capfd):
    """The estimated times of the first two, and the database that was borrowed."""
    own = json.loads(call(capfd, "db", "explain", 700, 3000, 2048, "--gpu", "h200", "--json")[0])
    assert (own["level"], own["proven"], own["config"]["kernel"]) == ("model", True, "wgmma")
    assert re.fullmatch(r"measured for [0-9x]+; estimated [0-9.]+ us; next wgmma .*, [0-9.]+ us", own["why"])
    lent = json.loads(call(capfd, "db", "explain", 4296, 12288, 4608, "--gpu", "h100", "--json")[0])
    assert (lent["level"], lent["files"]) == ("borrowed", [])
    assert lent["why"].startswith("from h200, measured for 4296x12288x4608; estimated ")
    same = json.loads(call(capfd, "db", "explain", 4296, 12288, 4608, "--gpu", "h200", "--json")[0])
    assert lent["config"] == same["config"]  # on a GPU like the lender its entry serves
    out, _ = call(capfd, "db", "explain", 4296, 12288, 4608, "--gpu", "h100")
    assert "->  borrowed" in out


def test_the_published_schema_is_the_models(capfd):
    text = (Path(__file__).parent.parent / "docs" / "tuning_db.schema.json").read_text()
    assert json.loads(text) == json_schema()
    assert call(capfd, "db", "schema")[0] == text


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.xdist_group("compilers")
def test_migrate_copies_entries_that_need_no_more_resources(tmp_path, capfd, compilers, monkeypatch):
    """The entries' Triton is said to be of another generation than the one that is here."""
    monkeypatch.setattr(workers, "Workers", lambda: contextlib.nullcontext(compilers))
    other = "3.9.0" if generation(triton.__version__) == "3.6" else "3.6.0"
    hash_ = gemm.kernel_hash()
    fits, spilt = TileConfig(64, 64, 64, 4, 3), TileConfig(64, 64, 128, 4, 3)
    good = {"source": Source.PROXY, "triton": other, "kernel": hash_, "tried": 1, "time_us": 9.0}
    ample = Resources(registers=255, spill_bytes=0, shared_bytes=90000)
    tight = Resources(registers=16, spill_bytes=0, shared_bytes=1024)
    entries = [
        Entry(m=1, n=64, k=64, config=fits, resources=ample, **good),
        Entry(m=2, n=64, k=64, config=spilt, resources=tight, **good),
        Entry(m=3, n=64, k=64, config=fits, resources=ample, **{**good, "kernel": "older"}),
    ]
    path = tmp_path / "t.json"
    store.update(path, gpus.get("rtx3090"), entries)
    command = ("db", "migrate", path, "--json")
    left = json.loads(call(capfd, *command)[0])["left"]
    assert "blocks per multiprocessor" in left["2x64x64"]
    assert "has changed since" in left["3x64x64"]
    found = store.load(path).entries
    assert len(found) == 4
    (new,) = [e for e in found if e.triton == triton.__version__]
    assert (new.shape.m, new.timed_with, new.time_us, new.verified) == (1, other, 9.0, None)
    assert 16 < new.resources.registers < 255
    assert json.loads(call(capfd, *command)[0])["migrated"] == 0
    store.update(path, gpus.get("rtx3090"), [entries[0].model_copy(update={"time_us": 8.0})])  # tuned anew
    assert json.loads(call(capfd, *command)[0])["migrated"] == 1
    assert [e.time_us for e in store.load(path).entries if e.triton == triton.__version__] == [8.0]
