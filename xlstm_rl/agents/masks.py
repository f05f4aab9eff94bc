"""Action masks: which actions an environment allows, in the layout of sb3-contrib's MaskablePPO.

A mask is a flat array of booleans, true where allowed: one per action of a Discrete space, one per choice of every
component of a MultiDiscrete space, one after the other, and two (for 0 and for 1) per bit of a MultiBinary space.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from gymnasium import spaces
from sb3_contrib.common.maskable.utils import EXPECTED_METHOD_NAME
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from xlstm_rl.agents.env_contract import has_method

# exp of it is 0, and 0 times it is still 0.
_FORBIDDEN = -1e8


def mask_parts(space: spaces.Space[Any]) -> list[int]:
    """Number of choices of every component of an action; a mask holds one boolean per choice.

    Raises:
        ValueError: actions of this space are not chosen from a list.
    """
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return [int(n) for n in space.nvec]
    if isinstance(space, spaces.MultiBinary) and isinstance(space.n, int):
        return [2] * space.n
    raise ValueError(
        f"actions {space} cannot be masked: masks are for Discrete, flat MultiDiscrete and flat MultiBinary actions; "
        "set use_masking=False to ignore the action_masks() of the environment"
    )


def masks_actions(env: VecEnv, space: spaces.Space[Any], use_masking: bool | None) -> bool:
    """Whether the masks of an environment are to be used.

    Args:
        env: asked for a method `action_masks`.
        space: of the actions.
        use_masking: true if they must be, false if not, None if there are any.

    Raises:
        ValueError: they must be and there are none, or actions of this space cannot be masked.
    """
    if use_masking is False:
        return False
    if has_method(env, EXPECTED_METHOD_NAME):
        mask_parts(space)
        return True
    if use_masking:
        raise ValueError(
            f"use_masking=True needs environments with a method {EXPECTED_METHOD_NAME}(): define it, wrap them in "
            "sb3_contrib.common.wrappers.ActionMasker, or set use_masking=None"
        )
    return False


def read_masks(env: VecEnv, space: spaces.Space[Any]) -> np.ndarray:
    """The masks of the present step of every environment: bool [n_envs, sum(mask_parts(space))].

    Raises:
        ValueError: a mask is of another size, or leaves nothing to choose.
    """
    return check_masks(env.env_method(EXPECTED_METHOD_NAME), space, env.num_envs)


def check_masks(masks: Any, space: spaces.Space[Any], n_envs: int) -> np.ndarray:
    """Masks as bool [n_envs, sum(mask_parts(space))].

    Args:
        masks: [n_envs, ...], an array or a list of arrays; of one environment without the first dimension too.
        space: of the actions.
        n_envs: number of environments.

    Raises:
        ValueError: a mask is of another size, or leaves nothing to choose.
    """
    parts = mask_parts(space)
    per_env = n_envs > 1 and len(masks) == n_envs
    rows = [np.ravel(mask) for mask in masks] if per_env else [np.ravel(masks)]
    sizes = {row.size for row in rows}
    if sum(row.size for row in rows) != n_envs * sum(parts) or len(sizes) > 1:
        given = f"sizes {sorted(sizes)}" if per_env else f"the shape {np.shape(masks)}"
        raise ValueError(
            f"action masks of {n_envs} environment(s) have {given}; actions {space} need {sum(parts)} "
            f"booleans each, those of the components {parts} one after the other; use_masking=False ignores them"
        )
    checked = np.concatenate(rows).astype(bool).reshape(n_envs, -1)
    starts = np.cumsum([0, *parts[:-1]])
    allowed = np.logical_or.reduceat(checked, starts, axis=1)
    if not allowed.all():
        env, part = np.argwhere(~allowed)[0]
        raise ValueError(
            f"the action mask of environment {env} forbids every choice of component {part} of {space}: allow one, "
            "or end the episode"
        )
    return checked


def mask_logits(logits: Tensor, masks: Tensor | None) -> Tensor:
    """Logits [N, n] with those of forbidden actions (masks bool [N, n]) so low that their probability is 0."""
    return logits if masks is None else logits.masked_fill(~masks, _FORBIDDEN)


def sample_allowed(space: spaces.Space[Any], mask: np.ndarray) -> np.ndarray:
    """A uniformly random action among those that a mask (bool [sum(mask_parts(space))]) allows."""
    parts = [part.astype(np.int8) for part in np.split(mask, np.cumsum(mask_parts(space))[:-1])]
    if isinstance(space, spaces.Discrete):
        return np.asarray(space.sample(parts[0]))
    if isinstance(space, spaces.MultiDiscrete):
        return np.asarray(space.sample(tuple(parts)))
    # of a bit: 0 and 1 allow that value alone, 2 both
    free = np.array([2 if part.all() else part[1] for part in parts], np.int8)
    return np.asarray(space.sample(free))


def takes_masks(model: Any) -> bool:
    """Whether a model's `predict` has the keyword `action_masks` and is not told to do without."""
    return (
        getattr(model, "use_masking", None) is not False
        and "action_masks" in inspect.signature(model.predict).parameters
    )
