"""Environments that fail: the run says which, in which step, why, and how to go on; nothing that was done is lost."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from stable_baselines3.common.vec_env import DummyVecEnv

from tests.runs import faulty_envs
from tests.runs.faulty_envs import SAYS
from tests.runs.test_train import TINY
from xlstm_rl import cli
from xlstm_rl.agents import EvaluationResult, evaluate, evaluate_random
from xlstm_rl.configs import ConfigError, TrainConfig, load
from xlstm_rl.runs import scores
from xlstm_rl.runs.folder import RunFolder
from xlstm_rl.runs.open import inspect_run
from xlstm_rl.runs.train import TrainingStoppedError, evaluate_run, resume, train
from xlstm_rl.vec_envs.env_contract import FaultyEnvironmentError

ID = "tests.runs.faulty_envs:Faulty-v0"


def faulty(*overrides: str, **kwargs: Any) -> TrainConfig:
    given = [f"env.kwargs.{key}={value}" for key, value in kwargs.items()]
    return load(ID, [*TINY, "env.n_envs=2", "eval.every_steps=null", *given, *overrides])


@pytest.mark.parametrize(
    ("fault", "vec"), [*((fault, "dummy") for fault in SAYS), ("raise", "subproc"), ("one number", "subproc")]
)
def test_a_faulty_step_is_told_with_environment_step_cause_and_how_to_go_on(
    fault: str, vec: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingStoppedError) as caught:
        train(faulty(f"env.vec={vec}", fault=f'"{fault}"'), tmp_path / "run")
    told = str(caught.value)
    assert "environment 0 " in told and "in step 5 of its episode" in told
    assert re.search(SAYS[fault], told), told
    assert f"xlstm-rl train --resume {tmp_path / 'run'}" in told


def broken(env: Any, action: Any) -> Any:
    raise ZeroDivisionError("the physics broke")


def test_of_several_environments_the_faulty_one_is_named(tmp_path: Path) -> None:
    # one more is made before, to look at its spaces
    copy = faulty_envs.Faulty.made + 2
    with pytest.raises(TrainingStoppedError, match="environment 1 failed in step 5 of its episode"):
        train(faulty("env.n_envs=3", fault="raise", copy=copy), tmp_path / "run")


def test_a_faulty_reset_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrainingStoppedError, match=r"(?s)environment 0 .*on reset.*the physics broke.*--resume"):
        train(faulty(fault="raise", at=0), tmp_path / "run")
    with pytest.raises(TrainingStoppedError, match=r"(?s)environment 0 .*on reset.*the physics broke.*--resume"):
        resume(tmp_path / "run")


def test_a_fault_of_the_closing_evaluation_leaves_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = faulty("total_steps=64")
    train(config, tmp_path / "run")
    monkeypatch.setattr(faulty_envs.Faulty, "step", broken)
    assert (tmp_path / "run" / "model.zip").is_file()
    with pytest.raises(TrainingStoppedError, match=r"(?s)closing evaluation stopped.*failed in step 1.*--resume"):
        resume(tmp_path / "run")
    with pytest.raises(FaultyEnvironmentError, match="environment 0 failed in step 1 of its episode"):
        evaluate_run(tmp_path / "run")
    with pytest.raises(FaultyEnvironmentError, match="environment 0 failed in step 1 of its episode"):
        inspect_run(tmp_path / "run")


def test_commands_tell_a_fault_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(faulty("total_steps=64"), tmp_path / "run")
    monkeypatch.setattr(faulty_envs.Faulty, "step", broken)
    for command in ("evaluate", "inspect"):
        assert cli.main([command, str(tmp_path / "run")]) == cli.STOPPED
        assert "xlstm-rl: environment 0 failed in step 1" in capsys.readouterr().err


def test_a_process_may_take_longer_to_start_than_to_answer(tmp_path: Path) -> None:
    overrides = ["env.vec=subproc", "env.worker_timeout=0.5", "total_steps=64", "eval.n_episodes=1"]
    result = train(faulty(*overrides, "eval.n_envs=1", fault='"slow start"'), tmp_path / "run")
    assert result.scores


def test_a_process_that_does_not_start_is_told_and_no_folder_is_made(tmp_path: Path) -> None:
    overrides = ["env.vec=subproc", "env.worker_start_timeout=0.01"]
    with pytest.raises(ConfigError, match=r"cannot be made 2 times .*did not start within 0.01 seconds"):
        train(faulty(*overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_environment_that_fails_while_its_episode_is_replayed_is_no_damage_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(faulty("total_steps=64", "checkpoint.every_steps=64"), tmp_path / "run")
    monkeypatch.setattr(faulty_envs.Faulty, "step", broken)
    with pytest.raises(TrainingStoppedError, match=r"(?s)environment 0 failed in step 1 of its episode.*--resume"):
        resume(tmp_path / "run", ["total_steps=256"])
    monkeypatch.undo()
    assert resume(tmp_path / "run", ["total_steps=256"]).scores


@pytest.mark.parametrize("n_envs", [1, 3])
def test_an_evaluation_of_endless_episodes_ends_and_says_so(n_envs: int) -> None:
    env = [faulty_envs.Faulty("endless") for _ in range(n_envs)]
    vec: Any = DummyVecEnv([lambda one=one: one for one in env])  # type: ignore[misc]
    seen: list[tuple[int, int]] = []
    result = evaluate_random(vec, 4, seed=0, max_episode_steps=7, on_step=lambda *told: seen.append(told))
    assert isinstance(result, EvaluationResult)
    assert result.returns.tolist() == [7.0] * 4 and result.lengths.tolist() == [7] * 4
    assert result.cut_episodes == 4 and result.successes is None
    assert seen[-1] == (4, 7 * (4 if n_envs == 1 else 2))


def test_only_episodes_that_do_not_end_are_cut() -> None:
    class Sometimes(faulty_envs.Faulty):
        episodes = 0

        def reset(self, **kwargs: Any) -> Any:
            Sometimes.episodes += 1
            self.fault = "endless" if Sometimes.episodes == 2 else ""
            return super().reset(**kwargs)

    result = evaluate_random(Sometimes(), 4, seed=0, max_episode_steps=20)
    assert result.lengths.tolist() == [9, 20, 9, 9]
    assert result.cut_episodes == 1


def test_an_episode_that_ends_at_the_limit_is_whole() -> None:
    result = evaluate_random(faulty_envs.Faulty(), 3, max_episode_steps=9)
    assert result.lengths.tolist() == [9] * 3 and result.cut_episodes == 0
    with pytest.raises(ValueError, match="max_episode_steps=0 must be at least 1"):
        evaluate_random(faulty_envs.Faulty(), 3, max_episode_steps=0)


def test_a_bound_of_steps_leaves_fewer_episodes_each_of_them_whole() -> None:
    vec: Any = DummyVecEnv([faulty_envs.Faulty for _ in range(2)])
    for max_steps, episodes in ((None, 10), (1_000, 10), (40, 6), (37, 6), (36, 4), (1, 2)):
        result = evaluate_random(vec, 10, max_steps=max_steps)
        assert result.lengths.tolist() == [9] * episodes, max_steps
    endless: Any = DummyVecEnv([lambda: faulty_envs.Faulty("endless")] * 2)
    assert evaluate_random(endless, 10, max_episode_steps=7, max_steps=20).lengths.tolist() == [7, 7, 7, 7]


def test_an_evaluation_of_long_episodes_is_shorter_unless_a_number_is_asked_for(tmp_path: Path) -> None:
    config = faulty("total_steps=64", "eval.n_episodes=20", "eval.n_envs=2", "eval.max_steps=40")
    result = train(config, tmp_path / "run")
    assert [score.episodes for score in result.scores] == [6] * 4
    assert [score.episodes for score in evaluate_run(tmp_path / "run")] == [6] * 4
    assert [score.episodes for score in evaluate_run(tmp_path / "run", n_episodes=8)] == [8] * 4


def test_a_run_on_an_endless_task_ends_and_says_how_many_episodes_were_cut(tmp_path: Path) -> None:
    told = io.StringIO()
    config = faulty("total_steps=128", "eval.every_steps=64", "eval.max_episode_steps=30", fault="endless")
    result = train(config, tmp_path / "run", console=Console(file=told, width=120))
    assert [score.cut_episodes for score in result.scores] == [4, 4, 4, 4]
    assert "2 of 2 episodes cut" in told.getvalue() and "4 (4 cut)" in told.getvalue()
    assert "cut after 30 steps (eval.max_episode_steps)" in told.getvalue()


def test_a_long_evaluation_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("xlstm_rl.runs.live.PATIENCE_SECONDS", 0.0)
    told = io.StringIO()
    config = faulty("total_steps=64", "eval.max_episode_steps=10", fault="endless")
    train(config, tmp_path / "run", console=Console(file=told, width=120))
    assert "evaluating the trained agent: 0 of 4 episodes, step 1" in told.getvalue()
    assert "evaluating random actions: 0 of 4 episodes, step 1" in told.getvalue()


def interrupted_after(seconds: float, begin: Any) -> tuple[Any, float]:
    """The result of a call and how long it went on after SIGINT came to this process."""
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        signal.raise_signal(signal.SIGINT)

    timer = threading.Timer(seconds, send)
    timer.start()
    try:
        result = begin()
    except KeyboardInterrupt:
        result = None
    finally:
        timer.join()
    return result, time.monotonic() - sent[0]


def test_ctrl_c_is_heard_in_an_evaluation_during_training_which_is_done_again_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["total_steps=128", "eval.every_steps=64", "eval.n_episodes=1", "eval.max_episode_steps=null"]
    config = faulty(*settings, "checkpoint.every_steps=64", fault="endless")
    result, seconds = interrupted_after(4.0, lambda: train(config, tmp_path / "run"))
    assert seconds < 1.5
    assert result.interrupted_by == signal.SIGINT
    assert result.rows == [] and (tmp_path / "run" / "checkpoints").is_dir()

    def ending(*args: Any, **kwargs: Any) -> EvaluationResult:
        return evaluate(*args, **kwargs | {"max_episode_steps": 20})._replace(cut_episodes=0)

    monkeypatch.setattr(scores, "evaluate", ending)
    monkeypatch.setattr(scores, "evaluate_random", lambda *args, **kwargs: ending(_Still(), *args, **kwargs))
    again = resume(tmp_path / "run")
    assert [row.step for row in again.rows if row.kind == "eval"] == [64, 128]


def test_ctrl_c_is_heard_in_a_long_update_which_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xlstm_rl.runs.train.plot_curve", lambda *_: None)
    config = faulty("ppo.n_epochs=100_000", "checkpoint.every_steps=64")
    result, seconds = interrupted_after(4.0, lambda: train(config, tmp_path / "run"))
    assert seconds < 1.5
    assert result.interrupted_by == signal.SIGINT
    folder = RunFolder(tmp_path / "run")
    assert [path.name for path in folder.list_checkpoints()] == ["step_0000000000.zip"]
    assert folder.model.is_file()


class _Still:
    """Always takes the first action."""

    def predict(self, observation: Any, state: Any = None, **_: Any) -> tuple[Any, None]:
        return [0] * len(observation), None


@pytest.mark.parametrize("which", ["trained", "emptied", "random"])
def test_ctrl_c_is_heard_in_the_closing_evaluation_and_the_run_is_saved(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(*args: Any, **kwargs: Any) -> Any:
        empty = kwargs.get("empty_state_every_step")
        if which == {True: "emptied", False: "trained", None: "random"}[empty] and kwargs.get("deterministic", True):
            kwargs["max_episode_steps"] = None
        else:
            kwargs["max_episode_steps"] = 5
        return (evaluate_random if empty is None else evaluate)(*args, **kwargs)

    monkeypatch.setattr(scores, "evaluate", endless)
    monkeypatch.setattr(scores, "evaluate_random", endless)
    config = faulty("total_steps=64", fault="endless")
    result, seconds = interrupted_after(4.0, lambda: train(config, tmp_path / "run"))
    assert seconds < 1.5
    assert result.interrupted_by == signal.SIGINT
    assert len(result.scores) == {"trained": 0, "emptied": 2, "random": 3}[which]
    assert (tmp_path / "run" / "model.zip").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
@pytest.mark.slow
@pytest.mark.parametrize("command", ["evaluate", "inspect"])
def test_ctrl_c_is_heard_by_commands(command: str, tmp_path: Path) -> None:
    train(faulty("total_steps=64", "eval.max_episode_steps=100", fault="endless"), tmp_path / "run")
    # a moment for every step, so that the episodes of the commands take minutes
    slowly = {**os.environ, "FAULTY_STEP_SECONDS": "0.5"}
    given = ["--max-steps", "1000"] if command == "inspect" else []
    run = subprocess.Popen(
        [sys.executable, "-m", "xlstm_rl", command, str(tmp_path / "run"), *given],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=slowly,
    )
    # until it plays
    time.sleep(15.0)
    assert run.poll() is None and run.stderr is not None
    run.send_signal(signal.SIGINT)
    begun = time.monotonic()
    with run.stderr as said:
        assert any("interrupted" in line for line in said)
        assert time.monotonic() - begun < 1.5
        assert run.wait(30) == 130
