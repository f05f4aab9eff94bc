"""Shift register: say at every step the symbol of some steps ago."""

from xlstm_rl.envs.random_draws import Chance
from xlstm_rl.envs.symbol_stream import Stream, SymbolStreamEnv
from xlstm_rl.envs.task import task
from xlstm_rl.envs.task_sizes import whole_number


@task("RepeatPrevious", "window", "length")
class RepeatPrevious(SymbolStreamEnv):
    """Symbols come one per step; from step `lag` on the agent says the symbol of `lag` steps ago.

    Ability: a window of the last `lag` symbols, renewed at every step. A lag of 1 is the symbol just before the current
    one (POPGym counts the current one too: its k is `lag + 1`).

    Observation: Box [num_symbols + 1], the one-hot symbol, independent and uniform, then a flag that is 0 in the first
    `lag` steps.
    Actions: Discrete(num_symbols), the symbol to say; ignored in the first `lag` steps.
    Reward: 1 / (length - lag) for a right answer, so the return is the hit rate.
    Horizon: `length` steps, then terminated. `info["is_success"]`: every answer was right.
    Optimal return: 1. Memoryless return: 1 / num_symbols, because the current symbol is independent of the earlier one.
    """

    hidden_name = "the symbol of lag steps ago"

    def __init__(self, lag: int = 4, length: int = 64, num_symbols: int = 4, *, render_mode: str | None = None) -> None:
        """Set the size of the task.

        Args:
            lag: How many steps ago, at least 1.
            length: Steps of an episode, more than `lag`.
            num_symbols: Different symbols, at least 2.
            render_mode: None, "ansi" or "rgb_array".
        """
        self._lag = whole_number("lag", lag, at_least=1)
        length = whole_number("length", length, at_least=self._lag + 1)
        self._num_symbols = whole_number("num_symbols", num_symbols, at_least=2)
        super().__init__(
            {"symbol": self._num_symbols},
            length=length,
            asked=range(self._lag, length),
            num_answers=self._num_symbols,
            render_mode=render_mode,
        )

    def draw(self, chance: Chance) -> Stream:
        """New symbols, asked for `lag` steps later."""
        symbols = chance.symbols(self._num_symbols, self.length)
        return Stream((symbols,), symbols[:, : -self._lag])
