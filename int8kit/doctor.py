"""An examination of this machine: which verbs work here, which database serves, and a remedy for each defect.

    examine()  ->  [Finding("Triton", "ok", "3.7.1"), Finding("GPU", "failed", "no CUDA device", "install ..."), ...]

A finding holds versions, names of GPUs and sizes. It holds no host name, no user name and no folder, so that its JSON
document can be attached to a bug report. Works without a GPU, without torch and without Triton.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import platformdirs
from packaging.requirements import InvalidRequirement, Requirement

from int8kit import __version__, files, gpus, shapes_file
from int8kit.database import store
from int8kit.errors import InputError, Int8kitError
from int8kit.gpus import Gpu
from int8kit.kernels import present_toolchain
from int8kit.spec import operation_of, plain
from int8kit.toolchain import ANY_TOOLCHAIN, OLDEST, release

GIB = 2**30
DISK_GIB = 5  # Triton's cache and the results of a tuning run
MEMORY_GIB = 8  # a compiling process takes about 0.5 GiB, the tiny pipeline 2
TESTED = ("3.6", "3.7")  # versions of Triton under which the shipped entries are proven
OLDEST_TORCH = "2.11"


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    name: str
    status: Literal["ok", "note", "failed"]  # failed: a verb that needs a GPU cannot work
    found: str
    remedy: str = ""


def examine(gpu: str | None = None) -> list[Finding]:
    """Every finding. gpu: whose database is examined; None: the present GPU's, else that of the RTX 3090."""
    return list(_findings(gpu))


def document(findings: Sequence[Finding]) -> dict[str, Any]:
    """The JSON document of an examination."""
    return {
        "works": all(finding.status != "failed" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }


def _findings(gpu: str | None) -> Iterator[Finding]:
    yield Finding("int8kit", "ok", __version__)
    yield _system()
    yield Finding("Python", "ok", platform.python_version())
    torch = _imported("torch")
    yield _torch(torch)
    yield _triton()
    yield _compiler()
    yield from _gpu(torch)
    yield from _extras()
    yield from _databases(gpu)
    yield _disk()
    yield _memory()


def _system() -> Finding:
    wsl = "microsoft" in platform.release().lower()
    version = re.match(r"[\d.]*\d", platform.release())  # what follows may be a name of its owner
    name = f"{platform.system()} {version[0] if version else ''} on {platform.machine()}" + (" (WSL)" if wsl else "")
    if sys.platform == "linux":
        return Finding("system", "ok", name)
    remedy = "use Linux or WSL for tune, verify and bench; trace-shapes, run on the CPU, db and doctor work here"
    return Finding("system", "failed", name, remedy)


def _imported(name: str) -> Any:
    """A module, or the reason why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken installation raises whatever it likes, and is to be reported
        return without_folders(next(iter(str(error).splitlines()), type(error).__name__))


def without_folders(text: str) -> str:
    """`text` with each path cut down to its last part."""
    return re.sub(r"(?:[A-Za-z]:)?[\\/](?:[^\\/\s'\":,;()]+[\\/])+", "", text)


def _torch(torch: Any) -> Finding:
    if isinstance(torch, str):
        return Finding("torch", "failed", f"cannot be imported: {torch}", f"pip install 'torch>={OLDEST_TORCH}'")
    built = f"{torch.__version__}, CUDA {torch.version.cuda}" if torch.version.cuda else f"{torch.__version__}, no CUDA"
    if release(torch.__version__.partition("+")[0]) < release(OLDEST_TORCH):
        return Finding("torch", "failed", built, f"pip install 'torch>={OLDEST_TORCH}'")
    return Finding("torch", "ok", built)


def _triton() -> Finding:
    triton = _imported("triton")
    if isinstance(triton, str):
        here = sys.platform == "linux"
        remedy = f"pip install 'triton>={OLDEST}'" if here else "Triton runs on Linux and WSL"
        return Finding("Triton", "failed", f"cannot be imported: {triton}", remedy)
    version = triton.__version__
    if release(version) < OLDEST:
        return Finding("Triton", "failed", version, f"pip install 'triton>={OLDEST}'")
    if not version.startswith(tuple(f"{minor}." for minor in TESTED)):
        proven = " and ".join(TESTED)
        return Finding(
            "Triton", "note", version, f"the shipped entries are proven under {proven}; run `int8kit verify`"
        )
    return Finding("Triton", "ok", version)


def _compiler() -> Finding:
    """Triton builds its launcher with the C compiler of the system."""
    found = next(
        (name for name in (os.environ.get("CC", ""), "gcc", "clang", "cc") if name and shutil.which(name)), None
    )
    if found:
        return Finding("C compiler", "ok", Path(found).name)
    return Finding("C compiler", "note", "none", "install gcc: Triton needs it to launch a kernel on a GPU")


def _gpu(torch: Any) -> Iterator[Finding]:
    driver = _driver()
    yield (
        Finding("driver", "ok", driver)
        if driver
        else Finding(
            "driver", "failed", "no NVIDIA driver", "install the NVIDIA driver; under WSL, install it on Windows"
        )
    )
    if isinstance(torch, str) or not torch.cuda.is_available():
        if isinstance(torch, str):
            remedy = "install torch first"
        elif torch.version.cuda is None:
            remedy = "this torch is built without CUDA; install a CUDA build of torch"
        else:
            remedy = "check `nvidia-smi` and CUDA_VISIBLE_DEVICES; without a GPU tune ranks with the cost model"
        yield Finding("GPU", "failed", "no CUDA device", remedy)
        return
    for device in range(torch.cuda.device_count()):
        yield _one_gpu(torch, device)


def _one_gpu(torch: Any, device: int) -> Finding:
    """Whether int8kit supports a CUDA device, and whether its figures are known."""
    properties = torch.cuda.get_device_properties(device)
    size = f"{properties.multi_processor_count} SMs, {properties.total_memory / GIB:.0f} GiB"
    text = f"{properties.name}, sm_{properties.major * 10 + properties.minor}, {size}"
    if reason := gpus.why_unsupported(properties):
        return Finding(f"GPU {device}", "failed", text, f"{reason}; use another GPU, or the CPU")
    gpu = gpus.of_device(device)
    if gpu.alias in gpus.GPUS:
        return Finding(f"GPU {device}", "ok", f"{text}: {gpu.alias}")
    if store.find(gpu.alias) or store.user_path(gpu.alias).is_file():
        return Finding(f"GPU {device}", "ok", f"{text}: {gpu.alias}, with a database and without a record")
    return Finding(f"GPU {device}", "note", f"{text}: {gpu.alias}, no record", "run `int8kit tune` to measure it")


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text):
            return found[0]
    except OSError:
        pass
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def _extras() -> Iterator[Finding]:
    """Packages of each extra that are missing or too old."""
    uses = {
        "run": "trace-shapes, run and compare", "nf4": "NF4 checkpoints", "lora": "LoRA", "verify": "verify",
        "tune": "tune", "images": "compare --images",
    }  # fmt: skip
    wanted: dict[str, list[Requirement]] = {extra: [] for extra in uses}
    try:
        lines = metadata.requires("int8kit") or []
    except metadata.PackageNotFoundError:
        yield Finding("packages", "note", "int8kit is not installed as a package", "pip install '.[all]' in the clone")
        return
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        for extra, listed in wanted.items():
            marker = requirement.marker if "extra" in str(requirement.marker) else None
            if marker is not None and marker.evaluate({"extra": extra}) and requirement.name != "int8kit":
                listed.append(requirement)
    for extra, listed in wanted.items():
        missing = [fault for requirement in listed if (fault := _fault(requirement))]
        if missing:
            remedy = f"pip install 'int8kit[{extra}]' for {uses[extra]}"
            yield Finding(f"extra {extra}", "note", ", ".join(missing), remedy)
        else:
            yield Finding(f"extra {extra}", "ok", "complete")


def _fault(requirement: Requirement) -> str | None:
    """Why a requirement is not met, or None."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"no {requirement.name}"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version}, needed {requirement.specifier}"
    return None


def _databases(name: str | None) -> Iterator[Finding]:
    """The database's files, the number of shipped shapes on each level of the lookup, and unproven configurations."""
    toolchain = present_toolchain()[0]
    try:
        gpu = _examined(name)
        database, paths = store.merged_view(gpu, toolchain)
        shapes = shapes_file.int8_shapes(shapes_file.read(files.shipped("shapes") / "ideogram4.json"))
    except Int8kitError as error:
        yield Finding("database", "failed", without_folders(str(error)), "repair or delete the file")
        return
    yield Finding("database", "ok", f"{gpu.alias}: {' and '.join(_label(path, gpu) for path in paths) or 'none'}")
    choices = [database.resolve(plain(shape), toolchain, operation_of(shape)) for shape in shapes]
    levels = Counter(choice.level for choice in choices)
    shares = ", ".join(f"{count} {level}" for level, count in levels.most_common())
    served = f"{len(choices)} shapes of ideogram4 on {gpu.alias}: {shares}"
    if set(levels) <= {"exact"}:
        yield Finding("lookup", "ok", served)
    else:
        yield Finding("lookup", "note", served, f"run `int8kit tune --gpu {gpu.alias}`")
    unproven = sum(not choice.is_verified for choice in choices)
    if toolchain is ANY_TOOLCHAIN:
        yield Finding("proofs", "note", "no Triton to compare them with", "install torch and Triton")
    elif unproven:
        text = f"{unproven} of {len(choices)} configurations unproven under Triton {toolchain.triton}"
        yield Finding("proofs", "note", text, f"run `int8kit verify --gpu {gpu.alias}` on a GPU")
    else:
        yield Finding("proofs", "ok", f"all {len(choices)} configurations, under Triton {toolchain.triton}")


def _examined(name: str | None) -> Gpu:
    """The named GPU, else the present one, else the RTX 3090. A GPU that is not supported has its own finding."""
    if name is not None:
        return gpus.get(name)
    try:
        return gpus.resolve(None)
    except InputError:
        return gpus.get("rtx3090")


def _label(path: Path, gpu: Gpu) -> str:
    """Name of a database file's role; its folder stays private."""
    if path == store.user_path(gpu.alias):
        return "your own database"
    return "the shipped database" if path.parent == files.shipped("tuning_db") else "./tuning_db"


def _disk() -> Finding:
    """Free space where kernels are cached and results are kept."""
    cache = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton"
    rooms = {}
    places = {
        "kernel cache": Path(cache),
        "your databases": Path(platformdirs.user_data_dir("int8kit")),
        "here": Path(),
    }
    for what, folder in places.items():
        folder = folder.absolute()
        existing = next((one for one in (folder, *folder.parents) if one.exists()), None)
        if existing is not None:
            rooms[what] = shutil.disk_usage(existing).free / GIB
    text = ", ".join(f"{what} {free:.0f} GiB free" for what, free in rooms.items())
    if rooms and min(rooms.values()) < DISK_GIB:
        return Finding("disk", "note", text, f"free at least {DISK_GIB} GiB, or set TRITON_CACHE_DIR to another disk")
    return Finding("disk", "ok", text)


def _memory() -> Finding:
    total, free = _memory_gib()
    if total is None:
        return Finding("memory", "note", "unknown on this system")
    text = f"{total:.0f} GiB" + (f", {free:.0f} GiB available" if free is not None else "")
    text += f"; {os.cpu_count()} CPU cores"
    if total < MEMORY_GIB:
        return Finding("memory", "note", text, f"tune takes 0.5 GiB a core; {MEMORY_GIB} GiB or more are comfortable")
    return Finding("memory", "ok", text)


def _memory_gib() -> tuple[float | None, float | None]:
    """Total and available memory, GiB."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        found = {name: int(kib) / 2**20 for name, kib in re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE)}
        return found["MemTotal"], found.get("MemAvailable")
    except (OSError, KeyError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, None
    except (AttributeError, ValueError, OSError):  # Windows
        return None, None
