"""Models by name: their modules without weights, and their inputs for an image size and a prompt length.

    model = get("ideogram4")
    module = model.build()                                            the full-size transformer
    inputs = model.inputs(module, Case(1024, 1024, text_tokens=200))  keyword arguments of its forward pass
    tiny_pipeline()                                                   a complete small pipeline of random weights

Under `FakeTensorMode`, `build` and `inputs` allocate no memory.

Ideogram 4 packs its tokens into one sequence `[pad | text | image]`. The conditional branch has
`slots + (height / 16) * (width / 16)` tokens, the unconditional branch only the image tokens. The stock pipeline pads
the text to 2048 slots; int8kit uses one slot per text token.

torch, diffusers and transformers are imported only by the functions that need them.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8kit import files
from int8kit.errors import FileError, InputError, Int8kitError, UnknownName
from int8kit.tiny_model import TINY_TRANSFORMER, default_dtype
from int8kit.tiny_model import tiny_pipeline as tiny_pipeline

if TYPE_CHECKING:
    import torch

BRANCHES = ("cond", "uncond")
PATCH = 16  # side of an image token in pixels: VAE factor 8, patches of 2 x 2
IMAGE_POSITION_OFFSET = 65536
TEXT, IMAGE, PAD = 3, 2, 0  # the indicator's values
STOCK_SLOTS = 2048
"""Text positions of the pipeline in diffusers, by default."""
TINY = "tiny"
HUB_ID = "ideogram-ai/ideogram-4-nf4-diffusers"  # weights of ideogram4


@dataclass(frozen=True)
class Case:
    """One forward pass of a model: image size in pixels, number of prompts, and branch of the guidance.

    Raises InputError for a size that is not a multiple of 16, and for fewer text slots than text tokens.
    """

    height: int
    width: int
    batch: int = 1
    text_tokens: int = 200
    slots: int | None = None  # text positions in the sequence; None: text_tokens
    branch: str = "cond"

    def __post_init__(self) -> None:
        for name, pixels in (("height", self.height), ("width", self.width)):
            if pixels < PATCH or pixels % PATCH:
                low = max(pixels // PATCH, 1) * PATCH
                raise InputError(
                    f"{name} {pixels}: expected a positive multiple of {PATCH}; the nearest are {low} and {low + PATCH}"
                )
        if self.batch < 1 or self.text_tokens < 1:
            raise InputError(f"batch {self.batch}, text tokens {self.text_tokens}: expected at least 1 of each")
        if self.branch not in BRANCHES:
            raise UnknownName("branch", self.branch, BRANCHES)
        if self.slots is not None and self.slots < self.text_tokens:
            raise InputError(
                f"{self.slots} text slots: expected at least {self.text_tokens}, the number of text tokens"
            )

    @property
    def text_slots(self) -> int:
        """Number of text positions in the packed sequence; 0 in the unconditional branch."""
        if self.branch == "uncond":
            return 0
        return self.text_tokens if self.slots is None else self.slots

    @property
    def image_tokens(self) -> int:
        """Number of image positions in the packed sequence."""
        return (self.height // PATCH) * (self.width // PATCH)


@dataclass(frozen=True)
class Join:
    """Linears that read the same input, and run as one GEMM: the ends of their names, and the GEMM's epilogue."""

    layers: tuple[str, ...]
    epilogue: str = "none"  # or "swiglu"


@dataclass(frozen=True)
class Model:
    """A transformer without weights, its inputs, and the linears that are not quantized."""

    name: str
    build: Callable[[], torch.nn.Module]
    inputs: Callable[[torch.nn.Module, Case], dict[str, Any]]
    unquantized: tuple[str, ...]  # linears whose name contains one of these are not quantized
    joins: tuple[Join, ...] = ()  # of the fused forward
    config: Path | None = None  # the user's file that describes the transformer

    def quantizes(self, layer: str) -> bool:
        """True if the linear with this name runs in INT8."""
        return not any(part in layer for part in self.unquantized)


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


IDEOGRAM4_JOINS = (
    Join(("attention.to_q", "attention.to_k", "attention.to_v")),
    Join(("feed_forward.w1", "feed_forward.w3"), "swiglu"),
)


def _ideogram4(name: str, settings: dict[str, Any], path: Path | None = None) -> Model:
    """An Ideogram 4 transformer. path: the user's file that the settings come from."""

    def build() -> torch.nn.Module:
        import torch
        from diffusers import Ideogram4Transformer2DModel

        accepted = settings if path is None else _accepted(settings, Ideogram4Transformer2DModel, path)
        with default_dtype(torch.bfloat16), blaming(path):
            module: torch.nn.Module = Ideogram4Transformer2DModel(**accepted).eval()
        return module

    def inputs(transformer: torch.nn.Module, case: Case) -> dict[str, Any]:
        with blaming(path):
            return _ideogram4_inputs(transformer, case)

    # adaLN, time embedding and head see one row per prompt or 128 channels: INT8 gains nothing and costs quality.
    unquantized = ("adaln", "t_embedding", "input_proj", "final_layer")
    return Model(name, build, inputs, unquantized, IDEOGRAM4_JOINS, path)


class UnusedSetting(UserWarning):
    """A setting of a model's config that the installed diffusers does not know."""


MAX_LAYERS = 1024
_MAX_SETTING = 1 << 24
_OF_WEIGHTS = {"quantization_config"}
"""Settings that describe how the weights are stored. They change no product."""


def _accepted(settings: dict[str, Any], kind: Any, path: Path) -> dict[str, Any]:
    """The settings that the class `kind` takes. Warns of others. Raises FileError for a value of another type."""
    parameters = inspect.signature(kind.__init__).parameters
    unknown = sorted(set(settings) - set(parameters) - _OF_WEIGHTS)
    if unknown:
        warnings.warn(
            f"{str(path)!r}: left out {', '.join(map(repr, unknown))}, which this diffusers does not know",
            UnusedSetting,
            stacklevel=2,
        )
    found = {}
    for name, value in settings.items():
        if name not in parameters:
            continue
        found[name], expected = _setting(value, parameters[name].default, MAX_LAYERS if name == "num_layers" else None)
        if expected:
            raise FileError(f"{str(path)!r}: {name} = {textwrap.shorten(repr(value), 60)}; expected {expected}")
    return found


def _setting(value: Any, default: Any, most: int | None = None) -> tuple[Any, str]:
    """A value as the type of `default`, and "" or the expected values, if it is not one. most: the largest number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, tuple):
        values = [_setting(one, default[0]) for one in value] if isinstance(value, list) else []
        fits = len(values) == len(default) and not any(wrong for _, wrong in values)
        return tuple(one for one, _ in values), "" if fits else f"{len(default)} whole numbers above 0"
    if isinstance(default, float):
        return value, "" if is_number and 0 < value < math.inf else "a number above 0"
    if isinstance(default, int):
        most = most or _MAX_SETTING
        fits = is_number and 1 <= value <= most and value == int(value)
        return int(value) if fits else value, "" if fits else f"a whole number from 1 to {most}"
    return value, ""


@contextlib.contextmanager
def blaming(path: Path | None) -> Iterator[None]:
    """Raise an error of the block as a FileError about the config `path`. Without a path the error passes."""
    try:
        yield
    except Int8kitError:
        raise
    except Exception as error:  # torch and diffusers raise many types for settings that do not fit together
        if path is None:
            raise
        raise FileError(
            f"{str(path)!r}: the settings do not fit together ({first_line(error)}); compare them with the config of "
            f"{HUB_ID}"
        ) from error


def first_line(error: Exception) -> str:
    """The type of an error and the start of its text, in one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return textwrap.shorten(f"{type(error).__name__}: {text}".removesuffix(": "), 160)


MODELS: dict[str, Model] = {
    "ideogram4": _ideogram4("ideogram4", {}),
    TINY: _ideogram4(TINY, TINY_TRANSFORMER),
}


def get(name: str) -> Model:
    """The model with this name, or in a local folder of diffusers' layout. Raises UnknownName or FileError."""
    if name in MODELS:
        return MODELS[name]
    if os.path.isdir(name):
        return _from_folder(Path(name))
    raise UnknownName("model", name, MODELS, "or name a local folder that holds transformer/config.json")


def _from_folder(folder: Path) -> Model:
    """The model of a local folder. Its settings are checked when it is built, because the check imports diffusers."""
    remedy = "name a folder in diffusers' layout"
    path = folder / "transformer" / "config.json"
    if not os.path.lexists(path):
        path = folder / "config.json"
        if not os.path.lexists(path):
            raise FileError(f"{str(folder)!r} holds no transformer/config.json; {remedy}")
    config = files.read_any_json(path, remedy=remedy)
    if not isinstance(config, dict):
        raise FileError(f"{str(path)!r} holds no JSON object; {remedy}")
    kind = config.get("_class_name")
    if kind != "Ideogram4Transformer2DModel":
        raise UnknownName(
            "transformer class", str(kind), ["Ideogram4Transformer2DModel"], "see CONTRIBUTING.md to add one"
        )
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    return _ideogram4(folder.resolve().name, settings, path)


def check_pipeline(name: str) -> None:
    """Raise InputError for a name that `run` cannot load: not tiny, no folder with a pipeline, and no hub id.

    It imports neither torch nor diffusers.
    """
    expected = "expected tiny, a local folder in diffusers' layout, or a hub id"
    if name == TINY:
        return
    if os.path.isdir(name):
        _check_index(name)
    elif name in MODELS:
        raise InputError(
            f"model {name!r}: it has no weights here; name its hub id, such as {HUB_ID}, or a local folder in "
            "diffusers' layout"
        )
    elif os.path.lexists(name):
        raise FileError(f"cannot load {name!r}: it is a {files.kind_of(Path(name)) or 'file'}; {expected}")
    elif _HUB_ID.fullmatch(name) and not name.endswith((".json", ".safetensors")):  # of a folder that is not there
        return
    elif "/" in name or name.startswith(("~", ".")):
        raise FileError(f"no folder {name!r}; {expected}, such as {HUB_ID}")
    else:
        raise UnknownName("model", name, [TINY], "or name a local folder in diffusers' layout, or a hub id")


_HUB_ID = re.compile(r"(?!.*(?:--|\.\.))[a-z0-9][\w.-]{0,95}/[a-z0-9_][\w.-]{0,95}(?<![.-])", re.ASCII | re.IGNORECASE)


def _check_index(folder: str) -> None:
    """Raise FileError for a folder without the index of an Ideogram 4 pipeline."""
    remedy = "expected a folder in diffusers' layout"
    path = Path(folder) / "model_index.json"
    if not os.path.lexists(path):
        raise FileError(f"cannot load {folder!r}: it holds no model_index.json; {remedy}")
    index = files.read_any_json(path, remedy=remedy)
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if not (isinstance(kind, str) and kind.startswith("Ideogram4")):
        raise FileError(f"{str(path)!r} describes the pipeline {kind!r}; expected Ideogram4Pipeline")


def check_seed(seed: int) -> None:
    """Raise InputError for a seed that torch refuses."""
    if not -(2**63) <= seed < 2**64:
        raise InputError(f"seed {seed}: expected a number of 64 bits, such as 0")
