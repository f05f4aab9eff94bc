"""Actions that do not start at 0: the agent counts from 0, everybody outside from the start of the space."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from sb3_contrib import RecurrentPPO as ContribPPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from tests.agents.masked_env import MaskedEpisodes
from tests.agents.small_agents import SMALL, agent
from tests.agents.spaces_for_tests import RandomEpisodes
from xlstm_rl.agents import MemoryInputs, RecurrentPPO, XLSTMPolicy, evaluate
from xlstm_rl.export import check_onnx, export_onnx

SPACES: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(3, start=5),
    "discrete, negative": spaces.Discrete(3, start=-1),
    "multi-discrete": spaces.MultiDiscrete([3, 2], start=[4, -1]),
}


class Shifted(RandomEpisodes):
    """`RandomEpisodes` that notes the actions it is given; it fails where one is not of its space."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.action_space = SPACES[kind]
        self.given: list[Any] = []

    def step(self, action: Any) -> Any:
        self.given.append(action)
        return super().step(action)


class ShiftedAndMasked(MaskedEpisodes, Shifted):
    """The same with masks; it fails where a forbidden action is taken."""


def envs(kind: str, env_class: type[Shifted] = Shifted, **kwargs: Any) -> VecEnv:
    return make_vec_env(env_class, n_envs=2, seed=0, env_kwargs={"kind": kind}, **kwargs)


@pytest.mark.parametrize("env_class", [Shifted, ShiftedAndMasked])
@pytest.mark.parametrize("kind", SPACES)
def test_agents_act_inside_the_space_in_training_and_evaluation(kind: str, env_class: type[Shifted]) -> None:
    env = envs(kind, env_class)
    model = agent(env=env, steps=16)
    evaluate(model, env, 4, deterministic=False, seed=0)


@pytest.mark.parametrize("kind", SPACES)
def test_the_environment_gets_what_the_agent_chose_plus_the_start(kind: str) -> None:
    env = envs(kind)
    space: Any = SPACES[kind]
    model = agent(env=env, steps=16)
    given = np.stack([np.stack(part) for part in env.get_attr("given")], 1)
    assert np.array_equal(given, model.rollout_buffer.actions + space.start)
    assert len(np.unique(given)) > 1


@pytest.mark.parametrize("kind", SPACES)
def test_predict_returns_actions_of_the_space_and_a_loaded_agent_the_same(kind: str, tmp_path: Path) -> None:
    model = agent(env=envs(kind))
    model.save(tmp_path / "model")
    loaded = RecurrentPPO.load(tmp_path / "model", envs(kind), device="cpu")
    for _ in range(10):
        obs = model.observation_space.sample()
        action, _ = model.predict(obs)
        assert model.action_space.contains(action)
        same, _ = loaded.predict(obs, deterministic=True)
        assert np.array_equal(same, model.predict(obs, deterministic=True)[0])


def test_the_previous_action_is_told_by_its_place() -> None:
    env = MemoryInputs(Shifted("discrete"), ["action"])
    env.reset(seed=0)
    env.unwrapped.left = 3  # type: ignore[attr-defined]
    assert env.step(np.int64(6))[0]["previous_action"].tolist() == [0, 1, 0]


@pytest.mark.parametrize("kind", ["discrete", "multi-discrete"])
def test_the_exported_policy_returns_actions_of_the_space(kind: str, tmp_path: Path) -> None:
    model = agent(env=envs(kind))
    export_onnx(model, tmp_path / "policy.onnx")
    assert check_onnx(model, tmp_path / "policy.onnx").largest_error <= 1e-5


def test_sb3_contrib_which_sends_actions_from_0_is_refused() -> None:
    model = ContribPPO(XLSTMPolicy, envs("discrete"), n_steps=8, batch_size=8, policy_kwargs=SMALL, device="cpu")
    with pytest.raises(ValueError, match=r"Discrete\(3, start=5\) do not start at 0.*xlstm_rl.RecurrentPPO"):
        model.learn(16)
