"""The recipes of docs/recipes.md run as they stand, with fewer steps, and do what the page says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.agents.small_agents import agent
from xlstm_rl import evaluate
from xlstm_rl.configs import load
from xlstm_rl.configs.validation import plain

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = {
    title: re.findall(r"```(python|bash)\n(.*?)```", text, flags=re.DOTALL)
    for title, text in re.findall(r"^## (.*?)$(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)
}


def run(title: str, steps: str = "256", **changes: str) -> dict[str, Any]:
    """What the Python code of a recipe defines; `learn` takes so many steps."""
    ((_, code),) = RECIPES[title]
    for old, new in {r"learn\([\d_]+": f"learn({steps}", **changes}.items():
        code, count = re.subn(old, new, code)
        assert count == 1
    namespace: dict[str, Any] = {"__name__": title}
    exec(code, namespace)
    assert namespace["model"].num_timesteps >= 256
    return namespace


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What SuperSuit's rows lack, Stable-Baselines3 does without.
@pytest.mark.filterwarnings("ignore:The `render_mode` attribute")
def test_agents_of_pettingzoo_come_and_go() -> None:
    pytest.importorskip("supersuit")
    env = run("PettingZoo: agents that come and go")["env"]
    obs, steps = env.reset(), []
    # is somebody there?
    there = [obs[:3, 2]]
    for _ in range(6):
        obs, rewards, dones, infos = env.step(np.zeros(24, int))
        there.append(obs[:3, 2])
        steps.append((rewards[:3], dones[:3]))
    assert np.array(there[:6]).T.tolist() == [[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert [dones.all() for _, dones in steps] == [False] * 5 + [True] and not np.any([d.any() for _, d in steps[:5]])
    paid = np.array([rewards for rewards, _ in steps])
    assert not paid[[0, 1, 2, 4, 5], 0].any() and not paid[[0, 1, 2, 3, 4], 2].any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The `render_mode` attribute")
def test_agents_of_pettingzoo_learn_to_remember() -> None:
    pytest.importorskip("supersuit")
    recipe = run("PettingZoo: agents that come and go", "60_000")
    assert evaluate(recipe["model"], recipe["env"], 240).returns.mean() > 0.95
    assert evaluate(recipe["model"], recipe["env"], 240, empty_state_every_step=True).returns.mean() < 0.7


def test_episodes_of_a_trial_are_one_for_the_agent() -> None:
    recipe = run("Memory over several episodes of a trial")
    env = recipe["Trial"](gym.make("xlstm_rl/Bandit-v0", num_pulls=5), episodes=3)
    env.reset(seed=0)
    ends = [env.step(0)[2] for _ in range(15)]
    assert ends == [False] * 14 + [True]


def test_an_agent_meets_its_past_in_self_play() -> None:
    recipe = run("Self-play", "4_096", **{r"= SelfPlay\(\)": "= SelfPlay(every=1)"})
    first, second = recipe["self_play"].opponents
    weights = [copy.state_dict()["action_net.weight"] for copy in (first, second, recipe["model"].policy)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    env = recipe["RockPaperScissors"]()
    env.meet(second)
    env.reset(seed=0)
    assert [env.step(t % 3)[2] for t in range(10)] == [False] * 9 + [True]
    assert env.opponent is second and env.state is not None
    # what one sees of the other is what that one showed
    seen: list[Any] = []

    class Watched:
        def predict(self, obs: Any, state: Any, episode_start: Any) -> tuple[int, str]:
            seen.append((obs, state, bool(episode_start[0])))
            return 2, "state"

    env.meet(Watched())
    env.reset()
    env.step(1)
    obs, reward, *_ = env.step(0)
    assert seen[0][1:] == (None, True) and seen[1][1:] == ("state", False)
    assert seen[1][0].tolist() == [0, 0, 1, 0, 1, 0] and obs.tolist() == [1, 0, 0, 0, 0, 1]
    # rock beats scissors
    assert reward == 1


def test_novelty_is_paid_and_wears_off() -> None:
    recipe = run("Intrinsic reward in a callback", "20_000")
    errors = recipe["curiosity"].errors
    assert errors[-1] < 0.8 * errors[0]
    buffer = recipe["model"].rollout_buffer
    # a T-maze pays at the end alone
    assert (buffer.rewards[~buffer.ended] > 0).all()
    assert np.allclose(buffer.returns, buffer.estimate(buffer.gae_lambda) + buffer.values)


def test_a_pretrained_extractor_stays_as_it_is() -> None:
    recipe = run("A pretrained extractor that stays as it is")
    stored = recipe["load_file"]("pretrained.safetensors")
    for name, weight in recipe["model"].policy.features_extractor.layers.state_dict().items():
        assert torch.equal(weight, stored[name]), name
    # and would not without what the page warns of
    changed = run("A pretrained extractor that stays as it is", **{"ortho_init=False": "ortho_init=True"})
    stored = recipe["load_file"]("pretrained.safetensors")
    assert not torch.equal(changed["model"].policy.features_extractor.layers[0].weight, stored["0.weight"])


def test_learning_rates_keep_their_ratio() -> None:
    falling = {"learning_rate=1e-3": "learning_rate=lambda left: 1e-3 * left"}
    groups = run("Several learning rates", **falling)["model"].policy.optimizer.param_groups
    assert groups[1]["lr"] < 1e-3 and groups[0]["lr"] == pytest.approx(groups[1]["lr"] / 10)


@cache
def sweep() -> tuple[str, str]:
    (_, runs), (_, search) = RECIPES["A sweep on Slurm"]
    return runs, search


def commands(script: str, task: int, folder: Path) -> list[str]:
    """The words after `xlstm-rl` of what a task of the array starts."""
    (folder / "bin").mkdir(exist_ok=True)
    stub = folder / "bin" / "srun"
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$*"\n')
    stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(task)}
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    name, *words = shlex.split(done.stdout)
    assert name == "xlstm-rl"
    return words


@pytest.mark.parametrize("script", range(2))
def test_slurm_scripts_are_sound(script: int) -> None:
    subprocess.run(["bash", "-n"], input=sweep()[script], text=True, check=True)


def test_tasks_of_a_slurm_array_are_runs_that_differ_and_go_on(folder: Path) -> None:
    configs = []
    for task in range(9):
        kind, name, *overrides, flag, path = commands(sweep()[0], task, folder)
        assert (kind, flag) == ("train", "--run-dir")
        config = load(name, overrides)
        configs.append((config.memory.name, config.seed, path))
    assert {config[:2] for config in configs} == {(n, s) for n in ("xlstm", "lstm", "gru") for s in range(3)}
    assert len({path for *_, path in configs}) == 9
    (folder / configs[4][2]).mkdir(parents=True)
    (folder / configs[4][2] / "config.yaml").touch()
    assert commands(sweep()[0], 4, folder) == ["train", "--resume", configs[4][2]]


def test_search_on_slurm_is_one_that_can_be_started(folder: Path) -> None:
    from xlstm_rl.cli import _parser

    options, left = _parser().parse_known_args(commands(sweep()[1], 0, folder))
    assert load(options.name, options.overrides + left).total_steps == 500_000 and options.runs == 24


def test_symptoms_speak_of_what_is_logged_and_can_be_set() -> None:
    table = PAGE.partition("## It does not learn")[2]
    model = agent(steps=24)
    named = set(re.findall(r"`((?:train|memory|time)/\w+)`", table))
    model.logger.output_formats.append(None)  # type: ignore[arg-type]
    model.train()
    logged = set(model.logger.name_to_value)
    assert named - {"time/env_seconds"} <= logged and len(named) > 4
    config = plain(load("TMaze-v0"))
    settings = {*config["ppo"], *config["policy"], *config["env"], "blocks", "init"}
    assert set(re.findall(r"`(\w+)(?:=[^`]*)?`", table)) <= settings | {"predict", "learn", "VecNormalize"}
