"""Device code and launchers, one module per kernel. Each kernel has its reference in `int8kit.reference`.

    gemm                         the entry point of the three GEMM kernels
    gemm_triton, gemm_mma_sync, gemm_wgmma
    epilogue, activations        device functions that the GEMM kernels share
    l2_swizzle, stream_k         order of tiles; stream-K
    quantize, rms_norm_quantize, residual_norm_quantize, swiglu_quantize, qk_norm_rope
    row_primitives               device functions that the row kernels share
    operands, launch             checks of tensors; launch without a look-up
    triton_compat                names that differ between versions of Triton

A launcher takes an explicit configuration and tensors on one device. With `TRITON_INTERPRET=1` in the environment
before triton is first imported, plain Triton kernels run on the CPU in Triton's interpreter, slowly. Gluon kernels do
not.
"""

from __future__ import annotations

from int8kit.toolchain import ANY_TOOLCHAIN, Toolchain


def present_toolchain() -> tuple[Toolchain, str]:
    """The toolchain of this process, and why no kernel can be compiled, or "".

    Where torch or Triton cannot be imported it is ANY_TOOLCHAIN, which compares with nothing.
    """
    try:
        from int8kit.kernels import gemm

        return gemm.toolchain(), ""
    except (ImportError, OSError, RuntimeError) as error:
        return ANY_TOOLCHAIN, (str(error).splitlines() or [type(error).__name__])[0]
