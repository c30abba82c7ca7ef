"""GPU records by alias, and the GPU of this machine.

    >>> get("RTX 3090").arch
    86

Figures are from the vendors' data sheets (dense rates, boost clocks). `l2_gb_s` is 32 bytes a clock and slice, an
estimate for the cost model. To add a GPU, add a record: no other module names one. Only `present` asks the driver.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

from int8kit import files
from int8kit.errors import FileError, UnknownName

SPEC_FORMAT = "int8kit.gpu/1"
ARCHS = (80, 86, 87, 88, 89, 90, 100, 101, 103, 110, 120, 121)
"""Architectures of GPUs with int8 tensor cores that a supported Triton compiles for."""
_RANGES: dict[str, tuple[int, int]] = {
    "sms": (1, 4096),
    "shared_memory": (101376, 1 << 20),  # each of ARCHS has at least 99 KiB
    "shared_memory_sm": (102400, 1 << 20),
    "threads_sm": (1024, 1 << 16),  # a block has up to 1024
    "l2_bytes": (1 << 16, 1 << 36),
    "memory_gib": (1, 1 << 16),
    "dram_gb_s": (1, 10**6),
    "l2_gb_s": (1, 10**6),
    "clock_mhz": (1, 10**5),
    "int8_tops": (1, 10**6),
    "bf16_tflops": (1, 10**6),
}
"""Figures that `read_spec` accepts. Any GPU of the next years is inside."""


@dataclass(frozen=True)
class Gpu:
    """Limits and rates of a GPU."""

    alias: str
    name: str  # as the driver spells it
    arch: int  # compute capability as in sm_86
    sms: int  # streaming multiprocessors
    shared_memory: int  # bytes that one block may use
    shared_memory_sm: int  # bytes of one multiprocessor
    threads_sm: int  # threads resident on one multiprocessor
    l2_bytes: int
    memory_gib: int
    dram_gb_s: float
    l2_gb_s: float
    clock_mhz: int  # boost
    int8_tops: float  # dense
    bf16_tflops: float  # dense, float32 accumulate


def _ampere(alias: str, name: str, arch: int, sms: int, l2_mib: int, gib: int, dram: float, l2: float, clock: int,
            tops: float, tflops: float) -> Gpu:  # fmt: skip
    """A GPU with the shared memory of GA102 and its successors: 100 KiB a multiprocessor, 1 KiB of it reserved."""
    return Gpu(alias, name, arch, sms, 101376, 102400, 1536, l2_mib << 20, gib, dram, l2, clock, tops, tflops)


def _datacenter(alias: str, name: str, arch: int, sms: int, kib: int, l2_mib: int, gib: int, dram: float, l2: float,
                clock: int, tops: float, tflops: float) -> Gpu:  # fmt: skip
    """A GPU with `kib` KiB of shared memory a multiprocessor, 1 KiB of it reserved."""
    return Gpu(alias, name, arch, sms, (kib - 1) << 10, kib << 10, 2048, l2_mib << 20, gib, dram, l2, clock, tops,
               tflops)  # fmt: skip


GPUS: dict[str, Gpu] = {
    gpu.alias: gpu
    for gpu in (
        _ampere("rtx3060", "NVIDIA GeForce RTX 3060", 86, 28, 3, 12, 360, 1360, 1777, 102, 25.5),
        _ampere("rtx3080", "NVIDIA GeForce RTX 3080", 86, 68, 5, 10, 760, 2190, 1710, 238, 59.5),
        _ampere("rtx3090", "NVIDIA GeForce RTX 3090", 86, 82, 6, 24, 936, 2600, 1695, 284, 71),
        _ampere("rtx4090", "NVIDIA GeForce RTX 4090", 89, 128, 72, 24, 1008, 5000, 2520, 660.6, 165.2),
        _ampere("l40s", "NVIDIA L40S", 89, 142, 96, 48, 864, 5000, 2520, 733, 362),
        _ampere("rtx5090", "NVIDIA GeForce RTX 5090", 120, 170, 96, 32, 1792, 6500, 2407, 838, 209.5),
        _datacenter("a100", "NVIDIA A100-SXM4-80GB", 80, 108, 164, 40, 80, 2039, 3600, 1410, 624, 312),
        _datacenter("h100", "NVIDIA H100 80GB HBM3", 90, 132, 228, 50, 80, 3350, 5500, 1980, 1979, 989),
        _datacenter("h200", "NVIDIA H200", 90, 132, 228, 50, 141, 4800, 5500, 1980, 1979, 989),
    )
}


def get(name: str) -> Gpu:
    """The record of an alias or of a driver's name: "rtx3090", "RTX 3090", "NVIDIA GeForce RTX 3090".

    Case, spaces and punctuation do not count. Raises UnknownName with the list of aliases.
    """
    wanted = _plain(name)
    for gpu in GPUS.values():
        if wanted in (_plain(gpu.alias), _plain(gpu.name)):
            return gpu
    raise UnknownName("GPU", name, GPUS, "describe another one in a file for `int8kit tune --gpu-spec`")


def _plain(name: str) -> str:
    """Letters and digits of a name without the vendor and the product line."""
    text = re.sub("[^a-z0-9]", "", name.lower())
    return text.removeprefix("nvidia").removeprefix("geforce")


def resolve(name: str | None) -> Gpu:
    """The named GPU; without a name the one of this machine; where there is none, the record of the RTX 3090."""
    return get(name) if name is not None else present() or get("rtx3090")


def read_spec(path: Path) -> Gpu:
    """The GPU that a JSON file describes: "format" and the fields of `Gpu`. Raises FileError.

    {"format": "int8kit.gpu/1", "alias": "mygpu", "name": "NVIDIA ...", "arch": 86, "sms": 46, ...}
    """
    row = files.read_json(path, SPEC_FORMAT, remedy=f"write {SPEC_FORMAT!r} and the fields of int8kit/gpus.py's Gpu")
    wanted = {field.name: field.type for field in fields(Gpu)}
    row.pop("format")
    if missing := sorted(set(wanted) - set(row)):
        raise FileError(f"{str(path)!r} lacks {', '.join(missing)}")
    if unknown := sorted(set(row) - set(wanted)):
        raise FileError(f"{str(path)!r} has the unknown field {unknown[0]!r}; expected {', '.join(wanted)}")
    for name, kind in wanted.items():
        if expected := _wrong(name, row[name], str(kind)):
            raise FileError(f"{str(path)!r}: {name} = {row[name]!r}; expected {expected}")
    gpu = Gpu(**row)
    if gpu.shared_memory > gpu.shared_memory_sm:
        raise FileError(
            f"{str(path)!r}: shared_memory = {gpu.shared_memory}; expected at most shared_memory_sm, "
            f"{gpu.shared_memory_sm}"
        )
    if (known := GPUS.get(gpu.alias)) is not None and gpu != known:
        name = next(name for name in wanted if getattr(gpu, name) != getattr(known, name))
        raise FileError(
            f"{str(path)!r}: {name} = {row[name]!r}, but {getattr(known, name)!r} in the record of {gpu.alias}; "
            "use another alias"
        )
    return gpu


def _wrong(name: str, value: object, kind: str) -> str | None:
    """The expected value of a field of `Gpu`, if `value` is not one. kind: the field's type."""
    if name == "alias":
        named = isinstance(value, str) and re.fullmatch("[a-z0-9][a-z0-9_-]{0,63}", value)  # it names a file
        return None if named else "small letters, digits, - and _"
    if name == "name":
        printable = isinstance(value, str) and bool(value.strip()) and value.isprintable()
        return None if printable else "a name of printable characters"
    if name == "arch":
        return None if type(value) is int and value in ARCHS else f"one of {', '.join(map(str, ARCHS))}"
    low, high = _RANGES[name]
    whole = kind == "int"
    if isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and low <= value <= high:
        return None
    return f"a {'whole ' if whole else ''}number from {low} to {high}"


def present() -> Gpu | None:
    """The record of the current CUDA device; None without a device, or where torch cannot be imported.

    A GPU without a record gets one from the driver's properties and under its own name. It takes the rates of the
    most similar known GPU, scaled by multiprocessors.
    """
    try:
        import torch
    except (ImportError, OSError):  # an OSError: a shared library of torch is missing
        return None
    if not torch.cuda.is_available():
        return None
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    for gpu in GPUS.values():
        if gpu.name == p.name:
            return gpu
    arch = p.major * 10 + p.minor
    like = min(GPUS.values(), key=lambda gpu: abs(gpu.arch - arch))
    share = p.multi_processor_count / like.sms
    block = int(getattr(p, "shared_memory_per_block_optin", like.shared_memory))
    return Gpu(
        alias="".join(c for c in p.name.lower() if c.isalnum()),
        name=p.name,
        arch=arch,
        sms=p.multi_processor_count,
        shared_memory=block,
        shared_memory_sm=block + 1024,
        threads_sm=int(p.max_threads_per_multi_processor),
        l2_bytes=int(getattr(p, "L2_cache_size", like.l2_bytes)),
        memory_gib=round(p.total_memory / 2**30),
        dram_gb_s=like.dram_gb_s * share,
        l2_gb_s=like.l2_gb_s * share,
        clock_mhz=like.clock_mhz,
        int8_tops=like.int8_tops * share,
        bf16_tflops=like.bf16_tflops * share,
    )
