"""A policy of this library as a module of RLlib's new API stack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import (
    TorchCategorical,
    TorchDiagGaussian,
    TorchMultiCategorical,
)
from ray.rllib.core.learner.utils import make_target_network
from ray.rllib.core.rl_module.apis import (
    TARGET_NETWORK_ACTION_DIST_INPUTS,
    InferenceOnlyAPI,
    TargetNetworkAPI,
    ValueFunctionAPI,
)
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.utils import ConstantSchedule
from torch import Tensor

from xlstm_rl.agents.actor_critic import Latents, PolicyState, within_bounds
from xlstm_rl.agents.features import is_small_image, space_parts
from xlstm_rl.agents.heads import mask_parts
from xlstm_rl.agents.policy import CnnXLSTMPolicy, MultiInputXLSTMPolicy, XLSTMPolicy, policy_arguments
from xlstm_rl.memory import leaf_names, leaves, map_leaves
from xlstm_rl.vec_envs.env_contract import entries

# What RLlib does itself, or what its losses do not know.
_NOT_HERE = {
    *("optimizer_class", "optimizer_kwargs", "extra_losses"),
    *("use_sde", "full_std", "use_expln", "squash_output"),
}


class XLSTMRLModule(TorchRLModule, ValueFunctionAPI, TargetNetworkAPI, InferenceOnlyAPI):
    """Actor and critic with a memory for RLlib's PPO, APPO and IMPALA.

    `model_config` is a dict: `max_seq_len`, the steps of a row in training, and what `XLSTMPolicy` takes as
    `policy_kwargs`, such as `memory`, `memory_kwargs`, `critic_memory` and `net_arch`. Actions are Discrete,
    MultiDiscrete or flat Box; observations those of `XLSTMPolicy`, images as RLlib takes them: [height, width,
    channels], whole numbers to 255 or floats.

    Rows of a batch never cross an episode, and RLlib hands in the state before a row, so nothing is reset inside.

    Attributes:
        policy: an `XLSTMPolicy`, whose weights fit a `RecurrentPPO` of the same settings.

    Raises:
        TypeError: `model_config` holds a name that is none of these.
        ValueError: a setting or a space does not fit.
    """

    policy: XLSTMPolicy

    def setup(self) -> None:
        """Build the policy; RLlib calls this."""
        settings = _policy_settings(self.model_config)
        _check_actions(self.action_space)
        parts = list(entries(space_parts(self.observation_space)))
        kinds = {key: _image_kind(part) for key, part in parts}
        self._transposed = {
            key for key, part in parts if kinds[key] is not None and not is_image_space_channels_first(part)
        }
        if "pixels" not in kinds.values() and "floats" in kinds.values():
            settings.setdefault("normalize_images", False)
        if isinstance(self.observation_space, spaces.Dict):
            policy_class: type[XLSTMPolicy] = MultiInputXLSTMPolicy
        else:
            large = kinds[None] is not None and not is_small_image(self.observation_space)
            policy_class = CnnXLSTMPolicy if large else XLSTMPolicy
        self.policy = policy_class(
            _each(self.observation_space, self._channels_first), self.action_space, ConstantSchedule(0.0), **settings
        )
        # RLlib has its own
        del self.policy.optimizer
        self._like = self.policy.initial_state(1)

    def get_initial_state(self) -> dict[str, np.ndarray]:
        """The empty memory of one environment, without a dimension for rows; RLlib wants a flat dict."""
        return {name: leaf[0].numpy() for name, leaf in self._flat_state(self._like).items()}

    def compute_values(self, batch: dict[str, Any], embeddings: Tensor | None = None) -> Tensor:
        """Values [B, T] of a batch, or of what `forward_train` gave for it as embeddings [B, T, width]."""
        if embeddings is None:
            embeddings = _shaped(self._latents(self.policy, batch).critic, batch)
        return self.policy.value_net(embeddings).squeeze(-1)  # type: ignore[no-any-return]

    def make_target_networks(self) -> None:
        """Keep a second policy, which APPO compares with."""
        self.target_policy = make_target_network(self.policy)

    def get_target_network_pairs(self) -> list[tuple[XLSTMPolicy, XLSTMPolicy]]:
        """The policy and the one it is copied to from time to time."""
        return [(self.policy, self.target_policy)]

    def forward_target(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the second policy would do."""
        with torch.no_grad():
            latents = self._latents(self.target_policy, batch)
            inputs = _distribution_inputs(self.target_policy, latents.actor)
        return {TARGET_NETWORK_ACTION_DIST_INPUTS: _shaped(inputs, batch)}

    def get_non_inference_attributes(self) -> list[str]:
        """Parts that env runners do not get; the critic's memory is carried there too."""
        return ["target_policy"]

    def get_inference_action_dist_cls(self) -> Any:
        """The distribution of RLlib that fits the actions."""
        if isinstance(self.action_space, spaces.MultiDiscrete):
            return TorchMultiCategorical.get_partial_dist_cls(
                space=self.action_space, input_lens=mask_parts(self.action_space)
            )
        return TorchDiagGaussian if isinstance(self.action_space, spaces.Box) else TorchCategorical

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Act: OBS [B, 1, ...] and STATE_IN {name: [B, ...]} to ACTION_DIST_INPUTS [B, 1, n] and STATE_OUT."""
        latents = self._latents(self.policy, batch)
        inputs = _shaped(_distribution_inputs(self.policy, latents.actor), batch)
        state = self._flat_state(latents.state)
        return {Columns.ACTION_DIST_INPUTS: inputs} | ({Columns.STATE_OUT: state} if state else {})

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Run rows OBS [B, T, ...]; what is padded at their ends changes nothing before it."""
        latents = self._latents(self.policy, batch)
        return {
            Columns.ACTION_DIST_INPUTS: _shaped(_distribution_inputs(self.policy, latents.actor), batch),
            # the value head starts from these, so that the memory runs once
            Columns.EMBEDDINGS: _shaped(latents.critic, batch),
        }

    def _latents(self, policy: XLSTMPolicy, batch: dict[str, Any]) -> Latents:
        rows, length = _rows_and_length(batch)
        obs = _each(batch[Columns.OBS], self._channels_first)
        # the zeros that RLlib pads with may be no observations
        obs = within_bounds(obs, policy.observation_space)
        if length == 1:
            obs = map_leaves(lambda part: part.squeeze(1), obs)
        shape = (rows,) if length in (None, 1) else (rows, length)
        reset = torch.zeros(shape, dtype=torch.bool, device=policy.device)
        state = policy.initial_state(rows) if length is None else self._state(batch[Columns.STATE_IN])
        return policy.latents(obs, state, reset)

    def _state(self, given: Mapping[str, Tensor]) -> PolicyState:
        in_order = iter([given[name] for name in leaf_names(self._like)])

        def of_dtype(like: Tensor) -> Tensor:
            return next(in_order).to(self.policy.dtype if like.is_floating_point() else like.dtype)

        tree: PolicyState = map_leaves(of_dtype, self._like)
        return tree

    def _flat_state(self, state: PolicyState) -> dict[str, Tensor]:
        if not any(leaf.numel() for leaf in leaves(self._like)):
            # nothing is remembered: to RLlib a module without time
            return {}
        return dict(zip(leaf_names(self._like), leaves(state), strict=True))

    def _channels_first(self, key: str | None, part: Any) -> Any:
        """A space, or a tensor [..., H, W, C] of it, with its channels first if it is an image."""
        if key not in self._transposed:
            return part
        if isinstance(part, spaces.Box):
            low, high = (np.moveaxis(bound, -1, 0) for bound in (part.low, part.high))
            return spaces.Box(low, high, dtype=part.dtype.type)
        return part.movedim(-1, -3)


def _rows_and_length(batch: dict[str, Any]) -> tuple[int, int | None]:
    """B and T of a batch; None where there is no time, since nothing is remembered."""
    first = next(iter(leaves(batch[Columns.OBS])))
    return first.shape[0], first.shape[1] if Columns.STATE_IN in batch else None


def _shaped(flat: Tensor, batch: dict[str, Any]) -> Tensor:
    """Flat over a batch, [N, n], to [B, T, n]."""
    rows, length = _rows_and_length(batch)
    return flat if length is None else flat.view(rows, length, -1)


def _distribution_inputs(policy: XLSTMPolicy, latent: Tensor) -> Tensor:
    """What distributions of RLlib are made of: logits, or means and log standard deviations."""
    output: Tensor = policy.action_net(latent)
    log_std = getattr(policy, "log_std", None)
    return output if log_std is None else torch.cat([output, log_std.expand_as(output)], -1)


def _each(parts: Any, function: Any) -> Any:
    """A function of key and part, of a space, an observation or a dict of either."""
    if isinstance(parts, spaces.Dict):
        return spaces.Dict({key: function(key, part) for key, part in parts.spaces.items()})
    if isinstance(parts, Mapping):
        return {key: function(key, part) for key, part in parts.items()}
    return function(None, parts)


def _image_kind(space: spaces.Space[Any]) -> str | None:
    """Images of whole numbers ("pixels") and those that RLlib's encoders take besides ("floats"); None for others."""
    if is_image_space(space):
        return "pixels"
    floats = is_image_space(space, normalized_image=True) and not is_small_image(space, normalized_image=True)
    return "floats" if floats else None


def _policy_settings(model_config: Any) -> dict[str, Any]:
    """Of the policy, from `model_config`."""
    settings = dict(model_config or {})
    length = settings.pop("max_seq_len", None)
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(
            f"model_config has max_seq_len={length!r}: give the steps of a row in training, such as "
            "model_config=dict(max_seq_len=64, ...)"
        )
    # PPO adds it, with the value False, to the settings of every module
    shared = settings.pop("vf_share_layers", False)
    known = policy_arguments(XLSTMPolicy) - _NOT_HERE
    unknown = sorted(set(settings) - known)
    if unknown:
        raise TypeError(
            f"model_config: XLSTMRLModule takes no {unknown}; known are max_seq_len and {sorted(known)}; settings of "
            "the memory go into memory_kwargs=dict(...), those of training into .training(...) of the algorithm"
        )
    if shared:
        raise ValueError("vf_share_layers=True is for the networks of RLlib: set critic_memory='shared' here")
    return settings


def _check_actions(space: spaces.Space[Any]) -> None:
    """Refuse actions that the distributions of RLlib cannot draw as the environment wants them."""
    remedy = "wrap the environment in gymnasium.wrappers.TransformAction"
    if not isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.Box):
        raise ValueError(
            f"{type(space).__name__} actions are none that RLlib draws here; allowed are Discrete, MultiDiscrete and "
            f"Box; {remedy}"
        )
    if np.any(getattr(space, "start", 0)):
        raise ValueError(f"actions {space} do not start at 0, and RLlib sends those from 0: {remedy}")
    if isinstance(space, spaces.Box) and (len(space.shape) != 1 or not np.issubdtype(space.dtype, np.floating)):
        raise ValueError(f"actions {space} are no flat row of floats, which RLlib draws: {remedy}")
