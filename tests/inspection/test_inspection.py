"""What is drawn of a memory is what the memory did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from matplotlib.figure import Figure
from PIL import Image
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize
from torch import Tensor

from tests.agents.masked_env import MaskedEpisodes
from tests.agents.small_agents import agent
from tests.agents.spaces_for_tests import RandomEpisodes, vec_env
from tests.conftest import assert_close
from xlstm_rl.agents import RecurrentPPO, VecMemoryInputs
from xlstm_rl.agents.training_state import normalizer_statistics
from xlstm_rl.inspection import draw_episode, picture, read_weights, record_episode, write_gif
from xlstm_rl.inspection.reads import horizons
from xlstm_rl.kernels import MLSTMCall, SLSTMCall, mlstm_sequence, recorded_calls, slstm_sequence
from xlstm_rl.memory import make_memory

T, H, D = 12, 2, 4


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("forget_activation", ["sigmoid", "exp"])
def test_weights_of_an_mlstm_read_give_its_output(scale: float, forget_activation: Any) -> None:
    q, k, v = (normal(1, T, H, D, seed=seed, scale=scale) for seed in range(3))
    write, forget = (normal(1, T, H, seed=seed, scale=scale) for seed in (3, 4))
    with recorded_calls() as calls:
        hidden, _ = mlstm_sequence(q, k, v, write, forget, forget_activation=forget_activation)
    (call,) = calls
    weights = torch.from_numpy(read_weights(call))
    assert_close(torch.einsum("htj,jhv->thv", weights, v[0]), hidden[0])


@pytest.mark.parametrize("forget_activation", ["sigmoid", "exp"])
def test_weights_of_an_slstm_read_give_its_content(forget_activation: Any) -> None:
    gates, recurrent = normal(1, T, 4, H, 1, seed=0), normal(4, H, 1, 1, seed=1)
    with recorded_calls() as calls:
        hidden, _ = slstm_sequence(gates, recurrent, forget_activation=forget_activation)
    (call,) = calls
    assert isinstance(call, SLSTMCall)
    _, _, cell_input, output_gate = call.pre_activations()[0, ..., 0].unbind(1)  # [T, H] each
    weights = torch.from_numpy(read_weights(call))
    assert_close(weights.sum(-1), torch.ones(H, T, dtype=torch.float64))
    content = torch.einsum("htj,jh->th", weights, cell_input.tanh())
    assert_close(output_gate.sigmoid() * content, hidden[0, ..., 0])


def test_weights_of_many_units_are_their_mean() -> None:
    gates, recurrent = normal(1, T, 4, H, D, seed=0), normal(4, H, D, D, seed=1)
    with recorded_calls() as calls:
        slstm_sequence(gates, torch.zeros_like(recurrent))
    with recorded_calls() as single:
        for unit in range(D):
            slstm_sequence(gates[..., unit : unit + 1].contiguous(), recurrent.new_zeros(4, H, 1, 1))
    np.testing.assert_allclose(read_weights(calls[0]), np.mean([read_weights(call) for call in single], 0))


def test_horizon_is_the_time_after_which_a_third_is_left() -> None:
    forget = torch.full((1, 1, 1), 0.9).logit()
    one = torch.ones(1, 1, 1, 1)
    with recorded_calls() as calls:
        mlstm_sequence(one, one, one, forget, forget)
    assert 0.9 ** horizons(calls[0]).item() == pytest.approx(np.exp(-1), rel=1e-5)


@pytest.mark.parametrize("blocks", ["m", "s", "sm"])
def test_recorded_sequence_equals_the_compiled_one(blocks: str) -> None:
    core = make_memory("xlstm", 3, hidden_size=8, num_heads=2, blocks=blocks, recurrent_std=1.0)
    x, reset = torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 9, dtype=torch.bool)
    reset[1, 4] = True
    with torch.no_grad():
        expected, _ = core(x, core.initial_state(4), reset)
        with recorded_calls() as calls:
            got, _ = core(x, core.initial_state(4), reset)
    assert_close(got, expected)
    assert [type(call) for call in calls] == [{"m": MLSTMCall, "s": SLSTMCall}[kind] for kind in blocks]


def test_nothing_is_recorded_outside_of_the_block() -> None:
    one = torch.ones(1, 1, 1, 1)
    with recorded_calls() as calls:
        pass
    mlstm_sequence(one, one, one, one[0], one[0])
    assert calls == []


def small(blocks: str = "ms", **kwargs: Any) -> RecurrentPPO:
    policy = {"memory_kwargs": {"hidden_size": 8, "num_heads": 2, "blocks": blocks}, **kwargs.pop("policy_kwargs", {})}
    return agent(policy_kwargs=policy, **kwargs)


def test_recorded_episode_is_the_one_that_the_agent_plays() -> None:
    model = small(env=make_vec_env("xlstm_rl/RepeatPrevious-v0", 1))
    env = model.get_env()
    assert env is not None
    env.seed(3)
    episode = record_episode(model, env, max_steps=100)
    env.seed(3)
    obs: Any = env.reset()
    state, done = None, np.ones(1, bool)
    actions, seen = [], []
    rewards: list[float] = []
    while not rewards or not done[0]:
        seen.append(obs[0])
        action, state = model.predict(obs, state=state, episode_start=done, deterministic=True)
        obs, reward, done, _ = env.step(action)
        actions.append(action)
        rewards.append(reward[0])
    np.testing.assert_array_equal(episode.actions, np.stack(actions))
    np.testing.assert_allclose(episode.rewards, rewards)
    np.testing.assert_array_equal(episode.observations, np.stack(seen))
    assert episode.ended == "terminated"
    assert all(call.hidden.shape[:2] == (1, len(rewards)) for call in episode.blocks)


def test_reads_of_an_episode_are_what_its_steps_gave() -> None:
    model = small("m", env=make_vec_env("xlstm_rl/RepeatPrevious-v0", 1))
    (call,) = record_episode(model, model.get_env(), max_steps=30).blocks  # type: ignore[arg-type]
    assert isinstance(call, MLSTMCall)
    read = torch.einsum("htj,jhv->thv", torch.from_numpy(read_weights(call)), call.v[0].double())
    assert_close(read.float(), call.hidden[0])


def test_observations_are_shown_as_the_environment_gave_them() -> None:
    env = VecNormalize(make_vec_env("xlstm_rl/RepeatPrevious-v0", 1))
    model = small(env=env, steps=64)
    env.training = False
    episode = record_episode(model, env, max_steps=5)
    assert set(np.unique(episode.observations)) <= {0.0, 1.0}


def test_recording_leaves_statistics_and_policy_alone_and_learning_begins_anew() -> None:
    env = VecNormalize(make_vec_env("xlstm_rl/RepeatPrevious-v0", 1))
    model = small(env=env, steps=64)
    model.learn(64)
    model.policy.set_training_mode(True)
    statistics = normalizer_statistics(env)
    record_episode(model, env, max_steps=5)
    assert normalizer_statistics(env) == statistics
    assert env.training and model.policy.training
    assert model._last_obs is None
    model.learn(64, reset_num_timesteps=False)


@pytest.mark.parametrize("wrap", [VecMemoryInputs, lambda env: VecFrameStack(env, 4)])
def test_observations_are_those_that_an_inner_normalisation_saw(wrap: Any) -> None:
    env = wrap(VecNormalize(make_vec_env("xlstm_rl/RepeatPrevious-v0", 1)))
    policy = "MultiInputXLSTMPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpXLSTMPolicy"
    episode = record_episode(small(env=env, policy=policy), env, max_steps=5)
    assert len(episode.labels) == episode.observations.shape[1]
    assert set(np.unique(episode.observations)) <= {0.0, 1.0}


CASES: list[dict[str, Any]] = [
    {"observation": "dict with image", "action": "multi-discrete"},
    {"observation": "image", "action": "box"},
    {"observation": "discrete", "action": "multi-binary", "policy_kwargs": {"critic_memory": "separate"}},
    {"policy_kwargs": {"memory": "lstm", "memory_kwargs": {"hidden_size": 4}}},
    {"policy_kwargs": {"memory": "none", "memory_kwargs": {"hidden_size": 4}}},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values()))[:40])
def test_every_kind_of_agent_can_be_drawn(case: dict[str, Any], tmp_path: Path) -> None:
    spaces = {"observation": case.get("observation", "vector"), "action": case.get("action", "discrete")}
    model = small(env=vec_env(n_envs=1, **spaces), **case)
    episode = record_episode(model, model.get_env(), max_steps=6)  # type: ignore[arg-type]
    draw_episode(episode, tmp_path / "picture.png", "title", gamma=0.9)
    with Image.open(tmp_path / "picture.png") as picture:
        assert min(picture.size) > 400
    assert len(episode.blocks) == (2 if "memory" not in case.get("policy_kwargs", {}) else 0)


@pytest.mark.parametrize("space", [spaces.Discrete(3, start=5), spaces.MultiDiscrete([3], start=[-1])])
def test_choice_that_was_taken_is_marked_in_its_row_wherever_actions_start(space: spaces.Space[Any]) -> None:
    class Shifted(RandomEpisodes):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = space

    env = make_vec_env(Shifted, 1, seed=0)
    episode = record_episode(small(env=env), env, max_steps=6)
    panel = Figure().subplots()
    picture._actions(panel, episode)
    assert episode.choices is not None
    np.testing.assert_array_equal(panel.lines[0].get_ydata(), episode.choices.argmax(-1))
    names = [str(action) for action in np.ravel(space.start) + range(3)]  # type: ignore[attr-defined]
    assert [label.get_text() for label in panel.get_yticklabels()] == names


def test_masked_choices_have_no_probability() -> None:
    env = make_vec_env(MaskedEpisodes, 1, env_kwargs={"action": "multi-discrete"})
    episode = record_episode(small(env=env), env, max_steps=20)
    assert episode.choices is not None and (episode.choices == 0).any()
    np.testing.assert_allclose(episode.choices.sum(-1), 2.0, rtol=1e-5)


def test_frames_become_an_animation(tmp_path: Path) -> None:
    env = make_vec_env("xlstm_rl/TMaze-v0", 1, env_kwargs={"render_mode": "rgb_array", "corridor_length": 2})
    episode = record_episode(small(env=env), env, max_steps=4)
    assert len(episode.frames) == len(episode.rewards) + (episode.ended == "cut")
    write_gif(episode.frames, tmp_path / "video.gif", 4)
    with Image.open(tmp_path / "video.gif") as video:
        # small frames are enlarged, by a whole number
        height, width, _ = episode.frames[0].shape
        scale = -(-400 // width)
        assert video.size == (scale * width, scale * height) and video.size[0] >= 400


def test_several_environments_are_refused() -> None:
    model = small()
    with pytest.raises(ValueError, match="an episode needs 1 environment and a step, got 3"):
        record_episode(model, model.get_env(), max_steps=5)  # type: ignore[arg-type]
