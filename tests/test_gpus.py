import json
import sys
from dataclasses import asdict, replace

import pytest
import torch

from int8kit import gpus
from int8kit.errors import FileError, UnknownName


def test_every_record_is_sound():
    for alias, gpu in gpus.GPUS.items():
        assert gpu.alias == alias
        assert gpu.shared_memory < gpu.shared_memory_sm
        assert gpu.int8_tops > gpu.bf16_tflops
    names = [gpu.name for gpu in gpus.GPUS.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "name", ["rtx3090", "RTX3090", "RTX 3090", "rtx-3090", "GeForce RTX 3090", "NVIDIA GeForce RTX 3090", " rtx_3090 "]
)
def test_a_name_is_found_without_regard_to_case_and_spaces(name):
    assert gpus.get(name) == gpus.GPUS["rtx3090"]


def test_every_gpu_is_found_by_its_drivers_name():
    for gpu in gpus.GPUS.values():
        assert gpus.get(gpu.name) == gpus.get(gpu.name.lower()) == gpu


@pytest.mark.parametrize("name", ["rtx9", "", " ", "RTX 3090 Ti", "nvidia", "GeForce", "3090", "rtx\uff13090"])
def test_an_unknown_gpu_lists_the_known(name):
    with pytest.raises(UnknownName, match=rf"unknown GPU '{name}'.*rtx3090.*--gpu-spec`"):
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


def test_present_matches_the_whole_name(monkeypatch):
    """A 3090 Ti is not a 3090: a part of the name does not identify a GPU."""

    class Properties:
        name, major, minor, multi_processor_count = "NVIDIA GeForce RTX 3090 Ti", 8, 6, 84
        max_threads_per_multi_processor, total_memory = 1536, 24 << 30
        shared_memory_per_block_optin, L2_cache_size = 101376, 6 << 20

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    gpu = gpus.present()
    assert gpu is not None
    assert (gpu.alias, gpu.arch, gpu.sms) == ("nvidiageforcertx3090ti", 86, 84)
    Properties.name = "NVIDIA GeForce RTX 3090"
    assert gpus.present() == gpus.get("rtx3090")
    assert replace(gpu, alias="x") != gpu


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
