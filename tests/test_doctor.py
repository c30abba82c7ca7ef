"""`int8kit doctor`: a finding for everything that decides which verbs work, and a remedy for each defect."""

import getpass
import json
import platform
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from driver import pretend, properties

from int8kit import doctor, files, gpus
from int8kit.database import store

COMMAND = "int8kit doctor"  # of the help and the documents
HERE = 0 if torch.cuda.is_available() else 1


def findings(gpu=None):
    return {finding.name: finding for finding in doctor.examine(gpu)}


def test_the_table_and_the_exit_status(verb):
    out, err = verb(*COMMAND.split()[1:], status=HERE)
    for word in ("int8kit", "torch", "Triton", "driver", "extra run", "database", "lookup", "proofs", "disk", "memory"):
        assert f"  {word}  " in out
    assert ("some verbs cannot work here: driver, GPU" in err) is (HERE == 1)
    assert max(map(len, out.splitlines())) <= 80


def test_the_document_names_no_user_no_host_and_no_folder(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store.user_path("rtx3090").parent.mkdir(parents=True)
    store.user_path("rtx3090").write_text("{")
    out, _ = verb("doctor", "--json", "--gpu", "rtx3090", "-o", "a.json", status=1)
    document = json.loads(out)
    assert document["format"] == "int8kit.result/1"
    assert document["works"] is False
    assert (tmp_path / "a.json").read_text() == out
    verb("doctor", "-o", "a.json", status=1)  # ours: overwritten
    assert (tmp_path / "a.json").read_text() != ""
    assert "damaged JSON in 'rtx3090.json'" in out
    for private in (str(Path.home()), str(tmp_path), str(files.shipped("tuning_db")), platform.node()):
        assert private not in out
    assert getpass.getuser() == "root" or getpass.getuser() not in out


def test_without_folders():
    text = "cannot open /home/alice/.venv/lib/libcuda.so: no such file; see C:\\Users\\alice\\x.dll and 1/2"
    assert doctor.without_folders(text) == "cannot open libcuda.so: no such file; see x.dll and 1/2"


def test_every_defect_has_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage(1 << 30))
    monkeypatch.setattr(doctor, "_memory_gib", lambda: (4.0, 1.0))
    monkeypatch.setattr(doctor, "_driver", lambda: None)
    found = findings()
    assert {name for name, one in found.items() if one.status == "failed"} == {"torch", "Triton", "driver", "GPU"}
    notes = {name for name, one in found.items() if one.status == "note"}
    assert {"C compiler", "disk", "memory"} <= notes
    assert all(one.remedy for one in found.values() if one.status != "ok")
    assert not doctor.document(list(found.values()))["works"]


@pytest.mark.parametrize(
    ("version", "status", "word"),
    [("3.5.1", "failed", "triton>=3.6"), ("3.6.0", "ok", ""), ("3.7.1", "ok", ""), ("3.8.0", "note", "verify")],
)
def test_versions_of_triton(monkeypatch, version, status, word):
    monkeypatch.setattr("triton.__version__", version)
    assert doctor._triton().status == status
    assert word in doctor._triton().remedy


def test_missing_and_old_packages_name_their_extra(monkeypatch):
    versions = {"diffusers": "0.1"}

    def version(name):
        if name == "hypothesis":
            raise doctor.metadata.PackageNotFoundError(name)
        return versions.get(name, "9999")

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = {one.name: one for one in doctor._extras()}
    assert found["extra verify"].found == "no hypothesis"
    assert "pip install 'int8kit[verify]'" in found["extra verify"].remedy
    assert found["extra run"].found.startswith("diffusers 0.1, needed >=")
    assert found["extra tune"].status == found["extra nf4"].status == found["extra lora"].status == "ok"


@pytest.mark.parametrize(
    ("given", "hip", "status", "word"),
    [
        (("NVIDIA GeForce RTX 3090", 8, 6, 82, 24), None, "ok", "sm_86, 82 SMs, 24 GiB: rtx3090"),
        (("NVIDIA GeForce RTX 3080", 8, 6, 70, 12), None, "ok", ": rtx3080-12gb"),
        (("NVIDIA Made Up", 8, 6, 70, 12), None, "note", ": madeup-70sm-12gb, no record"),
        (("Tesla T4", 7, 5, 40, 16), None, "failed", "sm_75"),
        (("AMD Radeon RX 9070 XT", 12, 0, 64, 16), "7.2", "failed", "Radeon"),
    ],
)
def test_a_gpu(monkeypatch, given, hip, status, word):
    pretend(monkeypatch, properties(*given), hip)
    monkeypatch.setattr(doctor, "_driver", lambda: "570.86.15")
    driver, gpu = doctor._gpu(torch)
    assert (driver.status, driver.found) == ("ok", "570.86.15")
    assert gpu.status == status
    assert word in gpu.found
    assert bool(gpu.remedy) is (status != "ok")
    if status == "failed":
        assert findings()["database"].found.startswith("rtx3090: ")


def test_the_lookup_counts_shapes_by_level(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert findings("rtx3090")["lookup"].found == "72 shapes of ideogram4 on rtx3090: 72 exact"
    assert findings("rtx3090")["proofs"].status == "ok"
    assert "72 of 72 configurations unproven" in findings("rtx5090")["proofs"].found
    assert findings("h100")["lookup"].found == "72 shapes of ideogram4 on h100: 72 borrowed"
    base = store.load(files.shipped("tuning_db") / "rtx3090.json")
    few = replace(base, entries=tuple(e for e in base.entries if e.m == 4296))
    (tmp_path / "tuning_db").mkdir()
    (tmp_path / "tuning_db" / "rtx3090.json").write_text(few.dumps())
    found = findings("rtx3090")
    assert found["database"].found == "rtx3090: ./tuning_db"
    assert "nearest-m" in found["lookup"].found
    assert found["lookup"].remedy == "run `int8kit tune --gpu rtx3090`"
    assert gpus.get("rtx3090") == base.gpu
