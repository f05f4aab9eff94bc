"""A training run as a library call."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from xlstm_rl.configs import ConfigError, TrainConfig, load, load_file
from xlstm_rl.report import read_returns
from xlstm_rl.training import RunResult, evaluate_run, train

TINY = [
    "total_steps=256",
    "env.n_envs=2",
    "ppo.n_steps=32",
    "ppo.batch_size=64",
    "ppo.n_epochs=1",
    "memory.hidden_size=8",
    "memory.num_heads=2",
    "eval.n_episodes=4",
    "eval.interim_episodes=2",
    "eval.every_steps=128",
    "checkpoint.every_steps=64",
    "checkpoint.keep=2",
]


def tiny(name: str, *overrides: str) -> TrainConfig:
    return load(name, [*TINY, *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(tiny("cue-recall"), tmp_path_factory.mktemp("runs") / "run")


def test_run_folder_holds_everything(run: RunResult) -> None:
    names = {path.name for path in run.folder.iterdir()}
    assert names == {
        "config.yaml",
        "versions.json",
        "returns.csv",
        "curve.png",
        "tensorboard",
        "checkpoints",
        "model.zip",
    }
    assert any((run.folder / "tensorboard").iterdir())


def test_config_of_the_run_is_the_resolved_one(run: RunResult) -> None:
    assert load_file(run.folder / "config.yaml") == tiny("cue-recall")


def test_versions_and_seed_are_noted(run: RunResult) -> None:
    versions = json.loads((run.folder / "versions.json").read_text(encoding="utf-8"))
    assert {"python", "torch", "stable_baselines3", "gymnasium", "xlstm_rl", "platform"} <= set(versions)
    assert versions["seed"] == 0


def test_only_the_last_checkpoints_are_kept(run: RunResult) -> None:
    names = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert names == ["step_0000000192.zip", "step_0000000256.zip"]


def test_returns_hold_training_and_evaluation(run: RunResult) -> None:
    rows = read_returns(run.folder / "returns.csv")
    assert rows == run.rows
    assert [row.step for row in rows if row.kind == "eval"] == [128, 256]
    assert [row.step for row in rows if row.kind == "train"] == [64, 128, 192, 256]


def test_closing_table_has_the_reference_points(run: RunResult) -> None:
    assert [score.agent for score in run.scores] == [
        "trained agent",
        "same agent, memory emptied every step",
        "random actions",
        "best without memory",
        "optimum",
    ]


def test_a_run_folder_is_never_overwritten(run: RunResult) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        train(tiny("cue-recall"), run.folder)


def test_evaluation_of_the_folder_repeats_the_closing_one(run: RunResult) -> None:
    assert evaluate_run(run.folder)[0] == run.scores[0]


def test_evaluation_takes_number_and_seed_of_episodes(run: RunResult) -> None:
    assert evaluate_run(run.folder, n_episodes=3, seed=7)[0].episodes == 3


def test_evaluation_falls_back_to_the_last_checkpoint(run: RunResult, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_bytes((run.folder / "config.yaml").read_bytes())
    checkpoint = run.folder / "checkpoints" / "step_0000000256.zip"
    (tmp_path / "checkpoints" / checkpoint.name).write_bytes(checkpoint.read_bytes())
    assert evaluate_run(tmp_path)[0] == run.scores[0]


def test_evaluation_refuses_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run folder"):
        evaluate_run(tmp_path)


def test_evaluation_refuses_a_run_without_a_model(run: RunResult, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((run.folder / "config.yaml").read_bytes())
    with pytest.raises(ConfigError, match="no model yet"):
        evaluate_run(tmp_path)


def test_same_seed_gives_the_same_run(run: RunResult, tmp_path: Path) -> None:
    again = train(tiny("cue-recall"), tmp_path / "again")
    assert [row.mean_return for row in again.rows] == [row.mean_return for row in run.rows]
    assert again.scores == run.scores


@pytest.mark.parametrize("memory", ["lstm", "gru", "none"])
def test_baseline_memories_train(memory: str, tmp_path: Path) -> None:
    result = train(tiny("cue-recall", f"memory.name={memory}", "checkpoint.every_steps=null"), tmp_path / "run")
    assert result.scores[0].episodes == 4


def test_normalisation_is_saved_and_used_again(tmp_path: Path) -> None:
    config = tiny("pendulum-no-velocity", "env.normalize_observation=true", "total_steps=128", "eval.every_steps=null")
    result = train(config, tmp_path / "run")
    assert (tmp_path / "run" / "model.normalizer.json").is_file()
    assert evaluate_run(tmp_path / "run")[0] == result.scores[0]


def test_environments_run_in_processes_of_their_own(tmp_path: Path) -> None:
    config = tiny("cue-recall", "env.vec=subproc", "total_steps=64", "eval.every_steps=null")
    assert train(config, tmp_path / "run").model.is_file()


def test_success_follows_from_the_return_where_the_task_does_not_say(tmp_path: Path) -> None:
    result = train(tiny("cartpole-no-velocity", "eval.success_return=1", "eval.every_steps=null"), tmp_path / "run")
    assert result.scores[0].success == 1.0


def test_wrong_environment_argument_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="corridor_lenght"):
        train(tiny("tmaze", "env.kwargs.corridor_lenght=3"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_progress_is_printed(tmp_path: Path) -> None:
    stream = io.StringIO()
    train(tiny("cue-recall"), tmp_path / "run", console=Console(file=stream, width=120))
    text = stream.getvalue()
    assert "steps/s" in text
    assert "evaluation: return" in text
    assert "trained agent" in text
    assert str(tmp_path / "run" / "model.zip") in text


def test_damaged_model_is_refused_by_name(tmp_path: Path) -> None:
    folder = train(tiny("cue-recall", "total_steps=64", "eval.every_steps=null"), tmp_path / "run").folder
    model = folder / "model.zip"
    model.write_bytes(model.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*model\.zip"):
        evaluate_run(folder)
