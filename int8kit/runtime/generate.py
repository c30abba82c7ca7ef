"""Image generation for `int8kit run`, with timings, peak memory and the configurations that served.

    generate(ImageRequest(("a red bicycle",), width=256, height=256))  ->  GeneratedImages(images, load_s, step_ms, ...)

`save` writes a PNG for each image, with its request as JSON in the text chunk "int8kit". `is_ours` recognizes one.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import statistics
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import KW_ONLY, asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from int8kit import __version__, files, gpus, lookup
from int8kit.database import store
from int8kit.database.database import Choice
from int8kit.errors import CheckFailed, InputError, UnknownName
from int8kit.kernels import present_toolchain
from int8kit.models import Case, check_pipeline, check_seed
from int8kit.progress import Progress, no_progress
from int8kit.runtime import variants
from int8kit.runtime.repairs import Repairs
from int8kit.toolchain import Toolchain, require_supported

if TYPE_CHECKING:
    import torch
    from PIL import Image


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

    def sigmas(self, steps: int, height: int, width: int) -> list[float]:
        """Noise levels of the steps, as diffusers' pipeline has them for this size in pixels."""
        from diffusers.pipelines.ideogram4 import pipeline_ideogram4

        mu = pipeline_ideogram4._resolution_aware_mu(height=height, width=width, base_mu=self.mu)
        levels: list[float] = pipeline_ideogram4._logit_normal_sigmas(steps, mu, std=self.std).tolist()
        return levels


PRESETS = {"quality": Preset(48, 0.0, 1.5, 3), "default": Preset(20, 0.0, 1.75, 2), "turbo": Preset(12, 0.5, 1.75, 1)}


MAX_STEPS = 10_000


@dataclass(frozen=True)
class ImageRequest:
    """Parameters of a batch of images: each prompt's images have the same size and steps."""

    prompts: tuple[str, ...]
    _: KW_ONLY
    model: str = "tiny"  # or a local folder in diffusers' layout, or a hub id
    height: int = 1024  # pixels
    width: int = 1024
    images: int = 1  # of each prompt
    preset: str = "quality"
    steps: int | None = None  # None: the preset's
    guidance: float | None = None  # None: the preset's schedule
    seed: int = 0  # of the first image; each further one has the next
    variant: str = "int8"  # of the linears, see `runtime.variants`
    without: tuple[str, ...] = ()  # repairs that are switched off, see `runtime.repairs`
    compile: bool = False  # the float blocks run through torch.compile
    gpu: str | None = None  # whose database serves; None: the present GPU, else rtx3090
    database: Path | None = None  # None: the search path of `store.merged_view`
    strict: bool = False  # refuse configurations that are not proven


@dataclass(frozen=True)
class GeneratedImages:
    """Images in the order of the prompts, their cost, and the configurations that served."""

    images: tuple[Image.Image, ...]
    request: ImageRequest
    device: str
    attention: str  # the back end
    fused: bool  # whether the blocks ran in int8kit's kernels
    graphs: bool  # whether the steps after the first ran as CUDA graphs
    tokens: tuple[int, ...]  # of each prompt
    steps: int
    choices: list[tuple[Choice, int]]  # for each INT8 GEMM of a step, with the number of GEMMs of that shape
    databases: tuple[Path, ...]
    start_s: float  # from the start of the process until the request
    load_s: float
    encode_s: float  # the prompts
    prepare_s: float  # the linears of the variant
    ahead_s: float  # all that is computed once: text projection, adaLN of all steps, noise
    first_step_s: float
    denoise_s: float  # all steps
    decode_s: float
    step_ms: float  # median of the steps after the first
    peak_gib: float  # GPU memory; on a CPU, memory of the process

    @property
    def until_first_step_s(self) -> float:
        """From the start of the process to the end of the first step."""
        return self.start_s + self.load_s + self.encode_s + self.prepare_s + self.ahead_s + self.first_step_s


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
    if request.images < 1 or not request.prompts:
        raise InputError(
            f"{len(request.prompts)} prompts, {request.images} images of each: expected at least 1 of each"
        )
    variants.check(request.variant)
    Repairs.without(request.without)
    if request.compile and request.variant == "int8" and "fused-rows" not in request.without:
        raise InputError("compile: the fused INT8 blocks gain nothing from it; name another variant, such as bf16")
    if request.guidance is not None and not math.isfinite(request.guidance):
        raise InputError(f"guidance {request.guidance}: expected a finite number, such as 7")
    check_seed(request.seed)
    check_seed(request.seed + len(request.prompts) * request.images - 1)
    for prompt in request.prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise InputError(f"prompt {textwrap.shorten(ascii(prompt), 60)}: expected text in UTF-8") from None
    check_pipeline(request.model)
    return steps


def generate(request: ImageRequest, progress: Progress = no_progress) -> GeneratedImages:
    """Generate the images of a request.

    Raises UnknownName, InputError or FileError for a bad request before any long work, and CheckFailed if the request
    is strict and a configuration is not proven.
    """
    clock = _Clock()
    steps = check(request)
    preset = PRESETS[request.preset]
    import torch

    from int8kit.runtime import attention, denoise, ideogram4

    present = gpus.present()
    _check_memory(request, present)
    gpu = gpus.resolve(request.gpu)
    toolchain = present_toolchain()[0]
    database, paths = store.merged_view(gpu, toolchain, request.database)
    device = torch.device("cpu" if present is None else "cuda")
    repairs = repairs_of(request)
    if reason := variants.why_not(request.variant, device, present):
        raise InputError(f"variant {request.variant!r}: {reason}")

    step = progress(f"loading {request.model}", 1)
    pipe = ideogram4.load(request.model)
    step()
    clock.lap("load_s")
    step = progress("encoding the prompts", 1)
    features = ideogram4.encode(pipe, request.prompts, device)
    scene = denoise.Scene(features, request.images, request.height, request.width)
    image_rows = scene.samples * Case(request.height, request.width).image_tokens
    rows = image_rows + sum(scene.texts)
    _check_rows(rows * denoise.bytes_per_row(pipe.transformer.config), request, present)
    step()
    clock.lap("encode_s")
    step = progress(f"preparing the linears, {request.variant}", 1)
    plans = functools.cache(lambda n, k: database.plan(n, k, toolchain))
    cond, uncond = ideogram4.prepare(pipe, request.variant, repairs, plans, device, compiled=request.compile)
    shapes = Counter(ideogram4.gemms(uncond, image_rows, 0))
    shapes.update(ideogram4.gemms(cond, rows, sum(map(len, features))))
    choices = [(database.resolve(shape, toolchain), count) for shape, count in sorted(shapes.items())]
    if request.strict:
        _require_proofs(choices, gpu, toolchain)
    step()
    clock.lap("prepare_s")
    guidance = preset.guidance(steps) if request.guidance is None else [request.guidance] * steps
    pipe.scheduler.set_timesteps(sigmas=preset.sigmas(steps, request.height, request.width), device=device)
    branches = denoise.FusedBranches(cond, uncond, scene, denoise.times(pipe.scheduler, pipe.transformer.dtype))
    if _is_short_of_memory(device, rows * denoise.bytes_per_row(pipe.transformer.config)):
        branches.release()
    noise = denoise.noise(scene, pipe.transformer.config.in_channels, request.seed, device)
    clock.lap("ahead_s", device)
    step = progress("denoising", steps)

    def on_step() -> None:
        clock.step(device)
        step()

    latents = denoise.denoise(branches, pipe.scheduler, noise, guidance, on_step)
    images = ideogram4.decode(pipe, latents, request.height, request.width)
    clock.lap("decode_s")
    return GeneratedImages(
        images=tuple(images),
        request=request,
        device="cpu, reference backend" if present is None else present.name,
        attention=attention.name_of(device),
        fused=cond.is_fused,
        graphs=branches.graphs and steps > 1,
        tokens=tuple(map(len, features)),
        steps=steps,
        choices=choices,
        databases=paths,
        peak_gib=_peak_bytes(device) / 2**30,
        **clock.times(),
    )


def repairs_of(request: ImageRequest) -> Repairs:
    """The repairs of a request. The variant "unfused" is INT8 without the fused row kernels."""
    off = {*request.without, *(("fused-rows",) if request.variant == "unfused" else ())}
    return Repairs.without(sorted(off))


class _Clock:
    """The times of the parts of a request, from the start of the process on."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._parts = {"start_s": _process_age()}
        self._steps: list[float] = []

    def lap(self, part: str, device: torch.device | None = None) -> None:
        """End a part of the work."""
        _synchronize(device)
        now = time.perf_counter()
        self._parts[part], self._last = now - self._last, now

    def step(self, device: torch.device) -> None:
        """End a denoising step."""
        _synchronize(device)
        now = time.perf_counter()
        self._steps.append(now - self._last)
        self._last = now

    def times(self) -> dict[str, float]:
        """The times under the names of `GeneratedImages`."""
        first, rest = self._steps[0], self._steps[1:] or self._steps
        step_ms = 1e3 * statistics.median(rest)
        return {**self._parts, "first_step_s": first, "denoise_s": sum(self._steps), "step_ms": step_ms}


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def _process_age() -> float:
    """Seconds since this process started; 0 where psutil cannot say."""
    import psutil

    try:
        return time.time() - float(psutil.Process().create_time())
    except psutil.Error:
        return 0.0


def _is_short_of_memory(device: torch.device, needed: int) -> bool:
    """Whether the activations of a step, `needed` bytes, may not fit beside weights that the steps do not need."""
    if device.type != "cuda":
        return False
    import torch

    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached < needed


def _check_memory(request: ImageRequest, present: gpus.Gpu | None) -> None:
    """Raise InputError for a size that no memory here holds.

    A lower bound: the VAE's last layer reads and writes 8 channels or more in bf16, and its image is float32.
    """
    total = _memory_bytes() if present is None else present.memory_gib << 30
    pixels = (2 * 8 * 2 + 3 * 4) * request.height * request.width
    if total and pixels > total:
        where = "this machine" if present is None else present.name
        raise InputError(
            f"size {request.width}x{request.height}: needs more than {pixels / 2**30:.0f} GiB, and {where} "
            f"has {total / 2**30:.0f}; name a smaller --size"
        )


def _check_rows(needed: int, request: ImageRequest, present: gpus.Gpu | None) -> None:
    """Raise InputError for a batch whose activations, `needed` bytes, no memory here holds."""
    total = _memory_bytes() if present is None else present.memory_gib << 30
    if total and needed > total:
        where = "this machine" if present is None else present.name
        count = len(request.prompts) * request.images
        raise InputError(
            f"{count} images of {request.width}x{request.height} at once: they need about {needed / 2**30:.0f} GiB, "
            f"and {where} has {total / 2**30:.0f}; name fewer --images, fewer prompts, or a smaller --size"
        )


def _memory_bytes() -> int:
    """Memory of this machine; 0 where Python cannot ask."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 0


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


def targets(path: Path, count: int) -> list[Path]:
    """The files of `count` images: `path`, and then name-2.png, name-3.png beside it."""
    return [path if i == 0 else path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(count)]


def save(generated: GeneratedImages, path: Path) -> list[Path]:
    """Write the PNGs with their request in the text chunk "int8kit" -> their paths, see `targets`. Raises FileError."""
    request = asdict(generated.request)
    for name in ("prompts", "images", "database", "strict"):
        request.pop(name)
    if Path(generated.request.model).is_dir():
        request["model"] = Path(generated.request.model).resolve().name  # images are published: no path in them
    request = {key: value for key, value in request.items() if value not in (None, (), False)}
    from PIL.PngImagePlugin import PngInfo

    paths = targets(path, len(generated.images))
    for i, (image, target) in enumerate(zip(generated.images, paths, strict=True)):
        prompt = generated.request.prompts[i // generated.request.images]
        own = {**request, "prompt": prompt, "seed": generated.request.seed + i, "steps": generated.steps}
        info = PngInfo()
        info.add_text("int8kit", json.dumps({**own, "versions": versions()}))
        with files.replacing(target) as temporary:
            image.save(temporary, format="PNG", pnginfo=info)
    return paths


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
