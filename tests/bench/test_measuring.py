"""What is seen of a memory's state while its agent plays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from xlstm_rl.bench.measuring import WatchedModel
from xlstm_rl.bench.results import StateHealth


class Plays:
    """A model whose state is given."""

    def __init__(self, *state: np.ndarray) -> None:
        self.state = state

    def predict(self, *_: Any) -> tuple[np.ndarray, Any]:
        return np.zeros(1, np.int64), self.state


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_state_is_not_finite_wherever_a_value_is_not(broken: float, place: int) -> None:
    parts = [np.array([[1.0, -2.0]]), np.zeros((1, 0)), np.array([[0.5]])]
    parts[place] = np.append(parts[place], broken)
    watched = WatchedModel(Plays(*parts))
    watched.predict(None)
    assert not watched.health(1).finite


def test_largest_value_is_that_of_all_parts_and_steps() -> None:
    model = Plays(np.array([[1.0, -3.0]]), np.array([[2.0]]), np.zeros((1, 0)))
    watched = WatchedModel(model)
    watched.predict(None)
    model.state = (np.array([[1.0, 1.0]]), np.array([[-2.5]]), np.zeros((1, 0)))
    watched.predict(None)
    assert watched.health(4) == StateHealth(bytes_first=24, bytes_last=24, largest=3.0, finite=True, length=4)
