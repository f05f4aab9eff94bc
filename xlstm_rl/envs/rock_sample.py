"""RockSample: which rocks are worth a visit? A sensor tells, the better the nearer."""

import math
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from xlstm_rl.envs.random_draws import Chance
from xlstm_rl.envs.task import task
from xlstm_rl.envs.task_pictures import Picture, draw
from xlstm_rl.envs.task_sizes import RENDER_MODES, known_render_mode, real_number, whole_number

NORTH, EAST, SOUTH, WEST, SAMPLE = range(5)
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
ROCK_REWARD, EXIT_REWARD = 10.0, 10.0
# Where the sensor is right three times in four.
HALF_DISTANCE = 20.0
STEP_LIMIT = 1000


@task("RockSample", "filtering")
class RockSample(gym.Env[NDArray[np.float32], np.int64]):
    """A rover among rocks, some of them good, on its way out of a square (Smith and Simmons 2004).

    Ability: keep what uncertain readings said of each of many things, and what was done about them.

    The rules are those of POBAX (Tao et al. 2025), RockSample(11,11) by default and (15,15) by `size=15, num_rocks=15`.
    Rocks lie on different random cells, never in the last column, the same in every episode; `layout` draws others.
    Each is good with chance 1/2, anew in every episode. The rover starts on a random cell outside the last column.
    Observation: Box [2 * size + num_rocks]: one-hot row and column of the rover; after a check the reading of that
    rock, 1 for good and -1 for bad, 0 elsewhere. Where the rocks lie is not shown, but the same for ever.
    Actions: Discrete(5 + num_rocks): 0 north, 1 east, 2 south, 3 west, 4 sample, 5 + i check rock i. A check at
    distance d is right with chance (1 + 2**(-d / 20)) / 2.
    Reward: sampling a good rock 10, a bad one -10, and it is bad from then on; 0 elsewhere. Reaching the last column
    10.
    Horizon: `terminated` in the last column, `truncated` after 1000 steps.

    POBAX reports returns discounted by 0.99 per step. `discount=0.99` multiplies the reward of step t by 0.99**t, so
    that the sum of rewards, which all reports here show, is that measure; an agent may be trained without it.
    No bounds are stated. Undiscounted, the best return is 10 * (1 + num_rocks / 2), since checks cost nothing; a policy
    without memory can come close to it in 1000 steps, so that only the discounted return tells memories apart.
    `oracle_action` is a player that knows which rocks are good, and not the best one.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4}
    hidden_name = "whether rock 0 is good"
    """Of `hidden_variable`."""

    def __init__(
        self,
        size: int = 11,
        num_rocks: int = 11,
        layout: int = 0,
        discount: float = 1.0,
        *,
        render_mode: str | None = None,
    ) -> None:
        """Set the size of the task.

        Args:
            size: Rows and columns, at least 2.
            num_rocks: Rocks, at least 1 and at most `size * (size - 1)`.
            layout: Seed of where the rocks lie.
            discount: Factor of the reward per step, 0 to 1.
            render_mode: None, "ansi" or "rgb_array".
        """
        self.size = whole_number("size", size, at_least=2)
        self.num_rocks = whole_number("num_rocks", num_rocks, at_least=1, at_most=self.size * (self.size - 1))
        self.discount = real_number("discount", discount, at_least=0.0, at_most=1.0)
        self.render_mode = known_render_mode(render_mode)
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (2 * self.size + self.num_rocks,), np.float32)
        self.action_space = gym.spaces.Discrete(5 + self.num_rocks)
        generator = np.random.default_rng(whole_number("layout", layout, at_least=0))
        cells = generator.permutation(self.size * (self.size - 1))[: self.num_rocks].tolist()
        self.rocks = [divmod(cell, self.size - 1) for cell in cells]
        self.good = [False] * self.num_rocks
        self.place = (0, 0)
        self._step = STEP_LIMIT

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Draw the rocks that are good, and a start; `options` are not used."""
        super().reset(seed=seed)
        chance = Chance([self.np_random])
        self.good = chance.happens(0.5, self.num_rocks)[0].tolist()
        self.place = divmod(int(chance.symbols(self.size * (self.size - 1), 1)[0, 0]), self.size - 1)
        self._step = 0
        return self._observe(), {}

    def step(self, action: np.int64 | int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Move, sample the rock here, or check one."""
        choice = int(action)
        if not 0 <= choice < 5 + self.num_rocks:
            raise ValueError(f"action must be in 0..{4 + self.num_rocks}, got {action}")
        if self._step == STEP_LIMIT:
            raise gym.error.ResetNeeded("the episode is over or was never started; call reset()")
        factor = self.discount**self._step
        self._step += 1
        reward = 0.0
        if choice < SAMPLE:
            (row, column), (down, right) = self.place, MOVES[choice]
            last = self.size - 1
            self.place = (min(max(row + down, 0), last), min(max(column + right, 0), last))
        elif choice == SAMPLE and self.place in self.rocks:
            rock = self.rocks.index(self.place)
            reward = ROCK_REWARD if self.good[rock] else -ROCK_REWARD
            self.good[rock] = False
        seen = self._observe()
        if choice > SAMPLE:
            rock = choice - SAMPLE - 1
            right_with = (1.0 + 2.0 ** (-math.dist(self.place, self.rocks[rock]) / HALF_DISTANCE)) / 2.0
            right = self.np_random.random() < right_with
            seen[2 * self.size + rock] = 1.0 if self.good[rock] == right else -1.0
        out = self.place[1] == self.size - 1
        reward += EXIT_REWARD * out
        cut = not out and self._step == STEP_LIMIT
        if out:
            self._step = STEP_LIMIT
        return seen, factor * reward, out, cut, {}

    def _observe(self) -> NDArray[np.float32]:
        seen = np.zeros(2 * self.size + self.num_rocks, np.float32)
        seen[self.place[0]] = seen[self.size + self.place[1]] = 1.0
        return seen

    def hidden_variable(self) -> int:
        """Whether rock 0 is good."""
        return int(self.good[0])

    def oracle_action(self) -> int:
        """To the nearest good rock and sample it; when none is left, out."""
        good = [place for place, is_good in zip(self.rocks, self.good, strict=True) if is_good]
        if not good:
            return EAST
        row, column = self.place
        to_row, to_column = min(good, key=lambda place: abs(place[0] - row) + abs(place[1] - column))
        if row != to_row:
            return SOUTH if row < to_row else NORTH
        if column != to_column:
            return EAST if column < to_column else WEST
        return SAMPLE

    def render(self) -> str | Picture | None:
        """The square as text (`A` the rover, `+` and `-` rocks that are good and bad, `|` the way out) or as cells."""
        return draw(self.render_mode, self._describe, self._brightness)

    def _cells(self) -> list[list[str]]:
        cells = [["."] * (self.size - 1) + ["|"] for _ in range(self.size)]
        for (row, column), good in zip(self.rocks, self.good, strict=True):
            cells[row][column] = "+" if good else "-"
        cells[self.place[0]][self.place[1]] = "A"
        return cells

    def _describe(self) -> str:
        return "\n".join("".join(row) for row in self._cells()) + "\n"

    def _brightness(self) -> NDArray[np.float32]:
        levels = {".": 0.0, "|": 0.2, "-": 0.4, "+": 0.7, "A": 1.0}
        return np.array([[levels[cell] for cell in row] for row in self._cells()], np.float32)
