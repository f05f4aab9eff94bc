"""Typed configuration of a training run, its presets and the one loader."""

from xlstm_rl.configs.loading import dump, general_settings, left_to_defaults, load, load_file, preset_names
from xlstm_rl.configs.schema import (
    CheckpointConfig,
    EnvConfig,
    EvalConfig,
    MemoryConfig,
    PolicyConfig,
    PPOConfig,
    TrainConfig,
)
from xlstm_rl.configs.validation import ConfigError

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "EnvConfig",
    "EvalConfig",
    "MemoryConfig",
    "PPOConfig",
    "PolicyConfig",
    "TrainConfig",
    "dump",
    "general_settings",
    "left_to_defaults",
    "load",
    "load_file",
    "preset_names",
]
