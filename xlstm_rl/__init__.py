"""Reinforcement-learning agents with an xLSTM memory: train on gymnasium tasks, plug into Stable-Baselines3, evaluate.

Importing this package registers the `xlstm_rl/...-v0` tasks with gymnasium. What needs torch or Stable-Baselines3 loads
them on first use.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import xlstm_rl.envs
from xlstm_rl._version import __version__

if TYPE_CHECKING:
    from xlstm_rl.agents import (
        CheckpointError,
        CnnXLSTMPolicy,
        LossTerm,
        LSTMPolicy,
        MemoryInputs,
        MultiInputXLSTMPolicy,
        RecurrentPPO,
        XLSTMPolicy,
        evaluate,
        register_loss,
    )
    from xlstm_rl.configs import general_settings
    from xlstm_rl.imitation.cloning import imitate, imitation_loss
    from xlstm_rl.imitation.demonstrations import record_demonstrations
    from xlstm_rl.kernels import backend_info
    from xlstm_rl.memory import MemoryCore, load_nxai_weights, make_memory, register_block, register_memory
    from xlstm_rl.memory.laws import check_memory_laws
    from xlstm_rl.runs.open import open_run
    from xlstm_rl.vec_envs.guarded_vec_env import GuardedSubprocVecEnv

__all__ = [
    "CheckpointError",
    "CnnXLSTMPolicy",
    "GuardedSubprocVecEnv",
    "LSTMPolicy",
    "LossTerm",
    "MemoryCore",
    "MemoryInputs",
    "MultiInputXLSTMPolicy",
    "RecurrentPPO",
    "XLSTMPolicy",
    "__version__",
    "backend_info",
    "check_memory_laws",
    "evaluate",
    "general_settings",
    "imitate",
    "imitation_loss",
    "load_nxai_weights",
    "make_memory",
    "open_run",
    "record_demonstrations",
    "register_block",
    "register_loss",
    "register_memory",
]

# Loaded on first use; what is in __all__ and neither imported above nor listed here is in xlstm_rl.agents.
_PLACES = {
    "GuardedSubprocVecEnv": "xlstm_rl.vec_envs.guarded_vec_env",
    "MemoryCore": "xlstm_rl.memory",
    "backend_info": "xlstm_rl.kernels",
    "check_memory_laws": "xlstm_rl.memory.laws",
    "general_settings": "xlstm_rl.configs",
    "imitate": "xlstm_rl.imitation.cloning",
    "imitation_loss": "xlstm_rl.imitation.cloning",
    "load_nxai_weights": "xlstm_rl.memory",
    "make_memory": "xlstm_rl.memory",
    "open_run": "xlstm_rl.runs.open",
    "record_demonstrations": "xlstm_rl.imitation.demonstrations",
    "register_block": "xlstm_rl.memory",
    "register_memory": "xlstm_rl.memory",
}
# Rooms that are there as soon as the package is.
_ROOMS = ("kernels", "memory")

# Modules that the documentation of earlier versions named; importing them still works, with a warning.
_MOVED = {
    "xlstm_rl.agents.subprocesses": "xlstm_rl.vec_envs.guarded_vec_env",
    "xlstm_rl.callbacks": "xlstm_rl.runs.callbacks",
    "xlstm_rl.finished": "xlstm_rl.runs.open",
    "xlstm_rl.training": "xlstm_rl.runs.train",
}


class _MovedModules(Loader):
    """Finds modules under the names they had before they moved."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        return ModuleSpec(name, cls()) if name in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """As the import system does it."""

    def exec_module(self, module: ModuleType) -> None:
        place = _MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is now {place}", DeprecationWarning, stacklevel=2)
        vars(module).update(vars(import_module(place)) | {"__name__": module.__name__, "__spec__": module.__spec__})


sys.meta_path.append(_MovedModules)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"xlstm_rl.{name}")
    if name in __all__:
        return getattr(import_module(_PLACES.get(name, "xlstm_rl.agents")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
