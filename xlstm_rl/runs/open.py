"""The trained agent of a run folder, loaded to be evaluated, exported or looked into."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import gymnasium
import numpy as np
import torch
from gymnasium.wrappers import RecordVideo
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from xlstm_rl.agents import RecurrentPPO
from xlstm_rl.agents.checkpoint import write_whole
from xlstm_rl.agents.evaluation import EvaluationResult, evaluate
from xlstm_rl.configs import ConfigError, TrainConfig
from xlstm_rl.envs import TaskFacts
from xlstm_rl.export import Check, ExportError, check_c, check_onnx, compiler, export_c, export_onnx, time_c
from xlstm_rl.export.step_check import ROWS
from xlstm_rl.inspection import Episode, Probe, draw_episode, draw_probes, probe_memory, record_episode, write_gif
from xlstm_rl.inspection.panel import MemoryPanel
from xlstm_rl.memory import leaf_names, leaves
from xlstm_rl.runs.build import evaluation_device, make_env, normalized_as_saved, own_classes, read_facts, torch_threads
from xlstm_rl.runs.folder import RunFolder
from xlstm_rl.runs.live import SignOfLife
from xlstm_rl.runs.seeds import Purpose, environment_seed
from xlstm_rl.vec_envs.env_contract import seed_envs

DEFAULT_FPS = 10
# Of a video, as all are in memory until it is written.
MOST_FRAMES = 3_000
# A run that trains has a new checkpoint before it removes the old one.
ATTEMPTS = 100
# Stepped together to be probed.
PROBED_COPIES = 16


class FinishedRun(NamedTuple):
    """A run folder and what was loaded from it."""

    folder: RunFolder
    config: TrainConfig
    model: RecurrentPPO
    env: VecEnv
    """Copies of the environment, as the agent sees it, one unless asked for more; its normalisation stays as it is."""
    facts: TaskFacts | None
    """What is known about the task, None if nothing."""


@contextmanager
def open_run(
    run_dir: Path | str,
    *,
    best: bool = False,
    device: str | None = None,
    render: bool = False,
    render_mode: str | None = None,
    n_envs: int = 1,
    console: Console | None = None,
) -> Iterator[FinishedRun]:
    """Load the last model of a run folder, and its environment with the normalisation that the model was trained with.

    A context manager: `with open_run(folder) as run: evaluate(run.model, run.env, 100)`. Within it, torch uses the
    configured number of threads; the environment is closed at the end.

    Args:
        run_dir: as `xlstm-rl train` made it, or one that `xlstm-rl push` uploaded, as "hf://user/repo".
        best: take the model of the best evaluation during training instead of the last one.
        device: as torch knows it, or "auto"; None takes the configured one, or the CPU if this machine lacks it.
        render: make the environment draw pictures, where it can.
        render_mode: make it with this mode of drawing; None or "none": as configured.
        n_envs: copies of the environment.
        console: told when the configured device is not taken; None tells nobody.

    Raises:
        ConfigError: this is no run folder, it holds no model, the model or its normalisation statistics are missing or
            damaged, or this machine has no such device; a run in the hub cannot be fetched, or names code of others.
    """
    folder = RunFolder.find(run_dir)
    config = folder.load_config()
    device = evaluation_device(config.device, device, console or Console(quiet=True))
    facts = read_facts(config.env)
    drawn = _rendering(config) if render else config
    if render_mode not in (None, "none"):
        kwargs = {**config.env.kwargs, "render_mode": render_mode}
        drawn = dataclasses.replace(config, env=dataclasses.replace(config.env, kwargs=kwargs))
    with torch_threads(config.threads), closing(make_env(drawn, n_envs, config.seed, here=True)) as env:
        model = _load(folder, best, config, env, device)
        wrapped = model.get_env()
        assert wrapped is not None, "loaded with one"
        normalizer = model.get_vec_normalize_env()
        if normalizer is not None:
            # what is played now is no training
            normalizer.training = False
        yield FinishedRun(folder, config, model, wrapped, facts)


def _load(folder: RunFolder, best: bool, config: TrainConfig, env: VecEnv, device: str) -> RecurrentPPO:
    """The model and its normalisation, both from one file, which a run that trains may replace at any moment."""
    for _ in range(ATTEMPTS):
        path = folder.best if best else folder.latest_model()
        try:
            with path.open("rb") as file:
                return RecurrentPPO.load(
                    file, env=normalized_as_saved(env, config, file), device=device, custom_objects=own_classes(config)
                )
        except FileNotFoundError as error:
            if best:
                raise ConfigError(
                    f"{path} is missing: no evaluation during training was due yet; take the last model"
                ) from error
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        # A damaged file, or spaces other than those of the environment.
        except ValueError as error:
            raise ConfigError(f"the model cannot be loaded: {error}") from error
    raise ConfigError(f"{folder.path} is written to faster than it can be read; try again when the run has ended")


def _rendering(config: TrainConfig) -> TrainConfig:
    """The configuration with an environment that draws pictures, where it can."""
    kwargs = {**config.env.kwargs, "render_mode": "rgb_array"}
    env = dataclasses.replace(config.env, kwargs=kwargs)
    try:
        with closing(gymnasium.make(env.id, **kwargs)) as tried:
            tried.reset(seed=0)
            tried.render()
    # what it takes to draw may be missing, a display for instance, or the environment knows no such mode
    except Exception:
        return config
    return dataclasses.replace(config, env=env)


def inspect_run(
    run_dir: Path | str,
    *,
    best: bool = False,
    max_steps: int = 300,
    seed: int | None = None,
    console: Console | None = None,
) -> Episode:
    """Play one episode of a run and draw what the memory does.

    Written are `inspection.png` and, where the environment draws pictures, `inspection.gif` in the run folder, or
    `inspection-best.png` and `inspection-best.gif`.

    Args:
        run_dir: as `train` made it.
        best: take the model of the best evaluation during training instead of the last one.
        max_steps: the episode is cut there.
        seed: of the episode; None takes one that was neither trained nor evaluated on.
        console: told what was written; None tells nobody.

    Raises:
        ConfigError: as for `open_run`.
    """
    folder = RunFolder.find(run_dir)
    paths = (folder.inspection, folder.video)
    picture, video = (path.with_stem(f"{path.stem}-best") if best else path for path in paths)
    with open_run(folder.path, best=best, device="cpu", render=True) as run:
        seed_envs(run.env, environment_seed(run.config.seed, Purpose.INSPECTION) if seed is None else seed)
        episode = record_episode(run.model, run.env, max_steps=max_steps)
        title = f"{run.config.env.id}, memory {run.config.memory.name}, {run.model.num_timesteps:,} steps of training"
        draw_episode(episode, picture, title, gamma=run.model.gamma)
        if episode.frames:
            write_video(run, episode, video)
    if console is not None:
        end = f"{len(episode.rewards)} steps, {episode.ended}, return {episode.total:.2f}"
        drawn = f"video: {video}" if episode.frames else "no video: the environment draws none here"
        said = f"one episode, {end}: {picture}\n{drawn}"
        console.print(said, highlight=False, soft_wrap=True, markup=False)
    return episode


def write_video(run: FinishedRun, episode: Episode, path: Path) -> None:
    """Write the frames of an episode as a GIF, as fast as the task says."""
    # an environment may have no metadata, or none that tells
    told: Any = (getattr(run.env, "metadata", None) or {}).get("render_fps")
    write_gif(episode.frames, path, told or DEFAULT_FPS)


def probe_run(
    run_dir: Path | str,
    *,
    beside: Path | str | None = None,
    best: bool = False,
    episodes: int = 400,
    max_steps: int = 200,
    console: Console | None = None,
) -> list[Probe]:
    """Probe the memory of a run for the hidden variable of its task, and draw `probe.png` into its folder.

    Args:
        run_dir: as `train` made it.
        beside: another run, drawn beside it, such as that of an LSTM.
        best: take the models of the best evaluations during training instead of the last ones.
        episodes: at least so many of each run; half of them train the probes.
        max_steps: later steps of an episode are not probed.
        console: told what was found; None tells nobody.

    Raises:
        ConfigError: as for `open_run`; the task names no hidden variable, or there are too few episodes.
    """
    probes = []
    folders = [RunFolder.find(name) for name in (run_dir, beside) if name is not None]
    for folder in folders:
        with open_run(folder.path, best=best, device="cpu", n_envs=PROBED_COPIES, console=console) as run:
            seed_envs(run.env, environment_seed(run.config.seed, Purpose.INSPECTION))
            try:
                probe = probe_memory(run.model, run.env, episodes=episodes, max_steps=max_steps)
            except ValueError as error:
                raise ConfigError(f"{folder.path} cannot be probed: {error}") from error
            blocks = run.config.memory.settings.get("blocks", "")
            title = f"{run.config.env.id}, {run.config.memory.name} {blocks}".rstrip()
            probes.append((f"{title}, {run.model.num_timesteps:,} steps of training", probe))
    picture = folders[0].probe
    draw_probes(probes, picture)
    if console is not None:
        for title, probe in probes:
            _show_probe(console, title, probe)
        console.print(f"picture: {picture}", highlight=False, soft_wrap=True, markup=False)
    return [probe for _, probe in probes]


def _show_probe(console: Console, title: str, probe: Probe) -> None:
    table = Table(title=f"{title}: {probe.variable}, {probe.episodes} test episodes", title_justify="left")
    table.add_column("read from")
    for column in ("mean over steps", "best", "at step", "last step"):
        table.add_column(column, justify="right")
    for name, accuracy in {**probe.accuracy, "chance": probe.chance}.items():
        best = int(accuracy.argmax())
        cells = (f"{accuracy.mean():.2f}", f"{accuracy[best]:.2f}", str(probe.steps[best]), f"{accuracy[-1]:.2f}")
        table.add_row(name, *cells)
    console.print(table)


def play_run(
    run_dir: Path | str,
    *,
    best: bool = False,
    episodes: int = 5,
    mode: str | None = None,
    record: Path | None = None,
    memory: bool = False,
    deterministic: bool = True,
    seed: int | None = None,
    console: Console | None = None,
) -> EvaluationResult:
    """Play episodes of a run to be looked at, or record them.

    Args:
        run_dir: as `train` made it.
        best: take the model of the best evaluation during training instead of the last one.
        episodes: how many.
        mode: "human" (a window), "ansi" (text on the console) or "none"; None: a window where there is a display and
            the task has one, else text where it has that.
        record: the file of a video of all episodes, .mp4 (by gymnasium's `RecordVideo`) or .gif.
        memory: draw beside every frame of the video how full the parts of the memory are.
        deterministic: the mode of the policy instead of a sample.
        seed: of the episodes; None takes some that were neither trained nor evaluated on.
        console: shows text, and the return of every episode.

    Raises:
        ConfigError: as for `open_run`; the task draws nothing of the kind that is asked for, or a package is missing.
    """
    folder = RunFolder.find(run_dir)
    config = folder.load_config()
    console = console or Console(quiet=True)
    modes = _render_modes(config)
    if record is not None:
        mode = "rgb_array"
    elif mode is None:
        window = "human" in modes and (sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY")))
        mode = "human" if window else "ansi" if "ansi" in modes else "none"
    if mode not in (*modes, "none"):
        raise ConfigError(f"{config.env.id} cannot be shown as {mode!r}: it draws {sorted(modes) or 'nothing'}")
    if record is not None and record.suffix not in (".mp4", ".gif"):
        raise ConfigError(f"{record} is neither .mp4 nor .gif, which can be recorded")
    if memory and record is None:
        raise ConfigError("the memory is drawn into a video: say where to with --record FILE")
    if record is not None:
        # before anything is played
        record.parent.mkdir(parents=True, exist_ok=True)
    with open_run(folder.path, best=best, render_mode=mode, console=console) as run:
        player = _Remembering(run.model)
        single = run.env.unwrapped
        assert isinstance(single, DummyVecEnv), "an environment here"
        if memory:
            single.envs[0] = MemoryPanel(single.envs[0], player.sizes)
        fps = float((single.envs[0].metadata or {}).get("render_fps") or DEFAULT_FPS)
        filmed = None if record is None else _film(single, record, fps)

        alive = SignOfLife(console, "the agent", episodes)

        def show(finished: int, steps: int) -> None:
            if mode == "ansi":
                console.print(single.envs[0].render(), highlight=False, markup=False)
            else:
                alive(finished, steps)

        shown = environment_seed(run.config.seed, Purpose.INSPECTION) if seed is None else seed
        limit = run.config.eval.max_episode_steps
        try:
            result = evaluate(
                player,
                run.env,
                episodes,
                seed=shown,
                deterministic=deterministic,
                max_episode_steps=limit,
                on_step=show,
            )
        finally:
            # what was filmed until Ctrl-C, too
            if filmed is not None:
                filmed()
    for index, (total, length) in enumerate(zip(result.returns, result.lengths, strict=True)):
        console.print(f"episode {index}: {length} steps, return {total:.2f}", highlight=False, markup=False)
    if record is not None:
        long = f" (the first {MOST_FRAMES:,} frames)" if result.lengths.sum() >= MOST_FRAMES else ""
        console.print(f"video: {record}{long}", highlight=False, soft_wrap=True, markup=False)
    return result


def _render_modes(config: TrainConfig) -> list[str]:
    with closing(make_env(config, 1, config.seed, here=True)) as env:
        return list((env.get_attr("metadata")[0] or {}).get("render_modes", []))


def _film(env: DummyVecEnv, path: Path, fps: float) -> Callable[[], None]:
    """Film what the only environment draws from now on, up to MOST_FRAMES; what is returned writes the file."""
    if path.suffix == ".gif":
        frames: list[np.ndarray] = []
        env.envs[0] = _Filmed(env.envs[0], frames)
        return lambda: write_gif(frames, path, fps) if frames else None
    scratch = TemporaryDirectory()
    # one video of all steps, whatever episodes they belong to
    what: dict[str, Any] = {"step_trigger": lambda step: step == 0, "video_length": MOST_FRAMES, "disable_logger": True}
    try:
        recorder: Any = RecordVideo(env.envs[0], f"{scratch.name}/video", fps=round(fps), **what)
    except gymnasium.error.DependencyNotInstalled as error:
        raise ConfigError(f"{path.name} needs the package moviepy: pip install moviepy, or record a .gif") from error
    env.envs[0] = recorder

    def write() -> None:
        if recorder.recording:
            recorder.stop_recording()
        for video in Path(scratch.name).rglob("*.mp4"):
            write_whole(path, video.read_bytes())
        scratch.cleanup()

    return write


class _Filmed(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Keeps frames, up to MOST_FRAMES."""

    def __init__(self, env: gymnasium.Env[Any, Any], frames: list[np.ndarray]) -> None:
        super().__init__(env)
        self._frames = frames

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        begun = super().reset(**kwargs)
        self._film()
        return begun

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        done = super().step(action)
        self._film()
        return done

    def _film(self) -> None:
        if len(self._frames) < MOST_FRAMES:
            self._frames.append(np.asarray(self.env.render()))


class _Remembering:
    """A model that can be asked for the sizes of the parts of its memory."""

    def __init__(self, model: RecurrentPPO) -> None:
        self._model, self._state = model, cast(tuple[np.ndarray, ...] | None, None)
        self.use_masking = model.use_masking

    def predict(self, observation: Any, *args: Any, **kwargs: Any) -> Any:
        actions, self._state = self._model.predict(observation, *args, **kwargs)
        return actions, self._state

    def sizes(self) -> dict[str, float]:
        """Root mean square of every part, by name."""
        if self._state is None:
            return {}
        policy = self._model.policy
        pair = tuple(torch.from_numpy(part) for part in self._state)
        state = policy._unpack(pair, policy.memory_actor)
        named = zip(leaf_names(state), leaves(state), strict=True)
        return {name: float(leaf.double().square().mean().sqrt()) for name, leaf in named if leaf.numel()}


def export_run(
    run_dir: Path | str,
    path: Path | str | None = None,
    *,
    best: bool = False,
    int8: bool = False,
    console: Console | None = None,
) -> Check | None:
    """Write the policy of a run as an ONNX file, or as C where its name ends in .c, and compare it with torch.

    Args:
        run_dir: as `train` made it.
        path: of the file; None: policy.onnx in the run folder.
        best: take the model of the best evaluation during training instead of the last one.
        int8: of a C file: weights of matrix products as int8.
        console: told what was written; None tells nobody.

    Returns:
        How 200 steps of both compare; None where a C file could not be checked, as there is no compiler.

    Raises:
        ConfigError: as for `open_run`; a package is missing, the file cannot be written, or what it computes differs.
    """
    folder = RunFolder.find(run_dir)
    path = folder.policy if path is None else Path(path)
    as_c = path.suffix.lower() == ".c"
    if int8 and not as_c:
        raise ConfigError(f"int8 is for C files, and {path.name} is none: name a file that ends in .c, or leave it out")
    with open_run(folder.path, best=best, device="cpu") as run, TemporaryDirectory() as scratch:
        # the name of a C file begins the names in it
        unchecked = Path(scratch) / path.name
        try:
            if as_c:
                export_c(run.model, unchecked, int8=int8)
                check = None if compiler() is None else check_c(run.model, unchecked)
                speed = "not compared with torch: there is no C compiler" if check is None else time_c(unchecked)
            else:
                export_onnx(run.model, unchecked)
                check = check_onnx(run.model, unchecked)
                speed = f"a step of {ROWS} environments takes {1e3 * check.step_seconds:.2f} ms"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, unchecked.read_bytes())
        except (ExportError, OSError) as error:
            raise ConfigError(f"{run_dir} cannot be exported to {path}: {error}") from error
    if console is not None:
        said = f"{path}: {path.stat().st_size / 1e3:,.0f} kB; {_comparison(check)}{speed}"
        console.print(said, highlight=False, soft_wrap=True, markup=False)
    return check


def _comparison(check: Check | None) -> str:
    if check is None:
        return ""
    actions = "" if check.same_actions in (None, 1.0) else f", {check.same_actions:.1%} of the actions the same"
    return f"as torch within {check.largest_error:.0e} over 200 steps with resets{actions}; "
