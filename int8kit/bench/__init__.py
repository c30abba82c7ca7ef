"""Benchmarks beside other kernels: one shape's tensors (`operands`), who takes part (`contestants`), one call to repeat
(`timing`), and the run from shapes to one JSON document (`gemm`)."""
