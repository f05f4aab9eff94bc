"""Checks of the arguments of the kernels, cheap enough to make on every call."""

from typing import get_args

import torch
from torch import Tensor

from xlstm_rl.kernels.states import ForgetActivation, MLSTMState, SLSTMState
from xlstm_rl.kernels.tracing import traced

_FLOATS = (torch.float32, torch.float64, torch.bfloat16)
_FORGET_ACTIVATIONS = get_args(ForgetActivation)


def check_mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    state: MLSTMState | None,
    reset: Tensor | None,
    forget_activation: str,
) -> None:
    """Raise ValueError or TypeError unless the arguments of `mlstm_sequence` fit together."""
    if q.ndim != 4 or 0 in q.shape[2:]:
        raise ValueError(f"q has shape {tuple(q.shape)}; allowed is [B, T, H, K] with H and K at least 1")
    if v.ndim != 4:
        raise ValueError(f"v has shape {tuple(v.shape)}; allowed is [B, T, H, V]")
    B, T, H, K = q.shape
    V = v.shape[3]
    _check_tensor("k", k, (B, T, H, K), q)
    _check_tensor("v", v, (B, T, H, V), q)
    _check_tensor("input_gate", input_gate, (B, T, H), q)
    _check_tensor("forget_gate", forget_gate, (B, T, H), q)
    if state is not None:
        _check_leaf("cell", state.cell, (B, H, K, V), q)
        _check_leaf("normalizer", state.normalizer, (B, H, K), q)
        _check_leaf("stabilizer", state.stabilizer, (B, H), q)
    _check_common("q", q, reset, B, T, forget_activation)


def check_slstm(
    gates: Tensor, recurrent: Tensor, state: SLSTMState | None, reset: Tensor | None, forget_activation: str
) -> None:
    """Raise ValueError or TypeError unless the arguments of `slstm_sequence` fit together."""
    if gates.ndim != 5 or gates.shape[2] != 4 or 0 in gates.shape[3:]:
        raise ValueError(f"gates has shape {tuple(gates.shape)}; allowed is [B, T, 4, H, D] with H and D at least 1")
    B, T, _, H, D = gates.shape
    _check_tensor("recurrent", recurrent, (4, H, D, D), gates)
    if state is not None:
        _check_leaf("cell", state.cell, (B, H, D), gates)
        _check_leaf("normalizer", state.normalizer, (B, H, D), gates)
        _check_leaf("hidden", state.hidden, (B, H, D), gates)
        _check_leaf("stabilizer", state.stabilizer, (B, H, D), gates)
    _check_common("gates", gates, reset, B, T, forget_activation)


def check_reset(reset: Tensor, *shape: int) -> None:
    """Raise unless reset is bool and of that shape."""
    if reset.dtype != torch.bool:
        raise TypeError(f"reset has dtype {reset.dtype}; allowed is torch.bool")
    if reset.shape != shape:
        raise ValueError(f"reset has shape {tuple(reset.shape)}; allowed is {shape}")


def resolved(x: Tensor) -> Tensor:
    """The tensor, or an equal one whose memory holds its numbers where that of `x` holds their negatives or nothing.

    Views such as `x.conj().imag` only note that their numbers are to be negated, and tangents that are zero have no
    memory. Traces see to it by themselves.
    """
    if traced():
        return x
    if x.is_neg():
        x = x.resolve_neg()
    return x.clone() if x._is_zerotensor() else x


def _check_tensor(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; allowed is {shape}")
    if x.dtype != like.dtype:
        raise TypeError(f"{name} has dtype {x.dtype}; allowed is the dtype of the other arguments, {like.dtype}")
    check_place(name, x, like)


def _check_leaf(name: str, leaf: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """A leaf of a state: the dtype of the inputs, float32 where these are bfloat16."""
    if leaf.shape != shape:
        raise ValueError(f"state.{name} has shape {tuple(leaf.shape)}; allowed is {shape}")
    dtype = torch.float32 if like.dtype == torch.bfloat16 else like.dtype
    if leaf.dtype != dtype:
        raise TypeError(f"state.{name} has dtype {leaf.dtype}; allowed with inputs in {like.dtype} is {dtype}")
    check_place(f"state.{name}", leaf, like)


def check_place(name: str, x: Tensor, like: Tensor) -> None:
    """Raise unless a tensor is an array on the device of another."""
    if x.layout is not torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; allowed is torch.strided, which {name}.to_dense() gives")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}; allowed is the device of the other arguments, {like.device}")


def _check_common(name: str, x: Tensor, reset: Tensor | None, B: int, T: int, forget_activation: str) -> None:
    check_place(name, x, x)
    if x.dtype not in _FLOATS:
        raise TypeError(
            f"{name} has dtype {x.dtype}; allowed are torch.float32 and torch.float64, and torch.bfloat16 on a GPU"
        )
    if reset is not None:
        check_reset(reset, B, T)
        check_place("reset", reset, x)
    if forget_activation not in _FORGET_ACTIVATIONS:
        raise ValueError(f"forget_activation is {forget_activation!r}; allowed is one of {_FORGET_ACTIVATIONS}")
