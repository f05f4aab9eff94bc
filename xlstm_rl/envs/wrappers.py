"""What robots have to live with: noise, lost frames and delays; and wrappers by name."""

from __future__ import annotations

import difflib
import importlib
from collections import deque
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from xlstm_rl.envs.hide_velocity import HidePosition, HideVelocity
from xlstm_rl.envs.task_sizes import real_number, whole_number

FILLS = ("repeat", "zero")


class NoisyObservation(gym.ObservationWrapper[Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Adds independent Gaussian noise to every number of a Box of real numbers; nothing bounds the result."""

    facts = None
    """Bounds of the task without noise are none of this one."""

    def __init__(self, env: gym.Env[Any, Any], std: float) -> None:
        """Wrap `env`.

        Args:
            env: Environment whose observations are a Box of real numbers.
            std: Standard deviation, in the units of the observation.
        """
        gym.utils.RecordConstructorArgs.__init__(self, std=std)
        super().__init__(env)
        self._std = real_number("std", std, at_least=0.0)
        space = _real_box("NoisyObservation", env)
        self.observation_space = spaces.Box(-np.inf, np.inf, space.shape, space.dtype.type)

    def observation(self, observation: Any) -> Any:
        """As seen through noise, of the same dtype."""
        noise = self.np_random.normal(0.0, self._std, observation.shape)
        return (observation + noise).astype(observation.dtype)


class DropObservation(gym.ObservationWrapper[Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Loses an observation now and then: the last one that came is shown again, or zeros.

    The first observation of an episode is never lost.
    """

    facts = None
    """Bounds of the task without losses are none of this one."""

    def __init__(self, env: gym.Env[Any, Any], probability: float, fill: str = "repeat") -> None:
        """Wrap `env`.

        Args:
            env: Environment; with zeros one whose observations are a Box.
            probability: Of losing an observation, 0 to 1.
            fill: "repeat" shows the last observation that came, "zero" zeros.
        """
        gym.utils.RecordConstructorArgs.__init__(self, probability=probability, fill=fill)
        super().__init__(env)
        self._probability = real_number("probability", probability, at_least=0.0, at_most=1.0)
        if fill not in FILLS:
            raise ValueError(f"fill must be one of {FILLS}, got {fill!r}")
        self._zeros: Any = None
        if fill == "zero":
            space = env.observation_space
            if not isinstance(space, spaces.Box):
                raise TypeError(f"DropObservation with fill='zero' needs Box observations, got {space}; use 'repeat'")
            low, high = np.minimum(space.low, 0), np.maximum(space.high, 0)
            self.observation_space = spaces.Box(low, high, dtype=space.dtype.type)
            self._zeros = np.zeros(space.shape, space.dtype)
        self._last: Any = None

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Start an episode; its first observation is always seen."""
        self._last, info = self.env.reset(**kwargs)
        return self._last, info

    def observation(self, observation: Any) -> Any:
        """The observation, or what stands for it."""
        if self.np_random.random() >= self._probability:
            self._last = observation
            return observation
        return self._last if self._zeros is None else self._zeros.copy()


class DelayAction(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Acts with the action that was chosen some steps ago."""

    facts = None
    """Bounds of the task without a delay are none of this one."""

    def __init__(self, env: gym.Env[Any, Any], delay: int, first: Any = None) -> None:
        """Wrap `env`.

        Args:
            env: Environment.
            delay: Steps, at least 0.
            first: Action until the first chosen one is due; None for zeros (the closest to them in a Box), or the first
                action of a Discrete space.

        Raises:
            TypeError: The action space has no such zeros and no `first` is given, or the actions are masked: a mask is
                about the present, the action about a later step.
            ValueError: `first` is no action.
        """
        gym.utils.RecordConstructorArgs.__init__(self, delay=delay, first=first)
        super().__init__(env)
        self._delay = whole_number("delay", delay, at_least=0)
        if env.has_wrapper_attr("action_masks"):
            raise TypeError("DelayAction cannot delay masked actions: a mask is about the present step")
        space = env.action_space
        if first is None:
            if isinstance(space, spaces.Box):
                first = np.clip(np.zeros(space.shape, space.dtype), space.low, space.high)
            elif isinstance(space, spaces.Discrete):
                first = space.start
            else:
                raise TypeError(f"DelayAction does not know a neutral action of {space}; give `first`")
        elif isinstance(space, spaces.Box):
            first = np.asarray(first, space.dtype)
        if not space.contains(first):
            raise ValueError(f"first={first!r} is no action of {space}")
        self._first = first
        self._due: deque[Any] = deque()

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Start an episode; actions of the one before are forgotten."""
        self._due = deque([self._first] * self._delay)
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Note the action and take the one that is due."""
        self._due.append(np.array(action))
        return self.env.step(self._due.popleft())


WRAPPERS: dict[str, type[Any]] = {
    wrapper.__name__: wrapper
    for wrapper in (HideVelocity, HidePosition, NoisyObservation, DropObservation, DelayAction)
}


def wrapper_class(name: str) -> type[gym.Wrapper[Any, Any, Any, Any]]:
    """A wrapper of this package or of `gymnasium.wrappers` by its name, or one of yours as "module:Class".

    Raises:
        ValueError: There is none of this name; the message says which resembles it.
    """
    module, colon, word = name.rpartition(":")
    if not colon and word in WRAPPERS:
        return WRAPPERS[word]
    try:
        found = getattr(importlib.import_module(module if colon else "gymnasium.wrappers"), word, None)
    except (ImportError, ValueError) as error:
        raise ValueError(f"module {module!r} of wrapper {name!r} cannot be imported: {error}") from error
    if isinstance(found, type) and issubclass(found, gym.Wrapper):
        return found
    close = difflib.get_close_matches(word, [*WRAPPERS, *gym.wrappers.__all__], n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(WRAPPERS)}"
    raise ValueError(f"{name!r} is no wrapper of this package, of gymnasium.wrappers, or module:Class; {hint}")


def wrapped(env: gym.Env[Any, Any], wrappers: Mapping[str, Mapping[str, Any]]) -> gym.Env[Any, Any]:
    """`env` in wrappers, the first one innermost.

    Args:
        env: Environment.
        wrappers: Keyword arguments by name, see `wrapper_class`.

    Raises:
        ValueError: A name is unknown, or a wrapper refuses its arguments or the environment.
        TypeError: Likewise.
    """
    for name, arguments in wrappers.items():
        wrapper: Any = wrapper_class(name)
        try:
            env = wrapper(env, **arguments)
        except (AssertionError, TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"wrapper {name!r} with {dict(arguments)}: {error}") from error
    return env


def _real_box(wrapper: str, env: gym.Env[Any, Any]) -> spaces.Box:
    space = env.observation_space
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise TypeError(f"{wrapper} needs observations that are a Box of real numbers, got {space}")
    return space
