"""Numbers that are not finite: they spoil their episode from there on, not what was before nor what follows.

The kernels select and never multiply by a mask, so that values are right whatever the inputs. Gradients take more care:
zero times NaN is NaN, and the backward pass would carry it to the steps before. So where a result is not finite and can
be looked at, the kernel runs once more on finite numbers alone, and the steps that were spoilt are told afterwards.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from xlstm_rl.kernels.states import ForgetActivation, MLSTMState, SLSTMState, zero_where
from xlstm_rl.kernels.tracing import traced


class MLSTMKernel(Protocol):
    """An mLSTM behind `mlstm_sequence`; the arguments arrive checked."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        input_gate: Tensor,
        forget_gate: Tensor,
        state: MLSTMState | None,
        reset: Tensor | None,
        forget_activation: ForgetActivation,
        /,
    ) -> tuple[Tensor, MLSTMState]:
        """Arguments and results as `mlstm_sequence`."""


class SLSTMKernel(Protocol):
    """An sLSTM behind `slstm_sequence`; the arguments arrive checked."""

    def __call__(
        self,
        gates: Tensor,
        recurrent: Tensor,
        state: SLSTMState | None,
        reset: Tensor | None,
        forget_activation: ForgetActivation,
        /,
    ) -> tuple[Tensor, SLSTMState]:
        """Arguments and results as `slstm_sequence`."""


def known_finite(x: Tensor) -> bool:
    """Whether it is known, at little cost, that all numbers are finite; also where they cannot be looked at."""
    return not x.is_cpu or traced() or math.isfinite(float(x.detach().sum()))


def spoilt_from(bad: Tensor, reset: Tensor | None) -> Tensor:
    """Which steps lie in an episode that was spoilt, there or before.

    Args:
        bad: bool [B, T, ...], what spoils the memory at each step.
        reset: bool [B, T] or None, true where an episode starts.

    Returns:
        bool [B, T, ...].
    """
    count = torch.arange(1, bad.shape[1] + 1, device=bad.device).view(-1, *(1,) * (bad.ndim - 2))
    last_bad = (bad * count).cummax(1).values
    if reset is None:
        return last_bad > 0
    starts = reset.view(*reset.shape, *(1,) * (bad.ndim - 2))
    return (last_bad > 0) & (last_bad >= (starts * count).cummax(1).values)


def spoil(mask: Tensor, x: Tensor) -> Tensor:
    """NaN in the rows, steps or heads that a mask bool [B, ...] marks in x [B, ..., ...]."""
    return x.masked_fill(mask.view(*mask.shape, *(1,) * (x.ndim - mask.ndim)), math.nan)


def contain_mlstm(
    run: MLSTMKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    state: MLSTMState | None,
    reset: Tensor | None,
    forget_activation: ForgetActivation,
) -> tuple[Tensor, MLSTMState]:
    """Run an mLSTM so that gradients by what was not spoilt stay finite where those by what was spoilt are zero."""
    hidden, final = run(q, k, v, input_gate, forget_gate, state, reset, forget_activation)
    if q.shape[1] == 0 or known_finite(hidden):
        return hidden, final
    bad_query = ~q.isfinite().all(-1)  # [B, T, H]
    bad = ~(k.isfinite().all(-1) & v.isfinite().all(-1)) | _bad_gates(input_gate, forget_gate, forget_activation)
    here = bad
    if state is not None:
        bad_state = ~(state.cell.isfinite().all(-1).all(-1) & state.normalizer.isfinite().all(-1))
        bad_state = bad_state | ~state.stabilizer.isfinite()  # [B, H]
        state = MLSTMState(*(zero_where(bad_state, leaf) for leaf in state))
        here = _with_state(bad, bad_state, reset)
    if not bool((here | bad_query).any()):
        return hidden, final
    q, (k, v, input_gate, forget_gate) = (
        zero_where(bad_query, q),
        (zero_where(bad, x) for x in (k, v, input_gate, forget_gate)),
    )
    hidden, final = run(q, k, v, input_gate, forget_gate, state, reset, forget_activation)
    spoilt = spoilt_from(here, reset)
    cell, normalizer = (spoil(spoilt[:, -1], leaf) for leaf in final[:2])
    return spoil(spoilt | bad_query, hidden), MLSTMState(cell, normalizer, final.stabilizer)


def contain_slstm(
    run: SLSTMKernel,
    gates: Tensor,
    recurrent: Tensor,
    state: SLSTMState | None,
    reset: Tensor | None,
    forget_activation: ForgetActivation,
) -> tuple[Tensor, SLSTMState]:
    """Run an sLSTM so that gradients by what was not spoilt stay finite where those by what was spoilt are zero."""
    hidden, final = run(gates, recurrent, state, reset, forget_activation)
    if gates.shape[1] == 0 or known_finite(hidden):
        return hidden, final
    input_gate, forget_gate, cell_input, output_gate = gates.unbind(2)  # [B, T, H, D] each
    bad = _bad_gates(input_gate, forget_gate, forget_activation) | cell_input.isnan() | output_gate.isnan()
    # units of a head feed each other
    bad = bad.any(-1)  # [B, T, H]
    here = bad
    if state is not None:
        bad_state = torch.stack([~leaf.isfinite().all(-1) for leaf in state]).any(0)  # [B, H]
        state = SLSTMState(*(zero_where(bad_state, leaf) for leaf in state))
        here = _with_state(bad, bad_state, reset)
    if not bool(here.any()):
        return hidden, final
    hidden, final = run(gates.masked_fill(bad[:, :, None, :, None], 0.0), recurrent, state, reset, forget_activation)
    spoilt = spoilt_from(here, reset)
    last = SLSTMState._make(spoil(spoilt[:, -1], leaf) for leaf in final)
    return spoil(spoilt, hidden), last._replace(stabilizer=final.stabilizer)


def _bad_gates(input_gate: Tensor, forget_gate: Tensor, forget_activation: ForgetActivation) -> Tensor:
    """Gates that leave nothing of a memory; minus infinity only closes them, as does the other one's sigmoid."""
    bad = ~(input_gate < math.inf)
    return bad | (forget_gate.isnan() if forget_activation == "sigmoid" else ~(forget_gate < math.inf))


def _with_state(bad: Tensor, bad_state: Tensor, reset: Tensor | None) -> Tensor:
    """Bad steps [B, T, H], the first of them also where the state before it is bad and not emptied."""
    first = bad_state if reset is None else bad_state & ~reset[:, :1]
    return torch.cat((bad[:, :1] | first[:, None], bad[:, 1:]), 1)
