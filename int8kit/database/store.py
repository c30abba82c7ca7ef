"""Database files: reading, writing under a lock, and the search path.

    load(Path("tuning_db/rtx3090.json"))            ->  Database
    merged_view(gpus.get("rtx3090"), toolchain)     ->  (Database, the files that it comes from)
    update(Path("tuning_db/rtx3090.json"), gpu, entries)

A file of another numerics version or of another GPU is refused as a whole. Files of earlier formats are read (see
`upgrade`) and written in the present format. `schema` defines the format.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import ValidationError

from int8kit import damage, files, gpus, locks
from int8kit.database import borrow, upgrade
from int8kit.database.database import Database, Key, identity_of
from int8kit.database.schema import FORMAT, Document, Entry, Stamp
from int8kit.errors import FileError, InputError
from int8kit.gpus import Gpu
from int8kit.kernels import present_toolchain
from int8kit.lookup import Plan
from int8kit.spec import NUMERICS_VERSION, GemmShape, Source, why_illegal
from int8kit.toolchain import Toolchain, require_supported

FORMATS = (FORMAT, upgrade.OLD_FORMAT)


def is_ours(path: Path) -> bool:
    """True if `path` is a tuning database of the present or an earlier format."""
    return files.is_ours(path, *FORMATS)


def read(path: Path) -> dict[str, Any]:
    """The JSON document of a file, unchecked. Raises FileError if it is no tuning database."""
    return files.read_json(path, *FORMATS, remedy=_remedy(path))


def _remedy(path: Path) -> str:
    """The remedy for a file that cannot be read. `int8kit tune` refuses to write over a damaged database."""
    if path.parent == user_path("x").parent and os.path.lexists(path):  # verbs read it without being told to
        return "delete it, and `int8kit tune` makes another"
    return "make one with `int8kit tune`, or name another file"


def load(path: Path, alias: str | None = None) -> Database:
    """The database in `path`.

    Raises FileError if the file is damaged, no tuning database, of another numerics version, or of another GPU than
    `alias`.
    """
    written = document = read(path)
    try:
        if document["format"] == upgrade.OLD_FORMAT:
            document = upgrade.upgraded(document)
        document = upgrade.with_present_names(document)
        # Through JSON: only there does pydantic's strict mode accept strings for enums and lists for tuples.
        found = Document.model_validate_json(json.dumps(document), strict=True)
        _check(found)
    except (TypeError, KeyError, ValueError, AttributeError, InputError) as error:
        raise FileError(f"{str(path)!r} is damaged ({_damage(error, written)}); {_remedy(path)}") from None
    header = found.gpu
    if found.numerics != NUMERICS_VERSION:
        raise FileError(f"{str(path)!r} has numerics {found.numerics}; expected {NUMERICS_VERSION}; {_remedy(path)}")
    if alias is not None and header.alias != alias:
        raise FileError(f"{str(path)!r} is for the GPU {header.alias!r}, not for {alias!r}; {_remedy(path)}")
    gpu, identity = gpus.GPUS.get(header.alias), header.model_dump(exclude_none=True)
    if gpu is None:
        gpu = gpus.described(identity)
    elif identity_of(gpu) != header:
        gpu = replace(gpu, **identity)
    return Database(gpu, tuple(sorted(found.entries, key=lambda e: e.key)), header, found.policies)


def _damage(error: Exception, document: dict[str, Any]) -> str:
    """One line about the first error of a damaged file."""
    if isinstance(error, ValidationError):
        return damage.first(error)
    if not isinstance(error, _Contradiction | InputError):  # a conversion to the present format met a wrong type
        try:
            Document.model_validate_json(json.dumps({**document, "format": FORMAT}), strict=True)
        except ValidationError as found:
            return damage.first(found)
    return files.lacks(error)


class _Contradiction(ValueError):
    """A row that no tuner writes."""


def _check(document: Document) -> None:
    """Raises _Contradiction or InputError for rows that no tuner writes."""
    gpu = document.gpu
    for entry in document.entries:
        shape = entry.shape  # raises ShapeError outside the kernels' domain
        for config in (
            entry.config,
            *(one.config for one in entry.runners_up or ()),
        ):  # `consolidate` may promote a runner-up
            reason = why_illegal(config, arch=gpu.arch, shared_memory=gpu.shared_memory)
            if reason:
                raise _Contradiction(f"{shape}: {reason}")
        if entry.source is not Source.MODELLED and entry.time_us is None:
            raise _Contradiction(f"{shape}: {entry.source} without time_us")
    twice = [key for key, count in Counter(entry.key for entry in document.entries).items() if count > 1]
    if twice:
        operation, n, k, m, triton = twice[0]
        raise _Contradiction(f"{operation} {GemmShape(m, n, k)} occurs twice for Triton {triton}")


def find(alias: str) -> Path | None:
    """The database file of a GPU: ./tuning_db/<alias>.json, else the shipped file, else None."""
    for folder in (Path("tuning_db"), files.shipped("tuning_db")):
        path = folder / f"{alias}.json"
        if path.is_file():
            return path
    return None


def user_path(alias: str) -> Path:
    """The user's own database of a GPU. `merged_view` merges it over the shipped one."""
    return files.user_folder() / f"{alias}.json"


def known() -> list[Path]:
    """The database files of all GPUs: those in ./tuning_db, else the shipped ones; and the user's own."""
    here = Path("tuning_db")
    folder = here if here.is_dir() else files.shipped("tuning_db")
    return [*sorted(folder.glob("*.json")), *sorted(user_path("x").parent.glob("*.json"))]


def merged_view(gpu: Gpu, toolchain: Toolchain, given: Path | None = None) -> tuple[Database, tuple[Path, ...]]:
    """The database that serves a GPU, and the files that it comes from. Raises FileError.

    given: the only file to read; nothing is borrowed then. By default the file that `find` returns, merged with the
    user's own. A user's entry whose kernel has changed since does not replace another entry. Except for a given file,
    the figures of `gpu` hold: a file for a GPU of other limits is refused.
    """
    base = given or find(gpu.alias)
    own = user_path(gpu.alias) if given is None else None
    paths = tuple(path for path in (base, own) if path is not None and (path == given or path.is_file()))
    database = Database(gpu)
    for path in paths:
        loaded = load(path, gpu.alias)
        present = {entry.key for entry in database.entries}
        fresh = [e for e in loaded.entries if e.key not in present or not e.is_stale(toolchain)]
        policies = {**database.policies, **loaded.policies}
        served, header = loaded.gpu, loaded.header
        if path != given:
            record = gpus.GPUS.get(gpu.alias, gpu)
            _check_record(path, served, record)
            served = record
            header = identity_of(record) if record.alias in gpus.GPUS else header
        database = replace(database.merged(fresh), gpu=served, header=header, policies=policies)
    if given is None:
        database = replace(database, lender=borrow.lender_of(database, toolchain, _readable))
    return database, paths


def _readable(alias: str) -> Database | None:
    """The database of a GPU, or None if there is no file or it cannot be read: `int8kit db check` reports that."""
    path = find(alias)
    try:
        return load(path, alias) if path else None
    except FileError:
        return None


def served_gpu(name: str | None, given: Path | None = None) -> Gpu:
    """The GPU whose database serves: the named one, else the present one, else the one of a `given` file, else rtx3090.

    A given file for the present kind of GPU serves under the file's alias. Raises UnknownName, FileError.
    """
    if name is not None or given is None:
        return gpus.resolve(name)
    of_file = load(given).gpu  # first: a missing file is reported before torch is imported
    here = gpus.present()
    return of_file if here is None or gpus.same(here, of_file) else here


def _check_record(path: Path, served: Gpu, record: Gpu) -> None:
    """Raise FileError for a file whose GPU has the alias of another GPU: its configurations may not run there."""
    for name in ("arch", "sms", "shared_memory"):
        found, known = getattr(served, name), getattr(record, name)
        if found != known:
            raise FileError(
                f"{str(path)!r} is for another GPU named {record.alias!r}: {name} = {found}, but {known} in "
                f"{record.name}; delete the file, and tune with another alias in --gpu-spec"
            )


def load_database(gpu: str | None = None) -> Database:
    """The tuning database that serves a GPU: ./tuning_db or the shipped file, with the user's own entries on top.

    gpu: an alias such as "rtx3090". Default: the GPU of this machine, or rtx3090 where there is none. Raises
    UnknownName for another alias, FileError for a damaged file.
    """
    target = gpus.resolve(gpu)
    return merged_view(target, present_toolchain()[0])[0]


def load_plans(gpu: str | None = None) -> Callable[[int, int], Plan]:
    """The function (n, k) -> `Plan` of a weight [n, k], from `load_database(gpu)` and for the installed Triton.

    `replace_linears` takes it as its argument `plan`; without it a layer calls `found_plan`. Where nothing
    is known, the plan chooses default configurations. Raises InputError for a Triton that is not supported.
    """
    require_supported()
    database, toolchain = load_database(gpu), present_toolchain()[0]
    return database.plans(toolchain)


class NotTuned(UserWarning):
    """A layer runs without a tuned configuration: the same bits, at lower speed."""


_found: dict[tuple[int, int, int], Plan] = {}  # device, n, k
_sources: dict[int, tuple[str, Callable[[int, int], Plan]]] = {}  # device -> alias of its GPU, its plans
_finding = threading.RLock()


def found_plan(device: int, n: int, k: int) -> Plan:
    """The plan of a weight [n, k] for the CUDA device with this index, from its GPU's database. Found once per process.

    The first weight for which nothing is known warns with `NotTuned`; so does a database that cannot be read. Raises
    InputError for a Triton that is not supported.
    """
    plan = _found.get((device, n, k))
    return _find_plan(device, n, k) if plan is None else plan


def _find_plan(device: int, n: int, k: int) -> Plan:
    with _finding:
        if (device, n, k) not in _found:
            if device not in _sources:
                _sources[device] = _source_of(device)
            alias, plans = _sources[device]
            plan = plans(n, k)
            is_first = all(other.configs for other in _found.values())
            _found[device, n, k] = plan
            if alias and not plan.configs and is_first:
                warnings.warn(
                    f"no entry of {alias} is near a weight [{n}, {k}], so default configurations serve it: run "
                    f"`int8kit tune --shape 4096x{n}x{k}`, with the rows of your input for 4096",
                    NotTuned,
                    stacklevel=2,
                )
        return _found[device, n, k]


def _source_of(device: int) -> tuple[str, Callable[[int, int], Plan]]:
    import torch

    require_supported()
    with torch.cuda.device(device):
        gpu = gpus.present()
    if gpu is None:  # tensors without memory, as `FakeTensorMode` has them
        return "", lambda n, k: Plan()
    try:
        database = merged_view(gpu, present_toolchain()[0])[0]
    except FileError as error:  # it costs speed and changes no bit: no reason to stop a model
        warnings.warn(f"{error}; until then default configurations serve", NotTuned, stacklevel=2)
        return "", lambda n, k: Plan()
    return gpu.alias, lambda n, k: database.plan(n, k, present_toolchain()[0])


def forget_plans() -> None:
    """Make `found_plan` read the databases again, for layers that are already built. Call it after tuning."""
    with _finding:
        _found.clear()
        _sources.clear()


def described(plan: Plan, n: int, k: int) -> str:
    """One line that names the entries which serve a weight [n, k]: those of its n and k, else the near ones."""
    shapes = sorted({candidate.shape for candidate in plan.candidates})
    own = [shape for shape in shapes if (shape.n, shape.k) == (n, k)]
    if not shapes:
        return f"best of {len(plan.configs)} by the cost model" if plan.configs else "default"
    names = ", ".join(map(str, (own or shapes)[:3]))
    more = len(own or shapes) - 3
    gpu = next((f" of {_sources[key[0]][0]}" for key, found in _found.items() if found is plan), "")
    return f"{'' if own else 'near '}{names}{f' and {more} more' if more > 0 else ''}{gpu}"


def update(path: Path, gpu: Gpu, entries: Iterable[Entry], *, force: bool = False) -> Database:
    """Merge `entries` into the file under a lock, atomically. Returns the file's database afterwards.

    Raises FileError for a file that is no tuning database; with `force` such a file is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_of(path):
        fresh = not path.exists() or (force and not is_ours(path))
        database = (Database(gpu) if fresh else load(path, gpu.alias)).merged(entries)
        database = replace(database, entries=tuple(entry.with_id() for entry in database.entries))
        files.write_text(path, database.dumps())
    return database


def stamp(path: Path, stamps: dict[Key, Sequence[Stamp]], proven: Database | None = None) -> bool:
    """Write verification stamps into the file. Returns False, with the file untouched, if they change nothing.

    proven: the verified database, if it is not this file's. Then only entries of the same configuration are stamped.
    Raises FileError.
    """
    with lock_of(path):
        before = load(path)
        if proven is not None:
            configs = {entry.key: entry.config for entry in proven.entries}
            same = {entry.key for entry in before.entries if configs.get(entry.key) == entry.config}
            stamps = {key: value for key, value in stamps.items() if key in same}
        after = before.stamped(stamps)
        if after != before:
            files.write_text(path, after.dumps())
    return after != before


def lock_of(path: Path, timeout: float = 60) -> locks.Lock:
    """A lock for the file `path`. The lock file is kept in the user's cache folder, so that `tuning_db/` stays clean.

    timeout: seconds that acquiring waits before it raises locks.Held.
    """
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    folder = Path(platformdirs.user_cache_dir("int8kit")) / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the lock folder {str(folder)!r} ({error.strerror}); set XDG_CACHE_HOME") from None
    return locks.Lock(folder / f"{name}.lock", str(path), timeout)
