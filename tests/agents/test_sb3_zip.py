"""Zips of Stable-Baselines3 are loaded where the caller says that they are trusted."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sb3_contrib
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm

from tests.agents.small_agents import SMALL, agent, assert_same
from tests.agents.spaces_for_tests import policy_name, vec_env
from xlstm_rl.agents import CheckpointError, LSTMPolicy, RecurrentPPO, XLSTMPolicy

TRUSTED = pytest.mark.filterwarnings("ignore:.* is a zip of Stable-Baselines3")


def contrib(observation: str = "vector", action: str = "discrete", **kwargs: Any) -> Any:
    policy_kwargs = {"lstm_hidden_size": 6, "net_arch": [8], **kwargs}
    return sb3_contrib.RecurrentPPO(
        policy_name(observation, "Lstm").replace("XLSTM", "Lstm"),
        vec_env(observation=observation, action=action),
        n_steps=8,
        batch_size=12,
        n_epochs=2,
        gamma=0.9,
        learning_rate=lambda progress: 1e-3 * progress,
        policy_kwargs=policy_kwargs,
        seed=0,
        device="cpu",
    )


def actions(model: Any, steps: int = 20) -> np.ndarray:
    model.observation_space.seed(1)
    state, seen = None, []
    for step in range(steps):
        start = np.array([step % 7 == 0])
        obs = model.observation_space.sample()
        action, state = model.predict(obs, state=state, episode_start=start, deterministic=True)
        seen.append(action)
    return np.stack(seen)


def test_flag_is_named_where_it_is_missing(tmp_path: Path) -> None:
    contrib().save(tmp_path / "stock")
    with pytest.raises(CheckpointError, match=r"RecurrentPPO.load\(path, allow_pickle=True\)"):
        RecurrentPPO.load(tmp_path / "stock")


def test_loading_warns(tmp_path: Path) -> None:
    contrib().save(tmp_path / "stock")
    with pytest.warns(UserWarning, match="loading it runs the code pickled in it"):
        RecurrentPPO.load(tmp_path / "stock", allow_pickle=True)


@TRUSTED
@pytest.mark.parametrize(
    "memories",
    [
        {},
        {"enable_critic_lstm": False},
        {"enable_critic_lstm": False, "shared_lstm": True},
        {"n_lstm_layers": 2, "share_features_extractor": False},
    ],
)
@pytest.mark.parametrize("spaces", [("vector", "box"), ("image", "discrete"), ("dict", "multi-discrete")])
def test_stock_agent_acts_the_same(spaces: tuple[str, str], memories: dict[str, Any], tmp_path: Path) -> None:
    stock = contrib(*spaces, **memories)
    stock.learn(24)
    stock.save(tmp_path / "stock")
    ours = RecurrentPPO.load(tmp_path / "stock", allow_pickle=True, device="cpu")
    assert isinstance(ours.policy, LSTMPolicy)
    assert np.allclose(actions(stock), actions(ours), atol=1e-5)


@TRUSTED
def test_stock_agent_trains_on_with_its_optimiser_and_settings() -> None:
    stock, file = contrib(), io.BytesIO()
    stock.learn(24)
    stock.save(file)
    ours = RecurrentPPO.load(file, vec_env(), allow_pickle=True, device="cpu")
    assert (ours.num_timesteps, ours.gamma, ours.lr_schedule(0.5)) == (24, 0.9, 5e-4)
    theirs = dict(zip(stock.policy.parameters(), range(100), strict=False))
    moments = stock.policy.optimizer.state
    for name, weight in stock.policy.named_parameters():
        renamed = name.replace("lstm_actor", "memory_actor.rnn").replace("lstm_critic", "memory_critic.rnn")
        other = dict(ours.policy.named_parameters())[renamed]
        assert torch.equal(moments[weight]["exp_avg"], ours.policy.optimizer.state[other]["exp_avg"])
    assert len(theirs) == len(list(ours.policy.parameters()))
    ours.learn(24, reset_num_timesteps=False)
    assert ours.num_timesteps == 48


@TRUSTED
def test_our_policy_trained_inside_sb3_contrib_is_loaded(tmp_path: Path) -> None:
    stock = sb3_contrib.RecurrentPPO(
        XLSTMPolicy, vec_env(), n_steps=8, batch_size=12, policy_kwargs=SMALL, device="cpu", seed=0
    )
    stock.learn(24)
    stock.save(tmp_path / "stock")
    ours = RecurrentPPO.load(tmp_path / "stock.zip", allow_pickle=True, device="cpu")
    assert np.array_equal(actions(stock), actions(ours))
    ours.save(tmp_path / "safe")
    assert_same(ours, RecurrentPPO.load(tmp_path / "safe", device="cpu"))


@TRUSTED
def test_our_agent_saved_by_sb3_is_loaded(tmp_path: Path) -> None:
    model = agent(steps=24)
    model._rollout_start = None
    BaseAlgorithm.save(model, tmp_path / "pickled")
    other = RecurrentPPO.load(tmp_path / "pickled", vec_env(), allow_pickle=True, device="cpu")
    assert_same(model, other)
    assert vars(other._advantage_scale) == vars(model._advantage_scale)
    other.learn(24, reset_num_timesteps=False)


@TRUSTED
def test_agent_without_memory_is_refused(tmp_path: Path) -> None:
    PPO("MlpPolicy", vec_env(), n_steps=8, batch_size=24).save(tmp_path / "ppo")
    with pytest.raises(CheckpointError, match=r"ActorCriticPolicy'>, which has no memory core; loaded can"):
        RecurrentPPO.load(tmp_path / "ppo", allow_pickle=True)


@TRUSTED
def test_damaged_pickle_is_refused(tmp_path: Path) -> None:
    class Gone:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.listdir, ("/no/such/folder",)

    model: Any = contrib()
    model.thing = Gone()
    model.save(tmp_path / "stock")
    content = (tmp_path / "stock.zip").read_bytes()
    (tmp_path / "torn.zip").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="torn"):
        RecurrentPPO.load(tmp_path / "torn", allow_pickle=True)


def test_the_flag_changes_nothing_for_safe_files(tmp_path: Path) -> None:
    model = agent(steps=24)
    model.save(tmp_path / "safe")
    assert_same(model, RecurrentPPO.load(tmp_path / "safe", allow_pickle=True, device="cpu"))
