"""State tracking on a circle: where do steps to the left and right lead?"""

import numpy as np

from xlstm_rl.envs.random_draws import Chance
from xlstm_rl.envs.symbol_stream import Stream, SymbolStreamEnv
from xlstm_rl.envs.task import task
from xlstm_rl.envs.task_sizes import whole_number


@task("Cycle", "state tracking", "num_moves")
class Cycle(SymbolStreamEnv):
    """A start on a circle of places, then moves; after each move the agent says where it is.

    Ability: track a state modulo a number (cycle navigation, Deletang et al. 2023).

    Observation: Box [modulus + 4]: the one-hot place (first step only), the one-hot move (-1, 0, +1; not at the first
    step), then a flag that is 0 at the first step. Start and moves are independent and uniform.
    Actions: Discrete(modulus), the place after the move on the screen; ignored at the first step.
    Reward: 1 / num_moves for a right answer, so the return is the hit rate.
    Horizon: num_moves + 1 steps, then terminated. `info["is_success"]`: every answer was right.
    Optimal return: 1. Memoryless return: 1 / modulus, because the uniform start makes every place as likely.
    """

    hidden_name = "the place on the cycle"
    first_shows_state = True

    def __init__(self, modulus: int = 7, num_moves: int = 16, *, render_mode: str | None = None) -> None:
        """Set the size of the task.

        Args:
            modulus: Places on the circle, at least 2.
            num_moves: Moves of an episode, at least 1.
            render_mode: None, "ansi" or "rgb_array".
        """
        self._modulus = whole_number("modulus", modulus, at_least=2)
        self._num_moves = whole_number("num_moves", num_moves, at_least=1)
        super().__init__(
            {"place": self._modulus, "move": 3},
            length=self._num_moves + 1,
            asked=range(1, self._num_moves + 1),
            num_answers=self._modulus,
            render_mode=render_mode,
        )

    def draw(self, chance: Chance) -> Stream:
        """A new start and new moves."""
        start = chance.symbols(self._modulus, 1)
        moves = chance.symbols(3, self._num_moves)
        places = (start + (moves - 1).cumsum(axis=1)) % self._modulus
        shown_places = np.hstack([start, np.full_like(moves, self._modulus)])
        return Stream((shown_places, np.hstack([np.full_like(start, 3), moves])), places)
