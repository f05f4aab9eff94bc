"""A critic that sees more than the actor: the actor's choices do not depend on it, and agents play without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from xlstm_rl import RecurrentPPO, evaluate
from xlstm_rl.configs import load
from xlstm_rl.runs.build import make_env, make_model


class Simulated(gym.Env[Any, Any]):
    """Say in the fourth step what was seen in the first; the state of the simulation says it all the time."""

    observation_space: spaces.Dict = spaces.Dict(
        {
            "seen": spaces.Box(-1, 1, (2,)),
            "state": spaces.Box(-1, 1, (3,)),
            "hint": spaces.Discrete(2),
        }
    )
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: object = None) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self.cue, self.t = int(self.np_random.integers(2)), 0
        return self._look(), {}

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.t += 1
        last = self.t == 4
        return self._look(), float(last and action == self.cue), last, False, {}

    def _look(self) -> dict[str, Any]:
        sign = 2 * self.cue - 1
        return {
            "seen": np.array([sign * (self.t == 0), self.t / 4], np.float32),
            "state": np.array([sign, self.t / 4, 0], np.float32),
            "hint": self.cue,
        }


KEYS = {"actor_keys": ["seen"], "critic_keys": ["seen", "state"]}


def make(critic_memory: str = "separate", env: Any = None, **kwargs: Any) -> RecurrentPPO:
    env = env or make_vec_env(Simulated, 4)
    policy_kwargs = {**KEYS, "critic_memory": critic_memory, "memory_kwargs": {"hidden_size": 16}}
    settings: dict[str, Any] = {"n_steps": 32, "batch_size": 64, "n_epochs": 2, "learning_rate": 3e-3, "ent_coef": 0.03}
    settings |= {"seed": 0, "device": "cpu"}
    return RecurrentPPO("MultiInputXLSTMPolicy", env, policy_kwargs=policy_kwargs, **settings, **kwargs)


@pytest.fixture(scope="module")
def trained() -> RecurrentPPO:
    return make().learn(6000)


@pytest.mark.parametrize("critic_memory", ["separate", "none"])
def test_what_the_critic_alone_sees_moves_values_and_no_action(critic_memory: str) -> None:
    policy = make(critic_memory).policy
    obs = {
        key: torch.randn(5, *space.shape) for key, space in Simulated.observation_space.spaces.items() if space.shape
    }
    obs["hint"] = torch.zeros(5, dtype=torch.long)
    other = {**obs, "state": torch.randn(5, 3)}
    hinted = {**obs, "hint": torch.ones(5, dtype=torch.long)}
    reset, state = torch.ones(5, dtype=torch.bool), policy.initial_state(5)
    first, changed, same = (policy.latents(given, state, reset) for given in (obs, other, hinted))
    assert torch.equal(first.actor, changed.actor) and torch.equal(first.actor, same.actor)
    assert not torch.allclose(first.critic, changed.critic)
    assert torch.equal(first.critic, same.critic), "nobody sees the hint"
    assert policy.unseen_keys == ("hint", "state")


def test_it_learns_and_plays_without_the_privileged_part(trained: RecurrentPPO) -> None:
    env = make_vec_env(Simulated, 4, seed=1)
    assert evaluate(trained, env, 40).mean_return > 0.9
    single = Simulated()
    obs, _ = single.reset(seed=3)
    state: Any = None
    other: Any = None
    start = True
    for _ in range(4):
        whole, other = trained.predict(obs, other, np.array([start]), deterministic=True)
        action, state = trained.predict({"seen": obs["seen"]}, state, np.array([start]), deterministic=True)
        assert action == whole
        assert all(map(np.array_equal, state, other))
        obs, *_ = single.step(int(action))
        start = False


def test_a_missing_part_of_the_actor_is_named(trained: RecurrentPPO) -> None:
    with pytest.raises(ValueError, match=r"lacks \['seen'\], which the actor sees"):
        trained.predict({"state": np.zeros(3, np.float32)})


def test_it_is_saved_and_loaded(trained: RecurrentPPO, tmp_path: Path) -> None:
    trained.save(tmp_path / "agent.zip")
    loaded = RecurrentPPO.load(tmp_path / "agent.zip", make_vec_env(Simulated, 4))
    assert (loaded.policy.actor_keys, loaded.policy.critic_keys) == (("seen",), ("seen", "state"))
    for mine, theirs in zip(loaded.policy.parameters(), trained.policy.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    loaded.learn(256)
    trained.policy.save(str(tmp_path / "policy.zip"))
    again = type(trained.policy).load(str(tmp_path / "policy.zip"))
    assert again.actor_keys == ("seen",)


@pytest.mark.parametrize("normalized", [False, True])
def test_exported_actor_has_no_privileged_input(normalized: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from xlstm_rl.export import check_onnx, export_onnx

    env: Any = make_vec_env(Simulated, 4)
    model = make(env=VecNormalize(env, norm_obs_keys=["seen", "state"]) if normalized else env).learn(256)
    metadata = export_onnx(model, tmp_path / "policy.onnx")
    assert set(metadata["inputs"]["observations"]) == {"observation.seen"} and metadata["value"] is None
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"))
    names = [node.name for node in session.get_inputs()]
    assert not [name for name in names if "state" in name.split(".") or "critic" in name]
    assert check_onnx(model, tmp_path / "policy.onnx").largest_error < 1e-5


def test_it_is_a_setting_of_a_configuration() -> None:
    gym.register("Simulated-v0", f"{__name__}:Simulated")
    try:
        words = ["policy.actor_keys=[seen]", "policy.critic_keys=[seen, state]", "policy.critic_memory=separate"]
        config = load("Simulated-v0", words)
        model = make_model(config, make_env(config, 2, 0, here=True))
        assert model.policy.unseen_keys == ("hint", "state")
    finally:
        del gym.registry["Simulated-v0"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"actor_keys": ["sen"]}, "must be a list of different keys of the observations: .*'seen'"),
        ({"actor_keys": []}, "must be a list"),
        ({"actor_keys": "seen"}, "must be a list"),
        ({"critic_keys": ["seen", "seen"]}, "must be a list of different keys"),
        ({"actor_keys": ["seen"], "critic_memory": "shared"}, "critic_memory='separate' or 'none'"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecurrentPPO("MultiInputXLSTMPolicy", Simulated(), policy_kwargs={"critic_memory": "separate", **keys})


def test_keys_need_dict_observations() -> None:
    with pytest.raises(ValueError, match="needs Dict observations"):
        RecurrentPPO("MlpXLSTMPolicy", "CartPole-v1", policy_kwargs={"actor_keys": ["x"]})
