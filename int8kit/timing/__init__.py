"""Timing on the GPU of this machine: interleaved samples, GPU state, operands larger than L2."""
