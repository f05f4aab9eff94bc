"""Credit: an unpaid act at the start decides whether the end pays."""

import math

import numpy as np

from xlstm_rl.envs.random_draws import Chance
from xlstm_rl.envs.symbol_stream import Stream, SymbolStreamEnv
from xlstm_rl.envs.task import task
from xlstm_rl.envs.task_sizes import real_number, whole_number


@task("KeyDoor", "credit", "delay")
class KeyDoor(SymbolStreamEnv):
    """Take the genuine key, wait among noisy rewards, and name the key again at the door.

    Ability: credit an act with a reward that comes much later, behind rewards that have nothing to do with it (after
    the key-to-door task of Hung et al. 2019).

    Observation: Box [2 * num_keys + 1]: one-hot, which key is genuine (first step only); one-hot, a uniform distractor
    (in between only); then a flag that is 1 where the action counts: at the first step, where it takes a key, and at
    the door, which shows nothing else. Which key was taken is not shown.
    Actions: Discrete(num_keys), the key to take or to name; ignored in between.
    Reward: at the door 1 if the genuine key was taken at the first step and is named now, else 0. In between,
    `noise / sqrt(delay)` or minus that with equal chance, whatever the agent does and the distractor shows. The noise
    of an episode has mean 0 and the standard deviation `noise` at any delay, so that a longer delay does not drown the
    reward: it only moves it away from its cause.
    Horizon: delay + 2 steps, then terminated. `info["is_success"]`: the door paid.
    Optimal return: 1. Memoryless return: 1 / num_keys: take the key that is shown, then name one blindly. Uniformly
    random actions collect 1 / num_keys**2.
    """

    hidden_name = "the genuine key"

    def __init__(
        self, delay: int = 10, num_keys: int = 4, noise: float = 0.5, *, render_mode: str | None = None
    ) -> None:
        """Set the size of the task.

        Args:
            delay: Steps between key and door, at least 0.
            num_keys: Different keys, at least 2.
            noise: Standard deviation of the summed rewards in between, at least 0.
            render_mode: None, "ansi" or "rgb_array".
        """
        self._delay = whole_number("delay", delay, at_least=0)
        self._num_keys = whole_number("num_keys", num_keys, at_least=2)
        self._noise = real_number("noise", noise, at_least=0.0)
        super().__init__(
            {"key": self._num_keys, "distractor": self._num_keys},
            length=self._delay + 2,
            asked=[0, self._delay + 1],
            num_answers=self._num_keys,
            render_mode=render_mode,
            all_or_nothing=True,
        )

    def draw(self, chance: Chance) -> Stream:
        """A new genuine key, new distractors and their rewards."""
        key = chance.symbols(self._num_keys, 1)
        distractors = chance.symbols(self._num_keys, self._delay)
        signs = 2.0 * chance.symbols(2, self._delay) - 1.0
        nothing = np.full_like(key, self._num_keys)
        shown_keys = np.hstack([key, np.full_like(distractors, self._num_keys), nothing])
        no_reward = np.zeros(key.shape)
        extra = np.hstack([no_reward, signs * (self._noise / math.sqrt(max(self._delay, 1))), no_reward])
        shown = (shown_keys, np.hstack([nothing, distractors, nothing]))
        return Stream(shown, np.hstack([key, key]), extra=extra)
