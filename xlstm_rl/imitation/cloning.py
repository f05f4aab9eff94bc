"""Behaviour cloning: the policy learns to give the actions of demonstrations the most probability, before PPO."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, maybe_transpose
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from xlstm_rl.agents import RecurrentPPO
from xlstm_rl.agents.actor_critic import evaluating
from xlstm_rl.agents.features import space_parts
from xlstm_rl.agents.heads import from_env
from xlstm_rl.agents.on_policy import schedule_rates
from xlstm_rl.agents.ppo import with_fresh_states
from xlstm_rl.agents.rollout import ChunkedRolloutBuffer, Evaluation, RolloutChunks, minibatches
from xlstm_rl.imitation.demonstrations import Demonstration
from xlstm_rl.memory import take
from xlstm_rl.vec_envs.env_contract import map_obs

OnEpoch = Callable[[int, float], object]


def imitate(
    model: RecurrentPPO, episodes: Iterable[Any], *, epochs: int = 10, on_epoch: OnEpoch | None = None
) -> list[float]:
    """Train an agent to do as in demonstrations; `learn` then goes on with PPO.

    Episodes are laid end to end and cut into the chunks that PPO trains with (`seq_len`, `batch_size`), the memory is
    emptied where an episode starts, and states at chunk starts are those of the present weights. The critic learns the
    discounted returns (weight `vf_coef`), and `ent_coef` is the weight of the entropy bonus. Rate and bounds of
    gradients are those of the model; its optimiser and its counters are afterwards as they were. Running statistics of
    a `VecNormalize` count the episodes in.

    Args:
        model: whose policy is trained.
        episodes: `Demonstration`s, Minari's episodes (a dataset is iterable) or others with the same attributes, as the
            environment gives them, before any normalisation.
        epochs: passes over all of them.
        on_epoch: called after each with its number, from 0, and its loss.

    Returns:
        The mean negative log-likelihood of an action in each epoch, in nats, while the weights changed.

    Raises:
        ValueError: there are no episodes, or one does not fit the spaces; the message names it.
        FloatingPointError: a gradient is not finite.
    """
    episodes = as_drawn(model, episodes)
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None and normalizer.training:
        _count_in(normalizer, episodes)
    policy, optimizer = model.policy, model.policy.optimizer
    kept = copy.deepcopy(optimizer.state_dict()), model._gradient_norm
    # a bound that goes by the usual norm must learn anew what is usual
    model._gradient_norm = None
    schedule_rates(optimizer, model.lr_schedule(1.0), model.lr_schedule(1.0))
    buffer = _laid_end_to_end(model, episodes)
    chunks = buffer.chunks(torch.from_numpy(buffer.advantages))
    losses = []
    for epoch in range(epochs):
        chunks = _up_to_date(model, buffer, chunks)
        policy.set_training_mode(True)
        parts = [_update(model, batch) for batch in minibatches(chunks, _steps(model), model.ranks)]
        losses.append(float(torch.stack(parts).mean()))
        if on_epoch is not None:
            on_epoch(epoch, losses[-1])
    policy.set_training_mode(False)
    optimizer.load_state_dict(kept[0])
    model._gradient_norm = kept[1]
    return losses


def imitation_loss(model: RecurrentPPO, episodes: Iterable[Any]) -> float:
    """The mean negative log-likelihood, in nats, of the actions in episodes that need not be those of training.

    Args:
        model: whose policy it is about; nothing of it changes.
        episodes: as for `imitate`.

    Raises:
        ValueError: as `imitate`.
    """
    buffer = _laid_end_to_end(model, as_drawn(model, episodes))
    chunks = _up_to_date(model, buffer, buffer.chunks(torch.from_numpy(buffer.advantages)))
    log_prob = torch.cat([part.log_prob for part in _evaluated(model, chunks)])
    return -float((chunks.weights * log_prob).sum() / chunks.weights.sum())


def _update(model: RecurrentPPO, batch: RolloutChunks) -> Tensor:
    """A step of the optimiser; gives the negative log-likelihood before it."""
    result = model.policy.evaluate_sequence(batch.observations, batch.actions, batch.state, batch.episode_starts)
    likelihood = -(batch.weights * result.log_prob).sum()
    value = (batch.weights * (batch.returns - result.values) ** 2).sum()
    entropy = (batch.weights * (-result.log_prob if result.entropy is None else result.entropy)).sum()
    ent_coef = model.ent_coef(1.0) if callable(model.ent_coef) else model.ent_coef
    told = model.compute_gradients(likelihood + model.vf_coef * value - ent_coef * entropy, {"likelihood": likelihood})
    model.gradient_step(lambda error: f"imitating: {error}")
    return told["likelihood"]


def _up_to_date(model: RecurrentPPO, buffer: ChunkedRolloutBuffer, chunks: RolloutChunks) -> RolloutChunks:
    """The chunks with the states and the targets of the critic that the present weights lead to."""
    with evaluating(model.policy):
        chunks = with_fresh_states(model.policy, buffer, chunks)
    buffer.values[:] = buffer.join(torch.cat([part.values for part in _evaluated(model, chunks)]))
    cut = buffer.ended & ~buffer.terminated
    # the step after one that a time limit cut holds what was seen last
    buffer.next_values[cut] = np.roll(buffer.values, -1, axis=0)[cut]
    buffer.compute_returns_and_advantage(buffer.values[-1])
    return chunks._replace(returns=buffer.cut(buffer.returns))


def _evaluated(model: RecurrentPPO, chunks: RolloutChunks) -> list[Evaluation]:
    """What the policy thinks of all chunks, as many at once as a minibatch has."""
    size, total = max(1, _steps(model) // chunks.weights.shape[1]), len(chunks.weights)
    pieces = [take(chunks, slice(start, start + size)) for start in range(0, total, size)]
    with evaluating(model.policy):
        return [
            model.policy.evaluate_sequence(piece.observations, piece.actions, piece.state, piece.episode_starts)
            for piece in pieces
        ]


def _steps(model: RecurrentPPO) -> int:
    """Steps of a minibatch."""
    return model.batch_size or model.n_steps * model.n_envs


def as_drawn(model: RecurrentPPO, episodes: Iterable[Any]) -> list[Demonstration]:
    """The episodes, with their actions as the policy draws them.

    Raises:
        ValueError: as `imitate`.
    """
    checked = [_check(model, f"episode {index}", episode) for index, episode in enumerate(episodes)]
    if not checked:
        raise ValueError("there are no episodes to imitate: give one at least")
    return checked


def _check(model: RecurrentPPO, name: str, episode: Any) -> Demonstration:
    steps, space = len(episode.rewards), model.action_space
    seen = space_parts(model.observation_space)
    given = episode.observations
    if isinstance(seen, dict):
        missing = [key for key in seen if not isinstance(given, dict) or key not in given]
        if missing:
            raise ValueError(f"the observations of {name} lack {missing}, which the agent sees")
        given = {key: given[key] for key in seen}
    observations = map_obs(partial(_fitting, f"the observations of {name}", steps + 1), given, seen)
    actions = _fitting(f"the actions of {name}", steps, episode.actions, space)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        unknown = [action for action in actions if not space.contains(action.astype(space.dtype))]
        if unknown:
            raise ValueError(f"the actions of {name} have {unknown[0]} among them, which is none of {space}")
    drawn = from_env(space, actions, squash=model.policy.squash_output)
    ends = np.stack([episode.terminations, episode.truncations])
    if not steps or not ends[:, -1].any() or ends[:, :-1].any():
        raise ValueError(
            f"{name} of {steps} steps does not end with its last step, and only there: record whole episodes, with "
            "terminations or truncations true in the last step alone"
        )
    return Demonstration(observations, drawn, np.asarray(episode.rewards), *ends)


def _fitting(name: str, steps: int, given: Any, space: spaces.Space[Any]) -> np.ndarray:
    array = np.asarray(given)
    if array.shape == (steps, 1) and not space.shape:
        array = array[:, 0]
    if np.shape(_oriented(array, space)) != (steps, *(space.shape or ())):
        raise ValueError(f"{name} are of shape {array.shape}, and {steps} of {space} have another")
    if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        raise ValueError(f"{name} are {array.dtype} that are not all finite numbers")
    return array.astype(space.dtype)


def _oriented(array: np.ndarray, space: spaces.Space[Any]) -> np.ndarray:
    """Images [N, ...] with channels first, as the policy sees them; all else as it is."""
    return maybe_transpose(array, space) if is_image_space(space) and array.ndim == 4 else array


def _as_seen(model: RecurrentPPO, observations: Any) -> Any:
    """Observations [N, ...] of the environment as the policy sees them."""
    normalizer = model.get_vec_normalize_env()
    # in the layout of the environment, as its statistics are
    seen = observations if normalizer is None else normalizer.normalize_obs(observations)
    return map_obs(_oriented, seen, space_parts(model.observation_space))


def _count_in(normalizer: VecNormalize, episodes: Sequence[Demonstration]) -> None:
    """Let running statistics see what they would have seen, had the episodes been collected."""
    if normalizer.norm_obs:
        seen = map_obs(lambda *parts: np.concatenate(parts), *(episode.observations for episode in episodes))
        for key, running in normalizer.obs_rms.items() if isinstance(seen, dict) else [(None, normalizer.obs_rms)]:
            running.update(seen if key is None else seen[key])
    if normalizer.norm_reward:
        for episode in episodes:
            total, totals = 0.0, []
            for reward in episode.rewards:
                total = normalizer.gamma * total + reward
                totals.append(total)
            normalizer.ret_rms.update(np.array(totals))


def _laid_end_to_end(model: RecurrentPPO, episodes: Sequence[Demonstration]) -> ChunkedRolloutBuffer:
    """A rollout of as many rows as the model has environments, made of episodes that follow each other.

    An episode that a time limit cut is followed by a step that did not happen, with what was seen last: what the critic
    says of it is the value of where it was cut.
    """
    places, lengths = _places(episodes, model.n_envs)
    steps, normalizer = int(lengths.max()), model.get_vec_normalize_env()
    buffer = ChunkedRolloutBuffer(
        steps,
        model.observation_space,
        model.action_space,
        device=model.device,
        gamma=model.gamma,
        gae_lambda=1.0,
        n_envs=len(lengths),
        seq_len=min(model.chunk_length, steps),
    )
    buffer.skipped[:] = True
    # what fills the rows must be of the space too
    buffer.observations = map_obs(
        lambda stored, seen: np.full(stored.shape, seen[0], seen.dtype),
        buffer.observations,
        _as_seen(model, episodes[0].observations),
    )
    for episode, (row, first) in zip(episodes, places, strict=True):
        observations = _as_seen(model, episode.observations)
        rewards = episode.rewards if normalizer is None else normalizer.normalize_reward(episode.rewards)
        cut, end = _is_cut(episode), first + len(rewards)
        map_obs(partial(_write, slice(first, end + cut), row), buffer.observations, observations)
        buffer.actions[first:end, row], buffer.rewards[first:end, row] = episode.actions, rewards
        buffer.skipped[first:end, row], buffer.episode_starts[first, row] = False, True
        buffer.ended[end - 1, row], buffer.terminated[end - 1, row] = True, not cut
    buffer.chunk_states = [model.policy.initial_state(len(lengths))] * len(buffer.chunk_starts)
    buffer.pos, buffer.full = steps, True
    return buffer


def _places(episodes: Sequence[Demonstration], most_rows: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Row and first step of every episode, and the length of every row: the longest first, each to the shortest row."""
    lengths = np.zeros(min(most_rows, len(episodes)), int)
    sizes = [len(episode.rewards) + _is_cut(episode) for episode in episodes]
    places = [(0, 0)] * len(episodes)
    for index in np.argsort(sizes)[::-1]:
        row = int(lengths.argmin())
        places[index] = row, int(lengths[row])
        lengths[row] += sizes[index]
    return places, lengths


def _is_cut(episode: Demonstration) -> bool:
    return not episode.terminations[-1]


def _write(steps: slice, row: int, stored: np.ndarray, seen: np.ndarray) -> None:
    stored[steps, row] = seen[: steps.stop - steps.start]
