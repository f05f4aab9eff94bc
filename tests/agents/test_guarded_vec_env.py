"""A worker that fails, dies or hangs is named, and started again where that was asked for."""

import os
import re
import signal
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor

from tests.agents.small_agents import agent
from xlstm_rl.configs import load
from xlstm_rl.runs.build import make_env
from xlstm_rl.vec_envs import guarded_vec_env
from xlstm_rl.vec_envs.env_contract import SKIPPED, has_method
from xlstm_rl.vec_envs.guarded_vec_env import EpisodeMonitor, GuardedSubprocVecEnv, WorkerError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.skipif(sys.platform == "win32", reason="no fork"),
]


class Counting(gym.Env[np.ndarray, np.int64]):
    """Observes [seed, steps since reset]; does something bad at one step."""

    observation_space = spaces.Box(0, np.inf, (2,), np.float64)
    action_space = spaces.Discrete(2)

    def __init__(self, fault: str = "", at: int = 3) -> None:
        self.fault, self.at, self.steps, self.seed = fault, at, 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.seed = self.seed if seed is None else seed
        self.steps = 0
        return np.array([self.seed, 0.0]), {}

    def step(self, action: np.int64) -> Any:
        self.steps += 1
        if self.steps == self.at:
            if self.fault == "raise":
                raise ZeroDivisionError("the physics broke")
            if self.fault == "die":
                os._exit(3)
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "hang":
                time.sleep(1000)
        return np.array([float(self.seed), self.steps]), 1.0, self.steps == 6, False, {}


def envs(fault: str, **kwargs: Any) -> GuardedSubprocVecEnv:
    makers = [Counting, partial(Counting, fault), Counting]
    env = GuardedSubprocVecEnv(makers, start_method="fork", timeout=0.5, **kwargs)  # type: ignore[arg-type]
    env.seed(10)
    return env


class Listing(Counting):
    action_masks = np.ones(2, bool)


def test_what_is_no_method_of_an_environment_in_a_process_is_not_called() -> None:
    with closing(GuardedSubprocVecEnv([Listing], start_method="fork")) as env:
        assert env.has_attr("action_masks") and not has_method(env, "action_masks") and has_method(env, "step")
        agent(env=env).learn(8)


FAULTS = {
    "raise": r"environment 1 \(process \d+\) failed:\n(?s:.*)ZeroDivisionError: the physics broke",
    "die": r"environment 1 \(process \d+\) died: exit code 3",
    "kill": r"environment 1 \(process \d+\) died: was killed by SIGKILL",
    "hang": r"environment 1 \(process \d+\) did not answer within 0.5 seconds",
}
NOTHING = np.zeros(3, int)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_and_nothing_goes_on(fault: str) -> None:
    env = envs(fault)
    env.reset()
    env.step(NOTHING)
    env.step(NOTHING)
    with pytest.raises(WorkerError, match=FAULTS[fault]) as caught:
        env.step(NOTHING)
    assert caught.value.index == 1
    with pytest.raises(WorkerError):
        env.step(NOTHING)
    with pytest.raises(WorkerError):
        env.get_attr("steps", 0)
    env.close()
    assert not any(process.is_alive() for process in env.processes)


@pytest.mark.parametrize("fault", FAULTS)
def test_environment_started_again_begins_a_new_episode(fault: str) -> None:
    env = envs(fault, restarts=1)
    env.reset()
    seen: list[Any] = [env.step(NOTHING) for _ in range(2)]
    with pytest.warns(UserWarning, match=FAULTS[fault]):
        seen.append(env.step(NOTHING))
    seen.append(env.step(NOTHING))
    obs, rewards, dones, infos = seen[2]
    assert dones.tolist() == [False, True, False]
    assert rewards.tolist() == [1.0, 0.0, 1.0]
    assert [SKIPPED in info for info in infos] == [False, True, False]
    assert "terminal_observation" not in infos[1]
    # a new seed, not the episode that was broken
    assert obs[1, 1] == 0
    assert obs[1, 0] != 11
    assert [step[0][:, 1].tolist() for step in seen] == [[1, 1, 1], [2, 2, 2], [3, 0, 3], [4, 1, 4]]
    env.step(NOTHING)
    with pytest.raises(WorkerError, match=FAULTS[fault]):
        env.step(NOTHING)
    env.close()


def test_fault_in_reset_and_in_methods_is_named() -> None:
    env = envs("")
    with pytest.raises(WorkerError, match=r"(?s)environment 0 .*no_such"):
        env.env_method("no_such")
    env.close()


def test_environment_that_cannot_be_made_is_named() -> None:
    with pytest.raises(WorkerError, match=r"(?s)environment 0 .*failed:.*unexpected keyword argument 'colour'"):
        GuardedSubprocVecEnv([partial(Counting, colour=1)], start_method="fork")  # type: ignore[call-arg]


def test_workers_that_hang_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded_vec_env, "CLOSE_SECONDS", 0.3)
    env = envs("hang")
    env.reset()
    for _ in range(2):
        env.step(NOTHING)
    env.step_async(NOTHING)
    processes = env.processes
    env.close()
    assert not any(process.is_alive() for process in processes)


def test_agent_learns_nothing_from_the_broken_step_and_empties_the_memory() -> None:
    model = agent(env=envs("kill", restarts=1), n_steps=5)
    with pytest.warns(UserWarning, match="died"):
        model.learn(15)
    buffer = model.rollout_buffer
    assert buffer.episode_starts[:, 1].tolist() == [True, False, False, True, False]
    assert buffer.terminated[:, 1].tolist() == [False, False, True, False, False]
    assert buffer.advantages[2, 1] == 0
    assert buffer.returns[2, 1] == buffer.values[2, 1]
    # the step before is valued as if the episode had been cut after it
    assert np.isclose(buffer.advantages[1, 1], 1 + 0.99 * buffer.values[2, 1] - buffer.values[1, 1])
    # an episode that was broken is not reported
    assert all(episode["l"] == 6 for episode in model.ep_info_buffer or ())
    assert model.env is not None
    model.env.close()


class SlowToReturn(Counting):
    """Dies in its third step; the first attempt to make another one fails."""

    def __init__(self, mark: str) -> None:
        path = Path(mark)
        if path.exists():
            path.unlink()
            raise RuntimeError("simulator not ready yet")
        super().__init__("die")
        self.path = path

    def step(self, action: np.int64) -> Any:
        if self.steps == 2:
            self.path.touch()
        return super().step(action)


def test_restart_that_fails_uses_another_one(tmp_path: Path) -> None:
    env = GuardedSubprocVecEnv([partial(SlowToReturn, str(tmp_path / "mark"))], start_method="fork", restarts=3)
    env.reset()
    for _ in range(2):
        env.step(NOTHING[:1])
    with pytest.warns(UserWarning) as warned:
        after: Any = env.step(NOTHING[:1])
    first, second = (str(entry.message) for entry in warned)
    assert re.match(FAULTS["die"].replace("environment 1", "environment 0"), first)
    assert re.match(r"environment 0 \(process \d+\) failed:\n(?s:.*)simulator not ready yet", second)
    obs, _, dones, infos = after
    assert dones.tolist() == [True] and SKIPPED in infos[0] and obs[0, 1] == 0
    for _ in range(2):
        env.step(NOTHING[:1])
    with pytest.raises(WorkerError, match="simulator not ready yet"), pytest.warns(UserWarning, match="0 more times"):
        env.step(NOTHING[:1])
    env.close()


def test_monitor_tells_episodes_as_that_of_sb3_and_keeps_none() -> None:
    ours, theirs = EpisodeMonitor(Counting()), Monitor(Counting())
    told: list[list[Any]] = [[], []]
    for monitor, episodes in ((ours, told[0]), (theirs, told[1])):
        for _ in range(50):
            monitor.reset()
            over = False
            while not over:
                _, _, terminated, truncated, info = monitor.step(np.int64(0))
                over = terminated or truncated
            episodes.append({key: info["episode"][key] for key in ("r", "l")})
    assert told[0] == told[1]
    assert ours.get_total_steps() == theirs.get_total_steps() == 300
    assert sum(len(part) for part in vars(ours).values() if isinstance(part, list)) == 0
    assert sum(len(part) for part in vars(theirs).values() if isinstance(part, list)) >= 150


def test_copies_of_runs_have_monitors_that_keep_nothing() -> None:
    env = make_env(load("CartPole-v1"), 2, seed=0)
    assert env.env_is_wrapped(Monitor) == [True, True]
    assert env.env_is_wrapped(EpisodeMonitor) == [True, True]
    env.close()


@pytest.mark.parametrize("value", (0, -1.0, float("nan"), float("inf"), 1e12))
@pytest.mark.parametrize("name", ("timeout", "start_timeout"))
def test_seconds_that_nobody_can_wait_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=\S+ must be above 0 and at most 1e\+07 seconds, or None$"):
        GuardedSubprocVecEnv([], **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("restarts", (-1, 1.5))
def test_restarts_that_are_no_count_are_refused(restarts: Any) -> None:
    with pytest.raises(ValueError, match="must be a whole number of at least 0"):
        GuardedSubprocVecEnv([], restarts=restarts)
