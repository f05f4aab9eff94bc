"""Policies as C files compute what the policies compute, need no memory of their own, and say what they cannot do."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from tests.agents.small_agents import agent
from tests.agents.spaces_for_tests import OBSERVATIONS
from tests.export.test_onnx import CORES, HEADS, SMALL_XLSTM, louder, model_of
from xlstm_rl.agents import MemoryInputs, RecurrentPPO
from xlstm_rl.export import ExportError, check_c, compiler, export_c, time_c

needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C compiler")
IN_C = ("m", "s", "ms", "sm", "lstm", "gru", "ssm", "none")
NOT_IN_C = sorted({*CORES} - {*IN_C})
STACKS: dict[str, dict[str, Any]] = {
    **CORES,
    "sm": {"memory_kwargs": {**SMALL_XLSTM, "blocks": "sm", "slstm_conv_kernel": 4, "post_norm": False}},
}


def stack_of(core: str, head: str, observation: str = "vector", **policy: Any) -> RecurrentPPO:
    return model_of("ms" if core == "sm" else core, head, observation, **STACKS[core], **policy)


def assert_exported(model: RecurrentPPO, path: Path) -> None:
    export_c(model, path)
    check = check_c(model, path)
    assert check.largest_error <= 1e-5
    assert check.same_actions in (None, 1.0)


@needs_compiler
@pytest.mark.parametrize(("core", "head"), [("m", "discrete"), ("s", "box"), ("ms", "masked multi-discrete")])
def test_c_computes_what_torch_computes(core: str, head: str, tmp_path: Path) -> None:
    assert_exported(stack_of(core, head), tmp_path / "policy.c")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("core", IN_C)
@pytest.mark.parametrize("head", HEADS)
def test_c_of_every_memory_and_head(core: str, head: str, tmp_path: Path) -> None:
    assert_exported(stack_of(core, head), tmp_path / "policy.c")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("critic_memory", ["shared", "separate", "none"])
@pytest.mark.parametrize("observation", [name for name in OBSERVATIONS if "image" not in name])
def test_c_of_every_observation_and_critic(observation: str, critic_memory: str, tmp_path: Path) -> None:
    assert_exported(stack_of("ms", "discrete", observation, critic_memory=critic_memory), tmp_path / "policy.c")


@needs_compiler
@pytest.mark.parametrize(
    "settings",
    [
        {"ffn_factor": 0.0},
        {"ffn_factor": 2.0},
        {"conv_kernel": 1},
        {"input_activation": "sigmoid"},
        {"forget_activation": "exp"},
        {"gate_soft_cap": 5.0},
        {"bias": True},
        {"input_projection": False, "hidden_size": 3, "num_heads": 1},
    ],
    ids=str,
)
def test_c_of_every_part_of_a_block(settings: dict[str, Any], tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"memory_kwargs": {**SMALL_XLSTM, "blocks": "ms", **settings}}
    assert_exported(model_of("ms", "discrete", **kwargs), tmp_path / "policy.c")


@pytest.fixture(scope="module")
def normalized() -> RecurrentPPO:
    """An agent with normalised observations and Box actions that is told its last action and reward."""
    env = make_vec_env("Pendulum-v1", n_envs=2, seed=0, wrapper_class=MemoryInputs)
    normalizer = VecNormalize(env, norm_obs_keys=["observation", "previous_reward"])
    model = agent("dict", env=normalizer, steps=64, policy_kwargs=CORES["ms"])
    louder(model)
    return model


@needs_compiler
def test_normalisation_and_memory_inputs_are_in_the_file(normalized: RecurrentPPO, tmp_path: Path) -> None:
    assert_exported(normalized, tmp_path / "policy.c")


@needs_compiler
def test_int8_is_smaller_and_near(normalized: RecurrentPPO, tmp_path: Path) -> None:
    export_c(normalized, tmp_path / "exact.c")
    export_c(normalized, tmp_path / "small.c", int8=True)
    exact, small = (_printed_bytes(time_c(tmp_path / name)) for name in ("exact.c", "small.c"))
    assert small < 0.6 * exact
    assert 1e-5 < check_c(normalized, tmp_path / "small.c").largest_error < 0.2


def _printed_bytes(line: str) -> int:
    found = re.fullmatch(r"[\d.]+ us a step, (\d+) bytes of weights, \d+ bytes of state and scratch", line)
    assert found is not None, line
    return int(found[1])


@needs_compiler
def test_file_of_a_program_with_two_policies(normalized: RecurrentPPO, tmp_path: Path) -> None:
    """Each in a file of its own, included for its declarations where it is called."""
    export_c(normalized, tmp_path / "first.c")
    export_c(normalized, tmp_path / "second.c", int8=True)
    (tmp_path / "main.c").write_text(
        "#define FIRST_DECLARATIONS_ONLY\n#define SECOND_DECLARATIONS_ONLY\n"
        '#include "first.c"\n#include "second.c"\n'
        "static first_state a; static second_state b; static first_input x; static second_input y;\n"
        "int main(void) { first_output u; second_output v; first_step(&a, &x, 1, &u); second_step(&b, &y, 1, &v);\n"
        "    return u.action[0] - v.action[0] < 1.0f ? 0 : 1; }\n"
    )
    command = [str(compiler()), "-std=c99", "-Wall", "-Wextra", "-Werror", "main.c", "first.c", "second.c", "-lm"]
    subprocess.run([*command, "-o", "both"], cwd=tmp_path, check=True)
    subprocess.run(["./both"], cwd=tmp_path, check=True)


@needs_compiler
def test_compiled_file_allocates_nothing(normalized: RecurrentPPO, tmp_path: Path) -> None:
    export_c(normalized, tmp_path / "policy.c")
    subprocess.run([str(compiler()), "-O3", "-c", "policy.c"], cwd=tmp_path, check=True)
    names = subprocess.run(["nm", "-u", "policy.o"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    called = {line.split()[-1] for line in names.splitlines()}
    assert called
    assert not called & {"malloc", "calloc", "realloc", "alloca", "free"}


@needs_compiler
def test_check_notices_other_weights(tmp_path: Path) -> None:
    model = model_of("none", "discrete")
    export_c(model, tmp_path / "policy.c")
    with torch.no_grad():
        model.policy.action_net.bias.add_(torch.tensor([100.0, 0.0, -100.0]))  # type: ignore[operator]
    with pytest.raises(ExportError, match="action of the exported policy is off by .* in step"):
        check_c(model, tmp_path / "policy.c")


@pytest.mark.parametrize("core", NOT_IN_C)
def test_memory_without_a_form_in_c_is_refused(core: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"has no form in C here: export it as ONNX, to a file that ends in \.onnx"):
        export_c(model_of(core, "discrete"), tmp_path / "policy.c")
    assert not os.listdir(tmp_path)


def test_other_precision_is_refused(tmp_path: Path) -> None:
    model = model_of("m", "discrete")
    model.policy.double()
    with pytest.raises(ExportError, match="compute in float32"):
        export_c(model, tmp_path / "policy.c")


def test_name_that_c_cannot_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"2\.c cannot begin names of C"):
        export_c(model_of("none", "discrete"), tmp_path / "2.c")


def test_machine_without_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("none", "discrete")
    export_c(model, tmp_path / "policy.c")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ExportError, match="install gcc or clang, or name your compiler in CC"):
        check_c(model, tmp_path / "policy.c")
