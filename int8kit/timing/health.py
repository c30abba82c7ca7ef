"""A health check of the GPU before anything is timed."""

from __future__ import annotations

import torch

from int8kit.errors import CheckFailed
from int8kit.gpus import Gpu
from int8kit.timing.interleave import sample, under_load

HEALTHY_SHARE = 0.5  # of the data sheet's dense bf16 rate; healthy GPUs reach 0.75 to 0.92 of it

HARMFUL = {"hardware slowdown", "software thermal", "hardware thermal", "power brake"}  # a power cap is normal

_REMEDY = "see `nvidia-smi -q -d PERFORMANCE`, and try again"


def check_health(gpu: Gpu) -> float:
    """Rate of a 4096^3 bf16 product on the present GPU, in TFLOP/s.

    Raises CheckFailed if the rate is under HEALTHY_SHARE of the data sheet's, or if heat or the power supply slows the
    GPU.
    """
    a, b = torch.randn(2, 4096, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(20):
        a @ b
    us = sample(lambda: a @ b, 20)
    tflops = 2 * 4096**3 / us / 1e6
    state = under_load(lambda: a @ b, us) or {}
    if reasons := HARMFUL & set(state.get("throttle") or ()):
        raise CheckFailed(
            f"{gpu.name} is slowed by {', '.join(sorted(reasons))} at {state['temperature_c']} C and "
            f"{state['sm_mhz']} MHz; nothing was stored: let it cool, {_REMEDY}"
        )
    if tflops < HEALTHY_SHARE * gpu.bf16_tflops:
        raise CheckFailed(
            f"{gpu.name} reaches {tflops:.0f} bf16 TFLOP/s: expected {HEALTHY_SHARE * gpu.bf16_tflops:.0f} or more; "
            f"nothing was stored: close other programs, let it cool, {_REMEDY}"
        )
    return tflops
