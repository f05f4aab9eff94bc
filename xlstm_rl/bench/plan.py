"""The runs of a benchmark, each with its whole configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from xlstm_rl.bench.spec import AgentSpec, BenchSpec, TaskSpec
from xlstm_rl.configs import ConfigError, EnvConfig, MemoryConfig, TrainConfig, load
from xlstm_rl.configs.loading import differences
from xlstm_rl.envs import TaskFacts, TaskPurpose, longer, task_purpose
from xlstm_rl.runs.build import make_env, make_model, read_facts

# Times the training length, at which agents are measured.
LENGTHS = (4, 16)
# Bounds that lie closer together, in units of the optimum, are equal but for rounding.
SMALLEST_GAP = 1e-9
# Bounds with which a score is the mean return as it is.
RETURN_ITSELF = TaskFacts(horizon=0, optimal_return=1.0, memoryless_return=0.0)


@dataclass(frozen=True)
class Task:
    """What all agents of a task share.

    Attributes:
        name: in the benchmark.
        purpose: its ability and its length.
        facts: its known bounds.
        given_bounds: the known bounds come from the specification, and hold for the length of training only.
    """

    name: str
    purpose: TaskPurpose
    facts: TaskFacts
    given_bounds: bool

    @property
    def in_a_row(self) -> bool:
        """Whether several episodes in a row stand for longer ones, there being none with known bounds."""
        return self.given_bounds or self.purpose.length is None

    def score(self, mean_return: float) -> float:
        """0 for the best policy without memory, 1 for the optimum."""
        return score(mean_return, self.facts)


def lengthened(config: TrainConfig, task: Task, factor: int) -> tuple[TrainConfig, TaskFacts]:
    """The task at `factor` times its training length, for tasks that are not played in a row, and its bounds there.

    Raises:
        ConfigError: it cannot be made as long, or does not state its bounds then.
    """
    assert task.purpose.length is not None
    advice = f"give another length_parameter than {task.purpose.length!r}, or none to play several episodes in a row"
    try:
        kwargs = longer(config.env.id, config.env.kwargs, task.purpose.length, factor, odd=task.purpose.odd)
    except ValueError as error:
        raise ConfigError(f"task {task.name}: {error}; {advice}") from error
    env = dataclasses.replace(config.env, kwargs=kwargs)
    facts = read_facts(env)
    if facts is None:
        raise ConfigError(f"task {task.name}: {env.id!r} does not state its bounds at env.kwargs={kwargs}; {advice}")
    _check_gap(task.name, env, facts)
    return dataclasses.replace(config, env=env), facts


def score(mean_return: float, facts: TaskFacts) -> float:
    """0 for the best policy without memory, 1 for the optimum."""
    return (mean_return - facts.memoryless_return) / (facts.optimal_return - facts.memoryless_return)


@dataclass(frozen=True)
class PlannedRun:
    """One training run and where its traces lie."""

    task: Task
    agent: str
    config: TrainConfig
    out: Path

    @property
    def name(self) -> str:
        """Task, agent and seed."""
        return f"{self.task.name}/{self.agent}/{self.config.seed}"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.out / "runs" / self.name

    @property
    def record(self) -> Path:
        """What the worker measured, until results.json holds it."""
        return self.folder.with_name(f"{self.folder.name}.record.json")

    @property
    def failure(self) -> Path:
        """Why the run failed."""
        return self.folder.with_name(f"{self.folder.name}.failure.txt")

    @property
    def log(self) -> Path:
        """What the worker process printed."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def spent(self) -> Path:
        """CPU seconds of earlier starts of the run."""
        return self.folder.with_name(f"{self.folder.name}.spent.json")

    @property
    def begun_with(self) -> Path:
        """The fingerprint of the settings that the run in the run folder was begun with."""
        return self.folder.with_name(f"{self.folder.name}.fingerprint.txt")


def fingerprint(run: PlannedRun, spec: BenchSpec) -> str:
    """Equal for runs that were trained and measured with equal settings."""
    measured = (spec.long_episodes, spec.stop_score_of(run.task.name), spec.stop_evaluations)
    settings = json.dumps(_as_of_before(differences(run.config)), sort_keys=True)
    return hashlib.sha256(f"{settings}{_in_words(run.task)}{measured}".encode()).hexdigest()[:16]


def _as_of_before(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in the words of the first records, when a memory that set nothing was that of the paper, with recall."""
    memory = dict(settings.get("memory", {}))
    if memory.get("name", MemoryConfig.name) != "xlstm":
        return settings
    paper = memory.pop("defaults", "recommended") == "paper"
    memory = memory if paper else {**_SETTINGS_OF_GENERAL, **memory}
    if memory.get("init") == "recall":
        del memory["init"]
    return {**settings, "memory": memory}


_SETTINGS_OF_GENERAL = {
    "blocks": "sm",
    "slstm_num_heads": 1,
    "recurrent_std": 1.0,
    "slstm_forget_bias": [1.0, 1.0],
    "ffn_factor": 0.0,
    "conv_kernel": 32,
    "slstm_conv_kernel": 0,
}


def _in_words(task: Task) -> str:
    """The task in words that stay: fields may be renamed, and the records of before still be found."""
    purpose, facts = task.purpose, task.facts
    return (
        f"Task(name={task.name!r}, "
        f"purpose=TaskPurpose(ability={purpose.ability!r}, length={purpose.length!r}, odd={purpose.odd!r}), "
        f"facts=TaskFacts(horizon={facts.horizon!r}, optimal_return={facts.optimal_return!r}, "
        f"memoryless_return={facts.memoryless_return!r}), given_ends={task.given_bounds!r})"
    )


def plan_runs(spec: BenchSpec, out: Path, only: Sequence[str] = ()) -> list[PlannedRun]:
    """All runs, seed by seed, so that an early end leaves whole rounds.

    Args:
        spec: the benchmark.
        out: its folder.
        only: patterns "task/agent/seed"; parts may be left out or hold "*". None given takes all.

    Raises:
        ConfigError: a run cannot be configured, or no run fits a pattern.
    """
    pairs = [(task, agent, config) for task, configs in _configure(spec) for agent, config in configs.items()]
    runs = [
        PlannedRun(task, agent, dataclasses.replace(config, seed=seed), out)
        for seed in spec.seeds
        for task, agent, config in pairs
        if seed in spec.seeds_of(agent)
    ]
    return select_runs(runs, only)


def select_runs(runs: Sequence[PlannedRun], only: Sequence[str]) -> list[PlannedRun]:
    """The runs that fit a pattern, see `plan_runs`."""
    for pattern in only:
        if not any(_fits(run, pattern) for run in runs):
            raise ConfigError(f"--only {pattern!r} fits no run; the first is {runs[0].name!r}, parts may be '*'")
    return [run for run in runs if not only or any(_fits(run, pattern) for pattern in only)]


def _fits(run: PlannedRun, pattern: str) -> bool:
    parts = pattern.split("/")
    names = run.name.split("/")
    return len(parts) <= len(names) and all(map(fnmatchcase, names, parts))


def _configure(spec: BenchSpec) -> list[tuple[Task, dict[str, TrainConfig]]]:
    return [_configure_task(spec, name, task) for name, task in spec.tasks.items()]


def _configure_task(spec: BenchSpec, name: str, task: TaskSpec) -> tuple[Task, dict[str, TrainConfig]]:
    shared = {"eval.n_episodes": spec.episodes, **spec.set, **task.set}
    configs: dict[str, TrainConfig] = {}
    # those whose size others take come first
    for agent_name, agent in sorted(spec.agents.items(), key=lambda item: item[1].parameters_of is not None):
        try:
            config = _configure_agent(task.base or name, agent, shared)
            steps = round(agent.share_of_steps * config.total_steps)
            config = dataclasses.replace(config, total_steps=steps)
            if agent.parameters_of is not None:
                config = _match(config, configs[agent.parameters_of])
        except ConfigError as error:
            raise ConfigError(f"task {name}, agent {agent_name}: {error}") from error
        configs[agent_name] = config
    ordered = {agent: configs[agent] for agent in spec.agents}
    first = next(iter(ordered.values()))
    planned = _task(name, task, first.env, spec.score)
    if spec.long_episodes and not planned.in_a_row:
        # before anything is trained
        for factor in LENGTHS:
            lengthened(first, planned, factor)
    return planned, ordered


def _configure_agent(base: str, agent: AgentSpec, shared: Mapping[str, Any]) -> TrainConfig:
    config = load(base, _overrides({**shared, **agent.set}))
    if not agent.tuned:
        config = _untuned(config, agent)
    if agent.memory is None:
        return config
    settings = {key: value for key, value in agent.memory.items() if key != "name"}
    return dataclasses.replace(config, memory=MemoryConfig(agent.memory.get("name", MemoryConfig.name), settings))


def _overrides(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _untuned(config: TrainConfig, agent: AgentSpec) -> TrainConfig:
    """The general settings on the environment, budget and evaluation of `config`, with what the agent sets itself."""
    general = load(config.env.id, _overrides(agent.set))
    task = {name: getattr(config.env, name) for name in ("kwargs", "wrappers", "vec")}
    env = dataclasses.replace(general.env, **task)
    kept = {name: getattr(config, name) for name in ("total_steps", "eval", "checkpoint", "device", "threads")}
    return dataclasses.replace(general, env=env, **kept)


def _match(config: TrainConfig, target: TrainConfig) -> TrainConfig:
    """The configuration with a memory of as many parameters as the target's."""
    read_facts(target.env)
    with closing(make_env(target, 1, target.seed, here=True)) as env:
        memory = make_model(dataclasses.replace(target, device="cpu"), env).policy.memory_actor
    count = sum(parameter.numel() for parameter in memory.parameters())
    if count == 0:
        raise ConfigError(f"its parameters cannot be those of memory {target.memory.name!r}, which has none")
    settings = {key: value for key, value in config.memory.settings.items() if key != "hidden_size"}
    memory_config = MemoryConfig(config.memory.name, {**settings, "match_parameters": count})
    return dataclasses.replace(config, memory=memory_config)


def _task(name: str, task: TaskSpec, env: EnvConfig, scored: str) -> Task:
    purpose = task_purpose(env.id)
    if task.ability is not None:
        purpose = purpose._replace(ability=task.ability)
    if task.length_parameter is not None:
        purpose = purpose._replace(length=task.length_parameter)
    if scored == "return":
        return Task(name, purpose, RETURN_ITSELF, True)
    facts = read_facts(env)
    given = task.optimal_return is not None and task.memoryless_return is not None
    if task.optimal_return is not None and task.memoryless_return is not None:
        facts = TaskFacts(0 if facts is None else facts.horizon, task.optimal_return, task.memoryless_return)
    if facts is None:
        raise ConfigError(
            f"task {name}: {env.id!r} does not state its bounds, so returns make no score; give optimal_return and "
            "memoryless_return, or the benchmark `score: return`"
        )
    _check_gap(name, env, facts)
    return Task(name, purpose, facts, given)


def _check_gap(name: str, env: EnvConfig, facts: TaskFacts) -> None:
    """Refuse a task in which memory gains nothing, for a score divides by what it gains."""
    if not facts.optimal_return - facts.memoryless_return > SMALLEST_GAP * max(1.0, abs(facts.optimal_return)):
        raise ConfigError(
            f"task {name}: optimal_return={facts.optimal_return:.6g} of {env.id!r} at env.kwargs={dict(env.kwargs)} is "
            f"not above memoryless_return={facts.memoryless_return:.6g}, so that returns make no score; choose a size "
            "at which memory helps, or correct the bounds that the benchmark gives"
        )
