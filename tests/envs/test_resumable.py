"""Another copy of an environment can be brought to the same point of an episode."""

import json
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import NormalizeObservation, NormalizeReward

from xlstm_rl.envs import Resumable, resumable
from xlstm_rl.envs.task import PURPOSES

ENVS = list(PURPOSES)
ENVS += ["FrozenLake-v1", "MountainCar-v0"]


def play(env: gym.Env[Any, Any], steps: int) -> list[Any]:
    """Everything an agent sees with actions from the environment's own action space."""
    seen = []
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        seen.append((np.asarray(obs).tolist(), reward, terminated, truncated))
        if terminated or truncated:
            seen.append(np.asarray(env.reset()[0]).tolist())
    return seen


def started(env_id: str, seed: int) -> Resumable:
    env = Resumable(gym.make(env_id))
    env.action_space.seed(seed)
    env.reset(seed=seed)
    return env


@pytest.mark.parametrize("steps", [0, 1, 7, 250])
@pytest.mark.parametrize("env_id", ENVS)
def test_copy_goes_on_exactly_as_the_original(env_id: str, steps: int) -> None:
    env, other = started(env_id, 1), started(env_id, 2)
    play(env, steps)
    play(other, 3)
    env.mark_point()
    point = env.resume_point()
    assert point is not None
    assert other.resume_at(point)
    assert play(other, 60) == play(env, 60)


def test_running_statistics_of_wrappers_go_on() -> None:
    def normalised(seed: int) -> Resumable:
        env = Resumable(NormalizeReward(NormalizeObservation(gym.make("CartPole-v1"))))
        env.action_space.seed(seed)
        env.reset(seed=seed)
        return env

    env, other = normalised(1), normalised(2)
    play(env, 50)
    play(other, 3)
    env.mark_point()
    point = env.resume_point()
    assert point is not None and other.resume_at(point)
    assert play(other, 60) == play(env, 60)


def test_point_is_the_marked_one_not_the_present() -> None:
    env, other = started("CartPole-v1", 0), started("CartPole-v1", 1)
    play(env, 5)
    env.mark_point()
    expected = env.unwrapped.state.copy()  # type: ignore[attr-defined]
    play(env, 40)
    point = env.resume_point()
    assert point is not None
    assert other.resume_at(point)
    assert np.array_equal(other.unwrapped.state, expected)  # type: ignore[attr-defined]


def test_there_is_no_point_without_a_mark() -> None:
    env = Resumable(gym.make("CartPole-v1"))
    env.mark_point()
    assert env.resume_point() is None


def test_long_episode_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable, "MAX_ACTIONS", 3)
    env = started("Pendulum-v1", 0)
    for steps, known in ((3, True), (1, False), (100, False)):
        play(env, steps)
        env.mark_point()
        assert (env.resume_point() is not None) == known
    assert env._episode is not None
    assert len(env._episode.actions) == 4


class Growing(gym.Env[np.ndarray, np.int64]):
    """Observations depend on the number of episodes so far."""

    observation_space = spaces.Box(0, 1000, (1,), np.float64)
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self.episodes = self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.episodes += 1
        self.steps = 0
        return np.array([self.episodes], np.float64), {}

    def step(self, action: np.int64) -> Any:
        self.steps += 1
        return np.array([self.episodes + self.steps / 10]), 0.0, self.steps == 4, False, {}


class Telling(Growing):
    """And says so."""

    def get_state(self) -> dict[str, Any]:
        return {"episodes": self.episodes}

    def set_state(self, state: dict[str, Any]) -> None:
        self.episodes = state["episodes"]


@pytest.mark.parametrize(("kind", "same"), [(Growing, False), (Telling, True)])
def test_state_that_outlives_episodes_has_to_be_told(kind: type[Growing], same: bool) -> None:
    env, other = Resumable(kind()), Resumable(kind())
    env.reset()
    play(env, 11)
    env.mark_point()
    point = env.resume_point()
    assert point is not None
    assert json.loads(json.dumps(point["own"])) == ({"episodes": 2} if same else None)
    assert other.resume_at(point) == same


def test_action_of_another_space_is_refused() -> None:
    env = started("CartPole-v1", 0)
    env.mark_point()
    point = env.resume_point()
    assert point is not None
    with pytest.raises(ValueError, match="action 7 is none of Discrete"):
        env.resume_at(point | {"actions": np.array([7])})


class OwnGenerator(gym.Env[Any, Any]):
    """Draws from a generator that is none of NumPy's new ones, as simulators of other libraries do."""

    observation_space, action_space = gym.spaces.Box(0, 1, (1,), np.float64), gym.spaces.Discrete(2)
    np_random: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.np_random = np.random.RandomState(seed)
        return self.np_random.random(1), {}

    def step(self, action: Any) -> Any:
        return self.np_random.random(1), 0.0, False, False, {}


def test_an_environment_with_a_generator_of_its_own_plays_and_is_not_brought_back() -> None:
    env = Resumable(OwnGenerator())
    env.reset(seed=0)
    env.step(0)
    env.mark_point()
    assert env.resume_point() is None


class Fragile(gym.Env[Any, Any]):
    """Fails from the third step on, once it is broken."""

    observation_space, action_space = gym.spaces.Box(0, 1, (1,), np.float64), gym.spaces.Discrete(2)
    broken = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        if self.broken and self.time == 3:
            raise ZeroDivisionError("the physics broke")
        return np.zeros(1), 0.0, False, False, {}


def test_an_episode_that_fails_when_it_is_played_again_is_not_brought_back() -> None:
    env = Resumable(Fragile())
    env.reset(seed=0)
    for _ in range(4):
        env.step(0)
    env.mark_point()
    point = env.resume_point()
    assert point is not None
    assert Resumable(Fragile()).resume_at(point)
    broken = Fragile()
    broken.broken = True
    assert not Resumable(broken).resume_at(point)
