"""From a configuration to environments."""

from collections.abc import Callable
from contextlib import closing

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from xlstm_rl.agents import GymnasiumVecEnv
from xlstm_rl.configs import ConfigError, TrainConfig, dump, load
from xlstm_rl.configs.validation import build, parse_yaml
from xlstm_rl.envs import NoisyObservation, TaskFacts
from xlstm_rl.runs.build import make_env, make_model, normalized, read_facts
from xlstm_rl.vec_envs.guarded_vec_env import GuardedDummyVecEnv


@pytest.mark.parametrize(
    ("env_id", "kind", "mode"),
    [
        ("CartPole-v1", object, AutoresetMode.NEXT_STEP),
        ("gymnasium:CartPole-v1", object, AutoresetMode.NEXT_STEP),
    ],
)
def test_vector_takes_the_own_vectorised_form_and_resets_at_once_where_it_can(
    env_id: str, kind: type, mode: AutoresetMode
) -> None:
    env = make_env(load(env_id, ["env.vec=vector"]), 4, seed=0)
    assert isinstance(env, GymnasiumVecEnv)
    assert isinstance(env.env, kind) and env.env.metadata["autoreset_mode"] is mode
    assert np.asarray(env.reset()).shape[0] == 4


def test_vector_steps_one_after_the_other_what_has_no_vectorised_form() -> None:
    config = load("xlstm_rl/CartPoleNoVelocity-v0", ["env.vec=vector"])
    assert isinstance(make_env(config, 4, seed=0), GuardedDummyVecEnv)


def test_vector_and_dummy_show_the_same_episodes() -> None:
    settings = ["env.kwargs.length=5", "env.vec=vector"]
    envs = [make_env(load("xlstm_rl/Parity-v0", settings[:count]), 3, seed=7) for count in (2, 1)]
    ours, theirs = (np.asarray(env.reset()) for env in envs)
    np.testing.assert_array_equal(ours, theirs)
    for _ in range(12):
        results = [env.step(np.array([0, 1, 1])) for env in envs]
        for part in range(3):
            np.testing.assert_allclose(np.asarray(results[0][part]), np.asarray(results[1][part]), rtol=1e-6)


IMAGE = spaces.Box(0, 255, (36, 36, 3), np.uint8)
VECTOR = spaces.Box(-1, 1, (2,), np.float32)


def test_wrappers_are_put_around_every_copy_in_their_order() -> None:
    config = load("CartPole-v1", ["env.wrappers.HideVelocity={}", "env.wrappers.NoisyObservation.std=0.2"])
    with closing(make_env(config, 2, 0)) as env:
        assert env.observation_space.shape == (2,)
        assert list(config.env.wrappers) == ["HideVelocity", "NoisyObservation"]
        assert env.env_is_wrapped(NoisyObservation) == [True, True]
    assert read_facts(config.env) is None


@pytest.mark.parametrize(
    "override", ["env.wrappers.HideVelocity={}", "env.wrappers.HideVelocity=", "env.wrappers={HideVelocity: }"]
)
def test_a_wrapper_without_arguments_is_named(override: str) -> None:
    config = load("CartPole-v1", [override])
    assert config.env.wrappers == {"HideVelocity": {}}
    assert load_file_of(config) == config
    assert read_facts(config.env) == TaskFacts(500, 500.0, 50.0)


def load_file_of(config: TrainConfig) -> TrainConfig:
    return build(TrainConfig, parse_yaml(dump(config), "dump"), "dump")


def test_bounds_are_not_stated_where_a_wrapper_of_others_may_have_changed_them() -> None:
    assert read_facts(load("TMaze-v0").env) is not None
    assert read_facts(load("TMaze-v0", ["env.wrappers.DelayObservation.delay=1"]).env) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["env.wrappers.Nois={}"], "'Nois' is no wrapper"),
        (["env.wrappers.NoisyObservation.sd=1"], "wrapper 'NoisyObservation' with {'sd': 1}: .*'sd'"),
        (
            ["env.wrappers.HideVelocity={}", "env.id=xlstm_rl/Parity-v0"],
            "does not know where Parity keeps its velocities",
        ),
    ],
)
def test_wrappers_that_do_not_fit_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_facts(load("CartPole-v1", overrides).env)


@pytest.mark.parametrize("value", ["HideVelocity", "{HideVelocity: 3}", "[HideVelocity]"])
def test_wrappers_are_names_with_arguments(value: str) -> None:
    with pytest.raises(ConfigError, match="env.wrappers"):
        load("CartPole-v1", [f"env.wrappers={value}"])


def test_batches_cannot_be_wrapped() -> None:
    config = load("CartPole-v1", ["env.wrappers.HideVelocity={}", "env.vec=vector"])
    with pytest.raises(ConfigError, match="take env.vec=dummy"):
        make_env(config, 2, 0)


class Shows(gymnasium.Env[object, np.int64]):
    """An observation space and nothing to do."""

    action_space = spaces.Discrete(2)

    def __init__(self, space: spaces.Space[object]) -> None:
        self.observation_space = space


def only(space: spaces.Space[object]) -> Callable[[], Shows]:
    return lambda: Shows(space)


@pytest.mark.parametrize(
    ("space", "normalizes", "keys"),
    [
        (VECTOR, True, None),
        (IMAGE, False, None),
        (spaces.Discrete(3), False, None),
        (spaces.Dict({"view": IMAGE, "speed": VECTOR, "sign": spaces.Discrete(3)}), True, ["speed"]),
        (spaces.Dict({"view": IMAGE}), False, []),
    ],
    ids=str,
)
def test_box_observations_are_normalised_but_not_images(
    space: spaces.Space[object], normalizes: bool, keys: list[str] | None
) -> None:
    config = load("CartPole-v1", ["env.normalize_observation=true"])
    env = normalized(DummyVecEnv([only(space)]), config)
    assert isinstance(env, VecNormalize)
    assert env.norm_obs == normalizes
    if normalizes:
        assert env.norm_obs_keys == keys


@pytest.mark.parametrize(
    "overrides", [["ppo.n_steps=1e12"], ["ppo.n_steps=1e9", "env.n_envs=64"], ["ppo.n_steps=1" + "0" * 400]]
)
def test_rollout_that_no_machine_can_hold_is_refused_in_a_sentence(overrides: list[str]) -> None:
    config = load("tmaze", overrides)
    with closing(make_env(config, config.env.n_envs, 0)) as env:
        with pytest.raises(ConfigError, match=r"a rollout of n_steps=[\d,]+ steps of \d+ environments takes .* GiB"):
            make_model(config, env)
