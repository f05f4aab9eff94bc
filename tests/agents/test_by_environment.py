"""What is told to one environment of many reaches that one and no other."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from stable_baselines3.common.vec_env import DummyVecEnv

import xlstm_rl.envs  # noqa: F401
from xlstm_rl.agents import GymnasiumVecEnv
from xlstm_rl.vec_envs.env_contract import has_method
from xlstm_rl.vec_envs.guarded_vec_env import GuardedDummyVecEnv, GuardedSubprocVecEnv

N = 3


class Told(gym.Env[Any, Any]):
    """Shows the goal and the seed that it was reset with, and counts calls."""

    observation_space = spaces.Box(-100, 100, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self.calls, self.shade, self.notes = 0, "red", np.zeros(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.seen = np.array([np.sum((options or {}).get("goal", -1)), -1 if seed is None else seed], np.float32)
        return self.seen, {"goal": float(self.seen[0])}

    def step(self, action: Any) -> Any:
        return self.seen, float(action), bool(action), False, {"notes": self.notes}

    def call(self, more: int = 1) -> int:
        self.calls += more
        return self.calls

    def action_masks(self) -> np.ndarray:
        return np.array([True, self.calls > 0])


def sync(mode: AutoresetMode) -> Callable[[], Any]:
    return lambda: GymnasiumVecEnv(SyncVectorEnv([Told] * N, autoreset_mode=mode))


def processes() -> Any:
    return GymnasiumVecEnv(AsyncVectorEnv([Told] * N))


KINDS: dict[str, Callable[[], Any]] = {
    "dummy": lambda: DummyVecEnv([Told] * N),
    "guarded dummy": lambda: GuardedDummyVecEnv([Told] * N),
    "guarded processes": lambda: GuardedSubprocVecEnv([Told] * N, start_method="fork"),
    "sync, same step": sync(AutoresetMode.SAME_STEP),
    "sync, next step": sync(AutoresetMode.NEXT_STEP),
    "sync, disabled": sync(AutoresetMode.DISABLED),
    "processes of gymnasium": processes,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(params=KINDS)
def env(request: pytest.FixtureRequest) -> Any:
    made = KINDS[request.param]()
    yield made
    made.close()


@pytest.fixture
def ours(env: Any) -> Any:
    if type(env).__module__.startswith("stable_baselines3."):
        pytest.skip("not from here")
    return env


@pytest.mark.parametrize("goals", [[1, 2, 3], [4, 4, 5], [6, 6, 6], [[1, 2], [1, 2], [3, 4]]])
def test_each_starts_with_its_own_options_and_seed(env: Any, goals: list[Any]) -> None:
    for attempt in range(2):
        env.set_options([{"goal": np.array(goal)} for goal in goals])
        env.seed(10 + attempt)
        first = env.reset()
        assert first[:, 0].tolist() == [np.sum(goal) for goal in goals]
        assert first[:, 1].tolist() == [10 + attempt, 11 + attempt, 12 + attempt]
        assert [info["goal"] for info in env.reset_infos] == first[:, 0].tolist()
    assert env.reset()[:, 0].tolist() == [-1] * N


def test_options_for_some_and_for_all(env: Any) -> None:
    env.set_options([{}, {"goal": 5}, {}])
    assert env.reset()[:, 0].tolist() == [-1, 5, -1]
    env.set_options({"goal": 8})
    assert env.reset()[:, 0].tolist() == [8] * N


def test_a_method_called_in_one_is_not_called_in_the_others(env: Any) -> None:
    env.reset()
    if isinstance(env, GymnasiumVecEnv) and isinstance(env.env, AsyncVectorEnv):
        with pytest.raises(ValueError, match=r"cannot call 'call' in environments \[1\] alone: AsyncVectorEnv calls"):
            env.env_method("call", indices=1)
        assert env.env_method("call") == [1, 1, 1]
        return
    assert env.env_method("call", 5, indices=1) == [5]
    assert env.env_method("call", more=2, indices=[2, 0]) == [2, 2]
    assert env.get_attr("calls") == [2, 5, 2]
    assert env.get_attr("calls", indices=[1, 0]) == [5, 2]


def test_an_attribute_set_in_one_stays_as_it_was_in_the_others(env: Any) -> None:
    env.reset()
    env.set_attr("shade", "blue", indices=[1])
    assert env.get_attr("shade") == ["red", "blue", "red"]
    env.set_attr("shade", "green")
    assert env.get_attr("shade") == ["green"] * N


def test_asking_for_a_method_does_not_call_it(env: Any) -> None:
    env.reset()
    assert has_method(env, "call") and not has_method(env, "absent")
    assert env.get_attr("calls") == [0, 0, 0]
    env.step(np.zeros(N, int))


def test_a_missing_attribute_is_told_and_nothing_breaks(env: Any) -> None:
    if isinstance(env, GuardedSubprocVecEnv):
        assert not has_method(env, "absent")
        return
    env.reset()
    with pytest.raises(AttributeError):
        env.get_attr("absent")
    with pytest.raises(AttributeError):
        env.env_method("absent")
    env.step(np.zeros(N, int))


@pytest.mark.parametrize("given", [2, 4])
def test_as_many_options_and_actions_as_environments_are_needed(ours: Any, given: int) -> None:
    ours.reset()
    with pytest.raises(ValueError, match=f"got {given} options for 3 environments"):
        ours.set_options([{"goal": 1}] * given)
    with pytest.raises(ValueError, match=f"got {given} actions for 3 environments"):
        ours.step(np.zeros(given, int))
    # nothing is left of it that would be answered later
    assert ours.get_attr("calls") == [0, 0, 0]
    ours.step(np.zeros(N, int))
    assert ours.reset()[:, 0].tolist() == [-1] * N


@pytest.mark.parametrize("indices", [3, -4, [0, 3], [True, False, True], np.array([True, False, True])])
def test_numbers_of_environments_that_there_are_not_are_refused(ours: Any, indices: Any) -> None:
    ours.reset()
    with pytest.raises(IndexError, match="there is no environment .* of 3: give their numbers"):
        ours.set_attr("shade", "blue", indices=indices)
    with pytest.raises(IndexError, match="there is no environment"):
        ours.get_attr("shade", indices=indices)
    with pytest.raises(IndexError, match="there is no environment"):
        ours.env_method("call", indices=indices)
    assert ours.get_attr("shade") == ["red"] * N


@pytest.mark.parametrize("indices", [-1, np.int64(2), np.array([2]), [-1], range(2, 3)])
def test_environments_are_counted_from_both_ends(ours: Any, indices: Any) -> None:
    ours.reset()
    ours.set_attr("shade", "blue", indices=indices)
    assert ours.get_attr("shade") == ["red", "red", "blue"]
    assert ours.get_attr("shade", indices=indices) == ["blue"]


class Native(VectorEnv[Any, Any, Any]):
    """Many at once, without parts, writing into the same arrays."""

    def __init__(self) -> None:
        self.num_envs, self.render_mode = N, None
        self.single_observation_space, self.single_action_space = Told.observation_space, Told.action_space
        self.observation_space = spaces.Box(-100, 100, (N, 2), np.float32)
        self.action_space = spaces.MultiDiscrete([2] * N)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.goals, self.shade, self.notes = np.arange(N), "red", np.zeros((N, 2))
        self.shown, self.paid = np.zeros((N, 2), np.float32), np.zeros(N, np.float32)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        self.shown[:] = (options or {}).get("goal", -1)
        return self.shown, {}

    def step(self, actions: Any) -> Any:
        self.shown += 1
        self.paid += 1
        self.notes += 1
        never = np.zeros(N, np.float32)
        return self.shown, self.paid, never, never, {"notes": self.notes}

    def masks(self) -> np.ndarray:
        return np.eye(N, 2, dtype=bool)

    def forget(self) -> None:
        self.goals = self.goals * 0

    def count(self) -> int:
        return N


@pytest.mark.parametrize("wrapped", [False, True])
def test_environments_without_parts_refuse_what_is_for_some(wrapped: bool) -> None:
    env = GymnasiumVecEnv(VectorWrapper(Native()) if wrapped else Native())
    env.set_options([{"goal": 1}, {"goal": 2}, {"goal": 3}])
    with pytest.raises(ValueError, match="got different options, and Native takes the same for all"):
        env.reset()
    env.set_options({"goal": 4})
    assert env.reset()[:, 0].tolist() == [4] * N
    assert env.get_attr("goals") == [0, 1, 2]
    assert env.get_attr("goals", indices=2) == [2]
    assert env.get_attr("shade") == ["red"] * N
    assert [mask.tolist() for mask in env.env_method("masks")] == [[True, False], [False, True], [False, False]]
    with pytest.raises(ValueError, match=r"cannot call 'masks' in environments \[0\] alone: Native has no parts"):
        env.env_method("masks", indices=[0])
    assert env.env_method("forget") == [None] * N
    with pytest.raises(ValueError, match="'count' of .* gave 3, not a result for each of 3"):
        env.env_method("count")


def test_what_a_step_gave_stays_as_it_was() -> None:
    env = GymnasiumVecEnv(Native())
    first: Any = env.reset()
    kept: Any = [env.step(np.zeros(N, int)) for _ in range(3)]
    assert first[0, 0] == -1
    assert [step[0][0, 0] for step in kept] == [0, 1, 2]
    assert [step[1][0] for step in kept] == [1, 2, 3]
    assert [step[3][0]["notes"].tolist() for step in kept] == [[1, 1], [2, 2], [3, 3]]
