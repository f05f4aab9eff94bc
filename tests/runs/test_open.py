"""A run folder exported, played without torch, and looked into, through the command line."""

from __future__ import annotations

import io
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from xlstm_rl import cli
from xlstm_rl.configs import ConfigError, load
from xlstm_rl.export import ExportError, compiler
from xlstm_rl.runs import open as runs_open
from xlstm_rl.runs.open import export_run, inspect_run, open_run, play_run
from xlstm_rl.runs.train import train

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CartPole with normalised observations and all memory inputs."""
    overrides = [
        "env.normalize_observation=true",
        "env.normalize_reward=false",
        "env.memory_inputs=[action, reward, start]",
        "env.n_envs=2",
        "ppo.n_steps=16",
        "ppo.batch_size=32",
        "ppo.n_epochs=1",
        "memory.hidden_size=16",
        "memory.blocks=m",
        "eval.n_episodes=1",
        "total_steps=64",
    ]
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(load("CartPole-v1", overrides), folder)
    return folder


@pytest.fixture(scope="module")
def policy(run: Path) -> Path:
    said = io.StringIO()
    export_run(run, console=Console(file=said, width=200))
    path = run / "policy.onnx"
    assert said.getvalue().startswith(f"{path}: ")
    assert "as torch within" in said.getvalue()
    return path


def test_example_plays_the_episode_of_the_agent_without_torch(run: Path, policy: Path) -> None:
    program = f"""
import runpy, sys
sys.modules["torch"] = sys.modules["xlstm_rl"] = None
sys.argv = ["play_onnx.py", {str(policy)!r}, "CartPole-v1", "50"]
runpy.run_path({str(EXAMPLES / "play_onnx.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    with open_run(run, device="cpu") as opened:
        env, state, total, steps = opened.env, None, 0.0, 0
        env.seed(0)
        obs: Any = env.reset()
        start = np.ones(1, bool)
        while steps < 50 and (not steps or not start[0]):
            action, state = opened.model.predict(obs, state=state, episode_start=start, deterministic=True)
            obs, reward, start, _ = env.step(action)
            total, steps = total + float(reward[0]), steps + 1
    assert f"return {total:.2f} after {steps} steps" in done.stdout
    assert "ms a step, state" in done.stdout


def test_refused_export_leaves_the_file_of_before(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ExportError("action of the exported policy is off by 1.0e+00 in step 0")

    path = tmp_path / "policy.onnx"
    path.write_bytes(b"good")
    monkeypatch.setattr("xlstm_rl.runs.open.check_onnx", refuse)
    with pytest.raises(ConfigError, match="off by 1.0e"):
        export_run(run, path)
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]


def test_inspection_goes_without_pictures_where_drawing_fails(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def render(self: Any) -> None:
        raise RuntimeError("No available video device")

    folder = shutil.copytree(run, tmp_path / "run")
    monkeypatch.setattr("gymnasium.envs.classic_control.CartPoleEnv.render", render)
    assert not inspect_run(str(folder), max_steps=3).frames
    assert (folder / "inspection.png").is_file()


def test_example_is_short() -> None:
    text = (EXAMPLES / "play_onnx.py").read_text(encoding="utf-8")
    assert len(text[text.index("def play") : text.index("def process_size")].strip().splitlines()) <= 32


@pytest.mark.parametrize(
    ("platform", "told", "size"),
    [("linux", 40 * 2**10, ", process 40 MiB"), ("darwin", 40 * 2**20, ", process 40 MiB"), ("win32", None, "")],
)
def test_example_tells_the_size_of_the_process_where_it_can(
    platform: str, told: int | None, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=told))
    # None makes the import fail, as on Windows
    monkeypatch.setitem(sys.modules, "resource", None if told is None else usage)
    monkeypatch.setattr(sys, "platform", platform)
    assert runpy.run_path(str(EXAMPLES / "play_onnx.py"))["process_size"]() == size


def test_number_of_threads_is_that_of_the_run_and_comes_back(run: Path) -> None:
    torch.set_num_threads(2)
    try:
        with open_run(run):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_inspection_is_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(run), "--max-steps", "5"]) == 0
    assert "inspection.png" in capsys.readouterr().out
    with Image.open(run / "inspection.png") as picture:
        assert picture.size[0] > 1000


def test_inspection_of_the_best_model_leaves_that_of_the_last_alone(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "inspection.png").unlink(missing_ok=True)
    for file in run.glob("model.*"):
        shutil.copy(file, folder / file.name.replace("model", "best"))
    assert cli.main(["inspect", str(folder), "--max-steps", "5", "--best"]) == 0
    assert (folder / "inspection-best.png").is_file() and not (folder / "inspection.png").exists()


def test_task_that_draws_gets_a_video(tmp_path: Path) -> None:
    overrides = ["memory.hidden_size=16", "total_steps=16", "eval.n_episodes=1", "env.n_envs=1", "ppo.n_steps=16"]
    train(load("tmaze", [*overrides, "ppo.batch_size=16", "ppo.n_epochs=1"]), tmp_path / "run")
    episode = inspect_run(tmp_path / "run", max_steps=8)
    with Image.open(tmp_path / "run" / "inspection.gif") as video:
        # small frames are enlarged, by a whole number
        height, width, _ = episode.frames[0].shape
        scale = -(-400 // width)
        assert video.size == (scale * width, scale * height) and video.size[0] >= 400


def test_missing_package_is_a_message(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("xlstm_rl.export.onnx_file.importlib.util.find_spec", lambda name: None)
    assert cli.main(["export", str(run)]) == cli.USAGE_ERROR
    assert "pip install 'xlstm-rl[export]'" in capsys.readouterr().err


@pytest.mark.skipif(compiler() is None, reason="there is no C compiler")
def test_export_to_c_is_checked_and_timed(run: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    export_run(run, tmp_path / "policy.c", int8=True, console=Console(file=said, width=200))
    assert re.search(r"as torch within .* over 200 steps .*[\d.]+ us a step, \d+ bytes of weights", said.getvalue())


def test_export_to_c_without_a_compiler_says_that_it_is_unchecked(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xlstm_rl.runs.open.compiler", lambda: None)
    said = io.StringIO()
    assert export_run(run, tmp_path / "policy.c", console=Console(file=said, width=200)) is None
    assert "not compared with torch: there is no C compiler" in said.getvalue()


def test_int8_of_onnx_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(run), "--int8"]) == cli.USAGE_ERROR
    assert "int8 is for C files, and policy.onnx is none" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["export", "inspect"])
def test_folder_without_a_run_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, str(tmp_path)]) == cli.USAGE_ERROR
    assert "is no run folder" in capsys.readouterr().err


@pytest.fixture(scope="module")
def maze(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a task that draws text and pictures."""
    overrides = [
        "env.n_envs=2",
        "ppo.n_steps=16",
        "ppo.batch_size=32",
        "total_steps=64",
        "env.kwargs.corridor_length=5",
    ]
    folder = tmp_path_factory.mktemp("runs") / "maze"
    train(load("tmaze", [*overrides, "eval.n_episodes=1", "eval.max_episode_steps=30"]), folder)
    return folder


def test_played_episodes_are_shown_as_text_with_their_returns(maze: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["play", str(maze), "--episodes", "2", "--mode", "ansi", "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"episode (\d): \d+ steps, return", shown) == ["0", "1"]
    with open_run(maze, render_mode="ansi") as opened:
        opened.env.seed(3)
        opened.env.reset()
        look = opened.env.env_method("render")[0]
    # the same maze, whoever walks in it
    assert look.count("\n") and len(shown.splitlines()) > 2 * look.count("\n")


def test_playing_is_repeatable_and_sampling_is_another_thing(maze: Path) -> None:
    first, again = (play_run(maze, episodes=8, mode="none", seed=5) for _ in range(2))
    assert list(first.returns) == list(again.returns) and list(first.lengths) == list(again.lengths)
    sampled = play_run(maze, episodes=8, mode="none", seed=5, deterministic=False)
    assert list(sampled.lengths) != list(first.lengths) or list(sampled.returns) != list(first.returns)


@pytest.mark.parametrize("memory", [False, True])
def test_recorded_animation_holds_all_episodes(maze: Path, memory: bool, tmp_path: Path) -> None:
    path = tmp_path / "videos" / "play.gif"
    path.parent.mkdir()
    result = play_run(maze, episodes=2, record=path, memory=memory)
    with Image.open(path) as picture:
        # equal frames that follow each other are one
        assert picture.n_frames > max(result.lengths) + 1
        assert picture.width >= 400 and (picture.height >= 200 or not memory)


def test_recording_ends_with_what_fits_into_memory_and_with_ctrl_c(
    maze: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_open, "MOST_FRAMES", 4)
    stream = io.StringIO()
    play_run(maze, episodes=2, record=tmp_path / "long.gif", console=Console(file=stream, width=200))
    assert f"video: {tmp_path / 'long.gif'} (the first 4 frames)" in stream.getvalue()
    with Image.open(tmp_path / "long.gif") as picture:
        assert picture.n_frames <= 4

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("xlstm_rl.runs.open.SignOfLife.__call__", interrupt)
    assert cli.main(["play", str(maze), "--record", str(tmp_path / "new" / "short.gif")]) == cli.INTERRUPTED
    assert (tmp_path / "new" / "short.gif").is_file()


def test_video_is_recorded_by_gymnasium(maze: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("moviepy")
    play_run(maze, episodes=1, record=tmp_path / "play.mp4")
    assert (tmp_path / "play.mp4").read_bytes()[4:8] == b"ftyp"
    assert "Overwriting" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--record", "play.avi"], "neither .mp4 nor .gif"),
        (["--memory"], "--record FILE"),
        (["--mode", "human"], "cannot be shown as 'human': it draws \\['ansi', 'rgb_array'\\]"),
    ],
)
def test_what_cannot_be_played_is_refused(
    maze: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["play", str(maze), *words]) == 2
    assert re.search(message, capsys.readouterr().err)
