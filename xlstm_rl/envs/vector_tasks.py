"""Batches of the stream tasks by name, as `gymnasium.make_vec` looks them up."""

from functools import partial

from xlstm_rl.envs.copy_items import Copy
from xlstm_rl.envs.cycle import Cycle
from xlstm_rl.envs.key_door import KeyDoor
from xlstm_rl.envs.key_value_recall import KeyValueRecall
from xlstm_rl.envs.nearest_so_far import NearestSoFar
from xlstm_rl.envs.noisy_evidence import NoisyEvidence
from xlstm_rl.envs.overwrite import Overwrite
from xlstm_rl.envs.parity import Parity
from xlstm_rl.envs.repeat_first import RepeatFirst, cue_recall
from xlstm_rl.envs.repeat_previous import RepeatPrevious
from xlstm_rl.envs.shell_game import ShellGame
from xlstm_rl.envs.symbol_stream_vector import SymbolStreamVectorEnv

copy_vector = partial(SymbolStreamVectorEnv, Copy)
cue_recall_vector = partial(SymbolStreamVectorEnv, cue_recall)
cycle_vector = partial(SymbolStreamVectorEnv, Cycle)
key_door_vector = partial(SymbolStreamVectorEnv, KeyDoor)
key_value_recall_vector = partial(SymbolStreamVectorEnv, KeyValueRecall)
nearest_so_far_vector = partial(SymbolStreamVectorEnv, NearestSoFar)
noisy_evidence_vector = partial(SymbolStreamVectorEnv, NoisyEvidence)
overwrite_vector = partial(SymbolStreamVectorEnv, Overwrite)
parity_vector = partial(SymbolStreamVectorEnv, Parity)
repeat_first_vector = partial(SymbolStreamVectorEnv, RepeatFirst)
repeat_previous_vector = partial(SymbolStreamVectorEnv, RepeatPrevious)
shell_game_vector = partial(SymbolStreamVectorEnv, ShellGame)
