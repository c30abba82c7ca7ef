"""upgrade.py: files of every released format are read, and rewritten in the present format without loss."""

import json
from pathlib import Path

import pytest

from int8kit import files, gpus
from int8kit.database import store, upgrade
from int8kit.database.schema import FORMAT
from int8kit.errors import FileError
from int8kit.kernels import gemm
from int8kit.spec import POLICIES, Kernel
from int8kit.toolchain import ANY_TOOLCHAIN

DATA = Path(__file__).parent / "data"
V1 = sorted((DATA / "tuning_v1").glob("*.json"))
EVERY = sorted(DATA.glob("tuning_v*/*.json"))
NAMES = {"pointer": Kernel.TRITON, "ampere": Kernel.MMA_SYNC, "hopper": Kernel.WGMMA}


def test_data_has_a_file_of_every_format():
    assert {json.loads(path.read_text())["format"] for path in EVERY} == {*store.FORMATS}
    assert len(V1) == 8


@pytest.mark.parametrize("path", V1, ids=lambda path: path.stem)
def test_every_file_of_release_0_1_keeps_its_contents(path):
    """Shapes, configurations, sources, times and runners-up are equal to the old file's. Stamps are dropped."""
    old, new = json.loads(path.read_text()), store.load(path, path.stem)
    assert len(old["entries"]) == len(new.entries)
    assert new.gpu == gpus.get(path.stem)

    def contents(row):
        config = row["config"]
        tile = [config[name] for name in ("block_m", "block_n", "block_k", "num_warps", "num_stages", "group_m")]
        times = [row.get(name) for name in ("model_us", "time_us", "p20_us", "p80_us")]
        return [*tile, config["stream_k"], *times, *row["resources"].values()], config["kernel"]

    by_key = {(e.m, e.n, e.k, e.triton): e for e in new.entries}
    for row in old["entries"]:
        entry = by_key[row["m"], row["n"], row["k"], row["triton"]]
        now = json.loads(entry.model_dump_json())
        for before, after in zip([row, *row.get("runners_up", [])], [now, *(now["runners_up"] or [])], strict=True):
            values, kernel = contents(before)
            assert contents(after)[0] == values
            assert after["config"]["kernel"] == NAMES[kernel]
            assert len(after["kernel"]) == 12
            assert after["kernel"] != before["kernel"]
        for name in ("source", "default_us", "bf16_us", "measured_on", "timed_with", "policy", "tried"):
            assert now[name] == row.get(name)
        assert now["gpu_state"] == (row.get("card_state") and now["gpu_state"] | row["card_state"])
        assert entry.verified is None


@pytest.mark.parametrize("path", EVERY, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_upgraded_file_has_the_present_format_and_round_trips(path, tmp_path):
    base = store.load(path)
    text = base.dumps()
    assert json.loads(text)["format"] == FORMAT
    (tmp_path / "a.json").write_text(text)
    again = store.load(tmp_path / "a.json")
    assert again.dumps() == text
    assert [e.with_id() for e in base.entries] == list(again.entries)
    one = base.entries[0]
    assert again.resolve(one.shape, ANY_TOOLCHAIN) == base.resolve(one.shape, ANY_TOOLCHAIN)


def test_gpu_without_a_record_keeps_the_fields_of_the_file(tmp_path):
    """Format /1 had no memory and L2 size. No invented value gets into the file."""
    document = json.loads(V1[0].read_text())
    document["gpu"] |= {"alias": "mygpu", "name": "My GPU", "sms": 99}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    base = store.load(path)
    assert (base.gpu.alias, base.gpu.sms) == ("mygpu", 99)
    assert "memory_gib" not in json.loads(base.dumps())["gpu"]
    merged = store.update(path, base.gpu, [])
    assert "l2_bytes" not in json.loads(path.read_text())["gpu"]
    assert len(merged.entries) == len(base.entries)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: d["gpu"].pop("alias"), "no gpu.alias"),
        (lambda d: d["entries"][0].pop("config"), r"no entries\[0\].config"),
        (lambda d: d["entries"][0].update(config=3), r"entries\[0\].config = 3; expected an object"),
        (lambda d: d["entries"][0].update(host="pc"), r"unknown field entries\[0\].host"),
        (lambda d: d["entries"][0].update(m="4096"), r"entries\[0\].m = \"4096\"; expected a whole number"),
        (lambda d: d["entries"][0]["config"].update(kernel="cublas"), "config.kernel = \"cublas\"; expected 'triton'"),
        (lambda d: d.update(entries={}), "entries = {}; expected a list"),
        (lambda d: d.update(gpu=None), "gpu = null; expected an object"),
    ],
)
def test_damaged_old_file_gives_a_one_line_error(tmp_path, damage, reason):
    document = json.loads(V1[0].read_text())
    damage(document)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    with pytest.raises(FileError, match=reason) as caught:
        store.load(path)
    assert "\n" not in str(caught.value)


def test_an_earlier_hash_of_a_kernel_keeps_times_and_proves_nothing(tmp_path):
    """The hash is of a kernel that was as fast. Its stamps are of other code."""
    document = json.loads((files.shipped("tuning_db") / "h200.json").read_text())
    earlier = {kernel: hash_ for hash_, kernel in upgrade._SAME_SPEED.items()}  # the last one before the present one
    for row in document["entries"]:
        for one in (row, *row.get("runners_up", ()), *row.get("verified", ())):
            one["kernel"] = earlier[one["kernel"]]
    (tmp_path / "h200.json").write_text(json.dumps(document))
    for entry in store.load(tmp_path / "h200.json").entries:
        assert not entry.is_stale(gemm.toolchain())
        assert all(one.kernel == gemm.kernel_hash(one.config.kernel) for one in entry.runners_up or ())
        assert entry.proofs(gemm.toolchain(), 90) == []


def test_hashes_are_translated_to_the_present_kernels():
    """Whoever changes a kernel's speed takes its hashes out; whoever keeps the speed adds the last hash."""
    assert set(upgrade._SAME_SPEED.values()) <= {gemm.kernel_hash(kernel) for kernel in Kernel}


@pytest.mark.parametrize("path", EVERY, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_policies_of_old_files_have_the_present_words(path):
    base = store.load(path)
    assert base.policies
    assert all(POLICIES[int(number)] == text for number, text in base.policies.items())
