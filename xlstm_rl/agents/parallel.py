"""Data parallel training: what the processes that `torchrun` started agree on. One process has nothing to agree on.

Each rank has its own environments, memory states and random numbers; weights, statistics and decisions are those of
all. `torch.distributed` sums over ranks: gloo on the CPU, NCCL on GPUs. Every method of `Ranks` is a collective, which
all ranks must call in the same order; training calls a handful of them per rollout and one per minibatch.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from stable_baselines3.common.running_mean_std import RunningMeanStd
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from typing_extensions import override

from xlstm_rl.vec_envs.guarded_vec_env import LONGEST_WAIT

# Seconds in which a rank must reach the next collective; an evaluation on rank 0 is in between.
TIMEOUT = 1800.0
_CAUSE = "xlstm_rl/cause"


class RankError(RuntimeError):
    """Another rank is gone, or did not come within the time limit; the message names the cause where it is known."""


class Ranks:
    """This process alone: rank 0 of a world of size 1, where everything is as it is given.

    Attributes:
        rank: of this process, from 0.
        world_size: number of processes.
    """

    rank, world_size = 0, 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over ranks, in place."""
        return tensor

    def least(self, number: int) -> int:
        """The smallest number of any rank."""
        return number

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        return flag

    def barrier(self) -> None:
        """Wait until all ranks are here."""

    def broadcast(self, value: Any) -> Any:
        """The plain value that rank 0 gives."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """The plain values of all ranks, by rank."""
        return [value]

    def broadcast_weights(self, module: nn.Module) -> None:
        """All ranks take the parameters and buffers of rank 0."""

    def sum_gradients(self, parameters: Iterable[Tensor], parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum gradients over ranks, in place, and with them scalars by name, in one message.

        Losses here are weighted sums whose weights count the steps of all ranks, so that gradients are summed and not
        averaged.

        Args:
            parameters: of the policy.
            parts: of the loss of this rank.

        Returns:
            The parts of all ranks together.
        """
        return parts

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Around training: tell the other ranks why this one ends, and explain why a collective failed."""
        yield


ALONE = Ranks()


class ProcessGroup(Ranks):
    """The ranks of the default process group of `torch.distributed`.

    Args:
        store: where a rank that fails leaves the reason for the others; None where there is none.
    """

    def __init__(self, store: Any = None) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._store = store

    @override
    def sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    @override
    def least(self, number: int) -> int:
        value = torch.tensor([number])
        dist.all_reduce(value, dist.ReduceOp.MIN)
        return int(value)

    @override
    def any(self, flag: bool) -> bool:
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    @override
    def barrier(self) -> None:
        self.any(False)

    @override
    def broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @override
    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    @override
    def broadcast_weights(self, module: nn.Module) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)

    @override
    def sum_gradients(self, parameters: Iterable[Tensor], parts: dict[str, Tensor]) -> dict[str, Tensor]:
        gradients = []
        for parameter in parameters:
            if parameter.requires_grad:
                # what no step of this rank touched has none, and all ranks must send the same layout
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                gradients.append(parameter.grad)
        scalars = torch.stack([*parts.values()]).to(gradients[0].dtype)
        # one message: forty tensors one by one take six times as long
        flat = torch.cat([scalars, *(gradient.reshape(-1) for gradient in gradients)])
        dist.all_reduce(flat)
        pieces = torch.split(flat[len(scalars) :], [gradient.numel() for gradient in gradients])
        for gradient, summed in zip(gradients, pieces, strict=True):
            gradient.copy_(summed.view_as(gradient))
        return dict(zip(parts, flat[: len(scalars)].unbind(), strict=True))

    @override
    @contextmanager
    def explaining(self) -> Iterator[None]:
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            if self._lost(error):
                raise RankError(self._cause_elsewhere(error)) from error
            if self._store is not None and not isinstance(error, GeneratorExit):
                self._store.set(_CAUSE, f"rank {self.rank}: {type(error).__name__}: {error}")
            raise

    @staticmethod
    def _lost(error: BaseException) -> bool:
        """Whether a collective failed because another rank is not there; gloo says it in words only."""
        words = ("Connection", "connection", "Timed out", "timed out", "Timeout", "timeout", "peer", "aborted")
        return isinstance(error, dist.DistError) or (
            type(error) is RuntimeError and any(word in str(error) for word in words)
        )

    def _cause_elsewhere(self, error: BaseException) -> str:
        cause = ""
        if self._store is not None:
            try:
                self._store.wait([_CAUSE], timedelta(seconds=1))
                cause = self._store.get(_CAUSE).decode()
            # nobody has left a word, or the store is gone with rank 0
            except (RuntimeError, dist.DistError):
                cause = ""
        first = str(error).partition("\n")[0]
        said = f"it ended with {cause}" if cause else "it was killed, hangs, or lost the network; torchrun names it"
        return f"rank {self.rank} of {self.world_size} lost another rank: {said} ({first})"


_ranks: Ranks | None = None


def ranks(timeout: float | None = None) -> Ranks:
    """The ranks that this process belongs to: those of the process group that is there, or that `torchrun` announces.

    Args:
        timeout: seconds in which a rank must reach the next collective, for a group that is made here; None: half an
            hour.

    Raises:
        ValueError: `torchrun --max-restarts` over several nodes without a store for every attempt; a timeout that is no
            time.
    """
    global _ranks
    timeout = TIMEOUT if timeout is None else timeout
    if not 0 < timeout <= LONGEST_WAIT:
        raise ValueError(f"timeout={timeout} must be above 0 and at most {LONGEST_WAIT:g} seconds, or None")
    if not dist.is_available():
        return Ranks()
    store = None
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        store = _join(timedelta(seconds=timeout))
        _ranks = None
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Ranks()
    if _ranks is None or (_ranks.rank, _ranks.world_size) != (dist.get_rank(), dist.get_world_size()):
        _ranks = ProcessGroup(store)
    return _ranks


def _join(timeout: timedelta) -> Any:
    """Make the process group that the environment variables of `torchrun` describe; its store."""
    several_nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    shared = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0") != "1"
    if several_nodes and restarts and shared:
        # nodes count restarts each for itself: their ranks would not find each other, and wait
        raise ValueError(
            "torchrun --max-restarts over several nodes works with a store of its own for every attempt only: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    # torchrun keeps its store over restarts, with the addresses of the ranks of the attempt before
    attempt = "any" if several_nodes else os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"attempt_{attempt}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    # its threads must end before the interpreter does
    atexit.register(_leave)
    return store


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        # what still refers to the group in a circle would end its threads too late, and with them the process
        gc.collect()


class Moments:
    """Mean and variance of observations or returns as they were when all ranks last agreed on them.

    Args:
        running: statistics that are equal on all ranks.
    """

    def __init__(self, running: RunningMeanStd) -> None:
        self._running = running
        self._note()

    def _note(self) -> None:
        self._mean, self._var = np.array(self._running.mean), np.array(self._running.var)
        self._count = float(self._running.count)

    def merge(self, group: Ranks) -> None:
        """Take in what every rank saw since, in the order of ranks, so that all have the same statistics to the bit."""
        running = self._running
        fresh = running.count - self._count
        seen = (self._mean, self._var, 0.0)
        if fresh > 0:
            # the formula of Chan et al. for the moments of two parts together, solved for the second part
            mean = (running.mean * running.count - self._mean * self._count) / fresh
            squares = running.var * running.count - self._var * self._count
            between = np.square(mean - self._mean) * self._count * fresh / running.count
            seen = (mean, np.maximum(squares - between, 0.0) / fresh, fresh)
        running.mean, running.var, running.count = np.array(self._mean), np.array(self._var), self._count
        for mean, var, count in group.gather(seen):
            if count > 0:
                running.update_from_moments(mean, var, count)
        self._note()
