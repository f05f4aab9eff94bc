"""Revision: keep the latest value of every key."""

import numpy as np

from xlstm_rl.envs.random_draws import Chance
from xlstm_rl.envs.symbol_stream import Stream, SymbolStreamEnv
from xlstm_rl.envs.task import task
from xlstm_rl.envs.task_sizes import whole_number


@task("Overwrite", "revision", "num_writes")
class Overwrite(SymbolStreamEnv):
    """Every step writes a value to a key; then every key is shown alone, in random order: which value is it now?

    Ability: revise what is stored; a memory that only adds mixes the values of a key.

    Observation: Box [num_keys + num_values + 1], the one-hot key, the one-hot value (zeros in questions), then a flag
    that is 1 in questions. Every key is written at least once, the other writes go to independent uniform keys, and
    all come in random order; values are independent and uniform.
    Actions: Discrete(num_values), the value to say; ignored during writes.
    Reward: 1 / num_keys for a right answer, so the return is the hit rate.
    Horizon: num_writes + num_keys steps, then terminated. `info["is_success"]`: every answer was right.
    Optimal return: 1. Memoryless return: 1 / num_values, because values are independent of keys.
    """

    hidden_name = "the value last written under key 0"

    def __init__(
        self, num_keys: int = 6, num_writes: int = 18, num_values: int = 4, *, render_mode: str | None = None
    ) -> None:
        """Set the size of the task.

        Args:
            num_keys: Keys, at least 1.
            num_writes: Writes, at least `num_keys`.
            num_values: Different values, at least 2.
            render_mode: None, "ansi" or "rgb_array".
        """
        self._num_keys = whole_number("num_keys", num_keys, at_least=1)
        self._num_writes = whole_number("num_writes", num_writes, at_least=self._num_keys)
        self._num_values = whole_number("num_values", num_values, at_least=2)
        length = self._num_writes + self._num_keys
        super().__init__(
            {"key": self._num_keys, "value": self._num_values},
            length=length,
            asked=range(self._num_writes, length),
            num_answers=self._num_values,
            render_mode=render_mode,
        )

    def draw(self, chance: Chance) -> Stream:
        """New writes and an order of questions."""
        repeated = chance.symbols(self._num_keys, self._num_writes - self._num_keys)
        once = np.broadcast_to(np.arange(self._num_keys), (len(repeated), self._num_keys))
        keys = np.take_along_axis(np.hstack([once, repeated]), chance.permutation(self._num_writes), 1)
        values = chance.symbols(self._num_values, self._num_writes)
        asked = chance.permutation(self._num_keys)
        writes_since = (keys[:, None, ::-1] == asked[:, :, None]).argmax(axis=2)  # [N, asked]
        answers = np.take_along_axis(values, self._num_writes - 1 - writes_since, 1)
        return Stream((np.hstack([keys, asked]), np.hstack([values, np.full_like(asked, self._num_values)])), answers)

    def hidden_variable(self) -> int:
        """The value last written under key 0; `num_values` before there is one."""
        values = self._frames[: self._step + 1, self._num_keys : -1]
        written = np.flatnonzero(self._frames[: self._step + 1, 0] * values.any(axis=1))
        return int(values[written[-1]].argmax()) if len(written) else self._num_values
