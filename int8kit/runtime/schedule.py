"""The steps of a generation: noise levels and guidance, as in diffusers' pipeline of Ideogram 4.

PRESETS["quality"].schedule(height, width, steps)  ->  Schedule(..., guidance=(7.0, ...))
schedule.scheduler(pipe, device)                   ->  diffusers' scheduler before its first step
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Schedule:
    """Noise levels and guidance of each step, for one image size."""

    height: int  # pixels
    width: int
    guidance: tuple[float, ...]  # one scale for each step
    mu: float  # mean and standard deviation of the noise levels' logits
    std: float

    def scheduler(self, pipe: Any, device: torch.device) -> Any:
        """A scheduler of the pipeline's kind before its first step, with the timesteps that the stock loop sets."""
        from diffusers.pipelines.ideogram4 import pipeline_ideogram4 as stock

        mu = stock._resolution_aware_mu(self.height, self.width, self.mu)
        sigmas = stock._logit_normal_sigmas(len(self.guidance), mu, std=self.std, device=device)
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        scheduler.set_timesteps(sigmas=sigmas.tolist(), device=device)
        return scheduler


@dataclass(frozen=True)
class Preset:
    """A denoising schedule recommended by the model's authors."""

    steps: int
    mu: float  # mean and standard deviation of the noise levels' logits
    std: float
    polish: int  # last steps, at guidance 3; the others have guidance 7

    def guidance(self, steps: int) -> list[float]:
        """Guidance scale of each step. The share of polish steps is kept; there is at least one if steps > 1."""
        polish = min(steps - 1, math.ceil(steps * self.polish / self.steps))
        return [7.0] * (steps - polish) + [3.0] * polish

    def schedule(self, height: int, width: int, steps: int, guidance: float | None = None) -> Schedule:
        """The schedule for an image size in pixels. guidance: one scale for all steps; None: the preset's."""
        scales = self.guidance(steps) if guidance is None else [guidance] * steps
        return Schedule(height, width, tuple(scales), self.mu, self.std)


PRESETS = {"quality": Preset(48, 0.0, 1.5, 3), "default": Preset(20, 0.0, 1.75, 2), "turbo": Preset(12, 0.5, 1.75, 1)}
