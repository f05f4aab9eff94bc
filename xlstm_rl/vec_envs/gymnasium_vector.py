"""Any `gymnasium.vector.VectorEnv` as a vector environment of Stable-Baselines3."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from traceback import walk_tb
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from stable_baselines3.common.monitor import Monitor
from torch import Tensor

from xlstm_rl.vec_envs.env_contract import (
    SKIPPED,
    CountedVecEnv,
    FaultyEnvironmentError,
    as_numbers,
    episode_record,
    flags_by_env,
    map_obs,
    numbers_by_env,
    one_for_each,
    own_copy,
)

Indices = int | Iterable[int] | None


class GymnasiumVecEnv(CountedVecEnv):
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
        self._mode = AutoresetMode((env.metadata or {}).get("autoreset_mode", AutoresetMode.NEXT_STEP))
        # vector wrappers do not expect resets that the mode does not announce
        self._masked_reset = self._mode is AutoresetMode.DISABLED or (
            self._mode is AutoresetMode.NEXT_STEP and isinstance(env, SyncVectorEnv | AsyncVectorEnv)
        )
        self._masked_through_wrappers = self._masked_reset and env is not env.unwrapped
        self._actions: Any = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._start, self._begun, self._steps = time.perf_counter(), False, 0
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        self._resets_next = np.zeros(self.num_envs, bool)

    def reset(self) -> Any:
        """Start new episodes everywhere: observations [n_envs, ...], or a dict of those."""
        seeds: Any = _for_gymnasium(self._seeds)
        obs: Any = None
        for options, rows in self._groups_of_options():
            # the first reset of gymnasium's must be one of all; those of other options are then reset once more
            masked = {"reset_mask": rows} if self._begun and not rows.all() else {}
            told = {"options": options | masked} if options or masked else {}
            obs, infos = self._ask(partial(self.env.reset, seed=seeds, **told), "on reset", 2)
            self._begun = True
            for row in np.flatnonzero(rows):
                self.reset_infos[row] = _by_environment(infos, self.num_envs)[row]
        self._reset_seeds()
        self._reset_options()
        self._returns[:], self._lengths[:], self._resets_next[:] = 0, 0, False
        return map_obs(own_copy, obs)

    def _ask(self, question: Callable[[], Any], place: str, parts: int) -> Any:
        """What the environment answers, a tuple of so many parts."""
        try:
            answer = question()
        # everything that an environment can raise is to be told
        except Exception as error:
            row = _row_at_fault(error, self.env.unwrapped)
            raise FaultyEnvironmentError(row, f"failed {place}: {type(error).__name__}: {error}") from error
        if not isinstance(answer, tuple) or len(answer) != parts:
            raise FaultyEnvironmentError(None, f"answered {place} what is no tuple of {parts} entries: {answer!r:.200}")
        return answer

    def _groups_of_options(self) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Different options of the next reset, and the environments that they are for, bool [n_envs]."""
        kinds: list[dict[str, Any]] = []
        of_row = []
        for given in self._options:
            known = [index for index, kind in enumerate(kinds) if _same(kind, given)]
            if not known:
                kinds.append(given)
            of_row.append(known[0] if known else len(kinds) - 1)
        if len(kinds) > 1 and not (self._masked_reset or isinstance(self.env, SyncVectorEnv | AsyncVectorEnv)):
            raise ValueError(
                f"the environments got different options, and {type(self.env.unwrapped).__name__} takes the same for "
                "all: use a SyncVectorEnv or AsyncVectorEnv without wrappers, or a vector environment of "
                "Stable-Baselines3"
            )
        for index, options in enumerate(kinds):
            yield options, np.array(of_row) == index

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions [n_envs, ...] for `step_wait`."""
        one_for_each(actions, self.num_envs, "actions")
        self._actions = actions

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Step every environment: observations, rewards [n_envs], dones [n_envs] and infos."""
        place = f"in step {self._steps} of this environment"
        self._steps += 1
        answer = self._ask(partial(self.env.step, self._actions), place, 5)
        # in arrays of their own, which later steps do not write over
        obs = map_obs(own_copy, answer[0])
        rewards = numbers_by_env(answer[1], "rewards", self.num_envs, place).astype(np.float32)
        terminated = flags_by_env(answer[2], "terminated", self.num_envs, place)
        truncated = flags_by_env(answer[3], "truncated", self.num_envs, place)
        infos = _by_environment(answer[4], self.num_envs)
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
            final = map_obs(itemgetter(row), obs)
        elapsed = round(time.perf_counter() - self._start, 6)
        episode = {"r": round(float(self._returns[row]), 6), "l": int(self._lengths[row]), "t": elapsed}
        foreign = self._masked_through_wrappers or episode_record(info) is None
        told = info | {"episode": episode} if foreign else {"episode": episode} | info
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
        return map_obs(partial(_where, mask), first, obs)

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    @property
    def calls_one_alone(self) -> bool:
        """Whether methods can be called in one environment and not in the others."""
        return isinstance(self.env.unwrapped, SyncVectorEnv)

    def has_attr(self, attr_name: str) -> bool:
        """Whether all environments have an attribute; gymnasium's would call methods to find out."""
        inner = self.env.unwrapped
        if isinstance(inner, SyncVectorEnv | AsyncVectorEnv) and attr_name != "render_mode":
            return all(inner.call("has_wrapper_attr", attr_name))
        return hasattr(self._layer_with(attr_name), attr_name)

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """An attribute of each environment.

        Of environments without parts, the one of all; an array, list or tuple with an entry for each is taken apart.

        Raises:
            AttributeError: there is no such attribute.
        """
        rows = self._get_indices(indices)
        inner = self.env.unwrapped
        if isinstance(inner, SyncVectorEnv | AsyncVectorEnv) and attr_name != "render_mode":
            self._require(attr_name)
            # its own get_attr would call what can be called
            values = inner.call("get_wrapper_attr", attr_name)
            return [values[row] for row in rows]
        value = getattr(self._layer_with(attr_name), attr_name)
        if isinstance(value, np.ndarray | list | tuple) and len(value) == self.num_envs:
            return [value[row] for row in rows]
        return [value for _ in rows]

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        """Set an attribute of each environment; of environments without parts, of all at once.

        Raises:
            ValueError: a choice among environments without parts.
        """
        rows = self._get_indices(indices)
        inner = self.env.unwrapped
        if isinstance(inner, SyncVectorEnv):
            for row in rows:
                inner.envs[row].set_wrapper_attr(attr_name, value)
        elif isinstance(inner, AsyncVectorEnv):
            everywhere = len(set(rows)) == self.num_envs
            values = [None] * self.num_envs if everywhere else self.get_attr(attr_name)
            inner.set_attr(attr_name, [value if row in rows else kept for row, kept in enumerate(values)])
        else:
            self._refuse_choice(f"set {attr_name!r}", rows)
            setattr(inner, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Indices = None, **kwargs: Any) -> list[Any]:
        """Call a method of each environment; of environments without parts, once, for results [n_envs, ...] or None.

        Raises:
            AttributeError: there is no such method.
            ValueError: a choice among environments that are called together, or results that are not one for each.
        """
        rows = self._get_indices(indices)
        inner = self.env.unwrapped
        if isinstance(inner, SyncVectorEnv):
            return [inner.envs[row].get_wrapper_attr(method_name)(*args, **kwargs) for row in rows]
        self._refuse_choice(f"call {method_name!r}", rows)
        if isinstance(inner, AsyncVectorEnv):
            self._require(method_name)
            results: Any = inner.call(method_name, *args, **kwargs)
        else:
            results = getattr(self._layer_with(method_name), method_name)(*args, **kwargs)
        if results is None:
            return [None for _ in rows]
        if not isinstance(results, np.ndarray | Sequence) or len(results) != self.num_envs:
            raise ValueError(
                f"{method_name!r} of {inner} gave {results!r:.80}, not a result for each of {self.num_envs}"
            )
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

    def _layer_with(self, name: str) -> Any:
        """The outermost layer that has an attribute, or the innermost: wrappers of gymnasium hide what is inside."""
        layer: Any = self.env
        while not hasattr(layer, name) and layer is not layer.unwrapped:
            layer = layer.env
        return layer

    def _require(self, name: str) -> None:
        if not self.has_attr(name):
            # asked for it, a process of gymnasium ends
            raise AttributeError(f"the environments have no attribute {name!r}")

    def _refuse_choice(self, what: str, rows: list[int]) -> None:
        if sorted(rows) != list(range(self.num_envs)):
            why = "calls all its parts at once" if isinstance(self.env.unwrapped, AsyncVectorEnv) else "has no parts"
            raise ValueError(
                f"cannot {what} in environments {rows} alone: {type(self.env.unwrapped).__name__} {why}; leave out "
                "indices, or use a SyncVectorEnv or a vector environment of Stable-Baselines3"
            )


# What gymnasium calls the number of an environment in its loops.
_AT = ("index", "env_idx", "i")


def _row_at_fault(error: Exception, env: Any) -> int | None:
    """Which environment of gymnasium's vectors failed; None if unknown. They name none, but stopped at one."""
    row = None
    for frame, _ in walk_tb(error.__traceback__):
        if "concatenate" in frame.f_code.co_name:
            # observations are stacked when the loop over the environments is over
            return None
        if isinstance(env, SyncVectorEnv | AsyncVectorEnv) and frame.f_locals.get("self") is env:
            row = next((frame.f_locals[name] for name in _AT if name in frame.f_locals), row)
    return row if isinstance(row, int) else None


def _for_gymnasium(seeds: Sequence[int | None]) -> int | list[int | None] | None:
    """Seeds of every environment; the first alone, which some can only take, where the others follow it."""
    first = seeds[0]
    if first is not None and list(seeds) == list(range(first, first + len(seeds))):
        return first
    return None if all(seed is None for seed in seeds) else list(seeds)


def _same(one: Any, other: Any) -> bool:
    """Whether two options are equal, arrays in them too."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return one is other or np.array_equal(one, other)


def _where(mask: np.ndarray, new: Any, old: Any) -> Any:
    wide = mask.reshape(-1, *[1] * (old.ndim - 1))
    if isinstance(old, Tensor):
        return torch.where(torch.from_numpy(wide).to(old.device), new, old)
    return np.where(wide, new, old)


def _by_environment(infos: dict[str, Any], n_envs: int) -> list[dict[str, Any]]:
    """gymnasium's dict of arrays, with masks under names with a leading "_", as a dict for each environment."""
    if not isinstance(infos, dict):
        raise FaultyEnvironmentError(None, f"answered infos {infos!r:.80}: those of gymnasium are a dict of arrays")
    rows: list[dict[str, Any]] = [{} for _ in range(n_envs)]
    for key, values in infos.items():
        if key.startswith("_") and key[1:] in infos:
            continue
        mask: Any = as_numbers(infos.get(f"_{key}", np.ones(n_envs, bool)))
        parts = _by_environment(values, n_envs) if isinstance(values, dict) else values
        for row in np.flatnonzero(mask):
            part = parts[row]
            rows[row][key] = part.item() if isinstance(part, np.generic) else _copied(part)
    return rows


def _copied(part: Any) -> Any:
    """An entry of an info that later steps do not write over."""
    return map_obs(_copied, part) if isinstance(part, dict) else part.copy() if isinstance(part, np.ndarray) else part
