"""Files that are torn, foreign or hostile are refused by name, and nothing in them runs."""

import contextlib
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from tests.agents.small_agents import SMALL, agent
from tests.agents.spaces_for_tests import vec_env
from xlstm_rl.agents import RecurrentPPO, XLSTMPolicy
from xlstm_rl.agents import checkpoint as checkpoint_module
from xlstm_rl.agents.checkpoint import CheckpointError
from xlstm_rl.envs import Resumable


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model.zip"
    agent(steps=24).save(path)
    return path


Edit = Callable[[dict[str, bytes]], object]


def edited(source: Path, target: Path, edit: Edit, compression: int = zipfile.ZIP_STORED) -> Path:
    """A copy of a checkpoint whose members were changed."""
    with zipfile.ZipFile(source) as file:
        members = {name: file.read(name) for name in file.namelist()}
    edit(members)
    with zipfile.ZipFile(target, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return target


def json_edit(member: str, edit: Callable[[Any], object]) -> Edit:
    def change(members: dict[str, bytes]) -> None:
        tree = json.loads(members[member])
        edit(tree)
        members[member] = json.dumps(tree).encode()

    return change


def tensor_edit(member: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def change(members: dict[str, bytes]) -> None:
        tensors = safetensors.torch.load(members[member])
        edit(tensors)
        members[member] = safetensors.torch.save(tensors)

    return change


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_torn_file_is_refused(saved: Path, tmp_path: Path, share: float) -> None:
    content = saved.read_bytes()
    (tmp_path / "torn.zip").write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"torn\.zip is torn"):
        RecurrentPPO.load(tmp_path / "torn.zip")


def test_flipped_byte_is_refused(saved: Path, tmp_path: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "flipped.zip").write_bytes(content)
    with pytest.raises(CheckpointError, match="CRC"):
        RecurrentPPO.load(tmp_path / "flipped.zip")


def test_any_flipped_bit_outside_the_members_is_refused_or_harmless(saved: Path, tmp_path: Path) -> None:
    """Members have checksums; names, places and sizes of members have none."""
    content = saved.read_bytes()
    with zipfile.ZipFile(saved) as file:
        headers = [(member.header_offset, 30 + len(member.filename)) for member in file.infolist()]
    whole = checkpoint_module.read_archive(saved, "model")
    path = tmp_path / "flipped.zip"
    places: list[int] = list(range(content.index(b"PK\x01\x02"), len(content)))
    for offset, size in headers:
        places += range(offset, offset + size)
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        try:
            archive = checkpoint_module.read_archive(path, "model")
        except CheckpointError:
            continue
        assert archive.libraries == whole.libraries
        for part, (tree, tensors) in whole.parts.items():
            assert archive.parts[part].tree == tree
            assert all(torch.equal(archive.parts[part].tensors[key], tensor) for key, tensor in tensors.items())


class Bomb:
    """Leaves a trace when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_sb3_zip_is_refused_unread(tmp_path: Path) -> None:
    model: Any = PPO("MlpPolicy", vec_env(), n_steps=8, batch_size=24)
    model.thing = Bomb(tmp_path / "trace")
    model.save(tmp_path / "sb3")
    with pytest.raises(CheckpointError, match="Stable-Baselines3 .cloudpickle.: loading it would run code"):
        RecurrentPPO.load(tmp_path / "sb3")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("policy", [False, True])
def test_pickles_are_refused_unread(policy: bool, tmp_path: Path) -> None:
    torch.save(Bomb(tmp_path / "trace"), tmp_path / "torch.zip")
    (tmp_path / "raw.zip").write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    load: Any = XLSTMPolicy.load if policy else RecurrentPPO.load
    for name, message in (("torch.zip", "torch.save: loading it could run code"), ("raw.zip", "torn or no checkpoint")):
        with pytest.raises(CheckpointError, match=message):
            load(str(tmp_path / name))
    assert not (tmp_path / "trace").exists()


def drop(name: str) -> Edit:
    return lambda members: members.pop(name)


def put(name: str, content: bytes = b"{}") -> Edit:
    return lambda members: members.update({name: content})


def set_data(**values: Any) -> Edit:
    return json_edit("data.json", lambda tree: tree.update(values))


def set_head(**values: Any) -> Edit:
    return json_edit("format.json", lambda tree: tree.update(values))


def name_class(name: str) -> dict[str, Any]:
    return {"activation_fn": {"$kind": "class", "name": name}}


def box(**values: Any) -> dict[str, Any]:
    return {"$kind": "Box", "dtype": "float32", "shape": [3], "low": -1, "high": 1} | values


def fill(part: str, name: str, value: float) -> Edit:
    return tensor_edit(f"{part}.safetensors", lambda tensors: tensors[name].fill_(value))


def replace(part: str, name: str, value: torch.Tensor) -> Edit:
    return tensor_edit(f"{part}.safetensors", lambda tensors: tensors.update({name: value}))


def replace_like(part: str, name: str, value: float, dtype: torch.dtype) -> Edit:
    return tensor_edit(
        f"{part}.safetensors",
        lambda tensors: tensors.update({name: torch.full_like(tensors[name], value, dtype=dtype)}),
    )


def set_group(**values: Any) -> Edit:
    return json_edit("policy.optimizer.json", lambda tree: tree["param_groups"][0].update(values))


VALUE = "value_net.weight"
HOSTILE: dict[str, tuple[Edit, str]] = {
    "absolute name": (put("/etc/passwd.json"), "'/etc/passwd.json', which belongs to no checkpoint"),
    "name upwards": (put("../../up.json"), "'../../up.json', which belongs to no checkpoint"),
    "unknown member": (put("run.json"), r"unknown \['run.json'\]"),
    "pickle beside": (put("data.pkl", pickle.dumps(1)), "could run code"),
    "no format": (drop("format.json"), "without format.json"),
    "no settings": (drop("data.json"), r"missing \['data.json'\]"),
    "no weights": (drop("policy.safetensors"), r"missing \['policy.safetensors'\]"),
    "no optimiser": (
        lambda members: (
            [members.pop(f"policy.optimizer.{suffix}") for suffix in ("json", "safetensors")]
            and set_head(parts=["data", "policy"])(members)
        ),
        r"no policy\.optimizer\.json",
    ),
    "other format": (set_head(format="other"), "no checkpoint of xlstm_rl"),
    "later version": (set_head(version=4), "format version 4, this library reads 1, 2, 3"),
    "parts upwards": (set_head(parts=["../data"]), "incomplete or changed"),
    "no JSON": (put("data.json", b"{"), "data.json is no JSON"),
    "deep JSON": (put("data.json", b"[" * 100_000 + b"]" * 100_000), "data.json is no JSON|no settings"),
    "list as settings": (put("data.json", b"[]"), "data.json holds no settings"),
    "huge tensor header": (
        put("policy.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        "tensors is damaged",
    ),
    "torn tensors": (
        lambda members: members.update({"policy.safetensors": members["policy.safetensors"][:-5]}),
        "policy.safetensors is damaged",
    ),
    "lost tensor": (
        tensor_edit("policy.safetensors", lambda tensors: tensors.pop(VALUE)),
        f"'{VALUE}'.*missing",
    ),
    "NaN": (fill("policy", VALUE, float("nan")), f"NaN in '{VALUE}'"),
    "infinity": (
        fill("policy", VALUE, float("inf")),
        f"'{VALUE}' is infin",
    ),
    "wrong shape": (
        replace("policy", VALUE, torch.zeros(1, 9)),
        rf"'{VALUE}' is \[1, 9\], its settings need \[1, 8\]",
    ),
    "wrong dtype": (
        tensor_edit(
            "policy.safetensors", lambda tensors: tensors.update({VALUE: torch.zeros(1, 8, dtype=torch.int64)})
        ),
        f"'{VALUE}' is torch.int64",
    ),
    "other settings": (set_data(policy_kwargs=SMALL | {"net_arch": [8, 8]}), "weights do not fit XLSTMPolicy"),
    "NaN in optimiser": (
        fill("policy.optimizer", "state.0.exp_avg", float("nan")),
        "policy.optimizer has NaN in 'state.0.exp_avg'",
    ),
    "shape in optimiser": (
        replace("policy.optimizer", "state.0.exp_avg", torch.zeros(2)),
        "optimiser state 'exp_avg' of weight 0",
    ),
    "weights of optimiser": (
        json_edit("policy.optimizer.json", lambda tree: tree["param_groups"][0].update(params=[0])),
        "another number of weights",
    ),
    "weights of optimiser unnamed": (
        json_edit("policy.optimizer.json", lambda tree: tree["param_groups"][0].update(param_names=["a"])),
        "another number of weights than names",
    ),
    "too large once converted": (
        replace("policy", VALUE, torch.full((1, 8), 1e300, dtype=torch.float64)),
        f"'{VALUE}' is infin",
    ),
    "too negative once converted": (
        replace("policy", "value_net.bias", torch.full((1,), -1e39, dtype=torch.float64)),
        "'value_net.bias' is infin",
    ),
    "infinity in optimiser": (
        fill("policy.optimizer", "state.0.exp_avg", float("-inf")),
        "has infinity in 'state.0.exp_avg'",
    ),
    "infinity in optimiser once converted": (
        replace_like("policy.optimizer", "state.0.exp_avg_sq", 1e300, torch.float64),
        "'exp_avg_sq' of weight 0 is not finite",
    ),
    "negative second moment": (
        fill("policy.optimizer", "state.0.exp_avg_sq", -1e-9),
        "'exp_avg_sq' of weight 0 is negative",
    ),
    "whole numbers in optimiser": (
        replace_like("policy.optimizer", "state.0.exp_avg", 1, torch.int64),
        r"'exp_avg' of weight 0 is torch\.int64",
    ),
    "truth in optimiser": (
        replace_like("policy.optimizer", "state.0.exp_avg_sq", 1, torch.bool),
        r"'exp_avg_sq' of weight 0 is torch\.bool",
    ),
    "negative steps of optimiser": (fill("policy.optimizer", "state.0.step", -1.0), "'step' of weight 0 is negative"),
    "infinite steps of optimiser": (
        fill("policy.optimizer", "state.0.step", float("inf")),
        "has infinity in 'state.0.step'",
    ),
    "no number of steps": (
        json_edit("policy.optimizer.json", lambda tree: tree["state"]["items"][0][1].update(step=None)),
        "'step' of weight 0 is None, no number",
    ),
    "state of no weight": (
        json_edit("policy.optimizer.json", lambda tree: tree["state"]["items"].append([99, {}])),
        "names weight 99, which there is not",
    ),
    "negative rate": (set_group(lr=-1.0), "impossible settings: .*learning rate"),
    "infinite rate": (set_group(lr={"$kind": "float", "value": "inf"}), "impossible settings: .*not finite"),
    "impossible betas": (set_group(betas={"$kind": "tuple", "items": [2.0, 0.9]}), "impossible settings: .*beta"),
    "text as rate": (set_group(lr="fast"), "impossible settings"),
    "shell as optimiser": (
        json_edit("policy.optimizer.json", lambda tree: tree.update({"class": ["os.system"]})),
        "another number of weights than names",
    ),
    "frozen weights that there are not": (set_data(frozen_parameters=["nothing"]), "frozen_parameters are"),
    "text as frozen weights": (set_data(frozen_parameters="all"), "frozen_parameters are"),
    "text as counter": (set_data(num_timesteps="many"), "num_timesteps is 'many'"),
    "list as counter": (set_data(_n_updates=[]), "_n_updates is"),
    "number as returns": (set_data(ep_info_buffer=5), "ep_info_buffer is 5"),
    "dict as scale": (set_data(_advantage_scale={}), "_advantage_scale is"),
    "text as schedule": (set_data(lr_schedule="fast"), "lr_schedule"),
    "shell as class": (set_data(policy_kwargs=name_class("os.system")), "'os.system', which is not among"),
    "module as class": (set_data(policy_kwargs=name_class("torch.nn.MultiheadAttentionX")), "is not among"),
    "shell as policy": (set_data(policy_class="os.system"), "names the policy 'os.system'"),
    "method as setting": (set_data(learn=1), "sets 'learn', which is no setting"),
    "environment as setting": (set_data(env=1), "sets 'env', which is no setting"),
    "unknown kind": (set_data(seed={"$kind": "eval"}), "seed is of unknown kind 'eval'"),
    "class as schedule": (
        set_data(clip_range={"$kind": "FloatSchedule", "value_schedule": {"$kind": "class", "name": "torch.nn.ReLU"}}),
        "clip_range describes no FloatSchedule",
    ),
    "endless space": (set_data(observation_space=box(shape=[10**9, 10**9])), "observation_space describes no Box"),
    "space of objects": (set_data(observation_space=box(dtype="O")), "observation_space describes no Box"),
    "negative action": (
        set_data(action_space={"$kind": "Discrete", "n": -1, "start": 0}),
        "action_space describes no Dis",
    ),
    "no steps": (set_data(n_steps=0), "n_steps=0 must be at least 1"),
    "text as number": (set_data(n_steps="many"), "no model can be built from the settings"),
    "unknown memory": (set_data(policy_kwargs={"memory": "nothing"}), "unknown memory 'nothing'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused(saved: Path, tmp_path: Path, case: str) -> None:
    edit, message = HOSTILE[case]
    path = edited(saved, tmp_path / "hostile.zip", edit)
    with pytest.raises(CheckpointError, match=message) as refused:
        RecurrentPPO.load(path)
    assert "hostile.zip" in str(refused.value)


def test_compressed_members_are_refused(saved: Path, tmp_path: Path) -> None:
    def inflate(members: dict[str, bytes]) -> None:
        members["data.json"] = b" " * 10**7 + members["data.json"]

    path = edited(saved, tmp_path / "bomb.zip", inflate, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        RecurrentPPO.load(path)


def test_declared_size_beyond_the_file_is_refused(saved: Path, tmp_path: Path) -> None:
    content = bytearray(saved.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = (2**31).to_bytes(4, "little") * 2
    (tmp_path / "bomb.zip").write_bytes(content)
    with pytest.raises(CheckpointError, match="not loaded"):
        RecurrentPPO.load(tmp_path / "bomb.zip")


def test_long_settings_are_refused(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "MAX_JSON_BYTES", 1000)
    with pytest.raises(CheckpointError, match="allowed are 1000"):
        RecurrentPPO.load(saved)


def test_member_twice_is_refused(saved: Path, tmp_path: Path) -> None:
    path = edited(saved, tmp_path / "twice.zip", lambda members: None)
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("data.json", "{}")
    with pytest.raises(CheckpointError, match="twice"):
        RecurrentPPO.load(path)


JUNK: list[Any] = [
    *(None, True, -1, 0.5, 10**30, "text", [], {}, {"$kind": None}, {"$kind": "Box"}),
    {"$kind": "tensor", "name": ["list"]},
    {"$kind": "class", "name": "torch.nn.ReLU"},
    {"$kind": "dict", "items": [[[], 1]]},
    {"$kind": "float", "value": "nan"},
]


def places(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Keys that lead to every value of a JSON tree."""
    if place:
        yield place
    for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(part, (*place, key))


@pytest.mark.filterwarnings("ignore:layers were changed after the agent was made")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("member", ["data.json", "policy.json", "policy.optimizer.json", "format.json"])
def test_changed_value_is_loaded_or_refused(saved: Path, tmp_path: Path, member: str, seed: int) -> None:
    random = np.random.default_rng(seed)

    def change(tree: Any) -> None:
        chosen = list(places(tree))
        *path, last = chosen[random.integers(len(chosen))]
        for key in path:
            tree = tree[key]
        # a rollout of 10**30 steps is a matter of memory, not of the file
        tree[last] = JUNK[random.integers(len(JUNK))] if last not in ("n_steps", "n_envs") else None

    for _ in range(5):
        path = edited(saved, tmp_path / "changed.zip", json_edit(member, change))
        with contextlib.suppress(CheckpointError):
            RecurrentPPO.load(path, device="cpu")


@pytest.mark.parametrize("resumed", [False, True])
def test_no_file_chooses_where_events_are_written(resumed: bool, tmp_path: Path) -> None:
    agent(steps=24).save_checkpoint(tmp_path / "run.zip")
    log_there = json_edit("data.json", lambda tree: tree.update(tensorboard_log=str(tmp_path / "chosen")))
    path = edited(tmp_path / "run.zip", tmp_path / "changed.zip", log_there)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*start new episodes")
        model = (RecurrentPPO.resume if resumed else RecurrentPPO.load)(path, vec_env(), "cpu")
    model.learn(24)
    assert not (tmp_path / "chosen").exists()
    again = RecurrentPPO.load(path, vec_env(), tensorboard_log=str(tmp_path / "own"))
    again.learn(24)
    assert list((tmp_path / "own").iterdir())


def test_folder_of_events_is_not_saved_and_can_be_handed_over(tmp_path: Path) -> None:
    agent(tensorboard_log=str(tmp_path / "here")).save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as file:
        assert "tensorboard_log" not in json.loads(file.read("data.json"))
    given = RecurrentPPO.load(tmp_path / "model", custom_objects={"tensorboard_log": "there"})
    assert given.tensorboard_log == "there"


def test_settings_left_out_are_named(tmp_path: Path) -> None:
    agent().save(tmp_path / "model", exclude=["action_space"])
    with pytest.raises(CheckpointError, match="holds no action_space"):
        RecurrentPPO.load(tmp_path / "model")


@pytest.mark.parametrize("seed", range(6))
def test_changed_training_run_is_resumed_or_refused(tmp_path: Path, seed: int) -> None:
    def envs() -> VecEnv:
        return VecNormalize(make_vec_env("xlstm_rl/TMaze-v0", 2, wrapper_class=Resumable))

    random = np.random.default_rng(seed)
    agent(env=envs(), n_steps=6, steps=12).save_checkpoint(tmp_path / "run.zip")

    def change(tree: Any) -> None:
        chosen = list(places(tree))
        *path, last = chosen[random.integers(len(chosen))]
        for key in path:
            tree = tree[key]
        tree[last] = JUNK[random.integers(len(JUNK))]

    for _ in range(8):
        path = edited(tmp_path / "run.zip", tmp_path / "changed.zip", json_edit("training.json", change))
        with contextlib.suppress(CheckpointError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            RecurrentPPO.resume(path, envs(), device="cpu")


def test_settings_that_are_none_are_refused_when_some_are_handed_over(saved: Path, tmp_path: Path) -> None:
    path = edited(saved, tmp_path / "edited.zip", set_data(policy_kwargs={"$kind": "tuple", "items": [1]}))
    with pytest.raises(CheckpointError, match="policy_kwargs are no keyword arguments"):
        RecurrentPPO.load(path, custom_objects={"policy_kwargs": {"net_arch": [8]}})
