"""Facts about the GPU operators that need no GPU: shapes, gradients and tracing, with the torch forms in their place.

The kernels themselves are tested in tests/gpu.
"""
