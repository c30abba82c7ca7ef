"""`int8kit bench model`: a denoising step of a whole model, stock diffusers beside each variant, in interleaved rounds.

    {"format": "int8kit.result/1", "benchmark": "model", ...,
     "rows": [{"name": "stock, 2048 text slots", "unit": "ms", "p20": ..., "p50": 606.1, "p80": ..., "rounds": 7,
               "of_stock": 1.0, "first_ms": 790.2}, ...],
     "details": {"model": "ideogram4", "size": "1024x1024", "prompts": [200], "attention": "cudnn",
                 "profile": {"int8": {...}, ...}}}

`bench.results` has the fields that are left out. A step is both branches and the guided velocity. The weights are
random, and both branches share them: a branch reads 9 GB or more, so no cache holds them. Stock is diffusers' forward
in bf16, at its default of 2048 text slots and at the longest prompt's. A variant is int8kit's forward with other
linears, see `runtime.variants`. first_ms: the first call, which compiles. On a GPU, activations_gib is the peak of the
first call beyond the memory that was in use. Without a GPU the times mean nothing: the tiny model shows that the
benchmark runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from int8kit import gpus, models
from int8kit.bench import profile, results
from int8kit.database import store
from int8kit.database.database import Database
from int8kit.errors import InputError
from int8kit.kernels import gemm
from int8kit.runtime import attention, denoise, variants
from int8kit.runtime.fused_ideogram4 import FusedIdeogram4
from int8kit.runtime.repairs import Repairs, described
from int8kit.timing import wall_clock

GUIDANCE = 7.0
Step = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class ModelSetting:
    """The step to time. Sizes are in pixels."""

    model: str = "ideogram4"
    height: int = 1024
    width: int = 1024
    text_tokens: tuple[int, ...] = (200,)  # of each prompt of the batch
    rounds: int = 7
    variants: tuple[str, ...] = ("int8", "bf16", "unfused")
    compiled: bool = False  # also each variant without int8kit's kernels through torch.compile
    each_repair: bool = False  # also int8 without one repair, for each of them
    profiled: bool = False
    gpu: str | None = None  # alias of the GPU whose database serves; None: the present one's, or rtx3090's without one
    database: Path | None = None
    stock_slots: int = models.STOCK_SLOTS

    def check(self) -> None:
        """Raise InputError or UnknownName for a setting that no machine can time."""
        if self.rounds < 1:
            raise InputError(f"{self.rounds} rounds: expected 1 or more")
        if (shortest := min(self.text_tokens, default=0)) < 1:
            raise InputError(f"{shortest} text tokens: expected 1 or more")
        models.Case(self.height, self.width)
        for name in self.variants:
            variants.check(name)


def measure(setting: ModelSetting = ModelSetting(), *, note: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The JSON document of a step by each contestant.

    note: receives a line after each first call, and after each round. Raises InputError for a bad setting and for a
    full-size model without a CUDA device, FileError for a damaged database, CheckFailed for a GPU that is not healthy.
    """
    setting.check()
    model = models.get(setting.model)
    present = gpus.present()
    if present is None and model.name != models.TINY:
        raise InputError(f"no CUDA device for the model {model.name!r}: expected one; `tiny` runs on a CPU")
    device = torch.device("cuda" if present else "cpu")
    for name in setting.variants:
        if reason := variants.why_not(name, device, present):
            raise InputError(f"variant {name!r}: {reason}")
    database, paths = store.merged_view(
        store.served_gpu(setting.gpu, setting.database), gemm.toolchain(), setting.database
    )
    used = results.DatabaseUsed(files=tuple(path.name for path in paths), entries=len(database.entries))
    header = results.header("model", results.Policy(timing=wall_clock.POLICY, database=used))
    calls: dict[str, Step] = {}
    first_ms: dict[str, float] = {}
    activations: dict[str, float] = {}
    for name, call in _contestants(model, setting, device, database):
        before = _reset_peak() if present else 0
        first_ms[name] = wall_clock.synchronized_ms(call)
        if present:
            activations[name] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
        calls[name] = call
        note(f"{name}: first call {first_ms[name]:.0f} ms")
    times = wall_clock.interleaved(
        calls,
        setting.rounds,
        on_round=lambda number, ms: note(f"round {number} of {setting.rounds}: {_texts(ms)}"),
        gate=present is not None,
    )
    stock = times[next(iter(calls))].p50
    rows = []
    for name, one in times.items():
        more: dict[str, Any] = {"activations_gib": activations[name]} if present else {}
        ratio, first = round(stock / one.p50, 3), round(first_ms[name], 1)
        rows.append(results.row(name, "ms", one, setting.rounds, of_stock=ratio, first_ms=first, **more))
    details: dict[str, Any] = {
        "model": model.name,
        "size": f"{setting.width}x{setting.height}",
        "prompts": list(setting.text_tokens),
        "attention": attention.name_of(device),
    }
    if remarks := {n: text for n in setting.variants if (text := variants.remark(n, device, present))}:
        details["remarks"] = remarks
    if setting.profiled:
        details["profile"] = {}
        for name, call in calls.items():
            details["profile"][name] = profile.profile(call, device=device.type).document()
            note(f"{name}: profiled")
    return results.document(header, rows, details=details, after=results.gpu_state())


def _reset_peak() -> int:
    """Start a new peak of GPU memory -> the bytes that are in use."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _texts(ms: Any) -> str:
    return ", ".join(f"{name} {one:.1f}" for name, one in sorted(ms.items(), key=lambda pair: pair[1]))


def _contestants(
    model: models.Model, setting: ModelSetting, device: torch.device, database: Database
) -> Iterator[tuple[str, Step]]:
    """Each contestant's name and its step. Stock at its default comes first."""
    with torch.device(device):
        stock = model.build().to(torch.bfloat16).eval()
    longest = max(setting.text_tokens)
    for slots in sorted({max(setting.stock_slots, longest), longest}, reverse=True):
        yield f"stock, {slots} text slots", _stock_step(model, stock, setting, slots, device)
    plans = database.plans(gemm.toolchain())
    for name in setting.variants:
        made = stock
        if name != "bf16":
            made = copy.deepcopy(stock)
            variants.convert(made, name, model.quantizes, plans, device, compiled=device.type == "cuda")
        base = Repairs.without(["fused-rows"]) if name == "unfused" else Repairs()

        def step(repairs: Repairs, compiled: bool = False, made: Any = made) -> Step:
            pair = [FusedIdeogram4(made, repairs, plans=plans, compiled=compiled) for _ in range(2)]
            return _repaired_step(pair[0], pair[1], setting, device)

        yield name, step(base)
        if setting.compiled and name != "int8":
            yield f"{name}, compiled", step(base, compiled=True)
        if setting.each_repair and name == "int8":
            for repair in described():
                yield f"int8 without {repair}", step(Repairs.without([repair]))


def _stock_step(model: models.Model, stock: Any, setting: ModelSetting, slots: int, device: torch.device) -> Step:
    """A step as diffusers' loop has it, with `slots` text slots."""
    sizes = setting.height, setting.width
    inputs = []
    for branch in models.BRANCHES:
        cases = [models.Case(*sizes, text_tokens=n, slots=slots, branch=branch) for n in setting.text_tokens]
        each = [model.inputs(stock, case) for case in cases]
        joined = {key: torch.cat([one[key] for one in each]).to(device) for key in each[0]}
        inputs.append({k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in joined.items()})

    @torch.no_grad()
    def step() -> torch.Tensor:
        cond = stock(**inputs[0], return_dict=False)[0][:, slots:].float()
        uncond = stock(**inputs[1], return_dict=False)[0].float()
        return denoise.guided(cond, uncond, GUIDANCE)

    return step


def _repaired_step(cond: FusedIdeogram4, uncond: FusedIdeogram4, setting: ModelSetting, device: torch.device) -> Step:
    """A step of `runtime.denoise`, with all that is computed ahead of the steps already there."""
    config = cond.model.config
    features = tuple(
        torch.randn(n, config.llm_features_dim, device=device, dtype=torch.bfloat16) for n in setting.text_tokens
    )
    scene = denoise.Scene(features, 1, setting.height, setting.width)
    times = torch.tensor([0.1, 0.5, 0.9], device=device, dtype=torch.bfloat16)
    branches = denoise.FusedBranches(cond, uncond, scene, times, max(setting.stock_slots, *setting.text_tokens))
    latents = denoise.noise(scene, config.in_channels, 0, device)

    @torch.no_grad()
    def step() -> torch.Tensor:
        return denoise.guided(*branches.velocities(latents, 1), GUIDANCE)

    return step
