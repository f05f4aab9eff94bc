"""Checkpoints give back the same agent, and whoever must hand something over is told what."""

import inspect
import io
import json
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import sb3_contrib
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from tests.agents.small_agents import SMALL, agent, assert_same, played
from tests.agents.spaces_for_tests import ACTIONS, OBSERVATIONS, RandomEpisodes, vec_env
from xlstm_rl.agents import RecurrentPPO, XLSTMPolicy, ppo
from xlstm_rl.agents.checkpoint import CheckpointError, remove_unfinished, write_whole
from xlstm_rl.agents.losses import LateSchedule
from xlstm_rl.agents.rollout import ChunkedRolloutBuffer
from xlstm_rl.memory import leaves


class OwnExtractor(FlattenExtractor):
    pass


class OwnPolicy(XLSTMPolicy):
    pass


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model.zip"
    agent(steps=24).save(path)
    return path


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_every_space_comes_back_bit_for_bit_and_trains_on(observation: str, action: str) -> None:
    model, file = agent(observation, action, steps=24), io.BytesIO()
    model.save(file)
    other = RecurrentPPO.load(file, model.env, device="cpu")
    assert_same(model, other)
    assert other.observation_space == model.observation_space
    assert other.action_space == model.action_space
    other.learn(24, reset_num_timesteps=False)
    assert other.num_timesteps == 48


@pytest.mark.parametrize("memory", ["lstm", "gru", "none"])
@pytest.mark.parametrize("critic_memory", ["shared", "separate", "none"])
def test_every_memory_comes_back(memory: str, critic_memory: str, tmp_path: Path) -> None:
    kwargs = {"memory": memory, "memory_kwargs": {"hidden_size": 5}, "critic_memory": critic_memory}
    model = agent(steps=24, policy_kwargs=kwargs)
    model.save(tmp_path / "model")
    assert_same(model, RecurrentPPO.load(tmp_path / "model", device="cpu"))


@pytest.mark.parametrize("late", [False, True])
def test_counters_schedules_and_advantage_scale_come_back(late: bool, tmp_path: Path) -> None:
    learning_rate: Any = LateSchedule(1e-3) if late else LinearSchedule(1e-3, 1e-4, 0.7)
    model = agent(steps=48, learning_rate=learning_rate, clip_range=LinearSchedule(0.3, 0.1, 1.0), ent_coef=0.01)
    model.save(tmp_path / "model")
    other: Any = RecurrentPPO.load(tmp_path / "model")
    assert (other.num_timesteps, other._n_updates, other.seed) == (48, 2, 0)
    assert other.ent_coef == 0.01
    assert vars(other._advantage_scale) == vars(model._advantage_scale)
    assert list(other.ep_info_buffer) == list(model.ep_info_buffer or ())
    for progress in (1.0, 0.77, 0.31, 0.0):
        assert other.lr_schedule(progress) == learning_rate(progress)
        assert other.clip_range(progress) == model.clip_range(progress)  # type: ignore[operator]


def test_learning_goes_on_as_without_the_file(tmp_path: Path) -> None:
    model = agent(steps=24)
    model.save(tmp_path / "model")
    other = RecurrentPPO.load(tmp_path / "model", vec_env(), device="cpu")
    for learner in (model, other):
        learner.set_env(vec_env())
        learner.set_random_seed(3)
        learner.learn(48, reset_num_timesteps=False)
    assert_same(model, other)


def test_without_force_reset_episodes_and_memory_go_on(tmp_path: Path) -> None:
    model = agent(steps=24)
    model.save(tmp_path / "model")
    other = RecurrentPPO.load(tmp_path / "model", model.env, device="cpu", force_reset=False)
    assert np.array_equal(other._last_obs, model._last_obs)  # type: ignore[arg-type]
    for before, after in zip(leaves(model._last_state), leaves(other._last_state), strict=True):
        assert torch.equal(before, after)
    other.learn(24, reset_num_timesteps=False)


def test_with_force_reset_the_memory_starts_empty(saved: Path) -> None:
    model = RecurrentPPO.load(saved, vec_env(n_envs=2))
    assert model._last_obs is None
    assert all(not leaf.any() and leaf.shape[0] == 2 for leaf in leaves(model._last_state))


def test_number_of_environments_may_change(saved: Path) -> None:
    model = RecurrentPPO.load(saved, vec_env(n_envs=5), device="cpu")
    assert model.rollout_buffer.n_envs == model.n_envs == 5
    model.learn(40)


def test_arguments_of_load_override_settings(saved: Path) -> None:
    model = RecurrentPPO.load(saved, vec_env(), n_steps=16, learning_rate=0.5, verbose=0)
    assert (model.rollout_buffer.buffer_size, model.lr_schedule(1.0)) == (16, 0.5)


class LabelledBuffer(ChunkedRolloutBuffer):
    def __init__(self, *args: Any, label: str = "none", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.label = label


def divisor(model: Any) -> float:
    """Of the normalisation of quiet advantages after loud ones."""
    model._advantage_scale.mean_square, model._advantage_scale.count = 1e6, 1
    model.learn(24, reset_num_timesteps=False)
    buffer = model.rollout_buffer
    with mock.patch.object(buffer, "chunks", wraps=buffer.chunks) as chunks:
        model.train()
    return float(buffer.advantages.std()) / float(chunks.call_args.args[0].std(correction=0))


def refreshes(model: Any) -> int:
    model.n_epochs = 2
    with mock.patch.object(ppo, "with_fresh_states", wraps=ppo.with_fresh_states) as refresh:
        model.learn(24)
    return refresh.call_count


def clipped_norm(model: Any) -> float:
    """Of a gradient after much smaller ones."""
    model._gradient_norm, model.max_grad_norm = 1e-3, 1e6
    model.learn(24)
    return float(sum(weight.grad.square().sum() for weight in model.policy.parameters()) ** 0.5)


def masks_kept(model: Any) -> bool:
    model.learn(24)
    return model.rollout_buffer.action_masks is not None


def answer_to_nan(model: Any) -> str:
    model.learn(24)
    model.rollout_buffer.returns[:] = np.nan
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*this update is skipped")
            model.train()
    except FloatingPointError:
        return "stop"
    return "skip"


def masked_agent(saved: Path, **kwargs: Any) -> Any:
    """The saved agent in an environment that has masks."""
    return RecurrentPPO.load(saved, make_vec_env(OptionalMasks, 3, seed=0), device="cpu", **kwargs)


class OptionalMasks(RandomEpisodes):
    def action_masks(self) -> np.ndarray:
        return np.ones(3, bool)


def mixes(model: Any) -> bool:
    """Whether a rollout's gradients were looked at."""
    model.learn(1)
    return model._gradient_moments is not None


# Name, value to load with, what it changes: from the first to the second.
AT_LOAD: dict[str, tuple[Any, Callable[[Any], Any], Any, Any]] = {
    "seq_len": (4, lambda model: model.rollout_buffer.chunk_starts, [0], [0, 4]),
    "refresh_state": (True, refreshes, 0, 1),
    "advantage_floor": (0.0, lambda model: divisor(model) > 10, True, False),
    "mix_advantages": (True, mixes, False, True),
    "grad_spike_factor": (None, lambda model: clipped_norm(model) > 0.1, False, True),
    "use_masking": (False, masks_kept, True, False),
    "on_nonfinite": ("skip", answer_to_nan, "stop", "skip"),
    "rollout_buffer_class": (
        LabelledBuffer,
        lambda model: type(model.rollout_buffer),
        ChunkedRolloutBuffer,
        LabelledBuffer,
    ),
    "rollout_buffer_kwargs": ({"label": "a"}, lambda model: model.rollout_buffer.label, "none", "a"),
}


@pytest.mark.parametrize("name", AT_LOAD)
def test_keyword_given_to_load_takes_effect(saved: Path, name: str) -> None:
    value, effect, before, after = AT_LOAD[name]
    others = {"rollout_buffer_class": LabelledBuffer} if name == "rollout_buffer_kwargs" else {}
    assert effect(masked_agent(saved, **others)) == before
    assert effect(masked_agent(saved, **others, **{name: value})) == after


def test_every_keyword_of_the_constructor_is_tried_at_load() -> None:
    parameters = inspect.signature(RecurrentPPO.__init__).parameters.values()
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == set(AT_LOAD)


def test_floor_of_advantages_can_be_set_between_rollouts() -> None:
    model = agent()
    assert divisor(model) > 10
    model.advantage_floor = 0.0
    assert divisor(model) < 10


def test_other_policy_arguments_are_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="policy kwargs do not equal"):
        RecurrentPPO.load(saved, policy_kwargs={"net_arch": [3]})


def test_equal_policy_arguments_are_accepted(saved: Path) -> None:
    assert RecurrentPPO.load(saved, policy_kwargs=SMALL).policy_kwargs == SMALL


@pytest.mark.parametrize("argument", [{"observation": "image"}, {"action": "box"}])
def test_environment_of_other_spaces_is_refused(saved: Path, argument: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="spaces do not match"):
        RecurrentPPO.load(saved, vec_env(**argument))


def test_suffix_is_appended_and_found(tmp_path: Path) -> None:
    agent().save(tmp_path / "new" / "model")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.zip"]
    RecurrentPPO.load(tmp_path / "new" / "model")
    RecurrentPPO.load(str(tmp_path / "new" / "model.zip"))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        RecurrentPPO.load(tmp_path / "nothing")


def test_excluded_attributes_are_left_out(tmp_path: Path) -> None:
    agent(gamma=0.5).save(tmp_path / "model", exclude=["gamma"])
    assert RecurrentPPO.load(tmp_path / "model").gamma == 0.99


def test_included_attributes_are_kept(tmp_path: Path) -> None:
    model: Any = agent()
    model.note = {"a": (1, 2.5)}
    model.save(tmp_path / "model", exclude=["note"], include=["note"])
    assert RecurrentPPO.load(tmp_path / "model").note == {"a": (1, 2.5)}  # type: ignore[attr-defined]


def test_environment_and_rollout_are_not_in_the_file(saved: Path) -> None:
    with zipfile.ZipFile(saved) as file:
        data = json.loads(file.read("data.json"))
    assert not {"env", "rollout_buffer", "policy", "_logger", "_vec_normalize_env"} & set(data)


def test_attribute_without_description_is_named_when_saving(tmp_path: Path) -> None:
    model: Any = agent()
    model.thing = object()
    with pytest.warns(UserWarning, match="thing.*not saved"):
        model.save(tmp_path / "model")
    assert RecurrentPPO.load(tmp_path / "model", custom_objects={"thing": 1}).thing == 1  # type: ignore[attr-defined]


def test_function_as_schedule_is_saved_as_its_present_value(tmp_path: Path) -> None:
    def rate(progress: float) -> float:
        return 1e-3 + progress * 1e-3

    model = agent(steps=24, learning_rate=rate)
    with pytest.warns(UserWarning, match=r"learning_rate is a function.*0\.001.*custom_objects"):
        model.save(tmp_path / "model")
    with pytest.warns(UserWarning, match=r"learning_rate was a function .* constant 0\.001 now") as warned:
        assert RecurrentPPO.load(tmp_path / "model").lr_schedule(1.0) == rate(0.0)
    assert warned[0].filename == __file__
    restored = RecurrentPPO.load(tmp_path / "model", custom_objects={"learning_rate": rate})
    assert restored.lr_schedule(0.5) == rate(0.5)


def test_functions_inside_sb3s_wrapper_are_found(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="clip_range is a function"):
        agent(clip_range=lambda progress: 0.1 * progress).save(tmp_path / "model")
    with pytest.warns(UserWarning, match="clip_range was a function"):
        assert RecurrentPPO.load(tmp_path / "model").clip_range(0.3) == 0.1  # type: ignore[operator]


def test_classes_of_torch_and_sb3_are_kept_by_name(tmp_path: Path) -> None:
    kwargs = {"activation_fn": nn.ELU, "optimizer_class": torch.optim.AdamW, "optimizer_kwargs": {"betas": (0.8, 0.9)}}
    model = agent(steps=24, policy_kwargs=kwargs | {"features_extractor_class": FlattenExtractor})
    model.save(tmp_path / "model")
    other = RecurrentPPO.load(tmp_path / "model")
    assert other.policy_kwargs == model.policy_kwargs
    assert_same(model, other)


def test_class_of_ones_own_has_to_be_handed_over(tmp_path: Path) -> None:
    kwargs = SMALL | {"features_extractor_class": OwnExtractor}
    model = agent(steps=24, policy_kwargs=kwargs)
    model.save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="features_extractor_class was .*OwnExtractor.*custom_objects=.*policy_k"):
        RecurrentPPO.load(tmp_path / "model")
    # the whole of policy_kwargs, or what the file does not hold
    for given in (kwargs, {"features_extractor_class": OwnExtractor}):
        loaded = RecurrentPPO.load(tmp_path / "model", custom_objects={"policy_kwargs": given})
        assert loaded.policy_kwargs == model.policy_kwargs
        assert_same(model, loaded)


def test_policy_of_ones_own_has_to_be_handed_over(tmp_path: Path) -> None:
    model = agent(policy=OwnPolicy)
    model.save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="policy_class was .*OwnPolicy.*custom_objects=.*YourPolicy"):
        RecurrentPPO.load(tmp_path / "model")
    other = RecurrentPPO.load(tmp_path / "model", custom_objects={"policy_class": OwnPolicy})
    assert type(other.policy) is OwnPolicy
    assert_same(model, other)


def test_alias_of_a_subclass_is_kept_by_name(tmp_path: Path) -> None:
    class Own(RecurrentPPO):
        policy_aliases = {"Own": OwnPolicy}

    Own("Own", vec_env(), policy_kwargs=SMALL).save(tmp_path / "model")
    assert type(Own.load(tmp_path / "model").policy) is OwnPolicy
    with pytest.raises(CheckpointError, match="names the policy 'Own'"):
        RecurrentPPO.load(tmp_path / "model")


def test_gsde_comes_back(tmp_path: Path) -> None:
    model = agent(action="box", steps=24, use_sde=True, sde_sample_freq=2, policy_kwargs={"squash_output": True})
    model.save(tmp_path / "model")
    assert_same(model, RecurrentPPO.load(tmp_path / "model"))


def test_parameters_go_from_model_to_model() -> None:
    model, other = agent(steps=24), agent(seed=1)
    other.set_parameters(model.get_parameters())
    assert_same(model, other)


def test_parameters_are_read_from_a_file(saved: Path) -> None:
    other = agent(seed=1)
    other.set_parameters(str(saved.with_suffix("")))
    assert_same(RecurrentPPO.load(saved), other)


def test_incomplete_parameters_are_refused() -> None:
    model = agent()
    with pytest.raises(ValueError, match="do not match"):
        model.set_parameters({"policy": model.policy.state_dict()})
    model.set_parameters({"policy": model.policy.state_dict()}, exact_match=False)


@pytest.mark.parametrize("critic_memory", ["shared", "separate", "none"])
@pytest.mark.parametrize("observation", ["vector", "image", "dict with image"])
def test_policy_comes_back_alone(observation: str, critic_memory: str, tmp_path: Path) -> None:
    share = critic_memory == "shared"
    model = agent(observation, policy_kwargs={"critic_memory": critic_memory, "share_features_extractor": share})
    model.policy.save(str(tmp_path / "policy.zip"))
    other = type(model.policy).load(str(tmp_path / "policy.zip"), device="cpu")
    assert len(list(other.parameters())) == len(list(model.policy.parameters()))
    before = played(model)
    model.policy = other
    for one, two in zip(before, played(model), strict=True):
        assert np.array_equal(one, two)


def test_policy_with_a_class_of_ones_own_wants_it_handed_over(tmp_path: Path) -> None:
    path = str(tmp_path / "policy.zip")
    agent(policy_kwargs={"features_extractor_class": OwnExtractor}).policy.save(path)
    with pytest.raises(CheckpointError, match="custom_objects=.*features_extractor_class"):
        XLSTMPolicy.load(path)
    assert isinstance(
        XLSTMPolicy.load(path, custom_objects={"features_extractor_class": OwnExtractor}).features_extractor,
        OwnExtractor,
    )


def test_policy_file_is_no_model_and_the_reverse(saved: Path, tmp_path: Path) -> None:
    agent().policy.save(str(tmp_path / "policy.zip"))
    with pytest.raises(CheckpointError, match="'policy', not a model"):
        RecurrentPPO.load(tmp_path / "policy.zip")
    with pytest.raises(CheckpointError, match="'model', not a policy"):
        XLSTMPolicy.load(str(saved))


def test_system_info_is_printed(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RecurrentPPO.load(saved, print_system_info=True)
    assert f"torch: {torch.__version__}" in capsys.readouterr().out


def test_failed_write_keeps_the_file_before(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        agent(seed=5).save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def rewritten(file: Path, target: Path, version: int, change: Callable[[dict[str, Any]], None]) -> Path:
    """A file as a former version wrote it: its JSON members by name, changed."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if version > 1 or name != "data"}
    trees = {name: json.loads(content) for name, content in members.items() if name.endswith(".json")}
    trees["format.json"]["version"] = version
    change(trees)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, json.dumps(trees[name]) if name in trees else content)
    return target


def test_file_of_format_1_is_read(tmp_path: Path) -> None:
    """As the first versions wrote them: nothing for others, no names of weights, nothing about frozen ones."""
    model = agent(policy_kwargs={"memory_kwargs": {"defaults": "paper", **SMALL["memory_kwargs"]}}, steps=24)
    model.save(tmp_path / "new.zip")

    def change(trees: dict[str, Any]) -> None:
        del trees["data.json"]["frozen_parameters"]
        del trees["policy.optimizer.json"]["class"], trees["policy.optimizer.json"]["param_groups"][0]["param_names"]

    old = rewritten(tmp_path / "new.zip", tmp_path / "old.zip", 1, change)
    assert_same(model, RecurrentPPO.load(old, device="cpu"))


@pytest.mark.parametrize("name", ["agent", "policy"])
def test_file_of_format_2_has_the_default_memory_of_its_time(name: str, tmp_path: Path) -> None:
    model = agent(policy_kwargs={"memory_kwargs": {"defaults": "paper", **SMALL["memory_kwargs"]}}, steps=24)
    (model if name == "agent" else model.policy).save(str(tmp_path / "new.zip"))

    def change(trees: dict[str, Any]) -> None:
        arguments = trees["data.json"]["policy_kwargs"] if name == "agent" else trees["data.json"]
        del arguments["memory_kwargs"]["defaults"]

    old = rewritten(tmp_path / "new.zip", tmp_path / "old.zip", 2, change)
    loaded = RecurrentPPO.load(old, device="cpu").policy if name == "agent" else XLSTMPolicy.load(str(old), "cpu")
    for before, after in zip(model.policy.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(before, after)
    # and a file written now has the default of now
    with pytest.raises(CheckpointError):
        now = rewritten(tmp_path / "new.zip", tmp_path / "now.zip", 3, change)
        RecurrentPPO.load(now, device="cpu") if name == "agent" else XLSTMPolicy.load(str(now), "cpu")


def test_hub_tools_find_settings_and_how_to_load(saved: Path) -> None:
    with zipfile.ZipFile(saved) as file:
        told = json.loads(file.read("data"))
    assert told["format"] == "xlstm_rl checkpoint"
    assert told["load_with"] == "xlstm_rl.RecurrentPPO.load(path)"
    assert (told["policy_class"], told["n_steps"], told["gamma"]) == ("MlpXLSTMPolicy", 8, 0.99)


def test_loader_of_stable_baselines3_says_how_to_load(saved: Path) -> None:
    with pytest.warns(UserWarning, match=r"this file, which is read by xlstm_rl\.RecurrentPPO\.load\(path\)"):
        settings, _, _ = load_from_zip_file(saved)
    assert settings is not None
    assert settings["load_with"] == "xlstm_rl.RecurrentPPO.load(path)"
    with pytest.warns(UserWarning, match=r"RecurrentPPO\.load"), pytest.raises(KeyError, match="observation_space"):
        sb3_contrib.RecurrentPPO.load(saved)


@pytest.mark.skipif(os.name == "nt", reason="Windows has nothing to flush in a folder")
def test_file_and_the_folders_that_hold_its_name_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    sync, replace = os.fsync, os.replace

    def note(number: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        sync(number)

    def note_name(source: Path, target: Path) -> None:
        flushed.append("in its place")
        replace(source, target)

    monkeypatch.setattr("os.fsync", note)
    monkeypatch.setattr("os.replace", note_name)
    agent().save(tmp_path / "new" / "run" / "model")
    folders, content, *rest = [flushed[:2], flushed[2], *flushed[3:]]
    assert sorted(folders) == sorted([tmp_path.name, "new"])
    assert content.startswith(".model.zip.")
    assert rest == ["in its place", "run"]


def test_unfinished_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    begin = (
        "import os, sys; from pathlib import Path; from xlstm_rl.agents import checkpoint\n"
        "os.fsync = lambda _: (print('begun', flush=True), sys.stdin.readline(), os._exit(9))\n"
        "checkpoint.write_whole(Path(sys.argv[1]) / 'model.zip', b'half')"
    )
    command = [sys.executable, "-c", begin, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "begun\n"
        (unfinished,) = tmp_path.iterdir()
        remove_unfinished(tmp_path)
        assert unfinished.exists(), "its writer lives"
        writer.communicate("\n")
    # of another machine, of which nobody here knows
    elsewhere = unfinished.with_name(unfinished.name.replace(f"@{writer.pid}", f"-2@{writer.pid}"))
    elsewhere.touch()
    remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == [elsewhere]


def test_unfinished_files_of_earlier_versions_are_removed(tmp_path: Path) -> None:
    for name in (".step_0000000012.zip.0a1b2c3d.part", ".returns.csv.part", "model.zip"):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]


def test_name_of_any_length_that_the_disk_takes_can_be_written(tmp_path: Path) -> None:
    write_whole(tmp_path / ("a" * 255), b"content")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"content"]
