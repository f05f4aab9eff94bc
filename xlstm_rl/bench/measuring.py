"""Measuring a finished run: final weights greedy and sampled, the oracle, longer episodes, the memory's state."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from xlstm_rl.agents import RecurrentPPO
from xlstm_rl.agents.evaluation import EvaluationResult, OnStep, evaluate
from xlstm_rl.bench.plan import LENGTHS, PlannedRun, fingerprint, lengthened, score
from xlstm_rl.bench.results import Figure, Record, StateHealth
from xlstm_rl.bench.spec import BenchSpec
from xlstm_rl.envs import TaskFacts
from xlstm_rl.imitation.demonstrations import Oracle
from xlstm_rl.runs.build import make_env, normalized_as_saved, own_classes
from xlstm_rl.runs.folder import RunFolder
from xlstm_rl.runs.scores import EMPTIED, SAMPLED, TRAINED, Score, play
from xlstm_rl.runs.seeds import Purpose, environment_seed
from xlstm_rl.runs.train import RunResult
from xlstm_rl.vec_envs.env_contract import SKIPPED, has_method

# What environments and monitors say about a single episode.
_OF_ONE_EPISODE = ("episode", "is_success")


class EpisodesInARow(VecEnvWrapper):
    """Ends an episode for the agent only when `count` episodes of the environment are over.

    The first observation of the next episode follows the last step of the one before, and a memory is carried on: only
    the observation, with memory inputs if the environments have them, says that a new one began.

    Args:
        venv: environments that reset themselves, as all of Stable-Baselines3 do.
        count: at least 1.

    Raises:
        ValueError: `count` is below 1.
    """

    def __init__(self, venv: VecEnv, count: int) -> None:
        super().__init__(venv)
        if count < 1:
            raise ValueError(f"count={count} must be at least 1")
        self._count = count
        self._over = np.zeros(venv.num_envs, int)

    def reset(self) -> VecEnvObs:
        """Start all anew."""
        self._over[:] = 0
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        """As the environments say, but for the ends of episodes."""
        obs, rewards, dones, infos = self.venv.step_wait()
        finished = dones & np.array([SKIPPED not in info for info in infos])
        self._over += finished
        ends = finished & (self._over == self._count)
        self._over[ends] = 0
        kept: list[dict[str, Any]] = [
            {key: value for key, value in info.items() if key not in _OF_ONE_EPISODE} for info in infos
        ]
        return obs, rewards, ends, kept


class WatchedModel:
    """A model whose memory state is watched while it plays.

    Args:
        model: with Stable-Baselines3's `predict`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._sizes: list[int] = []
        self._largest, self._finite = 0.0, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> tuple[np.ndarray, Any]:
        """`predict` of the model."""
        actions, state = self._model.predict(observation, state, episode_start, deterministic, action_masks)
        self._sizes.append(sum(part.nbytes for part in state) // len(actions))
        # of NumPy, whose maximum of numbers and NaN is NaN, whatever their order
        largest = float(np.max([np.abs(part).max() for part in state if part.size], initial=0.0))
        self._finite = self._finite and bool(np.isfinite(largest))
        self._largest = max(self._largest, largest) if self._finite else self._largest
        return actions, state

    def health(self, length: int) -> StateHealth:
        """What was seen; `length` is noted with it."""
        return StateHealth(self._sizes[0], self._sizes[-1], self._largest, self._finite, length)


def measure(
    run: PlannedRun,
    spec: BenchSpec,
    result: RunResult,
    cpu_seconds: Callable[[], float],
    check: Callable[[], object] = lambda: None,
) -> Record:
    """The record of a run that has just ended.

    Args:
        run: as planned.
        spec: how it is measured.
        result: of the run.
        cpu_seconds: asked last, for what was spent until then.
        check: called after every step that is played, to end the measuring by an exception.
    """

    def on_step(finished: int, steps: int) -> None:
        check()

    config, folder = run.config, RunFolder(result.folder)
    with closing(make_env(config, 1, config.seed, here=True)) as env:
        with folder.model.open("rb") as file:
            normalized = normalized_as_saved(env, config, file)
            model = RecurrentPPO.load(file, env=normalized, device="cpu", custom_objects=own_classes(config))
        scores = {line.agent: line for line in result.scores}
        long_figures, state = _play_longer(model, run, spec.long_episodes, on_step)
        evaluations = [row for row in result.rows if row.kind == "eval"]
        settings = getattr(model.policy.memory_actor, "config", None)
        return Record(
            task=run.task.name,
            agent=run.agent,
            seed=config.seed,
            fingerprint=fingerprint(run, spec),
            ability=run.task.purpose.ability,
            env=config.env.id,
            memory=f"{config.memory.name} {getattr(settings, 'blocks', '')}".strip(),
            parameters=_count(model.policy),
            memory_parameters=_count(model.policy.memory_actor),
            tuning_runs=spec.agents[run.agent].tuning_runs,
            total_steps=config.total_steps,
            steps=result.rows[-1].step if result.rows else model.num_timesteps,
            optimal_return=run.task.facts.optimal_return,
            memoryless_return=run.task.facts.memoryless_return,
            curve=[[row.step, row.mean_return] for row in evaluations],
            greedy=_of_score(scores[TRAINED], run.task.facts),
            sampled=_of_score(scores[SAMPLED], run.task.facts),
            emptied=_of_score(scores[EMPTIED], run.task.facts),
            oracle=_play_oracle(run, on_step),
            longer=long_figures,
            in_a_row=run.task.in_a_row,
            state=state,
            cpu_minutes=round(cpu_seconds() / 60, 3),
            versions=_versions(folder.versions),
        )


def _play_longer(
    model: RecurrentPPO, run: PlannedRun, n_episodes: int, on_step: OnStep
) -> tuple[dict[str, Figure], StateHealth]:
    """Figures at each multiple of the training length, and the state's health at the greatest.

    With no episodes to play, as many as there are environments show the state's health at the training length.
    """
    figures: dict[str, Figure] = {}
    seed = environment_seed(run.config.seed, Purpose.FINAL_EVALUATION)
    if n_episodes == 0:
        watched, few = WatchedModel(model), run.config.eval.n_envs
        limit = run.config.eval.max_episode_steps
        play(watched, run.config, few, seed, max_episode_steps=limit, on_step=on_step)
        return figures, watched.health(1)
    for factor in LENGTHS:
        watched = WatchedModel(model)
        limit = run.config.eval.max_episode_steps
        how: dict[str, Any] = {"max_episode_steps": None if limit is None else factor * limit, "on_step": on_step}
        if run.task.in_a_row:
            played = play(watched, run.config, n_episodes, seed, wrap=partial(EpisodesInARow, count=factor), **how)
            figures[str(factor)] = _figure(played._replace(returns=played.returns / factor), run.task.facts)
        else:
            config, facts = lengthened(run.config, run.task, factor)
            figures[str(factor)] = _figure(play(watched, config, n_episodes, seed, **how), facts)
    return figures, watched.health(factor)


def _play_oracle(run: PlannedRun, on_step: OnStep) -> Figure | None:
    seed, n_episodes = environment_seed(run.config.seed, Purpose.FINAL_EVALUATION), run.config.eval.n_episodes
    with closing(make_env(run.config, min(run.config.eval.n_envs, n_episodes), seed, here=True)) as env:
        if not has_method(env, "oracle_action"):
            return None
        return _figure(evaluate(Oracle(env), env, n_episodes, seed=seed, on_step=on_step), run.task.facts)


def _figure(result: EvaluationResult, facts: TaskFacts) -> Figure:
    mean = result.mean_return
    return Figure(mean, result.standard_error, score(mean, facts), len(result.returns))


def _of_score(line: Score, facts: TaskFacts) -> Figure:
    assert line.standard_error is not None and line.episodes is not None
    return Figure(line.mean_return, line.standard_error, score(line.mean_return, facts), line.episodes)


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _versions(path: Path) -> dict[str, Any]:
    noted = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in noted.items() if name not in ("command", "seed")}
    return {**kept, "machine": platform.machine(), "cores": os.cpu_count()}
