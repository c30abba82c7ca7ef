"""The properties `refusals` and `fallback`: their cases, and faults that they find."""

import pytest
import torch

from int8kit import gpus, reference
from int8kit.kernels import gemm, operands
from int8kit.spec import Kernel
from int8kit.verify import executors
from int8kit.verify.properties import gemm_calls

EXECUTOR = executors.available(gpus.get("rtx3090"))[-1]


def test_every_parameter_of_every_call_is_wrong_once():
    cases = set(gemm_calls.refused())
    for call in gemm_calls.CALLS:
        names = {c.operand for c in cases if c.call == call} - {""}
        vectors = set() if call == "accumulate" else {"sx", "sw", "bias"}
        assert names == {"xq", "wq", "out"} | vectors
        for name in names:
            faults = {c.fault for c in cases if (c.call, c.operand) == (call, name)}
            assert faults == set(gemm_calls.FAULTS) - ({"more rows"} if name in vectors else set())


def test_a_check_that_is_missing_is_found(monkeypatch):
    for case in gemm_calls.refused():
        assert gemm_calls.check_refused(case, EXECUTOR) is None, case
    monkeypatch.setattr(operands.Operands, "__post_init__", lambda self: None)
    monkeypatch.setattr(gemm, "_launch", lambda *_: None)
    monkeypatch.setattr(gemm_calls.operand_checks, "int8_weight", lambda *_: None)
    for case in gemm_calls.refused():
        assert "expected ShapeError" in gemm_calls.check_refused(case, EXECUTOR), case


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has the Gluon kernels")
def test_a_wrong_fallback_is_found(monkeypatch):
    cases = [c for c in gemm_calls.fallbacks("cpu") if c.shape.m == 3]
    assert {c.config.kernel for c in cases} == {Kernel.MMA_SYNC, Kernel.WGMMA}
    assert [why for c in cases if (why := gemm_calls.check_fallback(c, EXECUTOR))] == []
    notice = gemm._notice
    monkeypatch.setattr(
        gemm, "_notice", type("Silent", (), {"__call__": lambda *_: None, "cache_clear": lambda _: 0})()
    )
    assert "no warning" in gemm_calls.check_fallback(cases[0], EXECUTOR)
    monkeypatch.setattr(gemm, "_notice", notice)
    monkeypatch.setattr(reference, "accumulate", lambda xq, wq: torch.zeros(len(xq), len(wq), dtype=torch.int32))
    assert "differ" in gemm_calls.check_fallback(next(c for c in cases if c.call == "accumulate"), EXECUTOR)
