"""Stacks are spelt by letters, and anybody can add one."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import assert_close
from xlstm_rl.kernels import causal_conv
from xlstm_rl.memory import MemoryBlock, block_letters, make_memory, register_block
from xlstm_rl.memory.config import XLSTMConfig
from xlstm_rl.memory.laws import check_memory_laws
from xlstm_rl.memory.mlstm_block import MLSTMBlock


class Window(NamedTuple):
    past: Tensor  # [B, 2, width]


class Smoothing(MemoryBlock):
    """A residual convolution over three steps."""

    def __init__(self, config: XLSTMConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.weight = nn.Parameter(torch.randn(config.hidden_size, 3))

    def initial_state(self, batch_size: int) -> Window:
        return Window(self.weight.new_zeros(batch_size, 2, len(self.weight)))

    def forward(self, x: Tensor, state: Window, reset: Tensor | None = None) -> tuple[Tensor, Window]:
        y, past = causal_conv(x, self.weight, None, state.past, reset)
        return x + y, Window(past)


register_block("x", Smoothing)
STACKS = ("a", "d", "aa", "dd", "x", "mas", "sad", "dam", "mxs", "xad")


@pytest.mark.parametrize("blocks", STACKS)
@pytest.mark.parametrize("steps", (2, 7, 40))
def test_stack_obeys_the_laws(blocks: str, steps: int) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"hidden_size": 16, "num_heads": 2, "attention_window": 5, "num_states": 3}
    core = make_memory("xlstm", 4, blocks=blocks, recurrent_std=1.0, **settings).double()
    check_memory_laws(core, steps=steps)


def test_a_letter_makes_the_block_that_was_registered_for_it() -> None:
    assert {"m", "s", "a", "d", "x"} <= set(block_letters())
    core: Any = make_memory("xlstm", 4, hidden_size=16, blocks="xmx")
    assert [type(block) for block in core.blocks] == [Smoothing, MLSTMBlock, Smoothing]
    assert [block.index for block in core.blocks if isinstance(block, Smoothing)] == [0, 2]


@pytest.mark.parametrize("letter", ("", "xy", "X", "1", "é"))
def test_what_is_no_letter_is_refused(letter: str) -> None:
    with pytest.raises(ValueError, match="must be one small letter, from 'a' to 'z'"):
        register_block(letter, Smoothing)


def test_letter_that_is_taken_is_refused() -> None:
    with pytest.raises(ValueError, match="letter 'm' is already registered; choose another one than .*'a'"):
        register_block("m", Smoothing)


def test_what_cannot_be_called_is_no_block() -> None:
    with pytest.raises(TypeError, match="factory=3 must be callable: a MemoryBlock subclass"):
        register_block("y", 3)  # type: ignore[arg-type]


def test_unknown_letter_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="blocks='mq' must be a word of .*'m', 's', 'a', 'd'.*register_block"):
        make_memory("xlstm", 4, blocks="mq")


def test_transformer_takes_the_weights_it_was_saved_with_before_it_was_a_stack() -> None:
    torch.manual_seed(0)
    saved, core = (make_memory("transformer", 4, hidden_size=8, num_layers=2, window=3) for _ in range(2))
    old = {name.replace("blocks.", "layers."): value for name, value in saved.state_dict().items()}
    assert old.keys() != saved.state_dict().keys()
    nn.ModuleDict({"memory": core}).load_state_dict({f"memory.{name}": value for name, value in old.items()})
    x = torch.randn(2, 5, 4)
    assert_close(core(x, core.initial_state(2))[0], saved(x, saved.initial_state(2))[0])


def test_transformer_state_space_and_rwkv_memories_are_stacks_of_the_same_blocks() -> None:
    for memory, letter in (("transformer", "a"), ("ssm", "d"), ("rwkv", "r")):
        named: Any = make_memory(memory, 4, hidden_size=16)
        spelt: Any = make_memory("xlstm", 4, hidden_size=16, blocks=letter, conv_kernel=4)
        spelt.blocks[0].load_state_dict(named.blocks[0].state_dict())
        x = torch.randn(2, 5, 16)
        assert_close(*(core.blocks[0](x, core.blocks[0].initial_state(2))[0] for core in (named, spelt)))
