"""Interrupted runs of the command line go on as if nothing had happened."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from xlstm_rl import cli
from xlstm_rl.agents import RecurrentPPO
from xlstm_rl.configs import ConfigError, TrainConfig, load, load_file
from xlstm_rl.runs.callbacks import EpisodeRecorder
from xlstm_rl.runs.folder import RunFolder
from xlstm_rl.runs.open import open_run
from xlstm_rl.runs.returns import read_returns
from xlstm_rl.runs.train import RunResult, TrainingStoppedError, evaluate_run, resume, train

ROOT = Path(__file__).parents[2]
# Rollouts of 96 steps, checkpoints and evaluations at other steps, statistics and schedules that change.
SMALL = [
    *("env.n_envs=3", "ppo.n_steps=32", "ppo.batch_size=48", "ppo.n_epochs=2", "memory.hidden_size=8"),
    *("eval.n_episodes=3", "eval.interim_episodes=2", "eval.every_steps=150", "checkpoint.every_steps=90"),
]


def small(*overrides: str) -> TrainConfig:
    return load("cartpole-no-velocity", [*SMALL, "total_steps=576", "checkpoint.keep=20", *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(small(), tmp_path_factory.mktemp("runs") / "run")


def rows(folder: Path) -> list[Any]:
    """Without the time they took."""
    return [row._replace(seconds=0.0) for row in read_returns(folder / "returns.csv")]


def weights(model: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(model) as file:
        return {name: file.read(name) for name in file.namelist() if name.startswith(("policy", "normalizer"))}


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    names = [name for name in accumulator.Tags()["scalars"] if not name.startswith("time/")]
    return {name: [(event.step, event.value) for event in accumulator.Scalars(name)] for name in names}


def assert_same_runs(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    assert weights(one / "model.zip") == weights(other / "model.zip")
    assert weights(one / "best.zip") == weights(other / "best.zip")
    assert events(one) == events(other)


@pytest.mark.parametrize("kept", [0, 3, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 2, 4, 5, 6))])
def test_run_cut_after_any_checkpoint_becomes_the_same_run(run: RunResult, kept: int, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("*.zip"))
    assert len(checkpoints) == 6
    for path in checkpoints[kept:]:
        path.unlink()
    (tmp_path / "run" / "model.zip").unlink()
    # what a killed process may leave
    with (tmp_path / "run" / "returns.csv").open("a") as file:
        file.write("train,600,1.")
    result = resume(tmp_path / "run")
    assert_same_runs(run.folder, tmp_path / "run")
    assert result.scores == run.scores
    seconds = [row.seconds for row in result.rows]
    assert seconds == sorted(seconds)


@pytest.mark.slow
def test_run_with_memory_inputs_in_processes_becomes_the_same_run(tmp_path: Path) -> None:
    inputs = ["env.memory_inputs=[action,reward,start]", "env.vec=subproc", "env.n_envs=2", "ppo.batch_size=32"]
    folder = train(small(*inputs, "total_steps=256"), tmp_path / "run").folder
    shutil.copytree(folder, tmp_path / "cut")
    sorted((tmp_path / "cut" / "checkpoints").glob("*.zip"))[-1].unlink()
    resume(tmp_path / "cut")
    assert_same_runs(folder, tmp_path / "cut")


def test_torn_and_foreign_checkpoints_are_told_and_the_one_before_is_used(run: RunResult, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    *_, third, second, last = sorted((tmp_path / "run" / "checkpoints").glob("*.zip"))
    last.write_bytes(last.read_bytes()[:-200])
    shutil.copy(run.folder / "model.zip", second)
    stream = io.StringIO()
    resume(tmp_path / "run", console=Console(file=stream, width=500))
    assert f"{last.name} cannot be used: {last} is torn" in stream.getvalue()
    assert f"{second.name} cannot be used: {second} holds an agent without its training run" in stream.getvalue()
    assert f"goes on after {int(third.stem.removeprefix('step_'))} steps" in stream.getvalue()
    assert_same_runs(run.folder, tmp_path / "run")


def test_run_without_a_usable_checkpoint_is_refused(run: RunResult, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*.zip"):
        path.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no usable checkpoint left: step_0000000096\.zip cannot be used"):
        resume(tmp_path / "run")


def test_run_can_be_made_longer(run: RunResult, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    result = resume(tmp_path / "run", ["total_steps=672"])
    assert result.rows[-1].step == 672
    assert load_file(tmp_path / "run" / "config.yaml").total_steps == 672
    stream = io.StringIO()
    resume(tmp_path / "run", console=Console(file=stream, width=200))
    assert "all 672 are done, and total_steps=N goes on for longer" in stream.getvalue()
    with pytest.raises(ConfigError, match=r"'seed=3' cannot be changed when resuming; total_steps=N can"):
        resume(tmp_path / "run", ["seed=3"])
    with pytest.raises(ConfigError, match="total_steps=96 is below the 672 steps that are done"):
        resume(tmp_path / "run", ["total_steps=96"])
    assert load_file(tmp_path / "run" / "config.yaml").total_steps == 672


def test_run_shorter_than_the_checkpoints_are_apart_can_be_made_longer(tmp_path: Path) -> None:
    settings = ["checkpoint.every_steps=50000", "ppo.lr_schedule=constant"]
    whole = train(small("total_steps=288", *settings), tmp_path / "whole").folder
    train(small("total_steps=192", *settings), tmp_path / "run")
    resume(tmp_path / "run", ["total_steps=288"])
    assert rows(tmp_path / "run") == rows(whole)
    assert weights(tmp_path / "run" / "model.zip") == weights(whole / "model.zip")


def test_killed_resumption_leaves_its_newest_checkpoint_as_the_model(
    run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(Path(shutil.copytree(run.folder, tmp_path / "run")))

    save = RunFolder.save

    def killed_at_the_end(self: RunFolder, model: RecurrentPPO, path: Path) -> None:
        if path == self.model:
            raise KeyboardInterrupt
        save(self, model, path)

    monkeypatch.setattr(RunFolder, "save", killed_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        resume(folder.path, ["total_steps=672"])
    monkeypatch.undo()
    assert folder.latest_model() == folder.list_checkpoints()[-1]
    with open_run(folder.path) as opened:
        assert opened.model.num_timesteps == 672


def test_finished_run_without_checkpoints_is_not_overwritten(tmp_path: Path) -> None:
    run = train(small("total_steps=96", "checkpoint.every_steps=null"), tmp_path / "run")
    before = run.model.read_bytes(), run.folder.joinpath("returns.csv").read_bytes()
    with pytest.raises(ConfigError, match=r"is finished and has no checkpoint to go on from.*every_steps=None"):
        resume(tmp_path / "run", ["total_steps=192"])
    assert (run.model.read_bytes(), run.folder.joinpath("returns.csv").read_bytes()) == before
    assert load_file(tmp_path / "run" / "config.yaml").total_steps == 96


def test_without_replay_new_episodes_start(tmp_path: Path) -> None:
    train(small("checkpoint.replay=false", "total_steps=96"), tmp_path / "run")
    stream = io.StringIO()
    resume(tmp_path / "run", ["total_steps=192"], console=Console(file=stream, width=500))
    assert "all environments start new episodes: their state was not noted" in stream.getvalue()


def test_best_model_is_that_of_the_best_evaluation(run: RunResult) -> None:
    returns = {row.mean_return: row.step for row in reversed(run.rows) if row.kind == "eval"}
    assert RecurrentPPO.load(run.folder / "best.zip").num_timesteps == returns[max(returns)]
    assert evaluate_run(run.folder, best=True)[0].episodes == 3
    assert cli.main(["evaluate", str(run.folder), "--best"]) == 0


def test_best_model_that_is_not_there_yet_is_named(run: RunResult, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "best.zip").unlink()
    with pytest.raises(ConfigError, match=r"best\.zip is missing"):
        evaluate_run(tmp_path / "run", best=True)


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "xlstm_rl", "train", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"},
    )


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals for processes")
@pytest.mark.parametrize("kind", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_process_that_is_ended_and_resumed_makes_the_same_run(kind: signal.Signals, tmp_path: Path) -> None:
    longer = [*SMALL, "total_steps=2880", "checkpoint.keep=2", "eval.every_steps=1000"]
    killed = tmp_path / "killed"
    process = start("cartpole-no-velocity", *longer, "--run-dir", str(killed))
    # in the middle of whatever it does then
    while len(list((killed / "checkpoints").glob("*.zip"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(0.13)
    process.send_signal(kind)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (-kind if kind == signal.SIGKILL else 128 + kind), error
    assert read_returns(killed / "returns.csv")[-1].step < 2880
    assert cli.main(["train", "--resume", str(killed)]) == 0
    whole = train(load("cartpole-no-velocity", longer), tmp_path / "whole").folder
    assert_same_runs(whole, killed)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals for processes")
def test_run_that_is_interrupted_within_a_rollout_becomes_the_same_run(
    run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = EpisodeRecorder._on_step

    def interrupted(self: EpisodeRecorder) -> bool:
        # an evaluation is due at 300, and done after the rollout
        if self.num_timesteps == 303:
            signal.raise_signal(signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(EpisodeRecorder, "_on_step", interrupted)
    stopped = train(small(), tmp_path / "run")
    assert stopped.interrupted_by == signal.SIGTERM
    assert sorted((tmp_path / "run" / "checkpoints").glob("*.zip"))[-1].name == "step_0000000288.zip"
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert_same_runs(run.folder, tmp_path / "run")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals for processes")
@pytest.mark.parametrize("updates", [0, 3, 5])
def test_run_that_is_interrupted_within_an_update_becomes_the_same_run(
    updates: int, run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, done = RecurrentPPO.gradient_step, []

    def interrupted(self: RecurrentPPO, explain: Any) -> bool:
        done.append(self.num_timesteps)
        # the second of the four minibatches of an update
        if len(done) == 4 * updates + 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, explain)

    monkeypatch.setattr(RecurrentPPO, "gradient_step", interrupted)
    stopped = train(small(), tmp_path / "run")
    assert stopped.interrupted_by == signal.SIGINT and len(done) == 4 * updates + 2
    assert (tmp_path / "run" / "checkpoints" / f"step_{96 * updates:010d}.zip").is_file()
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert_same_runs(run.folder, tmp_path / "run")


def test_run_that_is_alive_in_another_process_is_not_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alive = tmp_path / "alive"
    process = start("cartpole-no-velocity", *SMALL, "total_steps=1_000_000", "--run-dir", str(alive))
    try:
        while not list((alive / "checkpoints").glob("*.zip")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        assert cli.main(["train", "--resume", str(alive)]) == 2
        said = capsys.readouterr().err
        assert f"process {process.pid} on " in said
        assert "is training in run folder" in said
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate(timeout=60)


@pytest.mark.parametrize("arguments", [["tmaze", "--resume", "run"], ["--resume", "run", "--run-dir", "other"], []])
def test_wrong_use_of_resume_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *arguments])
    assert caught.value.code == 2


def test_folder_without_a_run_cannot_be_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of file sizes")
def test_full_disk_keeps_every_file_whole(tmp_path: Path) -> None:
    train(small("total_steps=192"), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.zip")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # from here on files end in the middle, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
    try:
        with pytest.raises(
            TrainingStoppedError, match=r"(?s)stopped after 288 steps: .*File too large.*192\.zip is kept"
        ):
            resume(tmp_path / "run", ["total_steps=576"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.zip")} == before
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    resume(tmp_path / "run")
    whole = train(small(), tmp_path / "whole").folder
    assert rows(whole)[-1].step == rows(tmp_path / "run")[-1].step


def test_full_disk_is_told_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    run_dir = tmp_path / "run"
    # the disk is full once the folder is there
    monkeypatch.setattr("xlstm_rl.runs.folder.write_whole", Path.write_bytes)
    monkeypatch.setattr("xlstm_rl.runs.folder.make_folder", Path.mkdir)
    assert cli.main(["train", "cartpole-no-velocity", *SMALL, "--run-dir", str(run_dir)]) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "there is no checkpoint yet" in error
    assert f"xlstm-rl train --resume {run_dir}" in error


def test_a_run_whose_rate_is_0_from_its_first_update_on_says_so(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=400)
    late = ["ppo.lr_schedule=late", "eval.every_steps=null", "checkpoint.every_steps=96"]
    train(small(*late, "total_steps=96"), tmp_path / "run", console=console)
    assert stream.getvalue().count("nothing was learnt: ppo.lr_schedule='late' is at its end") == 1
    # and so does every round of one rollout more
    resume(tmp_path / "run", ["total_steps=192"], console=console)
    assert stream.getvalue().count("nothing was learnt") == 2
    # the last rollout of a longer run is the end of its schedule
    train(small(*late, "total_steps=192"), tmp_path / "whole", console=console)
    (tmp_path / "whole" / "checkpoints" / "step_0000000192.zip").unlink()
    resume(tmp_path / "whole", console=console)
    assert stream.getvalue().count("nothing was learnt") == 2
