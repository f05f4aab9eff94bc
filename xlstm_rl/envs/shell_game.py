"""State tracking of permutations: under which shell is the ball?"""

import itertools
import math

import numpy as np

from xlstm_rl.envs.random_draws import Chance
from xlstm_rl.envs.symbol_stream import Stream, SymbolStreamEnv
from xlstm_rl.envs.task import task
from xlstm_rl.envs.task_sizes import whole_number


@task("ShellGame", "state tracking", "num_swaps")
class ShellGame(SymbolStreamEnv):
    """A ball under one of some shells, which are then rearranged step by step; after each step: where is the ball?

    Ability: track a state under a group that is not commutative (from 3 shells on) and, with 5 shells, not solvable.

    Observation: Box [num_shells + num_shells! + 1]: the one-hot place of the ball (first step only), the one-hot
    permutation (not at the first step), then a flag that is 0 at the first step. Permutations are in lexicographic
    order: permutation p takes the shell at place i to place p[i]. Start and permutations are independent and uniform.
    Actions: Discrete(num_shells), where the ball is after the permutation on the screen; ignored at the first step.
    Reward: 1 / num_swaps for a right answer, so the return is the hit rate.
    Horizon: num_swaps + 1 steps, then terminated. `info["is_success"]`: every answer was right.
    Optimal return: 1. Memoryless return: 1 / num_shells, because the ball was anywhere with equal chance before.
    """

    hidden_name = "the place of the ball"
    first_shows_state = True

    def __init__(self, num_shells: int = 3, num_swaps: int = 12, *, render_mode: str | None = None) -> None:
        """Set the size of the task.

        Args:
            num_shells: Shells, 2 to 5.
            num_swaps: Permutations of an episode, at least 1.
            render_mode: None, "ansi" or "rgb_array".
        """
        self._num_shells = whole_number("num_shells", num_shells, at_least=2, at_most=5)
        self._num_swaps = whole_number("num_swaps", num_swaps, at_least=1)
        self._permutations = np.array(list(itertools.permutations(range(self._num_shells))))
        super().__init__(
            {"ball": self._num_shells, "swap": math.factorial(self._num_shells)},
            length=self._num_swaps + 1,
            asked=range(1, self._num_swaps + 1),
            num_answers=self._num_shells,
            render_mode=render_mode,
        )

    def draw(self, chance: Chance) -> Stream:
        """A new place of the ball and new permutations."""
        ball = chance.symbols(self._num_shells, 1)
        swaps = chance.symbols(len(self._permutations), self._num_swaps)
        places = np.empty_like(swaps)
        place = ball[:, 0]
        for step, swap in enumerate(swaps.T):
            places[:, step] = place = self._permutations[swap, place]
        shown_ball = np.hstack([ball, np.full_like(swaps, self._num_shells)])
        return Stream((shown_ball, np.hstack([np.full_like(ball, len(self._permutations)), swaps])), places)
