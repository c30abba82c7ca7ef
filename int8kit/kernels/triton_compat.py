"""Names that differ between versions of Triton, under one spelling. Triton 3.6 to 3.9."""

from __future__ import annotations

from types import ModuleType

from triton.experimental.gluon import language as gl


def alias(module: ModuleType, **newer: str) -> ModuleType:
    """A view of `module` in which functions have their names of Triton 3.6. newer: the name of each in Triton 3.9."""
    view = ModuleType(module.__name__)
    vars(view).update(vars(module))
    for name, new in newer.items():
        setattr(view, name, getattr(module, new, None) or getattr(module, name))
    return view


barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # `barrier` since Triton 3.7
