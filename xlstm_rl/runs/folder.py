"""The folder of a run: what lies where, written so that an interruption leaves no half file."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy
import sb3_contrib
import stable_baselines3
import torch
import yaml

from xlstm_rl._version import __version__
from xlstm_rl.agents.checkpoint import make_folder, remove_unfinished, write_whole
from xlstm_rl.agents.parallel import Ranks
from xlstm_rl.configs import ConfigError, TrainConfig, dump, left_to_defaults, load
from xlstm_rl.configs.hub_runs import fetch_run, is_in_hub
from xlstm_rl.configs.validation import parse_yaml
from xlstm_rl.envs.wrappers import WRAPPERS
from xlstm_rl.runs.lock import LockedError, exclusive

# The last line of config.yaml.
CHECKSUM_NAME = b"xlstm_rl-sha256"
CHECKSUM = b"# %b of the lines above: %%b\n" % CHECKSUM_NAME


class RunFolder:
    """Paths of a run.

    `config.yaml` the resolved configuration, `versions.json` what it ran with, `returns.csv`, `curve.png`,
    `tensorboard/` events, `checkpoints/` to resume from, `best.zip` the model of the best evaluation during training,
    `model.zip` the last model of a run that ended, each with the normalisation that it was trained with. `policy.onnx`
    the exported policy, `inspection.png` and `inspection.gif` an episode looked into (`inspection-best` that of the
    best model), `probe.png` what can be read from the memory, `lock` the process that trains, or trained last,
    `trackers.json` under which names trackers know the run.
    The last line of `config.yaml` is a checksum of the others.

    Of several processes that train one agent, rank 0 writes all of that, and every other one its own checkpoints to
    `checkpoints/rankN/`.

    Args:
        path: of the folder.
        group: the processes that train in it together; None for this one.
    """

    def __init__(self, path: Path, group: Ranks | None = None) -> None:
        self.path = path
        self.group = group or Ranks()
        self.config = path / "config.yaml"
        self.versions = path / "versions.json"
        self.returns = path / "returns.csv"
        self.curve = path / "curve.png"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        if self.group.rank > 0:
            self.checkpoints /= f"rank{self.group.rank}"
        self.model = path / "model.zip"
        self.best = path / "best.zip"
        self.policy = path / "policy.onnx"
        self.inspection = path / "inspection.png"
        self.video = path / "inspection.gif"
        self.probe = path / "probe.png"
        self.lock = path / "lock"
        self.trackers = path / "trackers.json"

    @classmethod
    def find(cls, run: Path | str) -> RunFolder:
        """The folder of a run that exists; one named as hf://user/repo is fetched, if it was not before.

        Raises:
            ConfigError: it cannot be fetched, or opening it would import or call what is not of this package.
        """
        path = fetch_run(run)
        folder = cls(path)
        if is_in_hub(run):
            names = sorted(set(_foreign_names(folder.config)))
            if names:
                raise ConfigError(
                    f"{run} would run code that its author chose, {', '.join(names)}: read {folder.config}, and open "
                    f"the folder {path} if you trust it"
                )
        return folder

    @classmethod
    def create(
        cls, path: Path, config: TrainConfig, *, versions: Mapping[str, str] | None = None, numbered: bool = False
    ) -> RunFolder:
        """Make a new folder with the configuration and the versions; of several runs at once, each gets its own.

        Args:
            path: of the folder; must not exist or be empty.
            config: of the run.
            versions: of packages, beside those that every run notes.
            numbered: if `path` is taken, take the first free one of `path`-2, `path`-3 and so on.

        Raises:
            ConfigError: the folder is in use, and not `numbered`, for nothing is ever overwritten; it cannot be
                written; or the configuration holds values that YAML cannot.
        """
        try:
            dump(config)
        except yaml.YAMLError as error:
            raise ConfigError(f"the configuration cannot be written as YAML: {error}; give plain values") from error
        try:
            folder = cls._claim_numbered(path) if numbered else cls._claim(path)
            if folder is None:
                raise ConfigError(f"run folder {path} exists already and is kept; choose another --run-dir")
            folder.write_config(config)
            noted = {**_versions(config), **(versions or {})}
            write_whole(folder.versions, (json.dumps(noted, indent=2) + "\n").encode())
        except OSError as error:
            raise ConfigError(
                f"run folder {path} cannot be written: {error.strerror}; choose another --run-dir"
            ) from error
        return folder

    @classmethod
    def _claim(cls, path: Path) -> RunFolder | None:
        """The folder made, or None if it is taken."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            return None
        make_folder(path)
        folder = cls(path)
        try:
            # Of several processes only one can make it.
            folder.checkpoints.mkdir()
        except FileExistsError:
            return None
        return folder

    @classmethod
    def _claim_numbered(cls, path: Path) -> RunFolder:
        candidates = itertools.chain([path], (path.with_name(f"{path.name}-{number}") for number in itertools.count(2)))
        return next(folder for folder in map(cls._claim, candidates) if folder is not None)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Keep all others from training in this folder; the end of the process ends that too, `kill -9` included.

        Raises:
            ConfigError: another process trains in it, or it cannot be written.
        """
        with ExitStack() as stack:
            try:
                if self.group.rank == 0:
                    stack.enter_context(exclusive(self.lock))
                else:
                    make_folder(self.checkpoints)
            except LockedError as error:
                raise ConfigError(
                    f"{error} is training in run folder {self.path}; wait until it has ended, or end it"
                ) from error
            except OSError as error:
                raise ConfigError(f"run folder {self.path} cannot be written: {error.strerror}") from error
            remove_unfinished(self.checkpoints, ["*"])
            if self.group.rank == 0:
                # pictures and exports may be being written by others
                mine = (self.config, self.versions, self.returns, self.curve, self.model, self.best)
                remove_unfinished(self.path, [path.name for path in mine])
            yield

    def load_config(self, overrides: Sequence[str] = ()) -> TrainConfig:
        """The configuration of the run, changed by overrides.

        Raises:
            ConfigError: this is no run folder, or an override is wrong.
        """
        if not self.config.is_file():
            raise ConfigError(f"{self.path} is no run folder: it holds no config.yaml; give a folder that train made")
        self._check_config()
        return load(str(self.config), overrides)

    def write_config(self, config: TrainConfig) -> None:
        """Replace the configuration of the run."""
        text = dump(config).encode()
        write_whole(self.config, text + CHECKSUM % hashlib.sha256(text).hexdigest().encode())

    def _check_config(self) -> None:
        """A checkpoint is sound in itself; of the configuration only its checksum can tell."""
        try:
            content = self.config.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read {self.config}: {error.strerror}") from error
        if CHECKSUM_NAME not in content:
            self._check_whole(content)
            return
        text, _, line = content.removesuffix(b"\n").rpartition(b"\n")
        if line + b"\n" != CHECKSUM % hashlib.sha256(text + b"\n").hexdigest().encode() or content[-1:] != b"\n":
            raise ConfigError(
                f"{self.config} is damaged or was changed after the run had written it: put it back, or remove its "
                "last line to take it as it is"
            )

    def _check_whole(self, content: bytes) -> None:
        """Without its checksum a configuration was changed on purpose, or its end is lost."""
        lacking = left_to_defaults(self.config)
        if lacking or content[-1:] != b"\n":
            lacks = f"lacks {', '.join(lacking[:5])}{' and more' if lacking[5:] else ''}"
            lost = lacks if lacking else "ends within a line"
            raise ConfigError(
                f"{self.config} has no checksum line and {lost}, as a file does that was cut off: put it back, or "
                "write all settings into it, as `xlstm-rl show` prints them"
            )

    def latest_model(self) -> Path:
        """The last model, else the last checkpoint.

        Raises:
            ConfigError: there is none yet.
        """
        if self.model.is_file():
            return self.model
        checkpoints = self.list_checkpoints()
        if not checkpoints:
            raise ConfigError(f"{self.path} holds no model yet; let the run reach its first checkpoint")
        return checkpoints[-1]

    def list_checkpoints(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("step_*.zip"))

    def save(self, model: Any, path: Path) -> None:
        """Write the model of rank 0 with its normalisation; the file appears whole or not at all."""
        if self.group.rank == 0:
            model.save(path)

    def has_checkpoint(self, model: Any) -> bool:
        """Whether `save_checkpoint` was called with the model as it is."""
        return self._checkpoint(model).is_file()

    def _checkpoint(self, model: Any) -> Path:
        return self.checkpoints / f"step_{model.checkpoint_step:010d}.zip"

    def save_checkpoint(self, model: Any, keep: int, notes: Mapping[str, Any]) -> Path:
        """Write a checkpoint to resume from, and remove `model.zip` and all checkpoints but the last `keep`.

        It is complete once that of rank 0 is there, which is written after those of all other ranks; nothing older is
        removed before.

        Args:
            model: after a rollout; see `RecurrentPPO.save_checkpoint`.
            keep: number of checkpoints.
            notes: given back with the model.
        """
        path, notes = self._checkpoint(model), {**notes, "world_size": self.group.world_size}
        if self.group.rank > 0:
            model.save_checkpoint(path, notes)
        self.group.barrier()
        if self.group.rank == 0:
            model.save_checkpoint(path, notes)
        self.group.barrier()
        for old in self.list_checkpoints()[:-keep]:
            # somebody may have removed it, or hold it open where the system then keeps it
            with contextlib.suppress(FileNotFoundError, PermissionError):
                old.unlink()
        if self.group.rank == 0:
            # that of a run before it was resumed is older than the checkpoint
            self.model.unlink(missing_ok=True)
        return path


def _foreign_names(file: Path) -> Iterator[str]:
    """What of a configuration names modules, or wrappers, some of which write files, that are not of this package."""
    values = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(values, dict):
        return
    # of no use to who opens a run
    left = {key: value for key, value in values.items() if key not in ("description", "init", "logging")}
    for text in _texts(left):
        if re.search(r"\S:\S", text) and not text.startswith("xlstm_rl:"):
            yield text
    env = values.get("env")
    wrappers = env.get("wrappers") if isinstance(env, dict) else None
    yield from (str(name) for name in wrappers or () if name not in WRAPPERS)


def _texts(values: Any) -> Iterator[str]:
    """Keys and values of nested ones."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict | list):
        for value in values:
            yield from _texts(value)
        if isinstance(values, dict):
            yield from _texts([*values.values()])


def default_run_path(name: str, seed: int, parent: Path = Path("runs")) -> Path:
    """Where a run lies that was given no folder, named after `name`, the seed and the time."""
    return parent / f"{name.replace('/', '-').replace(':', '-')}-seed{seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def _versions(config: TrainConfig) -> dict[str, Any]:
    return {
        "xlstm_rl": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "stable_baselines3": stable_baselines3.__version__,
        "sb3_contrib": sb3_contrib.__version__,
        "gymnasium": gymnasium.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "command": sys.argv,
        "seed": config.seed,
    }
