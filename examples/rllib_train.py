"""Trains an agent with RLlib's PPO, on this machine or on a cluster; docs/rllib.md says more.

Run it so:
    python examples/rllib_train.py --runners 8                       # here
    python examples/rllib_train.py --runners 64 --address auto       # from a node of a running Ray cluster
    python examples/rllib_train.py --memory rllib-lstm               # RLlib's own LSTM, to compare
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import gymnasium
import ray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.tune.registry import register_env

from xlstm_rl.rllib import XLSTMRLModule, keep_states_at_row_starts


def make_env(settings: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    """Called in every env runner; the name of a module before the id is imported there."""
    return gymnasium.make(**settings)


def configure(args: argparse.Namespace) -> PPOConfig:
    """PPO with the memory asked for."""
    register_env("task", make_env)
    config = (
        PPOConfig()
        .environment("task", env_config={"id": args.env})
        .env_runners(num_env_runners=args.runners, num_envs_per_env_runner=args.envs)
        .learners(num_learners=args.learners)
        .training(
            train_batch_size_per_learner=2048,
            minibatch_size=256,
            num_epochs=4,
            lr=1e-3,
            entropy_coeff=0.01,
            vf_clip_param=10.0,
            use_kl_loss=False,
            grad_clip=0.5,
        )
        .debugging(seed=args.seed, log_level="ERROR")
    )
    if args.memory == "rllib-lstm":
        own = DefaultModelConfig(
            use_lstm=True,
            lstm_cell_size=64,
            max_seq_len=args.seq_len,
            fcnet_hiddens=[64],
            head_fcnet_hiddens=[64],
            vf_share_layers=True,
        )
        return config.rl_module(model_config=own)
    model_config = {"max_seq_len": args.seq_len, "memory": args.memory, "memory_kwargs": {"hidden_size": 64}}
    config.rl_module(rl_module_spec=RLModuleSpec(module_class=XLSTMRLModule, model_config=model_config))
    return keep_states_at_row_starts(config)


def train(args: argparse.Namespace) -> float:
    """Train, print a line for every iteration, and return the last mean return."""
    algorithm = configure(args).build_algo()
    steps, episode_return = 0, float("nan")
    try:
        while steps < args.steps:
            start, before = time.perf_counter(), steps
            result = algorithm.train()
            steps = int(result["num_env_steps_sampled_lifetime"])
            episode_return = float(result["env_runners"].get("episode_return_mean", episode_return))
            speed = (steps - before) / (time.perf_counter() - start)
            print(f"{steps:9d} steps, return {episode_return:.3f}, {speed:.0f} steps/s", flush=True)
        if args.save:
            # RLlib takes no relative paths
            print("saved in", algorithm.save_to_path(args.save))
    finally:
        algorithm.stop()
    return episode_return


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="xlstm_rl:xlstm_rl/TMaze-v0", help="module:id of a gymnasium task")
    parser.add_argument("--memory", default="xlstm", help="a name of make_memory, or rllib-lstm")
    parser.add_argument("--seq-len", type=int, default=16, help="steps of a row in training")
    parser.add_argument("--runners", type=int, default=2, help="processes that step environments")
    parser.add_argument("--envs", type=int, default=8, help="environments of each of them")
    parser.add_argument("--learners", type=int, default=0, help="processes that train; 0: this one")
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--address", help="of a Ray cluster, such as auto; by default one is started here")
    parser.add_argument("--save", help="absolute folder for a checkpoint at the end")
    return parser.parse_args(given)


if __name__ == "__main__":
    options = arguments()
    ray.init(address=options.address, log_to_driver=False)
    train(options)
