"""State tracking: say at every step the parity of the bits seen so far."""

from xlstm_rl.envs.random_draws import Chance
from xlstm_rl.envs.symbol_stream import Stream, SymbolStreamEnv
from xlstm_rl.envs.task import task
from xlstm_rl.envs.task_sizes import whole_number


@task("Parity", "state tracking", "length")
class Parity(SymbolStreamEnv):
    """Bits come one per step; from the second step on the agent says whether the number of ones so far is odd.

    Ability: track a state with a nonlinear recurrence; linear memories cannot.

    Observation: Box [3], the one-hot bit (zero, one), independent and uniform, then a flag that is 0 at the first step,
    whose answer would be on the screen.
    Actions: Discrete(2), 1 for odd; ignored at the first step.
    Reward: 1 / (length - 1) for a right answer, so the return is the hit rate.
    Horizon: `length` steps, then terminated. `info["is_success"]`: every answer was right.
    Optimal return: 1. Memoryless return: 0.5, because the parity of the earlier bits is uniform and independent of the
    current bit.
    """

    hidden_name = "the parity so far"
    first_shows_state = True

    def __init__(self, length: int = 8, *, render_mode: str | None = None) -> None:
        """Set the size of the task.

        Args:
            length: Bits of an episode, at least 2.
            render_mode: None, "ansi" or "rgb_array".
        """
        length = whole_number("length", length, at_least=2)
        super().__init__({"bit": 2}, length=length, asked=range(1, length), num_answers=2, render_mode=render_mode)

    def draw(self, chance: Chance) -> Stream:
        """New bits and the parity from the second one on."""
        bits = chance.symbols(2, self.length)
        return Stream((bits,), (bits.cumsum(axis=1) % 2)[:, 1:])
