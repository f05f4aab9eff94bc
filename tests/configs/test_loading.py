"""The loader of configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

from xlstm_rl.configs import ConfigError, load, load_file, preset_names
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


def test_list_becomes_a_tuple() -> None:
    assert load("tmaze", ["policy.net_arch=[32, 16]"]).policy.net_arch == (32, 16)


def test_null_unsets() -> None:
    assert load("tmaze", ["eval.every_steps=null"]).eval.every_steps is None


def test_environment_arguments_are_free() -> None:
    assert load("tmaze", ["env.kwargs.corridor_length=30"]).env.kwargs == {"corridor_length": 30}


def test_another_memory_drops_the_settings_of_the_first_but_its_width() -> None:
    config = load("tmaze", ["memory.hidden_size=32", "memory.num_heads=2", "memory.name=lstm", "memory.num_layers=2"])
    assert config.memory.settings == {"hidden_size": 32, "num_layers": 2}


@pytest.mark.parametrize(
    ("name", "override", "expected"),
    [
        ("tmze", "seed=1", ["'tmze'", "did you mean 'tmaze'?"]),
        ("TMaze-v0", "seed=1", ["'TMaze-v0'", "did you mean 'xlstm_rl/TMaze-v0'?"]),
        ("tmaze", "sed=1", ["'sed'", "override 'sed=1'", "did you mean 'seed'?"]),
        ("tmaze", "ppo.gama=1", ["'ppo.gama'", "did you mean 'gamma'?"]),
        ("tmaze", "memory.hidden=3", ["memory.hidden", "did you mean 'hidden_size'?"]),
        ("tmaze", "memory.name=lstn", ["memory.name='lstn'", "did you mean 'lstm'?"]),
        ("tmaze", "memory.hidden_size=66", ["hidden_size=66", "multiple of num_heads=4"]),
        ("tmaze", "memory.hidden_size=wide", ["wide"]),
        ("tmaze", "ppo.gamma=1.5", ["ppo.gamma=1.5", "between 0 and 1"]),
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
        ("tmaze", "env=3", ["env=3", "mapping"]),
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
