import json
import re
import sys
from dataclasses import asdict, replace

import pytest
import torch
from driver import pretend, properties
from entries import entry

from int8kit import gpus
from int8kit.database import store
from int8kit.errors import FileError, InputError, UnknownName
from int8kit.gpu_records import SOURCES
from int8kit.spec import Source
from int8kit.toolchain import ANY_TOOLCHAIN
from int8kit.tune import search


def test_every_record_is_sound():
    for alias, gpu in gpus.GPUS.items():
        assert gpu.alias == alias
        assert gpu.shared_memory < gpu.shared_memory_sm
        assert gpu.int8_tops > gpu.bf16_tflops
        assert len(SOURCES[alias]) > 10
        assert gpu.arch in gpus.ARCHS
        if gpu.arch in (86, 89, 120):  # 2048 operations a clock and multiprocessor
            assert gpu.int8_tops == pytest.approx(2048e-6 * gpu.sms * gpu.clock_mhz, rel=0.005)
            assert gpu.int8_tops == pytest.approx(gpu.bf16_tflops * (4 if "GeForce" in gpu.name else 2), rel=0.02)
    listed = list(gpus.GPUS.values())
    assert not [(a.alias, b.alias) for a in listed for b in listed if a is not b and gpus.same(a, b)]
    assert set(SOURCES) == set(gpus.GPUS) >= {
        "rtx3060ti", "rtx3070", "rtx3080-12gb", "rtx3080ti", "rtx3090ti", "rtx4060ti", "rtx4070", "rtx4070ti",
        "rtx4080", "rtx5070ti", "rtx5080", "a10", "a40", "a6000", "l4", "rtx6000ada", "b200",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["rtx3090", "RTX3090", "RTX 3090", "rtx-3090", "GeForce RTX 3090", "NVIDIA GeForce RTX 3090", " rtx_3090 "]
)
def test_a_name_is_found_without_regard_to_case_and_spaces(name):
    assert gpus.get(name) == gpus.GPUS["rtx3090"]


def test_every_gpu_is_found_by_its_alias_and_by_its_drivers_name():
    for gpu in gpus.GPUS.values():
        assert gpus.get(gpu.alias) == gpus.get(gpu.alias.upper()) == gpu
        assert gpus.get(gpu.name) == gpus.get(gpu.name.lower())
        assert gpus.get(gpu.name).name == gpu.name
    assert gpus.get("RTX 3080 12GB").sms == 70


@pytest.mark.parametrize("name", ["rtx9", "", " ", "RTX 3099 Ti", "nvidia", "GeForce", "3090", "rtx\uff13090"])
def test_an_unknown_gpu_lists_the_known(name):
    with pytest.raises(UnknownName, match=rf"unknown GPU '{re.escape(name)}'.*--gpu-spec`"):
        gpus.get(name)


def test_resolve_takes_the_name_then_the_present_gpu_then_the_rtx3090(monkeypatch):
    monkeypatch.setattr(gpus, "present", lambda: gpus.GPUS["h200"])
    assert gpus.resolve("a100").alias == "a100"
    assert gpus.resolve(None).alias == "h200"
    monkeypatch.setattr(gpus, "present", lambda: None)
    assert gpus.resolve(None).alias == "rtx3090"
    with pytest.raises(UnknownName):
        gpus.resolve("")


def test_without_torch_no_gpu_is_present(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert gpus.present() is None


GEFORCE = "NVIDIA GeForce RTX "
DRIVERS = [
    # name, major, minor, multiprocessors, GiB that the driver reports, shared memory, alias
    (GEFORCE + "3090", 8, 6, 82, 23.68, 101376, "rtx3090"),
    (GEFORCE + "3090 Ti", 8, 6, 84, 23.68, 101376, "rtx3090ti"),
    (GEFORCE + "3080", 8, 6, 68, 9.77, 101376, "rtx3080"),
    (GEFORCE + "3080", 8, 6, 70, 11.76, 101376, "rtx3080-12gb"),
    (GEFORCE + "3080", 8, 6, 70, 9.77, 101376, "rtx3080-70sm-10gb"),
    (GEFORCE + "3080 Laptop GPU", 8, 6, 48, 15.74, 101376, "rtx3080laptop-48sm-16gb"),
    (GEFORCE + "3080 Laptop GPU", 8, 6, 48, 7.79, 101376, "rtx3080laptop-48sm-8gb"),
    (GEFORCE + "3080 with Max-Q Design", 8, 6, 48, 7.79, 101376, "rtx3080withmaxqdesign-48sm-8gb"),
    (GEFORCE + "3060", 8, 6, 28, 7.79, 101376, "rtx3060-28sm-8gb"),
    (GEFORCE + "4060 Ti", 8, 9, 34, 15.6, 101376, "rtx4060ti-16gb"),
    ("NVIDIA L40S", 8, 9, 142, 44.4, 101376, "l40s"),
    ("NVIDIA L4", 8, 9, 58, 21.96, 101376, "l4"),
    ("NVIDIA A10", 8, 6, 72, 22.06, 101376, "a10"),
    ("NVIDIA A100-SXM4-80GB", 8, 0, 108, 79.14, 166912, "a100"),
    ("NVIDIA A100-SXM4-40GB", 8, 0, 108, 39.39, 166912, "a100sxm440gb-108sm-40gb"),
    ("NVIDIA H100 80GB HBM3", 9, 0, 132, 79.1, 232448, "h100"),
    ("NVIDIA H100 80GB HBM3", 9, 0, 16, 9.75, 232448, "h10080gbhbm3-16sm-10gb"),
    ("NVIDIA H200", 9, 0, 132, 139.8, 232448, "h200"),
    ("NVIDIA H200 MIG 1g.18gb", 9, 0, 16, 16.0, 232448, "h200mig1g18gb-16sm-16gb"),
    ("NVIDIA B200", 10, 0, 148, 178.35, 232448, "b200"),
    (GEFORCE + "9999", 13, 0, 99, 63.0, 232448, "rtx9999-99sm-64gb"),
]


@pytest.mark.parametrize(("name", "major", "minor", "sms", "gib", "shared", "alias"), DRIVERS)
def test_the_present_gpu(monkeypatch, tmp_path, name, major, minor, sms, gib, shared, alias):
    """Figures identify a GPU, not only its name; one without a record is itself, and other verbs find its alias."""
    monkeypatch.chdir(tmp_path)
    pretend(monkeypatch, properties(name, major, minor, sms, gib, shared))
    gpu = gpus.present()
    assert (gpu.alias, gpu.name, gpu.arch, gpu.sms) == (alias, name, major * 10 + minor, sms)
    assert gpu == (gpus.GPUS.get(alias) or gpu)
    assert gpus.get(alias) == gpus.resolve(None) == gpu
    assert gpus._wrong("alias", alias, "str") is None


def test_rates_of_a_gpu_without_a_record(monkeypatch):
    """They come from the driver, and from the most similar record: scaled, and of the same product line."""
    laptop = ("NVIDIA GeForce RTX 3080 Laptop GPU", 8, 6, 48, 16)
    pretend(monkeypatch, properties(*laptop))
    plain, like = gpus.present(), gpus.get("rtx3070")
    assert plain.int8_tops == pytest.approx(like.int8_tops * 48 / 46)
    assert (plain.clock_mhz, plain.l2_bytes, plain.memory_gib) == (like.clock_mhz, 6 << 20, 16)
    more = {"clock_rate": 1_245_000, "memory_clock_rate": 7_001_000, "memory_bus_width": 256}
    pretend(monkeypatch, properties(*laptop, **more))
    gpu = gpus.present()
    assert gpu.clock_mhz == 1245
    assert gpu.int8_tops == pytest.approx(plain.int8_tops * 1245 / like.clock_mhz)
    assert gpu.dram_gb_s == pytest.approx(448.064)


@pytest.mark.parametrize(
    ("given", "hip", "reason"),
    [
        (("NVIDIA GeForce RTX 2080 Ti", 7, 5, 68, 11, 65536), None, "is sm_75: int8kit needs sm_80 or later"),
        (("Tesla V100-SXM2-16GB", 7, 0, 80, 16, 98304), None, "is sm_70: int8kit needs sm_80"),
        (("AMD Radeon RX 9070 XT", 12, 0, 64, 16, 65536), "7.2", "built for ROCm, and int8kit's kernels run on NVIDIA"),
    ],
)
def test_a_gpu_that_is_not_supported_is_refused(monkeypatch, verb, given, hip, reason):
    pretend(monkeypatch, properties(*given), hip)
    with pytest.raises(InputError, match=f"{given[0]}.*{reason}.*CUDA_VISIBLE_DEVICES"):
        gpus.resolve(None)
    assert gpus.get("rtx3090").sms == 82
    with pytest.raises(UnknownName):
        gpus.get(given[0])
    for call in ("run --size 64x64 --steps 1", "tune --shape 16x64x64", "bench gemm --shape 16x64x64", "db show"):
        out, err = verb(*call.split(), status=2)
        assert out == ""
        assert reason in err


MADE_UP = ("NVIDIA Made Up 1", 8, 6, 52, 14.7)


@pytest.mark.parametrize("alias", ["madeup1-52sm-16gb", "mine"])
def test_a_database_names_a_gpu_without_a_record(monkeypatch, tmp_path, verb, alias):
    """Its alias is a name for every verb, on its own machine and on others, and both have the same figures."""
    monkeypatch.chdir(tmp_path)
    pretend(monkeypatch, properties(*MADE_UP))
    here = replace(gpus.present(), alias=alias)
    assert search.source_of(here, [gpus.present()])[0] is Source.MEASURED
    store.update(tmp_path / "tuning_db" / f"{alias}.json", here, [entry()])
    assert gpus.present().alias == alias  # the file's, whatever it is
    assert store.merged_view(gpus.present(), ANY_TOOLCHAIN)[0].entries
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    away = gpus.get(alias)
    assert gpus.get("made up 1") == gpus.get(alias.upper()) == away
    assert gpus.same(away, here)
    database, paths = store.merged_view(away, ANY_TOOLCHAIN)
    assert (database.gpu, database.entries[0].m) == (away, 4096)
    assert [path.name for path in paths] == [f"{alias}.json"]
    for call in ("db show", "db explain 4096 4608 4608", "doctor"):
        out, _ = verb(*call.split(), "--gpu", alias, status=1 if call == "doctor" else 0)
        assert alias in out or MADE_UP[0] in out
    assert store.served_gpu(None, paths[0]) == store.load(paths[0]).gpu
    with pytest.raises(UnknownName, match="expected one of"):
        gpus.get("another")


def test_a_file_for_other_limits_is_refused(monkeypatch, tmp_path):
    """Two kinds of GPU cannot share an alias by accident."""
    monkeypatch.chdir(tmp_path)
    pretend(monkeypatch, properties(*MADE_UP))
    here = gpus.present()
    other = replace(here, sms=40)
    path = tmp_path / "tuning_db" / f"{here.alias}.json"
    store.update(path, other, [entry()])
    assert gpus.present() == here
    with pytest.raises(FileError, match="another GPU named 'madeup1-52sm-16gb': sms = 40, but 52"):
        store.merged_view(here, ANY_TOOLCHAIN)
    path.write_text("{")
    assert gpus.present() == here
    with pytest.raises(FileError, match="damaged JSON"):
        gpus.get(here.alias)


def test_two_files_of_one_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for alias, m in (("rtx3080", 1), ("rtx3080-12gb", 2)):
        store.update(tmp_path / "tuning_db" / f"{alias}.json", gpus.get(alias), [entry(m=m)])
    for sms, gib, m in ((68, 10, 1), (70, 12, 2)):
        pretend(monkeypatch, properties("NVIDIA GeForce RTX 3080", 8, 6, sms, gib))
        assert [e.m for e in store.load_database().entries] == [m]


SPEC = {"format": gpus.SPEC_FORMAT, **asdict(replace(gpus.get("rtx3080"), alias="mygpu", name="NVIDIA My GPU"))}


def test_a_gpu_from_a_file(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(SPEC))
    assert gpus.read_spec(path) == replace(gpus.get("rtx3080"), alias="mygpu", name="NVIDIA My GPU")
    for known in gpus.GPUS.values():
        path.write_text(json.dumps({"format": gpus.SPEC_FORMAT, **asdict(known)}))
        assert gpus.read_spec(path) == known


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sms": 0}, r"sms = 0; expected a whole number from 1 to 4096"),
        ({"sms": True}, r"sms = True; expected a whole number"),
        ({"sms": 68.5}, r"sms = 68.5; expected a whole number"),
        ({"int8_tops": "many"}, r"int8_tops = 'many'; expected a number from 1 to 1000000"),
        ({"name": ""}, r"name = ''; expected a name"),
        ({"name": "a\nb"}, r"name = 'a\\nb'; expected a name of printable characters"),
        ({"name": "\x1b[31m"}, r"name = '\\x1b\[31m'; expected a name of printable"),
        ({"alias": "../x"}, r"alias = '\.\./x'; expected small letters"),
        ({"alias": "x\n"}, r"alias = 'x\\n'; expected small letters"),
        ({"alias": "rtx3090"}, r"name = 'NVIDIA My GPU', but 'NVIDIA GeForce RTX 3090' in the record.*another alias"),
        ({"arch": 75}, r"arch = 75; expected one of 80, 86"),
        ({"arch": 999}, r"arch = 999; expected one of 80, 86"),
        ({"shared_memory": 1}, r"shared_memory = 1; expected a whole number from 101376"),
        ({"shared_memory": 200000}, r"shared_memory = 200000; expected at most shared_memory_sm, 102400"),
        ({"dram_gb_s": 1e308}, r"dram_gb_s = 1e\+308; expected a number from 1"),
        ({"hbm": 1}, r"unknown field 'hbm'; expected alias, name"),
        ({"sms": None, "arch": None}, r"arch = None; expected one of"),
        ({"format": "x"}, r"has the format 'x'"),
    ],
)
def test_a_bad_gpu_file_is_one_clear_error(tmp_path, change, reason):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({**SPEC, **change}))
    with pytest.raises(FileError, match=reason):
        gpus.read_spec(path)
    path.write_text(json.dumps({k: v for k, v in SPEC.items() if k not in ("sms", "arch")}))
    with pytest.raises(FileError, match="lacks arch, sms"):
        gpus.read_spec(path)


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpus.present() is None
