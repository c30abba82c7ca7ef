"""The verbs where Triton or torch cannot be imported: CPU verbs work, and a GPU verb gives one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HIDDEN = Path(__file__).parent / "hidden.py"


def calls(modules, folder, *verbs):
    """[(exit status, stdout, stderr)] of verbs in a process that lacks `modules`."""
    command = [sys.executable, HIDDEN, modules, json.dumps([verb.split() for verb in verbs])]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout.splitlines()[-1])


def assert_one_line(result, *words):
    status, out, err = result
    assert (status, out) == (2, ""), result
    [line] = err.splitlines()
    assert line.startswith("int8kit: ")
    for word in words:
        assert word in line


@pytest.mark.slow
@pytest.mark.process
def test_without_triton(tmp_path):
    trace, show, explain, doctor, run, tune, verify, bench, migrate = calls(
        "triton", tmp_path, "trace-shapes tiny --size 64x64", "db show --gpu rtx3090", "db explain 1 2 3 --gpu a100",
        "doctor", "run --size 64x64 --steps 1", "tune --gpu rtx3090", "verify --gpu rtx3090",
        "bench gemm", f"db migrate {Path(__file__).parent}/data/tuning_v2/rtx5090.json",
    )  # fmt: skip
    assert trace[0] == show[0] == explain[0] == run[0] == 0, (trace, show, explain, run)
    assert "wrote out/shapes/tiny.json" in trace[1]
    assert "wrote out/image.png" in run[1]
    assert "cpu, reference backend" in run[1]
    assert "186 entries for NVIDIA GeForce RTX 3090" in show[1]
    assert "no kernel compiles here" in show[2]
    assert doctor[0] == 1
    assert "failed  Triton" in doctor[1]
    assert "pip install 'triton>=3.6'" in doctor[1]
    for result, verb in ((tune, "tune"), (bench, "bench gemm"), (migrate, "db migrate")):
        assert_one_line(result, f"{verb} needs triton", "No module named 'triton'", "int8kit doctor")
    assert_one_line(verify, "triton")


@pytest.mark.process
def test_without_torch(tmp_path):
    show, check, explain, doctor, trace, run, tune, verify, bench = calls(
        "torch,triton", tmp_path, "db show --gpu rtx3090", "db check", "db explain 1 2 3", "doctor --json",
        "trace-shapes tiny", "run", "tune --gpu rtx3090", "verify", "bench gemm",
    )  # fmt: skip
    assert show[0] == explain[0] == 0
    assert check[0] in (0, 1)
    assert "rtx3090.json: " in check[1]
    document = json.loads(doctor[1])
    assert doctor[0] == 1
    assert document["works"] is False
    failed = {finding["name"] for finding in document["findings"] if finding["status"] == "failed"}
    assert {"torch", "Triton", "GPU"} <= failed
    assert all(finding["remedy"] for finding in document["findings"] if finding["status"] == "failed")
    for result in (trace, run, tune, verify, bench):
        assert_one_line(result, "torch", "int8kit doctor")
