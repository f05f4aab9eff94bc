"""Many two-armed bandits at once."""

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from xlstm_rl.envs.bandit import Bandit
from xlstm_rl.envs.chance import Chance, Symbols
from xlstm_rl.envs.vector import Flags, Observations, Outcome, Rows, TaskVectorEnv


class BanditVectorEnv(TaskVectorEnv[Bandit]):
    """N bandits with the rules of `Bandit`."""

    def __init__(
        self, num_envs: int = 1, *, autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP, **parameters: Any
    ) -> None:
        """Make a batch; `parameters` are those of `Bandit`."""
        super().__init__(Bandit(**parameters), num_envs, autoreset_mode)
        self._better, self._steps, self._votes = np.zeros((3, self.num_envs), np.int64)
        self._usual = np.zeros((self.num_envs, self.single.num_pulls), np.bool_)
        self._seen = np.zeros((self.num_envs, 3), np.float32)

    def start(self, rows: Rows, chance: Chance) -> None:
        """Set up new arms."""
        self._better[rows], self._usual[rows] = self.single.draw(chance)
        self._steps[rows] = 0
        self._votes[rows] = 0
        self._seen[rows] = 0.0

    def advance(self, actions: Symbols, active: Flags) -> Outcome:
        """Pull arms."""
        is_better = actions == self._better
        # A bandit that does not take part has just been started: it is at pull 0.
        paid = is_better == self._usual[self.rows, self._steps]
        self._steps += active
        self._votes += np.where((actions == 1) == paid, 1, -1) * active
        seen = np.stack([actions == 0, actions == 1, paid], axis=1) & active[:, None]
        self._seen[:] = seen
        ended = self._steps == self.single.num_pulls
        return Outcome((paid & active) / self.single.num_pulls, ended, np.zeros_like(ended), is_better & active)

    def observe(self) -> Observations:
        """The last arms and what they paid."""
        return np.array(self._seen)

    def single_at(self, row: int) -> Bandit:
        """The single bandit after the pulls of `row`."""
        arm, paid = int(self._seen[row, 1]), bool(self._seen[row, 2])
        self.single.better = int(self._better[row])
        self.single.usual = self._usual[row].tolist()
        self.single.steps = int(self._steps[row])
        self.single.votes = int(self._votes[row])
        self.single.last_pull = (arm, paid) if self.single.steps else None
        return self.single
