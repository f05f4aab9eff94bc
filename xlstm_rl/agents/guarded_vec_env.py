"""Environments in processes of their own whose faults are named, and which can be started again."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import CloudpickleWrapper, VecEnvStepReturn
from stable_baselines3.common.vec_env.subproc_vec_env import _stack_obs, _worker

from xlstm_rl.agents.nonfinite import SKIPPED

# For a worker to close its environment before it is killed.
CLOSE_SECONDS = 5.0


class WorkerError(RuntimeError):
    """An environment failed, died or hung; the message names it and holds its traceback."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"environment {index} {reason}")
        self.index = index


class _Failure:
    """What a worker sends in place of an answer."""

    def __init__(self, text: str) -> None:
        self.text = text


class _Remote:
    """The parent's end of a pipe; faults of the worker are raised as `WorkerError`."""

    def __init__(self, index: int, pipe: Connection, process: Any, timeout: float | None) -> None:
        self.index, self.pipe, self.process, self.timeout = index, pipe, process, timeout
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
            if self.timeout is not None and not self.pipe.poll(self.timeout):
                raise self._failed(
                    f"(process {self.process.pid}) did not answer within {self.timeout:g} seconds: it hangs, or needs "
                    "a longer timeout"
                )
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(answer, _Failure):
            raise self._failed(f"(process {self.process.pid}) failed:\n{answer.text}")
        return answer

    def close(self) -> None:
        self.pipe.close()

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


class GuardedSubprocVecEnv(SubprocVecEnv):
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

    Raises:
        WorkerError: an environment cannot be made.
    """

    def __init__(
        self,
        env_fns: list[Callable[[], gym.Env[Any, Any]]],
        start_method: str | None = None,
        *,
        timeout: float | None = None,
        restarts: int = 0,
    ) -> None:
        if start_method is None:
            start_method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context: Any = multiprocessing.get_context(start_method)
        self._env_fns, self._timeout = env_fns, timeout
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
        self.remotes[0].send(("get_spaces", None))
        VecEnv.__init__(self, len(env_fns), *self.remotes[0].recv())

    def _start(self, index: int) -> _Remote:
        ours, theirs = self._context.Pipe()
        arguments = (theirs, ours, CloudpickleWrapper(self._env_fns[index]))
        process = self._context.Process(target=_guarded_worker, args=arguments, daemon=True)
        process.start()
        # else a dead worker's pipe would not end
        theirs.close()
        return _Remote(index, ours, process, self._timeout)

    def seed(self, seed: int | None = None) -> Any:
        """Seed the next reset of every environment, and what restarted environments are seeded from."""
        self._base_seed = seed
        return super().seed(seed)

    def step_async(self, actions: np.ndarray) -> None:
        """Send the actions."""
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
        obs, rewards, dones, infos, self.reset_infos = zip(*results, strict=True)  # type: ignore[assignment]
        stacked = _stack_obs(obs, self.observation_space)
        return stacked, np.stack(rewards), np.stack(dones), infos  # type: ignore[return-value]

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


def _guarded_worker(pipe: Connection, parents: Connection, make_env: CloudpickleWrapper) -> None:
    try:
        _worker(pipe, parents, make_env)
    # everything that an environment can raise is to be told
    except Exception:
        try:
            pipe.send(_Failure(traceback.format_exc()))
        except OSError:
            # the parent is gone
            return


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
