"""store.py: database files, from the search path to locks and damaged files."""

import json
import multiprocessing
from dataclasses import replace

import pytest
from entries import GPU, entry

from int8kit import files, gpus
from int8kit.database import store
from int8kit.database.problems import problems
from int8kit.errors import FileError, Int8kitError
from int8kit.kernels import gemm
from int8kit.toolchain import Toolchain


def test_file_has_one_line_per_entry_and_round_trips(tmp_path):
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
        (lambda d: d["entries"][0].update(host="pc"), r"unknown field entries\[0\].host"),
        (lambda d: d["entries"][0].pop("config"), r"no entries\[0\].config"),
        (lambda d: d["entries"][0].update(k=200000), "K = 200000"),
        (lambda d: d["entries"][0].update(m=0), r"entries\[0\].m = 0; expected 1 or more"),
        (
            lambda d: d["entries"][0].update(triton="main"),
            r"entries\[0\].triton = \"main\"; expected a version such as 3.7.1",
        ),
        (
            lambda d: d["entries"][0]["config"].update(block_m=48),
            "4096x4608x4608: block_m = 48: ",
        ),
        (lambda d: d["entries"][0].update(time_us=-4), r"entries\[0\].time_us = -4; expected more than 0"),
        (lambda d: d["entries"][0].update(source="measured"), "4096x4608x4608: measured without time_us"),
        (lambda d: d["entries"].append(d["entries"][0]), "gemm 4096x4608x4608 occurs twice for Triton 3.6"),
        (lambda d: d["gpu"].update(sms=0), "gpu.sms = 0; expected 1 or more"),
        (lambda d: d.update(host="pc"), "unknown field host"),
        (lambda d: d.update(entries=3), "entries = 3; expected a list"),
        (lambda d: d.update(entries=[3]), r"entries\[0\] = 3; expected an object"),
        (lambda d: d.update(entries=[{}]), r"no entries\[0\].m"),
        (lambda d: d.update(policies=None), "policies = null; expected an object"),
        (lambda d: d.update(policies={"1": 2}), "policies.1 = 2; expected a text"),
        (lambda d: d["entries"][0].update(config=3), r"entries\[0\].config = 3; expected an object"),
        (lambda d: d["entries"][0].update(kernel=[]), r"entries\[0\].kernel = \[\]; expected a text"),
        (lambda d: d["entries"][0].update(source="x"), r"source = \"x\"; expected 'measured', 'proxy' or 'modelled'"),
        (lambda d: d["entries"][0]["config"].update(block="x"), r"unknown field entries\[0\].config.block"),
        (lambda d: d["entries"][0]["config"].pop("block_m"), r"no entries\[0\].config.block_m"),
        (lambda d: d.pop("gpu"), "no gpu"),
        (lambda d: d["gpu"].update(name="a\nb"), r"gpu.name = .*expected printable characters"),
        (lambda d: d["entries"][0].update(measured_on="\x1b[31m"), r"measured_on = .*expected printable characters"),
        (lambda d: d["gpu"].update(alias="rtx4090"), "is for the GPU 'rtx4090', not for 'rtx3090'"),
        (lambda d: d.update(format="int8kit.shapes/1"), "has the format 'int8kit.shapes/1'"),
    ],
)
def test_damaged_file_gives_a_one_line_error(tmp_path, damage, reason):
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


@pytest.mark.parametrize("text", ["", "{}", '{"format": "int8kit.tuning/2", "entries": 3}'])
def test_remedy_for_a_damaged_own_database(tmp_path, text):
    """`tune` writes over no damaged file, so the remedy for one that nobody named is to delete it."""
    own = store.user_path("rtx3090")
    with pytest.raises(FileError, match="make one with `int8kit tune`"):
        store.load(own)
    for path, remedy in ((own, "; delete it, and `int8kit tune` makes another"), (tmp_path / "a.json", "name another")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        with pytest.raises(FileError, match=remedy):
            store.load(path)


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
def test_two_concurrent_writers_lose_no_entry(tmp_path):
    path = tmp_path / "a.json"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path, first)) for first in (1, 101)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [e.m for e in store.load(path).entries] == [*range(1, 21), *range(101, 121)]


def test_search_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert store.find("rtx3090") == files.shipped("tuning_db") / "rtx3090.json"
    assert store.find("nosuchgpu") is None
    store.update(tmp_path / "tuning_db" / "rtx3090.json", GPU, [entry()])
    assert store.find("rtx3090").resolve() == tmp_path / "tuning_db" / "rtx3090.json"


def test_gpu_without_a_record_keeps_its_identity(tmp_path):
    mine = replace(GPU, alias="mygpu", name="My GPU", sms=99)
    store.update(tmp_path / "a.json", mine, [entry()])
    loaded = store.load(tmp_path / "a.json").gpu
    assert (loaded.alias, loaded.sms, loaded.arch) == ("mygpu", 99, 86)


@pytest.mark.parametrize("path", sorted(files.shipped("tuning_db").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_databases_are_sound(path):
    """Every entry is legal, without spills, of the present kernels, and proven under both tested versions of Triton."""
    base, kernels = store.load(path, path.stem), gemm.toolchain().kernel_hashes
    assert path.read_text() == base.dumps()
    assert base.gpu == gpus.get(path.stem)
    for triton in ("3.6.0", "3.7.1"):
        found = problems(base, Toolchain(triton, kernels))
        if base.gpu.arch > 90:  # no GPU that was available executes its code
            assert len(found) == 1
            assert f"not proven under Triton {triton} as sm_{base.gpu.arch} code" in found[0]
            assert "only as sm_90 code" in found[0]
        else:
            assert found == []
    for e in base.entries:
        assert e.resources.spill_bytes == 0
        assert not e.is_stale(Toolchain("", kernels)), "the kernel has changed; tune again"
    assert {e.m for e in base.entries} >= {4096, 4296, 6144}
