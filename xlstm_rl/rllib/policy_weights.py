"""Weights between the checkpoints of RLlib and the policies of this library."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_LEARNER_GROUP, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from torch import Tensor

from xlstm_rl.agents.checkpoint import CheckpointError, make_folder, write_whole
from xlstm_rl.agents.policy import XLSTMPolicy
from xlstm_rl.agents.training_state import set_weights

_FILE = "module_state.pkl"
_PREFIX = "policy."
# All that arrays by name are made of; whatever else a pickle asks for is refused.
_ARRAYS = {
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *(("numpy", "ndarray"), ("numpy", "dtype"), ("collections", "OrderedDict")),
}


def load_weights(policy: XLSTMPolicy, checkpoint: str | Path, module_id: str = DEFAULT_MODULE_ID) -> None:
    """Give a policy, such as that of a `RecurrentPPO`, the weights in a checkpoint of RLlib.

    Only arrays are read: unlike RLlib's own loading, nothing in the file is executed.

    Args:
        policy: of the settings that were the module's `model_config`.
        checkpoint: folder that `Algorithm.save_to_path` or a module's `save_to_path` wrote, on this machine.
        module_id: of the module in an Algorithm's.

    Raises:
        CheckpointError: there is no such module, the file is torn or holds other things than arrays, or the weights do
            not fit the policy.
    """
    file = _state_file(Path(checkpoint), module_id)
    try:
        with file.open("rb") as stream:
            state = _Arrays(stream).load()
    # what damaged pickles raise
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is no state of a module: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, np.ndarray) for value in state.values()):
        raise CheckpointError(f"{file} holds no arrays by name: give the folder of an Algorithm or of a module")
    weights = {
        name.removeprefix(_PREFIX): torch.from_numpy(value.copy())
        for name, value in state.items()
        if isinstance(name, str) and name.startswith(_PREFIX)
    }
    set_weights(policy, weights, "weights", str(file))


def save_weights(policy: XLSTMPolicy, folder: str | Path) -> None:
    """Write the weights of a policy so that RLlib's algorithms restore them.

    `algorithm.restore_from_path(folder, component="learner_group/learner/rl_module/default_policy")` gives them to
    learners and env runners; the optimiser starts anew. The folder must be absolute, as always for RLlib.

    Args:
        policy: of the settings that are the module's `model_config`.
        folder: made if it is not there.
    """
    state = {_PREFIX + name: _array(tensor) for name, tensor in policy.state_dict().items()}
    make_folder(Path(folder))
    write_whole(Path(folder) / _FILE, pickle.dumps(state))


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().numpy()
    return array


def _state_file(folder: Path, module_id: str) -> Path:
    inside = Path(COMPONENT_LEARNER_GROUP, COMPONENT_LEARNER, COMPONENT_RL_MODULE, module_id)
    files = [folder / _FILE, folder / inside / _FILE]
    for file in files:
        if file.is_file():
            return file
    raise CheckpointError(
        f"no weights of a module {module_id!r} in {folder}: looked for {', '.join(map(str, files))}; save with "
        "algorithm.save_to_path(folder), without use_msgpack"
    )


class _Arrays(pickle.Unpickler):
    """Reads arrays and what holds them, and refuses everything else before it is made."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only arrays are read")
        return super().find_class(module, name)
