"""Color-Cubes: fetch cubes by colour from memory, while the others jump about."""

from functools import lru_cache
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from xlstm_rl.envs.random_draws import Chance, Symbols
from xlstm_rl.envs.task import TaskFacts, task
from xlstm_rl.envs.task_pictures import Picture, draw
from xlstm_rl.envs.task_sizes import RENDER_MODES, known_render_mode, real_number, whole_number

UP, DOWN, LEFT, RIGHT, TAKE = range(5)
# Row and column of a move.
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))
STEP_LIMIT_FACTOR = 2


# More phases need more steps, but the bounds are no multiple of them: no length.
@task("ColorCubes", "revision")
class ColorCubes(gym.Env[NDArray[np.float32], np.int64]):
    """Cubes of different colours on a grid; walk to the one of the colour asked for and take it, again and again.

    Ability: keep a map in memory and change one entry of it at a time (Shchendrigin et al. 2026, where five agents
    score 0 in all but the trivial case).

    Rules: In each of `num_phases` phases a colour is asked for. Taking its cube pays, moves that cube to a random free
    cell and starts the next phase, with a colour drawn from all. After any other step, a random one of the other cubes
    jumps to a random free cell with chance `teleport`; the cube that is asked for stays. A free cell has neither cube
    nor agent; the agent walks over cubes. All draws are uniform.
    Observation: Box [2 * grid * (num_cubes + 1) + grid**2 + num_cubes], 0 or 1: the one-hot row and column of the
    agent; those of every cube, by colour; a map of the cells that have a cube; the one-hot colour asked for. The
    agent's place is always shown, the colour in the first observation of its phase, the cubes in that one and after a
    jump. With `hide_colors` the cubes are shown by colour in the first observation of the episode only, and later by
    the map, which says where cubes are but not which; one cube moves at a time, so that memory can tell. Without
    `hide_colors` the map stays empty. Zeros after the last step.
    Actions: Discrete(5): 0 up, 1 down, 2 left, 3 right, 4 take. A move into a wall and taking anything else do nothing.
    Reward: 1 for the right cube taken.
    Horizon: `terminated` after the last phase; `truncated` after 2 * num_phases * (2 * grid - 1) steps, twice as many
    as the longest ways take. `info["is_success"]`: all phases were passed.
    Optimal return: num_phases.
    Memoryless return: an estimate from below. A policy that sees only where it is can search all cells on a closed tour
    and try to take a cube with some chance at each step; the value is that of the best such chance, by dynamic
    programming, as if every cube were equally likely anywhere else and the tour no longer than there are cells. On a
    grid of odd size it is longer by a cell.

    Levels of the paper: Trivial is one cube and one phase (`num_cubes=1, num_phases=1`), Medium has several, Extreme
    hides the colours of changes (`hide_colors=True`). The paper's rules are followed as its summary and project page
    tell them. They leave open the sizes and the chance of a jump, what wrong takes and steps cost, the step limit, when
    the colour asked for is shown, and in Extreme whether a new phase shows colours: those are choices of this package,
    so that scores are not those of the paper's own environment.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4}
    hidden_name = "the row of the cube asked for"
    """Of `hidden_variable`."""

    def __init__(
        self,
        grid: int = 5,
        num_cubes: int = 3,
        num_phases: int = 3,
        teleport: float = 0.1,
        hide_colors: bool = False,
        *,
        render_mode: str | None = None,
    ) -> None:
        """Set the size of the task.

        Args:
            grid: Rows and columns, at least 2.
            num_cubes: Cubes, and colours, at least 1; two cells more than cubes are needed.
            num_phases: Cubes to take in an episode, at least 1.
            teleport: Chance of a jump after a step, 0 to 1.
            hide_colors: Whether changes are shown without colours.
            render_mode: None, "ansi" or "rgb_array".
        """
        self.grid = whole_number("grid", grid, at_least=2)
        self.num_cubes = whole_number("num_cubes", num_cubes, at_least=1, at_most=self.grid**2 - 2)
        self.num_phases = whole_number("num_phases", num_phases, at_least=1)
        self.teleport = real_number("teleport", teleport, at_least=0.0, at_most=1.0)
        self.hide_colors = bool(hide_colors)
        self.render_mode = known_render_mode(render_mode)
        size = 2 * self.grid * (self.num_cubes + 1) + self.grid**2 + self.num_cubes
        self.observation_space = gym.spaces.Box(0.0, 1.0, (size,), np.float32)
        self.action_space = gym.spaces.Discrete(len(MOVES))
        horizon = STEP_LIMIT_FACTOR * self.num_phases * (2 * self.grid - 1)
        found = taken_on_tour(self.grid**2, self.num_phases, horizon)
        self.facts = TaskFacts(horizon, float(self.num_phases), found)
        self.agent = 0
        self.cubes = [0] * self.num_cubes
        self.target = 0
        self.taken = self.num_phases
        self._step = horizon

    def draw(self, chance: Chance) -> Symbols:
        """Cells in random order, [N, grid**2]: those of the cubes, then the agent's."""
        return chance.permutation(self.grid**2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Scatter the cubes and ask for a colour; `options` are not used."""
        super().reset(seed=seed)
        cells = self.draw(Chance([self.np_random]))[0].tolist()
        self.cubes, self.agent = cells[: self.num_cubes], cells[self.num_cubes]
        self.target = self._pick(self.num_cubes)
        self.taken = 0
        self._step = 0
        return self._observe(cubes=True, target=True, colors=True), {}

    def step(self, action: np.int64 | int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Move, or take the cube here."""
        move = int(action)
        if not 0 <= move <= TAKE:
            raise ValueError(f"action must be in 0..{TAKE}, got {action}")
        if self._step == self.facts.horizon:
            raise gym.error.ResetNeeded("the episode is over or was never started; call reset()")
        self._step += 1
        row, column = divmod(self.agent, self.grid)
        down, right = MOVES[move]
        last = self.grid - 1
        self.agent = min(max(row + down, 0), last) * self.grid + min(max(column + right, 0), last)
        hit = move == TAKE and self.agent == self.cubes[self.target]
        self.taken += hit
        if self.taken == self.num_phases:
            self._step = self.facts.horizon
            return np.zeros(self.observation_space.shape or (), np.float32), 1.0, True, False, {"is_success": True}
        jump = False
        if hit:
            self._move_cube(self.target)
            self.target = self._pick(self.num_cubes)
        elif self.num_cubes > 1 and self.np_random.random() < self.teleport:
            jump = True
            self._move_cube((self.target + 1 + self._pick(self.num_cubes - 1)) % self.num_cubes)
        cut = self._step == self.facts.horizon
        seen = self._observe(cubes=hit or jump, target=hit, colors=not self.hide_colors)
        return seen, float(hit), False, cut, {"is_success": False} if cut else {}

    def _pick(self, number: int) -> int:
        return int(self.np_random.random() * number)

    def _move_cube(self, cube: int) -> None:
        taken = {*self.cubes, self.agent}
        free = [cell for cell in range(self.grid**2) if cell not in taken]
        self.cubes[cube] = free[self._pick(len(free))]

    def _observe(self, *, cubes: bool, target: bool, colors: bool) -> NDArray[np.float32]:
        grid = self.grid
        places = [(0, self.agent)]
        if cubes and colors:
            places += enumerate(self.cubes, start=1)
        ones = [2 * grid * slot + cell // grid for slot, cell in places]
        ones += [2 * grid * slot + grid + cell % grid for slot, cell in places]
        start = 2 * grid * (self.num_cubes + 1)
        if cubes and not colors:
            ones += [start + cell for cell in self.cubes]
        if target:
            ones.append(start + grid**2 + self.target)
        seen = np.zeros(self.observation_space.shape or (), np.float32)
        seen[ones] = 1.0
        return seen

    def hidden_variable(self) -> int:
        """The row of the cube that is asked for."""
        return self.cubes[self.target] // self.grid

    def oracle_action(self) -> int:
        """The shortest way to the cube asked for, rows first, and take it."""
        row, column = divmod(self.agent, self.grid)
        to_row, to_column = divmod(self.cubes[self.target], self.grid)
        if row != to_row:
            return DOWN if row < to_row else UP
        if column != to_column:
            return RIGHT if column < to_column else LEFT
        return TAKE

    def render(self) -> str | Picture | None:
        """The grid as text (`A` the agent, letters for cubes, a capital for the one asked for) or as cells."""
        return draw(self.render_mode, self._describe, self._brightness)

    def _describe(self) -> str:
        cells = ["."] * self.grid**2
        for color, cell in enumerate(self.cubes):
            cells[cell] = chr(ord("B" if color == self.target else "b") + color % 25)
        cells[self.agent] = "A"
        rows = ["".join(cells[start : start + self.grid]) for start in range(0, self.grid**2, self.grid)]
        return f"phase {min(self.taken + 1, self.num_phases)}/{self.num_phases}\n" + "\n".join(rows) + "\n"

    def _brightness(self) -> NDArray[np.float32]:
        cells = np.zeros(self.grid**2, np.float32)
        for color, cell in enumerate(self.cubes):
            cells[cell] = 0.2 + 0.3 * (color + 1) / self.num_cubes
        cells[self.cubes[self.target]] = 0.7
        cells[self.agent] = 1.0
        return cells.reshape(self.grid, self.grid)


@lru_cache(maxsize=64)
def taken_on_tour(num_cells: int, most: int, steps: int) -> float:
    """Cubes that a search finds which sees nothing but its place.

    It walks from cell to cell of a closed tour and tries to take a cube with some chance at every step instead.

    Args:
        num_cells: Of the tour.
        most: Cubes to take.
        steps: Of an episode.

    Returns:
        The expected number, for the best of 19 chances.
    """
    trying = np.linspace(0.05, 0.95, 19)[:, None, None]
    # By chance, cubes yet to take and cells before the next one: what the steps left are worth.
    value = np.zeros((19, most + 1, num_cells))
    for _ in range(steps):
        after = np.zeros_like(value)
        stays, walks = value[:, 1:], np.roll(value[:, 1:], 1, axis=2)
        after[:, 1:] = trying * stays + (1.0 - trying) * walks
        taken = 1.0 + value[:, :-1, 1:].mean(axis=2)
        after[:, 1:, 0] = trying[:, 0] * taken + (1.0 - trying[:, 0]) * walks[:, :, 0]
        value = after
    return float(value[:, most, 1:].mean(axis=1).max())
