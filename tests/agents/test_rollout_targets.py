"""Returns of a rollout equal those of a loop: cut episodes count on, ended ones do not."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from tests.agents.small_agents import SMALL
from xlstm_rl.agents import RecurrentPPO

GAMMA, LAMBDA = 0.9, 0.8
MEAN, DEVIATION, REWARD_SCALE = 0.5, 2.0, 4.0


class Clock(gym.Env[np.ndarray, np.int64]):
    """Shows the number of the step; rewards it; ends after `length` steps, by a time limit if `cut`."""

    observation_space = spaces.Box(-100, 100, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length: int, cut: bool) -> None:
        self.length, self.cut = length, cut

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.time = 0
        return self.show(self.time), {}

    def show(self, time: int) -> np.ndarray:
        return np.array([time, -(time % 3)], np.float32)

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.time += 1
        over = self.time == self.length
        return self.show(self.time), 0.1 * self.time, over and not self.cut, over and self.cut, {}


CLOCKS = [(5, True), (3, False), (4, True), (50, False)]


def clocks(normalized: bool) -> VecEnv:
    env: Any = DummyVecEnv([lambda length=length, cut=cut: Clock(length, cut) for length, cut in CLOCKS])  # type: ignore[misc]
    if not normalized:
        return env  # type: ignore[no-any-return]
    env = VecNormalize(env, training=False, gamma=GAMMA, epsilon=0.0, clip_obs=1000, clip_reward=1000)
    env.obs_rms.mean, env.obs_rms.var = np.full(2, MEAN), np.full(2, DEVIATION**2)
    env.ret_rms.var = np.array(REWARD_SCALE**2)
    return env  # type: ignore[no-any-return]


def looped_returns(model: RecurrentPPO, clock: Clock, steps: int, normalized: bool) -> list[float]:
    """TD(lambda) targets of one environment from the start, one step after the other."""

    def value(time: int, state: Any, reset: bool) -> float:
        obs = clock.show(time)
        obs = (obs - MEAN) / DEVIATION if normalized else obs
        tensor = torch.as_tensor(obs, dtype=torch.float32).unsqueeze(0)
        return float(model.policy.value(tensor, state, torch.tensor([reset])))

    def after(time: int, state: Any, reset: bool) -> Any:
        obs = clock.show(time)
        obs = (obs - MEAN) / DEVIATION if normalized else obs
        tensor = torch.as_tensor(obs, dtype=torch.float32).unsqueeze(0)
        return model.policy.act(tensor, state, torch.tensor([reset]), deterministic=True).state

    state, time, errors, ends, values = model.policy.initial_state(1), 0, [], [], []
    for _ in range(steps):
        values.append(value(time, state, time == 0))
        state = after(time, state, time == 0)
        time += 1
        over = time == clock.length
        following = 0.0 if over and not clock.cut else value(time, state, False)
        reward = 0.1 * time / (REWARD_SCALE if normalized else 1)
        errors.append(reward + GAMMA * following - values[-1])
        ends.append(over)
        time = 0 if over else time
    advantage, targets = 0.0, []
    for error, end, worth in zip(reversed(errors), reversed(ends), reversed(values), strict=True):
        advantage = error + (0.0 if end else GAMMA * LAMBDA * advantage)
        targets.append(advantage + worth)
    return targets[::-1]


@pytest.mark.parametrize("critic_memory", ["shared", "separate", "none"])
@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "normalised"])
def test_returns_equal_those_of_a_loop(critic_memory: str, normalized: bool) -> None:
    env = clocks(normalized)
    kwargs = SMALL | {"critic_memory": critic_memory}
    settings: dict[str, Any] = {"n_steps": 14, "batch_size": 14, "gamma": GAMMA, "gae_lambda": LAMBDA, "seed": 0}
    model = RecurrentPPO("MlpXLSTMPolicy", env, policy_kwargs=kwargs, device="cpu", **settings)
    model.train = lambda: None  # type: ignore[method-assign]
    model.learn(14 * len(CLOCKS))
    with torch.no_grad():
        for row, (length, cut) in enumerate(CLOCKS):
            expected = looped_returns(model, Clock(length, cut), 14, normalized)
            assert np.allclose(model.rollout_buffer.returns[:, row], expected, atol=1e-5)
