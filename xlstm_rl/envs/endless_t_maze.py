"""Endless T-maze: corridor after corridor, each with a sign that makes the one before worthless."""

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from xlstm_rl.envs.random_draws import Chance, Symbols
from xlstm_rl.envs.t_maze import FORWARD, LEFT, RIGHT
from xlstm_rl.envs.task import TaskFacts, task
from xlstm_rl.envs.task_pictures import Picture, draw
from xlstm_rl.envs.task_sizes import RENDER_MODES, known_render_mode, whole_number

LENGTHS = ("fixed", "uniform")
STEP_COST = 0.01
STEP_LIMIT_FACTOR = 6
# Up to here it pays to try the turn at every cell of a corridor of unknown length.
LONGEST = 100


@task("EndlessTMaze", "revision", "num_corridors")
class EndlessTMaze(gym.Env[NDArray[np.float32], np.int64]):
    """Corridors in a row, with a sign at the start of each that names the turn at its end (Shchendrigin et al. 2026).

    Ability: overwrite what is stored; the sign of the corridor before must not decide.

    Observation: Box [3]: place in the corridor divided by `corridor_length`; sign "left"; sign "right". A sign is
    shown in the first cell of its corridor. Zeros after the last step.
    Actions: Discrete(3): 0 forward, 1 left, 2 right. A turn within a corridor bumps into a wall.
    Lengths: "fixed": all corridors have `corridor_length` cells. "uniform": each has 1 to `corridor_length`, with equal
    chance; its end then looks like any other cell, so that it can only be found by trying the turn.
    Reward: 1 for the turn that the sign named; -1 for anything else at a junction, which ends the episode; -0.01 for
    any other step.
    Horizon: `terminated` after the last corridor or a wrong turn; `truncated` after
    6 * (corridor_length + 1) * num_corridors steps. `info["is_success"]`: all corridors were passed.
    Optimal return: num_corridors * (1 - 0.01 * corridor_length). With uniform lengths it tries the turn at every cell
    but the first, which costs 0.01 where the corridor goes on, and never walks on at a junction.
    Memoryless return: that of the best stationary policy, which turns blindly, the step limit left out. With fixed
    lengths it is 0.02 * corridor_length * (2**-num_corridors - 1). With uniform ones a cell is left by a step forward
    with chance f, and by a turn else: a higher f wastes fewer tries and more often misses the end. How the return
    depends on the chances is only through the share of corridors passed and the steps they cost, so the best chances
    are min(1, sqrt(w * cells ahead)) for some w, which is searched.

    Rules and sizes are those of the paper's public summaries and of the authors' repository Adaptive-Memory-Envs
    (observation, step limit, uniform lengths; sizes 5 or 10 cells, 1 to 10 corridors). The repository pays -0.01 for a
    wrong turn and nothing for a step; here both are as in the paper.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4}
    hidden_name = "the turn that the last sign named"
    """Of `hidden_variable`."""

    def __init__(
        self,
        num_corridors: int = 5,
        corridor_length: int = 10,
        lengths: str = "fixed",
        *,
        render_mode: str | None = None,
    ) -> None:
        """Set the size of the maze.

        Args:
            num_corridors: Corridors of an episode, at least 1.
            corridor_length: Cells of the longest corridor, 1 to 100.
            lengths: "fixed" or "uniform".
            render_mode: None, "ansi" or "rgb_array".
        """
        self.num_corridors = whole_number("num_corridors", num_corridors, at_least=1)
        self.corridor_length = whole_number("corridor_length", corridor_length, at_least=1, at_most=LONGEST)
        if lengths not in LENGTHS:
            raise ValueError(f"lengths must be one of {LENGTHS}, got {lengths!r}")
        self.lengths = lengths
        self.render_mode = known_render_mode(render_mode)
        self.observation_space = gym.spaces.Box(0.0, 1.0, (3,), np.float32)
        self.action_space = gym.spaces.Discrete(3)
        self.facts = TaskFacts(
            STEP_LIMIT_FACTOR * (self.corridor_length + 1) * self.num_corridors,
            self.num_corridors * (1.0 - STEP_COST * self.corridor_length),
            memoryless_return(self.num_corridors, self.corridor_length, uniform=lengths == "uniform"),
        )
        self.turns = [LEFT] * self.num_corridors
        self.ends = [self.corridor_length] * self.num_corridors
        self.corridor = self.num_corridors
        self.position = 0
        self._tried = False
        self._step = self.facts.horizon

    def draw(self, chance: Chance) -> tuple[Symbols, Symbols]:
        """Turns that new signs name and lengths of their corridors, [N, num_corridors] each."""
        turns = LEFT + chance.symbols(2, self.num_corridors)
        if self.lengths == "uniform":
            return turns, 1 + chance.symbols(self.corridor_length, self.num_corridors)
        return turns, np.full_like(turns, self.corridor_length)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Put the agent in front of the first sign; `options` are not used."""
        super().reset(seed=seed)
        turns, ends = self.draw(Chance([self.np_random]))
        self.turns, self.ends = turns[0].tolist(), ends[0].tolist()
        self.corridor = 0
        self.position = 0
        self._tried = False
        self._step = 0
        return self._observe(), {}

    def step(self, action: np.int64 | int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Walk, turn or bump."""
        move = int(action)
        if not 0 <= move <= RIGHT:
            raise ValueError(f"action must be in 0..{RIGHT}, got {action}")
        if self._step == self.facts.horizon:
            raise gym.error.ResetNeeded("the episode is over or was never started; call reset()")
        self._step += 1
        reward, ended = -STEP_COST, False
        if self.position == self.ends[self.corridor]:
            passed = move == self.turns[self.corridor]
            reward = 1.0 if passed else -1.0
            self.corridor += passed
            self.position = 0
            self._tried = False
            ended = not passed or self.corridor == self.num_corridors
        elif move == FORWARD:
            self.position += 1
            self._tried = False
        else:
            self._tried = True
        cut = not ended and self._step == self.facts.horizon
        if not (ended or cut):
            return self._observe(), reward, False, False, {}
        success = self.corridor == self.num_corridors
        seen = self._observe() if cut else np.zeros(3, np.float32)
        self._step = self.facts.horizon
        return seen, reward, ended, cut, {"is_success": success}

    def _observe(self) -> NDArray[np.float32]:
        seen = np.zeros(3, np.float32)
        if self.position == 0:
            seen[self.turns[self.corridor]] = 1.0
        else:
            seen[0] = self.position / self.corridor_length
        return seen

    def hidden_variable(self) -> int:
        """The turn that the last sign named: 0 left, 1 right."""
        return self.turns[min(self.corridor, self.num_corridors - 1)] - LEFT

    def oracle_action(self) -> int:
        """What an agent with perfect memory does: turn where the corridor may end, unless it was tried there."""
        if self._step == self.facts.horizon:
            return FORWARD
        shortest = 1 if self.lengths == "uniform" else self.corridor_length
        return FORWARD if self.position < shortest or self._tried else self.turns[self.corridor]

    def render(self) -> str | Picture | None:
        """The corridor as a line of text (`corridor 2/5: >..A...`; `<` or `>`: what its sign says) or as cells."""
        return draw(self.render_mode, self._describe, self._brightness)

    def _describe(self) -> str:
        corridor = min(self.corridor, self.num_corridors - 1)
        cells = ["."] * (self.ends[corridor] + 1)
        cells[self.position] = "A"
        sign = "<" if self.turns[corridor] == LEFT else ">"
        return f"corridor {corridor + 1}/{self.num_corridors}: {sign}{''.join(cells)}\n"

    def _brightness(self) -> NDArray[np.float32]:
        """Row 0 for the signs, by corridor; row 1 for the present corridor."""
        cells = np.zeros((2, max(self.num_corridors, self.corridor_length + 1)), np.float32)
        cells[0, : self.num_corridors] = [0.3 if turn == LEFT else 0.6 for turn in self.turns]
        corridor = min(self.corridor, self.num_corridors - 1)
        cells[0, corridor] += 0.4
        cells[1, : self.ends[corridor] + 1] = 0.3
        cells[1, self.position] = 1.0
        return cells


def memoryless_return(num_corridors: int, corridor_length: int, *, uniform: bool) -> float:
    """Expected return of the best stationary policy that sees only the present observation, see `EndlessTMaze`."""
    if not uniform:
        return 2.0 * STEP_COST * corridor_length * (2.0**-num_corridors - 1.0)
    ahead = np.arange(corridor_length - 1, 0, -1)  # cells after each but the first and the last
    forward = np.minimum(1.0, np.sqrt(np.logspace(-6, 1, 4001)[:, None] * ahead))
    # At the end, a turn is the named one half of the time.
    passed = ((1.0 - forward).sum(axis=1) + 1.0) / (2.0 * corridor_length)
    tries = ((1.0 - forward) / forward * ahead).sum(axis=1) / corridor_length
    a_corridor = 2.0 * passed - 1.0 - STEP_COST * ((corridor_length + 1) / 2.0 + tries)
    return float((a_corridor * (1.0 - passed**num_corridors) / (1.0 - passed)).max())
