"""Numbers, settings and pictures of a run reach the trackers, of one run in one place; callbacks by import path."""

from __future__ import annotations

import importlib
import json
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from xlstm_rl.configs import ConfigError, load
from xlstm_rl.runs import trackers
from xlstm_rl.runs.build import own_callbacks
from xlstm_rl.runs.train import resume, train

SMALL = [
    *("total_steps=1024", "ppo.n_steps=32", "ppo.batch_size=256", "ppo.n_epochs=1", "env.n_envs=8"),
    *("eval.every_steps=512", "eval.n_episodes=4", "eval.interim_episodes=4", "checkpoint.every_steps=512"),
    "memory.hidden_size=8",
]


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of a store in a file."""
    module = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    return module.MlflowClient()


def runs_of(client: Any) -> list[Any]:
    return list(client.search_runs([client.get_experiment_by_name("mine").experiment_id]))


# of SQLAlchemy and of MLflow themselves
@pytest.mark.filterwarnings("ignore")
def test_mlflow_gets_everything_and_a_run_that_goes_on_is_the_same(mlflow: Any, tmp_path: Path) -> None:
    overrides = (*SMALL, "logging.trackers=[mlflow]", "logging.project=mine", "logging.video_episodes=1")
    train(load("tmaze", overrides), tmp_path / "run")
    (first,) = runs_of(mlflow)
    name = first.info.run_id
    assert (first.info.run_name, first.info.status) == ("run", "FINISHED")
    assert first.data.params["memory.settings.hidden_size"] == "8"
    assert first.data.params["ppo.n_steps"] == "32"
    assert {metric.step for metric in mlflow.get_metric_history(name, "train/loss")} == {512, 1024}
    assert [metric.step for metric in mlflow.get_metric_history(name, "eval/mean_reward")][-1] == 1024
    assert {file.path for file in mlflow.list_artifacts(name)} == {"curve.png", "episodes.gif"}
    finals = {key for key in first.data.metrics if key.startswith("final/")}
    assert {"final/trained agent", "final/same agent memory emptied every step"} <= finals, finals
    # and no events besides
    assert not any((tmp_path / "run").glob("tensorboard/*"))
    resume(tmp_path / "run", ["total_steps=1536"])
    (again,) = runs_of(mlflow)
    assert again.info.run_id == name
    assert [metric.step for metric in mlflow.get_metric_history(name, "train/loss")][-1] == 1536


@pytest.mark.filterwarnings("ignore")
def test_run_that_fails_is_told_as_failed(mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no space for dreams")

    monkeypatch.setattr("xlstm_rl.runs.callbacks.PeriodicEvaluation._act", broken)
    with pytest.raises(RuntimeError, match="dreams"):
        train(load("tmaze", (*SMALL, "logging.trackers=[mlflow]", "logging.project=mine")), tmp_path / "run")
    assert [run.info.status for run in runs_of(mlflow)] == ["FAILED"]


def wandb_records(file: Path) -> Iterator[Any]:
    """What an offline run wrote: protocol buffers in the log format of LevelDB, after 7 bytes of its own."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        # whole, first, middle, last
        if kind in (1, 4):
            yield messages.Record.FromString(parts)
            parts = b""


def test_wandb_offline_keeps_numbers_and_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    overrides = (*SMALL, "logging.trackers=[tensorboard,wandb]", "logging.project=mine")
    train(load("tmaze", overrides), tmp_path / "run")
    identity = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    # as a run goes on; a second part of one in the same process is now and then left empty by the package's own service
    command = [sys.executable, "-m", "xlstm_rl", "train", "--resume", str(tmp_path / "run"), "total_steps=1536"]
    subprocess.run(command, check=True, capture_output=True)
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    assert len(files) == 2
    assert any((tmp_path / "run").glob("tensorboard/events*"))
    steps, settings, pictures = [], set(), False
    for record in (record for file in files for record in wandb_records(file)):
        values = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
        if "train/loss" in values:
            steps.append(int(values["steps"]))
        pictures |= any(key.startswith("curve") for key in values)
        settings |= {item.key for item in record.run.config.update}
    assert steps[-1] == 1536
    assert 1024 in steps
    assert {"ppo", "memory", "env"} <= settings
    assert pictures


class Grumbling:
    """A tracker that fails after some calls."""

    identity = "x"
    calls = 0

    def __init__(self, *_: Any) -> None:
        pass

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        Grumbling.calls += 1
        raise ConnectionError("the server is away")

    def show(self, name: str, file: Path) -> None:
        raise AssertionError("asked again")

    def end(self, *, failed: bool) -> None:
        raise AssertionError("asked again")


def test_tracker_that_fails_is_told_once_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Grumbling)
    monkeypatch.setattr(trackers, "check_trackers", lambda _: None)
    monkeypatch.setattr("xlstm_rl.runs.train.check_trackers", lambda _: None)
    with pytest.warns(UserWarning, match="mlflow failed, and the run goes on without it: the server is away"):
        result = train(load("tmaze", (*SMALL, "logging.trackers=[mlflow]")), tmp_path / "run")
    assert (result.scores != [], Grumbling.calls) == (True, 1)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_package_that_is_missing_is_named_before_anything_is_made(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"pip install 'xlstm_rl\[{name}\]'"):
        train(load("tmaze", (*SMALL, f"logging.trackers=[{name}]")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_callbacks_by_import_path_take_part(tmp_path: Path) -> None:
    stop = "stable_baselines3.common.callbacks:StopTrainingOnMaxEpisodes"
    config = load("tmaze", (*SMALL, "total_steps=100000", f'logging.callbacks={{"{stop}": {{max_episodes: 2}}}}'))
    result = train(config, tmp_path / "run")
    assert result.rows[-1].step < 2000
    assert result.scores


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ("{not_there:Callback: {}}", "module 'not_there' .* cannot be imported"),
        ("{json:dumps: {}}", "'json:dumps' is no callback of Stable-Baselines3"),
        ("{Callback: {}}", "name a class as module:Class"),
        (
            '{"stable_baselines3.common.callbacks:StopTrainingOnMaxEpisodes": {episodes: 3}}',
            "cannot be made of .*episodes",
        ),
    ],
)
def test_what_is_no_callback_is_refused_before_anything_is_made(callbacks: str, message: str, tmp_path: Path) -> None:
    config = load("tmaze", (*SMALL, f"logging.callbacks={callbacks}"))
    with pytest.raises(ConfigError, match=message):
        own_callbacks(config)
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
