"""Reinforcement-learning agents with an xLSTM memory: train on gymnasium tasks, plug into Stable-Baselines3, evaluate.

Importing this package registers the `xlstm_rl/...-v0` tasks with gymnasium. The agents load Stable-Baselines3 on
first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import xlstm_rl.envs
from xlstm_rl._version import __version__
from xlstm_rl.kernels import backend_info
from xlstm_rl.memory import MemoryCore, load_nxai_weights, make_memory, register_memory

if TYPE_CHECKING:
    from xlstm_rl.agents import CnnXLSTMPolicy, MemoryInputs, MultiInputXLSTMPolicy, RecurrentPPO, XLSTMPolicy

__all__ = [
    "CnnXLSTMPolicy",
    "MemoryCore",
    "MemoryInputs",
    "MultiInputXLSTMPolicy",
    "RecurrentPPO",
    "XLSTMPolicy",
    "__version__",
    "backend_info",
    "load_nxai_weights",
    "make_memory",
    "register_memory",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("xlstm_rl.agents"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
