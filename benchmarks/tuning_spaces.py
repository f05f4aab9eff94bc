"""What `benchmarks.tune` searches: settings of PPO, the same for every memory, and those of each memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna import Trial


@dataclass(frozen=True)
class OneOf:
    """One of several values, as YAML spells them; with `block`, only for stacks that hold such a block."""

    values: tuple[Any, ...]
    block: str = ""


@dataclass(frozen=True)
class Log:
    """A number between two, its logarithm spread evenly."""

    low: float
    high: float


Space = dict[str, OneOf | Log]

# These come first, so that the random trials at the start take the same values of them for every memory.
SHARED: Space = {
    "ppo.learning_rate": Log(1e-4, 3e-3),
    "ppo.gamma": OneOf((0.0, 0.9, 0.97, 0.99, 0.997)),
    "ppo.gae_lambda": OneOf((0.5, 0.8, 0.95, 1.0)),
    "ppo.n_epochs": OneOf((2, 4, 8)),
    "ppo.ent_coef": Log(1e-3, 1e-1),
    "policy.critic_memory": OneOf(("shared", "separate", "none")),
}
# The width is no part of a space: it follows from the number of parameters.
MEMORIES: dict[str, Space] = {
    "xlstm": {
        "memory.blocks": OneOf(("m", "s", "sm", "ms", "ss")),
        "memory.slstm_num_heads": OneOf((1, 4), block="s"),
        "memory.recurrent_std": OneOf((0.0, 0.5, 1.0, 2.0, 4.0), block="s"),
        "memory.slstm_forget_bias": OneOf((None, [1.0, 1.0], [3.0, 6.0]), block="s"),
        "memory.conv_kernel": OneOf((0, 4, 32)),
        "memory.slstm_conv_kernel": OneOf((None, 0), block="s"),
        "memory.ffn_factor": OneOf((0.0, 4 / 3), block="s"),
        "memory.init": OneOf(("recall", "reference")),
    },
    "lstm": {"memory.num_layers": OneOf((1, 2))},
    "gru": {"memory.num_layers": OneOf((1, 2))},
    "transformer": {"memory.num_layers": OneOf((1, 2)), "memory.window": OneOf((16, 32, 64, 128))},
    "ssm": {
        "memory.num_layers": OneOf((1, 2)),
        "memory.num_states": OneOf((4, 8, 16)),
        "memory.conv_kernel": OneOf((1, 4, 32)),
    },
}


def suggest(trial: Trial, memory: str) -> dict[str, Any]:
    """The settings of a trial, by dotted key."""
    chosen: dict[str, Any] = {}
    for key, values in {**SHARED, **MEMORIES[memory]}.items():
        if isinstance(values, Log):
            # three digits, so that the trial can be repeated from what is printed
            chosen[key] = float(f"{trial.suggest_float(key, values.low, values.high, log=True):.3g}")
        elif values.block in chosen.get("memory.blocks", ""):
            # as text, because lists are no choices for optuna
            chosen[key] = json.loads(trial.suggest_categorical(key, [json.dumps(value) for value in values.values]))
    return chosen
