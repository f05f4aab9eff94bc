"""What all tests share: the one tolerance table, the comparison that reads it, and repeatable property tests."""

from typing import Any

import torch
from hypothesis import settings
from torch import Tensor

# Largest allowed error, relative to the largest expected value of a tensor.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-10}
# Smaller errors are of no account: numbers about 1 that cancel out leave as much.
ROUNDING = {torch.bfloat16: 2e-3, torch.float32: 1.2e-7, torch.float64: 2.3e-16}
# Another order of operations can be as much less exact as the plain one, where both lose digits.
TIMES_THE_ROUGH_ERROR = 8

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=20)
settings.load_profile("repeatable")
torch.set_num_threads(1)


def assert_close(actual: Any, expected: Any, name: str = "value", *, rough: Any = None) -> None:
    """Assert that two tensors, or two equal trees of tuples of them, agree within the tolerance of their dtype.

    Where the dtypes differ, the coarser one decides. Values that are not finite never agree. `rough` is what a plain
    computation in the coarser dtype gives; several times its error is allowed too, as where large terms cancel.
    """
    if isinstance(expected, tuple | list):
        assert len(actual) == len(expected), f"{name} has {len(actual)} parts, expected {len(expected)}"
        names = getattr(expected, "_fields", range(len(expected)))
        for part, a, e, r in zip(names, actual, expected, rough or [None] * len(expected), strict=True):
            assert_close(a, e, f"{name}.{part}", rough=r)
        return
    _assert_tensors_close(actual, expected, name, rough)


def _assert_tensors_close(actual: Tensor, expected: Tensor, name: str, rough: Tensor | None) -> None:
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), f"{name} differs"
        return
    actual_64, expected_64 = actual.detach().double(), expected.detach().double()
    assert bool(actual_64.isfinite().all()), f"{name} is not finite"
    assert bool(expected_64.isfinite().all()), f"the expected {name} is not finite"
    error = float((actual_64 - expected_64).abs().max())
    scale = float(expected_64.abs().max())
    coarser = max(actual.dtype, expected.dtype, key=TOLERANCE.__getitem__)
    allowed = max(TOLERANCE[coarser] * scale, ROUNDING[coarser])
    if rough is not None:
        allowed = max(allowed, TIMES_THE_ROUGH_ERROR * float((rough.detach().double() - expected_64).abs().max()))
    assert error <= allowed, f"{name} is off by {error:.1e}, allowed {allowed:.1e}: its scale is {scale:.1e}"
