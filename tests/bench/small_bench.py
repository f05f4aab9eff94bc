"""A benchmark of runs that take a second, and environments that break."""

from __future__ import annotations

from pathlib import Path

FAR = """  far:
    base: xlstm_rl/RepeatFirst-v0
    set: {env.kwargs.length: 3}
    ability: credit
    optimal_return: 1
    memoryless_return: 0.25
"""
# Two tasks, two agents, two seeds; "lstm" comes first and is compared with "none".
SMALL = f"""
description: for tests
tasks:
  cue-recall: {{}}
{FAR}agents:
  lstm: {{memory: {{name: lstm, hidden_size: 8}}}}
  none: {{memory: {{name: none, hidden_size: 8}}}}
seeds: [0, 1]
episodes: 8
long_episodes: 2
set:
  total_steps: 320
  env.n_envs: 2
  ppo.n_steps: 32
  ppo.batch_size: 64
  ppo.n_epochs: 1
  eval.every_steps: 64
  eval.interim_episodes: 2
  eval.n_envs: 2
  checkpoint.every_steps: 64
"""
# The environments find the file beside themselves: only while it is there do they break.
BREAKING_ENVS = """
import os, signal
from pathlib import Path

import gymnasium as gym
from xlstm_rl.envs import Parity

TRIGGER = Path(__file__).with_name("trigger")


class Breaking(Parity):
    steps = 0

    def step(self, action):
        self.steps += 1
        if self.steps > 130 and TRIGGER.exists():
            self.break_down()
        return super().step(action)


class Raising(Breaking):
    def break_down(self):
        raise RuntimeError("the simulator has no licence")


class Dying(Breaking):
    def break_down(self):
        os.kill(os.getpid(), signal.SIGKILL)


for cls in (Raising, Dying):
    if cls.__name__ + "-v0" not in gym.registry:
        gym.register(cls.__name__ + "-v0", cls)
"""
BREAKING = SMALL.replace("  cue-recall: {}\n", "  raising: {base: breaking_envs:Raising-v0}\n").replace(
    FAR, "  dying: {base: breaking_envs:Dying-v0, ability: hold}\n"
)


def write_breaking_envs(folder: Path) -> Path:
    """The module `breaking_envs` in a folder; returns the file whose presence makes its environments break."""
    (folder / "breaking_envs.py").write_text(BREAKING_ENVS, encoding="utf-8")
    return folder / "trigger"
