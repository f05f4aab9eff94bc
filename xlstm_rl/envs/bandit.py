"""Two-armed bandit: find out which arm pays more, and pull it."""

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from xlstm_rl.envs.noisy_evidence import majority_accuracies
from xlstm_rl.envs.random_draws import Chance, Symbols
from xlstm_rl.envs.task import TaskFacts, task
from xlstm_rl.envs.task_pictures import Picture, draw
from xlstm_rl.envs.task_sizes import RENDER_MODES, known_render_mode, real_number, whole_number


class Arms(NamedTuple):
    """N bandits: the better arm, [N], and in which pulls it is the better one that pays, [N, num_pulls]."""

    better: Symbols
    usual: NDArray[np.bool_]


@task("Bandit", "self-directed", "num_pulls")
class Bandit(gym.Env[NDArray[np.float32], np.int64]):
    """Two arms, of which one pays with probability `better` and the other with the rest to 1; which is which is new.

    Ability: learn within an episode from one's own actions and their rewards.

    Observation: Box [3], 0 or 1: the one-hot arm of the last pull and whether it paid; zeros before the first pull.
    Actions: Discrete(2), the arm to pull.
    Reward: 1 / num_pulls if the arm pays. In each pull exactly one of the arms would pay.
    Horizon: num_pulls steps, then terminated. `info["is_success"]`: the last pull was of the better arm.
    Optimal return: 0.759 with 20 pulls of 0.8 and 0.2 (see `best_return`). The arms are dependent, so that each pull
    tells as much about both, whichever it is, and to follow the majority of what the pulls so far said is optimal.
    Memoryless return: 0.671 there, `(0.5 + (num_pulls - 1) * (better**2 + (1 - better)**2)) / num_pulls`: stay after a
    win, change after a loss. Then every pull after the first is of the better arm with probability `better`; no other
    use of the last pull reaches more.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4}
    hidden_name = "the better arm"
    """Of `hidden_variable`."""

    def __init__(self, num_pulls: int = 20, better: float = 0.8, *, render_mode: str | None = None) -> None:
        """Set the size of the task.

        Args:
            num_pulls: Pulls of an episode, at least 2.
            better: Probability that the better arm pays, 0.5 to 1, not 0.5 itself.
            render_mode: None, "ansi" or "rgb_array".
        """
        self.num_pulls = whole_number("num_pulls", num_pulls, at_least=2)
        self._chance = real_number("better", better, at_least=0.5, at_most=1.0)
        if self._chance == 0.5:
            raise ValueError("better must be above 0.5, got 0.5: no arm would be the better one")
        self.render_mode = known_render_mode(render_mode)
        self.observation_space = gym.spaces.Box(0.0, 1.0, (3,), np.float32)
        self.action_space = gym.spaces.Discrete(2)
        after_one = self._chance**2 + (1.0 - self._chance) ** 2
        self.facts = TaskFacts(
            self.num_pulls,
            best_return(self.num_pulls, self._chance),
            (0.5 + (self.num_pulls - 1) * after_one) / self.num_pulls,
        )
        self.better = 0
        self.usual: list[bool] = []
        self.steps = self.num_pulls
        self.votes = 0
        self.last_pull: tuple[int, bool] | None = None

    def draw(self, chance: Chance) -> Arms:
        """New bandits."""
        return Arms(chance.symbols(2, 1)[:, 0], chance.happens(self._chance, self.num_pulls))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Set up new arms; `options` are not used."""
        super().reset(seed=seed)
        arms = self.draw(Chance([self.np_random]))
        self.better = int(arms.better[0])
        self.usual = arms.usual[0].tolist()
        self.steps = 0
        self.votes = 0
        self.last_pull = None
        return np.zeros(3, np.float32), {}

    def step(self, action: np.int64 | int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Pull an arm."""
        arm = int(action)
        if not 0 <= arm <= 1:
            raise ValueError(f"action must be in 0..1, got {action}")
        if self.steps >= self.num_pulls:
            raise gym.error.ResetNeeded("the episode is over or was never started; call reset()")
        paid = (arm == self.better) == self.usual[self.steps]
        self.steps += 1
        self.votes += 1 if (arm == 1) == paid else -1
        self.last_pull = (arm, paid)
        seen = np.zeros(3, np.float32)
        seen[arm] = 1.0
        seen[2] = paid
        ended = self.steps == self.num_pulls
        info = {"is_success": arm == self.better} if ended else {}
        return seen, paid / self.num_pulls, ended, False, info

    def hidden_variable(self) -> int:
        """The better arm."""
        return self.better

    def oracle_action(self) -> int:
        """The arm that the majority of the pulls so far speaks for; arm 0 in a tie."""
        return int(self.votes > 0)

    def render(self) -> str | Picture | None:
        """The last pull as a line of text, or as cells: the arms above (pulled: bright), what they paid below."""
        return draw(self.render_mode, self._describe, self._brightness)

    def _describe(self) -> str:
        last = "no pull yet" if self.last_pull is None else f"arm {self.last_pull[0]} paid {int(self.last_pull[1])}"
        return f"pull {self.steps}/{self.num_pulls}: {last}; arm {self.better} is better\n"

    def _brightness(self) -> NDArray[np.float32]:
        cells = np.zeros((2, 2), np.float32)
        if self.last_pull is not None:
            cells[0, self.last_pull[0]] = 1.0
            cells[1, self.last_pull[0]] = float(self.last_pull[1])
        return cells


def best_return(num_pulls: int, better: float) -> float:
    """Mean pay of a pull if each goes by the majority of the pulls before it, ties by the toss of a coin."""
    right = majority_accuracies(num_pulls - 1, better)
    return sum(chance * better + (1.0 - chance) * (1.0 - better) for chance in right) / num_pulls
