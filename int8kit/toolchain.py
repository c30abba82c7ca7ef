"""Toolchain: everything that decides the code that a process compiles, and how much another toolchain's results say.

    Toolchain("3.7.1", {Kernel.TRITON: "5c4f5e4f33e8", ...})    what `kernels.gemm.toolchain()` gives

Two questions have two answers. An entry's *time* holds for a whole generation of Triton, since its versions compile the
kernels to the same code. A *proof* holds for one version only: nobody has looked at the code of another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from packaging.version import InvalidVersion, Version

from int8kit.errors import InputError
from int8kit.spec import NUMERICS_VERSION, Kernel


@dataclass(frozen=True)
class Toolchain:
    """What compiles kernels in a process. An empty field compares with nothing."""

    triton: str  # version
    kernels: Mapping[Kernel, str]  # `gemm.kernel_hash` of each
    numerics: int = NUMERICS_VERSION

    def is_other_triton(self, version: str) -> bool:
        """Whether Triton `version` compiles the kernels to other code than this one."""
        return bool(self.triton) and generation(version) != generation(self.triton)

    def is_stale(self, kernel: Kernel, kernel_hash: str) -> bool:
        """Whether `kernel` has changed since it had this hash."""
        return self.kernels.get(kernel, kernel_hash) != kernel_hash

    def proves(self, kernel: Kernel, *, kernel_hash: str, triton: str, numerics: int) -> bool:
        """Whether a verification with these is one of what this toolchain compiles."""
        same_triton = not self.triton or release(triton) == release(self.triton)
        return same_triton and not self.is_stale(kernel, kernel_hash) and numerics == self.numerics


ANY_TOOLCHAIN = Toolchain("", {})
"""For questions that no toolchain decides, such as what a file holds for a shape."""

_GENERATIONS = ("3.6", "3.8")
OLDEST = Version(_GENERATIONS[0])
"""Of the versions of Triton that can compile the kernels."""


def release(version: str) -> Version:
    """A version of Triton. Raises InputError for a text that is none."""
    try:
        return Version(version)
    except InvalidVersion:
        raise InputError(f"Triton {version!r}: expected a version such as 3.7.1") from None


def generation(version: str) -> str:
    """3.7.1 -> 3.6: the first Triton that compiles these kernels to the code that `version` does.

    3.8 is a border: from there on a prefetch pass doubles the registers of some int8 tiles on sm_80 to sm_89.
    """
    wanted = release(version).release[:2]
    known = [name for name in _GENERATIONS if Version(name).release <= wanted]
    return known[-1] if known else _GENERATIONS[0]


_NEWEST = (3, 9)


def unsupported(version: str) -> str | None:
    """The reason why Triton `version` is refused, or None.

    Versions 3.6 and 3.7 pass the GPU tests. Versions 3.8 and 3.9 compile every kernel, and no GPU has run the result.
    """
    if OLDEST.release <= release(version).release[:2] <= _NEWEST:
        return None
    newest = ".".join(map(str, _NEWEST))
    return f"Triton {version} is not supported: expected {OLDEST} to {newest}; run pip install 'triton>=3.6,<3.10'"


def require_supported() -> None:
    """Raise InputError if the installed Triton is refused. Reads the package's version and does not import it."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return
    if reason := unsupported(version):
        raise InputError(reason)
