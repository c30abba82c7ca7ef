"""`int8kit bench model`: one forward of a whole transformer, bf16 and INT8, in milliseconds and peak GiB.

    {"format": "int8kit.result/1", "benchmark": "model", ...,
     "rows": [{"name": "bf16, as diffusers ships it", "unit": "ms", "p20": ..., "p50": 369.5, "p80": ..., "rounds": 7,
               "peak_gib": 21.46}, ...],
     "details": {"model": "ideogram4", "size": "1024x1024", "text_tokens": 200}}

`bench.results` has the fields that are left out. The weights are random. A forward is the conditional branch, batch 1,
in eager mode. diffusers pads the text to 2048 slots; int8kit packs it tight. A time is of one forward after two to warm
up (`timing.wall_clock`). Each variant is timed by itself, because the INT8 model replaces the bf16 model. Without a
GPU, "peak_gib" is absent and the times mean nothing: the tiny model shows that the benchmark runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from int8kit import gpus, models
from int8kit.bench import results
from int8kit.database import store
from int8kit.errors import InputError
from int8kit.kernels import gemm
from int8kit.quantization import replace_linears
from int8kit.runtime import ideogram4
from int8kit.timing import wall_clock

TIMING = "wall clock around a synchronized call; each variant by itself; medians with p20 and p80"
STOCK_SLOTS = 2048
"""Text slots of the pipeline in diffusers."""

BF16_STOCK, BF16_TIGHT = "bf16, as diffusers ships it", "bf16, text packed tight"
INT8_STOCK, INT8_TIGHT = "int8, as diffusers packs it", "int8, text packed tight"
INT8_UNMASKED = "int8, tight, no mask: int8kit run"


@dataclass(frozen=True)
class ModelSetting:
    """The forward to time. Sizes are in pixels."""

    model: str = "ideogram4"
    height: int = 1024
    width: int = 1024
    text_tokens: int = 200
    rounds: int = 7
    gpu: str | None = None  # alias of the GPU whose database serves; None: the present one's, or rtx3090's without one
    database: Path | None = None
    stock_slots: int = STOCK_SLOTS


def measure(setting: ModelSetting = ModelSetting(), *, note: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The JSON document of one forward in five variants.

    note: receives a line after each variant. Raises InputError for a bad setting, and for a full-size model without a
    CUDA device; FileError for a damaged database.
    """
    if setting.rounds < 1:
        raise InputError(f"{setting.rounds} rounds: expected 1 or more")
    model = models.get(setting.model)
    tight = models.Case(setting.height, setting.width, text_tokens=setting.text_tokens)
    stock = replace(tight, slots=max(setting.stock_slots, setting.text_tokens))
    present = gpus.present()
    if present is None and model.name != models.TINY:
        raise InputError(f"no CUDA device for the model {model.name!r}: expected one; `tiny` runs on a CPU")
    target = gpus.resolve(setting.gpu)
    database, paths = store.merged_view(target, gemm.toolchain(), setting.database)
    used = results.DatabaseUsed(files=tuple(path.name for path in paths), entries=len(database.entries))
    header = results.header("model", results.Policy(timing=TIMING, database=used))
    device = "cuda" if present else "cpu"
    with torch.device(device):
        transformer = model.build()
        inputs = {case: model.inputs(transformer, case) for case in (stock, tight)}
    rows: list[dict[str, Any]] = []

    def forward(name: str, case: models.Case) -> None:
        if present:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            call = {name: lambda: transformer(**inputs[case])}
            times = wall_clock.interleaved(call, setting.rounds, gate=False)[name]
        peak: dict[str, Any] = {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)} if present else {}
        rows.append(results.row(name, "ms", times, setting.rounds, **peak))
        note(f"{name}: {times.p50:.1f} ms")

    forward(BF16_STOCK, stock)
    forward(BF16_TIGHT, tight)
    replace_linears(transformer, model.quantizes, lambda n, k: database.plan(n, k, gemm.toolchain()))
    forward(INT8_STOCK, stock)
    forward(INT8_TIGHT, tight)
    ideogram4.unmask(transformer)
    forward(INT8_UNMASKED, tight)
    details = {
        "model": model.name,
        "size": f"{setting.width}x{setting.height}",
        "text_tokens": setting.text_tokens,
    }
    return results.document(header, rows, details=details, after=results.gpu_state())
