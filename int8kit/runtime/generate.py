"""Image generation for `int8kit run`, with timings, peak memory and the configurations that served.

generate(ImageRequest(("a red bicycle",), width=256, height=256))  ->  GeneratedImages(images, load_s, step_ms, ...)
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8kit import gpus, lookup
from int8kit.database import store
from int8kit.database.database import Choice, Database
from int8kit.errors import CheckFailed, InputError, UnknownName
from int8kit.kernels import present_toolchain
from int8kit.models import Case, check_pipeline, check_seed
from int8kit.progress import Progress, no_progress
from int8kit.runtime import memory, variants
from int8kit.runtime.clock import Clock
from int8kit.runtime.repairs import Repairs
from int8kit.runtime.schedule import PRESETS, Schedule
from int8kit.toolchain import Toolchain, require_supported

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from int8kit.runtime.denoise import Scene
    from int8kit.runtime.fused_ideogram4 import FusedIdeogram4

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


def schedule_of(request: ImageRequest) -> Schedule:
    """The noise levels and the guidance of each step. Raises as `check`."""
    steps = check(request)
    return PRESETS[request.preset].schedule(request.height, request.width, steps, request.guidance)


def generate(request: ImageRequest, progress: Progress = no_progress) -> GeneratedImages:
    """Generate the images of a request.

    Raises UnknownName, InputError or FileError for a bad request before any long work, and CheckFailed if the request
    is strict and a configuration is not proven.
    """
    clock = Clock(progress)
    schedule = schedule_of(request)
    import torch

    from int8kit.runtime import attention, denoise, ideogram4

    present = gpus.present()
    memory.check_size(request.height, request.width, present)
    toolchain = present_toolchain()[0]
    served = store.served_gpu(request.gpu, request.database)
    database, paths = store.merged_view(served, toolchain, request.database)
    device = torch.device("cpu" if present is None else "cuda")
    if reason := variants.why_not(request.variant, device, present):
        raise InputError(f"variant {request.variant!r}: {reason}")

    with clock.part("load_s", f"loading {request.model}"):
        pipe = ideogram4.load(request.model)
    with clock.part("encode_s", "encoding the prompts"):
        scene = _encode(pipe, request, device)
        needed = scene.rows * denoise.bytes_per_row(pipe.transformer.config)
        memory.check_batch(needed, scene.samples, request.height, request.width, present)
    with clock.part("prepare_s", f"preparing the linears, {request.variant}"):
        plans = database.plans(toolchain)
        cond, uncond = ideogram4.prepare(
            pipe, request.variant, repairs_of(request), plans, device, compiled=request.compile
        )
        choices = _choices(cond, uncond, scene, database, toolchain)
        if request.strict:
            _require_proofs(choices, database.gpu, toolchain)
    pipe.scheduler = schedule.scheduler(pipe, device)
    branches = denoise.FusedBranches(cond, uncond, scene, denoise.times(pipe.scheduler, pipe.transformer.dtype))
    if memory.is_short(device, needed):
        branches.release()
    noise = denoise.noise(scene, pipe.transformer.config.in_channels, request.seed, device)
    clock.lap("ahead_s", device)
    step = progress("denoising", len(schedule.guidance))

    def on_step() -> None:
        clock.step(device)
        step()

    latents = denoise.denoise(branches, pipe.scheduler, noise, schedule.guidance, on_step)
    images = ideogram4.decode(pipe, latents, request.height, request.width)
    clock.lap("decode_s")
    return GeneratedImages(
        images=tuple(images),
        request=request,
        device="cpu, reference backend" if present is None else present.name,
        attention=attention.name_of(device),
        fused=cond.is_fused,
        graphs=branches.graphs and len(schedule.guidance) > 1,
        tokens=tuple(map(len, scene.features)),
        steps=len(schedule.guidance),
        choices=choices,
        databases=paths,
        peak_gib=memory.peak_bytes(device) / 2**30,
        **clock.times(),
    )


def _encode(pipe: Any, request: ImageRequest, device: torch.device) -> Scene:
    """The prompts of a request, encoded."""
    from int8kit.runtime import denoise, ideogram4

    features = ideogram4.encode(pipe, request.prompts, device)
    return denoise.Scene(features, request.images, request.height, request.width)


def _choices(
    cond: FusedIdeogram4, uncond: FusedIdeogram4, scene: Scene, database: Database, toolchain: Toolchain
) -> list[tuple[Choice, int]]:
    """The choice for each INT8 GEMM of a step, with the number of GEMMs of that shape."""
    from int8kit.runtime import ideogram4

    shapes = Counter(ideogram4.gemms(uncond, scene.rows - sum(scene.texts), 0))
    shapes.update(ideogram4.gemms(cond, scene.rows, sum(map(len, scene.features))))
    return [(database.resolve(shape, toolchain), count) for shape, count in sorted(shapes.items())]


def repairs_of(request: ImageRequest) -> Repairs:
    """The repairs of a request. The variant "unfused" is INT8 without the fused row kernels."""
    off = {*request.without, *(("fused-rows",) if request.variant == "unfused" else ())}
    return Repairs.without(sorted(off))


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
