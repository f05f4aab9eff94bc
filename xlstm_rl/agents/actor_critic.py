"""An actor-critic with a memory core between its features and its heads, on trees of states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space, maybe_transpose, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import obs_as_tensor
from torch import Tensor, nn

from xlstm_rl.agents.features import as_seen, check_extractor, check_spaces, is_grid, seen_space, space_parts
from xlstm_rl.agents.heads import GumbelCategorical, as_sampled, distribution_of, masked_output, to_env
from xlstm_rl.agents.losses import WeightedTerms
from xlstm_rl.agents.rollout import Evaluation
from xlstm_rl.memory import MemoryCore, make_memory, map_leaves, take
from xlstm_rl.memory.fast import run_network, teach_layer
from xlstm_rl.vec_envs.env_contract import entries, map_obs

CriticMemory = Literal["shared", "separate", "none"]
teach_layer(FlattenExtractor, lambda layer: lambda x: x.flatten(1))


class PolicyState(NamedTuple):
    """Memory state of actor and critic; leaves [n_envs, ...]."""

    actor: Any
    critic: Any
    """Empty unless the critic has a memory of its own."""


class StepResult(NamedTuple):
    """What the policy does in one step of every environment."""

    actions: Tensor
    """[n_envs, ...]"""
    values: Tensor
    """[n_envs]"""
    log_prob: Tensor
    """[n_envs]"""
    state: PolicyState


class Latents(NamedTuple):
    """What the heads start from, flat over [B, T], and the next state."""

    actor: Tensor
    """[N, width], input of the action head."""
    critic: Tensor
    """[N, width], input of the value head."""
    memory: Tensor
    """[N, output_size], what the actor's memory gives."""
    state: PolicyState


class MemoryActorCritic(RecurrentActorCriticPolicy):
    """The networks of `XLSTMPolicy`, which says what the arguments are, and what `RecurrentPPO` here asks of them.

    States are trees with leaves [n_envs, ...], sequences are [B, T, ...].
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.Tanh,
        ortho_init: bool = True,
        use_sde: bool = False,
        log_std_init: float = 0.0,
        full_std: bool = True,
        use_expln: bool = False,
        squash_output: bool = False,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        share_features_extractor: bool = True,
        normalize_images: bool = True,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        memory: str = "xlstm",
        memory_kwargs: dict[str, Any] | None = None,
        critic_memory: CriticMemory = "shared",
        extra_losses: Mapping[str, Mapping[str, Any]] | None = None,
        actor_keys: Sequence[str] | None = None,
        critic_keys: Sequence[str] | None = None,
    ) -> None:
        if critic_memory not in ("shared", "separate", "none"):
            raise ValueError(f"critic_memory={critic_memory!r} must be 'shared', 'separate' or 'none'")
        self.actor_keys = _check_keys("actor_keys", actor_keys, observation_space)
        self.critic_keys = _check_keys("critic_keys", critic_keys, observation_space)
        if self.actor_keys != self.critic_keys:
            # they cannot be shared, as actor and critic see different things
            share_features_extractor = False
        if critic_memory == "shared" and not share_features_extractor:
            raise ValueError("a shared memory needs shared features: set critic_memory='separate' or 'none'")
        check_spaces(observation_space, action_space)
        check_extractor(features_extractor_class, observation_space)
        if memory_kwargs is not None and not isinstance(memory_kwargs, Mapping):
            raise TypeError(f"memory_kwargs={memory_kwargs!r} must be a dict, such as dict(blocks='ms')")
        self.memory, self.memory_kwargs, self.critic_memory = memory, dict(memory_kwargs or {}), critic_memory
        if extra_losses is not None and not isinstance(extra_losses, Mapping):
            raise TypeError(f"extra_losses={extra_losses!r} must be a dict of settings by name")
        self.extra_losses = dict(extra_losses or {})
        if optimizer_kwargs is None and optimizer_class is torch.optim.Adam:
            optimizer_kwargs = {"eps": 1e-5, "fused": True}
        # the parent class makes the extractor of the actor first, and that of the critic where it has its own
        self._keys_to_build = [self.actor_keys, self.critic_keys]
        # the parent class would build LSTMs
        ActorCriticPolicy.__init__(
            self,
            observation_space,
            action_space,
            lr_schedule,
            net_arch,
            activation_fn,
            ortho_init,
            use_sde,
            log_std_init,
            full_std,
            use_expln,
            squash_output,
            features_extractor_class,
            features_extractor_kwargs,
            share_features_extractor,
            normalize_images,
            optimizer_class,
            optimizer_kwargs,
        )

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """A new features extractor; single numbers and grids of choices come to it as rows."""
        space = part_of_space(self.observation_space, self._keys_to_build.pop(0) if self._keys_to_build else None)
        return self.features_extractor_class(seen_space(space), **self.features_extractor_kwargs)

    def obs_to_tensor(self, observation: Any) -> tuple[Any, bool]:
        """Observations [N, ...] as tensors, and whether they were of several environments."""
        parts = space_parts(self.observation_space)
        if isinstance(observation, dict):
            # what the critic alone sees may be missing
            parts = {key: part for key, part in parts.items() if key in observation}
            missing = [key for key in self.actor_keys or self.observation_space.spaces if key not in observation]  # type: ignore[attr-defined]
            if missing:
                raise ValueError(f"the observation lacks {missing}, which the actor sees; it has {sorted(observation)}")
        if not any(is_grid(part) for _, part in entries(parts)):
            return super().obs_to_tensor(observation)
        # Stable-Baselines3 takes a grid of choices for several rows of them
        given = {key: observation[key] for key in parts} if isinstance(parts, dict) else observation
        rows = map_obs(_rows, parts, given)
        several = [array.ndim > len(self._shape_of(key)) for key, array in entries(rows)]
        shaped: Any = {key: array.reshape(-1, *self._shape_of(key)) for key, array in entries(rows)}
        return obs_as_tensor(shaped if isinstance(parts, dict) else shaped[None], self.device), any(several)

    def _shape_of(self, key: str | None) -> tuple[int, ...]:
        space: Any = self.observation_space if key is None else self.observation_space[key]  # type: ignore[index]
        return tuple(space.shape)

    def _build_mlp_extractor(self) -> None:
        """Build the memories, whose width the actor and critic networks start from."""
        critic_features = self.vf_features_extractor.features_dim
        self.memory_actor = make_memory(self.memory, self.features_dim, **self.memory_kwargs)
        self.memory_critic: MemoryCore | None = None
        self.critic: nn.Module | None = None  # type: ignore[assignment]
        if self.critic_memory == "separate":
            self.memory_critic = make_memory(self.memory, critic_features, **self.memory_kwargs)
        elif self.critic_memory == "none":
            self.critic = nn.Linear(critic_features, self.memory_actor.output_size)
        self.mlp_extractor = MlpExtractor(
            self.memory_actor.output_size, net_arch=self.net_arch, activation_fn=self.activation_fn, device=self.device
        )
        self.loss_terms = WeightedTerms(self, self.extra_losses)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = ActorCriticPolicy._get_constructor_parameters(self)
        return parameters | {
            "memory": self.memory,
            "memory_kwargs": self.memory_kwargs,
            "critic_memory": self.critic_memory,
            "extra_losses": self.loss_terms.present(self.extra_losses),
            "share_features_extractor": self.share_features_extractor,
            "actor_keys": self.actor_keys,
            "critic_keys": self.critic_keys,
        }

    @property
    def unseen_keys(self) -> tuple[str, ...]:
        """Parts of a Dict observation that the actor does not see: playing and exporting do without."""
        if self.actor_keys is None:
            return ()
        return tuple(key for key in space_parts(self.observation_space) if key not in self.actor_keys)

    @property
    def critic_sees_more(self) -> bool:
        """Whether the critic sees something that the actor does not."""
        return any(self.critic_keys is None or key in self.critic_keys for key in self.unseen_keys)

    def initial_state(self, n_envs: int) -> PolicyState:
        """The empty memory of `n_envs` environments."""
        critic = () if self.memory_critic is None else self.memory_critic.initial_state(n_envs)
        return PolicyState(self.memory_actor.initial_state(n_envs), critic)

    def act(
        self,
        obs: Any,
        state: PolicyState,
        reset: Tensor,
        *,
        deterministic: bool = False,
        action_masks: Tensor | None = None,
        reuse_state: bool = False,
    ) -> StepResult:
        """Choose actions for one step of every environment.

        Args:
            obs: [n_envs, ...] or a dict of those.
            state: memory state before the step.
            reset: bool [n_envs], true where `obs` is the first of an episode.
            deterministic: the mode instead of a sample.
            action_masks: bool [n_envs, ...], true where an action is allowed; None: all are.
            reuse_state: the new state may be written over `state`, see `MemoryCore.step`.
        """
        latents = self.latents(obs, state, reset, reuse_state=reuse_state)
        values = run_network(self.value_net, latents.critic).squeeze(-1)
        distribution = self.action_distribution(latents.actor, action_masks)
        actions = distribution.get_actions(deterministic=deterministic)
        log_prob = distribution.log_prob(actions)
        shaped = actions.detach().reshape(-1, *(self.action_space.shape or ()))
        return StepResult(shaped, values, log_prob, latents.state)

    def value(self, obs: Any, state: PolicyState, reset: Tensor) -> Tensor:
        """Value [n_envs] of observations [n_envs, ...], without acting."""
        features = self.extract_features(obs, self.vf_features_extractor)
        if self.memory_critic is not None:
            latent, _ = self.memory_critic.step(features, state.critic, reset)
        elif self.critic is not None:
            latent = self.critic(features)
        else:
            latent, _ = self.memory_actor.step(features, state.actor, reset)
        return self.value_net(self.mlp_extractor.forward_critic(latent)).squeeze(-1)  # type: ignore[no-any-return]

    def evaluate_sequence(
        self, obs: Any, actions: Tensor, state: PolicyState, reset: Tensor, action_masks: Tensor | None = None
    ) -> Evaluation:
        """Values, log-probabilities and entropies of past actions, whole sequences at once.

        Args:
            obs: [B, T, ...] or a dict of those.
            actions: [B, T, ...].
            state: memory state before the first step, leaves [B, ...].
            reset: bool [B, T].
            action_masks: bool [B, T, ...], true where an action was allowed; None: all were.
        """
        latents = self.latents(obs, state, reset)
        values = run_network(self.value_net, latents.critic).view(reset.shape)
        masks = None if action_masks is None else action_masks.flatten(0, 1)
        distribution = self.action_distribution(latents.actor, masks)
        log_prob = distribution.log_prob(as_sampled(self.action_space, actions.flatten(0, 1))).view(reset.shape)
        entropy = distribution.entropy()
        return Evaluation(
            values,
            log_prob,
            None if entropy is None else entropy.view(reset.shape),
            memory=latents.memory.view(*reset.shape, -1),
            latent_actor=latents.actor.view(*reset.shape, -1),
            latent_critic=latents.critic.view(*reset.shape, -1),
        )

    def advance(self, obs: Any, state: PolicyState, reset: Tensor) -> PolicyState:
        """Memory state after a sequence: obs [B, T, ...], reset bool [B, T]."""
        return self.latents(obs, state, reset, heads=False).state

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and so of features, memory states and what the networks give."""
        weight = getattr(self.value_net, "weight", None)
        if isinstance(weight, Tensor):
            # as nearly always
            return weight.dtype
        # of a network in its place, or of whole numbers
        return next((part.dtype for part in self.parameters() if part.is_floating_point()), torch.float32)

    def extract_features(self, obs: Any, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        """Features [N, F] in the dtype of the parameters; Stable-Baselines3 makes observations float32.

        Args:
            obs: [N, ...] or a dict of those.
            features_extractor: None for the policy's own: of actor and critic, a pair where each has its own.
        """
        if features_extractor is None and not self.share_features_extractor:
            pair = (self.pi_features_extractor, self.vf_features_extractor)
            return tuple(self.extract_features(obs, extractor) for extractor in pair)
        extractor = features_extractor or self.features_extractor
        critic = not self.share_features_extractor and extractor is self.vf_features_extractor
        keys = self.critic_keys if critic else self.actor_keys
        part = part_of_space(self.observation_space, keys)
        obs = obs if keys is None else {key: obs[key] for key in keys}
        if type(part) is spaces.Box and len(part.shape) == 1 and isinstance(obs, Tensor):
            # as nearly always, and nothing of what follows does anything to it
            return run_network(extractor, obs.float().to(self.dtype))
        obs = _from_zero(obs, part)
        obs, space = as_seen(obs, part), seen_space(part)
        seen: Any = preprocess_obs(obs, space, normalize_images=self.normalize_images)
        seen = map_leaves(lambda part: part.to(self.dtype), seen)
        return extractor(seen)

    def actor_step(self, obs: Any, state: Any, reset: Tensor) -> tuple[Tensor, Any]:
        """Input of the action head [n_envs, width] and the actor's next state; the critic is left out.

        Args:
            obs: [n_envs, ...] or a dict of those, which may lack what the critic alone sees.
            state: the actor's, leaves [n_envs, ...].
            reset: bool [n_envs].
        """
        features = self.extract_features(obs, self.pi_features_extractor)
        latent, state = self.memory_actor.step(features, state, reset)
        return self.mlp_extractor.forward_actor(latent), state

    def action_distribution(self, latent_pi: Tensor, action_masks: Tensor | None) -> Distribution:
        """Of what `latents` gave, [N, ...]; over the allowed actions, where there are masks bool [N, ...]."""
        if action_masks is None:
            return self._get_action_dist_from_latent(latent_pi)
        return self._distribution(run_network(self.action_net, latent_pi), latent_pi, action_masks)

    def _get_action_dist_from_latent(self, latent_pi: Tensor) -> Distribution:
        return self._distribution(run_network(self.action_net, latent_pi), latent_pi, None)

    def _distribution(self, output: Tensor, latent_pi: Tensor, action_masks: Tensor | None) -> Distribution:
        if action_masks is not None and isinstance(self.action_dist, CategoricalDistribution):
            return GumbelCategorical(output, action_masks)
        if action_masks is not None:
            output = masked_output(self.action_space, output, action_masks)
        return distribution_of(self.action_dist, output, latent_pi, getattr(self, "log_std", None))

    @torch.enable_grad()
    def scores(self, latent_pi: Tensor, actions: Tensor, action_masks: Tensor | None) -> Tensor:
        """Gradients of the log-probabilities of actions by what the action network gives, [N, outputs].

        Args:
            latent_pi: [N, width], as `latents` gave it.
            actions: [N, ...].
            action_masks: bool [N, ...], true where an action was allowed; None: all were.
        """
        output = self.action_net(latent_pi.detach()).detach().requires_grad_()
        distribution = self._distribution(output, latent_pi.detach(), action_masks)
        log_prob = distribution.log_prob(as_sampled(self.action_space, actions))
        gradient: Tensor = torch.autograd.grad(log_prob.sum(), output)[0]
        return gradient

    def latents(
        self, obs: Any, state: PolicyState, reset: Tensor, *, heads: bool = True, reuse_state: bool = False
    ) -> Latents:
        """Inputs of the action and value heads, flat over [B, T], and the next state.

        Args:
            obs: [B, ...] for a step, [B, T, ...] for a sequence, or a dict of those.
            state: memory state before it.
            reset: bool [B] for a step, [B, T] for a sequence.
            heads: run the actor and critic networks; without, what goes into them.
            reuse_state: see `MemoryCore.step`.
        """
        sequence = reset.ndim == 2
        if sequence:
            obs = map_leaves(lambda part: part.flatten(0, 1), obs)
        features = self.extract_features(obs)
        pi_features, vf_features = (features, features) if isinstance(features, Tensor) else features
        latent_pi, actor_state = _run(self.memory_actor, pi_features, state.actor, reset, reuse_state)
        critic_state = state.critic
        if self.memory_critic is not None:
            latent_vf, critic_state = _run(self.memory_critic, vf_features, state.critic, reset, reuse_state)
        else:
            latent_vf = latent_pi if self.critic is None else self.critic(vf_features)
        state = PolicyState(actor_state, critic_state)
        if not heads:
            return Latents(latent_pi, latent_vf, latent_pi, state)
        actor, critic = self._latents_of_heads(latent_pi, latent_vf)
        return Latents(actor, critic, latent_pi, state)

    def _latents_of_heads(self, latent_pi: Tensor, latent_vf: Tensor) -> tuple[Tensor, Tensor]:
        networks = self.mlp_extractor
        if type(networks) is not MlpExtractor:
            return networks.forward_actor(latent_pi), networks.forward_critic(latent_vf)
        return run_network(networks.policy_net, latent_pi), run_network(networks.value_net, latent_vf)

    def to_env_actions(self, actions: np.ndarray) -> np.ndarray:
        """Actions [n_envs, ...] as the environment wants them: in bounds, from the start of its space, in its dtype."""
        space = self.action_space
        if isinstance(space, spaces.Discrete) and space.start == 0:
            # as nearly always
            return actions.astype(space.dtype, copy=False)
        return to_env(space, torch.from_numpy(actions), squash=self.squash_output).numpy()


def as_tensors(obs: Any, device: torch.device) -> Any:
    """Observations [n_envs, ...], or a dict of those, as tensors on a device."""
    return map_obs(partial(torch.as_tensor, device=device), obs)


class Truncation(NamedTuple):
    """Episodes cut by a time limit in one step."""

    mask: np.ndarray
    """bool [n_envs]"""
    values: np.ndarray
    """[n_envs], value of the final observation where cut."""


def value_of_cut_episodes(
    policy: MemoryActorCritic, dones: np.ndarray, infos: list[dict[str, Any]], state: PolicyState
) -> Truncation:
    """Which episodes a time limit cut in a step, and the value of where they were cut.

    Args:
        policy: values the final observations.
        dones: bool [n_envs], an episode ended.
        infos: of the step, one per environment, as Stable-Baselines3 fills them.
        state: memory state after the observation acted on, leaves [n_envs, ...].
    """
    cut, values = np.zeros(len(dones), bool), np.zeros(len(dones), np.float32)
    for row in np.flatnonzero(dones):
        cut[row] = infos[row].get("TimeLimit.truncated", False) and "terminal_observation" in infos[row]
    if cut.any():
        rows = np.flatnonzero(cut)
        final = [infos[row]["terminal_observation"] for row in rows]
        stacked = map_obs(lambda *parts: torch.stack([torch.as_tensor(part) for part in parts]), *final)
        with torch.inference_mode():
            # the state that saw the episode, and no reset: the final observation belongs to it
            seen = take(state, torch.as_tensor(rows, device=policy.device))
            no_reset = torch.zeros(len(rows), dtype=torch.bool, device=policy.device)
            values[rows] = policy.value(as_tensors(stacked, policy.device), seen, no_reset).cpu().numpy()
    return Truncation(cut, values)


@contextmanager
def evaluating(policy: MemoryActorCritic) -> Iterator[None]:
    """Without gradients and dropout; the policy is left as it was."""
    training = policy.training
    policy.set_training_mode(False)
    try:
        with torch.no_grad():
            yield
    finally:
        policy.set_training_mode(training)


def part_of_space(space: spaces.Space[Any], keys: Sequence[str] | None) -> spaces.Space[Any]:
    """A Dict space with some of its keys, or any space whole."""
    return space if keys is None else spaces.Dict({key: space[key] for key in keys})  # type: ignore[index]


def _check_keys(name: str, keys: Sequence[str] | None, space: spaces.Space[Any]) -> tuple[str, ...] | None:
    if keys is None:
        return None
    if not isinstance(space, spaces.Dict):
        raise ValueError(f"{name}={keys!r} needs Dict observations, whose parts it names; these are {space}")
    if isinstance(keys, str) or not keys or len({*keys}) < len(keys) or not {*keys} <= space.spaces.keys():
        raise ValueError(f"{name}={keys!r} must be a list of different keys of the observations: {[*space.spaces]}")
    return tuple(keys)


def _rows(space: spaces.Space[Any], given: Any) -> np.ndarray:
    """An observation, or [N, ...], as an array, channels of images first."""
    array = maybe_transpose(given, space) if is_image_space(space) else np.asarray(given)
    shape = space.shape or ()
    if array.shape not in (shape, (len(array) if array.ndim else 0, *shape)):
        raise ValueError(f"observations of shape {array.shape} are none of {space}, nor several of them")
    return array


def _from_zero(obs: Any, space: spaces.Space[Any]) -> Any:
    """Observations whose whole numbers start at 0, as Stable-Baselines3 takes those of all spaces to do."""
    if isinstance(space, spaces.Dict):
        return {key: _from_zero(obs[key], part) for key, part in space.spaces.items()}
    start = getattr(space, "start", None)
    return obs if start is None or not np.any(start) else obs - torch.as_tensor(start, device=obs.device)


def within_bounds(obs: Any, space: spaces.Space[Any]) -> Any:
    """Observations whose whole numbers are of the space; the zeros that sb3-contrib pads sequences with may be none."""
    if isinstance(space, spaces.Dict):
        return {key: within_bounds(obs[key], part) for key, part in space.spaces.items()}
    if not np.any(getattr(space, "start", 0)):
        return obs
    size: Any = space.n if isinstance(space, spaces.Discrete) else space.nvec  # type: ignore[attr-defined]
    least, most = (torch.as_tensor(bound, device=obs.device) for bound in (space.start, space.start + size - 1))  # type: ignore[attr-defined]
    return obs.clamp(least, most)


def _run(core: MemoryCore, features: Tensor, state: Any, reset: Tensor, reuse_state: bool) -> tuple[Tensor, Any]:
    """Run a memory on flat features [B * T, F]: one step if reset is [B], a sequence if it is [B, T]."""
    if reset.ndim == 1:
        return core.step(features, state, reset, reuse_state=reuse_state)
    y, state = core(features.view(*reset.shape, -1), state, reset)
    return y.flatten(0, 1), state
