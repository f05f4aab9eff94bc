"""Tuning gives every memory the same number of trials, goes on where it stopped, and what it finds can be used."""

from __future__ import annotations

import errno
import json
import shlex
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from signal import SIGTERM
from statistics import fmean
from typing import Any

import optuna
import pytest
import yaml

from benchmarks import tune
from benchmarks.tuning_spaces import MEMORIES, SHARED, Log
from xlstm_rl.bench.plan import score
from xlstm_rl.configs import load, load_file
from xlstm_rl.memory import make_memory
from xlstm_rl.runs.build import read_facts
from xlstm_rl.runs.lock import exclusive
from xlstm_rl.runs.train import TrainingStoppedError, train

SPEC = """
tasks:
  parity-3: {base: parity, set: {env.kwargs.length: 3}}
agents: {xlstm: {}}
set:
  total_steps: 320
  env.n_envs: 2
  ppo.n_steps: 32
  ppo.batch_size: 64
  eval.interim_episodes: 7
  eval.n_episodes: 4
  eval.n_envs: 2
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spec") / "tiny.yaml"
    path.write_text(SPEC, encoding="utf-8")
    return path


def run(spec: Path, out: Path, trials: int, *further: str, memories: tuple[str, ...] = ("lstm",)) -> int:
    words = ["--spec", str(spec), "--out", str(out), "--trials", str(trials), "--memories", *memories]
    return tune.main([*words, "--workers", "1", *further])


def read(out: Path) -> list[dict[str, Any]]:
    studies: list[dict[str, Any]] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return studies


def without_time(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in trial.items() if key != "cpu_seconds"} for trial in trials]


@pytest.fixture(scope="module")
def tuned(spec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two studies of two trials each."""
    out = tmp_path_factory.mktemp("tuned")
    assert run(spec, out, 2, memories=("xlstm", "lstm")) == 0
    return out


def test_every_memory_has_the_same_number_of_trials_and_steps(tuned: Path) -> None:
    studies = read(tuned)
    assert [(study["memory"], study["trials"], study["steps"]) for study in studies] == [
        ("xlstm", 2, 640),
        ("lstm", 2, 640),
    ]
    assert all(study["cpu_minutes"] > 0 for study in studies)


def test_random_trials_share_the_settings_of_ppo(tuned: Path) -> None:
    xlstm, lstm = (
        [[word for word in trial["overrides"] if not word.startswith("memory")] for trial in study["all"]]
        for study in read(tuned)
    )
    assert xlstm == lstm and xlstm[0] != xlstm[1]


def test_memories_have_the_size_of_that_of_the_preset(tuned: Path) -> None:
    for study in read(tuned):
        for trial in study["all"]:
            assert size(trial["overrides"]) == pytest.approx(size([]), rel=0.15)


def size(overrides: list[str]) -> int:
    config = load("parity", overrides)
    core = make_memory(config.memory.name, 3, **config.memory.settings)
    return sum(parameter.numel() for parameter in core.parameters())


def test_printed_command_repeats_the_trial(tuned: Path, tmp_path: Path) -> None:
    for study in read(tuned):
        trial = study["all"][1]
        program, command, base, *overrides = shlex.split(trial["command"])
        assert (program, command) == ("xlstm-rl", "train")
        config = load(base, overrides)
        facts = read_facts(config.env)
        assert facts is not None
        result = train(config, tmp_path / study["memory"])
        scores = [score(row.mean_return, facts) for row in result.rows if row.kind == "eval"]
        assert fmean(scores) == pytest.approx(trial["mean_score"])
        # one a rollout, of which there are fewer than `EVALUATIONS`
        assert len(scores) == 5
        assert score(result.scores[0].mean_return, facts) == pytest.approx(trial["final_scores"][0])


def test_best_settings_load_as_a_configuration(tuned: Path) -> None:
    for study in read(tuned):
        config = load_file(tuned / "best" / "parity-3" / f"{study['memory']}.yaml")
        assert study["best"]["mean_score"] == max(trial["mean_score"] for trial in study["all"])
        assert config.memory == load("parity", study["best"]["overrides"]).memory
        assert config.env.kwargs == {"length": 3} and config.total_steps == 320


def test_snippets_make_presets(tuned: Path, tmp_path: Path) -> None:
    snippets = (tuned / "tuning.md").read_text(encoding="utf-8").split("```yaml\n")[1:]
    for study, text in zip(read(tuned), snippets, strict=True):
        preset = {"env": {"id": "xlstm_rl/Parity-v0"}, **yaml.safe_load(text.partition("```")[0])}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(preset), encoding="utf-8")
        config = load_file(tmp_path / "mine.yaml")
        best = load_file(tuned / "best" / "parity-3" / f"{study['memory']}.yaml")
        assert (config.memory, config.policy, config.ppo) == (best.memory, best.policy, best.ppo)


def test_same_command_repeats_nothing(
    tuned: Path, spec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tuned / "results.json").read_bytes()
    monkeypatch.setattr(tune, "train", None)
    assert run(spec, tuned, 2, memories=("xlstm", "lstm")) == 0
    assert (tuned / "results.json").read_bytes() == before
    assert "| parity-3 | lstm | 2 | 0 |" in capsys.readouterr().out


def test_interrupted_tuning_becomes_what_it_would_have_been(
    tuned: Path, spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(spec, tmp_path, 1) == 0
    with monkeypatch.context() as patch:
        patch.setattr(tune, "train", lambda *args, **kwargs: train(*args, **kwargs)._replace(interrupted_by=SIGTERM))
        assert run(spec, tmp_path, 2) == 128 + SIGTERM
    assert read(tmp_path)[0]["trials"] == 1
    assert run(spec, tmp_path, 2) == 0
    assert without_time(read(tmp_path)[0]["all"]) == without_time(read(tuned)[1]["all"])


@pytest.mark.slow
def test_studies_run_side_by_side(tuned: Path, spec: Path, tmp_path: Path) -> None:
    assert run(spec, tmp_path, 2, "--workers", "2", memories=("xlstm", "lstm")) == 0
    for one, other in zip(read(tuned), read(tmp_path), strict=True):
        assert without_time(one["all"]) == without_time(other["all"])


def test_trial_that_breaks_counts(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise TrainingStoppedError("NaN in the loss")

    monkeypatch.setattr(tune, "train", stop)
    assert run(spec, tmp_path, 2) == 0
    (study,) = read(tmp_path)
    assert (study["trials"], study["pruned"], study["best"]) == (2, 2, None)
    assert study["all"][0]["stopped"] == "NaN in the loss"


def test_a_full_disk_is_told_and_no_trial_pays_for_it(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise TrainingStoppedError("training stopped") from OSError(
            errno.ENOSPC, "No space left on device", "model.zip"
        )

    monkeypatch.setattr(tune, "train", full)
    assert run(spec, tmp_path, 2) == tune.STOPPED
    assert "tune: No space left on device (model.zip); what was done until now is kept" in capsys.readouterr().err
    assert read(tmp_path)[0]["trials"] == 0
    monkeypatch.undo()
    assert run(spec, tmp_path, 2) == 0
    assert read(tmp_path)[0]["trials"] == 2


@pytest.mark.parametrize("kind", ["a folder in its place", "damaged", "a file in place of the folder"])
def test_a_database_that_cannot_be_used_is_told_in_a_sentence(
    kind: str, spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database = tmp_path / "studies" / "parity-3" / "lstm.db"
    database.parent.mkdir(parents=True)
    if kind == "damaged":
        database.write_bytes(b"no database" * 1000)
    elif kind == "a folder in its place":
        database.mkdir()
    else:
        database.parent.rmdir()
        database.parent.touch()
    assert run(spec, tmp_path, 1) == tune.STOPPED
    told = capsys.readouterr().err
    assert told.startswith("tune: ") and str(database.parent) in told and told.count("\n") == 1


def test_a_worker_that_dies_and_an_interruption_are_told(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, code in ((BrokenProcessPool("terminated abruptly"), tune.STOPPED), (KeyboardInterrupt(), 130)):
        monkeypatch.setattr(tune, "run_all", lambda *_, error=error: (_ for _ in ()).throw(error))
        assert run(spec, tmp_path, 1) == code
        assert "the same command goes on" in capsys.readouterr().err


def test_pruned_trials_end_early_and_count(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hopeless = optuna.pruners.ThresholdPruner(lower=10.0)
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda *_, **__: hopeless)
    assert run(spec, tmp_path, 2, "--seeds", "0", "1") == 0
    (study,) = read(tmp_path)
    assert (study["trials"], study["pruned"]) == (2, 2)
    assert study["steps"] < 2 * 320


def test_memory_given_twice_is_tuned_once(spec: Path, tmp_path: Path) -> None:
    assert run(spec, tmp_path, 1, memories=("lstm", "lstm")) == 0
    assert [study["trials"] for study in read(tmp_path)] == [1]


def test_several_seeds_and_a_smaller_budget(spec: Path, tmp_path: Path) -> None:
    assert run(spec, tmp_path, 1, "--seeds", "0", "1", "--steps", "0.4") == 0
    (trial,) = read(tmp_path)[0]["all"]
    assert trial["steps"] == 2 * 128 and len(trial["final_scores"]) == 2
    # the budget of the task is what the best settings are for
    assert load_file(tmp_path / "best" / "parity-3" / "lstm.yaml").total_steps == 320


def test_other_settings_are_refused(tuned: Path, spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(spec, tuned, 2, "--steps", "0.5") == tune.USAGE_ERROR
    assert "parity-3/lstm" in (said := capsys.readouterr().err) and "choose another --out" in said


def test_study_of_another_process_is_left_alone(spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = tmp_path / "studies" / "parity-3" / "lstm.lock"
    lock.parent.mkdir(parents=True)
    with exclusive(lock):
        assert run(spec, tmp_path, 1) == tune.USAGE_ERROR
    assert "is tuning parity-3/lstm" in capsys.readouterr().err


def test_missing_optuna_is_named_with_its_install_line(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(spec, tmp_path, 1) == tune.USAGE_ERROR
    assert "pip install optuna" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--tasks", "pairty"], ["--tasks", "parity", "--memories", "lsmt"]])
def test_unknown_names_are_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(words) == tune.USAGE_ERROR
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("memory", MEMORIES)
def test_spaces_name_only_settings_that_exist(memory: str) -> None:
    for key, values in {**SHARED, **MEMORIES[memory]}.items():
        for value in (values.low, values.high) if isinstance(values, Log) else values.values:
            # checks names and values
            config = load("parity", tune._overrides({"memory.name": memory, key: value}))
            assert config.memory.name == memory
