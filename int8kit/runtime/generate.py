"""Image generation for `int8kit run`, with timings, peak memory and the configurations that served.

    generate(ImageRequest("a red bicycle", width=256, height=256))  ->  GeneratedImage(image, load_s, step_ms, ...)

`save` writes a PNG with the request as JSON in its text chunk "int8kit". `is_ours` recognizes such a PNG.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8kit import __version__, files, gpus, lookup
from int8kit.database import store
from int8kit.database.database import Choice
from int8kit.errors import CheckFailed, InputError, UnknownName
from int8kit.kernels import present_toolchain
from int8kit.models import Case, check_pipeline, check_seed
from int8kit.progress import Progress, no_progress
from int8kit.toolchain import Toolchain, require_supported

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from int8kit.runtime import ideogram4


@dataclass(frozen=True)
class Preset:
    """A denoising schedule recommended by the model's authors."""

    steps: int
    mu: float  # mean and standard deviation of the noise levels' logits
    std: float
    polish: int  # last steps, at guidance 3; the others have guidance 7

    def guidance(self, steps: int) -> list[float]:
        """Guidance scale of each step. The share of polish steps is kept; there is at least one if steps > 1."""
        polish = min(steps - 1, math.ceil(steps * self.polish / self.steps))
        return [7.0] * (steps - polish) + [3.0] * polish


PRESETS = {"quality": Preset(48, 0.0, 1.5, 3), "default": Preset(20, 0.0, 1.75, 2), "turbo": Preset(12, 0.5, 1.75, 1)}


MAX_STEPS = 10_000


@dataclass(frozen=True)
class ImageRequest:
    """Parameters of one image."""

    prompt: str
    _: KW_ONLY
    model: str = "tiny"  # or a local folder in diffusers' layout, or a hub id
    height: int = 1024  # pixels
    width: int = 1024
    preset: str = "quality"
    steps: int | None = None  # None: the preset's
    guidance: float | None = None  # None: the preset's schedule
    seed: int = 0
    gpu: str | None = None  # whose database serves; None: the present GPU, else rtx3090
    database: Path | None = None  # None: the search path of `store.merged_view`
    strict: bool = False  # refuse configurations that are not proven


@dataclass(frozen=True)
class GeneratedImage:
    """An image, its cost, and the configurations that served."""

    image: Image.Image
    request: ImageRequest
    device: str
    tokens: int  # of the prompt
    steps: int
    choices: list[tuple[Choice, int]]  # for each GEMM shape, with the number of layers of that shape
    databases: tuple[Path, ...]
    load_s: float
    prepare_s: float  # to encode the prompt and quantize the weights
    denoise_s: float
    decode_s: float
    step_ms: float  # median
    peak_gib: float  # GPU memory; on a CPU, memory of the process


def check(request: ImageRequest) -> int:
    """The number of steps of a request. Raises UnknownName or InputError for a request that `generate` cannot serve.

    Needs neither torch nor diffusers, so that a mistake is reported before they are imported.
    """
    require_supported()
    if request.preset not in PRESETS:
        raise UnknownName("preset", request.preset, PRESETS)
    preset = PRESETS[request.preset]
    steps = preset.steps if request.steps is None else request.steps
    if not 1 <= steps <= MAX_STEPS:
        raise InputError(f"{steps} steps: expected 1 to {MAX_STEPS}")
    Case(request.height, request.width)
    if request.guidance is not None and not math.isfinite(request.guidance):
        raise InputError(f"guidance {request.guidance}: expected a finite number, such as 7")
    check_seed(request.seed)
    try:
        request.prompt.encode()
    except UnicodeEncodeError:
        raise InputError(f"prompt {textwrap.shorten(ascii(request.prompt), 60)}: expected text in UTF-8") from None
    check_pipeline(request.model)
    return steps


def generate(request: ImageRequest, progress: Progress = no_progress) -> GeneratedImage:
    """Generate an image.

    Raises UnknownName, InputError or FileError for a bad request before any long work, and CheckFailed if the request
    is strict and a configuration is not proven.
    """
    steps = check(request)
    preset = PRESETS[request.preset]
    import torch

    from int8kit.runtime import ideogram4

    present = gpus.present()
    _check_memory(request, present)
    gpu = gpus.resolve(request.gpu)
    toolchain = present_toolchain()[0]
    database, paths = store.merged_view(gpu, toolchain, request.database)
    device = torch.device("cpu" if present is None else "cuda")

    start = time.perf_counter()
    step = progress(f"loading {request.model}", 1)
    stock = ideogram4.load(request.model)
    step()
    tokens = ideogram4.count_tokens(stock, request.prompt)
    case = Case(request.height, request.width, text_tokens=tokens)
    loaded = time.perf_counter()
    step = progress("encoding the prompt, quantizing", 1)
    pipe, choices = ideogram4.prepare(stock, request.prompt, case, database, device, toolchain)
    step()
    if request.strict:
        _require_proofs(choices, gpu, toolchain)
    prepared = time.perf_counter()
    guidance = preset.guidance(steps) if request.guidance is None else [request.guidance] * steps
    image, ends = _denoise(pipe, request, preset, guidance, tokens, progress("denoising", steps))
    done = time.perf_counter()
    durations = [b - a for a, b in zip([prepared, *ends], ends, strict=False)]
    return GeneratedImage(
        image=image,
        request=request,
        device="cpu, reference backend" if present is None else present.name,
        tokens=tokens,
        steps=steps,
        choices=choices,
        databases=paths,
        load_s=loaded - start,
        prepare_s=prepared - loaded,
        denoise_s=ends[-1] - prepared,
        decode_s=done - ends[-1],
        step_ms=1e3 * statistics.median(durations),
        peak_gib=_peak_bytes(device) / 2**30,
    )


def _check_memory(request: ImageRequest, present: gpus.Gpu | None) -> None:
    """Raise InputError for a size that no memory here holds.

    A lower bound: the transformer builds a mask of one byte for each pair of image tokens. The VAE returns three
    float32 values for each pixel.
    """
    total = _memory_bytes() if present is None else present.memory_gib << 30
    mask, pixels = Case(request.height, request.width).image_tokens ** 2, 12 * request.height * request.width
    if total and max(mask, pixels) > total:
        where = "this machine" if present is None else present.name
        raise InputError(
            f"size {request.width}x{request.height}: needs more than {max(mask, pixels) / 2**30:.0f} GiB, and {where} "
            f"has {total / 2**30:.0f}; name a smaller --size"
        )


def _memory_bytes() -> int:
    """Memory of this machine; 0 where Python cannot ask."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 0


def _denoise(
    pipe: ideogram4.Int8Pipeline,
    request: ImageRequest,
    preset: Preset,
    guidance: list[float],
    tokens: int,
    step: Callable[[], None],
) -> tuple[Image.Image, list[float]]:
    """The image, and the time at the end of each step. `step` is called after each."""
    import torch

    device = pipe.run_device
    ends: list[float] = []

    def on_step(_pipe: Any, _step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        step()
        return values

    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        request.prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=len(guidance),
        guidance_schedule=guidance,
        mu=preset.mu,
        std=preset.std,
        max_sequence_length=tokens,
        generator=torch.Generator(device).manual_seed(request.seed),
        callback_on_step_end=on_step,
    ).images[0]
    return image, ends


def _require_proofs(choices: list[tuple[Choice, int]], gpu: gpus.Gpu, toolchain: Toolchain) -> None:
    """Raises CheckFailed if a configuration is not proven."""
    if unproven := unproven_of(choices):
        raise CheckFailed(
            f"{len(unproven)} of {len(choices)} configurations are not proven under Triton {toolchain.triton} as "
            f"sm_{gpu.arch} code with the present kernels. The first is {unproven[0].config} for {unproven[0].shape}. "
            f"Run `int8kit verify --gpu {gpu.alias}` on a GPU to prove and stamp them"
        )


def unproven_of(choices: Iterable[tuple[Choice, int]]) -> list[Choice]:
    """Choices from a database entry without a proof for the present kernels."""
    return [choice for choice, _ in choices if choice.level != lookup.DEFAULT and not choice.is_verified]


def save(generated: GeneratedImage, path: Path) -> None:
    """Write the PNG with its request in the text chunk "int8kit". Raises FileError."""
    request = {k: v for k, v in asdict(generated.request).items() if k not in ("database", "strict") and v is not None}
    if Path(generated.request.model).is_dir():
        request["model"] = Path(generated.request.model).resolve().name  # images are published: no path in them
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("int8kit", json.dumps({**request, "steps": generated.steps, "versions": versions()}))
    with files.replacing(path) as temporary:
        generated.image.save(temporary, format="PNG", pnginfo=info)


def is_ours(path: Path) -> bool:
    """True if `path` is a PNG that `save` wrote."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return "int8kit" in image.info
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # broken chunks have each of them
        return False


def versions() -> dict[str, str]:
    """Versions of everything that can change an image. Contains no host name, user or path."""
    return {
        "int8kit": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def _peak_bytes(device: torch.device) -> int:
    """Peak memory of the GPU, or of this process on a CPU; 0 on Windows, which does not count it this way."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
