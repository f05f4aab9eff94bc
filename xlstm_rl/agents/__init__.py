"""The Stable-Baselines3 side: policies, rollouts, recurrent PPO, evaluation."""

from xlstm_rl.agents.actor_critic import PolicyState
from xlstm_rl.agents.checkpoint import CheckpointError
from xlstm_rl.agents.evaluation import (
    EvaluationResult,
    MaskedEvalCallback,
    MaskedModel,
    evaluate,
    evaluate_random,
)
from xlstm_rl.agents.gymnasium_vector import GymnasiumVecEnv
from xlstm_rl.agents.inputs import MemoryInputs, VecMemoryInputs
from xlstm_rl.agents.loss_terms import LossTerm, register_loss
from xlstm_rl.agents.losses import AdvantageScale, gae, ppo_loss
from xlstm_rl.agents.lstm_policy import CnnLSTMPolicy, LSTMPolicy, MultiInputLSTMPolicy
from xlstm_rl.agents.on_policy import RecurrentOnPolicyAlgorithm
from xlstm_rl.agents.policy import CnnXLSTMPolicy, MultiInputXLSTMPolicy, XLSTMPolicy
from xlstm_rl.agents.ppo import RecurrentPPO
from xlstm_rl.agents.rollout import ChunkedRolloutBuffer, Evaluation, RolloutChunks, minibatches
from xlstm_rl.agents.saving import load_normalizer

__all__ = [
    "AdvantageScale",
    "CheckpointError",
    "ChunkedRolloutBuffer",
    "CnnLSTMPolicy",
    "CnnXLSTMPolicy",
    "Evaluation",
    "EvaluationResult",
    "GymnasiumVecEnv",
    "LSTMPolicy",
    "LossTerm",
    "MaskedEvalCallback",
    "MaskedModel",
    "MemoryInputs",
    "MultiInputLSTMPolicy",
    "MultiInputXLSTMPolicy",
    "PolicyState",
    "RecurrentOnPolicyAlgorithm",
    "RecurrentPPO",
    "RolloutChunks",
    "VecMemoryInputs",
    "XLSTMPolicy",
    "evaluate",
    "evaluate_random",
    "gae",
    "load_normalizer",
    "minibatches",
    "ppo_loss",
    "register_loss",
]
