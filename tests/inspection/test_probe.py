"""What is in a memory, a probe finds there, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor

from xlstm_rl.agents import RecurrentPPO
from xlstm_rl.inspection import Probe, draw_probes, probe_memory
from xlstm_rl.inspection.probe import OBSERVATION, parts_of, read
from xlstm_rl.memory import MemoryCore, make_memory, register_memory


class Kept(NamedTuple):
    kept: Tensor  # [B, input_size]


class Latch(MemoryCore):
    """Keeps the first input of the episode; with `erased`, nothing."""

    def __init__(self, input_size: int, hidden_size: int = 4, *, erased: bool = False) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, input_size
        self.erased = erased
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def initial_state(self, batch_size: int) -> Kept:
        return Kept(self.weight.new_zeros(batch_size, self.input_size))

    def forward(self, x: Tensor, state: Kept, reset: Tensor | None = None) -> tuple[Tensor, Kept]:
        outputs = []
        for t in range(x.shape[1]):
            first = torch.zeros_like(state.kept[:, 0], dtype=torch.bool) if reset is None else reset[:, t]
            kept = torch.where(first[:, None], x[:, t], state.kept)
            state = Kept(kept * 0.0 if self.erased else kept)
            outputs.append(state.kept + 0.0 * self.weight)
        return torch.stack(outputs, dim=1), state


register_memory("latch-for-probes", Latch)


def probe(*, erased: bool = False, episodes: int = 320) -> Probe:
    env = make_vec_env("xlstm_rl/RepeatFirst-v0", 8, seed=0, env_kwargs={"length": 6})
    kwargs = {"memory": "latch-for-probes", "memory_kwargs": {"erased": erased}}
    model = RecurrentPPO("MlpXLSTMPolicy", env, n_steps=8, batch_size=64, policy_kwargs=kwargs, seed=0)
    return probe_memory(model, env, episodes=episodes, max_steps=50)


def test_what_the_memory_holds_is_read_at_every_step() -> None:
    found = probe()
    assert found.variable == "the first symbol" and found.steps.tolist() == list(range(6))
    assert found.episodes == 160 and set(found.accuracy) == {"memory", OBSERVATION}
    np.testing.assert_array_equal(found.accuracy["memory"], 1.0)
    assert found.accuracy[OBSERVATION][0] == 1.0
    spread = 4 * np.sqrt(0.25 * 0.75 / 160)
    np.testing.assert_allclose(found.accuracy[OBSERVATION][1:], 0.25, atol=spread)
    np.testing.assert_allclose(found.chance, 0.25, atol=spread)


def test_nothing_is_read_from_an_erased_memory() -> None:
    found = probe(erased=True)
    np.testing.assert_allclose(found.accuracy["memory"], found.chance, atol=1e-12)


def test_reading_is_of_episodes_that_did_not_train() -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(3, size=600)
    train = np.arange(600) % 2 == 0
    noise = generator.normal(size=(600, 60))
    accuracy = (read(noise, values, train) == values[~train]).mean()
    assert accuracy == pytest.approx(1 / 3, abs=4 * np.sqrt(2 / 9 / 300))
    told = noise.copy()
    told[:, :3] += 8.0 * np.eye(3)[values]
    assert (read(told, values, train) == values[~train]).mean() > 0.95


def test_features_that_never_change_say_the_usual_value() -> None:
    values = np.array([1, 1, 0, 1, 0, 0])
    train = np.array([True, True, True, False, False, False])
    assert read(np.ones((6, 2)), values, train).tolist() == [1, 1, 1]


def test_blocks_and_the_windows_of_their_convolutions_are_parts_of_their_own() -> None:
    core = make_memory("xlstm", 4, hidden_size=8, blocks="sm", num_heads=2, conv_kernel=4)
    parts = parts_of(core.initial_state(3))
    assert [name for name in parts if name.endswith("window")] and {"block 0", "block 1"} <= set(parts)
    assert sum(part.shape[1] for part in parts.values()) == core.state_size
    assert set(parts_of(make_memory("lstm", 4, hidden_size=8).initial_state(3))) == {"memory"}
    assert parts_of(make_memory("none", 4, hidden_size=8).initial_state(3)) == {}


def test_a_task_that_names_no_hidden_variable_is_refused() -> None:
    env = make_vec_env("CartPole-v1", 2)
    model = RecurrentPPO("MlpXLSTMPolicy", env, n_steps=8, batch_size=16)
    with pytest.raises(ValueError, match=r"names no hidden variable: .*hidden_variable\(\)"):
        probe_memory(model, env, episodes=50, max_steps=5)


def test_too_few_episodes_are_refused() -> None:
    with pytest.raises(ValueError, match="39 episodes are too few for a probe; take 40 or more"):
        probe(episodes=39)


def test_picture_has_a_panel_for_each_run(tmp_path: Path) -> None:
    found = probe(episodes=48)
    draw_probes([("one", found)], tmp_path / "one.png")
    draw_probes([("one", found), ("two", found)], tmp_path / "two.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert two.width > 1.5 * one.width
