"""Environments whose faults are named: one after the other here, or each in a process that can be started again."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from copy import deepcopy
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import CloudpickleWrapper, VecEnvStepReturn

from xlstm_rl.vec_envs.env_contract import (
    SKIPPED,
    CountedVecEnv,
    FaultyEnvironmentError,
    env_reset,
    env_step,
    innermost,
    map_obs,
    one_for_each,
)

# For a worker to close its environment before it is killed.
CLOSE_SECONDS = 5.0


# For environments to be made, imports of large libraries and the start of a simulator included.
# Beyond this nobody waits, and some clocks cannot count.
LONGEST_WAIT = 1e7
START_SECONDS = 300.0


class WorkerError(FaultyEnvironmentError):
    """An environment in a process of its own failed, died or hung; the message names it and holds its traceback."""

    index: int


_FLAGS, _NUMBERS = {bool, np.bool_}, (float, int)


class EnvPlayer:
    """One environment as Stable-Baselines3 plays it, reset in the step that ends an episode, and checked.

    Args:
        env: the environment.
        index: its number among others, for messages.
        space: of its observations.
    """

    def __init__(self, env: gym.Env[Any, Any], index: int, space: gym.Space[Any]) -> None:
        self.env, self._index, self._steps = env, index, 0
        self._space, self._shape, self._dtype = space, space.shape, space.dtype

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """First observation and info of a new episode.

        Raises:
            FaultyEnvironmentError: the environment failed, or answered what cannot be used.
        """
        try:
            answer = self.env.reset(seed=seed, **({"options": options} if options else {}))
        # everything that an environment can raise is to be told
        except Exception as error:
            raise FaultyEnvironmentError(self._index, f"failed on reset: {_cause(error)}") from error
        self._steps = 0
        return env_reset(answer, self._space, self._index)

    def step(self, action: Any) -> tuple[Any, float, bool, dict[str, Any], dict[str, Any] | None]:
        """Observation, reward, done, info, and the info of the reset where there was one; raises as `reset`."""
        self._steps += 1
        try:
            answer: Any = self.env.step(action)
        # everything that an environment can raise is to be told
        except Exception as error:
            raise FaultyEnvironmentError(self._index, f"failed {self._place()}: {_cause(error)}") from error
        # whether nothing needs a closer look, in place: it runs in every step, and a look takes as long as a small task
        if (
            type(answer) is not tuple
            or len(answer) != 5
            or type(answer[0]) is not np.ndarray
            or answer[0].shape != self._shape
            or answer[0].dtype is not self._dtype
            or not isinstance(answer[1], _NUMBERS)
            or type(answer[2]) not in _FLAGS
            or type(answer[3]) not in _FLAGS
            or type(answer[4]) is not dict
        ):
            answer = env_step(answer, self._space, self._index, self._place())
        obs, reward, terminated, truncated, info = answer
        if not (terminated or truncated):
            # as nearly always
            info["TimeLimit.truncated"] = False
            return obs, float(reward), False, info, None
        info["TimeLimit.truncated"] = not terminated
        info["terminal_observation"] = obs
        obs, reset_info = self.reset()
        return obs, float(reward), True, info, reset_info

    def _place(self) -> str:
        return f"in step {self._steps} of its episode"


class EpisodeMonitor(Monitor[Any, Any]):
    """A `Monitor` of Stable-Baselines3 that keeps nothing of episodes that are over, nor every reward of a long one."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self._return, self._length = 0.0, 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        self._return, self._length = 0.0, 0
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        """Step; the info of the last step has "episode" with return "r", length "l" and seconds "t"."""
        answer: Any = self.env.step(action)
        if not isinstance(answer, tuple) or len(answer) != 5 or not isinstance(answer[4], dict):
            # whoever stands outside refuses it
            return answer
        _, reward, terminated, truncated, info = answer
        self._return += float(reward)
        self._length += 1
        self.total_steps += 1
        if terminated or truncated:
            self.needs_reset = True
            elapsed = round(time.time() - self.t_start, 6)
            info["episode"] = {"r": round(self._return, 6), "l": self._length, "t": elapsed}
        return answer


def _cause(error: Exception) -> str:
    """An error in a line, and where it was raised."""
    raised = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({raised.filename}, line {raised.lineno})"


# Values whose deep copy is themselves.
_CONSTANT = {bool, int, float, str, bytes, type(None), np.bool_, np.float32, np.float64, np.int32, np.int64}


def _copied(info: dict[str, Any]) -> dict[str, Any]:
    """A deep copy; of plain values a tenth of the time that `deepcopy` takes, which takes as long as a small task."""
    return dict(info) if type(info) is dict and _CONSTANT.issuperset(map(type, info.values())) else deepcopy(info)


class GuardedDummyVecEnv(CountedVecEnv, DummyVecEnv):
    """A `DummyVecEnv` of Stable-Baselines3 that names the environment which failed, the step and the cause.

    Answers of another kind or shape are refused as well; `DummyVecEnv` would repeat one number for all.

    Args:
        env_fns: functions that make the environments.

    Raises:
        FaultyEnvironmentError: an environment cannot be made, or has other spaces than the first.
    """

    def __init__(self, env_fns: list[Callable[[], gym.Env[Any, Any]]]) -> None:
        super().__init__(env_fns)
        _check_spaces([(env.observation_space, env.action_space) for env in self.envs])
        self._players: dict[int, EnvPlayer] = {}

    def _player(self, index: int) -> EnvPlayer:
        env, known = self.envs[index], self._players.get(index)
        if known is not None and known.env is env:
            return known
        # the first time, or somebody has put another environment in its place
        self._players[index] = EnvPlayer(env, index, self.observation_space)
        return self._players[index]

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for `step_wait`."""
        one_for_each(actions, self.num_envs, "actions")
        super().step_async(actions)

    def reset(self) -> Any:
        """Start new episodes everywhere."""
        for index in range(self.num_envs):
            obs, self.reset_infos[index] = self._player(index).reset(self._seeds[index], self._options[index])
            self._save_obs(index, obs)
        self._reset_seeds()
        self._reset_options()
        return self._obs_from_buf()

    def step_wait(self) -> VecEnvStepReturn:
        """Step every environment."""
        rewards, dones, infos = self.buf_rews, self.buf_dones, self.buf_infos
        buffers: Any = self.buf_obs
        flat = buffers.get(None)  # where observations are no dict
        for index, action in enumerate(self.actions):
            obs, rewards[index], dones[index], infos[index], reset_info = self._player(index).step(action)
            if reset_info is not None:
                self.reset_infos[index] = reset_info
            if flat is None:
                self._save_obs(index, obs)
            else:
                flat[index] = obs
        # which copies in a tenth of the time of `deepcopy`
        copied = self._obs_from_buf() if flat is None else flat.copy()
        return copied, rewards.copy(), dones.copy(), [_copied(info) for info in infos]


def _check_spaces(spaces: list[tuple[Any, Any]]) -> None:
    for index, given in enumerate(spaces):
        for name, space, first in zip(("observations", "actions"), given, spaces[0], strict=True):
            if space != first:
                raise FaultyEnvironmentError(
                    index, f"has {name} {space}, and environment 0 has {first}: make them equal"
                )


class _Failure:
    """What a worker sends in place of an answer."""

    def __init__(self, text: str) -> None:
        self.text = text


class _Remote:
    """The parent's end of a pipe; faults of the worker are raised as `WorkerError`."""

    def __init__(
        self, index: int, pipe: Connection, process: Any, timeout: float | None, start_timeout: float | None
    ) -> None:
        self.index, self.pipe, self.process = index, pipe, process
        self._timeout, self._start_timeout = timeout, start_timeout
        self._started = False
        self.fault: WorkerError | None = None

    def send(self, message: Any) -> None:
        if self.fault is not None:
            raise self.fault
        try:
            self.pipe.send(message)
        except OSError as error:
            # what the worker said before it ended explains more than a broken pipe
            self._receive_last(error)

    def recv(self) -> Any:
        if self.fault is not None:
            raise self.fault
        try:
            self._wait()
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(answer, _Failure):
            raise self._failed(f"(process {self.process.pid}) failed:\n{answer.text}")
        self._started = True
        return answer

    def close(self) -> None:
        self.pipe.close()

    def _wait(self) -> None:
        """Wait for an answer, the first one as long as it may take to start."""
        patience = self._timeout if self._started else self._start_timeout
        if patience is None or self.pipe.poll(patience):
            return
        what = ("answer", "timeout") if self._started else ("start", "start timeout")
        raise self._failed(
            f"(process {self.process.pid}) did not {what[0]} within {patience:g} seconds: it hangs, or needs a longer "
            f"{what[1]}"
        )

    def _receive_last(self, error: OSError) -> None:
        if self.pipe.poll():
            self.recv()
        raise self._died() from error

    def _died(self) -> WorkerError:
        self.process.join(CLOSE_SECONDS)
        code = self.process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return self._failed(f"(process {self.process.pid}) died: {how}")

    def _failed(self, reason: str) -> WorkerError:
        self.fault = WorkerError(self.index, reason)
        return self.fault


class _CheckedRemote(_Remote):
    """The parent's end of a pipe to a worker of Stable-Baselines3 itself; what its environment answers is checked."""

    def __init__(self, index: int, pipe: Connection, process: Any, space: gym.Space[Any]) -> None:
        super().__init__(index, pipe, process, None, None)
        self._space, self._steps, self._asked = space, 0, ""

    def send(self, message: Any) -> None:
        if message[0] == "close" and self.fault is not None:
            # nobody is there any more
            return
        self._asked = message[0]
        super().send(message)

    def recv(self) -> Any:
        asked, self._asked = self._asked, ""
        if not asked:
            # closed after a fault in a step, where the others' answers have been taken
            return None
        answer = super().recv()
        # which has the parts that the worker makes of what its environment answers
        if asked == "step":
            obs, reward, done, info, reset_info = answer
            self._steps += 1
            step = env_step((obs, reward, done, False, info), self._space, self.index, f"in step {self._steps}")
            return step.observation, step.reward, step.terminated, step.info, reset_info
        return env_reset(answer, self._space, self.index) if asked == "reset" else answer

    def _wait(self) -> None:
        # forked workers hold the pipes of each other open, so that a dead one's does not end
        if self.pipe not in wait([self.pipe, self.process.sentinel]) and not self.pipe.poll():
            raise self._died()


def guard(env: VecEnv) -> VecEnv:
    """Let a `DummyVecEnv` or `SubprocVecEnv` of Stable-Baselines3, in whatever wrappers, name the faults of its copies.

    Args:
        env: any vector environment. A `DummyVecEnv` in it becomes a `GuardedDummyVecEnv` in its place, so that whoever
            holds it keeps the same object.

    Returns:
        `env` itself.
    """
    inner: Any = innermost(env)
    if isinstance(inner, DummyVecEnv) and not isinstance(inner, GuardedDummyVecEnv):
        kind: type[Any] = type(inner)
        # behind a class of somebody else, whose methods may call those of DummyVecEnv
        inner.__class__ = (
            GuardedDummyVecEnv if kind is DummyVecEnv else type(kind.__name__, (kind, GuardedDummyVecEnv), {})
        )
        vars(inner)["_players"] = {}
    elif isinstance(inner, SubprocVecEnv) and not isinstance(inner.remotes[0], _Remote):
        pairs = enumerate(zip(inner.remotes, inner.processes, strict=True))
        space = inner.observation_space
        inner.remotes = tuple(_CheckedRemote(index, pipe, process, space) for index, (pipe, process) in pairs)
    return env


class GuardedSubprocVecEnv(CountedVecEnv, SubprocVecEnv):
    """A `SubprocVecEnv` of Stable-Baselines3 that reports which environment failed, and why, and can restart it.

    Where an environment raises an exception, its process dies or it does not answer in time, `WorkerError` names it
    and holds its traceback. With restarts left, a step in which that happens ends the episode of this environment
    instead: the environment is built again with a new seed, its first observation is returned with `done`, the reward
    is 0 and the info holds "skipped_step" with the reason, no final observation and no "episode". `RecurrentPPO` learns
    nothing from such a step.

    Args:
        env_fns: functions that make the environments.
        start_method: of processes, as for `multiprocessing`; None: "forkserver" where available, else "spawn".
        timeout: seconds to wait for an answer; None waits forever.
        restarts: how often each environment may be restarted.
        start_timeout: seconds to wait for an environment to be made, the start of its process and all imports included;
            None waits forever.

    Raises:
        FaultyEnvironmentError: an environment has other spaces than the first; `WorkerError`: it cannot be made.
        ValueError: a number of seconds or restarts that is none.
    """

    def __init__(
        self,
        env_fns: list[Callable[[], gym.Env[Any, Any]]],
        start_method: str | None = None,
        *,
        timeout: float | None = None,
        restarts: int = 0,
        start_timeout: float | None = START_SECONDS,
    ) -> None:
        for name, seconds in (("timeout", timeout), ("start_timeout", start_timeout)):
            if seconds is not None and not 0 < seconds <= LONGEST_WAIT:
                raise ValueError(f"{name}={seconds} must be above 0 and at most {LONGEST_WAIT:g} seconds, or None")
        if restarts < 0 or restarts != int(restarts):
            raise ValueError(f"restarts={restarts} must be a whole number of at least 0")
        if start_method is None:
            start_method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context: Any = multiprocessing.get_context(start_method)
        self._env_fns, self._timeout, self._start_timeout = env_fns, timeout, start_timeout
        self.waiting, self.closed = False, False
        self.remotes: Any = []
        self.processes: list[Any] = []
        # before multiprocessing waits for daemons that may hang
        self._kill: Any = Finalize(self, _end, (self.processes, 0.0), exitpriority=10)
        for index in range(len(env_fns)):
            remote = self._start(index)
            self.remotes.append(remote)
            self.processes.append(remote.process)
        self._restarts_left = [restarts] * len(env_fns)
        self._base_seed: int | None = None
        try:
            spaces = [remote.recv() for remote in self.remotes]
            _check_spaces(spaces)
        except FaultyEnvironmentError:
            self.close()
            raise
        VecEnv.__init__(self, len(env_fns), *spaces[0])

    def _start(self, index: int) -> _Remote:
        ours, theirs = self._context.Pipe()
        arguments = (theirs, ours, CloudpickleWrapper(self._env_fns[index]), index)
        process = self._context.Process(target=_guarded_work, args=arguments, daemon=True)
        process.start()
        # else a dead worker's pipe would not end
        theirs.close()
        return _Remote(index, ours, process, self._timeout, self._start_timeout)

    def seed(self, seed: int | None = None) -> Any:
        """Seed the next reset of every environment, and what restarted environments are seeded from."""
        self._base_seed = seed
        return super().seed(seed)

    def step_async(self, actions: np.ndarray) -> None:
        """Send the actions."""
        # those that were sent would be answered later, in place of what is asked then
        one_for_each(actions, self.num_envs, "actions")
        for remote, action in zip(self.remotes, actions, strict=True):
            try:
                remote.send(("step", action))
            except WorkerError as error:
                self._check_restart(error)
        self.waiting = True

    def step_wait(self) -> VecEnvStepReturn:
        """Receive what the steps led to; lost environments are started again."""
        results = []
        for index, remote in enumerate(self.remotes):
            try:
                results.append(remote.recv())
            except WorkerError as error:
                self._check_restart(error)
                results.append(self._restart(index, error))
        self.waiting = False
        obs, rewards, dones, infos, reset_infos = zip(*results, strict=True)
        self.reset_infos = [new or kept for new, kept in zip(reset_infos, self.reset_infos, strict=True)]
        stacked = map_obs(lambda *parts: np.stack(parts), *obs)
        return stacked, np.array(rewards, np.float32), np.array(dones, bool), list(infos)

    def reset(self) -> Any:
        """Start new episodes everywhere."""
        for remote, seed, options in zip(self.remotes, self._seeds, self._options, strict=True):
            remote.send(("reset", (seed, options)))
        results = [remote.recv() for remote in self.remotes]
        self.reset_infos = [info for _, info in results]
        self._reset_seeds()
        self._reset_options()
        return map_obs(lambda *parts: np.stack(parts), *(obs for obs, _ in results))

    def has_method(self, name: str) -> bool:
        """Whether all environments have a method of this name."""
        for remote in self.remotes:
            remote.send(("has_method", name))
        return all([remote.recv() for remote in self.remotes])

    def _check_restart(self, error: WorkerError) -> None:
        if not self._restarts_left[error.index]:
            # the others' answers stay untaken, so nothing may be asked any more
            for remote in self.remotes:
                remote.fault = remote.fault or error
            raise error

    def _restart(self, index: int, error: WorkerError) -> tuple[Any, ...]:
        """The answer to a step that did not happen."""
        while True:
            try:
                obs, reset_info = self._start_again(index, error)
                return obs, 0.0, True, {SKIPPED: str(error), "TimeLimit.truncated": True}, reset_info
            except WorkerError as again:
                self._check_restart(again)
                error = again

    def _start_again(self, index: int, error: WorkerError) -> tuple[Any, Any]:
        """First observation and info of a new environment."""
        self._restarts_left[index] -= 1
        warnings.warn(
            f"{error}\nIt is started again, {self._restarts_left[index]} more times if need be.", stacklevel=5
        )
        _end([self.processes[index]], 0.0)
        self.remotes[index].close()
        remote = self._start(index)
        self.remotes[index], self.processes[index] = remote, remote.process
        # the spaces, which it tells first
        remote.recv()
        seed = None
        if self._base_seed is not None:
            # other episodes than the first environment had
            words = np.random.SeedSequence((self._base_seed, index, self._restarts_left[index])).generate_state(1)
            seed = int(words[0])
        remote.send(("reset", (seed, self._options[index])))
        obs, reset_info = remote.recv()
        return obs, reset_info

    def close(self) -> None:
        """End the processes, also those that hang."""
        if self.closed:
            return
        self.closed = True
        for remote in self.remotes:
            if remote.fault is not None:
                # maybe hanging: not worth waiting for
                self.processes[remote.index].kill()
                continue
            try:
                remote.pipe.send(("close", None))
            except OSError:
                continue
        _end(self.processes, CLOSE_SECONDS, [remote.pipe for remote in self.remotes])
        self._kill.cancel()
        for remote in self.remotes:
            remote.close()


def _guarded_work(pipe: Connection, parents: Connection, make_env: CloudpickleWrapper, index: int) -> None:
    parents.close()
    try:
        _work(pipe, make_env, index)
    # everything that an environment can raise is to be told
    except Exception:
        try:
            pipe.send(_Failure(traceback.format_exc()))
        except OSError:
            # the parent is gone
            return


def _work(pipe: Connection, make_env: CloudpickleWrapper, index: int) -> None:
    """Tell the spaces, then answer what `SubprocVecEnv` asks."""
    # which takes environments of older interfaces too
    env = DummyVecEnv([make_env.var]).envs[0]
    player = EnvPlayer(env, index, env.observation_space)
    answers: dict[str, Callable[[Any], Any]] = {
        "step": player.step,
        "reset": lambda data: player.reset(*data),
        "render": lambda _: env.render(),
        "get_spaces": lambda _: (env.observation_space, env.action_space),
        "env_method": lambda data: env.get_wrapper_attr(data[0])(*data[1], **data[2]),
        "get_attr": env.get_wrapper_attr,
        "has_attr": env.has_wrapper_attr,
        "has_method": lambda name: env.has_wrapper_attr(name) and callable(env.get_wrapper_attr(name)),
        "set_attr": lambda data: setattr(env, *data),
        "is_wrapped": lambda kind: is_wrapped(env, kind),
    }
    pipe.send(answers["get_spaces"](None))
    while True:
        try:
            command, data = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        if command == "close":
            env.close()
            pipe.close()
            return
        pipe.send(answers[command](data))


def _end(processes: list[Any], patience: float, pipes: list[Connection] | None = None) -> None:
    """Wait for processes, then kill those that are left."""
    until = time.monotonic() + patience
    for index, process in enumerate(processes):
        pipe = None if pipes is None else pipes[index]
        while process.is_alive() and time.monotonic() < until:
            _drain(pipe)
            process.join(0.02)
        if process.is_alive():
            process.kill()
            process.join()


def _drain(pipe: Connection | None) -> None:
    """Take answers nobody waits for: a worker with a large one does not listen until it is taken."""
    try:
        while pipe is not None and pipe.poll():
            pipe.recv_bytes()
    except (EOFError, OSError):
        return
