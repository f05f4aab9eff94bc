"""The example of environments in Ray actors: what they do is what they do in this process."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from xlstm_rl import RecurrentPPO
from xlstm_rl.envs import Resumable

if find_spec("ray") is None:
    pytest.skip("ray is not installed", allow_module_level=True)

import ray

ROOT = Path(__file__).parents[2]


def _maze() -> gymnasium.Env[Any, Any]:
    return Resumable(Monitor(gymnasium.make("xlstm_rl:xlstm_rl/TMaze-v0", corridor_length=4)))


def _stuck() -> gymnasium.Env[Any, Any]:
    class Stuck(gymnasium.Wrapper[Any, Any, Any, Any]):
        def step(self, action: Any) -> Any:
            time.sleep(60)

    return Stuck(_maze())


@pytest.fixture(scope="module")
def ray_vec_env() -> Iterator[Any]:
    path = [str(ROOT), str(ROOT / "examples")]
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=100_000_000,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(path)}},
    )
    sys.path.insert(0, path[1])
    yield __import__("ray_vec_env").RayVecEnv
    sys.path.remove(path[1])
    ray.shutdown()


def trained(env: VecEnv, steps: int) -> RecurrentPPO:
    settings: dict[str, Any] = {"n_steps": 32, "seq_len": 16, "batch_size": 128, "n_epochs": 2, "device": "cpu"}
    return RecurrentPPO("MlpXLSTMPolicy", env, seed=0, **settings).learn(steps)


def weights(model: RecurrentPPO) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach()


@pytest.mark.slow
def test_training_is_that_of_environments_in_this_process_and_resumes_exactly(ray_vec_env: Any, tmp_path: Path) -> None:
    # 5 environments in 2 processes: shares of different size
    env = ray_vec_env([_maze] * 5, groups=2)
    model = trained(env, 320)
    assert torch.equal(weights(model), weights(trained(DummyVecEnv([_maze] * 5), 320)))
    model.save_checkpoint(tmp_path / "run.zip")
    model.learn(320, reset_num_timesteps=False)
    env.close()
    other = ray_vec_env([_maze] * 5, groups=3)
    again = RecurrentPPO.resume(tmp_path / "run.zip", other, device="cpu")
    again.learn(320, reset_num_timesteps=False)
    other.close()
    assert torch.equal(weights(model), weights(again))


def test_lost_process_is_an_error_at_once(ray_vec_env: Any) -> None:
    env = ray_vec_env([_maze] * 4, groups=2)
    model = trained(env, 128)
    ray.kill(env.actors[1])
    start = time.monotonic()
    with pytest.raises(ray.exceptions.RayActorError):
        model.learn(128, reset_num_timesteps=False)
    assert time.monotonic() - start < 10
    env.close()


def test_process_that_hangs_is_an_error_after_the_time_limit(ray_vec_env: Any) -> None:
    env = ray_vec_env([_maze, _stuck], groups=2)
    env.reset()
    env.timeout = 0.5
    with pytest.raises(ray.exceptions.GetTimeoutError):
        env.step(np.zeros(2, np.int64))
    env.close()


def test_questions_reach_the_environments_that_they_are_for(ray_vec_env: Any) -> None:
    env = ray_vec_env([_maze] * 5, groups=2)
    env.set_attr("mark", "third", indices=[3])
    assert env.get_attr("mark", indices=[3]) == ["third"]
    env.set_attr("mark", "first", indices=0)
    assert env.get_attr("mark", indices=[3, 0]) == ["third", "first"]
    assert env.env_is_wrapped(Monitor) == [True] * 5
    assert not env.has_attr("mark") and env.has_attr("spec")
    assert len(env.env_method("get_wrapper_attr", "spec")) == 5
    env.close()


@pytest.mark.parametrize("groups", [0, 3])
def test_number_of_processes_that_does_not_fit_is_refused(groups: int, ray_vec_env: Any) -> None:
    with pytest.raises(ValueError, match=f"groups={groups} must be 1 to 2"):
        ray_vec_env([_maze] * 2, groups=groups)
