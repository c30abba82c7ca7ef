"""A health check of the GPU before anything is timed."""

from __future__ import annotations

import torch

from int8kit.errors import CheckFailed
from int8kit.gpus import Gpu
from int8kit.timing.interleave import _sample, under_load

HEALTHY_SHARE = 0.5  # of the data sheet's dense bf16 rate; healthy cards reach 0.75 to 0.92 of it

HARMFUL = {"hardware slowdown", "software thermal", "hardware thermal", "power brake"}  # a power cap is everyday life


def check_health(gpu: Gpu) -> float:
    """TFLOP/s of a 4096^3 bf16 product on this card.

    Raises CheckFailed if the card is far under its rate, or slowed by heat or its power supply.
    """
    a, b = torch.randn(2, 4096, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(20):
        a @ b
    us = _sample(lambda: a @ b, 20)
    tflops = 2 * 4096**3 / us / 1e6
    state = under_load(lambda: a @ b, us) or {}
    if held := HARMFUL & set(state.get("throttle") or ()):
        raise CheckFailed(
            f"{gpu.name} is held back by {', '.join(sorted(held))} at {state['temperature_c']} C and "
            f"{state['sm_mhz']} MHz; nothing was stored: let it cool, see `nvidia-smi -q -d PERFORMANCE`, try again"
        )
    if tflops < HEALTHY_SHARE * gpu.bf16_tflops:
        raise CheckFailed(
            f"{gpu.name} makes {tflops:.0f} bf16 TFLOP/s; healthy is {HEALTHY_SHARE * gpu.bf16_tflops:.0f} or more; "
            "nothing was stored: close other programs, let it cool, and see `nvidia-smi -q -d PERFORMANCE`"
        )
    return tflops
