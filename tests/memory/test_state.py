"""Trees of states."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from xlstm_rl.memory import make_memory, map_leaves, pack, take, unpack, zeros_where


class Inner(NamedTuple):
    a: Tensor
    b: Tensor


class Outer(NamedTuple):
    inner: Inner
    c: Tensor


def state() -> Outer:
    return Outer(Inner(torch.arange(6.0).view(3, 2), torch.ones(3, 2, 2)), torch.full((3,), 7.0))


def test_pack_then_unpack_is_the_identity() -> None:
    rebuilt = unpack(pack(state()), like=state())
    assert type(rebuilt) is Outer
    assert type(rebuilt.inner) is Inner
    assert torch.equal(pack(rebuilt), pack(state()))


def test_unpack_takes_structure_from_a_state_of_any_batch_size() -> None:
    assert unpack(pack(state()), like=take(state(), slice(0, 1))).c.shape == (3,)
    assert unpack(pack(state()), like=take(state(), slice(0, 0))).inner.b.shape == (3, 2, 2)


def test_unpack_refuses_the_state_of_another_memory() -> None:
    with pytest.raises(ValueError, match=r"must be \[B, 7\], got \[3, 8\]"):
        unpack(torch.zeros(3, 8), like=state())


def test_zeros_where_empties_rows_even_of_infinities() -> None:
    poisoned = map_leaves(lambda leaf: torch.full_like(leaf, float("nan")), state())
    emptied = zeros_where(torch.tensor([True, False, True]), poisoned)
    flat = pack(emptied)
    assert not flat[[0, 2]].count_nonzero()
    assert flat[1].isnan().all()


def test_take_indexes_every_leaf() -> None:
    rows = take(state(), torch.tensor([2, 0]))
    assert rows.inner.a.tolist() == [[4.0, 5.0], [0.0, 1.0]]


def test_state_size_counts_the_numbers_of_one_row() -> None:
    core = make_memory("xlstm", 3, hidden_size=16, num_heads=2, blocks="m", conv_kernel=4)
    # cell 2 x 16 x 16, normaliser 2 x 16, stabiliser 2, conv window 3 x 32
    assert core.state_size == 512 + 32 + 2 + 96
