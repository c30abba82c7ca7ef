"""The scripts in tools/ that can prove themselves without a card."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_bench_prologues_runs_dry(tmp_path):
    out = tmp_path / "out" / "prologues.json"
    command = [sys.executable, ROOT / "tools" / "bench_prologues.py", "--dry-run", "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    runs = json.loads(out.read_text())["runs"]
    assert {run["kernel"] for run in runs} == {
        "rms_norm_quantize", "residual_norm_quantize", "swiglu_quantize", "qk_norm_rope",
    }  # fmt: skip
    assert all(run["us"] > 0 and {"tb_s", "of_copy", "bytes"} <= set(run) for run in runs)
    assert json.loads(done.stdout.splitlines()[-1])["dry_run"]


def test_launches_and_what_sanitizes_them(tmp_path):
    command = [sys.executable, ROOT / "tools" / "launches.py"]
    done = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 configurations at 2 shapes, 5 kernels over rows: launched" in done.stdout
    environment = {"PATH": "/usr/bin:/bin"}  # where no CUDA toolkit is
    script = ["sh", ROOT / "tools" / "sanitize.sh", tmp_path / "s.txt"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == "sanitize: no compute-sanitizer; it is part of the CUDA toolkit\n"


def test_exhaustive_runs_dry(tmp_path):
    out = tmp_path / "exhaustive.json"
    shape = ("--gpu", "rtx3090", "--shape", "4096x256x1024", "--seeds")
    command = [sys.executable, ROOT / "tools" / "exhaustive.py", "--dry-run", *shape, "--out", out]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["shapes"]
    assert row["configurations"] == len(row["times"]) > 60
    assert row["best_us"] == min(p50 for _, _, p50, _ in row["hot"])
    assert 0 <= row["eight_regret"] <= row["first_regret"]
    assert 0.5 < row["spearman"] <= 1
    assert row["times"] == sorted(row["times"], key=lambda t: t[1])


def test_resources_of_the_shipped_kernels_and_beside_another_version(tmp_path):
    out = tmp_path / "r.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "tools" / "resources.py", "--gpu", "rtx3090"]
    subprocess.run([*command, "--out", out], cwd=ROOT, check=True, timeout=300, env=environment, capture_output=True)
    document = json.loads(out.read_text())
    for name, row in document["kernels"].items():
        registers, spills, kib = row
        assert 16 <= registers <= 255, name
        assert spills == 0, name
        assert 0 < kib <= 99, name
    out.write_text(json.dumps({**document, "triton": "1.2.3"}))
    done = subprocess.run(
        [*command, "--beside", out], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment
    )
    head, _, *rows = done.stdout.splitlines()
    assert "Triton 1.2.3" in head
    assert len(rows) == len(document["kernels"])
    assert all(row.split("|")[2].strip() == row.split("|")[3].strip() for row in rows)
