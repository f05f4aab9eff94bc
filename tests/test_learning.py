"""Agents learn what only memory can solve, within a budget of steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from xlstm_rl.configs import load
from xlstm_rl.runs.scores import Score
from xlstm_rl.runs.train import train


def scores(tmp_path: Path, preset: str, *overrides: str) -> dict[str, Score]:
    result = train(load(preset, overrides), tmp_path / "run")
    return {score.agent: score for score in result.scores}


@pytest.mark.parametrize("blocks", ["m", "s"])
def test_cue_is_recalled_within_twelve_thousand_steps(blocks: str, tmp_path: Path) -> None:
    result = scores(tmp_path, "cue-recall", f"memory.blocks={blocks}", "total_steps=12000")
    assert result["trained agent"].mean_return >= 0.95
    # 100 fair coins: beyond 0.7 once in 25 000
    assert result["same agent, memory emptied every step"].mean_return < 0.7


def test_agent_without_memory_stays_at_the_memoryless_ceiling(tmp_path: Path) -> None:
    result = scores(tmp_path, "cue-recall", "memory.name=none", "total_steps=12000")
    assert result["trained agent"].mean_return < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("preset", "least", "ceiling"),
    [
        ("cartpole-no-velocity", 475.0, 100.0),
        ("tmaze", 0.95, 0.7),
        ("repeat-previous", 0.9, 0.3),
        ("parity", 0.95, 0.6),
        ("key-value-recall", 0.95, 0.35),
        ("overwrite", 0.9, 0.35),
        ("copy", 0.95, 0.35),
        ("shell-game", 0.95, 0.45),
    ],
)
def test_preset_learns_stays_learnt_and_needs_its_memory(
    preset: str, least: float, ceiling: float, seed: int, tmp_path: Path
) -> None:
    result = scores(tmp_path, preset, f"seed={seed}")
    assert result["trained agent"].mean_return >= least
    assert result["worst of the last 5 evaluations"].mean_return >= 0.95 * least
    assert result["same agent, memory emptied every step"].mean_return < ceiling


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env_id", "kwargs", "steps"),
    [
        ("TMaze-v0", "{corridor_length: 20}", 200_000),
        ("RepeatPrevious-v0", "{lag: 16}", 300_000),
        ("KeyValueRecall-v0", "{num_pairs: 8}", 300_000),
        ("KeyDoor-v0", "{delay: 10, noise: 0.0}", 300_000),
    ],
)
def test_general_settings_learn_tasks_of_all_kinds(env_id: str, kwargs: str, steps: int, tmp_path: Path) -> None:
    result = scores(tmp_path, env_id, f"env.kwargs={kwargs}", f"total_steps={steps}", "env.vec=vector")
    assert result["trained agent"].mean_return >= 0.95
