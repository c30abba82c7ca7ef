"""The scripts in tools/ that run without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process
ROOT = Path(__file__).parent.parent


def test_launches_dry_run_and_sanitize_without_the_toolkit(tmp_path):
    command = [sys.executable, ROOT / "tools" / "launches.py"]
    done = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 configurations at 2 shapes, 5 kernels over rows: launched" in done.stdout
    environment = {"PATH": "/usr/bin:/bin"}  # without the CUDA toolkit
    script = ["sh", ROOT / "tools" / "sanitize.sh", tmp_path / "s.txt"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == "sanitize: no compute-sanitizer; it is part of the CUDA toolkit\n"


RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Read access at _gemm_wgmma+0x100 in gemm_wgmma.py:{start}
=========     and Write access at _gemm_wgmma+0x8f10 in gemm_wgmma.py:{start} [233 hazards]
=========     and Write access at _gemm_wgmma+0x10020 in gemm_wgmma.py:{other} [203 hazards]
=========
10 configurations at 2 shapes, 5 kernels over rows: launched
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("other", "cut", "code", "said"),
    [
        ("gl.warp_specialize(", "", 0, "1 hazards, 0 of them ours"),
        ("acc = ", "", 1, "OURS"),
        ("gl.warp_specialize(", "in gemm_wgmma.py:", 1, "a kernel: an of no known line:0"),
        ("gl.warp_specialize(", ": launched", 1, "not every kernel was launched"),
        ("gl.warp_specialize(", "RACECHECK SUMMARY", 1, "the report cannot be read: no summary"),
    ],
)  # fmt: skip
def test_a_race_is_ours_unless_triton_starts_warps_there(tmp_path, other, cut, code, said):
    """Reports of racecheck with the present kernel's lines, with another line, and incomplete ones."""
    lines = (ROOT / "int8kit" / "kernels" / "gemm_wgmma.py").read_text().splitlines()
    start, end = (next(i for i, line in enumerate(lines, 1) if text in line) for text in ("def _gemm_wgmma(", other))
    report = tmp_path / "s.txt.racecheck"
    text = RACE.format(start=start, other=end)
    report.write_text(text.replace(cut, "") if cut else text)
    done = subprocess.run([sys.executable, ROOT / "tools" / "hazards.py", report], capture_output=True, text=True)
    assert done.returncode == code, done.stdout
    assert said in done.stdout


def test_sanitize_runs_every_tool_and_sorts_the_findings(tmp_path):
    """With replacements of the launches and of the sanitizer, which finds only a race in Triton's dispatch."""
    lines = (ROOT / "int8kit" / "kernels" / "gemm_wgmma.py").read_text().splitlines()
    start, end = (
        next(i for i, t in enumerate(lines, 1) if s in t) for s in ("def _gemm_wgmma(", "gl.warp_specialize(")
    )
    (tmp_path / "report").write_text(RACE.format(start=start, other=end))
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/sh\n[ "$2" = racecheck ] && {{ cat {tmp_path}/report; exit 1; }}\n'
        'echo "launched"; echo "========= ERROR SUMMARY: ${ERRORS:-0} errors"; exit ${ERRORS:-0}\n'
    )
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = tools/launches.py ] || exec {sys.executable} "$@"\n')
    for file in (tool, python):
        file.chmod(0o755)
    environment = {"PATH": f"{tool.parent}:/usr/bin:/bin"}
    script = ["sh", "tools/sanitize.sh", tmp_path / "s.txt"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "memcheck: nothing found; ERROR SUMMARY: 0 errors" in done.stdout
    assert "1 hazards, 0 of them ours" in done.stdout
    assert (tmp_path / "s.txt").read_text() == done.stdout
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, env={**environment, "ERRORS": "1"})
    assert done.returncode == 1
    assert "memcheck: FOUND" in done.stdout


@pytest.mark.slow
@pytest.mark.xdist_group("workshop")  # where its kernels have been compiled
def test_exhaustive_dry_run(tmp_path):
    out = tmp_path / "exhaustive.json"
    shape = ("--gpu", "rtx3090", "--shape", "16x256x1000", "--seeds")
    command = [sys.executable, ROOT / "tools" / "exhaustive.py", "--dry-run", *shape, "--out", out]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["shapes"]
    assert row["configurations"] == len(row["times"]) > 30
    assert row["best_us"] == min(p50 for _, _, p50, _ in row["hot"])
    assert 0 <= row["eight_regret"] <= row["first_regret"]
    assert 0.5 < row["spearman"] <= 1
    assert row["times"] == sorted(row["times"], key=lambda t: t[1])


@pytest.mark.slow
@pytest.mark.xdist_group("workshop")  # where its kernels have been compiled
def test_resources_of_the_shipped_kernels_beside_another_version(tmp_path, monkeypatch, capsys):
    out = tmp_path / "r.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "tools" / "resources.py", "--gpu", "rtx3060"]
    subprocess.run([*command, "--out", out], cwd=ROOT, check=True, timeout=300, env=environment, capture_output=True)
    document = json.loads(out.read_text())
    assert document["kernels"]
    for name, row in document["kernels"].items():
        registers, spills, kib = row
        assert 16 <= registers <= 255, name
        assert spills == 0, name
        assert 0 < kib <= 99, name
    out.write_text(json.dumps({**document, "triton": "1.2.3"}))
    spec = importlib.util.spec_from_file_location("resources", command[1])
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool, "compiled", lambda alias: document)  # the same as a second compilation would give
    monkeypatch.setattr(sys, "argv", [*command[1:], "--beside", str(out)])
    tool.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert "Triton 1.2.3" in head
    assert len(rows) == len(document["kernels"])
    assert all(row.split("|")[2].strip() == row.split("|")[3].strip() for row in rows)
