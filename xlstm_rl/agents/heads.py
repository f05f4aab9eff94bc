"""The action head: from what the action network gives to distributions, and to actions as environments take them."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    StateDependentNoiseDistribution,
)
from torch import Tensor
from torch.distributions import Categorical

from xlstm_rl.agents.masks import mask_logits, mask_parts


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
    dtype = torch.from_numpy(np.zeros(1, space.dtype)).dtype
    if isinstance(space, spaces.Box):
        low, high = (torch.from_numpy(bound.copy()).to(actions.device) for bound in (space.low, space.high))
        # in the wider of the two, where the bounds are exact
        shaped = shaped.to(torch.promote_types(shaped.dtype, low.dtype))
        shaped = low + 0.5 * (shaped + 1.0) * (high - low) if squash else shaped.clamp(low, high)
        # whole numbers are not cut: the environment gets the floats that it was trained with
        return shaped.to(dtype) if dtype.is_floating_point else shaped
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        shaped = shaped + torch.as_tensor(space.start, device=actions.device)
    return shaped.to(dtype)


def as_sampled(space: spaces.Space[Any], actions: Tensor) -> Tensor:
    """Actions [N, ...] as distributions draw them: Box actions flat, bits as floats."""
    if isinstance(space, spaces.Box):
        return actions.reshape(len(actions), -1)
    return actions.float() if isinstance(space, spaces.MultiBinary) else actions
