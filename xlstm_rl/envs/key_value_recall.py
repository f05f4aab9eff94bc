"""Associative recall: say the value that was shown with a key."""

import numpy as np

from xlstm_rl.envs.random_draws import Chance
from xlstm_rl.envs.symbol_stream import Stream, SymbolStreamEnv
from xlstm_rl.envs.task import task
from xlstm_rl.envs.task_sizes import real_number, whole_number


# more pairs need more keys, hence other observations: no length
@task("KeyValueRecall", "capacity")
class KeyValueRecall(SymbolStreamEnv):
    """Pairs of key and value come one per step; then every key is shown alone, in random order, and its value is asked.

    Ability: capacity and recall by content (multi-query associative recall, Arora et al. 2023).

    Observation: Box [num_keys + num_values + 1], the one-hot key, the one-hot value (zeros in questions), then a flag
    that is 1 in questions. The keys of an episode differ; values are independent and uniform, so keys may share one and
    no answer tells about another.
    Actions: Discrete(num_values), the value to say; ignored while pairs are shown.
    Reward: 1 / num_pairs for a right answer, so the return is the hit rate.
    Horizon: 2 * num_pairs steps, then terminated. `info["is_success"]`: every answer was right.
    Optimal return: 1. Memoryless return: 1 / num_values, because a key is independent of its value.
    """

    hidden_name = "the value of the first pair"

    def __init__(
        self,
        num_pairs: int = 8,
        num_values: int = 4,
        num_keys: int | None = None,
        *,
        key_exponent: float = 0.0,
        render_mode: str | None = None,
    ) -> None:
        """Set the size of the task.

        Args:
            num_pairs: Pairs to keep, at least 1.
            num_values: Different values, at least 2.
            num_keys: Different keys that pairs are made of, at least `num_pairs`; None for just as many.
            key_exponent: Zipf exponent, at least 0: keys are drawn one after another without replacement, key k (from
                0) with a weight of (k + 1) ** -key_exponent. With 0 all are alike; with more, and with more keys than
                pairs, some keys are rare and yet asked like any other.
            render_mode: None, "ansi" or "rgb_array".
        """
        self._num_pairs = whole_number("num_pairs", num_pairs, at_least=1)
        self._num_values = whole_number("num_values", num_values, at_least=2)
        self._num_keys = (
            self._num_pairs if num_keys is None else whole_number("num_keys", num_keys, at_least=self._num_pairs)
        )
        exponent = real_number("key_exponent", key_exponent, at_least=0.0)
        self._key_weights = np.arange(1.0, self._num_keys + 1.0) ** -exponent
        super().__init__(
            {"key": self._num_keys, "value": self._num_values},
            length=2 * self._num_pairs,
            asked=range(self._num_pairs, 2 * self._num_pairs),
            num_answers=self._num_values,
            render_mode=render_mode,
        )

    def draw(self, chance: Chance) -> Stream:
        """New pairs and an order of questions."""
        keys = chance.weighted_order(self._key_weights)[:, : self._num_pairs]
        values = chance.symbols(self._num_values, self._num_pairs)
        order = chance.permutation(self._num_pairs)
        shown_keys = np.hstack([keys, np.take_along_axis(keys, order, 1)])
        shown_values = np.hstack([values, np.full_like(values, self._num_values)])
        return Stream((shown_keys, shown_values), np.take_along_axis(values, order, 1))

    def hidden_variable(self) -> int:
        """The value that the first pair had."""
        return int(self._frames[0, self._num_keys : -1].argmax())
