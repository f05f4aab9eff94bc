"""The actor-critic policy with a memory core, for `RecurrentPPO` here and for the one of sb3-contrib."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.torch_layers import NatureCNN
from torch import Tensor

from xlstm_rl.agents.actor_critic import MemoryActorCritic, PolicyState, within_bounds
from xlstm_rl.agents.features import FlatSmallImagesExtractor
from xlstm_rl.agents.heads import check_masks
from xlstm_rl.agents.saving import load_policy, save_policy
from xlstm_rl.memory import MemoryCore, map_leaves, pack, unpack
from xlstm_rl.vec_envs.env_contract import rows_of

if TYPE_CHECKING:
    from typing_extensions import Self
import inspect
from collections.abc import Mapping

from xlstm_rl.agents.actor_critic import CriticMemory

StatePair = tuple[Tensor, ...]


class PackedShape(NamedTuple):
    """How a packed state presents itself to sb3-contrib: as the (h, c) pair of an LSTM of this size."""

    num_layers: int
    hidden_size: int


class XLSTMPolicy(MemoryActorCritic):
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
        critic_memory: "shared" (the actor's memory, trained by both losses), "separate" (one of its own, with the same
            settings) or "none" (the critic sees only the current features).
        extra_losses: losses beside PPO's by name, see `register_loss`.
        actor_keys: parts of a Dict observation that the actor sees; None: all.
        critic_keys: parts that the critic sees, such as the state of a simulation that no agent in the world has
            (asymmetric actor-critic, Pinto et al. 2018); None: all. Where they differ from the actor's, each has an
            extractor of its own and the critic a memory of its own, or none; `predict` and exported policies do
            without what the critic alone sees.

    Raises:
        ValueError: a setting does not fit; the message names it and the remedy.
    """

    trained_with_masks = False
    """Whether it learnt from actions that were masked, so that without masks it may choose forbidden ones."""
    _missed_masks = False

    def _build_mlp_extractor(self) -> None:
        """Build the networks and say how sb3-contrib sees the memory."""
        super()._build_mlp_extractor()
        size = max(self.memory_actor.state_size, 0 if self.memory_critic is None else self.memory_critic.state_size)
        self.lstm_actor = PackedShape(num_layers=1, hidden_size=max(1, math.ceil(size / 2)))  # type: ignore[assignment]
        self.lstm_hidden_state_shape = (1, 1, self.lstm_actor.hidden_size)

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
        """One step for sb3-contrib: actions, values [N, 1], log_prob [N], states.

        Raises:
            ValueError: actions do not start at 0, which sb3-contrib would send all the same.
        """
        if np.any(getattr(self.action_space, "start", 0)):
            raise ValueError(
                f"actions {self.action_space} do not start at 0, and sb3_contrib.RecurrentPPO sends those from 0: use "
                "xlstm_rl.RecurrentPPO, or shift them with gymnasium.wrappers.TransformAction"
            )
        step = self.act(obs, self._from_pairs(lstm_states), episode_starts > 0.5, deterministic=deterministic)
        actions = step.actions.reshape((-1, *(self.action_space.shape or ())))
        return actions, step.values.unsqueeze(-1), step.log_prob, self._to_pairs(step.state)

    def get_distribution(  # type: ignore[override]
        self, obs: Any, lstm_states: StatePair, episode_starts: Tensor, action_masks: Tensor | None = None
    ) -> tuple[Distribution, StatePair]:
        """Action distribution of one step (over allowed actions) and the actor's next state, as pairs."""
        latent, state = self.actor_step(obs, self._unpack(lstm_states, self.memory_actor), episode_starts > 0.5)
        return self.action_distribution(latent, action_masks), self._pack(state)

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Choose actions as the environment takes them, and remember.

        Parameters may be float64 too, after `policy.double()`; gSDE then needs new noise, `policy.reset_noise()`.

        Args:
            observation: of one environment, or [n_envs, ...]; an array or a dict of those, which may lack
                `unseen_keys`.
            state: as the last call returned it; None where every environment starts.
            episode_start: bool [n_envs], or one bool for one environment, true where the observation is the first of an
                episode; None: nowhere.
            deterministic: the mode instead of a sample.
            action_masks: bool [n_envs, ...], true where an action is allowed, as `MaskablePPO` takes them; None: all,
                of which a policy that was trained with masks warns once.

        Returns:
            Actions, in bounds, and the state for the next call: two arrays [1, n_envs, hidden_size] in the dtype of the
            parameters.

        Raises:
            ValueError: the observation or a mask does not fit its space, a mask forbids everything, or state or
                episode_start are of another number of environments.
        """
        self.set_training_mode(False)
        obs, vectorized = self.obs_to_tensor(observation)
        n_envs = rows_of(obs)
        start = np.zeros(n_envs, bool) if episode_start is None else np.ravel(np.asarray(episode_start, dtype=bool))
        if len(start) != n_envs:
            raise ValueError(f"episode_start has {len(start)} flags for {n_envs} environment(s); give one for each")
        if state is None:
            if episode_start is not None and not bool(start.all()):
                warnings.warn(
                    "predict got state=None for episodes that go on, whose memory is lost: hand over the state that "
                    "the last call returned",
                    stacklevel=3,
                )
            state = (np.zeros((1, n_envs, self.lstm_actor.hidden_size)),) * 2
        shapes, fitting = [np.shape(part) for part in state], (1, n_envs, self.lstm_actor.hidden_size)
        if shapes != [fitting, fitting]:
            raise ValueError(
                f"state has the shapes {shapes}, and the memory of {n_envs} environment(s) is two arrays {fitting}: "
                "hand over what this policy returned for the same environments, or None where all of them start"
            )
        pair = tuple(torch.tensor(np.asarray(part), dtype=self.dtype, device=self.device) for part in state)
        masks = None
        if action_masks is None:
            self._warn_of_missed_masks()
        else:
            masks = torch.as_tensor(check_masks(action_masks, self.action_space, n_envs), device=self.device)
        with torch.no_grad():
            starts = torch.as_tensor(start, dtype=torch.float32, device=self.device)
            distribution, pair = self.get_distribution(obs, pair, starts, masks)
            chosen = distribution.get_actions(deterministic=deterministic)
        actions = self.to_env_actions(chosen.cpu().numpy().reshape(-1, *(self.action_space.shape or ())))
        return actions if vectorized else actions.squeeze(axis=0), tuple(part.cpu().numpy() for part in pair)

    def _warn_of_missed_masks(self) -> None:
        if self.trained_with_masks and not self._missed_masks:
            self._missed_masks = True
            warnings.warn(
                "predict got no action_masks, and the agent was trained with them: it may choose actions that are not "
                "allowed; give action_masks=get_action_masks(env) of sb3_contrib.common.maskable.utils, or let "
                "xlstm_rl.agents.MaskedModel(model, env) do so, which Stable-Baselines3's evaluate_policy takes too",
                stacklevel=4,
            )

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

        obs = map_leaves(sequences, within_bounds(obs, self.observation_space))
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
    """`XLSTMPolicy` for Dict observations: the features extractor is a `CombinedExtractor` unless given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", FlatSmallImagesExtractor)
        super().__init__(*args, **kwargs)


class LSTMPolicy(XLSTMPolicy):
    """A policy with an LSTM memory that takes the arguments of sb3-contrib's "MlpLstmPolicy".

    Args:
        *args: as for `XLSTMPolicy`.
        lstm_hidden_size: units per layer.
        n_lstm_layers: stacked layers.
        shared_lstm: one LSTM for actor and critic; unlike sb3-contrib's, it is trained by both losses.
        enable_critic_lstm: an LSTM of its own for the critic.
        lstm_kwargs: `bias` and `dropout` of `torch.nn.LSTM`.
        **kwargs: as for `XLSTMPolicy`.

    Raises:
        ValueError: both `shared_lstm` and `enable_critic_lstm` are set.
    """

    def __init__(
        self,
        *args: Any,
        lstm_hidden_size: int = 256,
        n_lstm_layers: int = 1,
        shared_lstm: bool = False,
        enable_critic_lstm: bool = True,
        lstm_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if shared_lstm and enable_critic_lstm:
            raise ValueError("shared_lstm=True needs enable_critic_lstm=False: the critic has one LSTM or the other")
        critic: CriticMemory = "shared" if shared_lstm else "separate" if enable_critic_lstm else "none"
        kwargs.setdefault("memory", "lstm")
        settings = {"hidden_size": lstm_hidden_size, "num_layers": n_lstm_layers, **(lstm_kwargs or {})}
        kwargs.setdefault("memory_kwargs", settings)
        kwargs.setdefault("critic_memory", critic)
        super().__init__(*args, **kwargs)


class CnnLSTMPolicy(LSTMPolicy):
    """`LSTMPolicy` for image observations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", NatureCNN)
        super().__init__(*args, **kwargs)


class MultiInputLSTMPolicy(LSTMPolicy):
    """`LSTMPolicy` for Dict observations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", FlatSmallImagesExtractor)
        super().__init__(*args, **kwargs)


def check_policy_kwargs(policy_class: type[Any], policy_kwargs: Mapping[str, Any]) -> None:
    """Refuse what the policy does not know.

    Raises:
        TypeError: a name is unknown; the message lists it and the known ones.
    """
    known = policy_arguments(policy_class)
    unknown = [key for key in policy_kwargs if key not in known]
    if unknown:
        raise TypeError(
            f"policy_kwargs: {policy_class.__name__} takes no {unknown}; settings of the memory go into "
            "memory_kwargs=dict(...), and those of sb3-contrib's LSTM policies fit MlpLstmPolicy, CnnLstmPolicy "
            f"and MultiInputLstmPolicy alone; known are {sorted(known)}"
        )


def policy_arguments(policy_class: type[Any]) -> set[str]:
    """Names of the settings that the constructor takes, those that it hands on to its parents included."""
    names: set[str] = set()
    for kind in policy_class.__mro__:
        if "__init__" not in vars(kind):
            continue
        parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
        named = {part.name for part in parameters if part.kind not in (part.VAR_POSITIONAL, part.VAR_KEYWORD)}
        names |= named - {"self", "observation_space", "action_space", "lr_schedule"}
        if not any(part.kind is part.VAR_KEYWORD for part in parameters):
            break
    return names
