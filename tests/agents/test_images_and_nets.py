"""Images as Stable-Baselines3 hands them over, extractors of your own, and memories of actor and critic."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecTransposeImage
from torch import Tensor, nn

from tests.agents.recomputation import assert_recomputed
from tests.agents.small_agents import SMALL, agent, assert_same
from tests.agents.spaces_for_tests import RandomEpisodes, policy_name, vec_env
from xlstm_rl.agents import MultiInputXLSTMPolicy, RecurrentPPO
from xlstm_rl.memory import leaves

CHANNEL_LAST = spaces.Box(0, 255, (36, 40, 3), np.uint8)
UNIT_IMAGE = spaces.Box(0, 1, (3, 36, 36), np.float32)
SPACES: dict[str, spaces.Space[Any]] = {
    "channel-last": CHANNEL_LAST,
    "channel-first": spaces.Box(0, 255, (3, 36, 40), np.uint8),
    "image in Dict": spaces.Dict({"camera": CHANNEL_LAST, "speed": spaces.Box(-1, 1, (2,), np.float32)}),
}


class Of(RandomEpisodes):
    """Random episodes with any observation space."""

    def __init__(self, space: spaces.Space[Any]) -> None:
        super().__init__()
        self.observation_space = space


def image_env(kind: str, stack: int = 1) -> VecEnv:
    env: VecEnv = make_vec_env(Of, 3, seed=0, env_kwargs={"space": SPACES[kind]})
    return VecFrameStack(env, stack) if stack > 1 else env


def collected(env: VecEnv, **kwargs: Any) -> RecurrentPPO:
    """A model that collected two rollouts and never updated."""
    model = agent(env=env, n_steps=40, batch_size=48, seq_len=16, **kwargs)
    model.train = lambda: None  # type: ignore[method-assign]
    return model.learn(80 * env.num_envs)


# Images.


@pytest.mark.parametrize("stack", [1, 4])
@pytest.mark.parametrize("kind", SPACES)
def test_images_are_trained_on_channel_first_stacked_or_not(kind: str, stack: int) -> None:
    env = image_env(kind, stack)
    policy = policy_name("dict" if "Dict" in kind else "image")
    model = collected(env, policy=policy)
    image = model.observation_space
    image = image.spaces["camera"] if isinstance(image, spaces.Dict) else image
    assert image.shape == (3 * stack, 36, 40)
    assert isinstance(model.env, VecTransposeImage) == (kind != "channel-first")
    # convolutions round otherwise for another number of images
    assert_recomputed(model, value_tolerance=5e-5)
    model = agent(env=env, policy=policy, steps=48)
    assert all(weight.isfinite().all() for weight in model.policy.parameters())
    actions, _ = model.predict(env.reset(), deterministic=True)
    assert actions.shape == (3,)


def test_predict_takes_images_in_either_order() -> None:
    model = agent(env=image_env("channel-last"), policy="CnnXLSTMPolicy", action="box")
    image = np.random.default_rng(0).integers(0, 256, (3, 36, 40, 3), dtype=np.uint8)
    seen = [model.predict(one, deterministic=True)[1] for one in (image, image.transpose(0, 3, 1, 2))]
    assert seen[0] is not None and seen[1] is not None
    for one, other in zip(*seen, strict=True):
        assert np.array_equal(one, other) and one.any()


def first_layer_input(model: RecurrentPPO, obs: Any) -> Tensor:
    seen: list[Tensor] = []
    cnn = next(part for part in model.policy.modules() if isinstance(part, nn.Conv2d))
    hook = cnn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.predict(obs)
    hook.remove()
    return seen[0]


def test_images_of_bytes_are_scaled_to_one() -> None:
    model = agent(env=image_env("channel-first"), policy="CnnXLSTMPolicy")
    assert first_layer_input(model, np.full((1, 3, 36, 40), 255, np.uint8)).max() == 1


@pytest.mark.parametrize("critic_memory", ["shared", "separate"])
def test_images_scaled_already_are_left_alone(critic_memory: str) -> None:
    env = make_vec_env(Of, 3, seed=0, env_kwargs={"space": UNIT_IMAGE})
    kwargs = {"normalize_images": False, "critic_memory": critic_memory}
    model = agent(env=env, policy="CnnXLSTMPolicy", policy_kwargs=kwargs, steps=24)
    assert first_layer_input(model, np.ones((1, 3, 36, 36), np.float32)).max() == 1


def test_scaled_images_without_the_switch_are_refused() -> None:
    env = make_vec_env(Of, 3, seed=0, env_kwargs={"space": UNIT_IMAGE})
    with pytest.raises(AssertionError, match="normalize_images=False"):
        agent(env=env, policy="CnnXLSTMPolicy")


# Extractors.


class CameraAndSpeed(BaseFeaturesExtractor):
    """An extractor of one's own for a Dict of an image and a vector."""

    def __init__(self, observation_space: spaces.Dict, width: int = 5) -> None:
        super().__init__(observation_space, width + 2)
        camera = observation_space.spaces["camera"].shape
        assert camera is not None
        self.camera = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(int(np.prod(camera)) // 16, width))

    def forward(self, observations: Any) -> Tensor:
        return torch.cat([self.camera(observations["camera"]), observations["speed"]], dim=1)


@pytest.mark.parametrize(("share", "critic_memory"), [(True, "shared"), (True, "none"), (False, "separate")])
def test_own_extractor_trains_and_comes_back(share: bool, critic_memory: str, tmp_path: Path) -> None:
    kwargs = {
        "features_extractor_class": CameraAndSpeed,
        "features_extractor_kwargs": {"width": 7},
        "share_features_extractor": share,
        "critic_memory": critic_memory,
    }
    env = image_env("image in Dict")
    assert_recomputed(collected(env, policy=MultiInputXLSTMPolicy, policy_kwargs=kwargs))
    model = agent(env=env, policy=MultiInputXLSTMPolicy, policy_kwargs=kwargs, steps=24)
    assert model.policy.features_dim == 9
    assert (model.policy.vf_features_extractor is model.policy.pi_features_extractor) == share
    model.save(tmp_path / "model")
    given = {"policy_kwargs": SMALL | kwargs}
    assert_same(model, RecurrentPPO.load(tmp_path / "model", custom_objects=given, device="cpu"))


# Memories of actor and critic.


@pytest.mark.parametrize(
    ("critic_memory", "trained"),
    [("shared", {"memory_actor"}), ("separate", {"memory_critic"}), ("none", {"critic"})],
)
def test_value_loss_trains_the_memory_that_the_critic_sees(critic_memory: str, trained: set[str]) -> None:
    model = collected(vec_env(), policy_kwargs={"critic_memory": critic_memory})
    chunks = model.rollout_buffer.chunks(torch.zeros(40, 3))
    values = model.policy.evaluate_sequence(
        chunks.observations, chunks.actions, chunks.state, chunks.episode_starts
    ).values
    values.sum().backward()  # type: ignore[no-untyped-call]
    reached = {
        name.split(".")[0]
        for name, weight in model.policy.named_parameters()
        if weight.grad is not None and weight.grad.count_nonzero()
    }
    assert reached & {"memory_actor", "memory_critic", "critic"} == trained


@pytest.mark.parametrize("critic_memory", ["shared", "separate", "none"])
@pytest.mark.parametrize("memory", ["xlstm", "lstm"])
def test_critic_without_memory_forgets_and_others_do_not(memory: str, critic_memory: str) -> None:
    kwargs = {"memory": memory, "memory_kwargs": {"hidden_size": 8}, "critic_memory": critic_memory}
    model = collected(vec_env(), policy_kwargs=kwargs)
    obs, going_on = torch.zeros(3, 3), torch.zeros(3, dtype=torch.bool)
    remembered = model._last_state
    assert remembered is not None and any(leaf.any() for leaf in leaves(remembered))
    with torch.no_grad():
        value = model.policy.value(obs, remembered, going_on)
        fresh = model.policy.value(obs, model.policy.initial_state(3), going_on)
    assert torch.equal(value, fresh) == (critic_memory == "none")


# Squashed actions.


def test_squashed_actions_are_unscaled_in_rollout_and_predict_alike() -> None:
    class Wide(gym.Wrapper[Any, Any, Any, Any]):
        def __init__(self) -> None:
            super().__init__(RandomEpisodes(action="box"))
            self.action_space = spaces.Box(np.array([-5, 10], np.float32), np.array([5, 30], np.float32))

        def step(self, action: Any) -> Any:
            assert self.action_space.contains(action)
            return super().step(np.zeros(2, np.float32))

    kwargs = {"squash_output": True, "log_std_init": 1.0}
    model = agent(env=make_vec_env(Wide, 2, seed=0), use_sde=True, policy_kwargs=kwargs, steps=32)
    assert np.abs(model.rollout_buffer.actions).max() <= 1
    obs = np.zeros((2, 3), np.float32)
    actions, _ = model.predict(obs)
    step = model.policy.act(torch.from_numpy(obs), model.policy.initial_state(2), torch.ones(2, dtype=torch.bool))
    assert np.allclose(actions, model.policy.to_env_actions(step.actions.detach().numpy()), atol=1e-4)
    assert (actions[:, 1] >= 10).all()


def test_small_pictures_of_floats_in_a_dict_are_taken_flat_beside_large_ones() -> None:
    small = spaces.Box(0, 1, (3, 5, 5), np.float32)
    space = spaces.Dict({"camera": UNIT_IMAGE, "map": small})
    model = RecurrentPPO(
        "MultiInputXLSTMPolicy",
        make_vec_env(Of, 2, seed=0, env_kwargs={"space": space}),
        n_steps=8,
        batch_size=16,
        policy_kwargs={**SMALL, "normalize_images": False},
    )
    model.learn(16)
    assert model.policy.features_dim == 256 + 3 * 5 * 5


NETWORKS = ("memory_actor.input_projection", "mlp_extractor.policy_net.0", "action_net", "value_net")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_weight_that_is_no_parameter_acts_in_rollouts_as_in_updates(name: str) -> None:
    model = agent(n_steps=40, batch_size=48, seq_len=16)
    model.train = lambda: None  # type: ignore[method-assign]
    network: Any = model.policy.get_submodule(name)
    weight = network.weight.detach().clone()
    # as something that computes weights does it
    del network.weight
    network.weight = 2 * weight
    assert_recomputed(model.learn(240))


def test_heads_may_be_networks() -> None:
    model = agent(n_steps=40, batch_size=48, seq_len=16)
    model.train = lambda: None  # type: ignore[method-assign]
    for name in ("action_net", "value_net"):
        setattr(model.policy, name, nn.Sequential(getattr(model.policy, name), nn.Tanh()))
    assert_recomputed(model.learn(240))
