"""The proofs that try every input, whole, as each architecture's code; and faults that each of them must catch."""

import time

import exhaustive_faults
import pytest
import torch

from int8kit import gpus
from int8kit.spec import Kernel
from int8kit.verify import executors, verify_kernels
from int8kit.verify.properties.exhaustive import PROOFS, epilogues

BYTES = 4 << 30  # of memory that a proof may allocate
INPUTS = {
    "row scale": 2**17, "silu": 2**17, "bias": 2**17, "row scale of fp32": 2**32, "epilogue conversion": 2**32,
    "accumulator conversion": 2**32, "silu of fp32": 2**32, "swiglu epilogue": 2**32,
    # numbers of both signs up to each amax, and two kernels
    "quantize, every pair": 2 * sum(last * (last + 1) + 2 * (last + 1) for last in (0x7F7F, 0x7BFF)),
}  # fmt: skip


def executors_here():
    return executors.available(gpus.get("rtx3090")) if torch.cuda.is_available() else []


def runs():
    return [(proof, on) for on in executors_here() for proof in PROOFS if proof.why_not(on) is None]


def tiles():
    return [config for config in epilogues.TILES.values() if config.kernel is not Kernel.WGMMA or _is_sm90()]


def _is_sm90():
    return gpus.present().arch == 90


@pytest.mark.parametrize(("proof", "executor"), runs(), ids=lambda value: getattr(value, "name", str(value)))
def test_proofs_hold(proof, executor):
    torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    result = verify_kernels.run_over_tiles(proof.name, executor, tiles())
    print(
        f"{proof.name} on {executor}: {time.monotonic() - start:.1f} s, {torch.cuda.max_memory_allocated() >> 20} MiB"
    )
    torch.cuda.empty_cache()
    assert result.failure is None
    assert result.examples == INPUTS.get(proof.name, result.examples) > 1_000
    assert torch.cuda.max_memory_allocated() < BYTES


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("mutant", exhaustive_faults.FAULTS, ids=lambda mutant: mutant.name)
def test_faults_are_caught(mutant):
    if mutant.kernel is Kernel.WGMMA and not _is_sm90():
        pytest.skip("no wgmma here")
    found = exhaustive_faults.verdict(mutant, mutant.expected, mutant.kernel, executors_here()[-1])
    assert (found.ending, found.how) == ("killed", "differs"), found.evidence
