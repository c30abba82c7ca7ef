"""Ideogram 4 on INT8 linears: diffusers' `Ideogram4Pipeline`, placed so that it fits one GPU with 24 GB.

    load(model)         -> the stock pipeline, on the CPU
    prepare(pipe, ...)  -> an Int8Pipeline with an encoded prompt and two INT8 transformers, on the device

Memory: the text encoder (16 GB in bf16) and the two INT8 transformers (20 GB) are never on the GPU together. The prompt
is encoded first, then the encoder returns to the CPU.

Text slots: one per token of the prompt. The stock pipeline has 2048 and masks the unused ones. At 1024 px
that takes half as long again.

Attention mask: without padding, the mask of one prompt is true everywhere, so it is removed. Torch's flash attention,
which accepts no mask, then runs on consumer GPUs.
"""

from __future__ import annotations

import textwrap
from typing import Any

import torch
from diffusers import Ideogram4Pipeline
from diffusers.models.transformers.transformer_ideogram4 import Ideogram4Attention, Ideogram4AttnProcessor

from int8kit import models
from int8kit.database.database import Choice, Database
from int8kit.errors import FileError, InputError
from int8kit.lookup import Plan
from int8kit.models import PATCH
from int8kit.quantization import replace_linears
from int8kit.spec import GemmShape
from int8kit.toolchain import Toolchain

MAX_TEXT_TOKENS = 2048
BRANCHES = {"cond": "transformer", "uncond": "unconditional_transformer"}


class UnmaskedAttention(Ideogram4AttnProcessor):
    """Stock attention without its mask, for one prompt without padding, where the mask is true everywhere."""

    def __call__(self, attn: Any, hidden_states: Any, attention_mask: Any, image_rotary_emb: Any) -> Any:
        """Output of the stock processor without a mask; `attention_mask` is ignored."""
        return super().__call__(attn, hidden_states, None, image_rotary_emb)


class Int8Pipeline(Ideogram4Pipeline):
    """Stock pipeline with an encoded prompt. It runs on `run_device`, regardless of the devices of its parts."""

    encoded: tuple[torch.Tensor, ...]
    run_device: torch.device

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """The prompt as encoded by `prepare`; all arguments are ignored."""
        return self.encoded

    @property
    def _execution_device(self) -> torch.device:
        return self.run_device


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
    """Number of tokens of the prompt in its chat template. Raises InputError beyond 2048."""
    messages = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
    text = pipe.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    tokens = len(pipe.tokenizer(text, add_special_tokens=False)["input_ids"])
    if tokens > MAX_TEXT_TOKENS:
        raise InputError(f"the prompt has {tokens} tokens; expected at most {MAX_TEXT_TOKENS}; shorten it")
    return tokens


def unmask(transformer: torch.nn.Module) -> None:
    """Make every attention of `transformer` ignore its mask."""
    for module in transformer.modules():
        if isinstance(module, Ideogram4Attention):
            module.set_processor(UnmaskedAttention())


def prepare(
    pipe: Any,
    prompt: str,
    case: models.Case,
    database: Database,
    device: torch.device,
    toolchain: Toolchain,
) -> tuple[Int8Pipeline, list[tuple[Choice, int]]]:
    """Encode the prompt, quantize both transformers, and move them and the VAE to `device`.

    Returns the pipeline and, for each GEMM shape of a step, the choice from the database and the number of layers of
    that shape. The database is not used after this call.
    """
    int8 = Int8Pipeline(**pipe.components)
    int8.run_device = device
    encoder = int8.text_encoder.to(device)
    grid = case.height // PATCH, case.width // PATCH
    with torch.no_grad():
        encoded = Ideogram4Pipeline.encode_prompt(int8, prompt, *grid, case.text_slots, device)
    # Stock keeps float32 features of both branches through the loop, beside bf16 copies: 1.8 GB at 1024 px.
    int8.encoded = (encoded[0].to(int8.transformer.dtype), *encoded[1:])
    encoder.to("cpu")

    model = models.MODELS["ideogram4"]
    rows = {"cond": case.batch * (case.text_slots + case.image_tokens), "uncond": case.batch * case.image_tokens}
    plans: dict[tuple[int, int], Plan] = {}

    def plan(n: int, k: int) -> Plan:
        if (n, k) not in plans:
            plans[n, k] = database.plan(n, k, toolchain)
        return plans[n, k]

    layers: dict[GemmShape, int] = {}
    for branch, part in BRANCHES.items():
        transformer = getattr(int8, part)
        for layer in replace_linears(transformer, model.quantizes, plan, device).values():
            shape = GemmShape(rows[branch], layer.out_features, layer.in_features)
            layers[shape] = layers.get(shape, 0) + 1
        unmask(transformer)
        transformer.to(device)
    int8.vae.to(device)
    return int8, [(database.resolve(shape, toolchain), count) for shape, count in sorted(layers.items())]
