"""The properties `refusals` and `fallback`: their cases, and faults that they find."""

import pytest
import torch

from int8kit import gpus, reference
from int8kit.kernels import gemm, gemm_mma_sync, gemm_wgmma, operands
from int8kit.spec import Kernel
from int8kit.verify import executors
from int8kit.verify.examples.encoding import from_json, to_json
from int8kit.verify.properties import gemm_calls, kernel_needs
from int8kit.verify.properties.kernel_needs import FREE, NEEDS, NeedCall

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


def test_every_need_is_lacking_alone():
    cases = list(kernel_needs.calls())
    assert len(set(cases)) == len(cases)
    for kernel in Kernel:
        assert set(NEEDS[kernel]) | set(FREE[kernel]) == set(NEEDS[Kernel.MMA_SYNC]) | set(NEEDS[Kernel.WGMMA])
        assert {c.lacks for c in cases if c.kernel is kernel} == {"", *NEEDS[kernel], *FREE[kernel]}
    assert [why for c in cases if (why := kernel_needs.check(c, EXECUTOR))] == []
    assert str(NeedCall(Kernel.WGMMA, "end of out")) == "wgmma kernel, bfloat16, end of out off by 8 bytes"
    assert from_json(to_json(cases[-1])) == cases[-1]


@pytest.mark.parametrize(("module", "kernel"), [(gemm_mma_sync, Kernel.MMA_SYNC), (gemm_wgmma, Kernel.WGMMA)])
def test_a_need_that_is_not_looked_at_is_found(monkeypatch, module, kernel):
    monkeypatch.setattr(module, "why_not", lambda operands: None)
    for lacks in NEEDS[kernel]:
        assert kernel_needs.check(NeedCall(kernel, lacks), EXECUTOR) == "served, expected a reason why not"
    monkeypatch.setattr(module, "why_not", lambda operands: "never")
    for lacks in ("", *FREE[kernel]):
        assert "refused: never" in kernel_needs.check(NeedCall(kernel, lacks), EXECUTOR)
