"""The error of a variant in each step of the denoising, on the latents of the stock pipeline.

    report = compare(ImageRequest(("a red bicycle",), model=..., steps=20), ["int8"])
    report.variants[1].mean("guided")

The stock pipeline makes all steps once. Its latents and velocities stay on the CPU. Then each variant computes its
velocities from these latents. One variant is in memory at a time.

A step has a conditional velocity c, an unconditional velocity u, and the guided velocity g c + (1 - g) u in float32.
The error of a velocity v is ||v - v_ref|| / ||v_ref||, with sums in float64. Every variant gets the latents of the
reference, so a step's error excludes the errors of earlier steps. The drift includes them: it is the same ratio for
the latents after the step, where a variant continues from its own latents.

The first variant is the floor: the same weights in bf16 with int8kit's repairs. It differs from the stock pipeline by
rounding alone, so a smaller error has no meaning.

`evaluate` knows neither pipelines nor variants.
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from int8kit import gpus, models
from int8kit.errors import InputError
from int8kit.lookup import Plan
from int8kit.progress import Progress, no_progress
from int8kit.runtime import denoise, ideogram4, stock_branches, variants
from int8kit.runtime.denoise import Branches, guided, require_finite
from int8kit.runtime.generate import ImageRequest, repairs_of, schedule_of

FLOOR = "bf16"
VELOCITIES = ("conditional", "unconditional", "guided")
DRIFT = "drift"


@dataclass(frozen=True)
class Trajectory:
    """The steps of the reference. Tensors are float32 [B, T, C] on the CPU."""

    latents: tuple[torch.Tensor, ...]  # before each step, and after the last one
    conditional: tuple[torch.Tensor, ...]
    unconditional: tuple[torch.Tensor, ...]
    guided: tuple[torch.Tensor, ...]
    guidance: tuple[float, ...]
    noise_levels: tuple[float, ...]  # before each step: 1 is noise, 0 an image
    scheduler: Any  # before its first step
    device: torch.device  # of the branches


@dataclass(frozen=True)
class StepErrors:
    """Relative errors of a variant in one step."""

    step: int  # from 1
    noise_level: float
    guidance: float
    conditional: float
    unconditional: float
    guided: float
    drift: float | None = None


@dataclass(frozen=True)
class VariantErrors:
    """The errors of a variant, step by step."""

    variant: str
    is_floor: bool
    steps: tuple[StepErrors, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The errors that were measured: those of the velocities, and the drift if it was asked for."""
        return VELOCITIES if self.steps[0].drift is None else (*VELOCITIES, DRIFT)

    def mean(self, name: str) -> float:
        """The mean of an error over the steps."""
        return statistics.fmean(getattr(step, name) for step in self.steps)

    def worst(self, name: str) -> StepErrors:
        """The step with the largest error."""
        return max(self.steps, key=lambda step: float(getattr(step, name)))


@dataclass(frozen=True)
class VelocityReport:
    """The errors of all variants, the floor first, and their conditions."""

    request: ImageRequest
    device: str
    text_tokens: tuple[int, ...]  # of each prompt
    text_slots: int  # of the reference
    variants: tuple[VariantErrors, ...]


def compare(
    request: ImageRequest,
    names: Sequence[str],
    *,
    slots: int = models.STOCK_SLOTS,
    drift: bool = False,
    progress: Progress = no_progress,
) -> VelocityReport:
    """The errors of the floor and of the variants `names` against the stock pipeline, on the GPU if there is one.

    slots: text slots of the stock pipeline. Raises UnknownName, InputError or FileError for a bad request, and
    CheckFailed for a velocity that is not finite.
    """
    schedule_of(request)
    device, present = _device(), gpus.present()
    for name in names:
        if reason := variants.why_not(name, device, present):
            raise InputError(f"variant {name!r}: {reason}")
    trajectory, tokens = _reference(request, slots, progress)
    _free()

    @contextmanager
    def built(variant: str) -> Iterator[Branches]:
        yield contestant(ideogram4.load(request.model), variant, request)

    order = list(dict.fromkeys([FLOOR, *names]))
    found = evaluate(trajectory, order, built, drift=drift, progress=progress)
    where = "cpu, reference backend" if present is None else present.name
    return VelocityReport(request, where, tokens, slots, tuple(found))


def _reference(request: ImageRequest, slots: int, progress: Progress) -> tuple[Trajectory, tuple[int, ...]]:
    """The trajectory of the stock pipeline, and the number of each prompt's tokens."""
    step = progress(f"loading {request.model}", 1)
    pipe, device, schedule = ideogram4.load(request.model), _device(), schedule_of(request)
    prompts = list(request.prompts)
    branches = stock_branches.StockBranches(pipe, prompts, schedule, slots, device)
    step()
    noise = stock_branches.noise(pipe, schedule, request.seed, device, batch=len(prompts))
    step = progress("stock pipeline", len(schedule.guidance))
    found = record(branches, schedule.guidance, schedule.scheduler(pipe, device), noise, step)
    return found, tuple(ideogram4.count_tokens(pipe, prompt) for prompt in prompts)


def contestant(pipe: Any, variant: str, request: ImageRequest) -> Branches:
    """The branches of a variant, on the device. `pipe` is a new stock pipeline on the CPU, which this changes."""
    device = _device()
    features = ideogram4.encode(pipe, request.prompts, device)
    repairs = repairs_of(replace(request, variant=variant))
    pair = ideogram4.prepare(pipe, variant, repairs, lambda n, k: Plan(), device)  # any configuration: the same bits
    scene = denoise.Scene(features, 1, request.height, request.width)
    schedule = schedule_of(request).scheduler(pipe, device)
    return denoise.FusedBranches(*pair, scene, denoise.times(schedule, pipe.transformer.dtype))


def _device() -> torch.device:
    return torch.device("cpu" if gpus.present() is None else "cuda")


def record(
    branches: Branches,
    guidance: Sequence[float],
    scheduler: Any,
    noise: torch.Tensor,
    step: Callable[[], None] = lambda: None,
) -> Trajectory:
    """The trajectory of `branches` from `noise` [B, T, C], float32 on their device.

    guidance: the scale of each step. scheduler: of diffusers, before its first step; it stays there. step: called
    after each step. Raises CheckFailed for a velocity that is not finite.
    """
    walk = copy.deepcopy(scheduler)
    latents = [noise.cpu()]
    conditional: list[torch.Tensor] = []
    unconditional: list[torch.Tensor] = []
    mixed: list[torch.Tensor] = []
    x = noise
    for i, (t, g) in enumerate(zip(walk.timesteps, guidance, strict=True)):
        c, u = branches.velocities(x, i)
        v = guided(c, u, g)
        x = walk.step(-v, t, x, return_dict=False)[0]
        for kept, one in ((conditional, c), (unconditional, u), (mixed, v), (latents, x)):
            kept.append(one.cpu())
        require_finite(c, u, what=f"stock pipeline, step {i + 1}")
        step()
    levels = tuple(map(float, walk.sigmas[: len(guidance)]))
    return Trajectory(
        tuple(latents), tuple(conditional), tuple(unconditional), tuple(mixed), tuple(guidance), levels, scheduler,
        noise.device,
    )  # fmt: skip


def evaluate(
    trajectory: Trajectory,
    names: Sequence[str],
    built: Callable[[str], AbstractContextManager[Branches]],
    *,
    drift: bool = False,
    progress: Progress = no_progress,
) -> list[VariantErrors]:
    """The errors of the variants `names`, in this order. The first one is the floor.

    built: enters with the branches of a variant, on the trajectory's device. Its memory is free before the next one is
    built. drift: also run each variant from its own latents, which doubles the time. Raises CheckFailed for a velocity
    that is not finite.
    """
    found = []
    for i, variant in enumerate(names):
        steps = _errors_of(trajectory, variant, built, drift, progress)
        found.append(VariantErrors(variant, i == 0, tuple(steps)))
        _free()
    return found


def _errors_of(
    trajectory: Trajectory,
    variant: str,
    built: Callable[[str], AbstractContextManager[Branches]],
    drift: bool,
    progress: Progress,
) -> list[StepErrors]:
    count = len(trajectory.guidance)
    step, found = progress(f"building {variant}", 1), []
    with built(variant) as branches:
        step()
        step = progress(variant, count)
        walk, own = copy.deepcopy(trajectory.scheduler), trajectory.latents[0].to(trajectory.device)
        for i, g in enumerate(trajectory.guidance):
            x = trajectory.latents[i].to(trajectory.device)
            c, u = branches.velocities(x, i)
            errors = _step_errors(trajectory, i, c, u, variant)
            ratio = None
            if drift:
                c, u = (c, u) if i == 0 else branches.velocities(own, i)
                own = walk.step(-guided(c, u, g), walk.timesteps[i], own, return_dict=False)[0]
                ratio = relative_error(own.cpu(), trajectory.latents[i + 1])
            found.append(StepErrors(i + 1, trajectory.noise_levels[i], g, *errors, drift=ratio))
            step()
    return found


def _step_errors(
    trajectory: Trajectory, i: int, c: torch.Tensor, u: torch.Tensor, variant: str
) -> tuple[float, float, float]:
    """The errors of the conditional, the unconditional and the guided velocity of step `i`."""
    c, u = c.cpu(), u.cpu()
    require_finite(c, u, what=f"variant {variant!r}, step {i + 1}")
    return (
        relative_error(c, trajectory.conditional[i]),
        relative_error(u, trajectory.unconditional[i]),
        relative_error(guided(c, u, trajectory.guidance[i]), trajectory.guided[i]),
    )


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """||found - reference|| / ||reference||, with sums in float64.

    For a reference of zeros it is 0 if both are equal, and infinity otherwise.
    """
    expected = reference.double()
    distance, norm = float((found.double() - expected).norm()), float(expected.norm())
    return distance / norm if norm else math.inf if distance else 0.0


def _free() -> None:
    """Return the memory of a pipeline that is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
