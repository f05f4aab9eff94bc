"""Losses beside those of PPO."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.agents.small_agents import agent, assert_same
from xlstm_rl import LossTerm, RecurrentPPO, XLSTMPolicy, register_loss
from xlstm_rl.agents import Evaluation, RolloutChunks
from xlstm_rl.agents.losses import _REGISTRY
from xlstm_rl.configs import ConfigError, load
from xlstm_rl.configs.schema import agent_arguments


class Guess(LossTerm):
    """Squared error of a guess at the return of every step."""

    def __init__(self, policy: XLSTMPolicy, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.guess = nn.Linear(policy.memory_actor.output_size, 1)
        self.seen: list[tuple[RolloutChunks, Evaluation]] = []

    def forward(self, chunk: RolloutChunks, computed: Evaluation) -> Tensor:
        self.seen.append((chunk, computed))
        error: Tensor = self.scale * (self.guess(computed.memory).squeeze(-1) - chunk.returns) ** 2
        return error


class Broken(LossTerm):
    """A mean where every step's loss is wanted, or NaN."""

    def __init__(self, policy: XLSTMPolicy, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, chunk: RolloutChunks, computed: Evaluation) -> Tensor:
        return computed.values.mean() if self.how == "mean" else computed.values * np.nan


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_loss("guess", Guess)
    register_loss("broken", Broken)
    yield
    _REGISTRY.clear()


def with_term(name: str = "guess", steps: int = 0, **settings: Any) -> RecurrentPPO:
    return agent(steps=steps, policy_kwargs={"extra_losses": {name: settings}})


def guess_of(model: RecurrentPPO) -> Any:
    return model.policy.loss_terms.terms["guess"]


def test_term_trains_its_own_parameters_and_the_memory() -> None:
    model = with_term(weight=2.0, scale=3.0)
    before = {name: part.clone() for name, part in model.policy.named_parameters()}
    model.learn(24)
    moved = [name for name, part in model.policy.named_parameters() if not torch.equal(part, before[name])]
    assert {"loss_terms.terms.guess.guess.weight", "loss_terms.terms.guess.guess.bias"} <= set(moved)
    chunk, _ = guess_of(model).seen[0]
    model.policy.optimizer.zero_grad()
    loss, terms = model._loss(chunk)
    terms["guess"].backward()  # type: ignore[no-untyped-call]
    gradients = [part.grad for part in model.policy.memory_actor.parameters() if part.grad is not None]
    assert any(float(gradient.abs().sum()) > 0 for gradient in gradients)
    assert "guess" not in loss._asdict()


def test_total_is_the_weighted_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_term(weight=2.0, scale=3.0)
    totals: list[float] = []
    losses: list[tuple[float, float]] = []
    gradients, compute = model.compute_gradients, model._loss

    def noting_gradients(total: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        totals.append(total.item())
        return gradients(total, parts)

    def noting_loss(batch: RolloutChunks, total_weight: Tensor | None = None) -> Any:
        loss, terms = compute(batch, total_weight)
        losses.append((loss.total.item(), terms["guess"].item()))
        return loss, terms

    monkeypatch.setattr(model, "compute_gradients", noting_gradients)
    monkeypatch.setattr(model, "_loss", noting_loss)
    model.learn(24)
    assert totals and np.allclose(totals, [total + 2.0 * term for total, term in losses])


def test_steps_that_do_not_count_have_no_part_in_it() -> None:
    # chunks of 5 in rollouts of 8 overlap
    model = agent(steps=24, seq_len=5, policy_kwargs={"extra_losses": {"guess": {}}})
    chunk, computed = guess_of(model).seen[0]
    assert bool((chunk.weights == 0).any())
    spoiled = chunk._replace(
        returns=torch.where(chunk.weights == 0, torch.full_like(chunk.returns, 1e6), chunk.returns)
    )
    terms = model.policy.loss_terms
    assert torch.equal(terms(chunk, computed)["guess"], terms(spoiled, computed)["guess"])


def test_term_is_saved_and_loaded_with_its_settings(tmp_path: Path) -> None:
    model = with_term(steps=24, weight=0.25, scale=2.0)
    model.save(tmp_path / "agent")
    loaded = RecurrentPPO.load(tmp_path / "agent")
    assert_same(model, loaded)
    assert torch.equal(guess_of(loaded).guess.weight, guess_of(model).guess.weight)
    assert (loaded.policy.loss_terms.weights, guess_of(loaded).scale) == ({"guess": 0.25}, 2.0)
    model.policy.save(str(tmp_path / "policy.zip"))
    assert XLSTMPolicy.load(str(tmp_path / "policy.zip")).loss_terms.weights == {"guess": 0.25}


def test_term_is_logged_by_name() -> None:
    model = with_term(steps=24)
    assert model.logger.name_to_value["train/loss_guess"] > 0


@pytest.mark.parametrize(
    ("settings", "error", "expected"),
    [
        ({"gues": {}}, ValueError, "'gues', which nobody has registered; known: broken, guess"),
        ({"guess": 0.1}, TypeError, "extra_losses['guess']=0.1 must be a dict"),
        ({"guess": {"scal": 1.0}}, TypeError, "scal"),
        ([], TypeError, "extra_losses=[] must be a dict"),
    ],
)
def test_wrong_settings_are_refused(settings: Any, error: type[Exception], expected: str) -> None:
    with pytest.raises(error, match=re.escape(expected)):
        agent(policy_kwargs={"extra_losses": settings})


def test_loss_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'broken' gave the shape \[\] for \[\d+, 8\] steps"):
        with_term("broken", how="mean", steps=24)


def test_term_that_is_not_finite_is_named() -> None:
    with pytest.raises(FloatingPointError, match=r"the loss \(total, loss_broken\) in minibatch 0 of epoch 0"):
        with_term("broken", how="nan", steps=24)


@pytest.mark.parametrize("name", ["a b", "", "a.b"])
def test_names_are_plain(name: str) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        register_loss(name, Guess)


def test_name_of_another_term_is_taken() -> None:
    register_loss("guess", Guess)
    with pytest.raises(ValueError, match="'guess' is already registered"):
        register_loss("guess", Broken)
    with pytest.raises(TypeError, match="must be callable"):
        register_loss("other", 3)  # type: ignore[arg-type]


def test_term_in_a_configuration() -> None:
    config = load("tmaze", ["policy.extra_losses.guess.weight=0.1", "policy.extra_losses.guess.scale=2"])
    arguments = agent_arguments(config.memory, config.policy, config.ppo)
    assert arguments["policy_kwargs"]["extra_losses"] == {"guess": {"weight": 0.1, "scale": 2}}
    with pytest.raises(ConfigError, match=r"policy.extra_losses.guess=1 in .* must be a mapping"):
        load("tmaze", ["policy.extra_losses.guess=1"])


def test_base_class_says_what_is_missing() -> None:
    with pytest.raises(TypeError, match="LossTerm has no forward"):
        LossTerm()(None, None)
