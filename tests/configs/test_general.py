"""The recommended settings from Python."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from xlstm_rl import RecurrentPPO, general_settings
from xlstm_rl.configs import ConfigError, dump, load, preset_names
from xlstm_rl.memory import make_memory
from xlstm_rl.runs.build import make_env, make_model, normalized

# A small memory and short rollouts, in both spellings.
SMALL: dict[str, Any] = {"n_steps": 16, "batch_size": 64, "policy_kwargs": {"memory_kwargs": {"hidden_size": 16}}}
SMALL_OVERRIDES = ["ppo.n_steps=16", "ppo.batch_size=64", "memory.hidden_size=16"]


def test_trains_as_the_command_line_does_for_a_plain_id() -> None:
    config = load("CartPole-v1", SMALL_OVERRIDES)
    # Two rollouts: the schedule has fallen when the second is trained on.
    theirs = make_model(config, normalized(make_env(config, config.env.n_envs, config.seed), config)).learn(512)
    env = VecNormalize(make_vec_env("CartPole-v1", n_envs=16))
    settings = general_settings(lr_schedule="late", ent_schedule="linear", **SMALL)
    ours = RecurrentPPO("MlpXLSTMPolicy", env, seed=0, device="cpu", **settings).learn(512)
    for mine, other in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert ours._n_updates == 2 * ours.n_epochs


def test_number_starts_the_schedule_and_a_function_replaces_it() -> None:
    schedule = general_settings(learning_rate=4e-4, lr_schedule="linear")["learning_rate"]
    assert (schedule(1.0), schedule(0.5), schedule(0.0)) == (4e-4, 2e-4, 0.0)
    assert general_settings(learning_rate=4e-4)["learning_rate"] == 4e-4
    assert general_settings(learning_rate=abs)["learning_rate"] is abs


def test_entropy_is_constant_unless_told_otherwise() -> None:
    assert general_settings()["ent_coef"] == 0.025
    assert general_settings(ent_coef=0.1)["ent_coef"] == 0.1
    assert general_settings(ent_coef=0.1, ent_schedule="linear")["ent_coef"](0.5) == pytest.approx(0.05)
    falling = general_settings(ent_schedule="linear")["ent_coef"]
    assert (falling(1.0), falling(0.5), falling(0.0)) == (0.05, 0.025, 0.0)


@pytest.mark.parametrize("reset", [True, False])
def test_rounds_of_one_rollout_are_trained_as_one_call(reset: bool) -> None:
    """Self-play and imitation call `learn` again and again, with either way to count steps."""

    def weights(rounds: int) -> list[torch.Tensor]:
        env = make_vec_env("xlstm_rl/CueRecall-v0", n_envs=4, seed=0)
        model = RecurrentPPO("MlpXLSTMPolicy", env, seed=0, device="cpu", **general_settings(**SMALL))
        for _ in range(rounds):
            model.learn(4 * 64 // rounds, reset_num_timesteps=reset)
        return list(model.policy.parameters())

    one, four = weights(1), weights(4)
    # with `reset_num_timesteps` a call begins new episodes, which is all that may differ
    assert reset or all(map(torch.equal, one, four))
    start = RecurrentPPO("MlpXLSTMPolicy", "xlstm_rl/CueRecall-v0", seed=0, device="cpu", **general_settings(**SMALL))
    before = torch.nn.utils.parameters_to_vector(start.policy.parameters())
    moved = [float(torch.dist(torch.nn.utils.parameters_to_vector(after), before).detach()) for after in (one, four)]
    assert 0.5 < moved[1] / moved[0] < 2.0


def test_rate_of_zero_in_all_updates_is_told() -> None:
    settings = general_settings(lr_schedule="linear", **SMALL)
    model = RecurrentPPO("MlpXLSTMPolicy", make_vec_env("CartPole-v1", n_envs=4), device="cpu", **settings)
    with pytest.warns(UserWarning, match="the learning rate was 0 in every update"):
        model.learn(64)
    # the second of two rollouts has it too, after one that moved
    model.learn(128)
    # the rest of a run that goes on may be its last rollout
    model.learn(64, reset_num_timesteps=False)
    with pytest.warns(UserWarning, match="the learning rate was 0 in every update"):
        model.learn(64, reset_num_timesteps=False)


def test_numbers_may_be_those_of_numpy() -> None:
    settings = general_settings(n_steps=np.int64(8), gamma=np.float32(0.5))
    assert (settings["n_steps"], type(settings["n_steps"])) == (8, int)
    assert (settings["gamma"], type(settings["gamma"])) == (0.5, float)


def test_policy_kwargs_are_merged() -> None:
    changed = general_settings(policy_kwargs={"net_arch": [8], "memory_kwargs": {"hidden_size": 32}})["policy_kwargs"]
    plain = general_settings()["policy_kwargs"]
    assert changed == {**plain, "net_arch": [8], "memory_kwargs": {**plain["memory_kwargs"], "hidden_size": 32}}


def test_another_memory_starts_from_its_own_defaults() -> None:
    changed = general_settings(policy_kwargs={"memory": "lstm", "memory_kwargs": {"num_layers": 2}})["policy_kwargs"]
    assert (changed["memory"], changed["memory_kwargs"]) == ("lstm", {"num_layers": 2})


def test_what_the_model_alone_knows_is_handed_on() -> None:
    assert general_settings(verbose=1)["verbose"] == 1


@pytest.mark.parametrize(("name", "value"), [("batch_size", None), ("sde_sample_freq", -1)])
def test_values_of_the_constructor_are_taken(name: str, value: int | None) -> None:
    assert general_settings(**{name: value})[name] == value


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gama": 0.9}, "did you mean 'gamma'"),
        ({"gamma": 2.0}, "gamma=2.0"),
        ({"env": "CartPole-v1"}, "unknown key 'ppo.env'"),
        ({"policy_kwargs": {"memory_kwargs": {"hidden": 3}}}, "did you mean 'hidden_size'"),
        ({"policy_kwargs": {"critic_memory": "seperate"}}, "did you mean 'separate'"),
    ],
)
def test_mistake_is_refused_by_name(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        general_settings(**changes)


RESOLVED = json.loads((Path(__file__).parent / "resolved_presets.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RESOLVED)
def test_resolved_settings_of_presets_stay(name: str) -> None:
    """Runs of the report card are runs of these settings; whoever changes one must make those runs anew."""
    known = RESOLVED[name]
    config = yaml.safe_load(dump(load("TMaze-v0" if name == "general" else name)))
    memory: Any = make_memory(config["memory"].pop("name"), 16, **config["memory"])
    config["memory"] = json.loads(json.dumps(dataclasses.asdict(memory.config)))
    # settings that came later have defaults that change nothing
    assert {key: _known_part(config[key], value) for key, value in known.items()} == known


@pytest.mark.parametrize("name", sorted({*preset_names()} - {*RESOLVED}))
def test_other_presets_are_the_general_settings_on_their_task(name: str) -> None:
    config = load(name)
    general = load(config.env.id)
    env = dataclasses.replace(general.env, kwargs=config.env.kwargs, memory_inputs=config.env.memory_inputs)
    expected = dataclasses.replace(general, env=env, description=config.description, total_steps=config.total_steps)
    assert config == expected


def _known_part(values: Any, known: Any) -> Any:
    if not isinstance(known, dict) or not isinstance(values, dict):
        return values
    return {key: _known_part(values.get(key), part) for key, part in known.items()}
