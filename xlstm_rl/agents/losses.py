"""Advantages and losses of PPO as pure functions on tensors [B, T]."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_rl.agents.parallel import Ranks


def gae(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, ended: Tensor, *, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage of every step (Schulman et al. 2016, eq. 16).

    Args:
        reward: [B, T].
        value: [B, T], value of the observation acted on.
        next_value: [B, T], value of the observation that step t led to, seen by the memory that saw step t; where an
            episode was cut by a time limit, that is its final observation.
        terminated: bool [B, T], the task ended: nothing follows.
        ended: bool [B, T], terminated or cut by a time limit.
        gamma: discount factor per step.
        lam: trade-off between bias (0) and variance (1).

    Returns:
        Advantage [B, T], in units of reward.
    """
    delta = reward + gamma * next_value.masked_fill(terminated, 0.0) - value
    keep = gamma * lam * (~ended).to(delta.dtype)
    advantages = [torch.zeros_like(delta[:, 0])]
    for step_delta, step_keep in zip(reversed(delta.unbind(1)), reversed(keep.unbind(1)), strict=True):
        advantages.append(torch.addcmul(step_delta, step_keep, advantages[-1]))
    return torch.stack(advantages[:0:-1], dim=1)


ALONE = Ranks()


class AdvantageScale:
    """Divisor that normalises advantages without amplifying noise to the size of a signal.

    Dividing by the standard deviation of one batch makes every batch equally loud. Once a sparse task is solved,
    nearly all returns are equal, what is left of the advantage is the error of the critic, and stock normalisation
    turns that noise into full-size policy updates: the policy walks away from the solution. The divisor is
    therefore kept above `floor` times the root mean square of the standard deviations seen so far in training, so it
    works for rewards of any unit.

    Attributes:
        mean_square: mean of the squared standard deviations met.
        count: rollouts met.
    """

    def __init__(self) -> None:
        self.mean_square = 0.0
        self.count = 0

    def normalize(
        self, advantage: Tensor, *, floor: float, counted: Tensor | None = None, group: Ranks = ALONE
    ) -> Tensor:
        """Count one rollout's advantages [...] in and return them centred and scaled.

        Args:
            advantage: [...].
            floor: smallest divisor relative to the scale met so far; 0 is the stock behaviour.
            counted: bool [...], false for steps that are not to be counted in; None counts all.
            group: the processes whose advantages are normalised together.

        Raises:
            ValueError: the floor is not in [0, 1).
        """
        check_advantage_floor(floor)
        seen = advantage if counted is None else advantage[counted]
        # sums in float64, so that it makes no difference over how many processes the steps are spread
        count, total = group.sum(
            torch.stack([torch.tensor(float(seen.numel())), seen.sum(dtype=torch.float64)])
        ).tolist()
        if count == 0:
            return advantage
        mean = total / count
        std = math.sqrt(float(group.sum((seen.double() - mean).square().sum())) / count)
        self.count += 1
        self.mean_square += (std**2 - self.mean_square) / self.count
        divisor: float = max(std, floor * self.mean_square**0.5, 1e-8)
        normalized: Tensor = (advantage - mean) / divisor
        return normalized


def check_advantage_floor(floor: float) -> None:
    """Refuse a floor of `AdvantageScale` that is not in [0, 1)."""
    if not 0 <= floor < 1:
        raise ValueError(f"advantage_floor={floor} must be in [0, 1); 0 is stock PPO, 0.1 the default")


class PPOLoss(NamedTuple):
    """The loss to minimise and its parts, all scalars."""

    total: Tensor
    policy: Tensor
    value: Tensor
    entropy: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


def ppo_loss(
    *,
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    value: Tensor,
    old_value: Tensor,
    target: Tensor,
    entropy: Tensor | None,
    weight: Tensor,
    total_weight: Tensor | None = None,
    clip_range: float,
    clip_range_vf: float | None,
    ent_coef: float,
    vf_coef: float,
) -> PPOLoss:
    """Clipped surrogate loss of PPO (Schulman et al. 2017, eq. 9) as weighted sums over steps.

    Args:
        log_prob, old_log_prob: [B, T], of the action taken, now and in the rollout.
        advantage: [B, T], normalised.
        value, old_value, target: [B, T], in units of return.
        entropy: [B, T], or None where the distribution has no closed form: estimated by -log_prob.
        weight: [B, T], of each step: 0 for steps that another chunk counts; in a minibatch of average size the
            weights sum to 1.
        total_weight: scalar, sum of the weights of the minibatch over all processes; None: of `weight`.
        clip_range: clip of the probability ratio around 1.
        clip_range_vf: clip of the value around `old_value`, in units of return; None for no clip.
        ent_coef, vf_coef: weights of the entropy bonus and of the value loss.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    policy = -(weight * torch.minimum(advantage * ratio, advantage * clipped)).sum()
    if clip_range_vf is not None:
        value = old_value + (value - old_value).clamp(-clip_range_vf, clip_range_vf)
    value_loss = (weight * (target - value) ** 2).sum()
    mean_entropy = (weight * (-log_prob if entropy is None else entropy)).sum()
    total = policy + vf_coef * value_loss - ent_coef * mean_entropy
    with torch.no_grad():
        # low-variance estimate of KL(old, new), http://joschu.net/blog/kl-approx.html
        # a minibatch may hold nothing but skipped steps
        total_weight = weight.sum() if total_weight is None else total_weight
        share = weight / total_weight.clamp_min(torch.finfo(weight.dtype).tiny)
        approx_kl = (share * (ratio - 1 - log_ratio)).sum()
        clip_fraction = (share * ((ratio - 1).abs() > clip_range)).sum()
    return PPOLoss(total, policy, value_loss, mean_entropy, approx_kl, clip_fraction)
