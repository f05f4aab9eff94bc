"""The module for RLlib against the policy and the memory that it is made of; `make test-rllib` runs it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from tests.conftest import assert_close
from xlstm_rl.memory import leaves, map_leaves, memory_names

if find_spec("ray") is None:
    pytest.skip("ray is not installed", allow_module_level=True)

from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import TARGET_NETWORK_ACTION_DIST_INPUTS
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from xlstm_rl.rllib import XLSTMRLModule

FLAT = spaces.Box(-1.0, 1.0, (3,), np.float32)
SMALL: dict[str, Any] = {"memory_kwargs": {"hidden_size": 16}, "net_arch": [8]}
MEMORIES = [name for name in memory_names() if name != "none"]


def make(observation_space: Any = FLAT, action_space: Any = None, **settings: Any) -> XLSTMRLModule:
    torch.manual_seed(0)
    config = {"max_seq_len": 8, **SMALL, **settings}
    actions = spaces.Discrete(4) if action_space is None else action_space
    spec = RLModuleSpec(
        module_class=XLSTMRLModule, observation_space=observation_space, action_space=actions, model_config=config
    )
    module: XLSTMRLModule = spec.build()
    # actions of an untrained policy hardly depend on anything
    action_net: Any = module.policy.action_net
    torch.nn.init.normal_(action_net.weight)
    return module


def rows(module: XLSTMRLModule, B: int, T: int, seed: int = 0) -> dict[str, Any]:
    """A batch as RLlib makes it: observations [B, T, ...] and the states before the rows."""
    space = module.observation_space
    space.seed(seed)
    obs = [[space.sample() for _ in range(T)] for _ in range(B)]
    state = {name: torch.from_numpy(np.stack([part] * B)).clone() for name, part in module.get_initial_state().items()}
    return {Columns.OBS: _tensors(obs), Columns.STATE_IN: state}


def _tensors(obs: list[list[Any]]) -> Any:
    if isinstance(obs[0][0], dict):
        return {key: _tensors([[step[key] for step in row] for row in obs]) for key in obs[0][0]}
    return torch.from_numpy(np.stack([np.stack(row) for row in obs]))


def cut(batch: dict[str, Any], start: int, stop: int, state: dict[str, Tensor]) -> dict[str, Any]:
    return {Columns.OBS: map_leaves(lambda part: part[:, start:stop], batch[Columns.OBS]), Columns.STATE_IN: state}


def sampled(module: XLSTMRLModule, batch: dict[str, Any]) -> list[dict[str, Any]]:
    """What env runners get from the module, step by step."""
    state, steps = batch[Columns.STATE_IN], []
    for t in range(next(iter(leaves(batch[Columns.OBS]))).shape[1]):
        steps.append(module.forward_exploration(cut(batch, t, t + 1, state)))
        state = steps[-1][Columns.STATE_OUT]
    return steps


@pytest.mark.parametrize("critic_memory", ["shared", "separate", "none"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_rows_give_what_the_steps_gave(memory: str, critic_memory: str) -> None:
    module = make(memory=memory, critic_memory=critic_memory)
    batch = rows(module, B=3, T=11)
    steps = sampled(module, batch)
    by_step = torch.cat([step[Columns.ACTION_DIST_INPUTS] for step in steps], 1)
    # the second row starts from the state that was stored there
    for start, state in ((0, batch[Columns.STATE_IN]), (6, steps[5][Columns.STATE_OUT])):
        given = module.forward_train(cut(batch, start, 11, state))
        assert_close(given[Columns.ACTION_DIST_INPUTS], by_step[:, start:])
    assert by_step.std(1).min() > 1e-4


@pytest.mark.parametrize("blocks", ["m", "s", "sm"])
@pytest.mark.parametrize("critic_memory", ["shared", "separate", "none"])
def test_values_and_gradients_of_a_row_are_those_of_the_policys_sequence(blocks: str, critic_memory: str) -> None:
    module = make(memory_kwargs={"hidden_size": 16, "blocks": blocks}, critic_memory=critic_memory).double()
    batch = rows(module, B=2, T=9)
    batch[Columns.OBS] = batch[Columns.OBS].double()
    state = sampled(module, batch)[-1][Columns.STATE_OUT]
    actions = torch.randint(4, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {**batch, Columns.STATE_IN: state}

    given = module.forward_train(batch)
    distribution = module.get_train_action_dist_cls().from_logits(given[Columns.ACTION_DIST_INPUTS])
    ours = (
        module.compute_values(batch, given[Columns.EMBEDDINGS]),
        distribution.logp(actions),
        distribution.entropy(),
    )
    expected = module.policy.evaluate_sequence(
        batch[Columns.OBS], actions, module._state(state), torch.zeros(2, 9, dtype=torch.bool)
    )
    assert expected.entropy is not None
    theirs = (expected.values, expected.log_prob, expected.entropy)
    assert_close(ours, theirs)
    assert_close(module.compute_values(batch), expected.values)
    parameters = list(module.policy.parameters())
    slopes = [torch.randn(2, 9, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)]
    assert_close(torch.autograd.grad(ours, parameters, slopes), torch.autograd.grad(theirs, parameters, slopes))


@pytest.mark.parametrize("memory", MEMORIES)
def test_padding_changes_neither_values_nor_gradients(memory: str) -> None:
    module = make(memory=memory)
    batch = rows(module, B=2, T=8)
    padded = {**batch, Columns.OBS: batch[Columns.OBS].clone()}
    padded[Columns.OBS][:, 5:] = 0.0

    def differentiated(batch: dict[str, Any]) -> tuple[Tensor, ...]:
        given = module.forward_train(batch)
        values = module.compute_values(batch, given[Columns.EMBEDDINGS])[:, :5]
        inputs = given[Columns.ACTION_DIST_INPUTS][:, :5]
        slopes = torch.autograd.grad((values.sum(), inputs.square().sum()), list(module.policy.parameters()))
        return values, inputs, *slopes

    alone = cut(batch, 0, 5, batch[Columns.STATE_IN])
    for ours, expected in zip(differentiated(padded), differentiated(alone), strict=True):
        assert_close(ours, expected)


OBSERVATIONS = {
    "flat": FLAT,
    "one number": spaces.Box(-1.0, 1.0, (), np.float32),
    "choice": spaces.Discrete(3),
    "choice from 2": spaces.Discrete(3, start=2),
    "choices": spaces.MultiDiscrete([3, 2]),
    "bits": spaces.MultiBinary(4),
    "pixels": spaces.Box(0, 255, (40, 44, 3), np.uint8),
    "pixels, channels first": spaces.Box(0, 255, (3, 40, 44), np.uint8),
    "floats": spaces.Box(-1.0, 1.0, (40, 44, 4), np.float32),
    "small pixels": spaces.Box(0, 255, (7, 7, 3), np.uint8),
    "small floats": spaces.Box(0.0, 1.0, (7, 7, 3), np.float32),
    "dict": spaces.Dict(
        {"image": spaces.Box(0, 255, (36, 40, 3), np.uint8), "speed": FLAT, "goal": spaces.Discrete(3, start=1)}
    ),
    "dict of floats": spaces.Dict(
        {"image": spaces.Box(0.0, 1.0, (36, 40, 3), np.float32), "small": spaces.Box(0.0, 1.0, (5, 5, 3), np.float32)}
    ),
}


@pytest.mark.parametrize("space", OBSERVATIONS.values(), ids=OBSERVATIONS)
def test_observations_of_every_kind_are_rows_and_may_be_padded(space: spaces.Space[Any]) -> None:
    module = make(space)
    batch = rows(module, B=2, T=4)
    by_step = torch.cat([step[Columns.ACTION_DIST_INPUTS] for step in sampled(module, batch)], 1)
    assert_close(module.forward_train(batch)[Columns.ACTION_DIST_INPUTS], by_step)
    # RLlib's padding, which may be no observation of the space
    zeros = map_leaves(torch.zeros_like, batch[Columns.OBS])
    assert bool(module.compute_values({**batch, Columns.OBS: zeros}).isfinite().all())
    assert not torch.equal(*by_step[0, :2])


@pytest.mark.parametrize("kind", ["pixels", "floats"])
def test_images_are_seen_by_the_network_of_images_channels_first(kind: str) -> None:
    module = make(OBSERVATIONS[kind])
    batch = rows(module, B=1, T=2)
    extractor: Any = module.policy.features_extractor
    image = batch[Columns.OBS][0, 1].movedim(-1, 0).float()
    expected = extractor(image[None] / (255.0 if kind == "pixels" else 1.0))
    seen: list[Tensor] = []
    extractor.register_forward_hook(lambda *call: seen.append(call[2]))
    module.forward_train(batch)
    assert_close(seen[0][1:], expected)


ACTIONS = {
    "choice": spaces.Discrete(4),
    "choices": spaces.MultiDiscrete([3, 2]),
    "box": spaces.Box(-1.0, 1.0, (2,), np.float32),
}


@pytest.mark.parametrize("space", ACTIONS.values(), ids=ACTIONS)
def test_actions_of_every_kind_have_the_policys_probabilities(space: Any) -> None:
    module = make(action_space=space)
    batch = rows(module, B=2, T=5)
    inputs = module.forward_train(batch)[Columns.ACTION_DIST_INPUTS]
    distribution = module.get_train_action_dist_cls().from_logits(inputs)
    torch.manual_seed(1)
    actions = distribution.sample()
    first = actions[0, 0].numpy()
    assert space.contains(first.clip(-1, 1) if isinstance(space, spaces.Box) else first)
    expected = module.policy.evaluate_sequence(
        batch[Columns.OBS], actions, module._state(batch[Columns.STATE_IN]), torch.zeros(2, 5, dtype=torch.bool)
    )
    assert expected.entropy is not None
    assert_close((distribution.logp(actions), distribution.entropy()), (expected.log_prob, expected.entropy))
    assert distribution.to_deterministic().sample().shape == actions.shape


def test_memory_that_remembers_nothing_has_no_state_and_no_time() -> None:
    module = make(memory="none", memory_kwargs={})
    assert not module.is_stateful() and module.get_initial_state() == {}
    obs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    given = module.forward_train({Columns.OBS: obs})
    assert given[Columns.ACTION_DIST_INPUTS].shape == (5, 4)
    assert Columns.STATE_OUT not in module.forward_exploration({Columns.OBS: obs})
    assert module.compute_values({Columns.OBS: obs}, given[Columns.EMBEDDINGS]).shape == (5,)


def test_second_policy_stays_until_it_is_copied() -> None:
    module = make()
    module.make_target_networks()
    batch = rows(module, B=2, T=6)
    before = module.forward_train(batch)[Columns.ACTION_DIST_INPUTS].detach()
    assert_close(module.forward_target(batch)[TARGET_NETWORK_ACTION_DIST_INPUTS], before)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.1)
    assert_close(module.forward_target(batch)[TARGET_NETWORK_ACTION_DIST_INPUTS], before)
    assert not torch.allclose(module.forward_train(batch)[Columns.ACTION_DIST_INPUTS], before)
    assert not any(name.startswith("target") for name in module.get_state(inference_only=True))
    ((main, target),) = module.get_target_network_pairs()
    target.load_state_dict(main.state_dict())
    moved = module.forward_train(batch)[Columns.ACTION_DIST_INPUTS]
    assert_close(module.forward_target(batch)[TARGET_NETWORK_ACTION_DIST_INPUTS], moved)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_seq_len": None}, "max_seq_len=None"),
        ({"max_seq_len": 0}, "max_seq_len=0"),
        ({"max_seq_len": True}, "max_seq_len=True"),
        ({"hidden_size": 8}, r"takes no \['hidden_size'\].*memory_kwargs"),
        ({"use_sde": True}, r"takes no \['use_sde'\]"),
        ({"vf_share_layers": True}, "critic_memory='shared'"),
        ({"critic_memory": "both"}, "critic_memory='both'"),
        ({"memory": "lstms"}, "unknown memory 'lstms'"),
        ({"memory_kwargs": {"units": 3}}, "units"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(settings: dict[str, Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        make(**settings)


def test_settings_of_rllibs_own_networks_are_refused() -> None:
    spec = RLModuleSpec(
        module_class=XLSTMRLModule,
        observation_space=FLAT,
        action_space=spaces.Discrete(2),
        model_config=DefaultModelConfig(use_lstm=True),
    )
    with pytest.raises(TypeError, match="'use_lstm'"):
        spec.build()


@pytest.mark.parametrize(
    ("space", "says"),
    [
        (spaces.Discrete(3, start=1), "do not start at 0"),
        (spaces.MultiDiscrete([3, 2], start=[0, 1]), "do not start at 0"),
        (spaces.MultiBinary(3), "MultiBinary"),
        (spaces.MultiDiscrete(np.array([[3, 2]])), "several dimensions"),
        (spaces.Box(-1.0, 1.0, (2, 2), np.float32), "flat row of floats"),
        (spaces.Box(0, 3, (2,), np.int64), "flat row of floats"),
        (spaces.Box(-np.inf, np.inf, (2,), np.float32), "bounds"),
    ],
)
def test_actions_that_rllib_cannot_draw_are_refused_with_the_remedy(space: Any, says: str) -> None:
    with pytest.raises(ValueError, match=rf"{says}.*TransformAction"):
        make(action_space=space)
