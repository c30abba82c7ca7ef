import json
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


def test_unknown_card_lists_the_known():
    with pytest.raises(UnknownName, match=r"unknown card 'rtx9'.*rtx3090.*--gpu-spec`"):
        gpus.get("rtx9")


def test_present_matches_the_whole_name(monkeypatch):
    """A 3090 Ti is not a 3090: identification by a part of the name has sent cards the wrong file elsewhere."""

    class Properties:
        name, major, minor, multi_processor_count = "NVIDIA GeForce RTX 3090 Ti", 8, 6, 84
        max_threads_per_multi_processor, total_memory = 1536, 24 << 30
        shared_memory_per_block_optin, L2_cache_size = 101376, 6 << 20

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    card = gpus.present()
    assert card is not None
    assert (card.alias, card.arch, card.sms) == ("nvidiageforcertx3090ti", 86, 84)
    Properties.name = "NVIDIA GeForce RTX 3090"
    assert gpus.present() == gpus.get("rtx3090")
    assert replace(card, alias="x") != card


SPEC = {"format": gpus.SPEC_FORMAT, **asdict(replace(gpus.get("rtx3080"), alias="mycard", name="NVIDIA My Card"))}


def test_a_card_out_of_a_file(tmp_path):
    path = tmp_path / "card.json"
    path.write_text(json.dumps(SPEC))
    assert gpus.read_spec(path) == replace(gpus.get("rtx3080"), alias="mycard", name="NVIDIA My Card")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sms": 0}, r"sms = 0; legal is a whole number above 0"),
        ({"sms": True}, r"sms = True; legal is a whole number"),
        ({"sms": 68.5}, r"sms = 68.5; legal is a whole number"),
        ({"int8_tops": "many"}, r"int8_tops = 'many'; legal is a number above 0"),
        ({"name": ""}, r"name = ''; legal is a name"),
        ({"alias": "../x"}, r"alias '\.\./x'; legal are small letters"),
        ({"arch": 75}, r"arch 75; legal is 80 or more"),
        ({"hbm": 1}, r"unknown field 'hbm'; legal are alias, name"),
        ({"sms": None, "arch": None}, r"arch = None; legal is a whole number"),
        ({"format": "x"}, r"has the format 'x'"),
    ],
)
def test_a_bad_card_file_is_one_clear_error(tmp_path, change, reason):
    path = tmp_path / "card.json"
    path.write_text(json.dumps({**SPEC, **change}))
    with pytest.raises(FileError, match=reason):
        gpus.read_spec(path)
    path.write_text(json.dumps({k: v for k, v in SPEC.items() if k not in ("sms", "arch")}))
    with pytest.raises(FileError, match="lacks arch, sms"):
        gpus.read_spec(path)


def test_no_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpus.present() is None
