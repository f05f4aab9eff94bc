"""Agents small enough for tests, and what two equal ones have in common."""

from typing import Any

import numpy as np
import torch

from tests.agents.spaces_for_tests import policy_name, vec_env
from xlstm_rl.agents import RecurrentPPO

SMALL: dict[str, Any] = {"memory_kwargs": {"hidden_size": 8, "num_heads": 2}, "net_arch": [8]}


def agent(observation: str = "vector", action: str = "discrete", steps: int = 0, **kwargs: Any) -> RecurrentPPO:
    policy_kwargs = SMALL | kwargs.pop("policy_kwargs", {})
    settings: dict[str, Any] = {"n_steps": 8, "batch_size": 12, "n_epochs": 1, "seed": 0, "device": "cpu"} | kwargs
    policy = settings.pop("policy", policy_name(observation))
    env = settings.pop("env", None) or vec_env(observation=observation, action=action)
    model = RecurrentPPO(policy, env, policy_kwargs=policy_kwargs, **settings)
    return model.learn(steps) if steps else model


def played(model: RecurrentPPO, steps: int = 4) -> list[np.ndarray]:
    """Deterministic actions and memory states on observations of the space."""
    model.observation_space.seed(1)
    state: Any = None
    seen: list[np.ndarray] = []
    for _ in range(steps):
        action, state = model.predict(model.observation_space.sample(), state=state, deterministic=True)
        seen += [action, *state]
    return seen


def assert_same(model: RecurrentPPO, other: RecurrentPPO) -> None:
    for before, after in zip(played(model), played(other), strict=True):
        assert np.array_equal(before, after)
    before_state, after_state = model.policy.optimizer.state_dict(), other.policy.optimizer.state_dict()
    assert before_state["param_groups"] == after_state["param_groups"]
    for index, kept in before_state["state"].items():
        for name, value in kept.items():
            assert torch.equal(value, after_state["state"][index][name])
