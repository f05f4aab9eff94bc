"""Runs go to the hub and come back; what goes wrong on the way is one sentence."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hub.fake_hub import TOKEN, FakeHub, serving
from xlstm_rl import cli
from xlstm_rl.configs import ConfigError, load
from xlstm_rl.hub.model_card import model_card
from xlstm_rl.hub.push import push_run
from xlstm_rl.runs.build import start_from
from xlstm_rl.runs.folder import RunFolder
from xlstm_rl.runs.open import open_run
from xlstm_rl.runs.scores import Score
from xlstm_rl.runs.train import evaluate_run, train

pytest.importorskip("huggingface_hub")

SMALL = [
    *("total_steps=512", "ppo.n_steps=32", "ppo.batch_size=256", "ppo.n_epochs=1", "env.n_envs=8"),
    *("eval.n_episodes=4", "eval.interim_episodes=4", "memory.hidden_size=8"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(load("tmaze", SMALL), folder)
    return folder


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The package imported anew, as it reads its settings then, with a cache of its own and a token."""
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # nobody listens there
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return monkeypatch


@pytest.fixture
def hub(settings: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving() as server:
        settings.setenv("HF_ENDPOINT", server.address)
        yield server


def test_pushed_run_is_the_same_agent_when_opened_from_the_hub(
    hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["push", str(run), "me/agent", "--episodes", "4"]) == 0
    assert "xlstm-rl play hf://me/agent" in capsys.readouterr().out
    files = hub.repositories["me/agent"]
    # neither checkpoints nor what tells of the machine
    assert {*files} == {"README.md", "config.yaml", "model.zip", "returns.csv", "curve.png", "episode.gif"}
    assert files["model.zip"] == (run / "model.zip").read_bytes()
    assert files["episode.gif"][:4] == b"GIF8"
    assert evaluate_run("hf://me/agent", n_episodes=4) == evaluate_run(run, n_episodes=4)
    assert cli.main(["play", "hf://me/agent", "--episodes", "1", "--mode", "none"]) == 0
    assert "episode 0: " in capsys.readouterr().out


def test_model_card_tells_scores_bounds_command_and_how_to_use_it(hub: FakeHub, run: Path) -> None:
    push_run(run, "me/agent", episodes=4)
    page = hub.repositories["me/agent"]["README.md"].decode()
    _, header, text = page.split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("xlstm_rl", "reinforcement-learning")
    (index,) = metadata["model-index"]
    scores = evaluate_run(run, n_episodes=4)
    value = index["results"][0]["metrics"][0]["value"]
    assert value.startswith(f"{scores[0].mean_return:.2f} +/- ")
    assert index["results"][0]["dataset"]["type"] == "xlstm_rl/TMaze-v0"
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert {score.agent for score in scores} <= {*rows}
    assert rows["optimum"].startswith("| optimum | 1.00 |")
    assert rows["best without memory"].startswith("| best without memory | 0.50 |")
    assert "xlstm-rl train config.yaml" in text
    assert "after 512 steps of training" in text
    assert "![An episode](episode.gif)" in text
    assert 'open_run("hf://me/agent")' in text
    assert str(run) not in page


@pytest.mark.parametrize(
    ("versions", "told"),
    [
        ({"command": ["/home/me/xlstm-rl", "train", "tmaze", "--run-dir", "/home/me/a"]}, ["xlstm-rl train tmaze\n"]),
        ({"command": ["/home/me/own.py"]}, ["```\nxlstm-rl train config.yaml\n```"]),
        (
            {"command": ["/home/me/xlstm-rl", "imitate", "tmaze", "--from", "oracle"], "demonstrations": "9 of oracle"},
            ["```\nxlstm-rl imitate tmaze --from oracle\n", "again: `xlstm-rl imitate config.yaml --from oracle`"],
        ),
    ],
)
def test_model_card_tells_the_command_without_folders(
    versions: dict[str, Any], told: list[str], settings: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    folder.versions.write_text(json.dumps({**versions, "torch": "2.9"}))
    package = importlib.import_module("huggingface_hub")
    page = model_card(package, "me/agent", folder, load("tmaze"), 1_024, [Score("trained agent", 0.5)], None)
    for text in (*told, "after 1,024 steps", "torch 2.9"):
        assert text in page
    assert "/home" not in page


def test_run_that_has_not_ended_is_pushed_with_its_last_checkpoint(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    (unfinished / "model.zip").unlink()
    push_run(unfinished, "me/agent", episodes=1)
    assert hub.repositories["me/agent"]["model.zip"] == RunFolder(unfinished).latest_model().read_bytes()


def test_second_push_replaces_what_the_first_one_brought(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(run, tmp_path / "changed")
    shutil.copy(run / "model.zip", changed / "best.zip")
    push_run(changed, "hf://me/agent", episodes=1)
    assert "best.zip" in hub.repositories["me/agent"]
    push_run(run, "me/agent", episodes=1)
    assert "best.zip" not in hub.repositories["me/agent"]


def test_fetched_run_is_found_again_without_the_hub(hub: FakeHub, run: Path) -> None:
    push_run(run, "me/agent", episodes=1)
    with open_run("hf://me/agent") as fetched:
        steps = fetched.model.num_timesteps
    hub.shutdown()
    hub.server_close()
    with open_run("hf://me/agent") as again:
        assert again.model.num_timesteps == steps


def test_fetched_run_can_be_drawn_and_exported(
    hub: FakeHub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push_run(run, "me/agent", episodes=1)
    assert cli.main(["inspect", "hf://me/agent"]) == 0
    # beside what was fetched, as the command says
    assert str(tmp_path / "cache") in capsys.readouterr().out.replace("\n", "")
    assert len(list((tmp_path / "cache").rglob("inspection.png"))) == 1
    assert cli.main(["export", "hf://me/agent", str(tmp_path / "policy.c")]) == 0
    assert (tmp_path / "policy.c").is_file()
    # what a `Path` makes of it
    with open_run(Path("hf://me/agent")) as fetched:
        assert fetched.config == RunFolder(run).load_config()


def test_training_starts_from_an_agent_in_the_hub(hub: FakeHub, run: Path) -> None:
    push_run(run, "me/agent", episodes=1)
    with open_run("hf://me/agent") as fetched:
        config = load("tmaze", [*SMALL, "init.from=hf://me/agent"])
        told = start_from(fetched.model, config)
    assert told is not None and "weights taken" in told


def test_nothing_is_asked_of_the_hub_for_a_folder(hub: FakeHub, run: Path) -> None:
    evaluate_run(run, n_episodes=1)
    assert hub.requests == []


@pytest.mark.parametrize(
    "changes",
    [
        {"env": {"id": "antigravity:Env-v0"}},
        {"base": "antigravity:Env-v0"},
        {"env": {"id": "xlstm_rl/TMaze-v0", "wrappers": {"antigravity:Wrapper": {}}}},
        {"env": {"id": "xlstm_rl/TMaze-v0", "wrappers": {"RecordVideo": {"video_folder": "/"}}}},
        {"env": {"id": "GymV26Environment-v0", "kwargs": {"env_id": "antigravity:Env-v0"}}},
        {"env": {"id": "xlstm_rl/TMaze-v0"}, "policy": {"features_extractor": "antigravity:Extractor"}},
    ],
)
def test_code_that_a_configuration_of_the_hub_names_is_not_run(hub: FakeHub, changes: dict[str, object]) -> None:
    hub.repositories["you/agent"] = {"config.yaml": yaml.safe_dump(changes).encode(), "model.zip": b""}
    with pytest.raises(ConfigError, match="would run code that its author chose, (antigravity:|RecordVideo).*if you"):
        evaluate_run("hf://you/agent", n_episodes=1)
    assert "antigravity" not in sys.modules


def test_missing_repository_revision_and_run_are_named(hub: FakeHub, run: Path) -> None:
    for name, problem in (
        ("hf://me/none", "hf://me/none cannot be fetched: there is no such repository"),
        ("hf://agent", "hf://agent names no repository; write hf://user/repo"),
    ):
        with pytest.raises(ConfigError, match=problem):
            evaluate_run(name)
    hub.repositories["me/other"] = {"README.md": b"", "curve.png": b"1"}
    with pytest.raises(ConfigError, match="is no run of xlstm_rl: it holds no config.yaml"):
        evaluate_run("hf://me/other")
    with pytest.raises(ConfigError, match="the repository has no such revision"):
        evaluate_run("hf://me/other@v7")


def test_push_without_a_right_token_is_told(hub: FakeHub, run: Path, settings: pytest.MonkeyPatch) -> None:
    settings.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConfigError, match="the hub answers 401: .*; call `hf auth login`"):
        push_run(run, "me/agent", episodes=1)
    settings.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="there is no token; call `hf auth login`, or set HF_TOKEN"):
        push_run(run, "me/agent", episodes=1)


@pytest.mark.parametrize("name", ["agent", "me/a/b", "me/a gent"])
def test_push_to_no_repository_is_refused(hub: FakeHub, run: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot be pushed to {name}: "):
        push_run(run, name, episodes=1)
    assert hub.requests == []


def test_network_that_is_missing_is_told(settings: pytest.MonkeyPatch, run: Path) -> None:
    with pytest.raises(ConfigError, match="hf://me/agent cannot be fetched: the hub cannot be reached"):
        evaluate_run("hf://me/agent")
    with pytest.raises(ConfigError, match="cannot be pushed to me/agent: the hub cannot be reached"):
        push_run(run, "me/agent", episodes=1)


def test_package_that_is_missing_is_told(settings: pytest.MonkeyPatch, run: Path) -> None:
    settings.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="package 'huggingface_hub' is missing .*pip install 'xlstm_rl"):
        evaluate_run("hf://me/agent")
    with pytest.raises(ConfigError, match="pip install 'xlstm_rl"):
        push_run(run, "me/agent")
