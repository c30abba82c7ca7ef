"""Toolchain of a process: the Triton version and kernel sources that decide the compiled code.

    Toolchain("3.7.1", {Kernel.TRITON: "5c4f5e4f33e8", ...})    as returned by `kernels.gemm.toolchain()`

Results of another toolchain count as follows:

    time    valid within a Triton generation: its versions compile the kernels to the same code
    proof   valid for one Triton version only: the code of other versions has not been compared
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata

from packaging.version import InvalidVersion, Version

from int8kit.errors import InputError
from int8kit.spec import NUMERICS_VERSION, Kernel


@dataclass(frozen=True)
class Toolchain:
    """Triton version, kernel hashes and numerics of a process. An empty field equals any value."""

    triton: str  # version, such as 3.7.1
    kernel_hashes: Mapping[Kernel, str]  # `gemm.kernel_hash` of each
    numerics: int = NUMERICS_VERSION

    def __hash__(self) -> int:
        return hash((self.triton, frozenset(self.kernel_hashes.items()), self.numerics))

    def is_other_triton(self, version: str) -> bool:
        """True if Triton `version` is of another generation: it compiles the kernels to other code."""
        return bool(self.triton) and generation(version) != generation(self.triton)

    def is_stale(self, kernel: Kernel, kernel_hash: str) -> bool:
        """True if the present hash of `kernel` is another than `kernel_hash`."""
        return self.kernel_hashes.get(kernel, kernel_hash) != kernel_hash

    def proves(self, kernel: Kernel, *, kernel_hash: str, triton: str, numerics: int) -> bool:
        """True if a verification with these values also holds for the code that this toolchain compiles."""
        same_triton = not self.triton or release(triton) == release(self.triton)
        return same_triton and not self.is_stale(kernel, kernel_hash) and numerics == self.numerics


ANY_TOOLCHAIN = Toolchain("", {})
"""Equals every toolchain: for questions about the contents of a file alone."""

_GENERATIONS = ("3.6", "3.8")
OLDEST = Version(_GENERATIONS[0])
"""The oldest Triton version that can compile the kernels."""


@lru_cache(maxsize=64)  # sorting the entries of a database asks for the same few versions a thousand times
def release(version: str) -> Version:
    """A Triton version, parsed. Raises InputError for any other text."""
    try:
        return Version(version)
    except InvalidVersion:
        raise InputError(f"Triton {version!r}: expected a version such as 3.7.1") from None


def generation(version: str) -> str:
    """The oldest Triton version that compiles the kernels to the same code as `version`: 3.7.1 -> 3.6.

    A generation starts with 3.8: its prefetch pass doubles the registers of some int8 tiles on sm_80 to sm_89.
    """
    wanted = release(version).release[:2]
    known = [name for name in _GENERATIONS if release(name).release <= wanted]
    return known[-1] if known else _GENERATIONS[0]


PORTABLE_ARCHS = (80, 86, 89)
"""Architectures whose code (mma.sync, cp.async) also runs on every newer GPU. Code of sm_90 with wgmma does not."""


def runnable_archs(arch: int) -> tuple[int, ...]:
    """The PORTABLE_ARCHS whose code runs on a GPU of `arch` (86 for sm_86), `arch` itself included if portable."""
    return tuple(code for code in PORTABLE_ARCHS if code <= arch)


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
