"""Vector environments that a user made name the environment, the step and the cause of a fault, as those of runs do."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from tests.agents.small_agents import agent
from tests.runs.faulty_envs import SAYS, Faulty
from xlstm_rl import RecurrentPPO, evaluate
from xlstm_rl.vec_envs.env_contract import FaultyEnvironmentError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


class CountingVecEnv(DummyVecEnv):
    """As somebody may derive one."""

    steps = 0

    def step_wait(self) -> VecEnvStepReturn:
        """Count, and step."""
        self.steps += 1
        return super().step_wait()


Makers = list[Callable[[], gym.Env[Any, Any]]]
KINDS: dict[str, Callable[[Makers], Any]] = {
    "DummyVecEnv": DummyVecEnv,
    "derived": CountingVecEnv,
    "VecMonitor": lambda makers: VecMonitor(DummyVecEnv(makers)),
    "VecNormalize": lambda makers: VecNormalize(DummyVecEnv(makers)),
    "SubprocVecEnv": partial(SubprocVecEnv, start_method="fork"),
}


def pair(fault: str, at: int = 5) -> Makers:
    return [Faulty, partial(Faulty, fault, at)]


def small(env: Any) -> RecurrentPPO:
    return agent(env=env, batch_size=16)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [0, 5])
def test_an_observation_of_one_number_is_refused_and_not_repeated(kind: str, at: int) -> None:
    env = KINDS[kind](pair("one number", at))
    model = small(env)
    place = "on reset" if at == 0 else "in step 5"
    with pytest.raises(FaultyEnvironmentError, match=rf"environment 1 .*{place}.*\(1,\).* wants the shape \(3,\)"):
        model.learn(16)


@pytest.mark.parametrize("fault", SAYS)
def test_every_fault_in_an_environment_of_make_vec_env_is_named(fault: str) -> None:
    made = iter(pair(fault))
    env = make_vec_env(lambda: next(made)(), n_envs=2)
    model = small(env)
    with pytest.raises(FaultyEnvironmentError, match="environment 1 .*in step 5 of its episode") as caught:
        model.learn(16)
    assert re.search(SAYS[fault], str(caught.value))


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize("fault", ["raise", "nothing", "die", "no reward", "too many numbers"])
def test_a_worker_of_stable_baselines_that_fails_is_named(fault: str) -> None:
    env = SubprocVecEnv([*pair(fault), Faulty], start_method="fork")
    with pytest.raises(FaultyEnvironmentError, match="environment 1 "):
        small(env).learn(24)
    env.close()
    assert not any(process.is_alive() for process in env.processes)


def test_evaluation_refuses_them_too() -> None:
    model = small(Faulty())
    with pytest.raises(FaultyEnvironmentError, match=r"environment 1 .*in step 5 of its episode.*wants the shape"):
        evaluate(model, DummyVecEnv(pair("one number")), 2)


def test_a_copy_with_a_smaller_space_than_the_first_is_refused() -> None:
    class Small(Faulty):
        observation_space = spaces.Box(-1, 1, (1,), np.float32)

        def step(self, action: Any) -> Any:
            return np.zeros(1, np.float32), 1.0, False, False, {}

    with pytest.raises(FaultyEnvironmentError, match=r"environment 1 .*\(1,\).* wants the shape \(3,\)"):
        small(DummyVecEnv([Faulty, Small])).learn(16)


def test_whoever_made_the_environments_keeps_them() -> None:
    env = CountingVecEnv([Faulty, Faulty])
    ones = list(env.envs)
    small(env).learn(16)
    assert isinstance(env, CountingVecEnv) and env.steps == 8
    assert all(one is kept for one, kept in zip(env.envs, ones, strict=True))
    # and may put others in their place
    env.envs[0] = Faulty("raise", at=1)
    with pytest.raises(FaultyEnvironmentError, match="environment 0 failed in step 1"):
        small(env).learn(16)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize("fault", ["raise", "nothing", "no info", "no reward", "too many numbers"])
@pytest.mark.parametrize("kind", [SyncVectorEnv, partial(AsyncVectorEnv, context="fork")])
def test_vector_environments_of_gymnasium_name_the_environment_where_they_stopped(kind: Any, fault: str) -> None:
    env = kind(pair(fault))
    with pytest.raises((FaultyEnvironmentError, FloatingPointError), match="in step 4 ") as caught:
        small(env).learn(16)
    with warnings.catch_warnings():
        # of the answers that nobody took
        warnings.simplefilter("ignore")
        env.close(terminate=True)
    stacked = fault == "too many numbers" and kind is SyncVectorEnv
    assert ("the vector environment failed" if stacked else "environment 1 ") in str(caught.value)
