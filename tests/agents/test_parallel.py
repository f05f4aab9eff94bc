"""Data parallel training: many processes do what one does with all their environments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.running_mean_std import RunningMeanStd

from tests.agents.parallel_run import CASES
from xlstm_rl.agents.parallel import Moments, Ranks, ranks

ROOT = Path(__file__).parents[2]


def start(
    kind: str, folder: Path, *, case: str = "plain", world: int = 1, as_ranks: int = 1, double: str = ""
) -> list[Any]:
    """What every rank of a training came to."""
    command = [sys.executable, "-m", "tests.agents.parallel_run", kind, case]
    tail = [str(world), str(as_ranks), double, str(folder)]
    running = [
        subprocess.Popen([*command, str(rank), *tail], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    return [torch.load(folder / f"{kind}.{rank}.pt", weights_only=False) for rank in range(world)]


def far(one: dict[str, Any], other: dict[str, Any]) -> float:
    return float((one["weights"] - other["weights"]).abs().max())


QUICK = [("plain", 2), ("masks", 3), ("truncation", 2), ("ragged", 3), ("separate", 2), ("mixed", 3)]
OTHERS = [(case, world) for case in CASES for world in (2, 3) if (case, world) not in QUICK]


@pytest.mark.parametrize(
    ("case", "world"), [*QUICK, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)]
)
def test_ranks_do_what_one_process_does_with_all_environments(case: str, world: int, tmp_path: Path) -> None:
    """To rounding: after three rollouts all weights, statistics and decisions are those of one process."""
    (one,) = start("one", tmp_path, case=case, as_ranks=world, double="double")
    many = start("many", tmp_path, case=case, world=world, double="double")
    assert far(one, many[0]) < 1e-10
    assert all(torch.equal(many[0]["weights"], rank["weights"]) for rank in many), "ranks agree to the bit"
    for name in ("gradient_norm", "advantage_scale", "explained_variance"):
        assert many[0][name] == pytest.approx(one[name], rel=1e-5, abs=1e-6)
    for name in ("steps", "updates", "episodes"):
        assert many[0][name] == one[name]


def test_ranks_in_float32_are_equal_to_rounding(tmp_path: Path) -> None:
    (one,) = start("one", tmp_path, as_ranks=2)
    many = start("many", tmp_path, world=2)
    assert 0 <= far(one, many[0]) < 1e-5


def test_world_of_one_is_the_plain_run_to_the_bit(tmp_path: Path) -> None:
    (plain,) = start("plain", tmp_path)
    (world_of_one,) = start("world of one", tmp_path)
    assert torch.equal(plain["weights"], world_of_one["weights"])


def test_statistics_are_those_of_what_all_ranks_saw(tmp_path: Path) -> None:
    both = start("normalized", tmp_path, world=2)
    expected = RunningMeanStd(shape=(4,))
    expected.update(np.concatenate([rank["seen"] for rank in both]).astype(np.float64))
    for rank in both:
        assert rank["count"] == pytest.approx(expected.count)
        np.testing.assert_allclose(rank["mean"], expected.mean, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(rank["var"], expected.var, rtol=1e-6)
    assert np.array_equal(both[0]["mean"], both[1]["mean"]) and both[0]["returns"] == both[1]["returns"]


class Told(Ranks):
    """Ranks of a world that all saw given moments."""

    def __init__(self, *seen: np.ndarray) -> None:
        self.seen, self.world_size = seen, 1 + len(seen)

    def gather(self, value: Any) -> list[Any]:
        return [value, *((part.mean(0), part.var(0), len(part)) for part in self.seen)]


@pytest.mark.parametrize("own", [0, 1, 50])
def test_merged_moments_are_those_of_all_observations(own: int) -> None:
    generator = np.random.default_rng(0)
    before, mine, theirs, more = (generator.normal(3, 2, (size, 5)) for size in (70, own, 30, 1))
    running, expected = RunningMeanStd(shape=(5,)), RunningMeanStd(shape=(5,))
    running.update(before)
    moments = Moments(running)
    if own:
        running.update(mine)
    moments.merge(Told(theirs, more))
    expected.update(np.concatenate([before, mine, theirs, more]))
    np.testing.assert_allclose(running.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(running.var, expected.var, rtol=1e-10)
    assert running.count == pytest.approx(expected.count)


def test_one_process_has_nothing_to_agree_on() -> None:
    alone = ranks()
    assert (alone.rank, alone.world_size, alone.least(3), alone.any(False)) == (0, 1, 3, False)
    assert alone.gather("x") == ["x"] and alone.broadcast("x") == "x"
    tensor = torch.ones(2)
    assert alone.sum(tensor) is tensor


def test_restarts_over_nodes_are_refused_without_a_store_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("GROUP_WORLD_SIZE", "2"), ("TORCHELASTIC_MAX_RESTARTS", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        ranks()


@pytest.mark.parametrize("seconds", (0.0, -1.0, float("nan"), float("inf"), 1e12))
def test_timeout_of_ranks_that_is_no_time_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="must be above 0 and at most"):
        ranks(seconds)
