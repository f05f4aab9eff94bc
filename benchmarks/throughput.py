"""Training speed against `sb3_contrib.RecurrentPPO`: equal rollouts, minibatches and epochs, one process, interleaved.

    python -m benchmarks.throughput                    # CartPole, width 64, 16 x 128 steps, 4 epochs, batch 512
    python -m benchmarks.throughput --episode-steps 200 --width 128

Not the same is how far gradients reach back: ours through sequences of 64 steps (`--seq-len`), those of sb3-contrib
through whole pieces of episodes in a minibatch, up to the 128 steps of the rollout.

Reported are environment steps per second of rollout plus update, medians over rounds, and the ratio to sb3-contrib.
With one thread the clock is CPU time, so that other work on the machine does not spoil the ratio.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import sb3_contrib
import stable_baselines3
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv

from xlstm_rl.agents import RecurrentPPO

N_ENVS, N_STEPS = 16, 128


class LongEpisodes(gym.Env[np.ndarray, np.int64]):
    """Cheap steps, episodes of uniform length with a given mean: the learner is the limit."""

    observation_space = spaces.Box(-1, 1, (8,), np.float32)
    action_space = spaces.Discrete(4)

    def __init__(self, mean_steps: int) -> None:
        self.mean_steps = mean_steps

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Draw the length of an episode."""
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 2 * self.mean_steps))
        return self.np_random.random(8, dtype=np.float32), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Pay for action 0."""
        self.left -= 1
        return self.np_random.random(8, dtype=np.float32), float(action == 0), self.left <= 0, False, {}


def contenders(args: argparse.Namespace) -> dict[str, BaseAlgorithm]:
    """The algorithms by label; every one with its own environments and the same settings."""

    def vec_env() -> DummyVecEnv:
        make: Callable[[], gym.Env[Any, Any]] = (
            (lambda: LongEpisodes(args.episode_steps)) if args.episode_steps else (lambda: gym.make("CartPole-v1"))
        )
        env = DummyVecEnv([make] * N_ENVS)
        env.seed(0)
        return env

    settings: dict[str, Any] = {
        "n_steps": N_STEPS,
        "batch_size": args.batch_size,
        "n_epochs": args.epochs,
        "seed": 0,
        "device": "cpu",
    }

    def ours(memory: str, critic_memory: str = "shared", **memory_kwargs: Any) -> BaseAlgorithm:
        # the settings of the rows that were measured before there were others
        paper = {"defaults": "paper", "init": "recall"} if memory == "xlstm" else {}
        policy_kwargs = {
            "memory": memory,
            "memory_kwargs": {"hidden_size": args.width, **paper, **memory_kwargs},
            "critic_memory": critic_memory,
        }
        return RecurrentPPO("MlpXLSTMPolicy", vec_env(), seq_len=args.seq_len, policy_kwargs=policy_kwargs, **settings)

    stock = {"lstm_hidden_size": args.width}
    return {
        "sb3_contrib.RecurrentPPO, LSTM x 2": sb3_contrib.RecurrentPPO(
            "MlpLstmPolicy", vec_env(), policy_kwargs=stock, **settings
        ),
        "xlstm_rl, xLSTM 'm' shared": ours("xlstm", blocks="m"),
        "xlstm_rl, xLSTM 'm' x 2": ours("xlstm", "separate", blocks="m"),
        "xlstm_rl, xLSTM 's' shared": ours("xlstm", blocks="s"),
        "xlstm_rl, xLSTM 'ms' shared": ours("xlstm", blocks="ms"),
        "xlstm_rl, LSTM x 2": ours("lstm", "separate"),
        "stable_baselines3.PPO, MLP (no memory)": stable_baselines3.PPO("MlpPolicy", vec_env(), **settings),
    }


def measure(models: dict[str, BaseAlgorithm], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Environment steps per second of every model in every round; one rollout and its update per turn."""
    rates: dict[str, list[float]] = {label: [] for label in models}
    for turn in range(rounds + 1):
        for label, model in models.items():
            start = clock()
            model.learn(N_ENVS * N_STEPS, reset_num_timesteps=turn == 0)
            if turn > 0:  # the first turn warms up
                rates[label].append(N_ENVS * N_STEPS / (clock() - start))
    return rates


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--episode-steps", type=int, help="mean episode length of a synthetic task instead of CartPole")
    parser.add_argument("--seq-len", type=int, default=64, help="steps of our training sequences")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    measured = measure(contenders(args), args.rounds, clock)
    rates = {label: statistics.median(values) for label, values in measured.items()}
    stock = next(iter(rates.values()))
    print(f"{'':42s} env steps/s   ratio  ({'CPU' if args.threads == 1 else 'wall'} time)")
    for label, rate in rates.items():
        print(f"{label:42s} {rate:11.0f} {rate / stock:6.2f}x")
    if args.json:
        machine = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
        versions = {"torch": torch.__version__, "stable_baselines3": stable_baselines3.__version__}
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({**machine, **versions, **settings, "env_steps_per_s": rates}, indent=2) + "\n")


if __name__ == "__main__":
    main()
