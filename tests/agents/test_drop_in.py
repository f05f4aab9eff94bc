"""One and the same user code runs with sb3-contrib's `RecurrentPPO` and with ours.

What sb3-contrib tests of its class is told here in our words: policies and their arguments, images, dictionaries,
gSDE, schedules, stateful prediction, saving; only the import differs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize

import xlstm_rl

both = pytest.mark.parametrize(
    "cls", [sb3_contrib.RecurrentPPO, xlstm_rl.RecurrentPPO], ids=["sb3_contrib", "xlstm_rl"]
)
POLICY_KWARGS: list[dict[str, Any]] = [
    {"lstm_hidden_size": 8},
    {"lstm_hidden_size": 8, "shared_lstm": True, "enable_critic_lstm": False},
    {"lstm_hidden_size": 8, "enable_critic_lstm": False},
    {"lstm_hidden_size": 4, "n_lstm_layers": 2, "lstm_kwargs": {"dropout": 0.5}},
    {"lstm_hidden_size": 8, "net_arch": {"pi": [8], "vf": [4]}, "activation_fn": torch.nn.ReLU, "ortho_init": False},
]
SMALL: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu"}


class AsDict(gym.ObservationWrapper[Any, Any, Any]):
    """The observation as a part and the whole."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        space = env.observation_space
        assert isinstance(space, spaces.Box)
        part = spaces.Box(space.low[:1], space.high[:1], dtype=np.float32)
        self.observation_space = spaces.Dict({"part": part, "whole": space})

    def observation(self, observation: Any) -> Any:
        return {"part": observation[:1], "whole": observation}


def cartpole() -> gym.Env[Any, Any]:
    return gym.make("CartPole-v1")


def test_constructor_takes_the_arguments_in_the_same_order_with_the_same_defaults() -> None:
    theirs = inspect.signature(sb3_contrib.RecurrentPPO.__init__).parameters
    ours = inspect.signature(xlstm_rl.RecurrentPPO.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].default == parameter.default for name, parameter in theirs.items())
    assert all(parameter.kind is parameter.KEYWORD_ONLY for name, parameter in ours.items() if name not in theirs)


def test_every_public_name_is_there() -> None:
    names = {name for name in dir(sb3_contrib.RecurrentPPO) if not name.startswith("_")}
    assert names <= set(dir(xlstm_rl.RecurrentPPO))


@both
@pytest.mark.parametrize("policy_kwargs", POLICY_KWARGS)
def test_policies_train_and_are_evaluated(cls: Any, policy_kwargs: dict[str, Any]) -> None:
    model = cls("MlpLstmPolicy", "CartPole-v1", policy_kwargs=policy_kwargs, **SMALL)
    model.learn(total_timesteps=32)
    mean, _ = evaluate_policy(model, Monitor(cartpole()), n_eval_episodes=2, warn=False)
    assert isinstance(mean, float) and mean >= 8


@both
@pytest.mark.parametrize("policy_kwargs", POLICY_KWARGS[:3])
def test_images_train(cls: Any, policy_kwargs: dict[str, Any]) -> None:
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=True)
    extractor = {"features_extractor_kwargs": {"features_dim": 16}}
    model = cls("CnnLstmPolicy", env, policy_kwargs=policy_kwargs | extractor, **SMALL)
    model.learn(total_timesteps=32)
    assert model.num_timesteps == 32


@both
@pytest.mark.parametrize("policy_kwargs", POLICY_KWARGS[:3])
def test_dictionaries_train(cls: Any, policy_kwargs: dict[str, Any]) -> None:
    env = make_vec_env(lambda: AsDict(cartpole()), n_envs=2)
    model = cls("MultiInputLstmPolicy", env, policy_kwargs=policy_kwargs, **SMALL).learn(64)
    evaluate_policy(model, env, n_eval_episodes=2, warn=False)
    assert model.num_timesteps == 64


@both
@pytest.mark.parametrize("sde", [{}, {"use_sde": True, "sde_sample_freq": 4}])
def test_continuous_actions_with_schedules(cls: Any, sde: dict[str, Any]) -> None:
    def linear(start: float) -> Callable[[float], float]:
        return lambda progress: start * progress

    kwargs = {"net_arch": [16], "lstm_hidden_size": 8}
    model = cls(
        *("MlpLstmPolicy", "Pendulum-v1", linear(1e-3)),
        clip_range=linear(0.3),
        clip_range_vf=linear(0.2),
        normalize_advantage=False,
        policy_kwargs=kwargs,
        **SMALL,
        **sde,
    )
    model.learn(64)
    action, _ = model.predict(np.zeros(3, np.float32))
    assert action.shape == (1,)
    assert model.env.action_space.contains(action)


@both
def test_stateful_prediction_over_parallel_episodes(cls: Any) -> None:
    env = make_vec_env("CartPole-v1", n_envs=3, seed=0)
    model = cls("MlpLstmPolicy", env, policy_kwargs={"lstm_hidden_size": 8}, **SMALL).learn(48)
    obs, lstm_states, episode_starts = env.reset(), None, np.ones((3,), dtype=bool)
    for _ in range(30):
        actions, lstm_states = model.predict(obs, state=lstm_states, episode_start=episode_starts, deterministic=True)
        obs, _, episode_starts, _ = env.step(actions)
        assert actions.shape == (3,)
        assert all(part.shape[1] == 3 for part in lstm_states)


@both
def test_start_of_the_episode_of_one_environment_may_be_a_plain_bool(cls: Any) -> None:
    model = cls("MlpLstmPolicy", "CartPole-v1", policy_kwargs={"lstm_hidden_size": 8}, **SMALL)
    obs = np.ones(4, np.float32)
    _, fresh = model.predict(obs, episode_start=True, deterministic=True)
    _, second = model.predict(obs, state=fresh, episode_start=False, deterministic=True)
    _, again = model.predict(obs, state=second, episode_start=True, deterministic=True)
    np.testing.assert_array_equal(again[0], fresh[0])
    assert not np.array_equal(second[0], fresh[0])


@both
def test_saved_model_predicts_and_trains_the_same(cls: Any, tmp_path: Path) -> None:
    env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
    model = cls("MlpLstmPolicy", env, policy_kwargs={"lstm_hidden_size": 8}, **SMALL).learn(32)
    model.save(tmp_path / "agent")
    loaded = cls.load(tmp_path / "agent", env=env, device="cpu", print_system_info=False)
    observations = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    for observation in observations:
        expected, _ = model.predict(observation, deterministic=True)
        assert loaded.predict(observation, deterministic=True)[0] == expected
    loaded.learn(32, reset_num_timesteps=False)
    assert loaded.num_timesteps == 64
    parameters = model.get_parameters()
    loaded.set_parameters(parameters, exact_match=True)
    for name, value in model.policy.state_dict().items():
        assert torch.equal(value, loaded.policy.state_dict()[name])


@both
def test_callbacks_loggers_and_normalisation(cls: Any, tmp_path: Path) -> None:
    class Counter(BaseCallback):
        seen: tuple[str, ...] = ()
        rollouts = 0

        def _on_step(self) -> bool:
            self.seen = tuple(self.locals)
            return True

        def _on_rollout_end(self) -> None:
            self.rollouts += 1

    env = VecNormalize(make_vec_env("CartPole-v1", n_envs=2, seed=0))
    eval_env = VecNormalize(make_vec_env("CartPole-v1", n_envs=1), training=False, norm_reward=False)
    model = cls("MlpLstmPolicy", env, policy_kwargs={"lstm_hidden_size": 8}, **SMALL)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    counter = Counter()
    evaluation = EvalCallback(eval_env, best_model_save_path=str(tmp_path), eval_freq=16, n_eval_episodes=1, verbose=0)
    model.learn(96, callback=CallbackList([counter, evaluation]), log_interval=1)
    model.logger.close()
    assert counter.rollouts == 3
    assert {"obs_tensor", "actions", "new_obs", "rewards", "dones", "infos", "values", "log_probs"} <= set(counter.seen)
    assert (tmp_path / "best_model.zip").is_file()
    header = (tmp_path / "progress.csv").read_text(encoding="utf-8").splitlines()[0]
    assert {"rollout/ep_rew_mean", "train/approx_kl", "train/loss", "time/fps"} <= set(header.split(","))


@both
def test_policy_answers_what_users_ask_it(cls: Any) -> None:
    model = cls("MlpLstmPolicy", "CartPole-v1", policy_kwargs={"lstm_hidden_size": 8}, **SMALL)
    observation, batched = model.policy.obs_to_tensor(np.zeros((4, 4), np.float32))
    assert batched and observation.shape == (4, 4)
    shape = (model.policy.lstm_hidden_state_shape[0], 4, model.policy.lstm_hidden_state_shape[2])
    state = (torch.zeros(shape), torch.zeros(shape))
    starts = torch.ones(4)
    distribution, _ = model.policy.get_distribution(observation, state, starts)
    assert distribution.get_actions().shape == (4,)
    assert model.policy.predict_values(observation, state, starts).shape == (4, 1)


@both
def test_both_shared_and_separate_is_refused(cls: Any) -> None:
    with pytest.raises((AssertionError, ValueError)):
        kwargs = {"shared_lstm": True, "enable_critic_lstm": True}
        cls("MlpLstmPolicy", "CartPole-v1", policy_kwargs=kwargs, **SMALL)


# From here on: what only ours says.


@pytest.mark.parametrize("policy", ["MlpLstmPolicy", "MlpXLSTMPolicy"])
def test_state_of_another_number_of_environments_is_refused(policy: str) -> None:
    model = xlstm_rl.RecurrentPPO(policy, "CartPole-v1", **SMALL)
    obs = np.zeros((4, 4), np.float32)
    _, of_four = model.predict(obs)
    _, of_one = model.predict(obs[0])
    assert of_four is not None
    for seen, state in [(obs, of_one), (obs[:3], of_four), (obs[0], of_four), (obs, of_four[:1])]:
        with pytest.raises(ValueError, match="state has the shapes .*hand over what this policy returned"):
            model.predict(seen, state=state)
    with pytest.raises(ValueError, match=r"episode_start has 2 flags for 4 environment\(s\); give one for each"):
        model.predict(obs, state=of_four, episode_start=np.ones(2, bool))


@pytest.mark.parametrize(
    ("policy", "policy_kwargs", "complaint"),
    [
        ("MlpPolicy", {}, r"policy 'MlpPolicy' is unknown; known are \['MlpXLSTMPolicy', "),
        ("MlpXLSTMPolicy", {"lstm_hidden_size": 8}, r"XLSTMPolicy takes no \['lstm_hidden_size'\]; .*MlpLstmPolicy"),
        ("MlpLstmPolicy", {"lstm_hiden_size": 8}, r"takes no \['lstm_hiden_size'\]; .*'lstm_hidden_size'.*'net_arch'"),
        ("CnnXLSTMPolicy", {"blocks": "m"}, r"takes no \['blocks'\]; settings of the memory go into memory_kwargs"),
        ("MlpXLSTMPolicy", {"memory_kwargs": "ms"}, "memory_kwargs='ms' must be a dict"),
        ("MultiInputXLSTMPolicy", {}, "Box observations are no Dict.*use the policy MlpXLSTMPolicy"),
    ],
)
def test_wrong_policy_is_told_with_the_remedy(policy: str, policy_kwargs: dict[str, Any], complaint: str) -> None:
    with pytest.raises((TypeError, ValueError), match=complaint):
        xlstm_rl.RecurrentPPO(policy, "CartPole-v1", policy_kwargs=policy_kwargs, **SMALL)


def test_policy_of_ones_own_takes_arguments_of_its_own() -> None:
    class Louder(xlstm_rl.XLSTMPolicy):
        def __init__(self, *args: Any, volume: float = 1.0, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.volume = volume

    model = xlstm_rl.RecurrentPPO(Louder, "CartPole-v1", policy_kwargs={"volume": 2.0, "net_arch": [8]}, **SMALL)
    assert model.policy.volume == 2.0
