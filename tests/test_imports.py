"""What commands and imports may load: torch takes more than a second, and Stable-Baselines3 more again."""

import subprocess
import sys

import pytest

SLOW = {"torch", "stable_baselines3", "sb3_contrib", "matplotlib", "pandas", "tensorboard"}


def modules_after(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded after it ran some code."""
    lines = [
        "import contextlib, io, sys",
        "with contextlib.redirect_stdout(io.StringIO()):",
        *(f"    {line}" for line in code.splitlines()),
        "print(*sys.modules)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("command", ["list", "show tmaze", "show CartPole-v1"])
def test_commands_that_only_tell_load_neither_torch_nor_the_agents(command: str) -> None:
    loaded = modules_after(f"from xlstm_rl.cli import main\nassert main({command.split()!r}) == 0")
    assert "xlstm_rl.configs.schema" in loaded
    assert not loaded & SLOW


def test_the_package_alone_loads_neither_torch_nor_the_agents() -> None:
    loaded = modules_after("import xlstm_rl\nassert 'xlstm_rl/TMaze-v0' in __import__('gymnasium').registry")
    assert "xlstm_rl.envs" in loaded
    assert not loaded & SLOW


def test_agents_load_neither_the_compiler_of_torch_nor_what_only_a_gpu_needs() -> None:
    loaded = modules_after("from xlstm_rl import RecurrentPPO")
    assert "xlstm_rl.agents.ppo" in loaded
    assert not loaded & {"torch._dynamo", "torch._inductor", "triton", "xlstm_rl.kernels.triton_operators"}
