"""The command line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xlstm_rl import cli
from xlstm_rl.bench.spec import spec_names
from xlstm_rl.configs import load, load_file, preset_names
from xlstm_rl.envs import suite_ids
from xlstm_rl.runs.live import LastingConsole

ROOT = Path(__file__).parents[1]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "xlstm_rl", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"},
    )


# other tests register memories of their own, which a fresh process does not know
BUILT_IN = ("xlstm", "lstm", "gru", "transformer", "ssm", "rwkv", "frames", "none")


@pytest.mark.parametrize("columns", ["80", "200"])
def test_list_on_a_terminal_breaks_no_name(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(LastingConsole, "is_terminal", True)
    assert cli.main(["list"]) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    names = [*preset_names(), *BUILT_IN, *suite_ids(), *spec_names(), "xlstm_rl/TMaze-v0"]
    assert [name for name in names if name not in text] == []
    assert re.search(r"xlstm_rl/TMaze-v0\W+44\W+1\W+0\.5\b", text)
    assert max(map(len, text.splitlines())) <= int(columns)


def test_list_into_a_pipe_gives_a_name_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {*preset_names(), *BUILT_IN, *suite_ids(), *spec_names(), "xlstm_rl/TMaze-v0"} <= set(lines)
    assert not any(" " in line for line in lines)


def test_list_shows_what_has_a_word_in_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "POPGym"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines and all("popgym" in line.lower() for line in lines)
    assert cli.main(["list", "no-such-thing"]) == cli.STOPPED
    assert "no name has 'no-such-thing' in it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tmaze", "CartPole-v1"])
def test_show_prints_what_train_would_use(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", name, "memory.hidden_size=32", "seed=3"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    expected = load(name, ["memory.hidden_size=32", "seed=3"])
    assert load(str(tmp_path / "shown.yaml")) == expected
    assert (expected.memory.settings["hidden_size"], expected.seed) == (32, 3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["show", "tmze"], "did you mean 'tmaze'?"),
        (["train", "tmze"], "did you mean 'tmaze'?"),
        (["train", "CartPole"], "did you mean 'CartPole-v1'?"),
        (["train", "MyEnv-v0"], "your_module:MyEnv-v0"),
        (["train", "tmaze", "learning_rate=1e-3"], "did you mean 'ppo.learning_rate'?"),
        (["train", "tmaze", "memory=lstm"], "such as memory.name=lstm"),
        (["train", "tmaze", "--run-dir", "unused", "ppo.gama=1"], "did you mean 'gamma'?"),
        (["train", "tmaze", "ppo.gama=1"], "did you mean 'gamma'?"),
        (["train", "tmaze", "env.kwargs.corridor_length=0"], "corridor_length"),
        (["train", "tmaze", "policy.kwargs.foo=1"], "unknown key policy.kwargs.foo"),
        (["train", "tmaze", "policy.kwargs.use_sde=true"], "use ppo.use_sde"),
        (["train", "tmaze", "device=meta"], "device='meta' cannot be used here"),
        (["train", "Blackjack-v1"], "'Blackjack-v1' has Tuple observations"),
        (["train", "tmaze", "--run-dir", "README.md/run"], "README.md/run cannot be written"),
        (["train", "no_such_module:Env-v0"], "module 'no_such_module'"),
        (["evaluate", "nowhere"], "nowhere is no run folder"),
    ],
)
def test_mistake_exits_with_code_2_and_a_message(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(arguments) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "tmaze", "--run-dri", "here", "seed=3"], "unrecognized arguments: --run-dri here seed=3"),
        (["evaluate", "run", "another"], "unrecognized arguments: another"),
        (["evaluate", "run", "--episodes", "many"], "'many' must be a whole number of at least 1"),
        (["evaluate", "run", "--seed", "-1"], "'-1' must be a whole number of at least 0"),
    ],
)
def test_wrong_options_show_the_usage(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


def test_settings_may_stand_before_and_after_options(tmp_path: Path) -> None:
    before = ["seed=3", "total_steps=32", "env.n_envs=2", "ppo.n_steps=16"]
    after = ["ppo.batch_size=32", "eval.n_episodes=1"]
    assert cli.main(["train", "cue-recall", *before, "--run-dir", str(tmp_path / "run"), *after]) == 0
    config = load_file(tmp_path / "run" / "config.yaml")
    assert (config.seed, config.ppo.batch_size, config.eval.n_episodes) == (3, 32, 1)


def test_runs_without_a_folder_get_one_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "now")
    overrides = ["seed=3", "total_steps=32", "env.n_envs=2", "ppo.n_steps=16", "ppo.batch_size=32", "eval.n_episodes=1"]
    for _ in range(2):
        assert cli.main(["train", "cue-recall", *overrides]) == 0
    assert {path.name for path in Path("runs").iterdir()} == {"cue-recall-seed3-now", "cue-recall-seed3-now-2"}
    assert cli.main(["evaluate", "runs/cue-recall-seed3-now-2", "--episodes", "1", "--device", "cpu"]) == 0


def test_mistake_shows_no_traceback() -> None:
    process = start("train", "tmaze", "ppo.gamma=2")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("xlstm-rl: ")
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [[], ["evaluate", "run", "--episodes", "0"], ["train"], ["fly"]])
def test_wrong_usage_exits_with_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: xlstm-rl" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals for processes")
def test_interruption_saves_and_says_where(kind: signal.Signals, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start("train", "cue-recall", "total_steps=100_000_000", "--run-dir", str(run_dir))
    assert process.stdout is not None
    while "steps/s" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(kind)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 128 + kind, error
    assert "interrupted after" in output
    assert f"model saved in {run_dir / 'model.zip'}" in output
    assert cli.main(["evaluate", str(run_dir), "--episodes", "2"]) == 0
