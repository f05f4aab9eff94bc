"""Any `gymnasium.vector.VectorEnv` as a vector environment of Stable-Baselines3."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from xlstm_rl.agents.nonfinite import SKIPPED

Indices = int | Iterable[int] | None


class GymnasiumVecEnv(VecEnv):
    """Presents a gymnasium vector environment as Stable-Baselines3 wants it: reset in the step that ends an episode.

    How the environment resets itself (`metadata["autoreset_mode"]`) decides what happens at the end of an episode:

    - SAME_STEP: its final observation goes into the info.
    - DISABLED, and NEXT_STEP of a bare Sync- or AsyncVectorEnv of gymnasium: it is reset at once with a reset mask.
    - NEXT_STEP of others, vector wrappers included: their next step only resets and ignores its action. That step is an
      episode of its own here, whose one observation belongs to nobody; the info marks it as "skipped_step", it has no
      "episode", and `RecurrentPPO` gives it no weight. Prefer SAME_STEP where there is a choice.

    Episodes are recorded as `Monitor` would: the info of a final step has "episode" with return "r", length "l" and
    seconds "t", unless the environment has put it there. In the mode DISABLED that of vector wrappers does not count:
    gymnasium's set the counters of all environments to zero where one is reset.

    Args:
        env: the environment.

    Raises:
        TypeError: `env` is no gymnasium vector environment.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        if not isinstance(env, VectorEnv):
            raise TypeError(
                f"env is a {type(env).__name__}: make one with gymnasium.make_vec, or hand over a gymnasium.Env"
            )
        self.env = env
        self._mode = AutoresetMode(env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        # vector wrappers do not expect resets that the mode does not announce
        self._masked_reset = self._mode is AutoresetMode.DISABLED or (
            self._mode is AutoresetMode.NEXT_STEP and isinstance(env, SyncVectorEnv | AsyncVectorEnv)
        )
        self._masked_through_wrappers = self._masked_reset and env is not env.unwrapped
        self._actions: Any = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._start = time.perf_counter()
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        self._resets_next = np.zeros(self.num_envs, bool)

    def reset(self) -> Any:
        """Start new episodes everywhere: observations [n_envs, ...], or a dict of those."""
        options = {key: value for given in self._options for key, value in given.items()}
        seed: Any = _for_gymnasium(self._seeds)
        obs, infos = self.env.reset(seed=seed, options=options or None)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = _by_environment(infos, self.num_envs)
        self._returns[:], self._lengths[:], self._resets_next[:] = 0, 0, False
        return _copied(obs)

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions [n_envs, ...] for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Step every environment: observations, rewards [n_envs], dones [n_envs] and infos."""
        obs, rewards, terminated, truncated, vector_infos = self.env.step(self._actions)
        obs, rewards = _copied(obs), np.asarray(rewards, np.float32)
        terminated, truncated = np.asarray(terminated, bool), np.asarray(truncated, bool)
        infos = _by_environment(vector_infos, self.num_envs)
        skipped, dones = self._resets_next, terminated | truncated
        self._returns += np.where(skipped, 0, rewards)
        self._lengths += ~skipped
        for row in np.flatnonzero(skipped):
            infos[row] = {SKIPPED: "the environment was reset in this step", "TimeLimit.truncated": False}
        for row in np.flatnonzero(dones):
            infos[row] = self._final_info(int(row), infos[row], obs, bool(truncated[row] and not terminated[row]))
        if self._masked_reset and dones.any():
            obs = self._reset_where(dones, obs)
        elif self._mode is AutoresetMode.NEXT_STEP:
            self._resets_next = dones
        self._returns[dones], self._lengths[dones] = 0, 0
        return obs, rewards, dones | skipped, infos

    def _final_info(self, row: int, info: dict[str, Any], obs: Any, cut: bool) -> dict[str, Any]:
        """The info of a final step, which in the mode SAME_STEP comes beside that of the reset."""
        if self._mode is AutoresetMode.SAME_STEP:
            final = info.get("final_obs")
            self.reset_infos[row] = {key: part for key, part in info.items() if not key.startswith("final_")}
            info = dict(info.get("final_info") or {})
        else:
            final = _row(obs, row)
        elapsed = round(time.perf_counter() - self._start, 6)
        episode = {"r": round(float(self._returns[row]), 6), "l": int(self._lengths[row]), "t": elapsed}
        told = info | {"episode": episode} if self._masked_through_wrappers else {"episode": episode} | info
        return told | {"terminal_observation": final, "TimeLimit.truncated": cut}

    def _reset_where(self, mask: np.ndarray, obs: Any) -> Any:
        try:
            first, infos = self.env.reset(options={"reset_mask": mask.copy()})
        except ValueError as error:
            if not self._masked_through_wrappers:
                raise
            raise ValueError(
                f"{self.env} cannot reset some environments alone, which autoreset_mode DISABLED needs: {error}; make "
                "the environment with AutoresetMode.SAME_STEP, or NEXT_STEP where the wrapper wants that"
            ) from error
        for row, info in enumerate(_by_environment(infos, self.num_envs)):
            if mask[row]:
                self.reset_infos[row] = info
        if isinstance(obs, dict):
            return {key: _where(mask, first[key], part) for key, part in obs.items()}
        return _where(mask, first, obs)

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """An attribute of each environment; of environments without parts, the one of all.

        Raises:
            AttributeError: there is no such attribute.
        """
        if _has_parts(self.env) and attr_name != "render_mode":
            values = self.env.unwrapped.get_attr(attr_name)  # type: ignore[attr-defined]
            return [values[row] for row in self._get_indices(indices)]
        value = getattr(self.env, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        """Set an attribute of each environment; of environments without parts, of all at once.

        Raises:
            ValueError: a choice among environments without parts.
        """
        rows = list(self._get_indices(indices))
        if _has_parts(self.env):
            values = list(self.env.unwrapped.get_attr(attr_name))  # type: ignore[attr-defined]
            for row in rows:
                values[row] = value
            self.env.unwrapped.set_attr(attr_name, values)  # type: ignore[attr-defined]
            return
        self._refuse_choice(f"set {attr_name!r}", rows)
        setattr(self.env.unwrapped, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Indices = None, **kwargs: Any) -> list[Any]:
        """Call a method of each environment; of environments without parts, once, for results [n_envs, ...].

        Raises:
            AttributeError: there is no such method.
        """
        rows = list(self._get_indices(indices))
        if _has_parts(self.env):
            results: Sequence[Any] = self.env.unwrapped.call(method_name, *args, **kwargs)  # type: ignore[attr-defined]
        else:
            results = getattr(self.env, method_name)(*args, **kwargs)
        return [results[row] for row in rows]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Indices = None
    ) -> list[bool]:
        """Whether each environment is wrapped so; as "episode" is recorded here, a `Monitor` is said to be there."""
        return [issubclass(Monitor, wrapper_class) for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        """What each environment renders, as far as it does."""
        images: Any = self.env.render()
        return [None] * self.num_envs if images is None else list(images)

    def _refuse_choice(self, what: str, rows: list[int]) -> None:
        if len(rows) != self.num_envs:
            raise ValueError(
                f"cannot {what} in environments {rows} alone: {type(self.env.unwrapped).__name__} has no parts; "
                "leave out indices"
            )


def _for_gymnasium(seeds: Sequence[int | None]) -> int | list[int | None] | None:
    """Seeds of every environment; the first alone, which some can only take, where the others follow it."""
    first = seeds[0]
    if first is not None and list(seeds) == list(range(first, first + len(seeds))):
        return first
    return None if all(seed is None for seed in seeds) else list(seeds)


def _has_parts(env: VectorEnv[Any, Any, Any]) -> bool:
    return hasattr(env.unwrapped, "call")


def _copied(obs: Any) -> Any:
    """Observations that later steps do not write over."""
    return {key: np.array(part) for key, part in obs.items()} if isinstance(obs, dict) else np.array(obs)


def _row(obs: Any, row: int) -> Any:
    return {key: part[row] for key, part in obs.items()} if isinstance(obs, dict) else obs[row]


def _where(mask: np.ndarray, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    return np.where(mask.reshape(-1, *[1] * (old.ndim - 1)), new, old)


def _by_environment(infos: dict[str, Any], n_envs: int) -> list[dict[str, Any]]:
    """gymnasium's dict of arrays, with masks under names with a leading "_", as a dict for each environment."""
    rows: list[dict[str, Any]] = [{} for _ in range(n_envs)]
    for key, values in infos.items():
        if key.startswith("_") and key[1:] in infos:
            continue
        mask = infos.get(f"_{key}", np.ones(n_envs, bool))
        parts = _by_environment(values, n_envs) if isinstance(values, dict) else values
        for row in np.flatnonzero(mask):
            part = parts[row]
            rows[row][key] = part.item() if isinstance(part, np.generic) else part
    return rows
