"""On-policy training of policies with memory: rollouts that carry it, and the step of the optimiser."""

from __future__ import annotations

import copy
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import check_for_correct_spaces, set_random_seed
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from xlstm_rl.agents.actor_critic import PolicyState, as_tensors, value_of_cut_episodes
from xlstm_rl.agents.features import check_spaces
from xlstm_rl.agents.heads import masks_actions, read_masks
from xlstm_rl.agents.losses import clip_gradients
from xlstm_rl.agents.parallel import Moments, ranks
from xlstm_rl.agents.policy import (
    CnnLSTMPolicy,
    CnnXLSTMPolicy,
    LSTMPolicy,
    MultiInputLSTMPolicy,
    MultiInputXLSTMPolicy,
    XLSTMPolicy,
    check_policy_kwargs,
)
from xlstm_rl.agents.rollout import ChunkedRolloutBuffer
from xlstm_rl.agents.saving import SavedAlgorithm
from xlstm_rl.agents.training_state import mark_point, normalizer_statistics, restore_statistics
from xlstm_rl.memory.config import check_number, check_whole
from xlstm_rl.vec_envs.env_contract import (
    as_env_takes,
    check_first_observations,
    check_step,
    checked_observations,
    episode_record,
    reset_envs,
    rewards_without_skipped,
    seed_envs,
    skipped_steps,
    step_envs,
)
from xlstm_rl.vec_envs.guarded_vec_env import GuardedDummyVecEnv, guard
from xlstm_rl.vec_envs.gymnasium_vector import GymnasiumVecEnv

if TYPE_CHECKING:
    from typing_extensions import Self

# Attempts at first observations without NaN.
RESETS = 10
# Among the parts of a loss that are summed over ranks: how many of them are asked to stop.
_STOPPING = "stopping"


class UpdateBrokenOffError(Exception):
    """Ends an update between two minibatches; `learn` undoes what was done of it."""


class RecurrentOnPolicyAlgorithm(SavedAlgorithm):
    """What on-policy algorithms for policies with memory share; a subclass says in `train` what it makes of a rollout.

    `collect_rollouts` fills a `ChunkedRolloutBuffer`, every environment's memory state carried from step to step and
    rollout to rollout; `gradient_step` is the one place where weights change. `RecurrentPPO` is the example.

    Args:
        policy: name among `policy_aliases`, or an `XLSTMPolicy` class.
        env: environment, vector environment of Stable-Baselines3 or gymnasium, or id.
        learning_rate: a number, or a function of the remaining progress from 1 to 0.
        n_steps: steps per environment and rollout.
        seq_len: steps of a training sequence (how far gradients reach back); None: the whole rollout.
        grad_spike_factor: see `clip_gradients`; None for no such bound.
        use_masking: choose among the actions that the `action_masks()` of the environment allow; None: where it has
            that method.
        on_nonfinite: what NaN or infinity does: "stop" raises FloatingPointError, "skip" warns and skips what they
            touch.
        rollout_buffer_class: a `ChunkedRolloutBuffer` class.
        _init_setup_model: build the networks now.
        **kwargs: of `OnPolicyAlgorithm` of Stable-Baselines3.

    Raises:
        TypeError: a setting is of the wrong kind, or `policy_kwargs` hold what the policy does not know.
        ValueError: a setting does not fit; the message names it and the remedy.
    """

    stop_requested: Callable[[], bool] | None = None
    """Asked between the minibatches of an update, if set: where it says so, the update is undone and training ends, as
    where a callback ends it. The rollout counts as not collected for `save_checkpoint`."""
    policy: XLSTMPolicy
    rollout_buffer: ChunkedRolloutBuffer  # type: ignore[assignment]
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpXLSTMPolicy": XLSTMPolicy,
        "CnnXLSTMPolicy": CnnXLSTMPolicy,
        "MultiInputXLSTMPolicy": MultiInputXLSTMPolicy,
        "MlpLstmPolicy": LSTMPolicy,
        "CnnLstmPolicy": CnnLSTMPolicy,
        "MultiInputLstmPolicy": MultiInputLSTMPolicy,
    }

    def __init__(
        self,
        policy: str | type[XLSTMPolicy],
        env: GymEnv | VectorEnv[Any, Any, Any] | str,
        learning_rate: float | Schedule,
        n_steps: int,
        *,
        seq_len: int | None = None,
        grad_spike_factor: float | None = None,
        use_masking: bool | None = None,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        rollout_buffer_class: type[ChunkedRolloutBuffer] | None = None,
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=n_steps,
            rollout_buffer_class=rollout_buffer_class,  # type: ignore[arg-type]
            _init_setup_model=False,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
            **kwargs,
        )
        self.seq_len = seq_len
        self.grad_spike_factor = grad_spike_factor
        self.use_masking = use_masking
        self.on_nonfinite = on_nonfinite
        self._gradient_norm: float | None = None
        self._last_state: PolicyState | None = None
        # of the updates of one call of `learn`, whether its rate was 0 throughout
        self._largest_rate, self.idle = 0.0, False
        # calls of `learn` in a row whose rate was 0 throughout
        self._idle_calls = 0
        self.ranks = ranks()
        self._moments: list[Moments] = []
        self._before_update: Callable[[], None] | None = None
        self._callback: BaseCallback | None = None
        self._ended_episodes: list[dict[str, Any]] = []
        # infos of the episodes that ended on the other ranks in the last rollout
        self.episodes_elsewhere: list[dict[str, Any]] = []
        # of all ranks, as `learn` finds them
        self._all_envs = 1
        self.check_settings()
        if _init_setup_model:
            self._setup_model()

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            *("_largest_rate", "idle", "_idle_calls", "ranks", "_all_envs", "_moments"),
            *("_ended_episodes", "episodes_elsewhere", "_steps_before", "_agreed"),
            *("stop_requested", "_before_update", "_callback"),
        ]

    def check_settings(self) -> None:
        """Refuse settings that do not fit; see the constructor."""
        check_whole("n_steps", self.n_steps, 1)
        if self.seq_len is not None:
            check_whole("seq_len", self.seq_len, 1)
            if self.seq_len > self.n_steps:
                raise ValueError(f"seq_len={self.seq_len} must be between 1 and n_steps={self.n_steps}, or None")
        for name in ("gamma", "gae_lambda"):
            check_number(name, getattr(self, name), least=0, most=1)
        check_number("vf_coef", self.vf_coef, least=0)
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be above 0; float('inf') is no bound")
        if self.grad_spike_factor is not None and self.grad_spike_factor <= 1:
            raise ValueError(f"grad_spike_factor={self.grad_spike_factor} must be above 1, or None for no bound")
        if self.on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite={self.on_nonfinite!r} must be 'stop' or 'skip'")

    @property
    def chunk_length(self) -> int:
        """Steps of a training sequence: `seq_len`, or what stands for None."""
        return self.seq_len or self.n_steps

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name not in self.policy_aliases:
            raise ValueError(f"policy {policy_name!r} is unknown; known are {list(self.policy_aliases)}")
        return self.policy_aliases[policy_name]

    def _setup_model(self) -> None:
        check_policy_kwargs(self.policy_class, self.policy_kwargs)
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self._setup_rollout_buffer()
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule, use_sde=self.use_sde, **self.policy_kwargs
        )
        if not isinstance(self.policy, XLSTMPolicy):
            raise ValueError(
                f"policy {type(self.policy).__name__} has no memory core: use one of {sorted(self.policy_aliases)} "
                "or a subclass of xlstm_rl.XLSTMPolicy"
            )
        self.policy = self.policy.to(self.device)
        self._last_state = self.policy.initial_state(self.n_envs)
        if self.ranks.world_size > 1 and self.seed is not None:
            # the same weights on all ranks, but each its own random numbers and its own episodes
            torch.manual_seed(int(np.random.SeedSequence((self.seed, self.ranks.rank)).generate_state(1)[0]))
            if self.env is not None:
                seed_envs(self.env, self.seed + self.ranks.rank * self.n_envs)

    def _setup_rollout_buffer(self) -> None:
        buffer_class: Any = self.rollout_buffer_class or ChunkedRolloutBuffer
        if not issubclass(buffer_class, ChunkedRolloutBuffer):
            raise ValueError(f"rollout_buffer_class {buffer_class.__name__} must subclass ChunkedRolloutBuffer")
        self.rollout_buffer = buffer_class(
            self.n_steps,
            self.observation_space,
            self.action_space,
            device=self.device,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            n_envs=self.n_envs,
            seq_len=self.chunk_length,
            **self.rollout_buffer_kwargs,
        )

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if isinstance(env, VectorEnv):
            check_spaces(env.single_observation_space, env.single_action_space)
            return SavedAlgorithm._wrap_env(GymnasiumVecEnv(env), verbose, monitor_wrapper)
        check_spaces(env.observation_space, env.action_space)
        if isinstance(env, gymnasium.Env):
            one = Monitor(env) if monitor_wrapper and not is_wrapped(env, Monitor) else env
            env = GuardedDummyVecEnv([lambda: one])
        return SavedAlgorithm._wrap_env(guard(env) if isinstance(env, VecEnv) else env, verbose, monitor_wrapper)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Use another environment from the next `learn` on, with as many or other numbers of copies."""
        env = self._wrap_env(env, self.verbose)
        if not force_reset and env.num_envs != self.n_envs:
            raise ValueError(
                f"force_reset=False goes on with the {self.n_envs} running episodes, but env has {env.num_envs} "
                "copies: set force_reset=True"
            )
        check_for_correct_spaces(env, self.observation_space, self.action_space)
        self._rollout_start = None
        # the parent class wants as many as before
        self.n_envs = env.num_envs
        super().set_env(env, force_reset)
        if getattr(self, "policy", None) is not None and self.rollout_buffer.n_envs != self.n_envs:
            self._setup_rollout_buffer()
            self._last_state = self.policy.initial_state(self.n_envs)

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed Python, NumPy, torch, the action space and the environments; None: nothing."""
        if seed is None:
            return
        set_random_seed(seed, using_cuda=self.device.type == "cuda")
        self.action_space.seed(seed)
        if self.env is not None:
            seed_envs(self.env, seed)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        self._rollout_start = None
        if self.rollout_buffer.buffer_size == self.n_steps and self.rollout_buffer.seq_len != self.chunk_length:
            # another length was set since the buffer was made
            self.check_settings()
            self._setup_rollout_buffer()
        fresh = self._last_obs is None
        before = self._read_statistics()
        self._all_envs = sum(self.ranks.gather(self.n_envs))
        self.ranks.broadcast_weights(self.policy)
        # before the first reset, which counts observations in: here they are equal on all ranks
        self._moments = self._running_moments()
        result = super()._setup_learn(*args, **kwargs)
        self._callback = result[1]
        assert self.env is not None and self._last_obs is not None, "the parent class has reset it"
        self._last_obs = checked_observations(self.env, self._last_obs, "on reset")
        if fresh or self._last_state is None:
            self._last_state = self.policy.initial_state(self.n_envs)
        if self.on_nonfinite == "skip":
            self._mend_first_observations(before)
        return result

    def collect_rollouts(  # type: ignore[override]
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: ChunkedRolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Act for `n_rollout_steps` steps in every environment and fill the buffer.

        A rollout with NaN or infinity in it is dropped where `on_nonfinite` says so; `train` finds the buffer empty.

        Returns:
            False if the callback stopped training.

        Raises:
            ValueError: the buffer is made for another number of steps.
            FloatingPointError: NaN or infinity; names the quantity, the environment and the step.
        """
        if n_rollout_steps != rollout_buffer.buffer_size:
            raise ValueError(
                f"n_steps={n_rollout_steps} was set after the rollout buffer was made for {rollout_buffer.buffer_size} "
                "steps: give n_steps to the constructor, or save the agent and load(path, env, n_steps=...)"
            )
        # settings may have changed since the buffer was made
        rollout_buffer.gamma, rollout_buffer.gae_lambda = self.gamma, self.gae_lambda
        statistics = self._read_statistics()
        self._steps_before, self._agreed = self.num_timesteps, False
        try:
            return self._collect(env, callback, rollout_buffer)
        except FloatingPointError as error:
            if self.on_nonfinite == "stop":
                self._last_obs = None
                raise FloatingPointError(
                    f"{error}; mend what it comes from, or drop such rollouts with on_nonfinite='skip'"
                ) from error
            warnings.warn(f"{error}; the rollout is dropped, all environments start new episodes", stacklevel=2)
            rollout_buffer.reset()
            self._rollout_start = None
            self._begin_finite_episodes(statistics)
            return self._agreed or self._agree(True)
        except BaseException:
            # the memory may have seen an observation that the next `learn` would show it again
            self._last_obs = None
            raise

    def _agree(self, goes_on: bool) -> bool:
        """Once per rollout, whatever its end: whether all ranks go on; counts the steps that all have done."""
        self._agreed = True
        if self.ranks.world_size == 1:
            return goes_on
        own = (self.num_timesteps - self._steps_before) // self._all_envs * self.n_envs
        told = self.ranks.gather((goes_on, own, self._ended_episodes))
        self.num_timesteps = self._steps_before + sum(steps for _, steps, _ in told)
        others = [infos for rank, (_, _, infos) in enumerate(told) if rank != self.ranks.rank]
        self.episodes_elsewhere = [info for infos in others for info in infos]
        super()._update_info_buffer(self.episodes_elsewhere)
        return all(each for each, _, _ in told)

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        kept = ("episode", "is_success")
        # without what else an environment calls "episode"
        told = [
            {name: info[name] for name in kept if name in info and (name != "episode" or episode_record(info))}
            for info in infos
        ]
        if self.ranks.world_size > 1:
            self._ended_episodes += [info for info in told if "episode" in info]
        super()._update_info_buffer(told, dones)

    def _running_moments(self) -> list[Moments]:
        """Of the running normalisation, if there is any."""
        normalizer = self.get_vec_normalize_env()
        if self.ranks.world_size == 1 or normalizer is None:
            return []
        observed = getattr(normalizer, "obs_rms", None)
        parts = [*observed.values()] if isinstance(observed, dict) else [] if observed is None else [observed]
        return [Moments(running) for running in (normalizer.ret_rms, *parts)]

    def _collect(self, env: VecEnv, callback: BaseCallback, rollout_buffer: ChunkedRolloutBuffer) -> bool:
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        # before callbacks, which may evaluate with them, and before the point from which a resumed run goes on
        for moments in self._moments:
            moments.merge(self.ranks)
        self._ended_episodes = []
        callback.on_rollout_start()
        if self._last_obs is None:
            # a callback has evaluated in these environments
            self._begin_episodes()
        assert self._last_obs is not None and self._last_state is not None, "learn() sets them"
        self._rollout_start = mark_point(self)
        # what the end of the rollout writes
        pending = _pending(self.logger)
        seconds: dict[str, float] = defaultdict(float)
        check_first_observations(env, self._last_obs)
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)
        state = self._last_state
        masked, masks, action_masks = masks_actions(env, self.action_space, self.use_masking), None, None
        self.policy.trained_with_masks = self.policy.trained_with_masks or masked
        for n_steps in range(rollout_buffer.buffer_size):
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self.policy.reset_noise(env.num_envs)
            rollout_buffer.add_state(state)
            obs_tensor = as_tensors(self._last_obs, self.device)
            if masked:
                action_masks = read_masks(env, self.action_space)
                masks = torch.as_tensor(action_masks, device=self.device)
            begun = time.perf_counter()
            with torch.inference_mode():
                episode_starts = torch.as_tensor(self._last_episode_starts, dtype=torch.bool, device=self.device)
                step = self.policy.act(obs_tensor, state, episode_starts, action_masks=masks, reuse_state=True)
            state, values, log_probs = step.state, step.values.cpu().numpy(), step.log_prob.cpu().numpy()
            actions = step.actions.cpu().numpy()
            clipped_actions = as_env_takes(self.policy.to_env_actions(actions), self._last_obs)
            place = f"in step {n_steps} of the rollout ({self.num_timesteps + self._all_envs} steps into the run)"
            acted = time.perf_counter()
            new_obs, rewards, dones, infos = step_envs(env, clipped_actions, place)
            seconds["act"] += acted - begun
            seconds["env"] += time.perf_counter() - acted
            # as if all ranks were equally far; what they have really done is counted at the end of the rollout
            self.num_timesteps += self._all_envs
            check_step(env, new_obs, rewards, infos, place)
            skipped = skipped_steps(infos)
            rewards = rewards_without_skipped(rewards, values, skipped)
            last_obs, starts = self._last_obs, self._last_episode_starts
            # before callbacks, which may save the agent or end training: the memory has been written over already
            self._last_obs, self._last_episode_starts, self._last_state = new_obs, dones, state
            callback.update_locals(locals())
            if not callback.on_step():
                self._agree(False)
                return False
            self._update_info_buffer(infos, dones)
            rollout_buffer.add(last_obs, actions, rewards, starts, values, log_probs, action_masks)  # type: ignore[arg-type]
            truncation = value_of_cut_episodes(self.policy, dones, infos, state)
            rollout_buffer.add_outcome(dones, truncation.mask, truncation.values, skipped)
        with torch.inference_mode():
            episode_starts = torch.as_tensor(dones, dtype=torch.bool, device=self.device)
            last_values = self.policy.value(as_tensors(new_obs, self.device), state, episode_starts)
        rollout_buffer.check_finite()
        rollout_buffer.compute_returns_and_advantage(last_values.cpu().numpy())
        if not self._agree(True):
            return False
        self._before_update = None if self.stop_requested is None else self._undoing_update(pending)
        self._rollout_start = None
        for name, spent in seconds.items():
            self.logger.record(f"time/{name}_seconds", spent)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _update_learning_rate(self, optimizers: list[torch.optim.Optimizer] | torch.optim.Optimizer) -> None:
        """Set the scheduled rate; groups of an optimiser, where there are several, keep the ratios of theirs."""
        rate = self.lr_schedule(self._current_progress_remaining)
        self.logger.record("train/learning_rate", rate)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            schedule_rates(optimizer, rate, self.lr_schedule(1.0))

    def compute_gradients(self, loss: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of a loss, summed over the processes of a data parallel training; the only place for both.

        Args:
            loss: scalar, a sum over steps whose weights count the steps of all processes.
            parts: scalars to be summed as well, such as those of the loss.

        Returns:
            The parts of all processes together, without gradients.

        Raises:
            UpdateBrokenOffError: `stop_requested` says so, on any of the processes.
        """
        self.policy.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        named = {name: part.detach() for name, part in parts.items()}
        stopping = self.stop_requested is not None and self.stop_requested()
        if self.ranks.world_size > 1:
            named[_STOPPING] = loss.new_tensor(float(stopping))
        summed = self.ranks.sum_gradients(self.policy.parameters(), named)
        if summed.pop(_STOPPING, stopping):
            raise UpdateBrokenOffError
        return summed

    def gradient_step(self, explain: Callable[[FloatingPointError], str]) -> bool:
        """One step of the optimiser along the gradients; the only place where weights change.

        Args:
            explain: says what is wrong where the gradient is NaN or infinite.

        Returns:
            Whether the step was done; a gradient that is not finite is skipped where `on_nonfinite` says so.

        Raises:
            FloatingPointError: the gradient is not finite.
        """
        try:
            self._gradient_norm = clip_gradients(
                self.policy.parameters(),
                max_norm=self.max_grad_norm,
                spike_factor=self.grad_spike_factor,
                running_norm=self._gradient_norm,
            )
        except FloatingPointError as error:
            explained = explain(error)
            if self.on_nonfinite == "stop":
                raise FloatingPointError(explained) from error
            warnings.warn(f"{explained}; this update is skipped", stacklevel=2)
            return False
        self.policy.optimizer.step()
        self._largest_rate = max(self._largest_rate, *(group["lr"] for group in self.policy.optimizer.param_groups))
        return True

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Choose actions; see `XLSTMPolicy.predict`."""
        return self.policy.predict(observation, state, episode_start, deterministic, action_masks)

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "RecurrentPPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train for `total_timesteps` environment steps, rounded up to whole rollouts."""
        updates, self._largest_rate = self._n_updates, 0.0
        with self.ranks.explaining():
            try:
                super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
            except UpdateBrokenOffError:
                assert self._before_update is not None and self._callback is not None, "a rollout came before"
                self._before_update()
                self._callback.on_training_end()
            self._before_update = None
            for moments in self._moments:
                moments.merge(self.ranks)
        self.idle = self._n_updates > updates and self._largest_rate == 0
        if self._n_updates > updates:
            self._idle_calls = self._idle_calls + 1 if self.idle else 0
        # the last rollout of a run that is resumed or made longer may have a rate of 0; a second call in a row may not
        if self._idle_calls > 1 - reset_num_timesteps:
            warnings.warn(
                "the learning rate was 0 in every update of this call of learn, so no weight has changed: schedules of "
                "Stable-Baselines3 end with each call, and one that falls to 0 leaves a call of one rollout nothing; "
                "give a constant learning_rate where learn is called again and again",
                stacklevel=2,
            )
        # a rollout that a callback broke off is over once all callbacks have seen the end
        self._rollout_start = None
        return self

    def _undoing_update(self, pending: dict[str, Any]) -> Callable[[], None]:
        """What brings the agent back to before the rollout that has just been collected.

        Args:
            pending: numbers that waited to be written then.
        """
        start, optimizer = self._rollout_start, self.policy.optimizer
        weights, moments = _cloned(self.policy.state_dict()), _cloned(optimizer.state_dict())
        left = {"_logger", *self._excluded_save_params()}
        names = [name for name in vars(self) if name not in left and not name.startswith("_last_")]
        attributes = copy.deepcopy({name: vars(self)[name] for name in names})

        def undo() -> None:
            self.policy.load_state_dict(weights)
            optimizer.load_state_dict(moments)
            vars(self).update(attributes)
            vars(self.logger).update(pending)
            self._rollout_start = start

        return undo

    def _begin_episodes(self) -> None:
        """All environments begin new episodes, with empty memories."""
        assert self.env is not None, "learn() has refused to go without one"
        self._last_obs = reset_envs(self.env)
        self._last_episode_starts = np.ones(self.n_envs, bool)
        self._last_state = self.policy.initial_state(self.n_envs)

    def _read_statistics(self) -> dict[str, Any] | None:
        """Running statistics of the environment, to bring back what NaN has spoilt; None where not needed."""
        normalizer = self.get_vec_normalize_env()
        return None if normalizer is None or self.on_nonfinite == "stop" else normalizer_statistics(normalizer)

    def _mend_first_observations(self, statistics: dict[str, Any] | None) -> None:
        """Begin other episodes if the first observations have NaN or infinity in them.

        Args:
            statistics: what `_read_statistics` gave before the environment was reset.

        Raises:
            FloatingPointError: all resets give such.
        """
        assert self.env is not None, "a model about to learn has one"
        try:
            check_first_observations(self.env, self._last_obs)
        except FloatingPointError as error:
            warnings.warn(f"{error}; all environments start other episodes", stacklevel=4)
            self._begin_finite_episodes(statistics)

    def _begin_finite_episodes(self, statistics: dict[str, Any] | None) -> None:
        assert self.env is not None, "a rollout was collected from it"
        normalizer = self.get_vec_normalize_env()
        for attempt in range(RESETS):
            if normalizer is not None and statistics is not None:
                restore_statistics(normalizer, statistics)
            self._begin_episodes()
            try:
                return check_first_observations(self.env, self._last_obs)
            except FloatingPointError as error:
                if attempt == RESETS - 1:
                    self._last_obs = None
                    raise FloatingPointError(
                        f"{error}, after {RESETS} resets in a row: mend the environment"
                    ) from error


def schedule_rates(optimizer: torch.optim.Optimizer, rate: float, first: float) -> None:
    """Set the learning rate of every group to `rate` times its ratio, which is kept in the group and saved with it.

    Args:
        optimizer: one with a single group gets `rate`, as in Stable-Baselines3.
        rate: of the schedule now.
        first: rate of the schedule at its start, against which rates count that were there before.
    """
    groups = optimizer.param_groups
    first = first or max(float(group["lr"]) for group in groups) or 1.0
    for group in groups:
        if len(groups) == 1:
            group["lr"] = rate
            continue
        # a rate that was not set here is somebody's choice
        if "lr_ratio" not in group or group["lr"] != group["lr_scheduled"]:
            group["lr_ratio"] = float(group["lr"]) / (group.get("lr_base") or first)
        group["lr"] = group["lr_scheduled"] = group["lr_ratio"] * rate
        group["lr_base"] = rate


def _cloned(values: Any) -> Any:
    """A copy of what a state_dict holds; that of `deepcopy` takes five times as long."""
    if isinstance(values, Tensor):
        return values.clone()
    if isinstance(values, dict):
        return {key: _cloned(value) for key, value in values.items()}
    return copy.deepcopy(values)


def _pending(logger: Logger) -> dict[str, Any]:
    """Copies of what a logger holds and has not written."""
    return {name: copy.copy(vars(logger)[name]) for name in ("name_to_value", "name_to_count", "name_to_excluded")}
