"""Trace of a model: every GEMM that one forward pass on fake tensors dispatches, written to a shapes file.

    {"format": "int8kit.shapes/1", "model": "ideogram4", "text_tokens": 200,
     "cases": [{"height": 1024, "width": 1024, "batch": 1, "text_tokens": 200, "slots": 200, "branch": "cond",
                "tokens": 4296, "gemm_flops": ..., "attention_flops": ...,
                "joined": [{"m": 4296, "n": 13824, "k": 4608, "count": 34, "epilogue": "none",
                            "layers": ["layers.*.attention.to_q", ...]}, ...],
                "gemms": [{"m": 4296, "n": 12288, "k": 4608, "count": 68, "bias": false, "op": "mm", "int8": true,
                           "layers": ["layers.*.feed_forward.w1", ...], "flops": ..., "share": 0.43}, ...],
                "attention": [{"batch": 1, "heads": 18, "queries": 4296, "keys": 4296, "head_dim": 256, "mask": true,
                               "count": 34, "flops": ...}]}]}

    m, n, k  out[m, n] = a[m, k] @ b[k, n], as dispatched
    count    number of products in one forward pass; a batched product counts once per element of its batch
    flops    2 m n k count
    share    part of the case's gemm_flops
    int8     quantized by `run`
    joined   GEMMs of the fused forward: linears with one input, whose weights have their rows together. n is the number
             of these rows; with the epilogue "swiglu" the output has half as many columns. Their FLOPs are those of
             the linears, so no sum has them

A `TorchDispatchMode` sees every product, no matter which module or function calls it. The rejected alternative, hooks
on `nn.Linear`, misses `addmm`, `mm` and `bmm` in a module's own code. Fake tensors have shapes but no data: the full
model is traced in a second, in under 1 GB, without weights and without a GPU. Attention is recorded one level higher,
at `scaled_dot_product_attention`, because its decomposition into products depends on the device.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from int8kit.models import Case, Model
from int8kit.shapes_schema import FORMAT

_ATEN = torch.ops.aten
# Positions of the two factors among an operator's arguments.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    _ATEN.mm.default: (0, 1),
    _ATEN.addmm.default: (1, 2),
    _ATEN.bmm.default: (0, 1),
    _ATEN.baddbmm.default: (1, 2),
}


@dataclass(frozen=True)
class Product:
    """One dispatched matrix product [m, k] @ [k, n], `batch` times."""

    op: str
    m: int
    n: int
    k: int
    batch: int
    bias: bool
    layer: str  # dotted name of the innermost running module


@dataclass(frozen=True)
class Attention:
    """One call of scaled_dot_product_attention, with queries [batch, heads, queries, head_dim]."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    mask: bool

    @property
    def flops(self) -> int:
        """Multiplications and additions of Q K^T and of P V: 4 batch heads queries keys head_dim."""
        return 4 * self.batch * self.heads * self.queries * self.keys * self.head_dim


class Recorder(TorchDispatchMode):
    """Recorder of every product and attention call inside `with recorder.watching(module)`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[Product] = []
        self.attentions: list[Attention] = []
        self._running: list[str] = []
        self._in_attention = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        places = _PRODUCTS.get(func)
        if places is not None and not self._in_attention:
            a, b = args[places[0]], args[places[1]]
            self.products.append(
                Product(
                    op=func.overloadpacket.__name__,
                    m=a.shape[-2],
                    n=b.shape[-1],
                    k=a.shape[-1],
                    batch=a.shape[0] if a.dim() == 3 else 1,
                    bias=places[0] == 1,
                    layer=self._running[-1] if self._running else "",
                )
            )
        return func(*args, **(kwargs or {}))

    @contextmanager
    def watching(self, module: torch.nn.Module) -> Iterator[Recorder]:
        """Record the products of `module`'s forward pass with their layer names. The hooks are removed afterwards."""
        handles = []
        for name, child in module.named_modules():
            # They return None: a hook's return value would replace the inputs or the output.
            handles.append(child.register_forward_pre_hook(lambda _m, _a, name=name: self._running.append(name)))
            handles.append(
                child.register_forward_hook(lambda _m, _a, _o: self._running.pop() and None, always_call=True)
            )
        try:
            with _AttentionCalls(self), self:
                yield self
        finally:
            for handle in handles:
                handle.remove()
            self._running.clear()

    @contextmanager
    def attention(self, record: Attention) -> Iterator[None]:
        """Record one attention call, and no product inside the block."""
        self.attentions.append(record)
        self._in_attention = True
        try:
            yield
        finally:
            self._in_attention = False


class _AttentionCalls(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False), **kwargs)
        query, key = call["query"], call["key"]
        batch, heads, queries, head_dim = query.shape
        masked = call.get("attn_mask") is not None
        with self.recorder.attention(Attention(batch, heads, queries, key.shape[-2], head_dim, masked)):
            return func(*args, **kwargs)


def record(module: torch.nn.Module, inputs: dict[str, Any]) -> Recorder:
    """Recorder after one forward pass of `module`, on fake, meta or real tensors."""
    recorder = Recorder()
    with torch.no_grad(), recorder.watching(module):
        module(**inputs)
    return recorder


def trace(model: Model, cases: Iterable[Case], on_case: Callable[[Case], None] = lambda _: None) -> dict[str, Any]:
    """The shapes document of `model` for `cases`. `on_case` is called after each case."""
    cases = list(cases)
    with FakeTensorMode():
        module = model.build()
        rows = []
        for case in cases:
            rows.append(_case_document(model, case, record(module, model.inputs(module, case))))
            on_case(case)
    return {"format": FORMAT, "model": model.name, "cases": rows}


def pattern(layer: str) -> str:
    """A layer's name without its indices: layers.7.attention.to_q -> layers.*.attention.to_q."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", layer)


def _case_document(model: Model, case: Case, recorder: Recorder) -> dict[str, Any]:
    counts: Counter[tuple[str, int, int, int, bool, bool]] = Counter()
    layers: dict[tuple[str, int, int, int, bool, bool], set[str]] = {}
    for p in recorder.products:
        key = (p.op, p.m, p.n, p.k, p.bias, p.op in ("mm", "addmm") and model.quantizes(p.layer))
        counts[key] += p.batch
        layers.setdefault(key, set()).add(pattern(p.layer))
    total = sum(2 * m * n * k * count for (_, m, n, k, _, _), count in counts.items())
    gemms: list[dict[str, Any]] = [
        {
            "m": m,
            "n": n,
            "k": k,
            "count": count,
            "bias": bias,
            "op": op,
            "int8": int8,
            "layers": sorted(layers[op, m, n, k, bias, int8]),
            "flops": 2 * m * n * k * count,
            "share": round(2 * m * n * k * count / total, 6),
        }
        for (op, m, n, k, bias, int8), count in counts.items()
    ]
    gemms.sort(key=lambda g: (-g["flops"], g["m"], g["n"], g["k"], g["bias"]))
    attention = [
        {
            "batch": a.batch,
            "heads": a.heads,
            "queries": a.queries,
            "keys": a.keys,
            "head_dim": a.head_dim,
            "mask": a.mask,
            "count": count,
            "flops": a.flops * count,
        }
        for a, count in Counter(recorder.attentions).items()
    ]
    return {
        "height": case.height,
        "width": case.width,
        "batch": case.batch,
        "text_tokens": case.text_tokens,
        "slots": case.text_slots,
        "branch": case.branch,
        "tokens": case.text_slots + case.image_tokens,
        "gemm_flops": total,
        "attention_flops": sum(a["flops"] for a in attention),
        "gemms": gemms,
        "joined": _joined(model, recorder.products),
        "attention": attention,
    }


def _joined(model: Model, products: Iterable[Product]) -> list[dict[str, Any]]:
    """The GEMMs of the fused forward, from the products of the linears that it joins."""
    by_layer = {p.layer: p for p in products if p.op in ("mm", "addmm") and model.quantizes(p.layer)}
    counts: Counter[tuple[int, int, int, str, tuple[str, ...]]] = Counter()
    for join in model.joins:
        for layer in by_layer:
            prefix = layer.removesuffix(join.layers[0])
            parts = [by_layer.get(prefix + end) for end in join.layers]
            if prefix == layer or None in parts:
                continue
            found = [part for part in parts if part is not None]
            if len({(part.m, part.k) for part in found}) == 1:
                names = tuple(sorted(pattern(part.layer) for part in found))
                counts[found[0].m, sum(part.n for part in found), found[0].k, join.epilogue, names] += 1
    return [
        {"m": m, "n": n, "k": k, "count": count, "epilogue": epilogue, "layers": list(names)}
        for (m, n, k, epilogue, names), count in sorted(counts.items())
    ]
