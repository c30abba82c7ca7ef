"""Ideogram 4 from diffusers' `Ideogram4Pipeline`: loading, prompts, the linears of a variant, and decoding.

    pipe = load(model)                                  the stock pipeline, on the CPU
    features = [encode(pipe, prompt, device), ...]      text features of each prompt
    parts = prepare(pipe, variant, repairs, ...)        both transformers on the device, with their fused forwards
    images = decode(pipe, latents, height, width)

Memory: the text encoder (16 GB in bf16) and the two INT8 transformers (20 GB) are never on the GPU together. The
prompts are encoded first, then the encoder returns to the CPU.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import Ideogram4Pipeline

from int8kit import models
from int8kit.errors import CheckFailed, FileError, InputError
from int8kit.layers import Int8Linear
from int8kit.lookup import Plan
from int8kit.models import PATCH
from int8kit.runtime import variants
from int8kit.runtime.fused_ideogram4 import FusedIdeogram4
from int8kit.runtime.repairs import Repairs
from int8kit.spec import GemmShape

MAX_TEXT_TOKENS = models.STOCK_SLOTS
BRANCHES = {"cond": "transformer", "uncond": "unconditional_transformer"}


def load(model: str) -> Any:
    """The stock pipeline of `model`: "tiny", a local folder, or a hub id.

    Raises UnknownName, InputError or FileError.
    """
    if model == models.TINY:
        return models.tiny_pipeline()
    models.check_pipeline(model)
    try:
        return Ideogram4Pipeline.from_pretrained(model, dtype=torch.bfloat16)
    except Exception as error:  # the hub, safetensors and diffusers each raise their own types
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise FileError(
            f"cannot load {model!r} as an Ideogram4Pipeline ({textwrap.shorten(reason, 160)}); expected tiny, a "
            "local folder in diffusers' layout, or, with a network, a hub id that `hf auth login` gives you access to"
        ) from None


def count_tokens(pipe: Any, prompt: str) -> int:
    """Number of tokens of the prompt in its chat template. Raises InputError beyond MAX_TEXT_TOKENS."""
    messages = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
    text = pipe.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    tokens = len(pipe.tokenizer(text, add_special_tokens=False)["input_ids"])
    if tokens > MAX_TEXT_TOKENS:
        raise InputError(f"the prompt has {tokens} tokens; expected at most {MAX_TEXT_TOKENS}; shorten it")
    return tokens


@torch.no_grad()
def encode(pipe: Any, prompts: Sequence[str], device: torch.device) -> tuple[torch.Tensor, ...]:
    """The text features [tokens, F] of each prompt, in the transformer's dtype. Returns the encoder to the CPU.

    Each prompt is encoded by itself, so that its features do not depend on the others.
    """
    pipe.text_encoder.to(device)
    made: dict[str, torch.Tensor] = {}
    for prompt in prompts:
        if prompt not in made:
            tokens = count_tokens(pipe, prompt)
            features = Ideogram4Pipeline.encode_prompt(pipe, prompt, 0, 0, tokens, device)[0]
            made[prompt] = features[0].to(pipe.transformer.dtype)
    pipe.text_encoder.to("cpu")
    return tuple(made[prompt] for prompt in prompts)


def prepare(
    pipe: Any,
    variant: str,
    repairs: Repairs,
    plans: Callable[[int, int], Plan],
    device: torch.device,
    *,
    compiled: bool = False,
) -> tuple[FusedIdeogram4, FusedIdeogram4]:
    """Give both transformers the linears of `variant`, and move them and the VAE to `device`.

    plans: the plan of a weight [n, k]. Returns the forwards of the conditional and the unconditional branch.
    """
    quantizes = models.MODELS["ideogram4"].quantizes
    made = []
    for part in BRANCHES.values():
        transformer = getattr(pipe, part)
        fast = compiled or device.type == "cuda"  # a chain of eager kernels quantizes the rows of fp8 otherwise
        variants.convert(transformer, variant, quantizes, plans, device, compiled=fast)
        transformer.to(device)
        made.append(FusedIdeogram4(transformer, repairs, plans=plans, compiled=compiled))
    pipe.vae.to(device)
    cond, uncond = made
    return cond, uncond


def gemms(branch: FusedIdeogram4, rows: int, texts: int) -> dict[GemmShape, int]:
    """The INT8 GEMMs of one forward and the number of each. rows: of the sequence; texts: of the text projection."""
    joins = branch.is_fused and branch.repairs.joined
    joined = {"to_q": 3, "to_k": 0, "to_v": 0, "w1": 2, "w3": 0} if joins else {}
    found: dict[GemmShape, int] = {}
    for name, layer in branch.model.named_modules():
        factor = joined.get(name.rpartition(".")[2], 1)
        if not isinstance(layer, Int8Linear) or not factor:
            continue
        m = texts if name == "llm_cond_proj" else rows
        if m:
            shape = GemmShape(m, layer.out_features * factor, layer.in_features)
            found[shape] = found.get(shape, 0) + 1
    return found


@torch.no_grad()
def decode(pipe: Any, latents: torch.Tensor, height: int, width: int, output_type: str = "pil") -> list[Any]:
    """The images of latents [B, T, C], one at a time: each needs much memory, and none depends on the others.

    Raises CheckFailed for an image with a value that is not finite.
    """
    vae, patch = pipe.vae, pipe.patch_size
    mean = vae.bn.running_mean.view(1, 1, -1).to(latents)
    std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).view(1, 1, -1).to(latents)
    rows, columns = height // PATCH, width // PATCH
    images = []
    for one in latents.split(1):
        z = (one * std + mean).view(1, rows, columns, patch, patch, -1)
        z = z.permute(0, 5, 1, 3, 2, 4).reshape(1, -1, rows * patch, columns * patch)
        decoded = vae.decode(z.to(vae.dtype), return_dict=False)[0]
        if not bool(decoded.isfinite().all()):
            raise CheckFailed(
                "the decoded image is not finite; the weights of the VAE are damaged, or a value overflows"
            )
        images += list(pipe.image_processor.postprocess(decoded.float(), output_type=output_type))
    return images
