"""int8kit/peers.py and tools/bench_peers.py: the adapters call stand-ins that have the released signatures."""

import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from int8kit import gpus, reference
from int8kit.bench import gemm
from int8kit.bench.contestants import ours
from int8kit.spec import GemmShape

TOOL = Path(__file__).parent.parent / "tools" / "bench_peers.py"
GPU, SHAPE, BF16 = gpus.get("h200"), GemmShape(33, 64, 96), torch.bfloat16


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("bench_peers", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scaled(a, b, xs, ws, bias=None, dtype=BF16):
    """a [M, K], b [N, K]."""
    assert a.dtype is b.dtype is torch.int8
    assert xs.dtype is ws.dtype is torch.float32
    return reference.scaled_mm(a, b, xs.flatten(), ws.flatten(), bias, out_dtype=dtype)


def vllm_stand_in():
    def cutlass_scaled_mm(out, a, b, a_scales, b_scales, bias):
        assert a_scales.shape == (a.shape[0], 1)
        assert b_scales.shape == (1, b.shape[1])
        assert b.stride(0) == 1
        out.copy_(scaled(a, b.t(), a_scales, b_scales, bias, out.dtype))

    def dynamic_scaled_int8_quant(result, input, scale, azp):
        q, s = reference.quantize(input)
        result.copy_(q)
        scale.copy_(s[:, None])

    return SimpleNamespace(cutlass_scaled_mm=cutlass_scaled_mm, dynamic_scaled_int8_quant=dynamic_scaled_int8_quant)


def comfy_stand_in():
    def cutlass_int8_dequant(a, b, xs, ws, bias, d, out_dtype_code, stream_ptr):
        d.copy_(scaled(a, b, xs, ws, bias))
        return (out_dtype_code, stream_ptr) == (2, 7)

    def cutlass_int8_dequant_config(a, b, xs, ws, d, out_dtype_code, config, stream_ptr):
        d.copy_(scaled(a, b, xs, ws))
        return config in (3, 12)

    def int8_linear(x, weight, weight_scale, bias=None, out_dtype=None, convrot=False):
        return reference.linear(x, weight, weight_scale, bias).to(out_dtype)

    c = SimpleNamespace(
        cutlass_int8_dequant=cutlass_int8_dequant,
        cutlass_int8_dequant_config=cutlass_int8_dequant_config,
        cutlass_int8_selected_config=lambda m, n, k: 12,
    )
    cuda = SimpleNamespace(_C=c, _wrap_for_dlpack=lambda tensor: tensor, DTYPE_TO_CODE={BF16: 2})
    backends = SimpleNamespace(cuda=cuda)
    opened = {"use_backend": lambda name: torch.no_grad(), "int8_linear": int8_linear, "backends": backends}
    return {"comfy_kitchen": SimpleNamespace(**opened), "comfy_kitchen.backends": backends}


def triton_stand_ins():
    def scaled_int8_mm(a, b, row_scale, col_scale):
        assert row_scale.dtype is col_scale.dtype is BF16
        return scaled(a, b.t(), row_scale.float(), col_scale.float())

    def sdnq_scaled_mm(a, b, scale_a, scale_b, bias=None, out_dtype=torch.float32):
        return scaled(a, b.t(), scale_a, scale_b, bias, out_dtype)

    class A8W8:
        def __init__(self, device="cuda:0", dtype=None):
            assert dtype is BF16

        def from_weights(self, weight, bias=None, scales=None):
            assert scales.shape == (weight.shape[0], 1)
            return lambda x: reference.linear(x, weight, scales.flatten(), bias)

    def int8_matmul(input, weight, scale, bias=None):
        return reference.linear(input, weight.t(), scale.flatten(), bias)

    return {
        "torchao.prototype.quantized_training.int8_mm": SimpleNamespace(
            scaled_int8_mm=scaled_int8_mm, _scaled_int8_mm_kernel=SimpleNamespace(configs=[1, 2])
        ),
        "sdnq.kernels.triton_scaled_mm": SimpleNamespace(
            sdnq_scaled_mm=sdnq_scaled_mm, sdnq_scaled_mm_kernel=SimpleNamespace(configs=[1, 2])
        ),
        "sdnq.layers.linear.linear_int8": SimpleNamespace(int8_matmul=int8_matmul),
        "gemlite.helper": SimpleNamespace(A8W8_INT8_dynamic=A8W8),
    }


def install_stand_ins(monkeypatch):
    """Modules with the names of the libraries, and the stream that the stand-in of comfy-kitchen expects."""
    stand_ins = comfy_stand_in() | triton_stand_ins()
    packages = {".".join(name.split(".")[:i]) for name in stand_ins for i in range(1, name.count(".") + 1)}
    for name in packages - set(stand_ins):
        package = ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("bitsandbytes", "bitsandbytes.functional"):  # as if not installed, whatever ran before
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))


@pytest.mark.slow
def test_each_adapter_calls_its_library_as_released(tool, monkeypatch):
    install_stand_ins(monkeypatch)
    monkeypatch.setattr(torch.ops, "_C", vllm_stand_in(), raising=False)
    listed = ours(GPU) + tool.contestants_of(inductor=False, timer=tool.invented)
    setting = gemm.Setting(3, device="cpu", copies=2, timer=tool.invented)
    outcome = gemm.measure_shapes([SHAPE], listed, GPU, setting)
    outcome.conclude()
    [shape] = outcome.shapes
    rows = {(row["name"], row["kind"]): row for row in shape["rows"]}
    for name in ("vllm", "comfy-kitchen", "sdnq"):
        assert rows[name, "gemm"]["differs"] == rows[name, "linear"]["differs"] == 0
    for key in (("comfy-best-of-14", "gemm"), ("comfy-triton", "linear"), ("gemlite", "linear")):
        assert rows[key]["differs"] == 0
    assert 0 < rows["torchao", "gemm"]["differs"] < SHAPE.m * SHAPE.n  # its scales are rounded to bf16
    assert rows["comfy-best-of-14", "gemm"]["note"] == "configuration 3 of 2"
    assert rows["comfy-kitchen", "gemm"]["note"] == "configuration 12"
    absent = {(row["name"], row["kind"]): row["reason"] for row in shape["absent"]}
    assert set(absent) == {("bitsandbytes", "gemm"), ("bitsandbytes", "linear"), ("torchao", "linear")}
    assert all(reason.startswith("ModuleNotFoundError") for reason in absent.values())


@pytest.mark.process
def test_dry_run(tmp_path):
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    done = run([sys.executable, TOOL, "--dry-run", "--arch", "sm86", "--only", "vllm", "--only", "bf16",
                "--skip", "bf16", "--out", "out/b.json"])  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document == json.loads((tmp_path / "out" / "b.json").read_text())
    assert document["complete"]
    assert {c["name"] for c in document["details"]["contestants"]} == {"int8kit", "int8kit-sm86", "vllm"}
    [(_, reason)] = {(row["name"], row["reason"]) for shape in document["details"]["shapes"] for row in shape["absent"]}
    assert reason
    assert "did not run" in done.stdout
    done = run([sys.executable, TOOL, "--dry-run", "--only", "cublas"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("bench_peers: unknown contestant 'cublas'; expected bf16, bitsandbytes, comfy-")
