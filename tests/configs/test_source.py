"""What is read from the source of the package is what importing it gives."""

import inspect

from xlstm_rl.agents import RecurrentPPO, evaluation
from xlstm_rl.configs import schema
from xlstm_rl.configs.source import constructor_defaults, registered_memories
from xlstm_rl.memory import memory_names
from xlstm_rl.vec_envs import guarded_vec_env


def test_defaults_are_those_of_the_constructor() -> None:
    parameters = inspect.signature(RecurrentPPO).parameters.values()
    expected = {part.name: part.default for part in parameters if part.default is not part.empty}
    assert constructor_defaults("agents/ppo.py", "RecurrentPPO") == expected


def test_constants_are_those_of_the_modules() -> None:
    assert schema.START_SECONDS == guarded_vec_env.START_SECONDS
    assert schema.MAX_EPISODE_STEPS == evaluation.MAX_EPISODE_STEPS


def test_memories_are_the_registered_ones() -> None:
    shipped = {"frames", "gru", "lstm", "none", "rwkv", "ssm", "transformer", "xlstm"}
    assert set(registered_memories()) == shipped <= set(memory_names())
