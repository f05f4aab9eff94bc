"""Many T-mazes at once."""

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from xlstm_rl.envs.chance import Chance, Symbols
from xlstm_rl.envs.t_maze import CORRIDOR, FORWARD, JUNCTION, LEFT, NO_ARM, SIGN_LEFT, TMaze
from xlstm_rl.envs.vector import Flags, Observations, Outcome, Rows, TaskVectorEnv

NOTHING = 4


class TMazeVectorEnv(TaskVectorEnv[TMaze]):
    """N mazes with the rules of `TMaze`."""

    def __init__(
        self, num_envs: int = 1, *, autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP, **parameters: Any
    ) -> None:
        """Make a batch; `parameters` are those of `TMaze`."""
        super().__init__(TMaze(**parameters), num_envs, autoreset_mode)
        self._codes = np.eye(NOTHING + 1, NOTHING, dtype=np.float32)
        self._named_arms, self._positions, self._steps, self._entered_arms = np.zeros((4, self.num_envs), np.int64)

    def start(self, rows: Rows, chance: Chance) -> None:
        """Put agents in front of new signs."""
        self._named_arms[rows] = self.single.draw(chance)
        self._positions[rows] = 0
        self._steps[rows] = 0
        self._entered_arms[rows] = NO_ARM

    def advance(self, actions: Symbols, active: Flags) -> Outcome:
        """Walk, turn or bump."""
        forward = actions == FORWARD
        at_junction = self._positions == self.single.corridor_length
        turned = active & at_junction & ~forward
        self._positions += active & forward & ~at_junction
        self._steps += active
        self._entered_arms[turned] = actions[turned]
        success = turned & (actions == self._named_arms)
        truncated = active & ~turned & (self._steps == self.facts.horizon)
        return Outcome(success.astype(np.float64), turned, truncated, success)

    def observe(self) -> Observations:
        """Signs at the start, then cells."""
        shown = np.where(self._positions == self.single.corridor_length, JUNCTION, CORRIDOR)
        shown = np.where(self._steps == 0, SIGN_LEFT + self._named_arms - LEFT, shown)
        return self._codes[np.where(self._entered_arms == NO_ARM, shown, NOTHING)]

    def single_at(self, row: int) -> TMaze:
        """The single maze with the agent of `row`."""
        self.single.named_arm = int(self._named_arms[row])
        self.single.position = int(self._positions[row])
        self.single.entered_arm = int(self._entered_arms[row])
        return self.single
