"""The Stable-Baselines3 side: policies, rollouts, recurrent PPO, evaluation."""

from xlstm_rl.agents.actor_critic import PolicyState
from xlstm_rl.agents.checkpoint import CheckpointError
from xlstm_rl.agents.evaluation import EvaluationResult, evaluate, evaluate_random
from xlstm_rl.agents.gymnasium_vector import GymnasiumVecEnv
from xlstm_rl.agents.inputs import MemoryInputs, VecMemoryInputs
from xlstm_rl.agents.losses import AdvantageScale, gae, ppo_loss
from xlstm_rl.agents.lstm_policy import CnnLSTMPolicy, LSTMPolicy, MultiInputLSTMPolicy
from xlstm_rl.agents.masked_evaluation import MaskedEvalCallback, MaskedModel
from xlstm_rl.agents.policy import CnnXLSTMPolicy, MultiInputXLSTMPolicy, XLSTMPolicy
from xlstm_rl.agents.ppo import RecurrentPPO
from xlstm_rl.agents.rollout import ChunkedRolloutBuffer, RolloutChunks, minibatches

__all__ = [
    "AdvantageScale",
    "CheckpointError",
    "ChunkedRolloutBuffer",
    "CnnLSTMPolicy",
    "CnnXLSTMPolicy",
    "EvaluationResult",
    "GymnasiumVecEnv",
    "LSTMPolicy",
    "MaskedEvalCallback",
    "MaskedModel",
    "MemoryInputs",
    "MultiInputLSTMPolicy",
    "MultiInputXLSTMPolicy",
    "PolicyState",
    "RecurrentPPO",
    "RolloutChunks",
    "VecMemoryInputs",
    "XLSTMPolicy",
    "evaluate",
    "evaluate_random",
    "gae",
    "minibatches",
    "ppo_loss",
]
