"""A forward pass of diffusers' `Ideogram4Transformer2DModel` with repairs, on the layers of the stock model.

    fused = FusedIdeogram4(transformer)
    prompt = fused.prompt(features, positions, rows)          once per prompt
    modulation = fused.modulation(timesteps)                  once for all steps
    velocity = fused.velocity(latents, prompt, modulation.at(step))

The layers are the stock model's, and are looked up at each call: other weights, adapters and devices take effect at
once. INT8 linears run in the chain of `int8_blocks`, all others in `float_blocks`. `repairs.Repairs` switches each
repair off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from int8kit.errors import InputError
from int8kit.runtime import attention, float_blocks, int8_blocks, joined
from int8kit.runtime.conditioning import Modulation, Prompt
from int8kit.runtime.joined import Plans
from int8kit.runtime.packed_rows import Rows
from int8kit.runtime.repairs import Repairs


class FusedIdeogram4:
    """The repaired forward of one stock transformer. See the module's docstring.

    plans: gives the plan of a joined weight [n, k]; None: the database of the present GPU. compiled: the float blocks
    run through torch.compile. Raises InputError for `compiled` with INT8 linears.
    """

    def __init__(
        self, model: Any, repairs: Repairs | None = None, *, plans: Plans = None, compiled: bool = False
    ) -> None:
        self.model, self.repairs, self.compiled, self._plans = model, repairs or Repairs(), compiled, plans
        if compiled and self.is_fused:
            raise InputError("compile: the fused INT8 blocks gain nothing from it; expected another variant")

    @property
    def is_fused(self) -> bool:
        """Whether the blocks run in int8kit's kernels."""
        layers = self.model.layers
        return self.repairs.fused_rows and any(joined.is_int8(part) for part in _linears(layers[0]))

    @property
    def can_be_captured(self) -> bool:
        """Whether the steps can become a CUDA graph: no hook and no linear of somebody else, which may wait for it."""
        for module in self.model.modules():
            hooks = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
            foreign = isinstance(module, torch.nn.Linear) and not _is_known(module)
            if hooks or foreign:
                return False
        return True

    @property
    def device(self) -> torch.device:
        """The device of the blocks."""
        device: torch.device = self.model.embed_image_indicator.weight.device
        return device

    @torch.no_grad()
    def prompt(self, features: torch.Tensor, positions: torch.Tensor, rows: Rows) -> Prompt:
        """The prompts of a batch. features: [texts, F] of the text rows in order; positions: [M, 3] of all rows."""
        model = self.model
        embedding = model.embed_image_indicator.weight
        hidden = embedding[:1].repeat(rows.count, 1)
        if len(rows.texts):
            _to(embedding.device, model.llm_cond_norm, model.llm_cond_proj)
            texts = model.llm_cond_proj(model.llm_cond_norm(features.to(embedding.dtype)))
            hidden[rows.texts] = texts + embedding[0]
        cos, sin = model.rotary_emb(positions[None])
        return Prompt(rows, hidden, cos[0].to(hidden.dtype), sin[0].to(hidden.dtype))

    @torch.no_grad()
    def modulation(self, timesteps: torch.Tensor) -> Modulation:
        """The modulation at `timesteps` [S], in [0, 1] and of the model's dtype."""
        model = self.model
        _to(model.embed_image_indicator.weight.device, *_modulators(model))
        given = torch.nn.functional.silu(model.adaln_proj(model.t_embedding(timesteps)))
        rows = []
        for layer in model.layers:
            scale, gate, ffn_scale, ffn_gate = layer.adaln_modulation(given).chunk(4, -1)
            rows += [scale, gate.tanh(), ffn_scale, ffn_gate.tanh()]
        rows.append(1.0 + model.final_layer.adaln_modulation(torch.nn.functional.silu(given)))
        return Modulation(torch.stack(rows, 1))

    def release(self) -> int:
        """Move the weights that a step does not need to the CPU -> their bytes.

        `prompt` and `modulation` bring them back.
        """
        model, freed = self.model, 0
        for module in (model.llm_cond_norm, model.llm_cond_proj, *_modulators(model)):
            tensors = [*module.parameters(), *module.buffers()]
            freed += sum(t.numel() * t.element_size() for t in tensors if t.is_cuda)
            module.to("cpu")
        return freed

    @torch.no_grad()
    def velocity(self, latents: torch.Tensor, prompt: Prompt, modulation: Modulation) -> torch.Tensor:
        """The velocity of the image rows: latents [images, C] in the order of `prompt.rows.images` -> [images, C]."""
        rows = prompt.rows
        if len(modulation.final) not in (1, rows.equal_parts):
            return self._by_sample(latents, prompt, modulation)
        model = self.model
        x = prompt.hidden.clone()
        x[rows.images] = model.input_proj(latents.to(x.dtype)) + model.embed_image_indicator.weight[1]
        with attention.backend(x.device):
            x = self._blocks(x, prompt, modulation)
        head = model.final_layer
        if not self.repairs.image_rows:
            out: torch.Tensor = head.linear(joined.scaled(head.norm_final(x), modulation.final))
            return out[rows.images]
        out = head.linear(joined.scaled(head.norm_final(x[rows.images]), modulation.final))
        return out

    def _blocks(self, x: torch.Tensor, prompt: Prompt, modulation: Modulation) -> torch.Tensor:
        layers, repairs = list(self.model.layers), self.repairs
        masked = 0 if repairs.no_mask else prompt.rows.equal_parts
        if self.is_fused:
            return int8_blocks.run(layers, x, prompt, modulation, plans=self._plans, masked=masked, join=repairs.joined)
        return float_blocks.run(
            layers, x, prompt, modulation, masked=masked, join=repairs.joined, compiled=self.compiled
        )

    def _by_sample(self, latents: torch.Tensor, prompt: Prompt, modulation: Modulation) -> torch.Tensor:
        """`velocity` of samples of several lengths at several timesteps: one run after the other."""
        rows, out, start = prompt.rows, torch.empty_like(latents), 0
        for length, sample in zip(rows.lengths, rows.samples, strict=True):
            inside = (rows.images >= start) & (rows.images < start + length)
            part = slice(start, start + length)
            own = Rows(rows.places[part], rows.images[inside] - start, rows.texts[:0], (length,), (0,))
            one = replace(prompt, rows=own, hidden=prompt.hidden[part], cos=prompt.cos[part], sin=prompt.sin[part])
            out[inside] = self.velocity(latents[inside], one, modulation.at(sample))
            start += length
        return out


def _is_known(linear: torch.nn.Linear) -> bool:
    return type(linear) is torch.nn.Linear or type(linear).__module__.startswith("int8kit.")


def _linears(layer: Any) -> Iterator[torch.nn.Module]:
    """The linears of a block that the fused kernels can serve."""
    yield from (layer.attention.to_q, layer.attention.to_k, layer.attention.to_v, layer.attention.to_out[0])
    yield from (layer.feed_forward.w1, layer.feed_forward.w2, layer.feed_forward.w3)


def _modulators(model: Any) -> list[torch.nn.Module]:
    """The modules that see timesteps alone."""
    each = [layer.adaln_modulation for layer in model.layers]
    return [model.t_embedding, model.adaln_proj, *each, model.final_layer.adaln_modulation]


def _to(device: torch.device, *modules: torch.nn.Module) -> None:
    """Move modules that `release` had moved away back to `device`."""
    for module in modules:
        if any(parameter.device != device for parameter in module.parameters()):
            module.to(device)
