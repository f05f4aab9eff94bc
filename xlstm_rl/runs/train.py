"""One training run from configuration to closing table, and the evaluation of a finished one."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from xlstm_rl.agents import CheckpointError, RecurrentPPO
from xlstm_rl.agents.parallel import Ranks, ranks
from xlstm_rl.agents.saving import Resumed
from xlstm_rl.configs import ConfigError, TrainConfig
from xlstm_rl.envs import TaskFacts, suite_versions
from xlstm_rl.runs.build import (
    check_device,
    make_env,
    make_model,
    normalized,
    own_callbacks,
    own_classes,
    read_facts,
    start_from,
    torch_threads,
    training_seed,
)
from xlstm_rl.runs.callbacks import (
    EpisodeRecorder,
    PeriodicCheckpoint,
    PeriodicEvaluation,
    StopAfterEvaluation,
    StopOnRequest,
)
from xlstm_rl.runs.curve import plot_curve
from xlstm_rl.runs.folder import RunFolder
from xlstm_rl.runs.interruption import InterruptedEvaluationError, Interruption
from xlstm_rl.runs.live import LiveView, SignOfLife, say
from xlstm_rl.runs.open import open_run, play_run
from xlstm_rl.runs.returns import Returns, Row, pack_rows, read_returns, unpack_rows
from xlstm_rl.runs.scores import RANDOM, Score, final_scores, play, remarks, score, show_scores, worst_of_last
from xlstm_rl.runs.seeds import Purpose, environment_seed
from xlstm_rl.runs.trackers import Trackers, check_trackers, flush_events, open_logger, pending_numbers
from xlstm_rl.vec_envs.env_contract import FaultyEnvironmentError

StopWhen = Callable[[Sequence[Row]], bool]

# Of writing; what the system says of opening a file names the file.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class TrainingStoppedError(RuntimeError):
    """A fault ended training; the message names it and what is left to go on from."""


class RunResult(NamedTuple):
    """What a run left.

    Attributes:
        folder: the run folder.
        model: the saved model.
        rows: training and evaluation returns over time.
        scores: lines of the closing table; empty after an interruption.
        interrupted_by: the signal that ended the run early, None if none did.
    """

    folder: Path
    model: Path
    rows: list[Row]
    scores: list[Score]
    interrupted_by: signal.Signals | None


def train(
    config: TrainConfig,
    run_dir: Path | str,
    *,
    numbered: bool = False,
    stop_when: StopWhen | None = None,
    console: Console | None = None,
) -> RunResult:
    """Train, save and evaluate an agent.

    SIGINT (Ctrl-C) and SIGTERM end training and evaluations at the next step or minibatch; the model and a checkpoint
    are saved and the result says so.

    Args:
        config: the run.
        run_dir: where it is written; must not exist or be empty.
        numbered: if `run_dir` is taken, write to the first free one of `run_dir`-2, `run_dir`-3 and so on.
        stop_when: called with the rows of all evaluations so far after each of them; true ends training there, as
            finished. None trains for `total_steps`.
        console: shows progress and the closing table; None shows nothing.

    Raises:
        ConfigError: the environment or the agent cannot be built as configured, this machine has no such device, or
            `run_dir` is in use or cannot be written.
        TrainingStoppedError: NaN or infinity, a faulty environment, or a full disk ended training or the closing
            evaluation.
    """
    group = ranks(config.rank_timeout)
    console = _console(console, group)
    check_device(config.device)
    _check_logging(config)
    facts = read_facts(config.env)
    with group.explaining(), torch_threads(config.threads), closing(_training_env(config, group)) as env:
        model = make_model(config, normalized(env, config))
        transfer = start_from(model, config)
        path = Path(run_dir)
        if group.rank == 0:
            path = RunFolder.create(path, config, versions=suite_versions(config.env.id), numbered=numbered).path
        folder = RunFolder(Path(group.broadcast(str(path))), group)
        say(console, f"run folder {folder.path}")
        if transfer is not None:
            say(console, f"from {config.init.source}: {transfer}")
        with folder.training(), _faults_told(folder, "training stopped", model):
            return _run(model, config, facts, folder, _returns(folder), {"log": {}}, stop_when, console)


def _check_logging(config: TrainConfig) -> None:
    """Refuse callbacks and trackers that cannot be had, before anything is made."""
    check_trackers(config)
    own_callbacks(config)


def _console(console: Console | None, group: Ranks) -> Console:
    """Where to say something: rank 0 alone does."""
    return console if console is not None and group.rank == 0 else Console(quiet=True)


def _returns(folder: RunFolder, kept: Sequence[Row] = (), seconds: float = 0.0) -> Returns:
    return Returns(folder.returns if folder.group.rank == 0 else None, kept, seconds)


def resume(
    run_dir: Path | str,
    overrides: Sequence[str] = (),
    *,
    new_episodes: bool = False,
    stop_when: StopWhen | None = None,
    console: Console | None = None,
) -> RunResult:
    """Go on with an interrupted run from its last usable checkpoint, or from the start if it has none.

    Rows and events after the checkpoint are removed and made again; on the CPU, with environments that `Resumable`
    brings back, the run becomes what it would have been without the interruption.

    Args:
        run_dir: as `train` made it.
        overrides: "total_steps=N", to go on for longer.
        new_episodes: leave the running episodes and start new ones, as another number of processes than before must.
        stop_when: as for `train`.
        console: shows progress, damaged checkpoints and the closing table; None shows nothing.

    Raises:
        ConfigError: this is no run folder, another process trains in it, none of its checkpoints can be used, an
            override is another one, or as for `train`.
        TrainingStoppedError: as for `train`.
    """
    for override in overrides:
        if not override.startswith("total_steps="):
            raise ConfigError(f"{override!r} cannot be changed when resuming; total_steps=N can")
    config = RunFolder(Path(run_dir)).load_config(overrides)
    group = ranks(config.rank_timeout)
    folder, console = RunFolder(Path(run_dir), group), _console(console, group)
    check_device(config.device)
    _check_logging(config)
    facts = read_facts(config.env)
    with (
        group.explaining(),
        torch_threads(config.threads),
        folder.training(),
        closing(_training_env(config, group)) as env,
    ):
        env = normalized(env, config)
        with _faults_told(folder, "the running episodes cannot be brought back"):
            resumed = _last_usable(folder, config, env, console, new_episodes)
        if resumed is None:
            if folder.model.is_file():
                raise ConfigError(
                    f"{folder.path} is finished and has no checkpoint to go on from (checkpoint.every_steps="
                    f"{config.checkpoint.every_steps}): train anew, into another folder"
                )
            say(console, f"{folder.path} has no checkpoint yet; it starts anew")
        elif config.total_steps < resumed.model.num_timesteps and overrides:
            raise ConfigError(
                f"total_steps={config.total_steps:,} is below the {resumed.model.num_timesteps:,} steps that are done; "
                "give more, or leave it out"
            )
        if resumed is None:
            model = make_model(config, env)
            start_from(model, config)
        else:
            model = resumed.model
        with _faults_told(folder, "training stopped", model):
            if overrides and group.rank == 0:
                folder.write_config(config)
            if resumed is None:
                return _run(model, config, facts, folder, _returns(folder), {"log": {}}, stop_when, console)
            _say_where(resumed, config, folder, console)
            notes = resumed.notes
            returns = _returns(folder, _rows_so_far(notes, folder, console), notes["seconds"])
            return _run(model, config, facts, folder, returns, notes, stop_when, console)


def _say_where(resumed: Resumed[RecurrentPPO], config: TrainConfig, folder: RunFolder, console: Console) -> None:
    done, of = resumed.model.num_timesteps, config.total_steps
    longer = f"; all {of:,} are done, and total_steps=N goes on for longer" if done >= of else ""
    say(console, f"{folder.path} goes on after {done:,} steps{longer}")
    if resumed.restarted is not None:
        say(console, f"all environments start new episodes: {resumed.restarted}")


def _rows_so_far(notes: Mapping[str, Any], folder: RunFolder, console: Console) -> list[Row]:
    """The returns up to a checkpoint, which holds them itself since files have format 2."""
    found, noted = read_returns(folder.returns), notes["rows"]
    rows = found[:noted] if isinstance(noted, int) else unpack_rows(noted)
    missing = (noted if isinstance(noted, int) else len(rows)) - len(found)
    if missing > 0 or found[: len(rows)] != rows:
        lost = "; they are lost" if isinstance(noted, int) else "; it is written anew from the checkpoint"
        say(console, f"{folder.returns} is damaged, {max(missing, 0)} rows of it are missing{lost}")
    for name, size in notes.get("events", {}).items():
        path = folder.tensorboard / name
        if not path.is_file() or path.stat().st_size < size:
            say(console, f"{path} lacks events from before the checkpoint; TensorBoard will show a gap")
    return rows


def evaluate_run(
    run_dir: Path | str,
    *,
    n_episodes: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    best: bool = False,
    console: Console | None = None,
) -> list[Score]:
    """Evaluate the last model of a run folder deterministically.

    Args:
        run_dir: as `train` made it.
        n_episodes: None takes the configured number.
        seed: of the episodes; None takes the one of the closing evaluation of `train`.
        device: as torch knows it, or "auto"; None takes the configured one, or the CPU if this machine lacks it.
        best: take the model of the best evaluation during training instead of the last one.
        console: told when the configured device is not taken, and how far it is; None tells nobody.

    Raises:
        ConfigError: this is no run folder, it holds no model, the model or its normalisation statistics are missing or
            damaged, this machine has no such device, or `n_episodes` is below 1.
        FaultyEnvironmentError: an environment failed or answered what cannot be used.
    """
    with open_run(run_dir, best=best, device=device, console=console) as run:
        config = run.config
        seed = environment_seed(config.seed, Purpose.FINAL_EVALUATION) if seed is None else seed
        max_steps = config.eval.max_steps if n_episodes is None else None
        n_episodes = config.eval.n_episodes if n_episodes is None else n_episodes
        if n_episodes < 1:
            raise ConfigError(f"n_episodes={n_episodes} must be at least 1")
        console = console or Console(quiet=True)
        scores = list(final_scores(run.model, config, run.facts, n_episodes, seed, console, max_steps=max_steps))
        for remark in remarks(scores, config, run.model.num_timesteps):
            say(console, remark)
        return scores


def _training_env(config: TrainConfig, group: Ranks) -> VecEnv:
    return make_env(config, config.env.n_envs, training_seed(config, group))


def _last_usable(
    folder: RunFolder, config: TrainConfig, env: VecEnv, console: Console, new_episodes: bool
) -> Resumed[RecurrentPPO] | None:
    """The newest checkpoint that every rank can read; None if there are none."""
    refused, group = "", folder.group
    # what rank 0 has is complete
    names = group.broadcast([path.name for path in folder.list_checkpoints()])
    for name in reversed(names):
        path = (RunFolder(folder.path) if new_episodes else folder).checkpoints / name
        resumed, problem = None, ""
        try:
            reason = "so it was asked for" if new_episodes else None
            own = own_classes(config)
            resumed = RecurrentPPO.resume_with_notes(path, env, config.device, custom_objects=own, new_episodes=reason)
            _check_notes(resumed.notes, path)
        except (CheckpointError, OSError) as error:
            if isinstance(error, OSError) and not _is_of(error, folder.path):
                raise
            problem = f"{path.name} cannot be used: {error}"
        except ValueError as error:
            raise ConfigError(f"{path} does not fit the environment: {error}") from error
        if not new_episodes:
            told = group.broadcast(None if resumed is None else resumed.notes.get("world_size", 1))
            _check_world(folder, told)
        problems = [text for text in group.gather(problem) if text]
        if not problems:
            return resumed
        refused = problems[0]
        say(console, f"{refused}; trying the one before")
    if refused:
        raise ConfigError(f"{folder.path} has no usable checkpoint left: {refused}")
    return None


def _check_world(folder: RunFolder, world_size: int | None) -> None:
    """Refuse to go on with another number of processes: their episodes and random numbers are not there."""
    if world_size is not None and world_size != folder.group.world_size:
        raise ConfigError(
            f"{folder.path} was trained by {world_size} process(es), and here are {folder.group.world_size}: start as "
            "many (torchrun --nproc_per_node), or go on with new episodes (--new-episodes)"
        )


def _check_notes(notes: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint that somebody else than `train` wrote."""
    rows, log = notes.get("rows"), notes.get("log")
    if not isinstance(rows, int | np.ndarray) or not isinstance(log, dict):
        raise CheckpointError(
            f"{path} is no checkpoint of a run folder: it notes no returns; RecurrentPPO.resume reads it"
        )
    if isinstance(rows, np.ndarray):
        unpack_rows(rows)


def _run(
    model: RecurrentPPO,
    config: TrainConfig,
    facts: TaskFacts | None,
    folder: RunFolder,
    returns: Returns,
    notes: Mapping[str, Any],
    stop_when: StopWhen | None,
    console: Console,
) -> RunResult:
    """Learn what is left to learn, save, evaluate and report."""
    group = folder.group
    scores: list[Score] = []
    with Trackers(config, folder) as trackers:
        model.set_logger(_logger(model, config, folder, notes, trackers))
        with Interruption(partial(say, console)) as interruption:
            _learn(model, config, folder, returns, notes, stop_when, console, interruption)
            folder.save(model, folder.model)
            signals = [kind for kind in group.gather(interruption.signal) if kind is not None]
            trained = not signals
            if group.rank > 0:
                # rank 0 evaluates
                return RunResult(folder.path, folder.model, returns.rows, scores, signals[0] if signals else None)
            if trained:
                seed = environment_seed(config.seed, Purpose.FINAL_EVALUATION)
                closing_scores = final_scores(
                    model,
                    config,
                    facts,
                    config.eval.n_episodes,
                    seed,
                    console,
                    interruption.check,
                    max_steps=config.eval.max_steps,
                )
                with (
                    _faults_told(folder, "the closing evaluation stopped", model),
                    suppress(InterruptedEvaluationError),
                ):
                    for score in closing_scores:
                        scores.append(score)
                scores[1:1] = worst_of_last(returns.of("eval"), 5) if scores else []
        _close(console, folder, config, model, scores, trained=trained, interrupted=interruption.signal is not None)
        # last, as it takes a second to load what draws, and whoever interrupted the run waits
        _draw(folder, config, returns.rows, facts, scores)
        if trackers:
            _track_end(trackers, config, folder, scores, model.num_timesteps, console)
        return RunResult(
            folder.path, folder.model, returns.rows, scores, interruption.signal or next(iter(signals), None)
        )


def _logger(
    model: RecurrentPPO, config: TrainConfig, folder: RunFolder, notes: Mapping[str, Any], trackers: Trackers
) -> Logger:
    if folder.group.rank > 0:
        # rank 0 alone logs
        return Logger(None, [])
    tensorboard = "tensorboard" in config.logging.trackers
    return open_logger(folder.tensorboard, model.num_timesteps, notes["log"], [trackers], tensorboard=tensorboard)


def _track_end(
    trackers: Trackers, config: TrainConfig, folder: RunFolder, scores: Sequence[Score], step: int, console: Console
) -> None:
    """The closing table, the curve and a video, where the run was not interrupted before."""
    trackers.log({f"final/{score.agent}": score.mean_return for score in scores}, step)
    trackers.show("curve", folder.curve)
    if config.logging.video_episodes and scores:
        try:
            play_run(folder.path, episodes=config.logging.video_episodes, record=folder.path / "episodes.gif")
        except ConfigError as error:
            say(console, f"no video for the trackers: {error}")
        trackers.show("episodes", folder.path / "episodes.gif")


@contextmanager
def _faults_told(folder: RunFolder, what: str, model: RecurrentPPO | None = None) -> Iterator[None]:
    """Faults of environments, numbers and disks as `TrainingStoppedError`, with what is left to go on from."""
    try:
        yield
    except (FloatingPointError, FaultyEnvironmentError, OSError) as error:
        if isinstance(error, OSError) and not _is_of(error, folder.path):
            raise
        kept = folder.list_checkpoints()
        left = f"{kept[-1]} is kept" if kept else "there is no checkpoint yet"
        when = "" if model is None else f" after {model.num_timesteps:,} steps"
        raise TrainingStoppedError(
            f"{what}{when}: {error}\n{left}; once the cause is mended, go on with: "
            f"xlstm-rl train --resume {folder.path}"
        ) from error


def _is_of(error: OSError, folder: Path) -> bool:
    """Whether an error is about the disk, or a file in the folder, and not about what an environment does."""
    named = isinstance(error.filename, str) and Path(error.filename).is_relative_to(folder)
    return named or error.errno in _DISK_ERRORS


def _learn(
    model: RecurrentPPO,
    config: TrainConfig,
    folder: RunFolder,
    returns: Returns,
    notes: Mapping[str, Any],
    stop_when: StopWhen | None,
    console: Console,
    interruption: Interruption,
) -> None:
    def save(model: RecurrentPPO) -> None:
        # first, so that a power cut leaves no checkpoint that knows more than they do
        returns.flush()
        kept = {
            # without that of a rollout which is collected again, where its update was broken off
            "rows": pack_rows([row for row in returns.rows if row.step <= model.checkpoint_step]),
            "seconds": returns.seconds(),
            "log": pending_numbers(model.logger),
            "events": flush_events(model.logger, folder.tensorboard),
            "evaluation_due": evaluation.due,
        }
        folder.save_checkpoint(model, config.checkpoint.keep, kept)

    def requested() -> bool:
        return interruption.signal is not None

    left = config.total_steps - model.num_timesteps
    with LiveView(config.total_steps, console, model.num_timesteps) as view:
        interim = partial(_interim, config=config, console=console, interruption=interruption)
        save_best = partial(folder.save, path=folder.best)
        # files of earlier versions have no such note
        due = bool(notes.get("evaluation_due", False))
        evaluation = PeriodicEvaluation(config.eval.every_steps, interim, returns, view, save_best, due=due)
        told: list[BaseCallback] = [
            *([] if stop_when is None else [StopAfterEvaluation(returns, stop_when)]),
            EpisodeRecorder(returns, view, config.eval.success_return),
            evaluation,
        ]
        callbacks = [
            *own_callbacks(config),
            *(told if folder.group.rank == 0 else []),
            # last: what is written must be all that the others did
            PeriodicCheckpoint(config.checkpoint.every_steps, save),
            StopOnRequest(requested, save, folder.group),
        ]
        model.stop_requested = requested
        # what is left of a run that was interrupted may be its last rollout, at the end of the schedule
        goes_on = model._total_timesteps == config.total_steps
        model.learn(max(left, 0), callback=CallbackList(callbacks), reset_num_timesteps=False)
    if model.idle and not goes_on:
        say(
            console,
            f"nothing was learnt: ppo.lr_schedule={config.ppo.lr_schedule!r} is at its end after a single rollout of "
            f"{config.ppo.n_steps} steps in {config.env.n_envs} environments; give more total_steps, smaller rollouts "
            "or ppo.lr_schedule=constant",
        )
    wanted = interruption.signal is None and config.checkpoint.every_steps is not None
    if not folder.group.any(not wanted or folder.has_checkpoint(model)):
        # so that a finished run can be made longer
        save(model)
    model.logger.close()


def _interim(model: RecurrentPPO, config: TrainConfig, console: Console, interruption: Interruption) -> Score | None:
    n_episodes = config.eval.interim_episodes
    seed = environment_seed(config.seed, Purpose.INTERIM_EVALUATION)
    alive = SignOfLife(console, "the agent", n_episodes, interruption.check)
    try:
        played = play(model, config, n_episodes, seed, max_steps=config.eval.max_steps, on_step=alive)
        return score("", played, config)
    except InterruptedEvaluationError:
        return None


def _draw(
    folder: RunFolder, config: TrainConfig, rows: list[Row], facts: TaskFacts | None, scores: list[Score]
) -> None:
    references = {score.agent: score.mean_return for score in scores if score.agent == RANDOM}
    if facts is not None:
        references |= {"best without memory": facts.memoryless_return, "optimum": facts.optimal_return}
    if rows:
        plot_curve(rows, folder.curve, f"{config.env.id}, memory {config.memory.name}, seed {config.seed}", references)


def _close(
    console: Console,
    folder: RunFolder,
    config: TrainConfig,
    model: RecurrentPPO,
    scores: list[Score],
    *,
    trained: bool,
    interrupted: bool,
) -> None:
    if scores:
        show_scores(console, scores, f"{config.env.id} after {model.num_timesteps:,} steps")
        for remark in remarks(scores, config, model.num_timesteps):
            say(console, remark)
    if any(score.cut_episodes for score in scores):
        limit = config.eval.max_episode_steps
        say(console, f"episodes that did not end were cut after {limit:,} steps (eval.max_episode_steps)")
    again = f"xlstm-rl evaluate {folder.path}"
    if not trained:
        text = (
            f"interrupted after {model.num_timesteps:,} steps; model saved in {folder.model}; "
            f"go on with: xlstm-rl train --resume {folder.path}"
        )
    elif interrupted:
        text = (
            f"all steps are done, the closing evaluation was interrupted; model saved in {folder.model}; evaluate it "
        )
        text += f"with: {again}"
    else:
        text = f"model saved in {folder.model}; play it again with: {again}"
    say(console, text)
