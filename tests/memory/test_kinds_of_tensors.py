"""Tensors whose memory does not hold their numbers as they are are read right or refused, wherever they come in."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from tests.conftest import assert_close
from tests.kernels import cases
from xlstm_rl.kernels import causal_conv
from xlstm_rl.memory import leaves, make_memory, map_leaves


def negative(x: Tensor) -> Tensor:
    """The same numbers, noted as the negatives of those in memory."""
    view = torch.complex(x, -x).conj().imag
    assert view.is_neg() and torch.equal(view, x)
    return view


def spread(x: Tensor) -> Tensor:
    return torch.stack((x, x), -1)[..., 0]


def zeros_without_memory(x: Tensor) -> Tensor:
    return torch._efficientzerotensor(x.shape, dtype=x.dtype)


def one_for_all(x: Tensor) -> Tensor:
    return x[:1].clone().expand_as(x)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "negative": negative,
    "spread": spread,
    "zeros without memory": zeros_without_memory,
    "one for all": one_for_all,
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_operation = pytest.mark.parametrize("operation", cases.OPERATIONS)


def plain(x: Tensor) -> Tensor:
    """The same numbers in order, in memory of their own."""
    return torch.zeros(x.shape, dtype=x.dtype).copy_(x)


def replaced(case: cases.Case, at: int, change: Callable[[Tensor], Tensor]) -> cases.Case:
    """The case with one of its tensors changed: of the sequence, the weights and then the state."""
    S, W = len(case.sequence), len(case.weights)
    tensors = [*case.sequence, *case.weights, *case.state]
    tensors[at] = change(tensors[at])
    return case._replace(
        sequence=tuple(tensors[:S]), weights=tuple(tensors[S : S + W]), state=cases.like(case.state, tensors[S + W :])
    )


@every_operation
@every_kind
@pytest.mark.parametrize("backend", ("auto", *cases.BACKENDS))
@pytest.mark.parametrize("T", (1, 9))
def test_kernels_read_every_kind_of_tensor(operation: str, kind: str, backend: str, T: int) -> None:
    case = cases.make_case(operation, B=3, T=T, K=4, V=4)
    # keys and queries of zero leave nothing to divide by
    for at in range(len(case.sequence) + len(case.weights) + len(case.state)):
        changed = replaced(case, at, KINDS[kind])
        expected = replaced(case, at, lambda x: plain(KINDS[kind](x)))
        assert_close(cases.run(changed, backend), cases.run(expected, "reference"), f"argument {at}")


@every_operation
@pytest.mark.parametrize("backend", ("auto", *cases.BACKENDS))
def test_kernels_refuse_sparse_tensors_by_name(operation: str, backend: str) -> None:
    case = cases.make_case(operation, B=3, T=9, K=4, V=4)
    for at in range(len(case.sequence) + len(case.weights) + len(case.state)):
        with pytest.raises(TypeError, match=r"has layout torch.sparse_coo; allowed is torch.strided, which .*to_dense"):
            cases.run(replaced(case, at, Tensor.to_sparse), backend)
    with pytest.raises(TypeError, match="reset has layout torch.sparse_coo"):
        cases.run(case._replace(reset=case.reset.to_sparse()), backend)


@every_operation
def test_auto_leaves_tensors_of_other_classes_to_the_torch_forms(operation: str) -> None:
    case = cases.make_case(operation, B=3, T=9, K=4, V=4)
    for at in range(len(case.sequence) + len(case.weights) + len(case.state)):
        changed = replaced(case, at, lambda x: TwoTensor(x.clone(), x.clone()))  # type: ignore[no-untyped-call]
        hidden, _ = cases.run(changed, "auto")
        hidden = hidden.a if isinstance(hidden, TwoTensor) else hidden
        assert_close(hidden, cases.run(case, "torch")[0])


def test_convolution_refuses_what_is_elsewhere_by_name() -> None:
    x, weight = torch.randn(2, 5, 3), torch.randn(3, 4)
    with pytest.raises(TypeError, match="weight has layout torch.sparse_coo"):
        causal_conv(x, weight.to_sparse(), None)
    with pytest.raises(ValueError, match="state is on meta; allowed is the device of the other arguments, cpu"):
        causal_conv(x, weight, None, torch.zeros(2, 3, 3, device="meta"))


def core_of(letter: str) -> Any:
    torch.manual_seed(0)
    core = make_memory(
        "xlstm", 4, defaults="paper", hidden_size=16, blocks=letter, num_heads=2, recurrent_std=1.0, bias=True
    )
    core = core.double()
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return core


def assert_reads(core: Any, x: Tensor, state: Any, expected_core: Any, expected_x: Tensor, expected_state: Any) -> None:
    """Steps and sequences, with gradients and without, of one are those of the other."""
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            assert_close(core.step(x[:, 0], state), expected_core.step(expected_x[:, 0], expected_state), "step")
            assert_close(core(x, state), expected_core(expected_x, expected_state), "sequence")


@pytest.mark.parametrize("letter", ("m", "s", "a", "d"))
@every_kind
def test_stacks_read_every_kind_of_input_and_state(letter: str, kind: str) -> None:
    core, x = core_of(letter), torch.randn(3, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        state = core(torch.randn(3, 4, 4, dtype=torch.float64), core.initial_state(3))[1]
    change = KINDS[kind]
    assert_reads(core, change(x), state, core, plain(change(x)), state)
    count = len(list(leaves(state)))
    for chosen in range(count):
        at = iter(range(count))
        other = map_leaves(lambda leaf: change(leaf) if next(at) == chosen else leaf, state)  # noqa: B023
        assert_reads(core, x, other, core, x, map_leaves(plain, other))


@pytest.mark.parametrize("letter", ("m", "s"))
@every_kind
def test_stacks_read_every_kind_of_weight(letter: str, kind: str) -> None:
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    state = core_of(letter).initial_state(3)
    change = KINDS[kind]
    for name, _ in core_of(letter).named_parameters():
        core, expected = core_of(letter), core_of(letter)
        core.step(x[:, 0], state)
        for changed, make in ((core, change), (expected, lambda weight: plain(change(weight)))):
            place, _, own = name.rpartition(".")
            module = changed.get_submodule(place)
            setattr(module, own, nn.Parameter(make(getattr(module, own).detach())))
        with torch.no_grad():
            assert_close(core.step(x[:, 0], state), expected.step(x[:, 0], state), name)
            assert_close(core(x, state), expected(x, state), name)


@pytest.mark.parametrize("letter", ("m", "s"))
def test_weight_that_is_negated_where_it_is_is_read_right(letter: str) -> None:
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    core, expected = core_of(letter), core_of(letter)
    state = core.initial_state(3)
    with torch.no_grad():
        core.step(x[:, 0], state)
        for parameter, other in zip(core.parameters(), expected.parameters(), strict=True):
            parameter.data = torch._neg_view(parameter.data)
            other.neg_()
        assert_close(core.step(x[:, 0], state), expected.step(x[:, 0], state))
        assert_close(core(x, state), expected(x, state))
