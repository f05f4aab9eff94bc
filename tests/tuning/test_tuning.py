"""Tuning tries the portfolio first, keeps to its budget, goes on where it stopped, and what it finds can be trained."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from xlstm_rl import cli
from xlstm_rl.configs import ConfigError, load, load_file
from xlstm_rl.memory import make_memory
from xlstm_rl.runs.build import make_env, make_model
from xlstm_rl.tuning import study as studies
from xlstm_rl.tuning.report import best_trial, write_report
from xlstm_rl.tuning.search import tune
from xlstm_rl.tuning.space import PORTFOLIO, SPACES, known_values, spell, study_space, suggest
from xlstm_rl.tuning.study import FIRST_SEED, Tuning, flat, objective, open_study

TINY = (
    *("env.kwargs.length=3", "total_steps=640", "env.n_envs=2", "ppo.n_steps=32", "ppo.batch_size=64"),
    *("eval.interim_episodes=4", "eval.n_envs=2"),
)


def tuning(out: Path, runs: float = 2.0, name: str = "parity", *overrides: str) -> Tuning:
    return Tuning(name, (*TINY, *overrides), out, runs)


def ended(study: optuna.Study) -> list[Any]:
    return study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    search = tuning(tmp_path_factory.mktemp("tuned"))
    assert tune(search) is None
    return search


def test_settings_as_they_are_come_first_and_the_budget_is_kept(tuned: Tuning) -> None:
    trials = ended(open_study(tuned))
    assert trials[0].user_attrs["kind"] == "as it is"
    config = tuned.trial_config(trials[0].user_attrs["overrides"])
    differing = {key for key, value in flat(config).items() if flat(tuned.config).get(key) != value}
    assert differing == set()
    spent = [trial.user_attrs["steps"] for trial in trials]
    # the last trial began while there was budget left
    assert sum(spent[:-1]) < tuned.budget <= sum(spent)


def test_again_nothing_is_left_to_do_and_a_larger_budget_goes_on(tuned: Tuning) -> None:
    before = len(ended(open_study(tuned)))
    assert tune(tuned) is None
    assert len(ended(open_study(tuned))) == before
    assert tune(tuning(tuned.out, 3.0)) is None
    assert len(ended(open_study(tuned))) > before


def test_report_names_the_best_and_its_settings_load(tuned: Tuning) -> None:
    best = best_trial(open_study(tuned))
    assert best is not None and best.value == max(
        t.value for t in ended(open_study(tuned)) if t.state.name == "COMPLETE"
    )
    assert best.value == objective([*best.intermediate_values.values()])
    config = load_file(tuned.out / "best.yaml")
    assert config.ppo == tuned.trial_config(best.user_attrs["overrides"]).ppo
    assert config.total_steps == 640
    assert config.seed == tuned.config.seed < FIRST_SEED
    report = (tuned.out / "report.md").read_text(encoding="utf-8")
    assert "as it is" in report and f"xlstm-rl train {tuned.out / 'best.yaml'}" in report
    assert (tuned.out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_memories_of_all_trials_are_of_one_size(tuned: Tuning) -> None:
    def parameters(config: Any) -> int:
        core = make_memory(config.memory.name, 3, **config.memory.settings)
        return sum(parameter.numel() for parameter in core.parameters())

    for trial in ended(open_study(tuned)):
        assert parameters(tuned.trial_config(trial.user_attrs["overrides"])) == pytest.approx(
            parameters(tuned.config), rel=0.15
        )


def test_other_settings_are_refused(tuned: Tuning) -> None:
    with pytest.raises(ConfigError, match="was begun with other settings"):
        open_study(tuning(tuned.out, 2.0, "parity", "ppo.gamma=0.5"))


def suggested(values: dict[str, Any], space: Any) -> dict[str, Any]:
    """What a trial with these values becomes."""
    study = optuna.create_study()
    study.enqueue_trial(values)
    return suggest(study.ask(), space)


@pytest.mark.parametrize("memory", [*SPACES, "none"])
def test_every_setting_of_a_space_can_be_built_and_is_in_its_own_search(memory: str, tmp_path: Path) -> None:
    config = load("CartPole-v1", [f"memory.name={memory}"])
    settings = flat(config)
    space = study_space(memory, settings)
    assert {"ppo.learning_rate", "ppo.mix_advantages", *SPACES.get(memory, {})} <= space.keys()
    fixed = suggested(known_values(space, settings), space)
    assert {key: settings[key] for key in fixed} == fixed
    sampled = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(5):
        words = [f"{key}={spell(value)}" for key, value in suggest(sampled.ask(), space).items()]
        drawn = load("CartPole-v1", [f"memory.name={memory}", *words])
        make_model(drawn, make_env(drawn, 1, 0, here=True))


def test_settings_outside_of_the_search_widen_it() -> None:
    settings = flat(load("parity", ["memory.slstm_num_heads=2", "ppo.learning_rate=1e-2", "ppo.n_epochs=3"]))
    space = study_space("xlstm", settings)
    values = known_values(space, settings)
    assert values["memory.slstm_num_heads"] == "2" and values["ppo.learning_rate"] == 1e-2
    assert suggested(values, space)["ppo.n_epochs"] == 3


def test_portfolio_has_one_of_each_kind_and_no_twins(tmp_path: Path) -> None:
    search = tuning(tmp_path)
    waiting = [trial.user_attrs["kind"] for trial in open_study(search).get_trials(states=(TrialState.WAITING,))]
    # the preset of parity is what tracking and an answer without consequences want
    assert waiting == [kind for kind in PORTFOLIO if kind not in ("tracking", "no consequences")]
    general = Tuning("CartPole-v1", (), tmp_path / "general")
    assert len(open_study(general).get_trials()) == len(PORTFOLIO)


def test_trial_that_cannot_be_built_counts_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> list[str]:
        raise ConfigError("too wide")

    monkeypatch.setattr(studies, "_width", refuse)
    search = tuning(tmp_path)
    study = open_study(search)
    assert studies.run_trial(search, studies.memory_size(search.config), study, study.ask()) is None
    (trial,) = ended(study)
    assert trial.state == TrialState.PRUNED and trial.user_attrs["stopped"] == "too wide"
    write_report(search, study)
    assert "stopped: too wide" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("ends", "told"), [((0.5, 0.9, 0.7), True), ((0.9, 0.91, 0.9), False)])
def test_report_says_whether_the_best_is_within_the_noise(ends: tuple[float, ...], told: bool, tmp_path: Path) -> None:
    search = tuning(tmp_path)
    study = open_study(search)

    def add(kind: str, returns: tuple[float, ...]) -> None:
        attributes = {"kind": kind, "overrides": [], "steps": 640, "cpu_seconds": 1.0}
        values = dict(enumerate(returns, start=1))
        study.add_trial(create_trial(value=objective(returns), intermediate_values=values, user_attrs=attributes))

    add("as it is", (0.5, 0.7, 0.6))
    add("search", ends)
    write_report(search, study)
    assert ("within the noise" in (tmp_path / "report.md").read_text(encoding="utf-8")) == told


def test_trial_of_a_process_that_is_gone_is_done_again(tmp_path: Path) -> None:
    search = tuning(tmp_path)
    study = open_study(search)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for host, process in (
        (socket.gethostname(), gone.pid),
        (socket.gethostname(), os.getpid()),
        ("elsewhere", gone.pid),
    ):
        trial = study.ask()
        suggest(trial, search.space)
        trial.set_user_attr("worker", [host, process])
    studies.close_lost(study)
    assert [trial.state.name for trial in study.get_trials()[:3]] == ["FAIL", "RUNNING", "RUNNING"]
    again = study.get_trials()[-1]
    assert again.state == TrialState.WAITING and again.user_attrs == {"kind": "as it is"}


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_search_saves_and_goes_on(kind: signal.Signals, tmp_path: Path) -> None:
    words = ["tune", "parity", *TINY, "total_steps=200000", "--out", str(tmp_path), "--runs", "1", "--workers", "1"]
    process = subprocess.Popen([sys.executable, "-m", "xlstm_rl", *words], start_new_session=True)
    search = Tuning("parity", (*TINY, "total_steps=200000"), tmp_path, 1.0)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (tmp_path / "journal.log").exists():
        time.sleep(0.2)
    study = open_study(search)
    while time.monotonic() < deadline and not study.get_trials(states=(TrialState.RUNNING,)):
        time.sleep(0.2)
    time.sleep(2)
    # as a terminal does it, Ctrl-C reaches the workers too; what stops services reaches the first process
    (os.killpg if kind == signal.SIGINT else os.kill)(process.pid, kind)
    assert process.wait(30) == 128 + kind
    states = [trial.state.name for trial in study.get_trials()]
    assert "RUNNING" not in states and states[0] == "FAIL" and states[-1] == "WAITING"
    assert (tmp_path / "report.md").is_file()


def test_two_workers_share_a_study(tmp_path: Path) -> None:
    assert tune(tuning(tmp_path, 3.0), workers=2) is None
    trials = ended(open_study(tuning(tmp_path)))
    assert len({tuple(trial.user_attrs["worker"]) for trial in trials}) == 2


def test_a_database_can_hold_the_study(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tune.db'}"
    search = Tuning("parity", TINY, tmp_path, 1.0, storage=url)
    assert tune(search) is None
    assert optuna.load_study(study_name="parity", storage=url).trials
    assert not (tmp_path / "journal.log").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runs", "0"], "must be above 0"),
        (["--minutes", "-1"], "must be above 0"),
        (["--runs", "inf"], "must be above 0 and below"),
        (["--runs", "nan"], "must be above 0"),
        (["--workers", "1000000000"], "--workers 1000000000 must be at most 1024"),
        (["--storage", "sqlite:////no/such/folder/tune.db"], "--storage sqlite:.* cannot be used: .*unable to open"),
        (["--storage", "nonsense"], "--storage nonsense cannot be used: "),
    ],
)
def test_command_refuses_budgets_and_databases_of_no_use(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tune", "parity", "--out", str(tmp_path), *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_torn_end_of_the_journal_is_taken_away_and_other_damage_refused(tmp_path: Path) -> None:
    open_study(tuning(tmp_path)).ask()
    journal = tmp_path / "journal.log"
    whole = journal.read_bytes()
    for torn in (whole[:-9], whole[:-9] + bytes(9)):
        journal.write_bytes(torn)
        with pytest.warns(UserWarning, match="the last line of .*journal.log was torn"):
            study = open_study(tuning(tmp_path))
        assert len(study.trials) >= 4
    journal.write_bytes(whole.replace(b"op_code", b"op_c\0de", 1))
    with pytest.raises(ConfigError, match="line 1 of .*journal.log is damaged"):
        open_study(tuning(tmp_path))


def test_command_prints_trials_and_where_the_report_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "parity", *TINY, "--out", str(tmp_path), "--runs", "1", "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "trial 0: " in printed and f"xlstm-rl train {tmp_path / 'best.yaml'}" in printed


def test_without_optuna_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install optuna"):
        open_study(tuning(tmp_path))
