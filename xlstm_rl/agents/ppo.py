"""Recurrent PPO: the constructor, learn, predict, save and load of sb3-contrib's, trained on dense chunks."""

from __future__ import annotations

import time
from functools import partial
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance
from torch import Tensor

from xlstm_rl.agents.actor_critic import PolicyState, evaluating
from xlstm_rl.agents.losses import (
    LEAST_UNITS,
    MIXED_LAMBDAS,
    AdvantageScale,
    PPOLoss,
    averaged_moments,
    check_advantage_floor,
    gradient_moments,
    mixture,
    moments_shape,
    ppo_loss,
    unexplained_reward,
)
from xlstm_rl.agents.on_policy import RecurrentOnPolicyAlgorithm
from xlstm_rl.agents.policy import XLSTMPolicy
from xlstm_rl.agents.rollout import ChunkedRolloutBuffer, RolloutChunks, first_steps, minibatches, stack_states
from xlstm_rl.kernels import KernelCall, recorded_calls
from xlstm_rl.memory import pack, take
from xlstm_rl.memory.config import check_number, check_whole


class RecurrentPPO(RecurrentOnPolicyAlgorithm):
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
        gae_lambda: trade-off between bias and variance of the advantage; of the critic's targets alone where advantages
            are mixed.
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
        mix_advantages: mix advantages of several lambdas, and of the next reward alone, so that their gradient has the
            most signal for its noise, as measured between environments; see `mixture`. False is stock PPO.
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
        mix_advantages: bool = False,
        grad_spike_factor: float | None = 5.0,
        use_masking: bool | None = None,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        rollout_buffer_class: type[ChunkedRolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.refresh_state = refresh_state
        self.advantage_floor = advantage_floor
        self._advantage_scale = AdvantageScale()
        self.mix_advantages = mix_advantages
        self._gradient_moments: Tensor | None = None
        super().__init__(
            policy,
            env,
            learning_rate,
            n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            grad_spike_factor=grad_spike_factor,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            seq_len=seq_len,
            use_masking=use_masking,
            on_nonfinite=on_nonfinite,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    def check_settings(self) -> None:
        """Refuse settings that do not fit; see the constructor."""
        super().check_settings()
        check_whole("n_epochs", self.n_epochs, 1)
        for name in ("clip_range", "clip_range_vf"):
            if isinstance(getattr(self, name), Real):
                check_number(name, getattr(self, name), above=0)
        check_advantage_floor(self.advantage_floor)
        if not isinstance(self.mix_advantages, bool):
            raise TypeError(f"mix_advantages={self.mix_advantages!r} must be True or False")
        moments = self._gradient_moments
        if moments is not None and not (moments.shape == moments_shape() and bool(moments.isfinite().all())):
            raise ValueError(f"moments of gradients are finite and {moments_shape()}, those given {moments!r:.200}")
        if self.batch_size is None:
            return
        check_whole("batch_size", self.batch_size, 1)
        if self.seq_len is not None and self.seq_len > self.batch_size:
            raise ValueError(
                f"seq_len={self.seq_len} is more than batch_size={self.batch_size}, and a minibatch is made of whole "
                "chunks: raise batch_size or lower seq_len"
            )

    @property
    def chunk_length(self) -> int:
        """Steps of a training sequence: `seq_len`, or what stands for None."""
        return self.seq_len or min(self.n_steps, self.batch_size or self.n_steps)

    def _setup_model(self) -> None:
        super()._setup_model()
        for name in ("clip_range", "clip_range_vf"):
            if getattr(self, name) is not None:
                setattr(self, name, FloatSchedule(getattr(self, name)))

    def train(self) -> None:
        """Update the policy on the rollout."""
        if self.ranks.any(self.rollout_buffer.pos < self.n_steps):
            # the rollout was dropped
            return
        begun = time.perf_counter()
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        advantages = torch.from_numpy(np.ascontiguousarray(self.rollout_buffer.advantages))
        if self.mix_advantages:
            advantages = self._mix_advantages(self.rollout_buffer.chunks(advantages))
        if self.normalize_advantage:
            counted = torch.from_numpy(~self.rollout_buffer.skipped)
            advantages = self._advantage_scale.normalize(
                advantages, floor=self.advantage_floor, counted=counted, group=self.ranks
            )
        chunks = self.rollout_buffer.chunks(advantages)
        parts: list[dict[str, Tensor]] = []
        keep_going, skipped = True, 0
        for epoch in range(self.n_epochs):
            if self.refresh_state and epoch > 0:
                chunks = with_fresh_states(self.policy, self.rollout_buffer, chunks)
            batches = list(minibatches(chunks, self.batch_size or self.n_steps * self._all_envs, self.ranks))
            totals = self.ranks.sum(torch.stack([batch.weights.sum() for batch in batches]))
            for minibatch, (batch, total_weight) in enumerate(zip(batches, totals, strict=True)):
                loss, terms = self._loss(batch, total_weight)
                total = loss.total + sum(self.policy.loss_terms.weights[name] * term for name, term in terms.items())
                named = {**loss._asdict(), **{f"loss_{name}": term for name, term in terms.items()}, "total": total}
                parts.append(self.compute_gradients(total, named))
                # of all ranks, so that all stop here or none
                if self.target_kl is not None and parts[-1]["approx_kl"] > 1.5 * self.target_kl:
                    keep_going = False
                    if self.verbose >= 1:
                        divergence = float(parts[-1]["approx_kl"])
                        print(f"Early stopping at epoch {epoch}: KL {divergence:.3f}, target {self.target_kl}")
                    break
                place = f"minibatch {minibatch} of epoch {epoch}"
                skipped += not self.gradient_step(partial(_explain, parts[-1], place))
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

    def _mix_advantages(self, chunks: RolloutChunks) -> Tensor:
        """Advantages [n_steps, n_envs] for the policy loss, and the moments of their gradients counted in."""
        buffer, masks = self.rollout_buffer, chunks.action_masks
        with evaluating(self.policy):
            latents = self.policy.latents(chunks.observations, chunks.state, chunks.episode_starts)
        actor, critic = (latent.view(*chunks.weights.shape, -1) for latent in (latents.actor, latents.critic))
        first = sum(self.ranks.gather(self.n_envs)[: self.ranks.rank])
        rows = torch.arange(len(chunks.weights), device=self.device)
        # two halves of the environments; of the chunks, where there is one alone
        fold = (first + rows % self.n_envs if self._all_envs > 1 else rows) % 2 == 0
        reward = unexplained_reward(buffer.cut(buffer.rewards), critic, chunks.weights, fold, self.ranks)
        estimates = torch.from_numpy(
            np.stack([buffer.join(reward), *(buffer.estimate(gae_lambda) for gae_lambda in MIXED_LAMBDAS)])
        )

        # environments are independent of each other; where they are few, stretches of each nearly are
        stretches = min(-(-LEAST_UNITS // self._all_envs), self.n_steps)

        def by_unit(steps: Tensor) -> Tensor:
            """Steps [B, L, ...], ordered by start, then environment, as [U, S, ...] of U independent units."""
            rows = steps.view(-1, self.n_envs, *steps.shape[1:]).transpose(0, 1).flatten(1, 2)
            length = rows.shape[1] // stretches
            return rows[:, : stretches * length].reshape(-1, length, *rows.shape[2:])

        counted = torch.from_numpy(~buffer.skipped)
        count = self.ranks.sum(counted.sum(dtype=torch.float64)).clamp_min(1)
        means = self.ranks.sum((estimates.double() * counted).sum((1, 2))) / count
        centred = (estimates - means[:, None, None].float()).numpy()
        cut = torch.stack([by_unit(buffer.cut(estimate) * chunks.weights) for estimate in centred])
        flat_masks = None if masks is None else masks.flatten(0, 1)
        scores = self.policy.scores(latents.actor, chunks.actions.flatten(0, 1), flat_masks).view(*actor.shape[:2], -1)
        moments = gradient_moments(cut, by_unit(scores), by_unit(actor), self.ranks).cpu()
        self._gradient_moments = averaged_moments(self._gradient_moments, moments)
        factors = mixture(self._gradient_moments, self._all_envs * stretches)
        for name, factor in zip(("reward", *MIXED_LAMBDAS), factors.tolist(), strict=True):
            self.logger.record(f"advantages/{name}", factor)
        mixed: Tensor = torch.tensordot(factors.float(), estimates, 1)
        return mixed

    def _loss(self, batch: RolloutChunks, total_weight: Tensor | None = None) -> tuple[PPOLoss, dict[str, Tensor]]:
        progress = self._current_progress_remaining
        result = self.policy.evaluate_sequence(
            batch.observations, batch.actions, batch.state, batch.episode_starts, batch.action_masks
        )
        loss = ppo_loss(
            log_prob=result.log_prob,
            old_log_prob=batch.old_log_prob,
            advantage=batch.advantages,
            value=result.values,
            old_value=batch.old_values,
            target=batch.returns,
            entropy=result.entropy,
            weight=batch.weights,
            total_weight=total_weight,
            clip_range=self.clip_range(progress),  # type: ignore[operator]
            clip_range_vf=self.clip_range_vf(progress) if self.clip_range_vf is not None else None,  # type: ignore[operator]
            ent_coef=self.ent_coef(progress) if callable(self.ent_coef) else self.ent_coef,
            vf_coef=self.vf_coef,
        )
        return loss, self.policy.loss_terms(batch, result)

    def _log(self, parts: list[dict[str, Tensor]]) -> None:
        mean = {name: float(torch.stack([part[name] for part in parts]).mean()) for name in parts[0]}
        buffer, record = self.rollout_buffer, self.logger.record
        record("train/entropy_loss", -mean["entropy"])
        record("train/policy_gradient_loss", mean["policy"])
        record("train/value_loss", mean["value"])
        record("train/approx_kl", mean["approx_kl"])
        record("train/clip_fraction", mean["clip_fraction"])
        for name in self.policy.loss_terms.weights:
            record(f"train/loss_{name}", mean[f"loss_{name}"])
        record("train/loss", float(parts[-1]["total"]))
        # of all ranks
        told = self.ranks.gather((buffer.values.flatten(), buffer.returns.flatten(), buffer.advantages.flatten()))
        values, returns, advantages = (np.concatenate(arrays) for arrays in zip(*told, strict=True))
        record("train/explained_variance", explained_variance(values, returns))
        record("train/gradient_norm", self._gradient_norm)
        record("train/advantage_std", float(advantages.std()))
        if hasattr(self.policy, "log_std"):
            record("train/std", torch.exp(self.policy.log_std).mean().item())
        record("train/n_updates", self._n_updates, exclude="tensorboard")
        record("train/clip_range", self.clip_range(self._current_progress_remaining))  # type: ignore[operator]
        if self.clip_range_vf is not None:
            record("train/clip_range_vf", self.clip_range_vf(self._current_progress_remaining))  # type: ignore[operator]


@torch.no_grad()
def with_fresh_states(policy: XLSTMPolicy, buffer: ChunkedRolloutBuffer, chunks: RolloutChunks) -> RolloutChunks:
    """Chunks of a rollout that start from the states of the present weights, from the rollout's first states on."""
    states = [buffer.chunk_states[0]]
    for index, (start, end) in enumerate(zip(buffer.chunk_starts, buffer.chunk_starts[1:], strict=False)):
        rows = slice(index * buffer.n_envs, (index + 1) * buffer.n_envs)
        obs, starts = first_steps(take(chunks, rows), end - start)
        states.append(policy.advance(obs, states[-1], starts))
    return chunks._replace(state=stack_states(states))


def _explain(parts: dict[str, Tensor], place: str, error: FloatingPointError) -> str:
    """What is not finite in an update, at a place such as "minibatch 2 of epoch 0"."""
    wrong = [name for name, part in parts.items() if not bool(part.isfinite())]
    return f"{'the gradient alone' if not wrong else 'the loss (' + ', '.join(wrong) + ')'} in {place}: {error}"


# Of the rollout, at most so many steps are run once more: little beside the epochs of an update.
STEPS_FOR_GATES, CHUNKS_FOR_GATES = 8, 16
STEPS_FOR_STALENESS = 128


@torch.no_grad()
def memory_statistics(
    policy: XLSTMPolicy, buffer: ChunkedRolloutBuffer, chunks: RolloutChunks, last_state: PolicyState
) -> dict[str, float]:
    """Statistics of the actor's memory after an update, by the names under which they are logged.

    - "memory/state_rms": root mean square of the numbers in the states that chunks start from.
    - "memory/stale_state_error": how far the states kept from the rollout are from those that the updated weights
      come to from the same start, relative to their norm. `refresh_state` and shorter rollouts lower it.
    - "memory/block0_forget", "..._input" and so on for every xLSTM block: mean of the activated forget gate, and of the
      logarithm of the activated input gate.
    - "memory/block0_horizon": median over heads (units of an sLSTM) and steps of -1 / log(forget gate), the steps after
      which 1/e of a memory is left.

    Args:
        policy: after the update.
        buffer: the rollout.
        chunks: of it.
        last_state: memory state after its last step.

    Returns:
        Nothing for a memory without state.
    """
    if policy.memory_actor.state_size == 0:
        return {}
    policy.set_training_mode(False)
    sample = take(chunks, slice(CHUNKS_FOR_GATES))
    with recorded_calls() as calls:
        obs, starts = first_steps(sample, STEPS_FOR_GATES)
        policy.advance(obs, sample.state, starts)
    if policy.memory_critic is not None:
        # the critic's blocks run after as many of the actor's
        calls = calls[: len(calls) // 2]
    statistics = {
        f"memory/block{index}_{name}": value for index, call in enumerate(calls) for name, value in _gates(call).items()
    }
    statistics["memory/state_rms"] = float(pack(chunks.state.actor).square().mean().sqrt())
    statistics["memory/stale_state_error"] = _staleness(policy, buffer, chunks, last_state)
    return statistics


def _gates(call: KernelCall) -> dict[str, float]:
    log = call.log_gates()
    horizon = (-1.0 / log.forget.clamp(max=-1e-6)).median()
    return {"forget": float(log.forget.exp().mean()), "input": float(log.input.mean()), "horizon": float(horizon)}


def _staleness(
    policy: XLSTMPolicy, buffer: ChunkedRolloutBuffer, chunks: RolloutChunks, last_state: PolicyState
) -> float:
    """Relative error of the kept states at the second chunk start, else at the end of the rollout."""
    later = len(buffer.chunk_starts) > 1
    until = buffer.chunk_starts[1] if later else buffer.buffer_size
    kept = buffer.chunk_states[1] if later else last_state
    rows = slice(min(buffer.n_envs, max(1, STEPS_FOR_STALENESS // until)))
    sample = take(chunks, rows)
    obs, starts = first_steps(sample, until)
    fresh = policy.advance(obs, take(buffer.chunk_states[0], rows), starts)
    expected, found = pack(fresh.actor), pack(take(kept, rows).actor)
    return float(torch.dist(found, expected) / expected.norm().clamp(min=1e-8))
