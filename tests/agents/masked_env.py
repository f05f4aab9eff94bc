"""An environment that allows some actions only, and fails where another is taken."""

from typing import Any

import numpy as np
from gymnasium import spaces

from tests.agents.spaces_for_tests import RandomEpisodes
from xlstm_rl.agents.heads import mask_parts

MASKABLE = ("discrete", "multi-discrete", "multi-binary")


def chosen(action: Any, space: spaces.Space[Any]) -> np.ndarray:
    """Positions in a mask of the choices that an action makes."""
    starts = np.cumsum([0, *mask_parts(space)[:-1]])
    return np.asarray(starts + np.atleast_1d(action) - getattr(space, "start", 0), int)


def random_mask(space: spaces.Space[Any], rng: np.random.Generator) -> np.ndarray:
    """About a third of the choices is allowed, of every component at least one."""
    parts = [rng.random(size) < 0.3 for size in mask_parts(space)]
    for part in parts:
        part[rng.integers(len(part))] = True
    return np.concatenate(parts)


class MaskedEpisodes(RandomEpisodes):
    """`RandomEpisodes` with new random masks in every step."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        result = super().reset(seed=seed, options=options)
        self.mask = random_mask(self.action_space, self.np_random)
        return result

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.mask[chosen(action, self.action_space)].all(), f"{action} is forbidden by {self.mask}"
        result = super().step(action)
        self.mask = random_mask(self.action_space, self.np_random)
        return result

    def action_masks(self) -> np.ndarray:
        return self.mask
