"""Revision by comparison: keep the value of the item nearest to a target yet."""

import numpy as np

from xlstm_rl.envs.random_draws import Chance
from xlstm_rl.envs.symbol_stream import Stream, SymbolStreamEnv
from xlstm_rl.envs.task import task
from xlstm_rl.envs.task_sizes import whole_number


@task("NearestSoFar", "revision", "num_items")
class NearestSoFar(SymbolStreamEnv):
    """A target point, then items one per step; which value had the nearest of the items before this one?

    Ability: decide at every item whether to replace what is stored (the task of the xLSTM paper, Beck et al. 2024,
    appendix D, made a stream of questions).

    Observation: Box [dim + num_values + 1]: coordinates in [-1, 1], the one-hot value, then a flag that is 1 where an
    answer is asked. The first step shows the target (coordinates without a value), the next `num_items` an item each,
    the last nothing. Points and values are independent and uniform.
    Actions: Discrete(num_values), the value of the item nearest to the target (Euclidean) among those of earlier steps;
    asked from the second item on and at the last step.
    Reward: 1 / num_items for a right answer, so the return is the hit rate.
    Horizon: num_items + 2 steps, then terminated. `info["is_success"]`: every answer was right.
    Optimal return: 1. Memoryless return: 1 / num_values, because the item on the screen is not among those that count
    and values are independent.
    """

    hidden_name = "the value of the nearest item"

    def __init__(
        self, num_items: int = 16, num_values: int = 4, dim: int = 2, *, render_mode: str | None = None
    ) -> None:
        """Set the size of the task.

        Args:
            num_items: Items, at least 1.
            num_values: Different values, at least 2.
            dim: Coordinates of a point, at least 1.
            render_mode: None, "ansi" or "rgb_array".
        """
        self._num_items = whole_number("num_items", num_items, at_least=1)
        self._num_values = whole_number("num_values", num_values, at_least=2)
        self._dim = whole_number("dim", dim, at_least=1)
        super().__init__(
            {"point": self._dim, "value": self._num_values},
            length=self._num_items + 2,
            asked=range(2, self._num_items + 2),
            num_answers=self._num_values,
            render_mode=render_mode,
            real_fields=("point",),
        )

    def draw(self, chance: Chance) -> Stream:
        """A new target and new items."""
        points = 2.0 * chance.reals((self._num_items + 1) * self._dim) - 1.0
        # What is compared is what is shown, so that rounding cannot change which item is nearest.
        points = points.astype(np.float32).reshape(-1, self._num_items + 1, self._dim).astype(np.float64)
        values = chance.symbols(self._num_values, self._num_items)
        distances = ((points[:, 1:] - points[:, :1]) ** 2).sum(axis=2)
        nearer = distances == np.minimum.accumulate(distances, axis=1)
        nearest = np.maximum.accumulate(np.where(nearer, np.arange(self._num_items), 0), axis=1)
        nothing = np.full((len(values), 1), self._num_values)
        shown_points = np.concatenate([points, np.zeros_like(points[:, :1])], axis=1)
        shown_values = np.hstack([nothing, values, nothing])
        return Stream((shown_points, shown_values), np.take_along_axis(values, nearest, 1))
