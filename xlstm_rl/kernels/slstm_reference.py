"""The sLSTM as its recurrence, one step at a time: the specification that the other forms are tested against."""

import torch
from torch import Tensor

from xlstm_rl.kernels.states import ForgetActivation, SLSTMState, empty_slstm_state, log_forget, zero_where


def slstm_recurrence(
    gates: Tensor,
    recurrent: Tensor,
    state: SLSTMState | None,
    reset: Tensor | None,
    forget_activation: ForgetActivation,
) -> tuple[Tensor, SLSTMState]:
    """Scalar-memory recurrence (Beck et al. 2024, eq. 8-18), arguments and results as `slstm_sequence`."""
    state = empty_slstm_state(gates) if state is None else state
    hidden = []
    for t in range(gates.shape[1]):
        if reset is not None:
            state = SLSTMState._make(zero_where(reset[:, t], leaf) for leaf in state)
        state = _step(gates[:, t], recurrent, state, forget_activation)
        hidden.append(state.hidden)
    return torch.stack(hidden, 1) if hidden else torch.zeros_like(gates[:, :, 0]), state


def _step(gates: Tensor, recurrent: Tensor, state: SLSTMState, forget_activation: ForgetActivation) -> SLSTMState:
    """One step; gates [B, 4, H, D] -> the next state."""
    feedback = torch.einsum("ahoi,bhi->baho", recurrent, state.hidden)
    input_gate, forget_gate, cell_input, output_gate = (gates + feedback).unbind(1)  # [B, H, D] each

    # Minus infinity makes the forget factor of an empty unit exactly zero, with finite gradients.
    previous = state.stabilizer.detach().masked_fill(state.normalizer == 0, float("-inf"))
    decayed = log_forget(forget_gate, forget_activation) + previous
    stabilizer = torch.maximum(decayed, input_gate).detach()
    forget = torch.exp(decayed - stabilizer)
    write = torch.exp(input_gate - stabilizer)

    cell = forget * state.cell + write * torch.tanh(cell_input)
    normalizer = forget * state.normalizer + write
    hidden = torch.sigmoid(output_gate) * cell / normalizer
    return SLSTMState(cell, normalizer, hidden, stabilizer)
