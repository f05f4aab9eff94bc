"""The configuration of a training run: frozen dataclasses that refuse impossible values."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from stable_baselines3.common.utils import LinearSchedule

from xlstm_rl.agents import XLSTMPolicy
from xlstm_rl.configs.errors import ConfigError, nearest
from xlstm_rl.memory import make_memory, memory_names


@dataclass(frozen=True)
class EnvConfig:
    """The task and how many copies of it run at once.

    Attributes:
        id: a gymnasium id.
        kwargs: keyword arguments of the environment.
        n_envs: copies stepped together.
        vec: "dummy" steps them one after the other in this process, "subproc" gives each its own process, "vector"
            takes the vectorised form that `gymnasium.make_vec` knows, or lets gymnasium step them where there is none.
        worker_timeout: seconds in which a process of "subproc" must answer; None waits forever.
        worker_restarts: how often a process that failed, died or hung is started again, per environment.
        normalize_observation, normalize_reward: running normalisation by SB3's VecNormalize; of observations the Box
            parts, but not images, which the network scales itself.
        memory_inputs: what the agent sees of the previous step beside the observation: any of "action", "reward" (not
            normalised) and "start".
    """

    id: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    n_envs: int = 16
    vec: Literal["dummy", "subproc", "vector"] = "dummy"
    worker_timeout: float | None = None
    worker_restarts: int = 0
    normalize_observation: bool = False
    normalize_reward: bool = False
    memory_inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _at_least("env", self, 1, "n_envs")
        for name in self.memory_inputs:
            if name not in ("action", "reward", "start"):
                raise ConfigError(f"env.memory_inputs has {name!r}; {nearest(name, ('action', 'reward', 'start'))}")
        _at_least("env", self, 0, "worker_restarts")
        _above("env", self, 0, "worker_timeout")
        _one_of("env", self, "vec", ("dummy", "subproc", "vector"))


@dataclass(frozen=True)
class MemoryConfig:
    """The memory core.

    Attributes:
        name: as `xlstm_rl.make_memory` knows it.
        settings: keyword arguments of the core; in YAML and overrides they stand beside `name`
            (`memory.hidden_size=64`).
    """

    name: str = "xlstm"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in memory_names():
            raise ConfigError(
                f"memory.name={self.name!r} is no memory; {nearest(self.name, memory_names())}; one of yours is "
                "known with the module that registers it: your_module:Env-v0"
            )
        width = self.settings.get("hidden_size")
        try:
            make_memory(self.name, width if isinstance(width, int) else 64, **self.settings)
        except TypeError as error:
            raise ConfigError(self._explain(error)) from error
        # Widths beyond the address space or the memory are a RuntimeError of torch.
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"memory {self.name!r}: {error}") from error

    def _explain(self, error: TypeError) -> str:
        known = memory_settings(self.name)
        unknown = [str(key) for key in self.settings if key not in known]
        if not unknown:
            return f"memory {self.name!r}: {error}"
        return f"unknown key memory.{unknown[0]} for memory {self.name!r}; {nearest(unknown[0], known)}"


@dataclass(frozen=True)
class PolicyConfig:
    """The networks around the memory.

    Attributes:
        critic_memory: "shared" uses the actor's memory for values, "separate" adds a second one, "none" gives the
            critic the observation only.
        net_arch: hidden layers after the memory, for actor and critic each; None takes the policy's default.
        kwargs: further keyword arguments of the policy, other than those that have a place of their own: the memory
            (`memory`), `critic_memory` (here) and `use_sde` (`ppo`).
    """

    critic_memory: Literal["shared", "separate", "none"] = "shared"
    net_arch: tuple[int, ...] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("policy", self, "critic_memory", ("shared", "separate", "none"))
        if any(width < 1 for width in self.net_arch or ()):
            raise ConfigError(f"policy.net_arch={list(self.net_arch or ())} must hold widths of at least 1")
        for key in self.kwargs:
            self._check_free(str(key))

    def _check_free(self, key: str) -> None:
        elsewhere = {
            "memory": "memory.name",
            "memory_kwargs": "memory",
            "critic_memory": "policy.critic_memory",
            "use_sde": "ppo.use_sde",
            "lr_schedule": "ppo.lr_schedule",
        } | ({} if self.net_arch is None else {"net_arch": "policy.net_arch"})
        if key in elsewhere:
            raise ConfigError(f"policy.kwargs.{key} is set elsewhere; use {elsewhere[key]}")
        known = set(inspect.signature(XLSTMPolicy).parameters) - {*elsewhere, "observation_space", "action_space"}
        if key not in known:
            raise ConfigError(f"unknown key policy.kwargs.{key}; {nearest(key, known)}")


@dataclass(frozen=True)
class PPOConfig:
    """Settings of `xlstm_rl.RecurrentPPO`, by the same names, with other defaults than its constructor has.

    The constructor keeps the defaults of sb3-contrib; these suit agents with memory: larger minibatches, fewer epochs,
    an entropy bonus and a falling learning rate.

    Attributes:
        n_steps: steps of each environment per rollout.
        seq_len: steps of a training chunk; None takes the whole rollout, but no more than `batch_size`.
        batch_size: environment steps per minibatch; None: the whole rollout.
        n_epochs: passes over a rollout.
        learning_rate: at the start of training.
        lr_schedule: "linear" lets the learning rate fall to 0 over the run, "constant" keeps it.
        gamma, gae_lambda: discount, and lambda of generalised advantage estimation.
        clip_range: of the probability ratio; clip_range_vf: of the value, in units of return, None for none.
        normalize_advantage: divide advantages by their deviation.
        advantage_floor: least divisor, against noise when all returns are nearly equal.
        grad_spike_factor: largest gradient norm as a multiple of the usual one; None for no such bound.
        ent_coef: weight of the entropy term; ent_schedule: "linear" lets it fall to 0 over the run.
        vf_coef: weight of the value term.
        max_grad_norm: gradients are scaled down to this norm.
        target_kl: stop a rollout's updates above 1.5 times this divergence; None never.
        on_nonfinite: NaN or infinity in observations, rewards or losses: "stop" ends training, "skip" skips the update
            or the rollout.
        refresh_state: recompute memory states at chunk starts between epochs.
        use_sde: state dependent exploration, for Box actions.
        sde_sample_freq: steps between new noise of it; None or -1: once a rollout.
        use_masking: choose among the actions that the environment's `action_masks()` allow; None: where it has them.
    """

    n_steps: int = 128
    seq_len: int | None = None
    batch_size: int | None = 512
    n_epochs: int = 4
    learning_rate: float = 3e-4
    lr_schedule: Literal["constant", "linear"] = "linear"
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    clip_range_vf: float | None = None
    normalize_advantage: bool = True
    advantage_floor: float = 0.1
    grad_spike_factor: float | None = 5.0
    ent_coef: float = 0.01
    ent_schedule: Literal["constant", "linear"] = "constant"
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    target_kl: float | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    refresh_state: bool = False
    use_sde: bool = False
    sde_sample_freq: int | None = None
    use_masking: bool | None = None

    def __post_init__(self) -> None:
        _at_least("ppo", self, 1, "n_steps", "seq_len", "batch_size", "n_epochs")
        if self.sde_sample_freq != -1:
            _at_least("ppo", self, 1, "sde_sample_freq")
        _above("ppo", self, 0, "learning_rate", "clip_range", "clip_range_vf", "max_grad_norm", "target_kl")
        _at_least("ppo", self, 0, "advantage_floor", "ent_coef", "vf_coef")
        _one_of("ppo", self, "lr_schedule", ("constant", "linear"))
        _one_of("ppo", self, "ent_schedule", ("constant", "linear"))
        _one_of("ppo", self, "on_nonfinite", ("stop", "skip"))
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"ppo.{name}={getattr(self, name)} must be between 0 and 1, such as 0.99")
        if self.seq_len is not None and self.seq_len > self.n_steps:
            raise ConfigError(
                f"ppo.seq_len={self.seq_len} must not exceed ppo.n_steps={self.n_steps}: a chunk lies within a "
                "rollout; raise ppo.n_steps or leave ppo.seq_len out"
            )

    def model_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the model constructor; what changes over the run as SB3's schedules."""
        arguments = dataclasses.asdict(self)
        for schedule, name in (("lr_schedule", "learning_rate"), ("ent_schedule", "ent_coef")):
            if arguments.pop(schedule) == "linear":
                arguments[name] = LinearSchedule(arguments[name], 0.0, 1.0)
        # SB3's word for "once a rollout".
        arguments["sde_sample_freq"] = -1 if self.sde_sample_freq is None else self.sde_sample_freq
        return arguments


def agent_arguments(memory: MemoryConfig, policy: PolicyConfig, ppo: PPOConfig) -> dict[str, Any]:
    """Keyword arguments of `xlstm_rl.RecurrentPPO` for a memory, the networks around it and their training."""
    policy_kwargs: dict[str, Any] = {
        "memory": memory.name,
        "memory_kwargs": dict(memory.settings),
        "critic_memory": policy.critic_memory,
        **policy.kwargs,
    }
    if policy.net_arch is not None:
        policy_kwargs["net_arch"] = list(policy.net_arch)
    return {**ppo.model_arguments(), "policy_kwargs": policy_kwargs}


@dataclass(frozen=True)
class EvalConfig:
    """Deterministic evaluation on fresh environments.

    Attributes:
        n_episodes: at the end of training.
        interim_episodes: during training.
        every_steps: environment steps between evaluations during training; None for none.
        n_envs: copies stepped together.
        success_return: an episode counts as success from this return on, for tasks that do not report success.
    """

    n_episodes: int = 100
    interim_episodes: int = 32
    every_steps: int | None = 20_000
    n_envs: int = 16
    success_return: float | None = None

    def __post_init__(self) -> None:
        _at_least("eval", self, 1, "n_episodes", "interim_episodes", "every_steps", "n_envs")


@dataclass(frozen=True)
class CheckpointConfig:
    """Models saved during training.

    Attributes:
        every_steps: environment steps between checkpoints; None for none.
        keep: older ones beyond this number are removed.
        replay: a resumed run plays the actions of the running episodes again to bring the environments to where they
            were; false starts new episodes, for environments where actions have effects outside.
    """

    every_steps: int | None = 50_000
    keep: int = 3
    replay: bool = True

    def __post_init__(self) -> None:
        _at_least("checkpoint", self, 1, "every_steps", "keep")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run.

    Attributes:
        description: one line for `xlstm-rl list`.
        total_steps: environment steps, rounded up to whole rollouts.
        seed: of the model, and of the environments with offsets.
        device: as torch knows it, or "auto"; whether this machine has it is checked by training.
        threads: torch threads; None leaves torch's choice.
    """

    env: EnvConfig
    description: str | None = None
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    total_steps: int = 300_000
    seed: int = 0
    device: str = "cpu"
    threads: int | None = 1

    def __post_init__(self) -> None:
        _at_least("", self, 1, "total_steps", "threads")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed={self.seed} must be from 0 to 2**31 - 1")
        self._check_device()
        self._check_batch()

    def _check_device(self) -> None:
        if self.device == "auto":
            return
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ConfigError(f"device={self.device!r} is none that torch knows; use auto, cpu or cuda") from error

    def _check_batch(self) -> None:
        if self.ppo.batch_size is None:
            return
        rollout, chunk = self.ppo.n_steps * self.env.n_envs, self.ppo.seq_len or 1
        if self.ppo.batch_size > rollout:
            raise ConfigError(
                f"ppo.batch_size={self.ppo.batch_size} must not exceed the {rollout} steps of a rollout (ppo.n_steps="
                f"{self.ppo.n_steps} x env.n_envs={self.env.n_envs}); lower it or raise one of those"
            )
        if self.ppo.batch_size < chunk:
            raise ConfigError(
                f"ppo.batch_size={self.ppo.batch_size} counts environment steps and must hold at least one chunk of "
                f"{chunk} steps; raise it or lower ppo.seq_len"
            )


def memory_settings(memory: str) -> list[str]:
    """Names of the settings of a memory, which stand beside its name."""
    core = make_memory(memory, 64)
    config = getattr(core, "config", None)
    if dataclasses.is_dataclass(config):
        return [f.name for f in dataclasses.fields(config)]
    parameters = inspect.signature(type(core)).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is not parameter.empty]


def _label(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _at_least(section: str, config: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{_label(section, name)}={value} must be at least {least}")


def _above(section: str, config: object, bound: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > bound:
            raise ConfigError(f"{_label(section, name)}={value} must be greater than {bound}")


def _one_of(section: str, config: object, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise ConfigError(f"{_label(section, name)}={value!r} is not allowed; {nearest(str(value), allowed)}")
