"""The action head: from what the action network gives to distributions, and to actions as environments take them."""

from __future__ import annotations

import copy
import inspect
import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from sb3_contrib.common.maskable.utils import EXPECTED_METHOD_NAME
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.distributions import Categorical

from xlstm_rl.vec_envs.env_contract import FaultyEnvironmentError, as_numbers, has_method


class GumbelCategorical(CategoricalDistribution):
    """A categorical distribution that samples by the Gumbel-max trick, many times faster than multinomial on CPU.

    Args:
        logits: [N, n].
        masks: bool [N, n], true where an action is allowed; None: all are.
    """

    def __init__(self, logits: Tensor, masks: Tensor | None = None) -> None:
        super().__init__(logits.shape[-1])
        self._log_probs = F.log_softmax(mask_logits(logits, masks), dim=-1)
        self._masks = masks

    @property
    def distribution(self) -> Categorical:  # type: ignore[override]
        """The same as torch knows it, made where it is asked for: it takes longer than all the rest of a step's."""
        return Categorical(logits=self._log_probs)

    def sample(self) -> Tensor:
        """Random actions [N]."""
        noisy = self._log_probs - torch.empty_like(self._log_probs).exponential_().log_()
        if self._masks is not None:
            # whatever the noise is
            noisy = noisy.masked_fill(~self._masks, -math.inf)
        return noisy.argmax(dim=-1)

    def mode(self) -> Tensor:
        """The most likely actions [N]."""
        return self._log_probs.argmax(dim=-1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Of actions [N]: [N]."""
        return self._log_probs.gather(-1, actions.long().view(-1, 1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """[N]."""
        return -(self._log_probs.exp() * self._log_probs).sum(-1)


def distribution_of(template: Distribution, output: Tensor, latent: Tensor, log_std: Any = None) -> Distribution:
    """A distribution of its own, which later calls leave alone.

    Stable-Baselines3 keeps one object per policy and writes into it; threads that share a policy would then draw from
    each other's distributions.

    Args:
        template: the policy's, of which kind and settings are taken.
        output: [N, ...], of the action network; of masked actions, by `masked_output`.
        latent: [N, ...], what the action network was given; gSDE makes its noise of it.
        log_std: parameter of a Gaussian.
    """
    if isinstance(template, CategoricalDistribution):
        return GumbelCategorical(output)
    # what it holds is replaced, not written over, so that a shallow copy is enough; gSDE's noise is shared on purpose
    own: Any = copy.copy(template)
    if isinstance(own, StateDependentNoiseDistribution):
        made: Distribution = own.proba_distribution(output, log_std, latent)
    elif isinstance(own, DiagGaussianDistribution):
        made = own.proba_distribution(output, log_std)
    else:
        made = own.proba_distribution(action_logits=output)
    return made


def masked_output(space: spaces.Space[Any], output: Tensor, masks: Tensor) -> Tensor:
    """What the action network gave, [N, ...], so that forbidden actions (masks bool [N, ...]) have no probability."""
    if not isinstance(space, spaces.MultiBinary):
        return mask_logits(output, masks)
    may_be_0, may_be_1 = masks.reshape(masks.shape[0], -1, 2).unbind(-1)
    # the logit of a bit is that of 1, and its negative that of 0
    return -mask_logits(-mask_logits(output, may_be_1), may_be_0)


def most_likely(space: spaces.Space[Any], output: Tensor) -> Tensor:
    """The mode of the distribution of an output [N, ...] of the action network, in plain operations for exporters."""
    if isinstance(space, spaces.Box):
        return output
    if isinstance(space, spaces.MultiBinary):
        return (output > 0).to(torch.int8)
    chosen = [part.argmax(-1) for part in torch.split(output, mask_parts(space), dim=-1)]
    return chosen[0] if isinstance(space, spaces.Discrete) else torch.stack(chosen, -1)


def to_env(space: spaces.Space[Any], actions: Tensor, *, squash: bool) -> Tensor:
    """Actions [N, ...] as the environment wants them: in bounds, from the start of its space, in its dtype.

    Args:
        space: of the environment.
        actions: as distributions draw them.
        squash: Box actions are within [-1, 1] and stand for the whole range.
    """
    shaped = actions.reshape(-1, *(space.shape or ()))
    dtype = _torch_dtype(space.dtype)
    if isinstance(space, spaces.Box):
        low, high = (torch.from_numpy(bound.copy()).to(actions.device) for bound in (space.low, space.high))
        # in the wider of the two, where the bounds are exact
        shaped = shaped.to(torch.promote_types(shaped.dtype, low.dtype))
        shaped = low + 0.5 * (shaped + 1.0) * (high - low) if squash else shaped.clamp(low, high)
        # whole numbers are not cut: the environment gets the floats that it was trained with
        return shaped.to(dtype) if dtype.is_floating_point else shaped
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) and np.any(space.start):
        shaped = shaped + torch.as_tensor(space.start, device=actions.device)
    return shaped.to(dtype)


def from_env(space: spaces.Space[Any], actions: np.ndarray, *, squash: bool) -> np.ndarray:
    """Actions [N, ...] as distributions draw them; the inverse of `to_env`.

    Args:
        space: of the environment.
        actions: as it takes them.
        squash: Box actions are to be within [-1, 1].
    """
    if isinstance(space, spaces.Box) and squash:
        scaled: np.ndarray = 2.0 * (actions - space.low) / (space.high - space.low) - 1.0
        return scaled
    from_zero: np.ndarray = actions - np.asarray(getattr(space, "start", 0), actions.dtype)
    return from_zero


@lru_cache
def _torch_dtype(dtype: Any) -> torch.dtype:
    """That of torch with the name of one of NumPy."""
    return torch.from_numpy(np.zeros(1, dtype)).dtype


def as_sampled(space: spaces.Space[Any], actions: Tensor) -> Tensor:
    """Actions [N, ...] as distributions draw them: Box actions flat, bits as floats."""
    if isinstance(space, spaces.Box):
        return actions.reshape(len(actions), -1)
    return actions.float() if isinstance(space, spaces.MultiBinary) else actions


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
        FaultyEnvironmentError: an environment failed, or `check_masks` refuses what it answered.
    """
    try:
        return check_masks(env.env_method(EXPECTED_METHOD_NAME), space, env.num_envs)
    except FaultyEnvironmentError:
        raise
    # everything that an environment can raise is to be told
    except Exception as error:
        raise FaultyEnvironmentError(None, f"failed in {EXPECTED_METHOD_NAME}(): {error}") from error


def check_masks(masks: Any, space: spaces.Space[Any], n_envs: int) -> np.ndarray:
    """Masks as bool [n_envs, sum(mask_parts(space))].

    Args:
        masks: [n_envs, ...], an array or a list of arrays; of one environment without the first dimension too.
        space: of the actions.
        n_envs: number of environments.

    Raises:
        ValueError: a mask is of another size, holds other things than booleans, or leaves nothing to choose.
    """
    parts = mask_parts(space)
    per_env = n_envs > 1 and len(masks) == n_envs
    rows = [_flat(mask) for mask in masks] if per_env else [_flat(masks)]
    sizes = {row.size for row in rows}
    if sum(row.size for row in rows) != n_envs * sum(parts) or len(sizes) > 1:
        given = f"sizes {sorted(sizes)}" if per_env else f"the shape {np.shape(masks)}"
        raise ValueError(
            f"action masks of {n_envs} environment(s) have {given}; actions {space} need {sum(parts)} "
            f"booleans each, those of the components {parts} one after the other; use_masking=False ignores them"
        )
    checked = np.concatenate([_flags(row) for row in rows]).reshape(n_envs, -1)
    starts = np.cumsum([0, *parts[:-1]])
    allowed = np.logical_or.reduceat(checked, starts, axis=1)
    if not allowed.all():
        env, part = np.argwhere(~allowed)[0]
        raise ValueError(
            f"the action mask of environment {env} forbids every choice of component {part} of {space}: allow one, "
            "or end the episode"
        )
    return checked


def _flat(mask: Any) -> np.ndarray:
    numbers = as_numbers(mask)
    return np.ravel(mask if numbers is None else numbers)


def _flags(mask: np.ndarray) -> np.ndarray:
    """A mask as bool; one that is added to logits, of 0 and -inf, would mean the contrary."""
    if mask.dtype != bool and not (mask.dtype.kind in "iuf" and ((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"an action mask holds {mask.tolist()!r:.80}, no booleans: true or 1 allows a choice, false or 0 forbids it"
        )
    return mask.astype(bool)


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
