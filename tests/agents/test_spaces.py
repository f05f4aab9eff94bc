"""Every space works in training, evaluation and files, or is refused with the remedy before anything is made."""

import inspect
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN

from tests.agents.small_agents import SMALL
from xlstm_rl import cli
from xlstm_rl.agents import RecurrentPPO, evaluate
from xlstm_rl.agents.features import find_extractor
from xlstm_rl.configs import ConfigError, load
from xlstm_rl.runs.open import open_run
from xlstm_rl.runs.train import resume, train
from xlstm_rl.vec_envs.env_contract import map_obs

# newer versions of gymnasium know it
NARROW: dict[str, Any] = {"dtype": np.uint8} if "dtype" in inspect.signature(spaces.Discrete).parameters else {}
UNIT = spaces.Box(-1, 1, (2,), np.float32)
PIXELS = spaces.Box(0, 255, (7, 7, 3), np.uint8)
OBSERVATIONS: dict[str, spaces.Space[Any]] = {
    "single number": spaces.Box(-1, 1, (), np.float32),
    "single number, float64": spaces.Box(-1, 1, (), np.float64),
    "single whole number": spaces.Box(-3, 3, (), np.int64),
    "vector without bounds": spaces.Box(-np.inf, np.inf, (3,), np.float64),
    "matrix": spaces.Box(-1, 1, (2, 3), np.float32),
    "bytes": spaces.Box(0, 255, (4,), np.uint8),
    "booleans": spaces.Box(0, 1, (2,), np.bool_),
    "small image": PIXELS,
    "small image, channels first": spaces.Box(0, 255, (3, 7, 7), np.uint8),
    "large image": spaces.Box(0, 255, (36, 40, 3), np.uint8),
    "floats in three dimensions": spaces.Box(0, 1, (7, 7, 3), np.float32),
    "one choice": spaces.Discrete(1),
    "choices in another dtype": spaces.Discrete(3, **NARROW),
    "choices from -3": spaces.Discrete(4, start=-3),
    "choices": spaces.MultiDiscrete([2, 3]),
    "grid of choices": spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])),
    "square grid of choices, not from 0": spaces.MultiDiscrete(np.full((2, 2), 2), start=np.array([[1, 2], [3, -4]])),
    "bits": spaces.MultiBinary(3),
    "grid of bits": spaces.MultiBinary([2, 3]),
    "dict": spaces.Dict(
        {
            "number": spaces.Box(-1, 1, (), np.float32),
            "grid": spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])),
            "bits": spaces.MultiBinary([2, 2]),
            "image": PIXELS,
            "choice": spaces.Discrete(3, start=5),
        }
    ),
}
ACTIONS: dict[str, spaces.Space[Any]] = {
    "choices in another dtype": spaces.Discrete(3, start=1, **NARROW),
    "choices from 2": spaces.Discrete(3, start=2),
    "single number": spaces.Box(-2, 2, (), np.float32),
    "matrix": spaces.Box(-1, 1, (2, 2), np.float64),
    "whole numbers": spaces.Box(-2, 3, (2,), np.int64),
    "choices": spaces.MultiDiscrete([2, 3], start=[1, -1]),
    "bits": spaces.MultiBinary(3),
}
REFUSED: dict[str, tuple[spaces.Space[Any], spaces.Space[Any], str]] = {
    "text": (spaces.Text(5), spaces.Discrete(2), "Text observations; allowed.*gymnasium.wrappers"),
    "tuple": (spaces.Tuple([UNIT, UNIT]), spaces.Discrete(2), "Tuple observations; allowed.*FlattenObservation"),
    "sequence": (spaces.Sequence(UNIT), spaces.Discrete(2), "Sequence observations; allowed"),
    "graph": (spaces.Graph(UNIT, None), spaces.Discrete(2), "Graph observations; allowed"),
    "one of": (spaces.OneOf([UNIT, UNIT]), spaces.Discrete(2), "OneOf observations; allowed"),
    "nested": (
        spaces.Dict({"inner": spaces.Dict({"part": UNIT})}),
        spaces.Discrete(2),
        "Dict observations under the key 'inner'; allowed.*flat Dict",
    ),
    "text in a dict": (
        spaces.Dict({"said": spaces.Text(5)}),
        spaces.Discrete(2),
        "Text observations under the key 'said'; allowed",
    ),
    "nothing": (spaces.Box(-1, 1, (0,), np.float32), spaces.Discrete(2), "has empty observations"),
    "dict of nothing": (spaces.Dict({}), spaces.Discrete(2), "observations without keys|empty Dict observation space"),
    "dict of actions": (UNIT, spaces.Dict({"one": spaces.Discrete(2)}), "Dict actions; allowed.*TransformAction"),
    "tuple of actions": (UNIT, spaces.Tuple([spaces.Discrete(2)]), "Tuple actions; allowed"),
    "text as action": (UNIT, spaces.Text(3), "Text actions; allowed"),
    "grid of chosen": (
        UNIT,
        spaces.MultiDiscrete(np.full((2, 2), 2)),
        "(?s)actions of several dimensions.*TransformAction",
    ),
    "grid of set bits": (UNIT, spaces.MultiBinary([2, 2]), "(?s)actions of several dimensions.*TransformAction"),
    "without bounds": (UNIT, spaces.Box(-np.inf, np.inf, (2,), np.float32), "actions without bounds.*TransformAction"),
    "no action": (UNIT, spaces.Box(-1, 1, (0,), np.float32), "has empty actions"),
}


class OfSpaces(gymnasium.Env[Any, Any]):
    """Random observations; refuses actions that are not of its space."""

    def __init__(self, observation: str = "", action: str = "", refused: str = "") -> None:
        self.observation_space = OBSERVATIONS.get(observation, UNIT)
        self.action_space = ACTIONS.get(action, spaces.Discrete(2))
        if refused:
            self.observation_space, self.action_space, _ = REFUSED[refused]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        # Box actions of whole numbers are floats, as Stable-Baselines3 has them
        whole = isinstance(self.action_space, spaces.Box) and self.action_space.dtype == np.int64
        assert whole or self.action_space.contains(np.asarray(action)), f"{action!r} is outside {self.action_space}"
        self.time += 1
        return self.observation_space.sample(), 1.0, self.time == 5, False, {}


gymnasium.register("OfSpaces-v0", entry_point="tests.agents.test_spaces:OfSpaces")
ID = "tests.agents.test_spaces:OfSpaces-v0"
TINY = [
    *("total_steps=64", "env.n_envs=2", "ppo.n_steps=16", "ppo.batch_size=32", "ppo.n_epochs=1"),
    *("memory.hidden_size=8", "eval.n_episodes=2", "eval.every_steps=null", "checkpoint.every_steps=32"),
]


def policy_for(space: spaces.Space[Any], observation: str) -> str:
    if isinstance(space, spaces.Dict):
        return "MultiInputXLSTMPolicy"
    return "CnnXLSTMPolicy" if observation == "large image" else "MlpXLSTMPolicy"


@pytest.mark.parametrize(
    ("observation", "action"), [*((name, "") for name in OBSERVATIONS), *(("", name) for name in ACTIONS)]
)
@pytest.mark.parametrize("vectorised", [False, True])
def test_agents_learn_play_and_come_back_from_files(
    observation: str, action: str, vectorised: bool, tmp_path: Path
) -> None:
    kwargs = {"observation": observation, "action": action}
    env: Any = make_vec_env(OfSpaces, 2, env_kwargs=kwargs)
    if vectorised:
        env = gymnasium.vector.SyncVectorEnv([lambda: OfSpaces(**kwargs)] * 2)
    space = OfSpaces(**kwargs).observation_space
    settings: dict[str, Any] = {"n_steps": 12, "batch_size": 12, "n_epochs": 1, "policy_kwargs": SMALL}
    model = RecurrentPPO(policy_for(space, observation), env, device="cpu", seed=0, **settings).learn(48)
    assert evaluate(model, OfSpaces(**kwargs), 2, deterministic=False).lengths.tolist() == [5, 5]
    model.save(tmp_path / "agent")
    again = RecurrentPPO.load(tmp_path / "agent", device="cpu")
    rows = [model.observation_space.sample() for _ in range(3)]
    batch = map_obs(lambda *parts: np.stack(parts), *rows)
    together, _ = model.predict(batch, deterministic=True)
    assert together.shape == (3, *(model.action_space.shape or ()))
    for row, chosen in zip(rows, together, strict=True):
        alone, _ = again.predict(row, deterministic=True)
        np.testing.assert_allclose(np.asarray(alone, float), np.asarray(chosen, float), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("refused", REFUSED)
def test_other_spaces_are_refused_with_the_remedy(refused: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[refused][2]):
        RecurrentPPO("MlpXLSTMPolicy", OfSpaces(refused=refused), device="cpu")


@pytest.mark.parametrize("refused", REFUSED)
def test_a_run_with_other_spaces_leaves_no_folder(
    refused: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*TINY, f'env.kwargs.refused="{refused}"']
    with pytest.raises(ConfigError, match=REFUSED[refused][2]):
        train(load(ID, overrides), tmp_path / "run")
    assert cli.main(["train", ID, "--run-dir", str(tmp_path / "run"), *overrides]) == cli.USAGE_ERROR
    assert capsys.readouterr().err.startswith("xlstm-rl: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["single number", "small image", "grid of choices", "dict"])
def test_runs_choose_an_extractor_that_fits(name: str, tmp_path: Path) -> None:
    result = train(load(ID, [*TINY, f'env.kwargs.observation="{name}"']), tmp_path / "run")
    assert len(result.scores) >= 3


def test_small_images_are_refused_by_the_network_for_images_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="too small for NatureCNN, which needs 36 x 36: use MlpXLSTMPolicy"):
        RecurrentPPO("CnnXLSTMPolicy", OfSpaces("small image"), device="cpu")
    with pytest.raises(ValueError, match="too small for NatureCNN.*FlatSmallImagesExtractor"):
        RecurrentPPO(
            "MultiInputXLSTMPolicy",
            OfSpaces("dict"),
            device="cpu",
            policy_kwargs={"features_extractor_class": CombinedExtractor},
        )


class MeanPixel(BaseFeaturesExtractor):
    """One feature: the mean of an image."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space, 1)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return observations.flatten(1).mean(1, keepdim=True)


EXTRACTORS = {
    "flatten": FlattenExtractor,
    "nature": NatureCNN,
    "tests.agents.test_spaces:MeanPixel": MeanPixel,
}


@pytest.mark.filterwarnings("ignore:.*it is not saved:UserWarning")
@pytest.mark.parametrize("name", EXTRACTORS)
def test_the_extractor_is_a_setting_of_runs(name: str, tmp_path: Path) -> None:
    overrides = [*TINY, 'env.kwargs.observation="large image"', f"policy.features_extractor={name}"]
    train(load(ID, overrides), tmp_path / "run")
    with open_run(tmp_path / "run") as run:
        assert type(run.model.policy.features_extractor) is EXTRACTORS[name]
    assert resume(tmp_path / "run", ["total_steps=128"]).scores


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "must be flatten, nature, combined, or module:Class"),
        ("no.such.module:Class", "cannot be imported"),
        ("tests.agents.test_spaces:Absent", "cannot be imported"),
        ("tests.agents.test_spaces:OfSpaces", "must be flatten"),
    ],
)
def test_other_extractors_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_extractor(name)
    with pytest.raises(ConfigError, match=message):
        load(ID, [f"policy.features_extractor={name}"])
