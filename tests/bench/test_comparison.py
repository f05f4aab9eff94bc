"""The comparison that the other tests rely on."""

import pytest
import torch

from tests.conftest import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("magnitude", [1e6, 1.0, 1e-3, 2e-7])
def test_tensor_of_the_wrong_sign_is_never_close(dtype: torch.dtype, magnitude: float) -> None:
    expected = magnitude * torch.tensor([1.0, -0.5], dtype=dtype)
    with pytest.raises(AssertionError, match="gradient is off by"):
        assert_close(-expected, expected, "gradient")


def test_errors_are_measured_by_the_magnitude_of_the_tensor() -> None:
    expected = torch.tensor([1e-3, 0.0], dtype=torch.float64)
    assert_close(expected + 5e-14, expected)
    with pytest.raises(AssertionError):
        assert_close(expected + 2e-13, expected)


def test_what_cancelling_leaves_is_close_to_zero() -> None:
    assert_close(torch.tensor([1e-16], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
