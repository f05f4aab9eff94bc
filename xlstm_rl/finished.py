"""The trained agent of a run folder, loaded to be evaluated, exported or looked into."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from stable_baselines3.common.vec_env import VecEnv

from xlstm_rl.agents import RecurrentPPO
from xlstm_rl.building import evaluation_device, make_env, normalized_as_saved
from xlstm_rl.configs import ConfigError, TrainConfig
from xlstm_rl.export import Check, ExportError, check_onnx, export_onnx
from xlstm_rl.export.onnx_check import ROWS
from xlstm_rl.run_folder import RunFolder


class FinishedRun(NamedTuple):
    """A run folder and what was loaded from it."""

    folder: RunFolder
    config: TrainConfig
    model: RecurrentPPO
    env: VecEnv
    """One copy of the environment, normalised as saved."""


@contextmanager
def open_run(
    run_dir: Path,
    *,
    best: bool = False,
    device: str | None = None,
    render: bool = False,
    console: Console | None = None,
) -> Iterator[FinishedRun]:
    """Load the last model of a run folder.

    Args:
        run_dir: as `train` made it.
        best: take the model of the best evaluation during training instead of the last one.
        device: as torch knows it, or "auto"; None takes the configured one, or the CPU if this machine lacks it.
        render: make the environment draw pictures.
        console: told when the configured device is not taken; None tells nobody.

    Raises:
        ConfigError: this is no run folder, it holds no model, the model or its normalisation statistics are missing or
            damaged, or this machine has no such device.
    """
    folder = RunFolder(run_dir)
    config = folder.load_config()
    path = folder.best if best else folder.latest_model()
    if not path.is_file():
        raise ConfigError(f"{path} is missing: no evaluation during training was due yet; take the last model")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = evaluation_device(config.device, device, console or Console(quiet=True))
    with closing(make_env(config, 1, config.seed, here=True)) as env:
        env = normalized_as_saved(env, config, path)
        try:
            model = RecurrentPPO.load(path, env=env, device=device)
        # A damaged file, or spaces other than those of the environment.
        except ValueError as error:
            raise ConfigError(f"the model cannot be loaded: {error}") from error
        yield FinishedRun(folder, config, model, env)


def export_run(run_dir: Path, path: Path | None = None, *, best: bool = False, console: Console | None = None) -> Check:
    """Write the policy of a run as an ONNX file and compare it with torch for 200 steps.

    Args:
        run_dir: as `train` made it.
        path: of the file; None: policy.onnx in the run folder.
        best: take the model of the best evaluation during training instead of the last one.
        console: told what was written; None tells nobody.

    Raises:
        ConfigError: as for `open_run`; a package is missing, the file cannot be written, or what it computes differs.
    """
    path = run_dir / "policy.onnx" if path is None else path
    with open_run(run_dir, best=best, device="cpu") as run:
        try:
            export_onnx(run.model, path)
            check = check_onnx(run.model, path)
        except (ExportError, OSError) as error:
            raise ConfigError(f"{run_dir} cannot be exported to {path}: {error}") from error
    if console is not None:
        same = f"as torch within {check.largest_error:.0e} over 200 steps with resets"
        speed = f"a step of {ROWS} environments takes {1e3 * check.step_seconds:.2f} ms"
        said = f"{path}: {path.stat().st_size / 1e3:,.0f} kB; {same}; {speed}"
        console.print(said, highlight=False, soft_wrap=True, markup=False)
    return check
