"""Memory cores: xLSTM stacks and the baselines they are compared with."""

from functools import partial

from xlstm_rl.memory.attention import attention_block
from xlstm_rl.memory.baselines import RWKV, FrameStack, Memoryless, RNNState, StateSpace, TorchRNN, Transformer
from xlstm_rl.memory.config import XLSTMConfig
from xlstm_rl.memory.core import (
    MemoryBlock,
    MemoryCore,
    block_letters,
    make_memory,
    memory_names,
    register_block,
    register_memory,
)
from xlstm_rl.memory.linear_recurrent import rwkv_block, state_space_block
from xlstm_rl.memory.mlstm_block import MLSTMBlock
from xlstm_rl.memory.nxai_weights import load_nxai_weights
from xlstm_rl.memory.slstm_block import SLSTMBlock
from xlstm_rl.memory.state import leaf_names, leaves, map_leaves, pack, take, unpack, zeros_where
from xlstm_rl.memory.xlstm import XLSTM

__all__ = [
    "RWKV",
    "XLSTM",
    "FrameStack",
    "MemoryBlock",
    "MemoryCore",
    "Memoryless",
    "RNNState",
    "StateSpace",
    "TorchRNN",
    "Transformer",
    "XLSTMConfig",
    "block_letters",
    "leaf_names",
    "leaves",
    "load_nxai_weights",
    "make_memory",
    "map_leaves",
    "memory_names",
    "pack",
    "register_block",
    "register_memory",
    "take",
    "unpack",
    "zeros_where",
]

register_memory("xlstm", XLSTM)
register_memory("lstm", partial(TorchRNN, "lstm"))
register_memory("gru", partial(TorchRNN, "gru"))
register_memory("transformer", Transformer)
register_memory("ssm", StateSpace)
register_memory("rwkv", RWKV)
register_memory("frames", FrameStack)
register_memory("none", Memoryless)
register_block("m", MLSTMBlock)
register_block("s", SLSTMBlock)
register_block("a", attention_block)
register_block("d", state_space_block)
register_block("r", rwkv_block)
