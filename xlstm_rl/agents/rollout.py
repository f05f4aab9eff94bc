"""The rollout buffer: steps of parallel environments, cut into chunks for training sequences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, RolloutBufferSamples
from torch import Tensor

from xlstm_rl.agents.parallel import ALONE, Ranks
from xlstm_rl.memory import map_leaves, take
from xlstm_rl.memory.config import check_fits
from xlstm_rl.vec_envs.env_contract import map_obs


def gae(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, ended: Tensor, *, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage of every step (Schulman et al. 2016, eq. 16).

    Args:
        reward: [B, T].
        value: [B, T], value of the observation acted on.
        next_value: [B, T], value of the observation that step t led to, seen by the memory that saw step t; where an
            episode was cut by a time limit, that is its final observation.
        terminated: bool [B, T], the task ended: nothing follows.
        ended: bool [B, T], terminated or cut by a time limit.
        gamma: discount factor per step.
        lam: trade-off between bias (0) and variance (1).

    Returns:
        Advantage [B, T], in units of reward.
    """
    delta = reward + gamma * next_value.masked_fill(terminated, 0.0) - value
    keep = gamma * lam * (~ended).to(delta.dtype)
    advantages = [torch.zeros_like(delta[:, 0])]
    for step_delta, step_keep in zip(reversed(delta.unbind(1)), reversed(keep.unbind(1)), strict=True):
        advantages.append(torch.addcmul(step_delta, step_keep, advantages[-1]))
    return torch.stack(advantages[:0:-1], dim=1)


class RolloutChunks(NamedTuple):
    """Chunks of a rollout: B chunks of L steps each, dense, episode starts inside.

    `take` slices it, memory state and all.
    """

    observations: Any
    """[B, L, ...], or a dict of those."""
    actions: Tensor
    """[B, L, ...]"""
    episode_starts: Tensor
    """bool [B, L]"""
    old_values: Tensor
    """[B, L]"""
    old_log_prob: Tensor
    """[B, L]"""
    advantages: Tensor
    """[B, L]"""
    returns: Tensor
    """[B, L]"""
    weights: Tensor
    """[B, L], 0 where another chunk counts the step or it did not happen, else the same for all."""
    action_masks: Tensor | None
    """bool [B, L, ...], true where an action was allowed; None without masks."""
    state: Any
    """Memory state before the first step of every chunk, leaves [B, ...]."""


class Evaluation(NamedTuple):
    """What the present policy thinks of chunks of past actions."""

    values: Tensor
    """[B, L]"""
    log_prob: Tensor
    """[B, L]"""
    entropy: Tensor | None
    """[B, L], or None where the distribution has no closed form."""
    memory: Tensor
    """[B, L, output_size], what the actor's memory gives."""
    latent_actor: Tensor
    """[B, L, width], input of the action head."""
    latent_critic: Tensor
    """[B, L, width], input of the value head."""


class ChunkedRolloutBuffer(BaseBuffer):
    """Rollout of [n_steps, n_envs] that keeps the memory state at chunk starts only.

    Chunks start every `seq_len` steps. If `n_steps` is no multiple, the last chunk starts earlier so that it has
    `seq_len` steps as well; the steps it shares with its neighbour have weight 0 there and serve as run-in.

    Args:
        buffer_size: steps per environment, n_steps.
        observation_space: any space Stable-Baselines3 supports.
        action_space: Discrete, Box, MultiDiscrete or MultiBinary.
        device: where chunks are put.
        gae_lambda: of the generalised advantage estimate.
        gamma: discount factor per step.
        n_envs: number of environments.
        seq_len: steps per chunk, at most `buffer_size`.
    """

    observations: Any
    """Arrays [n_steps, n_envs, ...], or tensors on the device of the environment's; or a dict of those."""

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device | str = "auto",
        gae_lambda: float = 1.0,
        gamma: float = 0.99,
        n_envs: int = 1,
        seq_len: int = 128,
    ) -> None:
        super().__init__(buffer_size, observation_space, action_space, device, n_envs)
        self._check_size()
        self.gae_lambda, self.gamma, self.seq_len = gae_lambda, gamma, seq_len
        starts = list(range(0, buffer_size - seq_len + 1, seq_len))
        if starts[-1] + seq_len < buffer_size:
            starts.append(buffer_size - seq_len)
        self.chunk_starts = starts
        self.reset()

    def _check_size(self) -> None:
        numbers = sum(
            math.prod(part.shape or ()) * np.dtype(part.dtype).itemsize
            for space in (self.observation_space, self.action_space)
            for part in (space.spaces.values() if isinstance(space, spaces.Dict) else [space])
        )
        # six numbers and four flags a step
        size = self.buffer_size * self.n_envs * (numbers + 6 * 4 + 4)
        check_fits(f"a rollout of n_steps={self.buffer_size:,} steps of {self.n_envs:,} environments", size)

    def reset(self) -> None:
        """Forget the rollout."""
        steps = (self.buffer_size, self.n_envs)
        space: Any = self.observation_space
        parts = dict(space.spaces) if isinstance(space, spaces.Dict) else space
        self.observations = map_obs(lambda part: np.zeros((*steps, *part.shape), part.dtype), parts)
        action_shape = self.action_space.shape or ()
        action_dtype = np.float32 if isinstance(self.action_space, spaces.Box) else np.int64
        self.actions = np.zeros((*steps, *action_shape), action_dtype)
        self.rewards, self.values, self.next_values, self.log_probs, self.returns, self.advantages = (
            np.zeros(steps, np.float32) for _ in range(6)
        )
        self.episode_starts, self.terminated, self.ended, self.skipped = (np.zeros(steps, bool) for _ in range(4))
        self.chunk_states: list[Any] = []
        self.action_masks: np.ndarray | None = None
        super().reset()

    def add_state(self, state: Any) -> None:
        """Note the memory state (leaves [n_envs, ...]) before the next step; kept if a chunk starts there."""
        if self.pos in self.chunk_starts:
            # a copy: the steps that follow may write over the state
            self.chunk_states.append(map_leaves(torch.clone, state))

    def add(
        self,
        obs: Any,
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: np.ndarray | Tensor,
        log_prob: np.ndarray | Tensor,
        action_masks: np.ndarray | None = None,
    ) -> None:
        """Append one step of every environment, arrays or tensors [n_envs, ...]; masks in every step or in none.

        An episode that starts here ended in the step before: by termination, unless `add_outcome` has told otherwise.
        """
        t = self.pos
        self.observations = map_obs(partial(_store, t), self.observations, obs)
        self.actions[t] = np.reshape(action, self.actions[t].shape)
        self.rewards[t], self.episode_starts[t] = np.ravel(reward), np.ravel(episode_start)
        self.values[t], self.log_probs[t] = _flat(value), _flat(log_prob)
        if action_masks is not None:
            if self.action_masks is None:
                self.action_masks = np.ones((self.buffer_size, *action_masks.shape), bool)
            self.action_masks[t] = action_masks
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def add_outcome(
        self, dones: np.ndarray, truncated: np.ndarray, final_values: np.ndarray, skipped: np.ndarray | None = None
    ) -> None:
        """Say how the step just added ended.

        Args:
            dones: bool [n_envs], the episode ended.
            truncated: bool [n_envs], it ended by a time limit.
            final_values: [n_envs], value of the final observation where truncated, else anything.
            skipped: bool [n_envs], the step did not happen and is to have no weight; None: all happened.
        """
        t = self.pos - 1
        self.ended[t] = dones
        self.terminated[t] = dones & ~truncated
        self.next_values[t][truncated] = final_values[truncated]
        if skipped is not None:
            self.skipped[t] = skipped

    def check_finite(self) -> None:
        """Refuse a rollout with NaN or infinity in it.

        Raises:
            FloatingPointError: names what is not finite, the step and the environment.
        """
        for name, array in (("reward", self.rewards), ("value", self.values), ("log-probability", self.log_probs)):
            if not np.isfinite(array).all():
                step, env = np.argwhere(~np.isfinite(array))[0]
                raise FloatingPointError(
                    f"the {name} of step {step} of the rollout in environment {env} is {array[step, env]}: look for "
                    "NaN in the observations and rewards of the environment, or lower the learning rate"
                )

    def compute_returns_and_advantage(self, last_values: np.ndarray | Tensor, dones: np.ndarray | None = None) -> None:
        """Fill `advantages` and `returns` (TD(lambda) targets); again where rewards have changed since.

        Args:
            last_values: [n_envs], value of the observation after the last step, used where no episode ended there.
            dones: bool [n_envs], the last step ended an episode; None: as `add_outcome` told.
        """
        self._end(slice(0, -1), self.episode_starts[1:], self.values[1:])
        self._end(slice(-1, None), self.ended[-1] if dones is None else np.ravel(dones) > 0, _flat(last_values))
        self.advantages = self.estimate(self.gae_lambda)
        self.returns = self.advantages + self.values

    def estimate(self, gae_lambda: float) -> np.ndarray:
        """The generalised advantage of every step, [n_steps, n_envs], once `compute_returns_and_advantage` was called.

        Args:
            gae_lambda: between 0 and 1.
        """
        arrays = (self.rewards, self.values, self.next_values, self.terminated, self.ended)
        advantage = gae(*(torch.from_numpy(array.T) for array in arrays), gamma=self.gamma, lam=gae_lambda)
        by_step: np.ndarray = advantage.numpy().T
        return by_step

    def get(self, batch_size: int | None = None) -> Iterator[RolloutBufferSamples | DictRolloutBufferSamples]:
        """The steps of the rollout in random order, as `RolloutBuffer` of Stable-Baselines3 gives them.

        For code that looks at single steps, such as a model of rewards; memories are trained on `chunks`.

        Args:
            batch_size: steps at a time; None: all at once.
        """
        steps = self.buffer_size * self.n_envs
        order = np.random.permutation(steps)
        batch_size = batch_size or steps
        for start in range(0, steps, batch_size):
            yield self._get_samples(order[start : start + batch_size])

    def chunks(self, advantages: Tensor) -> RolloutChunks:
        """The whole rollout as chunks, B = n_envs * number of chunk starts, ordered by start, then environment.

        Args:
            advantages: [n_steps, n_envs], as the policy loss should see them.
        """
        weights = self.cut((~self.skipped).astype(np.float32))
        overlap = self.chunk_starts[-1] % self.seq_len
        if overlap:
            weights[-self.n_envs :, : self.seq_len - overlap] = 0.0
        return RolloutChunks(
            observations=map_obs(self.cut, self.observations),
            actions=self.cut(self.actions),
            episode_starts=self.cut(self.episode_starts),
            old_values=self.cut(self.values),
            old_log_prob=self.cut(self.log_probs),
            advantages=self.cut(advantages.numpy()),
            returns=self.cut(self.returns),
            weights=weights,
            action_masks=None if self.action_masks is None else self.cut(self.action_masks),
            state=stack_states(self.chunk_states),
        )

    def cut(self, array: np.ndarray | Tensor) -> Tensor:
        """Numbers of steps, [n_steps, n_envs, ...], as those of `chunks`: [B, seq_len, ...] on the device."""
        if isinstance(array, Tensor):
            parts = [array[start : start + self.seq_len].swapaxes(0, 1) for start in self.chunk_starts]
            return torch.cat(parts).to(self.device)
        pieces = [array[start : start + self.seq_len].swapaxes(0, 1) for start in self.chunk_starts]
        return torch.as_tensor(np.concatenate(pieces), device=self.device)

    def join(self, chunks: Tensor) -> np.ndarray:
        """The inverse of `cut`: of chunks [B, seq_len], an array [n_steps, n_envs]."""
        pieces = chunks.numpy(force=True).reshape(len(self.chunk_starts), self.n_envs, self.seq_len)
        joined = np.empty((self.buffer_size, self.n_envs), pieces.dtype)
        # of steps in two chunks, what the first has, as their weights have it
        for start, piece in reversed([*zip(self.chunk_starts, pieces, strict=True)]):
            joined[start : start + self.seq_len] = piece.T
        return joined

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        """Single steps, numbered environment by environment."""
        step, row = batch_inds % self.buffer_size, batch_inds // self.buffer_size
        obs = map_obs(lambda part: torch.as_tensor(part[step, row], device=self.device), self.observations)
        # flat and float32, as Stable-Baselines3 keeps them
        actions = self.to_torch(self.actions[step, row].reshape(len(step), self.action_dim).astype(np.float32))
        numbers = (self.values, self.log_probs, self.advantages, self.returns)
        kind = DictRolloutBufferSamples if isinstance(obs, dict) else RolloutBufferSamples
        return kind(obs, actions, *(self.to_torch(array[step, row]) for array in numbers))

    def _end(self, steps: slice, ended: np.ndarray, values: np.ndarray) -> None:
        """Episodes end in steps, where this is news by termination; elsewhere the next observation has `values`."""
        self.terminated[steps] |= ended & ~self.ended[steps]
        self.ended[steps] |= ended
        np.copyto(self.next_values[steps], values, where=~self.ended[steps])


def _flat(values: np.ndarray | Tensor) -> np.ndarray:
    """[n_envs] of an array or tensor [n_envs] or [n_envs, 1]."""
    return np.ravel(values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values))


def _store(t: int, stored: Any, given: Any) -> Any:
    """What is stored, with a step more; tensors where they are given."""
    if isinstance(given, Tensor):
        if not isinstance(stored, Tensor):
            # nothing is in it yet, so that nothing is copied
            stored = torch.zeros(stored.shape, dtype=torch.from_numpy(stored[:0]).dtype, device=given.device)
        if given.is_floating_point() and not stored.is_floating_point():
            stored = stored.float()
        stored[t] = given.reshape(stored[t].shape)
        return stored
    given = np.asarray(given)
    if given.dtype.kind == "f" and stored.dtype.kind != "f":
        # normalised: VecNormalize leaves the space of whole numbers as it is
        stored = stored.astype(np.float32)
    stored[t] = given.reshape(stored[t].shape)
    return stored


def first_steps(chunks: RolloutChunks, count: int) -> tuple[Any, Tensor]:
    """Observations [B, count, ...] and episode starts [B, count] of the first steps of chunks."""
    return map_leaves(lambda part: part[:, :count], (chunks.observations, chunks.episode_starts))


def stack_states(states: list[Any]) -> Any:
    """Concatenate states along their rows."""
    return map_leaves(lambda *parts: torch.cat(parts), *states)


def minibatches(chunks: RolloutChunks, batch_size: int, group: Ranks = ALONE) -> Iterator[RolloutChunks]:
    """Yield the chunks in random order, in minibatches of about `batch_size` steps.

    Weights are scaled to sum to 1 in a minibatch of average size. Every step of the rollout then weighs the same,
    also in a minibatch where few steps count.

    Args:
        chunks: all chunks of a rollout, weights 0 or 1.
        batch_size: steps per minibatch; at least one chunk is taken.
        group: processes that train together; `batch_size` counts the steps of all, and all get as many minibatches.
    """
    total = len(chunks.weights)
    # steps that two chunks share, and those that did not happen, do not count
    counted = float(group.sum(chunks.weights.sum()))
    number = min(max(1, round(counted / batch_size)), group.least(total))
    chunks = chunks._replace(weights=chunks.weights * (number / max(counted, 1.0)))
    # shuffled at once: minibatches are then views
    chunks = take(chunks, torch.randperm(total).to(chunks.weights.device))
    bounds = [total * index // number for index in range(number + 1)]
    for start, end in zip(bounds, bounds[1:], strict=False):
        yield take(chunks, slice(start, end))
