"""Advantages and losses of PPO as pure functions on tensors [B, T]."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xlstm_rl.agents.parallel import ALONE, Ranks
from xlstm_rl.agents.rollout import Evaluation, RolloutChunks


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


# Of the estimates that are mixed: the reward alone, and generalised advantages with these lambdas.
MIXED_LAMBDAS = (0.0, 0.5, 0.8, 0.95, 1.0)
# Parts of a rollout whose gradients are compared, at least.
LEAST_UNITS = 8
# Whose gradient the others are measured against: lambda 0.95, the reward being the first.
_REFERENCE = 1 + MIXED_LAMBDAS.index(0.95)
# Rollouts over which the moments of their gradients are averaged, the part of the mixture that is spread evenly, and
# what keeps estimates that are nearly equal from being played off against each other.
_MEMORY, _LEAST_SHARE, _RIDGE = 20, 0.1, 0.1


def unexplained_reward(reward: Tensor, features: Tensor, weight: Tensor, fold: Tensor, group: Ranks = ALONE) -> Tensor:
    """The advantage at discount 0: the reward beyond what is to be expected where the agent is.

    What is expected is linear in the critic's features and fitted on the other half of the environments, so that it
    knows nothing of the action taken and leaves the policy gradient unbiased.

    Args:
        reward: [B, L].
        features: [B, L, W].
        weight: [B, L], 0 for steps that do not count.
        fold: bool [B], the half that a row belongs to.
        group: the processes whose steps are fitted together.

    Returns:
        [B, L], in units of reward.
    """
    inputs = torch.cat([features, torch.ones_like(features[..., :1])], -1).double()
    target, counted = reward.double(), weight.double()
    fitted = []
    for half in (fold, ~fold):
        x, y, w = inputs[half].flatten(0, 1), target[half].flatten(), counted[half].flatten()
        products = group.sum(torch.cat([x.mT @ (w[:, None] * x), (x.mT @ (w * y))[:, None]], 1))
        ridge = torch.eye(len(products), dtype=products.dtype, device=products.device)
        fitted.append(torch.linalg.solve(products[:, :-1] + ridge, products[:, -1]))
    expected = torch.where(fold[:, None], inputs @ fitted[1], inputs @ fitted[0])
    unexplained: Tensor = reward - expected.to(reward.dtype)
    return unexplained


def gradient_moments(advantages: Tensor, scores: Tensor, inputs: Tensor, group: Ranks = ALONE) -> Tensor:
    """Signal and noise of the policy gradients that several estimates of the advantage lead to.

    The gradient by the weights of the action head is a sum over independent units, such as environments. Products of
    gradients of different units estimate the inner products of the expected gradients (signal), products of those of
    the same unit the second moments of a single one (noise).

    Args:
        advantages: [K, U, S] of K estimates in U units of S steps, 0 where a step does not count.
        scores: [U, S, A], gradients of the log-probabilities by what the action head gave.
        inputs: [U, S, H], what it was given.
        group: the processes whose units count together.

    Returns:
        float64 [2, K, K], signal and noise, in units of the trace of the noise; NaN where there is a single unit.
    """
    kinds, units = advantages.shape[:2]
    inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)
    size = scores.shape[-1] * inputs.shape[-1]
    total = torch.zeros(kinds, size, dtype=torch.float64, device=inputs.device)
    own = torch.zeros(kinds, kinds, dtype=torch.float64, device=inputs.device)
    for first in range(0, units, 32):
        rows = slice(first, first + 32)
        weighted = advantages[:, rows].movedim(0, -1)[..., None].to(scores.dtype) * scores[rows, :, None]
        gradients = (weighted.flatten(2).mT @ inputs[rows]).view(-1, kinds, size).double()
        total += gradients.sum(0)
        own += (gradients @ gradients.mT).sum(0)
    count = float(group.sum(torch.tensor(float(units))))
    group.sum(total)
    group.sum(own)
    signal = (total @ total.mT - own) / (count * (count - 1) if count > 1 else math.nan)
    return torch.stack([signal, own / count]) / (own.trace() / count).clamp_min(1e-30)


def moments_shape() -> tuple[int, int, int]:
    """That of the `gradient_moments` of the estimates that are mixed."""
    kinds = 1 + len(MIXED_LAMBDAS)
    return 2, kinds, kinds


def averaged_moments(before: Tensor | None, moments: Tensor) -> Tensor | None:
    """The running mean of `gradient_moments` with a rollout's counted in, unless they are not finite."""
    if not bool(moments.isfinite().all()):
        return before
    return moments if before is None else before + (moments - before) / _MEMORY


def mixture(moments: Tensor | None, units: int) -> Tensor:
    """Factors of the estimates, so that their sum has the most signal for its noise.

    The signal is what a gradient has in common with that of the reference, a long-sighted estimate: one that is
    precise and short-sighted, as that of the next reward alone, gets a share only as far as it points to the same
    side. With shares w, products c of expected gradients with the reference's, and noise Q, the ratio c'w / sqrt(w'Qw)
    is largest at w = inv(Q) c. What is known of c is uncertain; by as much as its deviation, all estimates are taken to
    agree. Shares below 0 are cut off, and a tenth is spread evenly, so that none is lost sight of.

    Args:
        moments: [2, K, K] as averaged; None before anything is known: equal shares.
        units: number of units that each rollout's moments were of.

    Returns:
        float64 [K], to be multiplied with the estimates and summed.
    """
    kinds = moments_shape()[-1]
    if moments is None:
        return torch.full((kinds,), 1 / kinds, dtype=torch.float64)
    signal, noise = moments
    scale = noise.diagonal().clamp_min(1e-12).sqrt()
    pairs = torch.outer(scale, scale)
    # in units of their noise; products of independent gradients then have a variance of 1
    common = (signal / pairs)[:, _REFERENCE]
    deviation = 1 / (max(units, 2) * math.sqrt(_MEMORY))
    agreeing = common + deviation * scale.min() / scale
    shares = torch.linalg.solve(noise / pairs + _RIDGE * torch.eye(kinds).to(noise), agreeing).clamp_min(0)
    shares = (1 - _LEAST_SHARE) * shares / shares.sum().clamp_min(1e-12) + _LEAST_SHARE / kinds
    # shares are of estimates scaled to gradients of equal size
    factors: Tensor = shares / scale * scale.mean()
    return factors


class LateSchedule:
    """A schedule of Stable-Baselines3 that keeps its value and lets it fall linearly to 0 over the last part.

    A falling rate keeps what was learnt, and a constant one learns more: this does one after the other (Hägele et al.
    2024, arXiv 2405.18392).

    Args:
        value: until the last part begins.
        part: of the run, in which it falls.
    """

    def __init__(self, value: float, part: float = 0.3) -> None:
        self.value, self.part = value, part

    def __call__(self, progress_remaining: float) -> float:
        """The value where so much of the run remains, from 1 to 0; below in a last rollout that goes past the end."""
        return self.value * min(1.0, max(0.0, progress_remaining) / self.part)


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


# Updates over which the running norm averages.
MEMORY = 100


def clip_gradients(
    parameters: Iterable[Tensor], *, max_norm: float, spike_factor: float | None, running_norm: float | None
) -> float:
    """Scale gradients down to `max_norm`, and to a multiple of their usual norm.

    On a solved task gradients become small and Adam's second moment forgets what large ones were. One rare action with
    a surprising outcome then gives a gradient hundreds of times the usual, still below `max_norm`; Adam keeps moving
    along it for ten updates, farther than PPO's clipped ratio can undo, and the policy breaks. A bound relative to the
    running norm keeps such a step at the size of the others; gradients that stay large raise the bound.

    Args:
        parameters: with gradients.
        max_norm: largest norm of all gradients together.
        spike_factor: largest norm as a multiple of `running_norm`; None for no such bound.
        running_norm: mean of the clipped norms so far, or None before the first update.

    Returns:
        The running norm, this update counted in.

    Raises:
        FloatingPointError: the gradient is NaN or infinite.
    """
    limit = max_norm
    # a norm of zero, where nothing was to be learnt, bounds nothing
    if spike_factor is not None and running_norm:
        limit = min(max_norm, spike_factor * running_norm)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient norm is {norm}: lower the learning rate, or look for huge observations and rewards"
        )
    clipped = min(norm, limit)
    return clipped if not running_norm else running_norm + (clipped - running_norm) / MEMORY


class LossTerm(nn.Module):
    """A loss of a chunk and of what the policy computed for it, trained together with the policy.

    A subclass is registered with `register_loss` and named in `policy_kwargs=dict(extra_losses={name: settings})`. Its
    constructor is called as `cls(policy, **settings)` before the optimiser is made; parameters that it makes are
    trained, saved and loaded as those of the policy. It takes sizes from the policy and keeps no reference to it.
    """

    def forward(self, chunk: RolloutChunks, computed: Evaluation) -> Tensor:
        """The loss of every step, [B, T]; 0 where it says nothing.

        Args:
            chunk: of the rollout, [B, T] steps, episode starts inside.
            computed: by the present policy for it; the loss reaches the memory through its tensors.
        """
        raise TypeError(f"{type(self).__name__} has no forward: return the loss of every step, [B, T]")


class WeightedTerms(nn.Module):
    """The loss terms of a policy by name, each with its weight.

    Args:
        policy: whose sizes the terms take; its memories are made.
        settings: by name, the keyword arguments of each term, and its `weight` (1 where none is given).

    Raises:
        TypeError: the settings are no such mapping, or a term does not know one.
        ValueError: a name is not registered.
    """

    def __init__(self, policy: Any, settings: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self.terms = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        for name, given in settings.items():
            if name not in _REGISTRY:
                known = ", ".join(sorted(_REGISTRY)) or "none yet"
                raise ValueError(
                    f"extra_losses has {name!r}, which nobody has registered; known: {known}; call "
                    "xlstm_rl.register_loss(name, LossTermSubclass) first"
                )
            if not isinstance(given, Mapping):
                raise TypeError(
                    f"extra_losses[{name!r}]={given!r} must be a dict of settings, such as dict(weight=0.1)"
                )
            arguments = dict(given)
            self.weights[name] = float(arguments.pop("weight", 1.0))
            self.terms[name] = _REGISTRY[name](policy, **arguments)

    def present(self, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """The settings with the weights of now, which somebody may have changed since."""
        changed = {name for name, given in settings.items() if self.weights[name] != given.get("weight", 1.0)}
        return {
            name: {**given, **({"weight": self.weights[name]} if name in changed else {})}
            for name, given in settings.items()
        }

    def forward(self, chunk: RolloutChunks, computed: Evaluation) -> dict[str, Tensor]:
        """The terms as weighted sums over the steps that count, scalars by name; weights of the terms left out.

        Raises:
            ValueError: a term is of another shape than [B, T].
        """
        sums = {}
        for name, term in self.terms.items():
            loss = term(chunk, computed)
            if loss.shape != chunk.weights.shape:
                raise ValueError(
                    f"loss term {name!r} gave the shape {[*loss.shape]} for {[*chunk.weights.shape]} steps: return the "
                    "loss of every step, [B, T]"
                )
            sums[name] = (chunk.weights * loss).sum()
        return sums


_REGISTRY: dict[str, Callable[..., LossTerm]] = {}


def register_loss(name: str, factory: Callable[..., LossTerm]) -> None:
    """Make a loss term available to policies under `name`; saved agents hold the name, so register before loading.

    Args:
        name: letters, digits, '-' and '_'; logged as "train/loss_NAME".
        factory: called as `factory(policy, **settings)`; a `LossTerm` subclass will do.

    Raises:
        TypeError: the factory cannot be called.
        ValueError: the name is taken by another factory, or is no plain name. The same definition run again, as in a
            notebook, takes the place of the one before.
    """
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"loss name {name!r} must be made of letters, digits, '-' and '_'")
    if not callable(factory):
        raise TypeError(f"factory={factory!r} must be callable: a LossTerm subclass, or a function that returns one")
    known = _REGISTRY.get(name, factory)
    if (known.__module__, known.__qualname__) != (factory.__module__, factory.__qualname__):
        raise ValueError(f"loss {name!r} is already registered; choose another name")
    _REGISTRY[name] = factory
