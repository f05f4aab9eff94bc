"""Playing whole episodes with a trained agent, the same agent without its memory, or at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize

from xlstm_rl.agents.env_contract import copies, reset_envs, seed_envs, step_envs
from xlstm_rl.agents.gymnasium_vector import GymnasiumVecEnv
from xlstm_rl.agents.masked_evaluation import MaskedModel
from xlstm_rl.agents.masks import masks_actions, read_masks, sample_allowed
from xlstm_rl.agents.nonfinite import SKIPPED
from xlstm_rl.agents.training_state import statistics_kept


class EvaluationResult(NamedTuple):
    """Outcome of finished episodes, in the order in which they ended."""

    returns: np.ndarray
    """[n_episodes], undiscounted sums of reward, before any reward normalisation."""
    lengths: np.ndarray
    """[n_episodes], steps."""
    successes: np.ndarray | None
    """bool [n_episodes], `info["is_success"]` of the last step; None where the task does not say."""

    @property
    def mean_return(self) -> float:
        """Over the episodes."""
        return float(self.returns.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean return; 0 for a single episode."""
        return float(self.returns.std() / max(len(self.returns) - 1, 1) ** 0.5)


Actor = Callable[[Any, Any, np.ndarray], tuple[np.ndarray, Any]]


def evaluate(
    model: Any,
    env: GymEnv | VectorEnv[Any, Any, Any],
    n_episodes: int,
    *,
    deterministic: bool = True,
    empty_state_every_step: bool = False,
    seed: int | None = None,
) -> EvaluationResult:
    """Play episodes with a model that has Stable-Baselines3's `predict`.

    Where the environments have `action_masks` and `predict` takes them, no masked action is ever taken.

    Args:
        model: the agent.
        env: environment, or vector environment of Stable-Baselines3 or gymnasium. The statistics of a `VecNormalize`
            stay as they are, and returns are those of the rewards before it. If it is the one that the model learns in,
            the next `learn` begins new episodes.
        n_episodes: episodes to finish; every environment contributes a fixed share, so that short episodes are not
            over-represented.
        deterministic: the mode of the policy instead of a sample.
        empty_state_every_step: take the memory away: every observation is presented as the first of an episode.
        seed: of the environments and of what the policy samples, by torch's generators, which are afterwards as they
            were; None leaves the random state of both. Environment i has `seed + i`, as in training: episodes are
            others than those of training where the two seeds are further apart than there are environments.

    Raises:
        TypeError: `env` is no environment.
        ValueError: `n_episodes` is below 1, or the model is collecting a rollout in `env`.
    """
    env = _as_vec_env(env)
    own = plays_in(model, env)
    if own and getattr(model, "_rollout_start", None) is not None and model._last_obs is not None:
        raise ValueError(
            "env is the one in which the model is collecting a rollout: evaluate in another one, between rollouts, or "
            "after learn()"
        )
    player = MaskedModel(model, env)

    def actor(obs: Any, state: Any, episode_start: np.ndarray) -> tuple[np.ndarray, Any]:
        if empty_state_every_step:
            episode_start = np.ones_like(episode_start)
        return player.predict(obs, state=state, episode_start=episode_start, deterministic=deterministic)

    with nullcontext() if seed is None else _seeded_sampling(model, env.num_envs, seed):
        result = _play(actor, env, n_episodes, seed)
    if own:
        # its episodes are over: the next `learn` begins new ones, with an empty memory
        model._last_obs = None
    return result


def evaluate_random(
    env: GymEnv | VectorEnv[Any, Any, Any], n_episodes: int, *, seed: int | None = None
) -> EvaluationResult:
    """Play episodes with uniformly random actions, allowed ones where there are masks; arguments as for `evaluate`."""
    env = _as_vec_env(env)
    space = env.action_space
    space.seed(seed)
    masked = masks_actions(env, space, None)

    def actor(obs: Any, state: Any, episode_start: np.ndarray) -> tuple[np.ndarray, Any]:
        if masked:
            return np.stack([sample_allowed(space, mask) for mask in read_masks(env, space)]), state
        return np.stack([space.sample() for _ in episode_start]), state

    return _play(actor, env, n_episodes, seed)


@contextmanager
def _seeded_sampling(model: Any, n_envs: int, seed: int) -> Iterator[None]:
    """Samples of the model follow from the seed; torch's generators and the noise of gSDE come back afterwards."""
    device = torch.device(getattr(model, "device", "cpu"))
    noise = getattr(getattr(model, "policy", None), "action_dist", None)
    kept = dict(vars(noise)) if isinstance(noise, StateDependentNoiseDistribution) else {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        try:
            if kept:
                model.policy.reset_noise(n_envs)
            yield
        finally:
            if kept:
                vars(noise).update(kept)


def _as_vec_env(env: Any) -> VecEnv:
    if isinstance(env, VectorEnv):
        return GymnasiumVecEnv(env)
    if isinstance(env, gymnasium.Env):
        return DummyVecEnv([lambda: env])
    if not isinstance(env, VecEnv):
        raise TypeError(
            f"env={env!r} is no environment: hand over what gymnasium.make, gymnasium.make_vec or Stable-Baselines3's "
            "make_vec_env returned"
        )
    return env


def plays_in(model: Any, env: VecEnv) -> bool:
    """Whether the model learns in any of these environments."""
    own = getattr(model, "env", None)
    return isinstance(own, VecEnv) and not copies(own).isdisjoint(copies(env))


def _play(actor: Actor, env: VecEnv, n_episodes: int, seed: int | None) -> EvaluationResult:
    if n_episodes < 1:
        raise ValueError(f"n_episodes={n_episodes} must be at least 1")
    if seed is not None:
        seed_envs(env, seed)
    # every environment has its quota from the start: taking what ends first would favour short episodes
    quota = (n_episodes + np.arange(env.num_envs)) // env.num_envs
    counts = np.zeros(env.num_envs, int)
    totals, lengths = np.zeros(env.num_envs), np.zeros(env.num_envs, int)
    finished: list[tuple[float, int, bool | None]] = []
    normalizer = unwrap_vec_normalize(env)
    with statistics_kept(normalizer):
        obs, state, step = reset_envs(env), None, 0
        episode_start = np.ones(env.num_envs, bool)
        while (counts < quota).any():
            actions, state = actor(obs, state, episode_start)
            obs, rewards, episode_start, infos = step_envs(env, actions, f"in step {step} of the evaluation")
            step += 1
            totals += rewards if normalizer is None else normalizer.get_original_reward()
            lengths += 1
            for row in np.flatnonzero(episode_start):
                if counts[row] < quota[row] and SKIPPED not in infos[row]:
                    finished.append(_outcome(infos[row], totals[row], lengths[row]))
                    counts[row] += 1
                totals[row], lengths[row] = 0.0, 0
    return _result(finished)


def _outcome(info: dict[str, Any], total: float, length: int) -> tuple[float, int, bool | None]:
    # a Monitor saw the rewards before any wrapper around it scaled them
    episode = info.get("episode", {"r": total, "l": length})
    success = info.get("is_success")
    return float(episode["r"]), int(episode["l"]), None if success is None else bool(success)


def _result(finished: list[tuple[float, int, bool | None]]) -> EvaluationResult:
    returns, lengths, successes = zip(*finished, strict=True)
    told = all(success is not None for success in successes)
    return EvaluationResult(np.array(returns), np.array(lengths), np.array(successes, bool) if told else None)
