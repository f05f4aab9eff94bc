"""Tasks of other packages: found by name, missing packages named, presented as agents here take them."""

import sys
import types
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from xlstm_rl.configs import load
from xlstm_rl.envs import suite_ids, suite_versions
from xlstm_rl.envs.suites import DmEnvironment, PreviousActionVector

PACKAGES = {
    "xlstm_rl/popgym-RepeatPreviousMedium-v0": ("popgym", "pip install popgym"),
    "xlstm_rl/MiniGrid-MemoryS9-v0": ("minigrid", "pip install minigrid"),
    "xlstm_rl/MortarMayhem-Grid-v0": ("memory_gym", "--no-deps memory-gym"),
    "xlstm_rl/bsuite-memory_len-v0": ("bsuite", "pip install bsuite"),
    "xlstm_rl/Atari-v0": ("cv2", "pip install opencv-python-headless"),
}


class TwoParts(gym.Env[Any, Any]):
    """Counts the steps; a POPGym task in shape."""

    observation_space = spaces.Tuple((spaces.Discrete(3), spaces.Box(-1, 1, (2,), np.float32)))
    action_space = spaces.MultiDiscrete([2, 3])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return (0, np.zeros(2, np.float32)), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return (self.t % 3, np.full(2, 0.5, np.float32)), 1.0, self.t == 2, False, {}


class FakeDm:
    """An environment of bsuite in shape: two steps, cut by time or not."""

    def __init__(self, discount: float) -> None:
        self.discount, self._rng = discount, np.random.RandomState(0)

    def observation_spec(self) -> Any:
        return types.SimpleNamespace(shape=(1, 3))

    def action_spec(self) -> Any:
        return types.SimpleNamespace(num_values=2)

    def _timestep(self, last: bool) -> Any:
        discount = self.discount if last else 1.0
        reward = None if self.t == 0 else 2.0
        observation = self._rng.rand(1, 3)
        return types.SimpleNamespace(observation=observation, reward=reward, discount=discount, last=lambda: last)

    def reset(self) -> Any:
        self.t = 0
        return self._timestep(False)

    def step(self, action: int) -> Any:
        self.t += 1
        return self._timestep(self.t == 2)


def test_tasks_are_registered_and_may_be_called_by_their_own_names() -> None:
    assert {*PACKAGES} <= set(suite_ids()) <= set(gym.registry)
    assert load("popgym-RepeatPreviousMedium-v0").env.id == "xlstm_rl/popgym-RepeatPreviousMedium-v0"
    assert load("MiniGrid-MemoryS9-v0").env.id == "xlstm_rl/MiniGrid-MemoryS9-v0"


@pytest.mark.parametrize("env_id", PACKAGES)
def test_missing_package_is_named_with_its_install_line(env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, install = PACKAGES[env_id]
    monkeypatch.setitem(sys.modules, package, None)  # as if it was not installed
    with pytest.raises(gym.error.DependencyNotInstalled, match=f"needs the package '{package}'.*{install}"):
        gym.make(env_id)


def test_labyrinths_of_popgym_name_the_package_that_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "popgym", types.ModuleType("popgym"))
    monkeypatch.setitem(sys.modules, "mazelib", None)
    with pytest.raises(gym.error.DependencyNotInstalled, match="needs the package 'mazelib'.*pip install mazelib"):
        gym.make("xlstm_rl/popgym-LabyrinthEscapeEasy-v0")


def test_version_of_the_package_behind_a_task_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: f"{name} 1")
    assert suite_versions("xlstm_rl/popgym-RepeatPreviousMedium-v0") == {"popgym": "popgym 1"}
    assert suite_versions("some.module:xlstm_rl/Endless-MysteryPath-v0") == {"memory-gym": "memory-gym 1"}
    assert suite_versions("xlstm_rl/Atari-v0") == {"ale-py": "ale-py 1"}
    assert suite_versions("xlstm_rl/Parity-v0") == suite_versions("CartPole-v1") == {}


def test_version_of_a_package_that_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert suite_versions("xlstm_rl/popgym-RepeatPreviousMedium-v0") == {}


def test_popgym_observations_hold_the_previous_action_and_the_start() -> None:
    env = PreviousActionVector(TwoParts())
    first, _ = env.reset()
    np.testing.assert_array_equal(first, [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    obs, *_ = env.step(np.array([1, 2]))
    np.testing.assert_array_equal(obs, [0, 1, 0, 0.5, 0.5, 0, 1, 0, 0, 1, 0])
    assert env.observation_space.contains(obs)
    np.testing.assert_array_equal(env.reset()[0], first)


@pytest.mark.parametrize(("discount", "ended"), [(0.0, (True, False)), (1.0, (False, True))])
def test_dm_environments_end_as_their_discount_says(discount: float, ended: tuple[bool, bool]) -> None:
    env = DmEnvironment(FakeDm(discount))
    obs, _ = env.reset(seed=3)
    assert obs.shape == (3,) and env.observation_space.contains(obs)
    assert env.step(0)[1:4] == (2.0, False, False)
    assert env.step(1)[2:4] == ended
    np.testing.assert_array_equal(env.reset(seed=3)[0], obs)


@pytest.mark.parametrize("env_id", PACKAGES)
def test_installed_tasks_play(env_id: str) -> None:
    if find_spec(PACKAGES[env_id][0]) is None:
        pytest.skip(f"{PACKAGES[env_id][0]} is not installed")
    with gym.make(env_id) as env:
        obs, _ = env.reset(seed=0)
        np.testing.assert_array_equal(obs, env.reset(seed=0)[0])
        for _ in range(20):
            obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
            assert env.observation_space.contains(obs)
            if terminated or truncated:
                env.reset()
