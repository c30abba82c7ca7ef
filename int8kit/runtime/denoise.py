"""The denoising loop of Ideogram 4: both branches of the guidance, and the Euler steps between them.

    scene = Scene(features, images_per_prompt, height, width)     encoded prompts, one image size
    branches = FusedBranches(cond, uncond, scene, times)          all that does not change between steps, once
    latents = denoise(branches, scheduler, noise, guidance)

A step is that of diffusers' pipeline: v = g cond + (1 - g) uncond and the scheduler's step, in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from int8kit.errors import CheckFailed
from int8kit.models import PATCH, STOCK_SLOTS
from int8kit.runtime import packed_rows
from int8kit.runtime.conditioning import Modulation, Prompt
from int8kit.runtime.cuda_graph import Captured
from int8kit.runtime.fused_ideogram4 import FusedIdeogram4


class Branches(Protocol):
    """Both branches of the guidance, for given prompts and steps."""

    def velocities(self, latents: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The conditional and the unconditional velocity. All three are float32 [B, T, C]."""
        ...


@dataclass(frozen=True)
class Scene:
    """Prompts and an image size. features: for each prompt [its tokens, F]; height and width in pixels.

    Sample p * images_per_prompt + i is image i of prompt p.
    """

    features: tuple[torch.Tensor, ...]
    images_per_prompt: int
    height: int
    width: int

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width in image tokens."""
        return self.height // PATCH, self.width // PATCH

    @property
    def texts(self) -> tuple[int, ...]:
        """The number of text rows of each sample."""
        return tuple(len(one) for one in self.features for _ in range(self.images_per_prompt))

    @property
    def rows(self) -> int:
        """Text and image rows of all samples."""
        return sum(self.texts) + self.samples * math.prod(self.grid)

    @property
    def samples(self) -> int:
        """B, the number of images."""
        return len(self.features) * self.images_per_prompt


class FusedBranches:
    """The branches by `FusedIdeogram4`. times [S]: the model's time at each step, in [0, 1].

    slots: text rows of each sample with the repair "trim-text" switched off. graphs: on a GPU a step becomes a CUDA
    graph at its second call, unless a repair is off that computes ahead of the steps.
    """

    def __init__(
        self,
        cond: FusedIdeogram4,
        uncond: FusedIdeogram4,
        scene: Scene,
        times: torch.Tensor,
        slots: int = STOCK_SLOTS,
        *,
        graphs: bool = True,
    ) -> None:
        self.scene, self.times = scene, times
        self._slots = 0 if cond.repairs.trim_text else slots
        self._models = (cond, uncond)
        self._prompts = tuple(self._prompt(model) for model in self._models)
        self._ahead = tuple(self._modulation(model) for model in self._models)
        on_gpu = cond.device.type == "cuda"
        self.graphs = graphs and on_gpu and self._is_ahead and all(model.can_be_captured for model in self._models)
        self._captured: dict[tuple[int, ...], Captured | None] = {}

    def velocities(self, latents: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Branches`."""
        cond, uncond = self._velocities((0, 1), latents, step)
        return cond, uncond

    def conditional(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """The velocity with the prompts alone, float32 [B, T, C]."""
        [cond] = self._velocities((0,), latents, step)
        return cond

    def release(self) -> int:
        """Move weights that the steps do not need to the CPU -> their bytes.

        It moves none if a repair is off that computes ahead of the steps.
        """
        return sum(model.release() for model in self._models) if self._is_ahead else 0

    @property
    def _is_ahead(self) -> bool:
        """Whether all that does not depend on the latents is there before the steps."""
        repairs = self._models[0].repairs
        return repairs.text_once and repairs.modulation_ahead

    def _velocities(self, branches: tuple[int, ...], latents: torch.Tensor, step: int) -> list[torch.Tensor]:
        """The velocities of these branches: 0 with the prompts, 1 without."""
        given = [latents.flatten(0, 1), *(self._modulation_at(branch, step).table for branch in branches)]

        def call(flat: torch.Tensor, *tables: torch.Tensor) -> tuple[torch.Tensor, ...]:
            jobs = [functools.partial(self._velocity, *pair, flat) for pair in zip(branches, tables, strict=True)]
            return tuple(job() for job in jobs)

        found = self._run(branches, call, given)
        return [one.float().unflatten(0, (len(latents), -1)) for one in found]

    def _velocity(self, branch: int, table: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The velocity of a branch: latents [B T, C] in any float dtype -> [B T, C] in the model's."""
        model = self._models[branch]
        prompt = self._prompts[branch] if model.repairs.text_once else self._prompt(model)
        return model.velocity(latents, prompt, Modulation(table))

    def _modulation_at(self, branch: int, step: int) -> Modulation:
        ahead = self._ahead[branch]
        return self._models[branch].modulation(self.times[step : step + 1]) if ahead is None else ahead.at(step)

    def _run(
        self, key: tuple[int, ...], call: Callable[..., tuple[torch.Tensor, ...]], given: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """`call(*given)`; if graphs are wanted, by a graph from the second time on, for the first one compiles."""
        if self.graphs and key in self._captured:
            captured = self._captured[key] or Captured(call, given)
            self._captured[key] = captured
            return captured(*given)
        self._captured[key] = None
        return call(*given)

    def _prompt(self, model: FusedIdeogram4) -> Prompt:
        scene, device = self.scene, model.device
        if model is self._models[1]:
            texts, features = (0,) * scene.samples, scene.features[0][:0]
        else:
            texts = scene.texts
            features = torch.cat([one for one in scene.features for _ in range(scene.images_per_prompt)])
        slots = self._slots if any(texts) else 0
        rows = packed_rows.tight(texts, math.prod(scene.grid), device, slots)
        positions = packed_rows.positions(texts, *scene.grid, slots)
        return model.prompt(features.to(device), positions.to(device), rows)

    def _modulation(self, model: FusedIdeogram4) -> Modulation | None:
        return model.modulation(self.times) if model.repairs.modulation_ahead else None


def bytes_per_row(config: Any) -> int:
    """The activations of a step for each row of the sequence: some ten of the width and two of the feed-forward's."""
    width = config.attention_head_dim * config.num_attention_heads
    return int(2 * (10 * width + 2 * config.intermediate_size))


def times(scheduler: Any, dtype: torch.dtype) -> torch.Tensor:
    """The model's time at each step of a scheduler whose timesteps are set: 0 is noise, 1 the image."""
    made: torch.Tensor = (1.0 - scheduler.timesteps.float() / scheduler.config.num_train_timesteps).to(dtype)
    return made


def denoise(
    branches: FusedBranches,
    scheduler: Any,
    latents: torch.Tensor,
    guidance: Sequence[float],
    on_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """The latents after all steps. latents: float32 [B, T, C] of noise. on_step: called after each step.

    A step whose guidance is exactly 1 needs no unconditional branch, and runs none. Raises CheckFailed for a velocity
    that is not finite: its picture would be black.
    """
    weights = torch.tensor(guidance, dtype=torch.float32, device=latents.device)
    for step, (t, scale) in enumerate(zip(scheduler.timesteps, guidance, strict=True)):
        velocities: tuple[torch.Tensor, ...]
        if scale == 1:
            velocities = (branches.conditional(latents, step),)
            velocity = velocities[0]
        else:
            velocities = cond, uncond = branches.velocities(latents, step)
            velocity = guided(cond, uncond, weights[step])
        latents = scheduler.step(-velocity, t, latents, return_dict=False)[0]
        if not bool(latents.isfinite().all()):
            require_finite(*velocities, what=f"step {step + 1}")
            raise CheckFailed(f"step {step + 1}: the latents are not finite; name a smaller --guidance")
        on_step()
    return latents


def require_finite(*velocities: torch.Tensor, what: str) -> None:
    """Raise CheckFailed that names the branch whose velocity is not finite. velocities: conditional, unconditional."""
    for name, velocity in zip(("conditional", "unconditional"), velocities, strict=False):
        if not bool(velocity.isfinite().all()):
            raise CheckFailed(
                f"{what}: the {name} velocity is not finite; its weights are damaged, or a value overflows"
            )


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
    """The guided velocity of two float32 velocities, rounded as in diffusers' loop. weight: float32, or a number."""
    if not isinstance(weight, torch.Tensor):
        weight = torch.tensor(weight, dtype=torch.float32, device=conditional.device)
    return weight * conditional + (1.0 - weight) * unconditional


def noise(scene: Scene, channels: int, seed: int, device: torch.device) -> torch.Tensor:
    """Noise [B, T, C] in float32. Sample i has the noise of seed + i, whatever the batch."""
    shape = math.prod(scene.grid), channels
    parts = []
    for sample in range(scene.samples):
        generator = torch.Generator(device).manual_seed(seed + sample)
        parts.append(torch.randn(shape, generator=generator, dtype=torch.float32, device=device))
    return torch.stack(parts)
