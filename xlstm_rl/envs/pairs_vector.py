"""Many games of concentration at once."""

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from xlstm_rl.envs.chance import Chance, Symbols
from xlstm_rl.envs.concentration import TURN_STEPS
from xlstm_rl.envs.pairs import LOOK, Pairs
from xlstm_rl.envs.vector import Flags, Observations, Outcome, Rows, TaskVectorEnv


class PairsVectorEnv(TaskVectorEnv[Pairs]):
    """N tables with the rules of `Pairs`."""

    def __init__(
        self, num_envs: int = 1, *, autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP, **parameters: Any
    ) -> None:
        """Make a batch; `parameters` are those of `Pairs`."""
        super().__init__(Pairs(**parameters), num_envs, autoreset_mode)
        cards = (self.num_envs, self.single.num_cards)
        self._codes = np.eye(self.single.num_pairs, dtype=np.bool_)
        self._faces, self._partners = np.zeros((2, *cards), np.int64)
        self._taken, self._seen, self._up = np.zeros((3, *cards), np.bool_)
        self._steps = np.zeros(self.num_envs, np.int64)
        self._over = np.zeros(self.num_envs, np.bool_)

    def start(self, rows: Rows, chance: Chance) -> None:
        """Lay out new decks."""
        faces = self.single.draw(chance)
        by_face = faces.argsort(axis=1)
        partners = np.empty_like(faces)
        np.put_along_axis(partners, by_face, by_face.reshape(len(rows), -1, 2)[:, :, ::-1].reshape(faces.shape), 1)
        self._faces[rows] = faces
        self._partners[rows] = partners
        for flags in (self._taken, self._seen, self._up, self._over):
            flags[rows] = False
        self._steps[rows] = 0

    def advance(self, actions: Symbols, active: Flags) -> Outcome:
        """Turn cards over, or turn down or take those that are up."""
        looks = active & (self._steps % TURN_STEPS == LOOK)
        card = self.rows, actions
        turned = active & ~looks & ~self._taken[card] & ~self._up[card]
        self._up[looks] = False
        self._up[card] |= turned
        self._seen[card] |= turned
        found = turned & self._up[self.rows, self._partners[card]]
        self._taken |= self._up & found[:, None]
        self._steps += active
        success: Flags = np.logical_and.reduce(self._taken, axis=1)
        over = active & (success | (self._steps == self.facts.horizon))
        self._over[:] = over
        return Outcome(found / self.single.num_pairs, over, np.zeros_like(found), success)

    def observe(self) -> Observations:
        """Cards taken, faces of the cards that are up, and the phase."""
        seen = np.zeros((self.num_envs, self.single_observation_space.shape[0]), np.float32)  # type: ignore[index]
        num_cards = self.single.num_cards
        seen[:, :num_cards] = self._taken & ~self._up
        seen[:, num_cards:-TURN_STEPS] = (self._codes[self._faces] & self._up[:, :, None]).reshape(self.num_envs, -1)
        seen[self.rows, self._steps % TURN_STEPS - TURN_STEPS] = 1.0
        seen[self._over] = 0.0
        return seen

    def single_at(self, row: int) -> Pairs:
        """The single table with the cards of `row`."""
        self.single.faces = self._faces[row].tolist()
        self.single.taken = self._taken[row].tolist()
        self.single.seen = self._seen[row].tolist()
        self.single.up = np.flatnonzero(self._up[row]).tolist()
        self.single.steps = int(self._steps[row])
        self.single.ended = bool(self._over[row])
        return self.single
