"""Capacity: say a whole sequence again, in order."""

import numpy as np

from xlstm_rl.envs.random_draws import Chance
from xlstm_rl.envs.symbol_stream import Stream, SymbolStreamEnv
from xlstm_rl.envs.task import task
from xlstm_rl.envs.task_sizes import whole_number


@task("Copy", "capacity", "num_items")
class Copy(SymbolStreamEnv):
    """Symbols come one per step; then as many blank steps ask for them, in the order in which they came.

    Ability: capacity, and recall in order without a cue: questions all look alike.

    Observation: Box [num_symbols + 1], the one-hot symbol, independent and uniform (zeros in questions), then a flag
    that is 1 in questions.
    Actions: Discrete(num_symbols), the symbol to say; ignored while symbols are shown.
    Reward: 1 / num_items for a right answer, so the return is the hit rate.
    Horizon: 2 * num_items steps, then terminated. `info["is_success"]`: every answer was right.
    Optimal return: 1. Memoryless return: 1 / num_symbols, because questions show nothing.
    """

    hidden_name = "the symbol to say next"

    def __init__(self, num_items: int = 8, num_symbols: int = 4, *, render_mode: str | None = None) -> None:
        """Set the size of the task.

        Args:
            num_items: Symbols to keep, at least 1.
            num_symbols: Different symbols, at least 2.
            render_mode: None, "ansi" or "rgb_array".
        """
        self._num_items = whole_number("num_items", num_items, at_least=1)
        self._num_symbols = whole_number("num_symbols", num_symbols, at_least=2)
        super().__init__(
            {"symbol": self._num_symbols},
            length=2 * self._num_items,
            asked=range(self._num_items, 2 * self._num_items),
            num_answers=self._num_symbols,
            render_mode=render_mode,
        )

    def draw(self, chance: Chance) -> Stream:
        """New symbols, asked for in the same order."""
        symbols = chance.symbols(self._num_symbols, self._num_items)
        return Stream((np.hstack([symbols, np.full_like(symbols, self._num_symbols)]),), symbols)
