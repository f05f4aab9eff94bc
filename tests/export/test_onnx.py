"""Exported policies compute what the policies compute, for every memory, action space and observation."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

from tests.agents.masked_env import MASKABLE, MaskedEpisodes, random_mask
from tests.agents.small_agents import agent
from tests.agents.spaces_for_tests import ACTIONS, OBSERVATIONS, RandomEpisodes, vec_env
from tests.conftest import assert_close
from xlstm_rl.agents import MemoryInputs, RecurrentPPO
from xlstm_rl.agents.actor_critic import evaluating
from xlstm_rl.agents.heads import mask_parts
from xlstm_rl.export import ExportError, check_onnx, export_onnx
from xlstm_rl.export.preprocessing import as_seen, entries, front_of
from xlstm_rl.export.step_graph import observation_name

SMALL_XLSTM: dict[str, Any] = {"hidden_size": 8, "num_heads": 2}
# See test_where_images_are_amplified_torch_rounds_as_much.
FOR_IMAGES: dict[str, Any] = {"hidden_size": 64, "num_heads": 4}
CORES: dict[str, dict[str, Any]] = {
    "m": {"memory_kwargs": {**SMALL_XLSTM, "blocks": "m"}},
    "s": {"memory_kwargs": {**SMALL_XLSTM, "blocks": "s", "recurrent_std": 1.0}},
    "ms": {"memory_kwargs": {**SMALL_XLSTM, "blocks": "ms", "gate_soft_cap": 15.0}},
    "lstm": {"memory": "lstm", "memory_kwargs": {"hidden_size": 8, "num_layers": 2}},
    "gru": {"memory": "gru", "memory_kwargs": {"hidden_size": 8}},
    "transformer": {"memory": "transformer", "memory_kwargs": {"hidden_size": 8, "num_heads": 2, "window": 5}},
    "ssm": {"memory": "ssm", "memory_kwargs": {"hidden_size": 8}},
    "frames": {"memory": "frames", "memory_kwargs": {"hidden_size": 8}},
    "none": {"memory": "none", "memory_kwargs": {"hidden_size": 8}},
}
GSDE: dict[str, Any] = {"use_sde": True}
# Name of an action space, further settings of the policy, masks.
HEADS: dict[str, tuple[str, dict[str, Any], bool]] = {
    **{name: (name, {}, False) for name in ACTIONS},
    **{f"masked {name}": (name, {}, True) for name in MASKABLE},
    "gsde": ("box", GSDE, False),
    "squashed": ("box", {**GSDE, "policy_kwargs": {"squash_output": True}}, False),
}


def with_images(core: str) -> dict[str, Any]:
    """Policy settings for images."""
    return {"memory_kwargs": CORES[core]["memory_kwargs"] | FOR_IMAGES}


def louder(model: RecurrentPPO) -> None:
    """So that choices differ from step to step."""
    layer: Any = model.policy.action_net
    with torch.no_grad():
        layer.weight.mul_(100.0)


def model_of(core: str, head: str, observation: str = "vector", *, seed: int = 0, **policy: Any) -> RecurrentPPO:
    """An agent with random weights, large enough that its choices differ."""
    action, settings, masked = HEADS[head]
    settings = dict(settings)
    policy_kwargs = {**CORES[core], **settings.pop("policy_kwargs", {}), **policy}
    kind = MaskedEpisodes if masked else RandomEpisodes
    env = make_vec_env(kind, n_envs=2, seed=0, env_kwargs={"observation": observation, "action": action})
    model = agent(observation, action, env=env, policy_kwargs=policy_kwargs, seed=seed, **settings)
    louder(model)
    return model


def assert_exported(model: RecurrentPPO, path: Path) -> None:
    export_onnx(model, path)
    assert check_onnx(model, path).largest_error <= 1e-5
    assert_same_distribution(model, Runner(path))


def assert_same_distribution(model: RecurrentPPO, runner: Runner) -> None:
    """The parameters say how probable every action is, in a first step."""
    space, rows = front_of(model.get_env(), model.observation_space).space, 3
    space.seed(3)
    parts = {key: np.stack([np.asarray(part.sample()) for _ in range(rows)]) for key, part in entries(space).items()}
    fed: dict[str, Any] = {observation_name(key): part for key, part in parts.items()} | {"reset": np.ones(rows, bool)}
    masks = None
    if runner.facts["inputs"]["action_mask"] is not None:
        rng = np.random.default_rng(0)
        fed["action_mask"] = np.stack([random_mask(model.action_space, rng) for _ in range(rows)])
        masks = torch.from_numpy(fed["action_mask"])
    got = runner.step(**fed, **runner.state(rows))
    obs = obs_as_tensor(as_seen(model.get_env(), parts.get("", parts)), torch.device("cpu"))
    pair = (torch.zeros(1, rows, model.policy.lstm_actor.hidden_size),) * 2
    model.policy.set_training_mode(False)
    with torch.no_grad():
        distribution: Any = model.policy.get_distribution(obs, pair, torch.ones(rows), masks)[0]
    if isinstance(model.action_space, spaces.Box):
        assert_close(torch.from_numpy(got["mean"]), distribution.distribution.mean)
        assert_close(torch.from_numpy(got["std"]), distribution.distribution.stddev)
        return
    inner = distribution.distributions if hasattr(distribution, "distributions") else distribution.distribution
    expected = [part.probs for part in (inner if isinstance(inner, list) else [inner])]
    logits = torch.from_numpy(got["logits"])
    if isinstance(model.action_space, spaces.MultiBinary):
        found = [logits.sigmoid()]
        # a masked bit is a choice between 0 and 1
        expected = [torch.stack([part[:, 1] for part in expected], 1)] if masks is not None else expected
    else:
        found = [part.softmax(-1) for part in torch.split(logits, mask_parts(model.action_space), dim=-1)]
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


# Beside the agent that most tests below share; all combinations of the first two are slow.
QUICK = [
    ("s", "squashed", "dict with image"),
    # in its graph the exporter calls something else "mean"
    ("ssm", "box", "vector"),
]


@pytest.mark.parametrize(("core", "head", "observation"), QUICK)
def test_export_computes_what_torch_computes(core: str, head: str, observation: str, tmp_path: Path) -> None:
    policy = with_images(core) if "image" in observation else {}
    assert_exported(model_of(core, head, observation, **policy), tmp_path / "policy.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("head", HEADS)
def test_export_of_every_memory_and_head(core: str, head: str, tmp_path: Path) -> None:
    assert_exported(model_of(core, head), tmp_path / "policy.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("critic_memory", ["shared", "separate", "none"])
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_export_of_every_observation_and_critic(observation: str, critic_memory: str, tmp_path: Path) -> None:
    policy = with_images("ms") if "image" in observation else {}
    model = model_of("ms", "discrete", observation, critic_memory=critic_memory, **policy)
    assert_exported(model, tmp_path / "policy.onnx")


def test_where_images_are_amplified_torch_rounds_as_much(tmp_path: Path) -> None:
    """Heads of few units read next to nothing of noise and divide by it: both are then as far from float64."""
    of_onnx, of_torch = 0.0, 0.0
    for seed in range(3):
        model = model_of("ms", "discrete", "image", seed=seed)
        export_onnx(model, tmp_path / "policy.onnx")
        runner, torch_policy = Runner(tmp_path / "policy.onnx"), model.policy
        exact: Any = copy.deepcopy(torch_policy).double()
        # Stable-Baselines3 makes float32 of every image
        exact.extract_features = lambda obs, *_, policy=exact: policy.features_extractor(obs.double() / 255)
        space = front_of(model.get_env(), model.observation_space).space
        space.seed(seed)
        state, torch_state, exact_state = runner.state(3), torch_policy.initial_state(3), exact.initial_state(3)
        with evaluating(torch_policy), evaluating(exact):
            for index in range(60):
                reset = np.full(3, index % 20 == 0)
                images = np.stack([space.sample() for _ in range(3)])
                got = runner.step(observation=images, reset=reset, **state)
                state = {name: got[leaf["next"]] for name, leaf in runner.facts["state"].items()}
                seen = obs_as_tensor(as_seen(model.get_env(), images), torch.device("cpu"))
                step = torch_policy.act(seen, torch_state, torch.from_numpy(reset), deterministic=True)
                right = exact.act(seen, exact_state, torch.from_numpy(reset), deterministic=True)
                torch_state, exact_state = step.state, right.state
                of_onnx = max(of_onnx, np.abs(got["value"] - right.values.numpy()).max())
                of_torch = max(of_torch, float((step.values - right.values).abs().max()))
    assert of_torch > 1e-6, "nothing is amplified here"
    assert of_onnx <= 5 * of_torch


class Runner:
    """What somebody writes who knows the metadata alone."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.facts = json.loads(self.session.get_modelmeta().custom_metadata_map["xlstm_rl"])
        self.names = [output.name for output in self.session.get_outputs()]

    def state(self, rows: int, fill: float = 0.0) -> dict[str, np.ndarray]:
        return {
            name: np.full((rows, *leaf["shape"]), fill, leaf["dtype"]) for name, leaf in self.facts["state"].items()
        }

    def step(self, **fed: Any) -> dict[str, np.ndarray]:
        return dict(zip(self.names, self.session.run(self.names, fed), strict=True))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[RecurrentPPO, Runner]:
    """A masked agent with normalised memory inputs."""
    env = make_vec_env(
        MaskedEpisodes, n_envs=2, seed=0, wrapper_class=MemoryInputs, env_kwargs={"action": "multi-binary"}
    )
    normalizer = VecNormalize(env, norm_obs_keys=["observation", "previous_reward"])
    model = agent("dict", env=normalizer, steps=64, policy_kwargs=CORES["ms"])
    louder(model)
    path = tmp_path_factory.mktemp("onnx") / "policy.onnx"
    export_onnx(model, path)
    assert check_onnx(model, path).largest_error <= 1e-5
    return model, Runner(path)


def inputs(runner: Runner, rows: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    seen = {
        name: rng.normal(size=(rows, *entry["shape"])).astype(entry["dtype"])
        for name, entry in runner.facts["inputs"]["observations"].items()
    }
    return {**seen, "reset": np.zeros(rows, bool), "action_mask": np.ones((rows, 6), bool)}


def test_metadata_say_what_a_runner_needs(exported: tuple[RecurrentPPO, Runner]) -> None:
    model, runner = exported
    facts = runner.facts
    entries = facts["inputs"]["observations"]
    assert {name for name, entry in entries.items() if entry["normalized"]} == {
        "observation.observation",
        "observation.previous_reward",
    }
    assert facts["memory_inputs"] == {
        "action": "observation.previous_action",
        "reward": "observation.previous_reward",
        "start": "observation.episode_start",
    }
    assert facts["inputs"]["action_mask"] == {"name": "action_mask", "parts": [2, 2, 2]}
    assert facts["action"]["space"] == {"kind": "MultiBinary", "n": 3}
    assert facts["action"]["distribution"] == "bernoulli"
    assert {node.name for node in runner.session.get_inputs()} == {*entries, *facts["state"], "reset", "action_mask"}
    assert {"action", "value", "logits"} | {leaf["next"] for leaf in facts["state"].values()} == set(runner.names)
    assert {node.shape[0] for node in [*runner.session.get_inputs(), *runner.session.get_outputs()]} == {"batch"}


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_rows_do_not_depend_on_the_size_of_the_batch(exported: tuple[RecurrentPPO, Runner], rows: int) -> None:
    _, runner = exported
    many = {**inputs(runner, 7), **runner.state(7, fill=0.5)}
    few = {name: part[:rows] for name, part in many.items()}
    expected, got = runner.step(**many), runner.step(**few)
    for name in runner.names:
        assert_close(torch.from_numpy(got[name]), torch.from_numpy(expected[name][:rows]), name)


def test_reset_row_forgets_even_what_is_not_finite(exported: tuple[RecurrentPPO, Runner]) -> None:
    _, runner = exported
    given = {**inputs(runner, 2), "reset": np.array([True, False])}
    from_zeros = runner.step(**given, **runner.state(2))
    garbage = runner.state(2)
    for leaf in garbage.values():
        leaf[0] = np.nan
    from_garbage = runner.step(**given, **garbage)
    for name in runner.names:
        np.testing.assert_array_equal(from_garbage[name], from_zeros[name], err_msg=name)


def test_forbidden_bits_are_never_set(exported: tuple[RecurrentPPO, Runner]) -> None:
    model, runner = exported
    rng = np.random.default_rng(0)
    for seed in range(20):
        allowed = rng.random((3, 3, 2)) < 0.5
        allowed[..., 0] |= ~allowed.any(-1)
        given = inputs(runner, 3, seed) | {"action_mask": allowed.reshape(3, 6)}
        action = runner.step(**given, **runner.state(3))["action"]
        assert np.take_along_axis(allowed, action[..., None].astype(int), -1).all()
        assert model.action_space.contains(action[0])


def test_episode_of_a_runner_equals_that_of_the_agent(exported: tuple[RecurrentPPO, Runner]) -> None:
    """With what the environment itself gives: no normalisation, no torch, the state fed back."""
    model, runner = exported
    env = MemoryInputs(MaskedEpisodes(action="multi-binary", longest=40), ["action", "reward", "start"])
    obs, _ = env.reset(seed=5)
    state, pair, ended, reset = runner.state(1), None, False, True
    normalizer = model.get_vec_normalize_env()
    assert normalizer is not None
    steps = 0
    while not ended:
        mask = env.unwrapped.action_masks()  # type: ignore[attr-defined]
        fed = {f"observation.{key}": np.asarray(part)[None] for key, part in obs.items()}
        result = runner.step(**fed, **state, reset=np.array([reset]), action_mask=mask[None])
        state = {name: result[leaf["next"]] for name, leaf in runner.facts["state"].items()}
        seen = normalizer.normalize_obs({key: part[None] for key, part in obs.items()})
        action, pair = model.predict(
            seen, state=pair, episode_start=np.array([reset]), deterministic=True, action_masks=mask
        )
        np.testing.assert_array_equal(result["action"], action)
        obs, _, terminated, truncated, _ = env.step(action[0])
        ended, reset, steps = terminated or truncated, False, steps + 1
    assert steps > 5


def test_check_notices_other_weights(exported: tuple[RecurrentPPO, Runner], tmp_path: Path) -> None:
    model = model_of("none", "discrete")
    export_onnx(model, tmp_path / "policy.onnx")
    with torch.no_grad():
        model.policy.value_net.bias.add_(0.01)
    with pytest.raises(ExportError, match="value of the exported policy is off by .* in step 0"):
        check_onnx(model, tmp_path / "policy.onnx")


def test_exporting_leaves_the_agent_and_its_environment_as_they_were(tmp_path: Path) -> None:
    model = model_of("none", "discrete")
    model.policy.set_training_mode(True)
    model.observation_space.seed(3)
    expected = model.observation_space.sample()
    model.observation_space.seed(3)
    export_onnx(model, str(tmp_path / "policy.onnx"))
    check_onnx(model, str(tmp_path / "policy.onnx"), n_steps=2)
    assert model.policy.training
    np.testing.assert_array_equal(model.observation_space.sample(), expected)


class WholeActions(RandomEpisodes):
    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Box(0, 10, (2,), np.int64)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return super().step(np.round(action).astype(np.int64))


def test_actions_are_the_floats_that_the_environment_was_trained_with(tmp_path: Path) -> None:
    model = agent(env=make_vec_env(WholeActions, 2))
    with torch.no_grad():
        model.policy.action_net.bias.fill_(3.3)  # type: ignore[operator]
    export_onnx(model, tmp_path / "policy.onnx")
    assert check_onnx(model, tmp_path / "policy.onnx", n_steps=20).largest_error < 1e-4


class OneNumber(RandomEpisodes):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(-1, 1, (), np.float32)


def test_a_single_number_that_is_normalised_is_exported(tmp_path: Path) -> None:
    model = agent(env=VecNormalize(make_vec_env(OneNumber, 2)), steps=16)
    export_onnx(model, tmp_path / "policy.onnx")
    assert check_onnx(model, tmp_path / "policy.onnx", n_steps=20).largest_error < 1e-4


def test_policy_in_double_precision_is_checked(tmp_path: Path) -> None:
    model = model_of("m", "discrete")
    model.policy.double()
    export_onnx(model, tmp_path / "policy.onnx")
    assert check_onnx(model, tmp_path / "policy.onnx", n_steps=20).largest_error < 1e-4


def test_missing_package_is_named_with_its_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> object:
        return None if name == "onnxscript" else object()

    monkeypatch.setattr("importlib.util.find_spec", find)
    with pytest.raises(ExportError, match=r"needs the package onnxscript: pip install 'xlstm-rl\[export\]'"):
        export_onnx(model_of("none", "discrete"), tmp_path / "policy.onnx")


def test_policy_without_memory_core_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="ActorCriticPolicy has no memory core"):
        export_onnx(PPO("MlpPolicy", vec_env(), device="cpu"), tmp_path / "policy.onnx")


def test_missing_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "policy.onnx"
    export_onnx(model_of("none", "discrete"), path)
    assert path.is_file()


def test_masks_of_box_actions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be masked"):
        export_onnx(model_of("none", "box"), tmp_path / "policy.onnx", action_masks=True)


def test_wrappers_that_are_not_in_the_graph_are_named() -> None:
    env = VecNormalize(VecFrameStack(VecNormalize(vec_env()), 2))
    front = front_of(env, env.observation_space)
    assert front.outside == ["VecFrameStack", "VecNormalize"]
    assert front.space.shape == (6,)
    assert [type(layer).__name__ for layer in front.layers[""]] == ["Normalize"]
