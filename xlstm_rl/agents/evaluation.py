"""Playing whole episodes with a trained agent, the same agent without its memory, or at random."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization, unwrap_vec_normalize

from xlstm_rl.agents.heads import masks_actions, read_masks, sample_allowed, takes_masks
from xlstm_rl.agents.training_state import statistics_kept
from xlstm_rl.vec_envs.env_contract import (
    SKIPPED,
    as_env_takes,
    as_numbers,
    copies,
    episode_record,
    map_obs,
    reset_envs,
    seed_envs,
    step_envs,
)
from xlstm_rl.vec_envs.guarded_vec_env import GuardedDummyVecEnv, guard
from xlstm_rl.vec_envs.gymnasium_vector import GymnasiumVecEnv


class EvaluationResult(NamedTuple):
    """Outcome of finished episodes, in the order in which they ended."""

    returns: np.ndarray
    """[n_episodes], undiscounted sums of reward, before any reward normalisation."""
    lengths: np.ndarray
    """[n_episodes], steps."""
    successes: np.ndarray | None
    """bool [n_episodes], `info["is_success"]` of the last step; None where the task does not say."""
    cut_episodes: int = 0
    """How many did not end within `max_episode_steps`; they count with what they had until then."""

    @property
    def mean_return(self) -> float:
        """Over the episodes."""
        return float(self.returns.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean return; 0 for a single episode."""
        return float(self.returns.std() / max(len(self.returns) - 1, 1) ** 0.5)


# More than an episode of any usual task takes; those of Atari end after 27,000.
MAX_EPISODE_STEPS = 30_000

Actor = Callable[[Any, Any, np.ndarray], tuple[np.ndarray, Any]]
OnStep = Callable[[int, int], object]


def evaluate(
    model: Any,
    env: GymEnv | VectorEnv[Any, Any, Any],
    n_episodes: int,
    *,
    deterministic: bool = True,
    empty_state_every_step: bool = False,
    seed: int | None = None,
    max_episode_steps: int | None = MAX_EPISODE_STEPS,
    max_steps: int | None = None,
    on_step: OnStep | None = None,
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
        max_episode_steps: an episode is cut there, for tasks without an end and agents that walk in circles; None:
            never.
        max_steps: after so many steps of all environments together no more episodes begin, so that there are fewer than
            `n_episodes` of long ones; every environment finishes at least one. None: no bound.
        on_step: called after every step with the number of finished episodes and that of steps so far, for signs of
            life; an exception that it raises ends the evaluation.

    Raises:
        TypeError: `env` is no environment.
        ValueError: `n_episodes` or another bound is below 1, or the model is collecting a rollout in `env`.
        FaultyEnvironmentError: an environment failed or answered what cannot be used.
    """
    env = as_vec_env(env)
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
        try:
            return _play(actor, env, n_episodes, seed, max_episode_steps, max_steps, on_step)
        finally:
            if own:
                # its episodes are over: the next `learn` begins new ones, with an empty memory
                model._last_obs = None


def evaluate_random(
    env: GymEnv | VectorEnv[Any, Any, Any],
    n_episodes: int,
    *,
    seed: int | None = None,
    max_episode_steps: int | None = MAX_EPISODE_STEPS,
    max_steps: int | None = None,
    on_step: OnStep | None = None,
) -> EvaluationResult:
    """Play episodes with uniformly random actions, allowed ones where there are masks; arguments as for `evaluate`."""
    env = as_vec_env(env)
    space = env.action_space
    space.seed(seed)
    masked = masks_actions(env, space, None)

    def actor(obs: Any, state: Any, episode_start: np.ndarray) -> tuple[np.ndarray, Any]:
        if masked:
            return np.stack([sample_allowed(space, mask) for mask in read_masks(env, space)]), state
        return np.stack([space.sample() for _ in episode_start]), state

    return _play(actor, env, n_episodes, seed, max_episode_steps, max_steps, on_step)


class MaskedModel:
    """A model whose `predict` looks up the masks of the environment that it plays in.

    Pass it to code that calls `predict` without masks, such as Stable-Baselines3's `evaluate_policy`:
    `evaluate_policy(MaskedModel(model, env), env)`. Where the environment has no `action_masks`, or the model does not
    take them, it behaves as the model itself. Everything but `predict` is the model's.

    Args:
        model: with Stable-Baselines3's `predict`.
        env: the environment it will play in.

    Raises:
        ValueError: the model has use_masking=True and the environment no masks.
    """

    def __init__(self, model: Any, env: VecEnv) -> None:
        self._model, self._env = model, env
        wanted = getattr(model, "use_masking", None)
        self._masked = takes_masks(model) and masks_actions(env, env.action_space, wanted)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def predict(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, Any]:
        """`predict` of the model with the masks of the present step."""
        if self._masked:
            kwargs["action_masks"] = read_masks(self._env, self._env.action_space)
        actions, state = self._model.predict(*args, **kwargs)
        return actions, state


class MaskedEvalCallback(EvalCallback):
    """Stable-Baselines3's `EvalCallback` by `evaluate`: masks included, and evaluations end.

    sb3-contrib's `MaskableEvalCallback` is for policies without memory: it does not carry their state.

    Args:
        *args: as for `EvalCallback`.
        max_episode_steps: an episode is cut there; None: never.
        **kwargs: as for `EvalCallback`.
    """

    def __init__(self, *args: Any, max_episode_steps: int | None = MAX_EPISODE_STEPS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_episode_steps = max_episode_steps

    def _on_step(self) -> bool:
        if self.eval_freq <= 0 or self.n_calls % self.eval_freq != 0:
            return True
        if self.model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, self.eval_env)
        result = evaluate(
            self.model,
            self.eval_env,
            self.n_eval_episodes,
            deterministic=self.deterministic,
            max_episode_steps=self.max_episode_steps,
            on_step=(lambda finished, steps: self.eval_env.render("human")) if self.render else None,
        )
        if result.cut_episodes:
            warnings.warn(
                f"{result.cut_episodes} of {self.n_eval_episodes} episodes of the evaluation were cut after "
                f"{self.max_episode_steps:,} steps (max_episode_steps)",
                stacklevel=2,
            )
        self._is_success_buffer = [] if result.successes is None else result.successes.tolist()
        if self.log_path is not None:
            self._write_file(result)
        self._tell(result)
        return self._after(result)

    def _write_file(self, result: EvaluationResult) -> None:
        assert self.log_path is not None, "asked before"
        self.evaluations_timesteps.append(self.num_timesteps)
        self.evaluations_results.append(result.returns.tolist())
        self.evaluations_length.append(result.lengths.tolist())
        successes: dict[str, Any] = {}
        if result.successes is not None:
            self.evaluations_successes.append(self._is_success_buffer)
            successes["successes"] = self.evaluations_successes
        np.savez(
            self.log_path,
            timesteps=self.evaluations_timesteps,
            results=self.evaluations_results,
            ep_lengths=self.evaluations_length,
            **successes,
        )

    def _tell(self, result: EvaluationResult) -> None:
        mean_return, mean_length = result.mean_return, float(result.lengths.mean())
        if self.verbose >= 1:
            print(f"Eval num_timesteps={self.num_timesteps}, episode_reward={_spread(result.returns)}")
            print(f"Episode length: {_spread(result.lengths)}")
        self.logger.record("eval/mean_reward", mean_return)
        self.logger.record("eval/mean_ep_length", mean_length)
        if result.successes is not None:
            if self.verbose >= 1:
                print(f"Success rate: {100 * result.successes.mean():.2f}%")
            self.logger.record("eval/success_rate", float(result.successes.mean()))
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)

    def _after(self, result: EvaluationResult) -> bool:
        """Keep the best and ask the callbacks within this one; whether training goes on."""
        goes_on, self.last_mean_reward = True, result.mean_return
        if result.mean_return > self.best_mean_reward:
            if self.verbose >= 1:
                print("New best mean reward!")
            if self.best_model_save_path is not None:
                self.model.save(Path(self.best_model_save_path) / "best_model")
            self.best_mean_reward = result.mean_return
            if self.callback_on_new_best is not None:
                goes_on = self.callback_on_new_best.on_step()
        return goes_on and (self.callback is None or self._on_event())


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.2f} +/- {values.std():.2f}"


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


def as_vec_env(env: Any) -> VecEnv:
    """Any environment as a vector environment that names its faults.

    Raises:
        TypeError: it is none.
    """
    if isinstance(env, VectorEnv):
        return GymnasiumVecEnv(env)
    if isinstance(env, gymnasium.Env):
        return GuardedDummyVecEnv([lambda: env])
    if not isinstance(env, VecEnv):
        raise TypeError(
            f"env={env!r} is no environment: hand over what gymnasium.make, gymnasium.make_vec or Stable-Baselines3's "
            "make_vec_env returned"
        )
    return guard(env)


def quotas(n_episodes: int, n_envs: int) -> np.ndarray:
    """How many episodes every environment plays, [n_envs]."""
    return (n_episodes + np.arange(n_envs)) // n_envs


def plays_in(model: Any, env: VecEnv) -> bool:
    """Whether the model learns in any of these environments."""
    own = getattr(model, "env", None)
    return isinstance(own, VecEnv) and not copies(own).isdisjoint(copies(env))


def _play(
    actor: Actor,
    env: VecEnv,
    n_episodes: int,
    seed: int | None,
    max_episode_steps: int | None,
    max_steps: int | None,
    on_step: OnStep | None,
) -> EvaluationResult:
    bounds = {"n_episodes": n_episodes, "max_episode_steps": max_episode_steps, "max_steps": max_steps}
    for name, value in bounds.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if seed is not None:
        seed_envs(env, seed)
    # every environment has its quota from the start: taking what ends first would favour short episodes
    left = quotas(n_episodes, env.num_envs)
    totals, lengths = np.zeros(env.num_envs), np.zeros(env.num_envs, int)
    # episodes that were cut and go on all the same, for one environment alone cannot be reset
    stuck = np.zeros(env.num_envs, bool)
    finished: list[_Outcome] = []
    normalizer = unwrap_vec_normalize(env)
    with statistics_kept(normalizer):
        obs, state, steps = reset_envs(env), None, 0
        episode_start = np.ones(env.num_envs, bool)
        while left.any():
            if stuck[left > 0].all():
                obs, episode_start = reset_envs(env), np.ones(env.num_envs, bool)
                totals[:], lengths[:], stuck[:] = 0.0, 0, False
            actions, state = actor(map_obs(as_numbers, obs), state, episode_start)
            taken = as_env_takes(actions, obs)
            obs, rewards, episode_start, infos = step_envs(env, taken, f"in step {steps} of the evaluation")
            steps += 1
            totals += rewards if normalizer is None else normalizer.get_original_reward()
            lengths += 1
            too_long = (lengths == max_episode_steps) & ~episode_start
            for row in np.flatnonzero(episode_start | too_long):
                if left[row] and not stuck[row] and SKIPPED not in infos[row]:
                    cut = bool(too_long[row])
                    finished.append(_outcome({} if cut else infos[row], totals[row], lengths[row], cut=cut))
                    left[row] -= 1
            stuck = (stuck | too_long) & ~episode_start
            totals[episode_start], lengths[episode_start] = 0.0, 0
            if max_steps is not None and steps * env.num_envs >= max_steps and finished:
                # episodes under way are finished: to leave out the long ones would flatter
                left = np.where((lengths > 0) & ~stuck, np.minimum(left, 1), 0)
            if on_step is not None:
                on_step(len(finished), steps)
    return _result(finished)


class _Outcome(NamedTuple):
    total: float
    length: int
    success: bool | None
    cut: bool


def _outcome(info: dict[str, Any], total: float, length: int, *, cut: bool) -> _Outcome:
    # a Monitor saw the rewards before any wrapper around it scaled them
    episode = episode_record(info) or {"r": total, "l": length}
    success = info.get("is_success")
    if cut:
        # what is not over has not succeeded, where episodes can
        success = False
    return _Outcome(float(episode["r"]), int(episode["l"]), None if success is None else bool(success), cut)


def _result(finished: list[_Outcome]) -> EvaluationResult:
    returns, lengths, successes, cut = zip(*finished, strict=True)
    whole = [success for success, one in zip(successes, cut, strict=True) if not one]
    told = bool(whole) and all(success is not None for success in whole)
    return EvaluationResult(np.array(returns), np.array(lengths), np.array(successes, bool) if told else None, sum(cut))
