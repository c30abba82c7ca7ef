"""bench/results.py: the schema of result documents, their files, and what they must not contain."""

import copy
import json
import platform
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
import torch

from int8kit import __version__
from int8kit.bench import results
from int8kit.errors import FileError
from int8kit.timing.interleave import Times

ARGV = ["/home/somebody/venv/bin/int8kit", "bench", "model", "--db", "/home/somebody/db.json", "--size", "64x64"]
STATE = {"sm_mhz": 1980, "memory_mhz": 3201, "power_w": 120, "temperature_c": 31, "throttle": ["power cap"]}


def policy():
    used = results.DatabaseUsed(files=("h200.json",), entries=48)
    return results.Policy(
        timing="by the wall clock", variant="int8", repairs=("text", "rope"), database=used, seeds=(7,)
    )


def made(**details):
    rows = [
        results.row("int8", "ms", Times(1.00004, 2, 3), 8, peak_gib=17.25, note="", differs=0, tight=True, tops=None),
        results.row("bf16", "ms", Times(2, 2, 2), 8, digits=1),
    ]
    return results.document(results.header("model", policy(), argv=ARGV), rows, details=details, after=STATE)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with two H200s, as far as the header asks."""
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=150_110_011_392)
    sensors = SimpleNamespace(driver="580.159.04", read=lambda: STATE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(results, "Sensors", lambda: sensors)


def test_a_file_holds_what_was_written(tmp_path, gpu):
    document = made(size="64x64", parts={"GEMM": [1, 2.5, None]})
    results.write(tmp_path / "r.json", document)
    assert json.loads((tmp_path / "r.json").read_text()) == document
    read = results.read(tmp_path / "r.json")
    assert json.loads(read.model_dump_json()) == document
    assert (read.rows[0].name, read.rows[0].p20, read.rows[0].rounds) == ("int8", 1, 8)
    assert read.rows[0].model_extra == {"peak_gib": 17.25, "note": "", "differs": 0, "tight": True, "tops": None}
    assert read.policy == policy()
    lines = (tmp_path / "r.json").read_text().splitlines()
    assert sum('"p50"' in line for line in lines) == 2  # one line for each row


def test_the_header_names_versions_gpu_and_state(gpu):
    document = made()
    assert next(iter(document)) == "format"
    assert (document["format"], document["benchmark"], document["device"]) == ("int8kit.result/1", "model", "cuda")
    assert document["gpu"] == {"name": "NVIDIA H200", "capability": "9.0", "memory_gib": 139.8, "number": 2}
    assert document["state"] == {"before": STATE, "after": STATE}
    versions = document["versions"]
    assert (versions["int8kit"], versions["torch"]) == (__version__, torch.__version__)
    assert (versions["python"], versions["driver"]) == (platform.python_version(), "580.159.04")
    assert set(versions) == {"int8kit", "python", "torch", "triton", "diffusers", "transformers", "driver", "cuda"}
    taken = datetime.fromisoformat(document["date"])
    assert timedelta() <= datetime.now(UTC) - taken < timedelta(minutes=10)


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    header = results.header("fused", policy())
    assert (header["device"], header["gpu"], header["versions"]["driver"]) == ("cpu", None, None)
    assert header["state"] == {"before": None, "after": None}
    assert results.gpu_state() is None


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    def version(name):
        raise results.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(results.metadata, "version", version)
    assert results.header("fused", policy(), device="cpu")["versions"]["diffusers"] is None


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (ARGV, "int8kit bench model --db db.json --size 64x64"),
        (["/home/somebody/int8kit/__main__.py", "bench", "fused"], "int8kit bench fused"),
        (["int8kit", "--db=/home/somebody/a b.json"], "int8kit '--db=a b.json'"),
        (["int8kit", "-o", "~/out/r.json", "--db=~/d.json"], "int8kit -o r.json --db=d.json"),
        (["int8kit", "--prompt", "a cat / a dog"], "int8kit --prompt 'a cat / a dog'"),
        (["int8kit", "--prompt", "see /home/somebody/x.txt"], "int8kit --prompt 'see x.txt'"),
        (["int8kit", "out/r.json", "--size=64x64", "/"], "int8kit out/r.json --size=64x64 ''"),
        (["int8kit", "two\nlines"], "int8kit 'two?lines'"),
    ],
)
def test_the_command_has_no_folder_of_a_user(argv, shown):
    assert results.command_line(argv) == shown


def test_a_document_has_no_folder_in_any_text():
    rows = [
        {"name": "a", "unit": "us", "p20": 1, "p50": 1, "p80": 1, "rounds": 1, "note": "of /home/somebody/x/lib.so"}
    ]
    details = {"deep": [{"reason": "no '/home/somebody/y.so'", "folder": "'/home/somebody/'"}]}
    document = results.document(results.header("fused", policy(), argv=ARGV), rows, details=details)
    assert document["rows"][0]["note"] == "of lib.so"
    assert document["details"]["deep"][0]["reason"] == "no 'y.so'"
    assert "somebody" not in json.dumps(document)


def test_figures_that_a_document_cannot_hold():
    header = results.header("fused", policy(), device="cpu")
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.document(header, [results.row("a", "us", Times(1, float("nan"), 2), 3)])
    with pytest.raises(ValueError, match="ascending order"):
        results.document(header, [results.row("a", "us", Times(1, 3, 2), 3)])


def remove(*keys):
    def edit(document):
        for key in keys[:-1]:
            document = document[key]
        del document[keys[-1]]

    return edit


def put(value, *keys):
    def edit(document):
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("int8kit.bench/1", "format"), "has the format 'int8kit.bench/1'; expected 'int8kit.result/1'"),
        (remove("benchmark"), "is the result of another verb: expected the field 'benchmark'"),
        (remove("rows", 1, "p50"), r"is damaged \(no rows\[1\].p50\)"),
        (put("2", "rows", 0, "p50"), r"rows\[0\].p50 = \"2\"; expected a number"),
        (put(0.5, "rows", 0, "p50"), r"p20 1.0, p50 0.5, p80 3.0: expected them in ascending order"),
        (put("years", "rows", 0, "unit"), r"rows\[0\].unit = \"years\"; expected 'us', 'ms'"),
        (put(0, "rows", 0, "rounds"), r"rows\[0\].rounds = 0; expected 1 or more"),
        (put([1], "rows", 0, "extra"), r"rows\[0\].extra"),
        (put("me", "user"), "unknown field user"),
        (put("me", "gpu", "host"), "unknown field gpu.host"),
        (put("H200\x1b[2J", "gpu", "name"), "expected printable characters in one line"),
        (put("9", "gpu", "capability"), 'gpu.capability = "9"; expected a text of the pattern'),
        (put("2026-11-28T10:15:00+02:00", "date"), "expected a time in UTC"),
        (put("yesterday", "date"), 'date = "yesterday"'),
        (put(1, "complete"), "complete = 1; expected true or false"),
        (put([], "details"), r"details = \[\]; expected an object"),
    ],
)
def test_a_bad_file_gets_one_clear_line(tmp_path, gpu, edit, message):
    document = copy.deepcopy(made())
    edit(document)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(document))
    with pytest.raises(FileError, match=message) as error:
        results.read(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{str(path)!r} ")
    assert "int8kit bench gemm -o FILE" in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileError, match="no file"):
        results.read(tmp_path / "none.json")


def test_results_of_every_format_may_be_replaced(tmp_path):
    path = tmp_path / "r.json"
    for name in ("int8kit.result/1", "int8kit.bench/1", "int8kit.bench-fused/1", "int8kit.bench-model/1"):
        path.write_text(json.dumps({"format": name}))
        assert results.is_replaceable(path)
    path.write_text(json.dumps({"format": "int8kit.tuning/2"}))
    assert not results.is_replaceable(path)
