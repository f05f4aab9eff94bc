"""The observation tells what happened in the step before."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from tests.agents.spaces_for_tests import ACTIONS, OBSERVATIONS, RandomEpisodes, vec_env
from xlstm_rl import MemoryInputs
from xlstm_rl.agents import VecMemoryInputs

# What was done, and how the observation after it says so.
TOLD: dict[str, tuple[Any, list[float]]] = {
    "discrete": (2, [0, 0, 1]),
    "box": (np.array([-1.5, 0.5], np.float32), [-1.5, 0.5]),
    "multi-discrete": (np.array([1, 0]), [0, 1, 0, 1, 0]),
    "multi-binary": (np.array([1, 0, 1], np.int8), [1, 0, 1]),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_action_and_reward_of_the_step_before_are_told(action: str) -> None:
    env = MemoryInputs(RandomEpisodes(action=action, longest=1000))
    first, _ = env.reset(seed=0)
    assert not first["previous_action"].any() and not first["previous_reward"].any()
    assert first["episode_start"] == 1
    done, told = TOLD[action]
    obs, reward, *_ = env.step(done)
    assert obs["previous_action"].tolist() == told
    assert obs["previous_reward"] == np.float32(reward)
    assert obs["episode_start"] == 0
    again, _ = env.reset()
    assert not again["previous_action"].any() and not again["previous_reward"].any()
    assert again["episode_start"] == 1


@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize("action", ACTIONS)
def test_observations_lie_in_their_space(observation: str, action: str) -> None:
    env = MemoryInputs(RandomEpisodes(observation, action))
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    for _ in range(3):
        assert env.observation_space.contains(obs)
        obs = env.step(env.action_space.sample())[0]


def test_entries_of_a_dict_stay_as_they_are() -> None:
    env = MemoryInputs(RandomEpisodes("dict"), inputs=["reward"])
    assert isinstance(env.observation_space, spaces.Dict)
    assert set(env.observation_space.spaces) == {"vector", "flag", "previous_reward"}


def test_no_action_lies_in_a_space_without_zero() -> None:
    class Positive(RandomEpisodes):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = spaces.Box(1, 2, (2,), np.float32)

    env = MemoryInputs(Positive())
    assert env.observation_space.contains(env.reset(seed=0)[0])


@pytest.mark.parametrize("name", ["RepeatPrevious", "PendulumNoVelocity"])
def test_stable_baselines3_finds_no_fault(name: str) -> None:
    check_env(MemoryInputs(gym.make(f"xlstm_rl/{name}-v0", disable_env_checker=True)), warn=False)


@pytest.mark.parametrize("inputs", [[], ["actions"], "action"])
def test_other_inputs_are_refused(inputs: Any) -> None:
    with pytest.raises(ValueError, match="must be a list of some of 'action', 'reward', 'start'"):
        MemoryInputs(RandomEpisodes(), inputs)


@pytest.mark.parametrize("inputs", [["action", "action"], ["start", "reward", "action", "action"]])
def test_repeated_input_is_refused(inputs: list[str]) -> None:
    with pytest.raises(ValueError, match=r"inputs=\[.*\] names 'action' more than once: name each input once"):
        MemoryInputs(RandomEpisodes(), inputs)


def test_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match="has an entry 'episode_start' already"):
        MemoryInputs(MemoryInputs(RandomEpisodes(), ["start"]), ["reward", "start"])


def played(env: VecEnv) -> list[Any]:
    """All observations of 40 random steps, final ones included."""
    space = env.action_space
    space.seed(0)
    seen: list[Any] = [env.reset()]
    for _ in range(40):
        obs, _, dones, infos = env.step(np.stack([space.sample() for _ in range(3)]))
        seen += [obs, *(infos[row]["terminal_observation"] for row in np.flatnonzero(dones))]
    return seen


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", ["vector", "dict"])
def test_one_environment_and_many_are_told_the_same(observation: str, action: str) -> None:
    kwargs = {"observation": observation, "action": action}
    single = make_vec_env(RandomEpisodes, 3, seed=0, env_kwargs=kwargs, wrapper_class=MemoryInputs)
    many = VecMemoryInputs(vec_env(observation=observation, action=action))
    assert single.observation_space == many.observation_space
    told, told_too = played(single), played(many)
    assert len(told) == len(told_too) > 50
    for one, other in zip(told, told_too, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert np.array_equal(value, other[key]), key
