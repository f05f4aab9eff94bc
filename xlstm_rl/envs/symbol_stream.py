"""Tasks that show a stream of symbols and ask for answers at fixed steps."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from xlstm_rl.envs.random_draws import Chance, Reals, Symbols
from xlstm_rl.envs.task import TaskFacts
from xlstm_rl.envs.task_pictures import Picture, draw
from xlstm_rl.envs.task_sizes import RENDER_MODES, known_render_mode

Observation = NDArray[np.float32]


class Stream(NamedTuple):
    """N episodes: what is shown and what is right.

    Attributes:
        shown: Per field, the symbol of each step, [N, T] int64, where n shows nothing in a field of n symbols; or the
            real numbers of each step, [N, T, n].
        answers: Right actions of the asked steps, [N, num_asked].
        best: What an agent with perfect memory says, [N, num_asked], where it cannot always be right; None for
            `answers`.
        extra: Rewards that do not depend on the actions, [N, T]; None for none.
    """

    shown: tuple[Symbols | Reals, ...]
    answers: Symbols
    best: Symbols | None = None
    extra: Reals | None = None


class Episodes(NamedTuple):
    """N episodes, ready to be played.

    Attributes:
        frames: Observations, [N, T + 1, size]; zeros after the last step.
        answers: Right action of each step, [N, T]; -1 where none is asked.
        best: What the oracle does, [N, T].
        extra: Rewards that do not depend on the actions, [N, T]; None for none.
    """

    frames: Observation
    answers: Symbols
    best: Symbols
    extra: Reals | None


class SymbolStreamEnv(gym.Env[Observation, np.int64]):
    """A fixed number of steps, each showing one-hot symbols or numbers; some of them ask for an answer.

    Observation: Box, the one-hot code (or the numbers) of every field, then a flag that is 1 where an answer is asked;
    zeros after the last step.
    Actions: Discrete(num_answers), ignored where no answer is asked.
    Reward: 1 / num_asked for a right answer, so the return is the hit rate and its optimum is 1.
    Memoryless return: 1 / num_answers, exactly. It rests on what every subclass promises: at an asked step the right
    answer is uniform given the observation, so each action is right with that probability.
    Uniformly random actions collect just as much.
    End: `terminated` after `length` steps; `info["is_success"]` then tells whether every answer was right.

    A task with `all_or_nothing` pays 1 at the last step if every answer was right, and nothing before.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4}
    hidden_name = "the next right answer"
    """Of `hidden_variable`."""
    first_shows_state = False
    """Whether the first observation, which asks nothing, shows the state that is tracked, in its first field."""

    def __init__(
        self,
        fields: Mapping[str, int],
        *,
        length: int,
        asked: Sequence[int],
        num_answers: int,
        render_mode: str | None,
        real_fields: Sequence[str] = (),
        optimal_return: float = 1.0,
        all_or_nothing: bool = False,
    ) -> None:
        """Prepare the spaces.

        Args:
            fields: Name and size of each part of the observation: its number of symbols, or of numbers.
            length: Steps of an episode.
            asked: Steps that ask for an answer, from 0, ascending.
            num_answers: Number of actions.
            render_mode: None, "ansi" or "rgb_array".
            real_fields: Those fields that show numbers in [-1, 1] and not symbols.
            optimal_return: Expected return of an agent with perfect memory.
            all_or_nothing: Whether only a full set of right answers pays.
        """
        self.render_mode = known_render_mode(render_mode)
        low = np.concatenate([np.full(size, -1.0 * (name in real_fields)) for name, size in fields.items()] + [[0.0]])
        self.observation_space = gym.spaces.Box(low.astype(np.float32), np.float32(1.0), dtype=np.float32)
        self.action_space = gym.spaces.Discrete(num_answers)
        self.facts = TaskFacts(length, optimal_return, memoryless_return=1.0 / num_answers)
        self.length = length
        self.num_asked = len(asked)
        self.all_or_nothing = all_or_nothing
        self._fields = dict(fields)
        self._real_fields = frozenset(real_fields)
        self._codes = [np.eye(size + 1, size, dtype=np.float32) for size in fields.values()]
        self._num_answers = num_answers
        self._asked = np.array(asked)
        self._step = length
        self._hits = 0
        self._frames = np.zeros((length + 1, len(low)), np.float32)
        self._answers: list[int] = []
        self._best: list[int] = []
        self._extra: list[float] | None = None
        self._last_action: int | None = None

    @abstractmethod
    def draw(self, chance: Chance) -> Stream:
        """New episodes; all their randomness comes from `chance`."""

    def episodes(self, chance: Chance) -> Episodes:
        """New episodes with their observations; changes nothing in this environment."""
        stream = self.draw(chance)
        count = len(stream.answers)
        frames = np.zeros((count, self.length + 1, len(self._frames[0])), np.float32)
        start = 0
        for (name, size), code, shown in zip(self._fields.items(), self._codes, stream.shown, strict=True):
            frames[:, :-1, start : start + size] = shown if name in self._real_fields else code[shown]
            start += size
        frames[:, self._asked, -1] = 1.0
        answers = np.full((count, self.length), -1)
        answers[:, self._asked] = stream.answers
        best = np.zeros((count, self.length), np.int64)
        best[:, self._asked] = stream.answers if stream.best is None else stream.best
        return Episodes(frames, answers, best, stream.extra)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; `options` are not used."""
        super().reset(seed=seed)
        episodes = self.episodes(Chance([self.np_random]))
        self._frames = episodes.frames[0]
        self._answers = episodes.answers[0].tolist()
        self._best = episodes.best[0].tolist()
        self._extra = None if episodes.extra is None else episodes.extra[0].tolist()
        self._step, self._hits, self._last_action = 0, 0, None
        return self._frames[0].copy(), {}

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Answer the current observation and show the next one."""
        choice = int(action)
        if not 0 <= choice < self._num_answers:
            raise ValueError(f"action must be in 0..{self._num_answers - 1}, got {action}")
        if self._step >= self.length:
            raise gym.error.ResetNeeded("the episode is over or was never started; call reset()")
        hit = self._answers[self._step] == choice
        self._hits += hit
        ended = self._step + 1 == self.length
        success = self._hits == self.num_asked
        reward = float(ended and success) if self.all_or_nothing else hit / self.num_asked
        if self._extra is not None:
            reward += self._extra[self._step]
        self._step += 1
        self._last_action = choice
        return self._frames[self._step].copy(), reward, ended, False, {"is_success": success} if ended else {}

    def hidden_variable(self) -> int:
        """What memory has to hold at the present observation, to be looked for in it: a number from 0 on."""
        if self._step == 0 and self.first_shows_state:
            return int(self._frames[0, : next(iter(self._fields.values()))].argmax())
        return next((answer for answer in self._answers[self._step :] if answer >= 0), 0)

    def oracle_action(self) -> int:
        """What an agent with perfect memory answers to the current observation; 0 where no answer is asked."""
        return self._best[self._step] if self._step < self.length else 0

    def render(self) -> str | Picture | None:
        """The step as a line of text (`step 3/24: symbol 2, not asked; ...`), or the observations so far as cells.

        The picture has a column for each step, and a last row that marks the present one.
        """
        return draw(self.render_mode, self._describe, self._brightness)

    def _brightness(self) -> NDArray[np.float32]:
        low = np.asarray(self.observation_space.low)  # type: ignore[attr-defined]
        cells = np.zeros((len(low) + 1, self.length + 1), np.float32)
        cells[:-1, : self._step + 1] = ((self._frames[: self._step + 1] - low) / (1.0 - low)).T
        cells[-1, self._step] = 1.0
        return cells

    def _describe(self) -> str:
        frame = self._frames[self._step]
        parts, start = [], 0
        for name, size in self._fields.items():
            code = frame[start : start + size]
            if name in self._real_fields:
                parts.append(f"{name} ({', '.join(f'{number:.2f}' for number in code)})")
            else:
                parts.append(f"{name} {int(code.argmax()) if code.any() else '-'}")
            start += size
        parts.append("asked" if frame[-1] else "not asked")
        last = "-" if self._last_action is None else self._last_action
        return f"step {self._step}/{self.length}: {', '.join(parts)}; last action {last}, {self._hits} right so far\n"
