"""An agent starts from what another has learnt, as far as it fits, and says what that was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from xlstm_rl import RecurrentPPO
from xlstm_rl.configs import ConfigError, load
from xlstm_rl.runs.build import make_env, make_model, normalized, start_from
from xlstm_rl.runs.train import resume, train

SMALL: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "seed": 0, "device": "cpu"}
WORDS = ["ppo.n_steps=16", "ppo.batch_size=32", "env.n_envs=2", "memory.hidden_size=16", "eval.n_episodes=2"]
WORDS += ["eval.interim_episodes=2", "eval.n_envs=2", "env.normalize_observation=true"]


def make(env: Any, **memory: Any) -> RecurrentPPO:
    kwargs = {"memory_kwargs": {"hidden_size": 16, **memory}}
    return RecurrentPPO("MlpXLSTMPolicy", env, policy_kwargs=kwargs, **SMALL)


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an agent on CartPole."""
    path = tmp_path_factory.mktemp("donor") / "agent.zip"
    make("CartPole-v1").learn(16).save(path)
    return path


def weights(model: RecurrentPPO) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.policy.named_parameters()}


def test_all_weights_of_an_equal_agent_are_taken(donor: Path) -> None:
    model, source = make("CartPole-v1", blocks="sm"), weights(RecurrentPPO.load(donor))
    with torch.no_grad():
        for weight in model.policy.parameters():
            weight.add_(1)
    taken = model.take_weights(donor)
    assert set(taken.taken) == set(source) and not (taken.other_shape or taken.missing or taken.frozen)
    assert all(torch.equal(weight, source[name]) for name, weight in weights(model).items())
    known = RecurrentPPO.load(donor)
    assert vars(model._advantage_scale) == vars(known._advantage_scale) and known._advantage_scale.count == 1
    assert model._gradient_norm == known._gradient_norm


def test_layers_of_other_observations_and_actions_stay(donor: Path) -> None:
    model, source = make("Acrobot-v1"), weights(RecurrentPPO.load(donor))
    before = weights(model)
    told = model.take_weights(donor)
    assert set(told.other_shape) == {
        *("memory_actor.input_projection.weight", "action_net.weight", "action_net.bias"),
    }
    for name, weight in weights(model).items():
        assert torch.equal(weight, before[name] if name in told.other_shape else source[name])
    model.learn(16)


def test_parts_that_are_missing_there_are_told(donor: Path) -> None:
    model = RecurrentPPO(
        "MlpXLSTMPolicy",
        "CartPole-v1",
        policy_kwargs={"critic_memory": "separate", "memory_kwargs": {"hidden_size": 16}},
        **SMALL,
    )
    told = model.take_weights(donor, ["memory"])
    assert told.missing and all(name.startswith("memory_critic.") for name in told.missing)
    assert all(name.startswith("memory_actor.") for name in told.taken)


def test_frozen_parts_stay_frozen_in_files(donor: Path, tmp_path: Path) -> None:
    model = make("CartPole-v1")
    told = model.take_weights(donor, ["memory"], freeze=["memory"])
    assert set(told.frozen) == {name for name in weights(model) if name.startswith("memory_")}
    model.save(tmp_path / "agent.zip")
    loaded = RecurrentPPO.load(tmp_path / "agent.zip", make_vec_env("CartPole-v1", 1))
    before = weights(loaded)
    loaded.learn(64)
    moved = {name for name, weight in weights(loaded).items() if not torch.equal(weight, before[name])}
    assert moved and not moved & set(told.frozen)


@pytest.mark.parametrize(
    ("memory", "parts", "message"),
    [
        ({}, ["head"], "'head' is no part of a policy"),
        ({"hidden_size": 32}, ["memory"], "nothing that fits memory"),
    ],
)
def test_what_cannot_be_taken_is_refused(donor: Path, memory: dict[str, Any], parts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("CartPole-v1", **{"num_heads": 2, **memory} if memory else memory).take_weights(donor, parts)


def test_a_run_starts_from_another_and_resumes_with_what_was_frozen(tmp_path: Path) -> None:
    first = train(load("CartPole-v1", [*WORDS, "total_steps=64"]), tmp_path / "first")
    words = [*WORDS, f"init.from={tmp_path / 'first'}", "init.parts=[extractor, memory]", "init.freeze=[memory]"]
    second = train(load("CartPole-v1", [*words, "total_steps=64", "seed=3"]), tmp_path / "second")
    third = resume(second.folder, ["total_steps=128"])
    memories = [
        {name: weight for name, weight in weights(RecurrentPPO.load(run.model)).items() if name.startswith("memory_")}
        for run in (first, second, third)
    ]
    for name, weight in memories[0].items():
        assert torch.equal(weight, memories[1][name]) and torch.equal(weight, memories[2][name])
    heads = [weights(RecurrentPPO.load(run.model))["action_net.weight"] for run in (first, third)]
    assert not torch.equal(heads[0], heads[1])


def test_statistics_of_observations_come_along(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", 1))
    make(env).learn(64).save(tmp_path / "agent.zip")
    for env_id, told in (("CartPole-v1", True), ("Acrobot-v1", False)):
        config = load(env_id, [*WORDS, f"init.from={tmp_path / 'agent.zip'}", "policy.critic_memory=shared"])
        model = make_model(config, normalized(make_env(config, 2, 0, here=True), config))
        report = start_from(model, config)
        assert report is not None and ("statistics of observations taken" in report) == told
        own: Any = model.get_vec_normalize_env()
        theirs: Any = env.obs_rms
        assert bool((own.obs_rms.mean == theirs.mean).all()) if told else own.obs_rms.count < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init.from=nowhere"], "init.from='nowhere'"),
        (["init.freeze=[memory]"], "give init.from"),
        (["init.from=x", "init.parts=[]"], "takes nothing"),
        (["init.from=x", "init.parts=[brain]"], "brain"),
        (["init.form=x"], "did you mean 'from'"),
    ],
)
def test_mistakes_in_the_settings_are_told(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train(load("CartPole-v1", [*WORDS, *words]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_survive_yaml(tmp_path: Path) -> None:
    from xlstm_rl.configs import dump, load_file

    config = load("CartPole-v1", ["init.from=runs/a", "init.freeze=[memory]"])
    (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert load_file(tmp_path / "config.yaml") == config
    assert "from: runs/a" in dump(config)
