"""Result documents of all benchmarks: one schema, checked when a document is made and when a file is read.

    {"format": "int8kit.result/1", "benchmark": "model", "command": "int8kit bench model --size 1024x1024",
     "date": "2026-11-28T10:15:00Z", "versions": {"int8kit": "0.2.0", "python": "3.11.9", "torch": "2.11.0+cu130", ...},
     "device": "cuda", "gpu": {"name": "NVIDIA H200", "capability": "9.0", "memory_gib": 139.8, "number": 1},
     "state": {"before": {"sm_mhz": 1980, "memory_mhz": 3201, "power_w": 120, "temperature_c": 31, "throttle": []},
               "after": {...}},
     "policy": {"timing": "wall clock ...", "variant": null, "repairs": [], "database": {"files": ["h200.json"],
                "entries": 48}, "seeds": [0]},
     "complete": true,
     "rows": [{"name": "int8", "unit": "ms", "p20": 165.9, "p50": 166.1, "p80": 166.4, "rounds": 8, "peak_gib": 17.2}],
     "details": {"size": "1024x1024", ...}}

A row has a benchmark's own figures as further fields, and "details" has the figures that belong to no row. Other
unknown fields are refused. A document has no host name and no folder: a path is reduced to the name of its file.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from int8kit import __version__, damage, files
from int8kit.database.schema import GpuState, Text
from int8kit.errors import FileError
from int8kit.timing.captured import without_folders
from int8kit.timing.gpu_state import Sensors

FORMAT = "int8kit.result/1"
EARLIER_FORMATS = ("int8kit.bench/1", "int8kit.bench-fused/1", "int8kit.bench-model/1")
"""Formats of files that earlier versions of the benchmarks wrote. A benchmark may replace such a file."""

_REMEDY = "write one with `int8kit bench gemm -o FILE`, or with another benchmark"
Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Figure = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Unit = Literal["us", "ms", "s", "GiB", "dB", "ratio"]


def _utc(moment: datetime) -> datetime:
    if moment.utcoffset() != timedelta(0):
        raise ValueError("expected a time in UTC, such as 2026-11-28T10:15:00Z")
    return moment


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Versions(_Row):
    """Versions that decide a result; None where a package is not installed."""

    int8kit: Text
    python: Text
    torch: Text
    triton: Text | None = None
    diffusers: Text | None = None
    transformers: Text | None = None
    driver: Text | None = None
    cuda: Text | None = None


class GpuRow(_Row):
    """The GPU that was timed."""

    name: Text
    capability: Annotated[Text, Field(pattern=r"^\d+\.\d+$")]
    memory_gib: Figure
    number: Annotated[int, Field(ge=1)]  # of GPUs that the process sees; one of them is timed


class States(_Row):
    """State of the GPU before the first and after the last measurement; None without a GPU or without NVML."""

    before: GpuState | None = None
    after: GpuState | None = None


class DatabaseUsed(_Row):
    """The database that served: names of its files, and the number of its entries."""

    files: tuple[Text, ...] = ()
    entries: Count


class Policy(_Row):
    """How the benchmark measured, and on what, as far as it holds for all rows."""

    timing: Text
    variant: Text | None = None
    repairs: tuple[Text, ...] = ()
    database: DatabaseUsed | None = None
    seeds: tuple[Count, ...] = ()


class ResultRow(_Row):
    """Quantiles of one figure over the rounds. Further fields are a benchmark's own: texts, numbers, yes or no."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, bool | int | Finite | Text | None] = Field(init=False)

    name: Annotated[Text, Field(min_length=1)]
    unit: Unit
    p20: Figure
    p50: Figure
    p80: Figure
    rounds: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _ordered(self) -> ResultRow:
        if not self.p20 <= self.p50 <= self.p80:
            raise ValueError(f"p20 {self.p20}, p50 {self.p50}, p80 {self.p80}: expected them in ascending order")
        return self


class ResultDocument(_Row):
    """A complete result."""

    format: Literal["int8kit.result/1"]
    benchmark: Annotated[str, Field(pattern="^[a-z][a-z0-9-]*$")]
    command: Text
    date: Annotated[AwareDatetime, AfterValidator(_utc)]
    versions: Versions
    device: Literal["cuda", "cpu"]
    gpu: GpuRow | None
    state: States
    policy: Policy
    complete: bool  # false if the benchmark ended early
    rows: tuple[ResultRow, ...]
    details: dict[str, JsonValue]


class Spread(Protocol):
    """Quantiles as `timing` returns them."""

    @property
    def p20(self) -> float: ...
    @property
    def p50(self) -> float: ...
    @property
    def p80(self) -> float: ...


def header(
    benchmark: str, policy: Policy, *, device: str | None = None, argv: Sequence[str] | None = None
) -> dict[str, Any]:
    """The fields of a result that are known before anything is measured; `document` adds the others.

    device: "cuda" or "cpu"; default: "cuda" where there is one. argv: the command; default: that of this process.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    sensors = Sensors() if device == "cuda" else None
    return {
        "format": FORMAT,
        "benchmark": benchmark,
        "command": command_line(sys.argv if argv is None else argv),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": _versions(sensors.driver if sensors else None).model_dump(),
        "device": device,
        "gpu": _gpu().model_dump() if device == "cuda" else None,
        "state": {"before": sensors.read() if sensors else None, "after": None},
        "policy": policy.model_dump(mode="json"),
    }


def document(
    head: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    *,
    details: Mapping[str, Any] | None = None,
    complete: bool = True,
    after: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The whole result as JSON, checked against the schema and without folders in its texts.

    head: from `header`. after: state of the GPU after the last measurement (`Sensors.read`). Raises ValueError for
    figures that the schema refuses, such as NaN.
    """
    state = {**head["state"], "after": None if after is None else dict(after)}
    body = {"rows": [dict(row) for row in rows], "details": dict(details or {})}
    made = _without_folders({**head, "state": state, "complete": complete, **body})
    _validated(made)
    assert isinstance(made, dict)
    return made


def row(name: str, unit: Unit, times: Spread, rounds: int, *, digits: int = 3, **more: Any) -> dict[str, Any]:
    """One row of a result; more: the benchmark's own fields."""
    spread = {key: round(value, digits) for key, value in (("p20", times.p20), ("p50", times.p50), ("p80", times.p80))}
    return {"name": name, "unit": unit, **spread, "rounds": rounds, **more}


def gpu_state() -> dict[str, Any] | None:
    """The state of the current GPU, for `document`; None without a GPU or without NVML."""
    return Sensors().read() if torch.cuda.is_available() else None


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result with each row on one line. Raises FileError."""
    files.write_text(path, files.dump_rows(dict(result), "rows"))


def read(path: Path) -> ResultDocument:
    """The result in a file. Raises FileError for a file of another kind and for a damaged one."""
    found = files.read_json(path, FORMAT, remedy=_REMEDY)
    if "benchmark" not in found:  # every verb's document has this format
        raise FileError(f"{str(path)!r} is the result of another verb: expected the field 'benchmark'; {_REMEDY}")
    try:
        return _validated(found)
    except ValidationError as error:
        raise FileError(f"{str(path)!r} is damaged ({damage.first(error)}); {_REMEDY}") from None


def is_replaceable(path: Path) -> bool:
    """True if `path` is a result, or a file of a benchmark's earlier format."""
    return files.is_ours(path, FORMAT, *EARLIER_FORMATS)


def command_line(argv: Sequence[str]) -> str:
    """The command as a shell takes it, on one line. A path keeps the name of its file only; the first is the program.

    >>> command_line(["/opt/venv/bin/int8kit", "bench", "gemm", "--db=/data/somebody/h200.json"])
    'int8kit bench gemm --db=h200.json'
    """
    words = [_without_home(word) for word in argv]
    if words[:1] == ["__main__.py"]:  # python -m int8kit
        words[0] = "int8kit"
    shown = shlex.join(words)
    return "".join(c if c.isprintable() else "?" for c in shown)


def _without_home(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    if value.startswith(("/", "~")):
        return f"{option}{equals}{Path(value).name}"
    return option + equals + without_folders(value)


def _validated(found: Mapping[str, Any]) -> ResultDocument:
    return ResultDocument.model_validate_json(json.dumps(found, allow_nan=False), strict=True)


def _without_folders(value: Any) -> Any:
    """`value` with `without_folders` applied to each of its texts; keys stay."""
    if isinstance(value, str):
        return without_folders(value)
    if isinstance(value, Mapping):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(one) for one in value]
    return value


def _versions(driver: str | None) -> Versions:
    return Versions(
        int8kit=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_installed("triton"),
        diffusers=_installed("diffusers"),
        transformers=_installed("transformers"),
        driver=driver,
        cuda=torch.version.cuda,
    )


def _installed(package: str) -> str | None:
    """Version of a package, without its import; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> GpuRow:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return GpuRow(
        name=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        memory_gib=round(properties.total_memory / 2**30, 1),
        number=torch.cuda.device_count(),
    )
