"""Runs with other seeds, and the evaluations of a run, meet other episodes."""

from __future__ import annotations

from contextlib import closing
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.vec_env import VecEnv

import xlstm_rl.runs.scores
from xlstm_rl.agents.evaluation import EvaluationResult, evaluate
from xlstm_rl.configs import load
from xlstm_rl.runs.build import make_env, make_model
from xlstm_rl.runs.seeds import Purpose, environment_seed
from xlstm_rl.runs.train import train

ENVS = 32


def environment_seeds(seed: int, purpose: Purpose) -> set[int]:
    first = environment_seed(seed, purpose)
    return set(range(first, first + ENVS))


def test_no_environment_of_a_run_has_the_seed_of_another_one() -> None:
    # a hundred runs; more would meet the evaluations of the first ones
    kinds = [environment_seeds(seed, purpose) for seed in range(100) for purpose in Purpose]
    assert not any(one & other for one, other in combinations(kinds, 2))


@pytest.mark.parametrize("seed", [0, 10**6, 2**31, 10**12])
def test_seeds_fit_into_31_bits(seed: int) -> None:
    assert all(0 <= environment_seed(seed, purpose) < 2**31 - ENVS for purpose in Purpose)


@pytest.mark.parametrize("vec", ["dummy", "vector"])
def test_runs_of_neighbouring_seeds_start_in_other_episodes(vec: str) -> None:
    starts = []
    for seed in (0, 1, 2):
        config = load("CartPole-v1", [f"seed={seed}", f"env.vec={vec}", "env.normalize_observation=false"])
        with closing(make_env(config, 8, environment_seed(seed, Purpose.TRAINING))) as env:
            model = make_model(config, env)
            assert model.env is not None
            starts.append({tuple(row) for row in np.asarray(model.env.reset()).tolist()})
    assert all(len(rows) == 8 for rows in starts)
    assert not any(one & other for one, other in combinations(starts, 2))


def test_evaluations_of_a_run_meet_episodes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def noted(model: object, env: VecEnv, n_episodes: int, *, seed: int, **options: Any) -> EvaluationResult:
        seen.append(seed)
        return evaluate(model, env, n_episodes, seed=seed, **options)

    monkeypatch.setattr(xlstm_rl.runs.scores, "evaluate", noted)
    small = ["total_steps=256", "env.n_envs=2", "ppo.n_steps=64", "ppo.batch_size=64", "eval.every_steps=128"]
    train(load("cue-recall", [*small, "seed=3", "eval.n_episodes=2", "eval.interim_episodes=2"]), tmp_path / "run")
    interim, final = (
        environment_seed(3, purpose) for purpose in (Purpose.INTERIM_EVALUATION, Purpose.FINAL_EVALUATION)
    )
    assert set(seen[:-3]) == {interim}
    # greedy, sampled, and with the memory emptied
    assert seen[-3:] == [final, final, final]
