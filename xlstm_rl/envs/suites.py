"""Memory tasks of other packages, presented so that agents here take them; the packages are imported on first use.

xlstm_rl/popgym-RepeatPreviousMedium-v0   POPGym (Morad et al. 2023), wrapped as in the paper
xlstm_rl/MiniGrid-MemoryS9-v0             MiniGrid's memory tasks (Chevalier-Boisvert et al. 2023)
xlstm_rl/MortarMayhem-Grid-v0             Memory Gym (Pleines et al. 2023)
xlstm_rl/bsuite-memory_len-v0             bsuite (Osband et al. 2020), and bsuite-memory_size-v0; which one: `index`
xlstm_rl/Atari-v0                         the Arcade Learning Environment; `game="Pong"`
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from importlib import metadata
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from xlstm_rl.envs.task_sizes import whole_number

POPGYM = (
    *("Autoencode", "Battleship", "Concentration", "CountRecall", "HigherLower", "LabyrinthEscape"),
    *("LabyrinthExplore", "MineSweeper", "MultiarmedBandit", "NoisyPositionOnlyCartPole", "NoisyPositionOnlyPendulum"),
    *("PositionOnlyCartPole", "PositionOnlyPendulum", "RepeatFirst", "RepeatPrevious", "VelocityOnlyCartpole"),
)
MINIGRID = ("S7", "S9", "S11", "S13", "S13Random", "S17Random")
MEMORY_GYM = (
    *("MortarMayhem", "MortarMayhem-Grid", "MortarMayhemB", "MortarMayhemB-Grid", "Endless-MortarMayhem"),
    *("MysteryPath", "MysteryPath-Grid", "Endless-MysteryPath", "SearingSpotlights", "Endless-SearingSpotlights"),
)
BSUITE = ("memory_len", "memory_size")
# By the function that makes a task.
DISTRIBUTIONS = {
    **{"popgym": "popgym", "minigrid": "minigrid", "memory_gym": "memory-gym"},
    **{"bsuite": "bsuite", "atari": "ale-py"},
}


def suite_ids() -> list[str]:
    """gymnasium ids of the tasks of other packages, sorted."""
    return sorted(f"xlstm_rl/{name}-v0" for name in _tasks())


def suite_versions(env_id: str) -> dict[str, str]:
    """The package that a task comes from, with its version; nothing for other tasks or if it is not installed."""
    task = _tasks().get(env_id.rpartition(":")[2].removeprefix("xlstm_rl/").removesuffix("-v0"))
    if task is None:
        return {}
    distribution = DISTRIBUTIONS[task[0]]
    try:
        return {distribution: metadata.version(distribution)}
    except metadata.PackageNotFoundError:
        return {}


def register_suites() -> None:
    """Register the tasks of other packages with gymnasium; registering again changes nothing."""
    for name, (maker, kwargs) in _tasks().items():
        env_id = f"xlstm_rl/{name}-v0"
        if env_id not in gym.registry:
            gym.register(env_id, f"xlstm_rl.envs.suites:{maker}", kwargs=kwargs, disable_env_checker=True)


def _tasks() -> dict[str, tuple[str, dict[str, Any]]]:
    """By name here: the function that makes it, and its arguments."""
    popgym_names = [f"popgym-{name}{level}" for name in POPGYM for level in ("Easy", "Medium", "Hard")]
    by_maker = {"popgym": popgym_names, "minigrid": [f"MiniGrid-Memory{size}" for size in MINIGRID]}
    by_maker["memory_gym"] = list(MEMORY_GYM)
    tasks: dict[str, tuple[str, dict[str, Any]]] = {
        name: (maker, {"env_id": f"{name}-v0"}) for maker, names in by_maker.items() for name in names
    }
    tasks |= {f"bsuite-{name}": ("bsuite", {"experiment": name}) for name in BSUITE}
    return tasks | {"Atari": ("atari", {})}


def popgym(env_id: str, **kwargs: Any) -> gym.Env[Any, Any]:
    """A POPGym task as in the paper: one flat vector of the observation, the previous action and the start flag."""
    _import("popgym", "pip install popgym")
    if "Labyrinth" in env_id:
        # without it, popgym leaves these tasks out and says nothing
        _import("mazelib", "pip install mazelib")
    env: gym.Env[Any, Any] = gym.make(env_id, disable_env_checker=True, **kwargs).unwrapped
    return PreviousActionVector(env)


def minigrid(env_id: str, **kwargs: Any) -> gym.Env[Any, Any]:
    """A memory task of MiniGrid: the 7 x 7 cells in view, one-hot, as a flat vector."""
    _import("minigrid", "pip install minigrid")
    wrappers = importlib.import_module("minigrid.wrappers")
    env = wrappers.ImgObsWrapper(wrappers.OneHotPartialObsWrapper(gym.make(env_id, disable_env_checker=True, **kwargs)))
    # the wrapper keeps the bounds of the codes it replaces
    cells = spaces.Box(0.0, 1.0, env.observation_space.shape, np.float32)
    unit: gym.Env[Any, Any] = gym.wrappers.TransformObservation(env, lambda obs: np.asarray(obs, np.float32), cells)
    return gym.wrappers.FlattenObservation(unit)


def memory_gym(env_id: str, **kwargs: Any) -> gym.Env[Any, Any]:
    """A task of Memory Gym: images of 84 x 84 pixels in colour."""
    # no window and no sound
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    # its releases pin an old gymnasium and run with a new one
    _import("memory_gym", "pip install pygame && pip install --no-deps memory-gym")
    return gym.make(env_id, disable_env_checker=True, **kwargs)


def bsuite(experiment: str, index: int = 0) -> gym.Env[Any, Any]:
    """A memory experiment of bsuite: `index` counts its sizes, from the smallest."""
    package = _import("bsuite", "pip install bsuite")
    settings = importlib.import_module(f"bsuite.experiments.{experiment}.sweep").SETTINGS
    index = whole_number("index", index, at_least=0)
    if index >= len(settings):
        raise ValueError(f"index={index} must be less than {len(settings)}, the number of sizes of {experiment}")
    with contextlib.redirect_stdout(io.StringIO()):  # it tells what it loads
        return DmEnvironment(package.load_from_id(f"{experiment}/{index}"))


def atari(game: str = "Pong", frame_skip: int = 4, screen_size: int = 84, **kwargs: Any) -> gym.Env[Any, Any]:
    """An Atari game: grey images of the last frame alone, so that motion must be remembered.

    Args:
        game: Name as in "ALE/Pong-v5".
        frame_skip: Frames for which an action is repeated; the maximum over the last two is shown.
        screen_size: Pixels of a side.
        **kwargs: For the game, such as `repeat_action_probability`.
    """
    _import("cv2", "pip install opencv-python-headless")
    gym.register_envs(_import("ale_py", "pip install ale-py"))
    env: gym.Env[Any, Any] = gym.make(f"ALE/{game}-v5", frameskip=1, disable_env_checker=True, **kwargs)
    return gym.wrappers.AtariPreprocessing(
        env, noop_max=30, frame_skip=frame_skip, screen_size=screen_size, grayscale_newaxis=True
    )


def _import(package: str, install: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise gym.error.DependencyNotInstalled(
            f"this task needs the package {package!r}, which cannot be imported ({error}): {install}"
        ) from error


class PreviousActionVector(gym.Wrapper[Any, Any, Any, Any]):
    """One flat float32 vector: observation, with discrete parts one-hot, previous action likewise, and start flag."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        """Wrap `env`, whose spaces gymnasium must be able to flatten."""
        super().__init__(env)
        self._inner = env.observation_space
        flat = spaces.flatten_space(self._inner)
        assert isinstance(flat, spaces.Box)
        self._no_action = np.zeros(spaces.flatdim(env.action_space), np.float32)
        extra = len(self._no_action) + 1
        low = np.concatenate([flat.low.astype(np.float32), np.full(extra, -np.inf, np.float32)])
        high = np.concatenate([flat.high.astype(np.float32), np.full(extra, np.inf, np.float32)])
        self.observation_space = spaces.Box(low, high, dtype=np.float32)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Start an episode; no action came before."""
        obs, info = self.env.reset(**kwargs)
        return self._join(obs, self._no_action, 1.0), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, and note the action."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        noted = np.asarray(spaces.flatten(self.env.action_space, action), np.float32)
        return self._join(obs, noted, 0.0), reward, terminated, truncated, info

    def _join(self, obs: Any, action: np.ndarray, start: float) -> np.ndarray:
        flat = np.asarray(spaces.flatten(self._inner, obs), np.float32)
        return np.concatenate([flat, action, np.array([start], np.float32)])


class DmEnvironment(gym.Env[Any, Any]):
    """An environment with the interface of `dm_env`, array observations and discrete actions."""

    def __init__(self, env: Any) -> None:
        """Wrap `env`."""
        self._env = env
        shape = env.observation_spec().shape
        self.observation_space = spaces.Box(-np.inf, np.inf, (int(np.prod(shape)),), np.float32)
        self.action_space = spaces.Discrete(env.action_spec().num_values)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode; `options` are not used."""
        super().reset(seed=seed)
        if seed is not None:
            _seed(self._env, seed)
        return self._flat(self._env.reset().observation), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take a step; an episode that ends with a discount above zero was cut by a time limit."""
        timestep = self._env.step(int(action))
        last = bool(timestep.last())
        cut = last and timestep.discount is not None and timestep.discount > 0
        return self._flat(timestep.observation), float(timestep.reward or 0.0), last and not cut, cut, {}

    def _flat(self, observation: Any) -> np.ndarray:
        return np.asarray(observation, np.float32).reshape(-1)


def _seed(env: Any, seed: int) -> None:
    """Seed what draws the episodes: bsuite's environments hold a RandomState under a private name."""
    while env is not None:
        for name in ("_rng", "rng"):
            if isinstance(getattr(env, name, None), np.random.RandomState):
                setattr(env, name, np.random.RandomState(seed))
                return
        env = getattr(env, "_env", None) or getattr(env, "raw_env", None)
