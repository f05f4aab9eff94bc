"""A training run as a library call."""

from __future__ import annotations

import io
import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from gymnasium import spaces
from rich.console import Console

from xlstm_rl.agents import RecurrentPPO
from xlstm_rl.configs import ConfigError, TrainConfig, dump, load, load_file
from xlstm_rl.runs.returns import read_returns
from xlstm_rl.runs.train import RunResult, evaluate_run, resume, train

TINY = [
    "total_steps=256",
    "env.n_envs=2",
    "ppo.n_steps=32",
    "ppo.batch_size=64",
    "ppo.n_epochs=1",
    "memory.hidden_size=8",
    "eval.n_episodes=4",
    "eval.interim_episodes=2",
    "eval.every_steps=128",
    "checkpoint.every_steps=64",
    "checkpoint.keep=2",
]


SHORT = ["total_steps=64", "eval.every_steps=null"]


def tiny(name: str, *overrides: str) -> TrainConfig:
    return load(name, [*TINY, *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(tiny("cue-recall"), tmp_path_factory.mktemp("runs") / "run")


def test_run_folder_holds_everything(run: RunResult) -> None:
    names = {path.name for path in run.folder.iterdir()}
    assert names == {
        "config.yaml",
        "versions.json",
        "returns.csv",
        "curve.png",
        "tensorboard",
        "checkpoints",
        "lock",
        "model.zip",
        "best.zip",
    }
    assert any((run.folder / "tensorboard").iterdir())


def test_config_of_the_run_is_the_resolved_one(run: RunResult) -> None:
    assert load_file(run.folder / "config.yaml") == tiny("cue-recall")


def test_versions_and_seed_are_noted(run: RunResult) -> None:
    versions = json.loads((run.folder / "versions.json").read_text(encoding="utf-8"))
    assert {"python", "torch", "stable_baselines3", "gymnasium", "xlstm_rl", "platform"} <= set(versions)
    assert versions["seed"] == 0


def test_only_the_last_checkpoints_are_kept(run: RunResult) -> None:
    names = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert names == ["step_0000000192.zip", "step_0000000256.zip"]


def test_returns_hold_training_and_evaluation(run: RunResult) -> None:
    rows = read_returns(run.folder / "returns.csv")
    assert rows == run.rows
    assert [row.step for row in rows if row.kind == "eval"] == [128, 256]
    assert [row.step for row in rows if row.kind == "train"] == [64, 128, 192, 256]


def test_closing_table_has_the_reference_points(run: RunResult) -> None:
    assert [score.agent for score in run.scores] == [
        "trained agent",
        "same agent, actions sampled as in training",
        "same agent, memory emptied every step",
        "random actions",
        "best without memory",
        "optimum",
    ]


def test_a_run_folder_is_never_overwritten(run: RunResult) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        train(tiny("cue-recall"), run.folder)


def test_evaluation_of_the_folder_repeats_the_closing_one(run: RunResult) -> None:
    assert evaluate_run(run.folder)[0] == run.scores[0]


def test_evaluation_takes_number_and_seed_of_episodes(run: RunResult) -> None:
    assert evaluate_run(run.folder, n_episodes=3, seed=7)[0].episodes == 3
    with pytest.raises(ConfigError, match="n_episodes=0 must be at least 1"):
        evaluate_run(str(run.folder), n_episodes=0)


def test_evaluation_falls_back_to_the_last_checkpoint(run: RunResult, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_bytes((run.folder / "config.yaml").read_bytes())
    checkpoint = run.folder / "checkpoints" / "step_0000000256.zip"
    (tmp_path / "checkpoints" / checkpoint.name).write_bytes(checkpoint.read_bytes())
    assert evaluate_run(tmp_path)[0] == run.scores[0]


def test_evaluation_refuses_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run folder"):
        evaluate_run(tmp_path)


def test_evaluation_refuses_a_run_without_a_model(run: RunResult, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((run.folder / "config.yaml").read_bytes())
    with pytest.raises(ConfigError, match="no model yet"):
        evaluate_run(tmp_path)


def test_same_seed_gives_the_same_run(run: RunResult, tmp_path: Path) -> None:
    again = train(tiny("cue-recall"), tmp_path / "again")
    assert [row.mean_return for row in again.rows] == [row.mean_return for row in run.rows]
    assert again.scores == run.scores


@pytest.mark.parametrize("memory", ["lstm", "gru", "none"])
def test_baseline_memories_train(memory: str, tmp_path: Path) -> None:
    result = train(tiny("cue-recall", f"memory.name={memory}", "checkpoint.every_steps=null"), tmp_path / "run")
    assert result.scores[0].episodes == 4


def test_state_dependent_exploration_trains(tmp_path: Path) -> None:
    config = tiny("pendulum-no-velocity", "ppo.use_sde=true", "ppo.sde_sample_freq=8", *SHORT)
    model = RecurrentPPO.load(train(config, tmp_path / "run").model)
    assert (model.use_sde, model.sde_sample_freq) == (True, 8)


def test_memory_inputs_are_trained_saved_and_evaluated(tmp_path: Path) -> None:
    overrides = ["env.memory_inputs=[action, reward, start]", "env.normalize_observation=true", *SHORT]
    result = train(tiny("pendulum-no-velocity", *overrides), tmp_path / "run")
    model = RecurrentPPO.load(result.model)
    assert isinstance(model.observation_space, spaces.Dict)
    assert set(model.observation_space.spaces) == {
        *("observation", "previous_action", "previous_reward", "episode_start"),
    }
    assert evaluate_run(result.folder)[0] == result.scores[0]


def test_unknown_memory_input_is_named() -> None:
    with pytest.raises(ConfigError, match=r"env\.memory_inputs.*'actions'.*did you mean 'action'"):
        tiny("cue-recall", "env.memory_inputs=[actions]")


@pytest.mark.parametrize("vec", ["dummy", "vector"])
def test_repeated_memory_input_is_named(vec: str, tmp_path: Path) -> None:
    config = tiny("cue-recall", "env.memory_inputs=[action, action]", f"env.vec={vec}")
    with pytest.raises(ConfigError, match=r"env.memory_inputs of 'xlstm_rl/CueRecall-v0': .* 'action' more than once"):
        train(config, tmp_path / "run")


def test_masks_of_the_environment_are_used_throughout(tmp_path: Path) -> None:
    gymnasium.register("xlstm_rl_tests/Masked-v0", "tests.agents.masked_env:MaskedEpisodes")
    try:
        result = train(tiny("xlstm_rl_tests/Masked-v0", "ppo.use_masking=true"), tmp_path / "run")
    finally:
        del gymnasium.registry["xlstm_rl_tests/Masked-v0"]
    assert RecurrentPPO.load(result.model).use_masking is True
    assert len(result.scores) == 4


@pytest.fixture(scope="module")
def normalized_run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    config = tiny("pendulum-no-velocity", "env.normalize_observation=true", *SHORT)
    return train(config, tmp_path_factory.mktemp("runs") / "run")


def test_normalisation_is_saved_with_the_model_and_used_again(normalized_run: RunResult) -> None:
    assert evaluate_run(normalized_run.folder)[0] == normalized_run.scores[0]


def changed_model(run: RunResult, tmp_path: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of a run whose last model has other members."""
    folder = Path(shutil.copytree(run.folder, tmp_path / "run"))
    with zipfile.ZipFile(folder / "model.zip") as file:
        members = {name: file.read(name) for name in file.namelist()}
    change(members)
    with zipfile.ZipFile(folder / "model.zip", "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return folder


def without_normalizer(members: dict[str, bytes]) -> None:
    head = json.loads(members["format.json"])
    head["parts"].remove("normalizer")
    members["format.json"] = json.dumps(head).encode()
    for suffix in ("json", "safetensors"):
        del members[f"normalizer.{suffix}"]


def test_evaluation_refuses_missing_normalisation(normalized_run: RunResult, tmp_path: Path) -> None:
    folder = changed_model(normalized_run, tmp_path, without_normalizer)
    with pytest.raises(ConfigError, match=r"model\.zip holds no normalisation.*normalize_observation=True"):
        evaluate_run(folder)


def test_normalisation_beside_the_model_as_earlier_versions_wrote_it_is_used(
    normalized_run: RunResult, tmp_path: Path
) -> None:
    with zipfile.ZipFile(normalized_run.folder / "model.zip") as file:
        beside = file.read("normalizer.json")
    folder = changed_model(normalized_run, tmp_path, without_normalizer)
    (folder / "model.normalizer.json").write_bytes(beside)
    assert evaluate_run(folder)[0] == normalized_run.scores[0]
    (folder / "model.normalizer.json").write_bytes(beside[:-9])
    with pytest.raises(ConfigError, match=r"normalisation of .*model\.zip cannot be used"):
        evaluate_run(folder)


@pytest.mark.parametrize("content", [b"", b'{"settings": {', b"[]", b"{}", b"\xff\xfe"])
def test_damaged_normalisation_is_refused_by_name(normalized_run: RunResult, content: bytes, tmp_path: Path) -> None:
    folder = changed_model(normalized_run, tmp_path, lambda members: members.update({"normalizer.json": content}))
    with pytest.raises(ConfigError, match=r"normalisation of .*model\.zip cannot be used: .*normalizer\.json"):
        evaluate_run(folder)


def test_evaluation_refuses_an_environment_with_other_spaces(run: RunResult, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    other = tiny("CartPole-v1", "env.normalize_observation=false", "env.normalize_reward=false")
    (tmp_path / "run" / "config.yaml").write_text(dump(other), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cannot be loaded: Observation spaces do not match"):
        evaluate_run(tmp_path / "run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_evaluation_of_a_run_from_a_gpu_goes_to_the_cpu_and_says_so(run: RunResult, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(dump(tiny("cue-recall", "device=cuda")), encoding="utf-8")
    stream = io.StringIO()
    assert evaluate_run(tmp_path / "run", console=Console(file=stream))[0] == run.scores[0]
    assert "device='cuda' of the run cannot be used here" in stream.getvalue()


@pytest.mark.parametrize("device", ["meta", "tpu3"])
def test_evaluation_refuses_a_device_that_is_not_there(run: RunResult, device: str) -> None:
    with pytest.raises(ConfigError, match=f"device='{device}' cannot be used here"):
        evaluate_run(run.folder, device=device)


def test_evaluation_takes_another_device(run: RunResult) -> None:
    assert evaluate_run(run.folder, device="cpu")[0] == run.scores[0]


@pytest.mark.parametrize(
    "device",
    [
        "meta",
        pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
        pytest.param("mps", marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one")),
    ],
)
def test_training_refuses_a_device_that_is_not_there(device: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"device='{device}' cannot be used here: .*; use auto, cpu"):
        train(tiny("cue-recall", f"device={device}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("vec", ["dummy", "subproc"])
def test_environment_of_a_module_trains(vec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import gymnasium\n"
        'gymnasium.register("FromTraining-v0", entry_point="gymnasium.envs.classic_control.cartpole:CartPoleEnv", '
        "max_episode_steps=20)\n"
    )
    (tmp_path / "environments_for_training.py").write_text(program, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "environments_for_training", raising=False)
    monkeypatch.delitem(gymnasium.registry, "FromTraining-v0", raising=False)
    config = tiny("environments_for_training:FromTraining-v0", f"env.vec={vec}", *SHORT)
    assert train(config, tmp_path / "run").scores[0].episodes == 4


class _Mixed(gymnasium.Env[Any, Any]):
    """Observations of any kind."""

    action_space = spaces.Discrete(2)

    def __init__(self, kind: str = "mixed") -> None:
        box, discrete = spaces.Box(-1, 1, (2,)), spaces.Discrete(3)
        self.observation_space = {
            "mixed": spaces.Dict({"position": box, "sign": discrete}),
            "nested": spaces.Dict({"outer": spaces.Dict({"inner": box})}),
            "text": spaces.Text(4),
        }[kind]


@pytest.fixture
def mixed_env() -> Iterator[str]:
    gymnasium.register("Mixed-v0", entry_point=lambda **kwargs: _Mixed(**kwargs))
    yield "Mixed-v0"
    del gymnasium.registry["Mixed-v0"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["env.kwargs.kind=nested"], r"'Mixed-v0' has Dict observations under the key 'outer'; allowed are Box, "),
        (["env.kwargs.kind=text"], "'Mixed-v0' has Text observations; allowed are Box, "),
        (["env.kwargs.kind=odd"], r"'Mixed-v0' cannot be built with env.kwargs=\{'kind': 'odd'\}"),
    ],
)
def test_observations_that_cannot_be_used_are_refused(
    mixed_env: str, overrides: list[str], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=expected):
        train(tiny(mixed_env, *overrides), tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("Blackjack-v1", [], "'Blackjack-v1' has Tuple observations; allowed are Box, "),
        ("tmaze", ["ppo.use_sde=true"], "the agent cannot be built for 'xlstm_rl/TMaze-v0': .*continuous actions"),
        ("tmaze", ["policy.kwargs.activation_fn=rellu"], r"'rellu' is no class of torch.nn .*ReLU"),
        ("tmaze", ["policy.kwargs.optimizer_class=Adan"], r"'Adan' is no class of torch.optim .*Adam"),
        ("tmaze", ["policy.kwargs.squash_output=true"], r"with policy\.kwargs=\{'squash_output': True\}"),
        ("tmaze", ["policy.kwargs.net_arch=[-1]"], r"with policy\.kwargs=\{'net_arch': \[-1\]\}"),
    ],
)
def test_agent_that_cannot_be_built_is_refused(name: str, overrides: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        train(tiny(name, *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_classes_of_torch_are_settings_by_their_names(tmp_path: Path) -> None:
    words = ["policy.kwargs.activation_fn=ReLU", "policy.kwargs.optimizer_class=AdamW"]
    run = train(tiny("cue-recall", *words), tmp_path / "run")
    model = RecurrentPPO.load(run.model)
    assert type(model.policy.optimizer) is torch.optim.AdamW
    assert any(isinstance(module, torch.nn.ReLU) for module in model.policy.modules())
    assert evaluate_run(tmp_path / "run", n_episodes=1)


def test_environments_run_in_processes_of_their_own(tmp_path: Path) -> None:
    config = tiny("cue-recall", "env.vec=subproc", "total_steps=64", "eval.every_steps=null")
    assert train(config, tmp_path / "run").model.is_file()


def test_success_follows_from_the_return_where_the_task_does_not_say(tmp_path: Path) -> None:
    result = train(tiny("cartpole-no-velocity", "eval.success_return=1", "eval.every_steps=null"), tmp_path / "run")
    assert result.scores[0].success == 1.0


def test_wrong_environment_argument_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="corridor_lenght"):
        train(tiny("tmaze", "env.kwargs.corridor_lenght=3"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_progress_is_printed(tmp_path: Path) -> None:
    stream = io.StringIO()
    train(tiny("cue-recall"), tmp_path / "run", console=Console(file=stream, width=120))
    text = stream.getvalue()
    assert "steps/s" in text
    assert "evaluation: return" in text
    assert "trained agent" in text
    assert str(tmp_path / "run" / "model.zip") in text


def test_damaged_model_is_refused_by_name(tmp_path: Path) -> None:
    folder = train(tiny("cue-recall", "total_steps=64", "eval.every_steps=null"), tmp_path / "run").folder
    model = folder / "model.zip"
    model.write_bytes(model.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*model\.zip"):
        evaluate_run(folder)


@pytest.mark.parametrize("inputs", ["[]", "[action,reward,start]"])
def test_environments_stepped_by_gymnasium_are_trained_on(tmp_path: Path, inputs: str) -> None:
    result = train(tiny("cue-recall", *SHORT, "env.vec=vector", f"env.memory_inputs={inputs}"), tmp_path / "run")
    assert result.scores
    assert resume(result.folder, ["total_steps=128"]).rows[-1].step == 128
