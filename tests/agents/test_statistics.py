"""What is logged about the memory and about time."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from stable_baselines3.common.logger import configure

from tests.agents.small_agents import agent
from xlstm_rl.agents.ppo import memory_statistics

XLSTM = {"memory": "xlstm", "memory_kwargs": {"hidden_size": 8, "num_heads": 2, "blocks": "ms"}}

# a linear schedule ends with the single rollout that these are trained on
pytestmark = pytest.mark.filterwarnings("ignore:the learning rate was 0")


def statistics_of(model: Any) -> dict[str, float]:
    buffer = model.rollout_buffer
    chunks = buffer.chunks(torch.from_numpy(buffer.advantages.copy()))
    return memory_statistics(model.policy, buffer, chunks, model._last_state)


@pytest.mark.parametrize("critic_memory", ["shared", "separate"])
def test_every_block_of_the_actor_is_logged(critic_memory: str, tmp_path: Path) -> None:
    model = agent(policy_kwargs={**XLSTM, "critic_memory": critic_memory})
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(48)
    model.logger.close()
    logged = {name for name in model.logger.name_to_value if name.startswith("memory/")}
    blocks = {f"memory/block{index}_{name}" for index in range(2) for name in ("forget", "input", "horizon")}
    assert logged == blocks | {"memory/state_rms", "memory/stale_state_error"}


def test_nothing_is_computed_for_a_log_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xlstm_rl.agents.ppo.memory_statistics", None)
    assert not agent(steps=48).logger.output_formats


def test_times_of_a_rollout_are_logged(tmp_path: Path) -> None:
    model = agent()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(48)
    model.logger.close()
    with (tmp_path / "progress.csv").open() as file:
        *_, last = csv.DictReader(file)
    assert all(float(last[f"time/{name}_seconds"]) > 0 for name in ("act", "env", "train"))


@pytest.mark.parametrize("memory", ["lstm", "xlstm"])
@pytest.mark.parametrize("settings", [{"seq_len": 4}, {"seq_len": 6}, {"seq_len": 8}])
def test_states_are_stale_as_far_as_weights_moved(memory: str, settings: dict[str, Any]) -> None:
    kwargs = XLSTM if memory == "xlstm" else {"memory": "lstm", "memory_kwargs": {"hidden_size": 8}}
    model = agent(steps=24, policy_kwargs=kwargs, learning_rate=0.0, **settings)
    assert statistics_of(model)["memory/stale_state_error"] < 1e-5
    with torch.no_grad():
        for weight in model.policy.memory_actor.parameters():
            weight.add_(0.1)
    assert statistics_of(model)["memory/stale_state_error"] > 1e-3


def test_forget_gate_is_the_one_of_the_weights() -> None:
    model = agent(steps=24, policy_kwargs=XLSTM)
    memory: Any = model.policy.memory_actor
    gates = memory.blocks[0].gates
    with torch.no_grad():
        gates.weight.zero_()
        gates.bias[:2], gates.bias[2:] = -1.0, torch.tensor(0.9).logit()
    found = statistics_of(model)
    assert found["memory/block0_forget"] == pytest.approx(0.9, rel=1e-5)
    assert found["memory/block0_input"] == pytest.approx(-1.0)
    assert found["memory/block0_horizon"] == pytest.approx(-1 / torch.tensor(0.9).log().item(), rel=1e-4)


def test_memory_without_state_has_no_statistics() -> None:
    model = agent(steps=24, policy_kwargs={"memory": "none", "memory_kwargs": {"hidden_size": 4}})
    assert statistics_of(model) == {}
