"""The denoising loop of Ideogram 4: both branches of the guidance, and the Euler steps between them.

    scene = Scene(features, images_per_prompt, height, width)     encoded prompts, one image size
    branches = FusedBranches(cond, uncond, scene, times)          all that does not change between steps, once
    latents = denoise(branches, scheduler, noise, guidance)

A step is that of diffusers' pipeline: v = g cond + (1 - g) uncond and the scheduler's step, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from int8kit.models import PATCH
from int8kit.runtime import packed_rows
from int8kit.runtime.cuda_graph import Captured
from int8kit.runtime.fused_ideogram4 import FusedIdeogram4, Modulation, Prompt


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
    def samples(self) -> int:
        """B, the number of images."""
        return len(self.features) * self.images_per_prompt


class FusedBranches:
    """The branches by `FusedIdeogram4`. times [S]: the model's time at each step, in [0, 1].

    slots: text rows of each sample with the repair "trim-text" switched off. graphs: on a GPU, each branch becomes a
    CUDA graph at its second call, unless a repair is off that computes ahead of the steps.
    """

    def __init__(
        self,
        cond: FusedIdeogram4,
        uncond: FusedIdeogram4,
        scene: Scene,
        times: torch.Tensor,
        slots: int = 2048,
        *,
        graphs: bool = True,
    ) -> None:
        self.scene, self.times = scene, times
        self._slots = 0 if cond.repairs.trim_text else slots
        self._models = (cond, uncond)
        self._prompts = tuple(self._prompt(model) for model in self._models)
        self._ahead = tuple(self._modulation(model) for model in self._models)
        self.graphs = graphs and cond.device.type == "cuda" and self._is_ahead
        self._captured: dict[int, Captured | None] = {}  # None: after the first call of a branch
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None

    def velocities(self, latents: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Branches`."""
        return self.conditional(latents, step), self.unconditional(latents, step)

    def conditional(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """The velocity with the prompts, float32 [B, T, C]."""
        return self._velocity(0, latents, step)

    def unconditional(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """The velocity without the prompts, float32 [B, T, C]."""
        return self._velocity(1, latents, step)

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

    def _velocity(self, branch: int, latents: torch.Tensor, step: int) -> torch.Tensor:
        model, ahead = self._models[branch], self._ahead[branch]
        prompt = self._prompts[branch] if model.repairs.text_once else self._prompt(model)
        modulation = model.modulation(self.times[step : step + 1]) if ahead is None else ahead.at(step)

        def call(flat: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return model.velocity(flat, prompt, Modulation(table))

        velocity = self._run(branch, call, latents.flatten(0, 1), modulation.table)
        samples: torch.Tensor = velocity.float().unflatten(0, (len(latents), -1))
        return samples

    def _run(self, branch: int, call: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """`call(*tensors)`, by the graph of the branch from the second time on."""
        if not self.graphs:
            return call(*tensors)
        if branch not in self._captured:
            self._captured[branch] = None
            return call(*tensors)
        captured = self._captured[branch]
        if captured is None:
            try:
                captured = self._captured[branch] = Captured(call, tensors, self._pool)
            except RuntimeError:  # a linear of somebody else that waits for the GPU
                self.graphs = False
                return call(*tensors)
        return captured(*tensors)

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
    """The latents after all steps. latents: float32 [B, T, C] of noise. on_step: called after each step is queued.

    A step whose guidance is exactly 1 needs no unconditional branch, and runs none.
    """
    for step, (t, scale) in enumerate(zip(scheduler.timesteps, guidance, strict=True)):
        velocity = branches.conditional(latents, step)
        if scale != 1:
            weight = torch.tensor(scale, dtype=torch.float32, device=latents.device)
            velocity = weight * velocity + (1.0 - weight) * branches.unconditional(latents, step)
        latents = scheduler.step(-velocity, t, latents, return_dict=False)[0]
        on_step()
    return latents


def noise(scene: Scene, channels: int, seed: int, device: torch.device) -> torch.Tensor:
    """Noise [B, T, C] in float32. Sample i has the noise of seed + i, whatever the batch."""
    shape = math.prod(scene.grid), channels
    parts = []
    for sample in range(scene.samples):
        generator = torch.Generator(device).manual_seed(seed + sample)
        parts.append(torch.randn(shape, generator=generator, dtype=torch.float32, device=device))
    return torch.stack(parts)
