"""Control with the velocities, or the positions, taken out of the observation."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from xlstm_rl.envs.task import TaskFacts, TaskPurpose, register_task
from xlstm_rl.envs.task_sizes import whole_number


class Velocities(NamedTuple):
    """Where an environment keeps its velocities and, if measured, what is known about the task without them."""

    indices: tuple[int, ...]
    facts: TaskFacts | None = None


# Keyed by the class name of the environment, so that LunarLander needs no Box2D here.
KNOWN_VELOCITIES = {
    "CartPoleEnv": Velocities((1, 3), TaskFacts(500, 500.0, 50.0)),
    "PendulumEnv": Velocities((2,), TaskFacts(200, -150.0, -1035.0)),
    "AcrobotEnv": Velocities((4, 5), TaskFacts(500, -70.0, -100.0)),
    "MountainCarEnv": Velocities((1,)),
    "Continuous_MountainCarEnv": Velocities((1,)),
    "LunarLander": Velocities((2, 3, 5)),
}


class HideVelocity(
    gym.ObservationWrapper[NDArray[np.floating[Any]], Any, NDArray[np.floating[Any]]], gym.utils.RecordConstructorArgs
):
    """Drops the velocities from a flat Box observation; what is left keeps its order, bounds and dtype.

    Knows CartPole, Pendulum, Acrobot, MountainCar (both), LunarLander, and those MuJoCo environments of gymnasium that
    say how their observation is made up (Hopper, HalfCheetah, Walker2d, Ant and others), of which positions alone are
    left: contact forces and the like go too. For any other environment give `indices`.
    """

    hidden_name = "the sign of the last hidden number"
    """Of `hidden_variable`."""

    def __init__(self, env: gym.Env[Any, Any], indices: Sequence[int] | None = None) -> None:
        """Wrap `env`.

        Args:
            env: Environment whose observation space is a Box of one dimension.
            indices: Positions of the observation to hide; None for those of a known environment.

        Raises:
            TypeError: The observation space is not a Box of one dimension.
            ValueError: The environment is unknown and no `indices` are given, or they do not fit the observation.
        """
        gym.utils.RecordConstructorArgs.__init__(self, indices=indices)
        super().__init__(env)
        space = env.observation_space
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise TypeError(f"{type(self).__name__} needs a Box observation of one dimension, got {space}")
        size = space.shape[0]
        hidden = {
            whole_number("each of indices", index, at_least=0, at_most=size - 1)
            for index in (self._known_indices(size) if indices is None else indices)
        }
        if not 0 < len(hidden) < size:
            raise ValueError(f"indices must hide some but not all of {size} entries, got {indices}")
        self._chosen = indices is not None
        self._hidden = sorted(hidden)
        self._last_hidden = 0.0
        self._kept = np.array([index for index in range(size) if index not in hidden])
        self.observation_space = gym.spaces.Box(space.low[self._kept], space.high[self._kept], dtype=space.dtype.type)

    def _known_indices(self, size: int) -> Sequence[int]:
        """What to hide of an observation of `size` numbers."""
        positions = _mujoco_positions(self.env)
        if positions is None:
            return self._known().indices
        return range(positions.stop, size)

    def _known(self) -> Velocities:
        known = _known_velocities(self.env)
        if known is None:
            raise ValueError(
                f"{type(self).__name__} does not know where {type(self.env.unwrapped).__name__} keeps its velocities; "
                f"it knows {', '.join(KNOWN_VELOCITIES)} and MuJoCo environments that tell; for others say which "
                "entries to hide, e.g. indices=(1, 3)"
            )
        return known

    @property
    def facts(self) -> TaskFacts | None:
        """What is known about the task; None where it was never measured.

        It was not under most other step limits, nor with keyword arguments that change reward or dynamics.

        CartPole pays 1 per step, so its optimum is any step limit, and a pole that falls after 50 steps does so under
        any longer limit too.

        Estimates all, but for CartPole's optimum of 500, the step limit. The optima of Pendulum (-150) and Acrobot
        (-70) are what the best agents of RL Baselines3 Zoo reach with velocities in sight. The memoryless returns are
        the best of 5 to 10 runs of the cross-entropy method over stochastic policies with 16 tanh units, verified on
        2000 episodes: CartPole 50, Pendulum -1035, Acrobot -100. A search bounds the true ceiling from below only; the
        runs on CartPole and Pendulum agreed, those on Acrobot were still improving slowly.
        """
        spec, velocities = self.env.spec, _known_velocities(self.env)
        known = None if velocities is None or self._chosen else velocities.facts
        # a layer below that speaks of bounds has changed the task
        if known is None or spec is None or _is_changed(self.env, spec.kwargs) or self.env.has_wrapper_attr("facts"):
            return None
        limit = spec.max_episode_steps
        if limit is None:
            return None
        if known.optimal_return == known.horizon and limit > known.horizon:
            return TaskFacts(limit, float(limit), known.memoryless_return)
        return known if limit == known.horizon else None

    def hidden_variable(self) -> int:
        """Whether the last of the hidden numbers is positive."""
        return int(self._last_hidden > 0)

    def observation(self, observation: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """The entries that are not hidden, as a new array."""
        self._last_hidden = float(observation[self._hidden[-1]])
        shown: NDArray[np.floating[Any]] = observation[self._kept]
        return shown


class HidePosition(HideVelocity):
    """Drops all but the velocities from a flat Box observation, where `HideVelocity` knows them; or `indices`."""

    facts = None
    """Never measured."""

    def _known_indices(self, size: int) -> Sequence[int]:
        positions = _mujoco_positions(self.env)
        shown = self._known().indices if positions is None else _mujoco_velocities(self.env)
        return [index for index in range(size) if index not in shown]


def _is_changed(env: gym.Env[Any, Any], kwargs: dict[str, Any]) -> bool:
    """Whether the environment was made with other keyword arguments than its defaults, how it is drawn aside."""
    defaults = inspect.signature(type(env.unwrapped)).parameters
    return any(
        name != "render_mode" and (name not in defaults or defaults[name].default != value)
        for name, value in kwargs.items()
    )


def _known_velocities(env: gym.Env[Any, Any]) -> Velocities | None:
    for cls in type(env.unwrapped).__mro__:
        if cls.__name__ in KNOWN_VELOCITIES:
            return KNOWN_VELOCITIES[cls.__name__]
    return None


def _mujoco_positions(env: gym.Env[Any, Any]) -> range | None:
    """Where the positions stand in an observation of MuJoCo, whose environments tell; None of others."""
    parts = getattr(env.unwrapped, "observation_structure", None)
    return range(parts["qpos"]) if isinstance(parts, dict) and {"qpos", "qvel"} <= parts.keys() else None


def _mujoco_velocities(env: gym.Env[Any, Any]) -> range:
    """Where the velocities stand: after the positions."""
    parts: dict[str, int] = env.unwrapped.observation_structure  # type: ignore[attr-defined]
    return range(parts["qpos"], parts["qpos"] + parts["qvel"])


def _register(name: str, source: str, length: str | None) -> None:
    """Note a task of gymnasium's with its velocities hidden."""
    spec = gym.spec(source)
    registration = {
        "entry_point": spec.entry_point,
        "kwargs": spec.kwargs,
        "max_episode_steps": spec.max_episode_steps,
        "reward_threshold": spec.reward_threshold,
        "additional_wrappers": (HideVelocity.wrapper_spec(indices=None),),
    }
    register_task(name, TaskPurpose("filtering", length), registration)


_register("CartPoleNoVelocity", "CartPole-v1", "max_episode_steps")
# the known bounds of these hold for their own step limit only: no length
_register("PendulumNoVelocity", "Pendulum-v1", None)
_register("AcrobotNoVelocity", "Acrobot-v1", None)
