"""Settings and statistics of VecNormalize survive in the file of an agent, from which loading runs no code."""

import io
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.vec_env import VecNormalize

from tests.agents.small_agents import agent
from tests.agents.spaces_for_tests import vec_env
from xlstm_rl.agents import CheckpointError
from xlstm_rl.agents.saving import load_normalizer
from xlstm_rl.agents.training_state import make_normalizer, normalizer_state


def used(observation: str, **kwargs: object) -> VecNormalize:
    env = VecNormalize(vec_env(observation=observation), gamma=0.9, **kwargs)  # type: ignore[arg-type]
    env.reset()
    for _ in range(20):
        env.step(np.array([env.action_space.sample() for _ in range(env.num_envs)]))
    return env


@pytest.mark.parametrize(("observation", "keys"), [("vector", None), ("dict", ["vector"])], ids=["vector", "dict"])
def test_statistics_round_trip_exactly(observation: str, keys: list[str] | None) -> None:
    before, file = used(observation, norm_obs_keys=keys, clip_obs=3.0, clip_reward=4.0, epsilon=1e-3), io.BytesIO()
    agent(observation, env=before).save(file)
    after = load_normalizer(file, vec_env(observation=observation))
    assert after is not None
    assert normalizer_state(after) == normalizer_state(before)
    obs = before.get_original_obs()
    first, second = before.normalize_obs(obs), after.normalize_obs(obs)
    np.testing.assert_array_equal(first["vector"] if keys else first, second["vector"] if keys else second)


def test_reward_scale_round_trips() -> None:
    before = used("vector", norm_obs=False)
    after = make_normalizer(normalizer_state(before), vec_env())
    rewards = np.array([1.0, -2.0, 3.0])
    np.testing.assert_array_equal(after.normalize_reward(rewards), before.normalize_reward(rewards))


def test_agent_without_normalisation_has_none() -> None:
    file = io.BytesIO()
    agent().save(file)
    assert load_normalizer(file, vec_env()) is None


@pytest.mark.parametrize("state", [None, [], {}, {"settings": {}, "statistics": {}}])
def test_foreign_values_are_refused(state: Any) -> None:
    with pytest.raises(ValueError, match="no normalisation statistics"):
        make_normalizer(state, vec_env())


def test_statistics_of_another_space_are_refused() -> None:
    file = io.BytesIO()
    agent("dict", env=used("dict", norm_obs_keys=["vector"])).save(file)
    with pytest.raises(CheckpointError, match=r"normalizer\.json: .*norm_obs_keys"):
        load_normalizer(file, vec_env())
    state = normalizer_state(used("vector"))
    state["statistics"]["observations"]["mean"].append(0.0)
    with pytest.raises(ValueError, match=r"observations have shape \(4,\), the environment's are \(3,\)"):
        make_normalizer(state, vec_env())


@pytest.mark.parametrize(("name", "value"), [("mean", np.nan), ("mean", 1e999), ("var", -1.0), ("var", np.inf)])
def test_statistics_that_are_impossible_are_refused(name: str, value: float) -> None:
    before = used("vector")
    statistics: Any = before.obs_rms
    getattr(statistics, name)[0] = value
    with pytest.raises(ValueError, match="not finite"):
        make_normalizer(normalizer_state(before), vec_env())


@pytest.mark.parametrize("value", [-1.0, float("nan"), "many", None])
def test_settings_that_are_impossible_are_refused(value: Any) -> None:
    state = normalizer_state(used("vector"))
    state["settings"]["clip_reward"] = value
    with pytest.raises(ValueError, match="clip_reward"):
        make_normalizer(state, vec_env())
