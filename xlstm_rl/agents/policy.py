"""The actor-critic policy with a memory core, for `RecurrentPPO` here and for the one of sb3-contrib."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    MlpExtractor,
    NatureCNN,
)
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from xlstm_rl.agents.action_masks import check_masks, mask_logits, masked_distribution
from xlstm_rl.agents.checkpoint import load_policy, save_policy
from xlstm_rl.memory import MemoryCore, make_memory, pack, unpack

if TYPE_CHECKING:
    from typing_extensions import Self

StatePair = tuple[Tensor, ...]
CriticMemory = Literal["shared", "separate", "none"]


class PolicyState(NamedTuple):
    """Memory state of actor and critic; leaves [n_envs, ...]."""

    actor: Any
    critic: Any
    """Empty unless the critic has a memory of its own."""


class PackedShape(NamedTuple):
    """How a packed state presents itself to sb3-contrib: as the (h, c) pair of an LSTM of this size."""

    num_layers: int
    hidden_size: int


class StepResult(NamedTuple):
    """What the policy does in one step of every environment."""

    actions: Tensor
    """[n_envs, ...]"""
    values: Tensor
    """[n_envs]"""
    log_prob: Tensor
    """[n_envs]"""
    state: PolicyState


class Evaluation(NamedTuple):
    """What the current policy thinks of a sequence of past actions."""

    values: Tensor
    """[B, T]"""
    log_prob: Tensor
    """[B, T]"""
    entropy: Tensor | None
    """[B, T], or None where the distribution has no closed form."""


class XLSTMPolicy(RecurrentActorCriticPolicy):
    """Features extractor, memory core, then actor and critic networks.

    Runs under `xlstm_rl.RecurrentPPO` and, unmodified, under `sb3_contrib.RecurrentPPO`, which sees the memory state
    packed into the (h, c) pair of an LSTM.

    Args:
        observation_space: any space Stable-Baselines3 supports, Dict included.
        action_space: Discrete, Box, MultiDiscrete or MultiBinary.
        lr_schedule: learning rate by remaining progress.
        net_arch: layers after the memory, as in Stable-Baselines3; by default two of 64 for actor and critic each.
        activation_fn: of these layers.
        ortho_init: orthogonal init of extractor and networks; the memory keeps its own.
        use_sde: state dependent exploration (Box actions).
        log_std_init: initial log standard deviation (Box actions).
        full_std: of gSDE, see Stable-Baselines3.
        use_expln: of gSDE, see Stable-Baselines3.
        squash_output: of gSDE, see Stable-Baselines3.
        features_extractor_class: what turns an observation into features.
        features_extractor_kwargs: for its constructor.
        share_features_extractor: one for actor and critic, or one each.
        normalize_images: divide image observations by 255.
        optimizer_class: of all parameters.
        optimizer_kwargs: for its constructor; by default Adam's fused form with eps 1e-5.
        memory: name of the memory core, see `make_memory`.
        memory_kwargs: its settings, for "xlstm" the fields of `XLSTMConfig`.
        critic_memory: "shared" (the actor's memory, trained by both losses), "separate" (one of the same settings) or
            "none" (the critic sees the current features only).

    Raises:
        ValueError: a setting does not fit; the message names it and the remedy.
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
    ) -> None:
        if critic_memory not in ("shared", "separate", "none"):
            raise ValueError(f"critic_memory={critic_memory!r} must be 'shared', 'separate' or 'none'")
        if critic_memory == "shared" and not share_features_extractor:
            raise ValueError("a shared memory needs shared features: set critic_memory='separate' or 'none'")
        if isinstance(observation_space, spaces.Dict) and features_extractor_class is FlattenExtractor:
            raise ValueError(
                "a Dict observation needs an extractor that takes it apart: use the policy MultiInputXLSTMPolicy "
                "(MultiInputLstmPolicy), or set features_extractor_class"
            )
        self.memory, self.memory_kwargs, self.critic_memory = memory, dict(memory_kwargs or {}), critic_memory
        if optimizer_kwargs is None and optimizer_class is torch.optim.Adam:
            optimizer_kwargs = {"eps": 1e-5, "fused": True}
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
        # what sb3-contrib sees of the memory
        size = max(self.memory_actor.state_size, 0 if self.memory_critic is None else self.memory_critic.state_size)
        self.lstm_actor = PackedShape(num_layers=1, hidden_size=max(1, math.ceil(size / 2)))  # type: ignore[assignment]
        self.lstm_hidden_state_shape = (1, 1, self.lstm_actor.hidden_size)

    def _build_mlp_extractor(self) -> None:
        """Build the memories, whose width the actor and critic networks start from."""
        self.memory_actor = make_memory(self.memory, self.features_dim, **self.memory_kwargs)
        self.memory_critic: MemoryCore | None = None
        self.critic: nn.Module | None = None  # type: ignore[assignment]
        if self.critic_memory == "separate":
            self.memory_critic = make_memory(self.memory, self.features_dim, **self.memory_kwargs)
        elif self.critic_memory == "none":
            self.critic = nn.Linear(self.features_dim, self.memory_actor.output_size)
        self.mlp_extractor = MlpExtractor(
            self.memory_actor.output_size, net_arch=self.net_arch, activation_fn=self.activation_fn, device=self.device
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = ActorCriticPolicy._get_constructor_parameters(self)
        return parameters | {
            "memory": self.memory,
            "memory_kwargs": self.memory_kwargs,
            "critic_memory": self.critic_memory,
            "share_features_extractor": self.share_features_extractor,
        }

    def save(self, path: str) -> None:
        """Write the policy, without its optimiser, to a zip of JSON and safetensors at `path` or in a binary file."""
        save_policy(self, path)

    @classmethod
    def load(cls, path: str, device: torch.device | str = "auto", custom_objects: dict[str, Any] | None = None) -> Self:
        """Read a policy that `save` wrote. Nothing in the file is executed.

        Args:
            path: of the file, or a binary file.
            device: where to put the policy.
            custom_objects: constructor arguments to take instead of the stored ones, such as a
                `features_extractor_class` of your own.

        Raises:
            CheckpointError: the file is torn, foreign or wrong, or a class is missing; the message names the file,
                what is wrong and the remedy.
        """
        return load_policy(cls, path, device, custom_objects or {})

    # The contract of RecurrentPPO here: trees of states, [B, T] sequences.

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
    ) -> StepResult:
        """Choose actions for one step of every environment.

        Args:
            obs: [n_envs, ...] or a dict of those.
            state: memory state before the step.
            reset: bool [n_envs], true where `obs` is the first of an episode.
            deterministic: the mode instead of a sample.
            action_masks: bool [n_envs, ...], true where an action is allowed; None: all are.
        """
        latent_pi, latent_vf, state = self._latents(obs, state, reset)
        values = self.value_net(latent_vf).squeeze(-1)
        if isinstance(self.action_dist, CategoricalDistribution):
            actions, log_prob = _sample_categorical(self.action_net(latent_pi), deterministic, action_masks)
            return StepResult(actions, values, log_prob, state)
        distribution = self._distribution(latent_pi, action_masks)
        actions = distribution.get_actions(deterministic=deterministic)
        log_prob = distribution.log_prob(actions)
        return StepResult(actions.reshape(-1, *(self.action_space.shape or ())), values, log_prob, state)

    def value(self, obs: Any, state: PolicyState, reset: Tensor) -> Tensor:
        """Value [n_envs] of observations [n_envs, ...], without acting."""
        features = BasePolicy.extract_features(self, obs, self.vf_features_extractor)
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
        latent_pi, latent_vf, _ = self._latents(obs, state, reset)
        values = self.value_net(latent_vf).view(reset.shape)
        actions = actions.flatten(0, 1)
        masks = None if action_masks is None else action_masks.flatten(0, 1)
        if isinstance(self.action_dist, CategoricalDistribution):
            log_probs = F.log_softmax(mask_logits(self.action_net(latent_pi), masks), dim=-1)
            log_prob = log_probs.gather(-1, actions.view(-1, 1)).view(reset.shape)
            return Evaluation(values, log_prob, -(log_probs.exp() * log_probs).sum(-1).view(reset.shape))
        distribution = self._distribution(latent_pi, masks)
        log_prob = distribution.log_prob(_as_sampled(actions, self.action_space)).view(reset.shape)
        entropy = distribution.entropy()
        return Evaluation(values, log_prob, None if entropy is None else entropy.view(reset.shape))

    def advance(self, obs: Any, state: PolicyState, reset: Tensor) -> PolicyState:
        """Memory state after a sequence: obs [B, T, ...], reset bool [B, T]."""
        return self._latents(obs, state, reset, heads=False)[2]

    def _distribution(self, latent_pi: Tensor, action_masks: Tensor | None) -> Distribution:
        if action_masks is None:
            return self._get_action_dist_from_latent(latent_pi)
        return masked_distribution(self.action_space, self.action_net(latent_pi), action_masks)

    def _latents(
        self, obs: Any, state: PolicyState, reset: Tensor, *, heads: bool = True
    ) -> tuple[Tensor, Tensor, PolicyState]:
        """Inputs of the action and value heads, flat over [B, T], for a step (reset [B]) or a sequence ([B, T])."""
        sequence = reset.ndim == 2
        if sequence:
            obs = {key: part.flatten(0, 1) for key, part in obs.items()} if isinstance(obs, dict) else obs.flatten(0, 1)
        features = self.extract_features(obs)
        pi_features, vf_features = (features, features) if isinstance(features, Tensor) else features
        latent_pi, actor_state = _run(self.memory_actor, pi_features, state.actor, reset)
        critic_state = state.critic
        if self.memory_critic is not None:
            latent_vf, critic_state = _run(self.memory_critic, vf_features, state.critic, reset)
        else:
            latent_vf = latent_pi if self.critic is None else self.critic(vf_features)
        state = PolicyState(actor_state, critic_state)
        if not heads:
            return latent_pi, latent_vf, state
        return self.mlp_extractor.forward_actor(latent_pi), self.mlp_extractor.forward_critic(latent_vf), state

    # The contract of sb3_contrib.RecurrentPPO: (h, c) pairs, flat sequences.

    def _pack(self, state: Any) -> StatePair:
        """State with leaves [N, ...] -> two tensors [1, N, hidden_size]."""
        flat = pack(state)
        flat = F.pad(flat, (0, 2 * self.lstm_actor.hidden_size - flat.shape[1])).unsqueeze(0)
        return flat[..., : self.lstm_actor.hidden_size], flat[..., self.lstm_actor.hidden_size :]

    def _unpack(self, pair: StatePair, core: MemoryCore) -> Any:
        flat = torch.cat(pair, dim=-1).squeeze(0)[:, : core.state_size]
        return unpack(flat, like=core.initial_state(1))

    def _from_pairs(self, pairs: RNNStates) -> PolicyState:
        critic = () if self.memory_critic is None else self._unpack(pairs.vf, self.memory_critic)
        return PolicyState(self._unpack(pairs.pi, self.memory_actor), critic)

    def _to_pairs(self, state: PolicyState) -> RNNStates:
        actor = self._pack(state.actor)
        # a shared memory must reach predict_values, which is handed the critic's pair
        return RNNStates(actor, actor if self.memory_critic is None else self._pack(state.critic))

    def forward(  # type: ignore[override]
        self, obs: Any, lstm_states: RNNStates, episode_starts: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, RNNStates]:
        """One step for sb3-contrib: actions, values [N, 1], log_prob [N], states."""
        step = self.act(obs, self._from_pairs(lstm_states), episode_starts > 0.5, deterministic=deterministic)
        actions = step.actions.reshape((-1, *(self.action_space.shape or ())))
        return actions, step.values.unsqueeze(-1), step.log_prob, self._to_pairs(step.state)

    def get_distribution(  # type: ignore[override]
        self, obs: Any, lstm_states: StatePair, episode_starts: Tensor, action_masks: Tensor | None = None
    ) -> tuple[Distribution, StatePair]:
        """Action distribution of one step (over allowed actions) and the actor's next state, as pairs."""
        features = BasePolicy.extract_features(self, obs, self.pi_features_extractor)
        state = self._unpack(lstm_states, self.memory_actor)
        latent, state = self.memory_actor.step(features, state, episode_starts > 0.5)
        return self._distribution(self.mlp_extractor.forward_actor(latent), action_masks), self._pack(state)

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Choose actions as the environment takes them, and remember.

        Args:
            observation: of one environment, or [n_envs, ...]; an array or a dict of those.
            state: as the last call returned it; None where every environment starts.
            episode_start: bool [n_envs], true where the observation is the first of an episode; None: nowhere.
            deterministic: the mode instead of a sample.
            action_masks: bool [n_envs, ...], true where an action is allowed, as `MaskablePPO` takes them; None: all.

        Returns:
            Actions, in bounds, and the state for the next call: two arrays [1, n_envs, hidden_size].

        Raises:
            ValueError: the observation or a mask does not fit its space, or a mask forbids everything.
        """
        self.set_training_mode(False)
        obs, vectorized = self.obs_to_tensor(observation)
        n_envs = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        start = torch.zeros(n_envs) if episode_start is None else torch.as_tensor(episode_start)
        if state is None:
            if episode_start is not None and not bool(start.all()):
                warnings.warn(
                    "predict got state=None for episodes that go on, whose memory is lost: hand over the state that "
                    "the last call returned",
                    stacklevel=3,
                )
            state = (np.zeros((1, n_envs, self.lstm_actor.hidden_size)),) * 2
        pair = tuple(torch.as_tensor(part, dtype=torch.float32, device=self.device) for part in state)
        masks = None
        if action_masks is not None:
            masks = torch.as_tensor(check_masks(action_masks, self.action_space, n_envs), device=self.device)
        with torch.no_grad():
            starts = start.to(self.device, torch.float32)
            distribution, pair = self.get_distribution(obs, pair, starts, masks)
            chosen = distribution.get_actions(deterministic=deterministic)
        actions = self.to_env_actions(chosen.cpu().numpy().reshape(-1, *(self.action_space.shape or ())))
        return actions if vectorized else actions.squeeze(axis=0), tuple(part.cpu().numpy() for part in pair)

    def to_env_actions(self, actions: np.ndarray) -> np.ndarray:
        """Actions [n_envs, ...] as the environment wants them: in bounds and in its dtype."""
        space = self.action_space
        if isinstance(space, spaces.Box):
            if self.squash_output:
                return np.asarray(self.unscale_action(actions))
            return np.asarray(np.clip(actions, space.low, space.high))
        return np.asarray(actions, dtype=space.dtype)

    def predict_values(self, obs: Any, lstm_states: StatePair, episode_starts: Tensor) -> Tensor:  # type: ignore[override]
        """Value [N, 1] of observations for sb3-contrib."""
        state = self._from_pairs(RNNStates(lstm_states, lstm_states))
        return self.value(obs, state, episode_starts > 0.5).unsqueeze(-1)

    def evaluate_actions(  # type: ignore[override]
        self, obs: Any, actions: Tensor, lstm_states: RNNStates, episode_starts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values [N, 1], log_prob [N] and entropy [N] of flat, env-major sequences of equal (padded) length."""
        rows = lstm_states.pi[0].shape[1]

        def sequences(part: Tensor) -> Tensor:
            return part.reshape(rows, -1, *part.shape[1:])

        obs = {key: sequences(part) for key, part in obs.items()} if isinstance(obs, dict) else sequences(obs)
        reset = sequences(episode_starts) > 0.5
        result = self.evaluate_sequence(obs, sequences(actions), self._from_pairs(lstm_states), reset)
        entropy = None if result.entropy is None else result.entropy.flatten()
        return result.values.view(-1, 1), result.log_prob.flatten(), entropy


class CnnXLSTMPolicy(XLSTMPolicy):
    """`XLSTMPolicy` for image observations: the features extractor is `NatureCNN` unless given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", NatureCNN)
        super().__init__(*args, **kwargs)


class MultiInputXLSTMPolicy(XLSTMPolicy):
    """`XLSTMPolicy` for Dict observations: the features extractor is `CombinedExtractor` unless given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", CombinedExtractor)
        super().__init__(*args, **kwargs)


def _run(core: MemoryCore, features: Tensor, state: Any, reset: Tensor) -> tuple[Tensor, Any]:
    """Run a memory on flat features [B * T, F]: one step if reset is [B], a sequence if it is [B, T]."""
    if reset.ndim == 1:
        return core.step(features, state, reset)
    y, state = core(features.view(*reset.shape, -1), state, reset)
    return y.flatten(0, 1), state


def _sample_categorical(logits: Tensor, deterministic: bool, masks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Action [N] and its log-probability [N] by the Gumbel-max trick, many times faster than multinomial on CPU."""
    log_probs = F.log_softmax(mask_logits(logits, masks), dim=-1)
    noisy = log_probs if deterministic else log_probs - torch.empty_like(log_probs).exponential_().log_()
    if masks is not None:
        # whatever the noise is
        noisy = noisy.masked_fill(~masks, -math.inf)
    actions = noisy.argmax(dim=-1)
    return actions, log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def _as_sampled(actions: Tensor, space: spaces.Space[Any]) -> Tensor:
    """Actions [N, ...] as distributions draw them: Box actions flat, bits as floats."""
    if isinstance(space, spaces.Box):
        return actions.reshape(len(actions), -1)
    return actions.float() if isinstance(space, spaces.MultiBinary) else actions
