"""The examples run and do what they say."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3.common.env_util import make_vec_env

from xlstm_rl.agents import evaluate
from xlstm_rl.agents.losses import _REGISTRY as LOSSES
from xlstm_rl.memory.core import _REGISTRY
from xlstm_rl.memory.laws import check_memory_laws
from xlstm_rl.runs.scores import EMPTIED, MEMORYLESS, OPTIMUM, TRAINED
from xlstm_rl.runs.train import evaluate_run

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def own_memory() -> Iterator[dict[str, Any]]:
    yield runpy.run_path(str(EXAMPLES / "own_memory.py"))
    del _REGISTRY["leaky"]


def test_own_memory_obeys_the_laws(own_memory: dict[str, Any]) -> None:
    check_memory_laws(own_memory["LeakyMemory"](3).double())


def test_own_memory_is_short(own_memory: dict[str, Any]) -> None:
    text = (EXAMPLES / "own_memory.py").read_text(encoding="utf-8")
    core = text[text.index("class LeakyState") : text.index('register_memory("leaky"')]
    assert len(core.strip().splitlines()) < 40


def test_own_memory_trains_and_is_needed(own_memory: dict[str, Any]) -> None:
    model = own_memory["train"]()
    assert isinstance(model.policy.memory_actor, own_memory["LeakyMemory"])
    env = make_vec_env("xlstm_rl/CueRecall-v0", 8)
    assert evaluate(model, env, 100, seed=1).returns.mean() >= 0.95
    # 100 fair coins: beyond 0.7 once in 25 000
    assert evaluate(model, env, 100, empty_state_every_step=True, seed=1).returns.mean() < 0.7


def test_own_loss_is_trained_and_falls() -> None:
    example = runpy.run_path(str(EXAMPLES / "own_loss.py"))
    try:
        model = example["train"](4_096)
        first = example["train"](512).logger.name_to_value["train/loss_next-observation"]
        assert model.logger.name_to_value["train/loss_next-observation"] < 0.8 * first
    finally:
        LOSSES.pop("next-observation", None)


def test_trained_agents_that_come_along_are_small() -> None:
    sizes = [file.stat().st_size for file in (EXAMPLES / "agents").glob("*/model.zip")]
    assert len(sizes) == 3
    assert max(sizes) < 300_000


@pytest.mark.parametrize("folder", sorted((EXAMPLES / "agents").iterdir()), ids=lambda folder: folder.name)
def test_trained_agent_that_comes_along_is_at_the_optimum_by_its_memory(folder: Path) -> None:
    scores = {score.agent: score for score in evaluate_run(folder, n_episodes=100, seed=7)}
    optimum, memoryless = scores[OPTIMUM].mean_return, scores[MEMORYLESS].mean_return
    assert scores[TRAINED].mean_return >= optimum - 0.01
    # four standard errors of 100 fair coins
    assert scores[EMPTIED].mean_return <= memoryless + 0.2


def test_single_file_agent_learns_the_t_maze(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "single_file.py"))["main"]
    # a memoryless agent gets 1/2
    assert main(["--steps", "34000"]) > 0.85
    assert "return of the last 100" in capsys.readouterr().out


def test_single_file_agent_is_short_and_takes_any_memory() -> None:
    text = (EXAMPLES / "single_file.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    main = runpy.run_path(str(EXAMPLES / "single_file.py"))["main"]
    # episodes of CartPole are cut by a time limit too
    assert main(["--env", "CartPole-v1", "--steps", "2048", "--memory", "lstm"]) > 5
