"""The loader of configurations."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from xlstm_rl.configs import ConfigError, EnvConfig, TrainConfig, load, load_file, preset_names
from xlstm_rl.configs.loading import dump


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_survives_dump_and_load(name: str, tmp_path: Path) -> None:
    config = load(name)
    (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert load_file(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_describes_itself(name: str) -> None:
    assert load(name).description


def test_an_environment_id_takes_the_defaults() -> None:
    config = load("CartPole-v1")
    assert config.env.id == "CartPole-v1"
    assert config.memory.name == "xlstm"


def test_later_override_wins() -> None:
    assert load("tmaze", ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "0.0003", "3E-4"])
def test_scientific_notation_is_a_number(text: str) -> None:
    assert load("tmaze", [f"ppo.learning_rate={text}"]).ppo.learning_rate == pytest.approx(3e-4)


def test_scientific_notation_is_a_number_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("env: {id: CartPole-v1}\nppo: {learning_rate: 1e-3}\ntotal_steps: 1e6\n", encoding="utf-8")
    config = load(str(path))
    assert (config.ppo.learning_rate, config.total_steps) == (1e-3, 1_000_000)


@pytest.mark.parametrize("base", ["general", "tmaze", "parity"])
def test_file_may_start_from_a_base(base: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"base: {base}\nenv: {{id: CartPole-v1, n_envs: 4}}\nmemory: {{hidden_size: 32}}\n", encoding="utf-8"
    )
    expected = load(
        "CartPole-v1" if base == "general" else base, ["env.id=CartPole-v1", "env.n_envs=4", "memory.hidden_size=32"]
    )
    assert load(str(path)) == expected
    # another memory has other settings
    path.write_text(f"base: {base}\nenv: {{id: CartPole-v1}}\nmemory: {{name: lstm}}\n", encoding="utf-8")
    assert set(load(str(path)).memory.settings) <= {"hidden_size"}


def test_file_without_a_base_starts_from_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("env: {id: CartPole-v1}\n", encoding="utf-8")
    assert load(str(path)) == TrainConfig(env=EnvConfig("CartPole-v1"))


@pytest.mark.parametrize("base", ["CartPole-v1", "TMaze-v0"])
def test_file_may_start_from_an_environment_id(base: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {base}\nppo: {{n_steps: 64}}\n", encoding="utf-8")
    assert load(str(path)) == load(base, ["ppo.n_steps=64"])


@pytest.mark.parametrize("name", ["general", "tmaze", "CartPole-v1"])
def test_file_with_a_base_resolves_to_one_that_loads_to_itself(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {name}\nenv: {{id: CartPole-v1}}\nmemory: {{name: gru}}\n", encoding="utf-8")
    config = load(str(path))
    path.write_text(dump(config), encoding="utf-8")
    assert load_file(path) == config


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("tmase", r"'tmase' is neither .* \(base of .*mine.yaml\); did you mean 'tmaze'\?"),
        ("generl", r"'generl' is neither .* \(base of .*mine.yaml\); did you mean 'general'\?"),
        ("other.yaml", r"base='other.yaml' of .*mine.yaml must be a preset, an environment id or 'general'"),
        ("[1]", r"base=\[1\] of .*mine.yaml must be a preset"),
        ("null", r"base=None of .*mine.yaml must be a preset"),
    ],
)
def test_unknown_base_is_refused(base: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {base}\nenv: {{id: CartPole-v1}}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=expected):
        load(str(path))


@pytest.mark.parametrize("name", ["Qwertyuiop-v0", "MyEnv-v0", "MyCartPole-v1"])
def test_unknown_id_is_answered_briefly_with_the_way_to_one_of_ones_own(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(name)
    assert f"is written your_module:{name}" in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", ["tmze", "xlstm_rl/TMase-v0", "gymnasium:MyEnv-v0"])
def test_module_is_not_asked_for_where_it_cannot_help(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(name)
    assert "your_module" not in str(caught.value)


def test_list_becomes_a_tuple() -> None:
    assert load("tmaze", ["policy.net_arch=[32, 16]"]).policy.net_arch == (32, 16)


def test_null_unsets() -> None:
    assert load("tmaze", ["eval.every_steps=null"]).eval.every_steps is None


def test_environment_arguments_are_free() -> None:
    assert load("tmaze", ["env.kwargs.corridor_length=30"]).env.kwargs == {"corridor_length": 30}


@pytest.mark.parametrize("override", ["memory.num_heads=2", "memory={num_heads: 2}"])
def test_override_of_one_memory_setting_keeps_the_others(override: str) -> None:
    before = load("parity").memory.settings
    assert {"blocks", "conv_kernel", "ffn_factor", "recurrent_std", "slstm_forget_bias"} <= set(before)
    assert load("parity", [override]).memory.settings == {**before, "num_heads": 2}


def test_overrides_of_one_section_all_stay() -> None:
    before = load("parity").memory.settings
    config = load("parity", ["memory.hidden_size=32", "memory.num_heads=2"])
    assert config.memory.settings == {**before, "hidden_size": 32, "num_heads": 2}


def test_memory_named_as_it_is_keeps_its_settings() -> None:
    assert load("parity", ["memory.name=xlstm"]).memory == load("parity").memory


def test_another_memory_drops_the_settings_of_the_first_but_its_width(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("env: {id: CartPole-v1}\nmemory: {hidden_size: 32, blocks: s, num_heads: 2}\n", encoding="utf-8")
    memory = load(str(path), ["memory.name=lstm"]).memory
    assert (memory.name, memory.settings) == ("lstm", {"hidden_size": 32})


@pytest.mark.parametrize(
    "overrides",
    [
        ["memory.num_layers=2", "memory.name=lstm"],
        ["memory.name=lstm", "memory.num_layers=2"],
        ["memory={name: lstm, num_layers: 2}"],
        ["memory.name=gru", "memory.num_layers=2", "memory.name=lstm"],
    ],
    ids=str,
)
def test_overrides_stay_wherever_the_memory_is_named(overrides: list[str]) -> None:
    memory = load("parity", overrides).memory
    assert (memory.name, memory.settings) == ("lstm", {"num_layers": 2})


def test_override_that_another_memory_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown key memory\.num_heads for memory 'lstm'"):
        load("parity", ["memory.num_heads=2", "memory.name=lstm"])


@pytest.fixture
def module_of_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "environments_for_loading"
    program = (
        "import gymnasium\n"
        'gymnasium.register("FromLoading-v0", entry_point="gymnasium.envs.classic_control.cartpole:CartPoleEnv")\n'
    )
    (tmp_path / f"{name}.py").write_text(program, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delitem(gymnasium.registry, "FromLoading-v0", raising=False)
    return name


def test_module_of_an_environment_id_is_imported(module_of_environments: str) -> None:
    env_id = f"{module_of_environments}:FromLoading-v0"
    assert load(env_id).env.id == env_id


def test_module_of_an_environment_id_in_a_file_is_imported(module_of_environments: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f'env: {{id: "{module_of_environments}:FromLoading-v0"}}\n', encoding="utf-8")
    assert load_file(tmp_path / "config.yaml").env.id.endswith(":FromLoading-v0")


@pytest.mark.parametrize(
    ("env_id", "expected"),
    [
        ("no_such_module:Env-v0", ["module 'no_such_module'", "PYTHONPATH"]),
        ("gymnasium:Nowhere-v0", ["'gymnasium:Nowhere-v0'", "neither a preset nor a registered environment"]),
        ("a:b:Env-v0", ["'a:b:Env-v0'", "must be a module"]),
        (":Env-v0", ["':Env-v0'", "must be a module"]),
        (".relative:Env-v0", ["'.relative:Env-v0'", "must be a module"]),
    ],
)
def test_wrong_module_of_an_environment_id_is_refused_by_name(env_id: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(env_id)
    assert all(part in str(caught.value) for part in expected), str(caught.value)


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps"])
def test_device_of_another_machine_can_be_read(device: str) -> None:
    assert load("tmaze", [f"device={device}"]).device == device


def test_layers_may_differ_for_actor_and_critic() -> None:
    kwargs: dict[str, Any] = {"net_arch": {"pi": [8], "vf": [16]}}
    assert load("tmaze", ["policy.kwargs.net_arch={pi: [8], vf: [16]}"]).policy.kwargs == kwargs


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"mine\.yaml is no YAML"):
        load(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("name", "override", "expected"),
    [
        ("tmze", "seed=1", ["'tmze'", "did you mean 'tmaze'?"]),
        ("xlstm_rl/TMase-v0", "seed=1", ["'xlstm_rl/TMase-v0'", "did you mean 'xlstm_rl/TMaze-v0'?"]),
        ("tmaze", "sed=1", ["'sed'", "override 'sed=1'", "did you mean 'seed'?"]),
        ("tmaze", "ppo.gama=1", ["'ppo.gama'", "did you mean 'gamma'?"]),
        ("tmaze", "learning_rate=1e-3", ["unknown key 'learning_rate'", "did you mean 'ppo.learning_rate'?"]),
        ("tmaze", "n_envs=4", ["unknown key 'n_envs'", "did you mean 'env.n_envs' or 'eval.n_envs'?"]),
        ("tmaze", "kwargs.corridor_length=4", ["'kwargs'", "did you mean 'env.kwargs' or 'policy.kwargs'?"]),
        ("tmaze", "hidden_size=64", ["unknown key 'hidden_size'", "did you mean 'memory.hidden_size'?"]),
        ("tmaze", "settings={blocks: m}", ["unknown key 'settings'", "known: checkpoint"]),
        ("tmaze", "memory=lstm", ["'memory'", "is a section", "such as memory.name=lstm"]),
        ("tmaze", "env=CartPole-v1", ["'env'", "is a section", "such as env.id=..."]),
        ("tmaze", "memory.hidden=3", ["memory.hidden", "did you mean 'hidden_size'?"]),
        ("tmaze", "memory.name=lstn", ["memory.name='lstn'", "did you mean 'lstm'?"]),
        ("tmaze", "memory.hidden_size=66", ["hidden_size=66", "multiple of num_heads=4"]),
        ("tmaze", "memory.hidden_size=wide", ["hidden_size='wide'", "a whole number of at least 1"]),
        ("tmaze", "memory.hidden_size=64.0", ["hidden_size=64.0", "a whole number of at least 1"]),
        ("tmaze", "memory.hidden_size=.inf", ["hidden_size=inf", "a whole number of at least 1"]),
        ("tmaze", "memory.hidden_size=10000000000000000000000", ["memory 'xlstm'"]),
        ("tmaze", "memory.norm_eps=-1", ["norm_eps=-1", "greater than 0"]),
        ("tmaze", "memory.bias=maybe", ["bias='maybe'", "true or false"]),
        ("tmaze", "memory.mlstm_forget_bias=3", ["mlstm_forget_bias=3", "a pair of finite numbers"]),
        ("tmaze", "memory={3: 4}", ["unknown key memory.3"]),
        ("tmaze", "memory={name: lstm, hidden_size: wide}", ["hidden_size='wide'", "a whole number"]),
        ("tmaze", "memory={name: gru, num_layers: 1.5}", ["num_layers=1.5", "a whole number"]),
        ("tmaze", "memory={name: none, hidden_size: null}", ["hidden_size=None", "a whole number"]),
        ("tmaze", "policy.kwargs.foo=1", ["policy.kwargs.foo"]),
        ("tmaze", "policy.kwargs.ortho_int=true", ["policy.kwargs.ortho_int", "did you mean 'ortho_init'?"]),
        ("tmaze", "policy.kwargs.use_sde=true", ["policy.kwargs.use_sde", "use ppo.use_sde"]),
        ("tmaze", "policy.kwargs.memory=gru", ["policy.kwargs.memory", "use memory.name"]),
        ("tmaze", "policy={net_arch: [8], kwargs: {net_arch: [4]}}", ["use policy.net_arch"]),
        ("tmaze", "ppo.sde_sample_freq=0", ["ppo.sde_sample_freq=0", "at least 1"]),
        ("tmaze", f"seed=1{'0' * 400}", ["seed"]),
        ("tmaze", "ppo.gamma=2024-13-45", ["override 'ppo.gamma=2024-13-45'"]),
        ("tmaze", "ppo.gamma=1.5", ["ppo.gamma=1.5", "at most 1"]),
        ("tmaze", "ppo.gamma=.nan", ["ppo.gamma=nan"]),
        ("tmaze", "ppo.n_steps=12.5", ["ppo.n_steps=12.5", "a whole number"]),
        ("tmaze", "ppo.n_steps=true", ["ppo.n_steps=True", "a whole number"]),
        ("tmaze", "ppo.learning_rate=fast", ["ppo.learning_rate='fast'", "a number"]),
        ("tmaze", "ppo.lr_schedule=linaer", ["ppo.lr_schedule='linaer'", "did you mean 'linear'?"]),
        ("tmaze", "ppo.batch_size=4096", ["ppo.batch_size=4096", "2048 steps of a rollout"]),
        ("tmaze", "ppo.seq_len=256", ["ppo.seq_len=256", "ppo.n_steps=128"]),
        ("tmaze", "policy.net_arch=[0]", ["policy.net_arch=[0]"]),
        ("tmaze", "env.n_envs=0", ["env.n_envs=0", "at least 1"]),
        ("tmaze", "env.id=Nowhere-v0", ["'Nowhere-v0'"]),
        ("tmaze", "device=tpu3", ["device='tpu3'"]),
        ("tmaze", "seed=-1", ["seed=-1"]),
        ("tmaze", "env=3", ["env=3", "is a section"]),
        ("tmaze", "seed", ["override 'seed'", "key=value"]),
        ("tmaze", "seed=[", ["override 'seed=['"]),
        ("nowhere.yaml", "seed=1", ["nowhere.yaml"]),
    ],
)
def test_mistake_is_refused_by_name(name: str, override: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(name, [override])
    assert all(part in str(caught.value) for part in expected), str(caught.value)


def test_minibatch_without_room_for_a_chunk_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ppo.batch_size=100 .* one chunk of 128 steps"):
        load("tmaze", ["ppo.batch_size=100", "ppo.seq_len=128"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("env: {id: CartPole-v1}\nppo: {n_stps: 1}\n", "unknown key 'ppo.n_stps' in "),
        ("env: {id: CartPole-v1}\nlearning_rate: 1e-3\n", "did you mean 'ppo.learning_rate'?"),
        ("seed: 1\nseed: 2\n", "'seed' is given twice"),
        ("seed: 1\n", "names no environment"),
        ("- 1\n", "must be a mapping"),
        ("", "names no environment"),
    ],
)
def test_mistake_in_a_file_names_the_file(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="mine.yaml") as caught:
        load(str(path))
    assert expected in str(caught.value)


def test_plain_environment_id_takes_the_general_settings() -> None:
    config = load("CartPole-v1")
    assert config.memory.settings == {}, "the memory's own defaults are the recommended ones"
    assert (config.policy.critic_memory, config.ppo.gae_lambda) == ("separate", 0.9)
    assert load("CartPole-v1", ["memory.name=lstm"]).memory.settings == {}


ENDLESS = "&loop [*loop]"
ENDLESS_MAPPING = "env: &loop {id: CartPole-v1, kwargs: *loop}"
MANY = "\n".join(
    ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    + [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 9)]
)
MERGED = "\n".join(
    ["a0: &a0 {k: 1}"]
    + [f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}" for level in range(1, 12)]
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ENDLESS, "holds itself"),
        (ENDLESS_MAPPING, "holds itself"),
        (MANY, "more than 100,000 values once its aliases are written out"),
        (MERGED, "more than 100,000 values once its aliases are written out"),
        ("env: {id: CartPole-v1, kwargs: {a: " + "[" * 5_000 + "]" * 5_000 + "}}", "nested too deeply"),
        ("{" * 5_000, "nested too deeply|no YAML"),
    ],
    ids=["itself", "itself as a mapping", "aliases", "merged aliases", "deep", "deep and torn"],
)
def test_yaml_without_an_end_is_refused_at_once(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=expected):
        load(str(path))
    with pytest.raises(ConfigError):
        load("tmaze", [f"env.kwargs={text}"])


def test_aliases_may_be_used(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("base: tmaze\neval: {n_episodes: &few 7, interim_episodes: *few}\n", encoding="utf-8")
    config = load(str(path))
    assert config.eval.n_episodes == config.eval.interim_episodes == 7


ABSURD = [
    *("env.n_envs=1e9", "threads=40000", "threads=1e12", "env.worker_timeout=1e300", "eval.n_envs=1e12"),
    *("env.worker_start_timeout=1e12", "rank_timeout=1e12"),
    *("memory.hidden_size=10000000000", "memory.hidden_size=4000000", "memory.round_to=1000000000000"),
    *("memory.conv_kernel=1000000000000", f"memory.blocks={'m' * 2000}", "policy.net_arch=[1000000000, 1000000000]"),
    *(
        "policy.net_arch=[1000000000000]",
        "env.n_envs=5000 env.vec=subproc",
        "memory.name=lstm memory.num_layers=100000",
    ),
    *("memory.name=lstm memory.hidden_size=10000000", "memory.name=transformer memory.window=1000000000000"),
    *("memory.name=frames memory.num_frames=1000000000000", "memory.name=ssm memory.num_states=1000000000000"),
    "memory.name=transformer memory.num_layers=1000000000",
]


@pytest.mark.parametrize("overrides", ABSURD)
def test_size_that_no_machine_has_is_refused_in_a_sentence(overrides: str) -> None:
    with pytest.raises(ConfigError, match=overrides.split("=")[0].split(".")[-1] + "|" + "memory"):
        load("tmaze", overrides.split())
