"""The stock transformers of an Ideogram4Pipeline, called one step at a time as the loop of diffusers calls them.

    schedule = PRESETS["quality"].schedule(256, 256, steps=4)
    branches = StockBranches(pipe, "a red bicycle", schedule, slots=2048, device=torch.device("cpu"))
    conditional, unconditional = branches.velocities(latents, step=0)

The pipeline's own call hides its velocities. The velocities here have the same bits.
"""

from __future__ import annotations

from typing import Any

import torch

from int8kit.errors import InputError, ShapeError
from int8kit.models import PATCH
from int8kit.runtime import ideogram4
from int8kit.runtime.schedule import Schedule


def noise(pipe: Any, schedule: Schedule, seed: int, device: torch.device, batch: int = 1) -> torch.Tensor:
    """The stock pipeline's first latents [batch, image tokens, channels], float32, for a generator's seed."""
    made: torch.Tensor = pipe.prepare_latents(
        batch_size=batch,
        num_image_tokens=(schedule.height // PATCH) * (schedule.width // PATCH),
        latent_dim=pipe.transformer.config.in_channels,
        dtype=torch.float32,
        device=device,
        generator=torch.Generator(device).manual_seed(seed),
        latents=None,
    )
    return made


class StockBranches:
    """Both stock transformers with an encoded prompt.

    They move to the device. The text encoder works there too and returns to the CPU.
    """

    def __init__(
        self, pipe: Any, prompt: str | list[str], schedule: Schedule, slots: int, device: torch.device
    ) -> None:
        """slots: text positions of the conditional branch; the pipeline calls them max_sequence_length.

        Raises InputError for a prompt with more tokens than slots.
        """
        self._slots = slots
        self._branches = [getattr(pipe, part).to(device) for part in ideogram4.BRANCHES.values()]
        self._train_timesteps = pipe.scheduler.config.num_train_timesteps
        self._timesteps = schedule.scheduler(pipe, device).timesteps
        features, layout = _encoded(pipe, prompt, schedule, slots, device)
        conditional, unconditional = self._branches
        no_text = torch.zeros_like(features[:, slots:], dtype=unconditional.dtype)
        self._inputs = [
            {"encoder_hidden_states": features.to(conditional.dtype), **layout},
            {"encoder_hidden_states": no_text, **{name: one[:, slots:] for name, one in layout.items()}},
        ]

    def velocities(self, latents: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [B, T, C] in float32 before a step -> conditional and unconditional velocity, float32 [B, T, C].

        B is the number of prompts, T the number of image tokens. Raises ShapeError.
        """
        batch, tokens = self._inputs[1]["indicator"].shape
        if latents.dtype != torch.float32 or latents.ndim != 3 or latents.shape[:2] != (batch, tokens):
            raise ShapeError(
                f"latents {list(latents.shape)} in {latents.dtype}: expected [{batch}, {tokens}, C] in torch.float32"
            )
        conditional, unconditional = self._branches
        time = 1.0 - self._timesteps[step].float() / self._train_timesteps
        time = time.expand(batch).to(conditional.dtype)
        padding = latents.new_zeros(batch, self._slots, latents.shape[2])
        packed = torch.cat([padding, latents], dim=1).to(conditional.dtype)
        plain = latents.to(unconditional.dtype)
        with torch.no_grad():
            c = conditional(hidden_states=packed, timestep=time, return_dict=False, **self._inputs[0])[0]
            u = unconditional(hidden_states=plain, timestep=time, return_dict=False, **self._inputs[1])[0]
        return c[:, self._slots :].float(), u.float()


def _encoded(
    pipe: Any, prompt: str | list[str], schedule: Schedule, slots: int, device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Text features [B, slots + T, F] in float32, and the layout of the packed sequence. Raises InputError."""
    for one in [prompt] if isinstance(prompt, str) else prompt:
        if (tokens := ideogram4.count_tokens(pipe, one)) > slots:
            raise InputError(f"the prompt has {tokens} tokens; expected at most {slots}, the number of text slots")
    encoder = pipe.text_encoder.to(device)
    grid = schedule.height // PATCH, schedule.width // PATCH
    with torch.no_grad():
        features, *layout = pipe.encode_prompt(prompt, *grid, slots, device)
    encoder.to("cpu")
    return features, dict(zip(("position_ids", "segment_ids", "indicator"), layout, strict=True))
