"""Many streams of symbols at once."""

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from xlstm_rl.envs.chance import Chance, Symbols
from xlstm_rl.envs.symbol_stream import Episodes, SymbolStreamEnv
from xlstm_rl.envs.vector import Flags, Observations, Outcome, Rows, TaskVectorEnv


class SymbolStreamVectorEnv(TaskVectorEnv[SymbolStreamEnv]):
    """N environments of a stream task; episodes are laid out at a reset, a step only looks up what comes next."""

    def __init__(
        self,
        task: Callable[..., SymbolStreamEnv],
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        **parameters: Any,
    ) -> None:
        """Make a batch.

        Args:
            task: Makes a single environment.
            num_envs: N, at least 1.
            autoreset_mode: When an environment whose episode ended is reset.
            parameters: Handed to `task`.
        """
        single = task(**parameters)
        super().__init__(single, num_envs, autoreset_mode)
        self._steps = np.full(self.num_envs, single.length)
        self._hits = np.zeros(self.num_envs, np.int64)
        self._last_actions: Symbols | None = None
        self._episodes: Episodes

    def start(self, rows: Rows, chance: Chance) -> None:
        """Lay out new episodes."""
        new = self.single.episodes(chance)
        if len(rows) == self.num_envs:
            self._episodes = new
        else:
            for ours, theirs in zip(self._episodes, new, strict=True):
                if ours is not None and theirs is not None:
                    ours[rows] = theirs
        self._steps[rows] = 0
        self._hits[rows] = 0

    def advance(self, actions: Symbols, active: Flags) -> Outcome:
        """Compare actions with the right answers."""
        task = self.single
        right = (self._episodes.answers[self.rows, self._steps] == actions) & active
        self._hits += right
        extra = self._episodes.extra
        noise = None if extra is None else np.where(active, extra[self.rows, self._steps], 0.0)
        self._steps += active
        self._last_actions = actions
        ended = self._steps == task.length
        success = self._hits == task.num_asked
        reward = (ended & success).astype(np.float64) if task.all_or_nothing else right / task.num_asked
        if noise is not None:
            reward += noise
        return Outcome(reward, ended, np.zeros(self.num_envs, np.bool_), success)

    def observe(self) -> Observations:
        """The present observations."""
        frames: Observations = self._episodes.frames[self.rows, self._steps]
        return frames

    def single_at(self, row: int) -> SymbolStreamEnv:
        """The single environment at the step of `row`."""
        step = int(self._steps[row])
        last = None if self._last_actions is None or step == 0 else int(self._last_actions[row])
        self.single.play(self._episodes, row, step=step, hits=int(self._hits[row]), action=last)
        return self.single
