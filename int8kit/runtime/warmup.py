"""Compile the kernels of a model's fused forward ahead of `run`. They stay in Triton's cache on the disk.

    report = warm_up("ideogram4")     WarmUp(kernels=(Compiled("13824x4608, wgmma 128x128x128 ...", 1.9), ...), ...)

No weights are read. Each tile configuration that a plan of the model can choose runs once, so no prompt length and no
image size compiles later. Then one block of the model's width runs, for the row kernels and the attention.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from int8kit import gpus, models
from int8kit.database import store
from int8kit.database.database import Database
from int8kit.errors import InputError
from int8kit.kernels import gemm
from int8kit.layers import Int8Linear
from int8kit.lookup import Plan
from int8kit.models import Join, Model
from int8kit.progress import Progress, no_progress
from int8kit.runtime import denoise, variants
from int8kit.runtime.fused_ideogram4 import FusedIdeogram4
from int8kit.spec import GemmShape, Kernel, Operation, TileConfig, default_config

ROWS = 48
"""Rows of a trial: no kernel is compiled for a number of rows."""


@dataclass(frozen=True)
class Compiled:
    """A kernel, in words, and the seconds until its first launch had ended."""

    name: str
    seconds: float


@dataclass(frozen=True)
class WarmUp:
    """The kernels of a model on a device."""

    model: str
    device: str
    databases: tuple[Path, ...]
    kernels: tuple[Compiled, ...]

    @property
    def seconds(self) -> float:
        """Of all kernels."""
        return sum(kernel.seconds for kernel in self.kernels)


def warm_up(
    name: str = "ideogram4", gpu: str | None = None, database: Path | None = None, progress: Progress = no_progress
) -> WarmUp:
    """Compile every kernel that the fused forward of a model can launch on the present GPU.

    name: a model of `int8kit.models`, or a folder in diffusers' layout. gpu: alias of the GPU whose database serves;
    None: the present one. Raises UnknownName, FileError, and InputError for a full-size model without a CUDA device.
    """
    model = models.get(name)
    present = gpus.present()
    if present is None and model.name != models.TINY:
        raise InputError(f"no CUDA device for the model {model.name!r}: nothing is compiled without one")
    device = torch.device("cpu" if present is None else "cuda")
    toolchain = gemm.toolchain()
    found, paths = store.merged_view(store.served_gpu(gpu, database), toolchain, database)
    block = _one_block(model, device)
    jobs = [
        *_products(block, model, found, device),
        ("one block: row kernels and attention", lambda: _step(block, device)),
    ]
    step = progress("compiling", len(jobs))
    kernels = []
    for text, job in jobs:
        start = time.perf_counter()
        job()
        if device.type == "cuda":
            torch.cuda.synchronize()
        kernels.append(Compiled(text, time.perf_counter() - start))
        step()
    return WarmUp(model.name, "cpu" if present is None else present.name, paths, tuple(kernels))


def _one_block(model: Model, device: torch.device) -> Any:
    """The transformer with its first block alone, and random INT8 weights."""
    with torch.device("meta"):
        transformer: Any = model.build().to(torch.bfloat16)
    transformer.layers = transformer.layers[:1]
    transformer.to_empty(device=device)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    transformer.rotary_emb.inv_freq.fill_(0.1)  # a buffer without values in a model that was built without memory
    variants.convert(transformer, "int8", model.quantizes, lambda n, k: Plan(), device)
    return transformer.eval()


def _products(
    block: Any, model: Model, database: Database, device: torch.device
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each GEMM that a plan can choose: its name, and a launch."""
    toolchain, seen = gemm.toolchain(), set()
    for n, k, swiglu, bias in sorted(_weights(block, model)):
        plan, shape = database.plan(n, k, toolchain), GemmShape(4096, n, k)
        configs = plan.choosable(n, k, Operation.SWIGLU if swiglu else Operation.GEMM)
        if gemm.interpreted():  # it runs one kernel alone
            configs = {config for config in configs if config.kernel is Kernel.TRITON} or {default_config(shape)}
        for config in sorted(configs, key=str):
            key = (n, k, config, swiglu, bias)
            if key not in seen:
                seen.add(key)
                epilogue = (", SwiGLU" if swiglu else "") + (", bias" if bias else "")
                yield f"[{n}, {k}]{epilogue}: {config}", _launch(n, k, config, swiglu, bias, device)


def _weights(block: Any, model: Model) -> set[tuple[int, int, bool, bool]]:
    """(n, k, SwiGLU, bias) of each INT8 weight of the fused forward, joined and not."""
    layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, Int8Linear)}
    found = {(one.out_features, one.in_features, False, one.bias is not None) for one in layers.values()}
    for join in model.joins:
        found.update(_joined(join, layers))
    return found


def _joined(join: Join, layers: dict[str, Int8Linear]) -> Iterator[tuple[int, int, bool, bool]]:
    for name in layers:
        prefix = name.removesuffix(join.layers[0])
        parts = [layers[prefix + end] for end in join.layers if prefix + end in layers]
        if prefix != name and len(parts) == len(join.layers):
            n = sum(part.out_features for part in parts)
            yield n, parts[0].in_features, join.epilogue == "swiglu", parts[0].bias is not None


def _launch(
    n: int, k: int, config: TileConfig, swiglu: bool, bias: bool, device: torch.device
) -> Callable[[], torch.Tensor]:
    def launch() -> torch.Tensor:
        x = torch.ones(ROWS, k, dtype=torch.int8, device=device)
        w = torch.ones(n, k, dtype=torch.int8, device=device)
        sx, sw = torch.ones(ROWS, device=device), torch.ones(n, device=device)
        added = torch.zeros(n, dtype=torch.bfloat16, device=device) if bias else None
        product = gemm.scaled_mm_swiglu if swiglu else gemm.scaled_mm
        return product(x, w, sx, sw, added, config=config)

    return launch


def _step(block: Any, device: torch.device) -> None:
    """A step of both branches with one block, for one prompt and for two of other lengths."""
    config = block.config
    for texts in ((16,), (16, 7)):
        features = tuple(torch.zeros(n, config.llm_features_dim, device=device, dtype=torch.bfloat16) for n in texts)
        scene = denoise.Scene(features, 1, 64, 96)
        times = torch.tensor([0.5], device=device, dtype=torch.bfloat16)
        cond, uncond = FusedIdeogram4(block), FusedIdeogram4(block)
        branches = denoise.FusedBranches(cond, uncond, scene, times, graphs=False)
        branches.velocities(denoise.noise(scene, config.in_channels, 0, device), 0)
