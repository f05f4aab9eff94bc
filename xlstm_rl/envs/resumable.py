"""A wrapper that can bring another copy of an environment to the same point of the same episode."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers.utils import RunningMeanStd

# Actions of the running episode that are kept; a longer episode cannot be brought back.
MAX_ACTIONS = 100_000

Point = dict[str, Any]


@dataclass
class _Episode:
    """How the running episode came about."""

    generators: list[Any]
    own: Any
    running: list[dict[str, Any]]
    arguments: dict[str, Any]
    actions: list[Any] = field(default_factory=list)


class Resumable(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Records what determines the running episode, so that it can be replayed elsewhere.

    An episode is determined by the random generators before its reset and the actions since. `resume_at` restores the
    former and repeats the latter, so an environment, with all its wrappers, resumes exactly if all its randomness comes
    from `self.np_random` and its spaces; the running statistics of gymnasium's wrappers `NormalizeObservation` and
    `NormalizeReward` are brought back too. An environment that carries more from one episode to the next (a curriculum,
    the generator of a simulator) provides it through two methods of its own, which are called before a reset:
    `get_state()` returns plain values (numbers, strings, arrays, lists and dicts of them), and `set_state(state)` takes
    them.

    It must be the outermost wrapper: what lies outside is not brought back.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        """Wrap `env`."""
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._inner: gym.Env[Any, Any] = env.unwrapped
        spaces = (self._inner.action_space, self._inner.observation_space)
        self._random: list[Any] = [self._inner, *(part for space in spaces for part in _parts(space))]
        self._tells_state = env.has_wrapper_attr("get_state") and env.has_wrapper_attr("set_state")
        self._keeping = [layer for layer in _layers(env) if any(map(_is_running, vars(layer).values()))]
        self._episode: _Episode | None = None
        self._observation: Any = None
        self._marked: Point | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        arguments: dict[str, Any] = {"seed": seed} if options is None else {"seed": seed, "options": options}
        own = copy.deepcopy(self.env.get_wrapper_attr("get_state")()) if self._tells_state else None
        self._episode = _Episode(self._generators(), own, list(map(_running, self._keeping)), arguments)
        self._observation, info = self.env.reset(**arguments)
        return self._observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step and note the action."""
        if self._episode is not None and len(self._episode.actions) <= MAX_ACTIONS:
            self._episode.actions.append(np.array(action))
        result = self.env.step(action)
        self._observation = result[0]
        return result

    def mark_point(self) -> None:
        """Make the present the point that `resume_point` tells; costs as much as one copy of an observation."""
        if self._episode is None:
            return
        # the lists of the running episode only ever grow
        self._marked = {
            "episode": self._episode,
            "length": len(self._episode.actions),
            "generators": self._generators(),
            "observation": copy.deepcopy(self._observation),
        }

    def resume_point(self) -> Point | None:
        """The marked point as plain values.

        None without a mark, where the episode is too long to be kept, or where a random generator is none of NumPy's.
        """
        marked = self._marked
        if marked is None or marked["length"] > MAX_ACTIONS:
            return None
        episode: _Episode = marked["episode"]
        if any(state is None for state in (*episode.generators, *marked["generators"])):
            return None
        actions = episode.actions[: marked["length"]]
        return {
            "generators": episode.generators,
            "generators_after": marked["generators"],
            "own": episode.own,
            "running": episode.running,
            "arguments": episode.arguments,
            "actions": np.stack(actions) if actions else np.zeros(0),
            "observation": marked["observation"],
        }

    def resume_at(self, point: Point) -> bool:
        """Go to a point that `resume_point` told.

        Returns:
            Whether the observation there is the one noted; False means that the environment is not deterministic,
            another one, or failed on the way, and wants a reset.

        Raises:
            KeyError, TypeError, ValueError: this is no point of such an environment.
        """
        actions = list(point["actions"])
        for action in actions:
            if not self.action_space.contains(action):
                raise ValueError(f"action {str(action):.200} is none of {self.action_space}")
        if point["own"] is not None:
            self.env.get_wrapper_attr("set_state")(copy.deepcopy(point["own"]))
        # points of earlier versions have none
        for layer, kept in zip(self._keeping, point.get("running", ()), strict=False):
            _set_running(layer, kept)
        self._set_generators(point["generators"])
        if not self._replay(point["arguments"], actions):
            return False
        # whoever drew actions from the space is no part of the episode
        self._set_generators(point["generators_after"])
        return _equal(self._observation, point["observation"])

    def _replay(self, arguments: dict[str, Any], actions: list[Any]) -> bool:
        """Play an episode again; whether it was as long as that."""
        if not isinstance(arguments, dict) or set(arguments) - {"seed", "options"}:
            raise ValueError(f"arguments {arguments!r:.200} are none of reset()")
        try:
            self.reset(**arguments)
            for action in actions:
                _, _, terminated, truncated, _ = self.step(action)
                if terminated or truncated:
                    return False
        # whatever an environment can raise: it did not when the episode was played first
        except Exception:
            return False
        return True

    def _generators(self) -> list[Any]:
        """States of the random generators of the environment and its spaces; None of one that has no such generator."""
        return [_state_of(part) for part in self._random]

    def _set_generators(self, states: list[Any]) -> None:
        for part, state in zip(self._random, states, strict=True):
            part.np_random.bit_generator.state = state


def _layers(env: Any) -> Iterator[Any]:
    """An environment, its wrappers first."""
    yield env
    while env is not env.unwrapped:
        env = env.env
        yield env


def _is_running(value: Any) -> bool:
    return isinstance(value, RunningMeanStd)


def _running(layer: Any) -> dict[str, Any]:
    """What a wrapper with running statistics keeps beyond an episode: those, and its discounted sum of rewards."""
    kept = {name: part for name, part in vars(layer).items() if isinstance(part, RunningMeanStd | np.ndarray)}
    return {name: copy.deepcopy(vars(part) if _is_running(part) else part) for name, part in kept.items()}


def _set_running(layer: Any, kept: dict[str, Any]) -> None:
    for name, part in copy.deepcopy(kept).items():
        if _is_running(vars(layer)[name]):
            vars(vars(layer)[name]).update(part)
        else:
            setattr(layer, name, part)


def _parts(space: gym.Space[Any]) -> Iterator[gym.Space[Any]]:
    """A space and those it is made of, which draw from generators of their own."""
    yield space
    inner = getattr(space, "spaces", ())
    for part in inner.values() if isinstance(inner, dict) else inner:
        yield from _parts(part)


def _state_of(part: Any) -> Any:
    """The state of a random generator; None where there is none of NumPy's, as in simulators with their own."""
    try:
        return part.np_random.bit_generator.state
    except AttributeError:
        return None


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, tuple):
        return isinstance(other, tuple) and len(one) == len(other) and all(map(_equal, one, other))
    return np.array_equal(np.asarray(one), np.asarray(other))
