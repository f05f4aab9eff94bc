"""Mixed advantages: what is measured of their gradients is true, and the mixture is the best there is."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.env_util import make_vec_env

from tests.conftest import assert_close
from xlstm_rl import RecurrentPPO
from xlstm_rl.agents.losses import averaged_moments, gradient_moments, mixture, moments_shape, unexplained_reward
from xlstm_rl.agents.rollout import ChunkedRolloutBuffer

KINDS = moments_shape()[-1]


@given(seed=st.integers(0, 1000), units=st.integers(2, 40), steps=st.integers(1, 6))
def test_moments_are_those_of_gradients_of_single_units(seed: int, units: int, steps: int) -> None:
    torch.manual_seed(seed)
    advantages = torch.randn(3, units, steps, dtype=torch.float64)
    scores, inputs = (
        torch.randn(units, steps, 2, dtype=torch.float64),
        torch.randn(units, steps, 4, dtype=torch.float64),
    )
    biased = torch.cat([inputs, torch.ones(units, steps, 1, dtype=torch.float64)], -1)
    gradients = torch.einsum("kus,usa,ush->kuah", advantages, scores, biased).flatten(2)
    inner = torch.einsum("kup,jvp->kjuv", gradients, gradients)
    noise = inner.diagonal(dim1=2, dim2=3).mean(-1)
    signal = (inner.sum((2, 3)) - inner.diagonal(dim1=2, dim2=3).sum(-1)) / (units * (units - 1))
    assert_close(gradient_moments(advantages, scores, inputs), torch.stack([signal, noise]) / noise.trace())


def test_a_single_unit_tells_nothing() -> None:
    moments = gradient_moments(torch.randn(KINDS, 1, 5), torch.randn(1, 5, 2), torch.randn(1, 5, 3))
    assert averaged_moments(None, moments) is None
    assert_close(mixture(None, 1), torch.full((KINDS,), 1 / KINDS, dtype=torch.float64))


def test_a_rollout_with_nan_leaves_no_trace() -> None:
    before = torch.ones(moments_shape(), dtype=torch.float64)
    assert averaged_moments(before, torch.full(moments_shape(), torch.nan, dtype=torch.float64)) is before


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
def test_estimate_without_noise_gets_the_largest_share(unit: float) -> None:
    """Of estimates with the same expectation and independent noise, whatever their units are."""
    torch.manual_seed(0)
    scores, inputs = torch.randn(400, 8, 2), torch.randn(400, 8, 4)
    # what is right to do depends on the input
    true = torch.einsum("usa,ush,ah->us", scores, inputs, torch.ones(2, 4))
    noise = torch.tensor([3.0, 10.0, 30.0, 0.3, 10.0, 30.0])
    units = torch.tensor([1.0, 1.0, 1.0, unit, 1.0, 1.0])
    advantages = units[:, None, None] * (true + noise[:, None, None] * torch.randn(6, *true.shape))
    shares = mixture(averaged_moments(None, gradient_moments(advantages, scores, inputs)), 400) * units
    assert shares.argmax() == 3
    assert shares[3] > 0.6 * shares.sum()


def moments_of(common: list[float], noise: list[float]) -> torch.Tensor:
    """Moments of independent estimates with these products with the reference, and this noise."""
    signal = torch.zeros(KINDS, KINDS, dtype=torch.float64)
    signal[4] = signal[:, 4] = torch.tensor(common, dtype=torch.float64)
    return torch.stack([signal, torch.diag(torch.tensor(noise, dtype=torch.float64))])


def test_a_short_sighted_estimate_that_points_elsewhere_gets_no_more_than_its_part_of_a_tenth() -> None:
    """However precise it is, as that of the cost of acting is where a far goal pays more."""
    factors = mixture(moments_of([-0.02, 0.0, 0.05, 0.05, 0.05, 0.05], [0.01, 1.0, 1.0, 1.0, 1.0, 1.0]), 64)
    aligned = mixture(moments_of([0.05, 0.05, 0.05, 0.05, 0.05, 0.05], [0.01, 1.0, 1.0, 1.0, 1.0, 1.0]), 64)
    scale = torch.tensor([0.1, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    shares, others = (made * scale / (made * scale).sum() for made in (factors, aligned))
    assert shares[0] == pytest.approx(0.1 / 6)
    assert shares.min() >= 0.1 / 6 - 1e-9
    assert others[0] > 0.6


def test_without_evidence_the_least_noise_wins() -> None:
    factors = mixture(moments_of([0.0] * 6, [1.0, 0.1, 1.0, 1.0, 1.0, 1.0]), 16)
    assert factors.argmax() == 1


def test_expected_reward_is_fitted_without_the_row_itself() -> None:
    torch.manual_seed(0)
    features, weight = torch.randn(20, 30, 4), torch.ones(20, 30)
    fold = torch.arange(20) % 2 == 0
    surprise = torch.randn(20, 30)
    reward = features @ torch.tensor([1.0, -2.0, 0.0, 0.5]) + 3 + surprise
    unexplained = unexplained_reward(reward, features, weight, fold)
    assert torch.corrcoef(torch.stack([unexplained.flatten(), surprise.flatten()]))[0, 1] > 0.98
    changed = reward.clone()
    changed[0, 7] += 100
    difference = unexplained_reward(changed, features, weight, fold) - unexplained
    expected = torch.zeros(20, 30)
    expected[0, 7] = 100
    assert torch.allclose(difference[fold], expected[fold], atol=1e-3)
    weight[0, 7] = 0
    ignored = unexplained_reward(changed, features, weight, fold) - unexplained_reward(reward, features, weight, fold)
    assert torch.allclose(ignored, expected, atol=1e-4)


class Acting(gym.Env[np.ndarray, object]):
    """Random observations for actions of any space."""

    observation_space = spaces.Box(-1, 1, (3,))

    def __init__(self, action_space: spaces.Space[object]) -> None:
        self.action_space = action_space

    def reset(self, *, seed: int | None = None, options: object = None) -> tuple[np.ndarray, dict[str, object]]:
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action: object) -> tuple[np.ndarray, float, bool, bool, dict[str, object]]:
        self.steps += 1
        reward = float(np.sum(np.asarray(action))) + self.np_random.normal()
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), reward, self.steps >= 7, False, {}


SPACES: dict[str, spaces.Space[object]] = {
    "Discrete": spaces.Discrete(3),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3]),
    "MultiBinary": spaces.MultiBinary(3),
    "Box": spaces.Box(-1, 1, (2,)),
}


@pytest.mark.parametrize(("kind", "sde"), [*((kind, False) for kind in SPACES), ("Box", True)])
def test_scores_are_what_the_gradient_of_the_head_is_made_of(kind: str, sde: bool) -> None:
    model = RecurrentPPO("MlpXLSTMPolicy", Acting(SPACES[kind]), n_steps=16, seed=0, use_sde=sde, device="cpu")
    model.learn(16)
    policy, chunks = model.policy, model.rollout_buffer.chunks(torch.zeros(16, 1))
    latents = policy.latents(chunks.observations, chunks.state, chunks.episode_starts)
    actions, factors = chunks.actions.flatten(0, 1), torch.randn(16)
    scores = policy.scores(latents.actor, actions, None)
    computed = policy.evaluate_sequence(chunks.observations, chunks.actions, chunks.state, chunks.episode_starts)
    loss = (factors * computed.log_prob.flatten()).sum()
    weight, bias = torch.autograd.grad(loss, [*policy.action_net.parameters()])
    # gSDE's variance depends on the latent, not on the head's weights
    assert_close(torch.einsum("n,na,nh->ah", factors, scores, latents.actor.detach()), weight)
    assert_close(torch.einsum("n,na->a", factors, scores), bias)


@pytest.mark.parametrize(("n_envs", "n_steps", "seq_len"), [(1, 16, 16), (1, 40, 16), (3, 28, 8), (16, 8, 8)])
def test_any_number_of_environments_and_chunks_is_mixed(n_envs: int, n_steps: int, seq_len: int) -> None:
    env = make_vec_env(lambda: Acting(SPACES["Discrete"]), n_envs)
    model = RecurrentPPO(
        "MlpXLSTMPolicy", env, n_steps=n_steps, seq_len=seq_len, mix_advantages=True, seed=0, device="cpu"
    )
    model.learn(3 * n_steps * n_envs)
    assert model._gradient_moments is not None
    assert mixture(model._gradient_moments, 16).isfinite().all()
    assert {"advantages/reward", "advantages/0.95"} <= model.logger.name_to_value.keys()


def test_the_reward_alone_wins_where_nothing_has_consequences() -> None:
    """Each action is paid at once, behind noise that other steps add."""
    env = make_vec_env(lambda: Acting(SPACES["Discrete"]), 16)
    model = RecurrentPPO("MlpXLSTMPolicy", env, n_steps=32, mix_advantages=True, seed=0, device="cpu", n_epochs=1)
    model.learn(8 * 512)
    factors = mixture(model._gradient_moments, 16)
    assert factors[0] + factors[1] > factors[2:].sum()


def test_chunks_are_joined_to_what_they_were_cut_from() -> None:
    buffer = ChunkedRolloutBuffer(10, spaces.Box(-1, 1, (2,)), spaces.Discrete(2), "cpu", n_envs=3, seq_len=4)
    steps = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    assert np.array_equal(buffer.join(buffer.cut(steps)), steps)


def test_moments_are_saved_and_odd_ones_refused(tmp_path: Path) -> None:
    model = RecurrentPPO("MlpXLSTMPolicy", Acting(SPACES["Box"]), n_steps=16, mix_advantages=True, seed=0, device="cpu")
    model.learn(32)
    model.save(tmp_path / "agent.zip")
    loaded = RecurrentPPO.load(tmp_path / "agent.zip")
    assert loaded.mix_advantages
    assert loaded._gradient_moments is not None and model._gradient_moments is not None
    assert torch.equal(loaded._gradient_moments, model._gradient_moments)
    model._gradient_moments = torch.full((2, 3), torch.nan)
    model.save(tmp_path / "odd.zip")
    with pytest.raises(ValueError, match=r"moments of gradients are finite and \(2, 6, 6\)"):
        RecurrentPPO.load(tmp_path / "odd.zip")


def test_mix_advantages_is_true_or_false() -> None:
    with pytest.raises(TypeError, match="mix_advantages='yes' must be True or False"):
        RecurrentPPO("MlpXLSTMPolicy", "CartPole-v1", mix_advantages="yes")  # type: ignore[arg-type]
