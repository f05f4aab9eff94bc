"""The mLSTM as its recurrence, one step at a time: the specification that the other forms are tested against."""

import torch
from torch import Tensor

from xlstm_rl.kernels.states import (
    ForgetActivation,
    MLSTMState,
    empty_mlstm_state,
    least_divisor,
    log_forget,
    zero_where,
)


def mlstm_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    state: MLSTMState | None,
    reset: Tensor | None,
    forget_activation: ForgetActivation,
) -> tuple[Tensor, MLSTMState]:
    """Matrix-memory recurrence (Beck et al. 2024, eq. 19-27), arguments and results as `mlstm_sequence`."""
    state = empty_mlstm_state(k, v) if state is None else state
    log_decay = log_forget(forget_gate, forget_activation)
    hidden = []
    for t in range(q.shape[1]):
        if reset is not None:
            state = MLSTMState._make(zero_where(reset[:, t], leaf) for leaf in state)
        h, state = _step(q[:, t], k[:, t], v[:, t], input_gate[:, t], log_decay[:, t], state)
        hidden.append(h)
    return torch.stack(hidden, 1) if hidden else torch.zeros_like(v), state


def _step(
    q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, log_decay: Tensor, state: MLSTMState
) -> tuple[Tensor, MLSTMState]:
    """One step; q, k [B, H, K], v [B, H, V], input_gate, log_decay [B, H] -> hidden [B, H, V] and the next state."""
    k = k / k.shape[-1] ** 0.5
    decayed = log_decay + state.stabilizer.detach()
    # The floor at zero keeps exp(-stabilizer) at most 1; without it, long spells of closed input gates overflow.
    stabilizer = torch.maximum(decayed, input_gate).clamp(min=0.0).detach()
    forget = torch.exp(decayed - stabilizer)[..., None]
    write = torch.exp(input_gate - stabilizer)[..., None]

    cell = forget[..., None] * state.cell + write[..., None] * k[..., :, None] * v[..., None, :]
    normalizer = forget * state.normalizer + write * k
    read = (q[..., :, None] * cell).sum(-2)  # [B, H, V]
    weight = (q * normalizer).sum(-1).abs()  # [B, H]
    hidden = read / torch.maximum(weight, least_divisor(stabilizer))[..., None]
    return hidden, MLSTMState(cell, normalizer, stabilizer)
