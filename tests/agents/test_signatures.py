"""Whoever calls what is inherited as Stable-Baselines3 documents it is understood."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import RecurrentPPO as ContribRecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecEnvWrapper

import xlstm_rl
from tests.agents.small_agents import agent
from tests.agents.spaces_for_tests import ACTIONS, OBSERVATIONS
from xlstm_rl import agents
from xlstm_rl.agents.heads import GumbelCategorical
from xlstm_rl.agents.rollout import ChunkedRolloutBuffer
from xlstm_rl.vec_envs.guarded_vec_env import GuardedSubprocVecEnv

# sb3-contrib changed these itself, for memories: its form is the one to keep.
PAIRS = [
    (xlstm_rl.RecurrentPPO, BaseAlgorithm),
    (xlstm_rl.RecurrentPPO, OnPolicyAlgorithm),
    (xlstm_rl.RecurrentPPO, ContribRecurrentPPO),
    (xlstm_rl.XLSTMPolicy, RecurrentActorCriticPolicy),
    (agents.LSTMPolicy, RecurrentActorCriticPolicy),
    (ChunkedRolloutBuffer, RolloutBuffer),
    (agents.GymnasiumVecEnv, VecEnv),
    (GuardedSubprocVecEnv, SubprocVecEnv),
    (agents.VecMemoryInputs, VecEnvWrapper),
    (agents.MaskedEvalCallback, EvalCallback),
    (agents.MaskedEvalCallback, BaseCallback),
    (GumbelCategorical, CategoricalDistribution),
]
KINDS = inspect.Parameter


def public_methods(parent: type) -> list[str]:
    return [
        name
        for name, member in inspect.getmembers(parent, callable)
        if not name.startswith("_") and not inspect.isclass(member)
    ]


CASES = [
    pytest.param(ours, parent, name, id=f"{ours.__name__}.{name} of {parent.__name__}")
    for ours, parent in PAIRS
    for name in public_methods(parent)
]


def why_not_callable_as(ours: Any, theirs: Any) -> str | None:
    """What a call that is legal on the parent meets here; None if nothing."""
    mine, parents = list(ours.parameters.values()), list(theirs.parameters.values())
    takes_any = any(part.kind is KINDS.VAR_POSITIONAL for part in mine)
    takes_names = any(part.kind is KINDS.VAR_KEYWORD for part in mine)
    positional = [part for part in mine if part.kind in (KINDS.POSITIONAL_ONLY, KINDS.POSITIONAL_OR_KEYWORD)]
    by_name = {part.name: part for part in mine if part.kind in (KINDS.KEYWORD_ONLY, KINDS.POSITIONAL_OR_KEYWORD)}
    for index, part in enumerate(parents):
        if part.kind is KINDS.VAR_POSITIONAL:
            if not takes_any:
                return "takes no further positional arguments"
            continue
        if part.kind is KINDS.VAR_KEYWORD:
            if not takes_names:
                return "takes no further names"
            continue
        if part.kind is KINDS.POSITIONAL_OR_KEYWORD and not takes_any:
            if len(positional) <= index or positional[index].name != part.name:
                return f"{part.name!r} is not argument {index}"
        if part.name not in by_name and not takes_names:
            return f"takes no {part.name!r}"
        own = by_name.get(part.name)
        if own is not None and part.default is not part.empty and own.default is own.empty:
            return f"{part.name!r} must be given"
    known = {part.name for part in parents}
    needed = [
        part.name
        for part in mine
        if part.default is part.empty
        and part.kind in (KINDS.KEYWORD_ONLY, KINDS.POSITIONAL_OR_KEYWORD)
        and part.name not in known
    ]
    return f"needs {needed}, which the parent does not know" if needed else None


@pytest.mark.parametrize(("ours", "parent", "name"), CASES)
def test_a_call_that_is_legal_on_the_parent_is_legal_here(ours: type, parent: type, name: str) -> None:
    assert hasattr(ours, name), f"{ours.__name__} lacks {name}"
    problem = why_not_callable_as(inspect.signature(getattr(ours, name)), inspect.signature(getattr(parent, name)))
    assert problem is None, f"{ours.__name__}.{name}: {problem}"


@pytest.mark.parametrize("observation", ["vector", "dict"])
def test_a_buffer_filled_as_that_of_sb3_is_worth_the_same(observation: str) -> None:
    steps, n_envs, rng = 12, 3, np.random.default_rng(0)
    space, actions = OBSERVATIONS[observation], ACTIONS["discrete"]
    kind: Any = DictRolloutBuffer if observation == "dict" else RolloutBuffer
    theirs = kind(steps, space, actions, gae_lambda=0.9, gamma=0.95, n_envs=n_envs)
    ours = ChunkedRolloutBuffer(steps, space, actions, gae_lambda=0.9, gamma=0.95, n_envs=n_envs, seq_len=4)
    starts = rng.random((steps + 1, n_envs)) < 0.3
    for step in range(steps):
        drawn = [space.sample() for _ in range(n_envs)]
        obs: Any = (
            {key: np.stack([one[key] for one in drawn]) for key in drawn[0]} if kind is DictRolloutBuffer else drawn
        )
        for buffer in (theirs, ours):
            rng_step = np.random.default_rng(step)
            buffer.add(
                obs,
                rng_step.integers(0, 3, n_envs),
                rng_step.normal(size=n_envs),
                starts[step].astype(np.float32),
                torch.from_numpy(rng_step.normal(size=(n_envs, 1))),
                torch.from_numpy(rng_step.normal(size=n_envs)),
            )
    last = torch.from_numpy(rng.normal(size=(n_envs, 1)))
    for _ in range(2):
        for buffer in (theirs, ours):
            # as a curiosity module does at the end of a rollout
            buffer.rewards += 0.5
            buffer.compute_returns_and_advantage(last_values=last, dones=starts[-1])
        np.testing.assert_allclose(ours.advantages, theirs.advantages, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ours.returns, theirs.returns, rtol=1e-5, atol=1e-6)
    sizes, seen = [], []
    for samples in ours.get(10):
        sizes.append(len(samples.old_values))
        seen += samples.old_values.tolist()
    assert sizes == [10, 10, 10, 6]
    (whole,) = theirs.get()
    np.testing.assert_allclose(sorted(seen), sorted(whole.old_values.tolist()), rtol=1e-6)
    (own,) = ours.get()
    assert type(own) is type(whole)
    assert own.actions.shape == whole.actions.shape


def test_a_callback_may_add_rewards_of_its_own_at_the_end_of_a_rollout() -> None:
    class Curiosity(BaseCallback):
        changes: list[float]

        def _on_training_start(self) -> None:
            self.changes = []

        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            buffer = self.locals["rollout_buffer"]
            before = buffer.returns.copy()
            buffer.rewards += 1.0
            buffer.compute_returns_and_advantage(last_values=self.locals["last_values"], dones=self.locals["dones"])
            self.changes.append(float((buffer.returns - before).min()))

    callback = Curiosity()
    agent().learn(48, callback=callback)
    assert callback.changes and min(callback.changes) >= 1.0 - 1e-5
