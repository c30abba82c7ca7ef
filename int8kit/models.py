"""Models by name: how to build one without weights, and its inputs for a size and a prompt length.

    get("ideogram4").build()                                  the transformer, full size, on fake tensors
    get("ideogram4").inputs(Case(1024, 1024, text_tokens=200))  its forward's keyword arguments, likewise
    tiny_pipeline()                                           a whole pipeline of random weights, for a CPU

Ideogram 4 packs one sequence `[pad | text | image]` of `slots + (height / 16) * (width / 16)` tokens for its
conditional branch and of the image tokens alone for the unconditional one. The stock pipeline pads the text to 2048
slots; int8kit runs it tight, slots = text_tokens.

torch, diffusers and transformers are imported when a function needs them: `import int8kit.models` needs none.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8kit.errors import FileError, InputError, UnknownName

if TYPE_CHECKING:
    import torch

BRANCHES = ("cond", "uncond")
PATCH = 16  # pixels of an image token's side: VAE factor 8, patches of 2 x 2
IMAGE_POSITION_OFFSET = 65536
TEXT, IMAGE, PAD = 3, 2, 0  # the indicator's values
TINY = "tiny"


@dataclass(frozen=True)
class Case:
    """One forward of a model: the image in pixels, how many prompts at once, and the branch of guidance.

    Raises InputError for a size that is no multiple of 16, or fewer text slots than text tokens.
    """

    height: int
    width: int
    batch: int = 1
    text_tokens: int = 200
    slots: int | None = None  # text positions in the sequence; None: as many as there are tokens
    branch: str = "cond"

    def __post_init__(self) -> None:
        for name, pixels in (("height", self.height), ("width", self.width)):
            if pixels < PATCH or pixels % PATCH:
                low = max(pixels // PATCH, 1) * PATCH
                raise InputError(
                    f"{name} {pixels}: expected a positive multiple of {PATCH}; the nearest are {low} and {low + PATCH}"
                )
        if self.batch < 1 or self.text_tokens < 1:
            raise InputError(f"batch {self.batch}, text tokens {self.text_tokens}: both must be at least 1")
        if self.branch not in BRANCHES:
            raise UnknownName("branch", self.branch, BRANCHES)
        if self.slots is not None and self.slots < self.text_tokens:
            raise InputError(f"{self.slots} text slots: expected {self.text_tokens} (the text tokens) or more")

    @property
    def text_slots(self) -> int:
        """Text positions of the packed sequence: none in the unconditional branch."""
        if self.branch == "uncond":
            return 0
        return self.text_tokens if self.slots is None else self.slots

    @property
    def image_tokens(self) -> int:
        """Image positions of the packed sequence."""
        return (self.height // PATCH) * (self.width // PATCH)


@dataclass(frozen=True)
class Model:
    """How to build a transformer without weights, what to feed it, and which of its linears stay as they are."""

    name: str
    build: Callable[[], torch.nn.Module]
    inputs: Callable[[torch.nn.Module, Case], dict[str, Any]]
    keep: tuple[str, ...]  # linears with one of these in their name are not quantized

    def quantizes(self, layer: str) -> bool:
        """True if the linear of this name is to run in int8."""
        return not any(part in layer for part in self.keep)


def _ideogram4_inputs(transformer: torch.nn.Module, case: Case) -> dict[str, Any]:
    import torch

    slots, image = case.text_slots, case.image_tokens
    dtype = next(transformer.parameters()).dtype
    config: Any = transformer.config
    length = slots + image
    pad = slots - case.text_tokens if slots else 0

    indicator = torch.full((case.batch, length), IMAGE)
    indicator[:, :slots] = TEXT
    indicator[:, :pad] = PAD
    segments = torch.ones(case.batch, length, dtype=torch.long)
    segments[:, :pad] = -1
    positions = torch.zeros(case.batch, length, 3, dtype=torch.long)
    positions[:, pad:slots] = torch.arange(slots - pad)[:, None]
    tokens = torch.arange(image)
    rows, columns = tokens // (case.width // PATCH), tokens % (case.width // PATCH)
    positions[:, slots:] = torch.stack([torch.zeros_like(tokens), rows, columns], dim=1) + IMAGE_POSITION_OFFSET
    features = torch.zeros(case.batch, length, config.llm_features_dim, dtype=dtype)
    features[:, pad:slots].normal_()
    return {
        "hidden_states": torch.randn(case.batch, length, config.in_channels, dtype=dtype),
        "timestep": torch.full((case.batch,), 0.5, dtype=dtype),
        "encoder_hidden_states": features,
        "position_ids": positions,
        "segment_ids": segments,
        "indicator": indicator,
    }


def _ideogram4(name: str, **config: Any) -> Model:
    def build() -> torch.nn.Module:
        import torch
        from diffusers import Ideogram4Transformer2DModel

        with _default_dtype(torch.bfloat16):
            module: torch.nn.Module = Ideogram4Transformer2DModel(**config).eval()
        return module

    # adaLN, time and head see one row a prompt or 128 channels: nothing to gain, and quality hangs on them.
    keep = ("adaln", "t_embedding", "input_proj", "final_layer")
    return Model(name, build, _ideogram4_inputs, keep)


TINY_TRANSFORMER: dict[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 256,
    "intermediate_size": 1024,
    "adaln_dim": 32,
    "llm_features_dim": 13 * 32,
}

MODELS: dict[str, Model] = {
    "ideogram4": _ideogram4("ideogram4"),
    TINY: _ideogram4(TINY, **TINY_TRANSFORMER),
}


def get(name: str) -> Model:
    """The model of this name, or of a local folder in diffusers' layout. Raises UnknownName or FileError."""
    if name in MODELS:
        return MODELS[name]
    folder = Path(name)
    if name and folder.is_dir():
        return _from_folder(folder)
    raise UnknownName("model", name, MODELS, "or name a local folder that holds transformer/config.json")


def _from_folder(folder: Path) -> Model:
    path = folder / "transformer" / "config.json"
    path = path if path.exists() else folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise FileError(
            f"{str(folder)!r} holds no readable transformer/config.json; name a folder in diffusers' layout"
        ) from None
    if kind != "Ideogram4Transformer2DModel":
        raise UnknownName("transformer class", kind, ["Ideogram4Transformer2DModel"], "see CONTRIBUTING.md to add one")
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    return _ideogram4(folder.resolve().name, **settings)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tiny_pipeline(seed: int = 0) -> Any:
    """A whole `Ideogram4Pipeline` with random weights: the real classes, small, built without any download.

    The tokenizer is a byte-level one, so a prompt has about as many tokens as bytes. Head size, RoPE sections and VAE
    factor are the real ones, and K = 416 of the text projection is no multiple of any tile.
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
    with torch.random.fork_rng(devices=[]), _default_dtype(torch.bfloat16):
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
