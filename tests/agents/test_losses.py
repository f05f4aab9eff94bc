"""Advantages equal a plain loop, and their normalisation keeps its promises."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import assert_close
from xlstm_rl.agents.losses import AdvantageScale, LateSchedule, PPOLoss, ppo_loss
from xlstm_rl.agents.rollout import gae


def looped_advantage(
    reward: np.ndarray,
    value: np.ndarray,
    next_value: np.ndarray,
    terminated: np.ndarray,
    ended: np.ndarray,
    gamma: float,
    lam: float,
) -> np.ndarray:
    """The definition: a sum of discounted errors up to the end of the episode, for every step on its own."""
    B, T = reward.shape
    advantage = np.zeros((B, T))
    for b in range(B):
        for start in range(T):
            for t in range(start, T):
                following = 0.0 if terminated[b, t] else next_value[b, t]
                error = reward[b, t] + gamma * following - value[b, t]
                advantage[b, start] += (gamma * lam) ** (t - start) * error
                if ended[b, t]:
                    break
    return advantage


@given(
    seed=st.integers(0, 10_000),
    B=st.integers(1, 3),
    T=st.integers(1, 12),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    density=st.floats(0, 1),
)
def test_advantage_equals_the_definition(seed: int, B: int, T: int, gamma: float, lam: float, density: float) -> None:
    rng = np.random.default_rng(seed)
    reward, value, next_value = rng.normal(size=(3, B, T))
    ended = rng.random((B, T)) < density
    terminated = ended & (rng.random((B, T)) < 0.5)
    expected = looped_advantage(reward, value, next_value, terminated, ended, gamma, lam)
    tensors = [torch.from_numpy(array) for array in (reward, value, next_value, terminated, ended)]
    assert_close(gae(*tensors, gamma=gamma, lam=lam), torch.from_numpy(expected))


def test_advantage_of_an_ended_episode_ignores_what_follows() -> None:
    reward, value = torch.zeros(1, 3), torch.zeros(1, 3)
    ended = torch.tensor([[False, True, False]])
    later = torch.tensor([[0.0, 0.0, 100.0]])
    no = torch.zeros(1, 3, dtype=torch.bool)
    before = gae(reward, value, torch.zeros(1, 3), no, ended, gamma=0.9, lam=0.9)
    after = gae(reward + later, value, later, no, ended, gamma=0.9, lam=0.9)
    assert torch.equal(before[:, :2], after[:, :2])


ROLLOUTS = [torch.randn(20, 4, generator=torch.Generator().manual_seed(seed)) * 10.0**-seed for seed in range(4)]


@pytest.mark.parametrize("unit", [1e-3, 7.0, 1e4])
def test_normalised_advantage_does_not_depend_on_the_unit_of_reward(unit: float) -> None:
    plain, scaled = AdvantageScale(), AdvantageScale()
    for advantage in ROLLOUTS:
        assert_close(scaled.normalize(unit * advantage, floor=0.1), plain.normalize(advantage, floor=0.1))


def test_floor_of_zero_is_stock_normalisation() -> None:
    scale = AdvantageScale()
    for advantage in ROLLOUTS:
        stock = (advantage - advantage.mean()) / advantage.std(correction=0)
        assert_close(scale.normalize(advantage, floor=0.0), stock)


def test_first_rollout_is_normalised_as_by_stock_ppo() -> None:
    assert_close(AdvantageScale().normalize(ROLLOUTS[0], floor=0.5).std(correction=0), torch.tensor(1.0))


def test_floor_keeps_noise_small_after_a_solved_task() -> None:
    scale = AdvantageScale()
    scale.normalize(ROLLOUTS[0], floor=0.1)
    noise = 1e-3 * ROLLOUTS[0]
    normalised = scale.normalize(noise, floor=0.1)
    # the divisor is a tenth of the root mean square of both deviations
    expected = 1e-3 / (0.1 * 0.5**0.5)
    assert float(normalised.std(correction=0)) == pytest.approx(expected, rel=1e-3)


def test_equal_advantages_become_zero() -> None:
    assert_close(AdvantageScale().normalize(torch.full((3, 2), 5.0), floor=0.0), torch.zeros(3, 2))


@pytest.mark.parametrize("floor", [-0.1, 1.0, float("nan")])
def test_impossible_floor_is_refused(floor: float) -> None:
    with pytest.raises(ValueError, match="advantage_floor="):
        AdvantageScale().normalize(ROLLOUTS[0], floor=floor)


def loss_of(
    ratio: list[float], advantage: list[float], *, value: list[float] | None = None, clip_vf: float | None = None
) -> PPOLoss:
    """The loss of steps with these probability ratios; values were 0, targets are 1, the first step counts twice."""
    steps = len(ratio)
    log_ratio = torch.tensor([ratio]).log()
    return ppo_loss(
        log_prob=log_ratio - 1.5,
        old_log_prob=torch.full((1, steps), -1.5),
        advantage=torch.tensor([advantage]),
        value=torch.tensor([value or [0.0] * steps]),
        old_value=torch.zeros(1, steps),
        target=torch.ones(1, steps),
        entropy=torch.full((1, steps), 0.7),
        weight=torch.tensor([[2.0] + [1.0] * (steps - 1)]) / (steps + 1),
        clip_range=0.2,
        clip_range_vf=clip_vf,
        ent_coef=0.1,
        vf_coef=0.5,
    )


def test_policy_loss_is_clipped_where_that_makes_it_worse() -> None:
    loss = loss_of([1.5, 1.5, 0.5, 0.5], [1.0, -1.0, 1.0, -1.0])
    assert_close(loss.policy, torch.tensor(-(2 * 1.2 - 1.5 + 0.5 - 0.8) / 5))
    assert_close(loss.clip_fraction, torch.tensor(1.0))


def test_parts_of_the_loss_add_up() -> None:
    loss = loss_of([1.0, 1.1], [1.0, 2.0], value=[0.5, 0.0])
    assert_close(loss.value, torch.tensor((2 * 0.25 + 1.0) / 3))
    assert_close(loss.entropy, torch.tensor(0.7))
    assert_close(loss.total, loss.policy + 0.5 * loss.value - 0.1 * loss.entropy)


def test_value_moves_no_further_than_its_clip() -> None:
    assert_close(loss_of([1.0], [0.0], value=[0.9], clip_vf=0.3).value, torch.tensor(0.7**2))


def test_steps_of_weight_zero_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = {
        name: torch.randn(2, 3, generator=generator)
        for name in ("log_prob", "old_log_prob", "advantage", "value", "old_value", "target", "entropy")
    }
    settings = {"clip_range": 0.2, "clip_range_vf": None, "ent_coef": 0.1, "vf_coef": 0.5}
    weight = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    both = ppo_loss(**parts, weight=weight, **settings)  # type: ignore[arg-type]
    first = ppo_loss(**{name: part[:1] for name, part in parts.items()}, weight=weight[:1], **settings)  # type: ignore[arg-type]
    assert_close(both, first)


def test_late_schedule_keeps_its_value_and_falls_in_the_last_part() -> None:
    schedule = LateSchedule(2e-3, part=0.4)
    assert [schedule(remaining) for remaining in (1.0, 0.7, 0.4, 0.2, 0.0, -0.1)] == [2e-3, 2e-3, 2e-3, 1e-3, 0.0, 0.0]
