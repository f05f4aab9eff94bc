"""The configuration of a training run: frozen settings that refuse impossible values."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator
from pydantic_core import ArgsKwargs

from xlstm_rl.configs.source import constant, constructor_defaults
from xlstm_rl.configs.validation import (
    NOTHING_MADE,
    Count,
    Flag,
    Natural,
    Positive,
    Real,
    Share,
    Weight,
    Whole,
    Word,
    nearest,
    plain,
    settings,
)

# Agents, memories and torch are imported where they are needed: to show a preset takes none of them.

# Beyond these no run is meant: processes and copies of an environment, layers, threads.
_MOST_PROCESSES, _MOST_COPIES, _MOST_LAYERS, _MOST_THREADS = 4096, 2**17, 1000, 1024
# Of every weight: itself, its gradient and what Adam keeps.
_BYTES_PER_WEIGHT = 16

Copies = Annotated[Count, Field(le=_MOST_COPIES)]
Seconds = Annotated[Positive, Field(le=constant("vec_envs/guarded_vec_env.py", "LONGEST_WAIT"))]

START_SECONDS: float = constant("vec_envs/guarded_vec_env.py", "START_SECONDS")
MAX_EPISODE_STEPS: int = constant("agents/evaluation.py", "MAX_EPISODE_STEPS")
_CONSTRUCTOR = constructor_defaults("agents/ppo.py", "RecurrentPPO")


def _default(name: str) -> Any:
    """Of the constructor of `RecurrentPPO`, the one place where defaults of the algorithm are written down."""
    return _CONSTRUCTOR[name]


def _no_arguments(arguments: Any) -> Any:
    """Nothing after the name means a wrapper without arguments."""
    return {} if arguments is None else arguments


@settings
class EnvConfig:
    """The task and how many copies of it run at once.

    Attributes:
        id: a gymnasium id.
        kwargs: keyword arguments of the environment.
        wrappers: keyword arguments of wrappers around it by name, the innermost first: of this package (HideVelocity,
            HidePosition, NoisyObservation, DropObservation, DelayAction), of `gymnasium.wrappers`, or "module:Class".
        n_envs: copies stepped together.
        vec: "dummy" steps them one after the other in this process, "subproc" gives each its own process, "vector"
            takes the vectorised form that `gymnasium.make_vec` knows, and where there is none does what "dummy" does.
        worker_timeout: seconds in which a process of "subproc" must answer; None waits forever.
        worker_start_timeout: seconds in which it must have started and made its environment; None waits forever.
        worker_restarts: how often a process that failed, died or hung is started again, per environment.
        normalize_observation, normalize_reward: running normalisation by SB3's VecNormalize; of observations the Box
            parts, but not images, which the network scales itself.
        memory_inputs: what the agent sees of the previous step beside the observation: any of "action", "reward" (not
            normalised) and "start".
    """

    id: Word
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    wrappers: Mapping[Word, Annotated[Mapping[Word, Any], BeforeValidator(_no_arguments)]] = field(default_factory=dict)
    n_envs: Copies = 16
    vec: Literal["dummy", "subproc", "vector"] = "dummy"
    worker_timeout: Seconds | None = None
    worker_start_timeout: Seconds | None = START_SECONDS
    worker_restarts: Natural = 0
    normalize_observation: Flag = False
    normalize_reward: Flag = False
    memory_inputs: tuple[Literal["action", "reward", "start"], ...] = ()

    @model_validator(mode="after")
    def _can_have_processes(self) -> EnvConfig:
        if self.vec == "subproc" and self.n_envs > _MOST_PROCESSES:
            raise ValueError(
                f"env.n_envs={self.n_envs} is more than the {_MOST_PROCESSES} processes that env.vec='subproc' may "
                "start; take fewer, or another env.vec"
            )
        return self


@settings
class MemoryConfig:
    """The memory core.

    Attributes:
        name: as `xlstm_rl.make_memory` knows it.
        settings: keyword arguments of the core; in YAML and overrides they stand beside `name`
            (`memory.hidden_size=64`).
    """

    name: Word = "xlstm"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _beside_the_name(cls, values: Any) -> Any:
        if isinstance(values, ArgsKwargs) or not isinstance(values, Mapping):
            return values
        rest = {str(key): value for key, value in values.items() if key != "name"}
        return {"settings": rest, **({"name": values["name"]} if "name" in values else {})}

    @model_validator(mode="after")
    def _can_be_made(self, info: ValidationInfo) -> MemoryConfig:
        if (self.name == MemoryConfig.name and not self.settings) or info.context == NOTHING_MADE:
            # the default can
            return self
        import torch

        from xlstm_rl.memory import make_memory, memory_names
        from xlstm_rl.memory.config import check_fits

        if self.name not in memory_names():
            raise ValueError(
                f"memory.name={self.name!r} is no memory; {nearest(self.name, memory_names())}; one of yours is "
                "known with the module that registers it: your_module:Env-v0"
            )
        self._check_layers()
        width = self.settings.get("hidden_size")
        try:
            # nothing is allocated there
            with torch.device("meta"):
                core: Any = make_memory(self.name, width if isinstance(width, int) else 64, **self.settings)
            weights = sum(weight.numel() for weight in core.parameters())
            check_fits(f"memory {self.name!r} of {weights:,} weights", _BYTES_PER_WEIGHT * weights)
            check_fits(f"memory {self.name!r} of {core.state_size:,} numbers for an environment", 4 * core.state_size)
        except TypeError as error:
            raise ValueError(self._explain(error)) from error
        # Widths beyond the address space are a RuntimeError of torch.
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"memory {self.name!r}: {error}") from error
        return self

    def _check_layers(self) -> None:
        """Layers are made one by one."""
        layers, blocks = self.settings.get("num_layers", 1), self.settings.get("blocks", "")
        count = max(layers if isinstance(layers, int) else 1, len(blocks) if isinstance(blocks, str) else 1)
        if count > _MOST_LAYERS:
            raise ValueError(f"memory {self.name!r} of {count} layers is more than the {_MOST_LAYERS} that are allowed")

    def as_mapping(self) -> dict[str, Any]:
        """As it stands in YAML."""
        return {"name": self.name, **self.settings}

    @staticmethod
    def known_keys() -> list[str]:
        """Keys in YAML, for the memory that is there unless another is named."""
        return ["name", *memory_settings("xlstm")]

    def _explain(self, error: TypeError) -> str:
        known = memory_settings(self.name)
        unknown = [str(key) for key in self.settings if key not in known]
        if not unknown:
            return f"memory {self.name!r}: {error}"
        return f"unknown key memory.{unknown[0]} for memory {self.name!r}; {nearest(unknown[0], known)}"


@settings
class PolicyConfig:
    """The networks around the memory.

    Attributes:
        critic_memory: "shared" uses the actor's memory for values, "separate" adds a second one, "none" gives the
            critic the observation only.
        net_arch: hidden layers after the memory, for actor and critic each; None takes the policy's default.
        features_extractor: what turns observations into features: "flatten", "nature" (the usual network for images),
            "combined" (Dict observations) or "module:Class" for one of yours; None chooses by the observations.
        actor_keys, critic_keys: parts of Dict observations that actor and critic see; None: all.
        kwargs: further keyword arguments of the policy, other than those that have a place of their own: the memory
            (`memory`), `critic_memory` and `extra_losses` (here) and `use_sde` (`ppo`).
        extra_losses: losses beside PPO's by the name under which `xlstm_rl.register_loss` knows them, each with its
            settings and its `weight`.
    """

    critic_memory: Literal["shared", "separate", "none"] = "shared"
    net_arch: tuple[Count, ...] | None = None
    features_extractor: Word | None = None
    actor_keys: tuple[Word, ...] | None = None
    critic_keys: tuple[Word, ...] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    extra_losses: Mapping[Word, Mapping[Word, Any]] = field(default_factory=dict)

    @model_validator(mode="after")
    def _keys_are_free(self, info: ValidationInfo) -> PolicyConfig:
        if self.net_arch is not None and info.context != NOTHING_MADE:
            self._check_widths(self.net_arch)
        for key in self.kwargs:
            self._check_free(str(key))
        if self.features_extractor is not None:
            from xlstm_rl.agents.features import find_extractor

            find_extractor(self.features_extractor)
        return self

    @staticmethod
    def _check_widths(widths: tuple[int, ...]) -> None:
        from xlstm_rl.memory.config import check_fits

        weights = sum(before * after for before, after in zip(widths, widths[1:], strict=False))
        check_fits(f"policy.net_arch={list(widths)[:5]} of {weights:,} weights", 2 * _BYTES_PER_WEIGHT * weights)
        check_fits(f"policy.net_arch={list(widths)[:5]}", 2 * _BYTES_PER_WEIGHT * max(widths, default=0))

    def _check_free(self, key: str) -> None:
        from xlstm_rl.agents import XLSTMPolicy

        elsewhere = {
            "memory": "memory.name",
            "memory_kwargs": "memory",
            "critic_memory": "policy.critic_memory",
            "extra_losses": "policy.extra_losses",
            "actor_keys": "policy.actor_keys",
            "critic_keys": "policy.critic_keys",
            "features_extractor_class": "policy.features_extractor",
            "use_sde": "ppo.use_sde",
            "lr_schedule": "ppo.lr_schedule",
        } | ({} if self.net_arch is None else {"net_arch": "policy.net_arch"})
        if key in elsewhere:
            raise ValueError(f"policy.kwargs.{key} is set elsewhere; use {elsewhere[key]}")
        known = set(inspect.signature(XLSTMPolicy).parameters) - {*elsewhere, "observation_space", "action_space"}
        if key not in known:
            raise ValueError(f"unknown key policy.kwargs.{key}; {nearest(key, known)}")


@settings
class PPOConfig:
    """Settings of `xlstm_rl.RecurrentPPO`, by the same names and with the same defaults, those of sb3-contrib.

    What suits agents with memory better stands in general.yaml: larger minibatches, fewer epochs, an entropy bonus.

    Attributes:
        n_steps: steps of each environment per rollout.
        seq_len: steps of a training chunk; None takes the whole rollout, but no more than `batch_size`.
        batch_size: environment steps per minibatch; None: the whole rollout.
        n_epochs: passes over a rollout.
        learning_rate: at the start of training.
        lr_schedule: "constant" keeps the learning rate, "linear" lets it fall to 0 over the run, "late" over the last
            three tenths.
        gamma, gae_lambda: discount, and lambda of generalised advantage estimation.
        clip_range: of the probability ratio; clip_range_vf: of the value, in units of return, None for none.
        normalize_advantage: divide advantages by their deviation.
        advantage_floor: least divisor, against noise when all returns are nearly equal.
        mix_advantages: mix advantages of several lambdas, and of the next reward alone, by their gradients' ratio of
            signal to noise; gae_lambda is then that of the critic's targets alone.
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

    n_steps: Count = _default("n_steps")
    seq_len: Count | None = _default("seq_len")
    batch_size: Count | None = _default("batch_size")
    n_epochs: Count = _default("n_epochs")
    learning_rate: Positive = _default("learning_rate")
    lr_schedule: Literal["constant", "linear", "late"] = "constant"
    gamma: Share = _default("gamma")
    gae_lambda: Share = _default("gae_lambda")
    clip_range: Positive = _default("clip_range")
    clip_range_vf: Positive | None = _default("clip_range_vf")
    normalize_advantage: Flag = _default("normalize_advantage")
    advantage_floor: Weight = _default("advantage_floor")
    mix_advantages: Flag = _default("mix_advantages")
    grad_spike_factor: Positive | None = _default("grad_spike_factor")
    ent_coef: Weight = _default("ent_coef")
    ent_schedule: Literal["constant", "linear"] = "constant"
    vf_coef: Weight = _default("vf_coef")
    max_grad_norm: Positive = _default("max_grad_norm")
    target_kl: Positive | None = _default("target_kl")
    on_nonfinite: Literal["stop", "skip"] = _default("on_nonfinite")
    refresh_state: Flag = _default("refresh_state")
    use_sde: Flag = _default("use_sde")
    sde_sample_freq: Whole | None = None
    use_masking: Flag | None = _default("use_masking")

    @model_validator(mode="after")
    def _chunk_fits(self) -> PPOConfig:
        if self.sde_sample_freq is not None and self.sde_sample_freq != -1 and self.sde_sample_freq < 1:
            raise ValueError(f"ppo.sde_sample_freq={self.sde_sample_freq} must be at least 1, or -1: once a rollout")
        if self.seq_len is not None and self.seq_len > self.n_steps:
            raise ValueError(
                f"ppo.seq_len={self.seq_len} must not exceed ppo.n_steps={self.n_steps}: a chunk lies within a "
                "rollout; raise ppo.n_steps or leave ppo.seq_len out"
            )
        return self

    def model_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the model constructor; what changes over the run as SB3's schedules."""
        from stable_baselines3.common.utils import LinearSchedule

        from xlstm_rl.agents.losses import LateSchedule

        arguments = dataclasses.asdict(self)
        for schedule, name in (("lr_schedule", "learning_rate"), ("ent_schedule", "ent_coef")):
            kind = arguments.pop(schedule)
            if kind == "linear":
                arguments[name] = LinearSchedule(arguments[name], 0.0, 1.0)
            elif kind == "late":
                arguments[name] = LateSchedule(arguments[name])
        # SB3's word for "once a rollout".
        arguments["sde_sample_freq"] = -1 if self.sde_sample_freq is None else self.sde_sample_freq
        return arguments


def agent_arguments(memory: MemoryConfig, policy: PolicyConfig, ppo: PPOConfig) -> dict[str, Any]:
    """Keyword arguments of `xlstm_rl.RecurrentPPO` for a memory, the networks around it and their training."""
    from xlstm_rl.agents.checkpoint import class_by_word
    from xlstm_rl.agents.features import find_extractor

    modules = {"activation_fn": "torch.nn", "optimizer_class": "torch.optim"}
    named = {
        key: class_by_word(value, modules[key])
        for key, value in policy.kwargs.items()
        if key in modules and isinstance(value, str)
    }
    policy_kwargs: dict[str, Any] = {
        "memory": memory.name,
        "memory_kwargs": dict(memory.settings),
        "critic_memory": policy.critic_memory,
        **policy.kwargs,
        **named,
    }
    if policy.net_arch is not None:
        policy_kwargs["net_arch"] = list(policy.net_arch)
    if policy.features_extractor is not None:
        policy_kwargs["features_extractor_class"] = find_extractor(policy.features_extractor)
    for name in ("actor_keys", "critic_keys"):
        if getattr(policy, name) is not None:
            policy_kwargs[name] = list(getattr(policy, name))
    if policy.extra_losses:
        policy_kwargs["extra_losses"] = plain(policy.extra_losses)
    return {**ppo.model_arguments(), "policy_kwargs": policy_kwargs}


_PARTS = Literal["extractor", "memory", "heads"]


@settings
class InitConfig:
    """What a new agent starts from, other than chance.

    Attributes:
        source: in YAML and overrides `from`: a run folder, or a file of an agent, whose weights are taken as far as
            they fit; None starts from nothing.
        parts: which of its weights.
        freeze: which are not trained.
    """

    source: Word | None = None
    parts: tuple[_PARTS, ...] = ("extractor", "memory", "heads")
    freeze: tuple[_PARTS, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _from_is_a_word_of_python(cls, values: Any) -> Any:
        if isinstance(values, ArgsKwargs) or not isinstance(values, Mapping):
            return values
        return {{"from": "source"}.get(str(key), str(key)): value for key, value in values.items()}

    @model_validator(mode="after")
    def _is_of_use(self) -> InitConfig:
        if self.source is None and self.freeze:
            raise ValueError(f"init.freeze={list(self.freeze)} would train nothing of what chance gave; give init.from")
        if not self.parts:
            raise ValueError("init.parts=[] takes nothing; leave init.from out")
        return self

    def as_mapping(self) -> dict[str, Any]:
        """Values by key, as in YAML."""
        return {"from": self.source, "parts": self.parts, "freeze": self.freeze}

    @staticmethod
    def known_keys() -> list[str]:
        """As in YAML."""
        return ["from", "parts", "freeze"]


@settings
class EvalConfig:
    """Deterministic evaluation on fresh environments.

    Attributes:
        n_episodes: at the end of training.
        interim_episodes: during training.
        every_steps: environment steps between evaluations during training; None for none.
        n_envs: copies stepped together.
        max_episode_steps: an episode is cut there, and the result says so; None: never.
        max_steps: an evaluation begins no more episodes after so many steps; None: as many as asked for.
        success_return: an episode counts as success from this return on, for tasks that do not report success.
    """

    n_episodes: Count = 100
    interim_episodes: Count = 32
    every_steps: Count | None = 20_000
    n_envs: Copies = 16
    max_episode_steps: Count | None = MAX_EPISODE_STEPS
    max_steps: Count | None = 100_000
    success_return: Real | None = None


@settings
class CheckpointConfig:
    """Models saved during training.

    Attributes:
        every_steps: environment steps between checkpoints; None for none.
        keep: older ones beyond this number are removed.
        replay: a resumed run plays the actions of the running episodes again to bring the environments to where they
            were; false starts new episodes, for environments where actions have effects outside.
    """

    every_steps: Count | None = 50_000
    keep: Count = 3
    replay: Flag = True


@settings
class LoggingConfig:
    """Where the numbers of a run go beside its folder, and callbacks of yours.

    Attributes:
        trackers: any of "tensorboard" (events in the run folder), "wandb" (Weights & Biases) and "mlflow"; the latter
            two find their server by their own environment variables (WANDB_MODE, MLFLOW_TRACKING_URI and so on).
        project: of Weights & Biases; the experiment of MLflow.
        video_episodes: filmed after training for "wandb" and "mlflow"; 0 for none.
        callbacks: keyword arguments of callbacks of Stable-Baselines3, by "module:Class"; each process has its own.
    """

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    project: Word = "xlstm_rl"
    video_episodes: Natural = 0
    callbacks: Mapping[Word, Annotated[Mapping[Word, Any], BeforeValidator(_no_arguments)]] = field(
        default_factory=dict
    )


@settings
class TrainConfig:
    """Everything that decides a training run.

    Attributes:
        description: one line for `xlstm-rl list`.
        total_steps: environment steps, rounded up to whole rollouts.
        seed: of the model, and of the environments with offsets.
        device: as torch knows it, or "auto"; whether this machine has it is checked by training.
        threads: torch threads; None leaves torch's choice.
        rank_timeout: seconds in which each of several processes (torchrun) must come to where all meet, once a rollout
            and once a minibatch; rank 0 evaluates in between.
    """

    env: EnvConfig
    description: Word | None = None
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    init: InitConfig = field(default_factory=InitConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    total_steps: Count = 300_000
    seed: Annotated[Natural, Field(lt=2**31)] = 0
    device: Word = "cpu"
    threads: Annotated[Count, Field(le=_MOST_THREADS)] | None = 1
    rank_timeout: Seconds = 1800.0

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        self._check_device()
        self._check_batch()
        return self

    def _check_device(self) -> None:
        if self.device in ("auto", "cpu", "cuda"):
            return
        import torch

        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device={self.device!r} is none that torch knows; use auto, cpu or cuda") from error

    def _check_batch(self) -> None:
        if self.ppo.batch_size is None:
            return
        rollout, chunk = self.ppo.n_steps * self.env.n_envs, self.ppo.seq_len or 1
        if self.ppo.batch_size > rollout:
            raise ValueError(
                f"ppo.batch_size={self.ppo.batch_size} must not exceed the {rollout} steps of a rollout (ppo.n_steps="
                f"{self.ppo.n_steps} x env.n_envs={self.env.n_envs}); lower it or raise one of those"
            )
        if self.ppo.batch_size < chunk:
            raise ValueError(
                f"ppo.batch_size={self.ppo.batch_size} counts environment steps and must hold at least one chunk of "
                f"{chunk} steps; raise it or lower ppo.seq_len"
            )


def memory_settings(memory: str) -> list[str]:
    """Names of the settings of a memory, which stand beside its name."""
    from xlstm_rl.memory import make_memory

    core = make_memory(memory, 64)
    config = getattr(core, "config", None)
    parameters = inspect.signature(type(core)).parameters.values()
    own = [parameter.name for parameter in parameters if parameter.default is not parameter.empty]
    if dataclasses.is_dataclass(config):
        return [*(name for name in own if name != "config"), *(f.name for f in dataclasses.fields(config))]
    return own
