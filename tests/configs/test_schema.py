"""The configuration classes."""

import inspect

import pytest

from xlstm_rl.agents import RecurrentPPO
from xlstm_rl.configs import PPOConfig


def test_model_takes_every_field_of_ppo_config() -> None:
    accepted = set(inspect.signature(RecurrentPPO).parameters)
    assert set(PPOConfig().model_arguments()) <= accepted


@pytest.mark.parametrize(("given", "expected"), [(None, -1), (4, 4)])
def test_noise_of_state_dependent_exploration_is_passed_on(given: int | None, expected: int) -> None:
    arguments = PPOConfig(use_sde=True, sde_sample_freq=given).model_arguments()
    assert (arguments["use_sde"], arguments["sde_sample_freq"]) == (True, expected)


def test_linear_schedule_falls_to_zero() -> None:
    schedule = PPOConfig(learning_rate=1e-3, lr_schedule="linear").model_arguments()["learning_rate"]
    assert (schedule(1.0), schedule(0.5), schedule(0.0)) == (1e-3, 5e-4, 0.0)


def test_constant_schedule_is_a_number() -> None:
    assert PPOConfig(learning_rate=1e-3, lr_schedule="constant").model_arguments()["learning_rate"] == 1e-3
