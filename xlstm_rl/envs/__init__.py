"""Partially observable tasks that need memory, registered with gymnasium as `xlstm_rl/<Name>-v0`."""

from xlstm_rl.envs.bandit import Bandit
from xlstm_rl.envs.battleship import Battleship
from xlstm_rl.envs.color_cubes import ColorCubes
from xlstm_rl.envs.copy_items import Copy
from xlstm_rl.envs.cycle import Cycle
from xlstm_rl.envs.endless_t_maze import EndlessTMaze
from xlstm_rl.envs.hide_velocity import HidePosition, HideVelocity
from xlstm_rl.envs.key_door import KeyDoor
from xlstm_rl.envs.key_value_recall import KeyValueRecall
from xlstm_rl.envs.nearest_so_far import NearestSoFar
from xlstm_rl.envs.noisy_evidence import NoisyEvidence
from xlstm_rl.envs.overwrite import Overwrite
from xlstm_rl.envs.pairs import Pairs
from xlstm_rl.envs.parity import Parity
from xlstm_rl.envs.random_draws import Chance
from xlstm_rl.envs.repeat_first import RepeatFirst, cue_recall
from xlstm_rl.envs.repeat_previous import RepeatPrevious
from xlstm_rl.envs.resumable import Resumable
from xlstm_rl.envs.rock_sample import RockSample
from xlstm_rl.envs.shell_game import ShellGame
from xlstm_rl.envs.suites import register_suites, suite_ids, suite_versions
from xlstm_rl.envs.symbol_stream import Stream, SymbolStreamEnv
from xlstm_rl.envs.t_maze import TMaze
from xlstm_rl.envs.task import (
    ABILITIES,
    TaskFacts,
    TaskPurpose,
    longer,
    register_envs,
    task,
    task_facts,
    task_purpose,
)
from xlstm_rl.envs.wrappers import DelayAction, DropObservation, NoisyObservation, wrapped, wrapper_class

__all__ = [
    "ABILITIES",
    "Bandit",
    "Battleship",
    "Chance",
    "ColorCubes",
    "Copy",
    "Cycle",
    "DelayAction",
    "DropObservation",
    "EndlessTMaze",
    "HidePosition",
    "HideVelocity",
    "KeyDoor",
    "KeyValueRecall",
    "NearestSoFar",
    "NoisyEvidence",
    "NoisyObservation",
    "Overwrite",
    "Pairs",
    "Parity",
    "RepeatFirst",
    "RepeatPrevious",
    "Resumable",
    "RockSample",
    "ShellGame",
    "Stream",
    "SymbolStreamEnv",
    "TMaze",
    "TaskFacts",
    "TaskPurpose",
    "cue_recall",
    "longer",
    "register_envs",
    "register_suites",
    "suite_ids",
    "suite_versions",
    "task",
    "task_facts",
    "task_purpose",
    "wrapped",
    "wrapper_class",
]

register_envs()
register_suites()
