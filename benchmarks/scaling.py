"""What several processes gain: environment steps per second of training, and what a reduction costs.

    python -m benchmarks.scaling [--processes 2]

One process with 16 environments against several that share them, on a cheap task, on one that computes for 2 ms in
every step and on one that waits for 2 ms, as external simulators do; then the time of summing vectors of the size of a
policy's gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
from stable_baselines3.common.env_util import make_vec_env

from xlstm_rl import RecurrentPPO
from xlstm_rl.agents.parallel import ranks

ENVS, STEPS, ROLLOUTS = 16, 128, 4
SLOW_SECONDS = 0.002
SIZES = (50_000, 150_000, 5_000_000)
REPEATS = 20


class Slow(gym.Wrapper[Any, Any, Any, Any]):
    """A step takes a while, computing or waiting."""

    def __init__(self, env: gym.Env[Any, Any], how: str) -> None:
        super().__init__(env)
        self.how = how

    def step(self, action: Any) -> Any:
        """As the environment, later."""
        if self.how == "waits":
            time.sleep(SLOW_SECONDS)
        until = time.perf_counter() + SLOW_SECONDS
        while self.how == "computes" and time.perf_counter() < until:
            pass
        return self.env.step(action)


def train(how: str, n_envs: int) -> float:
    """Steps per second of all processes, after a first rollout that does not count."""
    torch.set_num_threads(1)
    wrapper = None if how == "cheap" else (lambda env: Slow(env, how))
    envs = make_vec_env("xlstm_rl:xlstm_rl/TMaze-v0", n_envs, seed=0, wrapper_class=wrapper)
    kwargs = {"critic_memory": "separate"}
    model = RecurrentPPO(
        "MlpXLSTMPolicy", envs, n_steps=STEPS, batch_size=512, n_epochs=4, seed=0, device="cpu", policy_kwargs=kwargs
    )
    rollout = STEPS * n_envs * ranks().world_size
    model.learn(rollout)
    begun = time.perf_counter()
    model.learn(ROLLOUTS * rollout)
    return ROLLOUTS * rollout / (time.perf_counter() - begun)


def reductions() -> dict[int, float]:
    """Median milliseconds of summing a vector of each size over all ranks."""
    found = {}
    for size in SIZES:
        vector, times = torch.zeros(size), []
        for _ in range(REPEATS):
            dist.barrier()
            begun = time.perf_counter()
            ranks().sum(vector)
            times.append(time.perf_counter() - begun)
        found[size] = float(np.median(times)) * 1e3
    return found


def measured(processes: int, *arguments: str) -> Any:
    """What a run of this file with so many processes says."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "benchmarks.scaling", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure all, or, as a child process, one thing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "ENVS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, n_envs = options.child
        group = ranks()
        result = reductions() if what == "reductions" else train(what, int(n_envs))
        if group.rank == 0:
            print(json.dumps(result), flush=True)
        return
    count = options.processes
    print(f"| task | 1 x {ENVS} | {count} x {ENVS // count} | {count} x {ENVS} |\n|---|---|---|---|")
    for how in ("cheap", "computes", "waits"):
        alone = measured(1, "--child", how, str(ENVS))
        shared = measured(count, "--child", how, str(ENVS // count))
        more = measured(count, "--child", how, str(ENVS))
        print(f"| {how} | {alone:,.0f} | {shared:,.0f} ({shared / alone:.2f}x) | {more:,.0f} ({more / alone:.2f}x) |")
    times = measured(count, "--child", "reductions", "0")
    print("sum over ranks: " + ", ".join(f"{int(size):,} floats {spent:.2f} ms" for size, spent in times.items()))


if __name__ == "__main__":
    main()
