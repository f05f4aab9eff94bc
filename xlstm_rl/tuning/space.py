"""What is searched: the training, the same for every memory, and the settings of each memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

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

# These come first, so that every memory gets the same values of them in its first random trials.
TRAINING: Space = {
    "ppo.learning_rate": Log(1e-4, 4e-3),
    "ppo.lr_schedule": OneOf(("constant", "linear")),
    "ppo.gamma": OneOf((0.0, 0.9, 0.99, 0.997, 1.0)),
    "ppo.mix_advantages": OneOf((True, False)),
    "ppo.gae_lambda": OneOf((0.5, 0.8, 0.9, 0.95, 1.0)),
    "ppo.n_epochs": OneOf((2, 4, 8)),
    "ppo.ent_coef": Log(1e-3, 1e-1),
    "policy.critic_memory": OneOf(("shared", "separate", "none")),
}
# The width is no part of a space: it follows from the number of parameters, which is that of the configuration.
SPACES: dict[str, Space] = {
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
    "lstm": {"memory.num_layers": OneOf((1, 2)), "memory.forget_bias": OneOf((0.0, 1.0, 3.0))},
    "gru": {"memory.num_layers": OneOf((1, 2)), "memory.forget_bias": OneOf((0.0, 1.0, 3.0))},
    "transformer": {"memory.num_layers": OneOf((1, 2)), "memory.window": OneOf((16, 32, 64, 128))},
    "ssm": {
        "memory.num_layers": OneOf((1, 2)),
        "memory.num_states": OneOf((4, 8, 16)),
        "memory.conv_kernel": OneOf((1, 4, 32)),
    },
    "rwkv": {"memory.num_layers": OneOf((1, 2)), "memory.ffn_factor": OneOf((1.0, 2.0, 4.0))},
}
# Tried before the search, each for one kind of task; by name, what differs from the settings that are tuned. Memories
# other than "xlstm" take what is not of the memory.
PORTFOLIO: dict[str, Mapping[str, Any]] = {
    "as it is": {},
    "no consequences": {"ppo.gamma": 0.0, "ppo.mix_advantages": False},
    "tracking": {
        "memory.blocks": "ss",
        "memory.slstm_num_heads": 1,
        "memory.recurrent_std": 1.0,
        "memory.slstm_forget_bias": [1.0, 1.0],
        "memory.conv_kernel": 0,
        "memory.ffn_factor": 0.0,
    },
    "delayed reward": {"ppo.gamma": 1.0, "ppo.mix_advantages": False, "ppo.gae_lambda": 1.0},
    "looking up": {"memory.blocks": "m"},
    "computing": {"ppo.n_epochs": 8, "memory.ffn_factor": 4 / 3},
}


def study_space(memory: str, settings: Mapping[str, Any]) -> Space:
    """The search for a memory, made wide enough to hold the settings that are tuned.

    Args:
        memory: its name; of one that is not in `SPACES` the training alone is searched.
        settings: that are tuned, by dotted key.
    """
    space: Space = {}
    for key, values in {**TRAINING, **SPACES.get(memory, {})}.items():
        if key not in settings:
            continue
        own = settings[key]
        if isinstance(values, Log):
            given = [float(own)] if own else []
            space[key] = Log(min([values.low, *given]), max([values.high, *given]))
        else:
            space[key] = values if own in values.values else OneOf((*values.values, own), values.block)
    return space


def known_values(space: Space, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key as Optuna takes them."""
    return {
        key: max(float(settings[key]), values.low) if isinstance(values, Log) else json.dumps(settings[key])
        for key, values in space.items()
    }


def suggest(trial: Trial, space: Space) -> dict[str, Any]:
    """The settings of a trial, by dotted key."""
    chosen: dict[str, Any] = {}
    for key, values in space.items():
        if isinstance(values, Log):
            # three digits, so that the trial can be repeated from what is printed
            chosen[key] = float(f"{trial.suggest_float(key, values.low, values.high, log=True):.3g}")
        elif values.block in chosen.get("memory.blocks", ""):
            # as text, because lists are no choices for Optuna
            chosen[key] = json.loads(trial.suggest_categorical(key, [json.dumps(value) for value in values.values]))
    return chosen


def spell(value: Any) -> str:
    """A value as YAML, words without quotes where they stay words."""
    return value if isinstance(value, str) and yaml.safe_load(value) == value else json.dumps(value)
