"""Faults of the torch operators, of the launch cache's key and of the stamps."""

from __future__ import annotations

from int8kit.verify.mutation.mutant import Mutant

FAULTS = (
    Mutant(
        "fake-linear-in-bfloat16", "ops.py",
        "return x.new_empty((*x.shape[:-1], wq.shape[0] // (1 + swiglu)))",
        "return x.new_empty((*x.shape[:-1], wq.shape[0] // (1 + swiglu)), dtype=torch.bfloat16)",
        "torch.compile takes the output of a linear for bfloat16, of whatever dtype x is", "operators",
    ),
    Mutant(
        "bias-rounded-on-a-cpu", "ops.py",
        "    return product(xq, wq, sx, sw, bias, out_dtype=out_dtype)\n",
        "    bias = None if bias is None else bias.to(out_dtype)\n"
        "    return product(xq, wq, sx, sw, bias, out_dtype=out_dtype)\n",
        "the CPU operator rounds the bias to the dtype of the output", "operators",
    ),
    Mutant(
        "stamp-of-any-kernel", "database/schema.py",
        "if s.of == own and toolchain.proves(", "if s.of == own or toolchain.proves(",
        "a stamp proves an entry under another kernel source", "stamps",
    ),
    Mutant(
        "key-without-n", "kernels/operands.py",
        "integers = self.n, self.k, *(matrix", "integers = self.k, self.k, *(matrix",
        "a kernel that was compiled for N a multiple of 16 is launched for another N", "launch cache",
    ),
    Mutant(
        "cpu-sums-in-float32", "ops.py",
        "    return product(xq, wq, sx, sw, bias, out_dtype=out_dtype)\n",
        "    if not swiglu:\n"
        "        sums = (xq.float() @ wq.float().t()).to(torch.int32)\n"
        "        return reference.dequantize(sums, sx, sw, bias, out_dtype)\n"
        "    return product(xq, wq, sx, sw, bias, out_dtype=out_dtype)\n",
        "the CPU operator adds in float32, which rounds beyond 2**24", "operators",
    ),
    Mutant(
        "cpu-scales-written", "ops.py",
        "    return product(xq, wq, sx, sw, bias, out_dtype=out_dtype)\n",
        "    return product(xq, wq, sx, sw.clamp_(min=0), bias, out_dtype=out_dtype)\n",
        "the CPU operator changes the scales of the weight in place", "operators",
    ),
    Mutant(
        "gradient-of-the-reference", "ops.py",
        "        with torch.no_grad():\n            return half", "        if True:\n            return half",
        "autograd records the reference's own operations", "operators",
    ),
    Mutant(
        "fake-rows-narrowed", "ops.py",
        "    return x.new_empty((*x.shape[:-1], wq", "    return x.new_empty((*map(int, x.shape[:-1]), wq",
        "torch.compile compiles a linear for one number of rows", "operators",
    ),
    Mutant(
        "autocast-keeps-float32", "ops.py",
        "if x.dtype in operand_checks.FLOATS else x", "if x.dtype in operand_checks.FLOATS[:2] else x",
        "a linear under autocast computes from x in float32", "gradients",
    ),
    Mutant(
        "gradient-without-scales", "gradient.py",
        "grad @ (wq * sw[:, None]).to(grad.dtype)", "grad @ wq.to(grad.dtype)",
        "the gradient of x lacks the scales of the weight", "gradients",
    ),
    Mutant(
        "gradient-of-bias-rounded-twice", "gradient.py",
        ".sum(0, dtype=bias.dtype)", ".sum(0).to(bias.dtype)",
        "the sum of the bias's gradient is rounded to the dtype of x first", "gradients",
    ),
    Mutant(
        "second-derivative-cut", "gradient.py",
        "        h = h + (exact - exact.detach())\n", "        h = h + 0 * exact.detach()\n",
        "the second derivative of SwiGLU lacks the part through its gate", "gradients",
    ),
    Mutant(
        "check-takes-float64", "operand_checks.py",
        "FLOATS = (torch.bfloat16, torch.float16, torch.float32)",
        "FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)",
        "the CPU takes float64, which a GPU refuses", "operators",
    ),
    Mutant(
        "check-of-a-layers-weight", "operand_checks.py",
        '    _rows_of_bytes("weight", weight)\n', "",
        "a layer takes a weight whose columns do not follow each other", "refusals",
    ),
    Mutant(
        "plan-by-its-beginning", "lookup.py",
        "@lru_cache(maxsize=1024)\ndef _plan_of(",
        "def _by_beginning(function: Callable[[str], Plan]) -> Callable[[str], Plan]:\n"
        "    seen: dict[str, Plan] = {}\n"
        "    return lambda text: seen.setdefault(text[:120], function(text))\n\n\n"
        "@_by_beginning\ndef _plan_of(",
        "plans whose texts begin alike are taken for one plan", "lookup",
    ),
    Mutant(
        "output-shared-by-calls", "kernels/gemm.py",
        "def _empty(", "@lru_cache(maxsize=64)\ndef _empty(",
        "a later call of the same x overwrites the output of an earlier one", "operators",
    ),
    Mutant(
        "fake-output-laid-out-as-x", "ops.py",
        "    x, wq = args[:2]\n    return x.new_empty(",
        "    x, wq = args[:2]\n"
        "    if not swiglu and wq.shape[0] == x.shape[-1]:\n"
        "        return torch.empty_like(x)\n"
        "    return x.new_empty(",
        "torch.compile takes the output of a square linear for one with the strides of x", "operators",
    ),
    Mutant(
        "autocast-takes-float64", "ops.py",
        "if x.dtype in operand_checks.FLOATS else x", "if x.is_floating_point() else x",
        "a linear takes float64 under autocast, which it refuses elsewhere", "gradients",
    ),
    Mutant(
        "gradient-of-bias-needs-rows", "gradient.py",
        "grad.reshape(-1, wq.shape[0]).sum(0,", "grad.flatten(0, -2).sum(0,",
        "the bias has no gradient where x has one axis", "gradients",
    ),
    Mutant(
        "gradient-of-contiguous-x", "gradient.py",
        "rows = x.reshape(-1, x.shape[-1]).contiguous()", "rows = x.reshape(-1, x.shape[-1])",
        "the backward of SwiGLU refuses a transposed x, which its forward takes", "gradients",
    ),
    Mutant(
        "second-derivative-without-bias", "gradient.py",
        "wq * sw[:, None], None if bias is None else bias.float())", "wq * sw[:, None])",
        "the gradient of x has no derivative for the bias", "gradients",
    ),
    Mutant(
        "stamp-of-a-spelling", "toolchain.py",
        "release(triton) == release(self.triton)", "triton == self.triton",
        "a stamp loses its proof where the same version of Triton is spelt in another way", "stamps",
    ),
    Mutant(
        "key-without-k-tail", "kernels/gemm_triton.py",
        "key = o.key and (config, o.k % config.block_k == 0, *o.key)", "key = o.key and (config, *o.key)",
        "a kernel without masks along K is launched for a K with a partial step", "launch cache",
    ),
    Mutant(
        "joined-bias-lost", "layers.py",
        "if any(b is not None for b in biases):", "if all(b is not None for b in biases):",
        "joined linears lose their biases if one of them has none", "layers",
    ),
    Mutant(
        "row-scales-written", "kernels/gemm.py",
        "    out = operands.out\n", "    out = operands.out\n    _ = operands.sx is None or operands.sx.abs_()\n",
        "negative scales of x become positive in place", "output",
    ),
    Mutant(
        "check-refuses-the-longest-row", "operand_checks.py",
        "_is_sure(k > K_MAX_HELD)", "_is_sure(k >= K_MAX_HELD)",
        "the CPU refuses a row of 16384, which a GPU takes", "operators",
    ),
    Mutant(
        "tied-bias-of-the-first", "quantization.py",
        "Int8Linear.from_int8(first.weight, first.weight_scale, bias, found)",
        "Int8Linear.from_int8(first.weight, first.weight_scale, first.bias, found)",
        "two linears with one weight get the bias of the first one", "modules",
    ),
    Mutant(
        "hooks-of-the-forward-alone", "quantization.py",
        "    for name in _HOOKS:", "    for name in _HOOKS[:3]:",
        "a layer loses the hooks before the forward and of the backward", "modules",
    ),
    Mutant(
        "scale-blocks-exchanged", "foreign_weights.py",
        "factor.repeat_interleave(block[0], 0)[:n].repeat_interleave(block[1], 1)[:, :k]",
        "factor.repeat_interleave(block[1], 0)[:n].repeat_interleave(block[0], 1)[:, :k]",
        "the rows and the columns of a block of scales are exchanged", "modules",
    ),
    Mutant(
        "vmap-along-the-first-axis", "gradient.py",
        "operator(x.movedim(in_dims[0] or 0, 0), *others), 0", "operator(x, *others), 0",
        "vmap along another axis of x than the first one computes other rows", "gradients",
    ),
    Mutant(
        "vmap-of-weights-in-place", "gradient.py",
        "one.select(dim, i).contiguous()", "one.select(dim, i)",
        "vmap along the columns of a weight is refused", "gradients",
    ),
    Mutant(
        "level-taken-for-a-tangent", "gradient.py",
        "if isinstance(operand, torch.Tensor) and forward_ad.unpack_dual(operand).tangent is not None:",
        "if isinstance(operand, torch.Tensor):",
        "a linear without a tangent is refused where another operation has one", "gradients",
    ),
    Mutant(
        "longest-k-refused", "spec.py", "K_MAX = 131071\n", "K_MAX = 131070\n",
        "a GEMM of the longest K that int32 holds is refused", "operators",
    ),
    Mutant(
        "output-of-one-column-refused", "kernels/quantize.py",
        "if k > 1 and q.stride(1) != 1:", "if q.stride(1) != 1:",
        "an output of one column needs a stride of 1, which says nothing", "quantize",
    ),
    Mutant(
        "new-layer-of-ones", "layers.py",
        "torch.full((out_features,), torch.nan, device", "torch.full((out_features,), 1.0, device",
        "a layer that was not loaded gives numbers", "layers",
    ),
    Mutant(
        "emptied-layer-not-marked", "layers.py",
        "made = made.fill_(torch.nan)  # of to_empty", "made = made.fill_(1.0)  # of to_empty",
        "a layer that was moved from meta without values gives numbers", "layers",
    ),
    Mutant(
        "old-weights-not-found", "layer_state.py",
        '_OLD_NAMES = {"wq": "weight", "sw"', '_OLD_NAMES = {"sw"',
        "the weights of an earlier version's state dict are not found", "layers",
    ),
    Mutant(
        "policy-leaves-the-smallest", "quantization.py",
        "if min(n, k) < policy.smallest:", "if min(n, k) <= policy.smallest:",
        "the default policy leaves a linear of the smallest size that it should take", "modules",
    ),
    Mutant(
        "largest-numbers-divided-by-128", "foreign_weights.py", ".float() / 127)", ".float() / 128)",
        "the scales of an 8-bit weight of bitsandbytes are too small", "modules",
    ),
)  # fmt: skip
