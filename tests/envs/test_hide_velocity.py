"""HideVelocity: what stays visible, time limits, unknown environments."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray

from xlstm_rl.envs import HideVelocity, Parity, TaskFacts, task_facts

KEPT = {
    "CartPole-v1": [0, 2],
    "Pendulum-v1": [0, 1],
    "Acrobot-v1": [0, 1, 2, 3],
    "MountainCar-v0": [0],
    "MountainCarContinuous-v0": [0],
}
IDS = {
    "xlstm_rl/CartPoleNoVelocity-v0": ("CartPole-v1", 500),
    "xlstm_rl/PendulumNoVelocity-v0": ("Pendulum-v1", 200),
    "xlstm_rl/AcrobotNoVelocity-v0": ("Acrobot-v1", 500),
}


class LunarLander(gym.Env[NDArray[np.float32], np.int64]):
    """Stands in for the Box2D environment of the same name."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (8,), np.float32)
    action_space = gym.spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.arange(8, dtype=np.float32), {}


@pytest.mark.parametrize("source", KEPT)
def test_positions_keep_their_order_bounds_and_dtype(source: str) -> None:
    full, hidden = gym.make(source), HideVelocity(gym.make(source))
    full_space, space = full.observation_space, hidden.observation_space
    assert isinstance(full_space, gym.spaces.Box) and isinstance(space, gym.spaces.Box)
    np.testing.assert_array_equal(space.low, full_space.low[KEPT[source]])
    np.testing.assert_array_equal(space.high, full_space.high[KEPT[source]])
    full.action_space.seed(0)
    seen, shown = full.reset(seed=0)[0], hidden.reset(seed=0)[0]
    for _ in range(20):
        assert shown.dtype == space.dtype and space.contains(shown)
        np.testing.assert_array_equal(shown, seen[KEPT[source]])
        action = full.action_space.sample()
        seen, _, terminated, _, _ = full.step(action)
        shown = hidden.step(action)[0]
        if terminated:
            break


def test_lunar_lander_is_known_by_its_class_name() -> None:
    observation, _ = HideVelocity(LunarLander()).reset()
    assert observation.tolist() == [0.0, 1.0, 4.0, 6.0, 7.0]


def test_a_subclass_of_a_known_environment_is_known() -> None:
    class Heavy(LunarLander):
        pass

    assert HideVelocity(Heavy()).observation_space.shape == (5,)


def test_an_unknown_environment_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"where Parity keeps its velocities; it knows CartPoleEnv, .*indices=\(1, 3\)"
    ):
        HideVelocity(Parity())


def test_indices_name_what_to_hide_in_any_environment() -> None:
    env = HideVelocity(Parity(), indices=[0])
    assert env.observation_space.shape == (2,)
    assert env.reset(seed=0)[0].shape == (2,)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([3], "each of indices must be at most 2, got 3"),
        ([-1], "each of indices must be at least 0, got -1"),
        ([], "must hide some but not all of 3 entries"),
        ([0, 1, 2], "must hide some but not all of 3 entries"),
    ],
)
def test_indices_that_do_not_fit_are_refused(indices: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HideVelocity(Parity(), indices=indices)


def test_an_observation_that_is_not_a_flat_box_is_refused() -> None:
    class Card(gym.Env[np.int64, np.int64]):
        observation_space = gym.spaces.Discrete(3)
        action_space = gym.spaces.Discrete(2)

    with pytest.raises(TypeError, match=r"needs a Box observation of one dimension, got Discrete\(3\)"):
        HideVelocity(Card())


@pytest.mark.parametrize("env_id", IDS)
def test_registered_ids_hide_the_velocities_and_keep_the_time_limit(env_id: str) -> None:
    source, limit = IDS[env_id]
    env = gym.make(env_id)
    assert env.observation_space.shape == (len(KEPT[source]),)
    assert env.spec is not None and env.spec.max_episode_steps == limit
    assert env.action_space == gym.make(source).action_space


def test_the_time_limit_truncates() -> None:
    env = gym.make("xlstm_rl/PendulumNoVelocity-v0")
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(200)]
    assert ends == [(False, False)] * 199 + [(False, True)]


def test_a_falling_pole_terminates() -> None:
    env = gym.make("xlstm_rl/CartPoleNoVelocity-v0")
    env.reset(seed=0)
    ends = [(False, False)]
    while ends[-1] == (False, False):
        ends.append(env.step(1)[2:4])
    assert ends[-1] == (True, False) and len(ends) < 20


@pytest.mark.parametrize("env_id", IDS)
def test_facts_hold_for_the_usual_time_limit_only(env_id: str) -> None:
    facts = task_facts(gym.make(env_id))
    assert facts is not None and facts.horizon == IDS[env_id][1]
    assert facts.memoryless_return < facts.optimal_return
    assert task_facts(gym.make(env_id, max_episode_steps=50)) is None


@pytest.mark.parametrize(
    ("env_id", "changed", "default"),
    [
        ("xlstm_rl/CartPoleNoVelocity-v0", {"sutton_barto_reward": True}, {"sutton_barto_reward": False}),
        ("xlstm_rl/PendulumNoVelocity-v0", {"g": 1.0}, {"g": 10}),
    ],
)
def test_facts_hold_for_the_usual_reward_and_dynamics_only(
    env_id: str, changed: dict[str, Any], default: dict[str, Any]
) -> None:
    assert task_facts(gym.make(env_id, **changed)) is None
    assert task_facts(gym.make(env_id, **default, render_mode="rgb_array")) == task_facts(gym.make(env_id)) is not None


def test_facts_do_not_hold_for_chosen_indices() -> None:
    assert task_facts(HideVelocity(gym.make("CartPole-v1"), indices=[3])) is None
    assert isinstance(task_facts(HideVelocity(gym.make("CartPole-v1"))), TaskFacts)
