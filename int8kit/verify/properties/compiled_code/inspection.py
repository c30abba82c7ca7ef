"""The work of a child process that compiles: every check on the code of its variants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import int8kit
from int8kit.spec import TileConfig
from int8kit.verify.process_pool import Report
from int8kit.verify.properties.compiled_code.launched import Code
from int8kit.verify.properties.compiled_code.variants import Variant

Check = Callable[[Code, TileConfig | None], str | None]


def checks() -> dict[str, Check]:
    """Every check by its name."""
    from int8kit.verify.properties.compiled_code import arithmetic, memory, offsets, synchronization

    return {
        "early start": synchronization.early_start,
        "stream-K counters": synchronization.counters,
        "mbarrier setup": synchronization.barrier_setup,
        "ring": synchronization.ring,
        "wgmma": synchronization.products,
        "staging buffers": memory.staging,
        "slots": memory.slots,
        "output masks": synchronization.masks,
        "offsets": offsets.offsets,
        "rounding": arithmetic.rounding,
        "operations": arithmetic.operations,
        "tensor cores": arithmetic.tensor_cores,
    }


def failure(code: Code, config: TileConfig | None) -> str | None:
    """The first check that the code fails, and how; or None."""
    found = ((name, check(code, config)) for name, check in checks().items())
    return next((f"{name}: {why}" for name, why in found if why), None)


def inspect(request: tuple[str, tuple[Variant, ...]], report: Report) -> str | None:
    """The first failure of the variants, or None. request: the package that the parent checks, and the variants."""
    from int8kit.verify.properties.compiled_code import launched

    package, wanted = request
    if (here := str(Path(int8kit.__file__).parent)) != package:
        raise AssertionError(f"expected the package {package}, got {here}; see PYTHONPATH")
    for variant in wanted:
        report(str(variant))
        try:
            why = failure(launched.code(variant.arch, variant.launch), variant.config)
        except Exception as error:  # a kernel that does not compile is a failure of the kernel
            why = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
        if why:
            return f"{variant}: {why}"
    return None
