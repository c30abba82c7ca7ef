"""A complete Ideogram 4 pipeline of the real classes, so small that a CPU runs it. Its weights are random."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TINY_TRANSFORMER: dict[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 256,
    "intermediate_size": 1024,
    "adaln_dim": 32,
    "llm_features_dim": 13 * 32,
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A context in which new tensors have this dtype."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tiny_pipeline(seed: int = 0) -> Any:
    """A small `Ideogram4Pipeline` of the real classes with random weights, built without a download.

    The tokenizer works on bytes, so a prompt has about as many tokens as bytes. Head size, RoPE sections and VAE factor
    equal the full model's. K = 416 of the text projection is not a multiple of any tile.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Ideogram4Pipeline,
        Ideogram4Transformer2DModel,
    )
    from transformers import Qwen3VLConfig, Qwen3VLModel

    tokenizer = _byte_tokenizer()
    width = TINY_TRANSFORMER["llm_features_dim"] // 13
    text = {
        "hidden_size": width,
        "num_hidden_layers": 36,  # the pipeline taps layers up to the 36th
        "num_attention_heads": 4,
        "head_dim": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": len(tokenizer),
    }
    vision = {
        "hidden_size": 16,
        "depth": 1,
        "num_heads": 2,
        "intermediate_size": 32,
        "patch_size": 16,
        "out_hidden_size": width,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    with torch.random.fork_rng(devices=[]), default_dtype(torch.bfloat16):
        torch.manual_seed(seed)
        parts = {
            "text_encoder": Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)),
            "vae": AutoencoderKLFlux2(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4),
            "transformer": Ideogram4Transformer2DModel(**TINY_TRANSFORMER),
            "unconditional_transformer": Ideogram4Transformer2DModel(**TINY_TRANSFORMER),
        }
    return Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), tokenizer=tokenizer, **{k: m.eval() for k, m in parts.items()}
    )


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    level = pre_tokenizers.ByteLevel
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(sorted(level.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = level(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    return fast
