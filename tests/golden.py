"""Golden bits: digests of the reference's results for fixed inputs, by numerics version.

    python tests/golden.py      adds the digests of the present numerics version to data/golden_bits.json

The inputs are integers of Python's random generator, whose sequence is the same in every version. So neither torch's
generator nor a rounding of the inputs can change a digest; only a change of the reference can.
"""

import hashlib
import json
import random
from itertools import product
from pathlib import Path

import torch

from int8kit import reference
from int8kit.spec import NUMERICS_VERSION

PATH = Path(__file__).parent / "data" / "golden_bits.json"
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def _integers(seed, count, bits):
    """Signed integers of `bits` bits."""
    drawn = random.Random(f"int8kit {seed}").randbytes(count * bits // 8)
    dtype = {8: torch.int8, 16: torch.int16, 32: torch.int32}[bits]
    return torch.frombuffer(bytearray(drawn), dtype=dtype).clone()


def numbers(seed, rows, columns, dtype):
    """Finite rows of different magnitude: 16-bit integers times a power of two, rounded once to `dtype`."""
    values = _integers(seed, rows * columns, 16).view(rows, columns).double()
    powers = (_integers(f"{seed} powers", rows, 8).double() / 16).floor() - 15  # 2**-23 to 2**-8
    return (values * 2.0 ** powers[:, None]).float().to(dtype)


def patterns(seed, rows, columns, dtype):
    """Arbitrary bits, with NaN, infinities, subnormal numbers and both zeros."""
    bits = _integers(seed, rows * columns, 16 if dtype is not torch.float32 else 32)
    special = torch.tensor([0, 1, -1, 0x7F80, 0x7C00, -0x8000, 0x7FC0, 0x0080], dtype=torch.int64)
    bits[::7] = special[torch.arange(len(bits[::7])) % len(special)].to(bits.dtype)
    return bits.view(rows, columns).view(dtype)


def _int8(seed, rows, columns):
    values = _integers(seed, rows * columns, 8).view(rows, columns).clone()
    values[0] = -128
    return values


def _scales(seed, count):
    """fp32 scales: ordinary, both zeros, subnormal, huge, NaN and infinite."""
    scales = numbers(seed, count, 1, torch.float32).view(-1) * 2.0**-10
    special = (0.0, -0.0, 2.0**-140, 2.0**120, torch.nan, torch.inf)
    scales[: len(special)] = torch.tensor(special)
    return scales


def cases():
    """{name: (function of `reference`, arguments, keyword arguments)}."""
    found = {}
    for name, dtype in FLOATS.items():
        found[f"quantize {name}"] = "quantize", (numbers("quantize", 17, 300, dtype),), {}
        found[f"quantize {name}, any bits"] = "quantize", (patterns("bits", 96, 3, dtype),), {}
        x, wq, sw = numbers("x", 9, 75, dtype), _int8("w", 14, 75), _scales("sw", 14)
        for bias_name, bias in {"none": None, **{b: numbers("bias", 1, 14, t)[0] for b, t in FLOATS.items()}}.items():
            found[f"linear {name}, bias {bias_name}"] = "linear", (x, wq, sw, bias), {}
            found[f"linear_swiglu {name}, bias {bias_name}"] = "linear_swiglu", (x, wq, sw, bias), {}
        vectors = [numbers(f"vector {i}", 2, 300, dtype) * 2.0**-4 for i in range(4)]
        a, b = numbers("a", 6, 300, dtype), numbers("b", 6, 300, dtype)
        given = vectors[0][0], vectors[1]
        for weight, modulation in product((given[0], None), (given[1], None)):
            which = f"{'' if weight is None else ' weight'}{'' if modulation is None else ' modulation'}" or " alone"
            found[f"rms_norm_quantize {name}{which}"] = "rms_norm_quantize", (a, weight, modulation, 1e-6), {}
        residual = a, b, vectors[0][0], vectors[1], vectors[2][0], vectors[3], 1e-5
        found[f"residual_norm_quantize {name}"] = "residual_norm_quantize", residual, {}
        found[f"swiglu_quantize {name}"] = "swiglu_quantize", (numbers("gu", 6, 600, dtype),), {}
        qkv, angles = numbers("qkv", 6, 3 * 2 * 64, dtype), numbers("angles", 6, 64, dtype) * 2.0**-2
        rope = qkv, vectors[0][0, :64], vectors[1][0, :64], angles[:3], angles[3:], 2, 1e-6
        found[f"qk_norm_rope {name}"] = "qk_norm_rope", rope, {}
    xq, wq = _int8("xq", 11, 2112), _int8("wq", 18, 2112)
    sx, sw = _scales("sx", 11), _scales("sw", 18)
    found["accumulate"] = "accumulate", (xq, wq), {}
    for name, dtype in FLOATS.items():
        for bias_name, bias in {"none": None, "fp32": numbers("bias", 1, 18, torch.float32)[0]}.items():
            for function in ("scaled_mm", "scaled_mm_swiglu"):
                found[f"{function} {name}, bias {bias_name}"] = function, (xq, wq, sx, sw, bias), {"out_dtype": dtype}
    found["silu"] = "silu", (numbers("silu", 64, 64, torch.float32) * 2.0**4,), {}
    found["silu, any bits"] = "silu", (patterns("silu", 64, 64, torch.float32),), {}
    found["mean_square"] = "mean_square", (numbers("mean", 5, 4608, torch.float32),), {}
    return found


def digest(result):
    """16 hexadecimal digits of one or several tensors: dtypes, shapes and bits. All NaN count as equal."""
    hashed = hashlib.sha256()
    for tensor in result if isinstance(result, tuple) else (result,):
        tensor = tensor.detach().cpu().contiguous()
        hashed.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.is_floating_point():
            nan = tensor.isnan()
            tensor = tensor.view(BITS[tensor.dtype]).masked_fill(nan, 0x7FC0)
        hashed.update(tensor.numpy().tobytes())
    return hashed.hexdigest()[:16]


def digests(functions=reference, device="cpu", names=None):
    """{name: digest} of each case, computed by the functions of a module on a device."""

    def on(value):
        return value.to(device) if isinstance(value, torch.Tensor) else value

    found = {}
    for name, (function, args, more) in cases().items():
        if names is None or function in names:
            found[name] = digest(getattr(functions, function)(*map(on, args), **more))
    return found


def known():
    """The committed digests: {numerics version: {name: digest}}."""
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def main():
    """Add the digests of the present version. Committed digests are never changed."""
    versions = known()
    if str(NUMERICS_VERSION) in versions:
        raise SystemExit(f"version {NUMERICS_VERSION} has its digests; raise NUMERICS_VERSION in int8kit/spec.py first")
    versions[str(NUMERICS_VERSION)] = digests()
    PATH.write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
