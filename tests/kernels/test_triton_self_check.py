"""What "auto" would run on a GPU for the first time is compared with the torch form there, and left alone if wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from xlstm_rl.kernels import dispatch
from xlstm_rl.kernels.mlstm_chunkwise import mlstm_chunkwise
from xlstm_rl.kernels.mlstm_reference import mlstm_recurrence
from xlstm_rl.kernels.slstm_reference import slstm_recurrence
from xlstm_rl.kernels.slstm_scan import slstm_scan
from xlstm_rl.kernels.triton_self_check import difference, why_not_trusted

CPU = torch.device("cpu")
KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "mlstm": (mlstm_recurrence, mlstm_chunkwise),
    "slstm": (slstm_recurrence, slstm_scan),
}
every_operation = pytest.mark.parametrize("operation", KERNELS)


def compared(operation: str, kernel: Callable[..., Any], dtype: torch.dtype = torch.float32) -> str | None:
    return difference(kernel, KERNELS[operation][1], operation, 16, dtype, CPU)


@every_operation
def test_kernels_that_are_right_are_trusted(operation: str) -> None:
    assert compared(operation, KERNELS[operation][0]) is None


@every_operation
def test_rounding_to_bfloat16_is_no_difference(operation: str) -> None:
    def in_bfloat16(*arguments: Any) -> Any:
        *tensors, state, reset, activation = arguments
        hidden, final = KERNELS[operation][0](*(x.float() for x in tensors), state, reset, activation)
        return hidden.bfloat16(), final

    assert compared(operation, in_bfloat16, torch.bfloat16) is None


def _ignore_resets(right: Callable[..., Any], *arguments: Any) -> Any:
    *tensors, reset, activation = arguments
    return right(*tensors, torch.zeros_like(reset), activation)


def _lose_a_gradient(right: Callable[..., Any], *arguments: Any) -> Any:
    first, *others = arguments
    return right(0.5 * first.detach() + 0.5 * first, *others)


def _leave_nan(right: Callable[..., Any], *arguments: Any) -> Any:
    hidden, final = right(*arguments)
    return hidden.masked_fill(torch.arange(hidden.shape[-1]) == 3, float("nan")), final


def _forget_the_final_state(right: Callable[..., Any], *arguments: Any) -> Any:
    hidden, final = right(*arguments)
    return hidden, final._replace(normalizer=0.9 * final.normalizer)


def _crash(right: Callable[..., Any], *arguments: Any) -> Any:
    raise RuntimeError("CUDA error: misaligned address\nmore")


@every_operation
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (_ignore_resets, "off by"),
        (_lose_a_gradient, "gradient by (q|gates) off by 5.0e-01"),
        (_leave_nan, "hidden off by nan after 1 steps"),
        (_forget_the_final_state, "final normalizer off by 1.0e-01"),
        (_crash, "RuntimeError: CUDA error: misaligned address$"),
    ],
)
def test_every_kind_of_mistake_is_found(operation: str, mistake: Callable[..., Any], message: str) -> None:
    found = compared(operation, lambda *arguments: mistake(KERNELS[operation][0], *arguments))
    assert found is not None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found)


def test_auto_falls_back_from_kernels_that_are_wrong_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dispatch._BACKENDS["triton"]._replace(
        why_not=lambda tensor, /: None, why_not_trusted=lambda tensor, /: "its mlstm of width 16 fails here"
    )
    monkeypatch.setitem(dispatch._BACKENDS, "triton", wrong)
    dispatch._warn_once.cache_clear()
    with FakeTensorMode():
        q = torch.empty(2, 3, 1, 16, device="cuda")
        with pytest.warns(RuntimeWarning, match="'triton' is not used here: its mlstm of width 16 fails here; using"):
            assert dispatch._choose("auto", q) is dispatch._BACKENDS["torch"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert dispatch._choose("triton", q) is wrong


@pytest.mark.parametrize("tensor", [torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16, device="meta")])
def test_nothing_is_checked_without_a_gpu(tensor: Tensor) -> None:
    assert why_not_trusted(tensor) is None
