"""`int8kit bench model`: one forward of a whole transformer, bf16 and INT8, in milliseconds and peak GiB.

    {"format": "int8kit.bench-model/1", "gpu": "NVIDIA H200", "model": "ideogram4", "size": "1024x1024",
     "text_tokens": 200, "rounds": 7, "database": 48, "torch": "2.11.0+cu130", ...,
     "ms": {"bf16, as diffusers ships it": 369.5, ...}, "peak_gib": {"bf16, as diffusers ships it": 21.46, ...}}

The weights are random. A forward is the conditional branch, batch 1, in eager mode. diffusers pads the text to 2048
slots; int8kit packs it tight. A time is the median of `rounds` forwards after two to warm up, by the wall clock around
a synchronized call. "database" is the number of the database's entries. Without a GPU, "peak_gib" is empty and the
times mean nothing: the tiny model shows that the benchmark runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton

from int8kit import __version__, gpus, models
from int8kit.database import store
from int8kit.errors import InputError
from int8kit.kernels import gemm
from int8kit.quantization import replace_linears
from int8kit.runtime import ideogram4

FORMAT = "int8kit.bench-model/1"
WARM_UP = 2
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
    database, _ = store.merged_view(target, gemm.toolchain(), setting.database)
    device = "cuda" if present else "cpu"
    with torch.device(device):
        transformer = model.build()
        inputs = {case: model.inputs(transformer, case) for case in (stock, tight)}
    ms: dict[str, float] = {}
    peak_gib: dict[str, float] = {}

    def forward(name: str, case: models.Case) -> None:
        if present:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            ms[name] = round(_milliseconds(lambda: transformer(**inputs[case]), setting.rounds), 1)
        if present:
            peak_gib[name] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        note(f"{name}: {ms[name]} ms")

    forward(BF16_STOCK, stock)
    forward(BF16_TIGHT, tight)
    replace_linears(transformer, model.quantizes, lambda n, k: database.plan(n, k, gemm.toolchain()))
    forward(INT8_STOCK, stock)
    forward(INT8_TIGHT, tight)
    ideogram4.unmask(transformer)
    forward(INT8_UNMASKED, tight)
    return {
        "format": FORMAT,
        "gpu": present.name if present else None,
        "device": device,
        "model": model.name,
        "size": f"{setting.width}x{setting.height}",
        "text_tokens": setting.text_tokens,
        "rounds": setting.rounds,
        "database": len(database.entries),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "int8kit": __version__,
        "ms": ms,
        "peak_gib": peak_gib,
    }


def _milliseconds(call: Callable[[], Any], rounds: int) -> float:
    """Median of `rounds` synchronized calls after WARM_UP ones, by the wall clock."""
    times = []
    for i in range(rounds + WARM_UP):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i >= WARM_UP:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
