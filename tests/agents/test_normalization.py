"""Normalisation statistics survive a file that runs no code."""

from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.vec_env import VecNormalize

from tests.agents.spaces_for_tests import vec_env
from xlstm_rl.agents.normalization import dump_normalizer, load_normalizer


def used(observation: str, **kwargs: object) -> VecNormalize:
    env = VecNormalize(vec_env(observation=observation), gamma=0.9, **kwargs)  # type: ignore[arg-type]
    env.reset()
    for _ in range(20):
        env.step(np.array([env.action_space.sample() for _ in range(env.num_envs)]))
    return env


@pytest.mark.parametrize(("observation", "keys"), [("vector", None), ("dict", ["vector"])], ids=["vector", "dict"])
def test_statistics_round_trip_exactly(observation: str, keys: list[str] | None) -> None:
    before = used(observation, norm_obs_keys=keys)
    after = load_normalizer(dump_normalizer(before), vec_env(observation=observation))
    assert dump_normalizer(after) == dump_normalizer(before)
    obs = before.get_original_obs()
    first, second = before.normalize_obs(obs), after.normalize_obs(obs)
    np.testing.assert_array_equal(first["vector"] if keys else first, second["vector"] if keys else second)


def test_reward_scale_round_trips() -> None:
    before = used("vector", norm_obs=False)
    after = load_normalizer(dump_normalizer(before), vec_env())
    rewards = np.array([1.0, -2.0, 3.0])
    np.testing.assert_array_equal(after.normalize_reward(rewards), before.normalize_reward(rewards))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {}, "statistics": {}}'])
def test_foreign_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no normalisation statistics"):
        load_normalizer(text, vec_env())


def test_statistics_of_another_space_are_refused() -> None:
    text = dump_normalizer(used("vector")).replace('"mean": [', '"mean": [0.0, ')
    with pytest.raises(ValueError, match=r"observations have shape \(4,\), the environment's are \(3,\)"):
        load_normalizer(text, vec_env())


def test_statistics_that_are_not_finite_are_refused() -> None:
    before = used("vector")
    statistics: Any = before.obs_rms
    statistics.mean[0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        load_normalizer(dump_normalizer(before), vec_env())
