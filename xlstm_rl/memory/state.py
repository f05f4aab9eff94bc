"""Memory states: trees of NamedTuples whose leaves are tensors that start with the batch dimension.

This is the only generic code that looks inside a state. Zeros are the empty state of every memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from xlstm_rl.kernels.spoilt import known_finite, spoil, spoilt_from
from xlstm_rl.kernels.states import zero_where

Tree = TypeVar("Tree")


def map_leaves(function: Callable[..., Tensor], tree: Tree, *others: Tree) -> Tree:
    """Apply `function` leaf by leaf to trees of one structure and return a tree of that structure.

    Args:
        function: receives one leaf of each tree.
        tree: a tensor, or a (named) tuple or dict of trees; None stands for a branch that is not there.
        *others: further trees with the structure of `tree`.
    """
    return cast(Tree, _map(function, tree, *others))


def _map(function: Callable[..., Tensor], tree: Any, *others: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree, *others)
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {key: _map(function, value, *(other[key] for other in others)) for key, value in tree.items()}
    parts = [_map(function, *branch) for branch in zip(tree, *others, strict=True)]
    return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)


def leaves(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of a tree, depth first, in field order."""
    if isinstance(tree, Tensor):
        yield tree
    elif tree is not None:
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(branch)


def leaf_names(tree: Any) -> list[str]:
    """Where each of the `leaves` is, as fields, indices and keys joined by dots, such as "0.cell.normalizer"."""
    if isinstance(tree, Tensor):
        return [""]
    if tree is None:
        return []
    if isinstance(tree, dict):
        branches = [(str(key), branch) for key, branch in tree.items()]
    else:
        branches = list(zip(getattr(tree, "_fields", map(str, range(len(tree)))), tree, strict=True))
    return [f"{name}.{inner}".rstrip(".") for name, branch in branches for inner in leaf_names(branch)]


def zeros_where(mask: Tensor, state: Tree) -> Tree:
    """Return the state with the rows emptied where `mask` [B] (bool) is true.

    Rows are replaced, not multiplied: an infinite or NaN value does not survive.
    """
    return map_leaves(lambda leaf: zero_where(mask, leaf), state)


def contained(
    run: Callable[[Tensor, Tree, Tensor | None], tuple[Tensor, Tree]], x: Tensor, state: Tree, reset: Tensor | None
) -> tuple[Tensor, Tree]:
    """Run a memory that what is not finite spoils until the episode ends, and keep it out of all gradients.

    Zero times NaN is NaN, and a backward pass would carry it to the steps before. So where the output is not finite,
    the memory runs once more on finite numbers alone, and the steps that were spoilt are told afterwards.

    Args:
        run: the memory, called with the following.
        x: [B, T, F].
        state: before the first step.
        reset: bool [B, T] or None, true where an episode starts.

    Returns:
        Output [B, T, ...] and the state after the last step.
    """
    y, final = run(x, state, reset)
    if x.shape[1] == 0 or known_finite(y):
        return y, final
    bad = ~x.isfinite().all(-1)  # [B, T]
    bad_state = torch.stack([~leaf.flatten(1).isfinite().all(-1) for leaf in leaves(state)]).any(0)  # [B]
    bad[:, 0] |= bad_state if reset is None else bad_state & ~reset[:, 0]
    if not bool(bad.any()):
        return y, final
    y, final = run(zero_where(bad, x), zeros_where(bad_state, state), reset)
    spoilt = spoilt_from(bad, reset)
    return spoil(spoilt, y), map_leaves(lambda leaf: spoil(spoilt[:, -1], leaf), final)


def take(tree: Tree, rows: Any) -> Tree:
    """Index every leaf along its first dimension.

    Args:
        tree: leaves [B, ...].
        rows: anything that indexes one dimension: indices [N] (int64), a mask [B] (bool) or a slice.

    Returns:
        The tree with leaves [N, ...].
    """
    return map_leaves(lambda leaf: leaf[rows], tree)


def pack(state: Any) -> Tensor:
    """Flatten a state into one tensor [B, S], S = the memory core's `state_size`."""
    return torch.cat([leaf.reshape(leaf.shape[0], -1) for leaf in leaves(state)], dim=1)


def unpack(flat: Tensor, like: Tree) -> Tree:
    """Rebuild a state from [B, S]; the inverse of `pack`.

    Args:
        flat: [B, S], any float dtype; the leaves keep it.
        like: a state of any batch size that gives structure and leaf shapes.

    Raises:
        ValueError: S does not fit the structure of `like`.
    """
    sizes = [leaf[:1].numel() if leaf.shape[0] else leaf.new_empty(1, *leaf.shape[1:]).numel() for leaf in leaves(like)]
    if flat.ndim != 2 or flat.shape[1] != sum(sizes):
        raise ValueError(
            f"packed state must be [B, {sum(sizes)}], got {list(flat.shape)}; was it made by another memory?"
        )
    pieces = iter(torch.split(flat, sizes, dim=1))
    return map_leaves(lambda leaf: next(pieces).reshape(flat.shape[0], *leaf.shape[1:]), like)
