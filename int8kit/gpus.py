"""GPU records by alias, and the GPU of this machine.

    >>> get("RTX 3090").arch
    86

`gpu_records` has the figures of the listed GPUs. Another GPU is described by the driver, by a file for `--gpu-spec`, or
by the header of a database that was written for it. A GPU is identified by name, architecture, multiprocessors, shared
memory and memory. Two products share the name RTX 3080, and a slice of a GPU may have the whole GPU's name.

Only `present` and `of_device` ask the driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from int8kit import files
from int8kit.errors import FileError, InputError, UnknownName
from int8kit.gpu_records import GPUS, Gpu

__all__ = ["ARCHS", "GPUS", "SPEC_FORMAT", "Gpu", "described", "get", "of_device", "present", "read_spec", "resolve",
           "same", "why_unsupported"]  # fmt: skip

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
_ALIAS = "[a-z0-9][a-z0-9_-]{0,63}"  # it names a file
_SIZES = (2, 4, 5, 6, 8, 10, 11, 12, 16, 18, 20, 24, 32, 40, 48, 64, 72, 80, 94, 96, 128, 141, 144, 180, 192, 288)
_USABLE = (0.88, 1.02)
"""Memory that the driver reports, as a share of the product's: error correction alone takes a sixteenth."""


def get(name: str) -> Gpu:
    """The GPU of an alias or of a driver's name: "rtx3090", "RTX 3090", "NVIDIA GeForce RTX 3090".

    A listed GPU, else one with a database file in the search path, else the present one. Case, spaces and punctuation
    do not count. Raises UnknownName with the list of aliases, and FileError for a damaged file of this alias.
    """
    wanted = _plain(name)
    if (found := GPUS.get(name) or _of_file(name)) is not None:
        return found
    for text in ("alias", "name"):  # an alias comes first: GPUs of the same name have different aliases
        if (found := _named(wanted, text, GPUS.values())) is not None:
            return found
    with_files = list(_with_files())
    here = None
    if "torch" in sys.modules or _has_driver():  # elsewhere a wrong name is reported at once, before torch is imported
        with contextlib.suppress(InputError):  # of another kind: it has no name here
            here = present()
    for text in ("alias", "name"):
        if (found := _named(wanted, text, [*with_files, *([here] if here else [])])) is not None:
            return found
    aliases = {*GPUS, *(gpu.alias for gpu in with_files)}
    raise UnknownName("GPU", name, aliases, "describe another one in a file for `int8kit tune --gpu-spec`")


def _has_driver() -> bool:
    """Whether NVIDIA's driver can be loaded here."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _named(wanted: str, text: str, listed: Iterable[Gpu]) -> Gpu | None:
    return next((gpu for gpu in listed if _plain(getattr(gpu, text)) == wanted), None)


def _plain(name: str) -> str:
    """Letters and digits of a name without the vendor and the product line."""
    text = re.sub("[^a-z0-9]", "", name.lower())
    return text.removeprefix("nvidia").removeprefix("geforce")


def resolve(name: str | None) -> Gpu:
    """The named GPU; without a name the one of this machine; where there is none, the record of the RTX 3090."""
    return get(name) if name is not None else present() or get("rtx3090")


def same(one: Gpu, other: Gpu) -> bool:
    """True if both describe the same kind of GPU, whatever their aliases and rates are."""
    known = (one.name, one.arch, one.sms, one.shared_memory) == (other.name, other.arch, other.sms, other.shared_memory)
    low, high = sorted((one.memory_gib, other.memory_gib))
    return known and low >= _USABLE[0] * high


def read_spec(path: Path) -> Gpu:
    """The GPU that a JSON file describes: "format" and the fields of `Gpu`. Raises FileError.

    {"format": "int8kit.gpu/1", "alias": "mygpu", "name": "NVIDIA ...", "arch": 86, "sms": 46, ...}
    """
    row = files.read_json(path, SPEC_FORMAT, remedy=f"write {SPEC_FORMAT!r} and the fields of gpu_records.py's Gpu")
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
        named = isinstance(value, str) and re.fullmatch(_ALIAS, value)
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


def described(identity: dict[str, Any], **driver: Any) -> Gpu:
    """A GPU that is not listed, from the header of a database file or from the driver.

    identity: alias, name, arch, sms, shared_memory, and where known memory_gib and l2_bytes. driver: further fields of
    `Gpu` where known. The rates that nobody has stated come from the most similar listed GPU, scaled by
    multiprocessors and clock.
    """
    known = {name: value for name, value in {**identity, **driver}.items() if value is not None}
    like = _similar(known["name"], known["arch"], known["sms"])
    share = known["sms"] / like.sms
    faster = share * known.get("clock_mhz", like.clock_mhz) / like.clock_mhz
    scaled = {
        "dram_gb_s": like.dram_gb_s * share,
        "l2_gb_s": like.l2_gb_s * faster,
        "int8_tops": like.int8_tops * faster,
        "bf16_tflops": like.bf16_tflops * faster,
        "shared_memory_sm": max(like.shared_memory_sm, known["shared_memory"] + 1024),
    }
    return replace(like, **{**scaled, **known})


def _similar(name: str, arch: int, sms: int) -> Gpu:
    """The listed GPU that is most similar: in architecture, then in the product line, then in multiprocessors."""

    def distance(gpu: Gpu) -> tuple[int, bool, float]:
        line = ("GeForce" in gpu.name) != ("GeForce" in name)  # a GeForce multiplies bf16 at half the rate
        return abs(gpu.arch - arch), line, abs(math.log(gpu.sms / sms))

    return min(GPUS.values(), key=distance)


def present() -> Gpu | None:
    """The current CUDA device's GPU; None without a device, or where torch cannot be imported.

    Raises InputError for a GPU that int8kit does not support.
    """
    try:
        import torch
    except (ImportError, OSError):  # an OSError: a shared library of torch is missing
        return None
    return of_device(torch.cuda.current_device()) if torch.cuda.is_available() else None


def of_device(device: int) -> Gpu:
    """The GPU of a CUDA device: a record, else the one of a database file, else what the driver describes.

    A GPU without a record has an alias of its own, which no other kind of GPU has: name, multiprocessors and memory.
    Raises InputError for a GPU that int8kit does not support.
    """
    import torch

    p: Any = torch.cuda.get_device_properties(device)
    if reason := why_unsupported(p):
        raise InputError(f"{reason}; hide this GPU with CUDA_VISIBLE_DEVICES= to use the CPU")
    gpu = _from_driver(p)
    listed = next((record for record in GPUS.values() if _is_product(gpu, record)), None)
    return listed or next((one for one in _with_files() if same(one, gpu)), None) or gpu


def why_unsupported(properties: Any) -> str | None:
    """The reason why no kernel of int8kit runs on a device with torch's `properties`; None if it is supported."""
    import torch

    if torch.version.hip is not None:
        return f"{properties.name}: this torch is built for ROCm, and int8kit's kernels run on NVIDIA GPUs only"
    arch = properties.major * 10 + properties.minor
    if arch < min(ARCHS):
        return f"{properties.name} is sm_{arch}: int8kit needs sm_80 or later, such as an A100 or a GeForce RTX 30"
    return None


def _from_driver(p: Any) -> Gpu:
    """The GPU as the driver describes it, under its own alias."""
    arch, sms, gib = p.major * 10 + p.minor, p.multi_processor_count, p.total_memory / 2**30
    product = next((size for size in _SIZES if _USABLE[0] * size <= gib <= size), round(gib))
    base = _plain(p.name).removesuffix("gpu")[:40] or "gpu"
    alias = f"{base}-{sms}sm-{product}gb"
    identity = {"alias": alias, "name": p.name, "arch": arch, "sms": sms}
    block = getattr(p, "shared_memory_per_block_optin", None) or _similar(p.name, arch, sms).shared_memory
    clock, memory_clock = getattr(p, "clock_rate", 0), getattr(p, "memory_clock_rate", 0)  # kHz
    bus = getattr(p, "memory_bus_width", 0)
    return described(
        identity, shared_memory=int(block), memory_gib=max(1, round(gib)), threads_sm=p.max_threads_per_multi_processor,
        l2_bytes=getattr(p, "L2_cache_size", 0) or None, clock_mhz=clock // 1000 or None,
        dram_gb_s=2 * memory_clock * bus / 8e6 or None,
        shared_memory_sm=getattr(p, "shared_memory_per_multiprocessor", 0) or None,
    )  # fmt: skip


def _is_product(gpu: Gpu, record: Gpu) -> bool:
    """True if the driver's description `gpu` is of the product of `record`."""
    key = (gpu.name, gpu.arch, gpu.sms, gpu.shared_memory)
    low, high = _USABLE
    return key == (record.name, record.arch, record.sms, record.shared_memory) and (
        low * record.memory_gib <= gpu.memory_gib <= high * record.memory_gib
    )


def _of_file(alias: str) -> Gpu | None:
    """The GPU of the database file `<alias>.json` in the search path, if it names a GPU that is not listed."""
    if not re.fullmatch(_ALIAS, alias) or alias in GPUS:
        return None
    for folder in files.database_folders():
        if (folder / f"{alias}.json").is_file() and (gpu := _header(folder / f"{alias}.json")) is not None:
            return gpu
    return None


def _with_files() -> Iterator[Gpu]:
    """GPUs that are not listed and have a database file in the search path. A file that cannot be read has none."""
    for folder in files.database_folders():
        for path in sorted(folder.glob("*.json")):
            if path.stem not in GPUS:
                with contextlib.suppress(FileError):
                    if (gpu := _header(path)) is not None:
                        yield gpu


def _header(path: Path) -> Gpu | None:
    """The GPU that a database file is for; None if the file has another name than its GPU. Raises FileError."""
    try:
        about = path.stat()
    except OSError:
        return None
    return _read_header(path.absolute(), about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=64)
def _read_header(path: Path, changed_ns: int, size: int) -> Gpu | None:
    """`_header` of a file with this date and size, read once."""
    document = files.read_any_json(path, remedy="delete it, and `int8kit tune` makes another")
    row = document.get("gpu") if isinstance(document, dict) else None
    names = ("alias", "name", "arch", "sms", "shared_memory", "memory_gib", "l2_bytes")
    identity = {name: row.get(name) for name in names} if isinstance(row, dict) else {}
    kinds = {field.name: str(field.type) for field in fields(Gpu)}
    faults = [name for name in names[:5] if _wrong(name, identity.get(name), kinds[name])]
    faults += [
        name for name in names[5:] if identity.get(name) is not None and _wrong(name, identity[name], kinds[name])
    ]
    if faults or identity["alias"] != path.stem:
        return None
    return described(identity)
