"""What a memory read attends to: the weight of every past input in the present output of an mLSTM or sLSTM."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from xlstm_rl.kernels import KernelCall, MLSTMCall, SLSTMCall


def read_weights(call: KernelCall) -> np.ndarray:
    """Weight of the input of step j in the read of step t, for one row that starts empty.

    An mLSTM reads `hidden[t] = sum_j weight[t, j] v[j]`: the weights hold gates, decay, the match of query and key and
    the division by the normalizer, may be negative and need not add up to 1 (the dual form of Beck et al. 2024, eq.
    19-27). Of an sLSTM `cell[t] / normalizer[t] = sum_j weight[t, j] tanh(z[j])`: input gate times the product of
    forget gates since, divided by the normalizer; non-negative, adding up to 1, here the mean over the units of a head.

    Args:
        call: of one row, T steps that belong to one episode, starting with an empty memory.

    Returns:
        [H, T, T] (head, step that reads, step that is read), zero for j > t.
    """
    weights = _mlstm_weights(call) if isinstance(call, MLSTMCall) else _slstm_weights(call)
    return weights.numpy(force=True)


def horizons(call: KernelCall) -> np.ndarray:
    """Steps after which 1/e of a memory is left at the present forget gate.

    Returns:
        [H, T] of an mLSTM, [H * D, T] of an sLSTM, whose units have gates of their own; at most 1e6.
    """
    forget = call.log_gates().forget[0]
    return (-1.0 / forget.clamp(max=-1e-6)).flatten(1).T.numpy(force=True)


def input_gates(call: KernelCall) -> np.ndarray:
    """Logarithms of the activated input gates, shape as `horizons`."""
    return call.log_gates().input[0].flatten(1).T.numpy(force=True)


def _mlstm_weights(call: MLSTMCall) -> Tensor:
    log = call.log_gates()
    log_weight = _log_weights(log.input[0].double().T, log.forget[0].double().T)  # [H, T, T]
    stabilizer = log_weight.amax(-1, keepdim=True).clamp(min=0.0)
    match = torch.einsum("thk,jhk->htj", call.q[0].double(), call.k[0].double()) * call.k.shape[-1] ** -0.5
    weights: Tensor = torch.exp(log_weight - stabilizer) * match
    divisor = torch.maximum(weights.sum(-1, keepdim=True).abs(), torch.exp(-stabilizer))
    weights = weights / divisor
    return weights


def _slstm_weights(call: SLSTMCall) -> Tensor:
    log = call.log_gates()
    T, H, D = log.input.shape[1:]
    total = log.input.new_zeros(H, T, T, dtype=torch.float64)
    # unit by unit: all at once would take D times the memory
    for unit in range(D):
        log_weight = _log_weights(log.input[0, :, :, unit].double().T, log.forget[0, :, :, unit].double().T)
        total += log_weight.softmax(-1)
    return total / D


def _log_weights(log_input: Tensor, log_forget: Tensor) -> Tensor:
    """[H, T] each -> [H, T (t), T (j)]: log of input gate j times the forget gates after j up to t."""
    decay = log_forget.cumsum(-1)
    log_weight = decay[:, :, None] - decay[:, None, :] + log_input[:, None, :]
    T = log_input.shape[-1]
    later = torch.ones(T, T, dtype=torch.bool, device=log_input.device).triu(1)
    return log_weight.masked_fill(later, float("-inf"))
