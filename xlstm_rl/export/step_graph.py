"""One step of a policy as a module from tensors to tensors, which is what an exporter traces."""

from __future__ import annotations

from typing import Any

from gymnasium import spaces
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from torch import Tensor, nn

from xlstm_rl.agents.actor_critic import MemoryActorCritic, PolicyState
from xlstm_rl.agents.heads import masked_output, most_likely, to_env
from xlstm_rl.export.preprocessing import SINGLE, Front
from xlstm_rl.memory import leaf_names, leaves, map_leaves

RESET, MASK = "reset", "action_mask"
NEXT = "next."


class PolicyStep(nn.Module):
    """Observations, reset flag, mask and memory state to action, value, distribution and next state.

    Args:
        policy: in evaluation mode.
        front: what is done to observations before the policy sees them.
        masked: whether there is an input for action masks.

    Attributes:
        inputs: names of the arguments of `forward`.
        outputs: names of its results.
        state_leaves: the leaves of the empty state of one row, by the name of their input.
    """

    def __init__(self, policy: MemoryActorCritic, front: Front, *, masked: bool) -> None:
        super().__init__()
        self.policy, self.masked = policy, masked
        self.front = nn.ModuleList(front.layers.values())
        self._keys = list(front.layers)
        # what the critic alone sees is no input, and so there is no value
        self._values = not policy.critic_sees_more
        example = self._empty_state(1)
        # some cores have leaves without numbers for what is switched off
        named = zip(leaf_names(example), leaves(example), strict=True)
        self.state_leaves = {name: leaf for name, leaf in named if leaf.numel()}
        self.inputs = [
            *(observation_name(key) for key in self._keys),
            RESET,
            *([MASK] if masked else []),
            *self.state_leaves,
        ]
        self.outputs = [
            "action",
            *(["value"] if self._values else []),
            *distribution_parameters(policy),
            *(NEXT + name for name in self.state_leaves),
        ]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Tensors [B, ...] in the order of `inputs` -> tensors [B, ...] in the order of `outputs`."""
        given = dict(zip(self.inputs, inputs, strict=True))
        parts = {key: layers(given[observation_name(key)]) for key, layers in zip(self._keys, self.front, strict=True)}
        obs: Any = parts[SINGLE] if isinstance(parts.get(SINGLE), Tensor) else parts
        reset = given[RESET]
        state = self._state_of(given, reset.shape[0])
        values = []
        if self._values:
            latents = self.policy.latents(obs, state, reset)
            latent, state = latents.actor, latents.state
            values = [self.policy.value_net(latents.critic).squeeze(-1)]
        else:
            latent, actor_state = self.policy.actor_step(obs, state.actor, reset)
            state = PolicyState(actor_state, ())
        action, parameters = self._head(latent, given.get(MASK))
        named = dict(zip(leaf_names(state), leaves(state), strict=True))
        return action, *values, *parameters, *(named[name] for name in self.state_leaves)

    def _empty_state(self, batch: int) -> PolicyState:
        state = self.policy.initial_state(batch)
        return state if self._values else state._replace(critic=())

    def _state_of(self, given: dict[str, Tensor], batch: int) -> PolicyState:
        empty = self._empty_state(batch)
        filled = iter([given.get(name, leaf) for name, leaf in zip(leaf_names(empty), leaves(empty), strict=True)])
        return map_leaves(lambda leaf: next(filled), empty)

    def _head(self, latent: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The most likely action as the environment takes it, and what `distribution_parameters` names."""
        policy, space = self.policy, self.policy.action_space
        output = policy.action_net(latent)
        if mask is not None:
            output = masked_output(space, output, mask)
        action = most_likely(space, output)
        if isinstance(space, spaces.Box):
            action = action.tanh() if policy.squash_output else action
            return to_env(space, action, squash=policy.squash_output), [output, self._std(latent, output)]
        return to_env(space, action, squash=False), [output]

    def _std(self, latent: Tensor, mean: Tensor) -> Tensor:
        """Standard deviation [B, n] of the Gaussian."""
        policy: Any = self.policy
        distribution = policy.action_dist
        if isinstance(distribution, StateDependentNoiseDistribution):
            variance = (latent**2) @ (distribution.get_std(policy.log_std) ** 2)
            return (variance + distribution.epsilon).sqrt()
        return policy.log_std.exp().expand_as(mean)  # type: ignore[no-any-return]


def observation_name(key: str) -> str:
    """Of the input for a Dict entry, or for an observation that is no Dict."""
    return "observation" if key == SINGLE else f"observation.{key}"


def distribution_parameters(policy: MemoryActorCritic) -> list[str]:
    """Names of the outputs that tell the distribution of actions."""
    return ["mean", "std"] if isinstance(policy.action_space, spaces.Box) else ["logits"]
