"""Noise, lost frames, delays, hidden halves, and wrappers by name."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from xlstm_rl.envs import (
    DelayAction,
    DropObservation,
    HidePosition,
    HideVelocity,
    NoisyObservation,
    Parity,
    Resumable,
    TMaze,
    task_facts,
    wrapped,
    wrapper_class,
)

# Positions and velocities of an observation.
MUJOCO = {"Hopper-v5": (5, 6), "HalfCheetah-v5": (8, 9), "Walker2d-v5": (8, 9), "Ant-v5": (13, 14)}


class Counter(gym.Env[np.ndarray, Any]):
    """Shows how many steps were taken, and remembers the actions."""

    def __init__(self, action_space: gym.Space[Any] | None = None) -> None:
        self.observation_space = gym.spaces.Box(1.0, 100.0, (2,), np.float32)
        self.action_space = action_space or gym.spaces.Discrete(5, start=1)
        self.actions: list[Any] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.actions = []
        return np.ones(2, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.actions.append(action)
        return np.full(2, 1.0 + len(self.actions), np.float32), 0.0, False, False, {}


def walk(env: gym.Env[Any, Any], steps: int, seed: int = 0) -> np.ndarray:
    first, _ = env.reset(seed=seed)
    return np.array([first, *(env.step(1)[0] for _ in range(steps))])


@pytest.mark.parametrize("env_id", MUJOCO)
def test_halves_of_mujoco_observations_are_the_positions_and_the_velocities(env_id: str) -> None:
    pytest.importorskip("mujoco")
    positions, velocities = MUJOCO[env_id]
    whole = gym.make(env_id)
    seen = whole.reset(seed=0)[0]
    for wrapper, part in (
        (HideVelocity, slice(positions)),
        (HidePosition, slice(positions, positions + velocities)),
    ):
        env = wrapper(gym.make(env_id))
        np.testing.assert_array_equal(env.reset(seed=0)[0], seen[part])
        for _ in range(2000):
            observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
            assert env.observation_space.contains(observation)
            if terminated or truncated:
                env.reset()


@pytest.mark.parametrize(
    ("env_id", "shown"),
    [("CartPole-v1", [1, 3]), ("Pendulum-v1", [2]), ("MountainCarContinuous-v0", [1]), ("Acrobot-v1", [4, 5])],
)
def test_velocities_alone_are_those_that_the_other_wrapper_hides(env_id: str, shown: list[int]) -> None:
    env, whole = HidePosition(gym.make(env_id)), gym.make(env_id)
    np.testing.assert_array_equal(env.reset(seed=1)[0], whole.reset(seed=1)[0][shown])
    assert env.facts is None


def test_noise_has_the_stated_deviation_and_knows_no_bounds() -> None:
    env = NoisyObservation(Counter(), 0.5)
    noise = walk(env, 4000) - walk(Counter(), 4000)
    assert noise.dtype == np.float32 and noise.std() == pytest.approx(0.5, rel=0.05)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.06
    assert env.observation_space == gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    np.testing.assert_array_equal(walk(NoisyObservation(Counter(), 0.0), 5), walk(Counter(), 5))


@pytest.mark.parametrize("fill", ["repeat", "zero"])
def test_observations_are_lost_as_often_as_stated(fill: str) -> None:
    seen = walk(DropObservation(Counter(), 0.3, fill), 4000)[:, 0]
    lost = seen != walk(Counter(), 4000)[:, 0]
    assert not lost[0] and lost.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / 4000))
    if fill == "zero":
        assert not seen[lost].any()
    else:
        last = np.maximum.accumulate(np.where(lost, 0, np.arange(len(seen))))
        np.testing.assert_array_equal(seen, last + 1.0)


def test_all_observations_but_the_first_can_be_lost() -> None:
    assert walk(DropObservation(Counter(), 1.0), 4)[:, 0].tolist() == [1.0] * 5
    assert walk(DropObservation(Counter(), 1.0, "zero"), 2)[:, 0].tolist() == [1.0, 0.0, 0.0]
    assert DropObservation(Counter(), 0.5, "zero").observation_space.contains(np.zeros(2, np.float32))


@pytest.mark.parametrize(
    ("space", "neutral"),
    [
        (gym.spaces.Discrete(5, start=1), 1),
        (gym.spaces.Box(-1.0, 1.0, (1,), np.float32), [0.0]),
        (gym.spaces.Box(2.0, 3.0, (1,), np.float32), [2.0]),
    ],
)
def test_actions_arrive_late_and_neutral_ones_before(space: gym.Space[Any], neutral: Any) -> None:
    inner = Counter(space)
    env = DelayAction(inner, 2)
    for _ in range(2):
        env.reset(seed=0)
        chosen = [space.sample() for _ in range(5)]
        for action in chosen:
            env.step(action)
        np.testing.assert_array_equal(np.array(inner.actions), np.array([neutral, neutral, *chosen[:3]]))


def test_an_action_buffer_that_is_used_again_does_not_change_what_was_chosen() -> None:
    inner = Counter(gym.spaces.Box(-1.0, 1.0, (1,), np.float32))
    env = DelayAction(inner, 1, first=[0.5])
    env.reset(seed=0)
    action = np.zeros(1, np.float32)
    for value in (0.1, 0.2, 0.3):
        action[:] = value
        env.step(action)
    np.testing.assert_allclose(np.array(inner.actions).ravel(), [0.5, 0.1, 0.2])


@pytest.mark.parametrize("wrappers", [{"NoisyObservation": {"std": 0.1}}, {"DropObservation": {"probability": 0.5}}])
def test_what_chance_adds_comes_back_with_the_episode(wrappers: dict[str, Any]) -> None:
    def make() -> Resumable:
        return Resumable(wrapped(gym.make("CartPole-v1"), {**wrappers, "DelayAction": {"delay": 1}}))

    env, other = make(), make()
    env.reset(seed=3)
    for _ in range(5):
        env.step(1)
    env.mark_point()
    point = env.resume_point()
    expected = [env.step(action)[0] for action in (0, 1, 0)]
    assert point is not None and other.resume_at(point)
    np.testing.assert_array_equal(expected, [other.step(action)[0] for action in (0, 1, 0)])


def test_first_wrapper_named_is_the_innermost() -> None:
    env = wrapped(Counter(), {"DelayObservation": {"delay": 1}, "NoisyObservation": {"std": 0.0}})
    assert isinstance(env, NoisyObservation) and isinstance(env.env, gym.wrappers.DelayObservation)
    assert walk(env, 3)[1:, 0].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("HideVelocities", "did you mean 'HideVelocity'"),
        ("TimeLimits", "did you mean 'TimeLimit'"),
        ("no_such_module:Wrapper", "module 'no_such_module' .* cannot be imported"),
        ("gymnasium.spaces:Box", "'gymnasium.spaces:Box' is no wrapper"),
    ],
)
def test_a_name_that_is_none_is_refused_with_the_remedy(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapper_class(name)


def test_a_wrapper_of_ones_own_is_named_with_its_module() -> None:
    assert wrapper_class("xlstm_rl.envs.hide_velocity:HideVelocity") is HideVelocity


@pytest.mark.parametrize(
    ("wrappers", "kind", "message"),
    [
        ({"NoisyObservation": {"std": -1.0}}, ValueError, "wrapper 'NoisyObservation' with .*std must be finite"),
        ({"NoisyObservation": {}}, TypeError, "wrapper 'NoisyObservation' with {}: .*std"),
        ({"DropObservation": {"probability": 2}}, ValueError, "probability must be finite and in 0.0..1.0, got 2"),
        ({"DropObservation": {"probability": 0.1, "fill": "nan"}}, ValueError, "fill must be one of .*got 'nan'"),
        ({"DelayAction": {"delay": -1}}, ValueError, "delay must be at least 0, got -1"),
        ({"DelayAction": {"delay": 1, "first": 9}}, ValueError, "first=9 is no action"),
        ({"HideVelocity": {}}, ValueError, "does not know where Counter keeps its velocities"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(
    wrappers: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        wrapped(Counter(), wrappers)


def test_spaces_that_cannot_be_wrapped_are_refused() -> None:
    with pytest.raises(TypeError, match=r"neutral action of MultiDiscrete.*give `first`"):
        DelayAction(Counter(gym.spaces.MultiDiscrete([2, 2])), 1)

    class Masked(Counter):
        def action_masks(self) -> np.ndarray:
            return np.ones(5, bool)

    with pytest.raises(TypeError, match="masked"):
        DelayAction(Masked(), 1)
    card = Counter()
    card.observation_space = gym.spaces.Discrete(3)  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"real numbers, got Discrete\(3\)"):
        NoisyObservation(card, 1.0)
    with pytest.raises(TypeError, match=r"use 'repeat'"):
        DropObservation(card, 0.5, "zero")


@pytest.mark.parametrize(
    "wrappers",
    [{"NoisyObservation": {"std": 0.1}}, {"DropObservation": {"probability": 0.1}}, {"DelayAction": {"delay": 1}}],
)
def test_bounds_are_not_those_of_the_task_inside(wrappers: dict[str, Any]) -> None:
    assert task_facts(wrapped(TMaze(), wrappers)) is None
    assert task_facts(HideVelocity(wrapped(gym.make("CartPole-v1"), wrappers))) is None


@pytest.mark.filterwarnings(
    "ignore:.*different from the unwrapped version.*", "ignore:.*observation space m.*infinity.*"
)
def test_gymnasium_accepts_the_wrapped_environment() -> None:
    all_of_them: dict[str, Any] = {
        "NoisyObservation": {"std": 0.1},
        "DropObservation": {"probability": 0.1},
        "DelayAction": {"delay": 1},
    }
    check_env(wrapped(Parity(), all_of_them), skip_render_check=True)
