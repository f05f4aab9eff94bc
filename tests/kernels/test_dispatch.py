"""Facts about the door to the kernels: choice of backend, and the errors of wrong arguments."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from tests.kernels import cases
from xlstm_rl.kernels import (
    MLSTMState,
    SLSTMState,
    backend_info,
    backends,
    dispatch,
    mlstm_sequence,
    slstm_sequence,
    why_not,
)

every_operation = pytest.mark.parametrize("operation", cases.OPERATIONS)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend that is tried first and never can run."""

    def never(tensor: Tensor, /) -> str:
        return f"no {tensor.device.type} today"

    backend = dispatch._BACKENDS["reference"]._replace(why_not=never)
    monkeypatch.setattr(dispatch, "_BACKENDS", {"broken": backend, **dispatch._BACKENDS})
    return "broken"


@every_operation
def test_forced_backend_that_cannot_run_says_why(operation: str, broken: str) -> None:
    with pytest.raises(ValueError, match=r"backend 'broken' cannot run here: no cpu today; use backend='auto' or one"):
        cases.run(cases.make_case(operation), broken)


@every_operation
def test_auto_passes_over_a_backend_that_cannot_run(operation: str, broken: str) -> None:
    hidden, _ = cases.run(cases.make_case(operation), "auto")
    assert bool(hidden.isfinite().all())


@every_operation
def test_unknown_backend_is_refused(operation: str) -> None:
    with pytest.raises(ValueError, match=r"backend 'fpga' is unknown; allowed is 'auto' or one of \('triton', 'cpp', "):
        cases.run(cases.make_case(operation), "fpga")


def test_why_not_is_none_for_a_usable_backend() -> None:
    assert why_not("torch", torch.zeros(1)) is None


def test_why_not_gives_the_reason(broken: str) -> None:
    assert why_not(broken, torch.zeros(1)) == "no cpu today"


def test_why_not_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="backend 'fpga' is unknown"):
        why_not("fpga", torch.zeros(1))


def test_reference_is_the_last_resort() -> None:
    assert backends()[-1] == "reference"


def test_backend_info_tells_what_is_in_use_and_why_others_are_not(broken: str) -> None:
    info = backend_info()["cpu"]
    assert info.in_use != broken
    assert info.unusable[broken] == "no cpu today"


def mlstm_arguments() -> dict[str, Any]:
    names = ("q", "k", "v", "input_gate", "forget_gate")
    return dict(zip(names, cases.make_case("mlstm").sequence, strict=True))


@pytest.mark.parametrize("name", ("q", "k", "v", "input_gate", "forget_gate"))
def test_mlstm_names_the_argument_of_wrong_shape(name: str) -> None:
    arguments = mlstm_arguments()
    arguments[name] = arguments[name][..., None]
    with pytest.raises(ValueError, match=rf"^{name} has shape \(.*\); allowed is"):
        mlstm_sequence(**arguments)


@pytest.mark.parametrize("name", ("k", "v", "input_gate", "forget_gate"))
def test_mlstm_names_the_argument_of_wrong_dtype(name: str) -> None:
    arguments = mlstm_arguments()
    arguments[name] = arguments[name].float()
    with pytest.raises(TypeError, match=rf"^{name} has dtype torch.float32; allowed is .* torch.float64"):
        mlstm_sequence(**arguments)


@pytest.mark.parametrize("name", ("k", "v", "input_gate", "forget_gate"))
def test_mlstm_names_the_argument_on_another_device(name: str) -> None:
    arguments = mlstm_arguments()
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=rf"^{name} is on meta; allowed is the device of the other arguments, cpu"):
        mlstm_sequence(**arguments)


@every_operation
@pytest.mark.parametrize("name", ("state.cell", "state.stabilizer", "reset"))
def test_state_or_reset_on_another_device_is_named(operation: str, name: str) -> None:
    case = cases.make_case(operation)
    if name == "reset":
        assert case.reset is not None
        case = case._replace(reset=case.reset.to("meta"))
    else:
        leaf = name.removeprefix("state.")
        assert case.state is not None
        case = case._replace(state=case.state._replace(**{leaf: getattr(case.state, leaf).to("meta")}))
    with pytest.raises(ValueError, match=rf"^{name} is on meta; allowed is the device"):
        cases.run(case, "auto")


@pytest.mark.skipif(why_not("cpp", torch.zeros(1)) is not None, reason="the compiled kernels are not built")
def test_compiled_kernels_refuse_tensors_of_other_classes() -> None:
    arguments = mlstm_arguments()
    arguments["k"] = TwoTensor(arguments["k"], arguments["k"].clone())  # type: ignore[no-untyped-call]
    with pytest.raises(TypeError, match="take plain tensors, not TwoTensor; use backend='auto' or 'torch'"):
        mlstm_sequence(**arguments, backend="cpp")


@pytest.mark.parametrize("name", MLSTMState._fields)
def test_mlstm_names_the_state_leaf_of_wrong_shape(name: str) -> None:
    case = cases.make_case("mlstm")
    assert isinstance(case.state, MLSTMState)
    state = case.state._replace(**{name: getattr(case.state, name)[:1]})
    with pytest.raises(ValueError, match=rf"^state.{name} has shape"):
        cases.run(case._replace(state=state), "auto")


@pytest.mark.parametrize("name", SLSTMState._fields)
def test_slstm_names_the_state_leaf_of_wrong_shape(name: str) -> None:
    case = cases.make_case("slstm")
    assert isinstance(case.state, SLSTMState)
    state = case.state._replace(**{name: getattr(case.state, name)[:1]})
    with pytest.raises(ValueError, match=rf"^state.{name} has shape"):
        cases.run(case._replace(state=state), "auto")


@pytest.mark.parametrize(
    ("gates", "recurrent", "name"),
    (((2, 3, 3, 1, 5), (4, 1, 5, 5), "gates"), ((2, 3, 4, 1, 5), (4, 2, 5, 5), "recurrent")),
)
def test_slstm_names_the_argument_of_wrong_shape(gates: tuple[int, ...], recurrent: tuple[int, ...], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} has shape"):
        slstm_sequence(torch.zeros(gates), torch.zeros(recurrent))


@every_operation
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_is_refused(operation: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="allowed are torch.float32 and torch.float64"):
        cases.run(cases.cast(cases.make_case(operation), dtype), "auto")


@every_operation
@pytest.mark.parametrize("dtype", (torch.float64, torch.int64, torch.uint8))
def test_reset_of_another_kind_is_refused(operation: str, dtype: torch.dtype) -> None:
    case = cases.make_case(operation)
    with pytest.raises(TypeError, match="reset has dtype .*; allowed is torch.bool"):
        cases.run(case._replace(reset=case.reset.to(dtype)), "auto")


@every_operation
def test_reset_of_wrong_shape_is_refused(operation: str) -> None:
    case = cases.make_case(operation, B=2, T=12)
    with pytest.raises(ValueError, match=r"reset has shape \(2, 11\); allowed is \(2, 12\)"):
        cases.run(case._replace(reset=case.reset[:, 1:]), "auto")


@every_operation
def test_unknown_forget_activation_is_refused(operation: str) -> None:
    case = cases.make_case(operation, forget_activation="tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"forget_activation is 'tanh'; allowed is one of \('sigmoid', 'exp'\)"):
        cases.run(case, "auto")
