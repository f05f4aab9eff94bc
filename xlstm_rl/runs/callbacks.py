"""Callbacks of a training run: recording, evaluation, checkpoints and the wish to stop."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from stable_baselines3.common.callbacks import BaseCallback

from xlstm_rl.agents.parallel import Ranks
from xlstm_rl.runs.live import LiveView
from xlstm_rl.runs.returns import Returns, Row
from xlstm_rl.runs.scores import Score
from xlstm_rl.vec_envs.env_contract import episode_record

# Episodes that the live view averages over, as SB3's own log does.
RECENT = 100
REDRAW_SECONDS = 0.25


class _Episode(NamedTuple):
    total: float
    success: float | None


class StopOnRequest(BaseCallback):
    """Ends training at the next step once `requested` says so, and saves the model then.

    Args:
        requested: whether to end.
        save: called with the model after the last step, before `learn` returns.
        group: of processes that train together: where one is to end, all end and save.
    """

    def __init__(
        self, requested: Callable[[], bool], save: Callable[[Any], object], group: Ranks | None = None
    ) -> None:
        super().__init__()
        self._requested, self._save, self._group = requested, save, group or Ranks()

    def _on_step(self) -> bool:
        return not self._requested()

    def _on_training_end(self) -> None:
        if self._group.any(self._requested()):
            self._save(self.model)


class StopAfterEvaluation(BaseCallback):
    """Ends training after an evaluation with which `stop_when` is content.

    Args:
        returns: where evaluations are written.
        stop_when: called with the rows of all evaluations so far, again after each.
    """

    def __init__(self, returns: Returns, stop_when: Callable[[Sequence[Row]], bool]) -> None:
        super().__init__()
        self._returns, self._stop_when = returns, stop_when
        self._seen = 0

    def _on_step(self) -> bool:
        # training rows come too, but only evaluations can change the answer
        if len(self._returns.rows) == self._seen:
            return True
        self._seen = len(self._returns.rows)
        return not self._stop_when(self._returns.of("eval"))


class EpisodeRecorder(BaseCallback):
    """Writes a row per rollout with its episodes and keeps the live view up to date.

    Args:
        returns: takes the rows.
        view: shows the last episodes.
        success_return: an episode succeeds from this return on where the task does not say; None: unknown.
    """

    def __init__(self, returns: Returns, view: LiveView, success_return: float | None) -> None:
        super().__init__()
        self._returns, self._view, self._success_return = returns, view, success_return
        self._fresh: list[_Episode] = []
        self._recent: deque[_Episode] = deque(maxlen=RECENT)
        self._drawn = time.monotonic()

    def _on_step(self) -> bool:
        ended = [self._read(info) for info in self.locals["infos"] if episode_record(info)]
        self._fresh += ended
        self._recent += ended
        if time.monotonic() - self._drawn > REDRAW_SECONDS:
            self._draw()
        return True

    def _on_rollout_end(self) -> None:
        ended = [self._read(info) for info in getattr(self.model, "episodes_elsewhere", [])]
        self._fresh += ended
        self._recent += ended
        if self._fresh:
            mean_return, success = _means(self._fresh)
            seconds, episodes = self._returns.seconds(), len(self._fresh)
            self._returns.add(Row("train", self.num_timesteps, seconds, episodes, mean_return, success))
            self._fresh = []

    def _on_training_end(self) -> None:
        self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        mean_return, success = _means(self._recent) if self._recent else (None, None)
        self._view.update(self.num_timesteps, mean_return, success)

    def _read(self, info: dict[str, Any]) -> _Episode:
        total = float(info["episode"]["r"])
        if info.get("is_success") is not None:
            return _Episode(total, float(info["is_success"]))
        return _Episode(total, None if self._success_return is None else float(total >= self._success_return))


class Periodic(BaseCallback):
    """Calls `_act` once per `every_steps` environment steps, between an update and the next rollout.

    Args:
        every_steps: None for never.
        due: whether it is due where a resumed run goes on, and was not done before.

    Attributes:
        due: whether it is due at present, and was not done.
    """

    def __init__(self, every_steps: int | None, *, due: bool = False) -> None:
        super().__init__()
        self._every_steps = every_steps
        self._next = 0
        self.due = due

    def _on_training_start(self) -> None:
        self._next = self.model.num_timesteps if self.due else self._after(self.model.num_timesteps)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._act_if_due()

    def _on_training_end(self) -> None:
        # a rollout that was broken off is collected again when the run is resumed
        if getattr(self.model, "checkpoint_step", self.num_timesteps) == self.num_timesteps:
            self._act_if_due()

    def _act_if_due(self) -> None:
        if self._every_steps is not None and self.num_timesteps >= self._next:
            self._next = self._after(self.num_timesteps)
            self.due = not self._act()

    def _after(self, step: int) -> int:
        """The first step after `step` at which to act."""
        return 0 if self._every_steps is None else (step // self._every_steps + 1) * self._every_steps

    @abstractmethod
    def _act(self) -> bool:
        """What is done each time; whether it came to its end."""


class PeriodicCheckpoint(Periodic):
    """Saves the model now and then.

    Args:
        every_steps: environment steps between checkpoints, None for none.
        save: called with the model.
    """

    def __init__(self, every_steps: int | None, save: Callable[[Any], object]) -> None:
        super().__init__(every_steps)
        self._save = save

    def _act(self) -> bool:
        self._save(self.model)
        return True


class PeriodicEvaluation(Periodic):
    """Evaluates now and then; results go to the returns, the live view and the logger as `eval/...`.

    Args:
        every_steps: environment steps between evaluations, None for none.
        evaluate: called with the model; gives its score, or None where it was interrupted.
        returns: takes a row each.
        view: gets a line each.
        save_best: called with the model where the mean return is above all before.
        due: as for `Periodic`.
    """

    def __init__(
        self,
        every_steps: int | None,
        evaluate: Callable[[Any], Score | None],
        returns: Returns,
        view: LiveView,
        save_best: Callable[[Any], object],
        *,
        due: bool = False,
    ) -> None:
        super().__init__(every_steps, due=due)
        self._evaluate, self._returns, self._view, self._save_best = evaluate, returns, view, save_best

    def _act(self) -> bool:
        score = self._evaluate(self.model)
        if score is None:
            return False
        mean_return, success, episodes = score.mean_return, score.success, score.episodes or 0
        if mean_return > max((row.mean_return for row in self._returns.of("eval")), default=float("-inf")):
            self._save_best(self.model)
        seconds = self._returns.seconds()
        self._returns.add(Row("eval", self.num_timesteps, seconds, episodes, mean_return, success))
        self.logger.record("eval/mean_reward", mean_return)
        if success is not None:
            self.logger.record("eval/success_rate", success)
        self.logger.dump(self.num_timesteps)
        shown = "" if success is None else f", success {success:.2f}"
        shown += f", {score.cut_episodes} of {episodes} episodes cut" if score.cut_episodes else ""
        self._view.say(f"{self.num_timesteps:>9,} steps  evaluation: return {mean_return:.2f}{shown}")
        return True


def _means(episodes: Sequence[_Episode] | deque[_Episode]) -> tuple[float, float | None]:
    known = [episode.success for episode in episodes if episode.success is not None]
    mean_return = sum(episode.total for episode in episodes) / len(episodes)
    return mean_return, sum(known) / len(known) if known else None
