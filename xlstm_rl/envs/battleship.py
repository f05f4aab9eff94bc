"""Battleship alone: sink a hidden fleet with few shots, told only whether the last one hit."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from xlstm_rl.envs.task import task
from xlstm_rl.envs.task_pictures import Picture, draw
from xlstm_rl.envs.task_sizes import RENDER_MODES, known_render_mode, whole_number

STEP_LIMIT = 1000
WATER, MISS, HIT = range(3)
# Of the scripted player: a place that explains one more hit counts so many times.
PER_HIT = 100.0


@task("Battleship", "self-directed")
class Battleship(gym.Env[NDArray[np.float32], np.int64]):
    """Shots at a grid with hidden ships, as in POBAX (Tao et al. 2025), 10 x 10 with ships of 5, 4, 3 and 2 cells.

    Ability: remember where one's own shots went and what came of them.

    Ships are placed one after the other: along rows or columns with equal chance, and then uniformly among the places
    that are free; ships may touch.
    Observation: Box [1]: whether the last shot hit a ship where none had hit before; 0 at first. Where it went is for
    the agent to remember, or shown by `env.memory_inputs=[action]`, as POBAX does.
    Actions: Discrete(size**2), a cell to shoot at, rows first. `action_masks()` allows those not yet shot at.
    Reward: size**2 for the shot that leaves no ship, -1 for every other.
    Horizon: `terminated` with the last ship, `truncated` after 1000 steps, which masked actions never reach.
    `info["is_success"]`: the fleet was sunk.
    No bounds are stated: the optimum is not known. `oracle_action` is a strong player that remembers all shots: it aims
    where most places of ships explain them. Shots at random cells collect size**2 - 1 less their expected number.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4}
    hidden_name = "what became of cell 0"
    """Of `hidden_variable`."""

    def __init__(self, size: int = 10, ships: Sequence[int] = (5, 4, 3, 2), *, render_mode: str | None = None) -> None:
        """Set the size of the task.

        Args:
            size: Rows and columns, at least 1.
            ships: Their lengths, at least one, placed in this order.
            render_mode: None, "ansi" or "rgb_array".

        Raises:
            ValueError: The ships could fill a grid so that no place is left for the last one.
        """
        self.size = whole_number("size", size, at_least=1)
        self.ships = tuple(whole_number("each of ships", ship, at_least=1, at_most=self.size) for ship in ships)
        if not self.ships:
            raise ValueError("ships must name at least one length")
        self.render_mode = known_render_mode(render_mode)
        self.observation_space = gym.spaces.Box(0.0, 1.0, (1,), np.float32)
        self.action_space = gym.spaces.Discrete(self.size**2)
        self._along_rows, self._along_columns = self._places(columns=False), self._places(columns=True)
        # However the others lie, each blocks at most so many places of one direction.
        for index, ship in enumerate(self.ships):
            if sum(other * ship for other in self.ships[:index]) >= len(self._along_rows[ship]):
                raise ValueError(f"ships={self.ships} may leave no place for one of {ship} on a grid of {self.size}")
        self.fleet = np.zeros(self.size**2, bool)
        self.shots = np.full(self.size**2, WATER)
        self._step = STEP_LIMIT

    def _places(self, *, columns: bool) -> dict[int, NDArray[np.bool_]]:
        """By length of a ship, all its places along rows or columns, [number, size**2]."""
        places = {}
        for ship in {*self.ships}:
            grids = []
            for line in range(self.size):
                for start in range(self.size - ship + 1):
                    grid = np.zeros((self.size, self.size), bool)
                    grid[line, start : start + ship] = True
                    grids.append((grid.T if columns else grid).ravel())
            places[ship] = np.array(grids)
        return places

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Hide a new fleet; `options` are not used."""
        super().reset(seed=seed)
        self.fleet = np.zeros(self.size**2, bool)
        for ship in self.ships:
            direction = self._along_rows if self.np_random.random() < 0.5 else self._along_columns
            free = direction[ship][~(direction[ship] & self.fleet).any(axis=1)]
            self.fleet |= free[int(self.np_random.random() * len(free))]
        self.shots = np.full(self.size**2, WATER)
        self._step = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.int64 | int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Shoot."""
        cell = int(action)
        if not 0 <= cell < self.size**2:
            raise ValueError(f"action must be in 0..{self.size**2 - 1}, got {action}")
        if self._step == STEP_LIMIT:
            raise gym.error.ResetNeeded("the episode is over or was never started; call reset()")
        self._step += 1
        hit = bool(self.fleet[cell]) and self.shots[cell] != HIT
        self.shots[cell] = HIT if self.fleet[cell] else MISS
        sunk = hit and bool((self.shots[self.fleet] == HIT).all())
        cut = not sunk and self._step == STEP_LIMIT
        if sunk:
            self._step = STEP_LIMIT
        reward = float(self.size**2) if sunk else -1.0
        return np.array([hit], np.float32), reward, sunk, cut, {"is_success": sunk} if sunk or cut else {}

    def action_masks(self) -> NDArray[np.bool_]:
        """Cells not yet shot at, bool [size**2]."""
        return np.asarray(self.shots == WATER)

    def hidden_variable(self) -> int:
        """What became of the first cell: 0 not shot at, 1 missed, 2 hit."""
        return int(self.shots[0])

    def oracle_action(self) -> int:
        """The cell that most places of ships cover, those that explain hits counted many times."""
        missed, hit = self.shots == MISS, self.shots == HIT
        likely = np.zeros(self.size**2)
        for ship in self.ships:
            for places in (self._along_rows[ship], self._along_columns[ship]):
                weights = np.where((places & missed).any(axis=1), 0.0, PER_HIT ** (places & hit).sum(axis=1))
                # One that explains hits alone says nothing of other cells.
                weights[(places & ~hit).sum(axis=1) == 0] = 0.0
                likely += weights @ places
        likely[self.shots != WATER] = -1.0
        return int(likely.argmax())

    def render(self) -> str | Picture | None:
        """The grid as text (`o` a miss, `X` a hit, `#` a ship not yet hit) or as cells."""
        return draw(self.render_mode, self._describe, self._brightness)

    def _describe(self) -> str:
        hidden = np.where(self.fleet, "#", ".")
        cells = np.where(self.shots == HIT, "X", np.where(self.shots == MISS, "o", hidden)).reshape(self.size, -1)
        return "\n".join("".join(row) for row in cells) + "\n"

    def _brightness(self) -> NDArray[np.float32]:
        hidden = np.where(self.fleet, 0.6, 0.0)
        cells = np.where(self.shots == HIT, 1.0, np.where(self.shots == MISS, 0.3, hidden))
        return cells.reshape(self.size, -1).astype(np.float32)
