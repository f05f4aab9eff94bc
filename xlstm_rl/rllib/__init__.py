"""The policies of this library inside RLlib; the only room that knows ray."""

from importlib.util import find_spec

if find_spec("ray") is None:
    raise ImportError(
        "xlstm_rl.rllib needs RLlib, which is not installed: pip install 'xlstm-rl[rllib]', in an environment of its "
        "own, since ray pins its gymnasium"
    )

from xlstm_rl.rllib.memory_module import XLSTMRLModule
from xlstm_rl.rllib.policy_weights import load_weights, save_weights
from xlstm_rl.rllib.row_starts import keep_states_at_row_starts

__all__ = ["XLSTMRLModule", "keep_states_at_row_starts", "load_weights", "save_weights"]
