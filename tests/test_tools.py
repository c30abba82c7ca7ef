"""The scripts in tools/ that can prove themselves without a card."""

import json
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
