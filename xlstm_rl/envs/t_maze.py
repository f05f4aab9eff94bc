"""T-maze: read a sign at the entrance, walk a uniform corridor, turn as the sign said."""

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from xlstm_rl.envs.random_draws import Chance, Symbols
from xlstm_rl.envs.task import TaskFacts, task
from xlstm_rl.envs.task_pictures import Picture, draw
from xlstm_rl.envs.task_sizes import RENDER_MODES, known_render_mode, whole_number

FORWARD, LEFT, RIGHT = 0, 1, 2
NO_ARM = 0
# Indices of the one-hot observation; the sign to turn left is SIGN_LEFT.
SIGN_LEFT, SIGN_RIGHT, CORRIDOR, JUNCTION = 0, 1, 2, 3
STEP_LIMIT_FACTOR = 4


@task("TMaze", "hold", "corridor_length")
class TMaze(gym.Env[NDArray[np.float32], np.int64]):
    """A corridor that ends in a junction with two arms; a sign at the start tells which arm pays (Bakker 2002).

    Ability: hold one bit over many identical observations and act on it at a time that depends on the agent.

    Observation: Box [4], one-hot: sign "left", sign "right", corridor, junction. The sign is only ever in the first
    observation of an episode: who waits in the start cell sees corridor. Corridor cells all look the same, and there is
    no clock. After an arm was entered the observation is zeros.
    Actions: Discrete(3): 0 forward, 1 left, 2 right. There is no way back. Left and right in the corridor, forward at
    the junction, bump into a wall: a step is lost and nothing else happens.
    Reward: 1 for entering the arm that the sign named, else 0.
    Horizon: an arm ends the episode with `terminated`. The limit of 4 * (corridor_length + 1) steps is no part of the
    task, only a bound on idle episodes that the agent cannot see, so it ends them with `truncated`.
    `info["is_success"]`: the named arm was entered.
    Uniformly random actions reach an arm in time in at least 0.9 of all episodes: 0.94 at length 10, 0.997 at 50.
    Optimal return: 1, in corridor_length + 1 steps.
    Memoryless return: 0.5. At the junction such a policy cannot know the sign: if a share p of its turns there is left,
    it collects at most p after one sign and 1 - p after the other. Always forward, then always left, collects 0.5.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4}
    hidden_name = "the arm that the sign named"
    """Of `hidden_variable`."""

    def __init__(self, corridor_length: int = 10, *, render_mode: str | None = None) -> None:
        """Set the size of the maze.

        Args:
            corridor_length: Forward steps from the start to the junction, at least 1; 1000 is fine.
            render_mode: None, "ansi" or "rgb_array".
        """
        self.corridor_length = whole_number("corridor_length", corridor_length, at_least=1)
        self.render_mode = known_render_mode(render_mode)
        self.observation_space = gym.spaces.Box(0.0, 1.0, (4,), np.float32)
        self.action_space = gym.spaces.Discrete(3)
        self._step_limit = STEP_LIMIT_FACTOR * (self.corridor_length + 1)
        self.facts = TaskFacts(horizon=self._step_limit, optimal_return=1.0, memoryless_return=0.5)
        self._codes = np.eye(4, dtype=np.float32)
        self.named_arm = LEFT
        self.position = 0
        self._step = 0
        self.entered_arm = NO_ARM
        self._ended = True

    def draw(self, chance: Chance) -> Symbols:
        """Arms that new signs name, LEFT or RIGHT, [N]."""
        return LEFT + chance.symbols(2, 1)[:, 0]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Put the agent in front of a new sign; `options` are not used."""
        super().reset(seed=seed)
        self.named_arm = int(self.draw(Chance([self.np_random]))[0])
        self.position = 0
        self._step = 0
        self.entered_arm = NO_ARM
        self._ended = False
        return self._codes[SIGN_LEFT if self.named_arm == LEFT else SIGN_RIGHT].copy(), {}

    def step(self, action: np.int64 | int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Walk, turn or bump."""
        move = int(action)
        if not 0 <= move <= RIGHT:
            raise ValueError(f"action must be in 0..{RIGHT}, got {action}")
        if self._ended:
            raise gym.error.ResetNeeded("the episode is over or was never started; call reset()")
        self._step += 1
        at_junction = self.position == self.corridor_length
        if at_junction and move != FORWARD:
            self.entered_arm = move
            self._ended = True
            success = move == self.named_arm
            return np.zeros(4, np.float32), float(success), True, False, {"is_success": success}
        if move == FORWARD and not at_junction:
            self.position += 1
        cell = JUNCTION if self.position == self.corridor_length else CORRIDOR
        self._ended = self._step == self._step_limit
        info = {"is_success": False} if self._ended else {}
        return self._codes[cell].copy(), 0.0, False, self._ended, info

    def hidden_variable(self) -> int:
        """The arm that the sign named: 0 left, 1 right."""
        return self.named_arm - LEFT

    def oracle_action(self) -> int:
        """Forward in the corridor, then into the arm that the sign named."""
        return FORWARD if self.position < self.corridor_length else self.named_arm

    def render(self) -> str | Picture | None:
        """The maze as three lines of text (`A` the agent, `$` the arm that pays) or as cells."""
        return draw(self.render_mode, self._describe, self._brightness)

    def _describe(self) -> str:
        return "\n".join("".join(row).rstrip() for row in self._cells()) + "\n"

    def _brightness(self) -> NDArray[np.float32]:
        levels = {" ": 0.0, ".": 0.3, "$": 0.6, "A": 1.0}
        return np.array([[levels[cell] for cell in row] for row in self._cells()], np.float32)

    def _cells(self) -> list[list[str]]:
        length = self.corridor_length
        rows = [[" "] * (length + 1), ["."] * (length + 1), [" "] * (length + 1)]
        rows[0][length] = rows[2][length] = "."
        rows[0 if self.named_arm == LEFT else 2][length] = "$"
        row = 1 if self.entered_arm == NO_ARM else 0 if self.entered_arm == LEFT else 2
        rows[row][self.position] = "A"
        return rows
