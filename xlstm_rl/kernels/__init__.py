"""Sequence maths of the xLSTM memories on plain tensors: mLSTM, sLSTM and the causal convolution before them."""

from xlstm_rl.kernels.convolution import causal_conv
from xlstm_rl.kernels.dispatch import BackendInfo, backend_info, backends, mlstm_sequence, slstm_sequence, why_not
from xlstm_rl.kernels.recording import KernelCall, MLSTMCall, SLSTMCall, recorded_calls
from xlstm_rl.kernels.states import ForgetActivation, MLSTMState, SLSTMState

__all__ = [
    "BackendInfo",
    "ForgetActivation",
    "KernelCall",
    "MLSTMCall",
    "MLSTMState",
    "SLSTMCall",
    "SLSTMState",
    "backend_info",
    "backends",
    "causal_conv",
    "mlstm_sequence",
    "recorded_calls",
    "slstm_sequence",
    "why_not",
]
