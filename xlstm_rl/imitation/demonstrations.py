"""Episodes to learn from: recorded from a player, from the oracle of a task, or read from a Minari dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, unwrap_vec_normalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from xlstm_rl.agents.evaluation import as_vec_env, evaluate, quotas
from xlstm_rl.vec_envs.env_contract import SKIPPED, has_method, map_obs, reset_envs, vec_step
from xlstm_rl.vec_envs.inputs import InputLayout


class Demonstration(NamedTuple):
    """An episode of T steps, by the names that Minari's `EpisodeData` has, which serves as well."""

    observations: Any
    """[T + 1, ...] or a dict of those, as the environment gives them; the last one is that after the last step."""
    actions: np.ndarray
    """[T, ...], as the environment takes them."""
    rewards: np.ndarray
    """[T]"""
    terminations: np.ndarray
    """bool [T], the task ended there."""
    truncations: np.ndarray
    """bool [T], a time limit ended it there."""


class Oracle:
    """Plays what the method `oracle_action()` of each environment says; the tasks of the suite have one.

    Args:
        env: in which it will play.

    Raises:
        ValueError: the environments have no such method.
    """

    def __init__(self, env: VecEnv) -> None:
        if not has_method(env, "oracle_action"):
            raise ValueError(
                "the environment has no oracle: give it a method oracle_action() that says the best action now, or "
                "imitate recorded episodes"
            )
        self._env = env

    def predict(self, observation: Any, **_: Any) -> tuple[np.ndarray, None]:
        """The actions [n_envs, ...]."""
        return np.array(self._env.env_method("oracle_action")), None


class _Recorder(VecEnvWrapper):
    """Keeps the finished episodes of every environment, which it leaves as they are."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.finished: list[list[Demonstration]] = [[] for _ in range(self.num_envs)]

    def reset(self) -> VecEnvObs:
        obs: VecEnvObs = reset_envs(self.venv)
        self._steps: list[list[Any]] = [[] for _ in range(self.num_envs)]
        self._seen = [[_row(obs, row)] for row in range(self.num_envs)]
        return obs

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = np.array(actions)
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos = vec_step(self.venv, self.venv.step_wait(), "in a step")
        for row, (done, info) in enumerate(zip(dones, infos, strict=True)):
            self._steps[row].append((self._actions[row], rewards[row]))
            if not done:
                self._seen[row].append(_row(obs, row))
                continue
            if SKIPPED not in info and "terminal_observation" in info:
                self._seen[row].append(info["terminal_observation"])
                self.finished[row].append(_joined(self._seen[row], self._steps[row], info))
            self._steps[row], self._seen[row] = [], [_row(obs, row)]
        return obs, rewards, dones, infos


def record_demonstrations(
    env: GymEnv, n_episodes: int, player: Any = None, *, seed: int | None = None, **how: Any
) -> list[Demonstration]:
    """Play episodes and keep them.

    Args:
        env: environment or vector environment. Kept is what is inside of a `VecNormalize`, whose statistics stay as
            they are: who learns from the episodes normalises them as it normalises its own.
        n_episodes: every environment contributes a fixed share.
        player: with Stable-Baselines3's `predict`, such as a trained agent; None: the `Oracle` of the environment.
        seed: of the environments, and of what the player samples.
        **how: as for `evaluate`: `deterministic`, `max_episode_steps` (longer episodes are left out) and so on.

    Raises:
        FaultyEnvironmentError: an environment failed or answered what cannot be used.
        ValueError: there is no player, and the environment has no oracle.
    """
    played = as_vec_env(env)
    normalizer = unwrap_vec_normalize(played)
    recorder = _Recorder(played if normalizer is None else normalizer.venv)
    if normalizer is None:
        played = recorder
    else:
        normalizer.venv = recorder
    try:
        evaluate(Oracle(played) if player is None else player, played, n_episodes, seed=seed, **how)
    finally:
        if normalizer is not None:
            normalizer.venv = recorder.venv
    by_env = zip(recorder.finished, quotas(n_episodes, recorder.num_envs), strict=True)
    return [episode for finished, quota in by_env for episode in finished[:quota]]


def read_minari(dataset_id: str) -> Sequence[Any]:
    """The episodes of a local Minari dataset (https://minari.farama.org); nothing is downloaded.

    Args:
        dataset_id: such as "D4RL/door/expert-v2"; its folder lies below MINARI_DATASETS_PATH, by default
            ~/.minari/datasets.

    Raises:
        ImportError: Minari is not installed.
        FileNotFoundError: there is no such dataset on this machine.
    """
    try:
        import minari
    except ImportError as error:
        raise ImportError(f"{error}; Minari datasets need: pip install 'xlstm-rl[minari]'") from error
    try:
        return [*minari.load_dataset(dataset_id)]
    # of ids that are none
    except (FileNotFoundError, ValueError) as error:
        known = ", ".join(minari.list_local_datasets()) or "none"
        raise FileNotFoundError(
            f"there is no Minari dataset {dataset_id!r} on this machine, there are: {known}; get one that is published "
            f"with: minari download {dataset_id}"
        ) from error


def with_memory_inputs(episode: Any, layout: InputLayout) -> Demonstration:
    """An episode of an environment, with the observations that `MemoryInputs` around it would have given."""
    actions = np.stack([np.zeros(layout.action_size), *map(layout.encode, episode.actions)])
    rewards = np.concatenate([[0.0], episode.rewards])[:, None]
    start = np.zeros_like(rewards)
    start[0] = 1.0
    observations = layout.join(episode.observations, actions, rewards, start)
    return Demonstration(observations, episode.actions, episode.rewards, episode.terminations, episode.truncations)


def _row(obs: Any, row: int) -> Any:
    return map_obs(lambda part: np.array(part[row]), obs)


def _joined(seen: list[Any], steps: list[Any], info: dict[str, Any]) -> Demonstration:
    actions, rewards = zip(*steps, strict=True)
    last = np.arange(len(steps)) == len(steps) - 1
    cut = bool(info.get("TimeLimit.truncated", False))
    observations = map_obs(lambda *parts: np.stack(parts), *seen)
    return Demonstration(observations, np.stack(actions), np.array(rewards), last & (not cut), last & cut)
