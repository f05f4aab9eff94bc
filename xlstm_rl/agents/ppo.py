"""Recurrent PPO: the constructor, learn, predict, save and load of sb3-contrib's, trained on dense chunks."""

from __future__ import annotations

import time
import warnings
from numbers import Real
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, check_for_correct_spaces, explained_variance, obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from xlstm_rl.agents.actor_critic import PolicyState
from xlstm_rl.agents.gradient_clip import clip_gradients
from xlstm_rl.agents.gymnasium_vector import GymnasiumVecEnv
from xlstm_rl.agents.losses import AdvantageScale, PPOLoss, check_advantage_floor, ppo_loss
from xlstm_rl.agents.lstm_policy import CnnLSTMPolicy, LSTMPolicy, MultiInputLSTMPolicy
from xlstm_rl.agents.masks import masks_actions, read_masks
from xlstm_rl.agents.nonfinite import (
    check_first_observations,
    check_step,
    explain_loss,
    leaves_broken_rollouts,
    mend_first_observations,
    read_statistics,
    rewards_without_skipped,
    skipped_steps,
)
from xlstm_rl.agents.policy import CnnXLSTMPolicy, MultiInputXLSTMPolicy, XLSTMPolicy
from xlstm_rl.agents.policy_arguments import check_policy_kwargs
from xlstm_rl.agents.rollout import ChunkedRolloutBuffer, RolloutChunks, first_steps, minibatches, stack_states
from xlstm_rl.agents.saving import SavedAlgorithm
from xlstm_rl.agents.statistics import memory_statistics
from xlstm_rl.agents.stopwatch import Stopwatch
from xlstm_rl.agents.training_state import mark_point
from xlstm_rl.agents.truncation import value_of_cut_episodes
from xlstm_rl.memory import take
from xlstm_rl.memory.checks import check_number, check_whole


class RecurrentPPO(SavedAlgorithm):
    """Proximal policy optimisation for policies with memory (Schulman et al. 2017, arXiv 1707.06347).

    A drop-in replacement for `sb3_contrib.RecurrentPPO`. The rollout is cut into chunks of `seq_len` steps; a
    minibatch is a random set of whole chunks, dense, with episode starts inside that the memory honours itself.

    Args:
        policy: "MlpXLSTMPolicy", "CnnXLSTMPolicy", "MultiInputXLSTMPolicy" (or "MlpLstmPolicy" and so on, for an
            LSTM), or an `XLSTMPolicy` class.
        env: environment, vector environment of Stable-Baselines3 or gymnasium, or id.
        learning_rate: a number, or a function of the remaining progress from 1 to 0.
        n_steps: steps per environment and rollout.
        batch_size: environment steps per minibatch, made of whole chunks; None: the whole rollout.
        n_epochs: passes over a rollout.
        gamma: discount factor per step.
        gae_lambda: trade-off between bias and variance of the advantage.
        clip_range: of the probability ratio; a number or a function of the remaining progress.
        clip_range_vf: of the value, in units of return; None for no clip.
        normalize_advantage: centre and scale the advantages of each rollout.
        ent_coef: weight of the entropy bonus; a number or a function of the remaining progress.
        vf_coef: weight of the value loss.
        max_grad_norm: gradients are scaled down to this norm.
        use_sde: state dependent exploration instead of independent noise (Box actions).
        sde_sample_freq: steps between new gSDE noise; -1: once a rollout.
        target_kl: stop the update once the policy moved by 1.5 times this; None for no limit.
        stats_window_size: episodes over which logged returns are averaged.
        tensorboard_log: folder of TensorBoard events; None for none.
        policy_kwargs: for the policy, for example `dict(memory="xlstm", memory_kwargs=dict(blocks="ms"))`.
        verbose: 0 silent, 1 info, 2 debug.
        seed: of Python, NumPy, torch and the environment.
        device: "auto", "cpu", "cuda", ...
        _init_setup_model: build the networks now.
        seq_len: steps of a training sequence (how far gradients reach back); None: the whole rollout, but no more
            than `batch_size`.
        refresh_state: run the memory anew with the current weights before every epoch but the first, so that chunks
            start from fresh states and not from those of the rollout.
        advantage_floor: see `AdvantageScale`; 0 is stock PPO.
        grad_spike_factor: see `clip_gradients`; None is stock PPO.
        use_masking: choose among the actions that the `action_masks()` of the environment allow, as
            `sb3_contrib.MaskablePPO` does; None: where it has that method.
        on_nonfinite: what NaN or infinity does: "stop" raises FloatingPointError that names the quantity, environment
            and step; "skip" warns and skips what they touch, an update of a minibatch or a whole rollout, after which
            all environments start new episodes.
        rollout_buffer_class: a `ChunkedRolloutBuffer` class.
        rollout_buffer_kwargs: further arguments of its constructor.

    Raises:
        TypeError: `policy_kwargs` or `memory_kwargs` hold what the policy or the memory does not know, or a setting is
            of the wrong kind.
        ValueError: a setting does not fit; the message names it and the remedy.
    """

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
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 128,
        batch_size: int | None = 128,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float | Schedule = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        seq_len: int | None = None,
        refresh_state: bool = False,
        advantage_floor: float = 0.1,
        grad_spike_factor: float | None = 5.0,
        use_masking: bool | None = None,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        rollout_buffer_class: type[ChunkedRolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,  # type: ignore[arg-type]
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,  # type: ignore[arg-type]
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        )
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.seq_len = seq_len
        self.refresh_state = refresh_state
        self.advantage_floor = advantage_floor
        self._advantage_scale = AdvantageScale()
        self.grad_spike_factor = grad_spike_factor
        self.use_masking = use_masking
        self._gradient_norm: float | None = None
        self.on_nonfinite = on_nonfinite
        self._last_state: PolicyState | None = None
        self._check_sizes()
        if _init_setup_model:
            self._setup_model()

    def _check_sizes(self) -> None:
        for name in ("n_steps", "batch_size", "n_epochs", "seq_len"):
            if getattr(self, name) is not None or name in ("n_steps", "n_epochs"):
                check_whole(name, getattr(self, name), 1)
        for name in ("gamma", "gae_lambda"):
            check_number(name, getattr(self, name), least=0, most=1)
        check_number("vf_coef", self.vf_coef, least=0)
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be above 0; float('inf') is no bound")
        for name in ("clip_range", "clip_range_vf"):
            if isinstance(getattr(self, name), Real):
                check_number(name, getattr(self, name), above=0)
        check_advantage_floor(self.advantage_floor)
        if self.grad_spike_factor is not None and self.grad_spike_factor <= 1:
            raise ValueError(f"grad_spike_factor={self.grad_spike_factor} must be above 1, or None for no bound")
        if self.on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite={self.on_nonfinite!r} must be 'stop' or 'skip'")
        if self.seq_len is None:
            return
        if self.seq_len > self.n_steps:
            raise ValueError(f"seq_len={self.seq_len} must be between 1 and n_steps={self.n_steps}, or None")
        if self.batch_size is not None and self.seq_len > self.batch_size:
            raise ValueError(
                f"seq_len={self.seq_len} is more than batch_size={self.batch_size}, and a minibatch is made of whole "
                "chunks: raise batch_size or lower seq_len"
            )

    @property
    def chunk_length(self) -> int:
        """Steps of a training sequence: `seq_len`, or what stands for None."""
        return self.seq_len or min(self.n_steps, self.batch_size or self.n_steps)

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
        for name in ("clip_range", "clip_range_vf"):
            if getattr(self, name) is not None:
                setattr(self, name, FloatSchedule(getattr(self, name)))

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
        env = GymnasiumVecEnv(env) if isinstance(env, VectorEnv) else env
        return SavedAlgorithm._wrap_env(env, verbose, monitor_wrapper)

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

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        self._rollout_start = None
        fresh = self._last_obs is None
        before = read_statistics(self)
        result = super()._setup_learn(*args, **kwargs)
        if fresh or self._last_state is None:
            self._last_state = self.policy.initial_state(self.n_envs)
        if self.on_nonfinite == "skip":
            mend_first_observations(self, before)
        return result

    def _begin_episodes(self) -> None:
        """All environments begin new episodes, with empty memories."""
        assert self.env is not None, "learn() has refused to go without one"
        self._last_obs = self.env.reset()  # type: ignore[assignment]
        self._last_episode_starts = np.ones(self.n_envs, bool)
        self._last_state = self.policy.initial_state(self.n_envs)

    @leaves_broken_rollouts
    def collect_rollouts(  # type: ignore[override]
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: ChunkedRolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Act for `n_rollout_steps` steps in every environment and fill the buffer.

        Returns:
            False if the callback stopped training.

        Raises:
            ValueError: the buffer is made for another number of steps.
        """
        if n_rollout_steps != rollout_buffer.buffer_size:
            raise ValueError(
                f"n_steps={n_rollout_steps} was set after the rollout buffer was made for {rollout_buffer.buffer_size} "
                "steps: give n_steps to the constructor, or save the agent and load(path, env, n_steps=...)"
            )
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        callback.on_rollout_start()
        if self._last_obs is None:
            # a callback has evaluated in these environments
            self._begin_episodes()
        assert self._last_obs is not None and self._last_state is not None, "learn() sets them"
        self._rollout_start = mark_point(self)
        clock = Stopwatch()
        check_first_observations(env, self._last_obs)
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)
        state = self._last_state
        masked, masks, action_masks = masks_actions(env, self.action_space, self.use_masking), None, None
        for n_steps in range(n_rollout_steps):
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self.policy.reset_noise(env.num_envs)
            rollout_buffer.add_state(state)
            obs_tensor = obs_as_tensor(self._last_obs, self.device)  # type: ignore[arg-type]
            if masked:
                action_masks = read_masks(env, self.action_space)
                masks = torch.as_tensor(action_masks, device=self.device)
            with clock.timing("act"), torch.inference_mode():
                episode_starts = torch.as_tensor(self._last_episode_starts, dtype=torch.bool, device=self.device)
                step = self.policy.act(obs_tensor, state, episode_starts, action_masks=masks, reuse_state=True)
            state, values, log_probs = step.state, step.values.cpu().numpy(), step.log_prob.cpu().numpy()
            actions = step.actions.cpu().numpy()
            clipped_actions = self.policy.to_env_actions(actions)
            with clock.timing("env"):
                new_obs, rewards, dones, infos = env.step(clipped_actions)
            self.num_timesteps += env.num_envs
            check_step(env, new_obs, rewards, infos, step=n_steps, total=self.num_timesteps)
            rewards = rewards_without_skipped(rewards, values, infos)
            last_obs, starts = self._last_obs, self._last_episode_starts
            # before callbacks, which may save the agent or end training: the memory has been written over already
            self._last_obs, self._last_episode_starts, self._last_state = new_obs, dones, state  # type: ignore[assignment]
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
            rollout_buffer.add(last_obs, actions, rewards, starts, values, log_probs, action_masks)  # type: ignore[arg-type]
            truncation = value_of_cut_episodes(self.policy, dones, infos, state)
            rollout_buffer.add_outcome(dones, truncation.mask, truncation.values, skipped_steps(infos))
        with torch.inference_mode():
            episode_starts = torch.as_tensor(dones, dtype=torch.bool, device=self.device)
            last_values = self.policy.value(obs_as_tensor(new_obs, self.device), state, episode_starts)  # type: ignore[arg-type]
        rollout_buffer.check_finite()
        rollout_buffer.compute_returns_and_advantage(last_values.cpu().numpy())
        self._rollout_start = None
        for name, seconds in clock.seconds.items():
            self.logger.record(f"time/{name}_seconds", seconds)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def train(self) -> None:
        """Update the policy on the rollout."""
        if self.rollout_buffer.pos < self.n_steps:
            # the rollout was dropped
            return
        begun = time.perf_counter()
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        advantages = torch.from_numpy(np.ascontiguousarray(self.rollout_buffer.advantages))
        if self.normalize_advantage:
            counted = torch.from_numpy(~self.rollout_buffer.skipped)
            advantages = self._advantage_scale.normalize(advantages, floor=self.advantage_floor, counted=counted)
        chunks = self.rollout_buffer.chunks(advantages)
        parts: list[PPOLoss] = []
        keep_going, skipped = True, 0
        for epoch in range(self.n_epochs):
            if self.refresh_state and epoch > 0:
                chunks = self._refresh(chunks)
            batches = minibatches(chunks, self.batch_size or self.n_steps * self.n_envs)
            for minibatch, batch in enumerate(batches):
                loss = self._loss(batch)
                parts.append(PPOLoss(*(part.detach() for part in loss)))
                if self.target_kl is not None and loss.approx_kl > 1.5 * self.target_kl:
                    keep_going = False
                    if self.verbose >= 1:
                        print(f"Early stopping at epoch {epoch}: KL {loss.approx_kl:.3f}, target {self.target_kl}")
                    break
                skipped += not self._step(loss, f"minibatch {minibatch} of epoch {epoch}")
            self._n_updates += 1
            if not keep_going:
                break
        self._log(parts)
        assert self._last_state is not None, "a rollout leaves a state"
        if self.logger.output_formats:
            # about 2 % of the time, for somebody who reads them
            for name, value in memory_statistics(self.policy, self.rollout_buffer, chunks, self._last_state).items():
                self.logger.record(name, value)
        self.logger.record("time/train_seconds", time.perf_counter() - begun)
        if self.on_nonfinite == "skip":
            self.logger.record("train/skipped_updates", skipped)

    def _step(self, loss: PPOLoss, place: str) -> bool:
        """One step of the optimiser; whether it was done."""
        self.policy.optimizer.zero_grad()
        loss.total.backward()  # type: ignore[no-untyped-call]
        try:
            self._gradient_norm = clip_gradients(
                self.policy.parameters(),
                max_norm=self.max_grad_norm,
                spike_factor=self.grad_spike_factor,
                running_norm=self._gradient_norm,
            )
        except FloatingPointError as error:
            explained = explain_loss(loss, place, error)
            if self.on_nonfinite == "stop":
                raise FloatingPointError(explained) from error
            warnings.warn(f"{explained}; this update is skipped", stacklevel=2)
            return False
        self.policy.optimizer.step()
        return True

    def _loss(self, batch: RolloutChunks) -> PPOLoss:
        progress = self._current_progress_remaining
        result = self.policy.evaluate_sequence(
            batch.observations, batch.actions, batch.state, batch.episode_starts, batch.action_masks
        )
        return ppo_loss(
            log_prob=result.log_prob,
            old_log_prob=batch.old_log_prob,
            advantage=batch.advantages,
            value=result.values,
            old_value=batch.old_values,
            target=batch.returns,
            entropy=result.entropy,
            weight=batch.weights,
            clip_range=self.clip_range(progress),  # type: ignore[operator]
            clip_range_vf=self.clip_range_vf(progress) if self.clip_range_vf is not None else None,  # type: ignore[operator]
            ent_coef=self.ent_coef(progress) if callable(self.ent_coef) else self.ent_coef,
            vf_coef=self.vf_coef,
        )

    @torch.no_grad()
    def _refresh(self, chunks: RolloutChunks) -> RolloutChunks:
        """Recompute the states at chunk starts with the current weights, from the rollout's first states on."""
        buffer = self.rollout_buffer
        states = [buffer.chunk_states[0]]
        for index, (start, end) in enumerate(zip(buffer.chunk_starts, buffer.chunk_starts[1:], strict=False)):
            rows = slice(index * self.n_envs, (index + 1) * self.n_envs)
            chunk = take(chunks, rows)
            obs, starts = first_steps(chunk, end - start)
            states.append(self.policy.advance(obs, states[-1], starts))
        return chunks._replace(state=stack_states(states))

    def _log(self, parts: list[PPOLoss]) -> None:
        mean = PPOLoss(*(float(torch.stack(part).mean()) for part in zip(*parts, strict=True)))  # type: ignore[arg-type]
        buffer, record = self.rollout_buffer, self.logger.record
        record("train/entropy_loss", -mean.entropy)
        record("train/policy_gradient_loss", mean.policy)
        record("train/value_loss", mean.value)
        record("train/approx_kl", mean.approx_kl)
        record("train/clip_fraction", mean.clip_fraction)
        record("train/loss", float(parts[-1].total))
        record("train/explained_variance", explained_variance(buffer.values.flatten(), buffer.returns.flatten()))
        record("train/gradient_norm", self._gradient_norm)
        record("train/advantage_std", float(buffer.advantages.std()))
        if hasattr(self.policy, "log_std"):
            record("train/std", torch.exp(self.policy.log_std).mean().item())
        record("train/n_updates", self._n_updates, exclude="tensorboard")
        record("train/clip_range", self.clip_range(self._current_progress_remaining))  # type: ignore[operator]
        if self.clip_range_vf is not None:
            record("train/clip_range_vf", self.clip_range_vf(self._current_progress_remaining))  # type: ignore[operator]

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
    ) -> RecurrentPPO:
        """Train for `total_timesteps` environment steps, rounded up to whole rollouts."""
        super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        # a rollout that a callback broke off is over once all callbacks have seen the end
        self._rollout_start = None
        return self
