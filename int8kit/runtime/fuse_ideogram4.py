"""The fused forward in place of the stock one, for `Ideogram4Transformer2DModel` in other people's pipelines.

    undo = fusion(model, gpu)      model(...) has the stock signature and result, up to rounding

The model's modules, names, state dict and adapters stay as they are. The work of a prompt is kept while a pipeline
passes the same tensors at each step. Where the fused forward cannot serve, the stock forward runs: see `why_stock`.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_ideogram4 import Ideogram4AttnProcessor, Ideogram4Transformer2DModel
from diffusers.utils import apply_lora_scale
from torch._subclasses.fake_tensor import FakeTensor

from int8kit.database import store
from int8kit.runtime import packed_rows, tied_weights
from int8kit.runtime.conditioning import Prompt
from int8kit.runtime.fuse import NotFused, Undo
from int8kit.runtime.fused_ideogram4 import FusedIdeogram4

QUIET = "quiet"
"""A reason without a warning: the caller asked for the stock forward's own behaviour."""


def fusion(model: Any, gpu: str | None = None) -> Undo | None:
    """Let `model` run by the fused forward -> the function that undoes it; None for a model with a forward of its own.

    gpu: alias of the GPU whose database serves; None: the present one. Raises UnknownName for an unknown alias.
    """
    if type(model).forward is not Ideogram4Transformer2DModel.forward or "_diffusers_hook" in vars(model):
        return None
    place = "_old_forward" if "_hf_hook" in vars(model) else "forward"  # accelerate keeps the model's own there
    installed = FusedForward(model, gpu)
    setattr(model, place, installed.forward)
    hooks = [layer.feed_forward.register_state_dict_post_hook(_contiguous) for layer in model.layers]
    reference = weakref.ref(model)

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        if (mine := reference()) is not None:
            _remove(mine)
            for layer in mine.layers:
                tied_weights.part(list(layer.feed_forward.modules()))

    return undo


def _remove(model: Any) -> None:
    """Put the stock forward back, also where accelerate has added or removed its hook since."""
    for place in ("forward", "_old_forward"):
        if isinstance(getattr(vars(model).get(place), "__self__", None), FusedForward):
            if place == "forward":
                del model.forward
            else:
                model._old_forward = type(model).forward.__get__(model)


class FusedForward:
    """The stock signature over `FusedIdeogram4`, with the prompt of the last call."""

    def __init__(self, model: Any, gpu: str | None) -> None:
        self.gpu = gpu
        self.fused = FusedIdeogram4(model, plans=None if gpu is None else store.load_plans(gpu))
        self._prompt: tuple[Any, Prompt] | None = None
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"gpu": self.gpu, "model": self.fused.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"], state["gpu"])  # type: ignore[misc]

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        segment_ids: torch.Tensor,
        indicator: torch.Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The stock model's forward. Rows that are no image rows are zero; the stock model fills them with noise."""
        model = self.fused.model
        reason = why_stock(model, hidden_states, timestep, attention_kwargs)
        if reason is not None:
            if reason != QUIET and reason not in self._warned:
                self._warned.add(reason)
                warnings.warn(f"{type(model).__name__} runs unfused: {reason}", NotFused, stacklevel=2)
            return type(model).forward(
                model, hidden_states, timestep, encoder_hidden_states, position_ids, segment_ids, indicator,
                attention_kwargs=attention_kwargs, return_dict=return_dict,
            )  # fmt: skip
        inputs = encoder_hidden_states, position_ids, segment_ids, indicator
        out = _with_lora_scale(
            model, call=lambda: self._velocity(hidden_states, timestep, *inputs), attention_kwargs=attention_kwargs
        )
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def _velocity(self, hidden_states: torch.Tensor, timestep: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        prompt = self._prompt_of(*inputs)
        rows = prompt.rows
        places = rows.places[rows.images]
        if len(timestep) > 1 and bool((timestep == timestep[0]).all()):
            timestep = timestep[:1]
        latents = hidden_states.flatten(0, 1)[places]
        velocity = self.fused.velocity(latents, prompt, self.fused.modulation(timestep))
        out = hidden_states.new_zeros(hidden_states.shape, dtype=velocity.dtype)
        out.flatten(0, 1)[places] = velocity
        return out

    def _prompt_of(
        self, features: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor, indicator: torch.Tensor
    ) -> Prompt:
        """The prompt of these tensors, kept from the last call if they and the text projection are unchanged."""
        model = self.fused.model
        weights = *model.llm_cond_proj.parameters(), *model.llm_cond_norm.parameters(), *model.llm_cond_proj.buffers()
        tensors = features, positions, segments, indicator, *weights, model.embed_image_indicator.weight
        kept = _Unchanged.of(tensors)
        if self._prompt is not None and kept is not None and self._prompt[0].still(tensors):
            return self._prompt[1]
        rows = packed_rows.pack(segments, indicator)
        prompt = self.fused.prompt(
            features.flatten(0, 1)[rows.places[rows.texts]], positions.flatten(0, 1)[rows.places], rows
        )
        has_adapter = hasattr(model.llm_cond_proj, "base_layer")  # its scale changes without a trace in a tensor
        self._prompt = None if kept is None or has_adapter else (kept, prompt)
        return prompt


class _Unchanged:
    """Tensors as they were: the same objects, memory and version."""

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self._was = [(weakref.ref(t), t.data_ptr(), t._version) for t in tensors]

    @classmethod
    def of(cls, tensors: tuple[torch.Tensor, ...]) -> _Unchanged | None:
        """None if one of them counts no versions, as tensors of inference mode."""
        return None if any(t.is_inference() for t in tensors) else cls(tensors)

    def still(self, tensors: tuple[torch.Tensor, ...]) -> bool:
        """Whether these are the same tensors with the same values."""
        return len(tensors) == len(self._was) and all(
            ref() is t and memory == t.data_ptr() and version == t._version
            for t, (ref, memory, version) in zip(tensors, self._was, strict=True)
        )


def why_stock(
    model: Any, hidden_states: torch.Tensor, timestep: torch.Tensor, attention_kwargs: dict[str, Any] | None
) -> str | None:
    """The reason why the stock forward has to run, or None. QUIET: the caller knows it."""
    if torch.compiler.is_compiling() or isinstance(hidden_states, FakeTensor) or hidden_states.is_meta:
        return QUIET
    if torch.is_grad_enabled() and (hidden_states.requires_grad or any(p.requires_grad for p in model.parameters())):
        return QUIET
    if torch.is_autocast_enabled(hidden_states.device.type):
        return "autocast is on; call it in the model's own dtype"
    if timestep.dim() != 1:
        return "each token has its own timestep"
    if set(attention_kwargs or ()) - {"scale"}:
        return "attention_kwargs has arguments for an attention processor"
    for name, module in model.named_modules():
        if module is not model and (
            module._forward_hooks
            or module._forward_pre_hooks
            or hasattr(module, "_hf_hook")
            or getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
        ):
            return f"{name} has a hook, of an offload or of a cache"
    for layer in model.layers:
        processor = layer.attention.processor
        if (
            type(processor) is not Ideogram4AttnProcessor
            or processor._attention_backend is not None
            or processor._parallel_config is not None
        ):
            return "its attention has another processor or back end"
    return None


@apply_lora_scale("attention_kwargs")  # type: ignore[untyped-decorator]
def _with_lora_scale(
    model: Any, *, call: Callable[[], torch.Tensor], attention_kwargs: dict[str, Any] | None
) -> torch.Tensor:
    """The result of `call` while the model's LoRAs have the scale that `attention_kwargs` names."""
    return call()


def _contiguous(module: torch.nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Give a state dict weights of its own in place of the rows that two linears have in turn."""
    for name, tensor in state.items():
        if name.startswith(prefix) and isinstance(tensor, torch.Tensor) and not tensor.is_contiguous():
            state[name] = tensor.detach().contiguous()
