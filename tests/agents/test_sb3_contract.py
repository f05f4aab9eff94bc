"""What users of Stable-Baselines3 rely on holds for `RecurrentPPO`."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, configure
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import xlstm_rl  # noqa: F401  registers the tasks
from tests.agents.small_agents import SMALL, agent, played
from tests.agents.spaces_for_tests import ACTIONS, OBSERVATIONS, RandomEpisodes, policy_name, vec_env
from xlstm_rl.agents import ChunkedRolloutBuffer, RecurrentPPO, minibatches
from xlstm_rl.agents.losses import PPOLoss, ppo_loss
from xlstm_rl.agents.policy import XLSTMPolicy
from xlstm_rl.memory import leaves


class Log(KVWriter):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.rows.append(dict(key_values))

    def close(self) -> None:
        pass


def logged(model: RecurrentPPO, steps: int) -> list[dict[str, Any]]:
    """What `learn` logs."""
    log = Log()
    logger = configure(None, [])
    logger.output_formats.append(log)
    model.set_logger(logger)
    model.learn(steps)
    return log.rows


def assert_finite(model: RecurrentPPO) -> None:
    for name, weight in model.policy.named_parameters():
        assert weight.isfinite().all(), name


# Spaces and environments.


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_every_space_trains_and_predicts(observation: str, action: str) -> None:
    model = agent(observation, action, steps=48)
    assert model.num_timesteps == 48
    assert_finite(model)
    obs: Any = vec_env(observation=observation, action=action).reset()
    actions, _ = model.predict(obs)
    assert len(actions) == 3
    assert all(model.action_space.contains(one) for one in actions)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_single_observation_needs_no_batch_dimension(observation: str, action: str) -> None:
    model = agent(observation, action)
    space = OBSERVATIONS[observation]
    space.seed(0)
    chosen, state = model.predict(space.sample(), deterministic=True)
    again, _ = model.predict(space.sample(), state=state, episode_start=np.array([False]))
    assert model.action_space.contains(chosen if chosen.shape else int(chosen))
    assert again.shape == model.action_space.shape


@pytest.mark.parametrize("use_sde", [False, True])
def test_actions_may_have_several_dimensions(use_sde: bool) -> None:
    class Matrix(RandomEpisodes):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = spaces.Box(-1, 1, (2, 3))

    model = agent(env=Matrix(), steps=24, use_sde=use_sde)
    assert model.rollout_buffer.actions.shape == (8, 1, 2, 3)
    assert_finite(model)
    assert model.predict(np.zeros(3, np.float32))[0].shape == (2, 3)


def test_environment_is_made_from_its_id() -> None:
    model = agent(env="CartPole-v1", steps=16)
    assert model.n_envs == 1
    assert model.env is not None
    assert np.mean(evaluate_policy(model, model.env, 2)[0]) >= 1


def test_single_environment_is_wrapped() -> None:
    assert agent(env=RandomEpisodes(), steps=16).n_envs == 1


def test_environments_in_processes_train() -> None:
    env = SubprocVecEnv([RandomEpisodes, RandomEpisodes])
    try:
        assert_finite(agent(env=env, steps=32))
    finally:
        env.close()


def test_normalised_environment_trains() -> None:
    env = VecNormalize(vec_env())
    model = agent(env=env, steps=48)
    statistics: Any = env.obs_rms
    assert model.get_vec_normalize_env() is env
    assert statistics.count > 48
    assert_finite(model)


def test_environment_may_be_replaced_by_another_number_of_copies() -> None:
    model = agent(steps=24)
    model.set_env(vec_env(n_envs=5))
    model.learn(40, reset_num_timesteps=False)
    assert model.num_timesteps == 24 + 40
    assert model.rollout_buffer.advantages.shape == (8, 5)
    assert all(leaf.shape[0] == 5 for leaf in leaves(model._last_state))


def test_environment_of_other_spaces_is_refused() -> None:
    model = agent()
    with pytest.raises(ValueError, match="do not match"):
        model.set_env(vec_env(n_envs=5, action="box"))
    assert model.n_envs == 3


# Learning.


def test_second_learn_goes_on_where_the_first_stopped() -> None:
    model = agent(steps=24)
    before, obs = model._last_state, model._last_obs
    seen: list[Any] = []
    add = model.rollout_buffer.add_state
    model.rollout_buffer.add_state = lambda state: (seen.append(state), add(state))[1]  # type: ignore[method-assign, func-returns-value]
    assert model.env is not None
    model.env.reset = lambda: pytest.fail("the environment was reset")  # type: ignore[method-assign]
    model.learn(24, reset_num_timesteps=False)
    assert model.num_timesteps == 48
    assert seen[0] is before
    assert np.array_equal(model.rollout_buffer.observations[0], obs)  # type: ignore[arg-type]


def test_learn_counts_from_zero_by_default() -> None:
    assert agent(steps=24).learn(24).num_timesteps == 24


def test_same_seed_gives_the_same_weights() -> None:
    one, two = agent(steps=48), agent(steps=48)
    for a, b in zip(one.policy.parameters(), two.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_tensorboard_files_hold_the_usual_tags(tmp_path: Path) -> None:
    model = agent(env="xlstm_rl/CueRecall-v0", n_steps=32, batch_size=32, tensorboard_log=str(tmp_path))
    model.learn(64, tb_log_name="run")
    events = EventAccumulator(str(tmp_path / "run_1")).Reload()
    assert set(events.Tags()["scalars"]) >= {
        *("rollout/ep_rew_mean", "rollout/ep_len_mean", "rollout/success_rate", "time/fps", "train/approx_kl"),
        *("train/clip_fraction", "train/clip_range", "train/entropy_loss", "train/explained_variance"),
        *("train/learning_rate", "train/loss", "train/policy_gradient_loss", "train/value_loss"),
    }
    assert [event.step for event in events.Scalars("train/loss")] == [64]


def test_success_rate_is_that_of_the_last_episodes() -> None:
    model = agent(env="xlstm_rl/CueRecall-v0", n_steps=50, batch_size=50)
    rate = logged(model, 50)[-1]["rollout/success_rate"]
    assert rate == np.mean(model.ep_success_buffer)  # type: ignore[arg-type]
    assert len(model.ep_success_buffer or ()) == 5


def test_evaluation_callback_keeps_the_best_model(tmp_path: Path) -> None:
    callback = EvalCallback(vec_env(1), n_eval_episodes=2, eval_freq=8, best_model_save_path=str(tmp_path), verbose=0)
    agent(steps=0).learn(48, callback)
    assert np.isfinite(callback.best_mean_reward)
    RecurrentPPO.load(tmp_path / "best_model")


def test_training_stops_at_a_reward_threshold() -> None:
    stop = StopTrainingOnRewardThreshold(-1e9, verbose=0)
    model = agent().learn(
        480, EvalCallback(vec_env(1), callback_on_new_best=stop, n_eval_episodes=1, eval_freq=4, verbose=0)
    )
    assert model.num_timesteps == 12


def test_learning_after_an_early_stop_goes_on_where_the_environments_are() -> None:
    class Seen(BaseCallback):
        def _on_step(self) -> bool:
            self.obs = self.locals["new_obs"]
            return self.n_calls < 5

    model, callback = agent(steps=24), Seen()
    model.learn(24, callback, reset_num_timesteps=False)
    np.testing.assert_array_equal(model._last_obs, callback.obs)
    assert model.learn(24, reset_num_timesteps=False).num_timesteps >= 48


def test_checkpoint_callback_writes_checkpoints(tmp_path: Path) -> None:
    agent(env=VecNormalize(vec_env())).learn(48, CheckpointCallback(8, str(tmp_path), save_vecnormalize=True))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"rl_model_24_steps.zip", "rl_model_48_steps.zip", "rl_model_vecnormalize_48_steps.pkl"} <= names
    assert RecurrentPPO.load(tmp_path / "rl_model_24_steps").num_timesteps == 24


def test_progress_bar_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    tqdm = pytest.importorskip("tqdm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tqdm.TqdmExperimentalWarning)
        agent().learn(24, progress_bar=True)
    captured = capfd.readouterr()
    assert "24/24" in captured.out + captured.err


# Settings.


@pytest.mark.parametrize("critic_memory", ["separate", "none"])
def test_features_need_not_be_shared(critic_memory: str) -> None:
    kwargs = {"share_features_extractor": False, "critic_memory": critic_memory}
    model = agent("dict with image", steps=24, policy_kwargs=kwargs)
    assert model.policy.pi_features_extractor is not model.policy.vf_features_extractor
    assert_finite(model)


def test_own_layers_and_extractor_are_used() -> None:
    class Half(BaseFeaturesExtractor):
        def __init__(self, observation_space: spaces.Box, factor: float) -> None:
            super().__init__(observation_space, 3)
            self.factor = factor

        def forward(self, observations: Tensor) -> Tensor:
            return self.factor * observations

    kwargs = {
        "features_extractor_class": Half,
        "features_extractor_kwargs": {"factor": 0.5},
        "net_arch": {"pi": [5], "vf": [6, 7]},
        "activation_fn": nn.ReLU,
    }
    model = agent(steps=24, policy_kwargs=kwargs)
    assert [layer.out_features for layer in model.policy.mlp_extractor.value_net if isinstance(layer, nn.Linear)] == [
        6,
        7,
    ]
    assert model.policy.action_net.in_features == 5
    assert any(isinstance(layer, nn.ReLU) for layer in model.policy.mlp_extractor.policy_net)


@pytest.mark.parametrize(
    ("kwargs", "critic_memory"),
    [
        ({"lstm_hidden_size": 6}, "separate"),
        ({"lstm_hidden_size": 6, "shared_lstm": True, "enable_critic_lstm": False}, "shared"),
        ({"lstm_hidden_size": 6, "n_lstm_layers": 2, "enable_critic_lstm": False}, "none"),
        ({"lstm_hidden_size": 6, "n_lstm_layers": 2, "lstm_kwargs": {"dropout": 0.1, "bias": False}}, "separate"),
    ],
)
def test_arguments_of_the_lstm_policies_are_understood(kwargs: dict[str, Any], critic_memory: str) -> None:
    model = RecurrentPPO("MlpLstmPolicy", vec_env(), n_steps=8, batch_size=24, policy_kwargs=kwargs).learn(24)
    assert model.policy.critic_memory == critic_memory
    assert model.policy.memory_actor.output_size == 6
    assert model.policy.memory_actor.state_size == 2 * 6 * kwargs.get("n_lstm_layers", 1)


@pytest.mark.parametrize("observation", ["vector", "image", "dict"])
def test_lstm_aliases_fit_their_observations(observation: str) -> None:
    model = RecurrentPPO(
        policy_name(observation, "Lstm"),
        vec_env(observation=observation),
        n_steps=8,
        batch_size=24,
        n_epochs=1,
        policy_kwargs={"lstm_hidden_size": 4},
    )
    assert_finite(model.learn(24))


def test_gsde_trains_and_draws_new_noise() -> None:
    model = agent(action="box", steps=24, use_sde=True, sde_sample_freq=4)
    obs = np.zeros((3, 3), np.float32)
    one, _ = model.predict(obs)
    again, _ = model.predict(obs)
    model.policy.reset_noise(3)
    other, _ = model.predict(obs)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_squashed_actions_use_the_whole_range() -> None:
    env = vec_env(action="box")
    taken: list[np.ndarray] = []
    step = env.step
    env.step = lambda actions: (taken.append(actions), step(actions))[1]  # type: ignore[method-assign, func-returns-value]
    agent(env=env, steps=48, use_sde=True, policy_kwargs={"squash_output": True, "log_std_init": 2.0})
    largest = np.abs(taken).max()
    assert 1.5 < largest <= 2.0


def test_schedules_reach_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("clip_range", "clip_range_vf", "ent_coef")
    seen: list[list[float]] = []

    def spy(**kwargs: Any) -> PPOLoss:
        seen.append([kwargs[name] for name in names])
        return ppo_loss(**kwargs)

    monkeypatch.setattr("xlstm_rl.agents.ppo.ppo_loss", spy)
    schedules: dict[str, Any] = {"clip_range": LinearSchedule(0.2, 0, 1), "clip_range_vf": LinearSchedule(2, 1, 1)}
    agent(ent_coef=lambda progress: 0.01 * progress, batch_size=24, **schedules, steps=96)
    expected: list[list[float]] = [[0.15, 1.75, 0.0075], [0.1, 1.5, 0.005], [0.05, 1.25, 0.0025], [0, 1, 0]]
    assert np.allclose(seen, expected)


def test_schedules_are_logged() -> None:
    model = agent(learning_rate=LinearSchedule(1e-3, 0, 1), clip_range=LinearSchedule(0.2, 0, 1), clip_range_vf=1.0)
    rows = [row for row in logged(model, 96) if "train/loss" in row]
    assert np.allclose([row["train/clip_range"] for row in rows], [0.15, 0.1, 0.05])
    assert np.allclose([row["train/learning_rate"] for row in rows], [7.5e-4, 5e-4, 2.5e-4])
    assert rows[-1]["train/clip_range_vf"] == 1.0


def test_target_kl_stops_the_update() -> None:
    model = agent(learning_rate=0.1, n_epochs=10, target_kl=1e-4).learn(24)
    assert model._n_updates < 10


def test_remainder_of_one_step_leaves_finite_weights() -> None:
    assert_finite(agent(n_steps=11, batch_size=32, seq_len=1, steps=66))


def test_rollout_need_not_be_a_multiple_of_the_sequence() -> None:
    assert_finite(agent(n_steps=11, batch_size=8, seq_len=4, steps=66))


def test_refreshed_states_train() -> None:
    assert_finite(agent(n_steps=12, batch_size=8, seq_len=4, n_epochs=3, refresh_state=True, steps=72))


def test_advantages_may_be_left_as_they_are() -> None:
    assert_finite(agent(normalize_advantage=False, steps=24))


def test_weights_stay_finite_where_every_reward_is_equal() -> None:
    model = agent(env=VecNormalize(vec_env(), norm_obs=False, clip_reward=0.0), steps=48)
    assert_finite(model)


@pytest.mark.parametrize("critic_memory", ["shared", "separate"])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", ["vector", "image", "dict with image"])
def test_policy_in_double_precision_predicts_and_trains(observation: str, action: str, critic_memory: str) -> None:
    separate = {"critic_memory": critic_memory, "share_features_extractor": critic_memory == "shared"}
    model = agent(observation, action, policy_kwargs=separate)
    model.policy.double()
    state: Any = None
    for _ in range(3):
        chosen, state = model.predict(model.observation_space.sample(), state=state)
        assert model.action_space.contains(chosen)
        assert {part.dtype for part in state} == {np.dtype(np.float64)}
    model.learn(24)


def test_policy_in_double_precision_remembers_the_same() -> None:
    single, double = played(agent(steps=24)), agent(steps=24)
    double.policy.double()
    for one, other in zip(single, played(double), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_steps", [4, 9])
def test_number_of_steps_that_changed_after_construction_is_refused(n_steps: int) -> None:
    model = agent()
    model.n_steps = n_steps
    with pytest.raises(
        ValueError, match=rf"n_steps={n_steps} was set after .* for 8 steps: give n_steps to the constr"
    ):
        model.learn(24)


class OwnBuffer(ChunkedRolloutBuffer):
    pass


def test_own_buffer_is_used() -> None:
    assert type(agent(rollout_buffer_class=OwnBuffer, steps=24).rollout_buffer) is OwnBuffer


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "n_steps": ({"n_steps": 0}, "n_steps=0 must be at least 1"),
    "batch_size": ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    "n_epochs": ({"n_epochs": 0}, "n_epochs=0 must be at least 1"),
    "part of a step": ({"n_steps": 1.5}, "n_steps=1.5 must be a whole number of at least 1"),
    "gamma": ({"gamma": 2}, "gamma=2 must be a finite number of at least 0 and at most 1"),
    "gae_lambda": ({"gae_lambda": -0.1}, "gae_lambda=-0.1 must be a finite number of at least 0 and at most 1"),
    "clip_range": ({"clip_range": 0}, "clip_range=0 must be a finite number greater than 0"),
    "clip_range_vf": ({"clip_range_vf": -1.0}, "clip_range_vf=-1.0 must be a finite number greater than 0"),
    "vf_coef": ({"vf_coef": "half"}, "vf_coef='half' must be a finite number of at least 0"),
    "max_grad_norm": ({"max_grad_norm": 0.0}, r"max_grad_norm=0.0 must be above 0; float\('inf'\) is no bound"),
    "long sequence": ({"seq_len": 9}, "seq_len=9 must be between 1 and n_steps=8"),
    "sequence over batch": ({"seq_len": 8, "batch_size": 7}, "seq_len=8 is more than batch_size=7"),
    "floor": ({"advantage_floor": 1.5}, "advantage_floor=1.5"),
    "critic memory": ({"policy_kwargs": {"critic_memory": "all"}}, "critic_memory='all' must be"),
    "features": ({"policy_kwargs": {"share_features_extractor": False}}, "set critic_memory='separate' or 'none'"),
    "memory": ({"policy_kwargs": {"memory": "moon"}}, "unknown memory 'moon'"),
    "heads": ({"policy_kwargs": {"memory_kwargs": {"hidden_size": 7, "num_heads": 2}}}, "7.*2"),
    "gSDE": ({"use_sde": True}, "can only be used with continuous actions"),
    "policy": ({"policy": "NoPolicy"}, r"policy 'NoPolicy' is unknown; known are \['MlpXLSTMPolicy'"),
    "policy without memory": ({"policy": PPO.policy_aliases["MlpPolicy"], "policy_kwargs": None}, "has no memory core"),
    "buffer": ({"rollout_buffer_class": dict}, "must subclass ChunkedRolloutBuffer"),
    "Dict observation": ({"observation": "dict", "policy": "MlpXLSTMPolicy"}, "MultiInputXLSTMPolicy"),
    "Dict observation, class": ({"observation": "dict", "policy": XLSTMPolicy}, "MultiInputXLSTMPolicy"),
    "LSTM of both": (
        {"policy": "MlpLstmPolicy", "policy_kwargs": {"shared_lstm": True}},
        "shared_lstm=True needs enable_critic_lstm=False",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument_is_named(case: str) -> None:
    arguments, message = WRONG[case]
    settings: dict[str, Any] = {"policy": "MlpXLSTMPolicy", "n_steps": 8, "batch_size": 24, "policy_kwargs": SMALL}
    settings |= arguments
    env = vec_env(observation=settings.pop("observation", "vector"))
    with pytest.raises((TypeError, ValueError), match=message):
        RecurrentPPO(settings.pop("policy"), env, **settings)


# Memory states.


def observations(steps: int, n_envs: int = 3) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (steps, n_envs, 3)).astype(np.float32)


@pytest.mark.parametrize("memory", ["xlstm", "lstm", "gru", "none"])
@pytest.mark.parametrize("critic_memory", ["shared", "separate"])
def test_predict_carries_the_state_of_the_policy(memory: str, critic_memory: str) -> None:
    kwargs = {"memory": memory, "memory_kwargs": {"hidden_size": 8}, "critic_memory": critic_memory}
    model = agent(action="box", policy_kwargs=kwargs)
    state, inner = None, model.policy.initial_state(3)
    going_on = torch.zeros(3, dtype=torch.bool)
    model.policy.set_training_mode(False)
    for obs in observations(5):
        actions, state = model.predict(obs, state=state, deterministic=True)
        assert state is not None
        state = tuple(np.array(part) for part in state)
        with torch.no_grad():
            result = model.policy.act(torch.from_numpy(obs), inner, going_on, deterministic=True)
        inner = result.state
        assert np.allclose(actions, result.actions.numpy().clip(-2, 2), atol=1e-6)


def test_state_emptied_every_step_equals_a_fresh_one() -> None:
    model = agent(action="box", policy_kwargs={"memory_kwargs": {"hidden_size": 8, "blocks": "ms"}})
    state = None
    for obs in observations(4):
        fresh, _ = model.predict(obs, deterministic=True)
        emptied, state = model.predict(obs, state=state, episode_start=np.ones(3, bool), deterministic=True)
        assert np.array_equal(fresh, emptied)


def test_memory_matters_otherwise() -> None:
    model = agent(action="box")
    first, second = observations(2)
    _, state = model.predict(first, deterministic=True)
    carried, _ = model.predict(second, state=state, episode_start=np.array([False, True, False]), deterministic=True)
    fresh, _ = model.predict(second, deterministic=True)
    assert (carried == fresh).all(axis=1).tolist() == [False, True, False]


def test_rollout_starts_episodes_from_an_empty_state() -> None:
    model = agent(n_steps=30, batch_size=90)
    model.train = lambda: None  # type: ignore[method-assign]
    model.learn(90)
    buffer = model.rollout_buffer
    empty = model.policy.initial_state(1)
    starts = np.argwhere(buffer.episode_starts)
    assert len(starts) > 3
    for t, row in starts:
        obs = torch.from_numpy(buffer.observations[t, row : row + 1])
        value = model.policy.value(obs, empty, torch.tensor([False]))
        assert np.isclose(value.item(), buffer.values[t, row], atol=1e-6)


def test_evaluate_policy_runs_whole_episodes() -> None:
    returns, lengths = evaluate_policy(agent(), vec_env(2), 5, return_episode_rewards=True)
    assert len(returns) == len(lengths) == 5  # type: ignore[arg-type]


def test_batch_size_none_takes_the_whole_rollout() -> None:
    model = agent(batch_size=None, n_epochs=3)
    assert model.chunk_length == 8
    model.learn(24)
    assert sum(1 for _ in minibatches(model.rollout_buffer.chunks(torch.zeros(8, 3)), 24)) == 1


def test_going_on_with_running_episodes_needs_as_many_environments() -> None:
    with pytest.raises(ValueError, match="3 running episodes, but env has 2"):
        agent(steps=24).set_env(vec_env(n_envs=2), force_reset=False)


@pytest.mark.parametrize("part", ["observation", "reward"])
def test_training_stops_at_nan_and_names_the_place(part: str) -> None:
    class Broken(RandomEpisodes):
        def step(self, action: Any) -> Any:
            obs, reward, *rest = super().step(action)
            return (obs * np.nan, reward, *rest) if part == "observation" else (obs, np.nan, *rest)

    with pytest.raises(FloatingPointError, match=rf"the {part} of environment 0 is nan.* in step \d of the rollout"):
        agent(env=make_vec_env(Broken, n_envs=1)).learn(8)


def test_every_step_weighs_the_same_whatever_minibatch_it_falls_into() -> None:
    model = agent(n_steps=10, seq_len=8, batch_size=8, steps=30)
    batches = list(minibatches(model.rollout_buffer.chunks(torch.zeros(10, 3)), 8))
    weights = torch.cat([batch.weights.flatten() for batch in batches])
    # 30 steps, though there are 6 chunks of 8
    assert len(batches) == 4
    assert weights.sum() == pytest.approx(len(batches))
    assert len(torch.unique(weights[weights > 0])) == 1


def test_the_whole_rollout_is_one_minibatch_also_where_chunks_overlap() -> None:
    model = agent(n_steps=10, seq_len=8, batch_size=None, steps=30)
    assert len(list(minibatches(model.rollout_buffer.chunks(torch.zeros(10, 3)), 30))) == 1
