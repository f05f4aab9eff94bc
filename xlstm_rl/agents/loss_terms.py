"""Losses beside those of PPO, such as a prediction that gives the memory something to learn where reward is rare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from xlstm_rl.agents.rollout import Evaluation, RolloutChunks


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
