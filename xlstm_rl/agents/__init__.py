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
from xlstm_rl.agents.losses import AdvantageScale, LossTerm, ppo_loss, register_loss
from xlstm_rl.agents.on_policy import RecurrentOnPolicyAlgorithm
from xlstm_rl.agents.policy import (
    CnnLSTMPolicy,
    CnnXLSTMPolicy,
    LSTMPolicy,
    MultiInputLSTMPolicy,
    MultiInputXLSTMPolicy,
    XLSTMPolicy,
)
from xlstm_rl.agents.ppo import RecurrentPPO
from xlstm_rl.agents.rollout import ChunkedRolloutBuffer, Evaluation, RolloutChunks, gae, minibatches
from xlstm_rl.agents.saving import load_normalizer
from xlstm_rl.vec_envs.gymnasium_vector import GymnasiumVecEnv
from xlstm_rl.vec_envs.inputs import MemoryInputs, VecMemoryInputs

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
