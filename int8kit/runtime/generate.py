"""An image from a prompt: what `int8kit run` does, with its timings, its memory and the configurations it used.

    generate(Request("a red bicycle", model="tiny", width=256, height=256))  ->  Outcome(image, load_s, step_ms, ...)

The PNG carries the call's parameters in its text chunk "int8kit", as JSON: `save` writes it, `is_ours` recognises it.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8kit import __version__, files, gpus, lookup
from int8kit.database import store
from int8kit.database.database import Choice
from int8kit.errors import CheckFailed, FileError, InputError, UnknownName
from int8kit.models import TINY, Case
from int8kit.toolchain import ANY_TOOLCHAIN, Toolchain

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True)
class Preset:
    """A schedule of the model's makers: steps, the spread of noise levels, and the last steps at low guidance."""

    steps: int
    mu: float
    std: float
    polish: int  # steps at guidance 3 that end the schedule; the others have 7

    def guidance(self, steps: int) -> list[float]:
        """Guidance of each of `steps` steps; the share of polish steps is kept, at least one of two or more."""
        polish = min(steps - 1, math.ceil(steps * self.polish / self.steps))
        return [7.0] * (steps - polish) + [3.0] * polish


PRESETS = {"quality": Preset(48, 0.0, 1.5, 3), "default": Preset(20, 0.0, 1.75, 2), "turbo": Preset(12, 0.5, 1.75, 1)}


MAX_STEPS = 10_000


@dataclass(frozen=True)
class Request:
    """One call of `int8kit run`."""

    prompt: str
    model: str = "tiny"
    height: int = 1024
    width: int = 1024
    preset: str = "quality"
    steps: int | None = None  # None: the preset's
    guidance: float | None = None  # None: the preset's schedule
    seed: int = 0
    gpu: str | None = None  # None: the card that is here
    database: Path | None = None  # None: see `db.gather`
    strict: bool = False  # refuse configurations that are not proven


@dataclass(frozen=True)
class Outcome:
    """An image and what it took."""

    image: Image.Image
    request: Request
    device: str
    tokens: int
    steps: int
    choices: list[tuple[Choice, int]]
    databases: tuple[Path, ...]
    load_s: float
    prepare_s: float  # encoding the prompt, quantizing the weights
    denoise_s: float
    decode_s: float
    step_ms: float  # median
    peak_gib: float  # of the card; of the process on a CPU


def check(request: Request) -> int:
    """The number of steps of a request. Raises UnknownName or InputError for what `generate` cannot make.

    Needs neither torch nor diffusers, so a mistake is reported before they are imported.
    """
    if request.preset not in PRESETS:
        raise UnknownName("preset", request.preset, PRESETS)
    preset = PRESETS[request.preset]
    steps = preset.steps if request.steps is None else request.steps
    if not 1 <= steps <= MAX_STEPS:
        raise InputError(f"{steps} steps: expected 1 to {MAX_STEPS}")
    Case(request.height, request.width)
    if request.guidance is not None and not math.isfinite(request.guidance):
        raise InputError(f"guidance {request.guidance}: expected a finite number, such as 7")
    if not -(2**63) <= request.seed < 2**64:
        raise InputError(f"seed {request.seed}: expected a number of 64 bits, such as 0")
    is_folder = bool(request.model) and Path(request.model).is_dir()
    if is_folder and not (Path(request.model) / "model_index.json").is_file():
        raise FileError(
            f"cannot load {request.model!r}: it holds no model_index.json; expected a folder in diffusers' layout"
        )
    if "/" not in request.model and request.model != TINY and not is_folder:
        raise UnknownName("model", request.model, [TINY], "or name a local folder in diffusers' layout, or a hub id")
    return steps


Stage = Callable[[str, int], Callable[[], None]]
"""Progress: called with a description and a number of steps, it returns the function to call after each step."""


def generate(request: Request, stage: Stage = lambda *_: lambda: None) -> Outcome:
    """Make an image. Raises UnknownName, InputError or FileError before any long work for a wrong request."""
    steps = check(request)
    preset = PRESETS[request.preset]
    import torch

    from int8kit.runtime import ideogram4

    card = gpus.present()
    gpu = gpus.resolve(request.gpu)
    toolchain = _toolchain()
    database, paths = store.gather(gpu, toolchain, request.database)
    device = torch.device("cpu" if card is None else "cuda")

    start = time.perf_counter()
    step = stage(f"loading {request.model}", 1)
    stock = ideogram4.load(request.model)
    step()
    tokens = ideogram4.count_tokens(stock, request.prompt)
    case = Case(request.height, request.width, text_tokens=tokens)
    loaded = time.perf_counter()
    step = stage("encoding the prompt, quantizing", 1)
    pipe, choices = ideogram4.prepare(stock, request.prompt, case, database, device, toolchain)
    step()
    if request.strict and (unproven := unproven_of(choices)):
        raise CheckFailed(
            f"{len(unproven)} of {len(choices)} configurations are not proven under Triton {toolchain.triton} as "
            f"sm_{gpu.arch} code with the present kernels, first {unproven[0].config} for {unproven[0].shape}; "
            f"run `int8kit verify --gpu {gpu.alias}` on a GPU, which stamps what holds"
        )
    prepared = time.perf_counter()

    ends: list[float] = []
    step = stage("denoising", steps)

    def on_step(_pipe: Any, _step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        step()
        return values

    pipe.set_progress_bar_config(disable=True)
    schedule = [request.guidance] * steps if request.guidance is not None else preset.guidance(steps)
    image = pipe(
        request.prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=steps,
        guidance_schedule=schedule,
        mu=preset.mu,
        std=preset.std,
        max_sequence_length=tokens,
        generator=torch.Generator(device).manual_seed(request.seed),
        callback_on_step_end=on_step,
    ).images[0]
    done = time.perf_counter()
    laps = sorted(b - a for a, b in zip([prepared, *ends], ends, strict=False))
    return Outcome(
        image=image,
        request=request,
        device="cpu, reference backend" if card is None else card.name,
        tokens=tokens,
        steps=steps,
        choices=choices,
        databases=paths,
        load_s=loaded - start,
        prepare_s=prepared - loaded,
        denoise_s=ends[-1] - prepared,
        decode_s=done - ends[-1],
        step_ms=1e3 * laps[len(laps) // 2],
        peak_gib=_peak_bytes(device) / 2**30,
    )


def unproven_of(choices: Iterable[tuple[Choice, int]]) -> list[Choice]:
    """Those that are from a database's entry that no verification with the present kernels has stamped."""
    return [choice for choice, _ in choices if choice.level != lookup.DEFAULT and not choice.verified]


def save(outcome: Outcome, path: Path) -> None:
    """Write the PNG with the call's parameters in its text chunk "int8kit". Raises FileError."""
    request = {k: v for k, v in asdict(outcome.request).items() if k not in ("database", "strict") and v is not None}
    if Path(outcome.request.model).is_dir():
        request["model"] = Path(outcome.request.model).resolve().name  # a picture is shown around: no path in it
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("int8kit", json.dumps({**request, "steps": outcome.steps, "versions": versions()}))
    with files.replacing(path) as temporary:
        outcome.image.save(temporary, format="PNG", pnginfo=info)


def is_ours(path: Path) -> bool:
    """True if `path` is a PNG that `save` wrote."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return "int8kit" in image.info
    except (OSError, UnidentifiedImageError):
        return False


def versions() -> dict[str, str]:
    """Of what decides a result: no host name, user or path."""
    return {
        "int8kit": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def _toolchain() -> Toolchain:
    """The toolchain of this process. Without Triton only the CPU's reference runs, and entries compare with nothing."""
    try:
        from int8kit.kernels import gemm
    except ImportError:
        return ANY_TOOLCHAIN
    return gemm.toolchain()


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
