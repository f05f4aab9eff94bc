"""Tasks that show a stream of symbols and pay for every right answer in its asked tail."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from xlstm_rl.envs.drawing import Picture, draw
from xlstm_rl.envs.parameters import RENDER_MODES, known_render_mode
from xlstm_rl.envs.task_facts import TaskFacts

Observation = NDArray[np.float32]
Symbols = NDArray[np.int64]


class Stream(NamedTuple):
    """One episode: what is shown and what is right.

    Attributes:
        shown: Per field, the symbol of each step, [T]; a field of n symbols shows nothing where the entry is n.
        answers: Right actions of the asked steps, which are the last ones, [num_asked].
    """

    shown: tuple[Symbols, ...]
    answers: Symbols


class SymbolStreamEnv(gym.Env[Observation, np.int64]):
    """A fixed number of steps, each showing one-hot symbols; the last `num_asked` of them ask for an answer.

    Observation: Box [0, 1], the one-hot code of every field, then a flag that is 1 where an answer is asked; zeros
    after the last step.
    Actions: Discrete(num_answers), ignored where no answer is asked.
    Reward: 1 / num_asked for a right answer, so the return is the hit rate and its optimum is 1.
    Memoryless return: 1 / num_answers, exactly. It rests on what every subclass promises: at an asked step the right
    answer is uniform given the observation, so each action is right with that probability.
    Uniformly random actions collect just as much.
    End: `terminated` after `length` steps; `info["is_success"]` then tells whether every answer was right.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4}

    def __init__(
        self, fields: Mapping[str, int], *, length: int, num_asked: int, num_answers: int, render_mode: str | None
    ) -> None:
        """Prepare the spaces.

        Args:
            fields: Name and number of symbols of each part of the observation.
            length: Steps of an episode.
            num_asked: How many of the last steps ask for an answer.
            num_answers: Number of actions.
            render_mode: None, "ansi" or "rgb_array".
        """
        self.render_mode = known_render_mode(render_mode)
        self.observation_space = gym.spaces.Box(0.0, 1.0, (sum(fields.values()) + 1,), np.float32)
        self.action_space = gym.spaces.Discrete(num_answers)
        self.facts = TaskFacts(horizon=length, optimal_return=1.0, memoryless_return=1.0 / num_answers)
        self._fields = dict(fields)
        self._codes = [np.eye(size + 1, size, dtype=np.float32) for size in fields.values()]
        self._length = length
        self._num_asked = num_asked
        self._num_answers = num_answers
        self._first_asked = length - num_asked
        self._step = length
        self._hits = 0
        self._frames = np.zeros((length + 1, sum(fields.values()) + 1), np.float32)
        self._answers: list[int] = []
        self._last_action: int | None = None

    @abstractmethod
    def _draw(self) -> Stream:
        """A new episode, drawn with `self.np_random`."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; `options` are not used."""
        super().reset(seed=seed)
        stream = self._draw()
        self._frames[:-1, :-1] = np.hstack(
            [code[symbols] for code, symbols in zip(self._codes, stream.shown, strict=True)]
        )
        self._frames[self._first_asked : -1, -1] = 1.0
        self._answers = stream.answers.tolist()
        self._step = 0
        self._hits = 0
        self._last_action = None
        return self._frames[0].copy(), {}

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Answer the current observation and show the next one."""
        choice = int(action)
        if not 0 <= choice < self._num_answers:
            raise ValueError(f"action must be in 0..{self._num_answers - 1}, got {action}")
        if self._step >= self._length:
            raise gym.error.ResetNeeded("the episode is over or was never started; call reset()")
        asked = self._step - self._first_asked
        hit = asked >= 0 and self._answers[asked] == choice
        self._hits += hit
        self._step += 1
        self._last_action = choice
        ended = self._step == self._length
        info = {"is_success": self._hits == self._num_asked} if ended else {}
        return self._frames[self._step].copy(), hit / self._num_asked, ended, False, info

    def oracle_action(self) -> int:
        """The right answer to the current observation; 0 where none is asked."""
        asked = self._step - self._first_asked
        return self._answers[asked] if 0 <= asked < self._num_asked else 0

    def render(self) -> str | Picture | None:
        """The current step as a line of text (`step 3/24: symbol 2, not asked; ...`), or the observation as cells."""
        return draw(self.render_mode, self._describe, lambda: self._frames[self._step][None])

    def _describe(self) -> str:
        frame = self._frames[self._step]
        parts, start = [], 0
        for name, size in self._fields.items():
            code = frame[start : start + size]
            parts.append(f"{name} {int(code.argmax()) if code.any() else '-'}")
            start += size
        parts.append("asked" if frame[-1] else "not asked")
        last = "-" if self._last_action is None else self._last_action
        return f"step {self._step}/{self._length}: {', '.join(parts)}; last action {last}, {self._hits} right so far\n"
