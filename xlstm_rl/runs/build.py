"""From a configuration to environments and an untrained agent, or to what is wrong with it."""

from __future__ import annotations

import importlib
import json
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import IO, Any

import gymnasium
import torch
from gymnasium import spaces
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import AutoresetMode
from rich.console import Console
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from xlstm_rl.agents import CheckpointError, GymnasiumVecEnv, RecurrentPPO
from xlstm_rl.agents.features import EXTRACTORS, check_spaces, find_extractor, is_small_image
from xlstm_rl.agents.parallel import Ranks
from xlstm_rl.agents.saving import load_normalizer
from xlstm_rl.agents.training_state import make_normalizer
from xlstm_rl.configs import ConfigError, EnvConfig, TrainConfig
from xlstm_rl.configs.hub_runs import fetch_run
from xlstm_rl.configs.schema import agent_arguments
from xlstm_rl.envs import Resumable, TaskFacts, task_facts, wrapped, wrapper_class
from xlstm_rl.runs.folder import RunFolder
from xlstm_rl.runs.seeds import SEEDS_APART, Purpose, environment_seed
from xlstm_rl.vec_envs.env_contract import FaultyEnvironmentError
from xlstm_rl.vec_envs.guarded_vec_env import EpisodeMonitor, GuardedDummyVecEnv, GuardedSubprocVecEnv
from xlstm_rl.vec_envs.inputs import KEYS, InputLayout, MemoryInputs, VecMemoryInputs

# What environments say of keyword arguments that they do not like, or of a package that is missing.
_REFUSALS = (AssertionError, ImportError, KeyError, MemoryError, TypeError, ValueError, gymnasium.error.Error)
# What agents say of settings and spaces: checks of their own, asserts of Stable-Baselines3, shapes and sizes in torch.
_MISFITS = (AssertionError, MemoryError, RuntimeError, TypeError, ValueError)


def make_env(config: TrainConfig, n_envs: int, seed: int, *, here: bool = False) -> VecEnv:
    """Copies of the configured environment with consecutive seeds.

    Args:
        config: the run.
        n_envs: copies.
        seed: of the first.
        here: for evaluation: one after the other in this process whatever the configuration says, and never resumed.

    Raises:
        ConfigError: a copy cannot be made, or not in time; `read_facts` says before what is wrong with a task.
    """
    # a module to import may stand before the id
    batched = gymnasium.spec(config.env.id.rpartition(":")[2]).vector_entry_point is not None
    if config.env.vec == "vector" and batched and not here:
        if config.env.wrappers:
            raise ConfigError(
                f"env.wrappers={list(config.env.wrappers)} wrap single environments, not the batches of "
                "env.vec='vector'; take env.vec=dummy"
            )
        return _make_vector(config.env, n_envs, seed)
    vec = "dummy" if here else config.env.vec
    replay = config.checkpoint.replay and not here
    makers: Any = [partial(_make_one, config.env, vec, replay, seed + index) for index in range(n_envs)]
    try:
        env = _guarded(config.env, makers) if vec == "subproc" else GuardedDummyVecEnv(makers)
    except FaultyEnvironmentError as error:
        raise ConfigError(
            f"environment {config.env.id!r} cannot be made {n_envs} times (env.vec={vec!r}): {error}"
        ) from error
    env.seed(seed)
    return env


def _guarded(config: EnvConfig, makers: Any) -> VecEnv:
    return GuardedSubprocVecEnv(
        makers,
        timeout=config.worker_timeout,
        start_timeout=config.worker_start_timeout,
        restarts=config.worker_restarts,
    )


def read_facts(config: EnvConfig) -> TaskFacts | None:
    """What is known about the task, None if nothing.

    Raises:
        ConfigError: the environment cannot be built with its keyword arguments, or its observations cannot be used as
            configured.
    """
    try:
        env = make_single(config)
    except _REFUSALS as error:
        raise ConfigError(
            f"environment {config.id!r} cannot be built with env.kwargs={dict(config.kwargs)}: {error}"
        ) from error
    with closing(env):
        try:
            check_spaces(env.observation_space, env.action_space, f"environment {config.id!r}")
        except ValueError as error:
            raise ConfigError(str(error)) from error
        _check_memory_inputs(env, config)
        # wrappers that do not speak of bounds may have changed them
        silent = [name for name in config.wrappers if not hasattr(wrapper_class(name), "facts")]
        return None if silent else task_facts(env)


def make_single(config: EnvConfig) -> gymnasium.Env[Any, Any]:
    """The configured environment in its wrappers, one copy and not seeded; raises what it and they raise."""
    return wrapped(gymnasium.make(config.id, **config.kwargs), config.wrappers)


def make_model(config: TrainConfig, env: VecEnv) -> RecurrentPPO:
    """The untrained agent, its environments seeded for training.

    Raises:
        ConfigError: the agent refuses the configuration or the spaces.
    """
    with_kwargs = f" with policy.kwargs={dict(config.policy.kwargs)}" if config.policy.kwargs else ""
    try:
        model = RecurrentPPO(
            _policy_name(env.observation_space),
            env,
            seed=config.seed,
            device=config.device,
            **agent_arguments(config.memory, config.policy, config.ppo),
        )
    except _MISFITS as error:
        raise ConfigError(f"the agent cannot be built{with_kwargs} for {config.env.id!r}: {error}") from error
    # the constructor has seeded it as Stable-Baselines3 does
    env.seed(training_seed(config, model.ranks))
    return model


def start_from(model: RecurrentPPO, config: TrainConfig) -> str | None:
    """Give a new agent what `init` says, and tell what it took; None where it starts from nothing.

    Raises:
        ConfigError: there is no such run or file, or nothing in it fits.
    """
    init = config.init
    if init.source is None:
        return None
    path = fetch_run(init.source).expanduser()
    try:
        file = RunFolder(path).latest_model() if path.is_dir() else path
        transfer = model.take_weights(file, init.parts, init.freeze)
        statistics = "extractor" in init.parts and _take_statistics(model, file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"init.from={init.source!r}: {error}") from error
    told = [f"{len(transfer.taken)} weights taken"]
    told += ["statistics of observations taken"] if statistics else []
    for names, why in ((transfer.other_shape, "of another shape there"), (transfer.missing, "missing there")):
        if names:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            told.append(f"{len(names)} new, {why} ({some})")
    told += [f"{len(transfer.frozen)} frozen"] if transfer.frozen else []
    return "; ".join(told)


def _take_statistics(model: RecurrentPPO, file: Path) -> bool:
    """Go on from the running statistics of observations of a file, where both have them of the same space."""
    own = model.get_vec_normalize_env()
    if own is None or not own.norm_obs:
        return False
    try:
        other = load_normalizer(file, own.venv)
    except CheckpointError:
        # of other observations
        return False
    if other is None or not other.norm_obs:
        return False
    own.obs_rms = other.obs_rms
    return True


def own_callbacks(config: TrainConfig) -> list[BaseCallback]:
    """The callbacks of `logging.callbacks`.

    Raises:
        ConfigError: one cannot be imported or made.
    """
    made: list[BaseCallback] = []
    for name, arguments in config.logging.callbacks.items():
        module, _, word = name.rpartition(":")
        try:
            kind = getattr(importlib.import_module(module), word, None) if module else None
        except ImportError as error:
            raise ConfigError(
                f"module {module!r} of logging.callbacks {name!r} cannot be imported: {error}; install it or put its "
                "folder on PYTHONPATH"
            ) from error
        if not (isinstance(kind, type) and issubclass(kind, BaseCallback)):
            raise ConfigError(
                f"logging.callbacks {name!r} is no callback of Stable-Baselines3; name a class as module:Class, such "
                "as stable_baselines3.common.callbacks:StopTrainingOnMaxEpisodes"
            )
        try:
            made.append(kind(**arguments))
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(f"logging.callbacks {name!r} cannot be made of {dict(arguments)}: {error}") from error
    return made


def own_classes(config: TrainConfig) -> dict[str, Any]:
    """`custom_objects` to load an agent of the run with: classes that its files do not name."""
    name = config.policy.features_extractor
    if name is None or name in EXTRACTORS:
        return {}
    return {"policy_kwargs": {"features_extractor_class": find_extractor(name)}}


def training_seed(config: TrainConfig, group: Ranks) -> int:
    """Of the first environment of this rank; the ranks before have the seeds before.

    Raises:
        ConfigError: there are more environments than runs of neighbouring seeds are apart.
    """
    if config.env.n_envs * group.world_size >= SEEDS_APART:
        raise ConfigError(
            f"env.n_envs={config.env.n_envs} on each of {group.world_size} processes are more than {SEEDS_APART - 1} "
            "environments, whose episodes would be those of the next seed: take fewer"
        )
    return environment_seed(config.seed, Purpose.TRAINING) + group.rank * config.env.n_envs


def _make_one(config: EnvConfig, vec: str, replay: bool, seed: int) -> gymnasium.Env[Any, Any]:
    if vec == "subproc":
        # Ctrl-C reaches the worker processes too, and so does the SIGTERM of a cluster; the main process acts on them.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    env = make_single(config)
    env.action_space.seed(seed)
    if config.memory_inputs:
        env = MemoryInputs(env, config.memory_inputs)
    env = EpisodeMonitor(env)
    return Resumable(env) if replay else env


def _make_vector(config: EnvConfig, n_envs: int, seed: int) -> VecEnv:
    entry_point: Any = gymnasium.spec(config.id.rpartition(":")[2]).vector_entry_point
    maker = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    # no step is then spent on resets; not all have the choice
    chosen = {"autoreset_mode": AutoresetMode.SAME_STEP} if "autoreset_mode" in signature(maker).parameters else {}
    kwargs: dict[str, Any] = {**config.kwargs, **chosen}
    env: VecEnv = GymnasiumVecEnv(gymnasium.make_vec(config.id, n_envs, "vector_entry_point", **kwargs))
    if config.memory_inputs:
        env = VecMemoryInputs(env, config.memory_inputs)
    env.seed(seed)
    return env


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Let torch use so many threads, and afterwards as many as before; None leaves its choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_device(device: str) -> None:
    """Raise ConfigError if this machine has no such device."""
    problem = _why_missing(device)
    if problem is not None:
        raise ConfigError(f"device={device!r} cannot be used here: {problem}; use auto, cpu or another that is there")


def evaluation_device(configured: str, asked: str | None, console: Console) -> str:
    """The device asked for, else the configured one, else, told on the console, the CPU."""
    if asked is not None:
        check_device(asked)
        return asked
    problem = _why_missing(configured)
    if problem is None:
        return configured
    text = f"device={configured!r} of the run cannot be used here: {problem}; evaluating on the CPU"
    console.print(text, highlight=False, soft_wrap=True, markup=False)
    return "cpu"


def _why_missing(device: str) -> str | None:
    """Why torch cannot compute on a device here, None if it can."""
    if device == "auto":
        return None
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, ImportError, RuntimeError) as error:
        return str(error).partition("\n")[0].partition(". ")[0]
    return None


def _check_memory_inputs(env: gymnasium.Env[Any, Any], config: EnvConfig) -> None:
    if config.memory_inputs:
        try:
            InputLayout(env.observation_space, env.action_space, config.memory_inputs)
        except ValueError as error:
            raise ConfigError(f"env.memory_inputs of {config.id!r}: {error}") from error


def _normalizes(config: EnvConfig) -> bool:
    return config.normalize_observation or config.normalize_reward


def normalized_as_saved(env: VecEnv, config: TrainConfig, model: IO[bytes]) -> VecEnv:
    """The environment with the normalisation that a saved model was trained with, if the run normalises.

    Args:
        env: as it is.
        config: of the run.
        model: its file, opened.

    Raises:
        ConfigError: the normalisation is missing or damaged.
    """
    if not _normalizes(config.env):
        return env
    try:
        normalizer = load_normalizer(model, env) or _normalizer_beside(Path(model.name), env)
    except ValueError as error:
        raise ConfigError(f"the normalisation of {model.name} cannot be used: {error}") from error
    if normalizer is None:
        raise ConfigError(
            f"{model.name} holds no normalisation, and the run normalises (env.normalize_observation="
            f"{config.env.normalize_observation}, env.normalize_reward={config.env.normalize_reward}); put back the "
            "file that the run wrote"
        )
    return normalizer


def _normalizer_beside(model: Path, env: VecEnv) -> VecNormalize | None:
    """What earlier versions wrote beside a model; None if they did not."""
    path = model.with_suffix(".normalizer.json")
    return make_normalizer(json.loads(path.read_text(encoding="utf-8")), env) if path.is_file() else None


def normalized(env: VecEnv, config: TrainConfig) -> VecEnv:
    """The environment with fresh running normalisation, if the run normalises."""
    if not _normalizes(config.env):
        return env
    some, keys = _parts_to_normalize(env.observation_space)
    return VecNormalize(
        env,
        norm_obs=config.env.normalize_observation and some,
        norm_reward=config.env.normalize_reward,
        gamma=config.ppo.gamma,
        norm_obs_keys=keys,
    )


def _parts_to_normalize(space: spaces.Space[Any]) -> tuple[bool, list[str] | None]:
    """Whether there is anything to normalise, and under which keys of a Dict: Box parts that are no images."""
    if not isinstance(space, spaces.Dict):
        return isinstance(space, spaces.Box) and not is_image_space(space), None
    # one-hot actions and the start flag are of the right size, and rare ones would come out huge
    left = (KEYS["action"], KEYS["start"])
    keys = [key for key, part in space.spaces.items() if key not in left and _parts_to_normalize(part)[0]]
    return bool(keys), keys


def normalized_like(env: VecEnv, training: VecNormalize | None) -> VecEnv:
    """The environment with the present statistics of that of training, which it leaves alone."""
    if training is None or not training.norm_obs:
        return env
    wrapped = VecNormalize(
        env, training=False, norm_reward=False, clip_obs=training.clip_obs, norm_obs_keys=training.norm_obs_keys
    )
    wrapped.obs_rms = training.obs_rms
    return wrapped


def _policy_name(observation_space: gymnasium.Space[Any]) -> str:
    if isinstance(observation_space, gymnasium.spaces.Dict):
        return "MultiInputXLSTMPolicy"
    large = is_image_space(observation_space) and not is_small_image(observation_space)
    return "CnnXLSTMPolicy" if large else "MlpXLSTMPolicy"
