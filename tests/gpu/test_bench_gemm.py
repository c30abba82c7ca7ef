"""The small benchmark: `pytest tests/gpu/test_bench_gemm.py --benchmark-enable`. Figures are for one launch.

`int8kit bench gemm` is the full benchmark, with ratios from interleaved rounds.
"""

import pytest
import torch

from int8kit import gpus
from int8kit.bench import contestants, gemm
from int8kit.spec import GemmShape
from int8kit.timing import captured
from int8kit.timing.captured import RepeatableCall
from int8kit.timing.operands import TimingOperands, differing

SHAPE = GemmShape(4096, 4608, 4608)
SMALL = GemmShape(256, 1024, 1024)


def listed():
    return contestants.ours(gpus.present(), arch="sm86") + contestants.standard() if torch.cuda.is_available() else []


@pytest.fixture(scope="module")
def operands():
    return TimingOperands(SHAPE, gpus.present())


@pytest.mark.parametrize("contestant", listed(), ids=lambda c: f"{c.kind}-{c.name}")
def test_bench(operands, benchmark, contestant):
    if contestant.arithmetic == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 tensor cores")
    with torch.no_grad():
        call = RepeatableCall(contestant.prepare(operands), graph=True)

        def synchronous():
            call()
            torch.cuda.synchronize()

        benchmark.extra_info["launches"] = call.launches
        benchmark(synchronous)
    assert call.by == "graph", call.note
    differs = differing(call.result, operands.truth(contestant.result))
    if contestant.ours or contestant.name == "int_mm":
        assert differs == 0
    assert call.result.isfinite().all()


@pytest.mark.parametrize("graph", [True, False])
def test_a_whole_run_gives_ratios(graph):
    setting = gemm.Setting(rounds=3, graph=graph)
    result = gemm.measure_shapes([SMALL, GemmShape(777, 512, 416)], listed(), gpus.present(), setting)
    result.conclude()
    document = result.document()
    assert document["complete"]
    assert {row["timed_by"] for row in document["rows"]} == {"graph" if graph else "host"}
    assert all(row["geomean"] > 0 for row in document["details"]["summary"])
    for shape in result.shapes:
        assert {"int8kit", "int8kit-sm86", "bf16", "int_mm"} <= {row["name"] for row in shape["rows"]}


def test_a_failing_contestant_is_absent_and_the_run_continues():
    def too_large(o):
        return captured.PreparedContestant([lambda: torch.empty(1 << 50, device="cuda")])

    greedy = contestants.Contestant("greedy", "gemm", "", too_large)
    result = gemm.measure_shapes([SMALL], [greedy, *listed()[:1]], gpus.present(), gemm.Setting(rounds=2))
    result.conclude()
    assert result.shapes[0]["absent"][0]["reason"].startswith("OutOfMemoryError")


def test_a_contestant_that_cannot_be_captured_is_launched_from_the_host():
    o = TimingOperands(SMALL, gpus.present())

    def launch():
        torch.cuda.synchronize()  # not allowed in a capture
        return torch.mm(o.x, o.w.t())

    call = RepeatableCall(captured.PreparedContestant([launch]), graph=True)
    assert (call.by, call.launches) == ("host", 1)
    assert call.note.startswith("from the host: ")
    call()
    assert call.result.isfinite().all()
    assert torch.randn(9, device="cuda").isfinite().all()  # the failed capture has left nothing open
