"""Implementations under test: GEMMs of int8kit and of other libraries, and any function that a user names.

    find("torch._int_mm", executor)        find("mypackage.gemm:scaled", executor)

An `Implementation` is one or two functions and the domain that its documentation promises: `to_supported_domain` moves
an example into the domain, so that a documented refusal is no failure. A user's function has one of two signatures:

    accumulators(xq, wq) -> int32 [M, N]                                two parameters
    scaled_mm(xq, wq, sx, sw, bias, out_dtype) -> out_dtype [M, N]      six, bias may be None

with xq [M, K] and wq [N, K] int8, sx [M] and sw [N] fp32. A function that takes other operands needs a wrapper of a few
lines; guessing from the names of parameters was rejected.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from int8kit import peers
from int8kit.errors import InputError
from int8kit.kernels import gemm
from int8kit.peers import Domain, Peer
from int8kit.spec import TileConfig
from int8kit.verify.examples.strategies import Draw
from int8kit.verify.executors import Executor

OURS = peers.OURS


@dataclass(frozen=True)
class Implementation:
    """An INT8 GEMM under test, with at least one of `accumulators` and `output`.

    `takes_out`: the functions also take `out`, the tensor that they write. `tiles`: the configurations of int8kit's
    kernels. `strides`: the functions take rows that are further apart than K elements.
    """

    name: str
    device: str
    accumulators: Callable[..., torch.Tensor] | None = None  # (example, xq, wq) -> int32 [M, N]
    output: Callable[..., torch.Tensor] | None = None  # (example, xq, wq, sx, sw, bias) -> out_dtype [M, N]
    swiglu: Callable[..., torch.Tensor] | None = None  # likewise -> out_dtype [M, N / 2]
    to_supported_domain: Callable[[Draw], Draw] = lambda d: d
    tiles: tuple[TileConfig, ...] = ()
    strides: bool = True
    takes_out: bool = False
    row_kernels: bool = False

    def run(
        self, d: Draw, x: torch.Tensor, w: torch.Tensor, sx: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The output, or the accumulators of an implementation without an epilogue."""
        if self.output is not None:
            return self.output(d, x, w, sx, sw, bias)
        assert self.accumulators is not None
        return self.accumulators(d, x, w)


def int8kit(executor: Executor, tiles: tuple[TileConfig, ...] = ()) -> Implementation:
    """int8kit's kernels on an executor. An example brings its configuration; `tiles` are the others to compare with."""

    def accumulators(d: Draw, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return gemm.accumulate(x, w, config=d.config, out=out, arch=executor.arch)

    def output(d: Draw, *operands: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        return gemm.scaled_mm(*operands, config=d.config, out_dtype=d.out_dtype, out=out, arch=executor.arch)

    def swiglu(d: Draw, *operands: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        return gemm.scaled_mm_swiglu(*operands, config=d.config, out_dtype=d.out_dtype, out=out, arch=executor.arch)

    # the row kernels have one source and no configuration, so one executor is enough
    return Implementation(
        OURS, executor.device, accumulators, output, swiglu, tiles=tiles, takes_out=True,
        row_kernels=executor.arch is None,
    )  # fmt: skip


def find(name: str, executor: Executor, tiles: tuple[TileConfig, ...] = ()) -> Implementation:
    """The implementation of that name: int8kit, one of `peers.PEERS`, or module:function.

    Raises UnknownName, or InputError for a library or a function that cannot be imported.
    """
    peers.check_names([name])
    if name == OURS:
        return int8kit(executor, tiles)
    if name in peers.PEERS:
        try:
            return _library(peers.PEERS[name], executor.device)
        except ImportError as error:
            raise InputError(f"{name} is not installed here ({error}); install it, or leave it out") from None
    return _users(name, executor.device)


def _library(peer: Peer, device: str) -> Implementation:
    prepare = peer.load(device, False)
    out_dtypes = tuple(getattr(torch, name) for name in peer.domain.out_dtypes)

    def output(d: Draw, x: torch.Tensor, w: torch.Tensor, sx: Any, sw: Any, bias: Any) -> torch.Tensor:
        return prepare(x, w, sx, sw, bias, torch.empty(len(x), len(w), dtype=d.out_dtype, device=x.device))()

    def accumulators(d: Draw, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        sx, sw = torch.ones(len(x), device=x.device), torch.ones(len(w), device=x.device)
        return prepare(x, w, sx, sw, None, torch.empty(len(x), len(w), dtype=torch.int32, device=x.device))()

    sums = peer.returns == "accumulators"
    into = partial(_into, domain=peer.domain, out_dtypes=out_dtypes)
    return Implementation(
        peer.name, device, accumulators if sums else None, None if sums else output, to_supported_domain=into,
        strides=False,
    )  # fmt: skip


def _into(d: Draw, domain: Domain, out_dtypes: tuple[torch.dtype, ...]) -> Draw:
    """The example nearest to `d` inside a library's domain."""
    m, n, k, step = d.shape.m, d.shape.n, d.shape.k, domain.multiple
    shape = replace(d.shape, m=max(m, domain.min_m), n=-(-n // step) * step, k=-(-k // step) * step)
    out_dtype = d.out_dtype if d.out_dtype in out_dtypes else torch.bfloat16
    bias = {"any": d.bias or out_dtype, "output": out_dtype, "float16": torch.float16}[domain.bias_dtype]
    with_bias = domain.bias == "always" or (domain.bias == "optional" and d.bias is not None)
    return replace(d, shape=shape, out_dtype=out_dtype, bias=bias if with_bias else None)


def _users(name: str, device: str) -> Implementation:
    module, _, function = name.partition(":")
    try:
        call = getattr(importlib.import_module(module), function)
        count = len(inspect.signature(call).parameters)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"implementation {name!r}: {error}; expected module:function with a module on PYTHONPATH"
        ) from None
    if count == 2:
        return Implementation(name, device, accumulators=lambda d, x, w: call(x, w))
    if count == 6:
        return Implementation(name, device, output=lambda d, *operands: call(*operands, d.out_dtype))
    raise InputError(
        f"implementation {name!r} takes {count} parameters; expected 2, (xq, wq) for accumulators, "
        "or 6, (xq, wq, sx, sw, bias, out_dtype)"
    )
