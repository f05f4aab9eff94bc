"""Linear maps of many rows equal those of torch, gradients and all."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import assert_close
from xlstm_rl.kernels import linear as module
from xlstm_rl.kernels.linear import linear

pytestmark = pytest.mark.skipif(not module._USABLE, reason="this torch has no oneDNN, or not the processor for it")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Shapes of the left factors that oneDNN multiplied."""
    seen: list[Any] = []
    product: Any = module._product

    def multiply(rows: Tensor, *others: Any) -> Any:
        seen.append(tuple(rows.shape))
        return product(rows, *others)

    monkeypatch.setattr(module, "_product", multiply)
    return seen


def factors(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weight and bias."""
    torch.manual_seed(0)
    weight, bias = torch.randn(96, shape[-1], dtype=dtype) / shape[-1] ** 0.5, torch.randn(96, dtype=dtype)
    return torch.randn(*shape, dtype=dtype).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("shape", [(512, 96), (4, 128, 96), (700, 80)])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_equal_those_of_torch(shape: tuple[int, ...], bias: bool, products: list[Any]) -> None:
    arguments = factors(*shape)[: 3 if bias else 2]
    outer = torch.randn(*shape[:-1], 96)
    y, expected = linear(*arguments), F.linear(*arguments)
    assert_close(y, expected)
    assert_close(torch.autograd.grad(y, arguments, outer), torch.autograd.grad(expected, arguments, outer))
    assert len(products) == 3


def test_only_what_is_asked_for_is_computed(products: list[Any]) -> None:
    x, weight, _ = factors(512, 96)
    linear(x.detach(), weight).sum().backward()  # type: ignore[no-untyped-call]
    assert len(products) == 2


def test_second_derivatives_are_right() -> None:
    x, weight, _ = factors(512, 96)

    def second(y: Tensor) -> tuple[Tensor, ...]:
        (by_x,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        return torch.autograd.grad((by_x**2).sum(), (x, weight))

    assert_close(second(linear(x, weight)), second(F.linear(x, weight)))


@pytest.mark.parametrize("kind", ["few rows", "float64", "autocast", "switched off", "a function transform"])
def test_what_onednn_is_not_for_is_left_to_torch(
    kind: str, products: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, _ = factors(
        8 if kind == "few rows" else 512, 96, dtype=torch.float64 if kind == "float64" else torch.float32
    )
    if kind == "switched off":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with torch.autocast("cpu", enabled=kind == "autocast"):
        y = torch.func.vmap(linear, (0, None))(x[None], weight)[0] if "transform" in kind else linear(x, weight)
        expected = F.linear(x, weight)
    assert_close(y, expected)
    assert not products
