"""Speed of the tasks: one environment, and gymnasium's batch of such.

    python -m benchmarks.env_speed                     # all tasks, about a minute
    python -m benchmarks.env_speed --num-envs 16 --seconds 2

Thousands of environment steps per second of CPU time, resets included, with random actions; the best of three turns.
A single environment is what `gymnasium.make` returns, its wrappers included, and the batch of gymnasium is
`SyncVectorEnv` of such, which resets at the step after the end of an episode.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import gymnasium as gym

from xlstm_rl.envs.task import PURPOSES

TURNS = 3


def steps_per_second(play: Callable[[int], None], steps_per_call: int, seconds: float) -> float:
    """Best rate of `play(calls)` over the turns, each of which takes about `seconds`."""
    calls = 100
    elapsed = 0.0
    while elapsed < seconds / 10:
        calls *= 2
        start = time.process_time()
        play(calls)
        elapsed = time.process_time() - start
    calls = round(calls * seconds / elapsed)
    rates = []
    for _ in range(TURNS):
        start = time.process_time()
        play(calls)
        rates.append(calls * steps_per_call / (time.process_time() - start))
    return max(rates)


def single_speed(env_id: str, seconds: float) -> float:
    env = gym.make(env_id)
    env.action_space.seed(0)
    env.reset(seed=0)
    actions = [env.action_space.sample() for _ in range(997)]

    def play(calls: int) -> None:
        for call in range(calls):
            _, _, terminated, truncated, _ = env.step(actions[call % 997])
            if terminated or truncated:
                env.reset()

    return steps_per_second(play, 1, seconds)


def batch_speed(env_id: str, num_envs: int, seconds: float) -> float:
    envs = gym.make_vec(env_id, num_envs, "sync")
    envs.reset(seed=0)
    envs.action_space.seed(0)
    actions = [envs.action_space.sample() for _ in range(97)]

    def play(calls: int) -> None:
        for call in range(calls):
            envs.step(actions[call % 97])

    return steps_per_second(play, num_envs, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, default=64, help="environments of a batch (64)")
    parser.add_argument("--seconds", type=float, default=0.3, help="CPU seconds of a turn (0.3)")
    options = parser.parse_args()
    print(f"thousands of steps per CPU second; batches of {options.num_envs}\n")
    print("| task | single | batch |\n|---|---|---|")
    for env_id in sorted(PURPOSES):
        single = single_speed(env_id, options.seconds)
        sync = batch_speed(env_id, options.num_envs, options.seconds)
        name = env_id.removeprefix("xlstm_rl/").removesuffix("-v0")
        print(f"| {name} | {single / 1e3:,.0f} | {sync / 1e3:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
